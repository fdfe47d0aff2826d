# SPDX-License-Identifier: Apache-2.0
"""The source model one layer at a time, and its hidden states on all calibration text.

* `LayerStream` builds the library's own model without weights and fills in the part that is at work. What comes before the
  layers, what they are called with and what comes after them is found by running the model's own `forward` with layers that do
  something else, so no family needs code here.
* `allocate` puts hidden states where they fit: on the device, in memory, or in a file.
"""

import copy
import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .matching import empty_model, match_model


logger = logging.getLogger(__name__)

CACHE_ARGUMENTS = ("cache", "past_key_values", "use_cache")  # of a layer, in any version of Transformers
EMBEDDED_TOKENS = 4096  # at a time: the library makes masks for them, a sequence at least
DEVICE_SHARE, MEMORY_SHARE = 1 / 3, 1 / 2  # hidden states take at most so much of what is free there


class LayerStream:
    """A checkpoint's model, of which one layer (or the embedding, or the head) is in memory at a time.

    Args:
        checkpoint: what to read; on disk.
        device: where to compute.
        dtype: what to compute in.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.device, self.dtype = match_model(checkpoint), device, dtype
        self.config = copy.deepcopy(self.checkpoint.config)
        self.model = empty_model(self.checkpoint, dtype)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self.decoder = self.model.base_model
        self.rotary = self.decoder.rotary_emb
        self.layers = next(module for module in self.decoder.children() if isinstance(module, nn.ModuleList))
        self.empty = self.model.state_dict()
        self.calls: list[dict[str, Any]] = []
        """What each layer is called with besides hidden states: masks, positions, rotary embeddings of one sequence."""

    def __len__(self) -> int:
        return len(self.layers)

    def names_in(self, part: nn.Module) -> list[str]:
        """Names of all weights of a part of the model."""
        place = next(name for name, module in self.model.named_modules() if module is part)
        return [name for name in self.empty if name.startswith(f"{place}.")]

    @contextmanager
    def filled(self, names: list[str]) -> Iterator[None]:
        """Give the model some of its weights for the time of the block."""
        try:
            self.model.load_state_dict(self.checkpoint.load(names, self.device, self.dtype), strict=False, assign=True)
            yield
        finally:
            self.model.load_state_dict({name: self.empty[name] for name in names}, strict=False, assign=True)
            give_back_memory()

    @contextmanager
    def layers_doing(self, *first: Callable[..., Tensor]) -> Iterator[None]:
        """Let the first layers do something else than they do, and all others nothing, for the time of the block."""
        for index, layer in enumerate(self.layers):
            layer.forward = first[index] if index < len(first) else lambda hidden_states, *_, **__: hidden_states
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def record_calls(self, window: int) -> None:
        """Set `calls` for sequences of so many tokens."""
        self.calls = self.calls_for(window)

    def calls_for(self, window: int) -> list[dict[str, Any]]:
        """What each layer is called with, besides hidden states, for sequences of so many tokens."""
        calls: list[dict[str, Any]] = []

        def record(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            calls.append({key: value for key, value in kwargs.items() if key not in CACHE_ARGUMENTS})
            return hidden_states.to("meta")  # as the norm's weights are that come next

        with self.layers_doing(*[record] * len(self)), torch.no_grad():
            self.decoder(inputs_embeds=self.zeros(window), use_cache=False)
        return calls

    def calls_alone(self, tokens: int) -> list[dict[str, Any]]:
        """What each layer is called with for sequences of so many tokens of which each sees itself alone."""
        alone = torch.full((1, 1, tokens, tokens), torch.finfo(self.dtype).min, dtype=self.dtype, device=self.device)
        alone.diagonal(dim1=2, dim2=3).zero_()
        return [call | {"attention_mask": alone} for call in self.calls_for(tokens)]

    def zeros(self, tokens: int) -> Tensor:
        """Hidden states of one sequence, of no meaning."""
        return torch.zeros(1, tokens, self.config.hidden_size, dtype=self.dtype, device=self.device)

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """A decoder layer with its weights."""
        with self.filled(self.names_in(self.layers[index])):
            yield self.layers[index]

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """All that comes after the layers, with weights: [B, T, D] -> [B, T, vocabulary]."""
        elsewhere = {*self.names_in(self.layers), *self.names_in(self.model.get_input_embeddings())}

        def head(states: Tensor) -> Tensor:
            with self.layers_doing(lambda *_, **__: states):
                return self.model(inputs_embeds=self.zeros(1), use_cache=False).logits

        with self.filled([name for name in self.empty if name not in elsewhere]):
            yield head

    def embed(self, windows: Tensor, into: Tensor) -> None:
        """Write what the first layer gets for token ids [windows, tokens] to `into` [windows, tokens, D]."""
        count = max(1, EMBEDDED_TOKENS // windows.shape[1])

        def catch(hidden_states: Tensor, **_: Any) -> Tensor:
            part.copy_(hidden_states)
            return hidden_states.to("meta")

        if not len(windows):
            return
        with self.filled(self.names_in(self.model.get_input_embeddings())), self.layers_doing(catch), torch.no_grad():
            for ids, part in zip(windows.split(count), into.split(count), strict=True):  # noqa: B007 - `catch` fills it
                self.decoder(input_ids=ids.to(self.device), use_cache=False)


def give_back_memory() -> None:
    """Return freed memory to the system, which glibc otherwise keeps in pieces: a quarter more with every few layers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, file: Path) -> Tensor:
    """Room for hidden states: on the device, in memory, or in a file, the first of them where enough is free.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        device: where the model computes.
        file: used if it does not fit elsewhere; the caller removes it.

    Returns:
        An uninitialised tensor.
    """
    import psutil

    count = 1
    for size in shape:
        count *= size
    needed = count * dtype.itemsize
    if device.type == "cuda" and needed <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return torch.empty(shape, dtype=dtype, device=device)
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine, which want as much
    if beside * needed <= MEMORY_SHARE * psutil.virtual_memory().available:
        return torch.empty(shape, dtype=dtype)
    logger.warning("hidden states of %.1f GB are kept in %s", needed / 1e9, file)
    if hasattr(os, "posix_fallocate"):  # a disk that is too full says so now; later, writing to a map of it would end the process
        with open(file, "wb") as reserved:
            os.posix_fallocate(reserved.fileno(), 0, needed)
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)
