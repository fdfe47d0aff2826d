# SPDX-License-Identifier: Apache-2.0
"""What a conversion will do, from headers alone: sizes, memory, bytes read and written."""

import math
from operator import itemgetter
from typing import Any

from ..errors import UserError
from ..mathematics.closed_form import mla_config
from ..mathematics.reconstruct import NORM_EPS
from ..mathematics.scales import HEAD_TOKENS, SCALES, SURVEY_TOKENS
from ..output.deepseek import ENGINE_WIDTHS, possible_exports, widths_of
from ..output.reports import PerSide, PlanReport
from ..source.checkpoint import Checkpoint, open_checkpoint
from ..source.families import FAMILIES, has_biases, key_norms, kv_heads, mlp_width, refusal, rotary_width, source_head_dim
from ..source.loading import free_memory
from ..source.matching import ModelCheckpoint, match_model
from ..source.shards import DTYPES, ITEMSIZE, TORCH_NAMES


DEFAULT_KV_BUDGET = 0.3125
LADDER = (1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 1 / 2, 5 / 8, 3 / 4)  # of the original cache, for --max-ratio
LIBRARIES = 500_000_000  # bytes that Python, torch and Transformers take


def plan(
    source: str,
    *,
    kv_budget: float | None = None,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    qk_norm: str = "exact",
    dtype: str = "auto",
    revision: str | None = None,
) -> PlanReport:
    """Say what converting `source` would give and take, reading configuration and safetensors headers only.

    Args:
        source: a checkpoint folder, a .gguf file or a Hub id.
        kv_budget: share of the original cache to keep, in (0, 1], split by a rule here, by measurement in `convert`; or give
            the two sizes.
        kv_lora_rank: width of the latent.
        qk_rope_head_dim: width of the shared rotary key; an even divisor of the head width.
        qk_norm: "exact" or "fold", for models with QK-norm; see `convert`.
        dtype: type of the output's numbers; "auto" keeps the source's.
        revision: branch, tag or commit of a Hub id.

    Returns:
        The plan; `supported` is false, with the reason, for a model that cannot be converted.

    Raises:
        UserError: the source is no whole checkpoint, or the sizes cannot be had.

    Example:
        >>> report = plan("llama", kv_budget=0.3125)
        >>> report.kv_lora_rank, report.qk_rope_head_dim
        (44, 16)
        >>> report.kv_bytes_per_token
        PerSide(source=2304, converted=720)
    """
    checkpoint = open_checkpoint(source, revision, headers_only=True)
    reason = refusal(checkpoint.config)
    if reason is not None:
        return PlanReport(checkpoint.config.model_type, supported=False, reason=reason)
    sizes = possible_sizes(checkpoint.config, kv_budget, kv_lora_rank, qk_rope_head_dim, qk_norm)
    return make_plan(checkpoint, *sizes[0], dtype, qk_norm)


def make_plan(checkpoint: Checkpoint, kv_lora_rank: int, qk_rope_head_dim: int, dtype: str, qk_norm: str = "exact") -> PlanReport:
    """The plan for a checked checkpoint and settled sizes; see `plan`."""
    checkpoint = match_model(checkpoint)
    config = checkpoint.config
    heads, head_dim, hidden = config.num_attention_heads, source_head_dim(config), config.hidden_size
    norms = key_norms(config, qk_norm)
    source_floats = 2 * kv_heads(config) * head_dim
    converted_floats = kv_lora_rank + qk_rope_head_dim + norms
    source_itemsize = ITEMSIZE[checkpoint.dtype]
    stored = checkpoint.dtype if dtype == "auto" else DTYPES[dtype]
    itemsize = ITEMSIZE[stored]
    converted = mla_config(config, kv_lora_rank, qk_rope_head_dim, TORCH_NAMES[stored], qk_norm)
    converted.kv_a_layernorm_eps = NORM_EPS  # as where anything is fitted
    keys = norms * (converted.key_norm_width or head_dim)
    left = [checkpoint.stored.tensors[part] for part in checkpoint.kept.values()]
    kept = sum(tensor.bytes if dtype == "auto" else tensor.parameters * itemsize for tensor in left)
    attention = (
        heads * (head_dim + qk_rope_head_dim) * hidden  # q_proj
        + (kv_lora_rank + qk_rope_head_dim) * hidden  # kv_a_proj_with_mqa
        + heads * 2 * head_dim * kv_lora_rank  # kv_b_proj
        + heads * head_dim * hidden  # o_proj
        + keys * hidden  # k_proj
    )
    if has_biases(config):
        attention += heads * (head_dim + qk_rope_head_dim) + kv_lora_rank + qk_rope_head_dim + hidden + keys
    layer = attention * itemsize + kv_lora_rank * max(itemsize, 4 if stored == "F16" else 0)  # kv_a_layernorm
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
        peak_memory_bytes=memory_estimate(checkpoint, (kv_lora_rank, qk_rope_head_dim), SCALES["cpu"].calibration),
        bytes_read=checkpoint.stored.bytes,
        bytes_written=kept + config.num_hidden_layers * layer,
        **export_fields(converted),
    )


def export_fields(converted: Any, tokenizer: Any = None) -> dict[str, Any]:
    """What `export` can do with a converted model, by its configuration and, if given, its tokenizer: fields of a report."""
    exports = possible_exports(converted, tokenizer)
    padded = None if all(exports.values()) else widths_of(converted, ENGINE_WIDTHS).kv_floats_per_token_per_layer
    return {"exports": exports, "engine_kv_floats_per_token_per_layer": padded}


def possible_sizes(
    config: Any, kv_budget: float | None, kv_lora_rank: int | None, qk_rope_head_dim: int | None, qk_norm: str = "exact"
) -> list[tuple[int, int]]:
    """Rank and rotary width as given, or the ways to split a budget between them.

    First comes what a rule says that knows nothing of the weights: the widest rotary key within a third of the budget and half a
    head. `convert` tries it and its neighbours, from a quarter of its width to four times that.

    Args:
        config: the source's configuration.
        kv_budget: share of the cache to keep, or None.
        kv_lora_rank: width of the latent, or None.
        qk_rope_head_dim: width of the rotary key, or None.
        qk_norm: "exact" or "fold"; exact norms are paid from the budget.

    Returns:
        Pairs of rank and rotary width.

    Raises:
        UserError: both or half of the ways are used, or a number is out of range.
    """
    head_dim, rotary = source_head_dim(config), rotary_width(config)
    source = 2 * kv_heads(config) * head_dim
    rope_dims = [dim for dim in range(2, rotary + 1, 2) if rotary % dim == 0]
    allowed = ", ".join(map(str, rope_dims))
    if (kv_lora_rank is None) != (qk_rope_head_dim is None):
        raise UserError("--kv-lora-rank and --qk-rope-head-dim go together; give both, or --kv-budget")
    if kv_lora_rank is not None and qk_rope_head_dim is not None:
        if kv_budget is not None:
            raise UserError("--kv-budget and --kv-lora-rank exclude each other; give one of them")
        if qk_rope_head_dim not in rope_dims:
            of = f"head_dim {head_dim}" if rotary == head_dim else f"the {rotary} numbers of a head that are rotated"
            raise UserError(f"--qk-rope-head-dim is {qk_rope_head_dim}; allowed: {allowed} (even divisors of {of})")
        most = min(source - qk_rope_head_dim, config.hidden_size)
        if not 1 <= kv_lora_rank <= most:
            raise UserError(
                f"--kv-lora-rank is {kv_lora_rank}; allowed: 1 to {most}, the rank that keys and values have beside "
                f"--qk-rope-head-dim {qk_rope_head_dim}"
            )
        return [(kv_lora_rank, qk_rope_head_dim)]
    budget = DEFAULT_KV_BUDGET if kv_budget is None else kv_budget
    norms = key_norms(config, qk_norm)
    floats = math.floor(budget * source) - norms if 0 < budget <= 1 else 0
    fitting = [dim for dim in rope_dims if 3 * dim <= floats and 2 * dim <= head_dim]
    if not fitting:
        least = min(1.0, (6 + norms) / source)
        raise UserError(f"--kv-budget is {budget}; allowed: {least:.3g} to 1 (this cache has {source} numbers a layer)")
    rule = fitting[-1]
    near = [dim for dim in rope_dims if rule <= 4 * dim <= 16 * rule and 3 * dim <= 2 * floats and dim != rule]
    return [(min(floats - dim, config.hidden_size), dim) for dim in (rule, *near)]


def size_ladder(config: Any, qk_norm: str) -> list[tuple[int, int]]:
    """Rank and rotary width of caches from large to small: of each, the split by a rule and the next with a wider rotary key."""
    least = 6 + key_norms(config, qk_norm)
    source = 2 * kv_heads(config) * source_head_dim(config)
    shares = [share for share in LADDER if math.floor(share * source) >= least]
    sizes: list[tuple[int, int]] = []
    for rule, *near in (possible_sizes(config, share, None, None, qk_norm) for share in reversed(shares)):
        sizes += [rule, *sorted((size for size in near if size[1] > rule[1]), key=itemgetter(1))[:1]]
    return list(dict.fromkeys(sizes))


def computed_width(checkpoint: Checkpoint, device: str) -> int:
    """Bytes of a number that is computed with; see `compute_dtype`."""
    return {"F64": 8, "BF16": 2 if device == "cuda" else 4}.get(checkpoint.dtype, 4)


def memory_estimate(checkpoint: ModelCheckpoint, size: tuple[int, int], tokens: int, device: str = "cpu") -> int:
    """Bytes of memory that a conversion takes at its peak.

    Args:
        checkpoint: the source.
        size: rank and rotary width.
        tokens: of calibration text whose hidden states are held in memory; 0 if they are on disk.
        device: type of the device.

    Returns:
        Bytes, the libraries' own included.
    """
    config, scale = checkpoint.config, SCALES[device]
    width = computed_width(checkpoint, device)
    heads, head_dim, hidden = config.num_attention_heads, source_head_dim(config), config.hidden_size
    queries, keys_values = heads * head_dim, 2 * kv_heads(config) * head_dim
    rank, rope_dim = size
    layer = largest_layer(checkpoint)
    table = config.vocab_size * hidden  # embedding or head
    mla = (rank + rope_dim) * hidden + heads * ((head_dim + rope_dim) * hidden + 2 * head_dim * rank + head_dim * hidden)
    window = min(scale.window, config.max_position_embeddings)
    step, batch = max(scale.step, window), max(scale.batch, window)
    # Numbers per token that a layer keeps for its backward pass: the original's, and the converted attention's.
    original = 10 * hidden + 6 * queries + 4 * keys_values + 6 * mlp_width(config)
    converted = 8 * hidden + heads * 16 * (head_dim + rope_dim) + 6 * rank
    fitting = 4 * (7 * mla + step * converted)  # weights, gradient, momentum, work space and what is best so far, in float32
    # In float64, and in part complex.
    closed_form = 8 * (6 * keys_values**2 + 6 * hidden**2 + 4 * queries**2 + 8 * (queries + keys_values) * hidden + 3 * mla)
    return LIBRARIES + max(
        table * width + HEAD_TOKENS * config.vocab_size * 16,
        tokens * hidden * width + layer * width + max(fitting, closed_form),
        layer * width + batch * original * width,
    )


def largest_layer(checkpoint: ModelCheckpoint) -> int:
    """Numbers in the largest layer: some have experts, and the first may have none."""
    layers: dict[str, int] = {}
    for name, tensor in checkpoint.tensors.items():
        place, _, inside = name.partition(".layers.")
        if inside:
            layer = f"{place}.{inside.split('.')[0]}"
            layers[layer] = layers.get(layer, 0) + tensor.parameters
    return max(layers.values())


def disk_estimate(checkpoint: Checkpoint, bytes_written: int, tokens: int, window: int, device: str, own: int = 0) -> int:
    """Bytes on disk that a conversion takes at its peak, if hidden states of the calibration text fit in memory.

    Args:
        checkpoint: the source.
        bytes_written: of the output.
        tokens: of calibration text.
        window: tokens in a sequence.
        device: type of the device.
        own: tokens of text that the source writes: 4 bytes each, and up to 8 as text if that is kept.

    Returns:
        Bytes of the output, and of what is kept until it is whole.
    """
    config = checkpoint.config
    surveyed = min(tokens, max(4 * window, SURVEY_TOKENS))
    inputs = surveyed * config.hidden_size * computed_width(checkpoint, device)
    moments = 2 * 8 * (kv_heads(config) * source_head_dim(config)) ** 2  # of keys and of values, in float64
    inside = f".{FAMILIES[config.model_type].attention_name}."
    attention = sum(tensor.parameters for name, tensor in checkpoint.tensors.items() if inside in name)
    layers = bytes_written * attention // checkpoint.parameters
    return 12 * own + config.num_hidden_layers * moments + max(config.num_hidden_layers * inputs, layers + bytes_written)


def check_memory(checkpoint: ModelCheckpoint, sizes: list[tuple[int, int]], device: Any) -> None:
    """Raise a UserError if a conversion's peak does not fit in what is free, hidden states on disk.

    Args:
        checkpoint: the source.
        sizes: rank and rotary width, all that will be tried.
        device: where to compute.

    Raises:
        UserError: it does not fit.
    """
    available = free_memory(device)
    needed = max(memory_estimate(checkpoint, size, 0, device.type) for size in sizes) - LIBRARIES
    if needed > available:
        raise UserError(
            f"converting {checkpoint.name} takes about {needed / 1e9:.1f} GB on {device}, {available / 1e9:.1f} GB are free; "
            "use another --device or machine"
        )
