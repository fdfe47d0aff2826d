# SPDX-License-Identifier: Apache-2.0
"""Convert GQA checkpoints of Transformers to Multi-head Latent Attention; each function is a command of `hf-mla`.

The functions load on first use, so that importing this package (and `hf-mla --help`) needs neither torch nor Transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import UserError


if TYPE_CHECKING:
    from .commands.bench import bench
    from .commands.convert import convert
    from .commands.demo import demo
    from .commands.env import env
    from .commands.export import export
    from .commands.heal import heal
    from .commands.info import info
    from .commands.plan import plan
    from .commands.refresh import refresh
    from .commands.verify import verify

__all__ = ["UserError", "bench", "convert", "demo", "env", "export", "heal", "info", "plan", "refresh", "verify"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f".commands.{name}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
