# SPDX-License-Identifier: Apache-2.0
"""The parameters of a narrower RoPE whose pairs turn as fast as the first of every fold group did.

Most types compute a pair's frequency from base^(-2i/P) alone, so a narrower one has every M-th frequency of the wider by itself.
Two do not:

* "yarn" rounds the ends of its ramp in units of the width. Said in turns per context, and not rounded, they are the same at any
  width. In a configuration of several RoPEs the library always rounds: there the ladder is listed, as "longrope" does.
* "longrope" lists a factor for every pair.
"""

import math
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..source.families import ropes, rotary_width


def narrowed(config: Any, kind: str | None, rope_dim: int) -> dict[str, Any]:
    """The parameters of RoPE, one of a source's (see `families.ropes`), at width P."""
    rope, width = dict(ropes(config)[kind]), rotary_width(config)
    if "partial_rotary_factor" in rope:  # of P, which is all that is rotated; left out, it would be the family's default
        rope["partial_rotary_factor"] = 1.0
    folded = width // rope_dim
    if folded == 1:
        return rope
    if rope["rope_type"] == "longrope":
        return rope | {name: rope[name][::folded] for name in ("short_factor", "long_factor")}
    if rope["rope_type"] == "yarn":
        context, base = rope["original_max_position_embeddings"], rope["rope_theta"]
        if kind is not None:
            frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, layer_type=kind)
            factors = [base ** (-2 * i / rope_dim) / pair for i, pair in enumerate(frequencies[::folded].tolist())]
            listed = {"rope_type": "longrope", "rope_theta": base, "original_max_position_embeddings": context}
            return listed | {"short_factor": factors, "long_factor": factors, "attention_factor": factor}
        if rope.get("truncate", True):
            pairs = [width * math.log(context / (2 * math.pi * turns)) / (2 * math.log(base)) for turns in betas(rope)]
            ends = max(math.floor(pairs[0]), 0), min(math.ceil(pairs[1]), width - 1)
            fast, slow = (context / (2 * math.pi * base ** (2 * end / width)) for end in ends)
            return rope | {"truncate": False, "beta_fast": fast, "beta_slow": slow}
    return rope


def betas(rope: dict[str, Any]) -> tuple[float, float]:
    """Turns per context at which YaRN's ramp begins and ends; what the library takes where they are not given."""
    return rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
