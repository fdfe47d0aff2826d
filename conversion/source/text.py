# SPDX-License-Identifier: Apache-2.0
"""Text to token windows: plain files, .xz files, and data sets."""

import codecs
import logging
import lzma
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, brief
from .checkpoint import Checkpoint, user_path
from .tokenizer import check_vocabulary


if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).parent.parent / "bundled"
CHARACTERS_PER_TOKEN = 16  # no tokenizer of natural text packs more on average; bounds how much text is read
# Text in a form of its own, or none: read as it is, its braces, commas and bytes would be learnt.
DATA: tuple[str, ...] = (
    "json",
    "jsonl",
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


def read_text(source: str | None, tokens: int, spread: int = 1) -> str:
    """Read text enough for `spread` times `tokens` tokens, if there is so much.

    Args:
        source: a .txt or .txt.xz file; else the name of a data set with a "text" column, for the `datasets` library; None
            for the bundled calibration text (English prose).
        tokens: how many tokens are wanted.
        spread: read so many times more, for windows to be drawn from.

    Returns:
        The text from its start.

    Raises:
        UserError: there is no such file or data set, it is not plain UTF-8 text, or it is empty.
    """
    path = BUNDLED / "calibration.txt.xz" if source is None else user_path(source)
    limit = min(tokens * CHARACTERS_PER_TOKEN * spread, 1 << 31)
    form = Path(path.name.lower().removesuffix(".xz")).suffix[1:]
    if path.exists() and not path.is_file():
        raise UserError(
            f"{source} is a {'folder' if path.is_dir() else 'pipe or device'}; give a text file, or the name of a data set"
        )
    if path.is_file():
        if form in DATA:
            raise UserError(f"{source} is not plain text (.{form}); write the text that is in it to a .txt or .txt.xz file")
        try:
            opener = lzma.open if path.suffix == ".xz" else open
            # Without the mark that some editors put first.
            with opener(path, "rt", encoding="utf-8-sig", errors="drop_cut_character") as file:
                text = file.read(limit)
        except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
            raise UserError(f"{source} is not UTF-8 text or a whole .xz of it ({error})") from None
        except OSError as error:
            raise UserError(f"{source} cannot be read: {error.strerror}") from None
        if "\0" in text[:8000]:  # UTF-16 would pass for UTF-8
            raise UserError(f"{source} is not UTF-8 text (it has zero bytes); write it again as UTF-8")
    elif form in ("txt", *DATA) or path.suffix == ".xz" or (source or "").startswith((".", "/", "~")):
        raise UserError(f"there is no text file {source}")
    else:
        text = read_dataset(str(source), limit)
    if not text.strip():
        raise UserError(f"{source} holds no text; give a file with some")
    return text


def read_dataset(name: str, limit: int) -> str:
    """Read up to `limit` characters of the "text" column of a data set's training split."""
    os.environ.setdefault("HF_DATASETS_TRUST_REMOTE_CODE", "0")  # datasets 3 would ask on stdin
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"there is no text file {name}; to read it as a data set, install the datasets library: pip install datasets"
        ) from None
    try:
        rows = load_dataset(name, split="train", streaming=True)
        parts, size = [], 0
        for row in rows:
            if "text" not in row:
                raise UserError(f'data set {name} has the columns {", ".join(row)}; one named "text" is needed')
            if not isinstance(row["text"], str | None):
                raise UserError(f'data set {name} has no strings in the column "text" but {type(row["text"]).__name__}')
            parts.append(row["text"] or "")
            size += len(parts[-1]) + 2
            if size >= limit:
                break
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} is neither a text file nor a data set that can be read: {brief(error)}") from None
    return "\n\n".join(parts)[:limit]


def token_windows(text: str, tokenizer: Any, tokens: int, window: int, seed: int | None = None) -> "Tensor":
    """Windows of tokens of a text.

    Args:
        text: what to tokenize.
        tokenizer: a Transformers tokenizer; no special tokens are added.
        tokens: at most so many.
        window: tokens per window.
        seed: None for consecutive windows from the start; else windows drawn from the whole text, none twice.

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
    if wanted < tokens:
        logger.warning("the text has %s tokens, fewer than the %s asked for", f"{len(ids):,}", f"{tokens:,}")
    window = min(window, wanted)
    windows = ids[: len(ids) // window * window].view(-1, window)
    if seed is not None:
        windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
    return windows[: wanted // window]


def calibration_windows(
    checkpoint: Checkpoint, tokenizer: Any, calibration: str | None, tokens: int, window: int, seed: int
) -> "Tensor":
    """Calibration token ids [windows, tokens], drawn from the text with the seed; two windows or more, one to be held back."""
    text = read_text(calibration, tokens, SPREAD)
    windows = token_windows(text, tokenizer, tokens, window, seed)
    if len(windows) == 1:
        if windows.shape[1] < 4:
            raise UserError(f"the calibration text has {windows.shape[1]} tokens; at least 4 are needed, 131072 and more are usual")
        windows = windows[:, : windows.shape[1] // 2 * 2].reshape(2, -1)
    check_vocabulary(windows, checkpoint)
    return windows
