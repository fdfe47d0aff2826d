# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls in each of its processes where hf_mla is installed (an entry point of the group vllm.general_plugins).

A checkpoint tells vLLM itself that it has MLA when its configuration is read (`configuration_mla.py`), which takes
`--trust-remote-code`. With this, vLLM takes the installed code where the flag is not given.
"""

import transformers

from . import modeling_mla
from .configuration_mla import FAMILIES, register_with_vllm


def register() -> None:
    """Make the models known to vLLM: that they have MLA, and their classes, which it looks up by name in Transformers."""
    register_with_vllm()
    for family in FAMILIES.values():
        if family.model_type in transformers.CONFIG_MAPPING:
            name = f"{family.mla}ForCausalLM"
            setattr(transformers, name, getattr(modeling_mla, name))
