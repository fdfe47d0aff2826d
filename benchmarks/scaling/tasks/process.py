"""What all tasks share: which of several processes this is, its device and memory, and how it says what it found."""

import json
import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def result(**values: Any) -> None:
    """Print what was found; of several processes the first does."""
    if RANK == 0:
        print("RESULT " + json.dumps(values), flush=True)


def load(folder: str, dtype: torch.dtype, spread: bool) -> Any:
    """The model on one device; spread over all of them; or, under torchrun, split between the processes."""
    if WORLD > 1:
        split = DistributedConfig(tp_size=WORLD, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=split)
    elif spread:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="auto")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE)
    return model.eval()


def peak() -> int:
    """Bytes of the GPU that this process had at most."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
