"""`verify` at two context lengths: what it measures, in how much memory, and what it says of it."""

import json
import lzma
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import MODEL, VALIDATION, make_source
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mla_conversion import verify
from hf_mla_conversion.cli import main
from hf_mla_conversion.commands import verify as verifier
from hf_mla_conversion.commands.verify import verdict
from hf_mla_conversion.errors import UserError
from hf_mla_conversion.mathematics import measures
from hf_mla_conversion.mathematics.closed_form import mla_config
from hf_mla_conversion.mathematics.measures import Comparison
from hf_mla_conversion.output.reports import ContextReport, PerSide
from hf_mla_conversion.source import loading
from hf_mla_conversion.source.checkpoint import open_checkpoint


@pytest.fixture
def short_windows(monkeypatch):
    """Short windows of 256 tokens, so that the 1024 of the bundled model are a longer context; logits in odd chunks."""
    monkeypatch.setattr(verifier, "VERIFICATION_WINDOW", 256)
    monkeypatch.setattr(measures, "HEAD_TOKENS", 100)


def test_each_context_is_transformers_own_perplexity(converted, short_windows):
    report = verify(converted[0], against=MODEL, text=VALIDATION, tokens=2100, device="cpu")
    assert [(context.window, context.tokens) for context in report.contexts] == [(256, 2048), (1024, 2048)]
    with lzma.open(VALIDATION, "rt") as file:
        ids = AutoTokenizer.from_pretrained(MODEL)(file.read(50_000), return_tensors="pt")["input_ids"][:, :2048]
    for path, side in ((MODEL, "source"), (converted[0], "converted")):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for context in report.contexts:
            windows = ids.view(-1, context.window)
            with torch.no_grad():
                loss = model(windows, labels=windows).loss
            assert math.isclose(math.exp(loss), getattr(context.perplexity, side), rel_tol=1e-4)
            with torch.no_grad():
                logits = model(windows).logits
            for start, end in [(0, context.window // 8), (context.window * 7 // 8, context.window)]:
                part = next(part for part in context.positions if (part.start, part.end) == (start, end))
                here = slice(max(start - 1, 0), end - 1)  # what predicts the part
                targets = windows[:, max(start, 1) : end]
                loss = torch.nn.functional.cross_entropy(logits[:, here].transpose(1, 2), targets)
                assert math.isclose(math.exp(loss), getattr(part.perplexity, side), rel_tol=1e-4)
    for context in report.contexts:
        assert len(context.positions) == 8
        assert all(math.isclose(x.perplexity_ratio, x.perplexity.converted / x.perplexity.source) for x in context.positions)
    for name in ("window", "tokens", "positions", "perplexity", "perplexity_ratio", "kl", "top1_agreement"):
        assert getattr(report, name) == getattr(report.contexts[0], name)


def test_the_worst_context_is_judged(converted, short_windows):
    models = [loading.load_model(open_checkpoint(x), torch.device("cpu"), torch.float32) for x in (MODEL, converted[0])]
    contexts = verifier.context_windows(torch.arange(3, 1027), 1024)
    ratios = [context.perplexity_ratio for context in verifier.compare(*models, contexts, None).contexts]
    report = verifier.compare(*models, contexts, sum(ratios) / 2)
    assert not report.passed
    assert f"failed: the perplexity ratio {max(ratios):.4f} at " in report.verdict
    assert verifier.compare(*models, contexts, 1.001 * max(ratios)).passed


def test_a_line_for_each_context(capsys, converted, short_windows):
    words = ["verify", converted[0], "--against", MODEL, "--text", VALIDATION, "--tokens", "1024", "--device", "cpu"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("at 256 tokens ") and lines[1].startswith("at 1,024 tokens ")
    name, ratios = lines[2].split("  ", 1)
    assert name == "ratio by position, to 1,024" and len(ratios.split(", ")) == 8
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    keys = {"window", "tokens", "positions", "perplexity", "perplexity_ratio", "kl", "top1_agreement"}
    assert set(result["contexts"][1]) == keys
    assert set(result["contexts"][1]["positions"][0]) == {"start", "end", "perplexity", "perplexity_ratio"}
    assert result["contexts"][0]["perplexity"] == result["perplexity"]


def test_text_shorter_than_the_context(converted, short_windows, caplog):
    report = verify(converted[0], against=MODEL, text=VALIDATION, tokens=1023, device="cpu")
    assert [context.window for context in report.contexts] == [256]
    assert "not measured at the model's full context of 1,024 tokens: there are 1,023" in caplog.text


def test_a_model_of_short_context_is_not_measured_beyond_it():
    assert [windows.shape for windows in verifier.context_windows(torch.arange(1000), 256)] == [(3, 256)]
    assert [windows.shape for windows in verifier.context_windows(torch.arange(100), 256)] == [(1, 100)]
    assert [windows.shape for windows in verifier.context_windows(torch.arange(5000), 2048)] == [(4, 1024), (2, 2048)]


@pytest.mark.parametrize("tokens", [2, 7, 8, 9, 15, 16, 40])
def test_chunks_give_what_the_whole_gives(monkeypatch, tokens):
    monkeypatch.setattr(measures, "HEAD_TOKENS", 7)
    torch.manual_seed(0)
    states, ids = torch.randn(2, tokens, 8), torch.randint(50, (tokens,))
    heads = torch.nn.Linear(8, 50), torch.nn.Linear(8, 50)
    sizes = []
    for head in heads:
        head.register_forward_hook(lambda _module, _inputs, output: sizes.append(len(output)))
    whole, chunked = Comparison(), Comparison()
    with torch.no_grad():
        chunked.add_states(*states, heads, ids)
        assert max(sizes) <= 8
        whole.add(heads[0](states[0]), heads[1](states[1]), ids)
    assert chunked.predictions == whole.predictions == tokens - 1
    assert torch.allclose(chunked.sums, whole.sums, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "parts"), [(2, [(0, 2)]), (3, [(0, 3)]), (5, [(0, 2), (2, 5)]), (17, 8)])
def test_parts_of_short_sequences(mla, tokens, parts):
    report = verifier.compare_at(mla, mla, torch.arange(1, tokens + 1).view(1, -1))
    found = [(part.start, part.end) for part in report.positions]
    assert len(found) == parts if isinstance(parts, int) else found == parts
    assert report.perplexity_ratio == 1
    losses = [
        (end - max(start, 1)) * math.log(x.perplexity.source) for x, (start, end) in zip(report.positions, found, strict=True)
    ]
    assert math.isclose(sum(losses), (tokens - 1) * math.log(report.perplexity.source), rel_tol=1e-5)


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128, "partial_rotary_factor": 0.5}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 3.5]}
ROPES = {
    "yarn": ("Llama", {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128}),
    "a part": ("Phi3", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "longrope": ("Phi3", LONGROPE),
}


@pytest.mark.parametrize(("family", "rope"), ROPES.values(), ids=ROPES)
def test_a_narrower_rope_is_known_for_the_sources(tmp_path, family, rope):
    """Parameters of another model are refused."""
    source = make_source(tmp_path / "source", family, hidden_size=64, rope_parameters=rope)
    opened = open_checkpoint(source)
    config = mla_config(opened.config, 16, 4, "float32")
    config.save_pretrained(tmp_path / "out")
    shutil.copy(tmp_path / "source/model.safetensors", tmp_path / "out")  # whose headers are not looked at here
    converted = open_checkpoint(str(tmp_path / "out"))
    verifier.check_pair(converted, opened)
    other = make_source(tmp_path / "other", family, hidden_size=64, rope_parameters={**rope, "rope_theta": 500000.0})
    with pytest.raises(UserError, match="has rope_parameters .*: it was converted from another model; for another context, change"):
        verifier.check_pair(converted, open_checkpoint(other))


VERDICTS = [
    ([1.02], None, "good: perplexity changed by +2.0%"),
    ([0.99, 1.04], 1.05, "good: perplexity changed by -1.0% (at 2,048 tokens: +4.0%)"),
    ([1.071], None, "needs fine-tuning: perplexity rose by 7.1%"),
    ([1.071, 1.12], None, "needs fine-tuning: perplexity rose by 7.1% (at 2,048 tokens: +12.0%)"),
    ([0.99, 1.12], None, "needs fine-tuning: perplexity rose by 12.0% at 2,048 tokens (at 1,024 tokens: -1.0%)"),
    ([1.02], 1.01, "failed: the perplexity ratio 1.0200 is above 1.01"),
    ([1.02, 1.03], 1.025, "failed: the perplexity ratio 1.0300 at 2,048 tokens is above 1.025"),
    ([1.071], 1.05, "failed: the perplexity ratio 1.0710 is above 1.05; needs fine-tuning: perplexity rose by 7.1%"),
]


@pytest.mark.parametrize(("ratios", "max_ratio", "words"), VERDICTS)
def test_verdict(ratios, max_ratio, words):
    reports = [
        ContextReport(
            window=1024 << i, tokens=4096, perplexity=PerSide(10, 10 * ratio), perplexity_ratio=ratio, kl=0, top1_agreement=1
        )
        for i, ratio in enumerate(ratios)
    ]
    assert verdict(reports, max_ratio) == words


@pytest.mark.parametrize(("count", "spread", "device_map"), [(2, True, "auto"), (2, False, None), (1, True, None)])
def test_models_are_spread_over_several_gpus(monkeypatch, count, spread, device_map):
    seen = []

    class Model:
        def to(self, device):
            seen.append(device)
            return self

        def eval(self):
            return self

    def load(_folder, **options):
        seen.append(options["device_map"])
        return Model(), {"missing_keys": [], "unexpected_keys": []}

    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    device = SimpleNamespace(type="cuda")
    loading.load_model(open_checkpoint(MODEL), device, "auto", spread=spread)
    assert seen == ([device_map] if device_map else [None, device])


def test_a_dispatched_model_measures_the_same(converted, tmp_path):
    """Hooks of Accelerate around the parts, as on several GPUs; here they fetch layers that are on disk."""
    from accelerate import dispatch_model

    checkpoints = open_checkpoint(MODEL), open_checkpoint(converted[0])
    contexts = verifier.context_windows(torch.arange(3, 300), 128)
    plain = verifier.compare(*(loading.load_model(x, torch.device("cpu"), torch.float32) for x in checkpoints), contexts, None)
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    places |= {f"model.layers.{layer}": "disk" for layer in range(6)}
    models = [loading.load_model(x, torch.device("cpu"), torch.float32) for x in checkpoints]
    for model in models:
        dispatch_model(model, places, offload_dir=tmp_path / model.config.model_type)
        assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    dispatched = verifier.compare(*models, contexts, None)
    for name in ("perplexity_ratio", "kl", "top1_agreement"):
        assert math.isclose(getattr(dispatched, name), getattr(plain, name), rel_tol=1e-5), name
