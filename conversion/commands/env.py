# SPDX-License-Identifier: Apache-2.0
"""What hf_mla would run on."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


PACKAGES = ("hf-mla", "torch", "transformers", "accelerate", "safetensors", "peft", "huggingface-hub", "tokenizers", "triton")


def env() -> dict[str, Any]:
    """Versions and devices, for a bug report.

    Returns:
        Package versions (None for what is not installed), Python, platform, and the devices torch sees.
    """
    import torch

    result: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = None
    result["cuda"] = torch.version.cuda
    result["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    result["location"] = str(Path(__file__).parent.parent)
    return result
