# SPDX-License-Identifier: Apache-2.0
"""What llama.cpp must be told of a tokenizer to give the same tokens.

* It has the patterns that split text before the merges in its own code, by name. A name is given only where the tokenizer's splits
  and treatment of whole words are exactly those; every other tokenizer is refused, since wrong tokens look like a bad model.
* Splits are compared as the library uses them, not as a file tells them: some classes bring their own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES, GPT2 = ("ByteLevel", False), ("ByteLevel", True)  # without and with the pattern of GPT-2
# Splits, and whether a word that is a token needs no merges, by llama.cpp's names.
PRE_TOKENIZERS: dict[str, tuple[tuple[tuple[str, Any], ...], bool]] = {
    "llama-bpe": ((("Split", WORDS + r"\p{N}{1,3}" + END), BYTES), True),
    "smaug-bpe": ((("Split", WORDS + r"\p{N}{1,3}" + END), BYTES), False),
    "qwen2": ((("Split", WORDS + r"\p{N}" + END), BYTES), False),
    "tekken": ((("Split", TEKKEN), BYTES), True),
    "smollm": ((("Digits", True), GPT2), False),
    "gpt-2": ((GPT2,), False),
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms."""

    pre: str
    """Name of the pre-tokenizer."""
    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: dict[str, int] = field(default_factory=dict)
    """Of the tokens with a meaning: bos, eos, eot, eom, unk, pad."""
    add_bos: bool = False
    add_eos: bool = False
    chat_template: Any = None


def tokenizer_refusal(tokenizer: Any, size: int) -> str | None:
    """Why it is not certain that llama.cpp would give the tokens of a tokenizer, or None if it is.

    Args:
        tokenizer: a model's.
        size: how many tokens the model knows.

    Returns:
        What is in the way.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "its tokenizer has no tokenizer.json"
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE" or spec["model"].get("byte_fallback"):
        return "its tokenizer is not byte-level BPE (sentencepiece's kind is not carried over)"
    if pre_tokenizer(spec) is None:
        return f"its tokenizer splits text in a way that llama.cpp has no name for; known are {', '.join(PRE_TOKENIZERS)}"
    for token in spec["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            return f"its tokenizer has {token['content']!r}, which depends on the spaces or letters beside it"
    count = 1 + max(tokenizer.get_vocab().values())
    if count > size:
        return f"its tokenizer has {count:,} tokens, the model {size:,}"
    if surroundings(tokenizer) is None:
        return "its tokenizer adds more to a text than llama.cpp can: a token at its beginning and one at its end"
    return None


def vocabulary(tokenizer: Any, size: int, ends: Sequence[int]) -> Vocabulary:
    """Say a tokenizer in llama.cpp's terms.

    Args:
        tokenizer: the model's, which `tokenizer_refusal` lets through.
        size: how many tokens the model knows; those that the tokenizer has no use for are filled up.
        ends: tokens that end what is generated; of more than three, the last are left to llama.cpp, which knows many by their text.

    Returns:
        What goes into the file.
    """
    from gguf import TokenType

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    pre, around = pre_tokenizer(spec), surroundings(tokenizer)
    assert pre is not None and around is not None
    words = {number: word for word, number in spec["model"]["vocab"].items()}
    names = words | {token["id"]: token["content"] for token in spec["added_tokens"]}
    kinds = {token["id"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED for token in spec["added_tokens"]}
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in ends or not ends else ends[0]
    roles = {"bos": tokenizer.bos_token_id, "eos": eos, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    roles |= dict(zip(("eot", "eom"), (each for each in ends if each != eos), strict=False))
    merges = spec["model"]["merges"]
    return Vocabulary(
        pre=pre,
        tokens=[names.get(number, f"[PAD{number}]") for number in range(size)],
        types=[kinds.get(number, TokenType.NORMAL if number in words else TokenType.UNUSED) for number in range(size)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        ids={role: number for role, number in roles.items() if number is not None},
        add_bos=around[0],
        add_eos=around[1],
        chat_template=tokenizer.chat_template,
    )


def pre_tokenizer(spec: dict[str, Any]) -> str | None:
    """The name that llama.cpp has for what a byte-level BPE does before and beside its merges; None if it has none."""
    model, normalizer, pre = spec["model"], spec["normalizer"], spec["pre_tokenizer"]
    if any(model.get(option) for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")):
        return None
    if normalizer is not None and normalizer["type"] != "NFC":  # which changes nothing in nearly all text; llama.cpp has none
        return None
    steps = tuple(split(step) for step in ((pre or {}).get("pretokenizers") or [pre]) if step is not None)
    return next((name for name, known in PRE_TOKENIZERS.items() if known == (steps, bool(model.get("ignore_merges")))), None)


def split(step: dict[str, Any]) -> tuple[str, Any]:
    """A step of a pre-tokenizer, as in `PRE_TOKENIZERS`."""
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return "Split", step["pattern"].get("Regex")
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "ByteLevel", step["use_regex"]
    return step["type"], step.get("individual_digits")


def surroundings(tokenizer: Any) -> tuple[bool, bool] | None:
    """Whether a tokenizer begins a text with `bos_token` and ends it with `eos_token`; None if it adds anything else."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in (False, True):
        for end in (False, True):
            if whole == [tokenizer.bos_token_id] * start + plain + [tokenizer.eos_token_id] * end:
                return start, end
    return None
