"""Dimensions are checked, and derived ones follow."""

import logging
import sys

import pytest
from conftest import make_mla
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from hf_mla import LlamaMLAConfig, LlamaMLAForCausalLM, Qwen2MLAConfig, Qwen3MLAConfig
from hf_mla.configuration_mla import FAMILIES, config_class
from hf_mla.layer_mla import rotary_embedding


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
        ({"source_rope_dim": 96}, r"null or a multiple of qk_rope_head_dim \(64\)"),
        ({"source_rope_dim": 256}, r"at most qk_nope_head_dim \(128\)"),
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


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_has_the_dimensions_of_mla(family, tmp_path):
    """Whatever a family computes by itself, or leaves out: as made, and as saved and loaded."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "qk_rope_head_dim": 8, "head_dim": 99}
    made = config_class(family)(num_key_value_heads=2, **shape)
    made.save_pretrained(tmp_path)
    for config in (made, config_class(family).from_pretrained(tmp_path)):
        assert (config.head_dim, config.qk_head_dim, config.num_key_value_heads) == (8, 136, 4)
        widths = rotary_embedding(config, type(None) if family.llama_rotary else own_rotary(family))
        assert {buffer.numel() for name, buffer in widths.named_buffers() if "inv_freq" in name} == {4}
        plan = config.base_model_tp_plan or {}
        assert not any("k_proj" in name or "v_proj" in name or "query_key_value" in name for name in plan)


def own_rotary(family):
    """The class of a family's rotary embedding."""
    decoder = MODEL_MAPPING[CONFIG_MAPPING[family.model_type]]
    module = sys.modules[decoder.__module__]
    return next(value for name, value in vars(module).items() if name.endswith("RotaryEmbedding"))


def test_biases_follow_the_options_of_the_family():
    biased = {family.model_type for family in FAMILIES.values() if config_class(family).attention_bias}
    assert biased == {"qwen2", "qwen2_moe", "starcoder2", "seed_oss", "jais2", "phi", "glm4", "gpt_neox", "gpt_oss"}


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
