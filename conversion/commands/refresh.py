# SPDX-License-Identifier: Apache-2.0
"""Give an older converted checkpoint the code and the configuration that a conversion of today would have.

* Weights, tokenizer and card stay as they are; of config.json, only what hf_mla defines may change.
* What is replaced is copied first, to a folder of its own in the checkpoint. Then each file takes its place in one step, those
  that others import first and config.json last. If anything goes wrong, the copies take their places again.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import hf_mla
from hf_mla.configuration_mla import MLAConfigMixin, auto_map

from ..errors import UserError, brief
from ..output.folder import BACKUP, MARK, arrive, locked, work_folder
from ..output.reports import FileChange, RefreshReport
from ..output.writing import REMOTE_FILES
from ..source.checkpoint import HUB_ID, RECORD, read_raw_config, user_path


# What `MLAConfigMixin` derives from its fields and gives to the library.
DERIVED = ("qk_head_dim", "head_dim", "num_key_value_heads")


def refresh(out: str, *, dry_run: bool = False) -> RefreshReport:
    """Bring the code and the configuration in a converted checkpoint up to the installed version.

    Args:
        out: the folder of a converted checkpoint.
        dry_run: only say which files would change.

    Returns:
        Which files changed and why, and where those that were replaced are kept.

    Raises:
        UserError: it is no folder of a converted checkpoint, a newer version has written it, or it cannot be written.
    """
    path = checked_folder(out)
    before = read_raw_config(path, out)
    after = refreshed(before, out, (path / RECORD).is_file())
    files = {name: (Path(hf_mla.__file__).parent / name).read_bytes() for name in REMOTE_FILES}
    reasons = {name: difference(path / name, content) for name, content in files.items()}
    if after != before:
        files[MARK] = (json.dumps(after, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
        reasons[MARK] = "other " + ", ".join(sorted(key for key in after if key not in before or before[key] != after[key]))
    changes = [FileChange(name, reason) for name, reason in reasons.items() if reason]
    report = {"output": str(path), "version": hf_mla.__version__, "version_before": before["hf_mla_version"], "changes": changes}
    if not changes or dry_run:
        return RefreshReport(**report, dry_run=dry_run)
    try:
        with locked(work_folder(path), path):
            backup = replace(path, {change.file: files[change.file] for change in changes})
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; it is as it was") from None
    return RefreshReport(**report, backup=backup)


def checked_folder(out: str) -> Path:
    """The folder that a user means, or a UserError."""
    path = user_path(out)
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise UserError(f"{out} is a file; give the folder of a converted checkpoint")
    hint = f"; of the Hub, download it first (hf download {out} --local-dir DIR), refresh DIR and upload that"
    raise UserError(f"there is no folder {out}{hint if HUB_ID.fullmatch(out) else ''}")


def refreshed(before: dict[str, Any], out: str, converted: bool) -> dict[str, Any]:
    """What config.json should hold.

    Args:
        before: what it holds.
        out: the checkpoint as the user gave it.
        converted: whether a conversion has made it, and nobody from nothing.

    Returns:
        The same, but for the keys that are hf_mla's.

    Raises:
        UserError: it is not of a converted checkpoint, of a newer version, or not valid.
    """
    from packaging.version import InvalidVersion, Version
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    version, model_type = before.get("hf_mla_version"), before["model_type"]
    config_class = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else PreTrainedConfig  # noqa: SIM401 - it lacks `get`
    if version is None or not issubclass(config_class, MLAConfigMixin):
        raise UserError(f"{out} is a {model_type!r}, not a converted checkpoint; no code of hf_mla travels with it")
    try:
        newer = Version(version) > Version(hf_mla.__version__)
        # As one of the installed version, or it would advise to do what is being done.
        fields = before | {"hf_mla_version": hf_mla.__version__}
        if converted and Version(version) < Version("0.2"):  # which converted no model that rotates a part of its heads
            fields["source_rope_dim"] = before["qk_nope_head_dim"]
        config = config_class.from_dict(fields)
    except InvalidVersion:
        raise UserError(f"{out}/config.json names hf_mla_version {version!r}, which is none; write 0.1.0 there") from None
    except Exception as error:  # the library raises many types for a bad value
        raise UserError(f"{out}/config.json is not valid: {brief(error)}") from None
    if newer:
        raise UserError(
            f"{out} was written by hf_mla {version}, newer than the {hf_mla.__version__} installed; upgrade hf_mla to refresh it"
        )
    ours = {name: getattr(config, name) for name in (*(field.name for field in dataclasses.fields(MLAConfigMixin)), *DERIVED)}
    ours["auto_map"] = {
        **before.get("auto_map", {}),
        **auto_map(config_class.__name__.removesuffix("Config")),
        "AutoConfig": f"configuration_mla.{config_class.__name__}",  # as `save_pretrained` has it
    }
    return before | ours


def difference(path: Path, content: bytes) -> str | None:
    """Why a file should change, or None if it has the content that it should have."""
    if not path.exists():
        return "missing"
    return None if path.read_bytes() == content else "not the one installed"


def replace(path: Path, files: dict[str, bytes]) -> str | None:
    """Replace files of a folder; all of them, or if that fails, none.

    Args:
        path: the folder.
        files: contents by name, in the order in which they are to be replaced.

    Returns:
        The folder, in that one, with what was replaced; None if all files are new.
    """
    work = work_folder(path) / "refresh"  # beside unfinished work, if there is any
    shutil.rmtree(work, ignore_errors=True)  # what a killed process has left
    new, old = work / "new", work / "old"
    try:
        for folder in (work, new, old):
            folder.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)
            if (path / name).exists():
                shutil.copy2(path / name, old / name)
        arrive(work)
        number = 1
        while (path / f"{BACKUP}{number}").exists():
            number += 1
        old = old.rename(path / f"{BACKUP}{number}")
        try:
            for name in files:
                (new / name).replace(path / name)
        except BaseException:
            for name in files:
                if (old / name).exists():
                    (old / name).replace(path / name)
                else:
                    (path / name).unlink(missing_ok=True)
            old.rmdir()
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if any(old.iterdir()):
        return str(old)
    old.rmdir()
    return None
