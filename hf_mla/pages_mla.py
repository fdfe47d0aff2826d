# SPDX-License-Identifier: Apache-2.0
"""Pages of latents for continuous batching (`generate_batch`), of converted models and of the library's own with MLA.

The library's pages hold a key and a value of equal width: here, half of what a token takes each. Its manager makes them as the
model's configuration says, so while it does it is shown another one.

This file travels with every checkpoint: it imports only torch, transformers and files beside it.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import __version__ as transformers_version
from transformers.generation.continuous_batching import PagedAttentionCache

from .configuration_mla import release


class LatentPages(PagedAttentionCache):
    """The pages of continuous batching, which hold what a model gives them in two halves."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        """Append to the pages.

        Args:
            key_states: [1, 1, T, R + P + g], packed latents of the new tokens of all requests; or [1, 1, T, R].
            value_states: [1, 1, T, 0], or what is beside the latents, [1, 1, T, P].
            layer_idx: the layer.
            kwargs: what the attention is called with: where to write and read; updated in place.

        Returns:
            Both, of all tokens [S] of all requests.
        """
        widths = key_states.shape[-1], value_states.shape[-1]
        latent = nn.functional.pad(torch.cat([key_states, value_states], dim=-1), [0, sum(widths) % 2])
        key, value = latent.chunk(2, dim=-1)
        halves = super().update(key_states=key, value_states=value, layer_idx=layer_idx, kwargs=kwargs)
        return torch.cat(halves, dim=-1)[..., : sum(widths)].split(widths, dim=-1)


@contextlib.contextmanager
def configured(model: Any, **changes: Any) -> Iterator[None]:
    """Within this, a model shows a changed copy of its text's configuration; its modules have theirs."""
    given, model.config = model.config, copy.copy(model.config.get_text_config(decoder=True))
    for name, value in changes.items():
        setattr(model.config, name, value)
    try:
        yield
    finally:
        model.config = given


def prepare_latent_pages(prepare: Callable[[], Any], model: Any, width: int, **changes: Any) -> Any:
    """Make a manager of continuous batching as the library does, but with pages of latents.

    Args:
        prepare: the library's method for it, with its arguments.
        model: the model.
        width: the numbers that a token takes in a layer (one more where they are odd).
        **changes: what else of the configuration is to look different while pages and masks are made.

    Returns:
        The manager.

    Raises:
        NotImplementedError: this version of Transformers does not hand the pages to the attention.
    """
    if release(transformers_version) < (5, 19):
        raise NotImplementedError(
            f"Continuous batching of models with MLA needs Transformers 5.19 or newer; this is {transformers_version}."
        )
    manager = prepare()
    manager.continuous_batching_config.max_blocks_per_request = 0  # flash would write keys and values to the pages by itself
    create = type(manager)._create_batch_processor

    def create_with_latents() -> Any:
        with configured(model, num_key_value_heads=1, head_dim=math.ceil(width / 2), **changes):
            processor = create(manager)  # of the class: the library hands out a manager that it kept again, wrapped already
        processor.cache.__class__ = LatentPages
        return processor

    manager._create_batch_processor = create_with_latents
    return manager
