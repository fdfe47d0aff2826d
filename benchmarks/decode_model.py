"""Milliseconds per token of whole models through `generate` with a static cache, and the largest batches that fit.

python benchmarks/decode_model.py [--only converted,gqa,deepseek_v3] [--shapes 16x16384,...] [--layers 8] [--out FILE] [--tiny]

Three models of the width of Llama-3-8B with random weights in bfloat16: the Llama with grouped queries (gqa), that Llama converted
to a latent of 512 and a rotary key of 64 (converted), and Transformers' DeepSeek-V3 of the same shape (deepseek_v3). What is
timed is `generate` with a static cache (`step_time.py`).

The largest batch is found by trying, each model alone on the GPU: allocate a static cache and take one step, not compiled.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from llama_width import DEVICE, machine, make_model
from step_time import SPARE, WARM_UP, measure
from transformers import PreTrainedModel, StaticCache

from hf_mla.cache_mla import CACHE_NAME
from hf_mla_conversion.commands.bench import free_memory


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", default="converted,gqa,deepseek_v3")
parser.add_argument(
    "--shapes", default="16x16384,1x2048,1x65536,64x8192", help="batch x context, separated by commas; may be empty"
)
parser.add_argument("--long", type=int, default=32768, help="the context whose largest batch is looked for; 0 for none")
parser.add_argument("--layers", type=int, default=8)
parser.add_argument("--steps", type=int, default=32, help=f"measured tokens, at most {SPARE - WARM_UP}")
parser.add_argument("--out", help="a JSON file to write, after every row")
parser.add_argument("--tiny", action="store_true", help="small models, to try the script on a CPU (with small --shapes and --long)")
arguments = parser.parse_args()


@torch.no_grad()
def fits(model: PreTrainedModel, batch: int, context: int) -> bool:
    """Whether a static cache of this size and a step over it fit in memory."""
    free_memory()
    ids = torch.zeros(batch, 1, dtype=torch.long, device=DEVICE)
    try:
        model(ids, **{CACHE_NAME: StaticCache(model.config, max_cache_len=context)}, logits_to_keep=1)
    except torch.OutOfMemoryError:
        return False
    return True


def largest_batch(model: PreTrainedModel, context: int) -> int:
    """The largest batch that fits, by doubling and bisecting; a CPU stops at 8."""
    most, least_too_large = 0, 1
    while fits(model, least_too_large, context):
        most, least_too_large = least_too_large, 2 * least_too_large
        if DEVICE == "cpu" and most == 8:
            return most
    while least_too_large - most > 1:
        middle = (most + least_too_large) // 2
        if fits(model, middle, context):
            most = middle
        else:
            least_too_large = middle
    return most


def save() -> None:
    """Write what there is."""
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")


names = arguments.only.split(",")
rows: list[dict[str, Any]] = []
largest: dict[str, int] = {}
report: dict[str, Any] = {"machine": machine(), "layers": arguments.layers, "rows": rows}
report[f"largest_batch_at_{arguments.long // 1024}k"] = largest
print(report["machine"])

torch.manual_seed(0)
shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",") if shape]
models = {name: make_model(name, arguments.layers, arguments.tiny) for name in names} if shapes else {}
for batch, context in shapes:
    row: dict[str, Any] = {"batch": batch, "context": context}
    rows.append(row)
    for name, model in models.items():
        measured = measure(model, batch, context, arguments.steps)
        for key, value in measured.items():
            row.setdefault(key, {})[name] = value
        print(f"{batch:4} x {context:6} {name:12}", measured, flush=True)
        save()

models.clear()
for name in names if arguments.long else []:
    model = make_model(name, arguments.layers, arguments.tiny)
    largest[name] = largest_batch(model, arguments.long)
    print(f"largest batch at {arguments.long}: {name} {largest[name]}", flush=True)
    save()
    del model
