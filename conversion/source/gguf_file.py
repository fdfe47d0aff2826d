# SPDX-License-Identifier: Apache-2.0
"""Models in a .gguf file, as llama.cpp keeps them: read where they lie, tensor by tensor, by the package `gguf` (an extra).

* Nothing is unpacked to disk: to dequantize a layer each time it is read is a few hundredths of a conversion's time.
* The file's own words make the configuration: Transformers' loader passes over scaled frequencies and Qwen3's width of a head.
* Llama's converter to GGUF interleaves the two halves of each head's queries and keys; that is undone.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, brief
from .families import FAMILIES


if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # others, of families that are converted too, have other words and tensors
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {  # after blk.N. and model.layers.N.
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FREQUENCIES = "rope_freqs.weight"  # what each rotary frequency is divided by: "llama3" is told in no other way
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # of all that there are
TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # each ends what is generated
CHUNK = 1 << 22  # numbers dequantized at a time: some copies of them in float32 are in memory


def is_gguf(path: Path) -> bool:
    """Whether a file is one by its name, or by its first bytes (Ollama's have no suffix)."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(len(MAGIC)) == MAGIC


class GGUFFile:
    """An open .gguf file with a language model.

    Args:
        path: the file.
        source: what the user called it, for messages.

    Raises:
        UserError: the package is not installed, or the file is damaged, a part of a model, or holds something else or a model of
            an architecture that is not read.
    """

    def __init__(self, path: Path, source: str) -> None:
        try:
            from gguf import GGUFReader, dequantize
        except ImportError:
            raise UserError('a .gguf file takes the package gguf, which is not installed: pip install "hf-mla[gguf]"') from None
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{source} is not a GGUF file: it does not begin with {MAGIC.decode()}; download it again")
        try:
            reader = GGUFReader(path)
        except Exception as error:  # any type: lengths and types are taken as they stand
            raise UserError(
                f"{source} is damaged, truncated or of a newer kind ({brief(error)}); download it again, or update the package gguf"
            ) from None
        self.path, self.source, self.fields = path, source, reader.fields
        kind, parts = self.field("general.type") or "model", self.field("split.count") or 1
        if parts > 1:
            raise UserError(f"{source} is one of {parts} parts; give one file, as llama-gguf-split --merge makes it")
        if kind != "model":
            raise UserError(f"{source} holds no language model but {kind!r}; give the .gguf file of the model itself")
        self.architecture = str(self.field("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"{source} is of architecture {self.architecture!r}; .gguf files of {', '.join(ARCHITECTURES)} are read: give a "
                f"checkpoint with safetensors, if its model type is one of {', '.join(FAMILIES)}"
            )
        if self.own("expert_count"):
            raise UserError(f"{source} is a mixture of {self.own('expert_count')} experts, which is not supported")
        self.tensors = {self.rename(tensor.name): tensor for tensor in reader.tensors}
        for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
            try:
                dequantize(tensor.data[:1], tensor.tensor_type)
            except Exception as error:  # any type: that is how the package says what it cannot read
                raise UserError(
                    f"{source}: {tensor.name} is stored as {tensor.tensor_type.name}, which the package gguf cannot dequantize "
                    f"({brief(error)}); give a file of another quantization"
                ) from None
        self.dtype = "float32" if all(tensor.tensor_type.name == "F32" for tensor in reader.tensors) else "bfloat16"

    def field(self, key: str) -> Any:
        """What the header says under a key, or None."""
        return self.fields[key].contents() if key in self.fields else None

    def own(self, key: str) -> Any:
        """What the header says of this architecture under a key, or None."""
        return self.field(f"{self.architecture}.{key}")

    def rename(self, name: str) -> str:
        """A tensor's name in Transformers; one that is not known stays as it is."""
        base, _, kind = name.rpartition(".")
        if base in NAMES:
            return f"{NAMES[base]}.{kind}"
        layer, _, part = base.removeprefix("blk.").partition(".")
        return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}" if part in LAYER_NAMES else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, as torch has it."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def config(self) -> Any:
        """The configuration in Transformers' terms.

        Returns:
            The configuration. `rope_freqs.weight`, if it is there, is part of it, and no tensor any more.

        Raises:
            UserError: the header is not that of such a model.
        """
        from transformers import CONFIG_MAPPING

        try:
            heads, hidden = self.own("attention.head_count"), self.own("embedding_length")
            width = self.own("attention.key_length") or hidden // heads
            turned = self.own("rope.dimension_count") or width
            fields = {
                "num_hidden_layers": self.own("block_count"),
                "hidden_size": hidden,
                "intermediate_size": self.own("feed_forward_length"),
                "num_attention_heads": heads,
                "num_key_value_heads": self.own("attention.head_count_kv") or heads,
                "max_position_embeddings": self.own("context_length"),
                "rms_norm_eps": decimal(self.own("attention.layer_norm_rms_epsilon")),
                "vocab_size": self.shape("model.embed_tokens.weight")[0],
                "tie_word_embeddings": "lm_head.weight" not in self.tensors,
                "rope_parameters": self.rope(width),
                "architectures": [f"{FAMILIES[self.architecture].mla.removesuffix('MLA')}ForCausalLM"],
                "dtype": self.dtype,
            }
            if FAMILIES[self.architecture].bias_options:
                fields["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self.tensors
            if self.architecture == "mistral":  # most say "llama"
                fields["sliding_window"] = self.own("attention.sliding_window")
            if width != hidden // heads or FAMILIES[self.architecture].qk_norm:
                fields["head_dim"] = width
            for token in ("bos_token", "eos_token", "pad_token"):
                fields[f"{token}_id"] = self.field(f"tokenizer.ggml.{TOKENS[token]}")
            config = CONFIG_MAPPING[self.architecture](**fields)
        except UserError:
            raise
        except Exception as error:  # any type: a key that is absent, or of which the library makes nothing
            raise UserError(f"{self.source} does not describe a {self.architecture!r} model ({brief(error)})") from None
        if turned != width or self.own("attention.value_length") not in (None, width):
            raise UserError(f"{self.source}: heads of several widths, or turned in part, are not supported")
        return config

    def rope(self, width: int) -> dict[str, Any]:
        """Rotary frequencies of heads of that width, as Transformers describes them."""
        import torch

        theta, kind = decimal(self.own("rope.freq_base") or 10000.0), self.own("rope.scaling.type") or "default"
        factor = self.own("rope.scaling.factor") or self.own("rope.scale_linear")
        if FREQUENCIES in self.tensors:
            divisors = self.tensor(FREQUENCIES, torch.float64)
            found = LLAMA3 | {"rope_type": "llama3", "rope_theta": theta, "factor": decimal(divisors.max().item())}
            found["original_max_position_embeddings"] = self.own("rope.scaling.original_context_length") or 8192
            if not torch.allclose(llama3_divisors(found, width), divisors, rtol=1e-4):
                raise UserError(f"{self.source}: its rotary frequencies ({FREQUENCIES}) are not those of rope type llama3")
            del self.tensors[FREQUENCIES]
            return found
        if kind in ("none", "default") and factor in (None, 0.0, 1.0):
            return {"rope_type": "default", "rope_theta": theta}
        if kind not in ("none", "default", "linear"):
            raise UserError(
                f"{self.source}: rope type {kind!r} is not supported in .gguf files; supported: default, linear, llama3"
            )
        return {
            "rope_type": "linear" if kind in ("none", "default") else kind,
            "rope_theta": theta,
            "factor": decimal(factor or 1.0),
        }

    def tensor(self, name: str, dtype: Any) -> "Tensor":
        """Dequantize a tensor, some rows at a time."""
        import torch
        from gguf import dequantize

        stored = self.tensors[name]
        shape = self.shape(name)
        whole = torch.empty(shape, dtype=dtype)
        rows = whole.view(-1, shape[-1])
        data = stored.data.reshape(len(rows), -1)
        count = max(1, CHUNK // shape[-1])
        for start in range(0, len(rows), count):
            rows[start : start + count] = torch.tensor(dequantize(data[start : start + count], stored.tensor_type))
        heads = {"q_proj": "attention.head_count", "k_proj": "attention.head_count_kv"}.get(name.split(".")[-2])
        if self.architecture in ("llama", "mistral") and heads is not None:
            count = self.own(heads) or self.own("attention.head_count")
            whole = whole.view(count, -1, 2, *shape[1:]).transpose(1, 2).reshape(shape)
        return whole

    def write_rest(self, folder: Path) -> None:
        """Write to an empty folder what goes with the weights: tokenizer, what ends a text, and the licence.

        Args:
            folder: where to.

        Raises:
            UserError: the library makes no tokenizer of the file.
        """
        from transformers import AutoTokenizer

        link = folder / "model.gguf"  # alone in a folder: the library would prefer any tokenizer that lies beside the file
        link.symlink_to(self.path.resolve())
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=link.name)
        except Exception as error:  # many types for whatever is missing there
            raise UserError(f"{self.source} has no usable tokenizer ({brief(error)})") from None
        finally:
            link.unlink()
        words = self.field("tokenizer.ggml.tokens")
        for token, key in TOKENS.items():  # older versions of the library confuse some
            place = self.field(f"tokenizer.ggml.{key}")
            setattr(tokenizer, token, None if place is None else words[place])
        tokenizer.save_pretrained(folder)
        generation = {
            name: self.field(f"tokenizer.ggml.{TOKENS[name.removesuffix('_id')]}") for name in ("bos_token_id", "pad_token_id")
        }
        ends = list(dict.fromkeys(end for key in ENDS if (end := self.field(f"tokenizer.ggml.{key}")) is not None))
        generation["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
        kept = {name: value for name, value in generation.items() if value is not None}
        (folder / "generation_config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        licence = {"license": "general.license", "license_name": "general.license.name", "license_link": "general.license.link"}
        said = [f"{name}: {json.dumps(self.field(key))}" for name, key in licence.items() if self.field(key)]
        if said:
            (folder / "README.md").write_text("\n".join(["---", *said, "---", ""]), encoding="utf-8")


def decimal(number: float) -> float:
    """A number that went through float32, as it was written before: 1e-05, not 9.999999747378752e-06."""
    import numpy

    return float(str(numpy.float32(number)))


def llama3_divisors(parameters: dict[str, Any], width: int) -> "Tensor":
    """What the frequencies of heads of that width are divided by under rope type "llama3" [width / 2]."""
    import torch

    wavelengths = 2 * math.pi * parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = parameters["original_max_position_embeddings"] / wavelengths
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # the share of a frequency that stays as it is
    return 1 / (kept + (1 - kept) / parameters["factor"])
