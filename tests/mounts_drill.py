"""What tests/test_drill.py has a process do that sees mounts of its own, started by unshare.

Arguments: a folder for mounts, a source, its undisturbed conversion, and the options of that.
"""

import contextlib
import io
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from hf_mla_conversion.cli import main
from hf_mla_conversion.output.folder import entries


def run(*words):
    """The exit code of a command, and its one line on standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        code = main([*map(str, words)])
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("hf-mla:")]
    assert len(lines) == (code == 2), lines
    return code, "".join(lines)


def mount(folder, options):
    """A file system in memory."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    return folder, folder.stat().st_ino


def weights(folder):
    """The bytes that do not depend on time."""
    return (folder / "model.safetensors").read_bytes()


folder, source, whole, options = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]

roomy, inode = mount(folder / "roomy", "size=100m")
assert run("convert", source, roomy, *options, "--seed", 1) == (0, "")
assert weights(roomy) != weights(whole)
assert run("convert", source, roomy, *options, "--overwrite") == (0, "")
assert weights(roomy) == weights(whole) and roomy.stat().st_ino == inode
assert {entry.name for entry in roomy.iterdir()} == {entry.name for entry in whole.iterdir()}

(folder / "bound").mkdir()  # the source under another name
subprocess.run(["mount", "--bind", source, folder / "bound"], check=True)
for out in (folder / "bound", folder / "bound" / "deeper"):
    code, line = run("convert", source, out, *options, "--overwrite")
    assert code == 2 and "is, holds or lies in the source folder" in line, line

small, _ = mount(folder / "small", "size=1m")
code, line = run("convert", source, small, *options)
assert code == 2 and "MB free, work and output take" in line and not list(small.iterdir()), line

free = shutil.disk_usage
shutil.disk_usage = lambda _: SimpleNamespace(free=1 << 40)  # the room goes to somebody else in the meantime
for size in (8, 200, 1100):  # kB
    full, _ = mount(folder / f"full{size}", f"size={size}k")
    code, line = run("convert", source, full, *options)
    assert code == 2 and "No space left on device" in line and not entries(full), line
    assert ("goes on with it" in line) == (size > 8) == bool(list(full.iterdir())), line
    subprocess.run(["mount", "-o", "remount,size=100m", full], check=True)
    assert run("convert", source, full, *options) == (0, "")
    assert weights(full) == weights(whole)
for size in (8, 200):  # kB
    full, _ = mount(folder / f"export{size}", f"size={size}k")
    code, line = run("export", whole, full / "deepseek", "--format", "deepseek_v3")
    assert code == 2 and line.endswith("No space left on device; nothing is kept") and not list(full.iterdir()), line
shutil.disk_usage = free

read_only, _ = mount(folder / "read-only", "size=1m")
(read_only / "empty").mkdir()
subprocess.run(["mount", "-o", "remount,ro", read_only], check=True)
for out in (read_only / "empty", read_only / "new"):
    code, line = run("convert", source, out, *options)
    assert code == 2 and "Read-only file system" in line, line
