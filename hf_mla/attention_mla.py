# SPDX-License-Identifier: Apache-2.0
"""Absorbed attention: multi-query attention over the cached latents, without forming keys or values.

With W_UK and W_UV the two halves of `kv_b_proj`, c(t) the latent and k_rope(t) the rotary key of token t, head h scores

    score_h(s, t) = scale * (q_nope_h(s) . W_UK_h c(t) + q_rope_h(s) . k_rope(t)),   out_h(s) = W_UV_h sum_t p_h(s, t) c(t)

(DeepSeek-V2, arXiv:2405.04434, section 2.1.2 and appendix C). *Expanded* attention applies W_UK and W_UV to every cached token;
*absorbed* attention moves W_UK to the query and W_UV to the output, so its cost per cached token does not depend on the
head widths. Which one is cheaper is decided by shapes alone (`absorbing_is_cheaper`); they agree to rounding.

`absorb_if_cheaper` is where `MLAAttention` and, under the name of "hf_mla", the library's own MLA models come through.

Notation, here and in `layer_mla.py`:

    B batch    T new tokens    S tokens attended to (cached and new)    H heads
    R kv_lora_rank    P qk_rope_head_dim    N qk_nope_head_dim    V v_head_dim
    g num_key_norms, where QK-norm is kept exactly

On a GPU the absorbed path runs as a Triton kernel, `decode_triton.py`, where the package hf_mla is installed beside Triton. What
stands here is the same in torch, for all other machines, types and masks.

This file travels with every checkpoint: it imports only torch, transformers and files beside it, and hf_mla where that exists.
"""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .cache_mla import dequantize


try:
    from hf_mla.decode_triton import attended_range, can_decode, latent_decode
except ImportError:
    attended_range = can_decode = latent_decode = None  # type: ignore[assignment]


def absorbing_is_cheaper(
    new_tokens: int,
    all_tokens: int,
    rank: int,
    rope_dim: int,
    nope_dim: int,
    value_dim: int,
    weight_cost: int = 0,
    in_kernel: bool = False,
) -> bool:
    """Whether absorbed attention takes fewer multiplications than expanded, per head and sequence, in no more memory.

    Args:
        new_tokens: T.
        all_tokens: S.
        rank: R.
        rope_dim: P.
        nope_dim: N.
        value_dim: V.
        weight_cost: multiplications it takes to obtain W_UK and W_UV for one head, divided by the batch size.
        in_kernel: whether it runs as a kernel, which keeps no scores.

    Returns:
        True to absorb.

    Example:
        >>> widths = {"rank": 512, "rope_dim": 64, "nope_dim": 128, "value_dim": 128}
        >>> absorbing_is_cheaper(new_tokens=1, all_tokens=8192, **widths)
        True
        >>> absorbing_is_cheaper(new_tokens=8192, all_tokens=8192, **widths)
        False
    """
    expanded = all_tokens * rank * (nope_dim + value_dim) + new_tokens * all_tokens * (nope_dim + rope_dim + value_dim)
    absorbed = new_tokens * rank * (nope_dim + value_dim) + new_tokens * all_tokens * (2 * rank + rope_dim) + weight_cost
    # Scores are T * S numbers a head, held about four times over (scores, softmax in float32); K and V are S * (N + P + V).
    fits = in_kernel or 4 * new_tokens <= nope_dim + rope_dim + value_dim
    return new_tokens < all_tokens and fits and absorbed < expanded


def is_plain_linear(module: nn.Module) -> bool:
    """Whether reading `module.weight` gives what calling `module` does.

    Not so for adapters (LoRA, DoRA, IA3, ...), quantized and tensor-parallel weights, hooks, and offloaded weights.
    """
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module.weight
    return type(weight.data) in (torch.Tensor, FakeTensor) and not weight.is_meta  # the latter while it is exported


def is_one_matrix(module: nn.Module) -> bool:
    """Whether calling a module is multiplying by one matrix; so it is but for adapters with biases or with a router (Arrow)."""
    return not hasattr(module, "lora_arrow") and not any(name.endswith("bias") for name, _ in module.named_parameters())


def effective_weight(module: Any, rank: int, like: torch.Tensor) -> torch.Tensor:
    """The weight [out, R] that a bias-free linear module applies, whatever is wrapped around it.

    Pushes the identity through the module, so an adapter or a quantized weight takes part; costs as much as expanding R
    tokens. `like` gives dtype and device.
    """
    if is_plain_linear(module):
        return module.weight
    return module(torch.eye(rank, dtype=like.dtype, device=like.device)).T


def is_quantized(latent: torch.Tensor) -> bool:
    """Whether latents are the codes of a quantized cache, one byte a number."""
    return latent.dtype.itemsize == 1


def runs_in_kernel(
    query: torch.Tensor, latent: torch.Tensor, attention_mask: torch.Tensor | None, rank: int, rope_dim: int, packed: bool = False
) -> bool:
    """Whether absorbed attention of such tensors (see `absorbed_attention`; of the query, type and device) runs as a kernel."""
    return (
        can_decode is not None
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and (latent.dtype == query.dtype or is_quantized(latent))
        and (packed or attention_mask is None or attention_mask.dtype == torch.bool or attention_mask.ndim == 2)
        # An exported program must not need this package. (While torch 2.11 compiles, it says that it exports.)
        and (torch.compiler.is_dynamo_compiling() or not torch.compiler.is_exporting())
        and can_decode(query.device.index, rank, rope_dim)
    )


def should_absorb(
    attention: Any, batch: int, new_tokens: int, all_tokens: int, attention_mask: Any, in_kernel: bool = False
) -> bool:
    """Whether a call of an MLA module takes the absorbed path: only python numbers and types decide, never data."""
    if torch.is_grad_enabled() or (attention.training and attention.attention_dropout):
        return False
    kv_b_proj = attention.kv_b_proj
    if kv_b_proj._forward_pre_hooks:  # adapters chosen per sequence: no one weight fits all of the batch
        return False
    plain = is_plain_linear(kv_b_proj)
    if attention.training and not plain:  # an adapter's dropout must act on tokens, not on the identity
        return False
    if not plain and not is_one_matrix(kv_b_proj):
        return False
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        readable = True
    else:  # no mask, or FlashAttention's [B, S]: it is the kernel that keeps to the causal order and the window
        readable = attention_mask is None or isinstance(attention_mask, torch.Tensor)
        readable = readable and new_tokens == 1 and all_tokens <= (getattr(attention, "sliding_window", None) or all_tokens)
    if torch.compiler.is_exporting() and isinstance(all_tokens, torch.SymInt):
        return readable and new_tokens == 1  # comparing lengths would bind the program to some of them
    dims = (attention.kv_lora_rank, attention.qk_rope_head_dim, attention.qk_nope_head_dim, attention.v_head_dim)
    pushed = 0 if plain else attention.kv_lora_rank**2 * (attention.qk_nope_head_dim + attention.v_head_dim) // batch
    return readable and absorbing_is_cheaper(new_tokens, all_tokens, *dims, weight_cost=pushed, in_kernel=in_kernel)


def absorb_if_cheaper(
    attention: Any,
    query_nope: torch.Tensor,
    query_rope: torch.Tensor,
    latent: torch.Tensor,
    rest: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    scaling: float,
    num_key_norms: int = 0,
    packed: bool = False,
    attended_ranges: dict[torch.Tensor, torch.Tensor] | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """`absorbed_attention` of a module, in a kernel where there is one, if that is possible and the cheaper way.

    Args:
        attention: the module, by DeepSeek's names: `kv_b_proj`, `kv_lora_rank` and so on, and its `config`.
        query_nope: as for `absorbed_attention`.
        query_rope: likewise.
        latent: likewise.
        rest: likewise.
        attention_mask: likewise, or FlashAttention's [B, S], or whatever else the configured attention implementation wants.
        scaling: as for `absorbed_attention`.
        num_key_norms: likewise.
        packed: likewise.
        attended_ranges: for the layers of one forward pass to share: what part of the tokens each mask lets the kernel read.
        sinks: as for `absorbed_attention`.
        softcap: likewise.

    Returns:
        What `absorbed_attention` does; None where keys and values are to be formed.
    """
    batch, _, tokens, _ = query_nope.shape
    # The eager attention is asked for where weights are wanted, which a kernel does not have; models with sinks or caps
    # know no other.
    in_kernel = runs_in_kernel(
        *(query_nope, latent, attention_mask, attention.kv_lora_rank, attention.qk_rope_head_dim, packed)
    ) and (sinks is not None or softcap is not None or not attention.config._attn_implementation.endswith("eager"))
    if not should_absorb(attention, batch, tokens, latent.shape[2], attention_mask, in_kernel):
        return None
    given: Any = attention_mask  # one object for all layers alike, and alive as long as it is a key
    if attention_mask is not None and attention_mask.ndim == 2:  # flash: [B, S], one new token
        attention_mask = attention_mask[:, None, None, :].bool()
    attended = None
    if in_kernel and attended_ranges is not None and attention_mask is not None and not packed:
        if given not in attended_ranges:
            attended_ranges[given] = attended_range(attention_mask)
        attended = attended_ranges[given]
    weight = effective_weight(attention.kv_b_proj, attention.kv_lora_rank, like=query_nope)
    return absorbed_attention(
        *(query_nope, query_rope, latent, weight, attention_mask, scaling),
        num_key_norms=num_key_norms,
        rest=rest,
        in_kernel=in_kernel,
        packed=packed,
        attended=attended,
        sinks=sinks,
        softcap=softcap,
    )


def absorbed_attention(
    query_nope: torch.Tensor,
    query_rope: torch.Tensor,
    latent: torch.Tensor,
    kv_b_weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    num_key_norms: int = 0,
    rest: torch.Tensor | None = None,
    in_kernel: bool = False,
    packed: bool = False,
    attended: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of T new tokens over S latents; no key or value of a cached token is ever formed.

    Args:
        query_nope: [B, H, T, N], position-free queries.
        query_rope: [B, H, T, P], rotary queries, after RoPE.
        latent: [B, 1, S, R + P + g], as cached: c_kv, the rotary key after RoPE, and what the keys of each of g equal groups of
            neighbouring heads are multiplied by. With `rest`, [B, 1, S, R]: c_kv alone, or its codes in a quantized cache.
        kv_b_weight: [H * (N + V), R], the effective weight of `kv_b_proj`.
        attention_mask: None to attend to all S tokens; bool (true attends) or additive, broadcastable to [B, 1, T, S].
        scaling: factor on the scores.
        num_key_norms: g.
        rest: [B, 1, S, P + g], what lies beside the latents where they are not packed (but g is 0 there as yet); beside codes
            [B, 1, S, P + g + 1] (see `cache_mla.quantize`).
        in_kernel: whether a kernel is to do the work, which `runs_in_kernel` says can.
        packed: whether the tokens are of several requests in one row, as in continuous batching: with B = 1, each of the T tokens
            attends to a part of the S, which an additive mask says.
        attended: int32 [B, 3], what the kernel's `attended_range` says of the mask, if it was asked before.
        sinks: [H], scores of a token that every token attends to and whose value is zero.
        softcap: c, if the scores x are to be capped as c * tanh(x / c).

    Returns:
        The output [B, T, H, V] and the attention weights [B, H, T, S], or None where a kernel did the work, which has none.
    """
    batch, heads, tokens, nope_dim = query_nope.shape
    rank, rope_dim = kv_b_weight.shape[1], query_rope.shape[-1]
    value_dim = kv_b_weight.shape[0] // heads - nope_dim
    weight_uk, weight_uv = kv_b_weight.view(heads, -1, rank).split_with_sizes([nope_dim, value_dim], dim=1)  # [H, N, R], [H, V, R]

    # One matrix product per head over all tokens of the batch: a broadcast product would copy W_UK for every sequence.
    query = torch.bmm(query_nope.transpose(0, 1).reshape(heads, batch * tokens, nope_dim), weight_uk)  # [H, B * T, R]
    query = query.view(heads, batch, tokens, rank).transpose(0, 1)  # [B, H, T, R]
    query = torch.cat([query, query_rope], dim=-1)  # [B, H, T, R + P]

    weights = None
    if in_kernel:
        if packed:  # each token as a sequence of its own: the kernel reads only what it attends to
            query = query.transpose(0, 2)  # [T, H, 1, R + P]
            assert attention_mask is not None
            attention_mask = attention_mask.transpose(0, 2) >= 0  # [T, 1, 1, S]; it is additive
            latent = latent.expand(tokens, -1, -1, -1)
            rest = None if rest is None else rest.expand(tokens, -1, -1, -1)
        codes, beside = (latent, rest) if rest is not None else latent.tensor_split([rank], dim=-1)
        tensors = query, codes[:, 0], beside[:, 0]
        context = latent_decode(
            *tensors, rank, scaling, attention_mask, attended, num_key_norms, softcap=softcap or 0.0, sinks=sinks
        )
    else:
        if rest is not None and is_quantized(latent):
            latent, rest = dequantize(latent, rest), None
        latent = latent.squeeze(1)  # [B, S, R + P + g], or [B, S, R] and `rest`
        query = query.view(batch, heads * tokens, rank + rope_dim) * scaling
        if rest is None:
            keys = latent[..., : rank + rope_dim] if num_key_norms else latent
            scores = torch.bmm(query, keys.transpose(1, 2))  # [B, H * T, S]
        else:
            scores = torch.bmm(query[..., :rank], latent.transpose(1, 2))
            scores = torch.baddbmm(scores, query[..., rank:], rest.squeeze(1).transpose(1, 2))
        if num_key_norms:
            key_norms = latent[..., rank + rope_dim :].transpose(1, 2)  # [B, g, S]
            scores = scores.unflatten(1, (num_key_norms, -1)) * key_norms.unsqueeze(2)  # [B, g, H / g * T, S]
        scores = scores.view(batch, heads, tokens, -1)  # [B, H, T, S]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if attention_mask is not None:
            if attention_mask.dtype == torch.bool:
                scores = torch.where(attention_mask, scores, torch.finfo(scores.dtype).min)
            else:
                scores = scores + attention_mask
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(batch, -1, tokens, 1)], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
        if sinks is not None:
            weights = weights[..., :-1]
        context = torch.bmm(weights.reshape(batch, heads * tokens, -1), latent[..., :rank])  # [B, H * T, R]
        context = context.view(batch, heads, tokens, rank).transpose(0, 1)  # [H, B, T, R]

    output = torch.bmm(context.reshape(heads, batch * tokens, rank), weight_uv.transpose(1, 2))  # [H, B * T, V]
    return output.view(heads, batch, tokens, -1).permute(1, 2, 0, 3), weights
