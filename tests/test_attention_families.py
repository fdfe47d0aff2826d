"""The attention of every family, read into one form and converted at full rank, against the library's own, in float64."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODEL, VALIDATION
from families import (
    EXACT,
    WRAPPED,
    converted_model,
    distance,
    disturbed,
    every_case,
    make,
    one_case_a_family,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
)
from transformers.masking_utils import eager_mask

from hf_mla import MLACache, attention_mla, layer_mla
from hf_mla_conversion import UserError, convert, info, plan, verify
from hf_mla_conversion.cli import main
from hf_mla_conversion.commands.verify import check_pair
from hf_mla_conversion.mathematics.moments import hooks
from hf_mla_conversion.source import own_text
from hf_mla_conversion.source.attention import added, attend, attention_of, pair_order, watch_gradients
from hf_mla_conversion.source.checkpoint import Checkpoint, open_checkpoint, read_config
from hf_mla_conversion.source.families import WRAPPERS, refusal
from hf_mla_conversion.source.loading import head_of, load_model
from hf_mla_conversion.source.shards import read_headers


@every_case
@torch.no_grad()
def test_logits_equal_the_originals_in_float64(unrounded, model_type, changes, rank, rope_dim):
    original = make(model_type, changes)
    converted = converted_model(original, rank, rope_dim)
    ids = torch.randint(3, 256, (2, 48))
    expected = original(ids).logits
    assert expected.std() > 0.1
    assert distance(converted(ids).logits, expected) < 1e-9
    # Token by token, through every cache and the absorbed path.
    caches = [DynamicCache(config=converted.config), DynamicCache(), MLACache(converted.config)]
    caches += [StaticCache(converted.config, 60), MLACache(converted.config, 60)]
    for cache in caches:
        parts = [converted(part, cache=cache).logits for part in ids.split([36, *[1] * 12], dim=1)]
        assert distance(torch.cat(parts, 1), expected) < 1e-9, cache


KINDS = ["Gemma2", "Gemma3", "Olmo2", "SmolLM3", "Cohere2", "Glm4Moe", "Ministral3", "GptOss"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter; test_gpu.py has the kernel on a GPU")
@pytest.mark.filterwarnings("ignore:divide by zero")  # of NumPy, in Triton's interpreter, where a split is empty
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_expanded_absorbed_and_kernel_agree(name, monkeypatch):
    model = disturbed(name, 24, 8, noise=0.15)
    ids = torch.randint(3, 256, (2, 40))
    expected = model(ids, use_cache=False).logits
    calls = []
    decode = attention_mla.latent_decode
    monkeypatch.setattr(attention_mla, "latent_decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    for in_kernel in (False, True):
        monkeypatch.setattr(attention_mla, "runs_in_kernel", lambda *_, value=in_kernel: value)
        cache = MLACache(model.config)
        parts = [model(part, cache=cache).logits for part in ids.split([30, *[2] * 5], dim=1)]
        assert distance(torch.cat(parts, 1), expected) < 1e-4 * expected.std()
        assert len(calls) == 10 * in_kernel


@pytest.mark.parametrize("name", ["Olmo", "Olmo3", "Gemma2", "GptOss"])
@torch.no_grad()
def test_steps_in_half_precision(name, monkeypatch):
    """Where rotary embeddings are float32, where scores are capped, and with sinks; with masks as the kernel takes them."""
    model_type, changes, rank, rope_dim = EXACT[name]
    exact = converted_model(make(model_type, changes).float(), rank, rope_dim).float()
    rounded = copy.deepcopy(exact).bfloat16()
    ids, masks = torch.randint(3, 256, (2, 40)), []
    expected = exact(ids, use_cache=False).logits
    usual = (rounded(ids, use_cache=False).logits - expected).square().mean().sqrt()  # with experts, a few tokens go to others
    absorb = layer_mla.absorb_if_cheaper
    monkeypatch.setattr(layer_mla, "absorb_if_cheaper", lambda *a, **k: masks.append(a[5]) or absorb(*a, **k))
    for cache in (MLACache(exact.config), MLACache(exact.config, 64)):
        parts = [rounded(part, cache=cache).logits for part in ids.split([36, *[1] * 4], dim=1)]
        assert (torch.cat(parts, 1) - expected).square().mean().sqrt() < 1.5 * usual < 0.3 * expected.std()
    assert {mask.dtype for mask in masks if mask is not None} == {torch.bool}


@pytest.mark.parametrize("name", ["Phi3", "Gemma3", "Olmo2", "Cohere2", "GPTNeoX", "StableLm, norms", "Glm4Moe"])
def test_gradients_at_keys_and_values_are_those_that_attention_gets(name, unrounded):
    """At place 0 RoPE changes nothing, so keys are to the attention function what they were before."""
    model_type, changes, *_ = EXACT[name]
    model, got, given = make(model_type, changes), {}, []

    def attention(module, query, key, value, attention_mask, **kwargs):
        for tensor in (key, value):  # [B, g, T, d]
            tensor.retain_grad()
            given.append(tensor)
        return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("watched", attention)
    AttentionMaskInterface.register("watched", eager_mask)
    model.set_attn_implementation("watched")
    module = attention_of(model.base_model.layers[1])
    handles = watch_gradients(module, 12, lambda gradient: got.update(keys=gradient), lambda gradient: got.update(values=gradient))
    ids = torch.randint(3, 256, (3, 12))
    with hooks(handles):
        causal = torch.full((12, 12), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1).expand(3, 1, 12, 12)
        model(ids, attention_mask=causal, position_ids=torch.zeros_like(ids), use_cache=False).logits.square().sum().backward()
    key, value = (tensor.grad.transpose(1, 2) for tensor in given[-2:])
    assert torch.allclose(got["keys"], key[..., pair_order(model.config)].flatten(2))
    assert torch.allclose(got["values"], value.flatten(2))
    assert key.std() > 0 and value.std() > 0


@one_case_a_family
def test_conversion(tmp_path, model_type, changes, rank, rope_dim):
    """Converted by the program, a model loads, is as the original, generates, and is the same when saved and loaded again."""
    original = make(model_type, changes | {"vocab_size": 4096}).float()
    original.save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "source")
    sizes = {"kv_lora_rank": min(rank, original.config.hidden_size), "qk_rope_head_dim": rope_dim}
    convert(str(tmp_path / "source"), str(tmp_path / "mla"), calibration_tokens=512, window=128, steps=0, device="cpu", **sizes)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "mla").eval()
    check_pair(*(open_checkpoint(str(tmp_path / name)) for name in ("mla", "source")))
    ids = torch.randint(3, 4096, (2, 24))
    with torch.no_grad():
        expected = original(ids).logits
        assert distance(converted(ids).logits, expected) < 1e-3 * expected.std()
    tokens = converted.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, original.generate(ids, max_new_tokens=8, do_sample=False))
    converted.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(ids, max_new_tokens=8, do_sample=False), tokens)


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
VISION |= {"patch_size": 8}
DECODERS = {"llava": "Llama", "llava_next": "Mistral", "llava_onevision": "Qwen2", "vipllava": "Llama", "mistral3": "Ministral3"}
DECODERS |= {"gemma3": "Gemma3", "internvl": "Qwen3"}


def make_wrapper(folder, wrapper, name, newer=False, **changes):
    """Save a model of the library with vision around a text decoder of `EXACT`, and a tokenizer; `newer`: under newer names."""
    text = make(EXACT[name][0], EXACT[name][1] | {"vocab_size": 4096} | changes)
    tied = {"tie_word_embeddings": text.config.tie_word_embeddings}
    config = AutoConfig.for_model(wrapper, vision_config=dict(VISION), text_config=text.config.to_dict(), **tied)
    model = AutoModelForImageTextToText.from_config(config).double()
    model.model.language_model.load_state_dict(text.base_model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.save_pretrained(folder, save_original_format=not newer)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return str(folder)


@pytest.mark.family(WRAPPED)
@pytest.mark.parametrize(("wrapper", "name", "newer"), [("llava", "Llama", False), ("mistral3", "Ministral3", True)])
def test_text_decoders_of_wrappers(tmp_path, caplog, wrapper, name, newer):
    """Converted by the program with nothing dropped, it is as the wrapper is on text, alone."""
    source, out = make_wrapper(tmp_path / "source", wrapper, name, newer), tmp_path / "mla"
    (tmp_path / "source" / "generation_config.json").unlink()  # else what config.json says of it is not asked
    model_type, _, rank, rope_dim = EXACT[name]
    sizes = ["--kv-lora-rank", str(rank), "--qk-rope-head-dim", str(rope_dim)]
    assert main(["convert", source, str(out), *sizes, "--calibration-tokens", "512", "--steps", "0", "--device", "cpu"]) == 0
    said = [record.getMessage() for record in caplog.records if record.name == open_checkpoint.__module__]
    assert said == [f"{source} is a '{wrapper}': its text decoder ({model_type}) is taken, all else is left out"]
    original = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float64).eval()
    converted = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    assert type(converted).__name__ == f"{name}MLAForCausalLM"
    ids = torch.randint(3, 4096, (2, 40))
    with torch.no_grad():
        expected = original(input_ids=ids).logits
        assert expected.std() > 0.1
        assert distance(converted(ids).logits, expected) < 1e-9
    tokens = converted.generate(ids[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, original.generate(input_ids=ids[:1], max_new_tokens=8, do_sample=False))
    report = verify(str(out), against=source, text=VALIDATION, tokens=512, device="cpu")
    assert abs(report.kl) < 1e-6 and report.top1_agreement == 1
    assert plan(source, kv_lora_rank=rank, qk_rope_head_dim=rope_dim).bytes_written == open_checkpoint(str(out)).bytes
    text = {name: tensor for name, tensor in load_file(Path(source) / "model.safetensors").items() if "vision" not in name}
    assert info(source)["parameters"] == sum(tensor.numel() for name, tensor in text.items() if "projector" not in name)
    assert f"Converted from the text decoder of `{source}`" in (out / "README.md").read_text()


@pytest.mark.family(WRAPPED)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@torch.no_grad()
def test_wrappers_are_read_as_their_text_decoders(tmp_path, monkeypatch, wrapper):
    """Under older and newer names, with a head and without, in a folder and by headers alone."""
    ids = torch.randint(3, 4096, (2, 24))
    for newer, tied in ((False, False), (True, True)):
        source = make_wrapper(tmp_path / str(newer), wrapper, DECODERS[wrapper], newer, tie_word_embeddings=tied)
        original = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
        text = load_model(open_checkpoint(source), torch.device("cpu"), torch.float32)
        assert torch.equal(text(ids).logits, original(input_ids=ids).logits)
        assert text.config.tie_word_embeddings == tied
        whole = Checkpoint("org/name", read_config(Path(source), source), read_headers(Path(source), source))
        monkeypatch.setattr("hf_mla_conversion.source.checkpoint.hub_headers", lambda *_, whole=whole: whole)
        assert plan("org/name") == plan(source)


def change_wrapper(folder, **changes):
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | changes | {"text_config": config["text_config"] | changes.get("text_config", {})}))


@torch.no_grad()
def test_wrappers_are_taken_at_their_word(tmp_path, caplog):
    """A head that is stored where config.json ties it is one of its own, as for the library; what cannot be is said."""
    source = make_wrapper(tmp_path, "llava", "Llama", tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    other = {"language_model.lm_head.weight": tensors["language_model.model.embed_tokens.weight"].flip(0)}
    save_file(tensors | other, file, metadata={"format": "pt"})
    ids = torch.randint(3, 4096, (2, 24))
    original = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    text = load_model(open_checkpoint(source), torch.device("cpu"), torch.float32)
    assert torch.equal(text(ids).logits, original(input_ids=ids).logits)
    assert torch.equal(text.lm_head.weight, other["language_model.lm_head.weight"].float())

    change_wrapper(source, quantization_config={"quant_method": "fp8"})
    assert "the checkpoint is quantized" in plan(source).reason
    change_wrapper(source, quantization_config=None, text_config={"model_type": "gpt2"})
    reason = "the text decoder of a 'llava': model type 'gpt2' is not supported; supported: llama"
    assert reason in plan(source).reason
    caplog.clear()
    with pytest.raises(UserError, match=reason):
        convert(source, str(tmp_path / "out"))
    assert not caplog.records  # nothing is taken
    change_wrapper(source, text_config={"model_type": "llama"})
    save_file({name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match="has no tensor under language_model, as a 'llava' has it in Transformers"):
        plan(source)


@pytest.mark.parametrize("kernel", [False, True], ids=["torch", "kernel"])
@pytest.mark.parametrize("name", ["Gemma2", "Cohere2", "SmolLM3", "GPTNeoX", "GptOss"])
def test_own_text_is_what_the_library_generates(name, kernel, monkeypatch):
    calls, decode = [], own_text.latent_decode
    if kernel:
        if decode is None or torch.cuda.is_available():  # compiled, it reads no tensors of a CPU
            pytest.skip("needs Triton's interpreter")
        monkeypatch.setattr(own_text, "in_kernel", lambda key, value: True)
        monkeypatch.setattr(own_text, "latent_decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    monkeypatch.setattr(own_text, "draw", lambda logits, _generator: logits.argmax(-1))
    monkeypatch.setattr(own_text, "BLOCK", 16)
    model_type, changes, *_ = EXACT[name]
    model = make(model_type, changes | {"vocab_size": 4096, "eos_token_id": 4095})
    ids = own_text.write_text(model, AutoTokenizer.from_pretrained(MODEL), 3, 40, seed=3)
    for row in ids:
        expected = model.generate(row[None, :1], max_new_tokens=39, do_sample=False, eos_token_id=None)[0]
        stop = min([*(row == 1).nonzero().flatten().tolist(), 40])
        assert row[:stop].tolist() == expected[:stop].tolist()
    assert bool(calls) == (kernel and name != "GptOss")  # whose sinks differ from head to head


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("Gemma2", "pre_feedforward_layernorm"),
        ("Olmo2", "mlp"),
        ("Phi3", "post_attention_layernorm"),
        ("Glm4", "post_attention_layernorm"),
    ],
)
@torch.no_grad()
def test_what_a_layer_adds_for_its_attention(name, after):
    model_type, changes, *_ = EXACT[name]
    model, seen = make(model_type, changes), []
    layer = model.base_model.layers[0]
    layer.get_submodule(after).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    layer.register_forward_hook(lambda _module, args, kwargs, _output: seen.append((args[0], kwargs)), with_kwargs=True)
    model(torch.randint(3, 256, (2, 12)), use_cache=False)
    stream, (states, call) = seen
    x, y = attend(layer, states, call)
    assert len(seen) == 2  # the rest of the layer did not run
    assert torch.allclose(states + added(layer, y), stream)
    assert torch.equal(y, attention_of(layer)(hidden_states=x, **call)[0])


@pytest.mark.parametrize("name", ["Gemma2", "Cohere2", "Phi", "Olmoe"])
@torch.no_grad()
def test_what_comes_after_the_decoder(name):
    model_type, changes, *_ = EXACT[name]
    model, ids = make(model_type, changes), torch.randint(3, 256, (2, 12))
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    expected = model(ids, use_cache=False).logits
    assert torch.equal(head_of(model)(states[1]), expected[1])
    assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("olmoe", {"clip_qkv": 3.0}, "clip_qkv is 3.0"),
        ("phi", {"qk_layernorm": True}, "the norm's bias is added"),
    ],
)
def test_what_is_only_approximate_is_refused(model_type, changes, reason):
    assert reason in refusal(AutoConfig.for_model(model_type, **changes))
