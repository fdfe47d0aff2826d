"""Every way to generate with the library's own MLA models over their latents, and whatever is done to caches and weights."""

import copy
from unittest import mock

import accelerate
import pytest
import torch
from native_models import IDS, PROMPT, REFUSED, TYPES, absorbing, greedy, native, read, said, ways
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

import hf_mla
from hf_mla import MLACache, attention_mla
from hf_mla.cache_mla import CACHE_NAME, QUANTIZATIONS, dequantize, quantize
from hf_mla.native_mla import text_config


@pytest.mark.parametrize("name", [name for name in TYPES if name not in REFUSED])
def test_generates_the_same(name):
    """With the caches that `generate` makes; and all is as before once another implementation is set."""
    before, model = native(name), copy.deepcopy(absorbing(name))
    tokens, cache = greedy(model)
    assert tokens == greedy(before)[0]
    assert all(type(layer) is not DynamicLayer for layer in cache.layers)
    static = {"cache_implementation": "static"}
    assert greedy(model, **static)[0] == greedy(before, **static)[0]
    assert list(model.state_dict()) == list(before.state_dict())
    model.set_attn_implementation(text_config(before.config)._attn_implementation)
    sizes = [PROMPT, 1, 1]
    again, was = (read(each, sizes, DynamicCache(config=each.config)) for each in (model, before))
    assert torch.equal(again, was)


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
        settings["assistant_model"] = copy.deepcopy(model)
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


@pytest.mark.mode(
    "The library's own MLA models, offloaded caches", since="5.15", costs="the latents of each layer cross the bus once a step"
)
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_linear", "deepseek_v32"])
def test_offloaded_caches(name, static, monkeypatch):
    """Without a GPU the bus is a copy: a layer's latents never lie where they lay the step before."""
    if name in REFUSED:
        pytest.skip("not right in this Transformers")
    before, model = native(name), absorbing(name)
    moved = []
    if not torch.cuda.is_available():

        def offload(self):
            moved.append(self)
            if self.is_initialized:
                self.keys, self.values = self.keys.clone(), self.values.clone()

        monkeypatch.setattr(torch, "Stream", mock.MagicMock)
        monkeypatch.setattr(torch.cuda, "default_stream", mock.MagicMock())
        monkeypatch.setattr(CacheLayerMixin, "offload", offload)
    else:
        before, model = (copy.deepcopy(each).cuda() for each in (before, model))
        if not static and "index_topk" in vars(model.config.get_text_config()):
            # The library offloads an indexer's keys before it appends to them.
            with pytest.raises(RuntimeError, match="same device"):
                greedy(before, cache_implementation="offloaded", disable_compile=True)
            return
    kind = "static" if static else "dynamic"
    tokens, cache = greedy(model, cache_implementation="offloaded_static" if static else "offloaded", disable_compile=True)
    assert tokens == greedy(before, cache_implementation=kind, disable_compile=True)[0]
    assert cache.offloading
    assert all(buffer.tensor is None for layer in cache.layers for buffer in getattr(layer, "buffers", []))  # none stays behind
    if not torch.cuda.is_available():
        assert len(moved) == 8 * sum(hasattr(module, "kv_b_proj") for module in model.modules())


@pytest.mark.mode("The library's own MLA models, adapters (LoRA, DoRA)", since="5.15", costs="`kv_b_proj` by identity push")
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
    for kind, logits in expected.items():
        assert (got[kind] - logits).abs().max() < 1e-10 < (said("deepseek_v3")[kind] - logits).abs().max(), kind


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
