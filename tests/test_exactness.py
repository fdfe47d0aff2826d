"""With nothing dropped, the converted model is the original: Transformers' own Llama is the reference, in float64."""

import pytest
import torch
from conftest import LLAMA3_ROPE, MODEL, make_llama
from transformers import AutoModelForCausalLM

from hf_mla import cache_of
from hf_mla.cache_mla import CACHE_NAME
from hf_mla_conversion import convert


CASES = {
    "one kv head": ({"num_key_value_heads": 1}, 16, 16),
    "two heads, mixes of one": ({"num_key_value_heads": 2, "mix": True}, 32, 16),
    "four heads (MHA), mixes of one": ({"num_key_value_heads": 4, "mix": True}, 48, 16),
    "one kv head, llama3 rope": (
        {"num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE},
        16,
        16,
    ),
    "one kv head, tied head, head_dim 24": ({"num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True}, 24, 24),
}


@pytest.mark.parametrize(("changes", "rank", "rope_dim"), CASES.values(), ids=CASES)
def test_logits_equal_the_originals_in_float64(tmp_path, changes, rank, rope_dim):
    source = make_llama(tmp_path / "source", dtype=torch.float64, **changes)
    out = str(tmp_path / "out")
    convert(source, out, kv_lora_rank=rank, qk_rope_head_dim=rope_dim, calibration_tokens=2048, steps=0, device="cpu")
    original, converted = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in (source, out))
    assert type(converted).__name__ == "LlamaMLAForCausalLM"
    ids = torch.randint(3, 4096, (2, 96))
    with torch.no_grad():
        expected = original(ids).logits
        assert expected.std() > 0.1
        error = (converted(ids).logits - expected).abs().max().item()
        # Token by token, through the cache and the absorbed path, as well.
        cache = cache_of(converted(ids[:, :80], use_cache=True))
        steps = [converted(part, cache=cache).logits for part in ids[:, 80:].split(1, dim=1)]
        decoded = (torch.cat(steps, 1) - expected[:, 80:]).abs().max().item()
    assert error < 1e-9, error
    assert decoded < 1e-9, decoded


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
AT_LOAD = {
    "yarn": YARN,
    "yarn, temperature of its own": {**YARN, "attention_factor": 1.5},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A model and the same with MLA, nothing dropped; folders."""
    folder = tmp_path_factory.mktemp("exact")
    source, out = make_llama(folder / "source", dtype=torch.float64, mix=True), str(folder / "out")
    convert(source, out, kv_lora_rank=32, qk_rope_head_dim=16, calibration_tokens=2048, steps=0, device="cpu")
    return source, out


@pytest.mark.parametrize("rope", AT_LOAD.values(), ids=AT_LOAD)
@torch.no_grad()
def test_rope_parameters_that_are_given_when_a_model_is_loaded(exact, rope):
    """Twice the context of training, 256 tokens, by the library's scaling: as the original does it."""
    context = {} if rope["rope_type"] == "dynamic" else {"max_position_embeddings": 512}  # from which the base begins to grow
    given = {"rope_parameters": {"rope_theta": 10000.0, **rope}} | context
    original, converted = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **given).eval() for path in exact)
    ids = torch.randint(3, 4096, (1, 400))
    expected = original(ids).logits  # rounded to float32 in norms and angles, as the library does
    assert (converted(ids).logits - expected).abs().max() < 1e-6
    cache = cache_of(converted(ids[:, :390], use_cache=True))
    steps = [converted(part, cache=cache).logits for part in ids[:, 390:].split(1, dim=1)]
    cache = cache_of(original(ids[:, :390], use_cache=True))
    expected_steps = [original(part, **{CACHE_NAME: cache}).logits for part in ids[:, 390:].split(1, dim=1)]
    assert (torch.cat(steps, 1) - torch.cat(expected_steps, 1)).abs().max() < 1e-6
    unscaled = AutoModelForCausalLM.from_pretrained(exact[0], dtype=torch.float64)
    assert (unscaled(ids).logits - expected).abs().max() > 1e-2


def test_dropping_something_is_not_exact(tmp_path):
    """Guards the test above: independent heads cannot be kept in one rotary key."""
    source = make_llama(tmp_path / "source", dtype=torch.float64)
    out = str(tmp_path / "out")
    convert(source, out, kv_lora_rank=48, qk_rope_head_dim=16, calibration_tokens=2048, steps=0, device="cpu")
    ids = torch.randint(3, 4096, (1, 96))
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)(ids).logits for path in (source, out)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_everything_but_attention_is_copied_bit_for_bit(converted):
    folder, _ = converted
    source, out = (AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict() for path in (MODEL, folder))
    for name, tensor in source.items():
        if "self_attn" not in name:
            assert torch.equal(tensor, out[name]), name
