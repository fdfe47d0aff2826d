"""Small byte-level BPE tokenizers that split text as those of well-known models do, each written as in its tokenizer.json."""

import json
import lzma

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_mla_conversion.source.text import BUNDLED


TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL
NEMO = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def by_pattern(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# By llama.cpp's names: whose it is, what it splits with, and whether a word that is a token is taken without merges.
SPLITS = {
    "llama-bpe": ("Llama 3", lambda: by_pattern(LLAMA3), True),
    "smaug-bpe": ("SmolLM3", lambda: by_pattern(LLAMA3), False),
    "qwen2": ("Qwen2", lambda: by_pattern(QWEN2), False),
    "tekken": ("Mistral Nemo", lambda: by_pattern(NEMO), True),
    "smollm": (
        "SmolLM2",
        lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        False,
    ),
    "gpt-2": ("GPT-2", lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), False),
}


def byte_level(
    splits, ignore_merges=False, size=900, special=("<|bos|>", "<|eos|>", "<|pad|>"), user=("<think>",), normalizer=None
):
    """A tokenizer trained on the bundled text; `splits` is one of `tokenizers`' pre-tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splits, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with lzma.open(BUNDLED / "validation.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(200_000)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    spec = json.loads(tokenizer.to_str())
    spec["model"]["ignore_merges"], spec["normalizer"] = ignore_merges, normalizer
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_tokens(list(user))
    roles = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
