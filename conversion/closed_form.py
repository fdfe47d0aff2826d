# SPDX-License-Identifier: Apache-2.0
"""One attention layer to MLA in closed form: weights from weights and second moments, nothing trained."""

from typing import Any

import torch

import hf_mla
from hf_mla.modeling_mla import MLAAttention

from .calibrate import LayerMoments
from .factorize import factorize
from .families import FAMILIES
from .rotary import principal_components, rotary_queries, split_keys


# RMSNorm with these is the identity, exact in float32 and bfloat16: sqrt(2**40) = 2**20 outweighs any latent.
IDENTITY_NORM_EPS, IDENTITY_NORM_WEIGHT = 2.0**40, 2.0**20


def mla_config(source: Any, rank: int, rope_dim: int, dtype: str) -> Any:
    """The configuration of the converted model: the source's, with MLA dimensions.

    Args:
        source: the configuration of the original.
        rank: kv_lora_rank.
        rope_dim: qk_rope_head_dim.
        dtype: type of the stored numbers, as torch names it.

    Returns:
        The configuration; its norm on the latent is the identity.
    """
    family = FAMILIES[source.model_type]
    fields = source.to_dict()
    for key in ("model_type", "head_dim", "num_key_value_heads", "auto_map", "transformers_version"):
        fields.pop(key, None)
    fields |= {"architectures": [f"{family.mla}ForCausalLM"], "dtype": dtype}
    return getattr(hf_mla, f"{family.mla}Config")(
        **fields,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope_dim,
        qk_nope_head_dim=source.head_dim,
        v_head_dim=source.head_dim,
        kv_a_layernorm_eps=IDENTITY_NORM_EPS,
    )


@torch.no_grad()
def convert_attention(attention: Any, moment: LayerMoments, config: Any) -> tuple[MLAAttention, float]:
    """Convert one attention layer in closed form.

    Args:
        attention: the original module.
        moment: its moments.
        config: the MLA configuration.

    Returns:
        The MLA module, on the device and in the type of the original, and the share of energy that its latent keeps.
    """
    query, key, value = (getattr(attention, f"{name}_proj").weight.double().cpu() for name in "qkv")
    head_dim, rank, rope_dim = config.qk_nope_head_dim, config.kv_lora_rank, config.qk_rope_head_dim
    kv_heads = key.shape[0] // head_dim
    components = principal_components(key, moment.inputs, kv_heads, rope_dim)
    rotary_key, rest = split_keys(key, components)
    factors = factorize(torch.cat([rest, value]), moment.inputs, [moment.keys, moment.values], rank)

    heads = config.num_attention_heads
    queries = torch.cat([query.view(heads, head_dim, -1), rotary_queries(query, components)], dim=1)  # [H, N + P, D]
    # DeepSeek's scale is (N + P)^-1/2, the original's d^-1/2.
    queries *= attention.scaling * (head_dim + rope_dim) ** 0.5
    up = factors.up.view(2, kv_heads, 1, head_dim, rank).expand(-1, -1, heads // kv_heads, -1, -1)
    up = up.reshape(2, heads, head_dim, rank).transpose(0, 1)  # [H, 2, d, R]: each query head gets its group's key and value
    mla = MLAAttention(config, attention.layer_idx).to(attention.q_proj.weight.device, attention.q_proj.weight.dtype)
    mla.requires_grad_(False)
    mla.q_proj.weight.copy_(queries.flatten(0, 1))
    mla.kv_a_proj_with_mqa.weight.copy_(torch.cat([factors.down, rotary_key]))
    mla.kv_a_layernorm.weight.fill_(IDENTITY_NORM_WEIGHT)
    mla.kv_b_proj.weight.copy_(up.flatten(0, 2))
    mla.o_proj.weight.copy_(attention.o_proj.weight)
    kept, total = factors.spectrum[:rank].sum(), factors.spectrum.sum()
    return mla.eval(), float(kept / total) if total > 0 else 1.0
