"""Runs where cyllama is installed, llama.cpp in a wheel, and nothing of ours: `python llamacpp.py JOB.json` adds its results.

A job has `model`, a .gguf file, `vocab_size`, and `prompts` (token ids) to continue by `new_tokens` or `texts` to tokenize.
"""

import json
import sys

import numpy as np
from cyllama.llama import llama_cpp


def log_softmax(logits):
    logits = np.asarray(logits, dtype=np.float64)
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


class Model(llama_cpp.LlamaModel):
    n_vocab = 0  # the wheel's LlamaContext reads it and does not set it


def run(job):
    Model.n_vocab = job["vocab_size"]
    options = llama_cpp.LlamaModelParams()
    options.n_gpu_layers = 0
    model = Model(job["model"], options, False)
    # No token is added, and what is written like a special token is one.
    job["tokens"] = [list(model.get_vocab().tokenize(text, False, True)) for text in job.get("texts", [])]
    options = llama_cpp.LlamaContextParams()
    options.n_ctx = options.n_batch = options.n_ubatch = 256
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = options.flash_attn_type = 0  # a cache in float32
    context = llama_cpp.LlamaContext(model, options, False)

    def read(ids, position):
        """Log-probabilities after each of some tokens."""
        batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        batch.set_batch(ids, position, True)
        context.decode(batch)
        return [log_softmax(context.get_logits_ith(place)) for place in range(len(ids))]

    job["runs"] = []
    for prompt in job.get("prompts", []):
        context.kv_cache_clear()
        after = read(prompt, 0)
        chances = [float(after[place][token]) for place, token in enumerate(prompt[1:])]
        size, written = context.get_state_seq_size(0), []
        for step in range(job["new_tokens"]):
            written.append(int(after[-1].argmax()))
            chances.append(float(after[-1][written[-1]]))
            after = read(written[-1:], len(prompt) + step)
        grown = (context.get_state_seq_size(0) - size) / job["new_tokens"]
        job["runs"].append({"tokens": written, "log_probabilities": chances, "bytes_per_token": grown})


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        job = json.load(file)
    run(job)
    with open(sys.argv[1], "w") as file:
        json.dump(job, file)
