"""Writes the figures in docs/scale.md from results/scale.json and results/fits.json.

python benchmarks/scale_page.py

As `pages.py` does with other pages: between `<!-- figures: NAME -->` and `<!-- end figures -->` stands what the function NAME here
makes of the results. What was not run is not in a table; what was not measured is a dash.
"""

import json
import re
from pathlib import Path
from typing import Any

from pages import BLOCK, RESULTS, machine, table


PAGE = Path(__file__).parent.parent / "docs" / "scale.md"


def place(report: dict[str, Any], name: str) -> str:
    """The machine that a result is of, where `machines` has its name; else that of all others."""
    return machine(report.get("machines", {}).get(name, report["machine"]))


def by_machine(tables: dict[str, list], header: list[str]) -> str:
    """Tables under the names of their machines."""
    return "\n\n".join(f"{where}:\n\n{table(header, rows)}" for where, rows in tables.items()) or "not measured yet"


def convert(report: dict[str, Any]) -> str:
    """Conversions by one and by several processes, and one that was killed."""
    results, rows = report["results"], []
    compared = results.get("convert-compared", {})
    computed = compared.get("seconds_of_32_layers_computed", {})
    titles = {"convert-1": "1", "convert-n": "{}", "convert-killed-and-resumed": "{}, one killed, then again"}
    for name, title in titles.items():
        if (found := results.get(name)) is not None:
            if ended := found.get("ended_after_layers"):
                title += f", ended after {ended} layers"
            stages = (seconds(found.get(f"seconds_{stage}")) for stage in ("before", "survey", "layers", "after"))
            whole = seconds(computed.get(name.removeprefix("convert-")))
            memory = gigabytes(max(found["peak_gpu"])), gigabytes(found["peak_host"])
            rows.append([title.format(found["processes"]), seconds(found["seconds"]), *stages, whole, *memory])
    if not rows:
        return "not measured yet"
    header = ["GPUs", "seconds", "of them before", "survey", "layers", "after", "32 layers, computed", "GB of a GPU", "of the host"]
    any_of_them = {key: value for name in titles for key, value in results.get(name, {}).items()}
    what = f"{any_of_them['layers']} layers"
    if "steps" in any_of_them:  # of a conversion that went to its end
        what += f", {any_of_them['calibration_tokens']:,} tokens, {any_of_them['steps']} steps a layer"
    text = f"{what}, {machine(report['machine'])}:\n\n{table(header, rows)}\n\n"
    if "speedup_of_32_layers_computed" in compared:
        text += (
            f"With 32 layers, {compared['processes']} are x {compared['speedup_of_32_layers_computed']:.2f} as fast (computed). "
        )
    if "same_bytes" in compared:
        same = "the same" if compared["same_bytes"] else "NOT the same"
        text += f"The bytes of all converted layers, {compared['layers_compared']} compared, are {same}."
    if plan := results.get("plan"):
        counted, seen = gigabytes(plan["with_hidden_states"]), gigabytes(max(plan["measured_gpu"]))
        text += f"\n\n`plan` counts {counted} GB of a GPU, {seen} were seen."
    return text


def heal(report: dict[str, Any]) -> str:
    """Healing on one and on several GPUs; a table for each machine."""
    tables: dict[str, list] = {}
    titles = {"1b": "Llama-3.2-1B", "8b": "Llama-3-8B, 4 layers"}
    for name, found in sorted(report["results"].items()):
        if re.fullmatch(r"heal-\d+b-.*", name):
            compared = report["results"].get(f"compared-{name}", {})
            speedup, loss, zero = compared.get("speedup"), compared.get("loss_differs_by"), found.get("zero")
            tables.setdefault(place(report, name), []).append(
                [
                    titles[found["model"]],
                    found["train"] + (", killed" if "killed" in name else "") + (f", ZeRO-{zero}" if zero else ""),
                    found["processes"],
                    f"{found['tokens_per_second']:,.0f}",
                    "-" if speedup is None else f"x {speedup:.2f}",
                    "-" if loss is None else f"{loss:.2%}",
                    gigabytes(found["peak_in_training"]),
                    gigabytes(found["planned"]["total"]) if found["processes"] == 1 else "-",
                ]
            )
    header = ["model", "trained", "GPUs", "tokens per second", "to one GPU", "loss differs by", "GB of a GPU", "planned"]
    return by_machine(tables, header)


def decode(report: dict[str, Any]) -> str:
    """Decoding by one and by several GPUs; a table for each machine. What a second machine gave is named decode-N-on-MACHINE."""
    tables: dict[str, list] = {}
    for name, found in sorted(report["results"].items()):
        if re.fullmatch(r"decode-(\d+|spread)(-on-.*)?", name):
            if "float32_equal" in found:
                title = "spread by `device_map`" if "spread" in name else f"{found['processes']} x tensor parallel"
                equal = f"{found['float32_equal']} of {found['tokens']}"
            else:
                title, equal = "1", "-"  # what the others are compared with
            beyond = found.get("bfloat16_choices_differ_beyond_rounding", "-")
            times = (f"{found[way]['milliseconds_per_token']:.2f}" if way in found else "-" for way in ("eager", "compiled"))
            tables.setdefault(place(report, name), []).append([title, equal, beyond, *times])
    header = ["GPUs", "equal tokens, float32", "other choices beyond rounding, bfloat16", "ms a token", "compiled"]
    text = by_machine(tables, header)
    if batches := report["results"].get("batching"):
        parts = (
            f"{name} {found['requests_per_second']:.2f} (at first {found['first_time']:.2f})" for name, found in batches.items()
        )
        text += f"\n\nContinuous batching, requests per second ({place(report, 'batching')}): {', '.join(parts)}."
    return text


def serve(report: dict[str, Any]) -> str:
    """Many requests."""
    found = report["results"].get("serve")
    if found is None:
        return "not measured yet"
    refused = sum(not said.startswith("[") for said in found["malformed"].values())
    memory = [found[f"memory_{when}"] for when in ("after_first_tenth", "at_the_end")]
    rows = [
        ["way", found["way"]],
        ["requests; answered of those that were to be", f"{found['requests']:,}; {found['answered']:,} of {found['expected']:,}"],
        ["cancelled; malformed; of these refused, alone", f"{found['cancelled']}; {len(found['malformed'])}; {refused}"],
        ["requests per second", f"{found['requests_per_second']:.1f}"],
        ["MB of the GPU after the first tenth, at the end", ", ".join(f"{entry['device'] / 1e6:,.0f}" for entry in memory)],
        ["MB of the host", ", ".join(f"{entry['host'] / 1e6:,.0f}" for entry in memory)],
    ]
    if "sample" in found:
        sampled = f"{found['equal']} of {found['sample']}; {found['differ_by_rounding']}; {len(found['differ'])}"
        rows.append(["as `generate` alone answers; differ by rounding; otherwise", sampled])
    return table(["", f"one GPU of {machine(report['machine'])}"], rows)


def long(report: dict[str, Any]) -> str:
    """One long sequence."""
    found = report["results"].get("long", [])
    rows = [
        [f"{entry['context']:,}", seconds(entry["prefill_seconds"]), f"{entry['milliseconds_per_token']:.1f}"]
        + [gigabytes(entry["cache_bytes"]), gigabytes(entry["peak"])]
        for entry in found
        if "context" in entry
    ]
    if not rows:
        return "not measured yet"
    header = ["tokens", "prefill, seconds", "then ms a token", "GB of cache", "GB in all"]
    text = f"{place(report, 'long')}:\n\n{table(header, rows)}"
    largest = [entry for entry in found if "largest_context_computed" in entry]
    if largest:
        parts = (f"{entry['largest_context_computed']:,} tokens ({entry['model']})" for entry in largest)
        text += f"\n\nThe largest context beside the weights on this GPU, computed: {', '.join(parts)}."
    return text


def fits(report: dict[str, Any]) -> str:
    """What converting and healing take."""
    rows = []
    for found in report["models"]:
        cache = found["kv_bytes_per_token"]
        row = [found["model"], f"{found['parameters'] / 1e9:.1f}", gigabytes(found["bytes"])]
        row += [f"{cache['source'] / 1024:.0f} -> {cache['converted'] / 1024:.0f}", gigabytes(found["convert_gpu"])]
        row += [gigabytes(found["hidden_states"]), gigabytes(found["convert_cpu"])]
        for what in ("lora", "all"):
            parts = found[f"heal_{what}"]
            shared = parts["student"] + parts["gradients_and_optimizer"]
            each = parts["teacher"] + parts["activations"]
            row.append(f"{gigabytes(each)} + {gigabytes(shared)} / n")
        rows.append(row)
    header = ["model", "10^9 weights", "GB", "cache, KiB a token", "convert: a GPU", "hidden states", "on a CPU"]
    return table([*header, "heal, adapters: each of n GPUs", "heal, all weights"], rows)


BLOCKS = {"convert": convert, "heal": heal, "decode": decode, "serve": serve, "long": long}


def seconds(value: float | None) -> str:
    """Seconds, or a dash."""
    return "-" if value is None else f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def gigabytes(value: float) -> str:
    """GB, or a dash for nothing."""
    return "-" if not value else f"{value / 1e9:,.0f}" if value >= 2e10 else f"{value / 1e9:.2g}"


def with_figures(text: str, results: Path) -> str:
    """The page as it should be.

    Args:
        text: the page as it is.
        results: the folder of the JSON files.

    Returns:
        The text with all blocks written anew.
    """

    def write(block: re.Match[str]) -> str:
        begin, name, end = block.groups()
        file = results / ("fits.json" if name == "fits" else "scale.json")
        if not file.is_file():
            return f"{begin}not measured yet\n{end}"
        report = json.loads(file.read_text(encoding="utf-8"))
        return f"{begin}{fits(report) if name == 'fits' else BLOCKS[name](report)}\n{end}"

    return BLOCK.sub(write, text)


if __name__ == "__main__":
    PAGE.write_text(with_figures(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
