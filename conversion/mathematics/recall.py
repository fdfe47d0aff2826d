# SPDX-License-Identifier: Apache-2.0
"""What models answer: numbers to be found again in long text, short tasks by example, how these are scored, and ten open prompts.

* Every prompt ends where the answer's line breaks off ("The special magic number for river is"): in a chat the model's turn has
  begun with that. So models without a chat template, and very small ones, are asked the same: SmolLM2-135M-Instruct finds 12 of 20
  in 512 tokens in a chat, 15 without the template.
* Short tasks are completed, not chatted: SmolLM2-135M-Instruct copies 9 of 16 lists of words so, and none in a chat.
* A long text has a number at each depth, and each is asked for: what is found is the number of a key, not the only number there.
* Prompts are put together of tokens, so a sequence with its answer is as long as asked, to the token.
* The text around is the bundled validation text, that no conversion is fitted to, a sentence a line.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import UserError
from ..source.own_text import chat_scripts
from ..source.text import BUNDLED, read_text
from ..source.tokenizer import first_token


DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FACT = "The special magic number for {key} is"
NUMBER_ROOM = 8  # tokens for " 4217." of any tokenizer, and for what a model says before it stops
BATCH_TOKENS = {"cuda": 1 << 16, "cpu": 1 << 12}  # read at once, or one sequence
NEEDLE_TOKENS = {"cuda": 1 << 20, "cpu": 1 << 14}  # of the texts of one length, in all
NEEDLE_COUNTS = (2, 20)  # of texts of one length, at least and at most
TASK_COUNT = {"cuda": 100, "cpu": 10}
EXAMPLES = 8
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain photosynthesis to a child.",
    "Give me three tips for sleeping better.",
    "Translate to French: The book is on the table.",
    "What is 17 plus 25?",
    "Write a Python function that reverses a string.",
    "Who wrote Romeo and Juliet, and what is it about?",
    "Suggest a name for a bakery and say why.",
    "Summarize in one sentence: The meeting was moved to Friday because the manager is ill.",
)
ANSWER_ROOM = 128  # tokens
LONGEST = 240  # characters of a sentence: longer ones are left out, for a number to come near its depth
WORDS = (  # noqa: SIM905
    "apple river stone table garden window yellow winter summer bridge castle forest island market mirror"
    " orange pencil rabbit school silver spring street butter button camera candle cotton doctor dragon"
    " engine farmer finger flower guitar hammer helmet jacket kitchen ladder lemon letter lion mountain ocean paper"
    " planet pocket potato ribbon saddle shadow ticket tiger tower valley violin water wizard"
).split()


@dataclass(frozen=True)
class Question:
    """A prompt and what is to follow."""

    ids: list[int]
    answer: str
    """Empty where none is the right one."""
    room: int
    """Tokens that the answer may take."""


Questions = dict[tuple[int, float] | str, list[Question]]
"""By kind: the length of a text and the depth of a number in it, or the name of a task."""


def words_task(count: int, answer: Callable[[list[str]], list[str]]) -> Callable[[random.Random], tuple[str, str]]:
    """Draws so many words, and what is to be said of them."""

    def draw(source: random.Random) -> tuple[str, str]:
        words = source.sample(WORDS, count)
        return ", ".join(words), ", ".join(answer(words))

    return draw


def sum_task(source: random.Random) -> tuple[str, str]:
    """Draws two digits, and their sum."""
    first, second = source.randrange(1, 10), source.randrange(1, 10)
    return f"{first} + {second}", str(first + second)


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copy": words_task(6, lambda words: words),
    "last": words_task(4, lambda words: words[-1:]),
    "reverse": words_task(3, lambda words: words[::-1]),
    "sort": words_task(3, sorted),
    "add": sum_task,
}


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of pieces of text, without special tokens."""
    return tokenizer([*texts], add_special_tokens=False, verbose=False)["input_ids"]


def frame(tokenizer: Any, chat: bool = True) -> tuple[list[int], list[int]]:
    """Token ids before and after what a user says; without a chat template what the tokenizer puts first, and nothing."""
    scripts = chat_scripts(tokenizer) if chat else None
    begin = first_token(tokenizer)
    return (scripts[0], scripts[1]) if scripts else ([] if begin is None else [begin], [])


@lru_cache(maxsize=1)
def prose(tokenizer: Any) -> tuple[list[list[int]], list[str]]:
    """Token ids of the sentences of the bundled prose, each a line, and the numbers of four digits that are not in it."""
    text = read_text(str(BUNDLED / "validation.txt.xz"), 1 << 20)
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    numbers = {str(number) for number in range(1000, 10000)} - set(re.findall(r"(?=(\d{4}))", text))
    return encoded(tokenizer, [f"{sentence}\n" for sentence in sentences if len(sentence) <= LONGEST]), sorted(numbers)


def filler(lines: list[list[int]], end: int, tokens: int) -> list[list[int]]:
    """So many tokens of lines, up to line `end` and from the last again before the first; the first has lost its beginning."""
    taken: list[list[int]] = []
    missing = tokens
    while missing > 0:
        end -= 1
        taken.append(lines[end % len(lines)])
        missing -= len(taken[-1])
    taken[-1] = taken[-1][-missing:]
    return taken[::-1]


def needles(tokenizer: Any, length: int, count: int, seed: int = 0) -> dict[float, list[Question]]:
    """Questions for numbers in long texts.

    Args:
        tokenizer: of the models.
        length: tokens of a sequence, the answer's included.
        count: texts, each with a number at all of `DEPTHS`.
        seed: of what is drawn.

    Returns:
        For each depth, as a share of the text around, a question of each text. The number is at the nearest end of a line.

    Raises:
        UserError: the length has no room for the numbers and the question.
    """
    source = random.Random(f"{seed} {length}")
    before, after = frame(tokenizer)
    lines, numbers = prose(tokenizer)
    found: dict[float, list[Question]] = {depth: [] for depth in DEPTHS}
    for _ in range(count):
        end, keys, values = source.randrange(len(lines)), source.sample(WORDS, len(DEPTHS)), source.sample(numbers, len(DEPTHS))
        begun = [FACT.format(key=key) for key in keys]
        facts = encoded(tokenizer, [f"{words} {value}.\n" for words, value in zip(begun, values, strict=True)])
        asked = encoded(tokenizer, [f"\nWhat is the special magic number for {key}?\n" for key in keys])
        for depth, answer, ask, words in zip(DEPTHS, values, asked, encoded(tokenizer, begun), strict=True):
            rest = [*ask, *after, *words]
            room = length - NUMBER_ROOM - sum(map(len, (before, rest, *facts)))
            if room < 1:
                raise UserError(f"{length} tokens have no room for {len(DEPTHS)} numbers and a question; {length - room + 1} have")
            pieces = filler(lines, end, room)
            ends = [0, *accumulate(map(len, pieces))]
            for place, fact in reversed([*zip(DEPTHS, facts, strict=True)]):
                pieces.insert(min(range(len(ends)), key=lambda index: abs(ends[index] - place * room)), fact)
            found[depth].append(Question([*before, *chain.from_iterable(pieces), *rest], answer, NUMBER_ROOM))
    return found


def tasks(tokenizer: Any, count: int, seed: int = 0) -> dict[str, list[Question]]:
    """Questions of each of `TASKS`, `count` of them, each after `EXAMPLES` of its kind; all are drawn with the seed."""
    first, _ = frame(tokenizer, chat=False)
    asked: dict[str, list[Question]] = {}
    for name, draw in TASKS.items():
        source = random.Random(f"{seed} {name}")
        drawn = [[draw(source) for _ in range(EXAMPLES + 1)] for _ in range(count)]
        texts = ["\n\n".join(f"Input: {given}\nOutput: {answer}" for given, answer in pairs) for pairs in drawn]
        answers = [pairs[-1][1] for pairs in drawn]
        begun = encoded(tokenizer, [text.removesuffix(f" {answer}") for text, answer in zip(texts, answers, strict=True)])
        rooms = [len(ids) + 2 for ids in encoded(tokenizer, [f" {answer}" for answer in answers])]
        asked[name] = [Question(first + ids, answer, room) for ids, answer, room in zip(begun, answers, rooms, strict=True)]
    return asked


def questions(tokenizer: Any, lengths: Sequence[int], device: torch.device) -> Questions:
    """As many questions of all kinds as a device answers in reasonable time; see `needles` for the lengths, and `tasks`."""
    least, most = NEEDLE_COUNTS
    asked: Questions = {}
    for length in lengths:
        count = NEEDLE_TOKENS[device.type] // (length * len(DEPTHS))
        found = needles(tokenizer, length, max(least, min(most, count)))
        asked |= {(length, depth): some for depth, some in found.items()}
    asked |= {name: some for name, some in tasks(tokenizer, TASK_COUNT[device.type]).items()}
    return asked


def open_questions(tokenizer: Any) -> list[Question]:
    """`PROMPTS` as the first turns of chats, or without a chat template that takes them as the beginnings of texts."""

    def begun(prompt: str) -> list[int]:
        turns = [{"role": "user", "content": prompt}]
        try:
            chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception:  # templates are programs: any type
            return [*frame(tokenizer, chat=False)[0], *encoded(tokenizer, [prompt])[0]]
        return encoded(tokenizer, [chat])[0]

    return [Question(begun(prompt), "", ANSWER_ROOM) for prompt in PROMPTS]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, asked: Sequence[Question]) -> list[str]:
    """What a model says to each question, by greedy generation."""
    return [text.strip() for batch in batches(model, asked) for text in generated(model, tokenizer, batch)]


def correct(said: str, answer: str) -> bool:
    """Whether what a model said is the answer, and then the end of the sentence or the line."""
    return re.match(rf"\s*{re.escape(answer)}\s*?(\.|\n|$)", said) is not None


@torch.no_grad()
def accuracies(model: Any, tokenizer: Any, asked: Questions) -> dict[tuple[int, float] | str, float]:
    """Let a model answer questions, by greedy generation with its own `generate`, in batches.

    Args:
        model: a causal language model of Transformers, in evaluation mode.
        tokenizer: its tokenizer.
        asked: the questions of each kind.

    Returns:
        For each kind the share that is right.
    """
    right = {}
    with tqdm(total=sum(map(len, asked.values())), desc="asking", unit="question") as bar:
        for kind, some in asked.items():
            found = 0
            for batch in batches(model, some):
                found += sum(map(correct, generated(model, tokenizer, batch), [question.answer for question in batch]))
                bar.update(len(batch))
            right[kind] = found / len(some)
    return right


def batches(model: Any, some: Sequence[Question]) -> Iterator[Sequence[Question]]:
    """Questions in groups that are read at once."""
    at_once = max(1, BATCH_TOKENS[model.device.type] // max(len(question.ids) for question in some))
    if model.config._attn_implementation == "eager":  # which has all scores in memory
        at_once = 1
    for start in range(0, len(some), at_once):
        yield some[start : start + at_once]


def generated(model: Any, tokenizer: Any, batch: Sequence[Question]) -> list[str]:
    """How a model goes on after each prompt; the shorter ones are padded in front."""
    width = max(len(question.ids) for question in batch)
    rows = [[0] * (width - len(question.ids)) + question.ids for question in batch]
    mask = [[0] * (width - len(question.ids)) + [1] * len(question.ids) for question in batch]
    output = model.generate(
        torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max(question.room for question in batch),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # whatever generation_config.json has: repeating is what is asked for
        pad_token_id=0,
    )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
