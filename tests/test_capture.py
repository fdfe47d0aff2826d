"""Decoding can be captured: one graph without a break, compiled once however long the context grows, and no wait for the device."""

import copy
from unittest import mock

import pytest
import test_native
import torch
from test_generation import NEW, SHAPES, UNWINDOWED, all_families, make, make_prompt
from test_native import PROMPT
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CompileConfig

import hf_mla
from hf_mla import MLACache, attention_mla
from hf_mla.cache_mla import CACHE_NAME


DEVICE, DTYPE = "cuda", torch.bfloat16
WIDE = {"num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
WIDE |= {"qk_nope_head_dim": 128, "v_head_dim": 128}
NATIVE = {  # the library's own models, without routers, and with indexers that pick all tokens: no rounding makes them choose
    "deepseek_v3": {"first_k_dense_replace": 3},
    "deepseek_v3, 128 heads of 512 + 64": {"first_k_dense_replace": 3} | WIDE,
    "hy_v4": {"mlp_layer_types": ["dense"] * 3, "index_topk": 512},
    "minicpm3": {},
}
NATIVE_CASES = [(name, None) for name in NATIVE] + [("deepseek_v3", "int8"), ("deepseek_v3, 128 heads of 512 + 64", "fp8")]


@pytest.mark.mode("Compiled by generate itself", since="5.15", costs="compiling; on a GPU, a static cache is all it takes")
@pytest.mark.parametrize(
    "family, lengths, quantization",
    [(family, (18, 20, 3), None) for family in SHAPES]
    + [("Llama", (20,), None), ("Llama", (20,), "fp8"), ("Mistral", (18, 20, 3), "int8")]
    + [("Qwen2", (20,), "fp8"), ("Qwen3", (18, 20, 3), "int8")],
    ids=str,
)
def test_one_graph(family, lengths, quantization):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True  # else only on a GPU
    torch._dynamo.reset()
    model, width = make(family), max(lengths)
    prompt, mask = make_prompt(rows=len(lengths), length=width), torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    sequences = [
        model.generate(
            prompt,
            attention_mask=mask.long(),
            **{CACHE_NAME: MLACache(model.config, max_cache_len=width + NEW, quantization=quantization)},
            max_new_tokens=NEW,
            do_sample=False,
            **options,
        )
        for options in ({}, {"compile_config": compile_config})
    ]
    assert torch.equal(*sequences)
    # The library's layers with windows count tokens in a Python integer, which becomes a symbol at the second step.
    assert len(graphs) == (1 if family in UNWINDOWED else 2)


def native(name, monkeypatch):
    """A model of the library with the changes of `NATIVE`."""
    kind = name.partition(",")[0]
    if kind in test_native.REFUSED:
        pytest.skip("needs Transformers 5.17")
    monkeypatch.setitem(test_native.TYPES, kind, test_native.TYPES[kind] | NATIVE[name])
    return test_native.native.__wrapped__(kind)


def graph_on_a_gpu(model):
    """The code of a decode step over a static cache; without a GPU too: a tensor with a device but no memory is compiled alike."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for kind in (module._parameters, module._buffers):
                for name, x in kind.items():
                    kind[name] = None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda")
        ids, mask = torch.zeros(3, 21, dtype=torch.long, device="cuda"), torch.ones(3, 21, dtype=torch.long, device="cuda")
        cache = MLACache(model.config, max_cache_len=60)
        model(ids[:, :20], **{CACHE_NAME: cache})
        inputs = model.prepare_inputs_for_generation(
            ids, **{CACHE_NAME: cache}, attention_mask=mask, use_cache=True, next_sequence_length=1
        )
        torch._dynamo.reset()
        torch.compile(model.forward, backend=backend, fullgraph=True)(**inputs)
    (code,) = graphs
    return code


built_with_cuda = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a PyTorch that was built with CUDA")


@built_with_cuda
@pytest.mark.parametrize("dtype, kernels", [(torch.bfloat16, 2), (torch.float32, 0)])
@all_families
@torch.no_grad()
def test_on_a_gpu_the_graph_has_the_kernel(family, dtype, kernels, monkeypatch):
    pytest.importorskip("hf_mla.decode_triton")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    code = graph_on_a_gpu(make(family).to(dtype))
    assert code.count("ops.hf_mla.latent_decode") == kernels and ("softmax" in code) == (not kernels)


@built_with_cuda
@pytest.mark.parametrize("name, ranges", [("deepseek_v3", 1), ("minicpm3", 1), ("hy_v4", 3)])
@torch.no_grad()
def test_on_a_gpu_the_graph_of_a_native_model_has_the_kernel(name, ranges, monkeypatch):
    """The range of a mask is asked for once; each layer of sparse attention has a mask of its own."""
    pytest.importorskip("hf_mla.decode_triton")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    model = native(name, monkeypatch)
    hf_mla.absorb(model)
    code = graph_on_a_gpu(model.bfloat16())
    assert (code.count("ops.hf_mla.latent_decode"), code.count("ops.hf_mla.attended_range")) == (3, ranges)


@pytest.mark.mode("Decode kernel", since="5.15", costs="needs Triton and a GPU, bfloat16 or float16, not the eager attention")
@pytest.mark.filterwarnings("ignore:divide by zero")  # of NumPy, where a split is empty
@pytest.mark.parametrize("family, quantization", [("Llama", "int8"), ("Mistral", None), ("Qwen2", None), ("Qwen3", None)])
def test_the_kernel_in_the_graph(family, quantization, monkeypatch):
    """As on a GPU, here through Triton's interpreter: the same tokens with the kernel, growing and static, compiled and not."""
    decode_triton = pytest.importorskip("hf_mla.decode_triton")
    if not decode_triton.triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")

    def backend(graph, inputs):
        assert graph.code.count("ops.hf_mla.latent_decode") == 2 and "softmax" not in graph.code
        assert graph.code.count("ops.hf_mla.attended_range") == (2 if family == "Qwen2" else 1)  # once for each kind of layer
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    model, prompt = make(family), make_prompt(rows=3, length=20)
    mask = (torch.arange(20) >= torch.tensor([[2], [0], [17]])).long()

    def tokens(length, **options):
        cache = MLACache(model.config, max_cache_len=length, quantization=quantization)
        return model.generate(prompt, attention_mask=mask, **{CACHE_NAME: cache}, max_new_tokens=5, do_sample=False, **options)

    expected = tokens(None)
    kernel = mock.Mock(wraps=decode_triton.latent_decode)
    monkeypatch.setattr(attention_mla, "latent_decode", kernel)
    monkeypatch.setattr(attention_mla, "runs_in_kernel", lambda *_: True)
    assert torch.equal(tokens(None), expected)
    assert kernel.call_count == 2 * 4  # layers, and tokens after the first
    monkeypatch.setattr(attention_mla, "latent_decode", decode_triton.latent_decode)
    assert torch.equal(tokens(25, compile_config=compile_config), expected)


@pytest.mark.parametrize("length, quantization", [(None, None), (60, None), (None, "int8"), (60, "fp8")], ids=str)
@all_families
@torch.no_grad()
def test_nothing_is_read(family, length, quantization):
    """On the meta device no tensor has values: whatever reads one, and would wait for a GPU, fails."""
    model = make(family).to("meta")
    model.set_attn_implementation("eager")  # where the library makes the mask of a prompt for SDPA, it reads the cache's length
    cache = MLACache(model.config, max_cache_len=length, quantization=quantization)
    ids = make_prompt(rows=3, length=28).to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        ids.max().item()
    with mock.patch.object(attention_mla, "absorbed_attention", wraps=attention_mla.absorbed_attention) as absorbed:
        for part in ids.split([20, *[1] * 8], dim=1):  # a growing buffer is replaced within these
            logits = model(part, cache=cache).logits
    assert logits.shape == (3, 1, 97) and absorbed.call_count == 8 * model.config.num_hidden_layers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", ["growing", "static", "generate"])
@pytest.mark.parametrize("name, quantization", NATIVE_CASES, ids=str)
@torch.no_grad()
def test_native_models_on_a_gpu(name, quantization, how, monkeypatch):
    """In bfloat16, the kernel's logits are as near to the library's in float32 as torch's; those of a captured graph, too."""
    decode_triton = pytest.importorskip("hf_mla.decode_triton")
    model = native(name, monkeypatch).to(DEVICE, DTYPE)
    exact = copy.deepcopy(model).float()
    for each in (model, exact) if quantization else (model,):  # codes are nothing for the library's own attention
        hf_mla.absorb(each)

    def cache(each):
        return MLACache(each.config, None if how == "growing" else 40, quantization=quantization)

    def read(each, ids, mask):
        return test_native.read(each, [PROMPT] + [1] * (ids.shape[1] - PROMPT), cache(each), mask, ids).float()

    ids, mask = test_native.IDS.to(DEVICE), test_native.PADDED.to(DEVICE)
    calls = mock.Mock(wraps=decode_triton.choose_splits)  # every call of the kernel asks this
    monkeypatch.setattr(decode_triton, "choose_splits", calls)
    if how == "generate":
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        settings = {CACHE_NAME: cache(model)} if quantization else {"cache_implementation": "static"}
        settings |= {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "output_logits": True}
        out = model.generate(ids[:, :PROMPT], **settings, return_dict_in_generate=True)
        ids, mask, logits = out.sequences[:, :-1], None, torch.stack(out.logits, 1).float()
        if model._can_compile_fullgraph:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
            assert not torch._dynamo.utils.counters["graph_break"]
    else:
        logits = read(model, ids, mask)
    assert calls.call_count >= model.config.num_hidden_layers
    monkeypatch.setattr(attention_mla, "runs_in_kernel", lambda *_: False)
    expected, plain = (read(each, ids, mask) for each in (exact, model))
    if how == "generate":
        expected, plain = expected[:, PROMPT - 1 :], plain[:, PROMPT - 1 :]
    error, allowed = ((each - expected).norm() / expected.norm() for each in (logits, plain))
    assert 0 < error < 1.5 * allowed < 0.15
