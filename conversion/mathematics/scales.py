# SPDX-License-Identifier: Apache-2.0
"""How much is worked on at a time."""

import math
from dataclasses import dataclass


HEAD_TOKENS = 1024  # whose logits are in memory at a time: those of a long sequence would outweigh the model
SURVEY_TOKENS = 1 << 14  # for the gradient, and to try sizes on


@dataclass(frozen=True)
class Scale:
    """How much is worked on at a time; numbers of tokens."""

    calibration: int
    """Of calibration text, unless given."""
    window: int
    """Of a calibration sequence, if the model's own context is not shorter."""
    long: int
    """Of a sequence that every second step of the end-to-end stage has, if the model's own context is not shorter."""
    step: int
    """Of a reconstruction step, or one sequence."""
    batch: int
    """Of a pass without training, or one sequence."""
    first: int
    """Different tokens that are seen as the first of a sequence, at most; as many again are drawn from the text."""
    fit: int
    """For least squares; few would undo a part of a long reconstruction."""
    compiled: float
    """Steps, of all layers together, from which on they are compiled: that takes ten seconds, and saves five milliseconds of one of
    a layer as wide as an 8B model's."""


SCALES = {
    "cuda": Scale(calibration=1 << 21, window=2048, long=8192, step=1 << 14, batch=8192, first=1 << 14, fit=1 << 18, compiled=2048),
    "cpu": Scale(calibration=1 << 17, window=2048, long=2048, step=1024, batch=1024, first=1 << 12, fit=1 << 15, compiled=math.inf),
}
