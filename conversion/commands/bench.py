# SPDX-License-Identifier: Apache-2.0
"""How fast a converted model and its source decode, and what their caches take (`bench`).

In place of these two it can be one model of Transformers that has MLA: as the library runs it, and as it decodes over its latents.

What is timed is `generate`, greedy, with a cache of `context` tokens, as anyone would call it: with a static one on a GPU,
Transformers compiles the step by itself; a growing one is as `generate` makes it. Of the tokens that fill the cache, all but the
last are a prompt. The last are decoded, and the time of these steps alone is taken: first some that are not counted, in which the
step is compiled and captured, then `REPEATS` stretches of `new_tokens` steps. The host's clock is read between stretches, when the
device has done its work; within a stretch nothing waits that does not wait in any `generate`.

All sequences of a batch have the same prompt of random tokens: it is read once and copied, which a cache of many long sequences
would otherwise take long and much memory to fill. Decoding takes the same time whatever the tokens are.
"""

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer
from transformers.generation import GenerationMode

from hf_mla import LatentDynamicLayer, absorb, cache_bytes
from hf_mla.cache_mla import CACHE_NAME
from hf_mla.native_mla import text_config

from ..errors import UserError
from ..output.plotting import check_plot, draw_bench, save_figure
from ..output.reports import BenchContext, BenchReport, PerSide
from ..source.checkpoint import Checkpoint, open_checkpoint
from ..source.loading import choose_device, device_name, load_model
from ..source.matching import match_model
from ..source.shards import TORCH_NAMES
from .verify import check_pair


DEFAULT_CONTEXT = 2048
WARM_UP_STEPS = 8  # the first compiles, the next two record CUDA graphs; a sliding window may make it compile again
REPEATS = 5
CACHES = ("static", "dynamic")
# Layers of caches that hold keys and values of each token and nothing else; not so indexers and linear attention.
COPYABLE = (DynamicLayer, LatentDynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


@dataclass(frozen=True)
class Decoding:
    """What was measured of one model at one context."""

    milliseconds: list[float]
    """Of a step, in each stretch."""
    cache_bytes: int


def bench(
    out: str,
    *,
    against: str | None = None,
    batch: int = 1,
    context: int | Sequence[int] | None = None,
    new_tokens: int = 32,
    cache: str = "static",
    device: str = "auto",
    dtype: str = "auto",
    plot: str | None = None,
    revision: str | None = None,
) -> BenchReport:
    """Time decoding with a converted model and with its source, one after the other, and measure their caches.

    Or with an MLA model of Transformers, as the library runs it (the "source" of the report), and over its latents ("converted").

    The time of a step is taken where the cache is nearly full: while the last `REPEATS` * `new_tokens` of `context` tokens are
    decoded. Reading the prompt and compiling are not counted.

    Args:
        out: the converted checkpoint; without `against`, one of an MLA model of Transformers, a folder or a Hub id.
        against: the source of the converted one, a folder, a .gguf file or a Hub id.
        batch: sequences that are decoded at once.
        context: tokens in each; several are measured one after the other. None: 2048, or as many as the model allows.
        new_tokens: steps that are timed together.
        cache: "static", or "dynamic" for one that grows.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16", "float16"; "auto" for what the source is stored in, or float32 on the CPU.
        plot: a .png, .svg or .pdf file to draw speed and cache against context to; needs matplotlib.
        revision: branch, tag or commit of the source, or of the MLA model, if it is a Hub id.

    Returns:
        What was measured.

    Raises:
        UserError: a checkpoint or an option cannot be used, or the device has too little memory.
    """
    if plot is not None:
        check_plot(plot)
    for name, value in (("batch", batch), ("new-tokens", new_tokens)):
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if cache not in CACHES:
        raise UserError(f"--cache is {cache}; it must be one of {', '.join(CACHES)}")
    if against is None:
        source_checkpoint = open_native(out, revision)
        checkpoints = [source_checkpoint]
    else:
        converted_checkpoint, source_checkpoint = open_checkpoint(out), open_checkpoint(against, revision)
        check_pair(converted_checkpoint, source_checkpoint)
        checkpoints = [source_checkpoint, converted_checkpoint]
    contexts = choose_contexts(context, new_tokens, text_config(source_checkpoint.config).max_position_embeddings)
    run_device = choose_device(device)
    run_dtype = choose_dtype(dtype, source_checkpoint, run_device)
    results, names = [], ["source", "converted"]
    with tqdm(total=2 * len(contexts), desc="benchmarking", unit="run") as bar:
        for checkpoint in checkpoints:
            with memory_of(run_device, f"the weights of {checkpoint.name}", "choose another --device or a shorter --dtype"):
                model = load_model(checkpoint, run_device, run_dtype)
            results.append(measure(model, checkpoint.name, batch, contexts, new_tokens, cache, bar))
            if against is None:
                names = [attention_of(model)]
                absorb(model)
                names.append(attention_of(model))
                results.append(measure(model, checkpoint.name, batch, contexts, new_tokens, cache, bar))
            del model
            free_memory()
    source, converted = results
    reports = [compare(*both, batch) for both in zip(contexts, source, converted, strict=True)]
    report = BenchReport(
        **vars(reports[-1]),
        contexts=reports,
        names={"source": names[0], "converted": names[1]},
        cache=cache,
        batch=batch,
        new_tokens=new_tokens,
        repeats=REPEATS,
        device=device_name(run_device),
        dtype=str(run_dtype).removeprefix("torch."),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    if plot is not None:
        save_figure(draw_bench(report), plot)
    return report


def open_native(name: str, revision: str | None) -> Checkpoint:
    """Open a model of Transformers that has MLA.

    Args:
        name: as given by the user.
        revision: branch, tag or commit of a Hub id.

    Returns:
        The checkpoint.

    Raises:
        UserError: it has no MLA, or is a converted one; or this version of Transformers cannot run it so.
    """
    checkpoint = open_checkpoint(name, revision)
    kind = checkpoint.config.model_type
    if hasattr(checkpoint.config, "hf_mla_version"):
        raise UserError(f"{name} is a converted model; give --against, what it was converted from")
    if getattr(text_config(checkpoint.config), "kv_lora_rank", None) is None:
        raise UserError(f"{name} is a {kind!r}, which has no MLA; give a model that has it, or a converted one and --against")
    matched = match_model(checkpoint)
    try:
        absorb(matched.model)  # which is empty
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{name}: {error}") from error
    return matched


def attention_of(model: Any) -> str:
    """The attention implementation of a model's text part."""
    return text_config(model.config)._attn_implementation


def choose_contexts(context: int | Sequence[int] | None, new_tokens: int, limit: int) -> list[int]:
    """The contexts to measure, ascending, or a UserError.

    Args:
        context: as given to `bench`.
        new_tokens: likewise.
        limit: tokens that the model has positions for.

    Returns:
        Each context once.

    Raises:
        UserError: one is beyond the limit, or shorter than what is decoded.
    """
    if context is None:
        context = min(DEFAULT_CONTEXT, limit)
    contexts = sorted({context} if isinstance(context, int) else set(context))
    least = decoded_steps(new_tokens) + 2  # a prompt of two tokens: one in the cache, one that decoding starts from
    for value in contexts:
        if value > limit:
            raise UserError(f"--context is {value}; the model has positions for {limit}: give at most that")
        if value < least:
            raise UserError(f"--context is {value}; --new-tokens {new_tokens} takes {least}: give more, or lower --new-tokens")
    return contexts


def choose_dtype(dtype: str, source: Checkpoint, device: torch.device) -> torch.dtype:
    """What both models compute and cache in."""
    allowed = ("auto", "float32", "bfloat16", "float16")
    if dtype not in allowed:
        raise UserError(f"--dtype is {dtype}; it must be one of {', '.join(allowed)}")
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else TORCH_NAMES[source.dtype]
    return getattr(torch, dtype)


def decoded_steps(new_tokens: int) -> int:
    """How many steps a run decodes."""
    return WARM_UP_STEPS + REPEATS * new_tokens


def measure(model: Any, name: str, batch: int, contexts: list[int], new_tokens: int, cache: str, bar: tqdm) -> list[Decoding]:
    """Let a model decode at each context."""
    results = []
    for context in contexts:
        bar.set_description(f"{name} at {batch} x {context:,} tokens")
        with memory_of(model.device, f"{name} at --batch {batch} and --context {context}", "lower one of them"):
            results.append(decode(model, batch, context, new_tokens, cache))
        free_memory()  # and compile anew: code for any context would not be the code that a user of this one gets
        bar.update()
    return results


@contextmanager
def memory_of(device: torch.device, what: str, advice: str) -> Iterator[None]:
    """Turn "out of memory" into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED")):
            raise
        raise UserError(f"{what}: this does not fit in the memory of {device_name(device)}; {advice}") from error


def free_memory() -> None:
    """Give back what nothing refers to any more, compiled code and recorded graphs with their memory among it."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def decode(model: Any, batch: int, context: int, new_tokens: int, kind: str) -> Decoding:
    """Decode the end of `context` tokens for each sequence of a batch, and time it; see the top of this file."""
    steps = decoded_steps(new_tokens)
    prompt = torch.randint(text_config(model.config).vocab_size, (1, context - steps), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(model.device)  # [1, T]
    cache = filled_cache(model, prompt[:, :-1], batch, context, kind)
    prompt = prompt.expand(batch, -1)  # [B, T]
    clock = Clock(prompt.shape[1] + WARM_UP_STEPS, new_tokens)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **{CACHE_NAME: cache},
        min_new_tokens=steps + 1,  # the first one comes from the prompt's last token, and is not timed
        max_new_tokens=steps + 1,
        do_sample=False,
        logits_processor=[clock],
    )
    return Decoding([1000 * (end - start) / new_tokens for start, end in pairwise(clock.times)], cache_bytes(cache))


def filled_cache(model: Any, prompt: Tensor, batch: int, length: int, kind: str) -> Any:
    """A cache with room for `length` tokens in each of `batch` sequences, all of which begin with a prompt [1, T]."""
    given: dict[str, Any] = {}
    if kind == "static":
        given[CACHE_NAME] = StaticCache(model.config, max_cache_len=length)
    else:
        model._prepare_cache_for_generation(GenerationConfig(), given, GenerationMode.GREEDY_SEARCH, batch, length)
    cache = given[CACHE_NAME]
    if any(type(layer) not in COPYABLE for layer in cache.layers):
        model(input_ids=prompt.expand(batch, -1), use_cache=True, logits_to_keep=1, **given)
        return cache
    read: Any = DynamicCache()
    model(input_ids=prompt, use_cache=True, logits_to_keep=1, **{CACHE_NAME: read})
    for index, layer in enumerate(read.layers):
        keys, values = (states.expand(batch, -1, -1, -1) for states in (layer.keys, layer.values))  # [B, heads, T, width]
        cache.update(keys, values, index)
    return cache


class Clock(LogitsProcessor):
    """Takes part in `generate` to note the time whenever the device has done a stretch of steps; changes nothing.

    Args:
        start: length of the sequences [B, length] when the first stretch begins.
        every: steps in a stretch.
    """

    def __init__(self, start: int, every: int) -> None:
        self.start = start
        self.every = every
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note the time between two stretches."""
        steps = input_ids.shape[1] - self.start
        if steps >= 0 and steps % self.every == 0:
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)
            self.times.append(time.perf_counter())
        return scores


def compare(context: int, source: Decoding, converted: Decoding, batch: int) -> BenchContext:
    """Both models at one context."""
    sides = (source, converted)
    medians = [statistics.median(side.milliseconds) for side in sides]
    ranges = [max(side.milliseconds) - min(side.milliseconds) for side in sides]
    return BenchContext(
        context=context,
        decode_tokens_per_second=PerSide(*(1000 * batch / median for median in medians)),
        decode_ms_per_token=PerSide(*medians),
        spread=PerSide(*(width / median for width, median in zip(ranges, medians, strict=True))),
        cache_bytes=PerSide(*(side.cache_bytes for side in sides)),
        speedup=medians[0] / medians[1],
        cache_ratio=converted.cache_bytes / source.cache_bytes,
    )
