# SPDX-License-Identifier: Apache-2.0
"""Forward and backward passes of a training, captured as CUDA graphs and replayed.

A step of a small model is thousands of kernels, and a processor takes longer to launch them than a GPU to run them. A graph is
launched at once. What it needs: the same tensors in each step (the batch and the gradients have places of their own), shapes that
come again, and nothing that waits for the GPU.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import brief


logger = logging.getLogger(__name__)

EAGER_STEPS = 3  # of each shape, before it is captured: what is compiled and set up at first is no part of a graph


class CapturedSteps:
    """Runs a function that leaves gradients in what is trained; from the fourth batch of a shape on as a graph.

    Graphs share their memory, as no two run at a time: what one returns is copied before another runs. It is theirs until they
    are gone, so nothing is captured where what is free would not do for them and for a step beside them.

    Args:
        trained: the parameters that the function adds gradients to.
        step: the function, of token ids [B, T]; it returns tensors, and waits for the GPU nowhere.
    """

    def __init__(self, trained: Sequence[nn.Parameter], step: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.trained, self.step = trained, step
        self.able = True
        self.seen: dict[torch.Size, int] = {}
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]] = {}
        self.gradients: list[Tensor] = []  # of what is trained, in every graph

    def __call__(self, ids: Tensor) -> tuple[Tensor, ...]:
        """What the function returns for token ids [B, T]; its gradients take the place of those before."""
        if not self.seen:
            torch.cuda.reset_peak_memory_stats()
        self.seen[ids.shape] = self.seen.get(ids.shape, 0) + 1
        if self.able and ids.shape not in self.graphs and self.seen[ids.shape] > EAGER_STEPS:
            self.able = bool(self.graphs) or has_room()
            if self.able:
                self.capture(ids)
        if ids.shape not in self.graphs:
            return self.step(ids)
        graph, place, results = self.graphs[ids.shape]
        place.copy_(ids)
        graph.replay()
        self.put_gradients()
        return tuple(result.clone() for result in results)

    def capture(self, ids: Tensor) -> None:
        """Make a graph for the shape of `ids`; if that fails, of memory say, none are made or used any more."""
        stream = torch.cuda.current_stream()
        try:
            if not self.gradients:
                self.gradients = [torch.zeros_like(parameter) for parameter in self.trained]
            pool = next((graph.pool() for graph, *_ in self.graphs.values()), None)
            graph, place = torch.cuda.CUDAGraph(), ids.clone()
            self.put_gradients()
            with torch.cuda.graph(graph, pool=pool):
                torch._foreach_zero_(self.gradients)
                results = self.step(place)
            self.graphs[ids.shape] = graph, place, results
        except RuntimeError as error:
            logger.warning("steps are not captured as CUDA graphs, which makes those of small models slower: %s", brief(error))
            torch.cuda.set_stream(stream)  # a capture that failed stays on its own
            self.able = False
            self.graphs.clear()
            self.gradients.clear()
            for parameter in self.trained:
                parameter.grad = None

    def put_gradients(self) -> None:
        """Let the parameters' gradients be those that graphs write; an optimizer lets go of them after each step."""
        for parameter, gradient in zip(self.trained, self.gradients, strict=True):
            parameter.grad = gradient


def has_room() -> bool:
    """Whether twice what a step has taken so far, beside what was there before and after it, is free."""
    torch.cuda.empty_cache()
    step = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] > 2 * step
