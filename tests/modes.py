"""Keeps docs/modes.md and docs/families.md: their rows are the tests that carry a marker, `mode` or `family`.

* A row works if one of its tests passed in this run and none failed; several tests, in any file, may prove one row.
* A row whose tests were all skipped (no GPU, an older Transformers, a package that is missing) stays as the table has it, so all
  machines agree on the table, and a "yes" can only have come from a run in which the tests passed.
* All of it is in the reports of the tests, so that the tests may run in several processes (pytest-xdist).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version


TESTS = Path(__file__).parent
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


@dataclass
class Page:
    """A page with a table."""

    kind: Any  # of a row; made of the arguments of the marker
    file: Path
    header: str = HEADER
    footer: Any = str  # called for what stands under the table
    order: Any = lambda row, results: min(results)  # of rows: by the first of their tests
    # Row -> its tests (file, line, name) -> the set of their outcomes of setup, call and teardown.
    rows: dict = field(default_factory=dict)

    def text(self, before):
        """What it says after this run, given what it says now."""
        lines = []
        for row, results in sorted(self.rows.items(), key=lambda pair: self.order(*pair)):
            tests = sorted(results)
            proven = {"passed"} in results.values() or row.row("yes", tests) in before
            works = "no" if any("failed" in outcomes for outcomes in results.values()) else "yes" if proven else "not run yet"
            lines.append(row.row(works, tests))
        return self.header + "".join(lines) + self.footer()


PAGES = {"mode": Page(Mode, TESTS.parent / "docs" / "modes.md")}  # by the marker; `families.py` adds its own


def pytest_addoption(parser):
    parser.addoption("--write-modes", action="store_true", help="write the tables of docs from what passes in this run")


def pytest_collection_modifyitems(items):
    for item in items:
        for name, page in PAGES.items():
            for marker in item.iter_markers(name):
                row = page.kind(*marker.args, **marker.kwargs)
                item.user_properties.append((name, list(row)))
                if Version(transformers.__version__) < Version(row.since):
                    item.add_marker(pytest.mark.skip(reason=f"needs Transformers {row.since}"))
                if getattr(row, "gpu", False) and not torch.cuda.is_available():
                    item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_runtest_logreport(report):
    for key, value in report.user_properties:
        if key in PAGES:
            results = PAGES[key].rows.setdefault(PAGES[key].kind(*value), {})
            results.setdefault(tuple(report.location), set()).add(report.outcome)


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    chosen = [config.getoption(name, None) for name in ("keyword", "markexpr", "deselect", "lf")]
    if hasattr(config, "workerinput") or any(chosen) or any("::" in argument for argument in config.args):
        return  # not all tests of a row are known here
    for name, page in PAGES.items():
        # (Where a line begins with it: a test of this file has it in a string.)
        marked = {path.name for path in TESTS.glob("*.py") if f"\n@pytest.mark.{name}(" in path.read_text()}
        seen = {Path(file).name for results in page.rows.values() for file, _, _ in results}
        if not page.rows or not marked <= seen:
            continue
        before = page.file.read_text() if page.file.exists() else ""
        after = page.text(before)
        if config.getoption("write_modes"):
            page.file.write_text(after)
        elif exitstatus == 0 and before != after:
            session.exitstatus = 1
            message = f"\n{page.file} differs from what this run shows; pytest --write-modes writes it"
            config.get_terminal_writer().line(message, red=True)
