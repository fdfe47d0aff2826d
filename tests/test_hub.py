"""The Hub: what `--push-to` uploads, that it loads from there, uploads that are cut short, and what is said when a Hub refuses."""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import FORKS, VALIDATION, apart, make_llama
from hub import OTHER, OWNER, TOKEN, running_hub
from huggingface_hub import ModelCard, constants, hf_api
from test_cli import refuses, run

from hf_mla_conversion.cli import main
from hf_mla_conversion.output.card import add_export, add_healing
from hf_mla_conversion.output.reports import ExportReport, PerSide, Widths


QUICK = ["--kv-budget", "0.5", "--calibration-tokens", "1024", "--steps", "0", "--device", "cpu"]
CARD = "---\nlicense:\n- llama3.2\nlicense_name: community\nbase_model: org/other\n---\n\n# Tiny\n"


def settings(hub, folder):
    """Constants of the Hub's library by which it finds a Hub, and its cache in a folder, empty at first."""
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    found = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": not hub.xet,
    }
    return found | {"HF_HUB_CACHE": str(folder / "cache"), "HF_TOKEN_PATH": str(folder / "no-token")}


@pytest.fixture
def hub(tmp_path, monkeypatch, small):
    """A Hub with a model org/tiny, at which this process and its token are."""
    with running_hub() as hub:
        hub.add("org/tiny", small)
        for name, value in settings(hub, tmp_path).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # of the functions that are methods of this
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    make_llama(folder)
    (folder / "README.md").write_text(CARD)
    return folder


def digest(content):
    return hashlib.sha256(content).hexdigest()


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pushed_is_all_and_loads_again(hub, tmp_path, monkeypatch, capsys):
    """By way of Xet, both ways."""
    import hf_xet

    hub.xet = str(tmp_path / "xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    code, out, errors = run(capsys, "convert", "org/tiny", "out", *QUICK, "--push-to", "tiny-mla", "--json")
    assert (code, errors) == (0, [])
    report, written, pushed = json.loads(out), contents(tmp_path / "out"), hub.repositories[f"{OWNER}/tiny-mla"]
    assert pushed.private and len(pushed.commits) == 1
    large = {digest(content): name for name, content in written.items()}
    there = {
        name: (content if isinstance(content, bytes) else written[large[content[0]]]) for name, content in pushed.files.items()
    }
    assert there == written and {"modeling_mla.py", "tokenizer.json", "conversion.json"} < set(there)
    assert there["conversion.png"].startswith(b"\x89PNG") and not isinstance(pushed.files["conversion.png"], bytes)

    text = written["README.md"].decode()
    assert "![Spectra and errors of all layers](conversion.png)" in text
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.license_name) == ("org/tiny", ["llama3.2"], "community")
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["mla", "hf_mla"])
    metrics = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    held, lookups = report["texts"]
    assert lookups["name"] == "lookups"  # which say nothing of other text
    assert data.model_name == "tiny-mla" and len(metrics) == 4
    assert metrics["bundled English prose, held back", "perplexity"] == pytest.approx(held["perplexity"]["converted"], abs=1e-5)
    assert metrics["bundled English prose, held back", "top1_agreement"] == pytest.approx(held["top1_agreement"], abs=1e-5)

    others_say_what_they_are(text)
    # What stands in the card, in a process that has neither cache nor hf_mla, and at the command line.
    paths = {
        digest(written[name]): str(tmp_path / "out" / name) for name, content in pushed.files.items() if type(content) is tuple
    }
    hub.xet_hashes = {sha: info.hash for sha, info in zip(paths, hf_xet.hash_files([*paths.values()]), strict=True)}
    (python,), (shell,) = (text.split(f"```{language}\n")[1:] for language in ("python", "bash"))
    code = f"import sys; sys.modules['hf_mla'] = None\n{python.split('```')[0]}\nprint(type(model).__module__)"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path / "xet")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Once upon a time" in done.stdout and "transformers_modules.me.tiny" in done.stdout
    words = shlex.split(shell.splitlines()[0].replace("your.txt", VALIDATION))[1:]
    code, out, errors = run(capsys, *words, "--tokens", 512, "--device", "cpu", "--json")
    assert (code, errors) == (0, [])
    assert json.loads(out)["kv_bytes_per_token"]["converted"] == report["kv_bytes_per_token"]["converted"]


def others_say_what_they_are(card):
    """Cards of what is made of a pushed model."""
    measured = {"perplexity": PerSide(2.0, 2.5), "perplexity_ratio": 1.25, "kl": 0.125, "top1_agreement": 0.5, "tokens": 512}
    report = SimpleNamespace(steps_taken=3, tokens_per_step=64, window=64, stopped_early=False, verify=SimpleNamespace(**measured))
    recipe = {"teacher": "org/tiny", "train": "attention", "lora_rank": 16, "text": "books.txt"}
    healed = add_healing(card, report, recipe, "a healed one")
    index = {(result.dataset_type, result.metric_type): result.metric_value for result in ModelCard(healed).data.eval_results}
    values = {"perplexity": 2.5, "perplexity_ratio": 1.25, "kl_divergence": 0.125, "top1_agreement": 0.5}
    assert index == {("books.txt", kind): value for kind, value in values.items()}
    assert ModelCard(healed).data.base_model == "org/tiny" and "(conversion.png)" in healed
    assert healed.count("hf-mla verify 'a healed one' --against org/tiny") == healed.count("## Healing") == 1
    exported = add_export(card, ExportReport("deepseek_v3", None, padded=Widths(16, 16, 16, 16)), "exported")
    assert "## Export" in exported and "Causal" in exported
    assert not [word for word in ("conversion.png", "trust_remote_code", "hf-mla verify me", "```bash") if word in exported]
    assert ModelCard(exported).data.to_dict() == ModelCard(card).data.to_dict()
    assert add_healing("# Older\n\n## Limits\n", report, recipe, "new").startswith("# Older\n\n## Healing")


def push_elsewhere(found, url, words):
    """The program, in a process that is at a Hub."""
    for name, value in found.items():
        setattr(constants, name, value)
    hf_api.api.endpoint = url
    os.environ["HF_TOKEN"] = TOKEN
    time.sleep = lambda _seconds: None  # before each new try
    return main(words)


@pytest.mark.parametrize("how", ["broken off", "killed"])
def test_the_same_command_goes_on_with_an_upload_that_was_cut_short(hub, tmp_path, monkeypatch, capsys, how):
    words = ["convert", "org/tiny", str(tmp_path / "out"), *QUICK, "--push-to", f"{OWNER}/tiny-mla"]
    weights = []

    def half_way(sha, size):
        if size < 1 << 20:
            return False
        assert hub.came.wait(60)  # the picture is to be there, and half of the weights
        weights.append(sha)
        if how == "killed":
            process.kill()
        return True

    hub.half_way = half_way
    process = FORKS.Process(target=apart, args=(tmp_path / "log", push_elsewhere, settings(hub, tmp_path), hub.url, words))
    process.start()
    process.join()
    said = (tmp_path / "log").read_text().splitlines()
    if how == "killed":
        assert process.exitcode == -signal.SIGKILL, said
    else:
        assert process.exitcode == 2, said
        begin = (
            f"hf-mla: {tmp_path}/out is complete, but uploading it to me/tiny-mla failed (Error while uploading 'model.safetensors'"
        )
        assert said[-1].startswith(begin)
        assert said[-1].endswith("; the same command, without --overwrite, goes on with the upload")
    written = contents(tmp_path / "out")
    pushed = hub.repositories[f"{OWNER}/tiny-mla"]
    assert hub.received == [digest(written["conversion.png"])] and not pushed.commits
    assert set(weights) == {digest(written["model.safetensors"])}

    hub.half_way = None
    monkeypatch.setattr("hf_mla_conversion.commands.convert.Job", None)  # nothing is converted again
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert json.loads(out) == json.loads(written["conversion.json"])["report"]
    assert [*pushed.commits[0]] == sorted(pushed.files) == sorted(written) and contents(tmp_path / "out") == written
    assert hub.received[1:] == [digest(written["model.safetensors"])]
    assert run(capsys, *words)[0] == 0  # and when all is there, nothing is sent
    assert len(hub.received) == 2 and len(pushed.commits) == 1
    assert "exists and is not empty" in refuses(capsys, *words, "--seed", 1)
    assert "exists and is not empty" in refuses(capsys, *words[:-2])


def test_what_xet_has_is_not_sent_again(hub, tmp_path, monkeypatch, capsys):
    hub.xet, hub.refuse_commits = str(tmp_path / "xet"), True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    words = ["convert", "org/tiny", "out", *QUICK, "--push-to", "me/tiny-mla"]
    line = refuses(capsys, *words)
    assert "out is complete, but uploading it to me/tiny-mla failed (" in line and "out of order" in line
    blocks = {path: path.stat().st_mtime_ns for path in (tmp_path / "xet").glob("xet/xorbs/xorbs/*")}
    assert sum(path.stat().st_size for path in blocks) > len((tmp_path / "out" / "model.safetensors").read_bytes()) * 0.8
    hub.refuse_commits = False
    assert run(capsys, *words)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "xet").glob("xet/xorbs/xorbs/*")} == blocks
    assert len(hub.repositories["me/tiny-mla"].commits) == 1


def test_an_interrupted_upload_says_how_to_go_on(hub, monkeypatch, capsys):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", interrupt)
    words = ["convert", "org/tiny", "out", *QUICK, "--overwrite", "--push-to", "me/tiny-mla"]
    code, out, errors = run(capsys, *words)
    words.remove("--overwrite")  # which would convert it again
    assert (code, out, errors[-1]) == (130, "", f"hf-mla: interrupted; to go on: hf-mla {' '.join(words)}")


IN = "log in with `hf auth login`, or set HF_TOKEN"
REFUSED = {  # the model, a token, and what is said of the model
    "gated": ("gated", "", "it is gated; ask for access on URL/org/gated, then " + IN),
    "gated, to another": ("gated", OTHER, "it is gated, and the account of this token has no access; ask for it on URL/org/gated"),
    "private": ("private", "", "there is no such model, or it is private; check the name, or " + IN),
    "private, to another": ("private", OTHER, "there is no such model, or it is private; check the name"),
    "unknown token": ("tiny", "hf_made_up", "it does not know this token; " + IN),
    "none": ("none", "", "there is no such model, or it is private; check the name, or " + IN),
    "no revision": ("tiny --revision v9", "", "it has no such revision; check --revision"),
}


@pytest.mark.parametrize("command", ["plan", "info", "convert"])
@pytest.mark.parametrize(("model", "token", "said"), REFUSED.values(), ids=REFUSED)
def test_a_source_that_the_hub_refuses(hub, monkeypatch, capsys, small, command, model, token, said):
    hub.add("org/gated", small, gated=True)
    hub.add("org/private", small, private=True)
    monkeypatch.setenv("HF_TOKEN", token)
    name, *options = model.split()
    line = refuses(capsys, command, f"org/{name}", *(["out"] if command == "convert" else []), *options)
    assert line == f"hf-mla: org/{name} is not a folder here, and the Hub says: {said.replace('URL', hub.url)}"


@pytest.mark.parametrize("command", ["plan", "info", "convert"])
def test_offline(hub, monkeypatch, capsys, command):
    words = [command, "org/tiny", *(["out"] if command == "convert" else [])]
    lines = []
    for changes in ({"HF_HUB_OFFLINE": True}, {"HF_HUB_OFFLINE": False, "ENDPOINT": "http://127.0.0.1:9"}):
        for name, value in changes.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", constants.ENDPOINT)
        lines.append(refuses(capsys, *words))
    said = "hf-mla: org/tiny is neither a folder here nor whole in the local Hub cache, and {}; check the path, or go online"
    assert lines == [said.format("HF_HUB_OFFLINE is set"), said.format("the Hub cannot be reached")]


PUSHES = {  # a token, where to, and what is said of that
    "no token": ("", "me/mine", "there is no token for the Hub; " + IN + " to one that may write"),
    "unknown token": ("hf_made_up", "me/mine", "it does not know this token; " + IN),
    "another's place": (OTHER, "me/mine", "this token may not write there; use one that may"),
    "no name": (TOKEN, "a/b/c", "Repo id must be in the form 'repo_name' or 'namespace/repo_name': 'a/b/c'."),
    "offline": (TOKEN, "me/mine", "HF_HUB_OFFLINE is set, and keeps everything from the Hub; unset it"),
    "no connection": (TOKEN, "me/mine", "it cannot be reached ("),
}


@pytest.mark.parametrize("name", PUSHES)
def test_a_push_that_cannot_be_is_refused_before_any_work(hub, tmp_path, monkeypatch, capsys, small, name):
    token, repository, said = PUSHES[name]
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", name == "offline")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9" if name == "no connection" else hub.url)
    line = refuses(capsys, "convert", small, "out", *QUICK, "--push-to", repository)
    assert line.startswith(f"hf-mla: --push-to {repository}: {said}")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    assert "exists and is not empty" in refuses(capsys, "convert", small, "out", *QUICK, "--push-to", "me/mine")
    assert not set(hub.repositories) - {"org/tiny"}  # nor is anything made there
