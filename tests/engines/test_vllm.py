"""Checkpoints in vLLM, on a CPU: the tokens of Transformers, from a cache of latents. `make test-vllm` runs this."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import LLAMA3_ROPE, MODEL, make_mla, make_source
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mla_conversion import convert


pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm")

GENERATE = str(Path(__file__).parent / "vllm_generate.py")
PROMPTS = (
    "The captain looked at the sea and",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was",
    "She had not been long in the house before the old man came in and asked for the letter. " * 9,
)
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
REMOTE = {"trust_remote_code": True}


def environment(scratch, variables):
    """No plugin of vLLM but those that a test names, and 1 GiB for the cache of each process."""
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": f"{scratch}/vllm", "HF_MODULES_CACHE": f"{scratch}/modules"}
    return given | own | {"VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": ""} | variables


def make_checkpoint(folder, family="Llama", **changes):
    """Save a random model with MLA, whose norms are real, and its tokenizer; a folder."""
    shape = LATENT | {"qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 4096, "max_position_embeddings": 512}
    model = make_mla(family, **(shape | {"num_hidden_layers": 3} | changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """A Llama in closed form, whose norm on the latent is the identity; a folder."""
    scratch = tmp_path_factory.mktemp("converted")
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "std": 0.06}
    source = make_source(scratch / "source", max_position_embeddings=512, **shape)
    convert(source, str(scratch / "mla"), **LATENT, steps=0, heal_tokens=0, calibration_tokens=2048, device="cpu")
    return str(scratch / "mla")


@torch.no_grad()
def expected(folder):
    """By Transformers: the configuration, and for each prompt its length, all tokens, and their log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=2)
        logprobs = model(tokens).logits.double().log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]
        results.append((ids.shape[1], tokens[0].tolist(), logprobs))
    return model.config, results


def generate(folder, scratch, prompts, options, variables):
    """What vLLM makes of the prompts, None if it fails, and all that it says."""
    (scratch / "prompts.json").write_text(json.dumps(prompts))
    arguments = [folder, str(scratch / "prompts.json"), str(scratch / "out.json"), json.dumps(options)]
    command = [sys.executable, GENERATE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=environment(scratch, variables))
    result = json.loads((scratch / "out.json").read_text()) if done.returncode == 0 else None
    return result, done.stdout + done.stderr


REFUSED = {"kv_lora_rank": 128, "qk_rope_head_dim": 32, "num_key_norms": 2, "sliding_window": 16, "use_sliding_window": True}
REFUSED["layer_types"] = ["full_attention", "sliding_attention", "sliding_attention"]

CASES = {
    "closed form": (None, REMOTE, {}),
    "biases, by the plugin, without the flag": (("Qwen2", {}), {}, {"VLLM_PLUGINS": "hf_mla"}),
    "llama3 rope, two processes": (
        ("Llama", {"rope_parameters": LLAMA3_ROPE}),
        REMOTE | {"tensor_parallel_size": 2},
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ),
    "all that is refused, expanded": (("Qwen3", REFUSED), REMOTE, {"VLLM_MLA_DISABLE": "1"}),
}


@pytest.mark.parametrize(("made", "options", "variables"), CASES.values(), ids=CASES.keys())
def test_tokens_and_cache(made, options, variables, converted, tmp_path):
    """Under tensor parallelism each process holds all latents: there is one head of them."""
    folder = converted if made is None else make_checkpoint(tmp_path / "model", made[0], **made[1])
    config, references = expected(folder)
    results, said = generate(folder, tmp_path, [tokens[:length] for length, tokens, _ in references], options, variables)
    assert results is not None, said[-4000:]
    for (tokens, logprobs), (_, reference, reference_logprobs) in zip(results, references, strict=True):
        assert tokens == reference
        assert (torch.tensor(logprobs, dtype=torch.float64) - reference_logprobs).abs().max() < 1e-4
    if "VLLM_MLA_DISABLE" not in variables:
        held = int(re.search(r"KV cache size: ([\d,]+) tokens", said)[1].replace(",", ""))
        page = 16
        assert held == 2**30 // (page * config.kv_bytes_per_token(itemsize=4)) * page


def test_a_refusal_is_the_last_line(tmp_path):
    folder = make_checkpoint(tmp_path / "model", "Qwen3", **REFUSED)
    result, said = generate(folder, tmp_path, [[5, 6, 7]], REMOTE, {})
    assert result is None
    assert said.strip().splitlines()[-1].startswith("NotImplementedError: kv_lora_rank + qk_rope_head_dim is 128 + 32; ")


def test_the_server_answers(converted, tmp_path):
    """Compiled, as it is by default."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", converted, "--trust-remote-code"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=environment(tmp_path, {}))
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except urllib.error.URLError:
                assert server.poll() is None, (tmp_path / "log").read_text()[-4000:]
                time.sleep(1)
        asked = {"model": converted, "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0}
        asked |= {"ignore_eos": True, "return_token_ids": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/completions", json.dumps(asked).encode(), headers)
        answer = json.load(urllib.request.urlopen(request))["choices"][0]
    finally:
        server.terminate()
        server.wait()
    _, [(length, tokens, _), *_] = expected(converted)
    assert answer["token_ids"] == tokens[length:]
