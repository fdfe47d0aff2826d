"""Every family: tiny models of it that conversion keeps exactly, and the rows of docs/families.md, which the tests of these prove.

A family's own numbers on that page are counted for the heads of a checkpoint that many know, by the converter's own rule of how to
split its budget; what cannot be exported or served is what the code refuses, in its words.
"""

import re
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from modes import PAGES, TESTS, Page
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

import hf_mla
from hf_mla.configuration_mla import check_vllm
from hf_mla_conversion.commands.plan import possible_sizes
from hf_mla_conversion.mathematics.closed_form import convert_attention, mla_config
from hf_mla_conversion.mathematics.moments import LayerMoments
from hf_mla_conversion.output.deepseek import LIKE_DEEPSEEK
from hf_mla_conversion.output.deepseek import refusal as export_refusal
from hf_mla_conversion.source.attention import attention_of, projections, read
from hf_mla_conversion.source.families import FAMILIES, WRAPPERS, key_norms, kv_heads, rotary_width, source_head_dim


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


SHAPE = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ONE = {"num_key_value_heads": 1}
TYPES = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "logits_scaling": 2.0}
# No head_dim in the configuration: 64 / 4.
NARROW = {"hidden_size": 64, "head_dim": None}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

INSIDE = r"\.(self_attn|attention)\."
EXACT = {  # model type, what is not as in `SHAPE`, kv_lora_rank, qk_rope_head_dim; of two key heads, one is a mix of the other
    "Llama": ("llama", {}, 32, 16),
    "Llama, biases, MHA": ("llama", {"attention_bias": True, "num_key_value_heads": 4}, 48, 16),
    "Llama, wide heads": ("llama", {"head_dim": 128, "hidden_size": 128, "num_attention_heads": 2, **ONE}, 128, 128),
    "Mistral": ("mistral", {"sliding_window": 16}, 32, 16),
    "Mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 64, **ONE}, 64, 64),
    "Qwen2": ("qwen2", {**TYPES, "use_sliding_window": True}, 32, 16),
    "Qwen2, no width of heads, tied": ("qwen2", {**NARROW, "tie_word_embeddings": True}, 32, 16),
    "Qwen3": ("qwen3", {}, 32, 16),
    "Qwen3, MHA": ("qwen3", {"num_key_value_heads": 4}, 48, 16),
    "Qwen3, biases, MHA": ("qwen3", {"attention_bias": True, "num_key_value_heads": 4}, 49, 16),
    "Qwen3, window in one layer": ("qwen3", {**TYPES, "use_sliding_window": True, **ONE}, 16, 16),
    "Mixtral": ("mixtral", {**MOE, "num_local_experts": 4}, 32, 16),
    "Mixtral, window": ("mixtral", {**MOE, **ONE, "num_local_experts": 4, "sliding_window": 16}, 16, 16),
    "Qwen2Moe": ("qwen2_moe", {**NARROW, **MOE, "num_experts": 4, "decoder_sparse_step": 2}, 32, 16),
    "Qwen2Moe, no biases, windows": (
        "qwen2_moe",
        {**NARROW, **MOE, **ONE, "num_experts": 4, "qkv_bias": False, "use_sliding_window": True, **TYPES},
        16,
        16,
    ),
    "Qwen3Moe": ("qwen3_moe", {**MOE, "num_experts": 4}, 32, 16),
    "Qwen3Moe, biases, window": (
        "qwen3_moe",
        {**MOE, **ONE, "num_experts": 4, "attention_bias": True, "use_sliding_window": True, "sliding_window": 16},
        24,
        16,
    ),
    "Granite": ("granite", {**NARROW, **MULTIPLIERS, "residual_multiplier": 0.7}, 32, 16),
    "Granite, biases": ("granite", {**NARROW, **MULTIPLIERS, "attention_bias": True}, 32, 16),
    "Starcoder2": ("starcoder2", {**NARROW, "sliding_window": 16}, 32, 16),
    "Starcoder2, no biases": ("starcoder2", {**NARROW, "use_bias": False}, 32, 16),
    "SeedOss": ("seed_oss", {"attention_out_bias": True}, 32, 16),
    "SeedOss, biases of inputs alone": ("seed_oss", {}, 32, 16),
    "Arcee": ("arcee", {"attention_bias": True}, 32, 16),
    "Arcee, yarn": ("arcee", {"rope_parameters": YARN}, 32, 16),
    "Gemma": ("gemma", {}, 32, 16),
    "Apertus": ("apertus", NARROW, 32, 16),
    "Apertus, biases": ("apertus", {**NARROW, **ONE, "attention_bias": True}, 24, 16),
    "HyperCLOVAX": ("hyperclovax", {**MULTIPLIERS, "attention_bias": True}, 32, 16),
    "Cwm": ("cwm", TYPES, 32, 16),
    "Ministral": ("ministral", TYPES, 32, 16),
    "Dots1": ("dots1", {**NARROW, **MOE, **ROUTED, **TYPES}, 32, 16),
    "Jais2": ("jais2", {}, 32, 16),
    "Olmo": ("olmo", {**NARROW, "attention_bias": True}, 32, 16),
    "GraniteMoe": ("granitemoe", {**NARROW, **MULTIPLIERS, **MOE, "num_local_experts": 4, "attention_bias": True}, 32, 16),
    "GraniteMoeShared": (
        "granitemoeshared",
        {**NARROW, **MULTIPLIERS, **MOE, "num_local_experts": 4, "shared_intermediate_size": 32},
        32,
        16,
    ),
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


def disturbed(name, rank, rope_dim, noise):
    """A model with MLA of a case of `EXACT`, whose weights, norms and biases too, are random."""
    model_type, changes, *_ = EXACT[name]
    shape = {key: value for key, value in (SHAPE | changes).items() if value is not None}
    config = mla_config(AutoConfig.for_model(model_type, **shape), rank, rope_dim, "float32")
    model = getattr(hf_mla, f"{config.family.mla}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


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


class Known(NamedTuple):
    """A checkpoint that many know, and the shape of its attention."""

    checkpoint: str
    heads: int
    kv_heads: int
    width: int
    hidden: int
    exact: str = "-"
    """What is kept exactly beside queries, keys, values and RoPE of every head."""
    changes: dict[str, Any] = {}


WINDOW = "windows of layers"
NORMS = "QK-norm"
JOINT = "QK-norm over all heads"
KNOWN = {
    "llama": Known("Llama 3.1 8B", 32, 8, 128, 4096, "biases"),
    "mistral": Known("Mistral 7B v0.3", 32, 8, 128, 4096, WINDOW, {"sliding_window": None}),
    "qwen2": Known("Qwen2.5 7B", 28, 4, 128, 3584, f"biases, {WINDOW}"),
    "qwen3": Known("Qwen3 8B", 32, 8, 128, 4096, f"{NORMS}, biases, {WINDOW}"),
    "mixtral": Known("Mixtral 8x7B", 32, 8, 128, 4096, WINDOW),
    "qwen2_moe": Known("Qwen1.5 MoE A2.7B", 16, 16, 128, 2048, f"biases, {WINDOW}"),
    "qwen3_moe": Known("Qwen3 30B-A3B", 32, 4, 128, 2048, f"{NORMS}, biases, {WINDOW}"),
    "granite": Known("Granite 3.3 8B", 32, 8, 128, 4096, "scale and multipliers, biases"),
    "starcoder2": Known("StarCoder2 7B", 36, 4, 128, 4608, f"biases, {WINDOW}", {"sliding_window": 4096}),
    "seed_oss": Known("Seed-OSS 36B", 80, 8, 128, 5120, "biases"),
    "arcee": Known("AFM 4.5B", 20, 4, 128, 2560, "biases, YaRN's factor"),
    "gemma": Known("Gemma 7B", 16, 16, 256, 3072, "biases"),
    "apertus": Known("Apertus 8B", 32, 8, 128, 4096, f"{NORMS}, biases"),
    "hyperclovax": Known("HyperCLOVA X SEED Think 14B", 48, 8, 128, 6144, "scale and multipliers, biases"),
    "cwm": Known("CWM 32B", 48, 8, 128, 6144, WINDOW),
    "ministral": Known("Ministral 8B", 32, 8, 128, 4096, WINDOW),
    "dots1": Known("dots.llm1", 32, 32, 128, 4096, f"{NORMS}, biases, {WINDOW}"),
    "jais2": Known("Jais 2 8B", 26, 26, 128, 3328, "biases"),
    "olmo": Known("OLMo 7B", 32, 32, 128, 4096, "biases; not `clip_qkv`, which is refused"),
    "granitemoe": Known("Granite 3.0 3B-A800M", 24, 8, 64, 1536, "scale and multipliers, biases"),
    "granitemoeshared": Known("MoE 7B-A1B, shared experts", 24, 8, 64, 1536, "scale and multipliers, biases"),
    "phi3": Known("Phi-3 mini", 32, 32, 96, 3072, "RoPE of a part of a head, longrope's factor"),
    "gemma2": Known("Gemma 2 9B", 16, 8, 256, 3584, f"cap on scores, scale, biases, {WINDOW}"),
    "gemma3_text": Known("Gemma 3 12B", 16, 8, 256, 3840, f"{NORMS}, scale, RoPE and {WINDOW}, biases"),
    "olmo2": Known("OLMo 2 7B", 32, 32, 128, 4096, f"{JOINT}, biases"),
    "olmo3": Known("Olmo 3 7B", 32, 32, 128, 4096, f"{JOINT}, RoPE and {WINDOW}, biases"),
    "olmoe": Known("OLMoE 1B-7B", 16, 16, 128, 2048, f"{JOINT}, biases; not `clip_qkv`, which is refused"),
    "smollm3": Known("SmolLM3 3B", 16, 4, 128, 2048, "layers without RoPE, biases"),
    "exaone4": Known("EXAONE 4.0 32B", 40, 8, 128, 5120, f"{NORMS}, layers without RoPE, {WINDOW}"),
    "cohere2": Known("Command R7B", 32, 8, 128, 4096, f"layers without RoPE, {WINDOW}, biases"),
    "glm4_moe": Known("GLM-4.5-Air", 96, 8, 128, 4096, f"{NORMS} if there is one, RoPE of a part of a head, biases"),
    "glm4": Known("GLM-4 9B", 32, 2, 128, 4096, "RoPE of a part of a head, biases"),
    "ministral3": Known("Ministral 3 8B", 32, 8, 128, 4096, "YaRN's factor, queries scaled by their position"),
    "phi": Known("Phi-2", 32, 32, 80, 2560, "RoPE of a part of a head, biases; not `qk_layernorm`, which is refused"),
    "stablelm": Known("Stable LM 2 1.6B", 32, 32, 64, 2048, "RoPE of a part of a head, norms if there are some, biases"),
    "gpt_neox": Known("GPT-NeoX 20B", 64, 64, 96, 6144, "RoPE of a part of a head, biases"),
    "nemotron": Known("Minitron 8B", 48, 8, 128, 4096, "RoPE of a part of a head, biases"),
    "cohere": Known("Command R", 64, 64, 128, 8192, "norms if there are some, biases"),
    "gpt_oss": Known("gpt-oss 20B", 64, 8, 64, 2880, f"sinks, YaRN's factor, {WINDOW}, biases"),
}


# The model type of one more row.
WRAPPED = f"any of these as the text decoder in {', '.join(f'`{name}`' for name in WRAPPERS)}"


def case(name, *, proves=True):
    """A row of EXACT as the parameters of a test."""
    return pytest.param(*EXACT[name], id=name, marks=pytest.mark.family(EXACT[name][0]) if proves else ())


parameters = "model_type, changes, rank, rope_dim"
every_case = pytest.mark.parametrize(parameters, [case(name) for name in EXACT])
one_case_a_family = pytest.mark.parametrize(parameters, [case(name) for name in EXACT if "," not in name])


class FamilyRow(NamedTuple):
    """A row of docs/families.md: the argument of the marker `family`."""

    model_type: str
    since: str = "5.15"

    def row(self, works, tests):
        proofs = ", ".join(dict.fromkeys(f"`{name.partition('[')[0]}`" for _, _, name in tests))
        if self.model_type == WRAPPED:
            cells = WRAPPED, "as alone; the rest, as vision, is left out", "Mistral Small 3.1 24B", *["as alone"] * 3
            return f"| {' | '.join((*cells[:4], works, self.since, *cells[4:], proofs))} |\n"
        known, config = KNOWN[self.model_type], known_config(self.model_type)
        rank, rope_dim = possible_sizes(config, None, None, None)[0]
        norms = key_norms(config, "exact")
        before, after = 2 * kv_heads(config) * source_head_dim(config), rank + rope_dim + norms
        split = " + ".join(map(str, [rank, rope_dim, *[norms] * (norms > 0)]))
        exported, served = (f"no ({notes().index(reason) + 1})" if reason else "yes" for reason in limits(self.model_type))
        if served == "yes" and f"{self.model_type}_mla" not in LIKE_DEEPSEEK:
            served = "not run"
        cells = f"`{self.model_type}`", known.exact, known.checkpoint, f"{before:,} to {after:,} ({split})"
        return f"| {' | '.join((*cells, works, self.since, exported, served, proofs))} |\n"


def known_config(model_type):
    known = KNOWN[model_type]
    shape = {"hidden_size": known.hidden, "num_attention_heads": known.heads, "num_key_value_heads": known.kv_heads}
    shape |= {"bos_token_id": 0, "eos_token_id": 1} | known.changes
    if known.width * known.heads != known.hidden:
        shape["head_dim"] = known.width
    config = AutoConfig.for_model(model_type, **shape)
    assert (source_head_dim(config), kv_heads(config)) == (known.width, known.kv_heads), model_type
    return config


def limits(model_type):
    """Why the known checkpoint, converted, cannot be exported, and why vLLM cannot serve it from latents; None where it can."""
    config = known_config(model_type)
    exported = export_refusal(mla_config(config, *possible_sizes(config, None, None, None)[0], "bfloat16"))
    converted = mla_config(config, 512, rotary_width(config), "bfloat16")
    converted.qk_rope_head_dim = 64  # whether its rotary width has that as a divisor is said by the sizes
    try:
        served = check_vllm(converted, on_cpu=False)
    except NotImplementedError as error:
        served = str(error)
    return [reason and in_general(reason, model_type) for reason in (exported, served)]


def in_general(reason, model_type):
    """A reason without the numbers of one checkpoint and the name of one family."""
    reason = reason.replace(f" ({model_type}_mla)", "")
    reason = reason.replace(f"'{model_type}_mla'", "this family").replace(f"{model_type}_mla has", "this family has")
    return re.sub(r"(is|over|by|of|len) [\d,]+(?=[; )]| more)", r"\1 N", reason)


@cache
def notes():
    """All reasons that the table gives, by the number of their note."""
    return list(dict.fromkeys(reason for model_type in KNOWN for reason in limits(model_type) if reason))


HEADER = """# Model families

Written by the tests that prove it (`pytest --write-modes`); a full run of the tests fails where this table says anything else.

A tiny random model of each family is converted with nothing dropped. In float64 its logits are the library's own to 1e-9, of a
whole sequence and token by token through every cache. The program converts it as well; it is loaded, compared, saved and loaded
anew (`tests/test_attention_families.py`). What is "kept exactly" is so at any size. What a size drops is dropped; `verify` measures
what that costs.

Cached are numbers for a token in one layer: of the checkpoint that is named, and of what the default budget makes of it, as
latent + rotary key + key norms. (The heads of these checkpoints are written down in `tests/families.py`; they are not read here.)
A layer with a window caches no more tokens than that, before and after.

| model type | kept exactly | for example | cached | works | since | export | vLLM | proven by |
|---|---|---|---|---|---|---|---|---|
"""
FOOTER = """
"Since" is the first Transformers where it works, or 5.15 where the oldest supported one does. "Export" is to `deepseek_v3` and
`gguf`; see [serving.md](serving.md). RoPE may be of the types default, linear, dynamic, llama3, yarn
and longrope. Quantized checkpoints are refused.

"""


def footer():
    """What stands under the table."""
    return FOOTER + "".join(f"{number}. {note}\n" for number, note in enumerate(notes(), 1))


def order(row, _results):
    """Rows stand as they do in KNOWN, what is not there after them."""
    return [*KNOWN, WRAPPED].index(row.model_type)


PAGES["family"] = Page(FamilyRow, TESTS.parent / "docs" / "families.md", HEADER, footer, order)
