# SPDX-License-Identifier: Apache-2.0
"""The attention of any family, read into one form, so that the mathematics knows no family.

Families call and lay out the same things differently: queries, keys and values are rows of three projections or of one, rotary
pairs are (l, l + r/2) or (2l, 2l + 1) of the first r numbers of a head, a norm's weight is w or 1 + w, its mean square is that of a
head or of all heads, with the mean subtracted first or not. In the one form

* projections are rows of (x, 1): a bias is one more column, zero where there is none;
* pairs are half-split, (l, l + r/2), in rows and in the weights of norms;
* norms are RMSNorms: LayerNorm subtracts the mean by a matrix, which is multiplied into the rows.

Notation: D hidden size, d head width, r rotary width, H query heads, g key/value heads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_mla.configuration_mla import layer_type, rotates
from hf_mla.layer_mla import rope_factor

from .families import FAMILIES, kv_heads, rotary_width, source_head_dim


class Projection(NamedTuple):
    """Queries, keys or values as outputs of a module, which may have others too."""

    module: nn.Linear
    rows: Tensor  # [heads, d], which of its outputs

    def weights(self, like: Tensor) -> Tensor:
        """[heads, d, D + 1], what multiplies (x, 1); typed as `like`."""
        weight, bias = self.module.weight, self.module.bias
        rows = self.rows.to(weight.device)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        return torch.cat([weight[rows], bias[rows].unsqueeze(-1)], dim=-1).to(like)


class Norm(NamedTuple):
    """QK-norm: what divides by the root mean square of a head, or of all heads together, and multiplies by weights."""

    weight: Tensor  # [heads, d], or [1, d] where all heads have the same
    eps: float
    joint: bool  # over all heads together


class Attention(NamedTuple):
    """An attention layer in the one form."""

    query: Tensor  # [H, d, D + 1]
    key: Tensor  # [g, d, D + 1]
    value: Tensor  # [g, d, D + 1]
    query_norm: Norm | None
    key_norm: Norm | None
    output: nn.Linear
    sinks: Tensor | None  # [H], scores of a token that every token attends to and whose value is zero
    softcap: float | None  # c, where scores x are capped as c * tanh(x / c)
    scaling: float
    rotary: int  # r
    factor: float  # of the cosines and sines; 1 in a layer without RoPE


def attention_of(layer: nn.Module) -> Any:
    """The attention of a decoder layer."""
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


def pair_order(config: Any) -> Tensor:
    """Where the numbers of a head [d] stand in a family's own order, its rotary pairs half-split."""
    width = rotary_width(config)
    order = torch.arange(source_head_dim(config))
    if FAMILIES[config.model_type].interleaved:
        order[:width] = order[:width].view(-1, 2).T.flatten()
    return order


def projections(attention: Any) -> tuple[Projection, Projection, Projection]:
    """Queries, keys and values of an attention module."""
    config = attention.config
    width, heads, groups = source_head_dim(config), config.num_attention_heads, kv_heads(config)
    if hasattr(attention, "query_key_value"):  # for each head: query, key, value
        modules = [attention.query_key_value] * 3
        rows = torch.arange(3 * heads * width).view(heads, 3, width).unbind(1)
    elif hasattr(attention, "qkv_proj"):
        modules = [attention.qkv_proj] * 3
        rows = torch.arange((heads + 2 * groups) * width).view(-1, width).split([heads, groups, groups])
    else:
        modules = [attention.q_proj, attention.k_proj, attention.v_proj]
        rows = tuple(torch.arange(count * width).view(count, width) for count in (heads, groups, groups))
    order = pair_order(config)
    query, key, value = zip(modules, (rows[0][:, order], rows[1][:, order], rows[2]), strict=True)
    return Projection(*query), Projection(*key), Projection(*value)


def norm_module(attention: Any, letter: str) -> Any:
    """The norm of queries ("q") or keys ("k"), or None."""
    names = f"{letter}_norm", f"{letter}_layernorm"
    return next((getattr(attention, name) for name in names if hasattr(attention, name)), None)


def read_norm(attention: Any, letter: str, like: Tensor) -> Norm | None:
    """The norm of queries ("q") or keys ("k"), its weights in the one order and typed as `like`."""
    module = norm_module(attention, letter)
    if module is None:
        return None
    config = attention.config
    family = FAMILIES[config.model_type]
    parts = getattr(module, "norms", [module])  # one for each head, or one in all
    width = source_head_dim(config)
    weight = torch.cat([part.weight.to(like).reshape(-1, width) for part in parts])[:, pair_order(config)]
    eps = getattr(parts[0], "variance_epsilon", None) or parts[0].eps
    return Norm(weight + 1 if family.unit_offset else weight, eps, family.joint_norm)


def subtracts_mean(norm: Any) -> bool:
    """Whether a norm is a LayerNorm."""
    return "LayerNorm" in type(norm).__name__


def read(attention: Any, like: Tensor) -> Attention:
    """An attention module of any family in the one form, its numbers typed as `like`."""
    query, key, value = (projection.weights(like) for projection in projections(attention))
    if subtracts_mean(norm_module(attention, "k")):
        query, key = query - query.mean(1, keepdim=True), key - key.mean(1, keepdim=True)
    config, layer_idx = attention.config, attention.layer_idx
    return Attention(
        *(query, key, value, read_norm(attention, "q", like), read_norm(attention, "k", like)),
        output=attention.o_proj if hasattr(attention, "o_proj") else attention.dense,
        sinks=getattr(attention, "sinks", None),
        softcap=config.attn_logit_softcapping if FAMILIES[config.model_type].softcap else None,
        scaling=attention.scaling,
        rotary=rotary_width(config),
        factor=rope_factor(config, layer_type(config, layer_idx)) if rotates(config, layer_idx) else 1.0,
    )


def watch_gradients(
    attention: Any, tokens: int, keys: Callable[[Tensor], None], values: Callable[[Tensor], None]
) -> list[RemovableHandle]:
    """Have functions called with the gradients [B, T, g * d] at keys (normed, before RoPE, in the one order) and at values.

    Args:
        attention: the module.
        tokens: T.
        keys: takes the gradient at the keys.
        values: takes that at the values.

    Returns:
        The handles of the hooks.
    """
    _, key, value = projections(attention)
    norm, order = norm_module(attention, "k"), pair_order(attention.config)

    def watch(projection: Projection, add: Callable[[Tensor], None]) -> RemovableHandle:
        rows = projection.rows.flatten()

        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            output.register_hook(lambda gradient: add(gradient[..., rows.to(gradient.device)]))

        return projection.module.register_forward_hook(hook)

    def at_norm(gradient: Tensor) -> None:  # [B, T, g, d], [B, g, T, d] or [B, T, g * d]
        if gradient.ndim == 4 and gradient.shape[1] != tokens:
            gradient = gradient.transpose(1, 2)
        keys(gradient.reshape(*gradient.shape[:2], -1, len(order))[..., order.to(gradient.device)].flatten(2))

    def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        output.register_hook(at_norm)

    return [watch(value, values), watch(key, keys) if norm is None else norm.register_forward_hook(hook)]


def added(layer: Any, output: Tensor) -> Tensor:
    """What a layer adds to the residual stream for an output of its attention: in some families normed, in some multiplied."""
    if hasattr(layer, "post_self_attn_layernorm"):
        return layer.post_self_attn_layernorm(output)
    if hasattr(layer, "post_feedforward_layernorm"):  # else the norm of that name is the one before the MLP
        return layer.post_attention_layernorm(output)
    return output * layer.residual_multiplier if hasattr(layer, "residual_multiplier") else output


class Caught(Exception):  # noqa: N818 - no error
    """What ends a layer's forward pass when its attention has been computed."""


def attend(layer: nn.Module, states: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What enters the attention of a layer and what comes out of it; the rest of the layer is not computed.

    Args:
        layer: a decoder layer.
        states: what enters the layer, [B, T, D].
        call: what it is called with besides.

    Returns:
        Both [B, T, D].
    """
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> None:
        caught.extend((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output[0]))
        raise Caught

    handle = attention_of(layer).register_forward_hook(catch, with_kwargs=True)
    try:
        layer(states, **call)
    except Caught:
        pass
    finally:
        handle.remove()
    return caught[0], caught[1]
