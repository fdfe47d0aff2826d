"""What fits where, by `hf-mla plan` and by what training counts, for models of which there are only headers."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from hf_mla_conversion import plan
from hf_mla_conversion.commands.heal import trained_parameters
from hf_mla_conversion.commands.plan import memory_estimate
from hf_mla_conversion.mathematics.closed_form import mla_config
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.matching import match_model
from hf_mla_conversion.source.shards import file_header
from hf_mla_conversion.stages.end_to_end import LORA_RANK, Training, memory

from .models import ROPE, headers, llama
from .process import result


def write_headers(config: PreTrainedConfig, folder: Path) -> None:
    """A checkpoint with configuration and headers; its numbers are holes in files, which take no room."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = headers(config)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(file_header(tensors))
        file.truncate(file.tell() + sum(tensor.bytes for tensor in tensors.values()))


def known_models() -> dict[str, PreTrainedConfig]:
    """Configurations of models that people have, by name."""
    llama_70b = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    qwen_32b = {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    qwen_235b = {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_attention_heads": 64}
    qwen_235b |= {"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936}
    context = {"max_position_embeddings": 40960, "tie_word_embeddings": False}
    return {
        "Llama-3-8B": llama("8b", 32, tiny=False),
        "Qwen3-32B": Qwen3Config(**qwen_32b, **context, num_hidden_layers=64, vocab_size=151936),
        "Llama-3-70B": LlamaConfig(**llama_70b, head_dim=128, num_hidden_layers=80, vocab_size=128256, **ROPE),
        "Qwen3-235B-A22B": Qwen3MoeConfig(**qwen_235b, **context, num_hidden_layers=94, norm_topk_prob=True),
    }


def fits(folder: str, out: str) -> None:
    """What `hf-mla plan` says of models of which there are only headers here, and what training them takes by `memory`."""
    found = []
    for name, config in known_models().items():
        place = Path(folder) / name
        write_headers(config, place)
        checkpoint = match_model(open_checkpoint(str(place), headers_only=True))
        planned = plan(str(place), kv_lora_rank=512, qk_rope_head_dim=64)
        assert planned.bytes_written is not None and planned.kv_bytes_per_token is not None
        converted = mla_config(checkpoint.config, 512, 64, "bfloat16")
        numbers = planned.bytes_written // 2
        heals = {}
        for what in ("lora", "all"):
            trained = numbers if what == "all" else trained_parameters(checkpoint, what, LORA_RANK)
            training = Training(what, 1, 0.0, 1, 1, 0, 1, gradient_checkpointing=True)
            types, sizes = (torch.bfloat16, torch.bfloat16), (numbers, checkpoint.parameters, trained)
            heals[f"heal_{what}"] = memory(converted, sizes, types, training, 2048, torch.device("cuda"))
        cache = planned.kv_bytes_per_token
        found.append(
            {
                "model": name,
                "parameters": checkpoint.parameters,
                "kv_bytes_per_token": {"source": cache.source, "converted": cache.converted},
                "bytes": planned.bytes_read,
                "convert_gpu": memory_estimate(checkpoint, (512, 64), 0, "cuda"),
                "hidden_states": 2097152 * config.hidden_size * 2,
                "convert_cpu": planned.peak_memory_bytes,
                **heals,
            }
        )
        result(**found[-1])
    Path(out).write_text(json.dumps({"models": found}, indent=1) + "\n")


def planned(folder: str, tokens: int, tiny: bool) -> None:
    """What `hf-mla plan` counts for a conversion, with the hidden states of so many tokens and without."""
    checkpoint = match_model(open_checkpoint(folder, headers_only=True))
    size, device = ((24, 8), "cpu") if tiny else ((512, 64), "cuda")
    result(
        without_hidden_states=memory_estimate(checkpoint, size, 0, device),
        with_hidden_states=memory_estimate(checkpoint, size, tokens, device),
    )
