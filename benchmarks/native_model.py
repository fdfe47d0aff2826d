"""MLA models of Transformers as the library runs them ("sdpa") and over their latents ("hf_mla"): milliseconds a token, and logits.

python benchmarks/native_model.py [--only NAME,...] [--steps 32] [--out FILE] [--tiny]

Random weights in bfloat16, each model once in memory; a row is printed and written when it is measured. What is timed is `generate`
with a static cache (`step_time.py`). The rows:

* deepseek_v3: 8 layers of the width of Llama-3-8B, dense, as in `decode_model.py`;
* heads_128: 4 layers with the attention of DeepSeek-V3 (128 heads) and small dense MLPs;
* DeepSeek-V2-Lite, DeepSeek-V3, GLM-4.7-Flash, Kimi-Linear and MiniCPM3: their real widths, with fewer layers, experts and words.

Of these last, logits are compared too: the same random tokens are decoded over the same random cache, and the difference to "sdpa"
is given relative to the size of the logits, with the share of tokens whose most likely successor is the same. As much as "eager"
differs from "sdpa" is what rounding does, to which experts tokens go included.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from llama_width import DEVICE, machine, make_config
from step_time import SPARE, WARM_UP, filled_cache, measure, one_line
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import hf_mla  # noqa: F401 - registers "hf_mla"
from hf_mla.cache_mla import CACHE_NAME
from hf_mla_conversion.commands.bench import free_memory


COMPARED = 16  # tokens of each sequence whose logits are compared

NO_END = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "vocab_size": 32000}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
EXPERTS = {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096}
YARN |= {"beta_fast": 32, "beta_slow": 1}
V3 = LATENT | {"hidden_size": 7168, "q_lora_rank": 1536, "num_attention_heads": 128, "num_key_value_heads": 128}
V3 |= {"num_hidden_layers": 4, "max_position_embeddings": 163840, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}
SPARSE_AFTER_FIRST = ["dense"] + ["sparse"] * 7
REAL = {
    "heads_128": V3 | {"model_type": "deepseek_v3", "intermediate_size": 2048, "first_k_dense_replace": 4},
    "DeepSeek-V2-Lite": LATENT
    | EXPERTS
    | {"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408}
    | {"num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "n_shared_experts": 2}
    | {"first_k_dense_replace": 1, "max_position_embeddings": 163840}
    | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "DeepSeek-V3": V3
    | EXPERTS
    | {"model_type": "deepseek_v3", "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 4, "topk_group": 2}
    | {"first_k_dense_replace": 1},
    "GLM-4.7-Flash": LATENT
    | EXPERTS
    | {"model_type": "glm4_moe_lite", "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536}
    | {"num_hidden_layers": 8, "num_attention_heads": 20, "num_key_value_heads": 20, "q_lora_rank": 768, "qk_nope_head_dim": 192}
    | {"v_head_dim": 256, "mlp_layer_types": SPARSE_AFTER_FIRST},
    "Kimi-Linear": LATENT
    | {"model_type": "kimi_linear", "hidden_size": 2304, "intermediate_size": 9216, "moe_intermediate_size": 1024}
    | {"num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 32, "q_lora_rank": None}
    | {"num_local_experts": 16, "num_experts_per_tok": 4, "mlp_layer_types": SPARSE_AFTER_FIRST}
    | {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2},
    "MiniCPM3": {"model_type": "minicpm3", "hidden_size": 2560, "intermediate_size": 6400, "num_hidden_layers": 8}
    | {"num_attention_heads": 40, "num_key_value_heads": 40, "kv_lora_rank": 256, "q_lora_rank": 768}
    | {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64},
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
TINY |= {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "linear_head_dim": 16}
TINY |= {"linear_num_heads": 4, "vocab_size": 512}
ROWS = [("deepseek_v3", 16, context) for context in (2048, 4096, 8192, 16384, 32768)]
ROWS += [("deepseek_v3", 1, 65536), ("deepseek_v3", 64, 8192), ("deepseek_v3", 1, 2048)]
ROWS += [("heads_128", 16, 8192)] + [(name, 8, 4096) for name in REAL if name != "heads_128"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", default=",".join(dict.fromkeys(name for name, *_ in ROWS)), metavar="NAME,...")
parser.add_argument("--steps", type=int, default=32, help=f"measured tokens, at most {SPARE - WARM_UP}")
parser.add_argument("--out", help="a JSON file to write, after every row")
parser.add_argument("--tiny", action="store_true", help="small models, batches and contexts, to try the script on a CPU")
arguments = parser.parse_args()


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a model; no token ends a sequence."""
    if name == "deepseek_v3":
        return make_config(name, 8, arguments.tiny)
    settings = REAL[name] | NO_END
    if arguments.tiny:
        settings |= {key: value for key, value in TINY.items() if key in settings or key.startswith("linear")}
    return AutoConfig.for_model(**settings)


@torch.no_grad()
def logits(model: PreTrainedModel, batch: int, context: int, attention: str) -> torch.Tensor:
    """Those [B, COMPARED, words] of random tokens after a random cache, the same whatever the attention."""
    free_memory()
    model.set_attn_implementation(attention)
    torch.manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, context + COMPARED - 1), device=DEVICE)
    cache = filled_cache(model, ids[:, :context])
    steps = ids[:, context - 1 :].split(1, dim=1)
    return torch.cat([model(step, **{CACHE_NAME: cache}).logits for step in steps], dim=1).float()


def compare(model: PreTrainedModel, batch: int, context: int) -> dict[str, Any]:
    """How far logits are from those of "sdpa", and how often they favour the same token."""
    expected = logits(model, batch, context, "sdpa")
    result: dict[str, Any] = {"difference": {}, "agreement": {}}
    for attention in ("hf_mla", "eager"):
        found = logits(model, batch, context, attention)
        result["difference"][attention] = ((found - expected).norm() / expected.norm()).item()
        result["agreement"][attention] = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return result


def fill(row: dict[str, Any], model: PreTrainedModel) -> None:
    """Measure a row."""
    batch, context = row["batch"], row["context"]
    if row["model"] not in ("deepseek_v3", "heads_128"):
        row |= compare(model, batch, context)
    for attention in ("sdpa", "hf_mla"):
        model.set_attn_implementation(attention)
        for key, value in measure(model, batch, context, arguments.steps).items():
            row.setdefault(key, {})[attention] = value
    native, ours = (row["milliseconds_per_token"][attention] for attention in ("sdpa", "hf_mla"))
    row["speedup"] = native / ours if native and ours else None


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    name = f"{row['model']:17}{row['batch']:3} x {row['context']:6}"
    if "error" in row:
        return f"{name}  {row['error']}"
    native, ours = (row["milliseconds_per_token"][attention] for attention in ("sdpa", "hf_mla"))
    text = f"{name}  sdpa {native or 0:8.3f} ms  hf_mla {ours or 0:7.3f} ms  x {row['speedup'] or 0:.2f}"
    for key, form in (("difference", ".5f"), ("agreement", ".4f")):
        if key in row:
            text += f"  {key} {row[key]['hf_mla']:{form}} (eager {row[key]['eager']:{form}})"
    return text + "".join(f"  {attention}: {note}" for attention, note in row.get("note", {}).items())


rows: list[dict[str, Any]] = []
report: dict[str, Any] = {"machine": machine(), "rows": rows}
print(report["machine"], flush=True)
made, model = "", None
for name, batch, context in ROWS:
    if name not in arguments.only.split(","):
        continue
    row: dict[str, Any] = {"model": name, "batch": batch, "context": 64 if arguments.tiny else context}
    rows.append(row)
    try:
        if made != name:
            made, model = name, None
            free_memory()
            torch.manual_seed(0)
            with torch.device(DEVICE):
                model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16).eval()
        assert model is not None
        fill(row, model)
    except Exception as error:  # this row alone
        row["error"] = one_line(error)
    print(line(row), flush=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")
