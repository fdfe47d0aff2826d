# SPDX-License-Identifier: Apache-2.0
"""A page that shows a verification (`verify --html`): one file for any browser.

* It asks for nothing elsewhere and runs no code, and says so to the browser (Content-Security-Policy).
* Markup is made by `element` alone, which escapes all text: what models say and paths are called cannot be anything else.
* Pictures are SVG in the colours of the page, which are light or dark as the reader's.
"""

import inspect
import math
import platform
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..mathematics.recall import ANSWER_ROOM
from ..source.checkpoint import RECORD, Checkpoint, read_record
from ..source.families import kv_heads, source_head_dim
from .plotting import layer_errors, write_file
from .progress import versions
from .reports import HEALING_RATIO, AnswerReport, ContextReport, RecallReport, VerifyReport
from .tables import recall_cells, size


PAGES = (".html", ".htm")
WIDTH, HEIGHT = 420, 230  # of a picture
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 40  # margins, which hold the numbers
SAFE = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --page: #fff; --panel: #f4f6f8; --line: #d6dce2; --faint: #5c6670; --text: #1b2026;
  --original: #b4500b; --converted: #137a5c; --before: #6a5acd; --needy: #9a6700; --failed: #c0272d }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --panel: #1d2228; --line: #363e47; --faint: #9aa5b1; --text: #e4e8ec;
  --original: #f0883e; --converted: #3fb68b; --before: #a99cf5; --needy: #d9a72e; --failed: #f4706b } }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25 }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem } h3 { font-size: 1rem; margin: 1.75rem 0 .5rem }
.verdict { border-left: .35rem solid; border-radius: .25rem; padding: .75rem 1rem; background: var(--panel); font-weight: 600 }
.good { border-color: var(--converted) } .needy { border-color: var(--needy) } .failed { border-color: var(--failed) }
.note { color: var(--faint); font-size: .9rem }
.scroll { margin: .75rem 0; overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .3rem clamp(.4rem, 1.2vw, .8rem); border-bottom: 1px solid var(--line); text-align: right }
th, td { vertical-align: baseline }
tbody th { font-weight: 400 } tbody th, td { white-space: nowrap }
th:first-child { padding-left: 0; text-align: left }
.words :is(th, td) { text-align: left; white-space: normal } .words td { overflow-wrap: anywhere }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .75rem 2.5rem }
.pair > * { min-width: 0 }
figure { margin: 0; max-width: 34rem } figcaption { font-size: .9rem } figcaption span { margin-right: 1rem; white-space: nowrap }
svg { display: block; width: 100%; height: auto; margin-top: .25rem; font-size: 12px }
svg text { fill: var(--faint) } svg .grid { stroke: var(--line) } svg polyline { fill: none; stroke-width: 2 }
.original { color: var(--original) } .converted, .reconstructed { color: var(--converted) } .closed-form { color: var(--before) }
polyline, circle { stroke: currentColor; fill: currentColor } polyline:is(.original, .closed-form) { stroke-dasharray: 6 3 }
.said { background: var(--panel); border-radius: .25rem; padding: .6rem .9rem; font-size: .95rem }
.said b { font-size: .85rem } .said p { margin: .25rem 0 0; white-space: pre-wrap }
.said p:empty::after { content: "(nothing)"; color: var(--faint) }
pre { background: var(--panel); border-radius: .25rem; padding: .75rem 1rem; white-space: pre-wrap }
"""


class Markup(str):
    """Text that is HTML already."""


def element(name: str, /, *children: str, **attributes: object) -> Markup:
    """An element; what is no Markup in it is escaped. `class_` is the attribute `class`, `text_anchor` is `text-anchor`."""
    given = "".join(f' {key.strip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    if name in ("meta", "link"):
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Markup:
    """One after the other; what is no Markup is escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def table(head: Sequence[str], *lines: Sequence[str], **attributes: object) -> Markup:
    """A table whose lines begin with their names."""
    body = [element("tr", element("th", line[0], scope="row"), *(element("td", cell) for cell in line[1:])) for line in lines]
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    return element("div", element("table", element("thead", top), element("tbody", *body), **attributes), class_="scroll")


def ticks(most: float, least: float = 0.0) -> list[float]:
    """Round numbers from zero to the first that is as much as `most` or more, at least `least` apart: up to seven, two or more."""
    apart = max(most / 6, least) or 1.0
    power = 10.0 ** math.floor(math.log10(apart))
    step = next(unit * power for unit in (1, 2, 5, 10) if unit * power >= apart)
    return [step * i for i in range(max(1, math.ceil(most / step)) + 1)]


def chart(title: str, across: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    """Lines of points (x, y), both axes from zero; x are whole numbers. STYLE has the colours of the names of lines.

    Args:
        title: what is drawn.
        across: what x counts.
        lines: by name; a point says its values where the pointer rests on it.

    Returns:
        A figure.
    """
    points = [point for line in lines.values() for point in line]
    last = max(1, *(x for x, _ in points))
    heights = ticks(max(y for _, y in points))

    def place(x: float, y: float) -> tuple[str, str]:
        right, up = x / last * (WIDTH - LEFT - RIGHT), y / heights[-1] * (HEIGHT - TOP - BOTTOM)
        return f"{LEFT + right:.1f}", f"{HEIGHT - BOTTOM - up:.1f}"

    drawn = []
    for height in heights:
        _, y = place(0, height)
        drawn.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        drawn.append(element("text", f"{height:,.6g}", x=LEFT - 6, y=y, dy="0.35em", text_anchor="end"))
    for width in ticks(last, 1.0):
        if width <= last:
            x, _ = place(width, 0)
            drawn.append(element("text", f"{width:,.6g}", x=x, y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    drawn.append(element("text", across, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle"))
    names = []
    for name, line in lines.items():
        kind = name.replace(" ", "-")
        places = [place(*point) for point in line]
        drawn.append(element("polyline", points=" ".join(map(",".join, places)), class_=kind))
        for point, (left, top) in zip(line, places, strict=True):
            said = element("title", f"{name}, {across} {point[0]:,.6g}: {point[1]:,.4g}")
            drawn.append(element("circle", said, class_=kind, cx=left, cy=top, r=3))
        names.append(element("span", f"\N{BLACK CIRCLE} {name}", class_=kind))
    picture = element("svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    return element("figure", element("figcaption", element("div", title), *names), picture)


def command_line(function: Callable, given: dict[str, Any]) -> str:
    """The command that calls a function of its name with what it was given, options with their defaults left out."""
    words = ["hf-mla", function.__name__]
    for name, parameter in inspect.signature(function).parameters.items():
        value = given[name]
        if parameter.kind is not parameter.KEYWORD_ONLY:
            words.append(str(value))
        elif value != parameter.default:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else map(str, value) if isinstance(value, (list, tuple)) else [str(value)]
    return shlex.join(words)


def write_page(
    html: str, report: VerifyReport, source: Checkpoint, converted: Checkpoint, *, text: str, device: str, command: str
) -> None:
    """Write the page of a verification.

    Args:
        html: the file, which appears whole or not at all; `check_file` has let it through.
        report: what was measured, the answers among it.
        source: the original.
        converted: what was made of it.
        text: the name of the held-out text.
        device: what the models ran on.
        command: what makes the page.

    Raises:
        UserError: the file cannot be written.
    """
    title = " beside ".join(checkpoint.name.rstrip("/").rsplit("/", 1)[-1] for checkpoint in (converted, source))
    needy = any(context.perplexity_ratio > HEALING_RATIO for context in report.contexts)
    verdict = element("p", report.verdict, class_=f"verdict {'failed' if not report.passed else 'needy' if needy else 'good'}")
    sections = {
        "What was compared": compared(report, source, converted),
        f"Perplexity on {text}": perplexities(report.contexts),
        "Error of each layer": layers(converted),
        "Numbers found in long text, and short tasks": recalled(report.needle),
        "Answers": answered(report.answers),
        "How this was measured": measured(report, device, command),
    }
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=SAFE),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("link", rel="icon", href="data:,"),  # or a browser would ask a server for one
        element("style", Markup(STYLE)),
    )
    shown = [element("section", element("h2", heading), section) for heading, section in sections.items() if section]
    body = element("body", element("h1", title), verdict, *shown)
    page = "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"
    write_file("--html", html, lambda path: path.write_bytes(page.encode("utf-8", "replace")))  # half a character is in some paths


def compared(report: VerifyReport, source: Checkpoint, converted: Checkpoint) -> Markup:
    """The models, and what their caches take."""
    floats = 2 * kv_heads(source.config) * source_head_dim(source.config), converted.config.kv_floats_per_token_per_layer
    held, context = report.kv_bytes_per_token, source.config.max_position_embeddings
    less = element("strong", f"{1 - held.converted / held.source:.1%} less")
    return table(
        ["", "original", "converted"],
        ["checkpoint", source.name, converted.name],
        ["cache, numbers per token and layer", *(f"{count:,}" for count in floats)],
        ["cache, bytes per token, measured", f"{held.source:,}", joined([f"{held.converted:,}, ", less])],
        [f"cache of {context:,} tokens, the whole context", size(context * held.source), size(context * held.converted)],
        class_="words",
    )


def perplexities(contexts: list[ContextReport]) -> Markup:
    """Both models on sequences of each length, as a whole and by position."""
    names = ["tokens in a sequence", "original", "converted", "ratio", "KL divergence, nats", "same likeliest token", "on tokens"]
    whole = [[f"{x.window:,}", *both(x), f"{x.kl:.4f}", f"{x.top1_agreement:.1%}", f"{x.tokens:,}"] for x in contexts]
    return joined([table(*zip(names, *whole, strict=True)), *map(by_position, contexts)])


def by_position(report: ContextReport) -> Markup:
    """Both models along the sequences of a length, as a picture and as a table."""
    lines = {
        name: [((part.start + part.end) // 2, getattr(part.perplexity, side)) for part in report.positions]
        for name, side in (("original", "source"), ("converted", "converted"))
    }
    told = [[f"{part.start:,} to {part.end - 1:,}", *both(part)] for part in report.positions]
    title = f"Perplexity by position in sequences of {report.window:,} tokens"
    return pair(chart(title, "position", lines), table(["positions", "original", "converted", "ratio"], *told))


def both(report: Any) -> list[str]:
    """Perplexities and their ratio."""
    return [f"{report.perplexity.source:.3f}", f"{report.perplexity.converted:.3f}", f"x {report.perplexity_ratio:.4f}"]


def pair(*sides: Markup) -> Markup:
    """Two things beside each other, or in a narrow window one above the other."""
    return element("div", *sides, class_="pair")


def layers(converted: Checkpoint) -> Markup:
    """What the conversion measured of each layer, if its record says so."""
    assert converted.folder is not None
    record = read_record(converted.folder)
    try:
        errors = layer_errors(record["report"])
        trained = record["report"].get("end_to_end") or record.get("healing")
        picture = chart("Relative squared error of the attention output, on held-back text", "layer", errors)
    except (KeyError, TypeError, ValueError):
        return element("p", f"{converted.name} has no {RECORD} that says how well each layer was converted.", class_="note")
    return joined([picture, element("p", "Before the whole model was trained.", class_="note")]) if trained else picture


def recalled(report: RecallReport | None) -> Markup:
    """What both models found and completed, as shares; nothing if they were not asked."""
    if report is None:
        return Markup()
    needles, tasks = (table(*cells) for cells in recall_cells(report))
    counts = [
        f"{count:,} at {length:,} tokens" for length, count in {each.length: each.questions for each in report.needles}.items()
    ]
    counts += [f"{each.questions:,} of {each.task}" for each in report.tasks]
    return joined([needles, tasks, element("p", f"Original -> converted. Questions: {', '.join(counts)}.", class_="note")])


def answered(answers: list[AnswerReport]) -> Markup:
    """What both models said, side by side."""
    same = sum(each.source == each.converted for each in answers)
    note = f"Greedy, up to {ANSWER_ROOM} tokens, unedited; {same} of {len(answers)} are the same to the letter."
    note += " Models without a chat template go on with the words as with any text."
    shown = [element("p", note, class_="note")]
    for each in answers:
        sides = {"original": each.source, "converted": each.converted}
        said = [joined([element("b", name, class_=name), element("p", text, dir="auto")]) for name, text in sides.items()]
        shown += [element("h3", each.prompt), pair(*(element("div", words, class_="said") for words in said))]
    return joined(shown)


def measured(report: VerifyReport, device: str, command: str) -> Markup:
    """Where the figures come from."""
    with_what = versions() | {"python": platform.python_version()}
    facts = [("device", device), ("computed and cached in", report.dtype), *with_what.items()]
    decoding = f"{report.absorbed_vs_expanded_max_error:.1e}, largest difference of logits"
    lines = [*facts, ("token-by-token decoding beside the prompt pass", decoding)]
    return joined([table(["", ""], *lines, class_="words"), element("pre", command)])
