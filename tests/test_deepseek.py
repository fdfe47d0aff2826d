"""Export to DeepSeek-V3's layout, against the class that Transformers has for it, which knows nothing of ours."""

import json
import lzma
import math
from pathlib import Path

import pytest
import torch
from conftest import LLAMA3_ROPE, MODEL, VALIDATION, make_mla, make_source
from safetensors import safe_open
from test_cli import run
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_mla.cache_mla import CACHE_NAME
from hf_mla_conversion import UserError, export, plan
from hf_mla_conversion.mathematics.closed_form import IDENTITY_NORM_EPS, IDENTITY_NORM_WEIGHT, keep_closed_form
from hf_mla_conversion.output.deepseek import DeepseekV3Export, engine_refusals, has_plain_frequencies, refusal, widths_of
from hf_mla_conversion.output.reports import Widths
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.matching import match_model
from hf_mla_conversion.source.shards import ShardWriter


EXPORT_KEYS = {"format", "tensors", "bytes_written", "padded", "refused", "output"}
DEEPSEEK = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
SMALL = {"kv_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64}
NARROW_HEADS = DEEPSEEK | {"kv_lora_rank": 128, "qk_nope_head_dim": 80, "v_head_dim": 48}
UNSCALED = LLAMA3_ROPE | {"original_max_position_embeddings": 1 << 30}  # no wave is as long as that
IDS = torch.randint(3, 4096, (2, 48), generator=torch.Generator().manual_seed(1))


def closed_form(model, *layers):
    """Make the norms of some layers the identity, as where no step improved them."""
    for layer in layers:
        attention = model.model.layers[layer].self_attn
        attention.kv_a_layernorm.weight.data.fill_(IDENTITY_NORM_WEIGHT)
        keep_closed_form(attention, model.config.kv_a_layernorm_eps)
        attention.kv_a_layernorm.weight.data *= torch.empty(model.config.kv_lora_rank).uniform_(0.9, 1.1)  # a training may follow


def make_converted(folder, family="Llama", kept=(), dtype=torch.float32, **changes):
    """Save a random model with MLA as a conversion leaves it; `kept`: layers in closed form."""
    model = make_mla(family, **({"hidden_size": 48, "vocab_size": 4096} | changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    if model.config.kv_a_layernorm_eps == IDENTITY_NORM_EPS:
        for layer in model.model.layers:
            layer.self_attn.kv_a_layernorm.weight.data.fill_(IDENTITY_NORM_WEIGHT)
    closed_form(model, *kept)
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return str(folder)


def deepseek(folder, dtype):
    """An exported model, as Transformers has it."""
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert type(model) is DeepseekV3ForCausalLM
    assert not any(loading.values()), loading
    return model.eval()


def weights(folder):
    """All tensors of a checkpoint in one file."""
    with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def as_engines_read(model):
    """Their norm on the latent has the epsilon that the configuration says; the library's has 1e-6 in any case."""
    for layer in model.model.layers:
        layer.self_attn.kv_a_layernorm.variance_epsilon = model.config.rms_norm_eps
    return model


CASES = {
    "512 + 64": ("Llama", DEEPSEEK, "auto"),
    "128 + 32": ("Llama", SMALL, "auto"),
    "128 + 32, padded": ("Llama", SMALL, "engine"),
    "tied, epsilon 1e-5": ("Llama", SMALL | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}, "auto"),
    "narrow, padded": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}, "engine"),
    "Qwen3 fold": ("Qwen3", SMALL, "engine"),
    "Mistral, a window as long as the context": ("Mistral", {"sliding_window": 64, "max_position_embeddings": 64}, "auto"),
    "Llama 3, with no frequency scaled": ("Llama", {"rope_parameters": UNSCALED}, "auto"),
    "a layer in closed form": ("Llama", SMALL | {"rms_norm_eps": 1e-5, "kept": [1]}, "auto"),
    "a layer in closed form, padded": ("Llama", SMALL | {"kept": [0]}, "engine"),
    "closed form": ("Llama", SMALL | {"rms_norm_eps": 1e-5, "kv_a_layernorm_eps": IDENTITY_NORM_EPS}, "auto"),
    "closed form, padded": ("Qwen3", {"kv_a_layernorm_eps": IDENTITY_NORM_EPS}, "engine"),
}


@pytest.mark.parametrize(("family", "changes", "pad"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_the_librarys_own_class_gives_the_same_logits(tmp_path, family, changes, pad):
    out = make_converted(tmp_path / "out", family, **changes)
    report = export(out, str(tmp_path / "dest"), format="deepseek_v3", pad=pad)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    exported = deepseek(tmp_path / "dest", torch.float32)
    if pad == "engine":
        assert vars(report.padded) == DEEPSEEK
    assert {name: getattr(exported.config, name) for name in DEEPSEEK} == vars(report.padded)
    expected = model(IDS).logits
    assert expected.std() > 0.3
    assert (exported(IDS).logits - expected).abs().max() < 3e-5
    cache = DynamicCache(config=exported.config)
    for index in range(40, 48):  # token by token, through the cache
        step = exported(IDS[:, :40] if index == 40 else IDS[:, index - 1 : index], **{CACHE_NAME: cache})
        assert (step.logits[:, -1] - expected[:, index - 1]).abs().max() < 3e-5
    assert cache.layers[0].keys.shape[-1] + cache.layers[0].values.shape[-1] == report.kv_floats_per_token_per_layer.converted
    tokens = [each.generate(IDS[:, :8], max_new_tokens=24, do_sample=False, eos_token_id=[]) for each in (model, exported)]
    assert torch.equal(*tokens)
    assert (as_engines_read(exported)(IDS).logits - expected).abs().max() < 3e-5


@pytest.mark.parametrize(("changes", "pad"), [(SMALL, "auto"), (NARROW_HEADS, "engine")], ids=["as it is", "padded"])
@torch.no_grad()
def test_exact_in_float64(tmp_path, monkeypatch, changes, pad):
    def forward(self, hidden_states):  # the library's rounds to float32 on the way
        return self.weight * hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for norm in (DeepseekV3RMSNorm, LlamaRMSNorm):
        monkeypatch.setattr(norm, "forward", forward)
    out = make_converted(tmp_path / "out", dtype=torch.float64, **changes)
    export(out, str(tmp_path / "dest"), format="deepseek_v3", pad=pad)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).eval()
    assert (deepseek(tmp_path / "dest", torch.float64)(IDS).logits - model(IDS).logits).abs().max() < 1e-10


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_bfloat16_weights_are_bit_equal(tmp_path, eps):
    """But for the order of rotary rows, and latents by a power of two where the source has another epsilon than its latents."""
    out = make_converted(tmp_path / "out", dtype=torch.bfloat16, tie_word_embeddings=True, rms_norm_eps=eps)
    export(out, str(tmp_path / "dest"), format="deepseek_v3")
    before, after = weights(out), weights(tmp_path / "dest")
    assert torch.equal(after.pop("lm_head.weight"), before["model.embed_tokens.weight"])
    assert after.keys() == before.keys()
    rotary = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # of 8
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        if "q_proj" in name:
            heads = tensor.view(4, 24, 48)
            tensor = torch.cat([heads[:, :16], heads[:, 16 + rotary]], dim=1).flatten(0, 1)
        if "kv_a_proj_with_mqa" in name:
            tensor = torch.cat([tensor[:24] * {1e-6: 1, 1e-5: 4}[eps], tensor[24 + rotary]])
        assert torch.equal(after[name], tensor), name
    assert json.loads((tmp_path / "dest" / "config.json").read_text())["rms_norm_eps"] == eps


REFUSALS = {
    "biases of Qwen2": ("Qwen2", {}, "the attention has biases"),
    "biases of the attention": ("Llama", {"attention_bias": True}, "the attention has biases"),
    "biases of the MLP": ("Llama", {"mlp_bias": True}, "the MLP has biases"),
    "exact norms": ("Qwen3", {"num_key_norms": 2}, "2 more cached numbers; convert with --qk-norm fold"),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}, "rope type llama3 scales the frequencies"),
    "linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "rope type linear scales the frequencies",
    ),
    "yarn": (
        "Llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}},
        "rope type yarn scales the frequencies",
    ),
    "no yarn any more": ("Llama", {"source_rope_dim": 8, "source_rope_factor": 1.2}, "weights hold the factor of a RoPE"),
    "window": ("Mistral", {"sliding_window": 16}, "attention slides over 16 of 131,072 tokens"),
    "window of some layers": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "attention slides over 16 of 32,768 tokens",
    ),
    "another activation": ("Llama", {"hidden_act": "gelu"}, "activation is gelu; the layout has only silu"),
    "closed form in float16": (
        "Llama",
        {"kv_a_layernorm_eps": IDENTITY_NORM_EPS, "dtype": torch.float16},
        "closed form and in float16",
    ),
}


@pytest.mark.parametrize(("family", "changes", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_what_the_layout_cannot_hold(tmp_path, capsys, family, changes, reason):
    out = make_converted(tmp_path / "out", family, **changes)
    words = ["export", out, tmp_path / "dest", "--format", "deepseek_v3"]
    code, printed, errors = run(capsys, *words)
    assert (code, printed, len(errors)) == (2, "", 1)
    assert f"{out} cannot be exported as deepseek_v3: " in errors[0]
    assert reason in errors[0]
    code, printed, _ = run(capsys, *words, "--json")
    result = json.loads(printed)
    assert code == 2
    assert reason in result["refused"]
    assert result["output"] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_frequency_that_is_not_scaled_is_no_reason():
    linear = {"rope_type": "linear", "rope_theta": 1e4}
    for rope, plain in (
        (linear | {"factor": 1.0}, True),
        (linear | {"factor": 1.5}, False),
        (UNSCALED, True),
        (LLAMA3_ROPE, False),
    ):
        config = make_mla(rope_parameters=rope).config
        assert has_plain_frequencies(config) is plain
        assert (refusal(config) is None) is plain


@pytest.mark.parametrize(
    ("widths", "vllm", "sglang"),
    [
        ((512, 64, 128, 128), True, True),
        ((512, 64, 64, 64), False, True),
        ((448, 64, 128, 128), True, True),
        ((256, 64, 128, 128), True, False),
        ((256, 32, 128, 128), False, True),
        ((128, 32, 64, 64), False, False),
        ((44, 16, 32, 32), False, True),
        ((512, 128, 128, 128), False, False),
    ],
)
def test_which_widths_engines_take(widths, vllm, sglang):
    refused = engine_refusals(Widths(*widths))
    assert {name: reason is None for name, reason in refused.items()} == {"vllm": vllm, "sglang": sglang}
    assert all(("--pad engine" in reason) is (widths[1] <= 64) for reason in refused.values() if reason)


@torch.no_grad()
def test_a_trained_conversion(tmp_path, converted, capsys, caplog):
    """From the command line: what is printed and written, and that it predicts text as before."""
    words = ["export", converted[0], tmp_path / "dest", "--format", "deepseek_v3"]
    code, printed, errors = run(capsys, *words, "--json")
    result = json.loads(printed)
    assert (code, errors) == (0, [])
    assert set(result) >= EXPORT_KEYS
    assert (result["format"], result["refused"]) == ("deepseek_v3", None)
    assert result["padded"] == {"kv_lora_rank": 44, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
    written = open_checkpoint(str(tmp_path / "dest"))
    assert (result["tensors"], result["bytes_written"]) == (len(written.tensors), written.bytes)
    assert not list((tmp_path / "dest").glob("*.py"))
    card = (tmp_path / "dest" / "README.md").read_text()
    assert "trust_remote_code" not in card
    assert 'from_pretrained("dest")' in card
    assert "The cache holds 60 numbers per token and layer" in card
    record = json.loads((tmp_path / "dest" / "conversion.json").read_text())
    assert record["export"]["report"] == result
    assert record["recipe"] == json.loads((Path(converted[0]) / "conversion.json").read_text())["recipe"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dest")
    with lzma.open(VALIDATION, "rt") as file:
        ids = tokenizer(file.read(4000), return_tensors="pt")["input_ids"][:, :512]
    models = (
        AutoModelForCausalLM.from_pretrained(converted[0], dtype=torch.float32).eval(),
        deepseek(tmp_path / "dest", torch.float32),
    )
    losses = [model(ids, labels=ids).loss.item() for model in models]
    assert math.isclose(*losses, rel_tol=1e-5)
    assert losses[0] < 5

    code, printed, errors = run(capsys, *words)  # there is something already
    assert (code, printed, len(errors)) == (2, "", 1)
    assert "--overwrite" in errors[0]
    code, printed, errors = run(capsys, *words, "--overwrite", "--pad", "engine")
    assert code == 0
    assert "caches 576 numbers a token and layer, the source 192: nothing is saved; --pad auto caches 60" in caplog.text
    assert "latent 512, rotary key 64, heads 128 and 128" in printed
    assert "60 -> 576 numbers" in printed
    assert "vLLM's own class           takes these widths" in printed


def test_what_cannot_be_asked_for(tmp_path, converted):
    dest = str(tmp_path / "dest")
    for wrong, message in (
        ({"format": "safetensors"}, "--format is safetensors; allowed: deepseek_v3"),
        ({"pad": "wide"}, "--pad is wide; allowed: auto, engine"),
        ({"out": MODEL}, "is a 'llama', not a converted model; convert it first"),
        ({"dest": converted[0]}, "choose another output folder"),
    ):
        with pytest.raises(UserError, match=message):
            export(**({"out": converted[0], "dest": dest, "format": "deepseek_v3"} | wrong))
    assert list(tmp_path.iterdir()) == []
    export(converted[0], dest, format="deepseek_v3")
    with pytest.raises(UserError, match="is a 'deepseek_v3' already; there is nothing to export"):
        export(dest, str(tmp_path / "again"), format="deepseek_v3")


def test_nothing_half_written(tmp_path, monkeypatch):
    """What was there stays, and where nothing was nothing is left, when the disk is full at the second of several shards."""
    out = make_converted(tmp_path / "out")
    export(out, str(tmp_path / "there"), format="deepseek_v3")
    before = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}

    class FullDisk(ShardWriter):
        def __init__(self, folder, tensors):
            super().__init__(folder, tensors, shard_bytes=1 << 18)

        def _write_shard(self, path, names, read):
            if "00002" in path.name:
                raise OSError(28, "No space left on device")
            super()._write_shard(path, names, read)

    monkeypatch.setattr("hf_mla_conversion.commands.export.ShardWriter", FullDisk)
    for dest in ("there", "new"):
        with pytest.raises(UserError, match="No space left on device; nothing is kept"):
            export(out, str(tmp_path / dest), format="deepseek_v3", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "there"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == before


@torch.no_grad()
def test_settings_of_generate(tmp_path):
    """They come along, but for a cache of quantized latents, which only our classes have."""
    out = make_converted(tmp_path / "out")
    settings = {"eos_token_id": [1, 7], "temperature": 0.7, "do_sample": True}
    cache = {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}}
    for more in ({}, cache):
        (tmp_path / "out" / "generation_config.json").write_text(json.dumps(settings | more))
        export(out, str(tmp_path / "dest"), format="deepseek_v3", overwrite=True)
        assert json.loads((tmp_path / "dest" / "generation_config.json").read_text()) == settings
    deepseek(tmp_path / "dest", torch.float32).generate(IDS, max_new_tokens=2)


def test_tensors_come_one_by_one(tmp_path):
    """In order, as the headers announce them, with widths of one's own."""
    checkpoint = match_model(open_checkpoint(make_converted(tmp_path / "out", kept=[1])))
    exported = DeepseekV3Export(checkpoint, widths_of(checkpoint.config, Widths(32, 12, 16, 20)))
    assert exported.identity == [False, True]
    shapes = {name: tuple(tensor.shape) for name, tensor in exported.tensors()}
    assert shapes == {name: header.shape for name, header in exported.headers.items()}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (4 * 28, 48)
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == (44, 48)
    assert shapes["model.layers.0.self_attn.kv_b_proj.weight"] == (4 * 36, 32)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (48, 80)


def test_plan_and_convert_say_what_can_be_exported(tmp_path, capsys, converted):
    assert plan(MODEL).exports["deepseek_v3"] is converted[1].exports["deepseek_v3"] is None
    assert "its tokenizer splits text in a way" in converted[1].exports["gguf"]  # which `plan` does not look at
    assert plan(MODEL).engine_kv_floats_per_token_per_layer == 576
    code, printed, _ = run(capsys, "plan", MODEL)
    assert code == 0
    assert "; --pad engine would cache 576 numbers, the source 192: nothing saved" in printed
    source = make_source(tmp_path / "source", "Qwen3", num_key_value_heads=4, head_dim=128)
    assert "--qk-norm fold" in plan(source).exports["deepseek_v3"]
    assert plan(source).engine_kv_floats_per_token_per_layer is None
    assert plan(source, qk_norm="fold").exports["deepseek_v3"] is None
    code, printed, _ = run(capsys, "plan", source, "--qk-norm", "fold")
    assert printed.splitlines()[-1].split()[:2] == ["export", "deepseek_v3;"]
    assert "nothing saved" not in printed
    code, printed, _ = run(capsys, "plan", make_source(tmp_path / "rope", rope_parameters=LLAMA3_ROPE))
    assert "not as deepseek_v3: rope type llama3 scales the frequencies" in printed


@torch.no_grad()
def test_closed_form_in_bfloat16(tmp_path):
    """Latents and, where the source has another epsilon than 1e-6, all that adds to the residual stream are rounded again."""
    changes = {"dtype": torch.bfloat16, "rms_norm_eps": 1e-5, "kv_a_layernorm_eps": IDENTITY_NORM_EPS}
    out = make_converted(tmp_path / "out", **changes)
    export(out, str(tmp_path / "dest"), format="deepseek_v3")
    expected = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(IDS).logits
    change = deepseek(tmp_path / "dest", torch.float32)(IDS).logits - expected
    rounded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()(IDS).logits - expected
    assert 0 < change.std() < rounded.std()  # less than computing in bfloat16 does
