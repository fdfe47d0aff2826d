"""The figures in README.md are those of the result files, and of nothing else."""

import json
import re
import runpy
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPT = runpy.run_path(str(BENCHMARKS / "readme.py"))
README = SCRIPT["README"].read_text(encoding="utf-8")
MACHINE = {"device": "Some GPU", "torch": "1.2", "transformers": "3.4"}
KERNEL_ROWS = [
    {
        "batch": 64,
        "context": 8192,
        "heads": 32,
        "latent": "512 + 64",
        "milliseconds": {"kernel": 0.2, "gqa_flash": 0.5, "gqa_packed": 0.6, "torch": None, "reexpansion": 17.5},
        "spread": {"kernel": [0.19, 0.21], "gqa_flash": [0.49, 0.52], "gqa_packed": [0.6, 0.7], "reexpansion": [17.0, 18.0]},
        "floor": 0.1,
    }
]
WHOLE_ROWS = [
    {
        "batch": 16,
        "context": 16384,
        "milliseconds_per_token": {"converted": 5.0, "gqa": 10.0, "deepseek_v3": 100.0},
        "spread": {"converted": [4.9, 5.2], "gqa": [9, 11], "deepseek_v3": [99, 101]},
    },
    {"batch": 64, "context": 8192, "milliseconds_per_token": {"converted": 8.0}, "spread": {"converted": [8, 8]}},
    {"batch": 1, "context": 2048, "milliseconds_per_token": {"converted": None, "gqa": 3.0}, "spread": {"gqa": [3, 3]}},
]


def figures(folder, name, result):
    """What a block becomes when its result file holds `result`, or is not there."""
    if result is not None:
        (folder / f"{name}.json").write_text(json.dumps(result))
    before = f"before\n<!-- figures: {name} -->\n| old |\n<!-- end figures -->\nafter"
    after = SCRIPT["with_figures"](before, folder)
    assert SCRIPT["with_figures"](after, folder) == after
    return re.fullmatch(rf"before\n<!-- figures: {name} -->\n(.*)\n<!-- end figures -->\nafter", after, re.DOTALL)[1]


def test_readme_is_what_the_script_writes():
    assert SCRIPT["with_figures"](README, SCRIPT["RESULTS"]) == README, "run python benchmarks/readme.py"
    assert set(re.findall(r"<!-- figures: (\w+) -->", README)) == set(SCRIPT["BLOCKS"])
    assert README.count("<!-- end figures -->") == len(SCRIPT["BLOCKS"])


@pytest.mark.parametrize("name", SCRIPT["BLOCKS"])
def test_nothing_is_invented(tmp_path, name):
    assert figures(tmp_path, name, None) == "not measured yet"


def test_decode_kernel(tmp_path):
    result = {"machine": MACHINE, "copy_terabytes_per_second": 4.236, "rows": KERNEL_ROWS}
    lines = figures(tmp_path, "decode_kernel", result).splitlines()
    assert "Some GPU, torch 1.2, transformers 3.4, which copies 4.24 TB/s" in lines[0]
    kernel, gqa = "0.200 (0.190 to 0.210) | 50% | - | -", "0.500 (0.490 to 0.520) | 0.600 (0.600 to 0.700)"
    assert lines[-1] == f"| 64 x 8192 | 32 | 512 + 64 | 0.100 | {kernel} | {gqa} | - | 17.5 (17 to 18) |"
    assert lines[2].count("|") == lines[-1].count("|")


def test_whole_model(tmp_path):
    largest = {"converted": 96, "gqa": 30, "deepseek_v3": None}
    text = figures(tmp_path, "whole_model", {"machine": MACHINE, "rows": WHOLE_ROWS, "largest_batch_at_32k": largest})
    assert "| 16 x 16384 | 5 (4.9 to 5.2) | 10 (9 to 11) | 100 (99 to 101) | x 2.00 | x 20.00 |" in text
    assert "| 64 x 8192 | 8 (8 to 8) | - | - | - | - |" in text
    assert "| 1 x 2048 | - | 3 (3 to 3) | - | - | - |" in text
    assert text.index("| 1 x 2048") < text.index("| 16 x 16384") < text.index("| 64 x 8192")  # whatever was measured first
    assert text.endswith("Largest batch that fits at 32k tokens: converted 96, GQA 30, DeepSeek-V3 -.")
