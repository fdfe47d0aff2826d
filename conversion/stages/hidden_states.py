# SPDX-License-Identifier: Apache-2.0
"""What goes from layer to layer while they are converted, shared out to the processes.

A batch is passed on by the same process all the way, on its device, in memory or in a file. A process that converts a layer is
handed all batches, one by one, in the order in which a single process would have them.
"""

from typing import Any

import torch
from torch import Tensor

from ..mathematics.survey import advance
from ..source.streaming import allocate
from .windows import shared_batches


class HiddenStates:
    """The hidden states of all calibration text, which are passed from layer to layer of the original.

    Each process passes on its share of the windows, whole batches, and all first tokens. A process that converts a layer is handed
    what enters it of all windows.

    Args:
        job: the conversion, a `Job` of layers.py.
        processes: Accelerate's state.
    """

    def __init__(self, job: Any, processes: Any) -> None:
        self.job, self.stream, self.processes = job, job.stream, processes
        self.entered = 0  # the layer that they enter
        mine = processes.process_index
        windows = job.windows[torch.cat([torch.empty(0, dtype=torch.long), *self.share(mine)])]
        shape, dtype = (job.windows.shape[1], self.stream.config.hidden_size), self.stream.dtype
        self.states = allocate((len(windows), *shape), dtype, job.device, job.folder / f"states-{mine}.bin")
        self.firsts = torch.empty(*job.firsts.shape, shape[1], dtype=dtype, device=job.device)
        self.stream.embed(windows, self.states)
        self.stream.embed(job.firsts, self.firsts)
        self.whole, self.whole_firsts = self.states, self.firsts
        if processes.num_processes > 1:
            self.whole = allocate((len(job.windows), *shape), dtype, job.device, job.folder / f"whole-{mine}.bin")
            self.whole_firsts = torch.empty_like(self.firsts)

    def share(self, process: int) -> list[Tensor]:
        """The windows that a process passes on, in batches."""
        return shared_batches(len(self.job.windows), self.job.batch, process, self.processes.num_processes)

    def pass_through(self, layer: Any) -> None:
        """Pass this process's share through the layer that they enter."""
        job, device = self.job, self.job.device
        advance(layer, self.stream.calls[self.entered], self.states, job.batch, device)
        advance(layer, job.alone[self.entered], self.firsts, max(1, job.scale.batch // self.firsts.shape[1]), device)
        self.entered += 1

    def advance_to(self, index: int) -> None:
        """Pass this process's share on until it enters a layer."""
        while self.entered < index:
            with self.stream.layer(self.entered) as layer:
                self.pass_through(layer)

    def hand_over(self, owner: int) -> None:
        """Leave what enters the layer in `whole` and `whole_firsts` of the process of that number; all take part."""
        if self.processes.num_processes == 1:
            return
        mine, own = self.processes.process_index, self.states.split(self.job.batch)
        if mine == owner:
            self.whole_firsts.copy_(self.firsts)
        for process in range(self.processes.num_processes):
            for number, windows in enumerate(self.share(process)):
                into = self.whole[windows[0] : windows[-1] + 1]
                if mine == process == owner:
                    into.copy_(own[number])
                elif mine == process:
                    torch.distributed.send(own[number].to(self.job.device), owner)
                elif mine == owner:
                    received = torch.empty_like(into, device=self.job.device)
                    torch.distributed.recv(received, process)
                    into.copy_(received)
