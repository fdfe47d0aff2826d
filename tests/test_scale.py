"""The figures in docs/scale.md are those of the result files, and of nothing else."""

import json
import runpy
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MACHINE = {"device": "2 x Some GPU", "torch": "1.2", "transformers": "3.4"}


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return runpy.run_path(str(BENCHMARKS / "scale_page.py"))
    finally:
        sys.path.remove(str(BENCHMARKS))


def page(script, folder, results, machines=()):
    """The page of these results, block by block."""
    report = {"machine": MACHINE, "machines": dict(machines), "layers": 4, "results": results}
    (folder / "scale.json").write_text(json.dumps(report))
    text = script["with_figures"](script["PAGE"].read_text(encoding="utf-8"), folder)
    return {block[: block.index(" -->")]: block[: block.index("<!-- end")] for block in text.split("<!-- figures: ")[1:]}


def test_the_page_is_what_the_script_writes(script):
    text = script["PAGE"].read_text(encoding="utf-8")
    assert script["with_figures"](text, script["RESULTS"]) == text, "run python benchmarks/scale_page.py"
    assert text.count("<!-- figures: ") == text.count("<!-- end figures -->") == len(script["BLOCKS"]) + 1


def test_what_was_not_run_is_not_shown(script, tmp_path):
    assert all("not measured yet" in block for block in page(script, tmp_path, {}).values())


def test_conversions(script, tmp_path):
    made = {"layers": 4, "calibration_tokens": 2097152, "steps": 400, "peak_host": 3e9}
    stages = {"seconds_before": 20.0, "seconds_survey": 5.25, "seconds_layers": 70.0, "seconds_after": 8.0}
    results = {
        "convert-1": made | stages | {"processes": 1, "seconds": 103.25, "peak_gpu": [3e10]},
        "convert-n": made | {"processes": 2, "seconds": 60.0, "peak_gpu": [2e10, 4e10]},
        "convert-killed-and-resumed": made | {"processes": 2, "seconds": 50.0, "peak_gpu": [0, 0]},
        "convert-compared": {"processes": 2, "speedup_of_32_layers_computed": 2.0, "same_bytes": True, "layers_compared": 4},
    }
    results["convert-compared"]["seconds_of_32_layers_computed"] = {"1": 640, "n": 320.0}
    results["plan"] = {"with_hidden_states": 2.8e10, "measured_gpu": [3e10]}
    text = page(script, tmp_path, results)["convert"]
    assert "4 layers, 2,097,152 tokens, 400 steps a layer, 2 x Some GPU, torch 1.2" in text
    assert "| 1 | 103 | 20 | 5.2 | 70 | 8.0 | 640 | 30 | 3 |" in text
    assert "| 2 | 60 | - | - | - | - | 320 | 40 | 3 |" in text
    assert "| 2, one killed, then again | 50 | - | - | - | - | - | - | 3 |" in text
    assert "With 32 layers, 2 are x 2.00 as fast (computed). The bytes of all converted layers, 4 compared, are the same." in text
    assert "`plan` counts 28 GB of a GPU, 30 were seen." in text
    results["convert-1"]["ended_after_layers"] = 3
    assert "| 1, ended after 3 layers | 103 | 20 |" in page(script, tmp_path, results)["convert"]
    alone = {key: value for key, value in results["convert-1"].items() if key not in ("steps", "calibration_tokens")}
    assert "4 layers, 2 x Some GPU" in page(script, tmp_path, {"convert-1": alone})["convert"]


def test_healing_and_decoding(script, tmp_path):
    ran = {"train": "all", "peak_in_training": 3e10, "planned": {"total": 3.5e10}}
    wide = {"tokens": 192, "float32_equal": 192, "bfloat16_choices_differ_beyond_rounding": 0}
    results = {
        "heal-1b-1": ran | {"model": "1b", "processes": 1, "tokens_per_second": 20000},
        "heal-1b-2": ran | {"model": "1b", "processes": 2, "tokens_per_second": 35000},
        "compared-heal-1b-2": {"speedup": 1.75, "loss_differs_by": 0.0021},
        "decode-1": {"processes": 1, "tokens": 192, "eager": {"milliseconds_per_token": 5.0}},
        "decode-2": wide | {"processes": 2, "eager": {"milliseconds_per_token": 6.0}, "compiled": {"milliseconds_per_token": 3.0}},
    }
    results |= {"decode-1-on-other": results["decode-1"], "decode-4-on-other": wide | {"processes": 4}}
    machines = dict.fromkeys(("decode-1-on-other", "decode-4-on-other"), {"device": "4 x Another"})
    blocks = page(script, tmp_path, results, machines)
    assert "| Llama-3.2-1B | all | 1 | 20,000 | - | - | 30 | 35 |" in blocks["heal"]
    assert "| Llama-3.2-1B | all | 2 | 35,000 | x 1.75 | 0.21% | 30 | - |" in blocks["heal"]
    assert "| 1 | - | - | 5.00 | - |" in blocks["decode"]
    assert "| 2 x tensor parallel | 192 of 192 | 0 | 6.00 | 3.00 |" in blocks["decode"]
    assert "| 4 x tensor parallel | 192 of 192 | 0 | - | - |" in blocks["decode"].split("4 x Another:")[1]
