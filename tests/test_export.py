"""Programs made of a model: torch.export, Transformers' exporters, and torch.fx as engines use it."""

import copy
import inspect

import pytest
import torch
import transformers
from conftest import make_mla
from families import YARN
from test_integration import EXACT_NORMS, IDS, counted_absorption
from transformers import AttentionInterface, DynamicCache, GenerationConfig
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.utils import decompose_prefill_decode

import hf_mla
from hf_mla import MLACache
from hf_mla.cache_mla import CACHE_NAME


# The exporter's own, and what torch says of a dimension of one.
quiet = pytest.mark.filterwarnings("ignore:.treespec.children_specs. is deprecated:FutureWarning")


class DecodeStep(torch.nn.Module):
    """One step over a static cache, whose tensors are buffers."""

    def __init__(self, model, cache):
        super().__init__()
        self.model, self.cache = model, cache
        for i, layer in enumerate(cache.layers):
            self.register_buffer(f"latents_{i}", layer.keys)
            self.register_buffer(f"values_{i}", layer.values)
            self.register_buffer(f"length_{i}", layer.cumulative_length)

    def forward(self, ids, length):
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(length)
        return self.model(ids, cache=self.cache).logits


@pytest.mark.mode("torch.export of a decode step", since="5.15", costs="static cache: attends to all of it at every step")
@torch.no_grad()
def test_exported_decode_step():
    model = make_mla("Qwen3", **EXACT_NORMS)
    cache = MLACache(model.config, max_cache_len=80)
    model(IDS[:, :64], cache=cache)
    with counted_absorption() as absorbed:
        exported = torch.export.export(DecodeStep(model, cache), (IDS[:, 64:65], torch.tensor(64)))
    assert absorbed.call_count == 2
    assert not any("eye" in str(node.target) for node in exported.graph.nodes)  # the weight is read, not recovered
    program = exported.module()
    decoded = [program(IDS[:, i : i + 1], torch.tensor(i)) for i in range(64, 72)]
    assert (torch.cat(decoded, dim=1) - model(IDS).logits[:, 64:]).abs().max() < 1e-5


def runnable(exported):
    """What 5.24 wraps in a component, and 5.15 gives as it is, as a function of the arguments that it takes of those given."""
    exported = getattr(exported, "program", exported)
    program, taken = exported.module(), exported.call_spec.in_spec.child(1).context
    return lambda **given: program(**{name: value for name, value in given.items() if name in taken})


@pytest.mark.mode("Transformers' DynamoExporter", since="5.15", costs="as for torch.export; a growing cache is copied at each step")
@quiet
@torch.no_grad()
def test_library_exporter_static():
    how = GenerationConfig(cache_implementation="static", max_cache_len=80)
    model, inputs = decompose_prefill_decode(make_mla("Qwen3", **EXACT_NORMS), {"input_ids": IDS}, how)["decode"]
    expected = model(**copy.deepcopy(inputs)).logits
    with counted_absorption() as absorbed:
        program = runnable(DynamoExporter().export(model, copy.deepcopy(inputs), DynamoConfig()))
    assert absorbed.call_count == 2
    outputs = program(**inputs)
    assert (outputs["logits"] - expected).abs().max() < 1e-5


def decode_with(program, cache, start, expected, **inputs):
    """Feed a program a few tokens, one by one, and the cache that it gave back; the logits are those of the whole text."""
    for index in range(start, start + 3):
        outputs = program(input_ids=IDS[:, index : index + 1], **{CACHE_NAME: cache}, **inputs)
        cache = outputs[CACHE_NAME]
        assert (outputs["logits"][:, -1] - expected[:, index]).abs().max() < 1e-5
        assert cache.get_seq_length() == index + 1


@pytest.mark.mode("Transformers' DynamoExporter", since="5.15", costs="as for torch.export; a growing cache is copied at each step")
@quiet
@pytest.mark.parametrize("kind", ["MLACache(config)", "DynamicCache(config)", "DynamicCache()"])
@torch.no_grad()
def test_library_exporter_growing(kind):
    """One program of a step serves prompts of other lengths than it was made with, and several steps."""
    model = make_mla("Qwen3", **EXACT_NORMS)
    expected = model(IDS).logits

    def read(length):
        make = {"MLACache(config)": lambda: MLACache(model.config), "DynamicCache()": DynamicCache}
        cache = make.get(kind, lambda: DynamicCache(config=model.config))()
        model(IDS[:, :length], cache=cache)
        return cache

    inputs = {"input_ids": IDS[:, 40:41], CACHE_NAME: read(40), "use_cache": True}
    with counted_absorption() as absorbed:
        program = runnable(DynamoExporter().export(copy.deepcopy(model), inputs, DynamoConfig(dynamic=True)))
    assert absorbed.call_count == 2
    for length in (40, 7, 60):
        decode_with(program, read(length), length, expected)
    cache = read(20)
    model(IDS[:, 20:21], cache=cache)  # from here on with spare room
    decode_with(program, cache, 21, expected)


@quiet
@torch.no_grad()
def test_library_exporter_for_generation():
    """The two programs of a generation, on a prompt of another length, are the model."""
    model = make_mla()
    expected = model(IDS % 97).logits
    exported = DynamoExporter().export_for_generation(copy.deepcopy(model), {"input_ids": IDS[:, :12]}, DynamoConfig(dynamic=True))
    programs = {name: runnable(part) for name, part in getattr(exported, "components", exported).items()}
    positions = torch.arange(72)[None].expand(2, -1)
    for length in (12, 30):
        _, inputs = decompose_prefill_decode(copy.deepcopy(model), {"input_ids": IDS[:, :length]})["prefill"]
        outputs = programs["prefill"](**inputs)
        for index in range(length, length + 3):
            step = slice(index, index + 1)
            given = {"input_ids": IDS[:, step], "attention_mask": torch.ones(2, index + 1, dtype=torch.long)}
            outputs = programs["decode"](**given, position_ids=positions[:, step], **{CACHE_NAME: outputs[CACHE_NAME]})
            assert (outputs["logits"][:, -1] - expected[:, index]).abs().max() < 1e-5


@torch.no_grad()
def test_a_base_model_of_any_length():
    model = make_mla().model
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        model, (IDS[:, :16],), {"use_cache": False}, dynamic_shapes={"input_ids": {1: length}, "use_cache": None}
    )
    for ids in (IDS[:, :16], IDS[:, :50]):
        assert torch.allclose(program.module()(ids, use_cache=False)[0], model(ids, use_cache=False)[0], atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_forwards_name_their_arguments_as_the_librarys(family):
    """The Trainer, exporters and engines look at them."""
    for kind in ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
        own, theirs = (
            inspect.signature(getattr(home, f"{family}{mla}{kind}").forward) for home, mla in ((hf_mla, "MLA"), (transformers, ""))
        )
        named = [name for name in theirs.parameters if name != "kwargs"]
        if "cache" in own.parameters:  # before 5.24 the library's has another name
            named = ["cache" if name == "past_key_values" else name for name in named]
        assert [name for name in own.parameters if name in named] == named
    parameters = list(inspect.signature(hf_mla.MLAAttention.forward).parameters)
    assert parameters[1:5] == ["hidden_states", "position_embeddings", "attention_mask", "cache"]
    for cls in (getattr(hf_mla, f"{family}MLA{kind}") for kind in ("Model", "ForCausalLM")):
        assert list(inspect.get_annotations(cls.__init__)) == ["config", "return"]  # engines hold arguments against them, in order


class EngineTracer(torch.fx.Tracer):
    """As an engine reads an attention module: without a cache, other modules and the attention function as they are."""

    def is_leaf_module(self, module, name):
        return True

    def keys(self, proxy):
        return iter(())  # no more arguments than the named ones


def engines_attention(module, query, key, value, attention_mask, **kwargs):
    return query.tracer.create_proxy("call_function", engines_attention, (query, key, value), {}), None


@pytest.mark.parametrize("changes", [{}, {"source_rope_dim": 16, "rope_parameters": YARN}], ids=["plain", "yarn since conversion"])
def test_engines_can_trace_the_attention(changes):
    """The graph has all that an engine looks for: the norm on the latent, the up-projection, one attention on unpadded values."""
    AttentionInterface.register("vllm", engines_attention)
    attention = make_mla(**changes).model.layers[0].self_attn
    attention.config._attn_implementation = "vllm"
    try:
        graph = EngineTracer().trace(attention, {"past_key_values": None})
    finally:
        AttentionInterface._global_mapping.pop("vllm")
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert called == ["q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    assert [node.target for node in graph.nodes if node.op == "call_function"].count(engines_attention) == 1
    value = next(node for node in graph.nodes if node.target is engines_attention).args[2]
    assert "pad" not in str(value.target)
    if changes:  # the query that engines get has the factor of what lost its rotation
        assert attention.factor_of_lost > 1 and any(attention.factor_of_lost in node.args for node in graph.nodes)
