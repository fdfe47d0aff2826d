# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: the shards of a checkpoint, by their headers, and small files of tensors.

* A truncated shard, or an index that names an absent one, is found before any weight is read.
* `ShardWriter` writes shards tensor by tensor.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import UserError


if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of the types that weights can have
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as torch and safetensors name them
TORCH_NAMES = {header: name for name, header in DTYPES.items()}


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    file: str = ""
    """The shard that holds it."""

    @classmethod
    def of(cls, tensor: "Tensor") -> "TensorHeader":
        """The header of a tensor."""
        return cls(tuple(tensor.shape), DTYPES[str(tensor.dtype).removeprefix("torch.")])

    @property
    def parameters(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Bytes of the elements."""
        if self.dtype in ITEMSIZE:
            return self.parameters * ITEMSIZE[self.dtype]
        bits = re.search(r"\d+", self.dtype)  # I64, U8, F8_E4M3; BOOL has none, and a byte
        return math.ceil(self.parameters * int(bits[0] if bits else 8) / 8)


def read_headers(folder: Path, source: str) -> dict[str, TensorHeader]:
    """Read the headers of all shards of a folder.

    Args:
        folder: where the shards are.
        source: what the user called it, for messages.

    Returns:
        The headers by tensor name.

    Raises:
        UserError: no safetensors, an index that does not match the shards, or a shard that is truncated.
    """
    from safetensors import SafetensorError, safe_open

    index_path, named = folder / INDEX, None
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif index_path.is_file():
        try:
            index = json.loads(index_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{source}/{INDEX} cannot be read ({error}); download it again") from None
        named = index.get("weight_map") if isinstance(index, dict) else None
        if not named or not isinstance(named, dict) or not all(file == Path(str(file)).name for file in named.values()):
            raise UserError(f"{source}/{INDEX} does not map tensors to files beside it; download it again")
        files = sorted(set(named.values()))
    else:
        refuse_format(source)
    tensors = {}
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{source}/{INDEX} names {file}, which is not there; download it again")
        try:
            with safe_open(folder / file, framework="np") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    view = shard.get_slice(name)
                    tensors[name] = TensorHeader(tuple(view.get_shape()), view.get_dtype(), file)
        except SafetensorError as error:
            raise UserError(f"{source}/{file} is damaged or truncated ({error}); download it again") from None
    for name, file in (named or {}).items():
        if name not in tensors or tensors[name].file != file:
            raise UserError(f"{source}/{INDEX} says that {file} holds {name}, which it does not; download it again")
    return tensors


def refuse_format(source: str) -> NoReturn:
    """Refuse weights that are not in safetensors files."""
    raise UserError(
        f"{source} is not a checkpoint with safetensors weights: it has neither {WEIGHTS} nor {INDEX}; if it has weights of "
        "another format, load it with Transformers and save it again with save_pretrained; a .gguf file is given itself, "
        "downloaded first"
    )


def file_header(tensors: dict[str, TensorHeader]) -> bytes:
    """What a file of these tensors begins with, before their bytes: https://github.com/huggingface/safetensors#format.

    That is eight bytes that tell its length, and a JSON header padded to a multiple of eight.

    Args:
        tensors: by name, in the order in which they lie in the file.

    Returns:
        The bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, offset + tensor.bytes]}
        offset += tensor.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes safetensors shards tensor by tensor, holding one in memory: names, shapes and types are known beforehand.

    (The library writes a file from tensors that are all in memory.)

    Args:
        folder: where to.
        tensors: what will be written, by name.
        shard_bytes: a shard holds at most so much, or one tensor.
    """

    def __init__(self, folder: Path, tensors: dict[str, TensorHeader], shard_bytes: int = 4 << 30) -> None:
        self.folder, self.tensors = folder, tensors
        shards: list[list[str]] = [[]]
        filled = 0
        for name, tensor in tensors.items():
            if shards[-1] and filled + tensor.bytes > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += tensor.bytes
        # Widest types first, so that every tensor starts at a multiple of its width.
        self._shards = [sorted(names, key=lambda name: -ITEMSIZE[tensors[name].dtype]) for names in shards]

    def write(self, read: "Callable[[str], Tensor]", process: int = 0, processes: int = 1) -> None:
        """Write all shards, and the index if there are several.

        Args:
            read: gives a tensor by its name.
            process: of several that write the same model, which this is; each writes its share of the shards.
            processes: how many there are.
        """
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            file = WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            weight_map |= dict.fromkeys(names, file)
            if number % processes == process:
                self._write_shard(self.folder / file, names, read)
        if count > 1 and process == 0:
            index = {
                "metadata": {"total_size": sum(tensor.bytes for tensor in self.tensors.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write_shard(self, path: Path, names: list[str], read: "Callable[[str], Tensor]") -> None:
        import torch

        with open(path, "wb") as file:
            file.write(file_header({name: self.tensors[name] for name in names}))
            for name in names:
                data = read(name).detach().cpu().contiguous()
                assert TensorHeader.of(data) == replace(self.tensors[name], file=""), name
                file.write(data.flatten().view(torch.uint8).numpy().tobytes())


def save_file(tensors: "dict[str, Tensor]", path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file that appears whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file as save

    partial = path.with_suffix(".partial")
    try:
        save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:  # a full disk arrives as this, not as an OSError
        raise OSError(str(error)) from error
    partial.replace(path)


def load_file(path: Path) -> "dict[str, Tensor]":
    """Read a safetensors file that `save_file` wrote; the tensors are mapped, not copied."""
    from safetensors.torch import load_file as load

    return load(path)
