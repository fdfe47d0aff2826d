"""Speed of training and of prefill: a model with MLA against the Llama with grouped queries that it is converted from.

python benchmarks/training.py [--layers 4] [--steps 7] [--out FILE] [--tiny]

Both have the width of Llama-3-8B and random weights in bfloat16, and take turns: a step of one, a step of the other. A step of
training is forward, backward and fused AdamW on 16,384 tokens; prefill is a forward pass that fills a cache. Ratios are tokens
per second of the converted model over those of the original, of medians; in brackets the least and the greatest of all turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llama_width import DEVICE, machine, make_model, synchronize


NAMES = ("gqa", "converted")
TRAINING = [(16, 1024), (2, 8192)]  # sequences and tokens of each
PREFILL = [(1, 8192), (4, 2048)]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--steps", type=int, default=7, help="measured steps of each; two more go before them")
parser.add_argument("--out", help="a JSON file to write")
parser.add_argument("--tiny", action="store_true", help="small models and short sequences, to try the script on a CPU")
arguments = parser.parse_args()


def training_step(name: str, ids: torch.Tensor) -> None:
    """Forward, backward and AdamW on [B, T]."""
    loss = models[name](ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizers[name].step()
    optimizers[name].zero_grad()


@torch.no_grad()
def prefill(name: str, ids: torch.Tensor) -> None:
    """A forward pass over [B, T] that fills a cache."""
    models[name](ids, use_cache=True, logits_to_keep=1)


def measure(step: Callable[[str, torch.Tensor], None], batch: int, tokens: int, **labels: Any) -> None:
    """Time both models' steps in turn; print and keep a row."""
    ids = torch.randint(32000, (batch, tokens), device=DEVICE)
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(-2, arguments.steps):
        for name in NAMES:
            synchronize()
            start = time.perf_counter()
            step(name, ids)
            synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    rates = {name: [ids.numel() / second for second in seconds[name]] for name in NAMES}
    ratios = [converted / gqa for gqa, converted in zip(rates["gqa"], rates["converted"], strict=True)]
    medians = {name: statistics.median(rates[name]) for name in NAMES}
    row = {**labels, "batch": batch, "tokens": tokens, "tokens_per_second": medians}
    row |= {"spread": {name: [min(rates[name]), max(rates[name])] for name in NAMES}}
    row |= {"ratio": medians["converted"] / medians["gqa"], "ratio_spread": [min(ratios), max(ratios)]}
    label = labels["what"] + (", checkpointing" if labels.get("gradient_checkpointing") else "")
    cells = [f"{medians[name]:,.0f} [{min(rates[name]):,.0f} .. {max(rates[name]):,.0f}]" for name in NAMES]
    cells.append(f"{row['ratio']:.3f} [{min(ratios):.3f} .. {max(ratios):.3f}]")
    print(f"{label:26}{batch:4} x {tokens:5}" + "".join(f"{cell:>34}" for cell in cells), flush=True)
    rows.append(row)


torch.manual_seed(0)
rows: list[dict[str, Any]] = []
models = {name: make_model(name, arguments.layers, arguments.tiny) for name in NAMES}
shrink = 64 if arguments.tiny else 1
print(machine())
print(f"{'':38}" + "".join(f"{head:>34}" for head in ("gqa, tokens/s", "converted, tokens/s", "ratio")))
for batch, tokens in PREFILL:
    measure(prefill, batch, tokens // shrink, what="prefill")
optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) for name, model in models.items()}
for checkpointing in (False, True):
    for model in models.values():
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
    for batch, tokens in TRAINING:
        measure(training_step, batch, tokens // shrink, what="training", gradient_checkpointing=checkpointing)
if DEVICE == "cuda":
    print(f"peak memory, both models: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
if arguments.out:
    report = {"machine": machine(), "layers": arguments.layers, "tiny": arguments.tiny, "rows": rows}
    Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")
