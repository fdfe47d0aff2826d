# SPDX-License-Identifier: Apache-2.0
"""The model families that can be converted, one declarative entry each.

A family differs from the next in tensor names, biases and norms. What cannot be converted exactly or honestly is refused at
once, with the reason: see `refusal`.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How a model family of Transformers maps to its MLA counterpart."""

    model_type: str
    """`model_type` of the source."""
    mla: str
    """Prefix of the class names in `hf_mla`: Config, Model and ForCausalLM are appended."""
    attention: str = "model.layers.{layer}.self_attn."
    """Where the attention tensors of a layer live."""


FAMILIES = {family.model_type: family for family in (Family("llama", mla="LlamaMLA"),)}

# The frequencies of these are a function of base^(-2i/P) alone, so a narrower RoPE computes the first of every fold group.
ROPE_TYPES = ("default", "linear", "llama3")


def refusal(config: Any) -> str | None:
    """Why a source configuration (of Transformers) cannot be converted, or None if it can."""
    if config.model_type not in FAMILIES:
        if config.model_type.endswith("_mla") or getattr(config, "kv_lora_rank", None) is not None:
            return f"model type {config.model_type!r} already has latent attention; there is nothing to convert"
        return f"model type {config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
    if getattr(config, "quantization_config", None):
        return "the checkpoint is quantized; convert the unquantized one and quantize the result"
    if config.attention_bias:
        return "attention_bias is true; only attention without biases is supported"
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"):
        if getattr(config, name) < 1:
            return f"{name} is {getattr(config, name)}; it must be positive"
    if config.max_position_embeddings < 2:
        return f"max_position_embeddings is {config.max_position_embeddings}; it must be at least 2"
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        return f"rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
    if config.head_dim % 2:
        return f"head_dim is {config.head_dim}; it must be even"
    return None
