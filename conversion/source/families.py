# SPDX-License-Identifier: Apache-2.0
"""What conversion asks of a source's family: `FAMILIES`, the table of all, is the runtime's.

What cannot be converted exactly or honestly is refused at once, with the reason: see `refusal`.
"""

from typing import Any

from hf_mla.configuration_mla import FAMILIES, ropes

from ..errors import UserError


QK_NORM_VARIANTS = ("exact", "fold")

# Model types with more than text of which the library makes the logits of a text as it does for their text decoder alone. (Not
# "aya_vision", for example: it leaves out Cohere 2's `logit_scale`.)
WRAPPERS = ("llava", "llava_next", "llava_onevision", "vipllava", "mistral3", "gemma3", "internvl")

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def source_head_dim(config: Any) -> int:
    """Width of a head of a source; not every family has it in its configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config: Any) -> int:
    """How many key/value heads a source has; not every family has the number in its configuration."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def rotary_width(config: Any) -> int:
    """How many numbers of a head, its first, are rotated."""
    return int(source_head_dim(config) * next(iter(ropes(config).values())).get("partial_rotary_factor", 1.0))


def experts_per_token(config: Any) -> int:
    """To how many experts a token goes; 0 where there are none."""
    return getattr(config, "num_experts_per_tok", None) or 0


def mlp_width(config: Any) -> int:
    """How many numbers a token becomes inside of the widest MLP: of all experts that it goes to, where there are some."""
    experts = experts_per_token(config)
    if not experts:
        return config.intermediate_size
    routed = experts * getattr(config, "moe_intermediate_size", config.intermediate_size)
    shared = getattr(config, "n_shared_experts", 0) or 0
    beside = shared * getattr(config, "moe_intermediate_size", 0) + getattr(config, "shared_expert_intermediate_size", 0)
    return max(config.intermediate_size, routed + beside)


def caps_scores(config: Any) -> bool:
    """Whether a source's scores are capped, which SDPA leaves out."""
    return config.model_type in FAMILIES and FAMILIES[config.model_type].softcap


def has_biases(config: Any) -> bool:
    """Whether projections of a source's attention, some at least, have a bias."""
    family = FAMILIES[config.model_type]
    return family.biased or any(getattr(config, option) for option in family.bias_options)


def has_qk_norm(config: Any) -> bool:
    """Whether queries and keys of a source are normed; in some families that is an option."""
    option = getattr(config, "use_qk_norm", getattr(config, "qk_layernorm", True))
    return FAMILIES[config.model_type].qk_norm and option


def key_norms(config: Any, qk_norm: str) -> int:
    """How many numbers per token the converted model caches beside latent and rotary key.

    Args:
        config: the source's configuration.
        qk_norm: "exact" or "fold".

    Returns:
        Where QK-norm is kept exactly, one for each key/value head, or one in all if it is over all heads together; else 0.

    Raises:
        UserError: there is no such variant.
    """
    if qk_norm not in QK_NORM_VARIANTS:
        raise UserError(f"--qk-norm is {qk_norm}; allowed: {', '.join(QK_NORM_VARIANTS)}")
    if qk_norm == "fold" or not has_qk_norm(config):
        return 0
    return 1 if FAMILIES[config.model_type].joint_norm else kv_heads(config)


def refusal(config: Any) -> str | None:
    """Why a source configuration (of Transformers) cannot be converted, or None if it can."""
    if config.model_type not in FAMILIES:
        if config.model_type.endswith("_mla") or getattr(config, "kv_lora_rank", None) is not None:
            return f"model type {config.model_type!r} already has latent attention; there is nothing to convert"
        if config.model_type in WRAPPERS:
            return f"the text decoder of a {config.model_type!r}: {refusal(config.text_config)}"
        return f"model type {config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
    if getattr(config, "quantization_config", None):
        return "the checkpoint is quantized; convert the unquantized one and quantize the result"
    if getattr(config, "clip_qkv", None) is not None:
        return (
            f"clip_qkv is {config.clip_qkv}; keys and values that are clipped are no linear function of what enters the attention"
        )
    if getattr(config, "qk_layernorm", False) and not FAMILIES[config.model_type].qk_norm:
        return "qk_layernorm is true; the norm's bias is added to a key after it was scaled, which the format has no place for"
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        if getattr(config, name, 1) < 1:
            return f"{name} is {getattr(config, name)}; it must be positive"
    if config.num_attention_heads % kv_heads(config):
        return f"{config.num_attention_heads} query heads do not divide among {kv_heads(config)} key/value heads"
    if config.max_position_embeddings < 2:
        return f"max_position_embeddings is {config.max_position_embeddings}; it must be at least 2"
    for rope in ropes(config).values():
        if rope["rope_type"] not in ROPE_TYPES:
            return f"rope type {rope['rope_type']!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
    width = source_head_dim(config)
    if width < 1 or width % 2:
        return f"head_dim is {width}; it must be positive and even"
    return None
