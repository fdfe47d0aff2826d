# SPDX-License-Identifier: Apache-2.0
"""Whole models, devices and processes, each there as asked for or refused in one line."""

from datetime import timedelta
from typing import Any

import torch

from ..errors import UserError, brief
from .checkpoint import Checkpoint


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: Any, *, spread: bool = False) -> Any:
    """A causal language model in evaluation mode, with every weight from the checkpoint and none left over.

    Args:
        checkpoint: what to load; on disk.
        device: where to put it.
        dtype: what to compute in; "auto" for what is stored.
        spread: put it on all GPUs, if `device` is one and there are more.

    Returns:
        The model; its `device` is where inputs go.

    Raises:
        UserError: weights are missing, left over or of the wrong shape, or the configuration is not one of a working model.
    """
    from transformers import AutoModelForCausalLM

    assert checkpoint.folder is not None
    device_map = "auto" if spread and device.type == "cuda" and torch.cuda.device_count() > 1 else None
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=dtype, device_map=device_map, output_loading_info=True
        )
    except Exception as error:  # any type: what a configuration can break is up to the library
        raise UserError(f"{checkpoint.name} cannot be loaded: {brief(error)}") from error
    model, loading = loaded
    for kind, what in (("missing_keys", "does not hold"), ("unexpected_keys", "holds, beyond what its config.json describes,")):
        names = sorted(name for name in loading[kind] if not name.endswith("inv_freq"))
        if names:
            raise UserError(f"{checkpoint.name} {what} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    return (model if device_map else model.to(device)).eval()


def choose_device(device: str) -> torch.device:
    """Resolve "auto", and refuse a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is not available; use auto, cpu, cuda or cuda:N")
    return chosen


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
