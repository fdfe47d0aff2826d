"""Writes the figures in the pages of docs/ from the results of benchmarks.

python benchmarks/pages.py

What stands in a page between `<!-- figures: NAME -->` and `<!-- end figures -->` is what the function NAME here makes of
results/NAME.json (of results/real_model.json for `tasks`), or "not measured yet" where there is no such file; `scale_page.py` has
the blocks of docs/scale.md. Each file names its machine. A median comes with its `spread`, two numbers that it lies between:
{"kernel": 0.2, ...} with {"kernel": [0.19, 0.22], ...}. What could not be measured is null or absent.
"""

import json
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end figures -->)", re.DOTALL)


def decode_kernel(result: dict[str, Any]) -> str:
    """Attention of one layer at one step: the kernel beside its alternatives and the time that reading the cache takes."""
    header = ["batch x context", "heads", "latent", "at copy speed", "kernel", "share of copy speed", "with a mask", "of int8"]
    header += ["GQA, flash", "GQA, heads as tokens", "torch on the latent", "re-expansion"]
    rows = []
    for row in result["rows"]:
        names = ("kernel", "masked", "int8", "gqa_flash", "gqa_packed", "torch", "reexpansion")
        kernel, *others = (cell(row, "milliseconds", name) for name in names)
        share = f"{row['floor'] / row['milliseconds']['kernel']:.0%}"
        rows.append([size(row), row["heads"], row["latent"], number(row["floor"]), kernel, share, *others])
    copies = f"which copies {result['copy_terabytes_per_second']:.2f} TB/s"
    return f"Milliseconds (and their spread), {machine(result['machine'])}, {copies}:\n\n{table(header, rows)}"


def whole_model(result: dict[str, Any]) -> str:
    """A step of `generate` with a whole model, and the largest batch that fits."""
    names = {"converted": "converted", "gqa": "GQA", "deepseek_v3": "DeepSeek-V3"}
    header = ["batch x context", *names.values(), "converted to GQA", "to DeepSeek-V3"]
    rows = []
    for row in sorted(result["rows"], key=lambda row: (row["batch"], row["context"])):
        times = row["milliseconds_per_token"]
        ours, others = times.get("converted"), (times.get(name) for name in ("gqa", "deepseek_v3"))
        ratios = [f"x {other / ours:.2f}" if ours and other else "-" for other in others]
        rows.append([size(row), *(cell(row, "milliseconds_per_token", name) for name in names), *ratios])
    text = f"Milliseconds a token (and their spread), ratios of tokens per second, {machine(result['machine'])}:\n\n"
    largest = result["largest_batch_at_32k"]
    batches = ", ".join(f"{title} {largest.get(name) or '-'}" for name, title in names.items())
    return f"{text}{table(header, rows)}\n\nLargest batch that fits at 32k tokens: {batches}."


def native_model(result: dict[str, Any]) -> str:
    """A step of the library's own MLA models, as the library runs them and over their latents."""
    titles = {"deepseek_v3": "DeepSeek-V3 of the width of an 8B model, 8 layers, 32 heads", "heads_128": "4 layers of 128 heads"}
    rows = []
    for row in (row for row in result["rows"] if "milliseconds_per_token" in row):
        times = (cell(row, "milliseconds_per_token", name) for name in ("sdpa", "hf_mla"))
        differences = [f"{row['difference'][name]:.3f}" if "difference" in row else "-" for name in ("hf_mla", "eager")]
        rows.append([titles.get(row["model"], row["model"]), size(row), *times, f"x {row['speedup']:.2f}", *differences])
    header = ["model, random weights", "batch x context", "sdpa", "hf_mla", "ratio", "logits differ by", "eager's by"]
    return f"Milliseconds a token (and their spread), {machine(result['machine'])}:\n\n{table(header, rows)}"


def bench(result: dict[str, Any]) -> str:
    """What `hf-mla bench --json` printed."""
    header = ["context", "source, ms a token", "converted", "tokens per second", "cache"]
    rows = []
    for row in result["contexts"]:
        times = (f"{row['decode_ms_per_token'][side]:.3f} (+- {row['spread'][side] / 2:.1%})" for side in ("source", "converted"))
        rows.append([f"{row['context']:,}", *times, f"x {row['speedup']:.2f}", f"x {row['cache_ratio']:.3f}"])
    where = machine({key: result[key] for key in ("device", "torch", "transformers")})
    return f"Batch {result['batch']}, {result['dtype']}, {where}:\n\n{table(header, rows)}"


def real_model(result: dict[str, Any]) -> str:
    """What conversions of a real model cost, by perplexity and by the mean of the tasks."""
    first, *_ = conversions = result["conversions"]
    places = [("books", 1024), ("wikitext-2", 1024), ("own text", 1024), ("books", 8192), ("wikitext-2", 8192)]
    titles = [text if window == 1024 else f"{text}, {window:,}" for text, window in places]
    originals = {(text["text"], text["window"]): text["perplexity"]["source"] for text in first["texts"]}
    header = ["latent + rotary key", "cache", "stage", *titles, "tasks, mean accuracy", "seconds"]
    rows = []
    for conversion in sorted(conversions, key=lambda made: (-made["kv_ratio"], made["heal_tokens"], made["seed"])):
        ratios = {(text["text"], text["window"]): f"x {text['perplexity_ratio']:.3f}" for text in conversion["texts"]}
        means = conversion.get("task_means")
        scores = f"{percent(means['source'])} -> {percent(means['converted'])} (+- {percent(means['error'])})" if means else "-"
        seconds = "-" if conversion["seconds"] is None else f"{conversion['seconds']:,.0f}"
        costs = [*(ratios.get(place, "-") for place in places), scores, seconds]
        ratio = conversion["kv_ratio"]
        rows.append(
            [
                f"{cache(conversion)} of {conversion['kv_floats_per_token_per_layer']['source']}",
                f"-{100 * (1 - ratio):.4g} %",
                stage(conversion, conversions),
                *costs,
            ]
        )
    tokens = f"{first['texts'][0]['tokens']:,} tokens each, {result['device']}"
    perplexities = ", ".join(
        f"{title} {originals[place]:.2f}" for title, place in zip(titles, places, strict=True) if place in originals
    )
    return f"Ratios to the original's perplexity ({perplexities}), {tokens}:\n\n{table(header, rows)}"


def tasks(result: dict[str, Any]) -> str:
    """What the first conversion of a real model costs by each task."""
    first, *_ = conversions = result["conversions"]
    rows = []
    for task, score in first["tasks"].items():
        change = f"{100 * (score['converted'] - score['source']):+.2f} (+- {percent(score['error'])})"
        scores = (percent(score[side]) for side in ("source", "converted"))
        rows.append([task, score["kind"], f"{score['questions']:,}", *scores, change])
    if not rows:
        return "not measured yet"
    header = ["task", "kind", "questions", "original", "converted", "difference (and its standard error)"]
    return f"Accuracy in percent, {cache(first)}, {stage(first, conversions)}, {result['device']}:\n\n{table(header, rows)}"


def long_context(result: dict[str, Any]) -> str:
    """Loss by position, numbers found in texts, and short tasks, of a model and conversions of it."""
    losses, found, answers = [], [], []
    source, *_ = models = result["models"]
    tasks = [*source["trained"]["tasks"]]
    for model in models:
        name = "original" if model is source else f"{cache(model)}, sequences of {model['calibration_window']:,}"
        answers.append([name, *(f"{model['trained']['tasks'][task]:.0%}" for task in tasks)])
        for way in ("trained", "yarn"):
            entry = model[way]
            title = name + (", YaRN" if way == "yarn" else "")
            if model is not source:
                losses.append([title, f"{entry['window']:,}", *(f"{part['ratio']:.3f}" for part in entry["positions"])])
            for length, shares in entry["needles"].items():
                *before, last = shares.values()
                found.append([title, f"{int(length):,}", f"{100 * sum(before) / len(before):.0f} %", f"{100 * last:.0f} %"])
    eighths = [f"{place + 1}/8" for place in range(len(source["trained"]["positions"]))]
    questions = f"{result['questions']} questions at each length and depth"
    return "\n\n".join(
        [
            f"Ratio to the original's perplexity on books by position in the sequence, {result['device']}:",
            table(["latent + rotary key, calibrated on", "tokens", *eighths], losses),
            f"Numbers found, {questions}, the mean over the first four of five depths, and right before the question:",
            table(["latent + rotary key, calibrated on", "tokens", "found", "at the end"], found),
            f"Exact answers, {result['task_questions']} of each task:",
            table(["latent + rotary key, calibrated on", *tasks], answers),
        ]
    )


def lookups(result: dict[str, Any]) -> str:
    """Numbers found and short tasks of conversions that were calibrated on several kinds of text, by their names."""
    source, *_ = models = result["models"]
    lengths, tasks = [*source["trained"]["needles"]], [*source["trained"]["tasks"]]
    rows = []
    for model in models:
        entry = model["trained"]
        sizes = [model["name"]] if model is source else [f"{cache(model)}, {model['name']}"]
        means = [sum([*entry["needles"][length].values()][:-1]) / (len(result["depths"]) - 1) for length in lengths]
        first, *_, last = (f"x {part['ratio']:.3f}" for part in entry["positions"])
        shares = [f"{share:.0%}" for share in (*means, *(entry["tasks"][task] for task in tasks))]
        rows.append([*sizes, *shares, *(("-", "-") if model is source else (first, last))])
    header = ["latent + rotary key", *(f"{int(length):,}" for length in lengths), *tasks, "books, 1/8", "8/8"]
    questions = f"{result['questions']} questions at each length and depth, {result['task_questions']} of each task"
    return f"{questions}, {result['device']}:\n\n{table(header, rows)}"


def training(result: dict[str, Any]) -> str:
    """Tokens per second in training and in reading a prompt."""
    rows = []
    for row in result["rows"]:
        what = ", checkpointing" if row.get("gradient_checkpointing") else ""
        rates = (f"{row['tokens_per_second'][name]:,.0f}" for name in ("gqa", "converted"))
        least, greatest = row["ratio_spread"]
        ratio = f"x {row['ratio']:.3f} ({least:.3f} to {greatest:.3f})"
        rows.append([row["what"] + what, f"{row['batch']} x {row['tokens']}", *rates, ratio])
    header = ["", "batch x tokens", "GQA, tokens per second", "converted", "ratio (and its spread)"]
    return f"{result['layers']} layers, {machine(result['machine'])}:\n\n{table(header, rows)}"


def machine(facts: dict[str, Any]) -> str:
    """A machine in words: its device, then names and versions."""
    return ", ".join([facts["device"], *(f"{name} {version}" for name, version in facts.items() if name != "device")])


def cache(conversion: dict[str, Any]) -> str:
    """The numbers that a conversion caches, of the latent and of the rotary key."""
    return f"{conversion['kv_lora_rank']} + {conversion['qk_rope_head_dim']}"


def stage(conversion: dict[str, Any], conversions: list[dict[str, Any]]) -> str:
    """How far a conversion went, with its seed where others differ from it in that alone."""
    tokens = conversion["heal_tokens"]
    same = operator.itemgetter("kv_lora_rank", "qk_rope_head_dim", "heal_tokens", "calibration")
    alike = [other for other in conversions if same(other) == same(conversion)]
    seed = f", seed {conversion['seed']}" if len({other["seed"] for other in alike}) > 1 else ""
    lookups_too = ", with lookups" if "lookups" in conversion["calibration"] else ""
    return (f"+ {tokens / 1e6:.3g} M tokens" if tokens else "layers alone") + lookups_too + seed


def percent(share: float) -> str:
    """A share in percent, without the sign."""
    return f"{100 * share:.2f}"


def size(row: dict[str, Any]) -> str:
    """Batch and context."""
    return f"{row['batch']} x {row['context']}"


def number(value: float) -> str:
    """Milliseconds, to three digits or three decimals."""
    return f"{value:.3f}" if value < 1 else f"{value:.3g}"


def cell(row: dict[str, Any], key: str, name: str) -> str:
    """A median with what it varied between."""
    if row[key].get(name) is None:
        return "-"
    least, greatest = row["spread"][name]
    return f"{number(row[key][name])} ({number(least)} to {number(greatest)})"


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [header, ["---"] * len(header), *rows])


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "bench": bench,
    "decode_kernel": decode_kernel,
    "gemma": real_model,
    "long_context": long_context,
    "lookups": lookups,
    "native_model": native_model,
    "real_model": real_model,
    "tasks": tasks,
    "training": training,
    "whole_model": whole_model,
}


FILES = {"tasks": "real_model"}  # where it is not the block's name


def with_figures(text: str, results: Path) -> str:
    """A page as it should be.

    Args:
        text: the page as it is.
        results: the folder of the JSON files.

    Returns:
        The text with all blocks of this script written anew.
    """

    def write(block: re.Match[str]) -> str:
        begin, name, end = block.groups()
        if name not in BLOCKS:
            return block[0]
        file = results / f"{FILES.get(name, name)}.json"
        figures = BLOCKS[name](json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else "not measured yet"
        return f"{begin}{figures}\n{end}"

    return BLOCK.sub(write, text)


if __name__ == "__main__":
    for page in DOCS.glob("*.md"):
        page.write_text(with_figures(page.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
