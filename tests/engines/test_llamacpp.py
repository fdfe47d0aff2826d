"""llama.cpp itself reads what `export --format gguf` writes, and gives what Transformers gives.

Runs where LLAMACPP_PYTHON names a Python that has the package cyllama: `make test-llamacpp` makes one.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from byte_level import LLAMA3, SPLITS, by_pattern, byte_level
from conftest import make_mla
from transformers import AutoModelForCausalLM

from hf_mla_conversion import export
from hf_mla_conversion.source.tokenizer import samples


PYTHON = os.environ.get("LLAMACPP_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="LLAMACPP_PYTHON names no Python with llama.cpp: make test-llamacpp")


def llamacpp(folder, **job):
    """Export a checkpoint in float32 and run a job on the file."""
    file, path = folder / "m.gguf", folder / "job.json"
    export(str(folder / "mla"), str(file), format="gguf", outtype="f32")
    path.write_text(json.dumps({"model": str(file), "new_tokens": 24, **job}))
    done = subprocess.run([PYTHON, Path(__file__).with_name("llamacpp.py"), path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


RANDOM = {
    "Mistral": {"family": "Mistral", "sliding_window": None, "rms_norm_eps": 1e-5},
    "Qwen3": {"family": "Qwen3", "kv_lora_rank": 40, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("case", ["converted", "closed_form", *RANDOM])
def test_writes_what_transformers_writes(tmp_path, request, case):
    folder = tmp_path / "mla"
    if case in RANDOM:
        make_mla(vocab_size=4096, max_position_embeddings=512, **RANDOM[case]).save_pretrained(folder)
    else:
        given = request.getfixturevalue(case)
        shutil.copytree(given if case == "closed_form" else given[0], folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):  # whose pattern llama.cpp has no name for
            (folder / file).unlink()
    byte_level(by_pattern(LLAMA3), ignore_merges=True).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [torch.randint(3, 4096, (1, length)) for length in (7, 32, 130)]
    job = llamacpp(tmp_path, vocab_size=4096, prompts=[prompt[0].tolist() for prompt in prompts])
    for prompt, run in zip(prompts, job["runs"], strict=True):
        whole = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert run["tokens"] == whole[0, prompt.shape[1] :].tolist()
        with torch.no_grad():
            logits = model(whole[:, :-1]).logits
        chances = logits.double().log_softmax(-1).gather(-1, whole[:, 1:, None])[0, :, 0]
        torch.testing.assert_close(torch.tensor(run["log_probabilities"], dtype=torch.float64), chances, atol=1e-4, rtol=0)
        beside = run["bytes_per_token"] - model.config.kv_bytes_per_token(4)
        assert 0 <= beside <= 12  # where a token stands, and in which sequence


@pytest.mark.parametrize("name", SPLITS)
def test_reads_text_as_transformers_does(tmp_path, name):
    _, splits, ignore_merges = SPLITS[name]
    tokenizer = byte_level(splits(), ignore_merges, size=2000)
    make_mla(vocab_size=2100).save_pretrained(tmp_path / "mla")
    tokenizer.save_pretrained(tmp_path / "mla")
    texts = [text for text in samples(tokenizer) if "\0" not in text]  # where a string ends
    assert len(texts) > 250
    job = llamacpp(tmp_path, vocab_size=2100, texts=texts)
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    differing = [text for text, one, other in zip(texts, job["tokens"], expected, strict=True) if one != other]
    assert not differing
