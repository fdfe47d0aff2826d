"""RoPE of converted models: at a narrower width, with factors, and with other parameters at load; against the library's own."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import LLAMA3_ROPE
from families import (
    EXACT,
    NARROW,
    SHAPE,
    TYPES,
    YARN,
    converted_model,
    distance,
    make,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
)

from hf_mla import MLACache, attention_mla
from hf_mla.cache_mla import CACHE_NAME
from hf_mla.configuration_mla import ropes
from hf_mla.layer_mla import rotary_embedding
from hf_mla_conversion import UserError
from hf_mla_conversion.commands.verify import check_pair
from hf_mla_conversion.mathematics.closed_form import mla_config


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
