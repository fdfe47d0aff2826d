# SPDX-License-Identifier: Apache-2.0
"""Second moments of what a layer sees and sends back, and what is fitted with them.

A sequence's first token is left out of both. Trained models rest their attention on it (a *sink*): its hidden state can be fifty
times as large as any other's, and the gradient at its key is a sum over all tokens after it. Neither says anything about others;
`reconstruct.py` adds inputs of many tokens that each come first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class LayerMoments:
    """Moments of one attention layer, in float64; D hidden size, g key/value heads of width d."""

    inputs: Tensor  # S [D, D]
    keys: Tensor  # G_K [g * d, g * d]
    values: Tensor  # G_V [g * d, g * d]


@contextmanager
def hooks(handles: list[Any]) -> Iterator[None]:
    """Remove hooks when the block ends, however it ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def second_moment(rows: Tensor) -> Tensor:
    """Sum over all but the last dimension of the outer products of `rows`, accumulated in float32 at least; float64."""
    flat = rows.detach().flatten(0, -2)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return (flat.T @ flat).double()


CAP = 4.0  # times the median norm


def gradient_moment(gradient: Tensor) -> Tensor:
    """Sum of the outer products of loss gradients [B, T, m] at all tokens but each sequence's first; float64.

    The few that are longer than four times the median are shortened to that: they would outweigh all others together.
    """
    rows = gradient.detach()[:, 1:].flatten(0, 1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norms = rows.norm(dim=-1, keepdim=True)
    return second_moment(rows * (CAP * norms.median() / norms.clamp_min(torch.finfo(rows.dtype).tiny)).clamp_max(1))


class OutputFit:
    """Least-squares fit of a converted layer's output projection to the original layer's attention output.

    Minimises E || y - W z ||^2 + ridge * || W - W_0 ||^2 over W, for y the original attention output and z the converted heads'
    outputs on the same input. It takes back what the approximation of keys and values shrank or leaked on average, and
    changes nothing where they are exact.
    """

    def __init__(self, weight: Tensor) -> None:
        """`weight`: W_0 [D, H * V], the original output projection."""
        self.weight = weight.double()
        self.zz: Any = 0  # sum of z z^T, [H * V, H * V]
        self.rz: Any = 0  # sum of (y - W_0 z) z^T, [D, H * V]

    def add(self, heads: Tensor, residual: Tensor) -> None:
        """Take in tokens: z [B, T, H * V], and y - W_0 z [B, T, D]."""
        wide = torch.promote_types(heads.dtype, torch.float32)
        z, r = heads.flatten(0, -2).to(wide), residual.flatten(0, -2).to(wide)
        self.zz = self.zz + (z.T @ z).double()
        self.rz = self.rz + (r.T @ z).double()

    def solve(self, ridge: float = 1e-4) -> Tensor:
        """The fitted W [D, H * V]."""
        damping = ridge * self.zz.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        damped = self.zz + damping * torch.eye(len(self.zz), dtype=torch.float64, device=self.zz.device)
        return self.weight + torch.linalg.solve(damped, self.rz.T).T
