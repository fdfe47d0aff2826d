"""Keeps docs/modes.md: its rows are the tests that carry `@pytest.mark.mode(name, since=..., costs=...)`.

* A mode works if one of its tests passed in this run and none failed; several tests, in any file, may prove one mode.
* A row whose tests were all skipped (no GPU, an older Transformers, a package that is missing) stays as the table has it, so all
  machines agree on the table, and a "yes" can only have come from a run in which the tests passed.
* All of it is in the reports of the tests, so that the tests may run in several processes (pytest-xdist).
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

    def row(self, works, tests):
        proofs = dict.fromkeys(f"`{Path(file).name}::{name.partition('[')[0]}`" for file, _, name in tests)
        cells = self.name, works + (" (GPU)" if self.gpu else ""), self.since, self.costs, ", ".join(proofs)
        return f"| {' | '.join(cells)} |\n"


modes = {}  # Mode -> its tests (file, line, name) -> the set of their outcomes of setup, call and teardown


def pytest_addoption(parser):
    parser.addoption("--write-modes", action="store_true", help="write docs/modes.md from what passes in this run")


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in item.iter_markers("mode"):
            mode = Mode(*marker.args, **marker.kwargs)
            item.user_properties.append(("mode", list(mode)))
            if Version(transformers.__version__) < Version(mode.since):
                item.add_marker(pytest.mark.skip(reason=f"needs Transformers {mode.since}"))
            if mode.gpu and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_runtest_logreport(report):
    for key, value in report.user_properties:
        if key == "mode":
            modes.setdefault(Mode(*value), {}).setdefault(tuple(report.location), set()).add(report.outcome)


def table(before):
    """The text of docs/modes.md after this run, given the text as it stands."""
    rows = []
    for mode, results in sorted(modes.items(), key=lambda pair: min(pair[1])):
        tests = sorted(results)
        proven = {"passed"} in results.values() or mode.row("yes", tests) in before
        works = "no" if any("failed" in outcomes for outcomes in results.values()) else "yes" if proven else "not run yet"
        rows.append(mode.row(works, tests))
    return HEADER + "".join(rows)


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    # (Where a line begins with it: a test of this file has it in a string.)
    marked = {path.name for path in TESTS.glob("test_*.py") if "\n@pytest.mark.mode(" in path.read_text()}
    seen = {Path(file).name for results in modes.values() for file, _, _ in results}
    chosen = [config.getoption(name, None) for name in ("keyword", "markexpr", "deselect", "lf")]
    if hasattr(config, "workerinput") or not marked <= seen or any(chosen) or any("::" in argument for argument in config.args):
        return  # not all tests of modes are known here
    before = TABLE.read_text() if TABLE.exists() else ""
    after = table(before)
    if config.getoption("write_modes"):
        TABLE.write_text(after)
    elif exitstatus == 0 and before != after:
        session.exitstatus = 1
        config.get_terminal_writer().line(f"\n{TABLE} differs from what this run shows; pytest --write-modes writes it", red=True)
