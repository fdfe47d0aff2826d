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


logger = logging.getLogger(__name__)

EAGER_STEPS = 3  # of each shape, before it is captured: what is compiled and set up at first is no part of a graph


class CapturedSteps:
    """Runs a function that leaves gradients in what is trained; from the fourth batch of a shape on as a graph.

    Graphs share their memory, as no two run at a time: what one returns is copied before another runs. If a function cannot be
    captured, or there is not the memory, it is called as it is, now and later.

    Args:
        trained: the parameters that the function adds gradients to.
        step: the function, of token ids [B, T]; it returns tensors.
    """

    def __init__(self, trained: Sequence[nn.Parameter], step: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.trained, self.step = trained, step
        self.able = True
        self.seen: dict[torch.Size, int] = {}
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]] = {}
        self.gradients: list[Tensor] = []  # of what is trained, in every graph

    def __call__(self, ids: Tensor) -> tuple[Tensor, ...]:
        """What the function returns for token ids [B, T]; its gradients take the place of those before."""
        self.seen[ids.shape] = self.seen.get(ids.shape, 0) + 1
        if self.able and ids.shape not in self.graphs and self.seen[ids.shape] > EAGER_STEPS:
            self.capture(ids)
        if ids.shape not in self.graphs:
            return self.step(ids)
        graph, place, results = self.graphs[ids.shape]
        place.copy_(ids)
        graph.replay()
        self.put_gradients()
        return tuple(result.clone() for result in results)

    def capture(self, ids: Tensor) -> None:
        """Make a graph for the shape of `ids`."""
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
        except RuntimeError as error:  # of memory too
            logger.info("steps are not captured as CUDA graphs: %s", error)
            torch.cuda.set_stream(stream)  # a capture that failed stays on its own
            self.able = False
            self.graphs.clear()
            self.gradients.clear()
            for parameter in self.trained:
                parameter.grad = None
            torch.cuda.empty_cache()

    def put_gradients(self) -> None:
        """Let the parameters' gradients be those that graphs write; an optimizer lets go of them after each step."""
        for parameter, gradient in zip(self.trained, self.gradients, strict=True):
            parameter.grad = gradient
