"""The heads besides the language model's: what the library's own heads compute, on a decoder with MLA."""

import pytest
import torch
import transformers
from conftest import make_mla, without_hf_mla
from safetensors.torch import load_file

import hf_mla


FAMILIES = {"Llama": {}, "Mistral": {"sliding_window": 8}, "Qwen2": {"classifier_dropout": 0.0}, "Qwen3": {"num_key_norms": 2}}
# Of which each has something of its own: experts, norms that multiply by 1 + w, another name for its dropout or its decoder.
OTHERS = {
    "Mixtral": {"num_local_experts": 4},
    "Gemma": {"tie_word_embeddings": False},
    "StableLm": {"hidden_dropout": 0.2},
    "GPTNeoX": {"classifier_dropout": 0.0},
}
LABELS = {
    "ForSequenceClassification": {"labels": torch.tensor([2, 0])},
    "ForTokenClassification": {"labels": torch.arange(24).view(2, 12) % 3},
    "ForQuestionAnswering": {"start_positions": torch.tensor([3, 0]), "end_positions": torch.tensor([7, 11])},
}
IDS = torch.arange(1, 25).view(2, 12)

every_family = pytest.mark.parametrize("family", FAMILIES)
every_kind = pytest.mark.parametrize("family", FAMILIES | OTHERS)
every_head = pytest.mark.parametrize("head", LABELS)


def make_head(family, head):
    source = make_mla(family, num_labels=3, **(FAMILIES | OTHERS)[family])
    model = getattr(hf_mla, f"{family}MLA{head}")(source.config).eval()
    model.base_model.load_state_dict(source.base_model.state_dict())
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{model.base_model_prefix}."):
            parameter.data.normal_()
    return model


def tensors(outputs):
    """Loss and logits, by name."""
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


@pytest.mark.mode("Heads: sequence and token classification, question answering", since="5.15", costs="prefill only")
@every_kind
@every_head
def test_equals_the_librarys_own_head_on_the_same_decoder(family, head):
    """Modules, their sizes and dropout, pooling, loss and gradient."""
    if not hasattr(transformers, f"{family}{head}"):
        pytest.skip("the library has no such head")
    model = make_head(family, head)
    own = getattr(transformers, f"{family}{head}")(getattr(transformers, f"{family}Config")(**model.config.to_diff_dict()))
    for mine, theirs in zip(list(model.children())[1:], list(own.children())[1:], strict=True):
        theirs.load_state_dict(mine.state_dict())
    setattr(own, own.base_model_prefix, model.base_model)
    assert str(list(own.children())[1:]) == str(list(model.children())[1:])
    ids = IDS.clone()
    ids[1, 9:] = model.config.pad_token_id
    results = []
    for either in (own.eval(), model):
        outputs = either(ids, attention_mask=(ids != model.config.pad_token_id).long(), **LABELS[head])
        outputs.loss.backward()
        results.append(tensors(outputs) | {name: parameter.grad.clone() for name, parameter in model.base_model.named_parameters()})
        model.zero_grad()
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name
        assert expected.abs().max() > 0, name


@every_family
@every_head
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(family, head, side):
    model = make_head(family, head)
    padding = torch.full((5,), model.config.pad_token_id)
    short = IDS[1, :7]
    ids = torch.stack([IDS[0], torch.cat([padding, short] if side == "left" else [short, padding])])
    outputs = tensors(model(ids, attention_mask=(ids != model.config.pad_token_id).long()))
    place = slice(5, 12) if side == "left" else slice(0, 7)
    for name, alone in tensors(model(short[None])).items():
        padded = outputs[name][1] if head == "ForSequenceClassification" else outputs[name][1, place]
        torch.testing.assert_close(padded, alone[0], atol=1e-5, rtol=1e-5)


@every_kind
def test_every_head_loads_from_a_language_model(family, tmp_path):
    """The decoder is the checkpoint's, and the new head is reported."""
    source = make_mla(family, **(FAMILIES | OTHERS)[family])
    source.save_pretrained(tmp_path)
    decoder = f"{source.base_model_prefix}."
    head_of_source = {name for name in load_file(tmp_path / "model.safetensors") if not name.startswith(decoder)}
    for head in LABELS:
        auto_class = getattr(transformers, f"AutoModel{head}")
        model, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(model) is getattr(hf_mla, f"{family}MLA{head}")
        assert set(report["missing_keys"]) == {name for name in model.state_dict() if not name.startswith(decoder)}
        assert set(report["unexpected_keys"]) == head_of_source
        for name, weight in source.base_model.state_dict().items():
            assert torch.equal(model.base_model.state_dict()[name], weight), name


# Loads each folder with its own head, and prints what it says.
WITHOUT_HF_MLA = """
import torch, transformers
ids = torch.arange(1, 25).view(2, 12)
for folder in sys.argv[1:]:
    head = folder.rsplit("-", 1)[-1]
    model, report = getattr(transformers, f"AutoModel{head}").from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert type(model).__module__.startswith("transformers_modules") and not report["missing_keys"]
    print(repr((type(model).__name__, [x.tolist() for x in model(ids).values() if isinstance(x, torch.Tensor)])))
language_model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
print(type(language_model).__name__)
"""


@torch.no_grad()
def test_loads_as_remote_code_and_as_installed_class(tmp_path):
    """Every head of every family; and whichever was saved, all others can be loaded from it."""
    folders, expected = [], []
    for family in FAMILIES:
        for head in LABELS:
            model = make_head(family, head)
            folders.append(str(tmp_path / f"{family}-{head}"))
            model.save_pretrained(folders[-1])
            expected.append(repr((type(model).__name__, [x.tolist() for x in tensors(model(IDS)).values()])))
            again = getattr(transformers, f"AutoModel{head}").from_pretrained(folders[-1])
            assert type(again) is type(model)
            assert repr((type(again).__name__, [x.tolist() for x in tensors(again(IDS)).values()])) == expected[-1]
    assert without_hf_mla(tmp_path, WITHOUT_HF_MLA, *folders) == [*expected, "Qwen3MLAForCausalLM"]
