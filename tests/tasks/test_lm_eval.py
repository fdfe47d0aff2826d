"""A converted checkpoint in lm-eval, by the code that it carries, as docs/tasks.md has it; the tasks are those of this folder.

Runs where lm-eval is installed: `make test-lm-eval`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


pytest.importorskip("lm_eval", reason="lm-eval is not installed: make test-lm-eval")

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def evaluated(closed_form, tmp_path_factory):
    """What lm_eval says of the tasks, and what it records of each question."""
    folder = tmp_path_factory.mktemp("lm_eval")
    words = ["--model", "hf", "--model_args", f"pretrained={closed_form},trust_remote_code=True,dtype=float32", "--device", "cpu"]
    words += ["--tasks", "hf_mla_choices,hf_mla_copy", "--include_path", ".", "--output_path", str(folder), "--log_samples"]
    here = {"HF_HOME": str(folder / "hub"), "HF_MODULES_CACHE": str(folder / "modules"), "HF_DATASETS_OFFLINE": "1"}
    program = Path(sys.executable).with_name("lm_eval")
    done = subprocess.run([program, *words], cwd=FOLDER, env=os.environ | here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = folder.glob("*/results_*.json")
    assert list((folder / "modules").rglob("modeling_mla.py")), "the model was not the checkpoint's own"
    samples = {}
    for task in ("hf_mla_choices", "hf_mla_copy"):
        (file,) = folder.glob(f"*/samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return json.loads(results.read_text(encoding="utf-8"))["results"], samples


@pytest.fixture(scope="module")
def model(closed_form):
    return AutoModelForCausalLM.from_pretrained(closed_form, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(closed_form):
    return AutoTokenizer.from_pretrained(closed_form)


@torch.no_grad()
def test_likelihoods_are_those_of_a_forward_pass(evaluated, model, tokenizer):
    results, samples = evaluated
    assert len(samples["hf_mla_choices"]) == 6
    for sample in samples["hf_mla_choices"]:
        for ending, ((likelihood, _greedy),) in zip(sample["doc"]["endings"], sample["resps"], strict=True):
            begin = tokenizer(sample["doc"]["begin"], add_special_tokens=False)["input_ids"]
            ids = tokenizer(f"{sample['doc']['begin']} {ending}", add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(logits[place - 1, ids[place]].item() for place in range(len(begin), len(ids)))
            assert float(likelihood) == pytest.approx(expected, abs=1e-3)
    assert results["hf_mla_choices"]["acc,none"] == 1


def test_texts_are_those_of_generate(evaluated, model, tokenizer):
    _, samples = evaluated
    assert len(samples["hf_mla_copy"]) == 4
    for sample in samples["hf_mla_copy"]:
        prompt = f"{sample['doc']['examples']}Input: {sample['doc']['words']}\nOutput:"
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=16, do_sample=False)
        said = sample["resps"][0][0]
        assert said and said == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]
