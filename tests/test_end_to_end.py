"""The end-to-end stage of a conversion: what it gives, what survives it, and what is refused."""

import json
import logging
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CALIBRATION, MODEL, VALIDATION, make_source, run_apart
from families import EXACT, disturbed
from transformers import AutoModelForCausalLM

from hf_mla_conversion import UserError, convert, verify
from hf_mla_conversion.mathematics.distill import BEST, DistillationTrainer
from hf_mla_conversion.mathematics.scales import SCALES
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.matching import match_model
from hf_mla_conversion.source.own_text import BUNDLED_NAME
from hf_mla_conversion.source.shards import load_file, save_file
from hf_mla_conversion.source.text import read_text
from hf_mla_conversion.stages import one_size as converter_module
from hf_mla_conversion.stages.end_to_end import distil, numbers_of_ends, tokens_of_each, trained_names


OPTIONS = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "calibration_tokens": 4096, "window": 64, "steps": 2, "device": "cpu"}
OPTIONS["calibration"] = CALIBRATION


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Steps of 512 tokens."""
    monkeypatch.setitem(converter_module.STEP_TOKENS, "cpu", 512)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"), max_position_embeddings=64)


def contents(folder):
    """All that a conversion wrote, but the time that it took."""
    found = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "conversion.json"}
    record = json.loads((Path(folder) / "conversion.json").read_text())
    for report in (record["report"], record["report"]["end_to_end"]):
        report.pop("seconds")
    record["report"].pop("output")
    for entry in record["report"]["end_to_end"]["history"]:
        entry.pop("tokens_per_second", None)
    return found | {"record": record}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The bundled model converted by layers alone, and with the end-to-end stage; the folders and the reports.

    One step leaves most layers in closed form, whose norms are the identity while they are trained and afterwards.
    """
    options = OPTIONS | {"kv_lora_rank": 44, "qk_rope_head_dim": 16, "calibration_tokens": 8192, "window": 128, "steps": 1}
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(converter_module.STEP_TOKENS, "cpu", 1024)
        patch.setitem(converter_module.RATES, "layers", 2e-4)  # for so few steps
        reports = [convert(MODEL, str(folder / name), heal_tokens=n, **options) for name, n in (("layers", 0), ("out", 8192))]
    return folder, *reports


def test_a_trained_model_gets_closer_to_its_source(both):
    folder, _, report = both
    stage = report.end_to_end
    assert stage.steps_taken == stage.steps == 8 and stage.tokens_per_step == 1024 and stage.train == "layers"
    assert stage.history[0]["perplexity"] == pytest.approx(report.layers_alone.perplexity.converted, rel=1e-4)
    assert report.perplexity_ratio < report.layers_alone.perplexity_ratio and report.kl < report.layers_alone.kl
    (text,) = report.texts
    assert text.perplexity_ratio == pytest.approx(report.perplexity_ratio)
    other = {"against": MODEL, "text": VALIDATION, "tokens": 2048, "device": "cpu"}
    trained, untrained = (verify(str(folder / name), **other).perplexity_ratio for name in ("out", "layers"))
    assert trained < untrained  # on text that neither has seen
    assert trained < 2
    card = (folder / "out" / "README.md").read_text()
    assert "all weights but those of the embedding and the head were trained to predict what the source predicts" in card
    assert "8,192 tokens of the same text" in card
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert stage.trained_parameters == model.num_parameters() - model.get_input_embeddings().weight.numel()
    assert f"(x {report.perplexity_ratio:.4f})" in card and "by layer, before all layers were trained |" in card
    names = [{path.name for path in (folder / name).iterdir()} for name in ("out", "layers")]
    assert names[0] == names[1]


def test_training_begins_where_the_layers_ended(both):
    folder, layers, report = both
    kept = [layer.layer for layer in layers.layers if not layer.steps_kept]
    assert len(kept) > 3
    assert report.end_to_end.history[0]["perplexity"] == pytest.approx(layers.perplexity.converted, rel=1e-3)
    assert report.kl < layers.kl and report.layers_alone.kl == pytest.approx(layers.kl)
    before, after = (load_file(folder / name / "model.safetensors") for name in ("layers", "out"))
    for layer in kept:
        norm, latent = (f"model.layers.{layer}.self_attn.kv_a_{part}.weight" for part in ("layernorm", "proj_with_mqa"))
        assert after[norm].eq(before[norm]).all() and not after[latent].eq(before[latent]).all()


def kill(*_arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def short_and_long(monkeypatch):
    """Let layers see sequences of 16 tokens, and the whole model those and 64 in turn."""
    monkeypatch.setitem(SCALES, "cpu", replace(SCALES["cpu"], window=16, long=64))
    monkeypatch.setattr(converter_module, "trained_context", lambda losses: losses.shape[1] + 1)


def convert_killed(place, source, out, options=OPTIONS):
    """A conversion that kills itself where a function of the converter is called, or before a step of the training."""
    converter_module.STEP_TOKENS["cpu"] = 512
    if options["window"] is None:
        short_and_long(pytest.MonkeyPatch())
    compute_loss = DistillationTrainer.compute_loss
    if isinstance(place, str):
        setattr(converter_module, place, kill)
    else:
        DistillationTrainer.compute_loss = lambda self, *args, **kwargs: (
            kill() if self.state.global_step == place else compute_loss(self, *args, **kwargs)
        )
    convert(source, out, heal_tokens=512 * 24, **options)


def test_killed_and_resumed_it_ends_the_same(tmp_path, source, caplog):
    convert(source, str(tmp_path / "whole"), heal_tokens=512 * 24, **OPTIONS)
    assert "reads its text" not in caplog.text  # there is more of it than the layers are calibrated on
    for place in ("write_model", 0, 10, "write_trained"):
        code, said = run_apart(tmp_path / "log", convert_killed, place, source, str(tmp_path / "killed"))
        assert code == -signal.SIGKILL, said[-2000:]
        assert not (tmp_path / "killed").exists()
    (best,) = tmp_path.glob(".killed*/*/best.safetensors")
    best.unlink()  # then the training is taken up after its last step, as if it had been killed before this was written
    convert(source, str(tmp_path / "killed"), heal_tokens=512 * 24, **OPTIONS)
    first, second = (contents(tmp_path / name) for name in ("whole", "killed"))
    second["README.md"] = second["README.md"].replace(b"killed", b"whole")
    assert first.pop("record") == second.pop("record")
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "log", "whole"]


def test_sequences_take_turns_in_a_resumed_training_as_well(tmp_path, source, monkeypatch):
    short_and_long(monkeypatch)
    options = OPTIONS | {"window": None, "calibration": [BUNDLED_NAME, "lookups"]}
    whole = convert(source, str(tmp_path / "whole"), heal_tokens=512 * 24, **options)
    assert whole.window == 16 and whole.end_to_end.window == 64
    for place in (7, 12, 21):
        code, said = run_apart(tmp_path / "log", convert_killed, place, source, str(tmp_path / "killed"), options)
        assert code == -signal.SIGKILL, said[-2000:]
    convert(source, str(tmp_path / "killed"), heal_tokens=512 * 24, **options)
    first, second = (contents(tmp_path / name) for name in ("whole", "killed"))
    assert first["model.safetensors"] == second["model.safetensors"] and first["record"] == second["record"]


def test_nothing_worse_is_written(tmp_path, source, monkeypatch, caplog):
    """At a ruinous rate the model that went in is the best, and comes out."""
    monkeypatch.setitem(converter_module.RATES, "layers", 10.0)
    (tmp_path / "short.txt").write_text(read_text(VALIDATION, 64))
    options = OPTIONS | {"calibration": str(tmp_path / "short.txt")}
    with caplog.at_level(logging.WARNING):
        ruined = convert(source, str(tmp_path / "ruined"), heal_tokens=2048, **options)
    assert "the end-to-end stage reads its text" in caplog.text
    layers = convert(source, str(tmp_path / "layers"), **options)
    assert layers.end_to_end is None and layers.layers_alone is None
    assert ruined.perplexity_ratio <= layers.perplexity_ratio * (1 + 1e-4)
    perplexities = [entry["perplexity"] for entry in ruined.end_to_end.history if "perplexity" in entry]
    assert min(perplexities) == pytest.approx(ruined.perplexity.converted, rel=1e-4) and max(perplexities) > 2 * min(perplexities)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_training_that_gains_nothing_is_left_out(tmp_path, source, monkeypatch, caplog, steps):
    options = OPTIONS | {"steps": steps}
    layers = convert(source, str(tmp_path / "layers"), **options)
    stages = []

    def worse(*arguments):
        stages.append(distil(*arguments))
        best = arguments[4] / BEST
        save_file({name: weight * 2 for name, weight in load_file(best).items()}, best)  # far too sure of itself
        return stages[-1]

    monkeypatch.setattr(converter_module, "distil", worse)
    with caplog.at_level(logging.WARNING):
        report = convert(source, str(tmp_path / "worse"), heal_tokens=2048, **options)
    assert "gained nothing" in caplog.text and report.end_to_end is None and report.layers_alone is None
    assert stages[0]["history"][0]["perplexity"] == pytest.approx(layers.perplexity.converted, rel=1e-4)
    before, written = (load_file(tmp_path / name / "model.safetensors") for name in ("layers", "worse"))
    assert all(torch.equal(written[name], before[name]) for name in before)


def test_short_texts_are_read_often_but_not_too_often():
    assert tokens_of_each({"a": 5_000_000, "b": math.inf}, 10_000_000) == {"a": 5_000_000, "b": 5_000_000}
    assert tokens_of_each({"a": 336_000, "b": math.inf}, 16_000_000) == {"a": 2_688_000, "b": 13_312_000}
    assert tokens_of_each({"a": math.inf, "b": 100, "c": 1000}, 30_000) == {"a": 21_200, "b": 800, "c": 8000}
    assert tokens_of_each({"a": 100, "b": 200}, 30_000) == {"a": 800, "b": 1600}
    assert tokens_of_each({"a": 100}, 0) == {"a": 0}


def test_shares_of_lookups_and_of_the_bundled_prose():
    assert tokens_of_each({"a": math.inf, "lookups": math.inf}, 30_000) == {"a": 20_000, "lookups": 10_000}
    for prose in (1000, math.inf):  # read as often as it may be, or as is its part
        texts = {BUNDLED_NAME: prose, "self": math.inf, "lookups": math.inf}
        assert tokens_of_each(texts, 38_000) == {BUNDLED_NAME: 8000, "self": 20_000, "lookups": 10_000}


@pytest.mark.parametrize("name", ["Llama", "Qwen2, no width of heads, tied", "Phi", "GPTNeoX", "Mixtral"])
def test_layers_are_all_but_embedding_and_head(name):
    model = disturbed(name, *EXACT[name][2:], noise=0.0)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    expected = {id(parameter) for parameter in model.parameters()} - {id(p) for end in ends for p in end.parameters()}
    named, names = dict(model.named_parameters()), trained_names(model, "layers")
    assert {id(named[name]) for name in names} == expected


def test_a_tied_head_that_is_stored_is_counted(tmp_path):
    folder = make_source(tmp_path / "source", tie_word_embeddings=True)
    weights = load_file(tmp_path / "source" / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    for count in (1, 2):
        assert numbers_of_ends(match_model(open_checkpoint(folder))) == count * embedding.numel()
        save_file(weights | {"lm_head.weight": embedding.clone()}, tmp_path / "source" / "model.safetensors")


def test_what_does_not_fit_is_said_before_any_work(tmp_path, source, monkeypatch, caplog):
    monkeypatch.setattr(converter_module, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match=r"takes about .* GB on cpu, 0.0 GB are free; give --heal-tokens 0"):
        convert(source, str(tmp_path / "out"), heal_tokens=2048, **OPTIONS)
    assert not any(tmp_path.iterdir())
    monkeypatch.setitem(converter_module.HEAL_TOKENS, "cpu", 2048)
    with caplog.at_level(logging.WARNING):
        report = convert(source, str(tmp_path / "out"), **OPTIONS)
    assert report.end_to_end is None and "the layers alone are converted" in caplog.text
    with pytest.raises(UserError, match="--heal-tokens is -1; allowed: 0"):
        convert(source, str(tmp_path / "other"), heal_tokens=-1, **OPTIONS)
