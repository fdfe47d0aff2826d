# SPDX-License-Identifier: Apache-2.0
"""A converted model in DeepSeek-V3's layout: a dense `DeepseekV3ForCausalLM`, which needs no code of ours anywhere.

Notation: N, P, V, R as in `attention_mla.py`; in the export they may be wider, N' etc., and the model stays the same:

* Rotary rows are interleaved there (0, P/2, 1, P/2 + 1, ...), half-split here.
* Rows and columns that pad are zero. Scores are scaled by (N' + P')^-1/2, so queries take sqrt((N' + P') / (N + P)). Pairs that pad
  come last, so theta becomes theta^(P' / P). The norm's mean is over R' numbers, so its weight takes sqrt(R / R').
* Epsilon. An export has one, E, for the hidden size and the latent; but Transformers' class takes 1e-6 for the latent in any case.
  Latents that are multiplied by g have a norm with epsilon E R' / (g^2 R). Trained latents outweigh any such epsilon: E is the
  source's, and g the power of two that keeps the latents' epsilon most nearly, so that no weight is rounded again.
* A layer in closed form has a norm that is the identity, because its epsilon outweighs the latents (`keep_closed_form`). There the
  epsilon is what counts: g is exact, and as all readers must take the same, E is 1e-6 where there is such a layer. Where the
  source's is another, all that adds to the residual stream is multiplied by sqrt(E / source's), which is exact but for rounding.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_mla.configuration_mla import slides

from ..source.families import experts_per_token
from ..source.matching import ModelCheckpoint
from ..source.shards import TORCH_NAMES, TensorHeader
from .gguf_vocabulary import tokenizer_refusal
from .reports import Widths


# Families that are a dense DeepSeek-V3 but for the attention: two RMSNorms a layer, an MLP with a gate, a plain embedding and head.
# What is not named here is refused, for what it has beyond that would be lost in silence.
LIKE_DEEPSEEK = ("llama_mla", "mistral_mla", "qwen2_mla", "qwen3_mla")
FORMATS = ("deepseek_v3", "gguf")  # which hold the same models, but for their tokenizers
LIBRARY_EPS = 1e-6  # of the norm on the latent in Transformers' class
ENGINE_WIDTHS = Widths(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)  # DeepSeek's own
CARRIED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"]
CARRIED += ["max_position_embeddings", "initializer_range", "attention_dropout", "use_cache"]
CARRIED += ["bos_token_id", "eos_token_id", "pad_token_id"]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def refusal(config: Any) -> str | None:
    """Why a converted model cannot be written in this layout, by its configuration, or None if it can."""
    served = "vLLM serves the converted checkpoint itself"
    if experts_per_token(config):
        return f"it is a mixture of experts ({config.model_type}); only dense models are written in this layout"
    if config.model_type not in LIKE_DEEPSEEK:
        return f"layers of {config.model_type!r} are not those of the layout; it holds {', '.join(LIKE_DEEPSEEK)}"
    if config.attention_bias:
        return f"the attention has biases, which the layout has no place for; {served}"
    if getattr(config, "mlp_bias", False):
        return f"the MLP has biases, which the layout has no place for; {served}"
    if config.num_key_norms:
        return f"QK-norm is kept exactly, by {config.num_key_norms} more cached numbers; convert with --qk-norm fold"
    if config.hidden_act != "silu":
        return f"the MLP's activation is {config.hidden_act}; the layout has only silu"
    if slides(config):
        window, context = config.sliding_window, config.max_position_embeddings
        return f"attention slides over {window:,} of {context:,} tokens; the layout has no window"
    rope_type = config.rope_parameters["rope_type"]
    if not has_plain_frequencies(config):
        return (
            f"rope type {rope_type} scales the frequencies; the layout has only theta, and engines take all else for YaRN; {served}"
        )
    if config.source_rope_dim is not None and config.source_rope_factor != 1:
        return (
            "weights hold the factor of a RoPE that rope_parameters had at conversion; give the original these, and convert again"
        )
    if config.kv_a_layernorm_eps >= 1 and str(config.dtype).removeprefix("torch.") == "float16":
        return (
            "it is in closed form and in float16, in which latents as small as they must be are zero; convert with --dtype bfloat16"
        )
    return None


def possible_exports(config: Any, tokenizer: Any = None) -> dict[str, str | None]:
    """For each format why a converted model cannot be exported to it, by its configuration and tokenizer, or None if it can."""
    reasons: dict[str, str | None] = dict.fromkeys(FORMATS, refusal(config))
    if tokenizer is not None:
        reasons["gguf"] = reasons["gguf"] or tokenizer_refusal(tokenizer, config.vocab_size)
    return reasons


def has_plain_frequencies(config: Any) -> bool:
    """Whether the rotary frequencies are theta^(-2i/P), whatever the rope type says."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    if rope["rope_type"] not in ("linear", "llama3"):
        return rope["rope_type"] == "default"
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    frequencies = frequencies[:: config.head_dim // config.qk_rope_head_dim].float()
    pairs = torch.arange(len(frequencies)) * 2 / config.qk_rope_head_dim
    return scale == 1 and torch.allclose(frequencies, rope["rope_theta"] ** -pairs, rtol=1e-5, atol=0)


def widths_of(config: Any, least: Widths | None = None) -> Widths:
    """The widths of a model with MLA, each at least as in `least`."""
    own = {name: getattr(config, name) for name in Widths.__dataclass_fields__}
    return Widths(**{name: max(width, getattr(least, name, 0)) for name, width in own.items()})


def engine_refusals(widths: Widths) -> dict[str, str | None]:
    """Why an engine's own DeepSeek class does not take such widths, or None if it does (vLLM 0.33, SGLang 0.5.23)."""
    rank, rope, nope, value = widths.kv_lora_rank, widths.qk_rope_head_dim, widths.qk_nope_head_dim, widths.v_head_dim
    cached = rank + rope
    heads = ((128, 64, 128), (192, 64, 256), (64, 64, 128), (256, 0, 256))
    vllm = sglang = None
    if cached not in (320, 512, 576):
        vllm = f"latent and rotary key are {cached} numbers wide, it takes 320, 512 or 576"
    elif (nope, rope, value) not in heads:
        vllm = f"heads are {nope} + {rope} and {value} wide, on GPUs up to Hopper it takes 128 + 64 and 128, or 64 + 64 and 128"
    fitting = 1 << (rank - 1).bit_length()
    if cached > fitting and cached not in (576, 288):
        sglang = f"latent and rotary key are {cached} numbers wide, its Triton kernel takes up to {fitting} here, or 288 or 576"
    hint = "; --pad engine fills them up" if widths_of(widths, ENGINE_WIDTHS) == ENGINE_WIDTHS else ""
    return {name: reason and reason + hint for name, reason in (("vllm", vllm), ("sglang", sglang))}


class DeepseekV3Export:
    """The tensors and the configuration of a converted model as DeepseekV3ForCausalLM has them; one tensor in memory at a time.

    Args:
        checkpoint: of a converted model that `refusal` lets through; on disk.
        widths: of the export, none smaller than the model's.
    """

    latent_eps: float | None = LIBRARY_EPS
    """What every reader takes for the epsilon of the latents' norm; None where it is the one of all norms."""
    headers: dict[str, TensorHeader]
    """What `load` gives, by name."""
    identity: list[bool]
    """Of each layer, whether the norm on the latent is the identity, because its epsilon outweighs the latents. Their rows of
    `kv_a_proj_with_mqa` are small there: other types than float32 and bfloat16 lose them."""

    def __init__(self, checkpoint: ModelCheckpoint, widths: Widths) -> None:
        self.checkpoint, self.model, self.widths = checkpoint, checkpoint.config, widths
        self.identity = [self.epsilon_counts(layer) for layer in range(self.model.num_hidden_layers)]
        self.eps = (self.latent_eps if any(self.identity) else None) or self.model.rms_norm_eps
        self.residual = math.sqrt(self.eps / self.model.rms_norm_eps)
        tensors = checkpoint.tensors
        self.headers = {}
        for name, stored in ({HEAD: tensors[EMBEDDING]} | tensors).items():
            empty = torch.empty(stored.shape, dtype=getattr(torch, TORCH_NAMES[stored.dtype]), device="meta")
            self.headers[name] = TensorHeader(tuple(self.change(name, empty).shape), stored.dtype)

    def epsilon_counts(self, layer: int) -> bool:
        """Whether a layer's latents do not by far outweigh their norm's epsilon, for inputs that go in all directions alike."""
        names = (f"model.layers.{layer}.{module}.weight" for module in ("input_layernorm", "self_attn.kv_a_proj_with_mqa"))
        norm, down = (self.checkpoint.load([name], "cpu", torch.float64)[name] for name in names)
        latents = (down[: self.model.kv_lora_rank] * norm).square().sum().item()
        return latents / self.model.kv_lora_rank < 1000 * self.model.kv_a_layernorm_eps

    def latent_factor(self, layer: int) -> float:
        """What a layer's latents are multiplied by before their norm."""
        factor = math.sqrt(self.eps / self.model.kv_a_layernorm_eps * self.widths.kv_lora_rank / self.model.kv_lora_rank)
        return factor if self.identity[layer] else 2.0 ** round(math.log2(factor))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, by their names there."""
        for name in self.headers:
            yield name, self.load(name)

    def load(self, name: str) -> Tensor:
        """Read a tensor and make it one of the export's, in the type that it is stored in."""
        return self.change(name, self.checkpoint.load([name], "cpu")[name])

    def change(self, name: str, weight: Tensor) -> Tensor:
        """Make a tensor of the model, which is overwritten, one of the export."""
        model, widths = self.model, self.widths
        rank, rope, nope, value = model.kv_lora_rank, model.qk_rope_head_dim, model.qk_nope_head_dim, model.v_head_dim
        heads = model.num_attention_heads
        module = name.removesuffix(".weight").rpartition(".")[2]
        if module in ("embed_tokens", "down_proj"):
            return weight.mul_(self.residual)
        if module == "o_proj":  # [D, H * V]
            return widened(weight.mul_(self.residual).unflatten(1, (heads, value)), 2, widths.v_head_dim).flatten(1)
        if module == "q_proj":  # [H * (N + P), D]
            width = widths.qk_nope_head_dim + widths.qk_rope_head_dim
            plain, rotary = weight.mul_(math.sqrt(width / (nope + rope))).unflatten(0, (heads, -1)).split([nope, rope], dim=1)
            rotary = widened(interleaved(rotary, 1), 1, widths.qk_rope_head_dim)
            return torch.cat([widened(plain, 1, widths.qk_nope_head_dim), rotary], dim=1).flatten(0, 1)
        if module == "kv_b_proj":  # [H * (N + V), R]
            keys, values = weight.unflatten(0, (heads, -1)).split([nope, value], dim=1)
            both = torch.cat([widened(keys, 1, widths.qk_nope_head_dim), widened(values, 1, widths.v_head_dim)], dim=1)
            return widened(both.flatten(0, 1), 1, widths.kv_lora_rank)
        if module == "kv_a_layernorm":  # [R]
            return widened(weight.mul_(math.sqrt(rank / widths.kv_lora_rank)), 0, widths.kv_lora_rank, value=1.0)
        if module == "kv_a_proj_with_mqa":  # [R + P, D]
            latent, rotary = weight.split([rank, rope])
            latent = latent * self.latent_factor(int(name.split(".")[2]))
            rotary = widened(interleaved(rotary, 0), 0, widths.qk_rope_head_dim)
            return torch.cat([widened(latent, 0, widths.kv_lora_rank), rotary])
        return weight

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says. No layer has experts; readers want sensible numbers for them all the same."""
        model = self.model
        theta = model.rope_parameters["rope_theta"] ** (self.widths.qk_rope_head_dim / model.qk_rope_head_dim)
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "dtype": str(model.dtype).removeprefix("torch."),
            **{name: getattr(model, name) for name in CARRIED},
            **vars(self.widths),
            "q_lora_rank": None,
            "num_key_value_heads": model.num_attention_heads,
            "rms_norm_eps": self.eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "rope_theta": theta,
            "rope_interleave": True,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "first_k_dense_replace": model.num_hidden_layers,
            "moe_intermediate_size": model.intermediate_size,
            "moe_layer_freq": 1,
            "n_routed_experts": 2,  # llama.cpp's converter wants more than one
            "n_shared_experts": 0,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 0,
        }


def interleaved(rows: Tensor, dim: int) -> Tensor:
    """Half-split rotary rows, in one dimension, as pairs next to each other."""
    return rows.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def widened(weight: Tensor, dim: int, width: int, value: float = 0.0) -> Tensor:
    """A tensor whose dimension `dim` is filled up to a width."""
    padding = [0, 0] * (weight.ndim - 1 - dim) + [0, width - weight.shape[dim]]
    return nn.functional.pad(weight, padding, value=value)
