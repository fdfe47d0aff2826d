"""The fault drill: whatever happens at whatever moment, nothing is lost, nothing half-written looks whole, and one line says it.

An audit hook sees every file that is created, renamed or removed. From the n-th of these on it lets nothing happen any more, as if
the process had been killed there, or nothing that takes room, as if the disk were full. What follows is looked at: what lies in the
folders, and what the same command does with it.
"""

import errno
import itertools
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
from conftest import make_source
from safetensors import SafetensorError

from hf_mla_conversion import UserError
from hf_mla_conversion.cli import main
from hf_mla_conversion.output.folder import clear, entries, locked
from hf_mla_conversion.output.progress import work_on
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.own_text import BUNDLED_NAME
from hf_mla_conversion.stages import layers
from hf_mla_conversion.stages import one_size as converter


TAKES_ROOM = {"open", "os.mkdir"}
EVENTS = TAKES_ROOM | {"os.rename", "os.remove", "os.rmdir"}
SIZES = ["--kv-lora-rank", "8", "--qk-rope-head-dim", "4", "--calibration-tokens", "512", "--steps", "0", "--device", "cpu"]
SIZES += ["--calibration", BUNDLED_NAME, "--calibration", "lookups"]  # named, or a line would say what that costs


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}


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
def other_writes_are_seen(monkeypatch):
    """The Rust code of safetensors writes without an audit event, and has an exception of its own for a full disk."""
    save = safetensors.torch.save_file

    def audited(tensors, path, metadata=None):
        try:
            FAULTS("open", (path, None, os.O_WRONLY))
        except OSError as error:
            raise SafetensorError(f"I/O error: {error.strerror} (os error 28)") from None
        save(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", audited)
    monkeypatch.setattr("os.fsync", lambda _file: FAULTS("open", (None, None, os.O_WRONLY)))


def contents(folder):
    """What is in the files that a user sees in a folder, but for those that hold the time that the work took."""
    seen = [file for entry in entries(folder) for file in ((entry, *entry.rglob("*")) if entry.name[0] != "." else ())]
    timed = ("conversion.json", "README.md")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in seen if file.is_file() and file.name not in timed}


# The last step by itself: every moment of it.


def write(path, text, *, overwrite=False):
    """A work of a few files, which goes on if the first is there."""
    alone = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    with work_on(path, {"text": text}, {}, alone, restart=False, overwrite=overwrite, worth=["part"]) as folder:
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


def test_every_moment_of_clearing(tmp_path):
    """Half of a work is not taken for work to go on with, and the rest of a finished one is known as such."""
    for count in itertools.count():
        (tmp_path / "old").mkdir(exist_ok=True)
        for name in ("recipe.json", "layer", "survey"):
            (tmp_path / name).touch()
        try:
            with FAULTS.after(count, "kill"):
                clear(tmp_path)
            break
        except Killed:
            left = {entry.name for entry in tmp_path.iterdir()}
            assert "recipe.json" not in left or left == {"recipe.json", "layer", "survey", "old"}
            assert "old" in left
    assert count == 4


# The whole command, every so many moments.


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of one small layer."""
    return make_source(tmp_path_factory.mktemp("drill") / "source", **SHAPE)


@pytest.fixture(scope="module")
def results(source, tmp_path_factory):
    """What an undisturbed conversion writes, and one with another seed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for seed in (0, 1):
        assert main(["convert", source, str(folder / f"{seed}"), *SIZES, "--seed", f"{seed}"]) == 0
    return folder


def line(capsys):
    """The one line that a command has left on standard error, but for progress bars; empty if there is none."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("hf-mla:", "Traceback"))]
    assert len(lines) < 2
    return "".join(lines)


EVERY = 37


def run_with_faults(command, count, kind):
    """The exit code of a command that writes so many times before the fault; None if it was killed."""
    with FAULTS.after(count, kind):
        try:
            return main(command)
        except Killed:
            return None


@pytest.mark.parametrize("kind", ["kill", "full"])
@pytest.mark.parametrize("place", ["absent", "empty", "old"])
def test_convert_at_any_moment(tmp_path, capsys, source, results, place, kind):
    path, first = tmp_path / "out", ["absent", "empty", "old"].index(place) * 9
    command = ["convert", source, str(path), *SIZES, *(["--overwrite"] if place == "old" else [])]
    new, old = contents(results / "0"), contents(results / "1") if place == "old" else {}
    assert new != old
    for count in itertools.count(first, EVERY):
        shutil.rmtree(path, ignore_errors=True)
        if place != "absent":
            shutil.copytree(results / "1", path) if old else path.mkdir()
        capsys.readouterr()
        code = run_with_faults(command, count, kind)
        seen, said = FAULTS.seen, line(capsys)
        if code == 2:
            assert "No space left on device" in said and contents(path) == old
            assert ("goes on with it" in said) == bool(list(tmp_path.glob("**/gradient-*")))
        elif (path / "config.json").exists():
            open_checkpoint(str(path))
            assert contents(path) in (old, new)
        done = contents(path) == new and place != "old"  # only killed while it cleaned up, if at all
        code = main(command)
        assert (code, "is not empty" in line(capsys)) == ((2, True) if done else (0, False))
        assert contents(path) == new and not list(tmp_path.glob("**/.*"))
        if seen <= count:
            break
    assert count > first + 30


@pytest.mark.parametrize("kind", ["kill", "full"])
def test_heal_at_some_moments(tmp_path, capsys, source, results, kind):
    text = tmp_path / "text.txt"
    text.write_text("A captain and the sea. " * 2000)
    path, options = tmp_path / "out", ["--teacher", source, "--text", str(text), "--steps", "4", "--step-tokens", "256"]
    assert main(["heal", str(results / "0"), str(tmp_path / "whole"), *options, "--device", "cpu"]) == 0
    new, old = contents(tmp_path / "whole"), contents(results / "1")
    command = ["heal", str(results / "0"), str(path), *options, "--device", "cpu", "--overwrite"]
    for count in itertools.count(35, 3 * EVERY):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(results / "1", path)
        capsys.readouterr()
        code = run_with_faults(command, count, kind)
        said = line(capsys)
        if code == 2:
            assert ("No space left on device" in said or "is the disk full?" in said) and contents(path) == old
            assert ("goes on with it" in said) == bool(list(path.glob("**/complete"))), said
        elif (path / "config.json").exists():
            assert contents(path) in (old, new)
        done = contents(path) == new
        assert main(command) == 0, line(capsys)
        assert contents(path) == new and not list(tmp_path.glob("**/.*"))
        if done:
            break
    assert count > 100


def test_the_same_command_twice_at_once(tmp_path, capsys, source):
    for path, folder in ((tmp_path / "new", tmp_path / ".new.incomplete"), (tmp_path / "old", tmp_path / "old" / ".incomplete")):
        if path.name == "old":
            path.mkdir()
        with locked(folder, path):
            (folder / "work").touch()
            for seed in "01":
                for more in ([], ["--restart"], ["--overwrite"]):
                    assert main(["convert", source, str(path), *SIZES, "--seed", seed, *more]) == 2
                    assert f"is being written already, by process {os.getpid()} on " in line(capsys)
            assert [entry.name for entry in folder.iterdir() if entry.name != "lock"] == ["work"]
        assert main(["convert", source, str(path), *SIZES]) == 0
        assert not folder.exists()


def test_a_source_that_changes_is_noticed(tmp_path, capsys, monkeypatch, source, results):
    """Whether what is read then is whole, cut, or gone; once it is back, the result is as if it had never been away."""
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    whole = (copy / "model.safetensors").read_bytes()

    def other_weights(weights):
        tensors = safetensors.torch.load_file(weights)
        safetensors.torch.save_file({name: 2 * tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})

    changes = {
        "whole": other_weights,
        "cut": lambda weights: weights.write_bytes(whole[:-100]),
        "gone": lambda weights: weights.unlink(),
    }
    for stage, (kind, change) in itertools.product(("convert_attention", "write_model"), changes.items()):
        module = layers if stage == "convert_attention" else converter
        with monkeypatch.context() as patch:
            original = getattr(module, stage)

            def changed(*arguments, change=change, original=original):
                change(copy / "model.safetensors")
                return original(*arguments)

            patch.setattr(module, stage, changed)
            command = ["convert", str(copy), str(tmp_path / f"{stage} {kind}"), *SIZES]
            assert main(command) == 2
        said = line(capsys)
        assert "model.safetensors" in said and "changed while it was read" in said, (stage, kind, said)
        assert not Path(command[2]).exists()
        (copy / "model.safetensors").write_bytes(whole)
        assert main(command) == 0 and contents(Path(command[2])) == contents(results / "0")


def test_without_locks_it_goes_on(tmp_path, monkeypatch):
    def none(*_arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", none)
    write(tmp_path / "network", "new")
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    write(tmp_path / "windows", "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["network", "windows"]


def test_the_current_folder_and_links(tmp_path, capsys, monkeypatch, source, results):
    """Each is written into and stays what it was; links may come before what they point to."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "early").symlink_to("later/target")
    new = contents(results / "0")
    monkeypatch.chdir(tmp_path / "folder")
    for more in ([], ["--overwrite"]):
        assert main(["convert", source, ".", *SIZES, *more]) == 0
        assert contents(Path(".")) == contents(tmp_path / "folder") == new and main(["info", "."]) == 0
    for name, target in (("link", "target"), ("early", "later/target")):
        assert main(["convert", source, str(tmp_path / name), *SIZES]) == 0
        assert (tmp_path / name).is_symlink() and contents(tmp_path / target) == new
    assert line(capsys) == ""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for name, said in (
        ("loop", "oop"),
        ("file/out", "Not a directory"),
        ("n" * 300, "File name too long"),
        (f"deep/{'n' * 250}", "File name too long"),  # the output's could be, the work folder's could not
    ):
        assert main(["convert", source, str(tmp_path / name), *SIZES]) == 2
        assert said in line(capsys)
    assert main(["info", "n" * 300]) == 2 and "too long" in line(capsys)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for command in (["info", "."], ["convert", source, ".", *SIZES]):
        assert main(command) == 2 and "the current folder is no more" in line(capsys)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["early", "file", "folder", "later", "link", "loop", "target"]


def test_mounted_folders(tmp_path, source, results):
    """A file system of its own for the output: empty, too small, found to be full, not to be written."""
    try:
        subprocess.run(["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", str(tmp_path)], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mount namespaces here")
    script = str(Path(__file__).parent / "mounts_drill.py")
    command = ["unshare", "--map-root-user", "--mount", sys.executable, script, str(tmp_path), source, str(results / "0"), *SIZES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_demo_advises_what_it_can_do(tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert line(capsys).endswith("exists and is not empty; choose another")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with FAULTS.after(8, "full"):
        assert main(["demo"]) == 2
    assert line(capsys).endswith("No space left on device; make room there, or give another folder by --out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
