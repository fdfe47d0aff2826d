# SPDX-License-Identifier: Apache-2.0
"""The attention module of models with MLA.

* `MLAAttention` is DeepSeek's module: the same sub-module names and shapes, a real norm on the latent, one `expand_kv`.
  It caches the packed latent and picks expanded or absorbed attention by cost, so nobody has to choose.
* QK-norm divides head j's key by its root mean square, one number s_j(t) per token. RoPE keeps lengths, so s_j(t) is a factor
  on the score: it is computed from the original key projection, cached beside the latent, and the rest is linear as ever.
  Where the norm is over all heads together, it is one number for all of them.
* YaRN and longrope multiply cosines and sines by a factor, so scores by its square: what is rotated gets it there, what has lost
  its rotation by the weights. Where other `rope_parameters` are given to a converted model, queries make up for the difference.
* What only some families have costs the others nothing: caps, sinks, layers without RoPE, queries scaled by their position.

This file travels with every checkpoint: it imports only torch, transformers and files beside it.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .attention_mla import absorb_if_cheaper
from .cache_mla import dequantize
from .configuration_mla import layer_type, ropes, rotates, window_of


def inverse_rms(hidden_states: torch.Tensor, eps: float, dims: int | tuple[int, ...] = -1) -> torch.Tensor:
    """What RMSNorm over some dimensions multiplies by: [..., width] -> [..., 1], in float32 or wider."""
    hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    return torch.rsqrt(hidden_states.pow(2).mean(dims, keepdim=True) + eps)


def own_eager(config: Any) -> Callable[..., Any]:
    """The library's eager attention of a family: that of its own file knows of caps and sinks."""
    modeling = CONFIG_MAPPING[config.family.model_type].__module__.replace(".configuration_", ".modeling_")
    return importlib.import_module(modeling).eager_attention_forward


def additive_mask(attention_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What eager attention adds to the scores, of a mask as SDPA wants it, which is None for a causal one: [B or 1, 1, T, S]."""
    if attention_mask is None:
        attention_mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        attention_mask = attention_mask if query.shape[2] == 1 else attention_mask.tril()  # from the first token, as in SDPA
    if attention_mask.dtype != torch.bool:
        return attention_mask
    return query.new_zeros(attention_mask.shape).masked_fill(~attention_mask, torch.finfo(query.dtype).min)


def rotary_embedding(config: Any, own: Any) -> nn.Module:
    """The rotary embedding of a model with MLA, given the class of its family's own."""
    if config.family.llama_rotary:  # imported by those alone that take it
        own = importlib.import_module("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding
    folded = config.head_dim // config.qk_rope_head_dim
    return own(config) if folded == 1 else NarrowerRotaryEmbedding(own(config), folded)


class NarrowerRotaryEmbedding(nn.Module):
    """The rotary embedding that a model had before it was converted, and of its pairs the first of every `folded`.

    Some types of RoPE (YaRN, dynamic, longrope) give the pairs of narrower heads other frequencies than these.
    """

    def __init__(self, own: nn.Module, folded: int) -> None:
        super().__init__()
        self.own, self.folded = own, folded

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B, T, P], as the library calls for them."""
        cos, sin = self.own(*args, **kwargs)  # half-split, so every `folded`-th number begins the second half as well
        return cos[..., :: self.folded], sin[..., :: self.folded]


def rope_factor(config: Any, kind: str | None) -> float:
    """What the cosines and sines of one of `ropes` are multiplied by, by a configuration of the library's."""
    name = ropes(config)[kind]["rope_type"]
    return 1.0 if name == "default" else ROPE_INIT_FUNCTIONS[name](config, layer_type=kind)[1]


def factor_of_lost(config: Any, layer_idx: int) -> float:
    """What a layer's scores lack of RoPE's factor where conversion took rotation away: 1 with the parameters of that time."""
    if config.source_rope_dim is None or not rotates(config, layer_idx):
        return 1.0
    before = config.source_rope_factor
    before = before[config.layer_types[layer_idx]] if isinstance(before, dict) else before
    return (rope_factor(config, layer_type(config, layer_idx)) / before) ** 2


def rotate_half(pairs: torch.Tensor) -> torch.Tensor:
    """A quarter turn of the pairs (i, i + P / 2) in the last dimension of [..., P]."""
    first, second = pairs.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class MLARMSNorm(nn.Module):
    """RMSNorm that multiplies by its weight before it rounds to the input's type.

    Rounding last keeps float64 exact, and lets float16 pass through the identity norm of a closed-form conversion (epsilon
    2**40, weight 2**20), whose intermediate values lie below float16's range. The weight itself lies above it: where the model is
    cast to float16, it becomes float32, as `_keep_in_fp32_modules` has it where the model is loaded in float16.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of [..., hidden_size]."""
        normed = hidden_states * inverse_rms(hidden_states, self.variance_epsilon)
        return (self.weight * normed).to(hidden_states.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "MLARMSNorm":
        """All of `half`, `to` and `cuda` comes through here."""

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.dtype != torch.float16 else tensor.to(applied.device, torch.float32)

        return super()._apply(apply, recurse)

    def extra_repr(self) -> str:
        """Shape and epsilon, for `print(model)`."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class MLAAttention(nn.Module):
    """Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, section 2.1); notation as in `attention_mla.py`."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.attention_dropout = getattr(config, "attention_dropout", 0.0)
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_head_dim
        self.v_head_dim = config.v_head_dim
        self.num_key_value_groups = 1  # expanded keys and values have one head per query head
        self.scaling = self.qk_head_dim**-0.5
        self.is_causal = True
        self.sliding_window = window_of(config, layer_idx)
        self.rotates = rotates(config, layer_idx)
        self.eager = own_eager(config)
        self.softcap = config.attn_logit_softcapping if config.family.softcap else None
        self.num_key_norms = config.num_key_norms
        self.key_norm_width = config.key_norm_width or config.qk_nope_head_dim
        self.query_norm_dims = -1 if config.key_norm_width is None else (1, 3)  # of [B, H, T, N]
        self.qk_norm_eps: Any = getattr(config, "rms_norm_eps", None) or getattr(config, "layer_norm_eps", None)
        self.source_rope_dim = config.source_rope_dim
        self.factor_of_lost = factor_of_lost(config, layer_idx)
        self.query_growth = config.rope_parameters.get("llama_4_scaling_beta")

        heads, hidden_size, bias = config.num_attention_heads, config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden_size, heads * self.qk_head_dim, bias=bias)
        if self.num_key_norms:  # the original keys, for the sake of their norms
            self.k_proj = nn.Linear(hidden_size, self.num_key_norms * self.key_norm_width, bias=bias)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, self.kv_lora_rank + self.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = MLARMSNorm(self.kv_lora_rank, eps=config.kv_a_layernorm_eps)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden_size, bias=bias)
        if config.family.sinks:  # scores of a token that all attend to and whose value is zero
            self.sinks = nn.Parameter(torch.zeros(heads))

    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Form the keys and values of every head.

        Args:
            kv_nope: [B, 1, S, R], latents.
            k_rot: [B, 1, S, P], rotary keys after RoPE.

        Returns:
            Keys [B, H, S, N + P] and values [B, H, S, V].
        """
        # Contiguous and of three dimensions, [B, S, R]: what adapters and quantized layers are made for.
        expanded = self.kv_b_proj(kv_nope.squeeze(1).contiguous()).unflatten(-1, (-1, self.qk_nope_head_dim + self.v_head_dim))
        k_nope, value = expanded.transpose(1, 2).split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat([k_nope, k_rot.expand(-1, k_nope.shape[1], -1, -1)], dim=-1), value

    def key_norms(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What QK-norm multiplies the keys of each group of heads by: [B, T, hidden_size] -> [B, 1, T, g]."""
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.key_norm_width))  # [B, T, g, N], or [B, T, 1, all heads' N]
        return inverse_rms(key, self.qk_norm_eps).to(key.dtype).squeeze(-1).unsqueeze(1)

    def query_factor(self, positions: torch.Tensor) -> torch.Tensor:
        """What queries far beyond the context of training are multiplied by, as in Llama 4: [B, T] -> [B, 1, T, 1]."""
        context = self.config.rope_parameters["original_max_position_embeddings"]
        return (1 + self.query_growth * torch.log(1 + torch.floor(positions / context)))[:, None, :, None]

    def value_padding(self) -> int:
        """How many zeros to append to each value for the attention function, and to cut off its output.

        FlashAttention wants keys and values of equal width, and so do the fastest kernels of SDPA on the CPU (4 to 20 times as fast
        as the one without) and, where results must repeat, on a GPU (4 times). An engine that brings its own attention takes
        the values as they are.
        """
        if self.config._attn_implementation.startswith("vllm"):
            return 0
        equal = is_flash_attention_requested(self.config) or self.o_proj.weight.device.type == "cpu"
        equal = equal or torch.are_deterministic_algorithms_enabled()
        return max(0, self.qk_head_dim - self.v_head_dim) if equal else 0

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | PagedAttentionCache | None = None,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        attended_ranges: dict[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from the T new tokens to all S.

        Args:
            hidden_states: [B, T, hidden_size], after the input norm.
            position_embeddings: cosines and sines of the rotary embedding, each [B, T, P]; not read in a layer without.
            attention_mask: as the configured attention implementation wants it.
            cache: to which the packed latents of the new tokens are appended, or the pages of continuous batching.
            past_key_values: the name of `cache` before Transformers 5.24.
            layer_past: its name in GPT-NeoX.
            attended_ranges: for the layers to share: what part of the tokens each mask lets the kernel read.
            **kwargs: passed on to the attention function.

        Returns:
            [B, T, hidden_size], and the attention weights [B, H, T, S] where the path taken computes them.
        """
        batch, tokens = hidden_states.shape[:2]
        query = self.q_proj(hidden_states).view(batch, tokens, -1, self.qk_head_dim).transpose(1, 2)  # [B, H, T, N + P]
        if self.num_key_norms:  # `q_nope` is the original query as it was before its norm
            inverse = inverse_rms(query[..., : self.qk_nope_head_dim], self.qk_norm_eps, self.query_norm_dims)
            query = (query * inverse).to(query.dtype)
        if self.query_growth is not None:
            query = query * self.query_factor(kwargs["position_ids"]).to(query.dtype)
        q_nope, q_rot = query.split_with_sizes([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        if self.factor_of_lost != 1:  # of the rotary numbers of a head, its first; the others never had RoPE's factor
            lost, still = q_nope.tensor_split([self.source_rope_dim], dim=-1)
            q_nope = torch.cat([lost * self.factor_of_lost, still], dim=-1)

        compressed = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)  # [B, 1, T, R + P]
        kv_nope, k_rot = compressed.split_with_sizes([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv_nope = self.kv_a_layernorm(kv_nope)
        if self.rotates:
            cos, sin = position_embeddings  # type: ignore[misc]
            rotary = torch.cat([q_rot, k_rot], dim=1)  # [B, H + 1, T, P]; in a step the number of operations counts, not their size
            rotary = (rotary * cos.unsqueeze(1) + rotate_half(rotary) * sin.unsqueeze(1)).to(rotary.dtype)  # OLMo's are float32
            q_rot, k_rot = rotary.split_with_sizes([q_rot.shape[1], 1], dim=1)

        parts = [kv_nope, k_rot]
        if self.num_key_norms:
            parts.append(self.key_norms(hidden_states))
        sinks = self.sinks if self.config.family.sinks else None
        latent = rest = None
        cache = past_key_values if cache is None else cache
        cache = layer_past if cache is None else cache
        # By what it is, for the names differ between versions; and whoever traces this module gives neither.
        paged = isinstance(cache, PagedAttentionCache)
        if isinstance(cache, (Cache, PagedAttentionCache)):
            latent = torch.cat(parts, dim=-1)
            where = {"kwargs": kwargs} if paged else {}  # to write and read; updated in place
            latent, rest = cache.update(latent, latent[..., :0], self.layer_idx, **where)  # [B, 1, S, R + P + g], or codes
            rest = rest if rest.shape[-1] else None  # of a quantized cache

        # Where flash reads pages, `latent` may hold tokens that only the kernel knows to leave out.
        if latent is not None and (not paged or attention_mask is not None):
            absorbed = absorb_if_cheaper(
                *(self, q_nope, q_rot, latent, rest, attention_mask, self.scaling),
                num_key_norms=self.num_key_norms,
                packed=paged,
                attended_ranges=attended_ranges,
                sinks=sinks,
                softcap=self.softcap,
            )
            if absorbed is not None:
                output, weights = absorbed
                return self.o_proj(output.reshape(batch, tokens, -1)), weights
        if latent is not None:
            latent = latent if rest is None else dequantize(latent, rest)
            parts = list(latent.split([part.shape[-1] for part in parts], dim=-1))
        kv_nope, k_rot = parts[:2]
        key_scale = parts[2].squeeze(1).transpose(1, 2) if self.num_key_norms else None  # [B, g, S]

        query = torch.cat([q_nope, q_rot], dim=-1)
        key, value = self.expand_kv(kv_nope, k_rot)
        if key_scale is not None:
            key = (key.unflatten(1, (key_scale.shape[1], -1)) * key_scale[:, :, None, :, None]).flatten(1, 2)
        padding = self.value_padding()
        if padding:
            value = nn.functional.pad(value, [0, padding])
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        if sinks is not None:
            kwargs["s_aux"] = sinks
        implementation = self.config._attn_implementation.removeprefix("paged|")  # the pages are read already
        if implementation == "sdpa" and (self.softcap is not None or sinks is not None):  # it knows of neither
            implementation, attention_mask = "eager", additive_mask(attention_mask, query, key)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, self.eager)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )  # [B, T, H, V]
        if padding:
            output = output[..., : self.v_head_dim]
        return self.o_proj(output.reshape(batch, tokens, -1)), weights
