"""A command on some GPUs and all the processes that it starts: what is seen of them, and how they are ended."""

import json
import re
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil


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

    @property
    def report(self) -> dict[str, Any]:
        """The JSON object that a command of `hf-mla` has printed."""
        return json.loads(self.output[self.output.index("{") :])


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
