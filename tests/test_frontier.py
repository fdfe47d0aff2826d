"""`convert --max-ratio`: the smallest cache that keeps a perplexity ratio."""

import json
import math
from types import SimpleNamespace

import pytest
from conftest import MODEL, make_source
from test_resume import fingerprint

from hf_mla_conversion import UserError, convert
from hf_mla_conversion.cli import main
from hf_mla_conversion.commands.plan import possible_sizes, size_ladder
from hf_mla_conversion.output.plotting import draw
from hf_mla_conversion.output.reports import Candidate
from hf_mla_conversion.output.tables import convert_table
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.stages.frontier import CONVERSIONS, FACTOR, POWER, search
from hf_mla_conversion.stages.layers import Job


ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
LADDER = [Candidate(rank, 8, error) for rank, error in ((8, 0.8), (16, 0.5), (24, 0.3), (40, 0.2), (56, 0.1), (88, 0.05))]
KV_RATIOS = [(size.kv_lora_rank + 8) / 128 for size in LADDER]


def law(factor, power=POWER):
    """What a conversion measures, where it goes with a power of the error."""
    return lambda size: math.exp(factor * size.error**power)


def look(folder, max_ratio, truth):
    """A search, with what it converted, by rank; a conversion leaves a folder."""
    converted = []

    def measure(size):
        converted.append(size.kv_lora_rank)
        (folder / f"{size.kv_lora_rank}+8").mkdir(exist_ok=True)
        return truth(size)

    best, points = search(folder, LADDER, KV_RATIOS, max_ratio, measure, ALONE)
    return best.kv_lora_rank, converted, points


@pytest.mark.parametrize("off", [0.05, 0.2, 1, 5, 20])
@pytest.mark.parametrize("max_ratio", [1.02, 1.1, 1.5])
def test_finds_the_smallest_whatever_the_factor(tmp_path, off, max_ratio):
    truth = law(off * FACTOR)
    fitting = [size.kv_lora_rank for size in LADDER if truth(size) <= max_ratio]
    if not fitting:
        with pytest.raises(
            UserError, match=r"largest cache that is tried, 88 \+ 8 \(75.00% of the source's\), reaches x 1\.\d+; give"
        ):
            look(tmp_path, max_ratio, truth)
        return
    best, converted, points = look(tmp_path, max_ratio, truth)
    assert best == fitting[0]
    assert len(converted) <= CONVERSIONS
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [f"{best}+8"]
    for point in points:  # now that the factor is known, all are
        expected = truth(point)
        assert point.measured_ratio == (expected if point.kv_lora_rank in converted else None)
        if point.kv_lora_rank not in converted:
            assert point.predicted_ratio == pytest.approx(expected)
    assert points == sorted(points, key=lambda point: point.kv_ratio)


def test_another_power_than_believed(tmp_path):
    """Predictions are then wrong, yet what is taken was measured to keep the ratio."""
    for number, power in enumerate((0.5, 1, 3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        best, _, points = look(folder, 1.1, law(0.3, power))
        chosen = next(point for point in points if point.kv_lora_rank == best)
        assert chosen.measured_ratio is not None and chosen.measured_ratio <= 1.1
        assert all(point.measured_ratio > 1.1 for point in points if point.measured_ratio and point.kv_ratio < chosen.kv_ratio)


def test_goes_on_where_it_was_stopped(tmp_path):
    truth = law(5.0)
    whole = look(tmp_path, 1.2, truth)
    assert len(whole[1]) == 2
    for path in tmp_path.glob(f"measured-{whole[0]}+8.json"):  # as if killed before the last was written
        path.unlink()
    assert look(tmp_path, 1.2, truth) == (whole[0], whole[1][1:], whole[2])
    assert look(tmp_path, 1.2, truth) == (whole[0], [], whole[2])
    # Another ratio takes up what was measured.
    assert not {*look(tmp_path, 1.06, truth)[1]} & {*whole[1]}


def test_the_better_split_of_a_cache(tmp_path):
    sizes = [Candidate(24, 8, 0.3), Candidate(16, 16, 0.2), Candidate(56, 8, 0.1), Candidate(48, 16, 0.15)]
    best, points = search(tmp_path, sizes, [0.25, 0.25, 0.5, 0.5], 1.1, law(FACTOR), ALONE)
    assert [(point.kv_lora_rank, point.qk_rope_head_dim) for point in points] == [(16, 16), (56, 8)]
    assert best.kv_ratio == 0.25


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1, "head_dim": 4}, {"num_key_value_heads": 1, "head_dim": 16}])
def test_ladder(changes):
    config = open_checkpoint(MODEL).config
    for name, value in changes.items():
        setattr(config, name, value)
    sizes = size_ladder(config, "exact")
    caches = [sum(size) for size in sizes]
    assert sizes and len({*sizes}) == len(sizes) and caches == sorted(caches, reverse=True)
    for rank, rope_dim in sizes:
        assert possible_sizes(config, None, rank, rope_dim) == [(rank, rope_dim)]
    if not changes:
        assert sizes[-4:] == [(28, 8), (20, 16), (16, 8), (8, 16)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-ratio", "1.1", "--kv-budget", "0.5"], "--max-ratio looks for the size; give it without --kv-budget"),
        (["--max-ratio", "1.1", "--kv-lora-rank", "8"], "--max-ratio looks for the size; give it without --kv-budget"),
        (["--max-ratio", "1"], "--max-ratio is 1.0; allowed: more than 1"),
        (["--max-ratio", "nan"], "--max-ratio is nan; allowed: more than 1"),
    ],
)
def test_refused_in_one_line(capsys, tmp_path, words, message):
    assert main(["convert", MODEL, str(tmp_path / "out"), *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"hf-mla: {message}") and captured.err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_plan_has_no_such_size(capsys):
    with pytest.raises(SystemExit):
        main(["plan", MODEL, "--max-ratio", "1.1"])
    assert "--max-ratio" in capsys.readouterr().err


def test_whole_conversion(tmp_path, monkeypatch):
    """Interrupted and resumed, it writes what a conversion to the size that it finds writes, with the frontier beside it."""
    source = make_source(tmp_path / "source")
    options = {"calibration_tokens": 1024, "window": 64, "steps": 0, "device": "cpu"}
    original, closeness, sizes = Job.measure, Job.closeness, []

    def stop(*_arguments):
        raise KeyboardInterrupt

    def measure(job, config, processes):
        sizes.append(config.kv_lora_rank)
        return original(job, config, processes)

    def closer(job, comparisons):  # random weights lose nothing, with any cache
        return closeness(job, comparisons) | {"perplexity_ratio": 1 + 4 / sizes[-1]}

    monkeypatch.setattr(Job, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(source, str(tmp_path / "out"), max_ratio=1.25, **options)
    monkeypatch.setattr(Job, "measure", measure)
    monkeypatch.setattr(Job, "closeness", closer)
    with pytest.raises(UserError, match="give a larger ratio, which goes on from here"):
        convert(source, str(tmp_path / "out"), max_ratio=1.01, **options)
    assert not (tmp_path / "out").exists()
    report = convert(source, str(tmp_path / "out"), max_ratio=1.25, **options)
    assert report.candidates == [] and report.perplexity_ratio <= 1.25
    size = report.kv_lora_rank, report.qk_rope_head_dim
    chosen = next(point for point in report.frontier if (point.kv_lora_rank, point.qk_rope_head_dim) == size)
    assert (chosen.measured_ratio, chosen.kv_ratio) == (report.perplexity_ratio, report.kv_ratio)
    assert all(point.measured_ratio in (None, 1 + 4 / point.kv_lora_rank) for point in report.frontier)

    direct = convert(source, str(tmp_path / "direct"), kv_lora_rank=size[0], qk_rope_head_dim=size[1], **options)
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "direct") and direct.frontier == []
    content = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert content["recipe"]["max_ratio"] == 1.25 and len(content["report"]["frontier"]) == len(report.frontier)

    lines = convert_table(report).splitlines()
    assert [line.startswith(f"{size[0]} + {size[1]} ") for line in lines if line.endswith("chosen")] == [True]
    axes = draw(content["spectra"], content["report"], "name").axes[2]
    predicted, measured, line = axes.lines
    assert list(predicted.get_ydata()) == [point.measured_ratio or point.predicted_ratio for point in report.frontier]
    assert list(measured.get_ydata()) == [point.measured_ratio for point in report.frontier if point.measured_ratio]
    assert list(line.get_xdata()) == [report.kv_ratio] * 2
