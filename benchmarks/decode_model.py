"""Milliseconds per token of whole models through `generate` with a static cache, and the largest batches that fit.

python benchmarks/decode_model.py [--only converted,gqa,deepseek_v3] [--shapes 16x16384,...] [--layers 8] [--out FILE] [--tiny]

Three models of the width of Llama-3-8B with random weights in bfloat16: the Llama with grouped queries (gqa), that Llama converted
to a latent of 512 and a rotary key of 64 (converted), and Transformers' DeepSeek-V3 of the same shape (deepseek_v3). `generate`
continues from a static cache that holds random numbers for all of the context but its last token, and compiles the step by itself
as it does for every static cache on a GPU, anew for each row: what it is called with is what a user calls it with, and a token's
time is all that passes from one to the next at a streamer. The first token, which `generate` computes without compiling, and those
in which it compiles and records CUDA graphs are left out; their seconds are in the JSON as `start_seconds`. Of the rest, the
median and the 10th and 90th percentiles. A model that cannot be compiled runs as it is, with a note.

The largest batch is found by trying, each model alone on the GPU: allocate a static cache and take one step, not compiled.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from llama_width import DEVICE, machine, make_model
from transformers import PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

from hf_mla.cache_mla import CACHE_NAME
from hf_mla_conversion.commands.bench import free_memory


SPARE = 64  # tokens of the static cache beyond the context
WARM_UP = 6  # tokens: the first, compiling, recording, and some more

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


class Clock(BaseStreamer):
    """Notes when tokens arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then a token of every sequence."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


@torch.no_grad()
def filled_cache(model: PreTrainedModel, ids: torch.Tensor) -> StaticCache:
    """A static cache that holds random numbers for all tokens [B, S] but the last."""
    cache = StaticCache(model.config, max_cache_len=ids.shape[1] + SPARE)
    model(ids[:, :1], **{CACHE_NAME: cache})  # allocates
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(ids.shape[1] - 1)
    return cache


def generate(model: PreTrainedModel, batch: int, context: int, eager: bool) -> dict[str, Any]:
    """Generate, and say how long the tokens took and what was compiled."""
    free_memory()
    torch._dynamo.utils.counters.clear()
    ids, clock = torch.randint(32000, (batch, context), device=DEVICE), Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE_NAME: filled_cache(model, ids)},
        max_new_tokens=WARM_UP + arguments.steps,
        do_sample=False,
        disable_compile=eager,
        streamer=clock,
    )
    seconds = [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)]
    steady = sorted(1000 * second for second in seconds[WARM_UP:])
    deciles = statistics.quantiles(steady, n=10)
    counters = torch._dynamo.utils.counters
    return {
        "milliseconds_per_token": statistics.median(steady),
        "spread": [deciles[0], deciles[-1]],
        "start_seconds": sum(seconds[:WARM_UP]),
        "compiled": {
            "graphs": counters["stats"]["unique_graphs"],
            "graph_breaks": sum(counters["graph_break"].values()),
            "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
        },
    }


def measure(model: PreTrainedModel, batch: int, context: int) -> dict[str, Any]:
    """`generate` as it is, else without compiling, else nothing; with a note where it is not the first."""
    notes = []
    for eager in (False, True):
        try:
            return generate(model, batch, context, eager) | ({"note": "; ".join(notes)} if notes else {})
        except Exception as error:  # out of memory, or whatever a compiler says
            notes.append(f"{'not compiled' if eager else 'compiled'}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return {"milliseconds_per_token": None, "note": "; ".join(notes)}


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
        measured = measure(model, batch, context)
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
