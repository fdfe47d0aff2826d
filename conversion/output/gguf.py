# SPDX-License-Identifier: Apache-2.0
"""A converted model as a .gguf file, for llama.cpp and what stands on it; written by the package `gguf` (an extra).

* It is llama.cpp's "deepseek2" without experts and with plain queries; `deepseek.py` has the layout of the weights, which are not
  padded. The keys' and the values' part of `kv_b_proj` are two tensors there, the keys' transposed. llama.cpp caches the latent and
  the rotary key, and reads values from the latent.
* Tensors are written one at a time. Attention weights are changed in float32 and rounded once.
* Vectors are in float32 whatever is asked for, and a matrix whose rows are no whole blocks of q8_0 is in float16.
* Layers in closed form have latents too small for float16 and its blocks; there the projection to them is in float32.
"""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..source.checkpoint import user_path
from ..source.gguf_file import CHUNK, LAYER_NAMES, NAMES
from ..source.matching import ModelCheckpoint
from .card import licence
from .deepseek import HEAD, DeepseekV3Export, widths_of
from .folder import arrive, lies_in, locked, work_folder
from .gguf_vocabulary import Vocabulary, vocabulary
from .reports import ExportReport, PerSide
from .tables import size
from .writing import generation_settings


if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

OUTTYPES = ("f32", "bf16", "f16", "q8_0")
ARCHITECTURE = "deepseek2"
LATENT_NAMES = {
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_k_b, attn_v_b",
}
TENSOR_NAMES = {library: name for name, library in (NAMES | LAYER_NAMES).items()} | LATENT_NAMES


class GGUFExport(DeepseekV3Export):
    """The tensors of a converted model as llama.cpp has them.

    Args:
        checkpoint: of a converted model that `refusal` lets through; on disk.
        outtype: of matrices, one of `OUTTYPES`.
    """

    latent_eps = None

    def __init__(self, checkpoint: ModelCheckpoint, outtype: str) -> None:
        super().__init__(checkpoint, widths_of(checkpoint.config))
        self.outtype = outtype
        if HEAD not in checkpoint.tensors:  # llama.cpp takes the embedding by itself
            del self.headers[HEAD]

    def read(self, name: str) -> Tensor:
        """A tensor of the layout of `deepseek.py`; of an attention, in float32."""
        return self.change(name, self.checkpoint.load([name], "cpu", torch.float32 if ".self_attn." in name else None)[name])

    def parts(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What a tensor of that layout becomes, by llama.cpp's names."""
        module = name.removesuffix(".weight")
        prefix = ""
        if module.startswith("model.layers."):
            layer, _, module = module.removeprefix("model.layers.").partition(".")
            prefix = f"blk.{layer}."
        renamed = [f"{prefix}{each}.weight" for each in TENSOR_NAMES[module].split(", ")]
        if len(renamed) == 1:
            yield renamed[0], weight
            return
        both = weight.unflatten(0, (self.model.num_attention_heads, -1))  # [H, N + V, R]
        keys, values = both.split([self.widths.qk_nope_head_dim, self.widths.v_head_dim], dim=1)
        yield renamed[0], keys.transpose(1, 2)
        yield renamed[1], values

    def type_of(self, name: str, shape: tuple[int, ...]) -> "GGMLQuantizationType":
        """The type that a tensor of the file has."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if len(shape) == 1 or (name.endswith("attn_kv_a_mqa.weight") and self.identity[int(name.split(".")[1])]):
            return GGMLQuantizationType.F32
        chosen = GGMLQuantizationType[self.outtype.upper()]
        return chosen if shape[-1] % GGML_QUANT_SIZES[chosen][0] == 0 else GGMLQuantizationType.F16

    def infos(self) -> Iterator[tuple[str, tuple[int, ...], "GGMLQuantizationType"]]:
        """Name, shape and type of each tensor of the file, in the order of `data`."""
        for name, header in self.headers.items():
            for part, empty in self.parts(name, torch.empty(header.shape, device="meta")):
                yield part, tuple(empty.shape), self.type_of(part, tuple(empty.shape))

    def data(self) -> Iterator[np.ndarray]:
        """The bytes of each tensor of the file."""
        for name in self.headers:
            for part, weight in self.parts(name, self.read(name)):
                yield encoded(weight, self.type_of(part, tuple(weight.shape)))


def encoded(weight: Tensor, kind: "GGMLQuantizationType") -> np.ndarray:
    """A tensor's bytes in a type of ggml's; some rows at a time, since quantizing takes several copies in float32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    plain = {
        GGMLQuantizationType.F32: torch.float32,
        GGMLQuantizationType.F16: torch.float16,
        GGMLQuantizationType.BF16: torch.bfloat16,
    }
    weight = weight.contiguous()
    if kind in plain:
        return weight.to(plain[kind]).flatten().view(torch.uint8).numpy()
    rows = weight.view(-1, weight.shape[-1]).split(max(1, CHUNK // weight.shape[-1]))
    return np.concatenate([quantize(part.float().numpy(), kind).reshape(-1) for part in rows])


def export_gguf(checkpoint: ModelCheckpoint, dest: str, tokenizer: Any, outtype: str | None, *, overwrite: bool) -> ExportReport:
    """Write a converted model to a .gguf file.

    Args:
        checkpoint: the model; of a kind that `refusal` lets through.
        dest: the file, which appears whole or not at all.
        tokenizer: the model's, which `tokenizer_refusal` lets through.
        outtype: of matrices, one of `OUTTYPES`; None for what the checkpoint stores.
        overwrite: replace a file.

    Returns:
        What was written.

    Raises:
        UserError: an argument is not allowed, or the file cannot be written.
    """
    if outtype is None:
        outtype = {"F32": "f32", "F64": "f32", "F16": "f16"}.get(checkpoint.dtype, "bf16")
    if outtype not in OUTTYPES:
        raise UserError(f"--outtype is {outtype}; allowed: {', '.join(OUTTYPES)}")
    path = checked_file(dest, checkpoint, overwrite=overwrite)
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise UserError('--format gguf takes the package gguf, which is not installed: pip install "hf-mla[gguf]"') from None
    words = vocabulary(tokenizer, checkpoint.config.vocab_size, text_ends(checkpoint))
    exported = GGUFExport(checkpoint, outtype)
    writer = GGUFWriter(None, ARCHITECTURE)
    describe(writer, exported, checkpoint, path.stem)
    add_vocabulary(writer, words)
    written = tensors = 0
    for name, shape, kind in exported.infos():
        count = bytes_of(shape, kind)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=kind)
        written, tensors = written + count, tensors + 1
    free = shutil.disk_usage(path.parent).free
    if free < written:
        raise UserError(f"{path.parent} has {size(free)} free, the file takes {size(written)}; make room or write elsewhere")
    work = work_folder(path)
    partial = work / path.name
    try:
        with locked(work, path):
            try:
                writer.write_header_to_file(partial)
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for data in exported.data():
                    writer.write_tensor_data(data)
                writer.close()
                arrive(work)
                partial.replace(path)
            finally:
                with suppress(OSError):  # of a full disk: what is buffered cannot be written
                    writer.close()
                partial.unlink(missing_ok=True)
    except OSError as error:
        why = error.strerror or f"the disk seems to be full ({error})"  # NumPy says how much it wrote, not why
        raise UserError(f"cannot write {dest}: {why}; nothing is kept") from None
    floats = exported.widths.kv_floats_per_token_per_layer
    return ExportReport(
        format="gguf",
        refused=None,
        tensors=tensors,
        bytes_written=written,
        padded=exported.widths,
        kv_floats_per_token_per_layer=PerSide(floats, floats),
        output=str(path),
    )


def checked_file(dest: str, checkpoint: ModelCheckpoint, *, overwrite: bool) -> Path:
    """The file to write, or a UserError."""
    assert checkpoint.folder is not None
    try:
        path = user_path(dest).resolve()
        if path.is_dir() or path.suffix != ".gguf":
            raise UserError(f"{dest} is no name of a .gguf file; give one, such as {Path(dest) / 'model.gguf'}")
        if not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent}; make it first")
        if lies_in(path, checkpoint.folder):
            raise UserError(f"{dest} lies in the checkpoint; choose another folder")
        if path.exists() and not overwrite:
            raise UserError(f"{dest} exists; choose another name, or pass --overwrite")
    except (OSError, RuntimeError) as error:  # the latter from links in a circle
        raise UserError(f"cannot write {dest}: {getattr(error, 'strerror', None) or error}") from None
    return path


def text_ends(checkpoint: ModelCheckpoint) -> list[int]:
    """The tokens that end what a model generates, as its settings for `generate` and its configuration say."""
    ends = generation_settings(checkpoint).get("eos_token_id", checkpoint.config.eos_token_id)
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]


def bytes_of(shape: tuple[int, ...], kind: "GGMLQuantizationType") -> int:
    """What a tensor takes in the file."""
    from gguf import GGML_QUANT_SIZES

    numbers, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // numbers * size


def describe(writer: "GGUFWriter", exported: GGUFExport, checkpoint: ModelCheckpoint, name: str) -> None:
    """Write what llama.cpp must know of the model, and whose it is."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    model, widths = exported.model, exported.widths
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType["ALL_F32" if exported.outtype == "f32" else f"MOSTLY_{exported.outtype.upper()}"])
    if exported.outtype == "q8_0":
        writer.add_quantization_version(GGML_QUANT_VERSION)
    add = {"license": writer.add_license, "license_name": writer.add_license_name, "license_link": writer.add_license_link}
    for key, value in licence(checkpoint).items():
        add[key](", ".join(map(str, value)) if isinstance(value, list) else str(value))
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(exported.eps)
    writer.add_rope_dimension_count(widths.qk_rope_head_dim)
    writer.add_rope_freq_base(model.rope_parameters["rope_theta"])
    writer.add_q_lora_rank(0)  # required, though queries are not compressed
    writer.add_kv_lora_rank(widths.kv_lora_rank)
    writer.add_key_length(widths.kv_floats_per_token_per_layer)  # of what is cached,
    writer.add_value_length(widths.kv_lora_rank)
    writer.add_key_length_mla(widths.qk_nope_head_dim + widths.qk_rope_head_dim)  # and of a head
    writer.add_value_length_mla(widths.v_head_dim)
    writer.add_leading_dense_block_count(model.num_hidden_layers)
    writer.add_expert_feed_forward_length(model.intermediate_size)  # required, though there are no experts
    writer.add_expert_shared_count(0)


def add_vocabulary(writer: "GGUFWriter", words: Vocabulary) -> None:
    """Write a tokenizer."""
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    add = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "eot": writer.add_eot_token_id}
    add |= {"eom": writer.add_eom_token_id, "unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id}
    for role, number in words.ids.items():
        add[role](number)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    template = words.chat_template
    if template:
        named = [{"name": name, "template": text} for name, text in template.items()] if isinstance(template, dict) else template
        writer.add_chat_template(named)
