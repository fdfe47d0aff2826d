"""Models for the tests: the bundled trained one, and small random ones of any shape, saved as users have them."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the program does

import pytest
import torch
import transformers


if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network

from families import Unrounded, mix_keys  # noqa: E402
from filelock import FileLock  # noqa: E402
from modes import (  # noqa: E402, F401 (pytest finds its hooks here)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_sessionfinish,
)
from transformers import AutoTokenizer  # noqa: E402

import hf_mla  # noqa: E402
from hf_mla_conversion import convert  # noqa: E402
from hf_mla_conversion.source.text import BUNDLED  # noqa: E402


MODEL = str(BUNDLED / "model")
VALIDATION = str(BUNDLED / "validation.txt.xz")
CALIBRATION = str(BUNDLED / "calibration.txt.xz")  # which the model has not seen, where it has the bundled prose
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


# A process that has imported what takes seconds and done nothing else is forked for every test that needs one of its own.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hf_mla_conversion.commands.convert", "hf_mla_conversion.commands.heal"])


def run_apart(log, function, *arguments):
    """Call a function of a test module in a process of its own; its exit code, or minus the signal that killed it, and output."""
    process = FORKS.Process(target=apart, args=(log, function, *arguments))
    process.start()
    process.join()
    return process.exitcode, log.read_text()


def apart(log, function, *arguments):
    with open(log, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.exit(function(*arguments))


def without_hf_mla(folder, code, *words):
    """The lines that code prints in a process where importing hf_mla fails; remote code is copied to the folder."""
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", f'import sys\nsys.modules["hf_mla"] = None\n{code}', *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def make_source(folder, family="Llama", dtype=torch.float32, shard_size="1GB", mix=False, std=0.25, **changes):
    """Save a random model of a family with the bundled tokenizer. `mix`: all key heads are unitary mixes of the first."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 4096}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1}
    shape |= {"pad_token_id": 2} | changes
    if shape["head_dim"] is None:  # left to the library
        del shape["head_dim"]
    config = getattr(transformers, f"{family}Config")(**shape)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=0.02 if "norm" in name else std)
        if "norm" in name:
            parameter.data += 1
        if "q_norm" in name or "k_norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.to(dtype)
    if mix:
        for layer in model.model.layers:
            mix_keys(layer.self_attn)
    model.save_pretrained(folder, max_shard_size=shard_size)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return str(folder)


def make_llama(folder, **changes):
    """Save a random Llama; see `make_source`."""
    return make_source(folder, **changes)


def make_mla(family="Llama", **changes):
    """A random MLA model in float32, with logits of order one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    shape |= {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "pad_token_id": 0}
    config = getattr(hf_mla, f"{family}MLAConfig")(**(shape | changes))
    model = getattr(hf_mla, f"{family}MLAForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            parameter.data.normal_(std=0.15)
    return model


@pytest.fixture(autouse=True)
def seeded():
    """Random numbers are a test's own, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def unrounded():
    """float64 all the way, in the library's models too."""
    with Unrounded():
        yield


@pytest.fixture
def mla():
    return make_mla()


def made_once(tmp_path_factory, name, make):
    """A folder, and what `make` returned that made it: the first of several processes that asks; from then on it is only read."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name  # one for all processes of pytest-xdist
    with FileLock(f"{folder}.lock"):
        done = folder / "returned"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # another has failed at it
            folder.mkdir()
            returned = make(folder)
            done.write_bytes(pickle.dumps(returned))
    return folder, pickle.loads(done.read_bytes())


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The bundled model, converted as `hf-mla demo` does but on less text and in shorter sequences; a folder and the report."""
    options = {"calibration": CALIBRATION, "calibration_tokens": 8192, "window": 256, "steps": 30, "device": "cpu"}
    folder, report = made_once(
        tmp_path_factory, "bundled", lambda f: convert(MODEL, str(f / "mla"), kv_lora_rank=44, qk_rope_head_dim=16, **options)
    )
    return str(folder / "mla"), report


@pytest.fixture(scope="session")
def closed_form(tmp_path_factory):
    """The bundled model in closed form; a folder."""
    options = {"calibration_tokens": 8192, "window": 256, "steps": 0, "device": "cpu"}
    folder, _ = made_once(
        tmp_path_factory, "closed_form", lambda f: convert(MODEL, str(f / "mla"), kv_lora_rank=44, qk_rope_head_dim=16, **options)
    )
    return str(folder / "mla")
