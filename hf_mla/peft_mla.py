# SPDX-License-Identifier: Apache-2.0
"""Default target modules for PEFT, so that a bare `LoraConfig()` works.

PEFT has a table of them for each of its methods, from model type to names of modules. Importing it takes seconds, and few of
those who import this package need it: the tables are filled in when they are first imported, or at once if they have been.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


TABLES = "peft.utils.constants"


def fill_tables(constants: ModuleType, model_types: Sequence[str]) -> None:
    """Add model types to PEFT's tables.

    Args:
        constants: the module of the tables.
        model_types: names of models with MLA.
    """
    for name, table in vars(constants).items():
        if name.endswith("_IA3_TARGET_MODULES_MAPPING"):
            targets = ["kv_b_proj", "down_proj"]  # keys and values, as for Llama
        elif name.endswith("_IA3_FEEDFORWARD_MODULES_MAPPING"):
            targets = ["down_proj"]
        elif name.endswith("_TARGET_MODULES_MAPPING") and table.get("llama") == ["q_proj", "v_proj"]:  # LoRA and its like
            targets = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
        else:
            continue
        table.update(dict.fromkeys(model_types, targets))


class TablesFinder:
    """Finds the module of the tables as Python does, and has them filled in once it has run.

    Args:
        model_types: names of models with MLA.
    """

    def __init__(self, model_types: Sequence[str]) -> None:
        self.model_types = model_types

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Called for every module that is imported; see `importlib.abc.MetaPathFinder`."""
        spec = PathFinder.find_spec(name, path, target) if name == TABLES else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_fill(module: ModuleType) -> None:
                run(module)
                fill_tables(module, self.model_types)

            spec.loader.exec_module = run_and_fill  # type: ignore[method-assign]
        return spec


def register_target_modules(model_types: Sequence[str]) -> None:
    """Give model types their default target modules, now or when PEFT is imported; nothing happens where it never is.

    Args:
        model_types: names of models with MLA.
    """
    if TABLES in sys.modules:
        fill_tables(sys.modules[TABLES], model_types)
    else:
        sys.meta_path.insert(0, TablesFinder(model_types))
