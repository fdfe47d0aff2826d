# SPDX-License-Identifier: Apache-2.0
"""What the original model does on calibration text, as the conversion of each layer needs it.

`survey` makes one forward and one backward pass over a few windows, holding one layer at a time: every layer's input goes to disk
on the way up, and on the way down the layer is computed again from it, with gradients. It leaves, per layer,

* the hidden states that enter it, from which S = E[x x^T] of the attention input follows, and
* the second moments of the loss gradient at keys (before RoPE) and values, G_K = E[dK dK^T] and G_V, without outliers.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..source.attention import attention_of, watch_gradients
from ..source.checkpoint import Checkpoint
from ..source.shards import load_file, save_file
from ..source.streaming import LayerStream, allocate
from .measures import losses_of
from .moments import gradient_moment, hooks
from .scales import HEAD_TOKENS


CONTEXT_TOLERANCE = 0.2  # nats


def inputs_file(folder: Path, layer: int) -> Path:
    """Where `survey` leaves the hidden states that enter a layer."""
    return folder / f"inputs-{layer:04}.safetensors"


def layer_inputs(folder: Path, layer: int) -> Tensor:
    """The hidden states [windows, tokens, D] that enter a layer, of the surveyed text."""
    return load_file(inputs_file(folder, layer))["states"]


def gradient_file(folder: Path, layer: int) -> Path:
    """Where `survey` leaves the gradient moments of a layer."""
    return folder / f"gradient-{layer:04}.safetensors"


def gradient_moments(folder: Path, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The gradient moments G_K and G_V of a layer, each [g * d, g * d]."""
    moments = load_file(gradient_file(folder, layer))
    return moments["keys"].to(device), moments["values"].to(device)


def survey(stream: LayerStream, windows: Tensor, batch: int, folder: Path, whole: Tensor, more: Tensor) -> int:
    """Leave every layer's inputs and gradient moments on calibration text in `folder`.

    Args:
        stream: the model.
        windows: token ids [windows, tokens].
        batch: windows per pass.
        folder: where to.
        whole: which windows are one text from beginning to end [windows]; in others a loss that rises says nothing.
        more: other such windows [others, tokens], for their loss alone.

    Returns:
        The context that the model shows to be trained for, see `trained_context`. If that is less than `tokens`, there are no
        gradient moments: what the model does beyond it is nothing to go by.

    Raises:
        UserError: the model computes numbers that are not finite.
    """
    with tqdm(total=2 * len(stream), desc="surveying", unit="layer") as progress:
        count, tokens = windows.shape
        shape = (count + len(more), tokens, stream.config.hidden_size)
        states = allocate(shape, stream.dtype, stream.device, folder / "surveyed.bin")
        stream.embed(torch.cat([windows, more]), states)
        for index in range(len(stream)):
            save_file({"states": states[:count]}, inputs_file(folder, index))
            with stream.layer(index) as layer:
                advance(layer, stream.calls[index], states, batch, stream.device)
            progress.update()

        gradient = states[:count]  # of the loss, at the output of the layer at work
        losses = []  # [B, tokens - 1] of each part
        with stream.head() as head:
            for part, ids in zip(gradient.split(batch), windows.split(batch), strict=True):
                at_output, at_tokens = loss_gradient(head, part.to(stream.device), ids.to(stream.device))
                part.copy_(at_output)
                losses.append(at_tokens.double().cpu())
            for row, ids in zip(states[count:].to(stream.device), more.to(stream.device), strict=True):
                losses.append(losses_of(lambda some: head(some.unsqueeze(0)).squeeze(0), row, ids).double().cpu().unsqueeze(0))
        each = torch.cat(losses)
        if not torch.isfinite(each).all():
            raise UserError(f"{stream.checkpoint.name} computes numbers that are not finite; {damage(stream.checkpoint)}")
        judged = torch.cat([each[:count][whole], each[count:]])
        context = trained_context(judged) if len(judged) else tokens
        if context < tokens:
            return context
        for index in reversed(range(len(stream))):
            with stream.layer(index) as layer:
                moments = backward(layer, stream.calls[index], layer_inputs(folder, index), gradient, batch, stream.device)
            save_file({name: (total / windows.numel()).cpu() for name, total in moments.items()}, gradient_file(folder, index))
            progress.update()
        return context


def damage(checkpoint: Checkpoint) -> str:
    """Which weights are the reason that a model computes numbers that are not finite."""
    for name, tensor in sorted(checkpoint.tensors.items()):
        if not torch.isfinite(checkpoint.load([name], "cpu")[name]).all():
            return f"{name} in {tensor.file} is damaged: download it again"
    return "its weights are finite, but do not go with its config.json"


def trained_context(losses: Tensor) -> int:
    """How many tokens a model can look back on to any good, by its loss at each position of some windows [windows, tokens - 1].

    `max_position_embeddings` often says more than a model was trained for. Beyond that the loss rises, by half a nat and more,
    where within it falls with every token of context. The length is halved, down to 256, while its second half is worse than what
    comes before by more than a tolerance plus the standard error over windows.
    """
    length = losses.shape[1] + 1
    while length % 2 == 0 and length >= 512:
        half, quarter = length // 2, length // 4
        rise = losses[:, half : length - 1].mean(1) - losses[:, quarter:half].mean(1)
        error = rise.std() / len(rise) ** 0.5 if len(rise) > 1 else 0.0
        if rise.mean() < CONTEXT_TOLERANCE + error:
            break
        length = half
    return length


def loss_gradient(head: Callable[[Tensor], Tensor], states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of its sum at the last hidden states.

    Args:
        head: from hidden states to logits.
        states: [B, T, D].
        ids: token ids [B, T].

    Returns:
        The gradient [B, T, D], and the loss at each token but the first [B, T - 1].
    """
    gradient, losses = torch.zeros_like(states), []
    step = max(1, HEAD_TOKENS // len(ids))
    for start in range(0, ids.shape[1] - 1, step):
        stop = min(start + step, ids.shape[1] - 1)
        inputs = states[:, start:stop].detach().requires_grad_(True)
        logits = head(inputs)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)  # [B T, vocabulary]
        each = nn.functional.cross_entropy(logits, ids[:, start + 1 : stop + 1].flatten(), reduction="none")
        losses.append(each.view(len(ids), -1))
        # The sum, not the mean: gradients of equal scale whatever the batch.
        gradient[:, start:stop] = torch.autograd.grad(losses[-1].sum(), inputs)[0]
    return gradient, torch.cat([part.detach() for part in losses], dim=1)


@torch.no_grad()
def advance(layer: Any, call: dict, states: Tensor, batch: int, device: torch.device) -> None:
    """Pass hidden states [windows, tokens, D] through a layer, in place."""
    for part in states.split(batch) if len(states) else ():
        part.copy_(layer(part.to(device), **call))


def backward(layer: Any, call: dict, states: Tensor, gradient: Tensor, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Pass the loss gradient [windows, tokens, D] back through a layer, in place; returns sums of its second moments."""
    totals: dict[str, Any] = {"keys": 0, "values": 0}

    def add(name: str, gradient: Tensor) -> None:
        totals[name] += gradient_moment(gradient)

    with hooks(watch_gradients(attention_of(layer), states.shape[1], partial(add, "keys"), partial(add, "values"))):
        for inputs, part in zip(states.split(batch), gradient.split(batch), strict=True):
            inputs = inputs.to(device, copy=True).requires_grad_(True)
            with torch.enable_grad():
                output = layer(inputs, **call)
            part.copy_(torch.autograd.grad(output, inputs, part.to(device))[0])
    return totals
