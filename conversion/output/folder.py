# SPDX-License-Identifier: Apache-2.0
"""The folder that a command writes: looked at before the work, filled in one step after it.

* What is not there yet is made beside its place and takes its name as a whole.
* A folder that is there stays the same folder, since it may be a mount point, somebody's current folder, or all of the disk that
  can be written: work is done in a hidden folder inside, from which the files move up in the end. What they replace is first set
  aside, and comes back if anything goes wrong. A folder with a `config.json` is a whole checkpoint: it goes first and comes last.
* A process that works on an output holds a lock, which the system takes back when the process dies.
"""

import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..source.checkpoint import RECORD, user_path


MARK = "config.json"  # what has none is no checkpoint
HIDDEN = ".incomplete"
LOCK, RECIPE = "lock", "recipe.json"
PROBE = f"{HIDDEN}-probe"
NO_CONTENT = {HIDDEN, PROBE, "lost+found"}  # the last is in every fresh file system
BACKUP = "before-refresh-"  # and a number: a folder in a checkpoint with what `refresh` has replaced
CARRIED_FOLDERS = {"additional_chat_templates", "LICENSES"}  # with a checkpoint; else an output has only files


def work_folder(path: Path) -> Path:
    """Where the work on `path` keeps what it has done so far; on the same file system as the output."""
    beside = path.parent / f".{path.name}{HIDDEN}"
    return path / HIDDEN if path.is_dir() and not beside.is_dir() else beside


def entries(folder: Path) -> list[Path]:
    """What a folder contains, `config.json` last; nothing if there is no such folder."""
    found = [entry for entry in folder.iterdir() if entry.name not in NO_CONTENT] if folder.is_dir() else []
    return sorted(found, key=lambda entry: (entry.name == MARK, entry.name))


def clear(folder: Path) -> None:
    """Remove what a work folder holds, but for the lock: first what lets it be taken up, last what shows that it is done."""
    for entry in sorted(folder.iterdir(), key=lambda entry: {RECIPE: 0, "old": 2}.get(entry.name, 1)):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def check_output(out: str, sources: Sequence[Path], bytes_needed: int, processes: Any, *, overwrite: bool) -> Path:
    """Check that an output folder can be made, before work starts.

    Args:
        out: as the user gave it.
        sources: folders that are read and must not be touched.
        bytes_needed: room on disk that work and output take at their most.
        processes: Accelerate's state; the main process tries what only one can.
        overwrite: whether a converted checkpoint that lies there may be replaced.

    Returns:
        The absolute path, symbolic links resolved.

    Raises:
        UserError: the folder exists and `overwrite` is false or would remove something else, it overlaps a source, it cannot be
            written, the disk is full, or another process is writing it.
    """
    try:
        path = user_path(out).resolve()
        for source in sources:
            if lies_in(path, source) or lies_in(source.resolve(), path):
                raise UserError(f"{out} is, holds or lies in the source folder; choose another output folder")
        if path.exists() and not path.is_dir():
            raise UserError(f"{out} is a file; give a folder to write to")
        if processes.is_main_process:
            folder = work_folder(path)
            if folder.is_dir():
                with locked(folder, path):
                    undo(path, folder)
            check_free(path, overwrite=overwrite)
            try_writing(path, folder, bytes_needed)
    except (OSError, RuntimeError) as error:  # the latter from links in a circle
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from None
    return path


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, under whatever name."""
    return folder.exists() and any(place.exists() and place.samefile(folder) for place in (path, *path.parents))


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise a UserError unless a folder is absent, empty, or a converted checkpoint that may be replaced."""
    found = entries(path)
    if not found:
        return
    if not overwrite:
        raise UserError(f"output folder {path} exists and is not empty; choose another, or pass --overwrite")
    folders = [entry.name for entry in found if entry.is_dir() and not entry.name.startswith(BACKUP)]
    if not (path / RECORD).is_file() or not CARRIED_FOLDERS.issuperset(folders):
        raise UserError(f"{path} is not just a converted checkpoint; --overwrite replaces only those: choose another folder")


def try_writing(path: Path, folder: Path, bytes_needed: int) -> None:
    """Do in small what the work will do: make its folder and a file there, and move that to where the output will be.

    Args:
        path: the output.
        folder: its work folder.
        bytes_needed: room that must be free, what earlier work takes included.

    Raises:
        UserError: there is too little room, or another process is at work.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with locked(folder, path):
            (folder / PROBE).touch()
            if path.is_dir():
                (folder / PROBE).replace(path / PROBE)
            (path if path.is_dir() else folder).joinpath(PROBE).unlink()
            used = sum(file.stat().st_size for file in folder.rglob("*"))
            free = shutil.disk_usage(folder).free
        if free + used < bytes_needed:
            raise UserError(
                f"{folder.parent} has {free / 1e6:,.1f} MB free, work and output take {bytes_needed / 1e6:,.1f} MB; "
                "make room or write elsewhere"
            )
    finally:
        for place in made:
            with suppress(OSError):  # not made after all, or somebody else is there now
                place.rmdir()


@contextmanager
def locked(folder: Path, path: Path) -> Iterator[None]:
    """Be the only process at work in a folder, which is made if it is not there, and removed if nothing is left in it.

    Args:
        folder: the work folder.
        path: the output, for the message.

    Yields:
        Nothing. Where the system or the file system has no locks, two processes are not kept apart.

    Raises:
        UserError: another process is at work there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            with suppress(OSError):  # something is left in it
                folder.rmdir()
        return
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOCK, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(f"{path} is being written already, by process {file.read()}; wait until it ends") from None
            except OSError:  # a network file system without locks
                pass
            if is_at(file, folder / LOCK):  # else the process that held it has just ended, and removed it
                file.truncate(0)
                file.write(f"{os.getpid()} on {platform.node()}")
                file.flush()
                try:
                    yield
                finally:
                    if [entry.name for entry in folder.iterdir()] == [LOCK]:
                        (folder / LOCK).unlink()
                        with suppress(OSError):  # somebody else is there now
                            folder.rmdir()
                return


def is_at(file: Any, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def put_in_place(path: Path, folder: Path) -> None:
    """Give a whole output, `folder`/output, its place, and remove the work folder; if that fails, all is as before.

    Killed at any moment, it leaves `path` whole, or such that `undo` makes it what it was.

    Args:
        path: the output; the files in it are replaced.
        folder: its work folder.
    """
    old, output, new = (folder / name for name in ("old", "output", "new"))
    assert (output / MARK).is_file()
    if replaced := entries(path):
        arrive(output)
    try:
        old.mkdir()
        for entry in reversed(replaced):
            entry.rename(old / entry.name)
        output.rename(new)  # from here on, what lies at `path` is new
        if not path.is_dir():
            new.rename(path)
        for entry in entries(new):
            entry.rename(path / entry.name)
    except OSError:
        undo(path, folder)
        raise
    with suppress(OSError):  # at worst something hidden is left over
        clear(folder)


def undo(path: Path, folder: Path) -> None:
    """Make of a replacement that was cut short what was before it, or if only its end was, what it was to be."""
    old, output, new = (folder / name for name in ("old", "output", "new"))
    if not old.is_dir():
        return
    if (new / MARK).exists():
        for entry in reversed(entries(path)):
            entry.rename(new / entry.name)
        new.rename(output)
    if not output.is_dir():
        clear(folder)
        return
    for entry in entries(old):
        entry.rename(path / entry.name)
    old.rmdir()


def arrive(folder: Path) -> None:
    """Wait until the files of a folder are on the disk: some systems notice only then that it is full."""
    for place, _, files in os.walk(folder) if os.name == "posix" else ():
        for name in files:
            with open(Path(place) / name, "rb") as file:
                os.fsync(file.fileno())
