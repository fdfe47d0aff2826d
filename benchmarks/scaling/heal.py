"""Healing in a few steps, of which only speed, loss and memory are wanted; and one that is killed and goes on."""

import importlib.util
import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .processes import NotRunError, Ran
from .runs import ROOT, TASKS, Runs


def healed(runs: Runs, model: str, processes: int, **changes: Any) -> Callable[[list[int]], Any]:
    """Heal in a few steps, of which only speed, loss and memory are wanted; `train` is what is trained.

    With `kill`, a process is killed after a checkpoint; the same command then goes on, to the end. With `stage`, it is sharded by
    the example's configuration for DeepSpeed, with this stage of ZeRO, where that is installed.
    """
    train, kill, stage = changes.get("train", "all"), changes.get("kill", False), changes.get("stage")

    def measure(gpus: list[int]) -> dict[str, Any]:
        if stage and importlib.util.find_spec("deepspeed") is None:
            raise NotRunError("DeepSpeed is not installed")
        runs.has(f"{model}-mla")
        name = f"heal-{model}-{processes}" + ("-killed" if kill else "") + ("-lora" if train == "lora" else "")
        name += f"-zero-{stage}" if stage else ""
        source, out, dest = (str(runs.work / folder) for folder in (f"llama-{model}", f"{model}-mla", name))
        words = ["heal", out, dest, "--teacher", source, "--text", str(runs.work / "short.txt"), "--train", train, "--json"]
        words += ["--gradient-checkpointing", "--steps", "8", "--step-tokens", "4096" if runs.tiny else "65536"]
        words += ["--device", "cpu"] if runs.tiny else []
        config = str(runs.work / "fsdp.yaml") if runs.tiny else "examples/heal_accelerate.yaml"
        if stage:
            config = str(runs.work / f"{name}.yaml")
            example = (ROOT / "examples" / "heal_deepspeed.yaml").read_text()
            Path(config).write_text(re.sub("zero_stage: .", f"zero_stage: {stage}", example))
        command = [*runs.launch(processes, "--config_file", config), *TASKS[1:], *words]
        environment = {"SCALE_STOP": "0" if kill else "1"}
        found: dict[str, Any] = {"model": model, "processes": processes, "train": train, "zero": stage}
        if kill:
            watched = runs.work / f".{name}.incomplete"
            first = runs.run(
                *(f"{name}-at-first", command, gpus, 200),
                environment=environment,
                watched=watched,
                kill=lambda marks: any(mark.endswith("complete") for mark in marks),
            )
            found |= {"killed_after": first.killed, "exit_code": first.code, "output_there": Path(dest).exists()}
            found["checkpoints_kept"] = sorted(path.parent.name for path in watched.glob("checkpoint-*/complete"))
        ran = runs.run(name, command, gpus, 200, environment=environment)
        if kill:
            found["after"] = ran.report["verify"]["perplexity"]["converted"]
            found["perplexity"] = [entry["perplexity"] for entry in ran.report["history"] if "perplexity" in entry]
        shutil.rmtree(dest, ignore_errors=True)
        return found | training(ran)

    return measure


def training(ran: Ran) -> dict[str, Any]:
    """Speed, loss and memory of a training, by what its processes said; they end after it, or else there is a report."""
    said = [json.loads(line) for line in re.findall(r"PROCESS (\{.*\})", ran.log)]
    (history,) = [entry["history"] for entry in said if "history" in entry] or [ran.report["history"]]
    entries = [entry for entry in history if "divergence" in entry]
    speeds = [entry["tokens_per_second"] for entry in entries[len(entries) // 3 :]]
    found = {"seconds": ran.seconds, "tokens_per_second": statistics.median(speeds), "spread": [min(speeds), max(speeds)]}
    found["divergence"] = {str(entry["step"]): entry["divergence"] for entry in entries}
    found |= {"peak_gpu": ran.peak_gpu, "peak_host": ran.peak_host}
    found["peak_in_training"] = max(entry["peak"] for entry in said)
    return found | {key: said[0][key] for key in ("layer", "types", "planned")}


def compare(runs: Runs) -> None:
    """Speed and loss of several GPUs beside one's."""
    for model in ("1b", "8b"):
        one = runs.results.get(f"heal-{model}-1")
        for name, other in [*runs.results.items()] if one else []:
            if name.startswith(f"heal-{model}-") and other is not one and other["train"] == "all":
                if f"compared-{name}" in runs.results:
                    continue
                pairs = [(one["divergence"].get(step), loss) for step, loss in other["divergence"].items()]
                losses = [abs(theirs / ours - 1) for ours, theirs in pairs if ours]
                found = {"speedup": other["tokens_per_second"] / one["tokens_per_second"]}
                found["loss_differs_by"] = max(losses, default=None)
                runs.keep(f"compared-{name}", found)
