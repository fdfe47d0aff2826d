# SPDX-License-Identifier: Apache-2.0
"""Convert GQA checkpoints of Transformers to Multi-head Latent Attention; each function is a command of `hf-mla`.

The functions load on first use, so that importing this package (and `hf-mla --help`) needs neither torch nor Transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import UserError


if TYPE_CHECKING:
    from .bencher import bench
    from .converter import convert
    from .demonstration import demo
    from .healer import heal
    from .inspector import env, info
    from .planner import plan
    from .verifier import verify

__all__ = ["UserError", "bench", "convert", "demo", "env", "heal", "info", "plan", "verify"]

# Modules are not named like their functions: importing one would put it in the function's place.
_HOMES = {
    "bench": "bencher",
    "convert": "converter",
    "demo": "demonstration",
    "env": "inspector",
    "heal": "healer",
    "info": "inspector",
    "plan": "planner",
    "verify": "verifier",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
