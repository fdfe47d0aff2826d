"""`info --plot`: pictures of a conversion, and one clear line where there is nothing to draw."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import MODEL

from hf_mla_conversion.cli import main
from hf_mla_conversion.commands.info import info
from hf_mla_conversion.output.plotting import draw


MAGIC = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


def refuses(capsys, *words):
    """The one line that a refused command prints."""
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hf-mla: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("suffix", MAGIC)
def test_formats(capsys, tmp_path, converted, suffix):
    file = tmp_path / f"picture.{suffix}"
    assert main(["info", converted[0], "--plot", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info(converted[0])
    assert file.read_bytes().startswith(MAGIC[suffix])


def test_what_is_drawn(converted):
    with open(f"{converted[0]}/conversion.json") as file:
        content = json.load(file)
    left, right, _ = draw(content["spectra"], content["report"], "a $name_{with} signs").axes
    spectra, line = left.lines[:-1], left.lines[-1]
    assert [list(drawn.get_ydata()) for drawn in spectra] == content["spectra"]
    assert left.get_yscale() == "log"
    assert list(line.get_xdata()) == [content["report"]["kv_lora_rank"]] * 2
    layers = content["report"]["layers"]
    expected = {"closed form": [layer["error_closed_form"] for layer in layers]}
    if content["report"]["steps"]:
        expected["reconstructed"] = [layer["error_reconstructed"] for layer in layers]
    assert {drawn.get_label(): list(drawn.get_ydata()) for drawn in right.lines} == expected


def test_closed_form_alone_and_a_single_layer():
    layer = {"layer": 0, "error_closed_form": 0.1, "error_reconstructed": None}
    _, right, _ = draw([[0.75, 0.25, 0.0]], {"kv_lora_rank": 2, "layers": [layer]}, "one").axes
    assert [drawn.get_label() for drawn in right.lines] == ["closed form"]


def test_what_cannot_be_drawn(capsys, tmp_path, converted):
    file = tmp_path / "picture.png"
    assert "not a converted model" in refuses(capsys, "info", MODEL, "--plot", file)
    assert "must end in one of .png, .svg, .pdf" in refuses(capsys, "info", converted[0], "--plot", tmp_path / "picture.bmp")
    assert "must end in one of" in refuses(capsys, "info", converted[0], "--plot", tmp_path)
    assert "cannot be written: No such file" in refuses(capsys, "info", converted[0], "--plot", tmp_path / "none" / "a.png")
    (tmp_path / "folder.png").mkdir()
    assert "cannot be written: Is a directory" in refuses(capsys, "info", converted[0], "--plot", tmp_path / "folder.png")
    copy = shutil.copytree(converted[0], tmp_path / "copy")
    for content in ("{", "[]", '{"spectra": [[1]], "report": {}}', '{"spectra": 3, "report": {"kv_lora_rank": 2}}'):
        (copy / "conversion.json").write_text(content)
        assert "it is damaged" in refuses(capsys, "info", copy, "--plot", file)
    (copy / "conversion.json").unlink()
    assert "has no conversion.json" in refuses(capsys, "info", copy, "--plot", file)
    assert not file.exists()
    assert main(["info", str(copy)]) == 0  # without --plot it is not needed


def test_without_matplotlib(capsys, monkeypatch, tmp_path, converted):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "hf-mla[plot]"' in refuses(capsys, "info", converted[0], "--plot", tmp_path / "picture.png")


def test_info_alone_does_not_import_matplotlib():
    code = f"import sys; from hf_mla_conversion.commands.info import info; info({MODEL!r}); assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
