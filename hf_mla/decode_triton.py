# SPDX-License-Identifier: Apache-2.0
"""Absorbed attention of few new tokens over many cached latents, in Triton: the kernels of decoding.

* Memory binds: a step must read every latent once. A tile of latents is loaded once and used twice, for scores and for values,
  and neither scores nor expanded keys are ever written.
* The tokens of a sequence are split among as many programs as fill the GPU; each leaves a partial sum and the logarithm of its
  weight, and `merge_kernel` adds them up (Flash-Decoding).
* Which tokens are attended is read on the device: `attended_range` finds the first and the last that a mask allows, so that the
  unused end of a static cache costs nothing, without the host knowing how long a sequence is.
* `split_kernel` is for any NVIDIA GPU since Ampere. On Hopper GPUs `decode_hopper.py` takes its place where the layout allows it.

The rows of a query are its heads and new tokens together, M = H * T; notation as in `attention_mla.py`. This file is not copied
into checkpoints; their code uses it where this package is installed.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


try:
    from . import decode_hopper
except ImportError:  # a Triton without Gluon, or with an older one
    decode_hopper = None  # type: ignore[assignment]

LOG2_E = math.log2(math.e)


@triton.jit(do_not_specialize=["S", "mask_b", "mask_t"])  # they change as a context grows
def range_kernel(mask, attended, T, S, mask_b, mask_t, BLOCK_S: tl.constexpr):
    """What `attended_range` returns for one sequence."""
    batch = tl.program_id(0)
    first = tl.full([BLOCK_S], 2147483647, tl.int32)
    last = tl.zeros([BLOCK_S], tl.int32)
    count = tl.zeros([BLOCK_S], tl.int32)
    for t in range(T):
        for begin in range(0, S, BLOCK_S):
            tokens = begin + tl.arange(0, BLOCK_S)
            seen = tl.load(mask + batch.to(tl.int64) * mask_b + t * mask_t + tokens, mask=tokens < S, other=0) != 0
            first = tl.where(seen, tl.minimum(first, tokens), first)
            last = tl.where(seen, tl.maximum(last, tokens + 1), last)
            count += seen.to(tl.int32)
    stop = tl.max(last, 0)
    start = tl.minimum(tl.min(first, 0), stop)
    tl.store(attended + 3 * batch, start)
    tl.store(attended + 3 * batch + 1, stop)
    tl.store(attended + 3 * batch + 2, (tl.sum(count, 0) < T * (stop - start)).to(tl.int32))


@triton.jit(do_not_specialize=["S", "mask_b", "mask_t"])
def split_kernel(
    query, latent, rest, mask, attended, sinks, out, lse,  # pointers
    scale, cap, S, M, T, window, row_blocks, heads_per_norm, latent_b, latent_s, rest_b, rest_s, mask_b, mask_t, attended_b,
    out_b, out_split, out_h,
    R: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMS: tl.constexpr, QUANTIZED: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Attend from BLOCK_M rows of one sequence to one split of its tokens; see `latent_decode` for the tensors.

    `out` [.., R] is the partial sum divided by its weight, and `lse` [B, splits, M] the base-2 logarithm of that weight.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    r, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    query += batch * M * (R + P) + rows[:, None] * (R + P)
    q = tl.load(query + r[None, :], mask=(rows < M)[:, None] & (r < R)[None, :], other=0.0)
    q_rope = tl.load(query + R + p[None, :], mask=(rows < M)[:, None] & (p < P)[None, :], other=0.0)
    latent += batch * latent_b
    rest += batch * rest_b

    start, stop = 0, S
    if BOUNDED:
        start, stop = tl.load(attended + batch * attended_b), tl.load(attended + batch * attended_b + 1)
    tiles = tl.cdiv(stop - start, BLOCK_N)
    begin = start + tiles * split // splits * BLOCK_N
    stop = tl.minimum(stop, start + tiles * (split + 1) // splits * BLOCK_N)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    context = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if sinks is not None:  # as if the first split had already seen a token of this score, whose value is zero
        sink = tl.load(sinks + rows // T, mask=rows < M, other=0.0).to(tl.float32) * 1.4426950408889634  # log2(e)
        largest = tl.where(split == 0, sink, largest)
        total = tl.where(split == 0, 1.0, total)
    for base in range(begin, stop, BLOCK_N):
        tokens = base + tl.arange(0, BLOCK_N)
        live = tokens < stop
        c = tl.load(latent + tokens[:, None] * latent_s + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)
        k_rope = tl.load(rest + tokens[:, None] * rest_s + p[None, :], mask=live[:, None] & (p < P)[None, :], other=0.0)
        if QUANTIZED:  # codes lose nothing in any type; the tokens' scales go to scores and weights
            c = c.to(q.dtype)
            token_scale = tl.load(rest + tokens * rest_s + P + NORMS, mask=live, other=0.0).to(tl.float32)[None, :]
        scores = tl.dot(q, tl.trans(c), input_precision="ieee")
        if QUANTIZED:
            scores *= token_scale
        scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if NORMS:
            norm = rest + tokens[None, :] * rest_s + P + (rows // T // heads_per_norm)[:, None]
            scores *= tl.load(norm, mask=live[None, :] & (rows < M)[:, None], other=0.0).to(tl.float32)
        scores *= scale
        if CAPPED:
            scores = cap * (1 - 2 / (tl.exp2(scores) + 1))  # cap * tanh, see `latent_decode`
        seen = live[None, :]
        if MASKED:
            place = mask + batch * mask_b + (rows % T)[:, None] * mask_t + tokens[None, :]
            seen = seen & (tl.load(place, mask=live[None, :] & (rows < M)[:, None], other=0) != 0)
        elif not BOUNDED:  # causal order
            ahead = tokens[None, :] - (S - T + rows % T)[:, None]
            seen = seen & (ahead <= 0) & (ahead > -window)
        scores = tl.where(seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # rows that have seen nothing yet
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(largest - shift)
        largest = new_largest
        total = total * fade + tl.sum(weights, 1)
        if QUANTIZED:
            weights *= token_scale * 128  # about as large as the latents, for 16 bits to hold
        context = tl.dot(weights.to(c.dtype), c, context * fade[:, None], input_precision="ieee")

    inverse = tl.where(total > 0, 1 / total, 0.0)
    if QUANTIZED:
        inverse /= 128
    context *= inverse[:, None]
    out += batch * out_b + split * out_split + (rows // T).to(tl.int64)[:, None] * out_h + (rows % T)[:, None] * R
    tl.store(out + r[None, :], context.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (r < R)[None, :])
    tl.store(lse + (batch * splits + split) * M + rows, largest + tl.log2(total), mask=rows < M)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    partial, lse, out, splits, M, T, out_b, out_h, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Average partial sums [B, splits, M, R] by weights of base-2 logarithms [B, splits, M] into `out` [H, B, T, R]."""
    row, batch = tl.program_id(0) % M, (tl.program_id(0) // M).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    largest = float("-inf")
    for begin in range(0, splits, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        weight = tl.load(lse + (batch * splits + s) * M + row, mask=s < splits, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(weight, 0))
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = 0.0
    context = tl.zeros([BLOCK_R], tl.float32)
    for begin in range(0, splits, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        weight = tl.exp2(tl.load(lse + (batch * splits + s) * M + row, mask=s < splits, other=float("-inf")) - largest)
        place = partial + ((batch * splits + s) * M + row)[:, None] * R + r[None, :]
        context += tl.sum(weight[:, None] * tl.load(place, mask=(s < splits)[:, None] & (r < R)[None, :], other=0.0), 0)
        total += tl.sum(weight, 0)
    context *= tl.where(total > 0, 1 / total, 0.0)
    out += batch * out_b + (row // T).to(tl.int64) * out_h + (row % T) * R
    tl.store(out + r, context.to(out.dtype.element_ty), mask=r < R)


@torch.compiler.assume_constant_result
def can_decode(device: int, rank: int, rope_dim: int) -> bool:
    """Whether there is a kernel for a CUDA device, by its number, and for dimensions R and P."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return rank <= 512 and 0 < rope_dim <= 128  # what shared memory and registers hold; no descriptor has a width of 0


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs a device runs at a time, one to a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def choose_splits(programs: int, blocks: int, processors: int) -> int:
    """How many parts to split each sequence into, so that the rounds the processors work in are as full as they can be.

    Args:
        programs: how many there are without a split.
        blocks: of 128 tokens, in each sequence.
        processors: how many programs run at a time.

    Returns:
        At least 1; a part is not made smaller than a block.
    """
    # A split costs about as much as reading half a block: its part of the queries, and a partial sum to write and read.
    options = range(1, min(processors, blocks) + 1)
    return min(options, key=lambda splits: math.ceil(programs * splits / processors) * (blocks / splits + 0.5))


def on_its_device(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes the device of a function's first argument the current one, on which Triton launches."""

    @functools.wraps(function)
    def call(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.cuda.device_of(first):
            return function(first, *args, **kwargs)

    return call


@torch.library.custom_op("hf_mla::attended_range", mutates_args=())
@on_its_device
def attended_range(mask: Tensor) -> Tensor:
    """What part of the tokens a mask lets a sequence's new tokens attend to; the same in all layers that share a mask.

    Args:
        mask: bool [B, 1, T, S].

    Returns:
        int32 [B, 3]: the first token that any of the T attends to, the one after the last, and whether any of the T leaves out any
        of those between.
    """
    batch, _, new_tokens, tokens = mask.shape
    mask = (mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8)
    attended = torch.empty(batch, 3, dtype=torch.int32, device=mask.device)
    block = max(1024, min(triton.next_power_of_2(tokens), 65536))
    strides = mask.stride(0), mask.stride(2)
    range_kernel[(batch,)](mask, attended, new_tokens, tokens, *strides, BLOCK_S=block, num_warps=min(32, block // 512))
    return attended


@attended_range.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape[0], 3, dtype=torch.int32)


@torch.library.custom_op("hf_mla::latent_decode", mutates_args=())
@on_its_device
def latent_decode(
    query: Tensor,
    latent: Tensor,
    rest: Tensor,
    rank: int,
    scaling: float,
    mask: Tensor | None = None,
    attended: Tensor | None = None,
    num_key_norms: int = 0,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Absorbed attention of the new tokens' queries over cached latents (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).

    With neither `mask` nor `attended`, the new tokens are the last T of S, in causal order.

    Args:
        query: [B, H, T, R + P], absorbed queries followed by the rotary ones, in bfloat16, float16 or (slowly) float32.
        latent: [B, S, R] with a contiguous last dimension, in the type of the query, or int8 or float8_e4m3fn codes.
        rest: [B, S, P + g], rotary keys and key norms, contiguous likewise; of codes, [B, S, P + g + 1] with a scale at its end.
        rank: R, at most 512; P is at most 128.
        scaling: factor on the scores.
        mask: bool, broadcastable to [B, 1, T, S], true where a token is attended to.
        attended: int32 [B, 3] or [1, 3], what `attended_range` says of the mask, if that is known already; without a mask, all new
            tokens attend to the tokens from the first number to before the second.
        num_key_norms: g.
        window: with neither, how many tokens a token attends to, itself included; 0 for all before it.
        softcap: c, if the scores x are to be capped as c * tanh(x / c); 0 if not.
        sinks: [H], scores of a token that every token attends to and whose value is zero; they are neither scaled nor capped.

    Returns:
        sum_t p(t) c(t), [H, B, T, R] and contiguous; zero where nothing is attended to.
    """
    global decode_hopper
    batch, heads, new_tokens, width = query.shape
    tokens, rope_dim, rows = latent.shape[1], width - rank, heads * new_tokens
    scale, cap = scaling * LOG2_E, 0.0
    if softcap:  # c tanh(x / c) = c (1 - 2 / (exp(2 x / c) + 1))
        scale, cap = 2 * scale / softcap, softcap * LOG2_E
    if mask is not None:
        mask = mask.expand(batch, 1, new_tokens, tokens)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        if attended is None:
            attended = attended_range(mask)
        mask = mask.view(torch.uint8)

    on_hopper = decode_hopper is not None and decode_hopper.fits(query, latent, rest)
    block_r, block_p = max(16, triton.next_power_of_2(rank)), max(16, triton.next_power_of_2(rope_dim))
    most_rows = 64 if on_hopper and block_r + block_p <= 576 else 32  # as shared memory allows
    block_m = max(16, min(most_rows, triton.next_power_of_2(rows)))
    row_blocks = triton.cdiv(rows, block_m)
    at_a_time = processors(query.device) * max(1, min(4, 512 // block_r))
    splits = choose_splits(batch * row_blocks, triton.cdiv(tokens, 128), at_a_time)

    out = query.new_empty(heads, batch, new_tokens, rank)
    lse = torch.empty(batch, splits, rows, dtype=torch.float32, device=query.device)
    if splits == 1:
        target, target_b, target_split, target_h = out, new_tokens * rank, 0, batch * new_tokens * rank
    else:
        target = torch.empty(batch, splits, rows, rank, dtype=torch.float32, device=query.device)
        target_b, target_split, target_h = splits * rows * rank, rows * rank, new_tokens * rank
    arguments = {
        "query": query.contiguous(),
        "mask": mask,
        "attended": attended,
        "sinks": None if sinks is None else sinks.contiguous(),
        "out": target,
        "lse": lse,
        "scale": scale,
        "cap": cap,
        "S": tokens,
        "M": rows,
        "T": new_tokens,
        "window": window or 1 << 30,
        "row_blocks": row_blocks,
        "heads_per_norm": heads // max(1, num_key_norms),
        "rest": rest,
        "rest_b": rest.stride(0),
        "rest_s": rest.stride(1),
        "mask_b": 0 if mask is None else mask.stride(0),
        "mask_t": 0 if mask is None else mask.stride(2),
        "attended_b": 0 if attended is None or attended.shape[0] == 1 else attended.stride(0),
        "out_b": target_b,
        "out_split": target_split,
        "out_h": target_h,
        "R": rank,
        "P": rope_dim,
        "BLOCK_M": block_m,
        "NORMS": num_key_norms,
        "MASKED": mask is not None,
        "BOUNDED": attended is not None,
        "CAPPED": bool(softcap),
    }
    grid = (batch * row_blocks, splits)
    if on_hopper:
        try:
            decode_hopper.launch(grid, latent, **arguments)
        except triton.CompilationError as error:  # Gluon is experimental, and changes
            warnings.warn(
                f"Triton {triton.__version__} cannot compile the kernel for Hopper GPUs, a slower one is used: {error}",
                stacklevel=2,
            )
            decode_hopper, on_hopper = None, False  # type: ignore[assignment]
    if not on_hopper:
        split_kernel[grid](
            latent=latent,
            latent_b=latent.stride(0),
            latent_s=latent.stride(1),
            BLOCK_R=block_r,
            BLOCK_P=block_p,
            BLOCK_N=32 if block_r > 256 else 64,
            QUANTIZED=latent.dtype.itemsize == 1,
            num_warps=4 if block_m * block_r <= 16 * 512 else 8,
            num_stages=2,
            **arguments,
        )
    if splits > 1:
        # A program takes some 4096 numbers, of all splits at once where it can: a loop over them costs more than reading them.
        block_s = min(256, triton.next_power_of_2(splits))
        block_r = min(block_r, max(32, 4096 // block_s))
        merge_kernel[batch * rows, triton.cdiv(rank, block_r)](
            target, lse, out, splits, rows, new_tokens, new_tokens * rank, batch * new_tokens * rank,
            R=rank, BLOCK_R=block_r, BLOCK_S=block_s,
        )  # fmt: skip
    return out


@latent_decode.register_fake
def _(query: Tensor, latent: Tensor, rest: Tensor, rank: int, *args: object, **kwargs: object) -> Tensor:
    batch, heads, new_tokens, _ = query.shape
    return query.new_empty(heads, batch, new_tokens, rank)
