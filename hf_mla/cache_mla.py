# SPDX-License-Identifier: Apache-2.0
"""The compressed cache: one packed latent per token and layer.

* A layer's `keys` are [B, 1, S, R + P], the latent c_kv of R numbers followed by the rotary key of P numbers (and by g key
  norms where QK-norm is kept exactly); its `values` are [B, 1, S, 0]. Nothing else is stored. Everything in Transformers
  that handles caches (beams, cropping, offloading, saving) sees two ordinary tensors, so its own `DynamicCache` and
  `StaticCache` work as well.
* `LatentDynamicLayer` appends in place into a buffer that grows by a quarter, where Transformers' own dynamic layer
  copies the whole cache at every step. The buffer never exceeds `max_length` where that is known (`generate` knows it),
  so a generation that runs to its end holds exactly S * (R + P) numbers per layer.
* The static and sliding-window layers of Transformers are used as they are: they take their shapes from the first tensors
  they see.

This file travels with every checkpoint: it imports only torch, transformers and files beside it.
"""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache, DynamicLayer


class LatentDynamicLayer(DynamicLayer):
    """One layer's packed latents, appended in amortised constant time.

    Args:
        max_length: the number of tokens the buffer need never exceed, or None if that is not known. Longer sequences are
            still cached; the buffer then grows on.
        **kwargs: what other layers take; ignored.
    """

    def __init__(self, max_length: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_length = max_length
        self._buffer: torch.Tensor | None = None  # [B, 1, capacity, R + P]; `keys` is a view of its first S tokens

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
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        total = length + key_states.shape[-2]
        buffer = self._buffer
        if buffer is None or not self._is_view_of(buffer) or total > buffer.shape[-2]:
            buffer = self._grow(key_states, length, total)
        buffer[:, :, length:total] = key_states
        self.keys = buffer[:, :, :total]
        self.values = self.keys[..., :0]
        return self.keys, self.values

    def _is_view_of(self, buffer: torch.Tensor) -> bool:
        """Whether `keys` still lies at the start of the buffer: whoever reorders or offloads a cache replaces it."""
        return (
            self.keys is not None
            and self.keys.data_ptr() == buffer.data_ptr()
            and self.keys.stride() == buffer.stride()
            and self.keys.shape[0] == buffer.shape[0]
            and (torch.is_inference_mode_enabled() or not buffer.is_inference())
        )

    def _grow(self, new: torch.Tensor, length: int, total: int) -> torch.Tensor:
        """Move the first `length` tokens to a buffer with room for `total` or more."""
        if self.max_length is not None:
            capacity = max(total, min(total + total // 4, self.max_length))
        else:
            capacity = total if length == 0 else total + total // 4  # a prompt that is only scored needs no spare room
        buffer = new.new_empty(*new.shape[:2], capacity, new.shape[-1])
        if length and self.keys is not None:
            buffer[:, :, :length] = self.keys
        self._buffer = buffer
        return buffer

    def reset(self) -> None:
        """Forget all tokens and release the buffer."""
        super().reset()
        self.keys = self.values = self._buffer = None
        self.is_initialized = False

    def offload(self) -> None:
        """Move the latents to the CPU; the buffer on the device is released."""
        self._buffer = None
        super().offload()


class MLACache(Cache):
    """A cache of packed latents to pass as `past_key_values`; `generate` makes one by itself.

    Args:
        config: the configuration of the model.
        max_cache_len: None for a cache that grows; a number of tokens for a static one, which `torch.compile` needs.
        offloading: keep all layers but the one at work on the CPU (CUDA only).

    Example:
        >>> cache = MLACache(model.config)
        >>> outputs = model.generate(**inputs, past_key_values=cache)
        >>> cache_bytes(cache)
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int | None = None, offloading: bool = False) -> None:
        like = DynamicCache(config=config) if max_cache_len is None else StaticCache(config, max_cache_len)
        use_latent_layers(like, None)
        super().__init__(layers=like.layers, offloading=offloading)


def use_latent_layers(cache: DynamicCache | StaticCache, max_length: int | None) -> None:
    """Replace the empty growing layers of a cache that `generate` has just made by latent layers, in place."""
    if cache.layer_class_to_replicate is None:
        cache.layers = [LatentDynamicLayer(max_length) if type(x) is DynamicLayer else x for x in cache.layers]


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory that a cache holds, spare capacity included, whatever its class.

    Counts each underlying storage once, so views and over-allocated buffers are reported as what they occupy.
    """
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None), getattr(layer, "_buffer", None)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
