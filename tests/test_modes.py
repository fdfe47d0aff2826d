"""docs/modes.md says what the tests of a run have shown."""

import modes
import pytest


pytest_plugins = ["pytester"]


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
def test_a_row(results, before, works):
    mode = modes.Mode("Flying", since="5.15", costs="wings", gpu=True)
    tests = {("tests/test_air.py", line, f"test_fly[{line}]"): outcomes for line, outcomes in enumerate(results)}
    page = modes.Page(modes.Mode, None, rows={mode: tests})
    row = "| Flying | {} (GPU) | 5.15 | wings | `test_air.py::test_fly` |\n"
    assert page.text(row.format(before)) == modes.HEADER + row.format(works)


def test_a_run_fails_where_the_table_differs(pytester, monkeypatch):
    hooks = ", ".join(name for name in dir(modes) if name.startswith("pytest_"))
    pytester.makeconftest(f"import sys\nsys.path.append({str(modes.TESTS)!r})\nfrom modes import {hooks}")
    pytester.makeini("[pytest]\nmarkers = mode(name, since, costs, gpu=False): proves a row")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.mode("Swimming", since="5.15", costs="air")
        @pytest.mark.parametrize("depth", [1, 2, 3])
        def test_swim(depth):
            pass
        """
    )
    monkeypatch.setattr(modes, "TESTS", pytester.path)
    file = pytester.path / "modes.md"

    def run(*options):
        monkeypatch.setattr(modes, "PAGES", {"mode": modes.Page(modes.Mode, file)})
        return pytester.runpytest_inprocess(*options)

    differs = run()
    assert differs.ret == 1 and "differs from what this run shows" in differs.stdout.str()
    assert run("--write-modes").ret == 0 and "| Swimming | yes | 5.15 | air |" in file.read_text()
    assert run("-n", "2").ret == 0  # two processes show the same
    file.write_text("")
    assert run("-n", "2").ret == 1
    assert run("-k", "1").ret == 0  # only a full run knows
