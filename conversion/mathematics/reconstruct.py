# SPDX-License-Identifier: Apache-2.0
"""Fit one converted layer to the original layer's attention output, on the original model's inputs.

Minimises E w || y - y' ||^2 / E w || y ||^2 over all weights of the MLA block, the norm on the latent included. Layers do not see
each other, so one is in memory at a time. docs/reconstruction.md has the measurements behind every constant here.

* A token's weight w is 1 over the mean square of the residual stream that y is added to, y included: so the next norm sees it, and
  the huge hidden states of a few tokens count no more than others. Where y is normed or multiplied before, to z, so is its error.
* Matrices move by Muon, each head's part by itself (`muon.py`), vectors by Adam.
* Step sizes are relative: a matrix's is a share of the root mean square of its own entries, so that no model needs its own.
* A sequence's first token sees nothing but itself, and what attention makes of it decides whether all others rest theirs on it (a
  sink). Few tokens of a text come first, so many are taken as if they did, each alone, with a share of the loss.
* What is kept is the best on held-back text: the end, or a moment before it.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_mla.layer_mla import MLAAttention

from ..source.attention import added, attend
from .closed_form import keep_closed_form
from .moments import OutputFit, hooks, second_moment
from .muon import Muon


NORM_EPS = 1e-6  # of the norm on the latent, as in DeepSeek's models
RATE = 0.08  # of the root mean square of a matrix; Muon moves its entries by a fifth of that, in the root mean square
LATENT_RATE = 2.0  # times that, for the projection to the latent
MOMENTUM = 0.85
FIRST_SHARE = 0.1  # of the error, beside all other tokens', for those that come first in a sequence
FIRST_EVERY, FIRST_TOKENS = 4, 1 / 4  # steps of which one sees any, and how many as a share of its others
FIRST_BATCH = 16  # sequences of them at a time
WARMUP = 0.05  # share of the steps
TINY = torch.finfo(torch.float32).tiny
SNAPSHOTS = (0.5, 0.75)  # shares of the steps after which a layer may already be at its best


class LayerTask:
    """One attention layer on calibration text: what enters it, and what the original makes of that.

    Args:
        layer: the original decoder layer, with its weights.
        call: what it is called with besides hidden states.
        states: hidden states that enter it, [windows, tokens, D], anywhere.
        position_embeddings: of the converted layer, for one sequence.
        device: where to compute.
        first: the same layer on tokens that each come first in a sequence.
        compiled: whether to compile what a step computes of the converted layer; the first compiled serves all layers.
    """

    def __init__(
        self,
        layer: Any,
        call: dict,
        states: Tensor,
        position_embeddings: Any,
        device: torch.device,
        first: "LayerTask | None" = None,
        compiled: bool = False,
    ) -> None:
        self.layer, self.call, self.states, self.device, self.first = layer, call, states, device, first
        self.position_embeddings = position_embeddings
        self.place = {name: call.get(name) for name in ("attention_mask", "position_ids")}
        self.wide = torch.promote_types(states.dtype, torch.float32)
        self.rounds = states.dtype == torch.bfloat16
        # Processes must come to the same bytes: how sums are cut may not be a matter of what was timed.
        self.step_error = torch.compile(self.wrong, dynamic=False, options={"shape_padding": False}) if compiled else self.wrong

    @torch.no_grad()
    def batch(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attention inputs x and the original's outputs y of some windows, each [B, T, D], and the tokens' weights w [B, T, 1].

        y and w are in float32 or wider.
        """
        states = self.states[windows.to(self.states.device)].to(self.device)
        x, y = attend(self.layer, states, self.call)
        z = added(self.layer, y)
        y, z, plain = y.to(self.wide), z.to(self.wide), z is y
        w = 1 / (states + z).square().mean(-1, keepdim=True).clamp_min(TINY)
        if not plain:
            w = w * z.square().mean(-1, keepdim=True) / y.square().mean(-1, keepdim=True).clamp_min(TINY)
        return x, y, w

    def all_windows(self, size: int) -> tuple[Tensor, ...]:
        """The places of all windows, so many at a time."""
        return torch.arange(len(self.states)).split(size)

    @torch.no_grad()
    def input_moment(self, parts: Sequence[Tensor]) -> Tensor:
        """Mean second moment of x [D, D] on some windows, given in batches, and on first tokens with a share; in float64."""
        tokens = sum(map(len, parts)) * (self.states.shape[1] - 1)  # a window's own first one is left out
        width = self.states.shape[-1]
        moment = torch.zeros(width, width, dtype=torch.float64, device=self.device)
        for part in parts:
            moment += second_moment(self.batch(part)[0][:, 1:]) / tokens
        if self.first is not None:
            for part in self.first.all_windows(FIRST_BATCH):
                moment += FIRST_SHARE * second_moment(self.first.batch(part)[0]) / self.first.states[..., 0].numel()
        return moment

    def output(self, mla: MLAAttention, x: Tensor) -> Tensor:
        """What the converted layer makes of x [B, T, D]; in float32 or wider."""
        # The weights that are fitted are wider than bfloat16; what is computed with them need not be.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.rounds):
            return mla(x, self.position_embeddings, **self.place)[0].to(self.wide)

    def wrong(self, mla: MLAAttention, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        """Sum of the weighted squared errors of the converted layer's output on a batch, with what `batch` returns."""
        return ((self.output(mla, x) - y).square() * w).sum()

    @torch.no_grad()
    def error(self, mla: MLAAttention, parts: Iterable[Tensor]) -> float:
        """Weighted relative squared error of the converted layer's output on some windows, given in batches."""
        wrong = total = 0.0
        for part in parts:
            x, y, w = self.batch(part)
            wrong += ((self.output(mla, x) - y).square() * w).double().sum().item()
            total += (y.square() * w).double().sum().item()
        return wrong / max(total, torch.finfo(torch.float64).tiny)

    @torch.no_grad()
    def fit_output(self, mla: MLAAttention, parts: Iterable[Tensor]) -> None:
        """Fit `o_proj` by weighted least squares on some windows, given in batches, and on first tokens, in place."""
        fit = OutputFit(mla.o_proj.weight)
        energy = self.add_rows(fit, mla, parts)
        if self.first is not None:
            batches = self.first.all_windows(FIRST_BATCH)
            self.first.add_rows(fit, mla, batches, FIRST_SHARE * energy / len(batches))
        mla.o_proj.weight.copy_(fit.solve())

    def add_rows(self, fit: OutputFit, mla: MLAAttention, parts: Iterable[Tensor], energy: float | None = None) -> float:
        """Let a fit take in windows, given in batches, each made to have a weighted energy if that is given; returns the sum."""
        heads: list[Tensor] = []
        total = 0.0
        with hooks([mla.o_proj.register_forward_pre_hook(lambda _module, args: heads.append(args[0]))]):
            for part in parts:
                x, y, w = self.batch(part)
                residual = y - self.output(mla, x)
                if energy is not None:
                    w = w * (energy / (y.square() * w).sum().clamp_min(TINY))
                total += (y.square() * w).double().sum().item()
                fit.add(heads.pop() * w.sqrt(), residual * w.sqrt())
        return total


def shuffled(windows: Tensor, size: int, steps: int, seed: int) -> Tensor:
    """Windows for each step, [steps, size]: in random order, all of them before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(steps * size / len(windows))
    order = torch.cat([windows[torch.randperm(len(windows), generator=generator)] for _ in range(rounds)])
    return order[: steps * size].view(steps, size)


def mixed(texts: list[Tensor], size: int, steps: int, seed: int) -> Tensor:
    """Windows for each step, [steps, size], evenly from all texts, each text's shuffled; see `shuffled`."""
    turns = math.ceil(steps * size / len(texts))
    orders = [shuffled(windows, 1, turns, seed + number) for number, windows in enumerate(texts)]
    return torch.cat(orders, dim=1).flatten()[: steps * size].view(steps, size)


def interleaved(texts: list[Tensor]) -> Tensor:
    """The windows of all texts: the first of each, then the second of each, and so on; none twice."""
    places = torch.cat([torch.arange(len(windows)) for windows in texts])
    return torch.cat(texts)[places.argsort(stable=True)]


def fit_layer(
    mla: MLAAttention, task: LayerTask, order: Tensor, fit: Sequence[Tensor], held: Sequence[Tensor], closed: float, *, keep: bool
) -> tuple[float, int]:
    """Train a layer that is in closed form, in place, and fit its output again; more slowly if that makes it no better.

    Args:
        mla: as for `reconstruct`.
        task: likewise.
        order: likewise.
        fit: windows for least squares, in batches.
        held: as for `reconstruct`.
        closed: the error of the closed form on them.
        keep: whether to go back to the closed form if nothing is better.

    Returns:
        The error on held-back windows of what `mla` is now, and after how many steps that was; 0 for the closed form.
    """
    error, kept, closed_form = closed, 0, copy.deepcopy(mla.state_dict())
    for slower in (1.0, 0.25):
        mla.load_state_dict(closed_form)
        mla.kv_a_layernorm.variance_epsilon = NORM_EPS
        nn.init.ones_(mla.kv_a_layernorm.weight)
        error, kept = reconstruct(mla, task, order, held, slower)
        if kept:
            before = mla.o_proj.weight.clone()
            task.fit_output(mla, fit)
            if (refitted := task.error(mla, held)) < error:
                error = refitted
            else:
                mla.o_proj.weight.copy_(before)
        if error < closed:
            return error, kept
    if keep:
        mla.load_state_dict(closed_form)
        keep_closed_form(mla, NORM_EPS)
        return closed, 0
    return error, kept


def heads_in(mla: MLAAttention, name: str) -> tuple[int, int]:
    """Into how many parts a matrix falls by heads, and along which dimension; keys and values of a head are two."""
    heads = mla.config.num_attention_heads
    assert mla.qk_nope_head_dim == mla.v_head_dim
    counts = {"q_proj": heads, "k_proj": mla.num_key_norms, "kv_b_proj": 2 * heads, "o_proj": heads}
    return counts.get(name.split(".")[0], 1), int(name.startswith("o_proj"))


def reconstruct(
    mla: MLAAttention, task: LayerTask, order: Tensor, held: Sequence[Tensor], slower: float = 1.0
) -> tuple[float, int]:
    """Train a converted layer, in place.

    Args:
        mla: the layer; in float32 or wider.
        task: the original.
        order: which windows make up each step, [steps, windows].
        held: windows that tell which moment of the training was the best, in batches.
        slower: share of the usual step sizes.

    Returns:
        The least error on held-back windows, and after how many steps that was; `mla` is what it was then.
    """
    groups: dict[int, list[dict]] = {1: [], 2: []}
    for name, parameter in mla.named_parameters():
        parameter.requires_grad_(True)
        weight = mla.get_parameter(name.replace("bias", "weight")).detach()
        rate = slower * RATE * (LATENT_RATE if name.startswith("kv_a_proj") else 1.0) * weight.square().mean().sqrt().item()
        parts = {"parts": heads_in(mla, name)} if parameter.ndim == 2 else {}
        groups[parameter.ndim].append({"params": [parameter], "lr": rate, **parts})
    optimizers = [
        Muon(groups[2], MOMENTUM),
        torch.optim.Adam(groups[1], betas=(0.9, 0.95)),
    ]
    steps, warmup = len(order), math.ceil(WARMUP * len(order))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps))
        for optimizer in optimizers
    ]
    looks = {math.ceil(share * steps) for share in (*SNAPSHOTS, 1.0)}
    best: tuple[float, int, dict[str, Tensor]] = (math.inf, 0, {})
    energy: Any = None
    if (first := task.first) is not None:
        count, length = first.states.shape[:2]
        size = max(1, round(FIRST_TOKENS * order.shape[1] * task.states.shape[1] / length))
        first_order = shuffled(torch.arange(count), size, math.ceil(steps / FIRST_EVERY), 0)
    for step, windows in enumerate(order, 1):
        x, y, w = task.batch(windows)
        if energy is None:
            energy = (y.square() * w).sum().clamp_min(TINY)
        with torch.enable_grad():
            loss = task.step_error(mla, x, y, w) / energy
            if first is not None and step % FIRST_EVERY == 0:
                x, y, w = first.batch(first_order[step // FIRST_EVERY - 1])
                loss = loss + FIRST_EVERY * FIRST_SHARE * first.wrong(mla, x, y, w) / (y.square() * w).sum().clamp_min(TINY)
            loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step in looks and (error := task.error(mla, held)) < best[0]:
            best = error, step, copy.deepcopy(mla.state_dict())
    mla.requires_grad_(False)
    mla.load_state_dict(best[2] or mla.state_dict())
    return best[:2]
