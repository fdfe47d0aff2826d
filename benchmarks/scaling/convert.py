"""Conversions by one and by several processes, one of which is killed in the middle; and what `hf-mla plan` says of them."""

import hashlib
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .runs import CONVERT, ROOT, Runs


SOURCE = "llama-8b-to-convert"


def make_llama(runs: Runs, name: str, layers: int, folder: str) -> Callable[[list[int]], Any]:
    """Write a model of random weights."""
    words = ["make-llama", name, str(runs.work / folder), "--layers", str(layers)]
    return lambda gpus: runs.task(f"make {folder}", gpus, 90, words)[0]


def command(runs: Runs, source: str, out: str, processes: int, *more: str) -> list[str]:
    """The command that converts."""
    options = ["--kv-lora-rank", "24", "--qk-rope-head-dim", "8"] if runs.tiny else ["--kv-lora-rank", "512"]
    options += [] if runs.tiny else ["--qk-rope-head-dim", "32" if source == "llama-1b" else "64"]
    options += ["--calibration", str(runs.work / "books.txt"), "--heal-tokens", "0", "--json", *more]
    if runs.tiny:
        options += ["--calibration-tokens", "16384", "--window", "128", "--device", "cpu"]
    steps = runs.arguments.steps or (100 if runs.tiny else None)
    if steps is not None and "--steps" not in more:
        options += ["--steps", str(steps)]
    return [*runs.launch(processes), *CONVERT, str(runs.work / source), str(runs.work / out), *options]


def converted(runs: Runs, out: str, processes: int, *, kill: bool = False) -> Callable[[list[int]], Any]:
    """Convert the 8B layers.

    With `kill`, a process is killed when half of the layers are done, and the same command goes on.
    """

    def measure(gpus: list[int]) -> dict[str, Any]:
        runs.has(SOURCE)
        words = command(runs, SOURCE, out, processes)
        watched = runs.work / f".{out}.incomplete"
        found: dict[str, Any] = {"processes": processes, "layers": runs.arguments.layers}
        half = max(1, runs.arguments.layers // 2)

        def layers(marks: dict[str, float]) -> int:
            return sum("layer-" in mark for mark in marks)

        if kill:
            first = runs.run(f"{out}-killed", words, gpus, 200, watched=watched, kill=lambda marks: layers(marks) >= half)
            found |= {"killed_after": first.killed, "exit_code": first.code, "seconds_until_it_ended": first.seconds}
            found["layers_kept"] = len([*watched.rglob("layer-*.safetensors")])
            found["output_there"] = (runs.work / out).exists()
        ran = runs.run(out, words, gpus, 140 + 20 * runs.arguments.layers, watched=watched)
        times, report = stages(ran.marks, ran.seconds, processes), ran.report
        found |= {"seconds": ran.seconds, **({} if kill else times), "peak_gpu": ran.peak_gpu, "peak_host": ran.peak_host}
        found |= {"calibration_tokens": report["calibration_tokens"], "steps": report["steps"]}
        # 0: the closed form was kept, after two tries to better it where there is usually one.
        found["steps_kept"] = [layer["steps_kept"] for layer in report["layers"]]
        found["sha256"] = digests(runs.work / out)
        return found

    return measure


def compare(runs: Runs) -> None:
    """What the conversions show together."""
    made = {name: runs.results[name] for name in ("convert-1", "convert-n", "convert-killed-and-resumed") if name in runs.results}
    one, several = made.get("convert-1"), made.get("convert-n")
    found = dict[str, Any]()
    if len(made) > 1:
        first, *others = (entry["sha256"] for entry in made.values())
        found |= {"of": list(made), "layers_compared": len(first), "same_bytes": all(other == first for other in others)}
    if several:
        found["processes"] = several["processes"]
    # Of one turn, all of it in which steps are compiled, nothing is known of others.
    known = {"1": one, "n": several}
    times = {name: computed(entry) for name, entry in known.items() if entry and entry["layers"] > entry["processes"]}
    if len(times) == 2:
        found["speedup_of_32_layers_computed"] = times["1"] / times["n"]
    if made:
        runs.keep("convert-compared", found | {"seconds_of_32_layers_computed": times})


def closed_form(runs: Runs, source: str, out: str) -> Callable[[list[int]], Any]:
    """A conversion to heal."""

    def measure(gpus: list[int]) -> dict[str, Any]:
        runs.has(source)
        tokens = () if runs.tiny else ("--calibration-tokens", "16384")
        ran = runs.run(f"make-{out}", command(runs, source, out, 1, "--steps", "0", *tokens), gpus, 150)
        return {"seconds": ran.seconds}

    return measure


def planned(runs: Runs, gpus: list[int]) -> Any:
    """What `hf-mla plan` says of the source, and what was measured."""
    runs.has(SOURCE)
    one = runs.results.get("convert-1", {})
    words = ["plan", str(runs.work / SOURCE), str(one.get("calibration_tokens", 2097152))]
    (found,) = runs.task("plan", gpus, 60, words)
    return found | {"measured_gpu": one.get("peak_gpu", [0]), "measured_host": one.get("peak_host", 0)}


def write_books(path: Path, characters: int) -> None:
    """So much of the bundled texts, their paragraphs in another order: of 7.9 million characters, 2.3 million tokens as bundled."""
    import lzma

    paragraphs = []
    for name in ("calibration", "prose"):
        with lzma.open(ROOT / "conversion" / "bundled" / f"{name}.txt.xz", "rt", encoding="utf-8") as file:
            paragraphs += file.read().split("\n\n")
    random.Random(0).shuffle(paragraphs)
    path.write_text("\n\n".join(paragraphs)[:characters], encoding="utf-8")


def stages(marks: dict[str, float], seconds: float, processes: int) -> dict[str, float]:
    """Seconds of the stages of a conversion, by when the files of its unfinished work appeared.

    `first_turn`, of the layers, is until each process has converted one: what compiles, compiles there.
    """
    layers = sorted(when for mark, when in marks.items() if "layer-" in mark)
    begun = marks.get("recipe.json", 0.0)
    surveyed = marks.get("prepared.json", begun)
    ended = max(layers, default=surveyed)
    up = max((when for mark, when in marks.items() if "inputs-" in mark), default=begun)
    parts = {
        "before": begun,
        "survey": surveyed - begun,
        "survey_upwards": up - begun,
        "layers": ended - surveyed,
        "first_turn": layers[:processes][-1] - surveyed if layers else 0.0,
        "after": seconds - ended,
    }
    return {f"seconds_{name}": value for name, value in parts.items()}


def computed(found: dict[str, Any]) -> float:
    """Seconds of 32 layers: the survey grows with their number, the layers by turns, what comes after by 8.03 B weights."""
    layers, processes, first = found["layers"], found["processes"], found["seconds_first_turn"]
    other = (found["seconds_layers"] - first) / (math.ceil(layers / processes) - 1)
    fitted = first + (math.ceil(32 / processes) - 1) * other
    after = found["seconds_after"] * 8.03 / (2 * 0.525 + layers * 0.218)
    return found["seconds_before"] + found["seconds_survey"] * 32 / layers + fitted + after


def digests(folder: Path) -> list[str]:
    """SHA-256 of each converted attention, by layer: over its tensors' bytes, by name."""
    places: dict[int, dict[str, tuple[Path, int, int]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            for name, entry in json.loads(opened.read(length)).items():
                inside = re.search(r"layers\.(\d+)\.self_attn\.(.*)", name)
                if inside:
                    begin, end = entry["data_offsets"]
                    places.setdefault(int(inside[1]), {})[inside[2]] = (file, 8 + length + begin, end - begin)
    found = []
    for layer in sorted(places):
        total = hashlib.sha256()
        for name, (file, offset, size) in sorted(places[layer].items()):
            with open(file, "rb") as opened:
                opened.seek(offset)
                total.update(name.encode() + opened.read(size))
        found.append(total.hexdigest())
    return found
