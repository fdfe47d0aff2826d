"""Decoding by one and by several GPUs, many requests, and one long sequence: what each task says of itself is kept."""

import sys
from collections.abc import Callable
from typing import Any

from .processes import NotRunError
from .runs import CONVERT, ROOT, TASKS, Runs, merged


def make_wide(runs: Runs, gpus: list[int]) -> Any:
    """Write a model with MLA to decode with, and its original."""
    words = ["make-converted", str(runs.work / "wide"), "--layers", "2" if runs.tiny else "8"]
    words += ["--tiny"] if runs.tiny else []
    return {"seconds": runs.run("make wide", [*TASKS, *words], gpus, 90).seconds}


def decoded(runs: Runs, processes: int, spread: bool = False) -> Callable[[list[int]], Any]:
    """Decode on one device, by tensor parallelism, or with a model that is spread over devices."""

    def measure(gpus: list[int]) -> dict[str, Any]:
        runs.has("wide")
        if (processes > 1 or spread) and not (runs.work / "reference.pt").exists():
            raise NotRunError("one GPU has not said anything to compare with")
        name = "decode-spread" if spread else f"decode-{processes}"
        words = ["decode", str(runs.work / "wide"), str(runs.work / "reference.pt")] + (["--spread"] if spread else [])
        return merged(runs.task(name, gpus, 80 if processes > 1 else 120, words, processes))

    return measure


def batching(runs: Runs, gpus: list[int]) -> Any:
    """Continuous batching."""
    runs.has("wide")
    found = runs.task("batching", gpus, 120, ["batching", str(runs.work / "wide"), str(runs.work / "wide-gqa")])
    if "not_run" in found[0]:
        raise NotRunError(found[0]["not_run"])
    return {entry.pop("model"): entry for entry in found}


def serve(runs: Runs, gpus: list[int]) -> Any:
    """Two thousand requests to the bundled model, converted."""
    bundled = str(runs.work / "bundled-mla")
    words = [*CONVERT, str(ROOT / "conversion" / "bundled" / "model"), bundled, "--kv-lora-rank", "64", "--qk-rope-head-dim", "32"]
    words += ["--steps", "0", "--calibration-tokens", "1024", "--heal-tokens", "0", "--calibration", str(runs.work / "books.txt")]
    words += ["--device", "cpu"] if runs.tiny else []
    runs.run("make bundled-mla", [sys.executable, *words], gpus, 120)
    return merged(runs.task("serve", gpus, 200, ["serve", bundled, "--requests", str(runs.arguments.requests)]))


def long(runs: Runs, gpus: list[int]) -> Any:
    """One long sequence."""
    return runs.task("long", gpus, 110, ["long", "--layers", "2"])
