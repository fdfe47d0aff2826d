"""Text that the source writes itself, several calibration texts, and what is kept of a fit."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import CALIBRATION, MODEL, VALIDATION, make_mla, make_source
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mla_conversion import UserError, convert
from hf_mla_conversion.commands import convert as convert_module
from hf_mla_conversion.commands import demo as demo_module
from hf_mla_conversion.commands.plan import disk_estimate
from hf_mla_conversion.mathematics import reconstruct
from hf_mla_conversion.mathematics.closed_form import (
    IDENTITY_NORM_EPS,
    IDENTITY_NORM_WEIGHT,
    keep_closed_form,
    make_trainable,
)
from hf_mla_conversion.mathematics.moments import CAP, gradient_moment
from hf_mla_conversion.mathematics.reconstruct import interleaved, mixed
from hf_mla_conversion.source import own_text
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.matching import match_model
from hf_mla_conversion.source.own_text import Scribe, chat_scripts, own_windows, write_own_text, write_text
from hf_mla_conversion.source.text import read_text, token_windows


ON_GPU = torch.cuda.is_available()
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
SIZES = {"kv_lora_rank": 12, "qk_rope_head_dim": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("own") / "source")


def tokenizer_with(template):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = template
    return tokenizer


def test_scripts_are_what_the_template_has_between_turns():
    tokenizer = tokenizer_with(TEMPLATE)
    scripts = [tokenizer.decode(script) for script in chat_scripts(tokenizer)]
    assert scripts == ["<user>", "</s><assistant>", "</s><user>"]
    assert chat_scripts(tokenizer_with(None)) is None
    assert chat_scripts(tokenizer_with("{{ raise_exception('no') }}")) is None
    assert chat_scripts(tokenizer_with("always the same")) is None


def test_turns_follow_each_other_and_texts_begin_anew():
    tokenizer, end = tokenizer_with(TEMPLATE), 1
    scripts = chat_scripts(tokenizer)
    scribe = Scribe(tokenizer, [end], 2, torch.device("cpu"), torch.Generator().manual_seed(0))
    drawn = [50] * 40
    for place in (12, 30):
        drawn[place] = end
    rows = torch.stack([scribe.next(torch.tensor([token, token])) for token in drawn], 1).tolist()
    free, chat = rows
    opening, answer, more = scripts
    words = 12 - len(opening)
    assert chat[:12] == opening + [50] * words
    assert chat[12 : 12 + len(answer)] == answer  # in place of the end that was drawn
    assert chat[30 : 30 + len(more)] == more[: 40 - 30]
    assert free[12] == free[30] == end
    assert free[1:12] == [50] * 11 and free[14:30] == [50] * 16
    assert {free[0], free[13], free[31]}.isdisjoint(tokenizer.all_special_ids)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not ON_GPU, reason="needs a GPU"))])
def test_without_chance_it_writes_what_the_library_generates(source, monkeypatch, device):
    monkeypatch.setattr(own_text, "draw", lambda logits, _generator: logits.argmax(-1))
    monkeypatch.setattr(own_text, "BLOCK", 16)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).to(device), AutoTokenizer.from_pretrained(source)
    ids = write_text(model, tokenizer, 4, 24, seed=3)
    for row in ids:
        expected = model.generate(row[None, :1].to(device), max_new_tokens=23, do_sample=False, eos_token_id=None)[0]
        stop = (expected == model.config.eos_token_id).nonzero().flatten().tolist() or [24]
        assert row[: stop[0]].tolist() == expected[: stop[0]].tolist()
    assert len({row[0].item() for row in ids}) == 4


def interrupted_writing(monkeypatch, count):
    """Interrupt the writing at its call number `count`, the first of which is for the estimate; returns the calls so far."""
    write, calls = own_text.write_text, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(own_text, "write_text", stop)
    return calls


def test_what_is_written_goes_on_and_depends_on_the_seed(source, tmp_path, monkeypatch):
    checkpoint, tokenizer, cpu = open_checkpoint(source), AutoTokenizer.from_pretrained(source), torch.device("cpu")
    monkeypatch.setattr(own_text, "MOST_SEQUENCES", {"cpu": 4})
    monkeypatch.setattr(own_text, "LENGTH", 16)
    for name in "abc":
        (tmp_path / name).mkdir()
    whole = own_windows(checkpoint, tokenizer, tmp_path / "a", cpu, 256, 32, seed=0)
    assert whole.shape == (8, 32)
    calls = interrupted_writing(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        own_windows(checkpoint, tokenizer, tmp_path / "b", cpu, 256, 32, seed=0)
    assert torch.equal(own_windows(checkpoint, tokenizer, tmp_path / "b", cpu, 256, 32, seed=0), whole)
    assert len(calls) == 4 + 3  # of four batches, two were written before
    assert not torch.equal(own_windows(checkpoint, tokenizer, tmp_path / "c", cpu, 256, 32, seed=1), whole)


@pytest.mark.parametrize(("most", "tokens"), [(1 << 24, 6144), (4096, 4096)])
def test_training_reads_own_text_once(source, tmp_path, monkeypatch, most, tokens):
    """So much of it is written as is its part of the training, up to a limit."""
    monkeypatch.setattr(convert_module, "MOST_WRITTEN", most)
    given = {"calibration": ["self", VALIDATION], "calibration_tokens": 2048, "heal_tokens": 12288, "keep_own_text": True}
    convert(source, str(tmp_path / "out"), **given, **SIZES | {"steps": 0})
    assert len((tmp_path / "out" / "own_text.jsonl").read_text(encoding="utf-8").splitlines()) == tokens / 256


def test_several_texts_are_mixed_and_measured_each(source, tmp_path):
    out = tmp_path / "out"
    given = {"calibration": ["self", VALIDATION], "calibration_tokens": 8192, "keep_own_text": True}
    report = convert(source, str(out), **given, steps=2, kv_budget=0.6, device="cpu")
    assert len(report.candidates) > 1
    assert [text.name for text in report.texts] == [VALIDATION, "self"]
    assert sum(text.held_back_tokens for text in report.texts) == report.held_back_tokens
    assert report.calibration_tokens == 8192
    assert all(set(layer.error_by_text) == {VALIDATION, "self"} for layer in report.layers)
    recipe = json.loads((out / "conversion.json").read_text())["recipe"]
    assert recipe["calibration"] == f"self and {VALIDATION}"
    assert len(recipe["own_text_sha256"]) == 64
    kept = [json.loads(line)["text"] for line in (out / "own_text.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(kept) == 4096 / 256 and all(kept)
    with pytest.raises(UserError, match="--window is 1000; allowed: 2 to 256"):
        convert(source, str(tmp_path / "other"), window=1000, **SIZES)
    with pytest.raises(UserError, match="--calibration names no text"):
        convert(source, str(tmp_path / "other"), calibration=[], **SIZES)
    with pytest.raises(UserError, match=f"--keep-own-text keeps what the source writes, the text here is {VALIDATION}; add"):
        convert(source, str(tmp_path / "other"), calibration=VALIDATION, keep_own_text=True, **SIZES)


def test_a_short_text_leaves_the_others_whole(source, tmp_path, caplog):
    (tmp_path / "short.txt").write_text("The captain looked at the sea and saw a ship.")
    texts = [str(tmp_path / "short.txt"), VALIDATION]
    with caplog.at_level(logging.WARNING):
        report = convert(source, str(tmp_path / "out"), calibration=texts, calibration_tokens=1024, steps=0, **SIZES)
    short, whole = report.texts
    assert report.window == short.tokens // 2 < 16 and 512 - 2 * report.window < whole.tokens <= 512
    assert f"short.txt is too short for a window: all text is read in sequences of {report.window} tokens" in caplog.text


def test_windows_of_all_texts_come_evenly():
    texts = [torch.arange(3), torch.arange(100, 110)]
    assert interleaved(texts).tolist() == [0, 100, 1, 101, 2, 102, *range(103, 110)]
    order = mixed(texts, 4, 5, seed=0)
    assert order.shape == (5, 4)
    assert ((order >= 100).sum(1) == 2).all()
    assert sorted(order.flatten().tolist())[10:] == list(range(100, 110))


def test_a_fit_that_fails_is_not_kept(source, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruct, "RATE", 30.0)
    report = convert(source, str(tmp_path / "out"), calibration_tokens=4096, steps=3, **SIZES)
    assert all(layer.steps_kept == 0 and layer.error_reconstructed == layer.error_closed_form for layer in report.layers)
    closed = convert(source, str(tmp_path / "closed"), calibration_tokens=4096, steps=0, **SIZES)
    assert report.perplexity_ratio == pytest.approx(closed.perplexity_ratio, rel=1e-5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.kv_a_layernorm_eps == 1e-6


def test_closed_form_under_a_small_epsilon_and_back():
    layer = make_mla(kv_a_layernorm_eps=1e-6).model.layers[0].self_attn.double()
    norm, weight = layer.kv_a_layernorm, layer.kv_a_proj_with_mqa.weight
    before = weight.detach().clone()
    norm.variance_epsilon = IDENTITY_NORM_EPS
    norm.weight.data.fill_(IDENTITY_NORM_WEIGHT)
    x = torch.randn(3, 64, dtype=torch.float64)
    rank = len(norm.weight)
    expected = norm((x @ weight.T)[:, :rank])
    keep_closed_form(layer, 1e-6)
    assert torch.allclose(norm((x @ weight.T)[:, :rank]), expected, rtol=1e-4)
    assert torch.equal(weight[rank:], before[rank:])
    make_trainable(layer)
    for _ in range(2):  # an ordinary layer stays as it is
        assert torch.allclose(weight, before, rtol=1e-6)
        assert torch.allclose(norm((x @ weight.T)[:, :rank]), expected, rtol=1e-4)
        make_trainable(layer)


def test_gradients_of_sinks_and_outliers_do_not_decide():
    gradient = torch.randn(2, 50, 6)
    expected = gradient_moment(gradient)
    sink = gradient.clone()
    sink[:, 0] *= 1000
    assert torch.equal(gradient_moment(sink), expected)
    outlier = gradient.clone()
    outlier[1, 7] *= 1000
    median = gradient[:, 1:].norm(dim=-1).median()
    assert (gradient_moment(outlier) - expected).norm() < 1.2 * (CAP * median) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_drawn_as_often_as_they_are_likely(dtype):
    """By the library's own sampling of the same probabilities: both within what chance does."""
    logits, count = torch.tensor([3.0, 2.0, 2.0, 1.0, -1.0, -2.0], dtype=dtype), 40000
    expected = torch.multinomial(logits.float().softmax(-1), count, replacement=True).bincount(minlength=6)
    found = own_text.draw(logits.expand(count, -1), torch.Generator().manual_seed(0)).bincount(minlength=6)
    assert ((found - expected).abs() < 5 * (2 * expected + 1).sqrt()).all()


def test_own_text_that_was_kept_is_read_again(tmp_path):
    tokenizer = tokenizer_with(None)
    ids = token_windows(read_text(VALIDATION, 256), tokenizer, 256, 64)
    ids[:, 32] = tokenizer.eos_token_id
    write_own_text(tokenizer, ids.view(2, 128), 64, tmp_path / "own_text.jsonl")
    text = read_text(str(tmp_path / "own_text.jsonl"), 1000)
    assert text.split("\n\n" + tokenizer.decode(ids[1])[:20])[0] == tokenizer.decode(ids[0])
    windows = token_windows(text, tokenizer, 280, 280)
    assert (windows == tokenizer.eos_token_id).sum() == 4


def names_by(calibration=None, device="cpu", tokens=6144, fitted=10240, earlier=None):
    return own_text.text_names(calibration, None, SimpleNamespace(type=device), tokens, fitted, earlier)


def test_own_text_is_written_where_there_is_memory_and_time(monkeypatch):
    alone, both = [own_text.BUNDLED_NAME, "lookups"], [own_text.BUNDLED_NAME, "self", "lookups"]
    monkeypatch.setattr(own_text, "own_text_fits", lambda *_: True)
    assert names_by() == both  # 2,048 tokens of it are a fifth of 10,240
    assert names_by(tokens=6147) == alone
    assert names_by(fitted=0) == alone
    assert names_by(device="cuda", fitted=0) == both
    assert names_by(earlier="bundled English prose and lookups") == alone
    monkeypatch.setattr(own_text, "own_text_fits", lambda *_: False)
    assert names_by() == names_by(device="cuda") == alone
    assert names_by(earlier="bundled English prose and self and lookups") == both


def test_what_fits_is_counted_in_the_numbers_computed_with(source, monkeypatch):
    checkpoint, cpu = open_checkpoint(source), torch.device("cpu")
    for free, fits in ((6 * checkpoint.parameters, False), (6 * checkpoint.parameters + 1, True)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert own_text.own_text_fits(checkpoint, cpu) is fits


def test_what_was_chosen_first_holds(source, tmp_path, monkeypatch, caplog):
    options = {"calibration_tokens": 384, "window": 16, "steps": 1, **SIZES}  # 128 tokens of its own, a fit of 1,024
    estimates = []
    monkeypatch.setattr(own_text, "MOST_SEQUENCES", {"cpu": 4})
    monkeypatch.setattr(convert_module, "disk_estimate", lambda *arguments: estimates.append(arguments[-1]) or 0)
    interrupted_writing(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        convert(source, str(tmp_path / "out"), **options)
    assert "writes 128 tokens to calibrate on, which takes 0.0 minutes or more" in caplog.text
    monkeypatch.setattr(own_text, "own_text_fits", lambda *_: False)
    report = convert(source, str(tmp_path / "out"), **options)
    assert [text.name for text in report.texts] == [own_text.BUNDLED_NAME, "self", "lookups"]
    assert estimates == [128, 128]
    assert "lookups made of it" not in caplog.text
    convert(source, str(tmp_path / "other"), **options)
    assert f"calibrating on the bundled English prose and lookups made of it: text of its own would take {source}" in caplog.text


def test_own_text_takes_disk(source):
    checkpoint = match_model(open_checkpoint(source))
    with_it, without = (disk_estimate(checkpoint, 1000, 4096, 256, "cpu", own) for own in (1000, 0))
    assert with_it - without == 12000


def test_the_demo_is_calibrated_on_what_its_model_has_not_seen_alone(monkeypatch):
    monkeypatch.setattr(demo_module, "convert", lambda *_, **options: pytest.fail(options["calibration"]))
    with pytest.raises(pytest.fail.Exception) as seen:
        demo_module.demo()
    assert str(seen.value) == CALIBRATION


def test_texts_are_chosen_by_their_whole_names(source, monkeypatch):
    gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(own_text, "own_text_fits", lambda *_: False)
    assert own_text.text_names("myself.txt", None, gpu, 4096, 0) == ["myself.txt"]
    with pytest.raises(UserError, match="--calibration self needs all of"):
        own_text.text_names(["a.txt", "self"], open_checkpoint(source), gpu, 4096, 0)
