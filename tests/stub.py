"""Writes hf_mla/classes.pyi, by which editors and type checkers know the classes made from the table: `python tests/stub.py`."""

from pathlib import Path

import hf_mla
from hf_mla import modeling_mla
from hf_mla.configuration_mla import CLASSES, FAMILIES, HEADS, config_class


STUB = Path(hf_mla.__file__).with_name("classes.pyi")
EMPTY = "    ...\n"
OPENING = """# SPDX-License-Identifier: Apache-2.0
# The classes of all families, for editors and type checkers; written from the table by tests/stub.py.
# mypy: disable-error-code="misc, assignment"
# (Some of the library's own classes say more narrowly than others what their configuration is.)
"""


def stub():
    """What the file has to say."""
    imports, classes = {"typing": {"ClassVar"}}, []
    for family in FAMILIES.values():
        members = {
            "Config": f"    base_model_tp_plan: ClassVar\n    attention_bias: bool = {config_class(family).attention_bias}\n",
            "PreTrainedModel": f"    config: {family.mla}Config\n",
        }
        for suffix in (*CLASSES, *HEADS):
            cls = getattr(modeling_mla, family.mla + suffix)
            for base in cls.__bases__:
                if base.__name__ not in hf_mla.__all__:  # else it stands further up
                    imports.setdefault(base.__module__.replace("hf_mla.", "."), set()).add(base.__name__)
            bases = ", ".join(base.__name__ for base in cls.__bases__)
            classes.append(f"class {cls.__name__}({bases}):\n{members.get(suffix, EMPTY)}")
    lines = [f"from {module} import {name}" for module, names in sorted(imports.items()) for name in sorted(names)]
    return "\n".join([OPENING, *lines, "", *classes])


if __name__ == "__main__":
    STUB.write_text(stub())
