# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: loaded as their users load them, or refused in one line; and what two of them differ in.

* `AutoTokenizer` goes by the files of a folder and by the model type in its config.json, which a conversion changes: the same
  files can give another class, and other ids. So tokenizers are compared, never assumed to be the same.
* Code that comes with a tokenizer runs only if the user says so. Left to itself the library would ask on stdin.
* The types of converted models are in none of the library's tables of tokenizers, whether hf_mla is imported or not: what is
  loaded here is what a process without hf_mla loads.
"""

import json
import logging
import random
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, brief
from .checkpoint import Checkpoint


if TYPE_CHECKING:
    from torch import Tensor


logger = logging.getLogger(__name__)

CONFIG = "tokenizer_config.json"
# What it takes to read a vocabulary that is no tokenizer.json, the first of these that is there: modules, and what pip calls them.
READERS = {
    "tekken.json": {"mistral_common": "mistral-common", "PIL": "pillow"},
    "*.tiktoken": {"tiktoken": "tiktoken"},
    "tiktoken.model": {"tiktoken": "tiktoken"},
    "*.model": {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"},
}
SPECIALS = 100  # added tokens, at most, of which samples are made


def load_tokenizer(folder: Path | None, name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer that `AutoTokenizer` gives for a folder; it asks nothing.

    Args:
        folder: of a checkpoint whose model type is known here.
        name: as the user gave it: the library has special cases for some Hub ids.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Returns:
        The tokenizer.

    Raises:
        UserError: there is none, it is damaged, or it needs code that may not run or a package that is not installed.
    """
    from transformers import AutoConfig, AutoTokenizer

    assert folder is not None
    code = custom_code(folder, name)
    if code and not trust_remote_code:
        raise UserError(
            f"the tokenizer of {name} comes with code ({', '.join(code)}), which must run to be used and compared; "
            "read it, then pass --trust-remote-code"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
        config.name_or_path = name
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust_remote_code)
    except Exception as error:  # many types for many damages; all of them mean that there is no usable tokenizer
        missing = missing_packages(folder)
        if missing:
            raise UserError(f"the tokenizer of {name} takes {' and '.join(missing)}: pip install {' '.join(missing)}") from None
        raise UserError(f"{name} has no usable tokenizer ({brief(error)}); copy tokenizer files there") from None


def missing_packages(folder: Path) -> list[str]:
    """Packages, as pip knows them, that the vocabulary of a folder takes and that are not installed."""
    if (folder / "tokenizer.json").is_file():
        return []
    modules: dict[str, str] = next((modules for pattern, modules in READERS.items() if any(folder.glob(pattern))), {})
    # (The package that a module is in may be missing, too.)
    return [name for module, name in modules.items() if not find_spec(module.split(".")[0]) or not find_spec(module)]


def custom_code(folder: Path, name: str) -> list[str]:
    """What a tokenizer's code is in.

    Args:
        folder: of the checkpoint.
        name: as the user gave it.

    Returns:
        Files in the folder, whatever they import from it included; or references to other repositories (`org/name--file.Class`).

    Raises:
        UserError: the tokenizer's configuration cannot be read, or names a file that is not there.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    settings = read_settings(folder, name).get("auto_map") or []
    classes = settings.get("AutoTokenizer") if isinstance(settings, dict) else settings
    references = [classes] if isinstance(classes, str) else [reference for reference in classes or [] if reference]
    found = []
    for reference in references:
        if "--" in reference:
            found.append(reference)
            continue
        file = folder / f"{reference.rsplit('.', 1)[0]}.py"
        try:
            found += [file.name, *(Path(needed).name for needed in get_relative_import_files(file))]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or brief(error)
            raise UserError(
                f"{name}/{CONFIG} names code for the tokenizer, {file.name}, which cannot be read ({reason}); copy it there"
            ) from None
    return list(dict.fromkeys(found))


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """The tokenizer's configuration, empty where there is none; a UserError if it is damaged."""
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{name}/{CONFIG} cannot be read ({brief(error)}); copy it there again") from None
    if not isinstance(settings, dict):
        raise UserError(f"{name}/{CONFIG} cannot be read (no JSON object); copy it there again")
    return settings


def check_vocabulary(windows: "Tensor", checkpoint: Checkpoint) -> None:
    """Raise a UserError if the tokenizer knows more tokens than the model."""
    highest, known = int(windows.max()), checkpoint.config.vocab_size
    if highest >= known:
        raise UserError(f"the tokenizer of {checkpoint.name} gives token {highest}, the model knows {known}; it is another model's")


def check_same_tokenizer(folder: Path | None, name: str, tokenizer: Any, source: str, trust_remote_code: bool) -> None:
    """Say what the tokenizer of a converted model does otherwise than its source's, if it does.

    A fine-tuned model may have a token for padding, or a chat template: that is for the user to know. Other tokens for the same
    text are refused.

    Args:
        folder: of the converted model.
        name: the user's for it.
        tokenizer: the source's.
        source: the user's name for that.
        trust_remote_code: as for `load_tokenizer`.

    Raises:
        UserError: ordinary text becomes other tokens, or there is no tokenizer.
    """
    own = load_tokenizer(folder, name, trust_remote_code)
    changed = difference(own, tokenizer)
    if changed is None:
        return
    ordinary = list(TEXTS[:-1])  # the last has what may be special
    if outcome(encode, own, False, ordinary) != outcome(encode, tokenizer, False, ordinary):
        raise UserError(f"the tokenizer of {name} is not that of {source}: {changed}; convert {source} again, or mend it there")
    logger.warning("the tokenizer of %s is not quite that of %s: %s", name, source, changed)


def difference(tokenizer: Any, original: Any) -> str | None:
    """What a tokenizer does otherwise than another, in a few words; None if nothing."""
    here, there = behaviour(tokenizer), behaviour(original)
    for what in {**here, **there}:
        if here.get(what) != there.get(what):
            first, second = (shortened(repr(each)) for each in apart(here.get(what), there.get(what)))
            return f"{shortened(what)} is {first}, not {second}"
    return None


def apart(first: Any, second: Any) -> tuple[Any, Any]:
    """Two values for a message: of long ones only what is not the same in both."""
    if isinstance(first, dict) and isinstance(second, dict):
        return dict(first.items() - second.items()), dict(second.items() - first.items())
    if isinstance(first, str | list) and type(first) is type(second) and len(repr(first) + repr(second)) > 120:
        pairs = enumerate(zip(first, second, strict=False))
        start = next((index for index, (here, there) in pairs if here != there), min(len(first), len(second)))
        return first[start:], second[start:]
    return first, second


def shortened(text: str) -> str:
    """Text for a message."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def behaviour(tokenizer: Any) -> dict[str, Any]:
    """All that two tokenizers must have in common, by what it is called in a message."""
    found: dict[str, Any] = {"class": type(tokenizer).__name__}
    found["vocabulary size"] = outcome(len, tokenizer)
    found["vocabulary"] = outcome(lambda: tokenizer.get_vocab())
    for name in ("special_tokens_map", "all_special_tokens", "all_special_ids", "added_tokens_decoder"):
        value = outcome(getattr, tokenizer, name)
        found[name.replace("_", " ")] = {key: repr(each) for key, each in value.items()} if isinstance(value, dict) else value
    texts = samples(tokenizer)
    for special in (True, False):
        ids = outcomes(partial(encode, tokenizer, special), texts)
        kind = "with" if special else "without"
        found |= {f"ids {kind} special tokens of {text!r}": each for text, each in zip(texts, ids, strict=True)}
        if special:
            decoded = outcomes(tokenizer.batch_decode, ids)
            found |= {f"text of the ids of {text!r}": each for text, each in zip(texts, decoded, strict=True)}
    templates = getattr(tokenizer, "chat_template", None) or {}
    named = templates if isinstance(templates, dict) else {"default": templates}
    found["names of chat templates"] = sorted(named)
    for name, template in sorted(named.items()):
        found[f"chat template {name!r}"] = template
        for kind, chat in CHATS.items():
            rendered = outcome(tokenizer.apply_chat_template, **chat, chat_template=template, tokenize=False)
            found[f"a chat {kind} by template {name!r}"] = rendered
    return found


def first_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text, if it does."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    before = whole[: whole.index(plain[0])]
    return before[-1] if before else None


def encode(tokenizer: Any, special: bool, texts: list[str]) -> list[list[int]]:
    """Token ids of texts."""
    return tokenizer(texts, add_special_tokens=special)["input_ids"]


def outcome(call: Callable, *arguments: Any, **options: Any) -> Any:
    """What a call gives, or the name of what it raises: where the source's tokenizer or template raises, the other must too."""
    try:
        return call(*arguments, **options)
    except Exception as error:  # any type: it may be anybody's code
        return type(error).__name__


def outcomes(call: Callable[[list], list], items: list) -> list:
    """The outcome for each of many items, by one call for all if none raises, which is faster."""
    together = outcome(call, items)
    return together if isinstance(together, list) else [outcome(call, [item]) for item in items]


def samples(tokenizer: Any) -> list[str]:
    """A few hundred texts of all sorts, the tokenizer's own special and added tokens among them; the same each time."""
    texts = ["", *TEXTS, *(word for text in TEXTS for word in text.split()[:4])]
    texts += [variant for text in TEXTS for variant in (f" {text}", f"{text} ", f"\n{text}\n\n", text.upper())]
    texts += [space * count + end for space in (" ", "\t", "\n", "\r\n", "\u3000") for count in (1, 2, 3, 8) for end in ("", "a")]
    chance = random.Random(0)
    for low, high in RANGES:
        texts += ["".join(chr(chance.randrange(low, high)) for _ in range(length)) for length in (1, 2, 5, 20)]
    for token in [*outcome(lambda: tokenizer.all_special_tokens), *list(outcome(lambda: tokenizer.get_added_vocab()))[:SPECIALS]]:
        texts += [token, f"a{token}b", f" {token} ", token * 2]
    return list(dict.fromkeys(texts))


SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": " Why is the sky blue?\n"}
ASSISTANT = {"role": "assistant", "content": "It <scatters> light \u2713"}
FUNCTION = {"name": "look", "description": "Looks", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
# What chat templates are tried on. A template may refuse any of these; another that does not is another template.
CHATS: dict[str, dict[str, Any]] = {
    "of three": {"conversation": [USER, ASSISTANT, USER]},
    "with a system prompt": {"conversation": [SYSTEM, USER, ASSISTANT]},
    "with a generation prompt": {"conversation": [USER], "add_generation_prompt": True},
    "with a system and a generation prompt": {"conversation": [SYSTEM, USER], "add_generation_prompt": True},
    "with tools": {"conversation": [USER], "add_generation_prompt": True, "tools": TOOLS},
    "out of order": {"conversation": [ASSISTANT, ASSISTANT]},
}

RANGES: tuple[tuple[int, int], ...] = (
    (0, 0x80),
    (0x80, 0x250),
    (0x250, 0x800),
    (0x900, 0x1100),
    (0x2000, 0x2C00),
    (0x3000, 0xD800),
    (0xE000, 0xF900),
)
RANGES += ((0xF900, 0x10000), (0x10000, 0x11000), (0x1D400, 0x1D800), (0x1F300, 0x1FB00), (0x20000, 0x2A6E0), (0, 0xD800))
TEXTS = (
    "The captain looked at the sea and said: \"We won't be home before 10:30, I'm afraid.\"",
    "It's the dogs' bowl; they'd've eaten. E.g. U.S.A., Dr. O'Neil-Smith ... (cf. p. 12) -- really ?! #tag @user $5.00 50% & co .",
    "camelCase snake_case SCREAMING_CASE kebab-case HTTPServer2 antidisestablishmentarianism aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    '    def f(x: int = 0) -> str:\n\t\treturn f"{x!r:>{10}}" if x else None  # comment\n\n\n\nclass A:\n        pass',
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; } /* C */ // end\r\n#include <stdio.h>\r\n",
    "SELECT * FROM t WHERE a >= 1 AND b != 'it''s'; <div class=\"a\">&nbsp;<br/></div> <!-- no -->",
    '{"key": [1, 2.5e-3, null, true]} \\frac{1}{2} $x^2$ `code` **bold** ~~~ === ||| \\n',
    "https://example.org/a_b-c?d=1&e=%20#f someone@example.org C:\\Users\\me /usr/lib/x86_64",
    "0 7 42 100 1234 12345678901234567890 3.14159 -1e-9 1,000,000 0xDEADBEEF 2026-11-26T17:40:00Z x² ½ Ⅷ ١٢٣ 一二三",
    "Ça va, l'été à Nîmes ; « œuvre » Straße, Übergröße ¿Qué? ¡Mañana! Ação Þórr æðir Łódź žluťoučký kůň İstanbul ığüş",
    "Съешь ещё этих мягких французских булок. Їжак Ξεσκεπάζω την ψυχοφθόρα βδελυγμία Հայերեն ქართული",
    "敏捷的棕色狐狸跳过了懒狗。「繁體字」 日本語のテキスト、カタカナ。ﾊﾝｶｸ 한국어 문장입니다 ㄱㄴㄷ ＦＵＬＬ ｗｉｄｔｈ",
    "مرحبا بالعالم، كيف حالك؟ اللُّغَةُ العَرَبِيَّة ﷽ فارسی می\u200cخواهم שלום עולם שָׁלוֹם",
    "नमस्ते दुनिया বাংলা தமிழ் తెలుగు ภาษาไทยไม่มีช่องว่าง မြန်မာ ខ្មែរ བོད་ཡིག አማርኛ ᏣᎳᎩ",
    "😀 👍🏽 👩\u200d👩\u200d👧 🏳️\u200d🌈 🇩🇪🇫🇷 ❤️ ☃ ✓ → ∑∫√∞≠ 𝔘𝔫𝔦 𝒜 🀄 ﬁ ™ ① ㎏ … – — ‘’ “”",
    "e\u0301 é A\u030a Å \u212b o\u0302\u0323 Z\u0351\u036b\u0343\u036a\u0302 \u1100\u1161 가 ſ ǆ",
    "zero\u200bwidth no\u00a0break \u2003em \u3000wide soft\u00adhyphen \ufeffmark \u202eright\u202c \u2028line \u2029paragraph",
    "\x00\x01\x07\x1b[31m\x7f\x85 \ue000 \U0010ffff \ufffd\ufffd ▁▁ ▁a Ġ Ġthe Ċ <0x0A> ## ##ing @@ </w>",
    "<s> </s> <unk> <pad><bos> <|endoftext|> <|im_start|>user\n<|im_end|> <|eot_id|> [INST] [/INST] <<SYS>> [UNK] [MASK]",
)
