"""What vLLM is told of a checkpoint, shown on stubs of its modules; tests/engines runs the engine itself."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from conftest import make_mla

import hf_mla
from hf_mla import vllm_mla
from hf_mla.configuration_mla import FAMILIES, register_with_vllm
from hf_mla.layer_mla import MLARMSNorm


SIZES = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


class Convertor:
    """As vLLM's, of which the model asks what is below."""

    def __init__(self, config):
        self.hf_text_config = config

    def is_deepseek_mla(self):
        return False

    def get_head_size(self):
        config = self.hf_text_config
        return config.kv_lora_rank + config.qk_rope_head_dim if self.is_deepseek_mla() else config.head_dim


@pytest.fixture
def vllm(monkeypatch):
    """vLLM as far as the configuration knows it: its switch, its platform, and its table of convertors."""
    platform = SimpleNamespace(is_cpu=lambda: True)
    modules = {
        "envs": {"VLLM_MLA_DISABLE": False},
        "platforms": {"current_platform": platform},
        "transformers_utils.model_arch_config_convertor": {
            "ModelArchConfigConvertorBase": Convertor,
            "MODEL_ARCH_CONFIG_CONVERTORS": {},
        },
    }
    for name, contents in modules.items():
        module = ModuleType(f"vllm.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return SimpleNamespace(envs=sys.modules["vllm.envs"], platform=platform, table=contents["MODEL_ARCH_CONFIG_CONVERTORS"])


def head_size(vllm, config):
    """The numbers that vLLM caches for a token, as it asks for them."""
    return vllm.table[config.model_type](config).get_head_size()


def test_the_configuration_that_travels_registers_itself(vllm, tmp_path):
    """In whatever process of vLLM reads it; where there is no vLLM, or one without such a table, nothing happens."""
    make_mla("Qwen2", **SIZES).save_pretrained(tmp_path)
    spec = importlib.util.spec_from_file_location("configuration_elsewhere", tmp_path / "configuration_mla.py")
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    assert set(vllm.table) == {family.mla_type for family in FAMILIES.values()}
    assert {convertor.__module__ for convertor in vllm.table.values()} == {"configuration_elsewhere"}
    assert head_size(vllm, elsewhere.Qwen2MLAConfig.from_pretrained(tmp_path)) == 576
    vllm.table.clear()
    del sys.modules["vllm.transformers_utils.model_arch_config_convertor"]
    register_with_vllm()
    assert not vllm.table


def test_the_plugin_makes_the_flag_unnecessary(vllm, monkeypatch):
    """vLLM looks up the class of a model in Transformers, where it may not run the checkpoint's code."""
    names = [f"{family.mla}ForCausalLM" for family in FAMILIES.values() if family.model_type in transformers.CONFIG_MAPPING]
    for name in names:
        monkeypatch.setattr(transformers, name, None, raising=False)
    vllm_mla.register()
    assert [getattr(transformers, name) for name in names] == [getattr(hf_mla, name) for name in names]
    assert len(vllm.table) == len(names)
    declared = (Path(hf_mla.__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\nhf_mla = "hf_mla.vllm_mla:register"\n' in declared


WINDOW = r"sliding_window is 16; .*\{\"sliding_window\": null\}' --max-model-len 16\), or set VLLM_MLA_DISABLE=1"


@pytest.mark.parametrize(
    ("family", "changes", "on_cpu", "line"),
    [
        (
            "Llama",
            {"kv_lora_rank": 128, "qk_rope_head_dim": 32},
            True,
            "is 128 [+] 32; .* 512 [+] 64 on a CPU. .*export --format deepseek_v3 --pad engine",
        ),
        ("Llama", {"kv_lora_rank": 256}, True, "is 256 [+] 64; .* 512 [+] 64 on a CPU"),
        ("Llama", {"kv_lora_rank": 448, "qk_rope_head_dim": 128}, True, "is 448 [+] 128; .* 512 [+] 64 on a CPU"),
        ("Llama", {"kv_lora_rank": 128, "qk_rope_head_dim": 32}, False, "is 128 [+] 32; .* 320, 512 or 576 numbers"),
        ("Qwen3", {"num_key_norms": 2}, True, "num_key_norms is 2; .*--qk-norm fold, or set VLLM_MLA_DISABLE=1"),
        ("Mistral", {"sliding_window": 16}, True, WINDOW),
        ("Gemma2", {}, True, "gemma2_mla has sinks or caps its scores"),
        ("GptOss", {}, True, "gpt_oss_mla has sinks or caps its scores"),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
            False,
            WINDOW,
        ),
    ],
)
def test_what_vllm_would_drop_is_refused(vllm, family, changes, on_cpu, line):
    """In one line, before a model is built; with keys and values of all heads in the cache all of it is right."""
    register_with_vllm()
    vllm.platform.is_cpu = lambda: on_cpu
    shape = SIZES | {"num_hidden_layers": 2, "num_attention_heads": 4, "sliding_window": None} | changes
    config = getattr(hf_mla, f"{family}MLAConfig")(**shape)
    with pytest.raises(NotImplementedError, match=line) as refusal:
        head_size(vllm, config)
    assert "\n" not in str(refusal.value)
    vllm.envs.VLLM_MLA_DISABLE = True
    assert head_size(vllm, config)


@pytest.mark.parametrize(
    ("family", "changes", "on_cpu"),
    [
        ("Llama", {}, True),
        ("Llama", {"kv_lora_rank": 256}, False),
        ("Mistral", {"sliding_window": None}, True),
        ("Mistral", {"sliding_window": 4096, "max_position_embeddings": 4096}, True),  # longer than any text
        ("Qwen2", {"sliding_window": 16, "use_sliding_window": False}, True),
    ],
)
def test_what_vllm_runs_is_not_refused(vllm, family, changes, on_cpu):
    register_with_vllm()
    vllm.platform.is_cpu = lambda: on_cpu
    config = getattr(hf_mla, f"{family}MLAConfig")(**(SIZES | changes))
    assert head_size(vllm, config) == config.kv_lora_rank + 64


def test_the_norm_is_seen_to_be_one():
    """vLLM puts its own RMSNorm in the place of one that computes nothing else, with the epsilon that it finds in an attribute."""
    graph = torch.fx.symbolic_trace(MLARMSNorm(8, eps=2.0**40)).graph
    names = [getattr(node.target, "__name__", node.target) for node in graph.nodes if node.op.startswith("call")]
    computed = [name for name in names if name not in ("getattr", "promote_types", "to")]
    assert computed == ["pow", "mean", "add", "rsqrt", "mul", "mul"]
