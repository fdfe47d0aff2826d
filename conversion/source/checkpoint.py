# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk and on the Hub: find, check by header, read, write.

* Headers first: a truncated shard or an index that names an absent one is found before any weight is read. Whether the tensors
  are those of a model is found next, in `matching.py`.
* A .gguf file (`gguf_file.py`) is a checkpoint as well, of tensors in bfloat16.
* Of a multimodal checkpoint the text decoder alone is one, by the names that it would have without the rest.
* `ShardWriter` writes shards tensor by tensor.
"""

import json
import logging
import math
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import UserError, brief
from .families import FAMILIES, WRAPPERS
from .gguf_file import GGUFFile, is_gguf
from .hub import hub_says


if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # of PEFT
RECORD = "conversion.json"  # how a converted checkpoint was made
ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of the types that weights can have
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as torch and safetensors name them
LICENCES = ["LICEN[CS]E*", "Licen[cs]e*", "licen[cs]e*", "COPYING*", "NOTICE*", "Notice*", "USE_POLICY*"]
# What a checkpoint needs besides weights; pickles, other frameworks' weights and pictures stay on the Hub.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "README.md"]
HUB_PATTERNS += LICENCES
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# What stands before the names of a text decoder's tensors, its head's too or not, as older and newer Transformers save multimodal
# models; what is left may be without the prefix of a decoder with a head, as in any checkpoint.
IN_WRAPPER = r"^(model\.)?language_model\."


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    file: str = ""
    """The shard that holds it."""

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


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and found consistent."""

    name: str
    """As the user gave it."""
    config: Any
    """The Transformers configuration."""
    tensors: dict[str, TensorHeader]
    folder: Path | None = field(default=None)
    """Where it lies on disk; None if only headers were read of a Hub checkpoint or a .gguf file."""

    def __post_init__(self) -> None:
        if not self.tensors:
            raise UserError(f"{self.name} holds no tensors; download it again")

    @property
    def parameters(self) -> int:
        """Number of stored parameters."""
        return sum(tensor.parameters for tensor in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The type that most parameters are stored in: "F64", "F32", "F16" or "BF16", unless all are quantized."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.parameters
        return max(counts, key=lambda dtype: (dtype in ITEMSIZE, counts[dtype]))

    @property
    def paths(self) -> dict[str, Path]:
        """The files that make it what it is, by name: config.json and the shards."""
        assert self.folder is not None
        return {name: self.folder / name for name in ["config.json", *sorted({tensor.file for tensor in self.tensors.values()})]}

    def load(self, names: list[str], device: Any, dtype: Any = None) -> "dict[str, Tensor]":
        """Read some tensors into memory of their own.

        Args:
            names: which.
            device: where to.
            dtype: in which type; None keeps the stored one.

        Returns:
            The tensors by name.

        Raises:
            UserError: they are not there any more.
        """
        from safetensors import SafetensorError, safe_open

        assert self.folder is not None
        files: dict[str, list[str]] = {}
        for name in names:
            files.setdefault(self.tensors[name].file, []).append(name)
        loaded = {}
        for file, inside in files.items():
            try:
                with safe_open(self.folder / file, framework="pt") as shard:
                    for name in inside:
                        # A copy: a view would keep the whole file mapped.
                        loaded[name] = shard.get_tensor(name).to(device, dtype, copy=True)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.name}/{file} changed while it was read: {brief(error)}") from None
        return loaded


@dataclass(frozen=True, kw_only=True)
class GGUFCheckpoint(Checkpoint):
    """A .gguf file, whose tensors are dequantized as they are read. `folder` has what else was in it, and no weights."""

    file: GGUFFile
    """The file."""

    @property
    def paths(self) -> dict[str, Path]:
        """The file."""
        return {self.file.path.name: self.file.path}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(int(tensor.n_bytes) for tensor in self.file.tensors.values())

    def load(self, names: list[str], device: Any, dtype: Any = None) -> "dict[str, Tensor]":
        """Dequantize some tensors; see `Checkpoint.load`."""
        import torch

        stored = getattr(torch, self.file.dtype)
        return {name: self.file.tensor(name, stored).to(device, dtype) for name in names}


@dataclass(frozen=True, kw_only=True)
class DecoderCheckpoint(Checkpoint):
    """The text decoder in a multimodal checkpoint."""

    whole: Checkpoint
    """The checkpoint."""
    names: dict[str, str]
    """What the decoder's tensors are called there, by their names here."""

    def load(self, names: list[str], device: Any, dtype: Any = None) -> "dict[str, Tensor]":
        """Read some tensors; see `Checkpoint.load`."""
        read = self.whole.load([self.names[name] for name in names], device, dtype)
        return {name: read[self.names[name]] for name in names}


def open_checkpoint(source: str, revision: str | None = None, *, headers_only: bool = False) -> Checkpoint:
    """Open a folder, a .gguf file or a Hub id and check that it is a whole checkpoint; of a multimodal one, the text decoder.

    Args:
        source: a folder, a .gguf file, or a Hub id; an id is downloaded (or taken from the local cache when offline).
        revision: branch, tag or commit of a Hub id.
        headers_only: of a Hub id, fetch configuration and safetensors headers only; of a .gguf file, leave the tokenizer.

    Returns:
        The checkpoint. Whether its family can be converted is not checked here, nor whether its tensors are those of a model.

    Raises:
        UserError: there is no such folder or id, it is not a checkpoint, or a file of it is missing or damaged.
    """
    folder = user_path(source)
    if not folder.is_dir():
        if is_gguf(folder):
            return open_gguf(folder, source, headers_only=headers_only)
        if folder.exists():
            raise UserError(f"{source} is a file; give a .gguf file, or the folder that holds config.json and *.safetensors")
        if source.lower().endswith(".gguf"):
            raise UserError(f"there is no file {source}; download a .gguf file of the Hub first: hf download REPOSITORY FILE")
        if not HUB_ID.fullmatch(source):
            raise UserError(f"there is no folder {source}; give a checkpoint folder or a Hub id like org/name")
        headers = hub_headers(source, revision) if headers_only else None
        if headers is not None:
            return text_decoder(headers)
        folder = hub_folder(source, revision)
    if (folder / ADAPTER).is_file():
        refuse_adapter(source)
    return text_decoder(Checkpoint(source, read_config(folder, source), read_headers(folder, source), folder))


def text_decoder(checkpoint: Checkpoint) -> Checkpoint:
    """The text decoder of a multimodal checkpoint, if it is of a supported family; any other checkpoint as it is."""
    whole, name = checkpoint.config, checkpoint.name
    if whole.model_type not in WRAPPERS or whole.text_config.model_type not in FAMILIES:
        return checkpoint
    config = whole.text_config
    config.tie_word_embeddings = whole.tie_word_embeddings  # the library goes by this one
    config.quantization_config = getattr(whole, "quantization_config", None)
    heads = [tensor for tensor in checkpoint.tensors if tensor.startswith("lm_head.")]
    names = {re.sub(IN_WRAPPER, "", tensor): tensor for tensor in checkpoint.tensors if re.match(IN_WRAPPER, tensor)}
    if not names:
        raise UserError(f"{name} has no tensor under language_model, as a {whole.model_type!r} has it in Transformers; save it so")
    names |= {tensor: tensor for tensor in heads}
    logger.warning("%s is a %r: its text decoder (%s) is taken, all else is left out", name, whole.model_type, config.model_type)
    tensors = {tensor: checkpoint.tensors[inside] for tensor, inside in names.items()}
    return DecoderCheckpoint(name, config, tensors, checkpoint.folder, whole=checkpoint, names=names)


def open_gguf(path: Path, source: str, *, headers_only: bool) -> Checkpoint:
    """Open a .gguf file, which the user called `source`; see `open_checkpoint`."""
    file = GGUFFile(path, source)
    config = file.config()
    tensors = {name: TensorHeader(file.shape(name), DTYPES[file.dtype], path.name) for name in file.tensors}
    if headers_only:
        return GGUFCheckpoint(source, config, tensors, file=file)
    try:
        folder = Path(tempfile.mkdtemp(prefix="hf_mla-"))
        checkpoint = GGUFCheckpoint(source, config, tensors, folder, file=file)
        weakref.finalize(checkpoint, shutil.rmtree, folder, ignore_errors=True)
        config.save_pretrained(folder)
        file.write_rest(folder)
    except OSError as error:
        raise UserError(f"cannot write to {tempfile.gettempdir()}: {error.strerror or error}; set TMPDIR to a folder") from None
    return checkpoint


def refuse_adapter(source: str) -> NoReturn:
    """Refuse a folder with an adapter; beside a model too, for Transformers would load the one that the adapter names."""
    raise UserError(f"{source} is an adapter ({ADAPTER}); merge it with its model (PEFT's merge_and_unload) and convert the result")


def refuse_format(source: str) -> NoReturn:
    """Refuse weights that are not in safetensors files."""
    raise UserError(
        f"{source} is not a checkpoint with safetensors weights: it has neither {WEIGHTS} nor {INDEX}; if it has weights of "
        "another format, load it with Transformers and save it again with save_pretrained; a .gguf file is given itself, "
        "downloaded first"
    )


def user_path(given: str) -> Path:
    """A path as a user writes it: `~` is expanded; an empty one is refused."""
    if not given:
        raise UserError("an empty path was given; give a folder or file")
    try:
        path = Path(given).expanduser()
        path.exists()  # an error if the name is too long, or where it would be cannot be looked at
    except (OSError, RuntimeError) as error:
        raise UserError(f"{given}: {getattr(error, 'strerror', None) or brief(error)}") from None
    return path


def hub_folder(source: str, revision: str | None) -> Path:
    """Download a Hub checkpoint, or find it in the local cache when the Hub cannot be reached."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=HUB_PATTERNS))
    except LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise UserError(
            f"{source} is neither a folder here nor whole in the local Hub cache, and {offline}; check the path, or go online"
        ) from None
    except HfHubHTTPError as error:
        raise UserError(f"{source} is not a folder here, and the Hub says: {hub_says(error, source)}") from None
    except Exception as error:  # of the HTTP library, which depends on the version of the Hub's
        raise UserError(f"{source} could not be downloaded ({brief(error)}); the same command goes on with it") from None


def hub_headers(source: str, revision: str | None) -> Checkpoint | None:
    """Read configuration and headers of a Hub checkpoint without its weights; None when the Hub cannot be reached."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download, model_info
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, NotASafetensorsRepoError, OfflineModeIsEnabled

    try:
        if ADAPTER in {file.rfilename for file in model_info(source, revision=revision).siblings or []}:
            refuse_adapter(source)
        metadata = get_safetensors_metadata(source, revision=revision)
        config = Path(hf_hub_download(source, "config.json", revision=revision))
    except UserError:
        raise
    except NotASafetensorsRepoError:
        refuse_format(source)
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        return None
    except HfHubHTTPError as error:
        raise UserError(f"{source} is not a folder here, and the Hub says: {hub_says(error, source)}") from None
    except Exception:  # no connection
        return None
    tensors = {
        name: TensorHeader(tuple(info.shape), info.dtype, file)
        for file, header in metadata.files_metadata.items()
        for name, info in header.tensors.items()
    }
    return Checkpoint(source, read_config(config.parent, source), tensors)


def read_raw_config(folder: Path, source: str) -> dict[str, Any]:
    """What the config.json of a folder holds, which the user called `source`; it names a model type, or a UserError is raised."""
    path = folder / "config.json"
    if not path.is_file():
        inside = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; give one of its .gguf files, such as {source.rstrip('/')}/{inside[0]}" if inside else ""
        raise UserError(f"{source} is not a checkpoint: it has no config.json{hint}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{source}/config.json cannot be read as a model configuration ({error})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise UserError(f"{source}/config.json cannot be read as a model configuration: it names no model_type")
    return raw


def read_record(folder: Path) -> dict[str, Any]:
    """How a converted checkpoint was made; empty if it has no record that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def read_config(folder: Path, source: str) -> Any:
    """Load config.json through Transformers, which settles defaults and older spellings.

    Model types that need remote code come back as a plain configuration with their `model_type`, to be refused by name.
    """
    model_type = read_raw_config(folder, source)["model_type"]

    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    import hf_mla  # noqa: F401 - registers the converted types, so that they are known by name

    if model_type not in CONFIG_MAPPING:
        return type("UnknownConfig", (PreTrainedConfig,), {"model_type": model_type})()
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # the library raises many types for a bad value; all of them are the file's fault
        raise UserError(f"{source}/config.json is not valid: {brief(error)}") from None


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


class ShardWriter:
    """Writes safetensors shards tensor by tensor, holding one in memory: names, shapes and types are known beforehand.

    (The library writes a file from tensors that are all in memory.) The format is eight bytes of header length, a JSON header
    padded to a multiple of eight, and the tensors' bytes: https://github.com/huggingface/safetensors#format.

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

    def write(self, read: "Callable[[str], Tensor]") -> None:
        """Write all shards, and the index if there are several; `read` gives a tensor by its name."""
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            file = WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            weight_map |= dict.fromkeys(names, file)
            self._write_shard(self.folder / file, names, read)
        if count > 1:
            index = {
                "metadata": {"total_size": sum(tensor.bytes for tensor in self.tensors.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write_shard(self, path: Path, names: list[str], read: "Callable[[str], Tensor]") -> None:
        import torch

        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            tensor = self.tensors[name]
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, offset + tensor.bytes]}
            offset += tensor.bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                data = read(name).detach().cpu().contiguous()
                stored = TensorHeader(tuple(data.shape), DTYPES[str(data.dtype).removeprefix("torch.")])
                assert stored == TensorHeader(self.tensors[name].shape, self.tensors[name].dtype), name
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
