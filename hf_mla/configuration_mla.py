# SPDX-License-Identifier: Apache-2.0
"""Configurations of models whose attention is Multi-head Latent Attention (MLA).

* `FAMILIES` has a row for every family. Its classes are made from that when they are first asked for, so a family that is not
  used is not imported, and need not be in the installed Transformers.
* A configuration is a thin subclass of the family's own: `MLAConfigMixin` adds DeepSeek's dimensions, and nothing else changes.
* `head_dim` is what the library's rotary embeddings read: `qk_rope_head_dim`, as in DeepSeek. In a converted model it is the width
  that the original rotates, so `rope_parameters` mean what they mean there, of every type (default, linear, llama3, yarn, ...).
* `auto_map` is part of the configuration, so whatever is saved loads again as remote code, with every head.
* vLLM runs these models by its Transformers backend, over a cache of latents, if it is told that they have MLA: whatever process of
  vLLM reads this file is.

This file travels with every checkpoint: it imports only transformers and the huggingface_hub that it stands on.
"""

import importlib
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.utils import logging


__version__ = "0.2.0"

logger = logging.get_logger("hf_mla")  # the same one in all copies of this file: what is said once is said once

try:  # by this file where it is the package's; where it has travelled, by a package that may be newer
    INSTALLED = metadata.version("hf-mla")
except metadata.PackageNotFoundError:
    INSTALLED = __version__


@dataclass(frozen=True)
class Family:
    """A model family of Transformers, as far as it differs from the next: in names, biases and norms."""

    model_type: str
    """`model_type` of the original."""
    base: str
    """What the names of its classes in Transformers begin with."""
    attention: str = "model.layers.{layer}.self_attn."
    """Where the attention tensors of a layer live."""
    biased: bool = False
    """Whether projections of the attention, some at least, always have a bias."""
    bias_options: tuple[str, ...] = ()
    """Options of the configuration that give them one."""
    qk_norm: bool = False
    """Whether each head's query and key pass an RMSNorm (`q_norm`, `k_norm`) before RoPE."""
    joint_norm: bool = False
    """Whether that is one over all heads together."""
    unit_offset: bool = False
    """Whether it multiplies by 1 + w, not w."""
    interleaved: bool = False
    """Whether the numbers of a rotary pair are neighbours, and not half the rotary width apart."""
    rotates: Callable[[Any, int], bool] = lambda config, layer_idx: True
    """Whether a layer has RoPE, by a configuration, converted or not, and the layer's number."""
    llama_rotary: bool = False
    """Whether it lays out cosines and sines in a way of its own; with MLA it takes Llama's, which are half-split."""
    softcap: bool = False
    """Whether scores are capped, at `attn_logit_softcapping`; SDPA leaves that out, though older ones of the library use it."""
    sinks: bool = False
    """Whether every head attends to a token of a score of its own, too, whose value is zero."""
    head_bias: bool = False
    """Whether the head that predicts tokens has a bias."""

    @property
    def attention_name(self) -> str:
        """What a layer calls its attention."""
        return self.attention.split(".")[-2]

    @property
    def mla(self) -> str:
        """What the names of its classes with MLA begin with: Config, Model, ForCausalLM, ... are appended."""
        return f"{self.base}MLA"

    @property
    def mla_type(self) -> str:
        """`model_type` with MLA."""
        return f"{self.model_type}_mla"


OPTION = ("attention_bias",)  # what most call it

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", bias_options=OPTION),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2", biased=True),
        Family("qwen3", "Qwen3", bias_options=OPTION, qk_norm=True),
        Family("mixtral", "Mixtral"),
        Family("qwen2_moe", "Qwen2Moe", bias_options=("qkv_bias",)),
        Family("qwen3_moe", "Qwen3Moe", bias_options=OPTION, qk_norm=True),
        Family("granite", "Granite", bias_options=OPTION),
        Family("starcoder2", "Starcoder2", bias_options=("use_bias",)),
        Family("seed_oss", "SeedOss", bias_options=("attention_bias", "attention_out_bias")),
        Family("arcee", "Arcee", bias_options=OPTION),
        Family("gemma", "Gemma", bias_options=OPTION),
        Family("apertus", "Apertus", bias_options=OPTION, qk_norm=True),
        Family("hyperclovax", "HyperCLOVAX", bias_options=OPTION),
        Family("cwm", "Cwm"),
        Family("ministral", "Ministral"),
        Family("dots1", "Dots1", bias_options=OPTION, qk_norm=True),
        Family("jais2", "Jais2", bias_options=OPTION),
        Family("olmo", "Olmo", bias_options=OPTION),
        Family("granitemoe", "GraniteMoe", bias_options=OPTION),
        Family("granitemoeshared", "GraniteMoeShared", bias_options=OPTION),
        Family("phi3", "Phi3"),
        Family("gemma2", "Gemma2", bias_options=OPTION, softcap=True),
        Family("gemma3_text", "Gemma3Text", bias_options=OPTION, qk_norm=True, unit_offset=True),
        Family("olmo2", "Olmo2", bias_options=OPTION, qk_norm=True, joint_norm=True),
        Family("olmo3", "Olmo3", bias_options=OPTION, qk_norm=True, joint_norm=True),
        Family("olmoe", "Olmoe", bias_options=OPTION, qk_norm=True, joint_norm=True),
        Family("smollm3", "SmolLM3", bias_options=OPTION, rotates=lambda config, layer_idx: bool(config.no_rope_layers[layer_idx])),
        Family(
            "exaone4",
            "Exaone4",
            qk_norm=True,
            rotates=lambda config, layer_idx: config.sliding_window is None or window_of(config, layer_idx) is not None,
        ),
        Family(
            "cohere2",
            "Cohere2",
            bias_options=OPTION,
            interleaved=True,
            llama_rotary=True,
            rotates=lambda config, layer_idx: window_of(config, layer_idx) is not None,
        ),
        Family("glm4_moe", "Glm4Moe", bias_options=OPTION, qk_norm=True),
        Family("glm4", "Glm4", bias_options=OPTION, interleaved=True),
        Family("ministral3", "Ministral3"),
        Family("phi", "Phi", biased=True, head_bias=True),
        Family("stablelm", "StableLm", bias_options=("use_qkv_bias",), qk_norm=True),
        Family("gpt_neox", "GPTNeoX", "gpt_neox.layers.{layer}.attention.", bias_options=OPTION),
        Family("nemotron", "Nemotron", bias_options=OPTION),
        Family("cohere", "Cohere", bias_options=OPTION, qk_norm=True, interleaved=True, llama_rotary=True),
        Family("gpt_oss", "GptOss", bias_options=OPTION, llama_rotary=True, sinks=True),
    )
}

CLASSES = ("Config", "PreTrainedModel", "Model")
HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def family_of(name: str) -> Family | None:
    """The family of a class with MLA, by the name of the class; None if there is none of that name."""
    base, mla, suffix = name.partition("MLA")
    known = mla and suffix in (*CLASSES, *HEADS)
    return next((family for family in FAMILIES.values() if known and family.base == base), None)


def mla_tp_plan(family: Family, plan: dict[str, str] | None) -> dict[str, str] | None:
    """A family's tensor-parallel plan with the attention replaced; the down-projection is shared by all heads, so never split."""
    if plan is None:
        return None
    attention = f"layers.*.{family.attention_name}"
    rest = {key: value for key, value in plan.items() if not key.startswith(attention)}
    if family.joint_norm or family.sinks:  # what needs all heads of a query, and what is none of these modules: whole everywhere
        return rest
    return rest | {
        f"{attention}.q_proj": "colwise",
        f"{attention}.kv_a_proj_with_mqa": "mla_kv_a_proj",
        f"{attention}.kv_b_proj": "colwise",
        f"{attention}.o_proj": "rowwise",
    }


def auto_map(family: str) -> dict[str, str]:
    """The `auto_map` of a family, e.g. "LlamaMLA". One entry file, so that all classes come from one module."""
    classes = {"AutoConfig": "Config", "AutoModel": "Model"} | {f"AutoModel{head}": head for head in HEADS}
    return {auto_class: f"modeling_mla.{family}{suffix}" for auto_class, suffix in classes.items()}


@dataclass(kw_only=True)
class MLAConfigMixin:
    """What Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) adds to the configuration of a family.

    Args:
        kv_lora_rank: width of the cached latent of one token.
        q_lora_rank: only None; queries are projected directly.
        qk_nope_head_dim: width of a head's query and key without position.
        qk_rope_head_dim: width of the rotary key, shared by all heads and cached beside the latent; even.
        v_head_dim: width of a head's value.
        kv_a_layernorm_eps: epsilon of the RMSNorm on the latent. A model converted in closed form carries 2**40, together
            with norm weights of 2**20: the norm is then the identity, exact in float32 and bfloat16.
        attention_bias: whether `q_proj`, `kv_a_proj_with_mqa` and `o_proj` have biases; `kv_b_proj` never has one.
        num_key_norms: how many numbers are cached beside the latent so that QK-norm stays exact: 0, or the number of
            key/value heads of the original. Only families with QK-norm take another value than 0.
        key_norm_width: how many numbers of the original keys each of these is over, where it is all heads' together, and of the
            queries likewise; None where it is a head's.
        source_rope_dim: of a converted model, how many numbers of a head the original rotates. RoPE is computed at that width,
            and of its pairs the first of every so many is taken. None: it is computed at the width of the rotary key.
        source_rope_factor: with it, what RoPE (YaRN, longrope) multiplied the original's cosines and sines by, for each type of
            layers where these have a RoPE of their own. Weights have it where rotation was lost; `rope_parameters` that are given
            later may have another.
        hf_mla_version: the version of hf_mla that wrote the checkpoint.
    """

    family: ClassVar[Family]
    base_model_tp_plan: ClassVar[dict[str, str] | None]

    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    kv_a_layernorm_eps: float = 1e-6
    attention_bias: bool = False
    num_key_norms: int = 0
    key_norm_width: int | None = None
    source_rope_dim: int | None = None
    source_rope_factor: float | dict[str, float] = 1.0
    hf_mla_version: str = __version__

    def __post_init__(self: Any, **kwargs: Any) -> None:
        check_mla_dimensions(self)
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        # The expanded keys and values have one head per query head.
        self.head_dim, self.num_key_value_heads = self.source_rope_dim or self.qk_rope_head_dim, self.num_attention_heads
        if self.num_key_norms and self.base_model_tp_plan and not self.family.joint_norm:
            self.base_model_tp_plan = {**self.base_model_tp_plan, f"layers.*.{self.family.attention_name}.k_proj": "colwise"}
        kwargs.setdefault("auto_map", auto_map(type(self).__name__.removesuffix("Config")))
        super().__post_init__(**kwargs)  # type: ignore[misc]
        # Again, where the family computes its own, or has no such field.
        self.head_dim, self.num_key_value_heads = self.source_rope_dim or self.qk_rope_head_dim, self.num_attention_heads
        adopt_rope(self)

    def validate_rope(self: Any) -> None:
        """As for all models of Transformers: what a family asks beyond that is of the width of its own heads."""
        PreTrainedConfig.validate_rope(self)

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers; what is saved is of the version that saves it, since its code is saved too."""
        return super().to_dict() | {"hf_mla_version": __version__}  # type: ignore[misc]

    @property
    def kv_floats_per_token_per_layer(self) -> int:
        """Numbers that one layer caches for one token: the latent, the rotary key and the key norms."""
        return self.kv_lora_rank + self.qk_rope_head_dim + self.num_key_norms

    def kv_bytes_per_token(self: Any, itemsize: int = 2) -> int:
        """Bytes that the whole model caches for one token; `itemsize` is the width of a number in bytes."""
        return self.num_hidden_layers * self.kv_floats_per_token_per_layer * itemsize


MADE: dict[str, Any] = {}
"""Configuration classes by name, those that have been asked for."""
WHEN_MADE: list[Callable[[Family], None]] = []
"""Called with the family of each configuration class that is made: the package makes the Auto classes know it."""
LOCK = threading.RLock()  # what several threads ask for at once is made once


def config_class(family: Family) -> Any:
    """The configuration class of a family, made when it is first asked for.

    Args:
        family: a row of the table.

    Returns:
        A class, always the same one.

    Raises:
        AttributeError: the installed Transformers does not have the family.
    """
    name = f"{family.mla}Config"
    with LOCK:
        if name not in MADE:
            if family.model_type not in CONFIG_MAPPING:
                raise AttributeError(f"{name} needs a Transformers that has {family.model_type!r}; {transformers_version} has not.")
            base: Any = CONFIG_MAPPING[family.model_type]
            members = {
                "__module__": __name__,
                "__qualname__": name,
                "__doc__": f"A {family.base} with Multi-head Latent Attention; see `MLAConfigMixin`.",
                "__annotations__": {"attention_bias": bool},
                "model_type": family.mla_type,
                "base_model_tp_plan": mla_tp_plan(family, base.base_model_tp_plan),
                "family": family,
                "attention_bias": family.biased or any(getattr(base, option) for option in family.bias_options),
            }
            MADE[name] = strict(type(name, (MLAConfigMixin, base), members))
            for call in WHEN_MADE:
                call(family)
        return MADE[name]


def __getattr__(name: str) -> Any:
    """Configuration classes are attributes of this module like any other, to imports and to pickle."""
    family = family_of(name)
    if family is None or not name.endswith("Config"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class(family)


def check_mla_dimensions(config: PreTrainedConfig) -> None:
    """Refuse dimensions that no MLA model can have.

    Args:
        config: the configuration to check.

    Raises:
        ValueError: a dimension is not a positive integer, the rotary width is odd, queries are compressed, or there are
            key norms or a width of the source that the attention cannot have.
    """
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_attention_heads"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a positive integer.")
    if config.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim is {config.qk_rope_head_dim}; it must be even, rotary dimensions come in pairs.")
    if config.q_lora_rank is not None:
        raise ValueError(f"q_lora_rank is {config.q_lora_rank}; only null is supported (queries are not cached).")
    norms, heads = config.num_key_norms, config.num_attention_heads
    if norms and not config.family.qk_norm:
        raise ValueError(f"num_key_norms is {norms}; only 0 is possible for {config.model_type}, which has no QK-norm.")
    if norms < 0 or (norms and heads % norms):
        raise ValueError(f"num_key_norms is {norms}; it must be 0 or a divisor of num_attention_heads ({heads}).")
    source, rope_dim = config.source_rope_dim, config.qk_rope_head_dim
    if source is not None and (source % rope_dim or not rope_dim <= source <= config.qk_nope_head_dim):
        raise ValueError(
            f"source_rope_dim is {source}; it must be null or a multiple of qk_rope_head_dim ({rope_dim}), at most "
            f"qk_nope_head_dim ({config.qk_nope_head_dim})."
        )
    if config.kv_a_layernorm_eps <= 0:
        raise ValueError(f"kv_a_layernorm_eps is {config.kv_a_layernorm_eps}; it must be positive.")
    if release(config.hf_mla_version) > release(__version__):
        logger.warning_once(
            f"The checkpoint was written by hf_mla {config.hf_mla_version}, newer than the {__version__} that loads it: "
            "upgrade hf_mla, or load with the code in the checkpoint (trust_remote_code=True)."
        )
    elif release(config.hf_mla_version) < release(INSTALLED):
        logger.warning_once(
            f"The code in the checkpoint is that of hf_mla {config.hf_mla_version}; `hf-mla refresh FOLDER` gives it that of the "
            f"{INSTALLED} installed, for wherever it is loaded with trust_remote_code."
        )


def adopt_rope(config: Any) -> None:
    """Take `rope_parameters` as the original has them, which the library may have set after a configuration was made.

    Args:
        config: the configuration; it is changed.

    Raises:
        ValueError: an older checkpoint has not what it takes to turn as the original does.
    """
    partial = "partial_rotary_factor"  # of a family that does not rotate its whole heads, as here all that `head_dim` says is
    parameters = {kind: rope | {partial: 1.0} if partial in rope else rope for kind, rope in ropes(config).items()}
    config.rope_parameters = parameters.get(None, parameters)
    if getattr(config, partial, None) is not None:  # which Transformers 5.15 has take the place of what is in there
        config.partial_rotary_factor = 1.0
    if config.source_rope_dim is not None or release(config.hf_mla_version) > (0, 1):
        return
    for rope_type in (rope["rope_type"] for rope in ropes(config).values()):  # which was none of these at conversion
        said = (
            f"Of a converted model, rope type {rope_type!r} depends on the width of the original's heads, which hf_mla "
            f"{config.hf_mla_version} did not write down: `hf-mla refresh FOLDER` does."
        )
        if rope_type == "dynamic" and config.qk_rope_head_dim < config.qk_nope_head_dim:
            raise ValueError(said)
        if rope_type in ("yarn", "longrope"):
            logger.warning_once(said)


def ropes(config: Any) -> dict[str | None, dict[str, Any]]:
    """The parameters of RoPE for each type of layers that has its own; under None where all layers have the same."""
    parameters = config.rope_parameters
    return {None: parameters} if "rope_type" in parameters else parameters


def layer_type(config: Any, layer_idx: int) -> str | None:
    """Under what a layer's RoPE is in `ropes`."""
    return None if "rope_type" in config.rope_parameters else config.layer_types[layer_idx]


def window_of(config: Any, layer_idx: int) -> int | None:
    """The sliding window of a layer; None where it attends to all tokens before it."""
    layer_types = getattr(config, "layer_types", None)  # None: all layers are alike
    sliding = layer_types is None or layer_types[layer_idx] == "sliding_attention"
    return getattr(config, "sliding_window", None) if sliding else None


def rotates(config: Any, layer_idx: int) -> bool:
    """Whether a layer of a configuration, converted or not, has RoPE."""
    return FAMILIES[config.model_type.removesuffix("_mla")].rotates(config, layer_idx)


def slides(config: Any) -> bool:
    """Whether a layer attends to fewer tokens than the model takes."""
    windows = (window_of(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
    return any(window is not None and window < config.max_position_embeddings for window in windows)


def release(version: str) -> tuple[int, ...]:
    """The (major, minor) of a version string; compatibility may change with either."""
    return tuple(int(part) for part in version.split(".")[:2])


def register_with_vllm() -> None:
    """Tell vLLM, where it is loaded, that these models cache `kv_lora_rank + qk_rope_head_dim` numbers a token."""
    convertors: Any = sys.modules.get("vllm.transformers_utils.model_arch_config_convertor")
    if convertors is None:  # or one older than this
        return

    class MLAConvertor(convertors.ModelArchConfigConvertorBase):
        def is_deepseek_mla(self) -> bool:
            return True

        def get_head_size(self) -> int:
            if not importlib.import_module("vllm.envs").VLLM_MLA_DISABLE:
                check_vllm(self.hf_text_config, on_cpu=importlib.import_module("vllm.platforms").current_platform.is_cpu())
            return super().get_head_size()

    for family in FAMILIES.values():
        convertors.MODEL_ARCH_CONFIG_CONVERTORS[family.mla_type] = MLAConvertor


def check_vllm(config: Any, on_cpu: bool) -> None:
    """Refuse what vLLM's attention over latents does not do, or would do wrong.

    Args:
        config: the configuration of the model.
        on_cpu: whether vLLM runs on a CPU, where its kernel is made for one size.

    Raises:
        NotImplementedError: vLLM has no kernel for the sizes, or there are key norms, sinks, capped scores or a sliding window.
    """
    rank, rope_dim = config.kv_lora_rank, config.qk_rope_head_dim
    expanded = "or set VLLM_MLA_DISABLE=1, which is right but caches the keys and values of all heads"
    if (rank, rope_dim) != (512, 64) if on_cpu else rank + rope_dim not in (320, 512, 576):
        raise NotImplementedError(
            f"kv_lora_rank + qk_rope_head_dim is {rank} + {rope_dim}; vLLM caches latents of "
            f"{'512 + 64 on a CPU' if on_cpu else '320, 512 or 576 numbers in all'}. "
            f"Convert to 512 + 64, or pad to that (hf-mla export --format deepseek_v3 --pad engine), {expanded}."
        )
    if config.num_key_norms:
        raise NotImplementedError(
            f"num_key_norms is {config.num_key_norms}; vLLM caches none (0). Convert with --qk-norm fold, {expanded}."
        )
    if config.family.sinks or config.family.softcap:
        raise NotImplementedError(f"{config.model_type} has sinks or caps its scores; vLLM's attention over latents does neither.")
    if slides(config):
        raise NotImplementedError(
            f"sliding_window is {config.sliding_window}; vLLM attends to all latents. Serve only what fits in the window "
            f"(--hf-overrides '{{\"sliding_window\": null}}' --max-model-len {config.sliding_window}), {expanded}."
        )


register_with_vllm()
