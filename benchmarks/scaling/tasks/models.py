"""Models of random weights: those of Llamas that are converted and healed, and one with MLA to decode with."""

import time
from pathlib import Path

import torch
from llama_width import TINY_WIDTH, WIDTH, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig

from hf_mla_conversion.source.shards import ShardWriter, TensorHeader
from hf_mla_conversion.source.text import BUNDLED

from .process import DEVICE, result


NO_END = {"bos_token_id": None, "eos_token_id": None}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "max_position_embeddings": 8192}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}


def llama(name: str, layers: int, tiny: bool) -> LlamaConfig:
    """The configuration of a Llama-3-8B ("8b") or Llama-3.2-1B ("1b") of so many layers."""
    shape = TINY_WIDTH if tiny else {"8b": WIDTH, "1b": LLAMA_1B}[name]
    sizes = {"vocab_size": 4608 if tiny else 128256, "num_hidden_layers": layers, "tie_word_embeddings": name == "1b"}
    rope = ROPE | ({"max_position_embeddings": 256} if tiny else {})
    return LlamaConfig(**shape, **sizes, **rope, **NO_END, architectures=["LlamaForCausalLM"], dtype="bfloat16")


def headers(config: PreTrainedConfig) -> dict[str, TensorHeader]:
    """The tensors of a model of this configuration, in bfloat16, by the names of its checkpoints."""
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = revert_weight_conversion(model, model.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: TensorHeader(tuple(tensor.shape), "BF16") for name, tensor in state.items()}


def make_llama(name: str, folder: str, layers: int, tiny: bool) -> None:
    """Write a Llama of random weights, with the bundled model's tokenizer."""
    config, path, begun = llama(name, layers, tiny), Path(f"{folder}.partial"), time.perf_counter()
    path.mkdir(parents=True)
    tensors = headers(config)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(tensor_name: str) -> torch.Tensor:
        shape = tensors[tensor_name].shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=DEVICE) * 0.02

    ShardWriter(path, tensors, shard_bytes=1 << 30).write(draw)
    config.save_pretrained(path)
    AutoTokenizer.from_pretrained(BUNDLED / "model").save_pretrained(path)
    path.rename(folder)
    result(bytes=sum(tensor.bytes for tensor in tensors.values()), seconds=time.perf_counter() - begun)


def make_converted(folder: str, layers: int, tiny: bool) -> None:
    """Write the Llama of `llama_width.py` with MLA, random weights, and beside it (FOLDER-gqa) the original's configuration."""
    torch.manual_seed(0)
    make_model("converted", layers, tiny).save_pretrained(folder)
    make_model("gqa", layers, tiny).save_pretrained(f"{folder}-gqa")
    result(layers=layers)
