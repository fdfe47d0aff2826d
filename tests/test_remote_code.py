"""A converted checkpoint is self-contained: it loads, generates, saves and loads again where hf_mla cannot be imported."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_mla, without_hf_mla
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import hf_mla
from hf_mla.configuration_mla import FAMILIES
from hf_mla_conversion.output.writing import REMOTE_FILES


# Runs in a process of its own, where importing hf_mla fails; prints logits and text for the caller to compare.
WITHOUT_HF_MLA = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
folder, again, qwen3 = sys.argv[1:]
options = {"trust_remote_code": True}
AutoModelForCausalLM.from_pretrained(qwen3, **options).generate(torch.tensor([[3, 4]]), max_new_tokens=2)
names = [name.split(".") for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
print(*sorted({family for _, _, family, *_ in names} - {"auto", "bloom"}))  # Bloom's are by PEFT
from transformers import pipeline  # which imports another in older versions
assert AutoConfig.from_pretrained(folder, **options).model_type == "llama_mla"
tokenizer = AutoTokenizer.from_pretrained(folder, **options)  # 5.23 reads the model configuration for it
ids = tokenizer("The captain looked at the sea and", return_tensors="pt")["input_ids"]
for path in (folder, again):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    base = AutoModel.from_pretrained(path, dtype=torch.float32, **options)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    attention = sys.modules[type(model.model.layers[0].self_attn).__module__]
    assert attention.absorb_if_cheaper.__globals__["latent_decode"] is None
    assert type(model).__name__ == "LlamaMLAForCausalLM" and type(base).__name__ == "LlamaMLAModel"
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("The captain", max_new_tokens=8, do_sample=False)
    outputs = model.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    cache = next(value for value in outputs.values() if hasattr(value, "layers"))  # under either name
    assert {type(layer).__name__ for layer in cache.layers} == {"LatentDynamicLayer"}
    print(repr((model(ids).logits[0, -1, :5].tolist(), outputs.sequences.tolist(), text[0]["generated_text"])))
    if path == folder:
        model.save_pretrained(again)
        tokenizer.save_pretrained(again)
"""


@pytest.fixture(scope="module")
def elsewhere(converted, tmp_path_factory):
    """What a process without hf_mla prints: families imported for a Qwen3, the checkpoint, its own copy of it; and that copy."""
    scratch = tmp_path_factory.mktemp("elsewhere")
    make_mla("Qwen3", num_key_norms=2).save_pretrained(scratch / "qwen3")
    words = converted[0], scratch / "again", scratch / "qwen3"
    return without_hf_mla(scratch, WITHOUT_HF_MLA, *words), scratch / "again"


def test_loads_without_hf_mla_installed(converted, elsewhere):
    (_, first, second), _ = elsewhere
    assert first == second
    model = AutoModelForCausalLM.from_pretrained(converted[0], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    ids = tokenizer("The captain looked at the sea and", return_tensors="pt")["input_ids"]
    logits = model(ids).logits[0, -1, :5].tolist()
    tokens = model.generate(ids, max_new_tokens=20, do_sample=False).tolist()
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("The captain", max_new_tokens=8, do_sample=False)
    assert first == repr((logits, tokens, text[0]["generated_text"]))


def test_a_checkpoint_imports_its_own_family_alone(elsewhere):
    assert elsewhere[0][0] == "qwen3"


def test_remote_code_takes_the_kernel_where_hf_mla_is_installed(converted, tmp_path):
    pytest.importorskip("triton")
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "module = sys.modules[type(model.model.layers[0].self_attn).__module__]\n"
        "print(module.__name__.split('.')[0], module.absorb_if_cheaper.__globals__['latent_decode'])"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, converted[0]], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("transformers_modules <CustomOpDef(hf_mla::latent_decode)"), done.stdout + done.stderr


def test_loads_without_the_flag_where_installed(converted):
    for auto, name in ((AutoModel, "LlamaMLAModel"), (AutoModelForCausalLM, "LlamaMLAForCausalLM")):
        assert type(auto.from_pretrained(converted[0])) is getattr(hf_mla, name)
    assert type(AutoConfig.from_pretrained(converted[0])) is hf_mla.LlamaMLAConfig


def test_files_shipped_are_the_files_in_the_package(converted, elsewhere, tmp_path):
    """By the converter, by save_pretrained here, and by save_pretrained in a process that has only the remote code."""
    AutoModelForCausalLM.from_pretrained(converted[0]).save_pretrained(tmp_path)
    package = Path(hf_mla.__file__).parent
    for folder in (Path(converted[0]), tmp_path, elsewhere[1]):
        assert sorted(path.name for path in folder.glob("*.py")) == sorted(REMOTE_FILES)
        for file in REMOTE_FILES:
            assert (folder / file).read_bytes() == (package / file).read_bytes(), (folder, file)
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        heads = {"CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"}
        assert set(auto_map) == {"AutoConfig", "AutoModel"} | {f"AutoModelFor{head}" for head in heads}


def test_saved_base_model_loads_again(converted, tmp_path):
    base = AutoModel.from_pretrained(converted[0])
    base.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_every_dtype_computes_the_same(closed_form, dtype):
    """The identity norm of a closed-form model is safe in float16 too, whose range its weight exceeds: loaded so or cast."""
    ids = torch.randint(3, 4096, (1, 64))
    model = AutoModelForCausalLM.from_pretrained(closed_form, dtype=torch.float32)
    assert model.model.layers[0].self_attn.kv_a_layernorm.weight.min() > torch.finfo(torch.float16).max
    exact = model(ids).logits.softmax(-1)
    loaded, cast = AutoModelForCausalLM.from_pretrained(closed_form, dtype=dtype), copy.deepcopy(model).to(dtype)
    for other in (loaded, cast, copy.deepcopy(cast)):
        assert (other(ids).logits.float().softmax(-1) - exact).abs().max() < 0.05
    for (name, one), other in zip(loaded.state_dict().items(), cast.state_dict().values(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    back = cast.to(torch.float32).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items() if "kv_a_layernorm" in name)


def test_label_smoothing_shifts_labels():
    """The trainer and the text-generation pipeline look the class name up in this table."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for family in FAMILIES.values():
        assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.mla_type] == f"{family.mla}ForCausalLM"
