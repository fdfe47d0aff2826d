"""The attention of every family, read into one form and converted at full rank, against the library's own, in float64."""

import copy
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LLAMA3_ROPE, MODEL, VALIDATION
from families import (
    EXACT,
    NARROW,
    SHAPE,
    TYPES,
    WRAPPED,
    YARN,
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
from hf_mla.cache_mla import CACHE_NAME
from hf_mla.configuration_mla import ropes
from hf_mla.layer_mla import rotary_embedding
from hf_mla_conversion import UserError, convert, info, plan, verify
from hf_mla_conversion.cli import main
from hf_mla_conversion.commands.verify import check_pair
from hf_mla_conversion.mathematics.closed_form import mla_config
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


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0], "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5]}
BY_TYPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": YARN}
SCALED = {  # model type, what is not as in `SHAPE`, qk_rope_head_dim
    "YaRN": ("llama", {"rope_parameters": YARN}, 4),
    "YaRN, not truncated": ("llama", {"rope_parameters": {**YARN, "truncate": False}}, 4),
    "YaRN, wide": ("llama", {"head_dim": 128, "rope_parameters": {**YARN, "rope_theta": 1e6, "factor": 32.0}}, 16),
    "YaRN of one type of layers": ("olmo3", {**TYPES, **NARROW, "rope_parameters": BY_TYPE}, 4),
    "longrope of a part": ("phi3", {**NARROW, "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75}}, 4),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}, 4),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}, 4),
}


@pytest.mark.parametrize(("model_type", "changes", "rope_dim"), SCALED.values(), ids=SCALED)
@torch.no_grad()
def test_a_narrower_rope_turns_as_every_fold_groups_first_pair(model_type, changes, rope_dim):
    config = AutoConfig.for_model(model_type, **{key: value for key, value in (SHAPE | changes).items() if value is not None})
    converted = mla_config(config, 16, rope_dim, "float32")
    own = AutoModelForCausalLM.from_config(config).base_model.rotary_emb
    narrow = rotary_embedding(converted, type(own))
    for length in (16, 300):  # within and beyond the context of training
        place = torch.zeros(1), torch.arange(length).unsqueeze(0)
        for kind in ropes(config):
            before, after = (rotary(*place) if kind is None else rotary(*place, kind) for rotary in (own, narrow))
            for wide, narrower in zip(before, after, strict=True):
                assert narrower.shape[-1] == rope_dim
                folded = wide.chunk(2, -1)[0][..., :: wide.shape[-1] // rope_dim]
                assert torch.allclose(narrower.chunk(2, -1)[0], folded, atol=1e-4)


@pytest.mark.parametrize(("model_type", "changes", "rope_dim"), SCALED.values(), ids=SCALED)
@torch.no_grad()
def test_what_loses_its_rotation_keeps_its_factor(unrounded, model_type, changes, rope_dim):
    """With all tokens at place 0 RoPE is a factor, and heads that share no rotary key are exact."""
    original = make(model_type, changes, mix=False)
    converted = converted_model(original, 64, rope_dim)
    ids = torch.randint(3, 256, (2, 24))
    place = {"position_ids": torch.zeros_like(ids), "attention_mask": torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()}
    expected = original(ids, **place).logits
    assert distance(converted(ids, **place).logits, expected) < 1e-9
    assert distance(converted(ids).logits, original(ids).logits) > 1e-3  # else nothing would have been shown


@pytest.mark.parametrize(("model_type", "changes", "rope_dim"), SCALED.values(), ids=SCALED)
def test_a_narrower_rope_is_known_for_its_sources(tmp_path, model_type, changes, rope_dim):
    config = AutoConfig.for_model(model_type, **{key: value for key, value in (SHAPE | changes).items() if value is not None})
    mla_config(config, 16, rope_dim, "float32").save_pretrained(tmp_path)
    converted = SimpleNamespace(name="out", config=AutoConfig.from_pretrained(tmp_path))
    check_pair(converted, SimpleNamespace(name="source", config=config))
    for rope in ropes(config).values():
        rope["rope_theta"] *= 2
    with pytest.raises(UserError, match="out has rope_parameters .* converted from another model"):
        check_pair(converted, SimpleNamespace(name="source", config=config))
    converted.config.qk_rope_head_dim = 10
    with pytest.raises(UserError, match="out has qk_rope_head_dim 10, .* converted from another model"):
        check_pair(converted, SimpleNamespace(name="source", config=config))


GIVEN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
OWN = {"rope_type": "default", "rope_theta": 10000.0}
ONE_GIVEN = {"sliding_attention": OWN, "full_attention": GIVEN}
AT_LOAD = {  # model type, what is not as in `SHAPE`, kv_lora_rank that drops nothing, qk_rope_head_dim, `rope_parameters` at load
    "YaRN": ("llama", {}, 64, 4, GIVEN),
    "YaRN, of all that is rotated": ("llama", {}, 64, 16, GIVEN),
    "YaRN of another factor": ("llama", {"rope_parameters": YARN}, 64, 4, GIVEN),
    "none where there was YaRN": ("llama", {"rope_parameters": YARN}, 64, 8, OWN),
    "longrope of a part": (
        "phi3",
        {**NARROW, "rope_parameters": {**OWN, "partial_rotary_factor": 0.75}},
        *(64, 4, {**LONGROPE, "partial_rotary_factor": 0.75, "attention_factor": 1.3}),
    ),
    "YaRN, key norms": ("qwen3", {}, 64, 4, GIVEN),
    "YaRN, key norms, a part": (
        "glm4_moe",
        {**EXACT["Glm4Moe"][1], "rope_parameters": {**OWN, "partial_rotary_factor": 0.5}},
        *(32, 4, {**GIVEN, "partial_rotary_factor": 0.5}),
    ),
    "YaRN of one type of layers": ("olmo3", {**TYPES, **NARROW}, 64, 4, ONE_GIVEN),
    "YaRN of the other": (
        "olmo3",
        {**TYPES, **NARROW, "rope_parameters": ONE_GIVEN},
        *(64, 4, {"sliding_attention": GIVEN, "full_attention": OWN}),
    ),
    "YaRN, layers without RoPE": ("smollm3", EXACT["SmolLM3"][1], 64, 4, GIVEN),
    "YaRN, sinks": ("gpt_oss", EXACT["GptOss"][1], 64, 4, GIVEN),
}


def loaded(model, folder, rope, **options):
    """A model, saved, and loaded with other `rope_parameters`."""
    if not folder.exists():
        model.save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, rope_parameters=copy.deepcopy(rope), **options)
    again = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64).double().eval()
    again.set_experts_implementation("eager")
    return again


@pytest.mark.parametrize(("model_type", "changes", "rank", "rope_dim", "rope"), AT_LOAD.values(), ids=AT_LOAD)
@torch.no_grad()
def test_what_has_lost_its_rotation_gets_a_factor_given_at_load(tmp_path, unrounded, model_type, changes, rank, rope_dim, rope):
    """At place 0, as above."""
    original = make(model_type, changes, mix=False)
    models = [original, converted_model(original, rank, rope_dim)]
    models += [loaded(model, tmp_path / str(index), rope) for index, model in enumerate(models)]
    ids = torch.randint(3, 256, (2, 24))
    causal = torch.full((2, 1, 24, 24), -1e9, dtype=torch.float64).triu(1)  # not boolean, for the eager attention of gpt_oss
    place = {"position_ids": torch.zeros_like(ids), "attention_mask": causal}
    before, ours_before, expected, ours = (model(ids, **place).logits for model in models)
    assert distance(ours_before, before) < 1e-9 and distance(ours, expected) < 1e-9
    assert distance(before, expected) > 1e-3


@pytest.mark.filterwarnings("ignore:divide by zero")  # of NumPy, in Triton's interpreter, where a split is empty
@torch.no_grad()
def test_yarn_given_at_load_is_the_originals_yarn(tmp_path, unrounded, monkeypatch):
    """At twice the context, with heads that share one pair of their keys, and all others too slow to turn: whole and by steps."""
    slow = {"rope_theta": 1e30}  # heads of 8: the second pair turns by 3e-8 a token, the third by 1e-15
    changes = {"head_dim": 8, "rope_parameters": OWN | slow, "max_position_embeddings": 64}
    original = make("llama", changes)
    for layer in original.base_model.layers:
        keys = layer.self_attn.k_proj.weight.unflatten(0, (2, 2, 4))  # [g, 2, d / 2, D], half-split
        keys[:, :, 1] = 0
        keys[1, :, 2:] = torch.randn_like(keys[1, :, 2:]) / 4
    given = {"rope": GIVEN | slow | {"factor": 2.0, "original_max_position_embeddings": 64}, "max_position_embeddings": 128}
    ours = loaded(converted_model(original, 32, 4), tmp_path / "out", **given)
    expected = loaded(original, tmp_path / "source", **given)
    ids = torch.randint(3, 256, (2, 120))
    logits = expected(ids).logits
    assert distance(original(ids).logits, logits) > 1e-2
    assert distance(ours(ids, use_cache=False).logits, logits) < 1e-9
    caches = [DynamicCache(config=ours.config), MLACache(ours.config), StaticCache(ours.config, 130), MLACache(ours.config, 130)]
    for cache in caches:
        parts = [ours(part, cache=cache).logits for part in ids.split([112, *[1] * 8], dim=1)]
        assert distance(torch.cat(parts, 1), logits) < 1e-9, cache
    for quantization in (None, "int8"):
        decoded = []
        for in_kernel in (False, True):  # which rounds to float32
            monkeypatch.setattr(attention_mla, "runs_in_kernel", lambda *_, value=in_kernel: value)
            cache = MLACache(ours.config, quantization=quantization)
            decoded.append(torch.cat([ours(part, cache=cache).logits for part in ids.split([118, 1, 1], dim=1)], 1))
        assert distance(*decoded) < 1e-4 * logits.std()
        assert distance(decoded[0], logits) < (1e-9 if quantization is None else logits.std() / 2)
    for layer in ours.model.layers:
        assert layer.self_attn.factor_of_lost == pytest.approx((1 + 0.1 * math.log(2)) ** 4 / (1 + 0.1 * math.log(2)) ** 2)
        layer.self_attn.factor_of_lost = 1
    assert distance(ours(ids).logits, logits) > 1e-2


LISTS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i / 8 for i in range(8)]}
EXTENDED = {
    "yarn": YARN,
    "dynamic": {**OWN, "rope_type": "dynamic", "factor": 2.0},
    "longrope": {**LONGROPE, **LISTS},
}


@pytest.mark.parametrize("kind", EXTENDED)
@torch.no_grad()
def test_a_narrower_rope_given_at_load_turns_as_the_originals(tmp_path, kind):
    """A quarter as wide, of heads whose keys have the first pair of every fold group alone: whole and by steps."""
    original = make("llama", {"rope_parameters": OWN, "max_position_embeddings": 64})
    for layer in original.base_model.layers:
        layer.self_attn.k_proj.weight.unflatten(0, (2, 2, 2, 4))[:, :, :, 1:] = 0  # [g, 2, P / 2, d / P, D], half-split
    given = {"rope": EXTENDED[kind], "max_position_embeddings": 64 if kind == "dynamic" else 256}
    ours = loaded(converted_model(original, 32, 4), tmp_path / "out", **given)
    expected = loaded(original, tmp_path / "source", **given)
    assert ours.config.qk_rope_head_dim == 4 and expected.config.head_dim == 16
    ids = torch.randint(3, 256, (2, 100))
    logits = expected(ids).logits  # rounded to float32 in norms and angles, as the library does
    assert distance(ours(ids).logits, logits) < 1e-6 and distance(original(ids).logits, logits) > 1e-2
    decoded = []
    for model in (expected, ours):  # cached keys stay as they were turned, though "dynamic" turns the next ones otherwise
        cache = DynamicCache(config=model.config)
        decoded.append(torch.cat([model(part, **{CACHE_NAME: cache}).logits for part in ids.split([90, *[1] * 10], dim=1)], 1))
    assert distance(*decoded) < 1e-6


KINDS = ["Gemma2", "Gemma3", "Olmo2", "SmolLM3", "Cohere2", "Glm4Moe", "Ministral3", "GptOss"]


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
    absorb = layer_mla.absorb_if_cheaper
    monkeypatch.setattr(layer_mla, "absorb_if_cheaper", lambda *a, **k: masks.append(a[5]) or absorb(*a, **k))
    for cache in (MLACache(exact.config), MLACache(exact.config, 64)):
        parts = [rounded(part, cache=cache).logits for part in ids.split([36, *[1] * 4], dim=1)]
        assert (torch.cat(parts, 1) - expected).square().mean().sqrt() < 0.1 * expected.std()
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


@pytest.mark.parametrize("name", ["Gemma2", "Cohere2", "SmolLM3", "GPTNeoX", "GptOss"])
def test_own_text_is_what_the_library_generates(name, monkeypatch):
    monkeypatch.setattr(own_text, "draw", lambda logits, _generator: logits.argmax(-1))
    monkeypatch.setattr(own_text, "BLOCK", 16)
    model_type, changes, *_ = EXACT[name]
    model = make(model_type, changes | {"vocab_size": 4096, "eos_token_id": 4095})
    ids = own_text.write_text(model, AutoTokenizer.from_pretrained(MODEL), 3, 40, seed=3)
    for row in ids:
        expected = model.generate(row[None, :1], max_new_tokens=39, do_sample=False, eos_token_id=None)[0]
        stop = min([*(row == 1).nonzero().flatten().tolist(), 40])
        assert row[:stop].tolist() == expected[:stop].tolist()


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
