# SPDX-License-Identifier: Apache-2.0
"""The kernel of `decode_triton.py` for Hopper GPUs (H100, H200), in Gluon.

* Everything is transposed: tokens (64) and the latent's numbers (R) are the rows of the matrix products, heads their columns.
  Hopper's matrix instruction works on 64 rows and any 8 columns, so 16 or 32 heads waste nothing.
* Two tiles of latents in shared memory, filled by the copy engine: while one is worked on the other is on its way, and its place
  is given away again as soon as it has been used. One program to a multiprocessor at 512 + 64.
* A tile in shared memory is the left operand of both products: as it lies for the scores, transposed for the values.
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
def fetch(latents, ropes, place, batch, token, ready, latent_tiles, rope_tiles, wanted):
    """Have the copy engine bring a tile of BLOCK_N tokens; `ready` is signalled when it is there."""
    size: gl.constexpr = latents.block_type.nbytes + (0 if ropes is None else ropes.block_type.nbytes)
    mbarrier.expect(ready.index(place), size, pred=wanted)
    load_tile(latents, [batch, token, 0], ready.index(place), latent_tiles.index(place), pred=wanted)
    if ropes is not None:
        load_tile(ropes, [batch, token, 0], ready.index(place), rope_tiles.index(place), pred=wanted)


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
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [warps, 1], [1, 0])
    # Codes come 8 to a thread: of 16, the threads would write what becomes of them to the same banks.
    codes_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [warps, 1], [1, 0])
    rope_layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0])

    split, splits = gl.program_id(1), gl.num_programs(1)
    batch = gl.program_id(0) // row_blocks
    start, stop, holes = 0, S, 1
    if BOUNDED:
        attended += batch * attended_b
        start, stop, holes = gl.load(attended), gl.load(attended + 1), gl.load(attended + 2)
    tiles = gl.cdiv(stop - start, BLOCK_N)
    begin = start + tiles * split // splits * BLOCK_N
    stop = gl.minimum(stop, start + tiles * (split + 1) // splits * BLOCK_N)
    tiles = gl.cdiv(stop - begin, BLOCK_N)

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
        fetch(latents, ropes, i, batch * copies, begin + i * BLOCK_N, ready, latent_tiles, rope_tiles, i < tiles)

    # The queries, [BLOCK_M, R] and [BLOCK_M, P].
    first_row = gl.program_id(0) % row_blocks * BLOCK_M
    rows = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, q_layout))
    r, p = gl.arange(0, BLOCK_R, gl.SliceLayout(0, q_layout)), gl.arange(0, BLOCK_P, gl.SliceLayout(0, q_layout))
    query += batch.to(gl.int64) * M * (R + P)
    q = gl.load(query + rows[:, None] * (R + P) + r[None, :], mask=(rows < M)[:, None] & (r < R)[None, :], other=0.0)
    q_rope = gl.load(query + rows[:, None] * (R + P) + R + p[None, :], mask=(rows < M)[:, None] & (p < P)[None, :], other=0.0)
    q_tile = gl.allocate_shared_memory(dtype, q.shape, gl.NVMMASharedLayout.get_default_for(q.shape, dtype), q)
    q_rope_tile = gl.allocate_shared_memory(dtype, q_rope.shape, gl.NVMMASharedLayout.get_default_for(q_rope.shape, dtype), q_rope)
    weights_shape: gl.constexpr = [BLOCK_N, BLOCK_M]
    weights_tile = gl.allocate_shared_memory(dtype, weights_shape, gl.NVMMASharedLayout.get_default_for(weights_shape, dtype))
    fence_async_shared()
    barrier()

    rest += batch.to(gl.int64) * rest_b
    if QUANTIZED:  # the first tile's rotary keys and scales; the next one's are always under way
        p = gl.arange(0, BLOCK_P, gl.SliceLayout(0, rope_layout))
        rope_tokens = begin + gl.arange(0, BLOCK_N, gl.SliceLayout(1, rope_layout))
        scale_tokens = begin + gl.arange(0, BLOCK_N, gl.SliceLayout(1, codes_layout))
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
        seen = (tokens < stop)[:, None]
        if MASKED:
            seen = seen & (rows < M)[None, :]  # of the shape that the mask gives it
            if holes != 0:
                spot = mask + batch.to(gl.int64) * mask_b + (rows % T)[None, :] * mask_t + tokens[:, None]
                seen = seen & (gl.load(spot, mask=seen, other=0) != 0)
        elif not BOUNDED:  # causal order
            ahead = tokens[:, None] - (S - T + rows % T)[None, :]
            seen = seen & (ahead <= 0) & (ahead > -window)

        if QUANTIZED:
            rope, factor = next_rope, next_scale
            rope_tokens += BLOCK_N
            scale_tokens += BLOCK_N
            live = (rope_tokens < stop)[:, None] & (p < P)[None, :]
            next_rope = gl.load(rest + rope_tokens[:, None] * rest_s + p[None, :], mask=live, other=0.0)
            next_scale = gl.load(rest + scale_tokens * rest_s + P + NORMS, mask=scale_tokens < stop, other=0.0)
            mbarrier.wait(ready.index(place), tile // 2 % 2)
            codes = latent_tiles.index(place).reshape([BLOCK_N, BLOCK_R]).load(codes_layout)
            c_tile.store(codes.to(dtype) * factor[:, None])
            rope_tiles.store(rope)
            fence_async_shared()
            barrier()  # the codes have been read by all, and what became of them is there
            token = begin + (tile + 2) * BLOCK_N
            fetch(latents, ropes, place, batch * copies, token, ready, latent_tiles, rope_tiles, tile + 2 < tiles)
            c, k_rope = c_tile, rope_tiles
        else:
            mbarrier.wait(ready.index(place), tile // 2 % 2)
            c = latent_tiles.index(place).reshape([BLOCK_N, BLOCK_R])
            k_rope = rope_tiles.index(place).reshape([BLOCK_N, BLOCK_P])
        scores = warpgroup_mma(c, q_tile.permute([1, 0]), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma(k_rope, q_rope_tile.permute([1, 0]), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])  # [BLOCK_N, BLOCK_M]
        if NORMS:
            norm = rest + tokens[:, None] * rest_s + P + (rows // T // heads_per_norm)[None, :]
            scores *= gl.load(norm, mask=(tokens < stop)[:, None], other=0.0).to(gl.float32)
        scores *= scale
        if CAPPED:
            scores = cap * (1 - 2 / (gl.exp2(scores) + 1))
        scores = gl.where(seen, scores, float("-inf"))
        new_largest = gl.maximum(largest, gl.max(scores, 0))
        shift = gl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = gl.exp2(scores - shift[None, :])
        fade = gl.exp2(largest - shift)
        largest = new_largest
        total = total * fade[None, :] + weights
        weights_tile.store(weights.to(dtype))
        context *= gl.convert_layout(fade, row_of_context)[None, :]
        fence_async_shared()
        context = warpgroup_mma(c.permute([1, 0]), weights_tile, context, is_async=True)
        context = warpgroup_mma_wait(0, deps=[context])
        barrier()  # nobody reads the tile any more
        if not QUANTIZED:
            token = begin + (tile + 2) * BLOCK_N
            fetch(latents, ropes, place, batch * copies, token, ready, latent_tiles, rope_tiles, tile + 2 < tiles)

    total = gl.sum(total, 0)
    inverse = gl.where(total > 0, 1 / total, 0.0)
    context *= gl.convert_layout(inverse, row_of_context)[None, :]
    rows = first_row + gl.arange(0, BLOCK_M, rows_layout)
    gl.store(lse + (batch.to(gl.int64) * splits + split) * M + rows, largest + gl.log2(total), mask=rows < M)
    rows = first_row + gl.arange(0, BLOCK_M, row_of_context)
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(1, context_layout))
    out += batch.to(gl.int64) * out_b + split * out_split + (rows // T).to(gl.int64)[None, :] * out_h + (rows % T)[None, :] * R
    gl.store(out + r[:, None], context.to(out.dtype.element_ty), mask=(rows < M)[None, :] & (r < R)[:, None])


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
    """Run `hopper_kernel` on a grid of (B * row blocks, splits); arguments as for `split_kernel`."""
    block_r, block_p = max(64, triton.next_power_of_2(R)), max(16, triton.next_power_of_2(P))
    batch, tokens = latent.shape[0] if latent.stride(0) else 1, latent.shape[1]
    quantized = latent.dtype.itemsize == 1
    warps = 8 if block_r > 128 and (quantized or BLOCK_M == 64) else 4

    def descriptor(tensor: Tensor, width: int, block: int) -> TensorDescriptor:
        # The layout depends on the size of a number only.
        layout = gl.NVMMASharedLayout.get_default_for([1, BLOCK_N, block], gl.int8 if tensor.dtype.itemsize == 1 else gl.bfloat16)
        strides = [tensor.stride(0) or tokens * tensor.stride(1), tensor.stride(1), 1]
        return TensorDescriptor(tensor, [batch, tokens, width], strides, [1, BLOCK_N, block], layout)

    hopper_kernel[grid](
        descriptor(latent, R, block_r),
        None if quantized else descriptor(rest, P, block_p),
        rest=rest,
        copies=int(latent.stride(0) > 0),
        BLOCK_P=block_p,
        BLOCK_M=BLOCK_M,
        R=R,
        P=P,
        QUANTIZED=quantized,
        warps=warps,
        num_warps=warps,
        **arguments,
    )
