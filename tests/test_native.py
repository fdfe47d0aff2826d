"""Absorbed decoding for the library's own MLA models, against themselves: tiny random models of every type, in float64."""

import copy
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from conftest import MODEL, make_mla
from native_models import IDS, LENGTH, PADDED, PROMPT, REFUSED, TYPES, absorbing, config_and_class, greedy, native, read, said, ways
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, flash_attention_mask, sdpa_mask

import hf_mla
from hf_mla import attention_mla, cache_of
from hf_mla.attention_mla import absorbed_attention
from hf_mla.cache_mla import CACHE_NAME
from hf_mla.configuration_mla import release
from hf_mla.native_mla import share_ranges


@pytest.mark.mode(
    'The library\'s own MLA models, `attn_implementation="hf_mla"`',
    since="5.15",
    costs="as for ours: keys and values are formed in prefill alone; sparse attention since 5.17",
)
@pytest.mark.parametrize("name", TYPES)
def test_equals_the_librarys_own(name):
    expected = said(name)
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
        logits = read(model, [PROMPT, 3, 1], StaticCache(model.config, max_cache_len=40))
    assert (logits - expected["static, chunks"][:, : PROMPT + 4])[:, PROMPT:].abs().amax() > 1e-6


def wrong(query_nope, *args, **kwargs):
    """Absorbed attention with a mistake; a test that does not see it sees nothing."""
    return absorbed_attention(query_nope * 1.01, *args, **kwargs)


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
    model, expected = copy.deepcopy(absorbing("glm4_moe_lite")), read(native("glm4_moe_lite"), [PROMPT, 1, 1, 1], DynamicCache())
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


PAGE = (Path(__file__).parent.parent / "docs" / "native.md").read_text(encoding="utf-8")


def test_the_page_lists_the_types():
    """All that this Transformers has; a newer one may have more."""
    files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    known = {file.parent.name for file in files if "def expand_kv(" in file.read_text(encoding="utf-8")}
    rows = re.findall(r"^\| (5\.\d+) \| (`.*`) \|$", PAGE, re.MULTILINE)
    since = {name: release(version) for version, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert sorted(since) == sorted(TYPES)
    assert {name for name, version in since.items() if version <= release(transformers.__version__)} == known - REFUSED


def test_the_example_of_the_page(tmp_path, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    config, model_class = config_and_class("deepseek_v2", vocab_size=4096)
    model_class._from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    with mock.patch.object(attention_mla, "absorbed_attention", wraps=attention_mla.absorbed_attention) as absorbed:
        exec(example.replace("deepseek-ai/DeepSeek-V2-Lite", str(tmp_path)))
    assert capsys.readouterr().out.startswith("The captain looked at the sea and")
    assert absorbed.call_count > 0


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


@pytest.mark.mode("The library's own MLA models, training and gradient checkpointing", since="5.15", costs="none: it is the base's")
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


@pytest.mark.mode("The library's own MLA models, compiled decoding", since="5.15", costs="as for ours")
@torch.no_grad()
def test_one_graph():
    """A decode step over a static cache is one graph, and says what it says uncompiled."""
    model = copy.deepcopy(absorbing("minicpm3"))
    del model.model.layers[2:]  # as many as it takes to share something
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


@pytest.mark.parametrize("name", [name for name in TYPES if name not in REFUSED])
def test_what_generate_compiles_has_no_hook(name):
    """It would run in Python at every step: the compiled call begins within the hooks of the module that is called."""
    model = absorbing(name)
    hooked = [module for module in model.modules() if share_ranges in module._forward_pre_hooks.values()]
    assert [hasattr(module, "layers") for module in hooked] == [True] and hooked != [model]


@pytest.mark.parametrize("attention", ["hf_mla", "hf_mla|eager"])
def test_mask_of_a_step(attention):
    """The library's own, from fewer operations."""
    config = copy.deepcopy(config_and_class("deepseek_v3")[0])
    config._attn_implementation = attention
    mask = AttentionMaskInterface()[attention]
    for seen, length in (3, 4), (4, 5), (4, 8), (7, 8), (7, 9):
        padding = torch.ones(2, length, dtype=torch.bool)
        padding[0, :3] = False
        sizes = {"batch_size": 2, "q_length": 1, "kv_length": 8, "q_offset": torch.tensor(seen), "kv_offset": 0}
        given = sizes | {"mask_function": causal_mask_function, "attention_mask": padding, "allow_is_causal_skip": False}
        results, operations = [], []
        for make in sdpa_mask, mask:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                results.append(make(**given, config=config))
            operations.append(sum(event.name.startswith("aten::") for event in profile.events()))
        assert torch.equal(*results) and results[0].stride() == results[1].stride()
        assert operations[1] < operations[0] / 2


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
