"""Conversions by one and by several processes, one of which is killed in the middle; and what `hf-mla plan` says of them."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .runs import CONVERT, ROOT, Runs


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
    """Convert the 8B layers; with `kill`, kill a process when half of the layers are done, and go on."""

    def measure(gpus: list[int]) -> dict[str, Any]:
        runs.has("llama-8b")
        words = command(runs, "llama-8b", out, processes)
        watched = runs.work / f".{out}.incomplete"
        found: dict[str, Any] = {"processes": processes}
        half = max(1, runs.arguments.layers // 2)

        def layers(marks: dict[str, float]) -> int:
            return sum("layer-" in mark for mark in marks)

        if kill:
            first = runs.run(f"{out}-killed", words, gpus, 200, watched=watched, kill=lambda marks: layers(marks) >= half)
            found |= {"killed_after": first.killed, "exit_code": first.code, "seconds_until_it_ended": first.seconds}
            found["layers_kept"] = len([*watched.rglob("layer-*.safetensors")])
            found["output_there"] = (runs.work / out).exists()
        ran = runs.run(out, words, gpus, 260, watched=watched)
        report, times = ran.report, stages(ran.marks, ran.seconds)
        found |= {"seconds": ran.seconds, **({} if kill else times), "peak_gpu": ran.peak_gpu, "peak_host": ran.peak_host}
        found |= {"calibration_tokens": report["calibration_tokens"], "steps": report["steps"], "layers": len(report["layers"])}
        # 0: the closed form was kept, after two tries to better it where there is usually one.
        found["steps_kept"] = [layer["steps_kept"] for layer in report["layers"]]
        found["sha256"] = layers_digest(runs.work / out)
        if not kill:
            found["seconds_of_32_layers_computed"] = computed(times, len(report["layers"]))
        return found

    return measure


def compare(runs: Runs) -> None:
    """What the conversions show together."""
    made = {name: runs.results[name] for name in ("convert-1", "convert-n", "convert-killed-and-resumed") if name in runs.results}
    if len(made) > 1:
        found: dict[str, Any] = {"same_bytes": len({entry["sha256"] for entry in made.values()}) == 1, "of": list(made)}
        if {"convert-1", "convert-n"} <= made.keys():
            one, several = made["convert-1"], made["convert-n"]
            found["processes"] = several["processes"]
            found["speedup"] = one["seconds"] / several["seconds"]
            key = "seconds_of_32_layers_computed"
            found["speedup_of_32_layers_computed"] = one[key] / several[key]
        runs.keep("convert-compared", found)


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
    runs.has("llama-8b")
    one = runs.results.get("convert-1", {})
    words = ["plan", str(runs.work / "llama-8b"), str(one.get("calibration_tokens", 2097152))]
    (found,) = runs.task("plan", gpus, 60, words)
    return found | {"measured_gpu": one.get("peak_gpu", [0]), "measured_host": one.get("peak_host", 0)}


def write_books(path: Path, times: int) -> None:
    """The bundled text, 390,000 tokens, its paragraphs so many times in another order."""
    import lzma

    with lzma.open(ROOT / "conversion" / "bundled" / "calibration.txt.xz", "rt", encoding="utf-8") as file:
        paragraphs = file.read().split("\n\n")
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(times):
            draw.shuffle(paragraphs)
            file.write("\n\n".join(paragraphs) + "\n\n")


def stages(marks: dict[str, float], seconds: float) -> dict[str, float]:
    """Seconds of the stages of a conversion, by when the files of its unfinished work appeared."""
    layers = [when for mark, when in marks.items() if "layer-" in mark]
    begun = marks.get("recipe.json", 0.0)
    surveyed = marks.get("prepared.json", begun)
    ended = max(layers, default=surveyed)
    up = max((when for mark, when in marks.items() if "inputs-" in mark), default=begun)
    parts = {
        "before": begun,
        "survey": surveyed - begun,
        "survey_upwards": up - begun,
        "layers": ended - surveyed,
        "after": seconds - ended,
    }
    return {f"seconds_{name}": value for name, value in parts.items()}


def computed(times: dict[str, float], layers: int) -> float:
    """Seconds of 32 layers: survey and layers grow with their number; what comes after by 8.03 B weights to those of the part."""
    share = 32 / layers
    after = times["seconds_after"] * 8.03 / (2 * 0.525 + layers * 0.218)
    return times["seconds_before"] + share * (times["seconds_survey"] + times["seconds_layers"]) + after


def layers_digest(folder: Path) -> str:
    """SHA-256 over the bytes of all tensors of the layers, by name."""
    places: dict[str, tuple[Path, int, int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            for name, entry in json.loads(opened.read(length)).items():
                if ".layers." in name:
                    begin, end = entry["data_offsets"]
                    places[name] = (file, 8 + length + begin, end - begin)
    total = hashlib.sha256()
    for name, (file, offset, size) in sorted(places.items()):
        total.update(name.encode())
        with open(file, "rb") as opened:
            opened.seek(offset)
            while size > 0 and (chunk := opened.read(min(size, 1 << 24))):
                total.update(chunk)
                size -= len(chunk)
    return total.hexdigest()
