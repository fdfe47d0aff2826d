"""The fault drill: whatever happens at whatever moment, nothing is lost, nothing half-written looks whole, and one line says it.

An audit hook sees every file that is created, renamed or removed. From the n-th of these on it lets nothing happen any more, as if
the process had been killed there, or nothing that takes room, as if the disk were full. What follows is looked at: what lies in the
folders, and what the same command does with it.
"""

import errno
import os
import shutil
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import safetensors.torch
from conftest import make_source
from safetensors import SafetensorError

from hf_mla_conversion import UserError, convert
from hf_mla_conversion.cli import main
from hf_mla_conversion.output.folder import entries
from hf_mla_conversion.output.progress import work_on
from hf_mla_conversion.source.checkpoint import open_checkpoint


TAKES_ROOM = {"open", "os.mkdir"}
EVENTS = TAKES_ROOM | {"os.rename", "os.remove", "os.rmdir"}
SIZES = ["--kv-lora-rank", "8", "--qk-rope-head-dim", "4", "--calibration-tokens", "512", "--steps", "0", "--device", "cpu"]


class Killed(BaseException):
    """From here on nothing happens any more."""


class Faults:
    """What the audit hook lets pass."""

    def __init__(self):
        self.active = False

    @contextmanager
    def after(self, count, kind):
        """Let `count` writes pass, then none, by a kill, or none that takes room, on a full disk."""
        self.active, self.count, self.kind, self.seen = True, count, kind, 0
        try:
            yield self
        finally:
            self.active = False

    def __call__(self, event, arguments):
        if not self.active or event not in EVENTS:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        self.seen += 1
        if self.seen > self.count:
            if self.kind == "kill":
                raise Killed
            if event in TAKES_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS = Faults()
sys.addaudithook(FAULTS)  # cannot be removed


@pytest.fixture(autouse=True)
def safetensors_writes_are_seen(monkeypatch):
    """Its Rust code writes without an audit event, and has an exception of its own for a full disk."""
    save = safetensors.torch.save_file

    def audited(tensors, path, metadata=None):
        try:
            FAULTS("open", (path, None, os.O_WRONLY))
        except OSError as error:
            raise SafetensorError(f"I/O error: {error.strerror} (os error 28)") from None
        save(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", audited)


def contents(folder):
    """What is in the files that a user sees in a folder, but for those that hold the time that the work took."""
    seen = [file for entry in entries(folder) for file in ((entry, *entry.rglob("*")) if entry.name[0] != "." else ())]
    timed = ("conversion.json", "README.md")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in seen if file.is_file() and file.name not in timed}


# The last step by itself: every moment of it.


def write(path, text, *, overwrite=False):
    """A work of a few files, which goes on if the first is there."""
    alone = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    with work_on(path, {"text": text}, {}, alone, restart=False, overwrite=overwrite, worth="part") as folder:
        (folder / "part").write_text(text)
        shutil.rmtree(folder / "output", ignore_errors=True)
        (folder / "output" / "deep").mkdir(parents=True)
        for name in ("config.json", "conversion.json", f"{text}.bin", "deep/file"):
            (folder / "output" / name).write_text(text)


@pytest.mark.parametrize("kind", ["kill", "full"])
@pytest.mark.parametrize("place", ["absent", "empty", "old"])
def test_every_moment_of_putting_in_place(tmp_path, monkeypatch, place, kind):
    monkeypatch.setattr("hf_mla_conversion.output.folder.CARRIED_FOLDERS", {"deep"})
    path, count, seen = tmp_path / "out", -1, 0
    whole = {"config.json": b"new", "new.bin": b"new", "deep/file": b"new"}
    old = {"config.json": b"old", "old.bin": b"old", "other.bin": b"old"} if place == "old" else {}
    while seen > count:
        count += 1
        shutil.rmtree(path, ignore_errors=True)
        if place != "absent":
            (path / "lost+found").mkdir(parents=True)
            for name in [*old, "conversion.json"] if old else ():
                (path / name).write_text("old")
            inode = path.stat().st_ino
        with FAULTS.after(count, kind):
            try:
                write(path, "new", overwrite=place == "old")
            except Killed:
                pass
            except UserError as error:
                assert "No space left on device" in str(error)
                assert contents(path) == old  # all of it, and at once
        seen, done = FAULTS.seen, contents(path) == whole
        if (path / "config.json").exists():
            assert done or contents(path) == old
        if done and place != "old":  # only killed while it cleaned up, if at all
            with pytest.raises(UserError, match="is not empty"):
                write(path, "new")
        else:
            write(path, "new", overwrite=place == "old")
        assert contents(path) == whole and (place == "absent" or path.stat().st_ino == inode)
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
        assert {entry.name for entry in path.iterdir()} - {"lost+found", "deep"} == {"config.json", "conversion.json", "new.bin"}
    assert count > 12
