# SPDX-License-Identifier: Apache-2.0
"""Put a converted checkpoint together."""

import json
import logging
import shutil
import tempfile
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_mla
from hf_mla.cache_mla import quantization_of

from ..errors import UserError, brief
from ..source.checkpoint import LICENCES, RECORD, Checkpoint
from ..source.families import FAMILIES
from ..source.matching import ModelCheckpoint
from ..source.shards import DTYPES, ShardWriter, TensorHeader, load_file
from ..source.tokenizer import CONFIG, custom_code, difference, load_tokenizer, read_settings
from .card import PICTURE, licence, model_card
from .folder import CARRIED_FOLDERS
from .plotting import plot_conversion
from .progress import layer_file, write_json
from .reports import ConvertReport


logger = logging.getLogger(__name__)

# The code that travels with a checkpoint; tests hold that these are the files that `save_pretrained` copies.
REMOTE_FILES = ("configuration_mla.py", "cache_mla.py", "pages_mla.py", "attention_mla.py", "layer_mla.py", "modeling_mla.py")
GENERATION = "generation_config.json"
# What goes with a checkpoint beside weights and configuration: files, and whole folders.
CARRIED = [
    GENERATION,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "*.jinja",
    *LICENCES,
]


def check_carried(source: Checkpoint, config: Any, tokenizer: Any) -> None:
    """Carry what goes with a checkpoint to a scratch folder, so that what is in the way there is known before any work.

    Args:
        source: the source.
        config: of the converted model.
        tokenizer: the source's.

    Raises:
        UserError: as for `carry`.
    """
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "output"  # the library keeps copies of code by this name
            folder.mkdir()
            config.save_pretrained(folder)
            carry(source, folder, tokenizer)
    except OSError as error:
        raise UserError(f"cannot write to {tempfile.gettempdir()}: {error.strerror or error}; set TMPDIR to a folder") from None
    licence(source)
    refused = unservable(generation_settings(source))
    if refused:
        logger.warning("%s asks `generate` for a cache that latents have no form of: %s is left out", source.name, refused)


def write_model(work: Path, folder: Path, source: ModelCheckpoint, config: Any, dtype: str, tokenizer: Any, processes: Any) -> None:
    """Put the converted model together: weights, configuration, code and tokenizer, but no card and no record.

    Args:
        work: has the converted layers.
        folder: where to; it appears whole or not at all.
        source: the source.
        config: of the converted model.
        dtype: type of the numbers; "auto" for what each was stored in.
        tokenizer: the source's.
        processes: Accelerate's state; all share the weights out.
    """
    assert source.folder is not None
    final, folder = folder, work / "partial" / folder.name
    if processes.is_main_process:
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
    processes.wait_for_everyone()
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    prefix = FAMILIES[source.config.model_type].attention
    kept = source.kept
    tensors = {name: source.stored.tensors[part] for name, part in kept.items()}
    if wanted is not None:
        tensors = {name: replace(tensor, dtype=DTYPES[dtype]) for name, tensor in tensors.items()}
    converted: dict[str, tuple[Path, str]] = {}  # the file of a tensor, and its name there
    for layer in range(config.num_hidden_layers):
        place = prefix.format(layer=layer)
        for name, tensor in load_file(layer_file(work, layer)).items():
            tensors[place + name] = TensorHeader.of(tensor)
            converted[place + name] = layer_file(work, layer), name

    def read(name: str) -> Tensor:
        if name in converted:
            file, inside = converted[name]
            return load_file(file)[inside]
        return source.stored.load([kept[name]], "cpu", wanted)[kept[name]]

    ShardWriter(folder, tensors).write(read, processes.process_index, processes.num_processes)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return
    package = Path(hf_mla.__file__).parent
    for file_name in REMOTE_FILES:
        shutil.copy(package / file_name, folder / file_name)
    config.save_pretrained(folder)
    carry(source, folder, tokenizer)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)


def write_record(
    folder: Path,
    source: ModelCheckpoint,
    config: Any,
    report: ConvertReport,
    recipe: dict,
    spectra: list[list[float]],
) -> None:
    """Give a converted model its record and its card, and if it goes to the Hub, a picture where one can be drawn."""
    write_json({"recipe": recipe, "report": asdict(report), "spectra": spectra}, folder / RECORD)
    if report.repository is not None and find_spec("matplotlib") is not None:
        plot_conversion(folder / RECORD, report.repository, str(folder / PICTURE))
    card = model_card(source, config, report, recipe, pictured=(folder / PICTURE).exists())
    (folder / "README.md").write_text(card, encoding="utf-8")


def carry(source: Checkpoint, folder: Path, tokenizer: Any) -> None:
    """Give a folder that has its config.json what goes with the source: tokenizer, settings of `generate`, licences.

    Args:
        source: the source.
        folder: where to.
        tokenizer: the source's; that of the folder will be the same.

    Raises:
        UserError: a file cannot be read, or has the name of another, or the tokenizer would not be the same.
    """
    for name in carried(source, tokenizer):
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(read_carried(source, name))
    settings = generation_settings(source)
    refused = unservable(settings)
    if refused or (settings and not (folder / GENERATION).exists()):
        write_json({key: value for key, value in settings.items() if key not in refused}, folder / GENERATION)
    keep_tokenizer(source.name, folder, tokenizer)


def carried(source: Checkpoint, tokenizer: Any) -> list[str]:
    """What is copied from a source as it is: names of files, relative to its folder."""
    assert source.folder is not None
    names = [name for name in getattr(tokenizer, "vocab_files_names", {}).values() if name]  # those of custom code, too
    names += [path.name for pattern in CARRIED for path in source.folder.glob(pattern)]
    names += [file.relative_to(source.folder).as_posix() for name in CARRIED_FOLDERS for file in (source.folder / name).glob("*")]
    code = [name for name in custom_code(source.folder, source.name) if "--" not in name]
    for name in code:
        if name in REMOTE_FILES:
            raise UserError(
                f"{source.name} has code of its tokenizer in {name}, where the output has the model's; rename it, also in {CONFIG}"
            )
    # A link that leads nowhere is not left out in silence.
    paths = {name: source.folder / name for name in [*names, *code]}
    return sorted(name for name, path in paths.items() if path.is_file() or (path.is_symlink() and not path.exists()))


def read_carried(source: Checkpoint, name: str) -> bytes:
    """A file of a source, or a UserError."""
    assert source.folder is not None
    try:
        return (source.folder / name).read_bytes()
    except OSError as error:
        raise UserError(f"{source.name}/{name} cannot be read: {error.strerror}; the output needs a copy of it") from None


def keep_tokenizer(name: str, folder: Path, tokenizer: Any) -> None:
    """See to it that `AutoTokenizer` gives the source's tokenizer for a folder that its files have been copied to.

    Args:
        name: of the source.
        folder: of the converted model.
        tokenizer: the source's.

    Raises:
        UserError: it cannot be had.
    """

    def name_class() -> None:  # that the library has chosen by the model type, which is another in the folder
        write_json(read_settings(folder, name) | {"tokenizer_class": type(tokenizer).__name__}, folder / CONFIG)

    changes = []
    for mend in (lambda: None, name_class, lambda: tokenizer.save_pretrained(folder)):
        try:
            mend()
            # Its code, if it has any, is the source's, which was allowed to run.
            change = difference(load_tokenizer(folder, str(folder), trust_remote_code=True), tokenizer)
        except OSError:
            raise
        except Exception as error:  # any type: there is no usable tokenizer, or it cannot be saved
            change = brief(error)
        if change is None:
            return
        changes.append(change)
    raise UserError(
        f"the output's tokenizer would not be that of {name}: {changes[0]}; give {name} one that `save_pretrained` wrote"
    )


def generation_settings(source: Checkpoint) -> dict[str, Any]:
    """What a source tells `generate`, as it is stored; empty if it says nothing or cannot be read."""
    from transformers import GenerationConfig

    assert source.folder is not None
    if (source.folder / GENERATION).exists():
        try:
            settings = json.loads(read_carried(source, GENERATION))
        except ValueError:  # the library passes over such a file as well
            return {}
        return settings if isinstance(settings, dict) else {}
    # Where there is none, the library takes what config.json has of it, which is not kept there any more.
    stored = GenerationConfig.from_pretrained(source.folder, "config.json").to_diff_dict()
    settings = {key: value for key, value in stored.items() if key in GenerationConfig().to_dict()}
    told = [key for key in settings if not key.endswith("_token_id") and key not in ("use_cache", "transformers_version")]
    return settings if told else {}


def unservable(settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings of `generate` that make every call of a converted model fail."""
    try:
        if settings.get("cache_implementation") == "quantized":
            quantization_of(settings.get("cache_config"))
    except ValueError:
        return {key: settings[key] for key in ("cache_implementation", "cache_config") if key in settings}
    return {}
