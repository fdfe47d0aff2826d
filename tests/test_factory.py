"""Classes of families are made from the table when they are asked for, and are like any others from then on."""

import importlib
import importlib.util
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_mla, run_apart
from families import EXACT, FAMILIES, KNOWN
from stub import STUB, stub
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import hf_mla
from hf_mla import configuration_mla, modeling_mla


def imported():
    """Families of Transformers whose models have been imported; Bloom's are by PEFT."""
    names = [name.split(".") for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
    return {family for _, _, family, *_ in names} - {"auto", "bloom"}


def only_what_is_used(folder, config):
    """In a process that has only imported hf_mla."""
    assert not imported() and not configuration_mla.MADE and not modeling_mla.MADE
    assert "mistral_mla" in transformers.CONFIG_MAPPING and "MistralMLAModel" in dir(hf_mla)
    assert type(pickle.loads(config)) is hf_mla.Qwen3MLAConfig  # by its own module, not by way of an Auto class
    assert type(AutoModelForTokenClassification.from_config(pickle.loads(config))) is hf_mla.Qwen3MLAForTokenClassification
    assert imported() == {"qwen3"}
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is modeling_mla.Qwen2MLAForCausalLM
    assert imported() == {"qwen2", "qwen3"} and set(configuration_mla.MADE) == {"Qwen2MLAConfig", "Qwen3MLAConfig"}


def test_no_family_is_made_before_it_is_used(tmp_path):
    make_mla("Qwen2").save_pretrained(tmp_path / "model")
    config = pickle.dumps(make_mla("Qwen3").config)
    code, output = run_apart(tmp_path / "log", only_what_is_used, tmp_path / "model", config)
    assert code == 0, output


def without_a_family(folder):
    """In a process whose Transformers has no Mistral."""
    for name in [name for name in sys.modules if name.startswith("transformers.models.mistral")]:
        del sys.modules[name]
    del CONFIG_MAPPING_NAMES["mistral"], CONFIG_MAPPING_NAMES["mistral_mla"]
    importlib.reload(hf_mla)
    assert "mistral_mla" not in CONFIG_MAPPING_NAMES and "MistralMLAConfig" not in hf_mla.__all__
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is hf_mla.Qwen2MLAForCausalLM
    with pytest.raises(
        AttributeError, match=f"MistralMLAConfig needs a Transformers that has 'mistral'; {transformers.__version__}"
    ):
        modeling_mla.MistralMLAForCausalLM  # noqa: B018 - made by being asked for


def test_families_load_where_transformers_lacks_another(tmp_path):
    make_mla("Qwen2").save_pretrained(tmp_path / "model")
    code, output = run_apart(tmp_path / "log", without_a_family, tmp_path / "model")
    assert code == 0, output


@pytest.mark.parametrize("suffix", [*configuration_mla.CLASSES, *configuration_mla.HEADS])
def test_a_class_is_found_where_it_says_it_is(suffix):
    name = f"Qwen3MLA{suffix}"
    cls = getattr(hf_mla, name)
    assert (cls.__name__, cls.__qualname__) == (name, name)
    assert getattr(sys.modules[cls.__module__], name) is getattr(modeling_mla, name) is pickle.loads(pickle.dumps(cls)) is cls
    assert cls.__module__ == f"hf_mla.{'configuration' if suffix == 'Config' else 'modeling'}_mla"
    assert name in dir(hf_mla) and name in hf_mla.__all__


@pytest.mark.parametrize("name", ["LlamaMLA", "LlamaMLAModels", "LlamaModel", "NoneMLAModel", "MLAConfig", "__path__"])
def test_other_names_are_no_attributes(name):
    for module in (configuration_mla, modeling_mla) if name == "__path__" else (hf_mla, configuration_mla, modeling_mla):
        assert not hasattr(module, name)


def test_threads_get_one_class(tmp_path):
    """Of a copy of the file, which has made none yet."""
    spec = importlib.util.spec_from_file_location("configuration_apart", configuration_mla.__file__)
    apart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(apart)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: apart.LlamaMLAConfig, range(8)))) == 1
    assert apart.LlamaMLAConfig is not hf_mla.LlamaMLAConfig


def test_whole_models_are_pickled(tmp_path):
    """As `torch.save` of a model does it; and Auto classes know the configuration that comes with it."""
    model, ids = make_mla("Qwen3", num_key_norms=2), torch.arange(1, 13).unsqueeze(0)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(again) is type(model) and torch.equal(again(ids).logits, model(ids).logits)
    assert type(AutoModel.from_config(again.config)) is hf_mla.Qwen3MLAModel
    assert type(AutoConfig.for_model("qwen3_mla")) is hf_mla.Qwen3MLAConfig


def test_a_mixture_of_experts_stays_one():
    """What the library looks for in the source of a class, in what a model records, and in attributes of its head."""
    model, ids = make_mla("Mixtral", num_local_experts=4, router_aux_loss_coef=0.5), torch.arange(1, 25).view(2, 12)
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        outputs = model(ids, labels=ids, output_router_logits=True)
        assert [logits.shape for logits in outputs.router_logits] == [(24, 4)] * 2
        assert outputs.aux_loss > 0
        torch.testing.assert_close(outputs.loss, model(ids, labels=ids).loss + 0.5 * outputs.aux_loss)


def test_what_is_kept_in_float32_and_how_norms_begin():
    kept = set(hf_mla.GptOssMLAModel._keep_in_fp32_modules)
    assert kept == {"kv_a_layernorm", *transformers.GptOssModel._keep_in_fp32_modules}
    layer = hf_mla.GemmaMLAModel(make_mla("Gemma").config).layers[0]
    assert not layer.input_layernorm.weight.any() and layer.self_attn.kv_a_layernorm.weight.eq(1).all()


def test_every_family_has_its_proof():
    """A tiny model that goes through the whole pipeline, and a well-known checkpoint for docs/families.md."""
    assert {model_type for name, (model_type, *_) in EXACT.items() if "," not in name} == set(KNOWN) == set(FAMILIES)
    assert f"{len(FAMILIES)} model types" in (Path(hf_mla.__file__).parent.parent / "README.md").read_text()


def test_editors_know_the_classes_of_the_table():
    assert STUB.read_text() == stub(), "run python tests/stub.py"
    assert '"*.pyi"' in (Path(hf_mla.__file__).parent.parent / "pyproject.toml").read_text()  # the wheel has it
