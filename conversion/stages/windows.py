# SPDX-License-Identifier: Apache-2.0
"""What the windows of calibration text are for: to fit to, to measure on, and what comes first in a sequence."""

import torch
from torch import Tensor


HELD_BACK = 8  # windows of each text, at most, that nothing is fitted to: errors are measured on them


def whole_runs(count: int, run: int) -> int:
    """So many windows without those beyond the last whole run of them; all if there is no whole one."""
    return count // run * run or count


def shorter(windows: Tensor, window: int) -> Tensor:
    """Windows [windows, tokens] cut into shorter ones [windows, window]; what is left of each is dropped."""
    return windows[:, : windows.shape[1] // window * window].reshape(-1, window)


def without_held_back(windows: Tensor, tokens: int, run: int) -> Tensor:
    """Of a text's windows [windows, tokens] some that `hold_back` leaves, if layers are calibrated on so many tokens of it."""
    count = whole_runs(min(len(windows), tokens // windows.shape[1]), run)
    return windows[: max(1, count - HELD_BACK)]


def hold_back(texts: dict[str, Tensor], run: int = 1) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Hold the end of each text back.

    Args:
        texts: token ids [windows, tokens] of each text, by its name.
        run: windows that are held back together, where there are so many.

    Returns:
        Places among all windows, one text after the other: of those to fit to, a tensor for each text, and of those that are held
        back, by the name of the text.
    """
    places = torch.arange(sum(map(len, texts.values()))).split([len(windows) for windows in texts.values()])
    held = [whole_runs(min(HELD_BACK, max(1, len(text) // 8)), run) for text in places]
    train = [text[: len(text) - count] for text, count in zip(places, held, strict=True)]
    return train, {name: text[-count:] for name, text, count in zip(texts, places, held, strict=True)}


def first_tokens(windows: Tensor, begin: int | None, length: int, most: int, seed: int) -> Tensor:
    """Tokens to be seen as if each came first in a sequence.

    Args:
        windows: token ids of all text [windows, tokens].
        begin: the token that every sequence begins with, if there is one.
        length: how many to put into a row.
        most: different ones.
        seed: of what is drawn.

    Returns:
        Token ids [rows, length].
    """
    generator = torch.Generator().manual_seed(seed)
    text = windows.flatten() if begin is None else windows[:, 0]  # what may come first
    tokens = text.unique()
    tokens = tokens[torch.randperm(len(tokens), generator=generator)[:most]]
    # And as often as the text has them: a few words begin many sequences.
    tokens = torch.cat([tokens, text[torch.randint(len(text), (len(tokens),), generator=generator)]])
    return tokens[torch.arange(-(-len(tokens) // length) * length) % len(tokens)].view(-1, length)


def shared_batches(count: int, batch: int, process: int, processes: int) -> list[Tensor]:
    """Which of so many windows a process takes, in batches, which are those of a single process; none where there are few."""
    return [*torch.arange(count).split(batch)][process::processes]


def joined(windows: Tensor, run: int) -> Tensor:
    """Windows [windows, tokens] put end to end, so many each; those of a text that has fewer come again."""
    count = max(1, len(windows) // run)
    return windows[torch.arange(count * run) % len(windows)].view(count, -1)
