"""A conversion that is stopped at any moment goes on, and ends as if it had not been."""

import hashlib
import json
import os
import signal
import sys
from unittest import mock

import pytest
import torch
from conftest import make_source, run_apart
from two_processes import fork

from hf_mla_conversion import UserError, convert
from hf_mla_conversion.cli import main
from hf_mla_conversion.source import streaming
from hf_mla_conversion.source.own_text import BUNDLED_NAME
from hf_mla_conversion.source.shards import INDEX, ShardWriter
from hf_mla_conversion.stages import layers as layers_module
from hf_mla_conversion.stages import one_size as converter_module


OPTIONS = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "calibration_tokens": 1024, "steps": 4, "device": "cpu"}
OPTIONS["calibration"] = BUNDLED_NAME  # what the source writes itself goes on in tests/test_own_text.py


def command(source, out, *words, **changes):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (OPTIONS | changes).items() if value is not None]
    return ["convert", str(source), str(out), *options, *words]


def signalled(name, number, words):
    """The program, which sends itself a signal when the first file that begins so is to get its name."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell does not heed it

    def hook(event, arguments):
        if event == "os.rename" and os.path.basename(arguments[0]).startswith(name):
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    return main(words)


def fingerprint(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six small layers."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
    return make_source(tmp_path_factory.mktemp("model") / "source", **shape)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """Fingerprint of a conversion that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(source, str(out), **OPTIONS)
    return fingerprint(out)


def test_killed_again_and_again(tmp_path, source, whole):
    """In the survey, between two layers, and when the output takes its place; what is killed holds no lock any more."""
    for name in ("gradient-0002", "layer-0003", "output"):
        code, said = run_apart(tmp_path / "log", signalled, name, signal.SIGKILL, command(source, tmp_path / "out"))
        assert code == -9, said[-2000:]
        assert not (tmp_path / "out").exists() and (tmp_path / ".out.incomplete" / "lock").exists()
    convert(source, str(tmp_path / "out"), **OPTIONS)
    assert fingerprint(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


@pytest.mark.parametrize("stage", ["survey", "convert_attention", "write_model"])
def test_interrupted_in_any_stage(tmp_path, monkeypatch, source, whole, stage):
    module = converter_module if stage == "write_model" else layers_module
    original, calls = getattr(module, stage), []

    def stop(*arguments, **options):
        calls.append(stage)
        if len(calls) == (3 if stage == "convert_attention" else 1):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(module, stage, stop)
    with pytest.raises(KeyboardInterrupt):
        convert(source, str(tmp_path / "out"), **OPTIONS)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    converted = []
    monkeypatch.setattr(
        layers_module, "convert_attention", lambda *a, f=layers_module.convert_attention: converted.append(1) or f(*a)
    )
    convert(source, str(tmp_path / "out"), **OPTIONS)
    assert len(converted) == {"survey": 6, "convert_attention": 4, "write_model": 0}[stage]  # of six layers
    assert fingerprint(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_says_how_to_go_on(tmp_path, source):
    words = command(source, tmp_path / "out", "--restart")
    code, said = run_apart(tmp_path / "log", signalled, "layer-0002", signal.SIGINT, words)
    assert code == 130, said[-2000:]
    assert "Traceback" not in said
    line = next(line for line in said.splitlines() if "interrupted; to go on: hf-mla convert" in line)
    assert "--restart" not in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.incomplete", "log"]


def interrupted(tmp_path, monkeypatch, source):
    def stop(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layers_module, "convert_attention", stop)
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
        ({"kv_lora_rank": 7}, "sizes"),
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


def test_full_disk_keeps_what_is_done(tmp_path, monkeypatch, source, whole):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(converter_module, "write_model", full)
        with pytest.raises(UserError, match="No space left on device; what is done so far is kept in"):
            convert(source, str(tmp_path / "out"), **OPTIONS)
    assert not (tmp_path / "out").exists()
    convert(source, str(tmp_path / "out"), **OPTIONS)
    assert fingerprint(tmp_path / "out") == whole


def on_one_thread(words):
    torch.set_num_threads(1)
    with mock.patch.object(ShardWriter.__init__, "__defaults__", (1 << 14,)):
        return main(words)


def in_two_processes(words):
    """What `accelerate launch` starts for several GPUs; on a CPU it starts one process, whatever it is asked for."""
    streaming.MEMORY_SHARE = 0
    child = fork()
    code = on_one_thread(words)
    torch.distributed.destroy_process_group()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or code if child else code


def test_two_processes_write_the_same_bytes(tmp_path, source):
    """They share tries of sizes, layers, text, of which one writes its own, and shards; on one thread, as rounding depends on it.

    There is no memory for hidden states, so each process has files of its own.
    """
    words, reports = (
        ["--calibration=self", "--kv-budget=0.5", "--calibration-tokens=2560", "--steps=4", "--device=cpu", "--json"],
        [],
    )
    for name, function in (("one", on_one_thread), ("two", in_two_processes)):
        code, said = run_apart(tmp_path / "log", function, ["convert", source, str(tmp_path / name), *words])
        assert code == 0, said[-2000:]
        assert said.count('"output"') == 1 and '"name": "self"' in said
        reports.append(json.loads(said[said.index("{\n") : said.rindex("}") + 1]))
    one, two = ({**report, "seconds": 0, "output": ""} for report in reports)
    assert one == two and len(one["candidates"]) > 1
    assert "states-0.bin" in said and "states-1.bin" in said
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two") and len(fingerprint(tmp_path / "one")) > 3
    assert (tmp_path / "one" / INDEX).read_bytes() == (tmp_path / "two" / INDEX).read_bytes()
