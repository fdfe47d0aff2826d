# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk and on the Hub: find, check by header, read.

* Headers first (`shards.py`). Whether the tensors are those of a model is found next, in `matching.py`.
* A .gguf file (`gguf_file.py`) is a checkpoint as well, of tensors in bfloat16.
* Of a multimodal checkpoint the text decoder alone is one, by the names that it would have without the rest.
"""

import json
import logging
import re
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import UserError, brief
from .families import FAMILIES, WRAPPERS
from .gguf_file import GGUFFile, is_gguf
from .hub import hub_says
from .shards import DTYPES, ITEMSIZE, TensorHeader, read_headers, refuse_format


if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"  # of PEFT
RECORD = "conversion.json"  # how a converted checkpoint was made
LICENCES = ["LICEN[CS]E*", "Licen[cs]e*", "licen[cs]e*", "COPYING*", "NOTICE*", "Notice*", "USE_POLICY*"]
# What a checkpoint needs besides weights; pickles, other frameworks' weights and pictures stay on the Hub.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "README.md"]
HUB_PATTERNS += LICENCES
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# What stands before the names of a text decoder's tensors, its head's too or not, as older and newer Transformers save multimodal
# models; what is left may be without the prefix of a decoder with a head, as in any checkpoint.
IN_WRAPPER = r"^(model\.)?language_model\."


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
