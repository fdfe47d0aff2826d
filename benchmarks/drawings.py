"""Draws how it works into docs/pictures/: the rotary concentration, the latent, absorption.

python benchmarks/drawings.py          # needs matplotlib

Numbers in the drawings are those of Llama-3-8B converted to 512 + 64. The rotary concentration is measured: on one layer of the
bundled model, on 4,096 tokens of the text bundled for it. Style and colours are those of `pictures.py`.
"""

from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from pictures import GREY, ORANGE, PICTURES, STYLE, TEAL
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mla_conversion.mathematics.moments import hooks, second_moment
from hf_mla_conversion.mathematics.rotary import principal_components, split_keys, to_complex
from hf_mla_conversion.source.text import BUNDLED, read_text, token_windows


D, G, H, N, V, R, P = 4096, 8, 32, 128, 128, 512, 64  # by the letters of `attention_mla.py`; G key/value heads
LAYER, ROPE_DIM, TOKENS = 3, 16, 4096  # of the bundled model, whose heads are 32 wide


def canvas(width: float, height: float) -> tuple[Figure, Any]:
    """A figure whose units are tenths of an inch, without axes."""
    figure = Figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Any, x: float, y: float, width: float, height: float, text: str, colour: str, weight: bool = False) -> None:
    """A box with its lower left corner at (x, y): filled for weights, an outline for what is computed."""
    shape = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.6", edgecolor=colour, linewidth=1.4)
    shape.set_facecolor((*matplotlib.colors.to_rgb(colour), 0.22 if weight else 0.0))
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, linespacing=1.5)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow, with words over its middle."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0})
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.7, text, ha="center", va="bottom", fontsize=8)


def chain(axes: Any, y: float, *boxes: tuple[float, float, str, str, bool]) -> None:
    """Boxes at one height, each (x, width, text, colour, weight), with an arrow from each to the next."""
    end = None
    for x, width, text, colour, weight in boxes:
        if end is not None:
            arrow(axes, (end, y + 3), (x, y + 3))
        box(axes, x, y, width, 6, text, colour, weight=weight)
        end = x + width


def title(axes: Any, x: float, y: float, text: str, colour: str = GREY) -> None:
    """A heading."""
    axes.text(x, y, text, fontsize=10.5, fontweight="bold", color=colour, va="center")


def latent() -> Figure:
    """What one token leaves in the cache of one layer: keys and values of all heads, or a latent and one rotary key."""
    figure, axes = canvas(96, 46)
    title(axes, 1, 44, f"Grouped-query attention: {2 * G * N:,} numbers a token and layer")
    box(axes, 1, 33, 11, 6, f"hidden state\n[{D:,}]", GREY)
    for y, name, what in ((36.5, "k_proj", "keys"), (30.5, "v_proj", "values")):
        arrow(axes, (12, 36), (19, y + 2))
        box(axes, 19, y, 18, 4, f"{name} [{G * N:,}, {D:,}]", ORANGE, weight=True)
        arrow(axes, (37, y + 2), (58, y + 2), "RoPE" if name == "k_proj" else "")
        box(axes, 58, y, 24, 4, f"{what} [{G}, {N}]", ORANGE)
    axes.text(83.5, 35.5, "cached", fontsize=9, fontweight="bold", color=ORANGE, va="center")

    title(axes, 1, 25.5, f"Multi-head latent attention: {R + P} numbers")
    box(axes, 1, 13, 11, 6, f"hidden state\n[{D:,}]", GREY)
    arrow(axes, (12, 16), (17, 16))
    box(axes, 17, 13, 20, 6, f"kv_a_proj_with_mqa\n[{R} + {P}, {D:,}]", TEAL, weight=True)
    arrow(axes, (37, 17), (58, 19), "kv_a_layernorm")
    arrow(axes, (37, 15), (58, 12.5), "RoPE")
    box(axes, 58, 17, 24, 4, f"latent c(t) [{R}]", TEAL)
    box(axes, 58, 10.5, 12, 4, f"k_rope(t) [{P}]", TEAL)
    axes.text(83.5, 16, "cached", fontsize=9, fontweight="bold", color=TEAL, va="center")
    axes.plot((1, 95), (8.3, 8.3), ":", color=GREY, linewidth=1)
    axes.text(1, 6.6, "formed when a prompt\nis read, and not kept:", fontsize=8.5, va="top", linespacing=1.4)
    box(axes, 24, 2.2, 25, 4.4, f"kv_b_proj [{H} x ({N} + {V}), {R}]", TEAL, weight=True)
    arrow(axes, (49, 4.4), (58, 4.4))
    box(axes, 58, 2.2, 37, 4.4, f"k_nope [{H}, {N}] and values [{H}, {V}]", GREY)
    return figure


def absorption() -> Figure:
    """One step of decoding over S cached tokens: keys and values formed again, and not formed at all."""
    figure, axes = canvas(104, 50)
    title(axes, 1, 48, "Expanded: kv_b_proj is applied to all S cached latents, in every step")
    chain(
        axes,
        37,
        (1, 16, f"latents [S, {R}]\n(cached)", ORANGE, False),
        (22, 18, f"kv_b_proj\n[{H} x ({N} + {V}), {R}]", ORANGE, True),
        (45, 23, f"k_nope [S, {H}, {N}]\nvalues [S, {H}, {V}]", ORANGE, False),
        (73, 13, "softmax of\nq . k", GREY, False),
        (91, 12, f"output\n[{H}, {V}]", GREY, False),
    )
    axes.text(1, 34.3, f"a cached token and head: {R} x ({N} + {V}) = {R * (N + V):,} multiplications, "
              f"then {N + P + V} for attention", fontsize=8.5, va="center")  # fmt: skip

    title(axes, 1, 28.5, "Absorbed: W_UK goes to the query and W_UV to the output; the latents are key and value of all heads")
    chain(
        axes,
        17,
        (1, 16, f"q_nope\n[{H}, {N}]", GREY, False),
        (22, 18, f"W_UK\n[{H}, {N}, {R}]", TEAL, True),
        (45, 23, f"query [{H}, {R} + {P}]\n(with q_rope)", TEAL, False),
        (73, 13, "softmax of\nq . c", GREY, False),
    )
    box(axes, 45, 6, 23, 6, f"latents [S, {R} + {P}]\n(cached, with k_rope)", TEAL)
    arrow(axes, (68, 10), (76, 17))
    arrow(axes, (82, 17), (82, 12))
    box(axes, 73, 6, 13, 6, f"sum of p c\n[{H}, {R}]", TEAL)
    arrow(axes, (68, 8), (73, 8))
    arrow(axes, (86, 9), (90, 9))
    box(axes, 90, 6, 13, 6, f"W_UV\n[{H}, {V}, {R}]", TEAL, weight=True)
    arrow(axes, (96.5, 12), (96.5, 17))
    box(axes, 91, 17, 12, 6, f"output\n[{H}, {V}]", GREY)
    axes.text(1, 2.5, f"a cached token and head: 2 x {R} + {P} = {2 * R + P:,} multiplications; a step and head besides: "
              f"{R} x ({N} + {V})", fontsize=8.5, va="center")  # fmt: skip
    return figure


@torch.no_grad()
def keys_and_moment() -> tuple[Tensor, Tensor]:
    """The key projection [g * d, D] of a layer of the bundled model, and the second moment [D, D] of what enters it."""
    folder = BUNDLED / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    text = read_text(str(BUNDLED / "calibration.txt.xz"), TOKENS, tokenizer=tokenizer)
    projection, inputs = model.model.layers[LAYER].self_attn.k_proj, []
    with hooks([projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0][:, 1:]))]):
        model(token_windows(text, tokenizer, TOKENS, 1024))
    return projection.weight.double(), second_moment(torch.cat(inputs))


def shares(keys: Tensor, moment: Tensor, heads: int) -> dict[str, Tensor]:
    """What share of each fold group's energy [P / 2] one of its pairs has, and one mix of them, real or complex.

    Args:
        keys: the key projection [g * d, D].
        moment: [D, D].
        heads: g.

    Returns:
        The shares by name.
    """
    members = to_complex(keys, heads).unflatten(1, (ROPE_DIM // 2, -1)).transpose(0, 1).flatten(1, 2)  # [P / 2, g * M, D]
    covariance = members @ moment.to(members.dtype) @ members.mH
    energy = covariance.diagonal(dim1=1, dim2=2).real
    shared, _ = split_keys(keys, principal_components(keys, moment, heads, ROPE_DIM))
    kept = (shared @ moment * shared).sum(-1).view(2, -1).sum(0)
    found = {
        "the largest pair alone": energy.amax(1),
        "the best real rotation": torch.linalg.eigvalsh(covariance.real)[:, -1],
        "the best complex mix": kept,
    }
    return {name: value / energy.sum(1) for name, value in found.items()}


def rotary() -> Figure:
    """Where the energy of rotary keys is, head by head, and how much of it one shared key keeps."""
    keys, moment = keys_and_moment()
    heads = 3
    pairs = to_complex(keys, heads)
    energy = ((pairs @ moment.to(pairs.dtype)) * pairs.conj()).sum(-1).real  # [g, d / 2]
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    image = left.imshow((energy / energy.sum()).numpy(), aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=left, label="share of the layer's key energy")
    for group in range(1, ROPE_DIM // 2):
        left.axvline(2 * group - 0.5, color="white", linewidth=1)
    left.set(xlabel="rotary pair l, fast to slow", ylabel="key head", title="Before: every head has its own pairs")
    left.set_xticks(range(0, pairs.shape[1], 2))
    left.set_yticks(range(heads))
    left.grid(False)
    places = torch.arange(ROPE_DIM // 2).numpy()
    for shift, (colour, (name, share)) in enumerate(zip((GREY, ORANGE, TEAL), shares(keys, moment, heads).items(), strict=True)):
        right.bar(places + 0.27 * (shift - 1), 100 * share.numpy(), 0.25, color=colour, label=name)
    right.set(xlabel=f"fold group i: {heads} heads x 2 frequencies", ylabel="% of the group's energy")
    right.set(title=f"After: one pair a group, in a shared key of {ROPE_DIM}", ylim=(0, 100))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        for draw in (latent, absorption, rotary):
            draw().savefig(PICTURES / f"{draw.__name__}.svg", metadata={"Date": None})
