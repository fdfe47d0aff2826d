# SPDX-License-Identifier: Apache-2.0
"""Teach a converted model to say three words backwards: LoRA of PEFT, the Trainer of Transformers; then merge, save, use.

python examples/finetune_lora.py [MODEL] [--out FOLDER]

MODEL is a checkpoint that `hf-mla convert` wrote; without one, the bundled model is converted first.
"""

import argparse
import itertools
import os
import random
import tempfile
from typing import Any


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: idle threads leave the processor alone

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hf_mla import cache_bytes, cache_of
from hf_mla_conversion import convert
from hf_mla_conversion.source.text import BUNDLED


WORDS = ["sea", "captain", "house", "night", "hand", "door", "window", "horse", "river", "garden"]
WORDS += ["king", "dog", "morning", "tree", "letter", "road", "fire", "heart", "boat", "table"]


def example(words: tuple[str, ...]) -> tuple[str, str]:
    """What the model reads, and what it is to write."""
    return f"Say {' '.join(words)} backwards:", f" {' '.join(reversed(words))}."


def tokens(tokenizer: Any, words: tuple[str, ...]) -> dict[str, list[int]]:
    """An example for the Trainer; only the answer counts (-100 does not)."""
    prompt, answer = (tokenizer(text)["input_ids"] for text in example(words))
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def answers(model: Any, tokenizer: Any, examples: list[tuple[str, ...]]) -> tuple[list[str], Any]:
    """What the model makes of each prompt, up to the full stop, and the cache at the end."""
    inputs = tokenizer([example(words)[0] for words in examples], padding=True, return_tensors="pt").to(model.device)
    outputs = model.eval().generate(
        **inputs, max_new_tokens=16, do_sample=False, stop_strings=".", tokenizer=tokenizer, return_dict_in_generate=True
    )
    new = outputs.sequences[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True), cache_of(outputs)


def score(model: Any, tokenizer: Any, examples: list[tuple[str, ...]]) -> float:
    """The share of examples that the model gets right to the letter."""
    texts, _ = answers(model, tokenizer, examples)
    return sum(text == example(words)[1] for text, words in zip(texts, examples, strict=True)) / len(examples)


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("model", nargs="?", help="converted checkpoint; default: the bundled model, converted")
parser.add_argument("--out", help="folder for the fine-tuned model; default: a temporary one")
options = parser.parse_args()

with tempfile.TemporaryDirectory() as scratch:
    source, out = options.model or f"{scratch}/bundled-mla", options.out or f"{scratch}/backwards-mla"
    if options.model is None:  # in closed form and on little text, for the example's sake; the defaults convert better
        convert(str(BUNDLED / "model"), source, kv_lora_rank=80, qk_rope_head_dim=16, steps=0, calibration_tokens=4096)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")

    lists = list(itertools.permutations(WORDS, 3))
    random.Random(0).shuffle(lists)
    held_out, train = lists[:100], lists[100:]
    print(f"correct before: {score(model, tokenizer, held_out):.0%} of {len(held_out)} lists that are not trained on")

    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{scratch}/training",
            max_steps=60,
            per_device_train_batch_size=32,
            learning_rate=2e-3,  # the model is tiny; 2e-4 is usual for billions of parameters
            lr_scheduler_type="cosine",
            warmup_steps=6,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=[tokens(tokenizer, words) for words in train],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()

    model.merge_and_unload().save_pretrained(out)  # weights and code: whoever loads it needs neither PEFT nor hf_mla
    tokenizer.save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    print(f"correct after: {score(model, tokenizer, held_out):.0%}, merged, saved and loaded again")

    texts, cache = answers(model, tokenizer, held_out[:1])
    print(f"{example(held_out[0])[0]}{texts[0]}")
    print(f"cached {cache.get_seq_length()} tokens in {cache_bytes(cache):,} bytes")
