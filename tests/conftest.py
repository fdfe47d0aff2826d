"""Models for the tests: the bundled trained one, and small random ones of any shape, saved as users have them."""

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network
os.environ.pop("CUDA_VISIBLE_DEVICES", None)

from transformers import AutoTokenizer  # noqa: E402

from hf_mla import LlamaMLAConfig, LlamaMLAForCausalLM  # noqa: E402
from hf_mla_conversion import convert  # noqa: E402
from hf_mla_conversion.text import BUNDLED  # noqa: E402


MODEL = str(BUNDLED / "model")
VALIDATION = str(BUNDLED / "validation.txt.xz")


def make_llama(folder, dtype=torch.float32, shard_size="1GB", mix=False, **changes):
    """Save a random Llama with the bundled tokenizer. `mix`: all key heads are unitary mixes of the first."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 4096}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(**(shape | {"pad_token_id": 2} | changes)))
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=0.25 if parameter.ndim > 1 else 0.02)
        if "norm" in name:
            parameter.data += 1
    model.to(dtype)
    if mix:
        for layer in model.model.layers:
            key = layer.self_attn.k_proj.weight.data
            heads = torch.complex(*key.view(model.config.num_key_value_heads, 2, -1, key.shape[1]).unbind(1))  # [g, d/2, D]
            size, angle = torch.rand(2, *heads.shape[:2], dtype=dtype)
            phases = torch.polar(size + 0.5, 6.28 * angle)
            heads = heads[:1] * phases.unsqueeze(-1)
            key.copy_(torch.stack([heads.real, heads.imag], dim=1).reshape(key.shape))
    model.save_pretrained(folder, max_shard_size=shard_size)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return str(folder)


def make_mla(**changes):
    """A random MLA model in float32, with logits of order one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    shape |= {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "pad_token_id": 0}
    model = LlamaMLAForCausalLM(LlamaMLAConfig(**(shape | changes))).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.15)
    return model


@pytest.fixture
def mla():
    return make_mla()


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The bundled model, converted as `hf-mla demo` does but on less text; a folder and the report."""
    folder = tmp_path_factory.mktemp("bundled") / "mla"
    report = convert(MODEL, str(folder), calibration_tokens=16384, device="cpu")
    return str(folder), report
