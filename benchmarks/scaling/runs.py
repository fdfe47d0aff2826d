"""Measurements side by side, as far as there are GPUs, each by a command that is watched and ended in time.

Memory of a GPU is what nvidia-smi shows, host memory what the processes have for themselves, both looked at five times a second.
This file needs neither hf_mla nor torch where there are no GPUs to count.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from .processes import NotRunError, Ran, count_gpus, end, family, free_port, kill_rank, nvml, tail, torchrun


HERE = Path(__file__).resolve().parent.parent
ROOT = HERE.parent
TASKS = [sys.executable, str(HERE / "scale_tasks.py")]
CONVERT = ["-m", "hf_mla_conversion.cli", "convert"]
MARGIN = 4  # seconds kept to write the results

Step = tuple[str, Callable[[list[int]], Any]]
"""The name of a measurement, and what makes it on GPUs of these numbers."""


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


class Runs:
    """One run of scale.py."""

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
    ) -> Ran:
        """Run a command on some GPUs; an error if it fails, or where it is to be killed, if it ends before.

        Args:
            name: of the measurement; its log is called so.
            command: the words.
            gpus: by number.
            seconds: at most.
            environment: more of it.
            watched: a folder of unfinished work whose files are noted when they appear.
            kill: says, of these, when to kill the second process, once.

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
        if kill is None and ran.code:
            raise NotRunError(f"exit code {ran.code}; {tail(logs)}")
        if kill is not None and ran.killed is None:
            raise NotRunError(f"it ended with {ran.code} before it could be killed; {ran.log[-300:]}")
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

    def lanes(self, *lanes: tuple[int, list[Step]]) -> None:
        """Run lanes side by side: each so many GPUs (0: the first one, beside others), and what is done with them."""

        def work(count: int, steps: list[Step]) -> None:
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

    def launch(self, processes: int, *config: str) -> list[str]:
        """What starts so many processes, as docs/scale.md has it; on a CPU `accelerate launch` starts one, whatever is asked."""
        if processes == 1:
            return [sys.executable]
        if self.tiny and not config:
            return torchrun(processes)
        port = ["--main_process_port", str(free_port())]
        return [sys.executable, "-m", "accelerate.commands.launch", *config, "--num_processes", str(processes), *port]

    def stop(self) -> None:
        """End all that runs."""
        for ran in [*self.running]:
            end(ran)


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
