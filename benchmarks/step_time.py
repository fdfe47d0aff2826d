"""Milliseconds a token of a whole model through `generate` with a static cache; for the scripts beside it.

`generate` continues from a static cache that holds random numbers for all of the context but its last token, and compiles the step
by itself as it does for every static cache on a GPU, anew for each measurement: it is called as a user calls it,
and a token's time is all that passes from one to the next at a streamer. The first token, which `generate` computes without
compiling, and those in which it compiles and records CUDA graphs are left out; their seconds are in `start_seconds`. Of the rest,
the median and the 10th and 90th percentiles. A model that cannot be compiled runs as it is, with a note.
"""

import statistics
import time
from typing import Any

import torch
from llama_width import DEVICE
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation.streamers import BaseStreamer

from hf_mla.cache_mla import CACHE_NAME
from hf_mla_conversion.commands.bench import free_memory


SPARE = 64  # tokens of the static cache beyond the context
WARM_UP = 6  # tokens: the first, compiling, recording, and some more


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
        if isinstance(layer, StaticLayer):  # not the states of linear attention
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(ids.shape[1] - 1)
    return cache


def generate(model: PreTrainedModel, batch: int, context: int, steps: int, eager: bool) -> dict[str, Any]:
    """Generate, and say how long the tokens took and what was compiled."""
    free_memory()
    torch._dynamo.utils.counters.clear()
    ids, clock = torch.randint(model.config.vocab_size, (batch, context), device=DEVICE), Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE_NAME: filled_cache(model, ids)},
        max_new_tokens=WARM_UP + steps,
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


def measure(model: PreTrainedModel, batch: int, context: int, steps: int) -> dict[str, Any]:
    """`generate` as it is, else without compiling, else nothing; with a note where it is not the first."""
    notes = []
    for eager in (False, True):
        try:
            return generate(model, batch, context, steps, eager) | ({"note": "; ".join(notes)} if notes else {})
        except Exception as error:  # out of memory, or whatever a compiler says
            notes.append(f"{'not compiled' if eager else 'compiled'}: {one_line(error)}")
    return {"milliseconds_per_token": None, "note": "; ".join(notes)}


def one_line(error: Exception) -> str:
    """An error of whatever kind, in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
