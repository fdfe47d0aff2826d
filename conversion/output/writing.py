# SPDX-License-Identifier: Apache-2.0
"""Put a converted checkpoint together, and upload it."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

import hf_mla

from ..errors import UserError, brief
from ..source.checkpoint import DTYPES, RECORD, ShardWriter, TensorHeader, load_file
from ..source.families import FAMILIES
from ..source.matching import ModelCheckpoint
from .card import model_card
from .progress import layer_file, write_json
from .reports import ConvertReport


# The code that travels with a checkpoint; tests hold that these are the files that `save_pretrained` copies.
REMOTE_FILES = ("configuration_mla.py", "cache_mla.py", "attention_mla.py", "layer_mla.py", "modeling_mla.py")
GENERATION = "generation_config.json"
CARRIED = [
    GENERATION,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
]


def write_checkpoint(
    work: Path, source: ModelCheckpoint, config: Any, report: ConvertReport, recipe: dict, spectra: list[list[float]]
) -> None:
    """Put the converted model together in `work`/output: weights, configuration, code, tokenizer, card and report."""
    assert source.folder is not None
    folder = work / "output"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype)
    wanted = None if recipe["dtype"] == "auto" else dtype
    prefix = FAMILIES[source.config.model_type].attention
    tensors = {
        name: TensorHeader(tensor.shape, tensor.dtype if wanted is None else DTYPES[recipe["dtype"]])
        for name, tensor in source.kept.items()
    }
    converted: dict[str, tuple[Path, str]] = {}  # the file of a tensor, and its name there
    for layer in range(config.num_hidden_layers):
        place = prefix.format(layer=layer)
        for name, tensor in load_file(layer_file(work, layer)).items():
            tensors[place + name] = TensorHeader(tuple(tensor.shape), DTYPES[str(tensor.dtype).removeprefix("torch.")])
            converted[place + name] = layer_file(work, layer), name

    def read(name: str) -> Tensor:
        if name in converted:
            file, inside = converted[name]
            return load_file(file)[inside]
        return source.load([name], "cpu", wanted)[name]

    ShardWriter(folder, tensors).write(read)
    for pattern in CARRIED:
        for carried in source.folder.glob(pattern):
            shutil.copy(carried, folder / carried.name)
    if not (folder / GENERATION).exists():  # the library then goes by what config.json has of it, and does not write there any more
        settings = GenerationConfig.from_pretrained(source.folder, "config.json", _from_model_config=True).to_diff_dict()
        write_json({key: value for key, value in settings.items() if not key.startswith("_")}, folder / GENERATION)
    package = Path(hf_mla.__file__).parent
    for file_name in REMOTE_FILES:
        shutil.copy(package / file_name, folder / file_name)
    config.save_pretrained(folder)
    write_json({"recipe": recipe, "report": asdict(report), "spectra": spectra}, folder / RECORD)
    (folder / "README.md").write_text(model_card(source, config, report, recipe), encoding="utf-8")


def check_repository(repository: str) -> None:
    """Raise a UserError unless this can be the name of a Hub repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push-to {repository}: {brief(error)}") from None


def upload(folder: Path, repository: str) -> None:
    """Upload a finished output folder to a Hub repository, which is made (private) if it does not exist."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Converted to MLA with hf_mla")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise UserError(f"{folder} is complete, but uploading it to {repository} failed: {brief(error)}") from None
