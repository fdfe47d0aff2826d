"""Absorbed decoding for the library's own MLA models, against themselves: tiny random models of every type, in float64."""

import copy
import functools
import importlib.util
from types import SimpleNamespace
from unittest import mock

import accelerate
import pytest
import torch
import transformers
from conftest import make_mla
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

import hf_mla
from hf_mla import MLACache, attention_mla, cache_of
from hf_mla.attention_mla import absorbed_attention
from hf_mla.cache_mla import CACHE_NAME, QUANTIZATIONS, dequantize, quantize
from hf_mla.configuration_mla import release
from hf_mla.native_mla import text_config


VERSION = release(transformers.__version__)
SHAPE = {"vocab_size": 98, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 512}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 32}
SHAPE |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
EXPERTS |= {"n_group": 1, "topk_group": 1}
MIXED = EXPERTS | {"mlp_layer_types": ["dense", "sparse", "sparse"]}
LOCAL = {"moe_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
SPARSE = MIXED | {"index_topk": 6, "index_head_dim": 16, "index_n_heads": 2, "head_dim": 8}  # six tokens are attended to
SHARED = {"indexer_types": ["full", "shared", "full"]}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
LINEAR = {"linear_head_dim": 16, "linear_num_heads": 4}
WINDOW = {"sliding_window": 8, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 28}
WINDOW |= {"swa_kv_lora_rank": 20, "swa_head_dim": 18, "swa_qk_nope_head_dim": 12, "swa_v_head_dim": 8}
TYPES = {
    "axk1": MIXED | {"rope_parameters": YARN},
    "axk2": SPARSE | {"gated_norm_rank": 4},
    "bailing_hybrid": LOCAL
    | {"n_group": 1, "topk_group": 1, "head_dim": 16, "layer_group_size": 3, "first_k_dense_replace": 1}
    | {"num_mtp_layers": 0},
    "deepseek_v2": EXPERTS | {"q_lora_rank": None, "first_k_dense_replace": 1, "rope_parameters": YARN},
    "deepseek_v3": EXPERTS | {"first_k_dense_replace": 1, "rope_parameters": YARN},
    "deepseek_v32": SPARSE,
    "dots3_note": SPARSE | WINDOW | {"shared_experts_intermediate_size": 32, "head_dim": 20},
    "glm4_moe_lite": MIXED,
    "glm5_next": SPARSE
    | LINEAR
    | {"qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 2}
    | {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "glm_moe_dsa": SPARSE | SHARED,
    "hy_v4": SPARSE | SHARED | {"head_dim": 20, "learnable_sink_init": 0.7},
    "kimi_linear": LOCAL
    | LINEAR
    | {"mlp_layer_types": ["dense", "sparse", "sparse"]}
    | {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 32, "n_routed_experts": 4, "zero_expert_num": 2}
    | {"moe_topk": 2, "num_layers": 2, "head_dim": 8},
    "minicpm3": {"dim_model_base": 64},
    "mistral4": EXPERTS
    | {"first_k_dense_replace": 1}
    | {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}},
    "mistral_large4": SPARSE
    | {"num_hidden_layers": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
    | {"no_rope_layers": [1, 0, 1, 1], "kv_source_layers": [0, 1, 0, 3], "indexer_types": ["full", "full", "full", "shared"]},
    "youtu": {},
}
VISION = {
    "glm5_next": {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 16}
    | {"projection_intermediate_size": 16},
    "mistral_large4": {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"intermediate_size": 16, "head_dim": 8},
}  # fmt: skip
REFUSED = {name for name, settings in TYPES.items() if "index_topk" in settings and VERSION < (5, 17)}

LENGTH, PROMPT = 22, 11
IDS = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(2, LENGTH, dtype=torch.long)
PADDED[0, :4] = 0


def config_and_class(name):
    """The configuration of a tiny model, and the class of the model."""
    if importlib.util.find_spec(f"transformers.models.{name}") is None:
        pytest.skip(f"this Transformers has no {name}")
    configs = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    models = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    settings = SHAPE | TYPES[name]
    if name == "longcat_flash":  # it has other names for these
        del settings["num_hidden_layers"], settings["intermediate_size"]
    if name in VISION:
        (config_class,) = (n for n in configs.__all__ if n.endswith("Config") and not n.endswith(("TextConfig", "VisionConfig")))
        config = getattr(configs, config_class)(text_config=settings, vision_config=VISION[name])
        head = "ForConditionalGeneration"
    else:
        classes = [n for n in configs.__all__ if n.endswith("TextConfig")] or [n for n in configs.__all__ if n.endswith("Config")]
        config, head = getattr(configs, classes[0])(**settings), "ForCausalLM"
    config._experts_implementation = "eager"
    return config, getattr(models, next(n for n in vars(models) if n.endswith(head)))


@functools.cache
def native(name):
    """A tiny model of the library, in which everything matters and nothing rounds to float32. Tests leave it as it is."""
    config, model_class = config_and_class(name)
    torch.manual_seed(0)
    model = model_class._from_config(config)
    for path, parameter in model.named_parameters():
        if parameter.ndim == 1 and path.endswith("norm.weight"):
            parameter.data.mul_(1 + 0.2 * torch.randn_like(parameter))
        elif parameter.ndim == 2 and "embed" not in path:
            parameter.data.normal_(std=1.2 * parameter.shape[-1] ** -0.5)
    for module in model.modules():
        kind = type(module).__name__
        if (
            kind.endswith("RMSNorm")
            and hasattr(module, "variance_epsilon")
            and not kind.endswith(("GatedRMSNorm", "UnweightedRMSNorm"))
        ):
            module.forward = functools.partial(norm, module)
    return model.double().eval()


def norm(module, hidden_states):
    """RMSNorm in the type of the model: the library's rounds to float32, which hides what is smaller than 1e-8."""
    return module.weight * (hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))


def absorbing(name, implementation=None):
    """The same model, which decodes over its latents."""
    model = copy.deepcopy(native(name))
    if implementation is None:
        hf_mla.absorb(model)
    else:
        model.set_attn_implementation(implementation)
    return model


@torch.no_grad()
def read(model, sizes, cache, mask=None, ids=IDS):
    """The logits of tokens that are read in steps of these sizes; those of padding left out."""
    parts, seen = [], 0
    for size in sizes:
        step = slice(seen, seen + size)
        extra = {}
        if mask is not None:
            extra["attention_mask"] = mask[:, : seen + size]
            extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, step]
        parts.append(model(ids[:, step], use_cache=True, **{CACHE_NAME: cache}, **extra).logits)
        seen += size
    logits = torch.cat(parts, dim=1)
    return logits if mask is None else logits[mask[:, :seen].bool()]


def ways(model):
    """Logits by each kind of cache."""
    steps = [PROMPT] + [1] * (LENGTH - PROMPT)
    return {
        "growing, left-padded": read(model, steps, DynamicCache(config=model.config), PADDED),
        "static, chunks": read(model, [PROMPT, 3, 3, 1, 2, 1], StaticCache(model.config, max_cache_len=40)),
    }


@pytest.mark.mode(
    'The library\'s own MLA models, `attn_implementation="hf_mla"`',
    since="5.15",
    costs="as for ours: keys and values are formed in prefill alone; sparse attention since 5.17",
)
@pytest.mark.parametrize("name", TYPES)
def test_equals_the_librarys_own(name):
    expected = ways(native(name))
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match="needs Transformers 5.17 or newer; this is 5"):
            absorbing(name)
        return
    model = absorbing(name)
    with mock.patch.object(attention_mla, "absorbed_attention", wraps=attention_mla.absorbed_attention) as absorbed:
        got = ways(model)
    layers = sum(hasattr(module, "kv_b_proj") for module in model.modules())
    assert absorbed.call_count == layers * (LENGTH - PROMPT + 5)  # at every step but prefill
    for kind, logits in expected.items():
        assert logits.std() > 0.3
        assert (got[kind] - logits).abs().max() < 1e-10, kind
    with mock.patch.object(attention_mla, "absorbed_attention", wrong):
        logits = read(model, [PROMPT, 1, 3], DynamicCache(config=model.config))
    assert (logits - read(native(name), [PROMPT, 1, 3], DynamicCache(config=model.config)))[:, PROMPT:].abs().amax() > 1e-6


def wrong(query_nope, *args, **kwargs):
    """Absorbed attention with a mistake; a test that does not see it sees nothing."""
    return absorbed_attention(query_nope * 1.01, *args, **kwargs)


def greedy(model, **settings):
    """What is generated of two prompts, one of them left-padded, and the cache."""
    ids = IDS[:, :PROMPT].masked_fill(PADDED[:, :PROMPT] == 0, 0)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | settings
    outputs = model.generate(ids, attention_mask=PADDED[:, :PROMPT], return_dict_in_generate=True, **settings)
    return outputs.sequences.tolist(), cache_of(outputs)


@pytest.mark.parametrize("name", [name for name in TYPES if name not in REFUSED])
def test_generates_the_same(name):
    """With the caches that `generate` makes; and all is as before once another implementation is set."""
    before, model = native(name), absorbing(name)
    for settings in {}, {"cache_implementation": "static"}:
        assert greedy(model, **settings)[0] == greedy(before, **settings)[0]
    layers = greedy(model)[1].layers
    assert all(type(layer) is not DynamicLayer for layer in layers)
    assert list(model.state_dict()) == list(before.state_dict())
    model.set_attn_implementation(text_config(before.config)._attn_implementation)
    sizes = [PROMPT, 1, 1]
    again, was = (read(each, sizes, DynamicCache(config=each.config)) for each in (model, before))
    assert torch.equal(again, was)


@pytest.mark.parametrize("base", ["eager", "sdpa", "mine"])
def test_the_base_can_be_named(base, monkeypatch):
    """Prefill is the base's, with its mask and under its name; "mine" stands for FlashAttention, which is not here."""
    calls = []

    def mine(module, *args, **kwargs):
        calls.append((module.config._attn_implementation, module.is_causal, module.layer_idx))
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setattr(AttentionInterface, "_global_mapping", AttentionInterface._global_mapping | {"mine": mine})
    masks = AttentionMaskInterface._global_mapping | {"mine": sdpa_mask}
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", masks)
    config, model_class = config_and_class("deepseek_v3")
    model = model_class._from_config(config, attn_implementation=f"hf_mla|{base}").eval()
    model.load_state_dict(native("deepseek_v3").state_dict())
    assert model.config._attn_implementation == ("hf_mla" if base == "sdpa" else f"hf_mla|{base}")
    before = copy.deepcopy(model)
    before.set_attn_implementation(base)
    expected = ways(before)
    calls.clear()
    got = ways(model)
    for kind, logits in expected.items():
        assert (got[kind] - logits).abs().max() < 5e-5, kind
    assert calls == ([("mine", True, layer) for layer in range(3)] * 2 if base == "mine" else [])
    hf_mla.absorb(before)
    assert before.config._attn_implementation == model.config._attn_implementation


@torch.no_grad()
def test_masks_of_flash(monkeypatch):
    """FlashAttention's masks are [B, S] or none at all: a single token reads them absorbed, several take the base."""
    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        tokens, length = query.shape[2], key.shape[2]
        seen.append((tokens, None if attention_mask is None else attention_mask.ndim))
        mask = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
        if attention_mask is not None:  # padding attends to itself, or it would be no numbers
            mask = mask & attention_mask[:, None, None].bool() | mask.triu(length - tokens)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(AttentionInterface, "_global_mapping", AttentionInterface._global_mapping | {"mine": flash})
    masks = AttentionMaskInterface._global_mapping | {"mine": flash_attention_mask}
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", masks)
    model, before = absorbing("deepseek_v3", "hf_mla|mine"), native("deepseek_v3")
    for mask in None, PADDED:
        logits, expected = (read(each, [PROMPT, 1, 3, 1], DynamicCache(config=model.config), mask) for each in (model, before))
        assert (logits - expected).abs().max() < 1e-10
    assert seen == [(PROMPT, None)] * 3 + [(3, None)] * 3 + [(PROMPT, 2)] * 3 + [(3, 2)] * 3


@torch.no_grad()
def test_may_change_at_any_token():
    """What is cached is the same either way."""
    model, expected = absorbing("glm4_moe_lite"), read(native("glm4_moe_lite"), [PROMPT, 1, 1, 1], DynamicCache())
    cache, parts = DynamicCache(config=model.config), []
    for name, ids in zip(["hf_mla", "sdpa", "hf_mla", "sdpa"], IDS[:, : PROMPT + 3].split([PROMPT, 1, 1, 1], dim=1), strict=True):
        model.set_attn_implementation(name)
        parts.append(model(ids, **{CACHE_NAME: cache}).logits)
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-10


def test_weights_are_needed_by_the_eager_base():
    model = absorbing("deepseek_v3", "hf_mla|eager")
    with torch.no_grad():
        cache = cache_of(model(IDS[:, :PROMPT]))
        outputs = model(IDS[:, PROMPT : PROMPT + 1], output_attentions=True, **{CACHE_NAME: cache})
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, 1, PROMPT + 1)] * 3


def test_saved_as_ever(tmp_path):
    before, model = native("deepseek_v2"), absorbing("deepseek_v2")
    before.save_pretrained(tmp_path / "before")
    model.save_pretrained(tmp_path / "after")
    names = sorted(file.name for file in (tmp_path / "before").iterdir())
    assert "model.safetensors" in names
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "after", attn_implementation="hf_mla", experts_implementation="eager"
    )
    assert loaded.config._attn_implementation == "hf_mla"
    assert greedy(loaded)[0] == greedy(model)[0]


REFUSAL = "LlamaForCausalLM is no MLA model of Transformers; attn_implementation='hf_mla' is for these alone"


def test_models_without_mla_are_refused():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=97
    )
    for base in "", "|eager":
        with pytest.raises(ValueError, match=REFUSAL):
            transformers.LlamaForCausalLM._from_config(config, attn_implementation=f"hf_mla{base}")
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    for refused in lambda: hf_mla.absorb(model), lambda: model.set_attn_implementation("hf_mla"):
        with pytest.raises(ValueError, match=REFUSAL):
            refused()
    assert model.config._attn_implementation == "eager"


def test_converted_models_absorb_by_themselves():
    model = make_mla(attn_implementation="eager")
    hf_mla.absorb(model)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("hf_mla")
    assert model.config._attn_implementation == "sdpa"
    assert make_mla(attn_implementation="hf_mla|eager").config._attn_implementation == "eager"


@pytest.mark.skipif(importlib.util.find_spec("transformers.models.mistral_large4") is None, reason="not in this Transformers")
def test_vision_stays_as_it_is():
    """Only the part with MLA is changed: by `absorb`, by the name for the whole model, and by the name for its text."""
    config, model_class = config_and_class("mistral_large4")
    given = [None, "hf_mla", {"text_config": "hf_mla"}]
    models = [model_class._from_config(copy.deepcopy(config), **({"attn_implementation": name} if name else {})) for name in given]
    hf_mla.absorb(models[0])
    for model in models:
        assert model.config.text_config._attn_implementation == "hf_mla"
        assert model.config.vision_config._attn_implementation == "sdpa"
    vision = models[0].model.vision_tower
    pixels = torch.randn(1, 3, 32, 32), [(32, 32)]
    expected = vision(pixels[0], image_sizes=torch.tensor(pixels[1])).last_hidden_state
    models[0].set_attn_implementation("sdpa")
    models[0].set_attn_implementation("hf_mla")  # here the library hands the name to all parts
    assert torch.equal(vision(pixels[0], image_sizes=torch.tensor(pixels[1])).last_hidden_state, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_takes_the_base(checkpointing):
    """Gradients are those of the library's model; nothing is absorbed."""
    gradients = []
    for model in native("deepseek_v3"), absorbing("deepseek_v3"):
        model = copy.deepcopy(model).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # before 5.23
            enable()
        with mock.patch.object(attention_mla, "absorbed_attention", side_effect=AssertionError):
            model(IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


MODES = {
    "beams": {"num_beams": 3},
    "beams, static": {"num_beams": 3, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
}


@pytest.mark.mode("The library's own MLA models, every way to generate", since="5.15", costs="as for ours")
@pytest.mark.parametrize("name", ["deepseek_v2", "kimi_linear", "deepseek_v32"])
@pytest.mark.parametrize("kind", MODES)
def test_ways_to_generate(kind, name):
    if name in REFUSED or (name == "kimi_linear" and kind in ("prompt lookup", "assisted")):
        pytest.skip("not in Transformers, or not right there")
    before, model = native(name), absorbing(name)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | MODES[kind]
    ids = IDS
    if kind in ("prompt lookup", "assisted"):
        ids = IDS[:1]
    if kind == "assisted":
        settings["assistant_model"] = absorbing(name)
        for parameter in settings["assistant_model"].parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    results = []
    for each in before, model:
        torch.manual_seed(0)
        results.append(each.generate(ids, attention_mask=torch.ones_like(ids), **settings).tolist())
    assert results[0] == results[1]


@torch.no_grad()
def test_appends_in_place():
    """A growing cache is written where it lies, of sparse models too; it is what `MLACache` makes, and `generate` by itself."""
    for name in ["deepseek_v3", "deepseek_v32"]:
        if name in REFUSED:
            continue
        model = absorbing(name)
        cache = MLACache(model.config)
        read(model, [PROMPT, 1], cache)
        assert cache.layers[0].buffers[0].tensor.shape[2] > PROMPT + 1
        places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        model(IDS[:, :1], **{CACHE_NAME: cache})
        assert places == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        assert [type(layer) for layer in greedy(model)[1].layers] == [type(layer) for layer in cache.layers]


class RoundedLayer(DynamicLayer):
    """The library's own layer, but what is read of it has been quantized and put back."""

    def update(self, key_states, value_states, *args, **kwargs):
        latent = torch.cat(super().update(key_states, value_states), dim=-1)
        return dequantize(*quantize(latent, 24, self.code_dtype)).split([24, 8], dim=-1)


@pytest.mark.mode("The library's own MLA models, quantized latents", since="5.15", costs="as for ours; not with sparse attention")
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@torch.no_grad()
def test_quantized_latents(quantization, static):
    """What is said over them is what the library's own attention says of latents that are rounded so."""
    model, sizes, rounded = absorbing("deepseek_v3"), [PROMPT, 1, 3, 1], DynamicCache()
    rounded.layers = [RoundedLayer() for _ in range(3)]
    for layer in rounded.layers:
        layer.code_dtype = QUANTIZATIONS[quantization]
    expected = read(native("deepseek_v3"), sizes, rounded)
    logits = read(model, sizes, MLACache(model.config, 40 if static else None, quantization=quantization))
    assert (logits - expected).abs().max() < 1e-10
    assert (logits - read(model, sizes, DynamicCache(config=model.config))).abs().max() > 1e-3


@torch.no_grad()
def test_quantized_by_generate():
    model = absorbing("kimi_linear")  # the states of its linear attention stay as they are
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}}
    held = [layer for layer in greedy(model, **settings)[1].layers if hasattr(layer, "code_dtype")]
    assert len(held) == 2 and held[0].keys.shape == (2, 1, PROMPT + 7, 24)
    if "deepseek_v32" not in REFUSED:
        with pytest.raises(ValueError, match="it must be None for a model whose cache has a LatentDynamicIndexedLayer"):
            greedy(absorbing("deepseek_v32"), **settings)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_adapters_on_kv_b_proj(dora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["kv_b_proj", "o_proj"], init_lora_weights=False, use_dora=dora)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(native("deepseek_v3")), config).double().eval()
    expected = ways(model)
    hf_mla.absorb(model)
    with mock.patch.object(attention_mla, "absorbed_attention", wraps=attention_mla.absorbed_attention) as absorbed:
        got = ways(model)
    assert absorbed.call_count > 0
    plain = ways(native("deepseek_v3"))
    for kind, logits in expected.items():
        assert (got[kind] - logits).abs().max() < 1e-10 < (plain[kind] - logits).abs().max(), kind


@pytest.mark.parametrize("where", ["torchao int8", "offloaded"])
@torch.no_grad()
def test_weights_that_are_not_plain(where):
    """`kv_b_proj` is quantized, or not in memory between calls: what it multiplies by is asked of itself."""
    results = []
    for model in native("deepseek_v3"), absorbing("deepseek_v3"):
        model = copy.deepcopy(model).float()
        if where == "offloaded":
            model = accelerate.cpu_offload(model, torch.device("cpu"))
            assert model.model.layers[0].self_attn.kv_b_proj.weight.is_meta
        else:
            torchao = pytest.importorskip("torchao.quantization")
            torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        with mock.patch.object(attention_mla, "absorbed_attention", wraps=attention_mla.absorbed_attention) as absorbed:
            results.append(read(model, [40, *[1] * 4], DynamicCache(config=model.config), ids=torch.cat([IDS, IDS], 1)))
    assert absorbed.call_count == 3 * 4
    assert (results[0] - results[1]).abs().max() < 5e-5


@torch.no_grad()
def test_one_graph():
    """A decode step over a static cache is one graph, and says what it says uncompiled."""
    model = absorbing("minicpm3")
    expected = read(model, [PROMPT, 1, 1, 1], StaticCache(model.config, max_cache_len=40))
    cache = StaticCache(model.config, max_cache_len=40)
    read(model, [PROMPT], cache)
    graphs = []
    step = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    positions = torch.arange(PROMPT, PROMPT + 3)
    parts = [step(IDS[:, p : p + 1], position_ids=p.view(1, 1), **{CACHE_NAME: cache}).logits for p in positions]
    assert (torch.cat(parts, 1) - expected[:, PROMPT:]).abs().max() < 1e-10
    assert len(graphs) == 1


@pytest.mark.parametrize("name", [name for name in TYPES if name not in REFUSED])
@torch.no_grad()
def test_layers_share_the_range_of_a_mask(name, monkeypatch):
    """Once a step for all layers that have the same mask; those of sparse attention have masks of their own."""

    def zeros(query, latent, *_, **__):
        return query.new_zeros(query.shape[1], 2, 1, latent.shape[-1])

    model = absorbing(name)
    cache = StaticCache(model.config, max_cache_len=40)
    read(model, [PROMPT], cache)
    ranges, kernel = mock.Mock(), mock.Mock(side_effect=zeros)
    monkeypatch.setattr(attention_mla, "attended_range", ranges)
    monkeypatch.setattr(attention_mla, "latent_decode", kernel)
    monkeypatch.setattr(attention_mla, "runs_in_kernel", lambda *_: True)
    model(IDS[:, PROMPT : PROMPT + 1], **{CACHE_NAME: cache})
    if "index_topk" not in TYPES[name]:
        assert kernel.call_count >= 1 == ranges.call_count
    assert ranges.call_count == len({id(call.args[5]) for call in kernel.call_args_list})
    assert all(call.args[6] is ranges.return_value for call in kernel.call_args_list)


@pytest.mark.filterwarnings("ignore:divide by zero")  # of NumPy, where a split is empty
@torch.no_grad()
def test_the_kernel_reads_the_cache_as_it_is(monkeypatch):
    """As it would run on a GPU, through Triton's interpreter: over latents and rotary keys where they lie."""
    decode_triton = pytest.importorskip("hf_mla.decode_triton")
    if not decode_triton.triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")
    before, model = (copy.deepcopy(each).float() for each in (native("deepseek_v3"), absorbing("deepseek_v3")))
    kernel, ranges = mock.Mock(wraps=decode_triton.latent_decode), mock.Mock(wraps=decode_triton.attended_range)
    monkeypatch.setattr(attention_mla, "latent_decode", kernel)
    monkeypatch.setattr(attention_mla, "attended_range", ranges)
    monkeypatch.setattr(attention_mla, "runs_in_kernel", lambda *_: True)
    caches = [StaticCache(model.config, max_cache_len=40) for _ in range(2)]
    expected, got = (read(each, [PROMPT, 3, 1], cache, PADDED) for each, cache in zip((before, model), caches, strict=True))
    assert (expected - got).abs().max() < 5e-5
    assert (ranges.call_count, kernel.call_count) == (3, 3 * 3)  # once for all layers of a forward pass
    for call, layer in zip(kernel.call_args_list, caches[1].layers * 3, strict=True):
        for tensor, held in zip(call.args[1:3], (layer.keys, layer.values), strict=True):
            assert (tensor.data_ptr(), tensor.stride()) == (held.data_ptr(), held[:, 0].stride())


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name, layers", [("hy_v4", 3), ("mistral_large4", 3), ("glm5_next", 0)])
@torch.no_grad()
def test_layers_that_the_kernel_takes(name, layers, monkeypatch):
    """On a GPU: those with sinks too; those without rotary keys decode in torch."""
    decode_triton = pytest.importorskip("hf_mla.decode_triton")
    if name in REFUSED or not decode_triton.triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter, and Transformers 5.17")
    runs_in_kernel = attention_mla.runs_in_kernel
    gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda", 0))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(attention_mla, "runs_in_kernel", lambda query, latent, *rest: runs_in_kernel(gpu, gpu, *rest))
    kernel = mock.Mock(wraps=decode_triton.latent_decode)
    monkeypatch.setattr(attention_mla, "latent_decode", kernel)
    before, model = (copy.deepcopy(each).float() for each in (native(name), absorbing(name)))
    for mask in None, PADDED:
        expected, got = (read(each, [PROMPT, 1, 1], DynamicCache(config=each.config), mask) for each in (before, model))
        assert (expected - got).abs().max() < 5e-5
    assert kernel.call_count == 4 * layers
    assert all((call.kwargs["sinks"] is not None) == (name == "hy_v4") for call in kernel.call_args_list)
