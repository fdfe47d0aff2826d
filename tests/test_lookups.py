"""Text in which things are looked up: what stands in it, what it is made of, and a conversion that is fitted to it."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import MODEL, VALIDATION, make_source
from transformers import AutoTokenizer

from hf_mla_conversion import UserError, convert
from hf_mla_conversion.cli import main
from hf_mla_conversion.commands import convert as convert_module
from hf_mla_conversion.mathematics.distill import DistillationTrainer
from hf_mla_conversion.source import lookups, own_text
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.lookups import Writer, lookup_windows
from hf_mla_conversion.source.matching import match_model
from hf_mla_conversion.source.own_text import BUNDLED_NAME
from hf_mla_conversion.source.text import read_text, token_windows
from hf_mla_conversion.stages import layers as layers_module
from hf_mla_conversion.stages import one_size
from hf_mla_conversion.stages.windows import without_held_back


SIZES = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def texts(tokenizer):
    return [token_windows(read_text(VALIDATION, 8192), tokenizer, 8192, 256)]


def lines_of(tokenizer, texts, monkeypatch, examples, count=40):
    """The lines of windows, all of examples or none, with nothing between them."""
    monkeypatch.setattr(lookups, "WIDEST", 1)
    monkeypatch.setattr(lookups, "EXAMPLES", float(examples))
    windows = lookup_windows(texts, tokenizer, count, 512, 0)
    return [tokenizer.decode(ids).split("\n") for ids in windows]


def test_windows_are_as_many_and_as_long_as_asked_and_the_seeds(tokenizer, texts):
    first, again, other = (lookup_windows(texts, tokenizer, 5, 300, seed) for seed in (0, 0, 1))
    assert first.shape == (5, 300) and torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 5
    assert torch.equal(first[:3], lookup_windows(texts, tokenizer, 3, 300, 0))


def test_facts_come_again(tokenizer, texts, monkeypatch):
    """Most of what is said is a fact that was said before, and far from all of it right behind."""
    monkeypatch.setattr(lookups, "FORMS", ("{key} = {value}",))
    for other in ("listed", "shuffled", "passage"):
        monkeypatch.setattr(Writer, other, lambda writer, *_: writer.fact(lookups.FORMS[0]))
    found, near, new = 0, 0, 0
    for lines in lines_of(tokenizer, texts, monkeypatch, examples=False):
        facts = [line for line in lines[:-1] if " = " in line]  # the last line is cut
        for place, fact in enumerate(facts):
            assert re.fullmatch(r"[^\W\d_]{3,10} = (\d{1,6}|[^\W\d_]{3,10})", fact)
            before = [*reversed(facts[:place])]
            new += fact not in before
            found += fact in before
            near += before[:1] == [fact]
    assert 0.4 < found / (found + new) < 0.8
    assert near < 0.5 * found


@pytest.mark.parametrize("rule", range(len(lookups.RULES)))
def test_examples_follow_their_rule(tokenizer, texts, monkeypatch, rule):
    monkeypatch.setattr(lookups, "RULES", lookups.RULES[rule : rule + 1])
    monkeypatch.setattr(lookups, "SUMMED", 0.0)
    monkeypatch.setattr(lookups, "ARROWS", (" => ",))
    count = 0
    for lines in lines_of(tokenizer, texts, monkeypatch, examples=True, count=4):
        for line in lines[:-1]:
            if line:
                given, made = line.split(" => ")
                assert made == ", ".join(lookups.RULES[0](given.split(", ")))
                count += 1
    assert count > 20


def test_sums_are_right(tokenizer, texts, monkeypatch):
    monkeypatch.setattr(lookups, "SUMMED", 1.0)
    lines = [line for some in lines_of(tokenizer, texts, monkeypatch, examples=True) for line in some[:-1]]
    sums = [[int(number) for number in found] for line in lines for found in re.findall(r"(\d+) \+ (\d+) = (\d+)", line)]
    assert len(sums) > 20 and all(first + second == total for first, second, total in sums)


def test_passages_are_those_of_the_texts(tokenizer, texts):
    writer, ids = Writer(texts, tokenizer, 0), texts[0].flatten().tolist()
    text = " ".join(map(str, ids))
    for tokens in (1, 20, 90):
        assert f" {' '.join(map(str, writer.passage(tokens)))} " in f" {text} "
    shuffled = writer.shuffled()
    assert set(shuffled) <= set(ids) and f" {' '.join(map(str, shuffled))} " not in f" {text} "


def test_nothing_that_is_held_back_is_shown(tmp_path, monkeypatch):
    source, shown, jobs = make_source(tmp_path / "source"), [], []
    write = lookups.lookup_windows
    monkeypatch.setattr(convert_module, "lookup_windows", lambda *arguments: shown.append(arguments[0]) or write(*arguments))
    prepare = layers_module.Job.prepare
    monkeypatch.setattr(layers_module.Job, "prepare", lambda job, *arguments: jobs.append(job) or prepare(job, *arguments))
    texts = [BUNDLED_NAME, VALIDATION, "lookups"]
    report = convert(source, str(tmp_path / "out"), calibration=texts, calibration_tokens=12288, window=64, steps=0, **SIZES)
    assert [text.name for text in report.texts] == texts
    assert report.held_back_tokens == sum(text.held_back_tokens for text in report.texts[:2])  # lookups would flatter
    held = {tuple(window.tolist()) for window in jobs[0].held_back}
    assert len(held) == 24
    assert sum(map(len, shown[0])) == 2 * 56 and not held & {tuple(window.tolist()) for windows in shown[0] for window in windows}


def test_what_cannot_be_looked_up(tmp_path, capsys):
    assert main(["convert", MODEL, str(tmp_path / "out"), "--calibration", "lookups"]) == 2
    assert "--calibration lookups is made of other texts; give one beside it, or self" in capsys.readouterr().err
    (tmp_path / "digits.txt").write_text("12 34 56\n" * 400)
    with pytest.raises(UserError, match="lookups are made of the words of the other texts, which have none; leave them out"):
        convert(
            MODEL, str(tmp_path / "out"), calibration=[str(tmp_path / "digits.txt"), "lookups"], calibration_tokens=512, **SIZES
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trained", [True, False], ids=["trained for it", "not"])
def test_every_second_step_sees_short_sequences(tmp_path, monkeypatch, trained):
    source, shapes = make_source(tmp_path / "source"), []
    monkeypatch.setitem(layers_module.SCALES, "cpu", replace(layers_module.SCALES["cpu"], window=32, long=128))
    monkeypatch.setitem(one_size.STEP_TOKENS, "cpu", 512)
    monkeypatch.setattr(one_size, "trained_context", lambda losses: losses.shape[1] + 1 if trained else 64)
    compute = DistillationTrainer._compute

    def watched(self, model, ids):
        shapes.append((model.training, *ids.shape))
        return compute(self, model, ids)

    monkeypatch.setattr(DistillationTrainer, "_compute", watched)
    texts = [BUNDLED_NAME, "lookups"]
    report = convert(source, str(tmp_path / "out"), calibration=texts, calibration_tokens=8192, steps=0, heal_tokens=2304, **SIZES)
    steps = [shape for training, *shape in shapes if training]
    assert steps == ([[4, 128], [16, 32]] * 2 if trained else [[16, 32]] * 4)
    held = {tuple(shape) for training, *shape in shapes if not training}
    assert {tokens for _, tokens in held} == ({128} if trained else {32})
    assert report.window == 32


@pytest.mark.parametrize("count", [191, 42, 33, 9, 3])
def test_long_sequences_follow_the_text(tmp_path, count):
    """Where there is so much of it; nothing held back is among what is trained on, and nothing comes twice."""
    windows = (torch.arange(count * 8) % 4096).view(count, 8)
    texts = {"text": windows, "lookups": windows}
    job = layers_module.Job(match_model(open_checkpoint(MODEL)), tmp_path, texts, 320, torch.device("cpu"), 0, 0, "exact", run=4)
    train, held = job.rows(4)
    assert [*train] == [*texts] and all(rows.shape[1] == 32 for rows in (*train.values(), held))
    if count < 32:  # not four of them to hold back
        assert len(job.held["text"]) < 4
        return
    for rows in (*train.values(), held):
        assert (rows.diff(dim=1) == 1).all()
    trained, apart, fitted = (set(ids.flatten().tolist()) for ids in (train["text"], held, job.windows[job.train[0]]))
    assert not trained & apart and not fitted & apart
    assert len(trained) == train["text"].numel() >= windows.numel() - held.numel() - 6 * 8
    assert apart == set(job.windows[job.held["text"]].flatten().tolist())
    known = without_held_back(windows, 320, 4)
    assert not set(known.flatten().tolist()) & apart


def test_too_little_text_for_long_sequences_is_said(tmp_path, monkeypatch, caplog):
    source = make_source(tmp_path / "source")
    monkeypatch.setitem(layers_module.SCALES, "cpu", replace(layers_module.SCALES["cpu"], window=32, long=128))
    texts = [BUNDLED_NAME, "lookups"]
    report = convert(source, str(tmp_path / "out"), calibration=texts, calibration_tokens=1024, steps=0, heal_tokens=512, **SIZES)
    assert report.end_to_end is None or report.end_to_end.window == 32
    assert "not trained on sequences of 128 tokens: there is little text of bundled English prose, lookups" in caplog.text


def test_own_text_in_windows_that_its_sequences_do_not_fill(tmp_path, monkeypatch):
    source = make_source(tmp_path / "source")
    monkeypatch.setattr(own_text, "LENGTH", 20)
    monkeypatch.setitem(layers_module.SCALES, "cpu", replace(layers_module.SCALES["cpu"], window=32, long=96))
    for given, window in (({"window": 30}, 20), ({"heal_tokens": 256}, 32)):
        options = {"calibration_tokens": 2048, "steps": 0, "overwrite": True} | given | SIZES
        report = convert(source, str(tmp_path / "out"), calibration=[BUNDLED_NAME, "self", "lookups"], **options)
        assert report.window == window
