"""Keeps docs/modes.md: its rows are the tests that carry `@pytest.mark.mode(name, since=..., costs=...)`.

* A mode works if one of its tests passed in this run and none failed; several tests, in any file, may prove one mode.
* A row whose tests were all skipped (no GPU, an older Transformers, a package that is missing) stays as the table has it, so all
  machines agree on the table, and a "yes" can only have come from a run in which the tests passed.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version


TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "modes.md"
HEADER = """# What works

Written by the tests that prove it (`pytest --write-modes`); a full run of the tests fails where this table says anything else.
"Since" is the first version of Transformers that has the mode, or 5.15 where the oldest supported one has it; "GPU" marks what
only a machine with CUDA can prove.

| mode | works | since | what it costs | proven by |
|---|---|---|---|---|
"""


class Mode(NamedTuple):
    """The arguments of the marker; with `gpu`, the tests are skipped where there is no CUDA."""

    name: str
    since: str
    costs: str
    gpu: bool = False

    def row(self, works, items):
        proofs = dict.fromkeys(f"`{item.path.name}::{item.originalname}`" for item in items)
        cells = self.name, works + (" (GPU)" if self.gpu else ""), self.since, self.costs, ", ".join(proofs)
        return f"| {' | '.join(cells)} |\n"


modes = {}  # Mode -> its test items
outcomes = {}  # node id -> the set of outcomes of setup, call and teardown
complete = True  # whether all tests that carry the marker were collected


def pytest_addoption(parser):
    parser.addoption("--write-modes", action="store_true", help="write docs/modes.md from what passes in this run")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    global complete
    for item in items:
        for marker in item.iter_markers("mode"):
            mode = Mode(*marker.args, **marker.kwargs)
            modes.setdefault(mode, []).append(item)
            if Version(transformers.__version__) < Version(mode.since):
                item.add_marker(pytest.mark.skip(reason=f"needs Transformers {mode.since}"))
            if mode.gpu and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    items.sort(key=lambda item: item.name == "test_modes_table")  # last: it looks at the outcomes of the others
    marked = {path for path in TESTS.glob("test_*.py") if "pytest.mark.mode(" in path.read_text()}
    complete = marked <= {item.path for item in items} and not any("::" in argument for argument in config.args)


def pytest_deselected(items):
    global complete
    complete = complete and not any(item.get_closest_marker("mode") for item in items)


def pytest_runtest_logreport(report):
    outcomes.setdefault(report.nodeid, set()).add(report.outcome)


def table(before):
    """The text of docs/modes.md after this run, given the text as it stands."""
    rows = []
    for mode, items in sorted(modes.items(), key=lambda pair: pair[1][0].location[:2]):
        results = [outcomes[item.nodeid] for item in items]
        proven = {"passed"} in results or mode.row("yes", items) in before
        works = "no" if any("failed" in result for result in results) else "yes" if proven else "not run yet"
        rows.append(mode.row(works, items))
    return HEADER + "".join(rows)
