# SPDX-License-Identifier: Apache-2.0
"""One attention layer to MLA in closed form: weights from weights and second moments, nothing trained.

Biases. Of a key's bias, the shared rotary key keeps its part. The position-free rest adds q . b to the scores of a query at
all tokens alike, which the softmax cancels: it is dropped. Attention weights sum to one, so a value's bias goes through
`o_proj` into the bias there. The query's is kept as it is. Neither holds for all: where QK-norm is kept exactly, a key's bias is
scaled from token to token; scores that are capped change with what is added to them all; and a sink, which has no key, takes a
share from all values. There a bias has its part in the latent, as a column of what is factorized, and becomes the latent's bias.

QK-norm. Normed and before RoPE, head j's key is s_j(t) diag(w) W_j x(t), with s_j(t) = (mean of squares of W_j x(t) + eps)^-1/2.
Both variants start from its linear mean, m_j diag(w) W_j x(t) with m_j the same of the mean square over the calibration text:
there heads are weighted as the softmax sees them, and the gradient moment is that at the output of `k_norm`.

* "fold" takes that mean for the key, and the like for the query: a plain DeepSeek model, inexact.
* "exact" caches s_j(t), and queries undo m_j. A query's norm needs its original rows, so those are what `q_proj` keeps for the
  position-free part; the norm's weight, 1 / m_j and the scale go to the other side, the keys' half of `kv_b_proj`.

A norm over all heads together has one s(t) and one m.

RoPE. Of a head, the first r numbers are rotated; the others are position-free as they are. Some types multiply cosines and sines
by a factor, so scores by its square: what loses its rotation would lose that, and gets it as a factor of its own. In a layer
without RoPE all of this is exact with any split: the shared key is so many latents more.
"""

from typing import Any

import torch
from torch import Tensor

import hf_mla
from hf_mla.configuration_mla import ropes
from hf_mla.layer_mla import MLAAttention, rope_factor

from ..source.attention import Norm, read
from ..source.families import FAMILIES, has_biases, key_norms, kv_heads, rotary_width, source_head_dim
from .factorize import factorize
from .moments import LayerMoments
from .rotary import principal_components, rotary_queries, split_keys


# RMSNorm with these is the identity, exact in float32 and bfloat16: sqrt(2**40) = 2**20 outweighs any latent.
IDENTITY_NORM_EPS, IDENTITY_NORM_WEIGHT = 2.0**40, 2.0**20
SMALL_LATENT_WEIGHT = 2.0**10  # of a norm that is the identity because what enters it is small


def mla_config(source: Any, rank: int, rope_dim: int, dtype: str, qk_norm: str = "exact") -> Any:
    """The configuration of the converted model: the source's, with MLA dimensions.

    Args:
        source: the configuration of the original.
        rank: kv_lora_rank.
        rope_dim: qk_rope_head_dim.
        dtype: type of the stored numbers, as torch names it.
        qk_norm: "exact" or "fold"; without meaning for families that have no QK-norm.

    Returns:
        The configuration; its norm on the latent is the identity.
    """
    family = FAMILIES[source.model_type]
    fields = source.to_dict()
    dropped = ("model_type", "head_dim", "num_key_value_heads", "auto_map", "transformers_version")
    for key in (*dropped, "cache_implementation", "cache_config"):  # the last are for `generate`, as others the library drops
        fields.pop(key, None)
    fields |= {"architectures": [f"{family.mla}ForCausalLM"], "dtype": dtype}
    fields["attention_bias"] = has_biases(source)
    factors: dict[Any, float] = {kind: rope_factor(source, kind) for kind in ropes(source)}
    if family.joint_norm:
        fields["key_norm_width"] = kv_heads(source) * source_head_dim(source)
    return getattr(hf_mla, f"{family.mla}Config")(
        **fields,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope_dim,
        qk_nope_head_dim=source_head_dim(source),
        v_head_dim=source_head_dim(source),
        num_key_norms=key_norms(source, qk_norm),
        source_rope_dim=rotary_width(source),
        source_rope_factor=factors.get(None, factors),
        kv_a_layernorm_eps=IDENTITY_NORM_EPS,
    )


def mean_inverse_rms(heads: Tensor, moment: Tensor, norm: Norm) -> Tensor:
    """What QK-norm multiplies each head by before its weights, its mean square replaced by the mean over the text.

    Args:
        heads: [heads, d, D + 1], rows of the projection.
        moment: [D + 1, D + 1], second moment of its input.
        norm: the norm.

    Returns:
        [heads, 1, 1].
    """
    squares = (heads @ moment * heads).sum(-1).mean(-1)
    squares = squares.mean().expand_as(squares) if norm.joint else squares
    return (squares + norm.eps).rsqrt().view(-1, 1, 1)


@torch.no_grad()
def keep_closed_form(mla: MLAAttention, eps: float) -> None:
    """Make a layer in closed form one of a model whose norms on the latent have an epsilon of `eps`, in place.

    Latents a thousand times smaller than the square root of `eps` leave it alone under the root: the norm is the identity again.
    """
    scale_latents(mla, eps**0.5 / SMALL_LATENT_WEIGHT)
    mla.kv_a_layernorm.variance_epsilon = eps
    mla.kv_a_layernorm.weight.fill_(SMALL_LATENT_WEIGHT)


@torch.no_grad()
def make_trainable(mla: MLAAttention) -> None:
    """Undo `keep_closed_form` for a training, in place: the steps of an optimizer would drown latents so small.

    The norm is the identity as before, now by an epsilon of its own.
    """
    norm = mla.kv_a_layernorm
    if norm.weight.eq(SMALL_LATENT_WEIGHT).all() and norm.variance_epsilon < 1:
        scale_latents(mla, SMALL_LATENT_WEIGHT / norm.variance_epsilon**0.5)
        norm.variance_epsilon = IDENTITY_NORM_EPS
        norm.weight.fill_(IDENTITY_NORM_WEIGHT)


def scale_latents(mla: MLAAttention, factor: float) -> None:
    """Multiply a layer's latents, before their norm, in place."""
    rank = len(mla.kv_a_layernorm.weight)
    for parameter in (mla.kv_a_proj_with_mqa.weight, mla.kv_a_proj_with_mqa.bias):
        if parameter is not None:
            parameter[:rank] *= factor


@torch.no_grad()
def convert_attention(attention: Any, moment: LayerMoments, config: Any) -> tuple[MLAAttention, Tensor]:
    """Convert one attention layer in closed form.

    Args:
        attention: the original module.
        moment: its moments; with QK-norm, `keys` is that of the gradient at the output of `k_norm`.
        config: the MLA configuration; with QK-norm, `num_key_norms` tells "exact" from "fold".

    Returns:
        The MLA module, on the device of the original, in float32 or wider, and the spectrum: the share of energy in
        each direction, descending; the latent keeps the first R.
    """
    hidden, rank, rope_dim, head_dim = config.hidden_size, config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim
    source = read(attention, moment.inputs)
    query, key, value = source.query, source.key, source.value
    heads, groups = len(query), len(key)
    # The mean of x is not known: a bias counts as energy as if it were uncorrelated.
    inputs = torch.block_diag(moment.inputs, torch.ones(1, 1).to(moment.inputs))  # of (x, 1)

    # What `query` lacks to be the query that meets the keys. DeepSeek's scale is (N + P)^-1/2, the original's often d^-1/2.
    gain = query.new_full((heads, head_dim, 1), source.scaling * (head_dim + rope_dim) ** 0.5)
    if source.key_norm is not None and source.query_norm is not None:
        key_mean = mean_inverse_rms(key, inputs, source.key_norm)
        normed = key * key_mean * source.key_norm.weight.unsqueeze(-1)
        gain *= source.query_norm.weight.unsqueeze(-1)
        if config.num_key_norms:
            gain /= key_mean.repeat_interleave(heads // groups, dim=0)
        else:
            gain *= mean_inverse_rms(query, inputs, source.query_norm)
    else:
        normed = key
    met_query, rotary = query * gain, source.rotary

    components = principal_components(normed[:, :rotary].flatten(0, 1), inputs, groups, rope_dim)
    rotary_key, rest = split_keys(normed[:, :rotary].flatten(0, 1), components)
    rotary_query = rotary_queries(met_query[:, :rotary].flatten(0, 1), components)
    turned = rest.view(groups, rotary, -1) * source.factor**2
    still = torch.cat([turned, normed[:, rotary:]], dim=1)  # [g, d, D + 1], the keys without position
    value_bias = value[..., hidden].clone() if source.sinks is None else torch.zeros_like(value[..., hidden])
    value[..., hidden] -= value_bias
    if not config.num_key_norms and source.sinks is None and source.softcap is None:
        still[..., hidden] = 0
    factors = factorize(torch.cat([still, value]).flatten(0, 1), inputs, [moment.keys, moment.values], rank)
    up = factors.up.view(2, groups, 1, head_dim, rank).expand(-1, -1, heads // groups, -1, -1)
    key_up, value_up = up.reshape(2, heads, head_dim, rank)  # each query head gets its group's
    if config.num_key_norms:
        key_up = gain * key_up
    else:
        query = met_query
    queries = torch.cat([query, rotary_query], dim=1).flatten(0, 1)  # [H * (N + P), D + 1]
    compressed = torch.cat([factors.down, rotary_key])  # [R + P, D + 1]

    weight = source.output.weight
    with torch.device("meta"):  # random weights would take time to draw
        mla = MLAAttention(config, attention.layer_idx).to(torch.promote_types(weight.dtype, torch.float32))
    mla.to_empty(device=weight.device).requires_grad_(False)
    mla.q_proj.weight.copy_(queries[:, :hidden])
    mla.kv_a_proj_with_mqa.weight.copy_(compressed[:, :hidden])
    mla.kv_a_layernorm.variance_epsilon = IDENTITY_NORM_EPS  # also where the model will have a norm that is fitted
    mla.kv_a_layernorm.weight.fill_(IDENTITY_NORM_WEIGHT)
    mla.kv_b_proj.weight.copy_(torch.cat([key_up, value_up], dim=1).flatten(0, 1))
    mla.o_proj.weight.copy_(weight)
    if config.num_key_norms:
        mla.k_proj.weight.copy_(key[..., :hidden].flatten(0, 1))
    if config.attention_bias:
        mla.q_proj.bias.copy_(queries[:, hidden])
        mla.kv_a_proj_with_mqa.bias.copy_(compressed[:, hidden])
        output_bias = weight.to(inputs) @ value_bias.repeat_interleave(heads // groups, dim=0).flatten()
        if source.output.bias is not None:
            output_bias += source.output.bias.to(inputs)
        mla.o_proj.bias.copy_(output_bias)
        if config.num_key_norms:
            mla.k_proj.bias.copy_(key[..., hidden].flatten())
    if source.sinks is not None:
        mla.sinks.copy_(source.sinks)
    total = factors.spectrum.sum()
    return mla.eval(), factors.spectrum / total if total > 0 else torch.zeros_like(factors.spectrum)
