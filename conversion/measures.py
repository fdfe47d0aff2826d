# SPDX-License-Identifier: Apache-2.0
"""How far one model's predictions are from another's."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .planner import PerSide


class Comparison:
    """Loss of two models on the same text, divergence of the second from the first, and their agreement."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)  # losses of both, divergences, agreements
        self.predictions = 0

    def add(self, source: Tensor, converted: Tensor, ids: Tensor) -> None:
        """Take in one sequence: both models' logits [T, vocabulary] and the token ids [T]."""
        first, second = (logits[:-1].float().log_softmax(-1) for logits in (source, converted))
        losses = [nn.functional.nll_loss(x, ids[1:], reduction="sum") for x in (first, second)]
        divergence = (first.exp() * (first - second)).sum()
        agreements = (first.argmax(-1) == second.argmax(-1)).sum()
        self.sums += torch.stack([*losses, divergence, agreements]).double().cpu()
        self.predictions += len(ids) - 1

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
            "perplexity": PerSide(math.exp(min(loss_source, 700.0)), math.exp(min(loss_converted, 700.0))),
            "perplexity_ratio": math.exp(min(loss_converted - loss_source, 700.0)),
            "kl": kl,
            "top1_agreement": agreement,
        }
