"""The closed forms against their definitions, in float64; the optimizer of what is fitted against torch's."""

import pytest
import torch

from hf_mla_conversion.mathematics.factorize import factorize, matrix_square_root
from hf_mla_conversion.mathematics.moments import OutputFit
from hf_mla_conversion.mathematics.muon import Muon
from hf_mla_conversion.mathematics.rotary import principal_components, rotary_queries, split_keys, to_complex, to_real


def random_moment(size):
    rows = torch.randn(4 * size, size, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def rope(vectors, frequencies):
    """Rotate [T, d] half-split vectors by position, from the definition."""
    angles = torch.arange(len(vectors), dtype=torch.float64)[:, None] * frequencies
    first, second = vectors.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def test_complex_pairs_round_trip():
    rows = torch.randn(3 * 8, 5, dtype=torch.float64)
    assert torch.equal(to_real(to_complex(rows, 3)), rows)


def test_split_keys_loses_nothing():
    key, moment = torch.randn(3 * 16, 24, dtype=torch.float64), random_moment(24)
    components = principal_components(key, moment, 3, 8)
    rotary, rest = split_keys(key, components)
    assert rotary.shape == (8, 24)
    # k = u z + rest, and the rest is orthogonal to u.
    assert split_keys(rest, components)[0].abs().max() < 1e-12
    energy = torch.trace(rotary @ moment @ rotary.T) + torch.trace(rest @ moment @ rest.T)
    assert torch.isclose(energy, torch.trace(key @ moment @ key.T))


def test_rotary_score_is_the_projection_of_the_original_score():
    """The shared rotary key scores what the kept part of the original keys scores, at every distance (M = 1)."""
    heads, kv_heads, head_dim, hidden = 4, 2, 8, 12
    query = torch.randn(heads * head_dim, hidden, dtype=torch.float64)
    key = torch.randn(kv_heads * head_dim, hidden, dtype=torch.float64)
    components = principal_components(key, random_moment(hidden), kv_heads, head_dim)
    rotary, rest = split_keys(key, components)
    tokens = torch.randn(10, hidden, dtype=torch.float64)
    frequencies = 10000.0 ** (-2 * torch.arange(head_dim // 2, dtype=torch.float64) / head_dim)
    shared_key = rope(tokens @ rotary.T, frequencies)
    for head, weight in enumerate(rotary_queries(query, components)):
        j = head // (heads // kv_heads)
        kept = rope(tokens @ (key - rest)[j * head_dim : (j + 1) * head_dim].T, frequencies)
        expected = rope(tokens @ query[head * head_dim : (head + 1) * head_dim].T, frequencies) @ kept.T
        assert torch.allclose(rope(tokens @ weight.T, frequencies) @ shared_key.T, expected, atol=1e-10)


def test_unitary_mix_keeps_more_than_any_real_rotation():
    """Two heads that differ by a phase are one complex component, but two real ones."""
    base = torch.randn(2, 20, dtype=torch.float64)
    pair = torch.complex(*base)
    heads = torch.stack([pair, pair * 1j])  # [g, D]
    key = torch.cat([torch.stack([h.real, h.imag]) for h in heads])  # d = 2
    components = principal_components(key, torch.eye(20, dtype=torch.float64), 2, 2)
    assert split_keys(key, components)[1].abs().max() < 1e-12


def test_factorization_is_optimal():
    """No random perturbation of the factors does better, and the error is the spectrum's tail."""
    weight, moment = torch.randn(12, 10, dtype=torch.float64), random_moment(10)
    blocks = [random_moment(5), random_moment(7)]
    factors = factorize(weight, moment, blocks, rank=4)
    root = torch.block_diag(*(matrix_square_root(block)[0] for block in blocks))
    half = torch.linalg.cholesky(moment)

    def error(up, down):
        return (root @ (weight - up @ down) @ half).square().sum()

    best = error(factors.up, factors.down)
    assert torch.isclose(best, factors.spectrum[4:].sum())
    for _ in range(50):
        up = factors.up + 1e-3 * torch.randn_like(factors.up)
        down = factors.down + 1e-3 * torch.randn_like(factors.down)
        assert error(up, down) > best


def test_full_rank_factorization_is_exact():
    weight, moment = torch.randn(8, 10, dtype=torch.float64), random_moment(10)
    factors = factorize(weight, moment, [random_moment(4), random_moment(4)], rank=8)
    assert (factors.up @ factors.down - weight).abs().max() < 1e-10


def test_output_fit_equals_least_squares():
    weight = torch.randn(6, 8, dtype=torch.float64)
    heads = torch.randn(2, 100, 8, dtype=torch.float64)
    target = torch.randn(2, 100, 6, dtype=torch.float64)
    fit = OutputFit(weight)
    for z, y in zip(heads, target, strict=True):
        fit.add(z[None], (y - z @ weight.T)[None])
    expected = torch.linalg.lstsq(heads.flatten(0, 1), target.flatten(0, 1)).solution.T
    assert torch.allclose(fit.solve(ridge=1e-12), expected, atol=1e-8)


def test_output_fit_leaves_an_exact_layer_alone():
    weight, heads = torch.randn(6, 8, dtype=torch.float64), torch.randn(1, 50, 8, dtype=torch.float64)
    fit = OutputFit(weight)
    fit.add(heads, torch.zeros(1, 50, 6, dtype=torch.float64))
    assert torch.equal(fit.solve(), weight)


@pytest.mark.parametrize("dim, shape", [(0, (48, 20)), (1, (20, 48)), (0, (24, 96))])
def test_muon_is_torchs_on_each_part(dim, shape):
    whole = torch.nn.Parameter(torch.randn(shape))
    alone = [torch.nn.Parameter(part.clone()) for part in whole.detach().chunk(4, dim)]
    ours = Muon([{"params": [whole], "lr": 0.1, "parts": (4, dim)}], momentum=0.85)
    theirs = torch.optim.Muon(alone, lr=0.1, momentum=0.85, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    start = whole.detach().clone()
    for _ in range(3):
        whole.grad = torch.randn(shape)
        for part, gradient in zip(alone, whole.grad.chunk(4, dim), strict=True):
            part.grad = gradient.contiguous()
        ours.step()
        theirs.step()
    moved, expected = whole.detach() - start, torch.cat(alone, dim).detach() - start
    assert (moved - expected).norm() < 0.02 * expected.norm()  # bfloat16, in another order
