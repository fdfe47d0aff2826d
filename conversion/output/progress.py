# SPDX-License-Identifier: Apache-2.0
"""What a conversion or a healing has done so far, in a folder of its own, so that it can be killed at any moment and go on.

* `recipe.json` says what the work depends on: source files, calibration tokens, options, versions. Work is only taken up by a
  command with the same recipe; what differs is named.
* Every finished part is one file that appears whole or not at all.
* The output is put together in a sub-folder and takes its place (`folder.py`); then the folder is removed.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..source.checkpoint import Checkpoint, user_path
from ..source.shards import save_file
from .folder import RECIPE, check_free, clear, locked, put_in_place, undo, work_folder
from .reports import LayerReport


if TYPE_CHECKING:
    from torch import Tensor


def size_folder(folder: Path, size: Any) -> Path:
    """Where a conversion to some size keeps its results; `size` is anything that has the two widths."""
    return folder / f"{size.kv_lora_rank}+{size.qk_rope_head_dim}"


def layer_file(folder: Path, layer: int) -> Path:
    """Where the result of a layer is kept: its weights, and as metadata its report and spectrum."""
    return folder / f"layer-{layer:04}.safetensors"


def save_layer(file: Path, weights: "dict[str, Tensor]", report: LayerReport, spectrum: list[float]) -> None:
    """Keep the result of a layer."""
    shares = [float(f"{share:.3g}") for share in spectrum]
    save_file(weights, file, {"report": json.dumps(asdict(report)), "spectrum": json.dumps(shares)})


def layer_reports(folder: Path, count: int) -> tuple[list[LayerReport], list[list[float]]]:
    """The reports and spectra of so many layers, as they were kept."""
    from safetensors import safe_open

    reports, spectra = [], []
    for layer in range(count):
        with safe_open(layer_file(folder, layer), framework="pt") as file:
            metadata = file.metadata()
        reports.append(LayerReport(**json.loads(metadata["report"])))
        spectra.append(json.loads(metadata["spectrum"]))
    return reports, spectra


@contextmanager
def work_on(
    path: Path,
    recipe: dict[str, Any],
    sources: Mapping[str, Checkpoint],
    processes: Any,
    *,
    restart: bool,
    overwrite: bool,
    worth: Sequence[str],
) -> Iterator[Path]:
    """The folder for unfinished work on an output; what is in it stays if the block fails or is interrupted.

    Args:
        path: the output, as `check_output` gave it.
        recipe: what the work depends on; JSON values.
        sources: the checkpoints that are read, by the name that their fingerprints have in the recipe.
        processes: Accelerate's state; the main process looks after the folder, the others wait.
        restart: forget earlier work.
        overwrite: replace what lies at `path`.
        worth: patterns of files that make the folder worth keeping.

    Yields:
        The folder. The block makes `output` in it, which takes its place at `path` when the block ends.

    Raises:
        UserError: another process is at this work, earlier work there had another recipe, a source was changed meanwhile, the
            disk is full, or the folder cannot be written.
    """
    folder, main = work_folder(path), processes.is_main_process

    def kept() -> bool:
        return any(any(folder.glob(pattern)) for pattern in worth) or (folder / "old").exists()

    try:
        with locked(folder, path) if main else nullcontext():
            try:
                if main:
                    undo(path, folder)
                    check_free(path, overwrite=overwrite)
                    begin(folder, recipe, restart=restart)
                processes.wait_for_everyone()
                yield folder
                processes.wait_for_everyone()
                if main:
                    check_unchanged(sources, recipe, folder)
                    check_free(path, overwrite=overwrite)
                    put_in_place(path, folder)
            finally:
                if main and not kept():
                    with suppress(OSError):
                        clear(folder)
    except OSError as error:
        done = f"what is done so far is kept in {folder}, and the same command goes on with it" if kept() else "nothing is kept"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {done}") from error


def begin(folder: Path, recipe: dict[str, Any], *, restart: bool) -> None:
    """Take up the work in `folder`, or begin it."""
    if (folder / RECIPE).exists() and not restart:
        check_recipe(json.loads((folder / RECIPE).read_text(encoding="utf-8")), recipe, folder)
    else:
        clear(folder)
        write_json(recipe, folder / RECIPE)


def earlier_recipe(out: str) -> dict[str, Any]:
    """The recipe of unfinished work on an output, as the user gave it; empty if there is none that can be read."""
    try:
        recipe = json.loads((work_folder(user_path(out).resolve()) / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # the last from links in a circle
        return {}
    return recipe if isinstance(recipe, dict) else {}


def check_unchanged(sources: Mapping[str, Checkpoint], recipe: dict[str, Any], folder: Path) -> None:
    """Raise a UserError if a source is not any more what it was when the work began; such work is thrown away."""
    for name, checkpoint in sources.items():
        try:
            now = source_fingerprint(checkpoint)
        except OSError:
            now = {}
        for file, digest in recipe[name].items():
            if now.get(file) != digest:
                clear(folder)
                raise UserError(f"{file} of {checkpoint.name} changed while it was read; nothing is kept, give the command again")


def write_json(data: Any, path: Path) -> None:
    """Write a JSON file that appears whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def check_recipe(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise a UserError that names what differs between the recipe of earlier work and this one."""
    changes = []
    for name, value in now.items():
        earlier = before.get(name)
        if isinstance(value, dict) and isinstance(earlier, dict):
            changes += [f"{key} of {name}" for key in {**earlier, **value} if earlier.get(key) != value.get(key)]
        elif earlier != value:
            changes.append(name if name.endswith("sha256") else f"{name} (was {earlier}, is {value})")
    if changes:
        raise UserError(
            f"{folder} holds unfinished work with other {', '.join(changes)}; "
            "give its command to go on with it, or --restart to begin anew"
        )


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    import torch
    import transformers

    import hf_mla

    return {"hf_mla": hf_mla.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def source_fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of config.json and of every shard, or of a .gguf file, by file name; for a Hub checkpoint these are what it shows."""

    def digest(path: Path) -> str:
        with open(path, "rb") as file:
            return file_digest(file)

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(checkpoint.paths, pool.map(digest, checkpoint.paths.values()), strict=True))


def file_digest(file: Any) -> str:
    """SHA-256 of an open binary file."""
    total = hashlib.sha256()
    while chunk := file.read(1 << 20):
        total.update(chunk)
    return total.hexdigest()


def token_fingerprint(windows: "Tensor") -> str:
    """SHA-256 of token ids: changes with the text, the tokenizer, the seed and the number of tokens."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()
