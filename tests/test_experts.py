"""Mixtures of experts keep their experts as they are stored, and models with MLA load them as the library's own do."""

import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import VALIDATION, make_source
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_mla.configuration_mla import FAMILIES as TABLE
from hf_mla.configuration_mla import config_class
from hf_mla_conversion import convert, export, heal, info, plan, verify
from hf_mla_conversion.errors import UserError
from hf_mla_conversion.mathematics.distill import Healing
from hf_mla_conversion.output.deepseek import LIKE_DEEPSEEK, possible_exports
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.streaming import LayerStream


EXPERTS = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 24}  # the tenth comes after the ninth
FAMILIES = {
    "Mixtral": {"num_local_experts": 12, "num_experts_per_tok": 2},
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 48, "mlp_only_layers": [0]},
    "Qwen3Moe": EXPERTS | {"norm_topk_prob": True},
}
EAGER = {"dtype": torch.float64, "experts_implementation": "eager"}  # the library's other ways have no float64


def stored(folder):
    """All tensors in the files of a checkpoint, but those of attention."""
    tensors = {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}
    return {name: tensor for name, tensor in tensors.items() if ".self_attn." not in name}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def load(folder, auto_class=AutoModelForCausalLM, **options):
    model, loading = auto_class.from_pretrained(folder, output_loading_info=True, **options)
    assert loading["unexpected_keys"] <= {"lm_head.weight"} and not loading["mismatched_keys"]
    return model.eval(), loading["missing_keys"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A source of several shards and one key head, and its conversion, in which nothing is dropped; the report too."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = {"num_key_value_heads": 1, "dtype": torch.float64, "shard_size": "500KB"} | FAMILIES[request.param]
    source, out = make_source(folder / "source", request.param, **changes), str(folder / "out")
    assert len([*(folder / "source").glob("*.safetensors")]) > 1
    report = convert(source, out, kv_lora_rank=16, qk_rope_head_dim=16, calibration_tokens=512, steps=0, device="cpu")
    return source, out, report


@torch.no_grad()
def test_experts_are_kept_loaded_and_saved_as_they_were_stored(pair, tmp_path):
    source, out, _ = pair
    assert any(".experts.11." in name for name in stored(source))
    assert same(stored(source), stored(out))
    original, _ = load(source, **EAGER)
    converted, missing = load(out, **EAGER)
    assert not missing
    ids = torch.randint(3, 4096, (2, 64))
    expected = original(ids).logits
    assert expected.std() > 0.1
    # The library rounds Qwen3's norms and what routers compute to float32.
    assert (converted(ids).logits - expected).abs().max() < 1e-5
    generated = converted.generate(ids[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, original.generate(ids[:1], max_new_tokens=8, do_sample=False))
    converted.save_pretrained(tmp_path)
    assert same(stored(out), stored(tmp_path))
    again, missing = load(tmp_path, **EAGER)
    assert not missing
    assert torch.equal(again(ids).logits, converted(ids).logits)
    classifier, missing = load(out, AutoModelForSequenceClassification, **EAGER)
    assert missing == {"score.weight"}
    assert same(converted.model.state_dict(), classifier.model.state_dict())


def test_commands_tell_of_experts_as_they_are_stored(pair, tmp_path):
    source, out, report = pair
    planned = plan(source, kv_lora_rank=16, qk_rope_head_dim=16)
    assert planned.bytes_written == report.bytes_written == open_checkpoint(out).bytes
    assert planned.bytes_read == open_checkpoint(source).bytes
    assert info(source)["supported"]
    for folder in (source, out):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert info(folder)["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for refused in (planned.exports, report.exports):
        assert all("mixture of experts" in reason for reason in refused.values()) and refused.keys() == {"deepseek_v3", "gguf"}
    assert export(out, str(tmp_path / "exported"), format="deepseek_v3").refused == planned.exports["deepseek_v3"]
    assert not (tmp_path / "exported").exists()
    verified = verify(out, against=source, text=VALIDATION, tokens=512, device="cpu")
    assert abs(verified.kl) < 1e-6


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A source whose sequences are of 64 tokens, and its conversion."""
    folder = tmp_path_factory.mktemp("short")
    changes = {"dtype": torch.bfloat16, "max_position_embeddings": 64, **FAMILIES["Qwen3Moe"]}
    source, out = make_source(folder / "source", "Qwen3Moe", **changes), str(folder / "out")
    convert(source, out, kv_lora_rank=8, qk_rope_head_dim=4, calibration_tokens=512, steps=0, device="cpu")
    return source, out


@pytest.mark.parametrize("train", ["attention", "lora", "all"])
def test_healed_experts_change_where_all_is_trained_and_are_written_as_before(short, tmp_path, train):
    (source, out), dest = short, str(tmp_path / "healed")
    options = {"teacher": source, "text": VALIDATION, "train": train, "step_tokens": 256, "device": "cpu"}
    report = heal(out, dest, steps=4, learning_rate=1e-2, **options)
    before, after = stored(out), stored(dest)
    assert before.keys() == after.keys()
    experts = [name for name in before if ".experts." in name]
    assert all(torch.equal(before[name], after[name]) != (train == "all") for name in experts)
    planned = heal(out, str(tmp_path / "dry"), dry_run=True, **options)
    assert planned.trained_parameters == report.trained_parameters
    model, missing = load(dest, dtype=torch.float32)
    assert not missing
    if train == "all":
        assert report.trained_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_healing_goes_on_with_the_experts_that_it_has_trained(short, tmp_path, monkeypatch):
    source, out = short
    options = {"teacher": source, "text": VALIDATION, "train": "all", "steps": 22, "step_tokens": 256, "device": "cpu"}

    def interrupt(callback, args, state, control, **_):
        if state.global_step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Healing, "on_step_end", interrupt)
        heal(out, str(tmp_path / "resumed"), learning_rate=1e-2, **options)
    assert (tmp_path / ".resumed.incomplete" / "checkpoint-8" / "complete").exists()
    resumed, whole = (heal(out, str(tmp_path / name), learning_rate=1e-2, **options) for name in ("resumed", "whole"))
    first, second = ([entry["perplexity"] for entry in report.history if "perplexity" in entry] for report in (resumed, whole))
    assert first == pytest.approx(second, rel=1e-4)


def test_an_expert_that_is_missing_is_said_in_one_line(short, tmp_path):
    source = shutil.copytree(short[0], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.11.up_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match=r"0.gate_proj.weight and 22 more hold 26,496 numbers, config.json announces 27,648"):
        plan(str(source))
    assert not info(str(source))["supported"]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most that were at a time; what is mapped from files is none."""

    def __init__(self):
        super().__init__()
        self.users, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
            if place not in self.users and function.is_view:
                continue
            self.now += 0 if self.users.get(place) else size
            self.users[place] = self.users.get(place, 0) + 1
            self.peak = max(self.peak, self.now)
            weakref.finalize(tensor, self.drop, place, size)
        return result

    def drop(self, place, size):
        self.users[place] -= 1
        if not self.users[place]:
            del self.users[place]
            self.now -= size


@pytest.mark.parametrize("family", FAMILIES)
def test_filling_a_layer_takes_little_more_than_the_layer(tmp_path, family):
    changes = FAMILIES[family] | {"num_experts" if "num_experts" in FAMILIES[family] else "num_local_experts": 64}
    source = make_source(tmp_path, family, dtype=torch.bfloat16, **changes)
    stream = LayerStream(open_checkpoint(source), torch.device("cpu"), torch.float32)
    size = sum(parameter.numel() * 4 for parameter in stream.layers[1].parameters())
    with LiveBytes() as memory, stream.layer(1):
        pass
    assert size <= memory.peak < 1.1 * size


@pytest.mark.parametrize("name", [name for name, family in TABLE.items() if family.mla_type not in LIKE_DEEPSEEK])
def test_a_family_that_is_not_known_to_fit_is_not_exported(name):
    reasons = possible_exports(config_class(TABLE[name])())
    assert all(reason and "\n" not in reason for reason in reasons.values())


WITHOUT_HF_MLA = """
import sys
sys.modules["hf_mla"] = None  # importing it raises ImportError
import torch
from transformers import AutoModelForCausalLM
options = {"trust_remote_code": True, "dtype": torch.float64, "experts_implementation": "eager", "output_loading_info": True}
for folder, again in zip(sys.argv[1::2], sys.argv[2::2]):
    for path in (folder, again):
        model, loading = AutoModelForCausalLM.from_pretrained(path, **options)
        assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
        assert not any(loading[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")), loading
        logits = model.eval()(torch.arange(3, 67)[None]).logits[0, -1]
        print(repr(logits[:5].tolist()))
        if path == folder:
            model.save_pretrained(again)
"""


@pytest.mark.parametrize("pair", ["Mixtral"], indirect=True)
def test_experts_are_loaded_without_hf_mla(pair, tmp_path):
    _, out, _ = pair
    again = tmp_path / "again"
    command = [sys.executable, "-c", WITHOUT_HF_MLA, out, str(again)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model, _ = load(out, **EAGER)
    with torch.no_grad():
        expected = repr(model(torch.arange(3, 67)[None]).logits[0, -1, :5].tolist())
    assert done.stdout.splitlines() == [expected] * 2
    assert same(stored(out), stored(again))
