"""The attention of every family, read into one form and converted at full rank, against the library's own, in float64."""

import re
import sys

import pytest
import torch
from conftest import LLAMA3_ROPE, MODEL
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
    TrainingArguments,
)
from transformers.masking_utils import eager_mask

import hf_mla
from hf_mla import MLACache, attention_mla
from hf_mla.layer_mla import rotary_embedding
from hf_mla_conversion import convert
from hf_mla_conversion.mathematics.closed_form import convert_attention, mla_config
from hf_mla_conversion.mathematics.distill import DistillationTrainer
from hf_mla_conversion.mathematics.moments import LayerMoments, hooks
from hf_mla_conversion.source import own_text
from hf_mla_conversion.source.attention import added, attend, attention_of, pair_order, projections, read, watch_gradients
from hf_mla_conversion.source.families import FAMILIES, refusal, ropes
from hf_mla_conversion.source.loading import head_of


class Unrounded(TorchFunctionMode):
    """Keeps float64 where the library rounds to float32 on the way, whatever the type: in norms, softmax and rotary embeddings."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.float:
            return args[0].double()
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if function in (torch.Tensor.to, torch.Tensor.type) and torch.float32 in args:
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs = kwargs | {"dtype": torch.float64}
        return function(*args, **kwargs)


@pytest.fixture
def unrounded():
    with Unrounded():
        yield


SHAPE = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ONE = {"num_key_value_heads": 1}
TYPES = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# No head_dim in the configuration: 64 / 4.
NARROW = {"hidden_size": 64, "head_dim": None}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

INSIDE = r"\.(self_attn|attention)\."
EXACT = {  # model type, what is not as in `SHAPE`, kv_lora_rank, qk_rope_head_dim; of two key heads, one is a mix of the other
    "Phi3": ("phi3", {**NARROW}, 32, 16),
    "Gemma2": ("gemma2", {**TYPES, "attention_bias": True, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}, 34, 16),
    "Gemma3": ("gemma3_text", {**TYPES, "query_pre_attn_scalar": 24}, 32, 16),
    "Olmo2": ("olmo2", NARROW, 32, 16),
    "Olmo2, one key head": ("olmo2", {**NARROW, **ONE}, 16, 16),
    "Olmo3": ("olmo3", {**TYPES, **NARROW}, 32, 16),
    "Olmoe": ("olmoe", {**NARROW, **MOE, "num_experts": 4}, 32, 16),
    "SmolLM3": ("smollm3", {**NARROW, "no_rope_layers": [1, 0]}, 32, 16),
    "Exaone4": ("exaone4", TYPES, 32, 16),
    "Exaone4, no windows": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}, 32, 16),
    "Cohere2": ("cohere2", {**TYPES, **NARROW}, 32, 16),
    "Glm4Moe": ("glm4_moe", {**MOE, **ONE, "n_routed_experts": 4, "use_qk_norm": True, "attention_bias": True}, 24, 8),
    "Glm4Moe, no norms": ("glm4_moe", {**MOE, "n_routed_experts": 4, "attention_bias": True}, 48, 8),
    "Glm4": ("glm4", {"attention_bias": True}, 48, 8),
    "Ministral3": (
        "ministral3",
        {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 8}},
        32,
        16,
    ),
    "Phi": ("phi", NARROW, 48, 8),
    "StableLm": ("stablelm", NARROW, 56, 4),
    "StableLm, norms": ("stablelm", {**NARROW, **ONE, "qk_layernorm": True}, 28, 4),
    "GPTNeoX": ("gpt_neox", {**NARROW, "num_key_value_heads": None}, 64, 4),
    "Nemotron": ("nemotron", ONE, 24, 8),
    "Cohere": ("cohere", NARROW, 32, 16),
    "Cohere, norms": ("cohere", {**NARROW, **ONE, "use_qk_norm": True}, 16, 16),
    "GptOss": ("gpt_oss", {**TYPES, "num_local_experts": 4, "num_experts_per_tok": 2}, 32, 16),
}


def distance(logits, expected):
    return (logits - expected).abs().max().item()


def make(model_type, changes, mix=True):
    """A random model of the library in float64; `mix`: all key heads are mixes of the first."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{key: value for key, value in (SHAPE | changes).items() if value is not None})
    attention = {"attn_implementation": "eager"} if FAMILIES[model_type].softcap else {}
    model = AutoModelForCausalLM.from_config(config, **attention).double().eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=0.02 if "norm" in name else 0.25)
        if "norm" in name and name.endswith("weight") and not FAMILIES[model_type].unit_offset:
            parameter.data += 1
        if "q_norm" in name or "k_norm" in name or "k_layernorm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.set_experts_implementation("eager")  # the library's fastest has no float64
    for layer in model.base_model.layers if mix else ():
        mix_keys(attention_of(layer))
    return model


def mix_keys(attention):
    """Make the rotated part of all key heads, normed, multiples of the first's, by a complex number for each head and frequency."""
    source = read(attention, torch.zeros((), dtype=torch.float64))
    if len(source.key) == 1:
        return
    weight = 1 if source.key_norm is None else source.key_norm.weight.unsqueeze(-1)
    first, second = (source.key * weight)[:, : source.rotary].chunk(2, dim=1)
    size, angle = torch.rand(2, *first.shape[:2], dtype=torch.float64)
    mixed = torch.complex(first[:1], second[:1]) * torch.polar(size + 0.5, 6.28 * angle).unsqueeze(-1)
    keys = torch.cat([mixed.real, mixed.imag, (source.key * weight)[:, source.rotary :]], dim=1) / weight
    module, rows = projections(attention)[1]
    module.weight.data[rows] = keys[..., :-1]
    if module.bias is not None:
        module.bias.data[rows] = keys[..., -1]


@torch.no_grad()
def converted_model(model, rank, rope_dim):
    """A model of the library in closed form; at full rank moments do not matter."""
    config = mla_config(model.config, rank, rope_dim, "float64")
    mla = getattr(hf_mla, f"{FAMILIES[model.config.model_type].mla}ForCausalLM")(config).double().eval()
    mla.set_experts_implementation("eager")
    copied = {name: tensor for name, tensor in model.state_dict().items() if not re.search(INSIDE, name)}
    left_out, left_over = mla.load_state_dict(copied, strict=False)
    assert not left_over and all(re.search(INSIDE, name) for name in left_out)
    for original, layer in zip(model.base_model.layers, mla.base_model.layers, strict=True):
        attention = attention_of(original)
        key = projections(attention)[1].rows
        factors = [torch.randn(size, 2 * size, dtype=torch.float64) for size in (config.hidden_size, *[key.numel()] * 2)]
        moments = LayerMoments(*(factor @ factor.T for factor in factors))
        setattr(layer, config.family.attention_name, convert_attention(attention, moments, config)[0])
    assert mla.state_dict().keys() == type(mla)(config).state_dict().keys()
    return mla


@pytest.mark.parametrize(("model_type", "changes", "rank", "rope_dim"), EXACT.values(), ids=EXACT)
@torch.no_grad()
def test_logits_equal_the_originals_in_float64(unrounded, model_type, changes, rank, rope_dim):
    original = make(model_type, changes)
    converted = converted_model(original, rank, rope_dim)
    ids = torch.randint(3, 256, (2, 64))
    expected = original(ids).logits
    assert expected.std() > 0.1
    assert distance(converted(ids).logits, expected) < 1e-9
    # Token by token, through every cache and the absorbed path.
    caches = [DynamicCache(config=converted.config), DynamicCache(), MLACache(converted.config)]
    caches += [StaticCache(converted.config, 80), MLACache(converted.config, 80)]
    for cache in caches:
        parts = [converted(part, cache=cache).logits for part in ids.split([40, *[1] * 24], dim=1)]
        assert distance(torch.cat(parts, 1), expected) < 1e-9, cache


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0], "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5]}
BY_TYPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": YARN}
SCALED = {  # model type, what is not as in `SHAPE`, qk_rope_head_dim
    "YaRN": ("llama", {"rope_parameters": YARN}, 4),
    "YaRN, not truncated": ("llama", {"rope_parameters": {**YARN, "truncate": False}}, 4),
    "YaRN, wide": ("llama", {"head_dim": 128, "rope_parameters": {**YARN, "rope_theta": 1e6, "factor": 32.0}}, 16),
    "YaRN of one type of layers": ("olmo3", {**TYPES, **NARROW, "rope_parameters": BY_TYPE}, 4),
    "longrope of a part": ("phi3", {**NARROW, "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75}}, 4),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}, 4),
}


@pytest.mark.parametrize(("model_type", "changes", "rope_dim"), SCALED.values(), ids=SCALED)
@torch.no_grad()
def test_a_narrower_rope_turns_as_every_fold_groups_first_pair(model_type, changes, rope_dim):
    config = AutoConfig.for_model(model_type, **{key: value for key, value in (SHAPE | changes).items() if value is not None})
    converted = mla_config(config, 16, rope_dim, "float32")
    own = AutoModelForCausalLM.from_config(config).base_model.rotary_emb
    narrow = rotary_embedding(converted, type(own))
    for length in (16, 200):  # within and beyond the context of training
        place = torch.zeros(1), torch.arange(length).unsqueeze(0)
        for kind in ropes(config):
            before, after = (rotary(*place) if kind is None else rotary(*place, kind) for rotary in (own, narrow))
            for wide, narrower in zip(before, after, strict=True):
                assert narrower.shape[-1] == rope_dim
                folded = wide.chunk(2, -1)[0][..., :: wide.shape[-1] // rope_dim]
                assert torch.allclose(narrower.chunk(2, -1)[0], folded, atol=1e-4)


@pytest.mark.parametrize(("model_type", "changes", "rope_dim"), SCALED.values(), ids=SCALED)
@torch.no_grad()
def test_what_loses_its_rotation_keeps_its_factor(unrounded, model_type, changes, rope_dim):
    """With all tokens at place 0 RoPE is a factor, and heads that share no rotary key are exact."""
    original = make(model_type, changes, mix=False)
    converted = converted_model(original, 64, rope_dim)
    ids = torch.randint(3, 256, (2, 24))
    place = {"position_ids": torch.zeros_like(ids), "attention_mask": torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()}
    expected = original(ids, **place).logits
    assert distance(converted(ids, **place).logits, expected) < 1e-9
    assert distance(converted(ids).logits, original(ids).logits) > 1e-3  # else nothing would have been shown


KINDS = ["Gemma2", "Gemma3", "Olmo2", "SmolLM3", "Cohere2", "Glm4Moe", "Ministral3", "GptOss"]


@pytest.mark.filterwarnings("ignore:divide by zero")  # of NumPy, in Triton's interpreter, where a split is empty
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_expanded_absorbed_and_kernel_agree(name, monkeypatch):
    model_type, changes, *_ = EXACT[name]
    shape = {key: value for key, value in (SHAPE | changes).items() if value is not None}
    config = mla_config(AutoConfig.for_model(model_type, **shape), 24, 8, "float32")
    model = getattr(hf_mla, f"{config.family.mla}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.add_(0.15 * torch.randn_like(parameter))
    ids = torch.randint(3, 256, (2, 40))
    expected = model(ids, use_cache=False).logits
    calls = []
    decode = attention_mla.latent_decode
    monkeypatch.setattr(attention_mla, "latent_decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    for in_kernel in (False, True):
        monkeypatch.setattr(attention_mla, "runs_in_kernel", lambda *_, value=in_kernel: value)
        cache = MLACache(config)
        parts = [model(part, cache=cache).logits for part in ids.split([30, *[2] * 5], dim=1)]
        assert distance(torch.cat(parts, 1), expected) < 1e-4 * expected.std()
        assert len(calls) == 10 * in_kernel


@pytest.mark.parametrize("name", ["Phi3", "Gemma3", "Olmo2", "Cohere2", "GPTNeoX", "StableLm, norms", "Glm4Moe"])
def test_gradients_at_keys_and_values_are_those_that_attention_gets(name, unrounded):
    """At place 0 RoPE changes nothing, so keys are to the attention function what they were before."""
    model_type, changes, *_ = EXACT[name]
    model, got, given = make(model_type, changes), {}, []

    def attention(module, query, key, value, attention_mask, **kwargs):
        for tensor in (key, value):  # [B, g, T, d]
            tensor.retain_grad()
            given.append(tensor)
        return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("watched", attention)
    AttentionMaskInterface.register("watched", eager_mask)
    model.set_attn_implementation("watched")
    module = attention_of(model.base_model.layers[1])
    handles = watch_gradients(module, 12, lambda gradient: got.update(keys=gradient), lambda gradient: got.update(values=gradient))
    ids = torch.randint(3, 256, (3, 12))
    with hooks(handles):
        causal = torch.full((12, 12), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1).expand(3, 1, 12, 12)
        model(ids, attention_mask=causal, position_ids=torch.zeros_like(ids), use_cache=False).logits.square().sum().backward()
    key, value = (tensor.grad.transpose(1, 2) for tensor in given[-2:])
    assert torch.allclose(got["keys"], key[..., pair_order(model.config)].flatten(2))
    assert torch.allclose(got["values"], value.flatten(2))
    assert key.std() > 0 and value.std() > 0


@pytest.mark.parametrize("name", [name for name in EXACT if "," not in name])
def test_conversion(name, tmp_path):
    """Converted by the program, a model loads, is as the original, generates, and is the same when saved and loaded again."""
    model_type, changes, rank, rope_dim = EXACT[name]
    original = make(model_type, changes | {"vocab_size": 4096}).float()
    original.save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "source")
    sizes = {"kv_lora_rank": min(rank, original.config.hidden_size), "qk_rope_head_dim": rope_dim}
    convert(str(tmp_path / "source"), str(tmp_path / "mla"), calibration_tokens=512, window=128, steps=0, device="cpu", **sizes)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "mla").eval()
    ids = torch.randint(3, 4096, (2, 24))
    with torch.no_grad():
        expected = original(ids).logits
        assert distance(converted(ids).logits, expected) < 1e-3 * expected.std()
    tokens = converted.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, original.generate(ids, max_new_tokens=8, do_sample=False))
    converted.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(ids, max_new_tokens=8, do_sample=False), tokens)


@pytest.mark.parametrize("name", ["Gemma2", "Cohere2", "SmolLM3", "GPTNeoX", "GptOss"])
def test_own_text_is_what_the_library_generates(name, monkeypatch):
    monkeypatch.setattr(own_text, "draw", lambda logits, _generator: logits.argmax(-1))
    monkeypatch.setattr(own_text, "BLOCK", 16)
    model_type, changes, *_ = EXACT[name]
    model = make(model_type, changes | {"vocab_size": 4096, "eos_token_id": 4095})
    ids = own_text.write_text(model, AutoTokenizer.from_pretrained(MODEL), 3, 40, seed=3)
    for row in ids:
        expected = model.generate(row[None, :1], max_new_tokens=39, do_sample=False, eos_token_id=None)[0]
        stop = min([*(row == 1).nonzero().flatten().tolist(), 40])
        assert row[:stop].tolist() == expected[:stop].tolist()


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("Gemma2", "pre_feedforward_layernorm"),
        ("Olmo2", "mlp"),
        ("Phi3", "post_attention_layernorm"),
        ("Glm4", "post_attention_layernorm"),
    ],
)
@torch.no_grad()
def test_what_a_layer_adds_for_its_attention(name, after):
    model_type, changes, *_ = EXACT[name]
    model, seen = make(model_type, changes), []
    layer = model.base_model.layers[0]
    layer.get_submodule(after).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    layer.register_forward_hook(lambda _module, args, kwargs, _output: seen.append((args[0], kwargs)), with_kwargs=True)
    model(torch.randint(3, 256, (2, 12)), use_cache=False)
    stream, (states, call) = seen
    x, y = attend(layer, states, call)
    assert len(seen) == 2  # the rest of the layer did not run
    assert torch.allclose(states + added(layer, y), stream)
    assert torch.equal(y, attention_of(layer)(hidden_states=x, **call)[0])


@pytest.mark.parametrize("name", ["Gemma2", "Cohere2", "Phi", "Olmoe"])
@torch.no_grad()
def test_what_comes_after_the_decoder(name):
    model_type, changes, *_ = EXACT[name]
    model, ids = make(model_type, changes), torch.randint(3, 256, (2, 12))
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    expected = model(ids, use_cache=False).logits
    assert torch.equal(head_of(model)(states[1]), expected[1])
    assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["Gemma2", "Cohere2", "GPTNeoX"])
def test_the_loss_of_a_training_is_of_logits_as_they_are_predicted(name, tmp_path):
    model_type, changes, *_ = EXACT[name]
    teacher, ids = make(model_type, changes), torch.randint(3, 256, (2, 12))
    student = converted_model(teacher, 16, 4)
    with torch.no_grad():
        ours, theirs = student(ids).logits, teacher(ids).logits
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = DistillationTrainer(teacher=teacher, folder=tmp_path, model=student, args=arguments)
    expected = torch.nn.functional.cross_entropy(ours[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    with torch.no_grad():
        assert torch.allclose(trainer.compute_loss(student.eval(), {"input_ids": ids}).double(), expected, rtol=1e-5)
    ours, theirs = (logits.flatten(0, 1).log_softmax(-1) for logits in (ours, theirs))
    expected = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    assert torch.allclose(trainer.compute_loss(student.train(), {"input_ids": ids}).double(), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("olmoe", {"clip_qkv": 3.0}, "clip_qkv is 3.0"),
        ("phi", {"qk_layernorm": True}, "the norm's bias is added"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic' changes its base"),
    ],
)
def test_what_is_only_approximate_is_refused(model_type, changes, reason):
    assert reason in refusal(AutoConfig.for_model(model_type, **changes))
