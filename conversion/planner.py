# SPDX-License-Identifier: Apache-2.0
"""What a conversion will do, from headers alone: sizes, memory, bytes read and written."""

import math
from dataclasses import dataclass
from typing import Any

from .checkpoint import ITEMSIZE, Checkpoint, open_checkpoint
from .errors import UserError
from .families import FAMILIES, refusal


DEFAULT_KV_BUDGET = 0.3125
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CALIBRATION_WINDOW = 1024


@dataclass(frozen=True)
class PerSide:
    """One number for the source and one for the converted model."""

    source: float
    converted: float


@dataclass(frozen=True)
class PlanReport:
    """The result of `plan`; the field names are the JSON keys. Of an unsupported model only the first three are set."""

    model_type: str
    supported: bool
    reason: str | None
    num_hidden_layers: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    kv_floats_per_token_per_layer: PerSide | None = None
    kv_bytes_per_token: PerSide | None = None
    kv_ratio: float | None = None
    peak_memory_bytes: int | None = None
    bytes_read: int | None = None
    bytes_written: int | None = None


def plan(
    source: str,
    *,
    kv_budget: float | None = None,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    dtype: str = "auto",
    revision: str | None = None,
) -> PlanReport:
    """Say what converting `source` would give and take, reading configuration and safetensors headers only.

    Args:
        source: a checkpoint folder or a Hub id.
        kv_budget: share of the original cache to keep, in (0, 1]; or give the two sizes.
        kv_lora_rank: width of the latent.
        qk_rope_head_dim: width of the shared rotary key; an even divisor of the head width.
        dtype: type of the output's numbers; "auto" keeps the source's.
        revision: branch, tag or commit of a Hub id.

    Returns:
        The plan; `supported` is false, with the reason, for a model that cannot be converted.

    Raises:
        UserError: the source is no whole checkpoint, or the sizes cannot be had.
    """
    checkpoint = open_checkpoint(source, revision, headers_only=True)
    reason = refusal(checkpoint.config)
    if reason is not None:
        return PlanReport(checkpoint.config.model_type, supported=False, reason=reason)
    rank, rope_dim = choose_size(checkpoint.config, kv_budget, kv_lora_rank, qk_rope_head_dim)
    return make_plan(checkpoint, rank, rope_dim, dtype)


def make_plan(checkpoint: Checkpoint, kv_lora_rank: int, qk_rope_head_dim: int, dtype: str) -> PlanReport:
    """The plan for a checked checkpoint and settled sizes; see `plan`."""
    config = checkpoint.config
    check_attention_shapes(checkpoint)
    source_floats = 2 * config.num_key_value_heads * config.head_dim
    converted_floats = kv_lora_rank + qk_rope_head_dim
    source_itemsize = ITEMSIZE[checkpoint.dtype]
    itemsize = source_itemsize if dtype == "auto" else ITEMSIZE[DTYPES[dtype]]
    written = 0
    for name, tensor in checkpoint.tensors.items():
        replaced = ".self_attn." in name
        if not replaced:
            written += tensor.parameters * (ITEMSIZE[tensor.dtype] if dtype == "auto" else itemsize)
    heads, head_dim, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
    attention = (
        heads * (head_dim + qk_rope_head_dim) * hidden  # q_proj
        + converted_floats * hidden  # kv_a_proj_with_mqa
        + kv_lora_rank  # kv_a_layernorm
        + heads * 2 * head_dim * kv_lora_rank  # kv_b_proj
        + heads * head_dim * hidden  # o_proj
    )
    return PlanReport(
        model_type=config.model_type,
        supported=True,
        reason=None,
        num_hidden_layers=config.num_hidden_layers,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        kv_floats_per_token_per_layer=PerSide(source_floats, converted_floats),
        kv_bytes_per_token=PerSide(
            config.num_hidden_layers * source_floats * source_itemsize,
            config.num_hidden_layers * converted_floats * itemsize,
        ),
        kv_ratio=converted_floats / source_floats,
        peak_memory_bytes=memory_estimate(checkpoint, backward=True),
        bytes_read=checkpoint.bytes,
        bytes_written=written + config.num_hidden_layers * attention * itemsize,
    )


def check_attention_shapes(checkpoint: Checkpoint) -> None:
    """Raise a UserError unless every layer has the attention tensors that the configuration announces."""
    config = checkpoint.config
    prefix = FAMILIES[config.model_type].attention
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    hidden = config.hidden_size
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{checkpoint.name}: {config.num_attention_heads} query heads do not divide among "
            f"{config.num_key_value_heads} key/value heads; config.json is wrong"
        )
    expected = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries)}
    for layer in range(config.num_hidden_layers):
        for module, shape in expected.items():
            name = f"{prefix.format(layer=layer)}{module}.weight"
            tensor = checkpoint.tensors.get(name)
            if tensor is None:
                raise UserError(f"{checkpoint.name} has no tensor {name}; config.json announces {config.num_hidden_layers} layers")
            if tensor.shape != shape:
                raise UserError(f"{checkpoint.name}: {name} is {list(tensor.shape)}, config.json announces {list(shape)}")


def choose_size(config: Any, kv_budget: float | None, kv_lora_rank: int | None, qk_rope_head_dim: int | None) -> tuple[int, int]:
    """Settle rank and rotary width, from a budget or as given.

    A budget is split by rule: the widest rotary key within a third of it and half a head. A narrower key costs much more than
    the latent gains (bundled model, 60 numbers: perplexity x 1.42 at 44 + 16, x 4.5 at 52 + 8).

    Args:
        config: the source's configuration.
        kv_budget: share of the cache to keep, or None.
        kv_lora_rank: width of the latent, or None.
        qk_rope_head_dim: width of the rotary key, or None.

    Returns:
        Rank and rotary width.

    Raises:
        UserError: both or half of the ways are used, or a number is out of range.
    """
    source = 2 * config.num_key_value_heads * config.head_dim
    rope_dims = [dim for dim in range(2, config.head_dim + 1, 2) if config.head_dim % dim == 0]
    allowed = ", ".join(map(str, rope_dims))
    if (kv_lora_rank is None) != (qk_rope_head_dim is None):
        raise UserError("--kv-lora-rank and --qk-rope-head-dim go together; give both, or --kv-budget")
    if kv_lora_rank is not None and qk_rope_head_dim is not None:
        if kv_budget is not None:
            raise UserError("--kv-budget and --kv-lora-rank exclude each other; give one of them")
        if qk_rope_head_dim not in rope_dims:
            raise UserError(
                f"--qk-rope-head-dim is {qk_rope_head_dim}; allowed: {allowed} (even divisors of head_dim {config.head_dim})"
            )
        most = min(source - qk_rope_head_dim, config.hidden_size)
        if not 1 <= kv_lora_rank <= most:
            raise UserError(
                f"--kv-lora-rank is {kv_lora_rank}; allowed: 1 to {most}, the rank that keys and values have beside "
                f"--qk-rope-head-dim {qk_rope_head_dim}"
            )
        return kv_lora_rank, qk_rope_head_dim
    budget = DEFAULT_KV_BUDGET if kv_budget is None else kv_budget
    floats = math.floor(budget * source) if 0 < budget <= 1 else 0
    fitting = [dim for dim in rope_dims if 3 * dim <= floats and 2 * dim <= config.head_dim]
    if not fitting:
        raise UserError(
            f"--kv-budget is {budget}; allowed: {min(1.0, 6 / source):.3g} to 1 (this cache has {source} numbers a layer)"
        )
    return min(floats - fitting[-1], config.hidden_size), fitting[-1]


def memory_estimate(checkpoint: Checkpoint, *, backward: bool, window: int = CALIBRATION_WINDOW) -> int:
    """Bytes that calibrating takes: float32 weights, statistics, and the activations of one window.

    Args:
        checkpoint: the source.
        backward: with the activations of all layers, kept for the backward pass; else of one layer.
        window: tokens per sequence.

    Returns:
        Bytes.
    """
    config = checkpoint.config
    width = max(4, ITEMSIZE[checkpoint.dtype])
    queries = config.num_attention_heads * config.head_dim
    keys = 2 * config.num_key_value_heads * config.head_dim
    per_layer = 8 * config.hidden_size + 4 * queries + 2 * keys + 4 * config.intermediate_size
    activations = window * (per_layer * (config.num_hidden_layers if backward else 2) + 4 * config.vocab_size)
    statistics = config.num_hidden_layers * (config.hidden_size**2 + keys**2 + queries * (queries + config.hidden_size))
    return width * (checkpoint.parameters + activations) + 8 * statistics
