"""Sources in every way that Transformers loads them: the library's own model of the same files is the reference."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LLAMA3_ROPE, make_source
from families import Unrounded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_mla_conversion import convert, info, plan
from hf_mla_conversion.commands.verify import compare_at
from hf_mla_conversion.errors import UserError
from hf_mla_conversion.mathematics.distill import BEST
from hf_mla_conversion.mathematics.survey import advance
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.loading import load_model
from hf_mla_conversion.source.matching import match_model
from hf_mla_conversion.source.own_text import BUNDLED_NAME
from hf_mla_conversion.source.streaming import LayerStream
from hf_mla_conversion.source.text import calibration_windows
from hf_mla_conversion.stages.end_to_end import Training, write_trained


CPU = torch.device("cpu")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = {"tie_word_embeddings": True}


def edit(change):
    """What changes the tensors of a saved model, in place."""

    def rewrite(folder):
        file = Path(folder) / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})

    return rewrite


def save_again_as(auto_class):
    def save(folder):
        auto_class.from_pretrained(folder, dtype="auto").save_pretrained(folder)

    return save


def add_buffers(tensors):
    layer = "model.layers.1.self_attn."
    tensors[layer + "rotary_emb.inv_freq"] = torch.ones(8)
    tensors[layer + "rotary_emb.cos_cached"] = torch.ones(256, 16)
    tensors[layer + "bias"] = torch.ones(256, 256, dtype=torch.bool)
    tensors["model.position_ids"] = torch.arange(256)


def strip(tensors):
    for name in [*tensors]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def cast(changed, dtype):
    return edit(lambda tensors: tensors.update({name: tensors[name].to(dtype) for name in tensors if changed in name}))


SOURCES = {  # family, configuration, and what is done to the saved model
    "tied, another head stored": ("Llama", TIED, edit(lambda t: t.update({HEAD: t[EMBEDDING].flip(0)}))),
    "tied, the same head stored": ("Qwen3", TIED, edit(lambda t: t.update({HEAD: t[EMBEDDING]}))),
    "tied, stored as the head": ("Qwen2", TIED, edit(lambda t: t.update({HEAD: t.pop(EMBEDDING)}))),
    "decoder alone, tied": ("Mistral", TIED, save_again_as(AutoModel)),
    "decoder alone, with a head beside": (
        "Llama",
        {},
        edit(strip),
    ),
    "buffers": ("Llama", {}, edit(add_buffers)),
    "shards": ("Qwen3", {"shard_size": "100KB"}, lambda folder: None),
    "bfloat16, norms in float32": ("Llama", {"dtype": torch.bfloat16}, cast("norm", torch.float32)),
    "float16": ("Llama", {"dtype": torch.float16}, lambda folder: None),
    "llama3 rope, biases": ("Llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True}, lambda folder: None),
    "window": ("Mistral", {"sliding_window": 48}, lambda folder: None),
    "window in one layer": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1},
        lambda folder: None,
    ),
}
EXPERTS = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPS = {"n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPS |= {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
# Nothing in this project knows these: what they do to embeddings and logits, and how experts are stored, is the library's.
UNKNOWN = {
    "Granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "HyperCLOVAX": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "Gemma": {},
    "Gemma2": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48, "final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.5},
    "Cohere2": {"logit_scale": 0.5, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48},
    "Phi": {"partial_rotary_factor": 0.5},  # its head has a bias
    "Mixtral": {"num_local_experts": 12, "num_experts_per_tok": 2},
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 48, "mlp_only_layers": [0]},
    "Qwen3Moe": EXPERTS | {"norm_topk_prob": True},
    "Olmoe": EXPERTS | {"head_dim": None},
    "GraniteMoe": {"num_local_experts": 12, "num_experts_per_tok": 2, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "Dots1": GROUPS,
    "Glm4Moe": GROUPS | {"use_qk_norm": True, "attention_bias": True},
}


def make(folder, name, **changes):
    family, configuration, change = SOURCES[name]
    source = make_source(folder, family, **{**configuration, **changes})
    change(source)
    return source


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in [*SOURCES, *UNKNOWN]), ("Mixtral", torch.float64)], ids=str
)
@torch.no_grad()
def test_layers_are_the_librarys_to_the_last_bit(tmp_path, name, dtype):
    source = make(tmp_path, name) if name in SOURCES else make_source(tmp_path, name, dtype=dtype, **UNKNOWN[name])
    model = load_model(open_checkpoint(source), CPU, dtype)
    ids = torch.randint(3, 4096, (2, 96))
    expected = model(ids, output_hidden_states=True, use_cache=False)

    stream = LayerStream(open_checkpoint(source), CPU, dtype)
    stream.record_calls(96)
    states = torch.empty(2, 96, 48, dtype=dtype)
    stream.embed(ids[:1], states[:1])
    stream.embed(ids[1:], states[1:])
    for index, hidden in enumerate(expected.hidden_states[:-1]):
        assert torch.equal(states, hidden), index
        with stream.layer(index) as layer:
            advance(layer, stream.calls[index], states, 2, CPU)
    with stream.head() as head:
        logits = head(states)
    assert logits.std() > 0.01
    assert torch.equal(logits, expected.logits)
    assert all(parameter.is_meta for parameter in stream.model.parameters())


def library_model(folder, dtype):
    """The library's model, with no key missing or left over but the buffers that are none of its own."""
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    return model.eval(), loading["unexpected_keys"]


@pytest.mark.parametrize("name", [name for name in SOURCES if "float" not in name and "rope" not in name and "window" not in name])
def test_output_is_the_source_where_nothing_is_dropped(tmp_path, name):
    """One key head and its full rotary width, in float64: the output is the model that Transformers makes of the source."""
    source, out = make(tmp_path / "source", name, num_key_value_heads=1, dtype=torch.float64), str(tmp_path / "out")
    convert(source, out, kv_lora_rank=16, qk_rope_head_dim=16, calibration_tokens=512, steps=0, device="cpu")
    original, _ = library_model(source, torch.float64)
    converted, unexpected = library_model(out, torch.float64)
    assert not unexpected
    # What other programs read is true as well.
    assert converted.config.tie_word_embeddings == (converted.lm_head.weight is converted.model.embed_tokens.weight)
    assert {EMBEDDING, "model.norm.weight"} <= open_checkpoint(out).tensors.keys()
    ids = torch.randint(3, 4096, (2, 96))
    with torch.no_grad(), Unrounded():  # else a last bit of float32 in the library's norms can differ, 3e-7
        expected = original(ids).logits
        assert expected.std() > 0.1
        # Qwen3's norms of queries and keys are rounded to float32 in the conversion as well.
        assert (converted(ids).logits - expected).abs().max() < (1e-5 if SOURCES[name][0] == "Qwen3" else 1e-9)


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in ("buffers", "shards")])
def test_own_measure_is_that_of_the_whole_models(tmp_path, name):
    source, out = make(tmp_path / "source", name), str(tmp_path / "out")
    sizes = {"kv_lora_rank": 24, "qk_rope_head_dim": 8}
    report = convert(source, out, calibration=BUNDLED_NAME, calibration_tokens=512, steps=0, device="cpu", **sizes)
    planned = plan(source, kv_lora_rank=24, qk_rope_head_dim=8)
    assert planned.bytes_written == report.bytes_written == open_checkpoint(out).bytes
    assert planned.bytes_read == open_checkpoint(source).bytes
    tokenizer = AutoTokenizer.from_pretrained(source)
    held = calibration_windows(open_checkpoint(source), tokenizer, None, 512, 256, seed=0)[-1:]
    assert report.held_back_tokens == held.numel()
    models = [load_model(open_checkpoint(path), CPU, torch.float32) for path in (source, out)]
    measured = compare_at(*models, held)
    assert measured.kl > 0.01
    for key, value in (("perplexity", "source"), ("perplexity", "converted")):
        assert math.isclose(getattr(report.perplexity, value), getattr(measured.perplexity, value), rel_tol=1e-5), key
    assert math.isclose(report.perplexity_ratio, measured.perplexity_ratio, rel_tol=1e-5)
    assert math.isclose(report.kl, measured.kl, rel_tol=1e-4)
    assert math.isclose(report.top1_agreement, measured.top1_agreement, abs_tol=1e-6)


def test_generation_settings_in_config_json_are_kept(tmp_path):
    source, out = make_source(tmp_path / "source"), str(tmp_path / "out")
    (tmp_path / "source" / "generation_config.json").unlink()
    change_config(do_sample=True, temperature=0.5, max_length=77)(source)
    convert(source, out, kv_lora_rank=24, qk_rope_head_dim=8, calibration_tokens=512, steps=0, device="cpu")
    first, second = (AutoModelForCausalLM.from_pretrained(path).generation_config for path in (source, out))
    assert second.temperature == 0.5
    assert {**first.to_dict(), "_from_model_config": None} == {**second.to_dict(), "_from_model_config": None}


def drop(*tails):
    return edit(lambda tensors: [tensors.pop(name) for name in [*tensors] if name.endswith(tails)])


def add(name, *shape, dtype=torch.float32):
    return edit(lambda tensors: tensors.update({name: torch.ones(shape).to(dtype)}))


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def pickle(folder):
    weights = Path(folder) / "model.safetensors"
    torch.save(load_file(weights), Path(folder) / "pytorch_model.bin")
    weights.unlink()


def adapter(folder):
    (Path(folder) / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}))


def change_config(**changes):
    def change(folder):
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


Q = "layers.1.self_attn.q_proj"
REFUSED = {
    "classifier": (save_again_as(AutoModelForSequenceClassification), "holds score.weight, which is none of a language model's"),
    "value head beside": (add("v_head.summary.weight", 1, 48), r"holds v_head.summary.weight, .* only .*LlamaForCausalLM"),
    "decoder alone": (save_again_as(AutoModel), "has no lm_head.weight, and its config.json ties none"),
    "pickled weights": (pickle, "neither model.safetensors nor .*save it again with save_pretrained"),
    "adapter": (both(adapter, lambda folder: (Path(folder) / "model.safetensors").unlink()), "is an adapter .*merge it"),
    "adapter beside a model": (adapter, "is an adapter .*merge it"),
    "adapter among the weights": (add(f"model.{Q}.lora_A.weight", 4, 48), r"holds an adapter, .*lora_A.weight; merge it"),
    "8 bits": (cast(f"{Q}.weight", torch.int8), f"{Q}.weight is stored as I8; supported: F64, F32, F16, BF16 .unquantized"),
    "4 bits": (
        both(drop(f"{Q}.weight"), add(f"model.{Q}.qweight", 6, 64, dtype=torch.int32)),
        f"is quantized: it has model.{Q}.qweight in place of model.{Q}.weight; convert the unquantized one",
    ),
    "biases that config.json does not have": (add(f"model.{Q}.bias", 64), f"beyond what its config.json describes, model.{Q}.bias"),
    "more layers than config.json has": (change_config(num_hidden_layers=1), "config.json describes, model.layers.1.input_layer"),
    "fewer layers": (change_config(num_hidden_layers=3), "has no tensor model.layers.2.self_attn.* announces 3 layers"),
    "other shape": (add("model.norm.weight", 47), r"model.norm.weight is \[47\], config.json announces \[48\]"),
    "one weight twice": (add("norm.weight", 48), "holds both model.norm.weight and norm.weight"),
    "nothing": (edit(dict.clear), "holds no tensors"),
    "no such heads": (change_config(num_key_value_heads=3), "4 query heads do not divide among 3"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(tmp_path, change, message):
    source = make_source(tmp_path / "source")
    change(source)
    with pytest.raises(UserError, match=message) as refused:
        convert(source, str(tmp_path / "out"), device="cpu")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    if "divide" in message:
        assert message in plan(source).reason
        return
    with pytest.raises(UserError, match=message):
        plan(source)


def test_info_says_why_not(tmp_path):
    source = make_source(tmp_path)
    assert info(source)["supported"]
    add("score.weight", 2, 48)(source)
    described = info(source)
    assert not described["supported"] and "only language models" in described["reason"]


@pytest.mark.parametrize("name", ["decoder alone, tied", "buffers", "shards", "tied, another head stored"])
def test_plan_from_headers_on_the_hub(tmp_path, monkeypatch, name):
    source = Path(make(tmp_path / "source", name))

    def header(file):
        with safe_open(file, framework="np") as shard:
            views = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118 - not a dict
            return SimpleNamespace(
                tensors={key: SimpleNamespace(shape=view.get_shape(), dtype=view.get_dtype()) for key, view in views.items()}
            )

    headers = SimpleNamespace(files_metadata={file.name: header(file) for file in source.glob("*.safetensors")})
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda *_, **__: headers)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, file, **__: str(source / file))

    def listed(*_arguments, **_options):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file.name) for file in source.iterdir()])

    monkeypatch.setattr("huggingface_hub.model_info", listed)
    assert plan("org/name") == plan(str(source))
    adapter(source)
    with pytest.raises(UserError, match="org/name is an adapter"):
        plan("org/name")


def test_healed_output_of_another_layout(tmp_path):
    """An output that was saved again as a decoder alone is healed to one with the model's own names."""
    source = make_source(tmp_path / "source", tie_word_embeddings=True)
    out = str(tmp_path / "out")
    convert(source, out, kv_lora_rank=24, qk_rope_head_dim=8, calibration_tokens=512, steps=0, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model.model.save_pretrained(out)
    trained = {name: p.detach() + 1 for name, p in model.named_parameters() if ".o_proj." in name}
    save_file({name: trained.get(name, p) for name, p in model.named_parameters() if ".self_attn." in name}, tmp_path / BEST)
    training = Training("attention", steps=1, rate=1e-3, micro=1, accumulated=1, seed=0, patience=1)
    healed = library_model(write_trained(match_model(open_checkpoint(out)), tmp_path, training), torch.float32)[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(healed.get_parameter(name), trained.get(name, parameter)), name
