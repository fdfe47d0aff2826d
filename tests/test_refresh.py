"""An older checkpoint gets today's code and configuration; whatever goes wrong, it is the older or the newer one, whole."""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_mla
from transformers import AutoModelForCausalLM

import hf_mla
from hf_mla import LlamaMLAConfig, LlamaMLAForCausalLM
from hf_mla_conversion import UserError, refresh
from hf_mla_conversion.cli import main
from hf_mla_conversion.output.folder import check_free
from hf_mla_conversion.output.writing import REMOTE_FILES


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new") / "mla"
    make_mla().save_pretrained(folder)
    return folder


@pytest.fixture
def old(new, tmp_path):
    """As an older version would have left it: a file fewer, one that today's libraries refuse, a key fewer, fewer heads."""
    folder = shutil.copytree(new, tmp_path / "old")
    (folder / "pages_mla.py").unlink()
    (folder / "modeling_mla.py").write_text("from transformers import what_is_no_more\n")
    config = json.loads((folder / "config.json").read_text())
    del config["num_key_norms"]
    config["auto_map"] = {name: config["auto_map"][name] for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    write(folder, config | {"hf_mla_version": "0.1.0", "of_the_users": [1]})
    return folder


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


WITHOUT_HF_MLA = """
import sys
sys.modules["hf_mla"] = None  # importing it raises ImportError
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        print(repr(model(torch.tensor([[5, 8, 13, 21]])).logits[0, -1, :5].tolist()))
    except ImportError:
        print("ImportError")
"""


def test_refreshed_code_loads_and_gives_the_same_logits(new, old, tmp_path):
    weights = (old / "model.safetensors").read_bytes()
    before = shutil.copytree(old, tmp_path / "before")
    report = refresh(str(old))
    assert (old / "model.safetensors").read_bytes() == weights
    for file in REMOTE_FILES:
        assert (old / file).read_bytes() == (Path(hf_mla.__file__).parent / file).read_bytes()
    fresh = json.loads((new / "config.json").read_text())
    assert json.loads((old / "config.json").read_text()) == fresh | {"of_the_users": [1]}
    assert Path(report.backup) == old / "before-refresh-1" and report.version_before == "0.1.0"
    assert contents(old / "before-refresh-1") == {file: (before / file).read_bytes() for file in ("config.json", "modeling_mla.py")}

    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WITHOUT_HF_MLA, str(before), str(old)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    logits = AutoModelForCausalLM.from_pretrained(new)(torch.tensor([[5, 8, 13, 21]])).logits[0, -1, :5].tolist()
    assert done.stdout.splitlines() == ["ImportError", repr(logits)], done.stderr


def test_dry_run_says_the_same_and_changes_nothing(old, capsys):
    before = contents(old)
    assert main(["refresh", str(old), "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert contents(old) == before and said["dry_run"] and said["backup"] is None
    reasons = {change["file"]: change["reason"] for change in said["changes"]}
    assert reasons["pages_mla.py"] == "missing" and reasons["modeling_mla.py"] == "not the one installed"
    assert reasons["config.json"] == "other auto_map, hf_mla_version, num_key_norms"
    assert main(["refresh", str(old), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changes"] == said["changes"]


def test_what_is_up_to_date_stays_as_it_is(converted, new):
    """What `convert` and what `save_pretrained` have written; and where something changes, backups are never written over."""
    for folder in (Path(converted[0]), new):
        assert refresh(str(folder)).changes == []
        assert not list(folder.glob("before-refresh-*"))


def test_backups_pile_up_and_a_checkpoint_with_them_can_be_replaced(old):
    first = refresh(str(old)).backup
    kept = contents(Path(first))
    (old / "cache_mla.py").write_text("# edited\n")
    second = refresh(str(old))
    assert [change.file for change in second.changes] == ["cache_mla.py"]
    assert contents(Path(second.backup)) == {"cache_mla.py": b"# edited\n"} and contents(Path(first)) == kept
    (old / "layer_mla.py").unlink()
    assert refresh(str(old)).backup is None and len(list(old.glob("before-refresh-*"))) == 2
    (old / "conversion.json").write_text("{}")
    check_free(old, overwrite=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["interrupted", "full"])
@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("method", ["write_bytes", "replace"])  # to the side, and of a file by what was written there
def test_cut_short_it_is_as_it_was(old, monkeypatch, method, call, error):
    before, real = contents(old), getattr(Path, method)
    outcomes = iter([None] * call + [error])

    def failing(path, *arguments):
        if raised := next(outcomes, None):
            raise raised
        return real(path, *arguments)

    monkeypatch.setattr(Path, method, failing)
    expected, message = (KeyboardInterrupt, None) if error is KeyboardInterrupt else (UserError, "No space left.*; it is as it was")
    with pytest.raises(expected, match=message):
        refresh(str(old))
    assert contents(old) == before and not (old / ".incomplete").exists()
    monkeypatch.undo()
    assert refresh(str(old)).changes


def refused(tmp_path, old, case):
    """The folder of a case, and what its refusal says."""
    config = json.loads((old / "config.json").read_text())
    if case == "newer":
        write(old, config | {"hf_mla_version": "99.0.0"})
        return old, "written by hf_mla 99.0.0, newer than the .* installed; upgrade hf_mla"
    if case == "no version":
        write(old, config | {"hf_mla_version": "newest"})
        return old, "names hf_mla_version 'newest', which is none"
    if case == "not valid":
        write(old, config | {"kv_lora_rank": 0})
        return old, "config.json is not valid: .*kv_lora_rank is 0"
    if case == "not converted":
        return make_llama(tmp_path / "llama"), "is a 'llama', not a converted checkpoint"
    if case == "unknown type":
        write(old, {"model_type": "never_heard_of"})
        return old, "is a 'never_heard_of', not a converted checkpoint"
    if case == "no configuration":
        (old / "config.json").unlink()
        return old, "it has no config.json"
    if case == "file":
        return old / "config.json", "is a file; give the folder"
    if case == "Hub id":
        return "org/name", "hf download org/name --local-dir DIR"
    return tmp_path / "no such folder", "there is no folder"


CASES = ["newer", "no version", "not valid", "not converted", "unknown type", "no configuration", "file", "Hub id", "nowhere"]


@pytest.mark.parametrize("case", CASES)
def test_refusals(old, tmp_path, case):
    given, message = refused(tmp_path, old, case)
    before = contents(old)
    with pytest.raises(UserError, match=message) as error:
        refresh(str(given))
    assert "\n" not in str(error.value) and contents(old) == before


def test_read_only_folder_is_refused(old, monkeypatch, capsys):
    """The test may be run by somebody to whom no folder is read-only."""

    def mkdir(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    before = contents(old)
    assert main(["refresh", str(old)]) == 2
    assert capsys.readouterr().err == f"hf-mla: cannot write {old}: Permission denied; it is as it was\n"
    assert contents(old) == before


def test_unfinished_work_is_left_alone(old):
    work = old / ".incomplete"
    work.mkdir()
    (work / "recipe.json").write_text("{}")
    assert refresh(str(old)).backup
    assert [path.name for path in work.iterdir() if path.name != "lock"] == ["recipe.json"]


def test_loading_an_older_checkpoint_advises_once(old, caplog, monkeypatch):
    logging.getLogger("transformers").propagate = True
    spec = importlib.util.spec_from_file_location("another_configuration_mla", old / "configuration_mla.py")
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    for config in (LlamaMLAConfig, LlamaMLAConfig, copy.LlamaMLAConfig):  # the library may run the code several times
        config.from_pretrained(old)
    advice = [record.getMessage() for record in caplog.records]
    assert len(advice) == 1 and "hf-mla refresh FOLDER" in advice[0] and "hf_mla 0.1.0" in advice[0]
    caplog.clear()
    refresh(str(old))
    LlamaMLAConfig.from_pretrained(old)
    assert not caplog.records
    # The code that has travelled, where a newer package is installed.
    monkeypatch.setattr("hf_mla.configuration_mla.INSTALLED", "0.9.0")
    LlamaMLAConfig.from_pretrained(old)
    assert "0.9.0 installed" in caplog.text


@torch.no_grad()
def test_the_width_of_the_original_is_concluded(old, caplog):
    """Of what version 0.1 converted; until then RoPE that depends on it is refused, or said to be another."""
    logging.getLogger("transformers").propagate = True
    ids = torch.tensor([[5, 8, 13, 21]])
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
    yarn = {"rope_parameters": dynamic["rope_parameters"] | {"rope_type": "yarn", "original_max_position_embeddings": 64}}
    expected = AutoModelForCausalLM.from_pretrained(old)(ids).logits
    with pytest.raises(ValueError, match="'dynamic' depends on the width .* hf_mla 0.1.0 did not write down: `hf-mla refresh F"):
        AutoModelForCausalLM.from_pretrained(old, **dynamic)
    before = AutoModelForCausalLM.from_pretrained(old, **yarn)
    assert "'yarn' depends on the width" in caplog.text and before.config.head_dim == 8
    (old / "conversion.json").write_text("{}")
    refresh(str(old))
    caplog.clear()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(old)(ids).logits, expected)
    for given in (dynamic, yarn):
        model = AutoModelForCausalLM.from_pretrained(old, **given)
        assert (model.config.head_dim, model.config.source_rope_dim, model.config.source_rope_factor) == (16, 16, 1.0)
    assert not caplog.records and not torch.equal(model(ids).logits, before(ids).logits)


def test_saving_names_the_version_whose_code_is_saved(old, tmp_path):
    LlamaMLAForCausalLM.from_pretrained(old).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["hf_mla_version"] == hf_mla.__version__
