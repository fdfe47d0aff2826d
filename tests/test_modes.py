"""docs/modes.md says what the tests of this run have shown."""

from pathlib import Path
from types import SimpleNamespace

import modes
import pytest


@pytest.mark.parametrize(
    "results, before, works",
    [
        ([{"passed"}, {"passed"}], "not run yet", "yes"),
        ([{"passed"}, {"passed", "failed"}], "yes", "no"),
        ([{"passed"}, {"passed", "skipped"}], "not run yet", "yes"),
        ([{"passed", "skipped"}] * 2, "yes", "yes"),
        ([{"passed", "skipped"}] * 2, "no", "not run yet"),
    ],
    ids=["passed", "failed", "partly skipped", "skipped, known", "skipped, unknown"],
)
def test_a_row(results, before, works, monkeypatch):
    mode = modes.Mode("Flying", since="5.15", costs="wings", gpu=True)
    items = [SimpleNamespace(nodeid=i, path=Path("test_air.py"), originalname="test_fly", location=("", i)) for i in range(2)]
    monkeypatch.setattr(modes, "modes", {mode: items})
    monkeypatch.setattr(modes, "outcomes", dict(enumerate(results)))
    row = "| Flying | {} (GPU) | 5.15 | wings | `test_air.py::test_fly` |\n"
    assert modes.table(row.format(before)) == modes.HEADER + row.format(works)


def test_modes_table(request):
    if not modes.complete:
        pytest.skip("not all tests of modes were selected")
    before = modes.TABLE.read_text() if modes.TABLE.exists() else ""
    after = modes.table(before)
    if request.config.getoption("write_modes"):
        modes.TABLE.write_text(after)
    else:
        assert before == after, "docs/modes.md differs from what this run shows; pytest --write-modes writes it"
