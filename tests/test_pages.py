"""The figures and the pictures in docs/ are those of the result files, and of nothing else."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

import hf_mla


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPT = runpy.run_path(str(BENCHMARKS / "pages.py"))
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


def conversion(latent, tokens=0, seed=0, ratios=(), **more):
    """An entry of real_model.json, of a model with 384 numbers; ratios on three texts, and on books in windows of 8,192."""
    places = (("books", 1024), ("wikitext-2", 1024), ("own text", 1024), ("books", 8192))
    texts = [
        {"text": text, "window": window, "tokens": 32768, "perplexity": {"source": 37.268}, "perplexity_ratio": ratio}
        for (text, window), ratio in zip(places, ratios, strict=False)
    ]
    made = {"kv_lora_rank": latent, "qk_rope_head_dim": 32, "kv_ratio": (latent + 32) / 384, "heal_tokens": tokens, "seed": seed}
    made["calibration"] = "books and self"
    made["kv_floats_per_token_per_layer"] = {"source": 384, "converted": latent + 32}
    stage = {"layers_alone": None, "end_to_end": None, "frontier": None}
    return made | stage | {"texts": texts, "tasks": {}, "seconds": 412.4} | more


LAYERS = [
    {"layer": 0, "error_closed_form": 0.2, "error_reconstructed": 0.1, "steps_kept": 300},
    {"layer": 1, "error_closed_form": 0.3, "error_reconstructed": 0.3, "steps_kept": 0},
]
TASKS = {"boolq": {"kind": "rc_5shot", "questions": 3270, "source": 0.6, "converted": 0.5911, "error": 0.0061}}
TRAINED = {
    "layers_alone": {"perplexity": {"source": 20.0}},
    "end_to_end": {
        "tokens_per_step": 500_000,
        "history": [
            {"step": 0, "perplexity": 30.0},
            {"step": 1, "divergence": 0.3, "tokens_per_second": 1},
            {"step": 2, "divergence": 0.2, "tokens_per_second": 1},
            {"step": 2, "perplexity": 22.0},
        ],
    },
}
FRONTIER = [
    {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "kv_ratio": 0.04, "predicted_ratio": 1e9, "measured_ratio": None},
    {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "kv_ratio": 0.125, "predicted_ratio": 1.3, "measured_ratio": None},
    {"kv_lora_rank": 88, "qk_rope_head_dim": 32, "kv_ratio": 0.3125, "predicted_ratio": 1.07, "measured_ratio": 1.05},
]


def figures(folder, name, result):
    """What a block becomes when its result file holds `result`, or is not there."""
    if result is not None:
        (folder / f"{SCRIPT['FILES'].get(name, name)}.json").write_text(json.dumps(result))
    others = "<!-- figures: another_script's -->\n| old |\n<!-- end figures -->"
    before = f"before\n<!-- figures: {name} -->\n| old |\n<!-- end figures -->\nafter\n{others}"
    after = SCRIPT["with_figures"](before, folder)
    assert SCRIPT["with_figures"](after, folder) == after
    wanted = rf"before\n<!-- figures: {name} -->\n(.*)\n<!-- end figures -->\nafter\n{re.escape(others)}"
    return re.fullmatch(wanted, after, re.DOTALL)[1]


def test_the_pages_are_what_the_script_writes():
    blocks = []
    for page in SCRIPT["DOCS"].glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert SCRIPT["with_figures"](text, SCRIPT["RESULTS"]) == text, "run python benchmarks/pages.py"
        assert text.count("<!-- figures: ") == text.count("<!-- end figures -->")
        blocks += re.findall(r"<!-- figures: (\w+) -->", text)
    assert [blocks.count(name) for name in SCRIPT["BLOCKS"]] == [1] * len(SCRIPT["BLOCKS"])


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


def test_native_model(tmp_path):
    rows = [
        {"model": "deepseek_v3", "batch": 1, "context": 2048, "speedup": 2.0},
        {"model": "MiniCPM3", "batch": 8, "context": 4096, "speedup": 3.0, "difference": {"hf_mla": 0.02, "eager": 0.03}},
        {"model": "DeepSeek-V3", "batch": 8, "context": 4096, "error": "out of memory"},
    ]
    for row in rows[:2]:
        row |= {"milliseconds_per_token": {"sdpa": 6.0, "hf_mla": 3.0}, "spread": {"sdpa": [6, 7], "hf_mla": [3, 3]}}
    lines = figures(tmp_path, "native_model", {"machine": MACHINE, "rows": rows}).splitlines()
    assert "8 layers, 32 heads | 1 x 2048 | 6 (6 to 7) | 3 (3 to 3) | x 2.00 | - | - |" in lines[-2]
    assert lines[-1] == "| MiniCPM3 | 8 x 4096 | 6 (6 to 7) | 3 (3 to 3) | x 3.00 | 0.020 | 0.030 |"
    assert lines[2].count("|") == lines[-1].count("|")


def test_whole_model(tmp_path):
    largest = {"converted": 96, "gqa": 30, "deepseek_v3": None}
    text = figures(tmp_path, "whole_model", {"machine": MACHINE, "rows": WHOLE_ROWS, "largest_batch_at_32k": largest})
    assert "| 16 x 16384 | 5 (4.9 to 5.2) | 10 (9 to 11) | 100 (99 to 101) | x 2.00 | x 20.00 |" in text
    assert "| 64 x 8192 | 8 (8 to 8) | - | - | - | - |" in text
    assert "| 1 x 2048 | - | 3 (3 to 3) | - | - | - |" in text
    assert text.index("| 1 x 2048") < text.index("| 16 x 16384") < text.index("| 64 x 8192")  # whatever was measured first
    assert text.endswith("Largest batch that fits at 32k tokens: converted 96, GQA 30, DeepSeek-V3 -.")


def test_long_context(tmp_path):
    def measured(window, ratios, shares):
        positions = [{"ratio": ratio, "error": 0.01} for ratio in ratios]
        needles = {str(window): dict(zip(("0.0", "0.25", "0.5", "0.75", "1.0"), shares, strict=True))}
        return {"window": window, "positions": positions, "needles": needles, "tasks": {"copy": 0.7, "add": 0.1}}

    source = {"name": "s"} | dict.fromkeys(("trained", "yarn"), measured(1024, [1, 1], [0.8, 0.8, 0.5, 0.4, 1]))
    other = {"name": "c", "kv_lora_rank": 88, "qk_rope_head_dim": 32, "calibration_window": 1024}
    other |= {"trained": measured(1024, [1.04, 1.1], [0, 0, 0.1, 0.2, 0.9]), "yarn": measured(2048, [1.05, 1.2], [0, 0, 0, 0, 0.1])}
    result = {"device": "Some GPU", "questions": 10, "task_questions": 100, "models": [source, other]}
    text = figures(tmp_path, "long_context", result)
    assert "| 88 + 32, sequences of 1,024 | 1,024 | 1.040 | 1.100 |" in text
    assert "| 88 + 32, sequences of 1,024, YaRN | 2,048 | 1.050 | 1.200 |" in text
    assert "| original | 1,024 | 62 % | 100 % |" in text and "| original | 1.000" not in text
    assert "| 88 + 32, sequences of 1,024 | 1,024 | 8 % | 90 % |" in text
    assert "| original | 70% | 10% |\n| 88 + 32, sequences of 1,024 | 70% | 10% |" in text


def test_lookups(tmp_path):
    needles = {"1024": {"0.0": 0.1, "0.5": 0.2, "1.0": 1.0}, "8192": {"0.0": 0.0, "0.5": 0.1, "1.0": 1.0}}
    measured = {"positions": [{"ratio": 1.04}, {"ratio": 1.2}, {"ratio": 1.1}], "needles": needles, "tasks": {"copy": 0.7}}
    other = {"name": "4 M, lookups", "kv_lora_rank": 88, "qk_rope_head_dim": 32, "trained": measured}
    result = {"device": "Some GPU", "questions": 10, "depths": [0.0, 0.5, 1.0], "task_questions": 100}
    text = figures(tmp_path, "lookups", result | {"models": [{"name": "original", "trained": measured}, other]})
    assert "| original | 15% | 5% | 70% | - | - |\n| 88 + 32, 4 M, lookups | 15% | 5% | 70% | x 1.040 | x 1.100 |" in text


def test_real_model(tmp_path):
    means = {"source": 0.5, "converted": 0.49756, "error": 0.0031}
    healed = conversion(88, 10_000_000, ratios=(1.04, 1.28, 1.0996, 1.05), tasks=TASKS, task_means=means, layers=LAYERS)
    others = [conversion(88, 10_000_000, seed=1, ratios=(1.041,)), conversion(88, ratios=(1.1, 1.6)), conversion(160, seconds=None)]
    others.append(conversion(32, 20_000_000, ratios=(1.2,), calibration="books and lookups"))
    result = {"device": "Some GPU", "conversions": [healed, *others]}
    about, _, head, _, *rows = figures(tmp_path, "real_model", result).splitlines()
    title, _, header, _, task = figures(tmp_path, "tasks", result).splitlines()
    originals = ", ".join(f"{name} 37.27" for name in ("books", "wikitext-2", "own text", "books, 8,192"))
    assert about == f"Ratios to the original's perplexity ({originals}), 32,768 tokens each, Some GPU:"
    assert {line.count("|") for line in (head, *rows)} == {11} and header.count("|") == task.count("|")
    assert rows == [  # the largest cache first, then what was trained longer and longer
        "| 160 + 32 of 384 | -50 % | layers alone | - | - | - | - | - | - | - |",
        "| 88 + 32 of 384 | -68.75 % | layers alone | x 1.100 | x 1.600 | - | - | - | - | 412 |",
        "| 88 + 32 of 384 | -68.75 % | + 10 M tokens, seed 0 | x 1.040 | x 1.280 | x 1.100 | x 1.050 | - | "
        "50.00 -> 49.76 (+- 0.31) | 412 |",
        "| 88 + 32 of 384 | -68.75 % | + 10 M tokens, seed 1 | x 1.041 | - | - | - | - | - | 412 |",
        "| 32 + 32 of 384 | -83.33 % | + 20 M tokens, with lookups | x 1.200 | - | - | - | - | - | 412 |",
    ]
    assert title == "Accuracy in percent, 88 + 32, + 10 M tokens, seed 0, Some GPU:"
    assert task == "| boolq | rc_5shot | 3,270 | 60.00 | 59.11 | -0.89 (+- 0.61) |"
    assert figures(tmp_path, "tasks", {"device": "Some GPU", "conversions": [others[1]]}) == "not measured yet"


@pytest.fixture
def pictures(monkeypatch):
    """The script that draws, by its names."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return runpy.run_path(str(BENCHMARKS / "pictures.py"))


@pytest.fixture
def drawings(monkeypatch):
    """The script that draws how it works."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return runpy.run_path(str(BENCHMARKS / "drawings.py"))


def drawn(axes):
    """The lines of a diagram by their names, as points."""
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in axes.lines}


def test_pictures(pictures):
    last = conversion(160, 1_000_000, frontier=FRONTIER, **TRAINED)
    result = {"conversions": [conversion(88, layers=LAYERS), conversion(88, 1_000_000, **TRAINED), last]}
    errors, steps = pictures["layer_errors"](result).axes
    assert drawn(errors) == {"closed form": [(0, 0.2), (1, 0.3)], "fitted": [(0, 0.1), (1, 0.3)]}
    assert [bar.get_height() for bar in steps.patches] == [300, 0] and "88 + 32 (-68.75 %)" in errors.get_title()
    divergence, ratio = pictures["training_curve"](result).axes
    names = ["88 + 32, 1 M tokens", "160 + 32, 1 M tokens"]
    assert drawn(divergence) == dict.fromkeys(names, [(0.5, 0.3), (1, 0.2)])
    assert drawn(ratio) == dict.fromkeys(names, [(0, 1.5), (1, 1.1)])
    assert {text.get_text() for text in ratio.texts} == set(names)
    (axes,) = pictures["frontier"](result).axes
    assert list(drawn(axes).values()) == [[(12.5, 1.3), (31.25, 1.07)], [(31.25, 1.05)]]
    assert {text.get_text() for text in axes.texts} == {"32 + 16, predicted", "88 + 32", "measured x 1.050"}
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in (divergence, ratio, axes))


def test_picture_of_native_models(pictures):
    def row(model, batch, context, native, ours):
        times = {"sdpa": native, "hf_mla": ours}
        speedup = native / ours if native else None
        return {"model": model, "batch": batch, "context": context, "milliseconds_per_token": times, "speedup": speedup}

    rows = [row("wide", 16, 4096, 20.0, 2.0), row("wide", 1, 4096, 3.0, 2.0), row("wide", 16, 1024, 6.0, 2.0)]
    rows += [row("wide", 16, 8192, None, 3.0), {"model": "other", "batch": 16, "context": 1024, "error": "no memory"}]
    (axes,) = pictures["native_model"]({"machine": {"device": "Some GPU"}, "rows": rows}).axes
    assert drawn(axes) == {"sdpa": [(1024, 6), (4096, 20)], "hf_mla": [(1024, 2), (4096, 2)]}
    assert {text.get_text() for text in axes.texts} == {"sdpa", "hf_mla", "x 3", "x 10"} and "Some GPU" in axes.get_title()
    assert pictures["native_model"]({"rows": rows[:2]}) is None


def test_picture_of_decoding(pictures):
    sides = {"decode_ms_per_token": {"source": 4.0, "converted": 2.5}, "cache_bytes": {"source": 2**31, "converted": 2**29}}
    rows = [{"context": 2048, **sides}, {"context": 8192, **sides, "decode_ms_per_token": {"source": 12.0, "converted": 2.75}}]
    result = {"contexts": rows, "batch": 16, "dtype": "bfloat16", **MACHINE}
    figure = pictures["decoding"](result)
    held, time = figure.axes
    assert drawn(held) == {"original": [(2048, 2), (8192, 2)], "converted": [(2048, 0.5), (8192, 0.5)]}
    assert drawn(time) == {"original": [(2048, 4), (8192, 12)], "converted": [(2048, 2.5), (8192, 2.75)]}
    assert "Some GPU" in figure.get_supxlabel() and {text.get_text() for text in time.texts} == {"12", "2.75"}


def test_pictures_are_of_what_there_is(pictures, tmp_path):
    closed = [layer | {"error_reconstructed": None, "steps_kept": 0} for layer in LAYERS]
    result = {"conversions": [conversion(88, layers=closed)]}
    assert list(drawn(pictures["layer_errors"](result).axes[0])) == ["closed form"]
    (tmp_path / "real_model.json").write_text(json.dumps(result), encoding="utf-8")
    (tmp_path / "native_model.json").write_text(json.dumps({"rows": []}), encoding="utf-8")
    pictures["draw_all"](tmp_path, tmp_path / "docs")
    (file,) = (tmp_path / "docs").iterdir()
    before = file.read_bytes()
    assert file.name == "layer_errors.svg" and b"</svg>" in before
    pictures["draw_all"](tmp_path, tmp_path / "docs")
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["latent", "absorption"])
def test_shapes_in_drawings(drawings, name):
    """Those of the module, of a Llama-3-8B at 512 + 64."""
    shape = {"hidden_size": 4096, "num_attention_heads": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    config = hf_mla.LlamaMLAConfig(**shape, qk_nope_head_dim=128, v_head_dim=128)
    with torch.device("meta"):
        module = hf_mla.MLAAttention(config, 0)
    words = {text.get_text().replace("\n", " ") for text in drawings[name]().axes[0].texts}
    assert "kv_b_proj [32 x (128 + 128), 512]" in words and module.kv_b_proj.weight.shape == (32 * (128 + 128), 512)
    if name == "latent":
        assert "kv_a_proj_with_mqa [512 + 64, 4,096]" in words and module.kv_a_proj_with_mqa.weight.shape == (512 + 64, 4096)


def test_the_drawn_shares_of_energy(drawings):
    keys, moment = torch.randn(3 * 32, 48, dtype=torch.float64), torch.eye(48, dtype=torch.float64)
    alone, real, mixed = drawings["shares"](keys, moment, 3).values()
    assert (alone < real).all() and (real < mixed).all() and (mixed < 1).all()
    pairs = torch.complex(*torch.randn(2, 1, 8, 1, 48, dtype=torch.float64)).expand(3, 8, 2, 48)  # of a group, all the same but
    turned = (pairs * torch.polar(*torch.rand(2, 3, 8, 2, 1, dtype=torch.float64).mul(3).unbind(0))).flatten(1, 2)
    alone, real, mixed = drawings["shares"](torch.cat([turned.real, turned.imag], dim=1).flatten(0, 1), moment, 3).values()
    assert (alone < 0.9).all() and (real < 0.999).all()
    torch.testing.assert_close(mixed, torch.ones_like(mixed))


def test_the_concentration_is_drawn(drawings):
    energy, bars = drawings["rotary"]().axes[:2]
    assert energy.images[0].get_array().shape == (3, 16)
    assert len(bars.patches) == 3 * 8 and all(0 < bar.get_height() <= 100 for bar in bars.patches)
