# SPDX-License-Identifier: Apache-2.0
"""What conversion asks of a source's family: `FAMILIES`, the table of all, is the runtime's.

What cannot be converted exactly or honestly is refused at once, with the reason: see `refusal`.
"""

from typing import Any

from hf_mla.configuration_mla import FAMILIES

from ..errors import UserError


QK_NORM_VARIANTS = ("exact", "fold")

# The frequencies of these are a function of base^(-2i/P) alone, so a narrower RoPE computes the first of every fold group.
ROPE_TYPES = ("default", "linear", "llama3")


def source_head_dim(config: Any) -> int:
    """Width of a head of a source; not every family has it in its configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def mlp_width(config: Any) -> int:
    """How many numbers a token becomes inside of the widest MLP: of all experts that it goes to, where there are some."""
    experts = getattr(config, "num_experts_per_tok", None)
    if not experts:
        return config.intermediate_size
    routed = experts * getattr(config, "moe_intermediate_size", config.intermediate_size)
    shared = getattr(config, "n_shared_experts", 0) or 0
    beside = shared * getattr(config, "moe_intermediate_size", 0) + getattr(config, "shared_expert_intermediate_size", 0)
    return max(config.intermediate_size, routed + beside)


def biased_projections(config: Any) -> tuple[str, ...]:
    """Which of the projections q, k, v, o of a source have a bias."""
    family = FAMILIES[config.model_type]
    return ("q", "k", "v", "o") if family.bias_option and config.attention_bias else family.biases


def key_norms(config: Any, qk_norm: str) -> int:
    """How many numbers per token the converted model caches beside latent and rotary key.

    Args:
        config: the source's configuration.
        qk_norm: "exact" or "fold".

    Returns:
        One for each key/value head where QK-norm is kept exactly, else 0.

    Raises:
        UserError: there is no such variant.
    """
    if qk_norm not in QK_NORM_VARIANTS:
        raise UserError(f"--qk-norm is {qk_norm}; allowed: {', '.join(QK_NORM_VARIANTS)}")
    return config.num_key_value_heads if FAMILIES[config.model_type].qk_norm and qk_norm == "exact" else 0


def refusal(config: Any) -> str | None:
    """Why a source configuration (of Transformers) cannot be converted, or None if it can."""
    if config.model_type not in FAMILIES:
        if config.model_type.endswith("_mla") or getattr(config, "kv_lora_rank", None) is not None:
            return f"model type {config.model_type!r} already has latent attention; there is nothing to convert"
        return f"model type {config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
    if getattr(config, "quantization_config", None):
        return "the checkpoint is quantized; convert the unquantized one and quantize the result"
    if FAMILIES[config.model_type].qk_norm and biased_projections(config):
        return "attention_bias is true; with QK-norm a key's bias is scaled from token to token, which the format has no place for"
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        if getattr(config, name) < 1:
            return f"{name} is {getattr(config, name)}; it must be positive"
    if config.num_attention_heads % config.num_key_value_heads:
        return f"{config.num_attention_heads} query heads do not divide among {config.num_key_value_heads} key/value heads"
    if config.max_position_embeddings < 2:
        return f"max_position_embeddings is {config.max_position_embeddings}; it must be at least 2"
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        return f"rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
    width = source_head_dim(config)
    if width < 1 or width % 2:
        return f"head_dim is {width}; it must be positive and even"
    return None
