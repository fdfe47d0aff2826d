"""Sequences begin as the tokenizer begins a text, wherever models read them: in calibration, own text and measures."""

from types import SimpleNamespace

import pytest
import torch
from conftest import MODEL, VALIDATION
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mla_conversion.commands.verify import context_windows
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.matching import match_model
from hf_mla_conversion.source.own_text import write_text
from hf_mla_conversion.source.text import calibration_windows, read_text, token_windows
from hf_mla_conversion.source.tokenizer import first_token
from hf_mla_conversion.stages.layers import Job


BEGIN = 7


@pytest.fixture(scope="module")
def tokenizer():
    """One that begins each text with a token and ends it with another."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    names = [(tokenizer.convert_ids_to_tokens(token), token) for token in (BEGIN, 9)]
    template = f"{names[0][0]} $A {names[1][0]}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=names)
    return tokenizer


def test_the_first_token(tokenizer):
    assert first_token(tokenizer) == BEGIN
    assert first_token(AutoTokenizer.from_pretrained(MODEL)) is None


def test_windows_of_a_text(tmp_path, tokenizer):
    text = read_text(VALIDATION, 512)
    windows, plain = (token_windows(text, each, 256, 64) for each in (tokenizer, AutoTokenizer.from_pretrained(MODEL)))
    assert windows[:, 0].tolist() == [BEGIN] * 4
    assert torch.equal(windows[:, 1:], plain[:, 1:])
    (tmp_path / "short.txt").write_text(text[:100])
    halves = calibration_windows(open_checkpoint(MODEL), tokenizer, str(tmp_path / "short.txt"), 64, 64, 0)
    assert torch.equal(halves.flatten(), plain.flatten()[: halves.numel()])  # as it stands there: it is begun where it is cut
    for contexts in context_windows(plain.flatten(), 128, BEGIN):
        assert (contexts[:, 0] == BEGIN).all()


def test_sequences_that_are_cut(tmp_path):
    texts = {"text": torch.randint(10, 4000, (8, 64))}
    job = Job(match_model(open_checkpoint(MODEL)), tmp_path, texts, 256, torch.device("cpu"), 0, 0, "exact", BEGIN)
    job.split(32)
    trained_on, held = job.rows(1)
    for windows, count in ((job.windows, 8), (trained_on["text"], 15), (held, 1)):
        assert windows.shape == (count, 32)
        assert windows[:, 0].tolist() == [BEGIN] * count
    assert job.firsts.unique().tolist() == [BEGIN]  # no other token comes first


def test_own_text(tokenizer, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    ends = torch.arange(100, 4000)  # so that most texts end soon
    monkeypatch.setattr(model, "generation_config", SimpleNamespace(eos_token_id=ends.tolist()))
    monkeypatch.setattr(tokenizer, "chat_template", None)
    ids = write_text(model, tokenizer, 4, 24, seed=0)
    assert ids[:, 0].tolist() == [BEGIN] * 4
    after = ids[:, 1:][torch.isin(ids[:, :-1], ends)]
    assert len(after) > 20
    assert (after == BEGIN).all()
