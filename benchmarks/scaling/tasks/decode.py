"""Decoding beside a reference, and continuous batching beside the original."""

import os
import random
import time
from typing import Any

import step_time
import torch
import transformers
from transformers import GenerationConfig

from hf_mla.cache_mla import CACHE_NAME, cache_of
from hf_mla.configuration_mla import release

from .process import DEVICE, RANK, WORLD, load, peak, result


@torch.no_grad()
def forced(model: Any, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, n, vocabulary] of each of the tokens [B, n] that follow the prompts [B, T], decoded one by one from a cache."""
    outputs = model(ids, logits_to_keep=1)
    logits, cache = [outputs.logits[:, -1]], cache_of(outputs)
    for token in tokens[:, :-1].split(1, dim=1):
        logits.append(model(token, **{CACHE_NAME: cache}).logits[:, -1])
    return torch.stack([part.float().cpu() for part in logits], dim=1)


def decode(folder: str, reference: str, spread: bool, tiny: bool) -> None:
    """Greedy tokens in float32, logits in bfloat16 for the same tokens (by the kernel), and milliseconds a token.

    One process without `--spread` leaves what it says in REFERENCE, the others compare themselves with that.
    """
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    first = WORLD == 1 and not spread
    ids = torch.randint(1000, (4, 16 if tiny else 512), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    count = 8 if tiny else 48
    settings = {"max_new_tokens": count, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    model = load(folder, torch.float32, spread)
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    weight = model.model.layers[0].self_attn.q_proj.weight
    rows = (weight.to_local() if hasattr(weight, "to_local") else weight).shape[0]  # of this process
    tokens = model.generate(ids, **settings)[:, ids.shape[1] :].cpu()
    del model
    model = load(folder, torch.bfloat16, spread)
    said = None if first else torch.load(reference)
    forcing = tokens if said is None else said["tokens"]
    logits = forced(model, ids, forcing.to(DEVICE))
    free = model.generate(ids, **settings)[:, ids.shape[1] :].cpu()
    if said is None:
        if RANK == 0:
            torch.save({"tokens": tokens, "logits": logits, "free": free}, reference)
        result(processes=1, rows_of_queries=rows, tokens=tokens.numel())
    else:
        difference = (logits - said["logits"]).abs().amax(-1)  # [B, n]
        best, second = said["logits"].topk(2).values.unbind(-1)
        other = logits.argmax(-1) != said["logits"].argmax(-1)
        result(
            processes=WORLD,
            devices=places,
            rows_of_queries=rows,
            tokens=tokens.numel(),
            float32_equal=int((tokens == said["tokens"]).sum()),
            bfloat16_logits_differ_by=(difference / said["logits"].std(-1)).max().item(),
            bfloat16_choices_differ=int(other.sum()),
            bfloat16_choices_differ_beyond_rounding=int((other & (best - second > 2 * difference)).sum()),
            bfloat16_generated_equal=int((free == said["free"]).sum()),
        )
    if not spread:
        batch, context, steps = (2, 64, 8) if tiny else (16, 16384, 32)
        torch.manual_seed(0)
        for eager in (True, False):
            measured = step_time.generate(model, batch, context, steps, eager)
            measured = {key: measured[key] for key in ("milliseconds_per_token", "spread", "start_seconds")}
            result(**{"eager" if eager else "compiled": measured | {"batch": batch, "context": context, "peak": peak()}})
    if WORLD > 1:
        torch.distributed.barrier()
        os._exit(0)  # what is recorded in graphs keeps NCCL from ending


def has_batching() -> bool:
    """Whether this Transformers hands the pages of continuous batching to the attention."""
    return release(transformers.__version__) >= (5, 19)


def greedy(tokens: int, end: int = -1) -> GenerationConfig:
    """Greedy generation of so many tokens."""
    return GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=0)


def pages(share: float) -> Any:
    """Settings of continuous batching: pages that take so much of the memory of a GPU, and few of a CPU's."""
    few = {"num_blocks": 64, "page_size": 16, "max_batch_tokens": 64} if DEVICE == "cpu" else {"max_memory_percent": share}
    return transformers.ContinuousBatchingConfig(**few)


def batching(folder: str, gqa: str, tiny: bool) -> None:
    """Requests per second of `generate_batch`: the converted model and its original, prompts of mixed lengths."""
    if not has_batching():
        result(not_run=f"Transformers {transformers.__version__} does not hand pages to the attention; 5.19 does")
        return
    draw = random.Random(0)
    count, longest, new = (6, 60, 4) if tiny else (64, 4096, 64)
    prompts = [[draw.randrange(1000) for _ in range(draw.randint(longest // 8, longest))] for _ in range(count)]
    for name, place in (("converted", folder), ("gqa", gqa)):
        model = load(place, torch.bfloat16, False)
        rates = []
        for _ in range(2):  # the first one compiles and records
            begun = time.perf_counter()
            outputs = model.generate_batch(
                inputs=prompts, generation_config=greedy(new), continuous_batching_config=pages(0.8), progress_bar=False
            )
            rates.append(count / (time.perf_counter() - begun))
        answered = sum(len(output.generated_tokens) == new for output in outputs.values())
        result(model=name, requests=count, answered=answered, new_tokens=new, requests_per_second=rates[-1], first_time=rates[0])
        del model
