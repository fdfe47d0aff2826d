"""What several GPUs give: conversion, healing, decoding, serving, a long sequence; all in one go, with results as they come.

python benchmarks/scale.py [--parts convert,heal,...] [--gpus N] [--seconds 400] [--layers 4] [--out FILE]

`scale_page.py` writes the tables in docs/scale.md from what this leaves in results/scale.json.

Every measurement is a process, or several, of its own (`scale_tasks.py`, or the commands that users run); one that fails or runs
out of its time shows the end of its log, and the others go on. Parts are cut into lanes. Those of a round run side by side, as far
as there are GPUs; rounds come one after the other, the most important first. `--seconds` ends it, whatever is at work.
Without GPUs, or with `--tiny`, the same is done with small models by processes on the CPU.

Memory of a GPU is what nvidia-smi shows, host memory what the processes have for themselves, both looked at five times a second.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TASKS = [sys.executable, str(HERE / "scale_tasks.py")]
CONVERT = ["-m", "hf_mla_conversion.cli", "convert"]
MARGIN = 4  # seconds kept to write the results

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--parts", default="convert,heal,decode,batching,serve,long,plan")
parser.add_argument("--gpus", type=int, help="how many to use (all; without GPUs 2 processes)")
parser.add_argument("--seconds", type=float, default=400.0)
parser.add_argument("--layers", type=int, default=4, help="of the 32 of a Llama-3-8B that is converted")
parser.add_argument("--steps", type=int, help="of the conversion of a layer (its default)")
parser.add_argument("--requests", type=int, default=2000)
parser.add_argument("--work", default="/tmp/scale", help="a folder for models and logs; emptied")
parser.add_argument("--out", default=str(HERE / "results" / "scale.json"))
parser.add_argument("--tiny", action="store_true", help="small models and processes on the CPU")


class NotRunError(Exception):
    """Why a measurement was not made."""


@dataclass
class Ran:
    """What came of a command."""

    code: int
    seconds: float
    output: str
    log: str
    peak_gpu: list[int]
    """Bytes on each of its GPUs."""
    peak_host: int
    marks: dict[str, float] = field(default_factory=dict)
    """When files of unfinished work were first seen, in seconds."""
    killed: float | None = None
    family: set[psutil.Process] = field(default_factory=set)
    """All processes that were seen: what torchrun starts is in sessions of its own."""


class Pool:
    """GPUs (without any, places for processes) that lanes take and give back."""

    def __init__(self, count: int) -> None:
        self.free, self.change = list(range(count)), threading.Condition()

    @contextmanager
    def take(self, count: int) -> Any:
        """So many of them."""
        with self.change:
            self.change.wait_for(lambda: len(self.free) >= count)
            taken, self.free = self.free[:count], self.free[count:]
        try:
            yield taken
        finally:
            with self.change:
                self.free = sorted(self.free + taken)
                self.change.notify_all()


class Scale:
    """One run of the script."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.tiny = arguments, arguments.tiny
        self.begun = time.monotonic()
        self.work = Path(arguments.work)
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.results: dict[str, Any] = {}
        self.commands: dict[str, str] = {}
        self.not_run: dict[str, str] = {}
        self.lock, self.running = threading.Lock(), list[Ran]()
        self.gpus = 0 if self.tiny else count_gpus()
        self.tiny = self.tiny or not self.gpus
        self.count = arguments.gpus or self.gpus or 2
        self.pool = Pool(self.count)
        self.nvml = None if self.tiny else nvml()
        self.environment = self.make_environment()
        self.machine: dict[str, str] = {}
        threading.Thread(target=self.describe, daemon=True).start()

    def make_environment(self) -> dict[str, str]:
        """What all processes are started with; the package is made importable where it is not installed."""
        threads = 1 if self.tiny else max(1, min(16, (os.cpu_count() or 1) // self.count))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "NCCL_NVLS_ENABLE": "0"}
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "SCALE_TINY": "1" if self.tiny else "0"}
        site = self.work / "site"
        paths = [str(HERE), environment.get("PYTHONPATH", "")]
        try:
            importlib.metadata.version("hf-mla")
            assert importlib.util.find_spec("hf_mla_conversion")
        except (importlib.metadata.PackageNotFoundError, AssertionError):
            (site / "hf_mla-0.dist-info").mkdir(parents=True)
            (site / "hf_mla-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-mla\nVersion: 0\n")
            (site / "hf_mla").symlink_to(ROOT / "hf_mla")
            (site / "hf_mla_conversion").symlink_to(ROOT / "conversion")
            paths.insert(0, str(site))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        return environment

    def describe(self) -> None:
        """Find out what the machine is, and what is installed on it."""
        code = "import json, llama_width; print(json.dumps(llama_width.machine()))"
        environment = self.environment | ({"CUDA_VISIBLE_DEVICES": ""} if self.tiny else {})
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=HERE)
        facts = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"device": "?", "error": done.stderr[-300:]}
        if not self.tiny:
            facts["device"] = f"{self.count} x {facts['device']}"
        for name in ("accelerate", "triton"):
            if importlib.util.find_spec(name):
                facts[name] = importlib.metadata.version(name)
        self.machine = facts | {"processors": str(os.cpu_count())}
        self.say(f"on {self.machine}")

    def left(self) -> float:
        """Seconds."""
        return self.arguments.seconds - MARGIN - (time.monotonic() - self.begun)

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"[{time.monotonic() - self.begun:6.1f}] {text}", flush=True)

    def keep(self, name: str, value: Any) -> None:
        """Print a result and write all that there is."""
        with self.lock:
            self.results[name] = value
            self.say(f"{name}: {json.dumps(rounded(value))}")
            self.save()

    def save(self) -> None:
        """Write the JSON file."""
        report = {"machine": self.machine, "gpus": self.count, "tiny": self.tiny, "seconds": time.monotonic() - self.begun}
        report |= {"layers": self.arguments.layers, "results": self.results, "not_run": self.not_run, "commands": self.commands}
        text = json.dumps(rounded(report), indent=1).replace(str(self.work), "SCALE").replace(str(ROOT) + "/", "")
        Path(self.arguments.out).write_text(text.replace(sys.executable, "python") + "\n")

    def run(
        self,
        name: str,
        command: list[str],
        gpus: list[int],
        seconds: float,
        *,
        environment: dict[str, str] | None = None,
        watched: Path | None = None,
        kill: Callable[[dict[str, float]], bool] | None = None,
        may_fail: bool = False,
    ) -> Ran:
        """Run a command on some GPUs; an error if it fails.

        Args:
            name: of the measurement; its log is called so.
            command: the words.
            gpus: by number.
            seconds: at most.
            environment: more of it.
            watched: a folder of unfinished work whose files are noted when they appear.
            kill: says, of these, when to kill the process of rank 1, once.
            may_fail: whether an exit code other than 0 is no error.

        Returns:
            What came of it.
        """
        seconds = min(seconds, self.left())
        if seconds < 2:
            raise NotRunError("no time was left")
        visible = "" if self.tiny else ",".join(map(str, gpus))
        self.commands[name] = shlex.join(command)
        logs = self.work / f"{name}.out", self.work / f"{name}.log"
        ran = Ran(0, 0.0, "", "", [0] * len(gpus), 0)
        begun = time.monotonic()
        with open(logs[0], "w") as out, open(logs[1], "w") as err:
            variables = self.environment | {"CUDA_VISIBLE_DEVICES": visible} | (environment or {})
            process = subprocess.Popen(command, stdout=out, stderr=err, env=variables, cwd=ROOT, start_new_session=True)
            self.running.append(ran)
            try:
                while process.poll() is None:
                    self.look(ran, process.pid, gpus, watched, begun)
                    if kill is not None and ran.killed is None and kill(ran.marks):
                        ran.killed = kill_rank(process.pid, 1) and time.monotonic() - begun
                    if time.monotonic() - begun > seconds:
                        raise NotRunError(f"stopped after {seconds:.0f} s; {tail(logs)}")
                    time.sleep(0.2)
            finally:
                self.look(ran, process.pid, gpus, watched, begun)
                end(ran)
                process.wait()
                self.running.remove(ran)
        ran.code, ran.seconds = process.returncode, time.monotonic() - begun
        ran.output, ran.log = logs[0].read_text(errors="replace"), logs[1].read_text(errors="replace")
        if ran.code and not may_fail:
            raise NotRunError(f"exit code {ran.code}; {tail(logs)}")
        return ran

    def look(self, ran: Ran, pid: int, gpus: list[int], watched: Path | None, begun: float) -> None:
        """Note memory and files."""
        for place, gpu in enumerate(gpus if self.nvml else []):
            ran.peak_gpu[place] = max(ran.peak_gpu[place], self.nvml(gpu))
        total = 0
        now = family(pid)
        ran.family |= set(now)
        for process in now:
            try:
                memory = process.memory_info()
                total += memory.rss - getattr(memory, "shared", 0)
            except psutil.Error:
                continue
        ran.peak_host = max(ran.peak_host, total)
        if watched is not None:
            for file in watched.rglob("*"):
                if file.suffix in (".json", ".safetensors") or file.name == "complete":
                    ran.marks.setdefault(str(file.relative_to(watched)), time.monotonic() - begun)

    def task(self, name: str, gpus: list[int], seconds: float, words: list[str], processes: int = 1) -> list[dict[str, Any]]:
        """Run one of `scale_tasks.py`, under torchrun if it is for several processes; keeps and returns what it found."""
        command = [*TASKS, *words] + (["--tiny"] if self.tiny else [])
        if processes > 1:
            command = [*torchrun(processes), *command[1:]]
        try:
            self.run(name, command, gpus, seconds)
        except NotRunError as error:
            found = self.said(name)
            if not found:
                raise
            self.skip(f"{name}, the rest of it", str(error))  # what was said before counts
            return found
        return self.said(name)

    def said(self, name: str) -> list[dict[str, Any]]:
        """What a task has printed as RESULT, as far as it came."""
        out = self.work / f"{name}.out"
        lines = out.read_text(errors="replace").splitlines() if out.exists() else []
        return [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ") and line.endswith("}")]

    def lanes(self, *lanes: tuple[int, list[tuple[str, Callable[[list[int]], Any]]]]) -> None:
        """Run lanes side by side: each so many GPUs (0: the first one, beside others), and what is done with them."""

        def work(count: int, steps: list[tuple[str, Callable[[list[int]], Any]]]) -> None:
            if count > self.count:
                for name, _ in steps:
                    self.skip(name, f"it needs {count} GPUs")
                return
            with self.pool.take(count) as taken:
                gpus = taken or [0]
                for name, step in steps:
                    try:
                        found = step(gpus)
                    except NotRunError as error:
                        self.skip(name, str(error))
                    except Exception as error:  # a mistake in one measurement must not cost the others
                        self.skip(name, f"{type(error).__name__}: {error}")
                    else:
                        if found is not None:
                            self.keep(name, found)

        threads = []
        for count, steps in lanes:
            if steps:
                threads.append(threading.Thread(target=work, args=(count, steps), daemon=True))
                threads[-1].start()
                time.sleep(0.05)  # the first lane takes its GPUs first
        for thread in threads:
            thread.join()

    def skip(self, name: str, why: str) -> None:
        """Note that a measurement was not made."""
        with self.lock:
            self.not_run[name] = why.splitlines()[0]
            self.say(f"{name}: NOT RUN: {why}")
            self.save()

    def has(self, *names: str) -> None:
        """Wait for folders that another lane makes; an error if they were not made."""
        for name in names:
            until = time.monotonic() + 120
            while not (self.work / name).exists():
                failed = any(made.startswith("make") and name.removeprefix("llama-") in made for made in self.not_run)
                if failed or time.monotonic() > until or self.left() < 5:
                    raise NotRunError(f"{name} was not made")
                time.sleep(0.2)

    # What is measured.

    def make_llama(self, name: str, layers: int, folder: str) -> Callable[[list[int]], Any]:
        """Write a model of random weights."""
        words = ["make-llama", name, str(self.work / folder), "--layers", str(layers)]
        return lambda gpus: self.task(f"make {folder}", gpus, 90, words)[0]

    def convert(self, source: str, out: str, processes: int, *more: str) -> list[str]:
        """The command that converts."""
        options = ["--kv-lora-rank", "24", "--qk-rope-head-dim", "8"] if self.tiny else ["--kv-lora-rank", "512"]
        options += [] if self.tiny else ["--qk-rope-head-dim", "32" if source == "llama-1b" else "64"]
        options += ["--calibration", str(self.work / "books.txt"), "--heal-tokens", "0", "--json", *more]
        if self.tiny:
            options += ["--calibration-tokens", "16384", "--window", "128", "--device", "cpu"]
        steps = self.arguments.steps or (100 if self.tiny else None)
        if steps is not None and "--steps" not in more:
            options += ["--steps", str(steps)]
        return [*self.launch(processes), *CONVERT, str(self.work / source), str(self.work / out), *options]

    def launch(self, processes: int, *config: str) -> list[str]:
        """What starts so many processes, as docs/scale.md has it; on a CPU `accelerate launch` starts one, whatever is asked."""
        if processes == 1:
            return [sys.executable]
        if self.tiny and not config:
            return torchrun(processes)
        port = ["--main_process_port", str(free_port())]
        return [sys.executable, "-m", "accelerate.commands.launch", *config, "--num_processes", str(processes), *port]

    def converted(self, out: str, processes: int, *, kill: bool = False) -> Callable[[list[int]], Any]:
        """Convert the 8B layers; with `kill`, kill a process when half of the layers are done, and go on."""

        def measure(gpus: list[int]) -> dict[str, Any]:
            self.has("llama-8b")
            command = self.convert("llama-8b", out, processes)
            watched = self.work / f".{out}.incomplete"
            found: dict[str, Any] = {"processes": processes}
            half = max(1, self.arguments.layers // 2)

            def layers(marks: dict[str, float]) -> int:
                return sum("layer-" in mark for mark in marks)

            if kill:
                first = self.run(
                    f"{out}-killed", command, gpus, 200, watched=watched, kill=lambda marks: layers(marks) >= half, may_fail=True
                )
                if first.killed is None:
                    raise NotRunError(f"it ended with {first.code} before it could be killed; {first.log[-300:]}")
                found |= {"killed_after": first.killed, "exit_code": first.code, "seconds_until_it_ended": first.seconds}
                found["layers_kept"] = len([*watched.rglob("layer-*.safetensors")])
                found["output_there"] = (self.work / out).exists()
            ran = self.run(out, command, gpus, 260, watched=watched)
            report = json.loads(ran.output[ran.output.index("{") :])
            times = stages(ran.marks, ran.seconds)
            found |= {"seconds": ran.seconds, **({} if kill else times), "peak_gpu": ran.peak_gpu, "peak_host": ran.peak_host}
            found |= {"calibration_tokens": report["calibration_tokens"], "steps": report["steps"], "layers": len(report["layers"])}
            # 0: the closed form was kept, after two tries to better it where there is usually one.
            found["steps_kept"] = [layer["steps_kept"] for layer in report["layers"]]
            found["sha256"] = layers_digest(self.work / out)
            if not kill:
                found["seconds_of_32_layers_computed"] = computed(times, len(report["layers"]))
            return found

        return measure

    def compare_conversions(self) -> None:
        """What the conversions show together."""
        made = {
            name: self.results[name] for name in ("convert-1", "convert-n", "convert-killed-and-resumed") if name in self.results
        }
        if len(made) > 1:
            found: dict[str, Any] = {"same_bytes": len({entry["sha256"] for entry in made.values()}) == 1, "of": list(made)}
            if {"convert-1", "convert-n"} <= made.keys():
                one, several = made["convert-1"], made["convert-n"]
                found["processes"] = several["processes"]
                found["speedup"] = one["seconds"] / several["seconds"]
                key = "seconds_of_32_layers_computed"
                found["speedup_of_32_layers_computed"] = one[key] / several[key]
            self.keep("convert-compared", found)

    def closed_form(self, source: str, out: str) -> Callable[[list[int]], Any]:
        """A conversion to heal."""

        def measure(gpus: list[int]) -> dict[str, Any]:
            self.has(source)
            tokens = () if self.tiny else ("--calibration-tokens", "16384")
            ran = self.run(f"make-{out}", self.convert(source, out, 1, "--steps", "0", *tokens), gpus, 150)
            return {"seconds": ran.seconds}

        return measure

    def heal(self, model: str, processes: int, **changes: Any) -> Callable[[list[int]], Any]:
        """Heal in a few steps, of which only speed, loss and memory are wanted; `train` is what is trained.

        With `kill`, a process is killed after a checkpoint; the same command then goes on, to the end.
        """
        train, kill = changes.get("train", "all"), changes.get("kill", False)

        def measure(gpus: list[int]) -> dict[str, Any]:
            self.has(f"{model}-mla")
            name = f"heal-{model}-{processes}" + ("-killed" if kill else "") + ("-lora" if train == "lora" else "")
            source, out, dest = (str(self.work / folder) for folder in (f"llama-{model}", f"{model}-mla", name))
            words = ["heal", out, dest, "--teacher", source, "--text", str(self.work / "short.txt"), "--train", train, "--json"]
            words += ["--gradient-checkpointing", "--steps", "8", "--step-tokens", "4096" if self.tiny else "65536"]
            words += ["--device", "cpu"] if self.tiny else []
            config = ["--config_file", str(self.work / "fsdp.yaml") if self.tiny else "examples/heal_accelerate.yaml"]
            command = [*self.launch(processes, *config), *TASKS[1:], *words]
            environment = {"SCALE_STOP": "0" if kill else "1"}
            found: dict[str, Any] = {"model": model, "processes": processes, "train": train}
            if kill:
                watched = self.work / f".{name}.incomplete"
                first = self.run(
                    *(f"{name}-at-first", command, gpus, 200),
                    environment=environment,
                    watched=watched,
                    kill=lambda marks: any(mark.endswith("complete") for mark in marks),
                    may_fail=True,
                )
                if first.killed is None:
                    raise NotRunError(f"it ended with {first.code} before it could be killed; {first.log[-300:]}")
                found |= {"killed_after": first.killed, "exit_code": first.code, "output_there": Path(dest).exists()}
                found["checkpoints_kept"] = sorted(path.parent.name for path in watched.glob("checkpoint-*/complete"))
            ran = self.run(name, command, gpus, 200, environment=environment)
            said = [json.loads(line) for line in re.findall(r"PROCESS (\{.*\})", ran.log)]
            if kill:
                report = json.loads(ran.output[ran.output.index("{") :])
                history, found["after"] = report["history"], report["verify"]["perplexity"]["converted"]
                found["perplexity"] = [entry["perplexity"] for entry in history if "perplexity" in entry]
            else:
                (history,) = (entry["history"] for entry in said if "history" in entry)
            entries = [entry for entry in history if "divergence" in entry]
            speeds = [entry["tokens_per_second"] for entry in entries[len(entries) // 3 :]]
            found |= {"seconds": ran.seconds, "tokens_per_second": statistics.median(speeds), "spread": [min(speeds), max(speeds)]}
            found["divergence"] = {str(entry["step"]): entry["divergence"] for entry in entries}
            found |= {"peak_gpu": ran.peak_gpu, "peak_host": ran.peak_host}
            found["peak_in_training"] = max(entry["peak"] for entry in said)
            found |= {key: said[0][key] for key in ("layer", "types", "planned")}
            shutil.rmtree(dest, ignore_errors=True)
            return found

        return measure

    def compare_healing(self) -> None:
        """Speed and loss of several GPUs beside one's."""
        for model in ("1b", "8b"):
            one = self.results.get(f"heal-{model}-1")
            for name, other in [*self.results.items()] if one else []:
                if name.startswith(f"heal-{model}-") and other is not one and other["train"] == "all":
                    if f"compared-{name}" in self.results:
                        continue
                    pairs = [(one["divergence"].get(step), loss) for step, loss in other["divergence"].items()]
                    losses = [abs(theirs / ours - 1) for ours, theirs in pairs if ours]
                    found = {"speedup": other["tokens_per_second"] / one["tokens_per_second"]}
                    found["loss_differs_by"] = max(losses, default=None)
                    self.keep(f"compared-{name}", found)

    def deepspeed(self, stage: int) -> Callable[[list[int]], Any]:
        """The example's configuration for DeepSpeed, with this stage of ZeRO, where it is installed."""

        def measure(gpus: list[int]) -> dict[str, Any]:
            if importlib.util.find_spec("deepspeed") is None:
                raise NotRunError("DeepSpeed is not installed")
            self.has("1b-mla")
            name = f"heal-deepspeed-{stage}"
            example = (ROOT / "examples" / "heal_deepspeed.yaml").read_text()
            (self.work / f"{name}.yaml").write_text(re.sub("zero_stage: .", f"zero_stage: {stage}", example))
            words = ["heal", str(self.work / "1b-mla"), str(self.work / name), "--teacher", str(self.work / "llama-1b"), "--text"]
            words += [str(self.work / "short.txt"), "--train", "all", "--gradient-checkpointing", "--steps", "4", "--json"]
            launch = self.launch(2, "--config_file", str(self.work / f"{name}.yaml"))
            ran = self.run(name, [*launch, *TASKS[1:], *words], gpus, 150)
            report = json.loads(ran.output[ran.output.index("{") :])
            return {"seconds": ran.seconds, "peak_gpu": ran.peak_gpu, "history": report["history"]}

        return measure

    def decode(self, processes: int, spread: bool = False) -> Callable[[list[int]], Any]:
        """Decode on one device, by tensor parallelism, or with a model that is spread over devices."""

        def measure(gpus: list[int]) -> dict[str, Any]:
            self.has("wide")
            if (processes > 1 or spread) and not (self.work / "reference.pt").exists():
                raise NotRunError("one GPU has not said anything to compare with")
            name = "decode-spread" if spread else f"decode-{processes}"
            words = ["decode", str(self.work / "wide"), str(self.work / "reference.pt")] + (["--spread"] if spread else [])
            return merged(self.task(name, gpus, 80 if processes > 1 else 120, words, processes))

        return measure

    def batching(self, gpus: list[int]) -> Any:
        """Continuous batching."""
        self.has("wide")
        found = self.task("batching", gpus, 120, ["batching", str(self.work / "wide"), str(self.work / "wide-gqa")])
        if "not_run" in found[0]:
            raise NotRunError(found[0]["not_run"])
        return {entry.pop("model"): entry for entry in found}

    def serve(self, gpus: list[int]) -> Any:
        """Two thousand requests to the bundled model, converted."""
        bundled = str(self.work / "bundled-mla")
        words = [
            *CONVERT,
            str(ROOT / "conversion" / "bundled" / "model"),
            bundled,
            "--kv-lora-rank",
            "64",
            "--qk-rope-head-dim",
            "32",
        ]
        words += ["--steps", "0", "--calibration-tokens", "1024", "--heal-tokens", "0"] + (["--device", "cpu"] if self.tiny else [])
        words += ["--calibration", str(self.work / "books.txt")]
        self.run("make bundled-mla", [sys.executable, *words], gpus, 120)
        return merged(self.task("serve", gpus, 200, ["serve", bundled, "--requests", str(self.arguments.requests)]))

    def long(self, gpus: list[int]) -> Any:
        """One long sequence."""
        return self.task("long", gpus, 110, ["long", "--layers", "2"])

    def planned(self, gpus: list[int]) -> Any:
        """What `hf-mla plan` says of the source, and what was measured."""
        self.has("llama-8b")
        source = str(self.work / "llama-8b")
        code = (
            "import json, sys; from hf_mla_conversion.commands.plan import memory_estimate as m; "
            "from hf_mla_conversion.source.checkpoint import open_checkpoint; "
            "from hf_mla_conversion.source.matching import match_model; "
            "c = match_model(open_checkpoint(sys.argv[1], headers_only=True)); "
            "size = (24, 8) if sys.argv[2] == '1' else (512, 64); "
            "device = 'cpu' if sys.argv[2] == '1' else 'cuda'; "
            "print('RESULT', json.dumps({'without_hidden_states': m(c, size, 0, device), "
            "'with_hidden_states': m(c, size, int(sys.argv[3]), device)}))"
        )
        one = self.results.get("convert-1", {})
        tokens = str(one.get("calibration_tokens", 2097152))
        self.run("plan", [sys.executable, "-c", code, source, str(int(self.tiny)), tokens], gpus, 60)
        return self.said("plan")[0] | {"measured_gpu": one.get("peak_gpu", [0]), "measured_host": one.get("peak_host", 0)}

    def everything(self) -> None:
        """All parts that were asked for, in rounds."""
        parts = set(self.arguments.parts.split(","))
        layers = self.arguments.layers
        write_books(self.work / "books.txt", 1 if self.tiny else 6)
        write_books(self.work / "short.txt", 1 if self.tiny else 2)  # to heal with: tokenizing takes seconds
        if self.tiny:
            example = (ROOT / "examples" / "heal_accelerate.yaml").read_text()
            (self.work / "fsdp.yaml").write_text(example.replace("mixed_precision: bf16", "mixed_precision: 'no'\nuse_cpu: true"))
        convert, heal, decode = ("convert" in parts, "heal" in parts, "decode" in parts)
        everyone = self.count

        def lane(wanted: bool, *steps: tuple[str, Callable[[list[int]], Any]]) -> list[tuple[str, Callable[[list[int]], Any]]]:
            return [*steps] if wanted else []

        make_8b = ("make-8b", self.make_llama("8b", layers, "llama-8b"))
        make_1b = ("make-1b", self.make_llama("1b", 4 if self.tiny else 16, "llama-1b"))
        wide = [*TASKS, "make-converted", str(self.work / "wide"), "--layers", "2" if self.tiny else "8"]
        wide += ["--tiny"] if self.tiny else []
        make_wide = ("make-wide", lambda gpus: {"seconds": self.run("make wide", wide, gpus, 90).seconds})
        plan = lane("plan" in parts, ("plan", self.planned))
        batching = lane("batching" in parts, ("batching", self.batching))
        serve, long = lane("serve" in parts, ("serve", self.serve)), lane("long" in parts, ("long", self.long))
        # What one GPU does.
        self.lanes(
            (
                1,
                lane(convert or heal or bool(plan), make_8b) + lane(convert, ("convert-1", self.converted("convert-1", 1))) + plan,
            ),
            (1, lane(heal, make_1b, ("make-1b-mla", self.closed_form("llama-1b", "1b-mla")), ("heal-1b-1", self.heal("1b", 1)))),
            (1, lane(decode or bool(batching), make_wide) + lane(decode, ("decode-1", self.decode(1))) + long),
            (1, lane(heal, ("make-8b-mla", self.closed_form("llama-8b", "8b-mla")), ("heal-8b-1", self.heal("8b", 1)))),
        )
        if everyone == 1:
            self.lanes((1, batching), (1, serve))
            return
        self.lanes((everyone, lane(convert, ("convert-n", self.converted("convert-n", everyone)))))
        self.compare_conversions()
        # Serving says nothing of speed, and so shares its GPU.
        self.lanes(
            (2, lane(convert, ("convert-killed-and-resumed", self.converted("convert-again", 2, kill=True)))),
            (2, lane(decode, ("decode-2", self.decode(2)), ("decode-spread", self.decode(1, spread=True)))),
            (0, serve),
        )
        self.compare_conversions()
        self.lanes(
            (2, lane(heal, ("heal-1b-2", self.heal("1b", 2)))),
            (2, lane(heal, ("heal-8b-2", self.heal("8b", 2)))),
        )
        if everyone > 2:
            both = (lane(heal, (f"heal-{model}-{everyone}", self.heal(model, everyone))) for model in ("1b", "8b"))
            self.lanes((everyone, [step for steps in both for step in steps]))
        self.compare_healing()
        if everyone > 2:
            self.lanes((everyone, lane(decode, (f"decode-{everyone}", self.decode(everyone)))))
        self.lanes(
            (2, lane(heal, ("heal-8b-2-lora", self.heal("8b", 2, train="lora")))),
            (2, lane(heal, ("heal-1b-2-killed", self.heal("1b", 2, kill=True)))),
            (2, lane(heal, *((f"heal-deepspeed-{stage}", self.deepspeed(stage)) for stage in (2, 3)))),
            (1, batching),
        )
        self.compare_healing()

    def stop(self) -> None:
        """End all that runs."""
        for ran in [*self.running]:
            end(ran)


def count_gpus() -> int:
    """How many GPUs there are."""
    import torch

    return torch.cuda.device_count()


def nvml() -> Callable[[int], int] | None:
    """What says how many bytes are in use on a GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(gpu)).used
    except Exception as error:  # the figures are then missing, no more
        print(f"no memory of GPUs: {type(error).__name__}: {error}")
        return None


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def kill_rank(pid: int, rank: int) -> bool:
    """Kill the process of some rank among what a launcher has started, as the system would that runs out of memory."""
    for process in family(pid)[1:]:
        try:
            # A process that the ranks start themselves has their environment too.
            if process.environ().get("RANK") == str(rank) and process.parent().environ().get("RANK") is None:
                process.kill()
                return True
        except psutil.Error:
            continue
    return False


def end(ran: Ran) -> None:
    """End a command and all that it has started."""
    for process in ran.family:
        with suppress(psutil.Error):
            process.kill()  # none that has its number by chance


def torchrun(processes: int) -> list[str]:
    """What starts so many processes on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def tail(logs: tuple[Path, Path]) -> str:
    """The end of a log, progress bars left out."""
    lines = []
    for log in logs:
        text = log.read_text(errors="replace") if log.exists() else ""
        lines += [line for line in text.splitlines() if line.strip() and not re.search(r"\d%\|", line)][-25:]
    return "the end of its log:\n    " + "\n    ".join(line[:400] for line in lines)


def rounded(value: Any) -> Any:
    """JSON with no more digits than mean something."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def merged(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """All that a task found, as one."""
    return {key: value for entry in entries for key, value in entry.items()}


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


if __name__ == "__main__":
    arguments = parser.parse_args()
    scale = Scale(arguments)
    signal.signal(signal.SIGTERM, lambda *_: (scale.stop(), sys.exit(1)))
    scale.say(f"{scale.count} {'processes' if scale.tiny else 'GPUs'}, {arguments.seconds:.0f} s")
    try:
        scale.everything()
    finally:
        scale.stop()
        with scale.lock:
            scale.save()
    scale.say(f"done; {len(scale.results)} results in {arguments.out}; not run: {', '.join(scale.not_run) or 'nothing'}")
