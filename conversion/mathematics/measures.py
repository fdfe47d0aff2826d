# SPDX-License-Identifier: Apache-2.0
"""How far one model's predictions are from another's."""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..source.loading import head_of
from .scales import HEAD_TOKENS


def edges(tokens: int, parts: int) -> list[int]:
    """Where equal parts of a sequence begin and end."""
    return [tokens * part // parts for part in range(parts + 1)]


def perplexity(loss: float) -> float:
    """What a mean loss in nats is called on the scale of tokens; of the largest, a number that is still finite."""
    return math.exp(min(loss, 700.0))


@torch.no_grad()
def losses_of(head: Callable[[Tensor], Tensor], states: Tensor, ids: Tensor) -> Tensor:
    """Loss at each token but the first of one sequence.

    Args:
        head: [some, D] -> [some, vocabulary].
        states: what comes out of the decoder [tokens, D].
        ids: token ids [tokens].

    Returns:
        In nats [tokens - 1].
    """
    parts = zip(states[:-1].split(HEAD_TOKENS), ids[1:].split(HEAD_TOKENS), strict=True)
    return torch.cat([nn.functional.cross_entropy(head(some).float(), right, reduction="none") for some, right in parts])


@torch.no_grad()
def token_losses(model: Any, windows: Tensor) -> Tensor:
    """Loss, in nats, of a causal language model at each token but the first [windows, tokens - 1] of windows [windows, tokens]."""
    head, rows = head_of(model), []
    for ids in windows.to(model.device):
        states = model.get_decoder()(input_ids=ids.unsqueeze(0), use_cache=False).last_hidden_state[0]
        rows.append(losses_of(head, states, ids))
    return torch.stack(rows).cpu()


class Comparison:
    """Loss of two models on the same text, divergence of the second from the first, and their agreement."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)  # losses of both, divergences, agreements
        self.predictions = 0

    def add(self, source: Tensor, converted: Tensor, ids: Tensor) -> None:
        """Take in one sequence: both models' logits [T, vocabulary] and the token ids [T]; they may be on different devices."""
        first, second = (logits[:-1].to(source.device, torch.float32).log_softmax(-1) for logits in (source, converted))
        ids = ids.to(source.device)
        losses = [nn.functional.nll_loss(x, ids[1:], reduction="sum") for x in (first, second)]
        divergence = (first.exp() * (first - second)).sum()
        agreements = (first.argmax(-1) == second.argmax(-1)).sum()
        self.sums += torch.stack([*losses, divergence, agreements]).double().cpu()
        self.predictions += len(ids) - 1

    def join(self, other: "Comparison") -> None:
        """Take in all that another comparison has."""
        self.sums += other.sums
        self.predictions += other.predictions

    @classmethod
    def joined(cls, comparisons: "Iterable[Comparison]") -> "Comparison":
        """What several comparisons have together."""
        total = cls()
        for comparison in comparisons:
            total.join(comparison)
        return total

    def add_states(
        self, source: Tensor, converted: Tensor, heads: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], ids: Tensor
    ) -> None:
        """Take in one sequence as what enters the heads, which are applied to a chunk of positions at a time.

        Args:
            source: hidden states of the source [T, D].
            converted: hidden states of the converted model [T, D].
            heads: of the source and of the converted model: [T, D] -> [T, vocabulary].
            ids: token ids [T].
        """
        for start in range(0, len(ids) - 1, HEAD_TOKENS):
            part = slice(start, start + HEAD_TOKENS + 1)  # the last one is predicted here and predicts in the next
            self.add(heads[0](source[part]), heads[1](converted[part]), ids[part])

    @torch.no_grad()
    def add_models(self, source: Any, converted: Any, windows: Tensor, parts: int = 1) -> list["Comparison"]:
        """Take in token windows, which both causal language models run over.

        Layers that were compiled for training are not compiled again for these shapes.

        Args:
            source: the source.
            converted: the converted model.
            windows: token ids [windows, tokens].
            parts: how many equal parts of a window are to be told apart.

        Returns:
            For each part what was taken in of it, the beginning of all windows first.
        """
        eager = torch.compiler.set_stance("force_eager")(lambda model, ids: model.get_decoder()(input_ids=ids, use_cache=False))
        heads = (head_of(source), head_of(converted))
        found = [Comparison() for _ in range(parts)]
        for ids in tqdm(windows, desc=f"measuring at {windows.shape[1]:,} tokens", unit="window"):
            first, second = (eager(model, ids.unsqueeze(0).to(model.device)).last_hidden_state[0] for model in (source, converted))
            for part, (start, end) in zip(found, pairwise(edges(len(ids), parts)), strict=True):
                here = slice(max(start - 1, 0), end)  # what stands before a part predicts its first token
                part.add_states(first[here], second[here], heads, ids[here])
        for part in found:
            self.join(part)
        return found

    def result(self) -> dict[str, Any]:
        """`perplexity` of both, `perplexity_ratio`, `kl` in nats per token, `top1_agreement`.

        Returns:
            The measures by name.

        Raises:
            UserError: a model computes numbers that are not finite.
        """
        loss_source, loss_converted, kl, agreement = (self.sums / self.predictions).tolist()
        for name, loss in (("source", loss_source), ("converted", loss_converted)):
            if not math.isfinite(loss):
                raise UserError(f"the {name} model computes numbers that are not finite; its weights are damaged")
        return {
            "perplexity": {"source": perplexity(loss_source), "converted": perplexity(loss_converted)},
            "perplexity_ratio": perplexity(loss_converted - loss_source),
            "kl": kl,
            "top1_agreement": agreement,
        }
