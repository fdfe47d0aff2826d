# SPDX-License-Identifier: Apache-2.0
"""Absorbed decoding for the MLA models of Transformers itself (DeepSeek, GLM, Kimi, ...): `attn_implementation="hf_mla"`.

Each of them caches the latent, and forms the keys and values of all cached tokens again at every step:

    ... queries, rope, norms, cache ...; key, value = self.expand_kv(kv_nope, k_rot); attention(self, query, key, value, mask, ...)

Between the two calls they read nothing of `key` but its length. So no forward is copied, and two hooks are enough:

* `expand_kv` of the class lets the latents through while the model's attention implementation is ours, and is as ever otherwise;
* the attention function gets query [B, H, T, N + P], latents [B, 1, S, R] and rotary keys [B, 1, S, P]. It absorbs, or it expands
  them after all and calls the implementation below, the *base*: "hf_mla" stands on what the library would take by itself, and
  "hf_mla|flash_attention_2" on that. `set_attn_implementation` with any other name undoes it.

Three methods of the library learn our name: the one that checks names, which prepares the classes and refuses models without MLA;
the one with which `generate` makes its cache, which then appends in place as for our own models; and the one with which
`generate_batch` begins, which then makes pages of latents. Nothing else is touched: weights, state dict and what is saved are the
library's. Notation as in `attention_mla.py`. This file stays with the package.
"""

import functools
import sys
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_mla import absorb_if_cheaper, is_quantized
from .cache_mla import dequantize, prepare_latent_cache
from .configuration_mla import release
from .pages_mla import configured, prepare_latent_pages


NAME = "hf_mla"


def base_of(implementation: Any) -> str | None:
    """The base of an attention implementation that is ours, "" if it names none; None for all others."""
    name, _, base = implementation.partition("|") if isinstance(implementation, str) else ("", "", "")
    return base if name == NAME else None


def text_config(config: Any) -> Any:
    """The configuration of the part of a model that generates text; that of a model of text is its own."""
    return config.get_text_config(decoder=True)


def absorb(model: nn.Module) -> None:
    """Make a loaded MLA model of Transformers decode over its latents; `model.set_attn_implementation("sdpa")` undoes it.

    What it has as attention implementation serves for prefill and training on. A converted model decodes so by itself.

    Args:
        model: the model; of one with vision or sound, the part with MLA is changed, and all others stay as they are.

    Raises:
        ValueError: there is no MLA in the model.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is text_config(part.config)]
    parts = [part for part in parts if any(hasattr(module, "expand_kv") for module in part.modules())]
    if not parts:
        raise ValueError(refusal(model))
    for part in parts:
        if base_of(part.config._attn_implementation) is None:
            part.set_attn_implementation(f"{NAME}|{part.config._attn_implementation}")


def refusal(model: nn.Module) -> str:
    """What a user is told whose model has no MLA."""
    return (
        f"{type(model).__name__} is no MLA model of Transformers; attn_implementation={NAME!r} is for these alone (DeepSeek-V3 "
        "and its like): take another."
    )


def prepare(model: PreTrainedModel) -> None:
    """See to it that a model can have our attention implementation; it may have no modules yet.

    Args:
        model: the model, or a part of one.

    Raises:
        ValueError: there is no MLA in it.
        NotImplementedError: this version of Transformers has its model type, but not in a form that can be right.
    """
    text = text_config(model.config)
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    files = {base.__module__ for part in parts for base in type(part).__mro__ if issubclass(base, PreTrainedModel)}
    classes = [
        found
        for name in files
        for found in vars(sys.modules[name]).values()
        if isinstance(found, type) and "expand_kv" in vars(found)
    ]
    if not classes and (text is model.config or len(parts) > 1):  # else its text, in another file, is built after this
        raise ValueError(refusal(model))
    # Before, indexers add the mask to their scores, whether it is numbers or, as here, true and false.
    if "index_topk" in vars(text) and release(transformers.__version__) < (5, 17):
        raise NotImplementedError(
            f"{type(model).__name__} with attn_implementation={NAME!r} needs Transformers 5.17 or newer; this is "
            f"{transformers.__version__}."
        )
    for attention in classes:
        defer(attention)
    for part in parts:  # on the decoder alone: a hook on what `generate` compiles would run in Python, outside of the compiled step
        if part.config is text and not part.can_generate() and share_ranges not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(share_ranges, with_kwargs=True)
    for key in model.config.sub_configs:  # vision and sound, which are built after this, have the library's choice
        config: Any = getattr(model.config, key, None)
        if config is not None and config is not text and base_of(config._attn_implementation) is not None:
            config._attn_implementation = None


def defer(attention: Any) -> None:
    """Make `expand_kv` of a class let latents through while the implementation is ours; the original stays as its `__wrapped__`."""
    expand = attention.expand_kv
    if hasattr(expand, "__wrapped__"):
        return

    @functools.wraps(expand)
    def expand_kv(self: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (kv_nope, k_rot) if base_of(self.config._attn_implementation) is not None else expand(self, kv_nope, k_rot)

    attention.expand_kv = expand_kv


def share_ranges(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Before a forward pass: something for its attention layers to share, which the library hands through to `attend`."""
    if base_of(module.config._attn_implementation) is None:
        return None
    return args, {"attended_ranges": {}} | kwargs


class Changed:
    """An object with some attributes of its own and all others of another; for functions that read the attributes of a module."""

    def __init__(self, original: Any, **changes: Any) -> None:
        vars(self).update(changes, original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    indices: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    attended_ranges: dict[torch.Tensor, torch.Tensor] | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function.

    Args:
        module: the attention module; one without MLA, in a part of the model that is not text, has its keys and values as ever.
        query: [B, H, T, N + P].
        key: [B, 1, S, R], the latents, or their codes.
        value: [B, 1, S, P], the rotary keys, or what a quantized cache holds beside codes.
        attention_mask: as the base wants it.
        scaling: factor on the scores.
        indices: [B, T, K], the tokens that the indexer of a sparse model has picked for each new one; no others are attended to.
        s_aux: [H], sinks: see `absorbed_attention`.
        attended_ranges: see `absorb_if_cheaper`.
        cache: the pages of continuous batching, which before Transformers 5.24 no module appends to by itself.
        **kwargs: passed on to the base.

    Returns:
        The output [B, T, H, V], and the attention weights where the path taken computes them.
    """
    base = base_of(module.config._attn_implementation) or "sdpa"
    expand_kv = getattr(getattr(type(module), "expand_kv", None), "__wrapped__", None)
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx, kwargs)
    if expand_kv is not None:
        latent, rest = key, value
        paged = "write_index" in kwargs
        if indices is not None:
            # The eager base is for weights of all tokens, but models with sinks know no other.
            gather = base != "eager" or s_aux is not None
            latent, rest, attention_mask = pick(latent, rest, attention_mask, indices, gather)
        q_nope, q_rope = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
        assert scaling is not None
        if not paged or attention_mask is not None:  # flash alone knows which tokens of the pages belong to which request
            absorbed = absorb_if_cheaper(
                *(module, q_nope, q_rope, latent, rest, attention_mask, scaling),
                packed=paged,
                attended_ranges=attended_ranges,
                sinks=s_aux,
            )
            if absorbed is not None:
                return absorbed
        if is_quantized(latent):
            latent, rest = dequantize(latent, rest).split([module.kv_lora_rank, module.qk_rope_head_dim], dim=-1)
        key, value = expand_kv(module, latent, rest)
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)
    under = Changed(module, config=Changed(module.config, _attn_implementation=base)) if base not in ("sdpa", "eager") else module
    if s_aux is not None:
        kwargs["s_aux"] = s_aux
    if base == "eager" and attention_mask is not None and attention_mask.dtype == torch.bool:  # see `whole_mask`
        zeros = torch.zeros_like(attention_mask, dtype=query.dtype)
        attention_mask = zeros.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    return attention(under, query, key, value, attention_mask, scaling=scaling, **kwargs)


def pick(
    latent: torch.Tensor, rest: torch.Tensor, mask: torch.Tensor, indices: torch.Tensor, gather: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leave only the tokens that an indexer has picked.

    Args:
        latent: [B, 1, S, R].
        rest: [B, 1, S, P].
        mask: broadcastable to [B, 1, T, S], bool (true attends) or additive.
        indices: [B, T, K].
        gather: whether a single new token may read K tokens in place of S.

    Returns:
        Latents, rotary keys and mask: of the K tokens, or of all with the others masked out.
    """
    (batch, tokens, _), all_tokens = indices.shape, latent.shape[2]
    indices = indices.long()
    if gather and tokens == 1 and indices.shape[-1] < all_tokens:
        rows = indices.transpose(1, 2)[:, None]  # [B, 1, K, 1]
        latent, rest = (tensor.gather(2, rows.expand(-1, -1, -1, tensor.shape[-1])) for tensor in (latent, rest))
        return latent, rest, mask.expand(batch, -1, -1, -1).gather(3, indices[:, None])
    picked = torch.zeros(batch, 1, tokens, all_tokens, dtype=torch.bool, device=mask.device).scatter(3, indices[:, None], True)
    if mask.dtype == torch.bool:
        return latent, rest, mask & picked
    return latent, rest, mask.masked_fill(~picked, torch.finfo(mask.dtype).min)


def register() -> None:
    """Make the attention implementation known to Transformers; once, when the package is imported."""
    models: Any = PreTrainedModel
    generation: Any = GenerationMixin
    check = models._check_and_adjust_attn_implementation
    make_cache = generation._prepare_cache_for_generation
    begin_batching = generation.init_continuous_batching

    @functools.wraps(check)
    def check_and_adjust(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> str:
        base = base_of(attn_implementation)
        if base is None or hasattr(self.config, "hf_mla_version"):  # a converted model absorbs by itself, whatever the base
            return check(self, attn_implementation if base is None else base or None, *args, **kwargs)
        prepare(self)
        return named(check(self, base or None, *args, **kwargs))

    @functools.wraps(make_cache)
    def prepare_cache(self: Any, generation_config: Any, model_kwargs: dict, *args: Any) -> Any:
        make = functools.partial(make_cache, self)
        text = text_config(self.config)
        if base_of(text._attn_implementation) is None:
            return make(generation_config, model_kwargs, *args)
        return prepare_latent_cache(make, text, generation_config, model_kwargs, *args)

    @functools.wraps(begin_batching)
    def begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        text = text_config(self.config)
        base = base_of(text._attn_implementation)
        if base is None:
            return begin_batching(self, *args, **kwargs)
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=text).layers):
            raise NotImplementedError(
                f"{type(self).__name__} caches more than latents, and the pages of generate_batch cannot hold that: use generate."
            )
        # The library takes few names. This one means that masks are wanted, and keeps it from choosing FlashAttention by itself.
        change = {"_attn_implementation": base if "flash" in base else "paged|eager"}

        def make() -> Any:
            with configured(self, **change):
                return begin_batching(self, *args, **kwargs)

        return prepare_latent_pages(make, self, text.kv_lora_rank + text.qk_rope_head_dim, **change)

    models._check_and_adjust_attn_implementation = check_and_adjust
    generation._prepare_cache_for_generation = prepare_cache
    generation.init_continuous_batching = begin
    named("sdpa")
    named("eager")


def named(base: str) -> str:
    """The name of our implementation over a base, which is registered with the base's masks."""
    name = NAME if base == "sdpa" else f"{NAME}|{base}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, {"sdpa": step_mask, "eager": whole_mask}.get(base) or ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def step_mask(**kwargs: Any) -> Any:
    """The library's `sdpa_mask`; that of a step over a static cache in a third of the operations, for which a GPU has to wait."""
    tokens, seen, mask = kwargs["kv_length"], kwargs.get("q_offset"), kwargs.get("attention_mask")
    plain = kwargs["q_length"] == 1 and not kwargs.get("kv_offset") and kwargs.get("mask_function") is causal_mask_function
    if not (plain and isinstance(seen, torch.Tensor) and mask is not None):
        return sdpa_mask(**kwargs)
    mask = nn.functional.pad(mask, [0, tokens - mask.shape[1]])  # [B, S]; of tokens beyond the cache, nothing is left
    return (mask & (torch.arange(tokens, device=mask.device) <= seen))[:, None, None]


def whole_mask(**kwargs: Any) -> Any:
    """The mask that the library's eager attention gets as numbers, before it becomes these: the kernel reads true and false."""
    return step_mask(**kwargs | {"allow_is_causal_skip": False})
