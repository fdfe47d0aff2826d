# SPDX-License-Identifier: Apache-2.0
"""The compressed cache: one packed latent per token and layer.

* A layer's `keys` are [B, 1, S, R + P], the latent c_kv of R numbers followed by the rotary key of P numbers (and by g key
  norms where QK-norm is kept exactly); its `values` are [B, 1, S, 0]. Nothing else is stored. Everything in Transformers
  that handles caches (beams, cropping, offloading, saving) sees two ordinary tensors, so its own `DynamicCache` and
  `StaticCache` work as well.
* `LatentDynamicLayer` appends in place into a buffer that grows by a quarter, where Transformers' own dynamic layer
  copies the whole cache at every step. The buffer never exceeds `max_length` where that is known (`generate` knows it),
  so a generation that runs to its end holds exactly S * (R + P) numbers per layer. The buffer is no part of the layer's state,
  so an exporter, which takes every attribute for an input of the program, does not see it.
* The static and sliding-window layers of Transformers are used as they are: they take their shapes from the first tensors
  they see.
* A quantized layer holds two tensors likewise: its `keys` are the codes of the latent, one byte a number, its `values` the rest
  of the packed latent and the token's scale, in the model's type. So whatever handles caches handles it too.

This file travels with every checkpoint: it imports only torch, transformers and files beside it.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers import __version__ as transformers_version
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .configuration_mla import release


# What models and `generate` call a cache, as an argument and in their outputs.
CACHE_NAME = "cache" if release(transformers_version) >= (5, 24) else "past_key_values"


class TokenBuffer:
    """Room for tokens [B, 1, S, width], which are appended in place and in amortised constant time.

    Args:
        max_length: the number of tokens the buffer need never exceed, or None if that is not known. Longer sequences are
            still held; the buffer then grows on.
    """

    def __init__(self, max_length: int | None) -> None:
        self.max_length = max_length
        self.tensor: torch.Tensor | None = None  # [B, 1, capacity, width]

    def append(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Append tokens.

        Args:
            held: [B, 1, S, width], what the last call returned, or whatever has taken its place since; [0] at first.
            new: [B, 1, T, width].

        Returns:
            All tokens [B, 1, S + T, width], as a view of the buffer where that is safe.
        """
        length = held.shape[-2] if held.ndim == 4 else 0
        total = length + new.shape[-2]
        buffer = self.tensor
        if buffer is None or total > buffer.shape[-2] or not is_start_of(buffer, held):
            if self.max_length is not None:
                capacity = max(total, min(total + total // 4, self.max_length))
            else:
                capacity = total if length == 0 else total + total // 4  # a prompt that is only scored needs no spare room
            self.tensor = buffer = new.new_empty(*new.shape[:2], capacity, new.shape[-1])
            if length:
                buffer[:, :, :length] = held
        buffer[:, :, length:total] = new
        return buffer[:, :, :total]


def is_start_of(buffer: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether `held` still lies at the start of a buffer that may be written: whoever reorders or offloads a cache replaces it."""
    return (
        held.data_ptr() == buffer.data_ptr()
        and held.stride() == buffer.stride()
        and held.shape[0] == buffer.shape[0]
        and (torch.is_inference_mode_enabled() or not buffer.is_inference())
    )


class LatentDynamicLayer(DynamicLayer):
    """One layer's packed latents, appended in amortised constant time.

    Args:
        max_length: as for `TokenBuffer`.
        **kwargs: what other layers take; ignored.
    """

    __slots__ = ("_buffers",)  # beside `__dict__`, which is what an exporter looks at

    def __init__(self, max_length: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers = (TokenBuffer(max_length), TokenBuffer(max_length))

    @property
    def buffers(self) -> tuple[TokenBuffer, TokenBuffer]:
        """What `keys` and `values` are views of. A layer that an exporter has put together begins with empty ones."""
        if not hasattr(self, "_buffers"):
            self._buffers = (TokenBuffer(None), TokenBuffer(None))
        return self._buffers

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy has no spare room: it takes no more memory than its tokens, and no exporter learns the strides of a buffer."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        for name, value in vars(self).items():
            whole = isinstance(value, torch.Tensor)
            setattr(twin, name, value.clone(memory_format=torch.contiguous_format) if whole else copy.deepcopy(value, memo))
        twin._buffers = TokenBuffer(self.buffers[0].max_length), TokenBuffer(self.buffers[1].max_length)
        return twin

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append packed latents.

        Args:
            key_states: [B, 1, T, R + P], new latents with their rotary keys.
            value_states: [B, 1, T, 0].
            *args: what other layers take; ignored.
            **kwargs: likewise.

        Returns:
            All latents [B, 1, S, R + P], and the empty values [B, 1, S, 0].
        """
        # Autograd may have saved earlier views of the buffer, and a compiler cannot see whether a view is still ours.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self.buffers[0].append(self.keys, key_states)  # type: ignore[arg-type]
        if value_states.shape[-1]:
            self.values = self.buffers[1].append(self.values, value_states)  # type: ignore[arg-type]
        else:
            self.values = self.keys[..., :0]
        return self.keys, self.values

    def release(self) -> None:
        """Let go of the buffers; `keys` and `values` live on if anything still refers to them."""
        for buffer in self.buffers:
            buffer.tensor = None

    def reset(self) -> None:
        """Forget all tokens and release the buffer."""
        super().reset()
        self.release()
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the sequences for beam search; the buffers, in the old order, are released."""
        super().reorder_cache(beam_idx)
        self.release()

    def offload(self) -> None:
        """Move the latents to the CPU; the buffers on the device are released."""
        self.release()
        super().offload()


class LatentDynamicIndexedLayer(LatentDynamicLayer, DynamicIndexedLayer):
    """`LatentDynamicLayer` for sparse attention: beside the latents it holds the keys of an indexer, as the library's own does."""


LATENT_LAYERS: dict[Any, Any] = {DynamicLayer: LatentDynamicLayer, DynamicIndexedLayer: LatentDynamicIndexedLayer}

QUANTIZATIONS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize(latent: torch.Tensor, rank: int, code_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the latent part of packed latents with a scale per token; the rest stays as it is.

    The scale is rounded to the type it is stored in before the codes are computed, so its rounding costs nothing.

    Args:
        latent: [B, 1, T, R + P + g].
        rank: R.
        code_dtype: one of `QUANTIZATIONS`.

    Returns:
        Codes [B, 1, T, R] of `code_dtype`, and [B, 1, T, P + g + 1]: rotary key, key norms and the scale.
    """
    latent, rest = latent.tensor_split([rank], dim=-1)
    wide = latent.to(torch.promote_types(latent.dtype, torch.float32))
    largest = LARGEST_CODE[code_dtype]
    scale = (wide.abs().amax(dim=-1, keepdim=True) / largest).to(rest.dtype).clamp(min=torch.finfo(rest.dtype).tiny)
    codes = (wide / scale).clamp(-largest, largest)
    if not code_dtype.is_floating_point:
        codes = codes.round()
    return codes.to(code_dtype), torch.cat([rest, scale], dim=-1)


def dequantize(codes: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Undo `quantize` up to rounding: [..., R] and [..., P + g + 1] to packed latents [..., R + P + g] of the latter's type."""
    return torch.cat([codes.to(rest.dtype) * rest[..., -1:], rest[..., :-1]], dim=-1)


class QuantizedLayerMixin:
    """Mixed into a layer, makes it store quantized latents; it is given packed latents and gives back what it stores.

    `keys` are the codes [B, 1, S, R], to be viewed as `code_dtype`: stored as int8, since PyTorch does not index float8
    everywhere. `values` are [B, 1, S, P + g + 1]: rotary key, key norms and the scale. No gradient flows through the cache.

    Args:
        layer: an empty layer of the class that this is mixed into, whose settings are taken over.
        rank: R.
        code_dtype: one of `QUANTIZATIONS`.
    """

    values: Any
    is_compileable: bool

    def __init__(self, layer: Any, rank: int, code_dtype: torch.dtype) -> None:
        vars(self).update(vars(layer))
        if isinstance(layer, LatentDynamicLayer):
            self._buffers = layer.buffers
        self.rank = rank
        self.code_dtype = code_dtype

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate codes and values; the library gives both the type of the codes."""
        super().lazy_initialization(key_states, value_states)  # type: ignore[misc]
        self.values = self.values.to(value_states.dtype)
        if self.is_compileable and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.values)

    @torch.no_grad()
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize and append latents.

        Args:
            key_states: [B, 1, T, R + P + g], packed; or [B, 1, T, R].
            value_states: [B, 1, T, 0], or what is beside the latents, [B, 1, T, P].
            *args: passed on.
            **kwargs: passed on.

        Returns:
            The codes [B, 1, S, R] of all tokens and the rest [B, 1, S, P + g + 1], as `dequantize` wants them.
        """
        rank = key_states.shape[-1] if value_states.shape[-1] else self.rank
        codes, rest = quantize(torch.cat([key_states, value_states], dim=-1), rank, self.code_dtype)
        codes, rest = super().update(codes.view(torch.int8), rest, *args, **kwargs)  # type: ignore[misc]
        return codes.view(self.code_dtype), rest


class QuantizedLatentDynamicLayer(QuantizedLayerMixin, LatentDynamicLayer):
    """`LatentDynamicLayer`, quantized."""


class QuantizedDynamicSlidingWindowLayer(QuantizedLayerMixin, DynamicSlidingWindowLayer):
    """The library's growing layer with a sliding window, quantized."""


class QuantizedStaticLayer(QuantizedLayerMixin, StaticLayer):
    """The library's static layer, quantized."""


class QuantizedStaticSlidingWindowLayer(QuantizedLayerMixin, StaticSlidingWindowLayer):
    """The library's static layer with a sliding window, quantized."""


QUANTIZED_LAYERS: dict[Any, Any] = {
    LatentDynamicLayer: QuantizedLatentDynamicLayer,
    DynamicSlidingWindowLayer: QuantizedDynamicSlidingWindowLayer,
    StaticLayer: QuantizedStaticLayer,
    StaticSlidingWindowLayer: QuantizedStaticSlidingWindowLayer,
}


class MLACache(Cache):
    """A cache of packed latents to pass as `cache` (before Transformers 5.24: `past_key_values`); `generate` makes one by itself.

    Args:
        config: the configuration of the model.
        max_cache_len: None for a cache that grows; a number of tokens for a static one, which `torch.compile` needs.
        offloading: keep all layers but the one at work on the CPU (CUDA only).
        quantization: None, "int8" or "fp8": how the latents are stored; rotary keys stay in the type of the model. For inference:
            no gradient flows through it.

    Example:
        >>> cache = MLACache(model.config)
        >>> outputs = model.generate(**inputs, cache=cache, max_new_tokens=8)
        >>> [tuple(layer.keys.shape) for layer in cache.layers]  # tokens, all but the last one, and numbers of each
        [(1, 1, 12, 32), (1, 1, 12, 32)]
        >>> cache_bytes(cache)
        3328
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_cache_len: int | None = None,
        offloading: bool = False,
        quantization: str | None = None,
    ) -> None:
        like = DynamicCache(config=config) if max_cache_len is None else StaticCache(config, max_cache_len)
        use_latent_layers(like, config, quantization=quantization)
        super().__init__(layers=like.layers, offloading=offloading)

    __iter__ = DynamicCache.__iter__  # what each layer holds, for those who gather caches from several devices


def quantization_of(cache_config: dict[str, Any] | None) -> str:
    """The quantization that `generate(cache_implementation="quantized", cache_config=...)` asks for; int8 if it does not say.

    Args:
        cache_config: as given to `generate`.

    Returns:
        One of `QUANTIZATIONS`.

    Raises:
        ValueError: anything else is asked for; the library's own quantizations want keys and values, which are one tensor here.
    """
    allowed = [{"backend": name} for name in QUANTIZATIONS]
    cache_config = cache_config or allowed[0]
    if cache_config not in allowed:
        raise ValueError(f"cache_config is {cache_config}; it must be one of {', '.join(map(str, allowed))}.")
    return cache_config["backend"]


def use_latent_layers(
    cache: DynamicCache | StaticCache, config: PreTrainedConfig, max_length: int | None = None, quantization: str | None = None
) -> None:
    """Replace the empty layers of a cache that has just been made by latent layers, in place.

    Args:
        cache: the cache.
        config: the configuration of the model.
        max_length: as for `TokenBuffer`.
        quantization: as for `MLACache`.

    Raises:
        ValueError: no such quantization, or none for such layers.
    """
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantization is {quantization!r}; it must be None or one of {', '.join(map(repr, QUANTIZATIONS))}.")
    if cache.layer_class_to_replicate is None:
        cache.layers = [LATENT_LAYERS[type(x)](max_length) if type(x) in LATENT_LAYERS else x for x in cache.layers]
    if quantization is not None:
        latents = [isinstance(x, DynamicLayer | StaticLayer) for x in cache.layers]  # not the states of linear attention
        for layer, quantized in zip(cache.layers, latents, strict=True):
            if quantized and type(layer) not in QUANTIZED_LAYERS:
                raise ValueError(
                    f"quantization is {quantization!r}; it must be None for a model whose cache has a {type(layer).__name__}."
                )
        settings = (config.get_text_config(decoder=True).kv_lora_rank, QUANTIZATIONS[quantization])
        layers = zip(cache.layers, latents, strict=True)
        cache.layers = [QUANTIZED_LAYERS[type(x)](x, *settings) if quantized else x for x, quantized in layers]


def prepare_latent_cache(
    prepare: Callable[..., Any],
    config: PreTrainedConfig,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Make a cache for `generate` as the library does, but of latent layers; one that the user passes is left alone.

    Args:
        prepare: the library's method for it.
        config: the configuration of the model.
        generation_config: as for the method.
        model_kwargs: likewise; the cache is put in.
        generation_mode: likewise.
        batch_size: likewise.
        max_cache_length: likewise.
    """
    given, quantization = model_kwargs.get(CACHE_NAME), None
    if given is None and generation_config.cache_implementation == "quantized":
        quantization = quantization_of(generation_config.cache_config)
        generation_config = copy.copy(generation_config)
        generation_config.cache_implementation = None  # a growing cache, whose layers are replaced below
    prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    cache = model_kwargs.get(CACHE_NAME)
    if given is None and cache is not None:
        use_latent_layers(cache, config, max_cache_length, quantization)


def cache_of(outputs: Any) -> Any:
    """The cache in what a model or `generate` returned, whatever this version of Transformers calls it; None if there is none."""
    return outputs.get(CACHE_NAME)


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory that a cache holds, spare capacity included, whatever its class.

    Counts each underlying storage once, so views and over-allocated buffers are reported as what they occupy.
    """
    storages: dict[int, int] = {}
    for layer in cache.layers:
        buffers = [buffer.tensor for buffer in getattr(layer, "buffers", [])]
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None), *buffers):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
