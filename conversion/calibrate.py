# SPDX-License-Identifier: Apache-2.0
"""Second moments of a model on text: what the closed form is computed from.

* Of the attention input, S = E[x x^T], from a forward pass.
* Of the loss gradient at keys (before RoPE) and values, G_K = E[dK dK^T] and G_V, from a backward pass through frozen weights.
  Where that does not fit in memory, a layer-local stand-in is used: what the queries make of a key, and `o_proj` of a value.
* Of the attention output, to fit the output projection of the converted layers (`OutputFit`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm


@dataclass
class LayerMoments:
    """Moments of one attention layer, in float64 on the CPU; D hidden size, g key/value heads of width d."""

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
    """Sum over all but the last dimension of the outer products of `rows`, in float64."""
    flat = rows.detach().flatten(0, -2)
    return (flat.T @ flat).double().cpu()


def measure_moments(model: Any, windows: Tensor, batch: int, *, backward: bool) -> list[LayerMoments]:
    """Accumulate the moments of all layers over calibration text.

    Args:
        model: a causal language model of Transformers, frozen, in evaluation mode.
        windows: token ids [windows, tokens].
        batch: windows per pass.
        backward: weight by the loss gradient; else by the layer's own queries and output projection.

    Returns:
        One entry per layer.
    """
    config = model.config
    size = config.num_key_value_heads * config.head_dim
    zeros = [(config.hidden_size, config.hidden_size), (size, size), (size, size)]
    moments = [LayerMoments(*(torch.zeros(shape, dtype=torch.float64) for shape in zeros)) for _ in model.model.layers]

    def watch_input(moment: LayerMoments) -> Callable:
        def hook(_module: nn.Module, args: tuple) -> None:
            moment.inputs += second_moment(args[0])

        return hook

    def watch_gradient(total: Tensor) -> Callable:
        def add(gradient: Tensor) -> None:
            total.add_(second_moment(gradient))

        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            if not output.requires_grad:  # the first layer's: weights and embeddings are frozen
                output.requires_grad_(True)
            output.register_hook(add)

        return hook

    def watch_queries(total: Tensor) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            total.add_(key_sensitivity(output, config.num_key_value_heads, config.head_dim))

        return hook

    handles = []
    for layer, moment in zip(model.model.layers, moments, strict=True):
        attention = layer.self_attn
        handles.append(attention.k_proj.register_forward_pre_hook(watch_input(moment)))
        if backward:
            handles.append(attention.k_proj.register_forward_hook(watch_gradient(moment.keys)))
            handles.append(attention.v_proj.register_forward_hook(watch_gradient(moment.values)))
        else:
            handles.append(attention.q_proj.register_forward_hook(watch_queries(moment.keys)))
    with hooks(handles), torch.set_grad_enabled(backward):
        for ids in tqdm(windows.split(batch), desc="calibrating", unit="batch"):
            ids = ids.to(model.device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=0 if backward else 1).logits
            if backward:
                # The sum, not the mean: gradients of equal scale whatever the batch.
                nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").backward()
    for layer, moment in zip(model.model.layers, moments, strict=True):
        moment.inputs /= windows.numel()
        moment.keys /= windows.numel()
        moment.values /= windows.numel()
        if not backward:
            balance_local(moment, layer.self_attn)
    return moments


def key_sensitivity(queries: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """Sum of q q^T over tokens and the query heads of each key head: [B, T, H * d] -> block-diagonal [g * d, g * d]."""
    grouped = queries.detach().unflatten(-1, (kv_heads, -1, head_dim)).flatten(0, 1).transpose(0, 1)  # [g, B * T, n, d]
    return torch.block_diag(*(second_moment(head) for head in grouped))


def balance_local(moment: LayerMoments, attention: Any) -> None:
    """Complete the layer-local stand-in for the gradient: values by `o_proj`, and keys and values on equal energy."""
    heads = attention.o_proj.weight.double().cpu().unflatten(1, (-1, attention.head_dim))  # [D, H, d]
    grouped = heads.unflatten(1, (-1, attention.num_key_value_groups))  # [D, g, n, d]
    moment.values = torch.block_diag(*(second_moment(head) for head in grouped.transpose(0, 1)))
    energies = []
    for weighting, projection in ((moment.keys, attention.k_proj), (moment.values, attention.v_proj)):
        weight = projection.weight.double().cpu()
        energies.append(torch.trace(weighting @ weight @ moment.inputs @ weight.T))
    moment.keys *= energies[1] / energies[0].clamp_min(torch.finfo(torch.float64).tiny)


class OutputFit:
    """Least-squares fit of a converted layer's output projection to the original layer's attention output.

    Minimises E || y - W z ||^2 + ridge * || W - W_0 ||^2 over W, for y the original attention output and z the converted heads'
    outputs on the same input. It takes back what the approximation of keys and values shrank or leaked on average, and
    changes nothing where they are exact.
    """

    def __init__(self, weight: Tensor) -> None:
        """`weight`: W_0 [D, H * V], the original output projection."""
        self.weight = weight.double().cpu()
        self.zz = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)  # sum of z z^T
        self.rz = torch.zeros(weight.shape, dtype=torch.float64)  # sum of (y - W_0 z) z^T
        self.rr = self.yy = 0.0  # sums of squares of y - W_0 z, and of y

    def add(self, heads: Tensor, target: Tensor) -> None:
        """Take in tokens: z [B, T, H * V] and y [B, T, D]."""
        z, y = heads.flatten(0, -2), target.flatten(0, -2)
        residual = y - z @ self.weight.to(z).T
        self.zz += (z.T @ z).double().cpu()
        self.rz += (residual.T @ z).double().cpu()
        self.rr += residual.double().square().sum().item()
        self.yy += y.double().square().sum().item()

    def solve(self, ridge: float = 1e-4) -> tuple[Tensor, float]:
        """The fitted W [D, H * V], and the relative squared error of the output that is left."""
        damping = ridge * self.zz.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        damped = self.zz + damping * torch.eye(len(self.zz), dtype=torch.float64)
        change = torch.linalg.solve(damped, self.rz.T).T
        left = self.rr - 2 * (change * self.rz).sum() + (change @ self.zz * change).sum()
        return self.weight + change, max(float(left), 0.0) / max(self.yy, torch.finfo(torch.float64).tiny)
