"""A conversion that is stopped at any moment goes on, and ends as if it had not been."""

import hashlib
import os
import random
import signal
import subprocess
import sys
from functools import partial

import pytest
from conftest import MODEL, make_source

from hf_mla_conversion import UserError, convert
from hf_mla_conversion.commands import convert as converter_module


OPTIONS = {"kv_lora_rank": 44, "qk_rope_head_dim": 16, "calibration_tokens": 8192, "steps": 4, "device": "cpu"}
WORDS = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]


def command(source, out, *words):
    return [sys.executable, "-m", "hf_mla_conversion.cli", "convert", str(source), str(out), *WORDS, *words]


def fingerprint(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Fingerprint of a conversion that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(MODEL, str(out), **OPTIONS)
    return fingerprint(out)


# Runs in a process of its own, which kills itself at a moment that its work decides, not the machine's speed.
KILLED = """
import os, signal, sys
from hf_mla_conversion.cli import main
left = int(sys.argv.pop(1))
def watch(event, arguments):
    global left
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and ".incomplete" in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
sys.exit(main())
"""


def test_killed_at_random_moments(tmp_path, whole):
    chance, kills = random.Random(0), 0
    while not (tmp_path / "out").exists():
        touched = chance.randint(1, 20) + 16 * kills  # of some fifty files; more every time, lest it never ends
        words = [sys.executable, "-c", KILLED, str(touched), *command(MODEL, tmp_path / "out")[3:]]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        kills += done.returncode != 0
    assert kills > 1
    assert fingerprint(tmp_path / "out") == whole


@pytest.mark.parametrize("stage", ["survey", "convert_attention", "write_checkpoint"])
def test_interrupted_in_any_stage(tmp_path, monkeypatch, whole, stage):
    original, calls = getattr(converter_module, stage), []

    def stop(*arguments, **options):
        calls.append(stage)
        if len(calls) == (3 if stage == "convert_attention" else 1):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(converter_module, stage, stop)
    with pytest.raises(KeyboardInterrupt):
        convert(MODEL, str(tmp_path / "out"), **OPTIONS)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    converted = []
    monkeypatch.setattr(
        converter_module, "convert_attention", lambda *a, f=converter_module.convert_attention: converted.append(1) or f(*a)
    )
    convert(MODEL, str(tmp_path / "out"), **OPTIONS)
    assert len(converted) == {"survey": 6, "convert_attention": 4, "write_checkpoint": 0}[stage]  # of six layers
    assert fingerprint(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_says_how_to_go_on(tmp_path):
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background of a shell does not
    process = subprocess.Popen(command(MODEL, tmp_path / "out", "--restart"), stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    seen = ""
    while "converting" not in seen and process.poll() is None:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    line = next(line for line in errors.splitlines() if "interrupted; to go on: hf-mla convert" in line)
    assert "--restart" not in line
    assert [path.name for path in tmp_path.iterdir()] == [".out.incomplete"]


def interrupted(tmp_path, monkeypatch, source):
    def stop(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(converter_module, "convert_attention", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(str(source), str(tmp_path / "out"), **OPTIONS)


def test_other_work_is_not_taken_up(tmp_path, monkeypatch):
    source = make_source(tmp_path / "source", "Llama", head_dim=32)
    interrupted(tmp_path, monkeypatch, source)
    (tmp_path / "text.txt").write_text("A captain and the sea. " * 9000)
    for change, named in (
        ({"seed": 1}, "calibration_sha256, seed (was 0, is 1)"),
        ({"steps": 5}, "steps (was 4, is 5)"),
        ({"dtype": "bfloat16"}, "dtype (was auto, is bfloat16)"),
        ({"kv_lora_rank": 40}, "sizes"),
        ({"calibration": str(tmp_path / "text.txt")}, "calibration_sha256"),
    ):
        with pytest.raises(UserError, match="unfinished work") as refused:
            convert(source, str(tmp_path / "out"), **(OPTIONS | change))
        assert named in str(refused.value)
    make_source(tmp_path / "source", "Llama", head_dim=32, rms_norm_eps=1e-3)
    with pytest.raises(UserError, match="config.json of source_sha256"):
        convert(source, str(tmp_path / "out"), **OPTIONS)
    convert(source, str(tmp_path / "out"), **OPTIONS, restart=True)
    assert not (tmp_path / ".out.incomplete").exists()


def test_full_disk_keeps_what_is_done(tmp_path, monkeypatch, whole):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(converter_module, "write_checkpoint", full)
        with pytest.raises(UserError, match="No space left on device; what is done so far is kept in"):
            convert(MODEL, str(tmp_path / "out"), **OPTIONS)
    assert not (tmp_path / "out").exists()
    convert(MODEL, str(tmp_path / "out"), **OPTIONS)
    assert fingerprint(tmp_path / "out") == whole


def test_two_processes_write_the_same_bytes(tmp_path):
    """Each converts every second layer; all on one thread, since rounding depends on their number."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    for words in (command(MODEL, tmp_path / "one", "--json"), [*launch, *command(MODEL, tmp_path / "two", "--json")[2:]]):
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count('"output"') == 1
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
