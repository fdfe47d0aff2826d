# SPDX-License-Identifier: Apache-2.0
"""Configurations of models whose attention is Multi-head Latent Attention (MLA).

* One class per family, a thin subclass of the family's own configuration: it adds DeepSeek's dimensions and nothing else.
* `head_dim` always equals `qk_rope_head_dim`, as in DeepSeek: the library's rotary embeddings read it, so every rope type
  (default, linear, llama3, ...) works on the narrower rotary key without code of ours.
* `auto_map` is part of the configuration, so whatever is saved loads again as remote code, with every head.

This file travels with every checkpoint: it imports only transformers and the huggingface_hub that it stands on.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig
from transformers.utils import logging


__version__ = "0.1.0"

logger = logging.get_logger(__name__)

# Matches the shapes of `MLAAttention`; the key/value down-projection is shared by all heads, so it is never split.
MLA_ATTENTION_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}


def auto_map(family: str) -> dict[str, str]:
    """The `auto_map` of a family, e.g. "LlamaMLA". One entry file, so that all classes come from one module."""
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    return {auto_class: f"modeling_mla.{family}{suffix}" for auto_class, suffix in classes.items()}


@strict
class LlamaMLAConfig(LlamaConfig):
    """A Llama with Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Args:
        kv_lora_rank: width of the cached latent of one token.
        q_lora_rank: only None; queries are projected directly.
        qk_nope_head_dim: width of a head's query and key without position.
        qk_rope_head_dim: width of the rotary key, shared by all heads and cached beside the latent; even.
        v_head_dim: width of a head's value.
        kv_a_layernorm_eps: epsilon of the RMSNorm on the latent. A model converted in closed form carries 2**40, together
            with norm weights of 2**20: the norm is then the identity, exact in float32 and bfloat16.
        hf_mla_version: the version of hf_mla that wrote the checkpoint.
    """

    model_type = "llama_mla"
    base_model_tp_plan: ClassVar = {
        **{key: plan for key, plan in LlamaConfig.base_model_tp_plan.items() if "self_attn" not in key},
        **MLA_ATTENTION_TP_PLAN,
    }

    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    kv_a_layernorm_eps: float = 1e-6
    hf_mla_version: str = __version__

    def __post_init__(self, **kwargs: Any) -> None:
        check_mla_dimensions(self)
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.head_dim = self.qk_rope_head_dim
        # The expanded keys and values have one head per query head.
        self.num_key_value_heads = self.num_attention_heads
        kwargs.setdefault("auto_map", auto_map("LlamaMLA"))
        super().__post_init__(**kwargs)

    @property
    def kv_floats_per_token_per_layer(self) -> int:
        """Numbers that one layer caches for one token: the latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes that the whole model caches for one token; `itemsize` is the width of a number in bytes."""
        return self.num_hidden_layers * self.kv_floats_per_token_per_layer * itemsize


def check_mla_dimensions(config: LlamaMLAConfig) -> None:
    """Refuse dimensions that no MLA model can have.

    Args:
        config: the configuration to check.

    Raises:
        ValueError: a dimension is not a positive integer, the rotary width is odd, queries are compressed, or the
            attention has biases.
    """
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_attention_heads"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a positive integer.")
    if config.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim is {config.qk_rope_head_dim}; it must be even, rotary dimensions come in pairs.")
    if config.q_lora_rank is not None:
        raise ValueError(f"q_lora_rank is {config.q_lora_rank}; only null is supported (queries are not cached).")
    if config.attention_bias:
        raise ValueError("attention_bias is true; only false is supported.")
    if config.kv_a_layernorm_eps <= 0:
        raise ValueError(f"kv_a_layernorm_eps is {config.kv_a_layernorm_eps}; it must be positive.")
    if release(config.hf_mla_version) > release(__version__):
        logger.warning_once(
            f"The checkpoint was written by hf_mla {config.hf_mla_version}, newer than the {__version__} that loads it: "
            "upgrade hf_mla, or load with the code in the checkpoint (trust_remote_code=True)."
        )


def release(version: str) -> tuple[int, ...]:
    """The (major, minor) of a version string; compatibility may change with either."""
    return tuple(int(part) for part in version.split(".")[:2])
