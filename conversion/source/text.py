# SPDX-License-Identifier: Apache-2.0
"""Text to token windows: plain files, lines of JSON with texts or chats, either of them as .xz, and data sets.

No more is read than is used. A chat becomes what the tokenizer's chat template makes of it; the special tokens in that text are
read as such.
"""

import codecs
import json
import logging
import lzma
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, brief
from .checkpoint import Checkpoint, user_path
from .tokenizer import check_vocabulary, first_token


if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).parent.parent / "bundled"
CHARACTERS_PER_TOKEN = 16  # no tokenizer of natural text packs more on average; bounds how much text is read
LINE = 1 << 26  # characters of a .jsonl file, at most
# Text in a form of its own, or none: read as it is, its braces, commas and bytes would be learnt.
DATA: tuple[str, ...] = (
    "json",
    "ndjson",
    "jsonlines",
    "csv",
    "tsv",
    "parquet",
    "arrow",
    "feather",
    "pkl",
    "npy",
    "bin",
    "db",
    "sqlite",
)
DATA += ("pdf", "epub", "doc", "docx", "odt", "rtf", "gz", "tgz", "bz2", "zst", "lz4", "7z", "zip", "tar", "rar")
SPREAD = 4  # calibration windows are drawn from this many times the text that they take up


def drop_cut_character(error: UnicodeError) -> tuple[str, int]:
    """Take a text without the character that its end falls into, which `head -c` does; any other damage is an error."""
    if not isinstance(error, UnicodeDecodeError) or error.reason != "unexpected end of data":
        raise error
    return "", error.end


codecs.register_error("drop_cut_character", drop_cut_character)


def read_text(source: str | None, tokens: int, spread: int = 1, tokenizer: Any = None) -> str:
    """Read text enough for `spread` times `tokens` tokens, if there is so much.

    Args:
        source: a .txt file of text; a .jsonl file of objects with a `text` or with `messages` ({`role`, `content`} each), one a
            line; either of them as .xz; else the name of a data set with such a column, for the `datasets` library; None for the
            bundled English prose.
        tokens: how many tokens are wanted.
        spread: read so many times more, for windows to be drawn from.
        tokenizer: its chat template makes text of messages; None if there are none.

    Returns:
        The text from its start; texts of lines and rows have a blank line between them.

    Raises:
        UserError: there is no such file or data set, it is not UTF-8 text, a line or row of it is wrong, or it is empty.
    """
    path = BUNDLED / "prose.txt.xz" if source is None else user_path(source)
    limit = min(tokens * CHARACTERS_PER_TOKEN * spread, 1 << 31)
    form = Path(path.name.lower().removesuffix(".xz")).suffix[1:]
    if path.exists() and not path.is_file():
        raise UserError(
            f"{source} is a {'folder' if path.is_dir() else 'pipe or device'}; give a text file, or the name of a data set"
        )
    if path.is_file():
        if form in DATA:
            raise UserError(f"{source} is not plain text (.{form}); write the text that is in it to a .txt or .jsonl file")
        try:
            opener = lzma.open if path.suffix == ".xz" else open
            # Without the mark that some editors put first.
            with opener(path, "rt", encoding="utf-8-sig", errors="drop_cut_character") as file:
                text = joined(json_lines(file, str(source)), limit, tokenizer) if form == "jsonl" else file.read(limit)
        except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
            raise UserError(f"{source} is not UTF-8 text or a whole .xz of it ({error})") from None
        except OSError as error:
            raise UserError(f"{source} cannot be read: {error.strerror}") from None
        if "\0" in text[:8000]:  # UTF-16 would pass for UTF-8
            raise UserError(f"{source} is not UTF-8 text (it has zero bytes); write it again as UTF-8")
    elif form in ("txt", "jsonl", *DATA) or path.suffix == ".xz" or (source or "").startswith((".", "/", "~")):
        raise UserError(f"there is no text file {source}")
    else:
        text = joined(dataset_rows(str(source)), limit, tokenizer)
    if not text.strip():
        raise UserError(f"{source} holds no text; give a file with some")
    return text


def json_lines(file: Any, source: str) -> Iterator[tuple[str, Any]]:
    """What the lines of a .jsonl file hold, each with its place; a cut last line, as `head -c` leaves it, is dropped."""
    for number, line in enumerate(iter(lambda: file.readline(LINE), ""), 1):
        place = f"{source}, line {number}"
        try:
            if line.strip():
                yield place, json.loads(line)
        except (ValueError, RecursionError):
            if line.endswith("\n") or len(line) == LINE:
                raise UserError(f'{place} is not JSON; each line must be an object with "text" or "messages"') from None


def dataset_rows(name: str) -> Iterator[tuple[str, Any]]:
    """The rows of a data set's training split, each with its place."""
    os.environ.setdefault("HF_DATASETS_TRUST_REMOTE_CODE", "0")  # datasets 3 would ask on stdin
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"there is no text file {name}; to read it as a data set, install the datasets library: pip install datasets"
        ) from None
    try:
        for number, row in enumerate(load_dataset(name, split="train", streaming=True), 1):
            yield f"data set {name}, row {number}", row
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is neither a text file nor a data set that can be read: {brief(error)}") from None


def joined(rows: Iterable[tuple[str, Any]], limit: int, tokenizer: Any) -> str:
    """Up to `limit` characters of the texts and chats in rows, a blank line between them; no more rows are read."""
    parts, size = [], 0
    for place, row in rows:
        parts.append(row_text(row, place, tokenizer))
        size += len(parts[-1]) + 2
        if size >= limit:
            break
    # Half of a character, which JSON can hold, is none that a tokenizer takes.
    return "\n\n".join(parts)[:limit].encode("utf-8", "replace").decode("utf-8")


def row_text(row: Any, place: str, tokenizer: Any) -> str:
    """The text of a row, else its chat in the tokenizer's template; nothing where both are null; a UserError if it has neither."""
    if not isinstance(row, dict) or not {"text", "messages"} & row.keys():
        has = f"has {', '.join(map(str, row)) or 'nothing'}" if isinstance(row, dict) else "is no object"
        raise UserError(f'{place} {has}; "text" or "messages" is needed')
    text, messages = row.get("text"), row.get("messages")
    if text is not None:
        if not isinstance(text, str):
            raise UserError(f'{place} has no string in "text" but {type(text).__name__}')
        return text
    if messages is None:
        return ""
    turns = messages if isinstance(messages, list) else [None]
    if not all(isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content")) for turn in turns):
        raise UserError(f'{place} has "messages" that are no list of objects with "role" and "content", strings both')
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f'{place} has "messages", for which the tokenizer has no chat template; give them as "text"')
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # templates are programs: any type
        raise UserError(f'{place} has "messages" that the chat template does not take: {brief(error)}') from None


def token_windows(text: str, tokenizer: Any, tokens: int, window: int, seed: int | None = None) -> "Tensor":
    """Windows of tokens of a text, as `cut_text`; each is begun as the tokenizer begins a text."""
    return begun(cut_text(text, tokenizer, tokens, window, seed), first_token(tokenizer))


def cut_text(
    text: str, tokenizer: Any, tokens: int, window: int, seed: int | None = None, run: int = 1, *, warn: bool = True
) -> "Tensor":
    """Cut the tokens of a text into windows.

    Args:
        text: what to tokenize.
        tokenizer: a Transformers tokenizer.
        tokens: at most so many.
        window: tokens per window.
        seed: None for consecutive windows from the start; else windows drawn from the whole text, none twice.
        run: draw so many together that follow one another in the text.
        warn: whether to say that there are fewer tokens.

    Returns:
        [windows, window]; a text shorter than one window gives one shorter window.

    Raises:
        UserError: fewer than two tokens.
    """
    import torch

    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    wanted = min(tokens, len(ids))
    if wanted < 2:
        raise UserError(f"{wanted} tokens of text to work on; at least 2 are needed, some thousands make sense")
    if wanted < tokens and warn:
        logger.warning("the text has %s tokens, fewer than the %s that would be used", f"{len(ids):,}", f"{tokens:,}")
    window = min(window, wanted)
    windows = ids[: len(ids) // window * window].view(-1, window)
    if seed is not None:
        order = torch.randperm(len(windows) // run, generator=torch.Generator().manual_seed(seed))
        whole = len(order) * run
        windows = torch.cat([windows[:whole].view(-1, run, window)[order].view(-1, window), windows[whole:]])
    return windows[: wanted // window]


def begun(windows: "Tensor", token: int | None) -> "Tensor":
    """Windows [windows, tokens] that each begin with a token, in place of what was there; as they are if there is none.

    What a tokenizer puts before every text, a model was trained to find there: Gemma 3 270M, in float32, has a perplexity of 62 on
    eight windows of 1,024 tokens of wikitext-2 without it, and of 34 with it.
    """
    if token is not None:
        windows = windows.clone()
        windows[:, 0] = token
    return windows


def calibration_windows(
    checkpoint: Checkpoint, tokenizer: Any, calibration: str | None, tokens: int, window: int, seed: int, run: int = 1
) -> "Tensor":
    """Calibration token ids [windows, tokens], as `cut_text` gives them; two windows or more, one to be held back."""
    text = read_text(calibration, tokens, SPREAD, tokenizer)
    windows = cut_text(text, tokenizer, tokens, window, seed, run, warn=calibration is not None)  # of the bundled there is no more
    if len(windows) == 1:
        if windows.shape[1] < 4:
            raise UserError(f"the calibration text has {windows.shape[1]} tokens; at least 4 are needed, 131072 and more are usual")
        windows = windows[:, : windows.shape[1] // 2 * 2].reshape(2, -1)
        logger.warning(
            "%s is too short for a window: all text is read in sequences of %s tokens", calibration or "the text", windows.shape[1]
        )
    check_vocabulary(windows, checkpoint)
    return windows
