# SPDX-License-Identifier: Apache-2.0
"""Teach a converted model to talk back: TRL's SFTTrainer with a chat template, packed conversations and LoRA.

pip install trl
python examples/finetune_sft.py [MODEL] [--out FOLDER]

The user says "My dog sees your garden."; the model is to say "So your dog sees my garden.". MODEL is a checkpoint that
`hf-mla convert` wrote; without one, the bundled model is converted first.
"""

import argparse
import itertools
import os
import random
import tempfile
from typing import Any


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: idle threads leave the processor alone

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_mla import cache_bytes, cache_of
from hf_mla_conversion import convert
from hf_mla_conversion.source.text import BUNDLED


NOUNS = ["dog", "horse", "king", "captain", "father", "brother", "friend", "garden", "house", "boat"]
VERBS = ["sees", "hears", "likes", "wants", "knows", "remembers"]
OTHER = {"my": "your", "your": "my"}
# For models that have none: a line for each message. A model made for chats brings its own.
TEMPLATE = (
    "{% for message in messages %}{{ 'Q: ' if message['role'] == 'user' else 'A: ' }}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def conversation(whose: str, subject: str, verb: str, whose_too: str, thing: str) -> dict[str, list[dict[str, str]]]:
    """A conversation in TRL's form; the loss is on the completion."""
    question = f"{whose.capitalize()} {subject} {verb} {whose_too} {thing}."
    answer = f"So {OTHER[whose]} {subject} {verb} {OTHER[whose_too]} {thing}."
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


def answers(model: Any, tokenizer: Any, conversations: list[dict]) -> tuple[list[str], Any]:
    """What the model replies, up to the end of the line, and the cache at the end."""
    inputs = tokenizer.apply_chat_template(
        [each["prompt"] for each in conversations],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    outputs = model.eval().generate(
        **inputs, max_new_tokens=16, do_sample=False, stop_strings="\n", tokenizer=tokenizer, return_dict_in_generate=True
    )
    new = outputs.sequences[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)], cache_of(outputs)


def score(model: Any, tokenizer: Any, conversations: list[dict]) -> float:
    """The share of replies that are right to the letter."""
    texts, _ = answers(model, tokenizer, conversations)
    right = [each["completion"][0]["content"] for each in conversations]
    return sum(text == wanted for text, wanted in zip(texts, right, strict=True)) / len(right)


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("model", nargs="?", help="converted checkpoint; default: the bundled model, converted")
parser.add_argument("--out", help="folder for the fine-tuned model; default: a temporary one")
options = parser.parse_args()

with tempfile.TemporaryDirectory() as scratch:
    source, out = options.model or f"{scratch}/bundled-mla", options.out or f"{scratch}/chat-mla"
    if options.model is None:  # in closed form and on little text, for the example's sake; the defaults convert better
        convert(str(BUNDLED / "model"), source, kv_lora_rank=80, qk_rope_head_dim=16, steps=0, calibration_tokens=4096)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE

    conversations = [conversation(*words) for words in itertools.product(OTHER, NOUNS, VERBS, OTHER, NOUNS)]
    random.Random(0).shuffle(conversations)
    held_out, train = conversations[:100], conversations[100:]
    print(f"correct before: {score(model, tokenizer, held_out):.0%} of {len(held_out)} conversations that are not trained on")

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=f"{scratch}/training",
            max_steps=60,
            per_device_train_batch_size=4,
            max_length=128,
            packing=True,  # whole conversations, about five in a sequence; none sees another
            learning_rate=2e-3,  # the model is tiny; 2e-4 is usual for billions of parameters
            lr_scheduler_type="cosine",
            warmup_steps=6,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,  # there is memory enough
            logging_steps=20,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(train),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()

    trainer.model.merge_and_unload().save_pretrained(out)  # weights and code
    tokenizer.save_pretrained(out)  # with the chat template
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(out, padding_side="left")
    print(f"correct after: {score(model, tokenizer, held_out):.0%}, merged, saved and loaded again")

    texts, cache = answers(model, tokenizer, held_out[:1])
    print(f"{held_out[0]['prompt'][0]['content']} -> {texts[0]}")
    print(f"cached {cache.get_seq_length()} tokens in {cache_bytes(cache):,} bytes")
