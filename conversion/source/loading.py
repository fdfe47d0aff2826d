# SPDX-License-Identifier: Apache-2.0
"""Whole models, devices and processes, each there as asked for or refused in one line."""

import os
import platform
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from ..errors import UserError, brief
from .checkpoint import IN_WRAPPER, Checkpoint, DecoderCheckpoint, GGUFCheckpoint
from .families import caps_scores
from .matching import experts_option, match_model
from .shards import TORCH_NAMES


class Given(nn.Module):
    """In place of a module, something that is computed already."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """What was given."""
        return self.output


def head_of(model: Any, linear: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """All that a causal language model does after its decoder, multipliers and caps of logits included.

    Args:
        model: the model.
        linear: what the module does that makes logits, if that is not its `forward` any more.

    Returns:
        A function [tokens, D] -> [tokens, vocabulary].
    """

    def head(states: Tensor) -> Tensor:
        module, decoder = model.get_output_embeddings(), model.get_decoder()
        own = vars(decoder).get("forward")
        model.set_output_embeddings(Given((linear or module)(states.unsqueeze(0))))
        decoder.forward = Given(MoeModelOutputWithPast(last_hidden_state=states.unsqueeze(0))).forward
        try:
            token = torch.zeros(1, 1, dtype=torch.long, device=states.device)
            return type(model).forward(model, input_ids=token, use_cache=False).logits.squeeze(0)
        finally:
            model.set_output_embeddings(module)
            del decoder.forward
            if own is not None:
                decoder.forward = own

    return head


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: Any, *, spread: bool = False) -> Any:
    """A causal language model in evaluation mode, with every weight from the checkpoint and none left over.

    Args:
        checkpoint: what to load; on disk.
        device: where to put it.
        dtype: what to compute in; "auto" for what most of it is stored in.
        spread: put it on all GPUs, if `device` is one and there are more.

    Returns:
        The model; its `device` is where inputs go.

    Raises:
        UserError: the tensors are not those of a model (see `match_model`), or the library cannot load them.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    checkpoint = match_model(checkpoint)
    assert checkpoint.folder is not None
    if dtype == "auto":
        dtype = TORCH_NAMES[checkpoint.dtype]
    device_map = "auto" if spread and device.type == "cuda" and torch.cuda.device_count() > 1 else None
    options: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "output_loading_info": True, **experts_option(dtype)}
    if caps_scores(checkpoint.config):
        options["attn_implementation"] = "eager"
    try:
        loaded: Any
        if isinstance(checkpoint.stored, GGUFCheckpoint):
            state = checkpoint.load([*checkpoint.tensors], "cpu")
            loaded = type(checkpoint.model).from_pretrained(None, config=checkpoint.config, state_dict=state, **options)
            loaded[0].generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
        elif isinstance(checkpoint.stored, DecoderCheckpoint):
            options["key_mapping"] = {IN_WRAPPER: ""}
            loaded = type(checkpoint.model).from_pretrained(checkpoint.folder, config=checkpoint.config, **options)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(checkpoint.folder, **options)
    except Exception as error:  # any type: what a configuration can break is up to the library
        raise UserError(f"{checkpoint.name} cannot be loaded: {brief(error)}") from error
    model, loading = loaded
    assert not loading["missing_keys"], loading["missing_keys"]
    return (model if device_map else model.to(device)).eval()


def choose_device(device: str) -> torch.device:
    """Resolve "auto", and refuse a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # or all processes would hold memory of the first GPU
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is not available; use auto, cpu, cuda or cuda:N")
    return chosen


def device_name(device: torch.device) -> str:
    """The device, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    import psutil

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def compute_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """What the source is computed in: its own type on a GPU if that is bfloat16, float64 if it is stored so, else float32."""
    if checkpoint.dtype == "F64":
        return torch.float64
    return torch.bfloat16 if checkpoint.dtype == "BF16" and device.type == "cuda" else torch.float32


def launched_processes(device: torch.device) -> Any:
    """The processes that `accelerate launch` started, this one among them; without it, this one alone."""
    from accelerate import PartialState

    # The others wait while the main process surveys the model, however long that takes.
    return PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))
