# SPDX-License-Identifier: Apache-2.0
"""Pictures: of a conversion (`info --plot`), from what its conversion.json holds, and of a benchmark (`bench --plot`).

matplotlib is an optional extra.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, brief
from ..source.checkpoint import user_path


FORMATS = (".png", ".svg", ".pdf")
LEAST_SHARE = 1e-7  # of the energy; what lies below is rounding, and would take up most of a logarithmic axis


def check_plot(plot: str) -> None:
    """Raise a UserError if nothing can draw a picture, or it could not be written."""
    check_file("--plot", plot, FORMATS)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError('--plot needs matplotlib, which is not installed: pip install "hf-mla[plot]"') from None


def check_file(option: str, given: str, suffixes: Sequence[str]) -> None:
    """Raise a UserError if the name that an option gives to a file has none of the suffixes, or it could not be written."""
    path = user_path(given)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {given}: the name must end in one of {', '.join(suffixes)}")
    try:
        was_there = path.exists()
        open(path, "ab").close()
        if not was_there:
            path.unlink()
    except OSError as error:
        raise UserError(f"{option} {given} cannot be written: {error.strerror}") from None


def write_file(option: str, given: str, write: Callable[[Path], Any]) -> None:
    """Have the file of an option written as a whole, or raise a UserError and leave what was there."""
    path = user_path(given)
    partial = path.with_name(f".{path.name}")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{option} {given} cannot be written: {error.strerror}") from None


def save_figure(figure: Any, plot: str) -> None:
    """Write a matplotlib figure; see `write_file`."""
    write_file("--plot", plot, lambda path: figure.savefig(path, format=path.suffix[1:].lower()))


def plot_conversion(record: Path, name: str, plot: str) -> None:
    """Draw the spectra of all layers and their errors, in closed form and reconstructed.

    Args:
        record: the conversion.json of a converted checkpoint.
        name: of the checkpoint, for the title.
        plot: file to write; its suffix says the format.

    Raises:
        UserError: there is no such record, it is damaged, or the file cannot be written.
    """
    if not record.is_file():
        raise UserError(f"{name} has no {record.name}; only the folder that `hf-mla convert` wrote can be drawn")
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        figure = draw(content["spectra"], content["report"], name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}/{record.name} cannot be drawn, it is damaged: {brief(repr(error))}") from None
    save_figure(figure, plot)


def layer_errors(report: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Each layer's number and the error of its attention output, from a stored report; of the fit only if all were fitted."""
    keys = {"closed form": "error_closed_form", "reconstructed": "error_reconstructed"}
    found = {label: [(layer["layer"], layer[key]) for layer in report["layers"]] for label, key in keys.items()}
    return {label: errors for label, errors in found.items() if all(error is not None for _, error in errors)}


def draw(spectra: list[list[float]], report: dict[str, Any], name: str) -> Any:
    """The figure: spectra on the left, errors beside them, and where a size was looked for, what each costs.

    Args:
        spectra: of each layer, the share of energy in each direction, descending.
        report: of the conversion, as it is stored.
        name: the title.

    Returns:
        A matplotlib figure, which belongs to no window and no global state.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    frontier = report.get("frontier", [])
    figure = Figure(figsize=(16.5 if frontier else 11, 4.2), dpi=150, layout="constrained")
    left, right, *more = figure.subplots(1, 3 if frontier else 2)
    figure.suptitle(name, parse_math=False)

    last, colours = max(1, len(spectra) - 1), colormaps["viridis"]
    for layer, spectrum in enumerate(spectra):
        left.plot(range(1, len(spectrum) + 1), spectrum, color=colours(layer / last), linewidth=1)
    left.axvline(report["kv_lora_rank"], color="black", linestyle="--", linewidth=1)
    left.annotate(
        f" kv_lora_rank {report['kv_lora_rank']}", (report["kv_lora_rank"], 1), (0, -12), ("data", "axes fraction"), "offset points"
    )
    figure.colorbar(ScalarMappable(Normalize(0, last), colours), ax=left, label="layer", ticks=MaxNLocator(integer=True))
    left.set(yscale="log", xlabel="direction", ylabel="share of energy", title="What the latent keeps: left of the line")
    left.set_ylim(bottom=max(LEAST_SHARE, left.get_ylim()[0]))

    for label, errors in layer_errors(report).items():
        right.plot(*zip(*errors, strict=True), marker="o", markersize=4, label=label)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(xlabel="layer", ylabel="relative squared error", title="Error of the attention output, on held-back text")
    right.set_ylim(bottom=0)
    right.legend()
    for axes in more:
        draw_frontier(axes, frontier, report["kv_ratio"])
    return figure


def draw_frontier(axes: Any, frontier: list[dict[str, Any]], chosen: float) -> None:
    """What each size of a search costs in perplexity, against its cache.

    Args:
        axes: where to draw.
        frontier: the sizes, as `ConvertReport.frontier` has them.
        chosen: share of the source's cache that was taken.
    """
    from matplotlib.ticker import MaxNLocator, NullLocator

    caches = [point["kv_ratio"] for point in frontier]
    known = [point["measured_ratio"] or point["predicted_ratio"] for point in frontier]
    measured = [(point["kv_ratio"], point["measured_ratio"]) for point in frontier if point["measured_ratio"]]
    axes.plot(caches, known, "o--", markersize=4, label="predicted")
    axes.plot(*zip(*measured, strict=True), "s", markersize=7, label="measured")
    axes.axvline(chosen, color="black", linestyle="--", linewidth=1)
    axes.set(yscale="log", xlabel="share of the source's cache", ylabel="perplexity ratio", title="What a cache costs")
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.legend()


def draw_bench(report: Any) -> Any:
    """The figure of a benchmark: tokens per second on the left, bytes of the caches on the right, against the context.

    Args:
        report: a `BenchReport`.

    Returns:
        As `draw`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    title = f"{report.device}, {report.dtype}, batch {report.batch}, {report.cache} cache"
    figure.suptitle(title, parse_math=False)
    contexts = [context.context for context in report.contexts]
    for side in ("source", "converted"):
        rates = [getattr(context.decode_tokens_per_second, side) for context in report.contexts]
        held = [getattr(context.cache_bytes, side) / 1e6 for context in report.contexts]
        for axes, values in ((left, rates), (right, held)):
            axes.plot(contexts, values, marker="o", markersize=4, label=report.names[side])
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("context")
        axes.set_ylim(bottom=0)
        axes.legend()
    left.set(ylabel="tokens per second", title="Decoding")
    right.set(ylabel="MB", title="Cache")
    return figure
