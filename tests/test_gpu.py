"""What only a GPU shows: families in the decode kernel in bfloat16, conversions that repeat, and training as CUDA graphs."""

import pytest
import torch
from conftest import BUNDLED, MODEL
from families import EXACT, disturbed, make
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mla import MLACache, attention_mla
from hf_mla_conversion import convert
from hf_mla_conversion.mathematics import captured
from hf_mla_conversion.source import own_text
from hf_mla_conversion.stages import one_size


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("name", [name for name in EXACT if "," not in name])
@torch.no_grad()
def test_the_kernel_is_as_close_as_expanded_attention(name, monkeypatch):
    exact = disturbed(name, 32, 8, noise=0.1)
    config = exact.config
    for parameter in exact.parameters():
        parameter.copy_(parameter.bfloat16())
    ids = torch.randint(3, 256, (2, 40))
    expected = exact(ids, use_cache=False).logits.cuda()
    ids = ids.cuda()
    rounded = type(exact)(config).eval().bfloat16().cuda()
    rounded.load_state_dict(exact.state_dict())
    usual = (rounded(ids, use_cache=False).logits - expected).square().mean().sqrt()
    calls = []
    decode = attention_mla.latent_decode
    monkeypatch.setattr(attention_mla, "latent_decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    for cache in (MLACache(config), MLACache(config, 64)):
        parts = [rounded(part, cache=cache).logits for part in ids.split([30, *[2] * 5], dim=1)]
        found = (torch.cat(parts, 1) - expected).square().mean().sqrt()
        assert found < 2 * usual
    assert len(calls) == 20


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "Glm4Moe", "GptOss", "Gemma2", "Gemma3", "Olmo2", "GPTNeoX"])
def test_layers_repeat_and_training_nearly(tmp_path, monkeypatch, name):
    model_type, changes, rank, rope_dim = EXACT[name]
    make(model_type, changes | {"vocab_size": 4096}).float().save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "source")
    sizes = {"kv_lora_rank": min(rank, 20), "qk_rope_head_dim": rope_dim}
    amounts = {"calibration_tokens": 4096, "window": 128, "steps": 2, "heal_tokens": 1 << 16}
    layers, courses = [], []  # whether a random model gains by its training or not

    def distil(student, *args):
        layers.append(load_file(student.folder / "model.safetensors"))
        done = one_size_distil(student, *args)
        courses.append([entry["perplexity"] for entry in done["history"] if "perplexity" in entry])
        return done

    one_size_distil = one_size.distil
    monkeypatch.setattr(one_size, "distil", distil)
    for out in "ab":
        convert(str(tmp_path / "source"), str(tmp_path / out), device="cuda", **amounts, **sizes)
    assert [key for key in layers[0] if not torch.equal(layers[0][key], layers[1][key])] == []
    assert len(courses[0]) > 1 and courses[0] == pytest.approx(courses[1], rel=1e-3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16).cuda()
    ids = torch.randint(3, 4096, (2, 24)).cuda()
    assert model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False).shape == (2, 32)


@pytest.mark.parametrize("trained", ["layers", "all", "attention", "lora"])
def test_captured_steps_train_as_others_do(tmp_path, monkeypatch, trained):
    amounts = {"calibration_tokens": 1 << 16, "window": 256, "steps": 2, "heal_tokens": 20 << 14}
    text, shapes, courses = str(BUNDLED / "validation.txt.xz"), [], []
    capture = captured.CapturedSteps.capture

    def counted(steps, ids):
        capture(steps, ids)
        assert steps.able
        shapes.append(ids.shape)

    monkeypatch.setattr(captured.CapturedSteps, "capture", counted)
    monkeypatch.setattr(one_size, "TRAINED", trained)
    for eager in (captured.EAGER_STEPS, 1000):
        monkeypatch.setattr(captured, "EAGER_STEPS", eager)
        sizes = {"kv_lora_rank": 44, "qk_rope_head_dim": 16}
        report = convert(MODEL, str(tmp_path / str(eager)), device="cuda", calibration=text, **amounts, **sizes)
        courses.append([entry["perplexity"] for entry in report.end_to_end.history if "perplexity" in entry])
    assert len(shapes) == len(set(shapes)) > 0
    assert courses[0][-1] < 0.99 * courses[0][0]
    assert courses[0] == pytest.approx(courses[1], rel=2e-3)


@pytest.mark.parametrize(
    ("heads", "groups", "width", "options"),
    [(9, 3, 64, {}), (32, 8, 128, {}), (9, 3, 64, {"sliding_window": 100}), (8, 1, 64, {"softcap": 30.0})],
)
def test_own_text_is_written_by_the_kernel(heads, groups, width, options):
    query, key, value = (torch.randn(7, n, t, width, device="cuda") for n, t in ((heads, 1), (groups, 320), (groups, 320)))
    mask = (torch.arange(320, device="cuda") < 260).view(1, 1, 1, -1)
    tensors = [tensor.bfloat16() for tensor in (query, key, value)]
    assert own_text.in_kernel(*tensors[1:]) and not own_text.in_kernel(key, value)
    expected, _ = own_text.grouped_attention(None, *(tensor.float() for tensor in tensors), mask, width**-0.5, **options)
    found, _ = own_text.grouped_attention(None, *tensors, mask, width**-0.5, **options)
    assert (found - expected).norm() < 0.01 * expected.norm()
