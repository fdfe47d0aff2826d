# SPDX-License-Identifier: Apache-2.0
"""Text in which things are looked up: what was said is said again, in other order, among other text.

Prose and chats seldom ask a model for what stands far back. One that is fitted to them alone no longer finds it, and its perplexity
does not tell (docs/results.md). This text asks for little else, of any model and in any language, for it is made of other texts:

* facts in lines of many forms, their keys words of those texts, their values words and numbers that nobody can guess,
* lists of such words, and passages of those texts, half of them with their tokens in an order that no language has.

Each is said once, and again some times, from right behind itself to as far off as a sequence is long. That repeating is not all
that is learnt, some sequences have examples of rules instead: the last word of a list, its words in order, a sum.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError


if TYPE_CHECKING:
    from torch import Tensor

LOOKUPS = "lookups"  # in place of a text's name
FORMS = (  # of facts; what `hf-mla verify --needle` asks for has another
    "{key}: {value}",
    "{key} = {value}",
    "- {key}: {value}",
    "| {key} | {value} |",
    '"{key}": "{value}",',
    "{key} -> {value}",
    "{key}\t{value}",
    "{value} ({key})",
    "The {key} has the code {value}.",
    "Remember: the {key} is called {value}.",
    "The password of the {key}, {value}, is secret.",
)
ARROWS = (" -> ", " => ", " = ", ": ", " | ", "\n")  # between what a rule is given and what it makes of it
RULES: tuple[Callable[[list[str]], list[str]], ...] = (  # for lists of words
    lambda words: words,
    lambda words: words[:1],
    lambda words: words[-1:],
    lambda words: words[1:2],
    lambda words: words[::-1],
    sorted,
    lambda words: [word.upper() for word in words],
    lambda words: [str(len(words))],
    lambda words: [max(words, key=len)],
)
SUMS: tuple[Callable[[int, int], str], ...] = (
    lambda first, second: f"{first} + {second} = {first + second}",
    lambda first, second: f"{first + second} - {second} = {first}",
    lambda first, second: f"{first}, {second}: {max(first, second)}",
    lambda first, second: f"{first} and {second} are {first + second}.",
)
WORDS_FROM = 1 << 16  # tokens of each of the other texts
WIDEST = 256  # tokens of other text between two things, in the mean of a sequence, at most
PASSAGE = (8, 96)  # tokens of a passage, from and to
WORDS = (3, 8)  # of a list, from and to
LINES = (6, 40)  # of examples of one rule, from and to
EXAMPLES = 0.25  # of sequences: those of rules
SUMMED = 0.3  # of rules: those for numbers
AGAIN = 2  # how often a thing is said once more, in the mean
NEW = (0.3, 0.8)  # how often a new thing follows where there are some to be said again, in a sequence, from and to


class Writer:
    """Writes such text.

    Args:
        texts: token ids [windows, tokens] of other texts.
        tokenizer: of the model.
        seed: of what is drawn.

    Raises:
        UserError: there are no words in the other texts.
    """

    def __init__(self, texts: Sequence["Tensor"], tokenizer: Any, seed: int) -> None:
        self.texts, self.tokenizer, self.source = [windows.flatten() for windows in texts], tokenizer, random.Random(seed)
        sample = "\n".join(tokenizer.decode(ids[:WORDS_FROM], skip_special_tokens=True) for ids in self.texts)
        self.words = sorted(set(re.findall(r"\b[^\W\d_]{3,10}\b", sample)))
        if not self.words:
            raise UserError(f"{LOOKUPS} are made of the words of the other texts, which have none; leave them out")
        self.line = self.encoded("\n")

    def encoded(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def passage(self, tokens: int) -> list[int]:
        """So many tokens of the other texts."""
        ids = self.source.choice(self.texts)
        start = self.source.randrange(max(1, len(ids) - tokens))
        return ids[start : start + tokens].tolist()

    def shuffled(self) -> list[int]:
        """The tokens of a passage, in any order."""
        ids = self.passage(self.source.randint(*PASSAGE))
        self.source.shuffle(ids)
        return ids

    def listed(self) -> list[int]:
        """Some words."""
        return self.encoded(", ".join(self.source.choices(self.words, k=self.source.randint(*WORDS))))

    def fact(self, form: str) -> list[int]:
        """A key and its value."""
        number = str(self.source.randrange(10 ** self.source.randint(2, 6)))
        value = self.source.choice((number, self.source.choice(self.words)))
        return self.encoded(form.format(key=self.source.choice(self.words), value=value))

    def examples(self) -> list[int]:
        """Examples of one rule."""
        source, lines = self.source, self.source.randint(*LINES)
        if source.random() < SUMMED:
            add, most = source.choice(SUMS), 10 ** source.randint(1, 3)
            said = [add(source.randrange(most), source.randrange(most)) for _ in range(lines)]
        else:
            rule, arrow, most = source.choice(RULES), source.choice(ARROWS), source.randint(*WORDS)
            given = [source.choices(self.words, k=source.randint(2, most)) for _ in range(lines)]
            said = [f"{', '.join(words)}{arrow}{', '.join(rule(words))}" for words in given]
        return self.encoded(source.choice(("\n", "\n\n")).join(said) + "\n\n")

    def window(self, tokens: int) -> list[int]:
        """A sequence of so many tokens: of examples, or of things of one kind, with other text between any two."""
        source, ids = self.source, list[int]()
        if source.random() < EXAMPLES:
            while len(ids) < tokens:
                ids += self.examples()
            return ids[:tokens]
        form, apart = source.choice(FORMS), int(WIDEST ** source.random()) - 1  # as often none as some and many
        kinds: tuple[Callable[[], list[int]], ...] = (
            lambda: self.fact(form),
            lambda: self.fact(form),
            self.listed,
            lambda: self.passage(source.randint(*PASSAGE)),
            self.shuffled,
        )
        say, new, pending = source.choice(kinds), source.uniform(*NEW), list[list[int]]()
        while len(ids) < tokens:
            if not pending or source.random() < new:
                thing = say()
                pending += [thing] * source.randint(0, 2 * AGAIN)
            else:
                thing = pending.pop(source.randrange(len(pending)))
            ids += [*thing, *self.line]
            if apart:
                ids += [*self.passage(source.randint(0, 2 * apart)), *self.line]
        return ids[:tokens]


def lookup_windows(texts: Sequence["Tensor"], tokenizer: Any, count: int, window: int, seed: int) -> "Tensor":
    """Windows in which things are looked up.

    Args:
        texts: token ids [windows, tokens] of other texts.
        tokenizer: of the model.
        count: windows.
        window: tokens of each.
        seed: of what is drawn.

    Returns:
        Token ids [count, window].

    Raises:
        UserError: there are no words in the other texts.
    """
    import torch

    writer = Writer(texts, tokenizer, seed)
    return torch.tensor([writer.window(window) for _ in range(count)])
