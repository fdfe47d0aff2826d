"""Tiny random models of every MLA type of Transformers, as they are and absorbing, in float64; and ways to make them speak."""

import copy
import functools
import importlib.util

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import hf_mla
from hf_mla import cache_of
from hf_mla.cache_mla import CACHE_NAME
from hf_mla.configuration_mla import release


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
    "hy_v4_vl": SPARSE
    | SHARED
    | {"head_dim": 20, "learnable_sink_init": 0.7, "rope_parameters": YARN | {"mrope_section": [2, 1, 1]}},
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
    "hy_v4_vl": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "out_hidden_size": 64}
    | {"intermediate_size": 16},
    "mistral_large4": {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"intermediate_size": 16, "head_dim": 8},
}  # fmt: skip
REFUSED = {name for name, settings in TYPES.items() if "index_topk" in settings and VERSION < (5, 17)}

LENGTH, PROMPT = 22, 11
IDS = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(2, LENGTH, dtype=torch.long)
PADDED[0, :4] = 0


def config_and_class(name, **changes):
    """The configuration of a tiny model, and the class of the model."""
    if importlib.util.find_spec(f"transformers.models.{name}") is None:
        pytest.skip(f"this Transformers has no {name}")
    configs = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    models = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    settings = SHAPE | TYPES[name] | changes
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


@functools.cache
def absorbing(name, implementation=None):
    """The same model, which decodes over its latents. Tests leave it as it is, too."""
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


@functools.cache
def said(name):
    """What the library's own model says."""
    return ways(native(name))


def greedy(model, **settings):
    """What is generated of two prompts, one of them left-padded, and the cache."""
    mask = PADDED[:, :PROMPT].to(model.device)
    ids = IDS[:, :PROMPT].to(model.device).masked_fill(mask == 0, 0)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | settings
    outputs = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    return outputs.sequences.tolist(), cache_of(outputs)
