# SPDX-License-Identifier: Apache-2.0
"""The source model one layer at a time, and its hidden states on all calibration text.

* `LayerStream` builds the library's own model without weights and fills in the part that is at work; the masks and rotary
  embeddings that a layer is called with are recorded from the model's own `forward`, so no family needs code here.
* `allocate` puts hidden states where they fit: on the device, in memory, or in a file.
"""

import copy
import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, brief
from .checkpoint import Checkpoint
from .families import FAMILIES


logger = logging.getLogger(__name__)

DEVICE_SHARE, MEMORY_SHARE = 1 / 3, 1 / 2  # hidden states take at most so much of what is free there


class LayerStream:
    """A checkpoint's model, of which one layer (or the embedding, or the head) is in memory at a time.

    Args:
        checkpoint: what to read; on disk.
        device: where to compute.
        dtype: what to compute in.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.config = copy.deepcopy(checkpoint.config)
        try:
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype, attn_implementation="sdpa")
        except Exception as error:  # any type: what a configuration can break is up to the library
            raise UserError(f"{checkpoint.name} cannot be loaded: {brief(error)}") from error
        self.model.eval().requires_grad_(False)
        self.decoder = self.model.model
        self.prefix = FAMILIES[self.config.model_type].attention.removesuffix("self_attn.")
        self._check_names()
        self.rotary = type(self.decoder.rotary_emb)(config=self.config).to(device)
        self.calls: list[dict[str, Any]] = []
        """What each layer is called with besides hidden states: masks, positions, rotary embeddings of one sequence."""

    def __len__(self) -> int:
        return len(self.decoder.layers)

    def _check_names(self) -> None:
        """Raise a UserError unless the checkpoint holds just the tensors of the model, in its shapes."""
        held = {name: tensor.shape for name, tensor in self.checkpoint.tensors.items() if not name.endswith("inv_freq")}
        wanted = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        if self.config.tie_word_embeddings:
            wanted.pop("lm_head.weight", None)
            held.pop("lm_head.weight", None)
        for names, what in (
            (wanted.keys() - held.keys(), "does not hold"),
            (held.keys() - wanted.keys(), "holds, beyond what its config.json describes,"),
        ):
            if names:
                first, *more = sorted(names)
                raise UserError(f"{self.checkpoint.name} {what} {first}" + (f" and {len(more)} more" if more else ""))
        for name, shape in wanted.items():
            if held[name] != shape:
                raise UserError(f"{self.checkpoint.name}: {name} is {list(held[name])}, config.json announces {list(shape)}")

    def record_calls(self, window: int) -> None:
        """Set `calls` for sequences of so many tokens."""
        calls: list[dict[str, Any]] = []

        def record(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            calls.append({key: value for key, value in kwargs.items() if key not in ("cache", "past_key_values", "use_cache")})
            return hidden_states

        parts = [*self.decoder.layers, self.decoder.norm]
        rotary, self.decoder.rotary_emb = self.decoder.rotary_emb, self.rotary
        for part in parts:
            part.forward = record
        try:
            states = torch.zeros(1, window, self.config.hidden_size, dtype=self.dtype, device=self.device)
            with torch.no_grad():
                self.decoder(inputs_embeds=states, use_cache=False)
        finally:
            self.decoder.rotary_emb = rotary
            for part in parts:
                del part.forward
        self.calls = calls[: len(self)]

    @contextmanager
    def _filled(self, module: Any, prefix: str, names: dict[str, str] | None = None) -> Iterator[Any]:
        """Give a module its weights for the time of the block."""
        names = names or {name: prefix + name for name in module.state_dict()}
        weights = self.checkpoint.load(list(names.values()), self.device, self.dtype)
        try:
            module.load_state_dict({name: weights[source] for name, source in names.items()}, assign=True)
            module.requires_grad_(False)
            yield module
        finally:
            module.to("meta")
            give_back_memory()

    def layer(self, index: int) -> Any:
        """A decoder layer with its weights, as a context."""
        return self._filled(self.decoder.layers[index], self.prefix.format(layer=index))

    @contextmanager
    def head(self) -> Iterator[nn.Module]:
        """The final norm and the language-model head, with weights: [B, T, D] -> [B, T, vocabulary]."""
        tied = self.config.tie_word_embeddings
        source = {"weight": "model.embed_tokens.weight"} if tied else None
        with self._filled(self.decoder.norm, "model.norm.") as norm, self._filled(self.model.lm_head, "lm_head.", source) as head:
            yield nn.Sequential(norm, head)

    def embed(self, windows: Tensor, into: Tensor) -> None:
        """Write the embeddings of token ids [windows, tokens] to `into` [windows, tokens, D]."""
        with self._filled(self.decoder.embed_tokens, "model.embed_tokens.") as embedding:
            for start in range(0, len(windows), 16):
                into[start : start + 16] = embedding(windows[start : start + 16].to(self.device)).to(into)


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
    if needed <= MEMORY_SHARE * psutil.virtual_memory().available:
        return torch.empty(shape, dtype=dtype)
    logger.warning("hidden states of %.1f GB are kept in %s", needed / 1e9, file)
    if hasattr(os, "posix_fallocate"):  # a disk that is too full says so now; later, writing to a map of it would end the process
        with open(file, "wb") as reserved:
            os.posix_fallocate(reserved.fileno(), 0, needed)
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)
