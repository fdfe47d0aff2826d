"""Dimensions are checked, and derived ones follow."""

import logging

import pytest
from conftest import make_mla

from hf_mla import LlamaMLAConfig, LlamaMLAForCausalLM, Qwen2MLAConfig, Qwen3MLAConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"kv_lora_rank": -3}, "kv_lora_rank is -3"),
        ({"qk_rope_head_dim": 7}, "even"),
        ({"qk_nope_head_dim": 0}, "qk_nope_head_dim is 0"),
        ({"v_head_dim": -1}, "v_head_dim is -1"),
        ({"q_lora_rank": 8}, "only null is supported"),
        ({"num_key_norms": 2}, "only 0 is possible for llama_mla"),
        ({"kv_a_layernorm_eps": 0.0}, "must be positive"),
    ],
)
def test_impossible_dimensions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaMLAConfig(**changes)


def test_wrong_types_are_refused():
    with pytest.raises(Exception, match="kv_lora_rank"):
        LlamaMLAConfig(kv_lora_rank="many")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_norms": 3}, "a divisor of num_attention_heads"),
        ({"num_key_norms": -2}, "a divisor of num_attention_heads"),
    ],
)
def test_impossible_key_norms_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Qwen3MLAConfig(num_attention_heads=4, **changes)


def test_biases_are_the_familys():
    assert Qwen2MLAConfig().attention_bias
    assert not Qwen2MLAConfig(attention_bias=False).attention_bias
    assert not Qwen3MLAConfig().attention_bias


def test_derived_dimensions():
    config = LlamaMLAConfig(qk_nope_head_dim=24, qk_rope_head_dim=8, num_attention_heads=4, num_key_value_heads=2, head_dim=99)
    assert (config.qk_head_dim, config.head_dim, config.num_key_value_heads) == (32, 8, 4)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_parallel_plan_names_existing_parameters(family):
    for changes in [{}, {"num_key_norms": 2}] if family == "Qwen3" else [{}]:
        model = make_mla(family, **changes)
        names = {name.replace(".0.", ".*.").removesuffix(".weight") for name, _ in model.model.named_parameters()}
        assert set(model.config.base_model_tp_plan) <= names
        assert {name for name in names if name.startswith("layers.*.") and "norm" not in name and "bias" not in name} <= set(
            model.config.base_model_tp_plan
        )


def test_small_test_sizes():
    config = LlamaMLAConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, kv_lora_rank=32, qk_rope_head_dim=16)
    assert LlamaMLAForCausalLM(config).config.kv_floats_per_token_per_layer == 48


def test_checkpoint_of_a_newer_version_warns(caplog):
    logging.getLogger("transformers").propagate = True
    LlamaMLAConfig(hf_mla_version="99.0.0")
    assert "newer than" in caplog.text
