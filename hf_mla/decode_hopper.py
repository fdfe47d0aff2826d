# SPDX-License-Identifier: Apache-2.0
"""The kernels of `decode_triton.py` for Hopper GPUs (H100, H200), in Gluon.

In both, two tiles of 64 tokens lie in shared memory, filled by the copy engine: while one is worked on the other is on its way, and
its place is given away again as soon as it has been used. One program to a multiprocessor at 512 + 64.

`hopper_kernel`, bound by memory up to 32 rows:

* Everything is transposed: tokens and the latent's numbers (R) are the rows of the matrix products, heads their columns.
  Hopper's matrix instruction works on 64 rows and any 8 columns, so 16 or 32 heads waste nothing.
* A tile in shared memory is the left operand of both products: as it lies for the scores, transposed for the values.

`two_groups_kernel`, for 64 rows of wide latents, bound by the matrix units; its schedule is that of FlashMLA
(https://github.com/deepseek-ai/FlashMLA, "seesaw" in docs/20250422-new-kernel-deep-dive.md):

* Rows are the rows of the products: an instruction of one group of four warps has all 64 of them, and 256 columns of the values.
* The sums of 64 rows, 64 x 512, fill the registers of two groups: each adds up one half of the columns over all tokens. Each
  computes the weights of every other tile, and hands them to the other through shared memory. While one computes weights, the
  other keeps the matrix units busy.
* A half of a tile has one last reader, the group that adds it up, which has the next one brought there: nothing but the arrival of
  halves is waited for.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError("the Gluon of an older Triton lacks what this file uses")

BLOCK_N = 64  # tokens in a tile
# Names that changed: what stands first is the newer one.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def fetch(latents, ropes, place, batch, token, number, ready, latent_tiles, rope_tiles, wanted):
    """Have the copy engine bring a tile of BLOCK_N tokens, or its part from a number on; `ready` is signalled when it is there."""
    size: gl.constexpr = latents.block_type.nbytes + (0 if ropes is None else ropes.block_type.nbytes)
    mbarrier.expect(ready.index(place), size, pred=wanted)
    load_tile(latents, [batch, token, number], ready.index(place), latent_tiles.index(place), pred=wanted)
    if ropes is not None:
        load_tile(ropes, [batch, token, 0], ready.index(place), rope_tiles.index(place), pred=wanted)


@gluon.jit
def share(attended, attended_b, batch, S, BLOCK: gl.constexpr, BOUNDED: gl.constexpr):
    """Where this program's split of a sequence begins and stops, in how many blocks, and whether a mask has holes there."""
    split, splits = gl.program_id(1), gl.num_programs(1)
    start, stop, holes = 0, S, 1
    if BOUNDED:
        attended += batch * attended_b
        start, stop, holes = gl.load(attended), gl.load(attended + 1), gl.load(attended + 2)
    blocks = gl.cdiv(stop - start, BLOCK)
    begin = start + blocks * split // splits * BLOCK
    stop = gl.minimum(stop, start + blocks * (split + 1) // splits * BLOCK)
    return begin, stop, gl.cdiv(stop - begin, BLOCK), holes


@gluon.jit
def query_tile(
    query, batch, first_row, M, WIDTH: gl.constexpr, BEGIN: gl.constexpr, END: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """The numbers from BEGIN to before END of BLOCK_M queries, in shared memory; zeros up to BLOCK."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [warps, 1], [1, 0])
    rows = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    r = BEGIN + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    place = query + batch.to(gl.int64) * M * WIDTH + rows[:, None] * WIDTH + r[None, :]
    q = gl.load(place, mask=(rows < M)[:, None] & (r < END)[None, :], other=0.0)
    return gl.allocate_shared_memory(q.dtype, q.shape, gl.NVMMASharedLayout.get_default_for(q.shape, q.dtype), q)


# Rows, tokens and numbers of latents lie along either dimension of what follows, [.., 1] or [1, ..], as a kernel has them.


@gluon.jit
def sees(
    rows, tokens, stop, batch, mask, holes, S, T, window, mask_b, mask_t, MASKED: gl.constexpr, BOUNDED: gl.constexpr
):  # fmt: skip
    """Which rows attend to which tokens."""
    seen = tokens < stop
    if MASKED:
        seen = seen & (rows >= 0)  # of the shape that the mask gives it
        if holes != 0:
            spot = mask + batch.to(gl.int64) * mask_b + rows % T * mask_t + tokens
            seen = seen & (gl.load(spot, mask=seen, other=0) != 0)
    elif not BOUNDED:  # causal order
        ahead = tokens - (S - T + rows % T)
        seen = seen & (ahead <= 0) & (ahead > -window)
    return seen


@gluon.jit
def logits(
    scores, seen, rows, tokens, stop, rest, scale, cap, T, heads_per_norm, rest_s,
    P: gl.constexpr, NORMS: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """What becomes of scores before their softmax to base 2."""
    if NORMS:
        norm = rest + tokens * rest_s + P + rows // T // heads_per_norm
        scores *= gl.load(norm, mask=tokens < stop, other=0.0).to(gl.float32)
    scores *= scale
    if CAPPED:
        scores = cap * (1 - 2 / (gl.exp2(scores) + 1))
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def finite(largest):
    """By how much to shift scores: not at all in rows that have seen nothing yet."""
    return gl.where(largest == float("-inf"), 0.0, largest)


@gluon.jit
def write(context, rows, r, out, batch, M, T, out_b, out_split, out_h, R: gl.constexpr):
    """Store a partial sum."""
    out += batch.to(gl.int64) * out_b + gl.program_id(1) * out_split + (rows // T).to(gl.int64) * out_h + rows % T * R
    gl.store(out + r, context.to(out.dtype.element_ty), mask=(rows < M) & (r < R))


@gluon.jit(do_not_specialize=["S", "mask_b", "mask_t"])
def hopper_kernel(
    latents, ropes, query, rest, mask, attended, sinks, out, lse,
    scale, cap, S, M, T, window, row_blocks, heads_per_norm, copies, rest_b, rest_s, mask_b, mask_t, attended_b,
    out_b, out_split, out_h,
    R: gl.constexpr, P: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_M: gl.constexpr, warps: gl.constexpr,
    NORMS: gl.constexpr, QUANTIZED: gl.constexpr, MASKED: gl.constexpr, BOUNDED: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """As `split_kernel`, with descriptors of latents [B, S, R] and rotary keys [B, S, P]; `copies` is 0 if sequences share them.

    Of a quantized cache the codes come by descriptor, and the rest, whose rows have no alignment, by way of registers.
    """
    BLOCK_N: gl.constexpr = latents.block_shape[1]
    BLOCK_R: gl.constexpr = latents.block_shape[2]
    dtype: gl.constexpr = query.dtype.element_ty
    columns: gl.constexpr = max(8, BLOCK_M * 4 // warps)
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, warps // 4], [16, columns, 16])
    context_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, BLOCK_M, 16])
    tokens_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    rows_layout: gl.constexpr = gl.SliceLayout(0, scores_layout)
    row_of_context: gl.constexpr = gl.SliceLayout(0, context_layout)
    # Codes come 8 to a thread: of 16, the threads would write what becomes of them to the same banks.
    codes_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [warps, 1], [1, 0])
    rope_layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0])

    split, splits = gl.program_id(1), gl.num_programs(1)
    batch = gl.program_id(0) // row_blocks
    begin, stop, tiles, holes = share(attended, attended_b, batch, S, BLOCK_N, BOUNDED)

    latent_tiles = gl.allocate_shared_memory(latents.dtype, [2, 1, BLOCK_N, BLOCK_R], latents.layout)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    c_shape: gl.constexpr = [BLOCK_N, BLOCK_R]
    rope_shape: gl.constexpr = [BLOCK_N, BLOCK_P]
    if QUANTIZED:
        rope_tiles = gl.allocate_shared_memory(dtype, rope_shape, gl.NVMMASharedLayout.get_default_for(rope_shape, dtype))
        c_tile = gl.allocate_shared_memory(dtype, c_shape, gl.NVMMASharedLayout.get_default_for(c_shape, dtype))
    else:
        rope_tiles = gl.allocate_shared_memory(dtype, [2, 1, BLOCK_N, BLOCK_P], ropes.layout)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(2):
        fetch(latents, ropes, i, batch * copies, begin + i * BLOCK_N, 0, ready, latent_tiles, rope_tiles, i < tiles)

    first_row = gl.program_id(0) % row_blocks * BLOCK_M
    q_tile = query_tile(query, batch, first_row, M, R + P, 0, R, BLOCK_M, BLOCK_R, warps)
    q_rope_tile = query_tile(query, batch, first_row, M, R + P, R, R + P, BLOCK_M, BLOCK_P, warps)
    weights_shape: gl.constexpr = [BLOCK_N, BLOCK_M]
    weights_tile = gl.allocate_shared_memory(dtype, weights_shape, gl.NVMMASharedLayout.get_default_for(weights_shape, dtype))
    fence_async_shared()
    barrier()

    rest += batch.to(gl.int64) * rest_b
    if QUANTIZED:  # the first tile's rotary keys and scales; the next one's are always under way
        p = gl.arange(0, BLOCK_P, gl.SliceLayout(0, rope_layout))
        rope_tokens = begin + gl.arange(0, BLOCK_N, gl.SliceLayout(1, rope_layout))
        scale_tokens = begin + gl.arange(0, BLOCK_N, tokens_layout)
        live = (rope_tokens < stop)[:, None] & (p < P)[None, :]
        next_rope = gl.load(rest + rope_tokens[:, None] * rest_s + p[None, :], mask=live, other=0.0)
        next_scale = gl.load(rest + scale_tokens * rest_s + P + NORMS, mask=scale_tokens < stop, other=0.0)

    rows = gl.minimum(first_row + gl.arange(0, BLOCK_M, rows_layout), M - 1)  # rows there are not do as the last one does
    largest = gl.full([BLOCK_M], float("-inf"), gl.float32, rows_layout)
    total = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, scores_layout)  # added up over tokens at the end
    context = gl.zeros([BLOCK_R, BLOCK_M], gl.float32, context_layout)
    nothing = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, scores_layout)
    if sinks is not None:
        sink = gl.load(sinks + rows // T).to(gl.float32) * 1.4426950408889634  # log2(e)
        largest = gl.where(split == 0, sink, largest)
        total = gl.where(split == 0, 1 / BLOCK_N, total)  # of each row that is added up
    for tile in range(tiles):
        place = tile % 2
        tokens = begin + tile * BLOCK_N + gl.arange(0, BLOCK_N, tokens_layout)
        seen = sees(
            rows[None, :], tokens[:, None], stop, batch, mask, holes, S, T, window, mask_b, mask_t, MASKED, BOUNDED
        )  # fmt: skip

        if QUANTIZED:
            rope, factor = next_rope, next_scale
            rope_tokens += BLOCK_N
            scale_tokens += BLOCK_N
            live = (rope_tokens < stop)[:, None] & (p < P)[None, :]
            next_rope = gl.load(rest + rope_tokens[:, None] * rest_s + p[None, :], mask=live, other=0.0)
            next_scale = gl.load(rest + scale_tokens * rest_s + P + NORMS, mask=scale_tokens < stop, other=0.0)
            mbarrier.wait(ready.index(place), tile // 2 % 2)
            codes = latent_tiles.index(place).reshape([BLOCK_N, BLOCK_R]).load(codes_layout)
            c_tile.store(codes.to(dtype))  # which loses nothing; the tokens' scales go to scores and weights
            rope_tiles.store(rope)
            fence_async_shared()
            barrier()  # the codes have been read by all, and what became of them is there
            token = begin + (tile + 2) * BLOCK_N
            fetch(latents, ropes, place, batch * copies, token, 0, ready, latent_tiles, rope_tiles, tile + 2 < tiles)
            c, k_rope = c_tile, rope_tiles
        else:
            mbarrier.wait(ready.index(place), tile // 2 % 2)
            c = latent_tiles.index(place).reshape([BLOCK_N, BLOCK_R])
            k_rope = rope_tiles.index(place).reshape([BLOCK_N, BLOCK_P])
        scores = warpgroup_mma(c, q_tile.permute([1, 0]), nothing, use_acc=False, is_async=True)  # [BLOCK_N, BLOCK_M]
        if QUANTIZED:
            turned = warpgroup_mma(k_rope, q_rope_tile.permute([1, 0]), nothing, use_acc=False, is_async=True)
            scores, turned = warpgroup_mma_wait(0, deps=[scores, turned])
            factor = factor.to(gl.float32)[:, None]
            scores = scores * factor + turned
        else:
            scores = warpgroup_mma(k_rope, q_rope_tile.permute([1, 0]), scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
        scores = logits(
            scores, seen, rows[None, :], tokens[:, None], stop, rest, scale, cap, T, heads_per_norm, rest_s, P, NORMS, CAPPED
        )  # fmt: skip
        new_largest = gl.maximum(largest, gl.max(scores, 0))
        shift = finite(new_largest)
        weights = gl.exp2(scores - shift[None, :])
        fade = gl.exp2(largest - shift)
        largest = new_largest
        total = total * fade[None, :] + weights
        if QUANTIZED:
            weights *= factor * 128  # about as large as the latents, for 16 bits to hold
        weights_tile.store(weights.to(dtype))
        context *= gl.convert_layout(fade, row_of_context)[None, :]
        fence_async_shared()
        context = warpgroup_mma(c.permute([1, 0]), weights_tile, context, is_async=True)
        context = warpgroup_mma_wait(0, deps=[context])
        barrier()  # nobody reads the tile any more
        if not QUANTIZED:
            token = begin + (tile + 2) * BLOCK_N
            fetch(latents, ropes, place, batch * copies, token, 0, ready, latent_tiles, rope_tiles, tile + 2 < tiles)

    total = gl.sum(total, 0)
    inverse = gl.where(total > 0, 1 / total, 0.0)
    if QUANTIZED:
        inverse /= 128
    context *= gl.convert_layout(inverse, row_of_context)[None, :]
    rows = first_row + gl.arange(0, BLOCK_M, rows_layout)
    gl.store(lse + (batch.to(gl.int64) * splits + split) * M + rows, largest + gl.log2(total), mask=rows < M)
    rows = first_row + gl.arange(0, BLOCK_M, row_of_context)
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(1, context_layout))
    write(context, rows[None, :], r[:, None], out, batch, M, T, out_b, out_split, out_h, R)


@gluon.jit
def add_theirs(context, total, largest, weights_tile, theirs, largest_tile):
    """Begin to add up a tile whose weights the other group has computed, with the largest score of each row up to then."""
    newer = largest_tile.load(largest.type.layout)
    fade = gl.exp2(largest - finite(newer))
    context *= gl.convert_layout(fade, gl.SliceLayout(1, context.type.layout))[:, None]
    return warpgroup_mma(weights_tile, theirs, context, is_async=True), total * fade, newer


@gluon.jit
def group(
    latents, ropes, q_mine, q_beside, q_rope, latent_tiles, rope_tiles, weights_tile, largest_tiles, ready, given,
    batch, first_row, begin, stop, pairs, holes, rest, mask, sinks, out, lse,
    scale, cap, S, M, T, window, heads_per_norm, copies, rest_s, mask_b, mask_t, out_b, out_split, out_h,
    ME: gl.constexpr, R: gl.constexpr, P: gl.constexpr,
    NORMS: gl.constexpr, MASKED: gl.constexpr, BOUNDED: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """One of the two groups: 0 computes the weights of even tiles and adds up the left half of all, 1 odd tiles and the right half.

    There is a place for each half of an even tile and an odd one; the first two are of a group's own tile and half, and have the
    tile's rotary keys with them.
    """
    OTHER: gl.constexpr = 1 - ME
    MINE: gl.constexpr = ME  # the half that this group adds up, of its own tile
    BESIDE: gl.constexpr = 2 + ME  # the other half of its tile
    THEIRS: gl.constexpr = 3 - ME  # the half that it adds up, of the other's tile
    BLOCK_M: gl.constexpr = q_mine.shape[0]
    BLOCK_N: gl.constexpr = latent_tiles.shape[2]
    HALF: gl.constexpr = latent_tiles.shape[3]
    dtype: gl.constexpr = q_mine.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    context_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, context_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    row_of_context: gl.constexpr = gl.SliceLayout(1, context_layout)
    mine = latent_tiles.index(MINE).reshape([BLOCK_N, HALF])
    beside = latent_tiles.index(BESIDE).reshape([BLOCK_N, HALF])
    theirs = latent_tiles.index(THEIRS).reshape([BLOCK_N, HALF])
    k_rope = rope_tiles.index(ME).reshape([BLOCK_N, rope_tiles.shape[3]])

    rows = gl.minimum(first_row + gl.arange(0, BLOCK_M, rows_layout), M - 1)  # rows there are not do as the last one does
    largest = gl.full([BLOCK_M], float("-inf"), gl.float32, rows_layout)
    total = gl.zeros([BLOCK_M], gl.float32, rows_layout)  # of this group's tiles
    context = gl.zeros([BLOCK_M, HALF], gl.float32, context_layout)
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, scores_layout)
    if sinks is not None:
        sink = gl.load(sinks + rows // T).to(gl.float32) * 1.4426950408889634  # log2(e)
        largest = gl.where(gl.program_id(1) == 0, sink, largest)
        if ME == 0:
            total = gl.where(gl.program_id(1) == 0, 1.0, total)
    for pair in range(pairs):
        phase = pair % 2
        more = pair + 1 < pairs
        even = begin + pair * 2 * BLOCK_N
        tokens = even + ME * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_layout))
        seen = sees(
            rows[:, None], tokens[None, :], stop, batch, mask, holes, S, T, window, mask_b, mask_t, MASKED, BOUNDED
        )  # fmt: skip
        mbarrier.wait(ready.index(MINE), phase)
        scores = warpgroup_mma(q_mine, mine.permute([1, 0]), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma(q_rope, k_rope.permute([1, 0]), scores, is_async=True)
        mbarrier.wait(ready.index(BESIDE), phase)
        scores = warpgroup_mma(q_beside, beside.permute([1, 0]), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])  # [BLOCK_M, BLOCK_N]
        scores = logits(
            scores, seen, rows[:, None], tokens[None, :], stop, rest, scale, cap, T, heads_per_norm, rest_s, P, NORMS, CAPPED
        )  # fmt: skip
        most = gl.max(scores, 1)

        if ME == 1:  # the other's tile comes first; meanwhile, the weights of this one
            mbarrier.wait(given.index(OTHER), phase)
            mbarrier.wait(ready.index(THEIRS), phase)
            context, total, largest = add_theirs(context, total, largest, weights_tile, theirs, largest_tiles.index(OTHER))
        newer = gl.maximum(largest, most)
        shift = finite(newer)
        fade = gl.exp2(largest - shift)
        weights = gl.exp2(scores - shift[:, None])
        largest = newer
        if ME == 1:
            context, weights = warpgroup_mma_wait(0, deps=[context, weights])  # which are computed before it waits
            barrier()  # nobody reads it any more
            token = even + 2 * BLOCK_N
            fetch(latents, None, THEIRS, batch * copies, token, ME * HALF, ready, latent_tiles, rope_tiles, more)

        total = total * fade + gl.sum(weights, 1)
        rounded = weights.to(dtype)
        weights_tile.store(rounded)
        largest_tiles.index(ME).store(largest)
        fence_async_shared()
        barrier()
        mbarrier.arrive(given.index(ME), count=1)
        context *= gl.convert_layout(fade, row_of_context)[:, None]
        context = warpgroup_mma(gl.convert_layout(rounded, weights_layout), mine, context, is_async=True)
        context = warpgroup_mma_wait(0, deps=[context])
        barrier()
        token = even + (2 + ME) * BLOCK_N
        fetch(latents, ropes, MINE, batch * copies, token, ME * HALF, ready, latent_tiles, rope_tiles, more)

        if ME == 0:  # the other's tile comes after this one
            mbarrier.wait(given.index(OTHER), phase)
            mbarrier.wait(ready.index(THEIRS), phase)
            context, total, largest = add_theirs(context, total, largest, weights_tile, theirs, largest_tiles.index(OTHER))
            context = warpgroup_mma_wait(0, deps=[context])
            barrier()
            token = even + 3 * BLOCK_N
            fetch(latents, None, THEIRS, batch * copies, token, ME * HALF, ready, latent_tiles, rope_tiles, more)

    # Both have seen all tiles, and have the same `largest`.
    if ME == 1:
        mbarrier.wait(given.index(OTHER), pairs % 2)
    largest_tiles.index(ME).store(total)
    barrier()
    mbarrier.arrive(given.index(ME), count=1)
    if ME == 0:
        mbarrier.wait(given.index(OTHER), pairs % 2)
    total += largest_tiles.index(OTHER).load(rows_layout)
    inverse = gl.where(total > 0, 1 / total, 0.0)
    context *= gl.convert_layout(inverse, row_of_context)[:, None]
    if ME == 0:
        rows = first_row + gl.arange(0, BLOCK_M, rows_layout)
        lse += (batch.to(gl.int64) * gl.num_programs(1) + gl.program_id(1)) * M
        gl.store(lse + rows, largest + gl.log2(total), mask=rows < M)
    rows = first_row + gl.arange(0, BLOCK_M, row_of_context)
    r = ME * HALF + gl.arange(0, HALF, gl.SliceLayout(0, context_layout))
    write(context, rows[:, None], r[None, :], out, batch, M, T, out_b, out_split, out_h, R)


@gluon.jit(do_not_specialize=["S", "mask_b", "mask_t"])
def two_groups_kernel(
    latents, ropes, query, rest, mask, attended, sinks, out, lse,
    scale, cap, S, M, T, window, row_blocks, heads_per_norm, copies, rest_b, rest_s, mask_b, mask_t, attended_b,
    out_b, out_split, out_h,
    R: gl.constexpr, P: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_M: gl.constexpr,
    NORMS: gl.constexpr, MASKED: gl.constexpr, BOUNDED: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """As `hopper_kernel`, with a descriptor of halves of latents, and BLOCK_M 64; it takes no codes."""
    BLOCK_N: gl.constexpr = latents.block_shape[1]
    HALF: gl.constexpr = latents.block_shape[2]
    dtype: gl.constexpr = query.dtype.element_ty
    batch = gl.program_id(0) // row_blocks
    begin, stop, pairs, holes = share(attended, attended_b, batch, S, 2 * BLOCK_N, BOUNDED)

    latent_tiles = gl.allocate_shared_memory(dtype, [4, 1, BLOCK_N, HALF], latents.layout)
    rope_tiles = gl.allocate_shared_memory(dtype, [2, 1, BLOCK_N, BLOCK_P], ropes.layout)
    ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())  # weights of the even tile, and the odd
    for i in gl.static_range(4):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(given.index(i), count=1)
    for i in gl.static_range(2):
        token = begin + i * BLOCK_N
        fetch(latents, ropes, i, batch * copies, token, i * HALF, ready, latent_tiles, rope_tiles, pairs > 0)
        fetch(latents, None, 2 + i, batch * copies, token, HALF - i * HALF, ready, latent_tiles, rope_tiles, pairs > 0)

    first_row = gl.program_id(0) % row_blocks * BLOCK_M
    q_left = query_tile(query, batch, first_row, M, R + P, 0, R, BLOCK_M, HALF, 4)
    q_right = query_tile(query, batch, first_row, M, R + P, HALF, R, BLOCK_M, HALF, 4)
    q_rope = query_tile(query, batch, first_row, M, R + P, R, R + P, BLOCK_M, BLOCK_P, 4)
    shape: gl.constexpr = [BLOCK_M, BLOCK_N]
    weights_tile = gl.allocate_shared_memory(dtype, shape, gl.NVMMASharedLayout.get_default_for(shape, dtype))
    largest_tiles = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fence_async_shared()
    barrier()
    rest += batch.to(gl.int64) * rest_b
    # Written out twice, for a tuple that has a name would make tensors of its constants.
    gl.warp_specialize([
        (group, (
            latents, ropes, q_left, q_right, q_rope, latent_tiles, rope_tiles, weights_tile, largest_tiles, ready, given,
            batch, first_row, begin, stop, pairs, holes, rest, mask, sinks, out, lse,
            scale, cap, S, M, T, window, heads_per_norm, copies, rest_s, mask_b, mask_t, out_b, out_split, out_h,
            0, R, P, NORMS, MASKED, BOUNDED, CAPPED,
        )),
        (group, (
            latents, ropes, q_right, q_left, q_rope, latent_tiles, rope_tiles, weights_tile, largest_tiles, ready, given,
            batch, first_row, begin, stop, pairs, holes, rest, mask, sinks, out, lse,
            scale, cap, S, M, T, window, heads_per_norm, copies, rest_s, mask_b, mask_t, out_b, out_split, out_h,
            1, R, P, NORMS, MASKED, BOUNDED, CAPPED,
        )),
    ], [4], [256])  # fmt: skip


def fits(query: Tensor, latent: Tensor, rest: Tensor) -> bool:
    """Whether the kernel takes these tensors: types and alignment that the copy engine and the matrix units want."""
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device)[0] != 9:
        return False
    if query.dtype not in (torch.bfloat16, torch.float16):
        return False
    copied = [latent] if latent.dtype.itemsize == 1 else [latent, rest]
    places = [tensor.data_ptr() for tensor in copied]
    places += [tensor.stride(dim) * tensor.dtype.itemsize for tensor in copied for dim in (0, 1)]
    return all(place % 16 == 0 for place in places)


def launch(grid: tuple[int, int], latent: Tensor, *, rest: Tensor, BLOCK_M: int, R: int, P: int, **arguments: object) -> None:
    """Run one of the kernels on a grid of (B * row blocks, splits); arguments as for `split_kernel`."""
    block_r, block_p = max(64, triton.next_power_of_2(R)), max(16, triton.next_power_of_2(P))
    batch, tokens = latent.shape[0] if latent.stride(0) else 1, latent.shape[1]
    quantized = latent.dtype.itemsize == 1
    warps = 8 if block_r > 128 and (quantized or BLOCK_M == 64) else 4

    def descriptor(tensor: Tensor, width: int, block: int) -> TensorDescriptor:
        # The layout depends on the size of a number only.
        layout = gl.NVMMASharedLayout.get_default_for([1, BLOCK_N, block], gl.int8 if tensor.dtype.itemsize == 1 else gl.bfloat16)
        strides = [tensor.stride(0) or tokens * tensor.stride(1), tensor.stride(1), 1]
        return TensorDescriptor(tensor, [batch, tokens, width], strides, [1, BLOCK_N, block], layout)

    arguments |= {"rest": rest, "copies": int(latent.stride(0) > 0), "BLOCK_P": block_p, "BLOCK_M": BLOCK_M, "R": R, "P": P}
    if BLOCK_M == 64 and block_r == 512 and not quantized:  # of narrower latents, two programs fit a multiprocessor
        two_groups_kernel[grid](descriptor(latent, R, block_r // 2), descriptor(rest, P, block_p), num_warps=4, **arguments)
        return
    ropes = None if quantized else descriptor(rest, P, block_p)
    hopper_kernel[grid](descriptor(latent, R, block_r), ropes, QUANTIZED=quantized, warps=warps, num_warps=warps, **arguments)
