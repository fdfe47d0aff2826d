"""Models of Llama-3-8B width with random weights, for measurements of speed; and the machine that they run on.

python benchmarks/llama_width.py FOLDER [--layers 8] [--tiny]

writes the Llama, with the bundled model's tokenizer, for `hf-mla bench`. results/bench.json is of

hf-mla convert FOLDER CONVERTED --kv-lora-rank 512 --qk-rope-head-dim 64 --steps 0 --calibration-tokens 8192
hf-mla bench CONVERTED --against FOLDER --batch 16 --context 2048 8192 16384 --json
"""

import argparse
import platform

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

from hf_mla_conversion.mathematics.closed_form import IDENTITY_NORM_WEIGHT, mla_config
from hf_mla_conversion.source.text import BUNDLED


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
LATENT = {"rank": 512, "rope_dim": 64}
TINY_WIDTH = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY_LATENT = {"rank": 24, "rope_dim": 8}


def make_config(name: str, layers: int, tiny: bool) -> PreTrainedConfig:
    """The configuration of one of the models that are compared: a Llama, that Llama converted, and DeepSeek-V3 of its shape.

    Args:
        name: "gqa", "converted" or "deepseek_v3".
        layers: how many.
        tiny: whether to make it small enough for a try on a CPU.

    Returns:
        The configuration; no token ends a sequence.
    """
    gqa = LlamaConfig(
        **(TINY_WIDTH if tiny else WIDTH),
        num_hidden_layers=layers,
        vocab_size=32000,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,
    )
    if name == "gqa":
        return gqa
    converted = mla_config(gqa, **(TINY_LATENT if tiny else LATENT), dtype="bfloat16")
    if name == "converted":
        return converted
    shared = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "rope_parameters")
    shared += ("max_position_embeddings", "bos_token_id", "eos_token_id", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim")
    shared += ("qk_rope_head_dim", "v_head_dim")
    fields = {key: getattr(converted, key) for key in shared}
    return DeepseekV3Config(**fields, num_key_value_heads=gqa.num_attention_heads, first_k_dense_replace=layers)


def make_model(name: str, layers: int, tiny: bool) -> PreTrainedModel:
    """One of the models, in bfloat16 and on the GPU if there is one; see `make_config`."""
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(make_config(name, layers, tiny), dtype=torch.bfloat16)
    if name == "converted":
        for layer in model.model.layers:
            layer.self_attn.kv_a_layernorm.weight.data.fill_(IDENTITY_NORM_WEIGHT)  # as in a converted checkpoint
    return model.eval()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def machine() -> dict[str, str]:
    """What a measurement was made on."""
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        device = {"device": properties.name, "memory": f"{properties.total_memory / 2**30:.0f} GiB"}
    else:
        device = {"device": platform.processor() or platform.machine()}
    return device | {"torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="where to write the checkpoint")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a small model, to try it on a CPU")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    make_model("gqa", arguments.layers, arguments.tiny).save_pretrained(arguments.folder)
    AutoTokenizer.from_pretrained(BUNDLED / "model").save_pretrained(arguments.folder)
