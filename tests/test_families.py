"""What holds for one family holds for all: caches, paths, adapters, half precision, saving, and the fold of QK-norm."""

import json

import pytest
import torch
from conftest import make_mla, make_source, without_hf_mla
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import hf_mla
from hf_mla import MLACache, attention_mla, cache_bytes, cache_of
from hf_mla.cache_mla import CACHE_NAME
from hf_mla_conversion import UserError
from hf_mla_conversion.commands.plan import make_plan
from hf_mla_conversion.mathematics.closed_form import convert_attention, mla_config
from hf_mla_conversion.mathematics.moments import LayerMoments
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.families import FAMILIES


SLIDING = {"use_sliding_window": True, "max_window_layers": 1}  # of two layers, the second


def measure(model, ids):
    """Moments of all layers: of the inputs as they are, of the gradients arbitrary ones."""
    inputs = []
    handles = [layer.self_attn.k_proj.register_forward_pre_hook(lambda _, a: inputs.append(a[0])) for layer in model.model.layers]
    model(ids)
    for handle in handles:
        handle.remove()
    moments = []
    for x in inputs:
        factors = torch.randn(2, *[model.model.layers[0].self_attn.k_proj.out_features] * 2, dtype=torch.float64)
        keys, values = factors @ factors.mT
        moments.append(LayerMoments(torch.einsum("bti,btj->ij", x, x) / x.shape[:2].numel(), keys, values))
    return moments


@torch.no_grad()
def convert_model(model, rank, rope_dim, qk_norm="exact"):
    """A model of Transformers in closed form, in memory."""
    moments = measure(model, torch.randint(3, 4096, (4, 128)))
    config = mla_config(model.config, rank, rope_dim, "float64", qk_norm)
    assert config.attention_bias == any("attn" in name and "bias" in name for name in model.state_dict())
    mla = getattr(hf_mla, f"{FAMILIES[model.config.model_type].mla}ForCausalLM")(config).double().eval()
    copied = {name: tensor for name, tensor in model.state_dict().items() if "self_attn" not in name}
    left_out, left_over = mla.load_state_dict(copied, strict=False)
    assert not left_over and all("self_attn" in name for name in left_out)
    for original, layer, moment in zip(model.model.layers, mla.model.layers, moments, strict=True):
        layer.self_attn, _ = convert_attention(original.self_attn, moment, config)
    assert mla.state_dict().keys() == type(mla)(config).state_dict().keys()
    return mla


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).double().eval()  # buffers, too


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@torch.no_grad()
def test_only_position_is_lost_at_full_rank(tmp_path, unrounded, family):
    """With all tokens at place 0 RoPE does nothing, and heads that share no rotary key are exact too, biases included."""
    changes = {"attention_bias": True} if family == "Llama" else {}
    original = load(make_source(tmp_path, family, dtype=torch.float64, **changes))
    converted = convert_model(original, rank=48, rope_dim=8)
    ids = torch.randint(3, 4096, (2, 40))
    place = {"position_ids": torch.zeros_like(ids), "attention_mask": torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()}
    expected = original(ids, **place).logits
    assert (converted(ids, **place).logits - expected).abs().max() < 1e-9
    assert (converted(ids).logits - original(ids).logits).abs().max() > 1e-3  # else nothing would have been shown


@torch.no_grad()
def test_folded_norms_are_their_means(tmp_path, unrounded):
    """The variant "fold" is the original with every norm replaced by a factor, here measured on queries and keys themselves."""
    original = load(make_source(tmp_path, "Qwen3", dtype=torch.float64, num_key_value_heads=1))
    torch.manual_seed(1)
    converted = convert_model(original, 16, 16, qk_norm="fold")
    assert converted.config.num_key_norms == 0
    assert "model.layers.0.self_attn.k_proj.weight" not in converted.state_dict()
    torch.manual_seed(1)
    text = torch.randint(3, 4096, (4, 128))  # what `convert_model` measured
    norms = [norm for layer in original.model.layers for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm)]
    squares = {}

    def watch(norm, args):
        squares[norm] = args[0].square().mean((0, 1, 3))  # [heads]

    handles = [norm.register_forward_pre_hook(watch) for norm in norms]
    original(text)
    for handle in handles:
        handle.remove()
    for norm in norms:
        mean = (squares[norm] + norm.variance_epsilon).rsqrt()
        norm.forward = lambda x, mean=mean, norm=norm: x * mean.unsqueeze(-1) * norm.weight
    ids = torch.randint(3, 4096, (2, 64))
    assert (converted(ids).logits - original(ids).logits).abs().max() < 1e-9


def test_library_norms_agree_to_float32(tmp_path):
    """The exact form of QK-norm against the library as it is, which rounds norms to float32."""
    original = load(make_source(tmp_path, "Qwen3", dtype=torch.float64, num_key_value_heads=1))
    ids = torch.randint(3, 4096, (2, 64))
    with torch.no_grad():
        assert (convert_model(original, 16, 16)(ids).logits - original(ids).logits).abs().max() < 1e-5


MODELS = {  # every family with each of its quirks
    "Llama": ("Llama", {"attention_bias": True}),
    "Mistral": ("Mistral", {"sliding_window": 8}),
    "Mistral without a window": ("Mistral", {"sliding_window": None}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, window in one layer": ("Qwen2", SLIDING | {"sliding_window": 8}),
    "Qwen3 exact": ("Qwen3", {"num_key_norms": 2}),
    "Qwen3 exact, window in one layer": ("Qwen3", SLIDING | {"sliding_window": 8, "num_key_norms": 2}),
    "Qwen3 exact, biases": ("Qwen3", {"num_key_norms": 2, "attention_bias": True}),
    "Qwen3 fold": ("Qwen3", {}),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "changes"), MODELS.values(), ids=MODELS)
def test_generate_gives_the_same_tokens_from_every_cache(family, changes, implementation):
    model = make_mla(family, attn_implementation=implementation, **changes)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    ids = torch.randint(1, 97, (3, 12))
    padded = torch.ones_like(ids)
    padded[1, :5] = 0
    for mask in (torch.ones_like(ids), padded):
        inputs = {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask, **options}
        expected = model.generate(**inputs, use_cache=False)
        assert torch.equal(model.generate(**inputs), expected)
        assert torch.equal(model.generate(**inputs, cache_implementation="static"), expected)
        for cache in (MLACache(model.config), MLACache(model.config, 40), DynamicCache()):
            assert torch.equal(model.generate(**inputs, **{CACHE_NAME: cache}), expected), cache
    beams = {"input_ids": ids, "num_beams": 3, **options}
    assert torch.equal(model.generate(**beams), model.generate(**beams, use_cache=False))


@pytest.mark.parametrize(("family", "changes"), MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_absorbed_equals_expanded(family, changes, monkeypatch):
    model, taken = make_mla(family, **changes), []
    decide = attention_mla.should_absorb
    monkeypatch.setattr(attention_mla, "should_absorb", lambda *a: taken.append(decide(*a)) or taken[-1])
    ids = torch.randint(1, 97, (2, 40))
    expected = model(ids, use_cache=False).logits
    cache = cache_of(model(ids[:, :20]))
    parts = [model(part, cache=cache).logits for part in ids[:, 20:].split(2, dim=1)]
    assert (torch.cat(parts, 1) - expected[:, 20:]).abs().max() < 1e-5
    assert taken == [False] * 2 + [True] * 20


@pytest.mark.parametrize("target", [["kv_b_proj"], "all-linear"], ids=str)
@torch.no_grad()
def test_adapters_take_part_in_both_paths(target):
    model = get_peft_model(
        make_mla("Qwen3", num_key_norms=2), LoraConfig(r=4, target_modules=target, init_lora_weights=False)
    ).eval()
    ids = torch.randint(1, 97, (2, 40))
    expected = model(ids, use_cache=False).logits
    cache = cache_of(model(ids[:, :30]))
    parts = [model(part, cache=cache).logits for part in ids[:, 30:].split(1, dim=1)]
    assert (torch.cat(parts, 1) - expected[:, 30:]).abs().max() < 1e-4
    with model.disable_adapter():
        assert (model(ids, use_cache=False).logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_window_without_a_mask_is_left_to_the_kernel():
    """FlashAttention gets no mask over the window: only a cache that holds no more than the window may be absorbed."""
    attention = make_mla("Mistral", sliding_window=8).model.layers[0].self_attn
    mask = torch.ones(1, 64)
    assert attention_mla.should_absorb(attention, 1, 1, 8, None) and attention_mla.should_absorb(attention, 1, 1, 8, mask)
    assert not attention_mla.should_absorb(attention, 1, 1, 64, None) and not attention_mla.should_absorb(attention, 1, 1, 64, mask)
    assert attention_mla.should_absorb(attention, 1, 1, 64, mask[None, None].bool())


@pytest.mark.parametrize(("family", "changes"), MODELS.values(), ids=MODELS)
def test_cache_holds_what_the_configuration_says(family, changes):
    model = make_mla(family, **changes)
    config = model.config
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    cache = cache_of(model.generate(torch.randint(1, 97, (2, 10)), **options))
    for layer, held in zip(model.model.layers, cache.layers, strict=True):
        window = layer.self_attn.sliding_window
        tokens = 39 if window is None else window - 1
        assert held.keys.shape == (2, 1, tokens, config.kv_floats_per_token_per_layer)
        assert held.values.numel() == 0
    if not any(layer.self_attn.sliding_window for layer in model.model.layers):
        assert cache_bytes(cache) == 2 * 39 * config.kv_bytes_per_token(itemsize=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_key_norms_in_half_precision(dtype):
    model = make_mla("Qwen3", num_key_norms=2)
    ids = torch.randint(1, 97, (2, 40))
    expected = model(ids).logits.softmax(-1)
    model.to(dtype)
    cache = cache_of(model(ids[:, :30]))
    assert cache.layers[0].keys.dtype == dtype
    decoded = [model(part, cache=cache).logits for part in ids[:, 30:].split(1, dim=1)]
    for logits in (model(ids).logits[:, 30:], torch.cat(decoded, 1)):
        assert (logits.float().softmax(-1) - expected[:, 30:]).abs().max() < 0.05


@pytest.mark.parametrize(("family", "changes"), MODELS.values(), ids=MODELS)
def test_configuration_round_trip(family, changes, tmp_path):
    model = make_mla(family, **changes)
    model.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(model.config)
    for key, value in changes.items():
        assert getattr(again, key) == value
    for key in ("kv_lora_rank", "qk_nope_head_dim", "attention_bias", "num_key_norms", "head_dim", "base_model_tp_plan"):
        assert getattr(again, key) == getattr(model.config, key), key
    assert "base_model_tp_plan" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


# Prints logits and tokens for the caller to compare.
WITHOUT_HF_MLA = """
import torch
from transformers import AutoModel, AutoModelForCausalLM
ids, seen = torch.arange(1, 13).unsqueeze(0), {"auto", "llama"}  # `layer_mla.py` takes two functions of Llama's
for folder in sys.argv[1:]:
    for path in (folder, folder + "-again"):
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules")
        AutoModel.from_pretrained(path, trust_remote_code=True)
        print(repr((type(model).__name__, model(ids).logits[0, -1, :5].tolist(), model.generate(ids, max_new_tokens=8).tolist())))
        if path == folder:
            model.save_pretrained(folder + "-again")
    seen.add(model.config.model_type.removesuffix("_mla"))
    imported = {name.split(".")[2] for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name}
    assert imported == seen, imported  # no other family, so it need not be in this Transformers
"""


def test_every_family_loads_where_hf_mla_is_not_installed(tmp_path):
    folders, expected, ids = [], [], torch.arange(1, 13).unsqueeze(0)
    for family, changes in (MODELS[name] for name in ("Llama", "Mistral", "Qwen2", "Qwen3 exact", "Qwen3 fold")):
        model = make_mla(family, **changes)
        folders.append(str(tmp_path / f"model-{len(folders)}"))
        model.save_pretrained(folders[-1])
        logits, tokens = model(ids).logits[0, -1, :5].tolist(), model.generate(ids, max_new_tokens=8).tolist()
        expected += [repr((f"{family}MLAForCausalLM", logits, tokens))] * 2
    assert without_hf_mla(tmp_path, WITHOUT_HF_MLA, *folders) == expected


@pytest.mark.parametrize(
    ("family", "changes", "qk_norm", "floats"),
    [
        ("Llama", {"attention_bias": True}, "exact", 32),
        ("Mistral", {}, "exact", 32),
        ("Qwen2", {}, "exact", 32),
        ("Qwen3", {}, "exact", 34),
        ("Qwen3", {"attention_bias": True}, "exact", 34),
        ("Qwen3", {}, "fold", 32),
    ],
)
def test_plan_counts_every_number(tmp_path, family, changes, qk_norm, floats):
    path = make_source(tmp_path, family, **changes)
    plan = make_plan(open_checkpoint(path, None), 24, 8, "auto", qk_norm)
    config = mla_config(AutoConfig.from_pretrained(path), 24, 8, "float32", qk_norm)
    model = getattr(hf_mla, f"{family}MLAForCausalLM")(config)
    assert plan.kv_floats_per_token_per_layer.converted == config.kv_floats_per_token_per_layer == floats
    assert plan.kv_bytes_per_token.converted == config.kv_bytes_per_token(itemsize=4)
    assert plan.bytes_written == 4 * sum(tensor.numel() for tensor in model.state_dict().values())


@pytest.mark.parametrize(("family", "missing"), [("Qwen2", "k_proj.bias"), ("Qwen3", "q_norm.weight")])
def test_missing_biases_and_norms_are_refused(tmp_path, family, missing):
    from safetensors.torch import load_file, save_file

    path = make_source(tmp_path, family)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.self_attn.{missing}"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"has no tensor model.layers.1.self_attn.{missing}"):
        make_plan(open_checkpoint(path, None), 24, 8, "auto")


def test_unknown_variant_of_qk_norm_is_refused(tmp_path):
    config = AutoConfig.from_pretrained(make_source(tmp_path, "Qwen3"))
    with pytest.raises(UserError, match="allowed: exact, fold"):
        mla_config(config, 24, 8, "float32", "drop")
