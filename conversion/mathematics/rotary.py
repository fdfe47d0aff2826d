# SPDX-License-Identifier: Apache-2.0
"""Concentrate the rotary part of all key heads in one narrow shared key (closed form; imports torch and nothing of ours).

RoPE multiplies key pair l, read as the complex number k_l = k[l] + i k[l + d/2], by exp(i t theta_l), the same for all heads.
A unitary mix of the heads at one frequency therefore commutes with RoPE. Of each *fold group*, the g heads times M = d / P
neighbouring frequencies, the shared key keeps the one complex component that carries most energy, and rotates it at the
group's first frequency: base^(-2i/P), which is just the ladder of a RoPE of width P. With one head and M = 1 nothing is lost.
A real rotation, as in RoRoPE (TransMLA, arXiv:2502.07864), has half the freedom of a unitary one and keeps less.

Notation: D hidden size, d head width, g key/value heads, H query heads, P rotary width, S = E[x x^T].
"""

import torch
from torch import Tensor


def to_complex(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * d, D] of a projection as complex pairs [heads, d/2, D], half-split as in Transformers."""
    real, imaginary = rows.view(heads, 2, -1, rows.shape[-1]).unbind(1)
    return torch.complex(real, imaginary)


def to_real(pairs: Tensor) -> Tensor:
    """Complex pairs [heads, d/2, D] as rows [heads * d, D], the inverse of `to_complex`."""
    return torch.cat([pairs.real, pairs.imag], dim=1).flatten(0, 1)


def principal_components(key_weight: Tensor, moment: Tensor, kv_heads: int, rope_dim: int) -> Tensor:
    """The complex direction of each fold group that carries most key energy.

    Args:
        key_weight: [g * d, D].
        moment: [D, D], second moment of the attention input.
        kv_heads: g.
        rope_dim: P; an even divisor of d.

    Returns:
        Unit vectors u [P/2, g, M] over the heads and frequencies of each group.
    """
    keys = to_complex(key_weight, kv_heads)  # [g, d/2, D]
    groups = keys.unflatten(1, (rope_dim // 2, -1)).transpose(0, 1)  # [P/2, g, M, D]
    members = groups.flatten(1, 2)  # [P/2, g * M, D]
    covariance = members @ moment.to(members.dtype) @ members.mH  # E[k k^H], [P/2, g * M, g * M]
    _, vectors = torch.linalg.eigh(covariance)  # ascending
    return vectors[..., -1].unflatten(1, groups.shape[1:3])


def split_keys(key_weight: Tensor, components: Tensor) -> tuple[Tensor, Tensor]:
    """Split the key projection into the shared rotary key and what loses its rotation.

    Args:
        key_weight: [g * d, D].
        components: u [P/2, g, M].

    Returns:
        The rotary rows [P, D], z = u^H k, and the rest [g * d, D], k - u z.

    Example:
        >>> key_weight, moment = torch.randn(8, 3), torch.eye(3)  # one head, as wide as the shared key: nothing is lost
        >>> rotary, rest = split_keys(key_weight, principal_components(key_weight, moment, kv_heads=1, rope_dim=8))
        >>> bool(rest.abs().max() < 1e-5)
        True
    """
    kv_heads = components.shape[1]
    keys = to_complex(key_weight, kv_heads)
    groups = keys.unflatten(1, (components.shape[0], -1)).transpose(0, 1)  # [P/2, g, M, D]
    shared = (components.conj().unsqueeze(-1) * groups).sum((1, 2))  # [P/2, D]
    rest = groups - components.unsqueeze(-1) * shared[:, None, None]
    return to_real(shared.unsqueeze(0)), to_real(rest.transpose(0, 1).flatten(1, 2))


def rotary_queries(query_weight: Tensor, components: Tensor) -> Tensor:
    """The rows of the query projection that meet the shared rotary key.

    Args:
        query_weight: [H * d, D], the heads of one key/value head next to each other.
        components: u [P/2, g, M].

    Returns:
        [H, P, D]; head h of key/value head j takes sum_m conj(u[:, j, m]) q[h, m].
    """
    pairs, kv_heads, folded = components.shape
    queries = to_complex(query_weight, query_weight.shape[0] // (2 * pairs * folded))  # [H, d/2, D]
    queries = queries.view(kv_heads, -1, pairs, folded, queries.shape[-1])  # [g, n, P/2, M, D]
    mixed = (components.conj().transpose(0, 1)[:, None, :, :, None] * queries).sum(3).flatten(0, 1)  # [H, P/2, D]
    return torch.cat([mixed.real, mixed.imag], dim=1)
