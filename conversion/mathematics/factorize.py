# SPDX-License-Identifier: Apache-2.0
"""Joint low-rank factorization of keys and values (closed form; imports torch and nothing of ours).

Minimises || G^(1/2) (W - A B) S^(1/2) ||_F over A [m, R] and B [R, D], for W [m, D] the stacked rows of keys and values, S the
second moment of the input and G the second moment of the loss gradient at W x. G puts keys and values, heads and layers
on one scale: to second order the objective is the increase of the loss, with the Fisher matrix taken as a Kronecker
product (K-FAC, arXiv:1503.05671).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """W is approximated by `up @ down`."""

    down: Tensor  # B [R, D]; the latent B x has mean square 1
    up: Tensor  # A [m, R]
    spectrum: Tensor  # [m], weighted energy of each direction, descending; the first R are kept


def matrix_square_root(matrix: Tensor, damping: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of a positive semi-definite matrix.

    Args:
        matrix: [m, m], symmetric.
        damping: what is added to the diagonal, as a share of its mean, so that the inverse exists.

    Returns:
        G^(1/2) and G^(-1/2), each [m, m].
    """
    mean = matrix.diagonal().mean()
    damped = matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) * (damping * mean if mean > 0 else 1)
    values, vectors = torch.linalg.eigh(damped)
    root = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def factorize(weight: Tensor, moment: Tensor, gradient_moments: list[Tensor], rank: int) -> Factors:
    """The best weighted approximation of `weight` of a given rank.

    Args:
        weight: W [m, D].
        moment: S [D, D].
        gradient_moments: the diagonal blocks of G, their sizes summing to m.
        rank: R, at most m.

    Returns:
        The factors. `up @ down` equals `weight` when `rank` reaches its rank.
    """
    roots, inverses = zip(*(matrix_square_root(block) for block in gradient_moments), strict=True)
    root, inverse = torch.block_diag(*roots), torch.block_diag(*inverses)
    weighted = root @ weight
    energies, vectors = torch.linalg.eigh(weighted @ moment @ weighted.T)  # ascending
    energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
    kept = vectors[:, :rank]  # [m, R]
    # The optimum is G^(-1/2) U U^T G^(1/2) W: S need not be inverted.
    scale = (energies[:rank].mean()).sqrt()
    scale = scale if scale > 0 else torch.ones_like(scale)
    return Factors(down=kept.T @ weighted / scale, up=inverse @ kept * scale, spectrum=energies)
