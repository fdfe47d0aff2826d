"""Draws what conversions of a real model cost, how fast MLA models decode, and from what caches, from results/ into docs/pictures/.

python benchmarks/pictures.py          # needs matplotlib

What a file does not hold is not drawn. The background is transparent and every colour of middling brightness, to be read on light
pages and on dark ones.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator
from pages import RESULTS, cache, machine, stage


PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
LARGEST_RATIO = 10  # what is predicted above is of no use to anyone, and would take up most of an axis
GREY, TEAL, ORANGE = "#767676", "#1b9e77", "#d95f02"
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), GREY),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=matplotlib.colormaps["Dark2"].colors),
    "grid.alpha": 0.25,
    "svg.hashsalt": "hf-mla",  # the same bytes whenever they are drawn
}


def layer_errors(result: dict[str, Any]) -> Figure:
    """How far the fit brings each layer of the first conversion, and after how many steps it was at its best."""
    first = result["conversions"][0]
    layers, which = first["layers"], f"{cache(first)} (-{100 * (1 - first['kv_ratio']):.4g} %)"
    places, last = [layer["layer"] for layer in layers], layers[-1]["layer"]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    errors, steps = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    ends = []
    for key, name, colour in (("error_closed_form", "closed form", ORANGE), ("error_reconstructed", "fitted", TEAL)):
        values = [layer[key] for layer in layers]
        if None not in values:
            errors.plot(places, values, "o-", color=colour, markersize=4, linewidth=1, label=name)
            ends.append((last, values[-1], name, colour))
    errors.set(ylabel="relative squared error", title=f"Error of each layer's attention output on held-back text, {which}")
    errors.set_ylim(bottom=0)
    steps.bar(places, [layer["steps_kept"] for layer in layers], color=TEAL, width=0.6)
    steps.set_ylim(bottom=0, top=max(1, steps.get_ylim()[1]))
    steps.set(xlabel="layer", ylabel="steps kept")
    steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_ends(errors, ends)
    return figure


def training_curve(result: dict[str, Any]) -> Figure | None:
    """The end-to-end stage of all conversions that had one: what it minimizes, and perplexity on text held back from it."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    ends: list[tuple[float, float, str, str]] = []
    for conversion in result["conversions"]:
        if not conversion["end_to_end"]:
            continue
        trained, original = conversion["end_to_end"], conversion["layers_alone"]["perplexity"]["source"]
        name = f"{cache(conversion)}, {stage(conversion, result['conversions']).removeprefix('+ ')}"
        colour = f"C{len(ends)}"
        for axes, key, unit in ((left, "divergence", 1.0), (right, "perplexity", original)):
            points = [(entry["step"], entry[key] / unit) for entry in trained["history"] if key in entry]
            tokens = [step * trained["tokens_per_step"] / 1e6 for step, _ in points]
            axes.plot(tokens, [value for _, value in points], color=colour, linewidth=1.3, label=name)
        ends.append((tokens[-1], points[-1][1], name, colour))
    if not ends:
        return None
    left.set(yscale="log", xlabel="million tokens", ylabel="nats per token", title="Divergence from the original, in training")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:.4g}")
    left.yaxis.set_minor_formatter("")
    right.set(xlabel="million tokens", ylabel="perplexity ratio", title="Perplexity on held-back text")
    ratio_scale(right)
    label_ends(right, ends)
    return figure


def frontier(result: dict[str, Any]) -> Figure | None:
    """What each size costs that the first search by ratio in the file looked at."""
    points = next(filter(None, (conversion.get("frontier") for conversion in result["conversions"])), None)
    if points is None:
        return None
    points = [point for point in points if point["predicted_ratio"] < LARGEST_RATIO or point["measured_ratio"] is not None]
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    measured = [point for point in points if point["measured_ratio"] is not None]
    for shown, key, marks, colour in ((points, "predicted_ratio", "o--", ORANGE), (measured, "measured_ratio", "s", TEAL)):
        places, ratios = [100 * point["kv_ratio"] for point in shown], [point[key] for point in shown]
        axes.plot(places, ratios, marks, color=colour, markersize=6, linewidth=1, label=key)
    for place, point in enumerate(points):  # the curve falls, so there is room above it to the right and below it to the left
        name = cache(point) + ("" if place else ", predicted")
        at = (100 * point["kv_ratio"], max(point["predicted_ratio"], point["measured_ratio"] or 0))
        axes.annotate(name, at, (5, 5), textcoords="offset points", color=GREY if place else ORANGE)
    for point in measured:
        at = (100 * point["kv_ratio"], min(point["predicted_ratio"], point["measured_ratio"]))
        name = f"measured x {point['measured_ratio']:.3f}"
        axes.annotate(name, at, (-5, -5), textcoords="offset points", ha="right", va="top", color=TEAL)
    axes.margins(0.12)
    axes.set(xlabel="cache, % of the original's", ylabel="perplexity ratio", title="What a smaller cache costs")
    ratio_scale(axes)
    return figure


def native_model(result: dict[str, Any]) -> Figure | None:
    """Milliseconds a token against context, of the model and batch that were measured at most contexts: the library's and ours."""
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row.get("speedup"):
            lines.setdefault((row["model"], row["batch"]), []).append(row)
    (model, batch), rows = max(lines.items(), key=lambda line: len(line[1]), default=(("", 0), []))
    if len(rows) < 2:
        return None
    rows.sort(key=lambda row: row["context"])
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    contexts, ends = [row["context"] for row in rows], []
    for attention, colour in (("sdpa", ORANGE), ("hf_mla", TEAL)):
        values = [row["milliseconds_per_token"][attention] for row in rows]
        axes.plot(contexts, values, "o-", color=colour, markersize=4, linewidth=1.3, label=attention)
        ends.append((contexts[-1], values[-1], attention, colour))
    for row in rows:
        at = (row["context"], row["milliseconds_per_token"]["sdpa"])
        axes.annotate(f"x {row['speedup']:.3g}", at, (-5, 5), textcoords="offset points", ha="right")
    axes.margins(x=0.1)
    axes.set(xscale="log", yscale="log", xlabel=f"tokens of context, of {batch} sequences each", ylabel="milliseconds a token")
    axes.set(title=f"A {model} of 8B width, {result['machine']['device']}")
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylim(bottom=min(row["milliseconds_per_token"]["hf_mla"] for row in rows) / 2)
    label_ends(axes, ends)
    return figure


def decoding(result: dict[str, Any]) -> Figure:
    """What `hf-mla bench --json` printed: bytes of the caches, and milliseconds a token, against the context."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    held, time = figure.subplots(1, 2)
    names = {"source": ("original", ORANGE), "converted": ("converted", TEAL)}
    contexts = [row["context"] for row in result["contexts"]]
    for axes, values, unit in (
        (held, {side: [row["cache_bytes"][side] / 2**30 for row in result["contexts"]] for side in names}, "GiB"),
        (time, {side: [row["decode_ms_per_token"][side] for row in result["contexts"]] for side in names}, "milliseconds"),
    ):
        ends = []
        for side, (name, colour) in names.items():
            axes.plot(contexts, values[side], "o-", color=colour, markersize=4, linewidth=1.6, label=name)
            ends.append((contexts[-1], values[side][-1], f"{values[side][-1]:.3g}", colour))
        axes.set(xlabel=f"tokens of context, of {result['batch']} sequences each", ylabel=unit, xlim=(0, contexts[-1]))
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(FixedLocator(contexts))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        label_ends(axes, ends)
    held.set_title("KV cache")
    time.set_title("Time of a token")
    held.legend(frameon=False, loc="upper left")
    where = machine({key: result[key] for key in ("device", "torch", "transformers")})
    figure.supxlabel(f"width of Llama-3-8B, 8 layers, random weights; {result['dtype']}, {where}", fontsize=8)
    return figure


def ratio_scale(axes: Any) -> None:
    """A logarithmic scale of what a perplexity ratio has above 1."""
    axes.set_yscale("function", functions=(lambda ratio: np.log(np.maximum(ratio - 1, 1e-3)), lambda height: 1 + np.exp(height)))
    axes.yaxis.set_major_locator(FixedLocator([1 + excess * scale for scale in (0.001, 0.01, 0.1, 1, 10) for excess in (1, 2, 5)]))
    axes.yaxis.set_major_formatter("x {x:.4g}")


def label_ends(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Name lines at the right edge, by their last points (x, y, name, colour), apart from each other."""
    axes.figure.draw_without_rendering()  # axes have their limits then
    heights = []
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        height = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]
        heights.append(max(height, heights[-1] + 0.06) if heights else height)
        axes.annotate(
            name, (x, y), (1.03, heights[-1]), "data", "axes fraction", color=colour, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.4},
        )  # fmt: skip


def draw_all(results: Path, folder: Path) -> None:
    """Write all pictures of a folder of results, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for file, drawings in DRAWINGS.items():
            path = results / f"{file}.json"
            result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            for draw in drawings if result is not None else ():
                figure = draw(result)
                if figure is not None:
                    figure.savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})


DRAWINGS = {"real_model": (layer_errors, training_curve, frontier), "native_model": (native_model,), "bench": (decoding,)}

if __name__ == "__main__":
    draw_all(RESULTS, PICTURES)
