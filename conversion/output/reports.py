# SPDX-License-Identifier: Apache-2.0
"""What the commands return; the field names are the JSON keys."""

from dataclasses import dataclass, field, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints


HEALING_RATIO = 1.05  # of perplexities; above it a model needs fine-tuning


@dataclass(frozen=True)
class PerSide:
    """One number for the source and one for the converted model."""

    source: float
    converted: float


def with_sides(measures: dict[str, Any]) -> dict[str, Any]:
    """Measures by name, those that were taken of both models as a `PerSide`."""
    return {name: PerSide(**value) if isinstance(value, dict) else value for name, value in measures.items()}


def from_json(kind: Any, data: Any) -> Any:
    """A report as it was before it became JSON; `kind` is its class, or the type of any value in it."""
    if NoneType in get_args(kind):
        return None if data is None else from_json(get_args(kind)[0], data)
    if get_origin(kind) is list:
        return [from_json(get_args(kind)[0], entry) for entry in data]
    if is_dataclass(kind):
        types = get_type_hints(kind)
        return kind(**{name: from_json(types[name], value) for name, value in data.items()})  # type: ignore[operator]
    return data


@dataclass(frozen=True)
class Widths:
    """Of the attention of a model with MLA, by DeepSeek's names."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int

    @property
    def kv_floats_per_token_per_layer(self) -> int:
        """Numbers that one layer caches for one token."""
        return self.kv_lora_rank + self.qk_rope_head_dim


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
    exports: dict[str, str | None] = field(default_factory=dict)
    """For each format of `export`, why the converted model cannot be written in it, or None; a plan has not read the tokenizer."""
    engine_kv_floats_per_token_per_layer: int | None = None
    """What an export with `pad` "engine" caches; None where there can be none."""


@dataclass(frozen=True)
class LayerReport:
    """How well one layer was converted.

    Errors are relative squared ones of the attention output on held-back text; each token counts by what the next norm sees of it.
    """

    layer: int
    energy_kept: float
    """Share of the attention output's energy that the closed form keeps: lost rank and lost rotation are both missing from it."""
    error_closed_form: float
    error_reconstructed: float | None = None
    """Of what was kept."""
    steps_kept: int = 0
    """After how many steps it was at its best and is kept; 0 for the closed form."""
    error_by_text: dict[str, float] = field(default_factory=dict)
    """Of the layer as it is stored, on each text."""

    @property
    def error(self) -> float:
        """Of the layer as it is stored."""
        return self.error_closed_form if self.error_reconstructed is None else self.error_reconstructed


@dataclass(frozen=True)
class Candidate:
    """A way to spend a budget, and the mean error of the layers that were tried with it."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    error: float


@dataclass(frozen=True)
class FrontierPoint(Candidate):
    """A size that `max_ratio` looked at: its cache, and what that costs in perplexity."""

    kv_ratio: float
    predicted_ratio: float
    """Of perplexities, from the error; of a size that was converted, what was predicted before."""
    measured_ratio: float | None = None
    """On held-back calibration text; None of a size that was not converted."""


@dataclass(frozen=True)
class Closeness:
    """How close the models are on some text."""

    perplexity: PerSide
    perplexity_ratio: float
    kl: float
    """Mean Kullback-Leibler divergence of the converted model from the source, in nats per token."""
    top1_agreement: float
    """Share of positions at which both models find the same token likeliest."""


@dataclass(frozen=True)
class TextReport(Closeness):
    """How close the models are on one of the calibration texts, on a part of it that nothing was fitted to."""

    name: str
    tokens: int
    """Of the text, what was held back included."""
    held_back_tokens: int


@dataclass(frozen=True)
class ConvertReport(PlanReport):
    """The result of `convert`; the field names are the JSON keys."""

    seconds: float = 0.0
    """Of this run; what an interrupted one had done before is not counted."""
    calibration_tokens: int = 0
    window: int = 0
    """Tokens in a sequence of calibration text."""
    steps: int = 0
    candidates: list[Candidate] = field(default_factory=list)
    """What a budget was tried with; empty where the sizes were given."""
    frontier: list[FrontierPoint] = field(default_factory=list)
    """What `max_ratio` was looked for in, the smallest cache first; empty where the size was given otherwise."""
    layers: list[LayerReport] = field(default_factory=list)
    held_back_tokens: int = 0
    """Calibration text that nothing was fitted to; what follows is measured on it."""
    perplexity: PerSide | None = None
    perplexity_ratio: float | None = None
    kl: float | None = None
    """Mean Kullback-Leibler divergence of the converted model from the source, in nats per token."""
    top1_agreement: float | None = None
    """Share of positions at which both models find the same token likeliest."""
    texts: list[TextReport] = field(default_factory=list)
    """The same for each text."""
    layers_alone: Closeness | None = None
    """The same before the end-to-end stage, if there was one."""
    end_to_end: "HealReport | None" = None
    """What the end-to-end stage did; held-back text has chosen the best of its weights, so it flatters them a little."""
    output: str = ""
    repository: str | None = None
    """On the Hub, where the output is uploaded to."""


@dataclass(frozen=True)
class PositionReport:
    """Both models' perplexity on one part of all sequences of a length."""

    start: int
    """The first position of the part, counted from 0."""
    end: int
    """The first one after it."""
    perplexity: PerSide
    perplexity_ratio: float


@dataclass(frozen=True)
class ContextReport(Closeness):
    """How close the models are on sequences of one length."""

    window: int
    """Tokens in a sequence."""
    tokens: int
    positions: list[PositionReport] = field(default_factory=list, kw_only=True)
    """The same in eight parts of a sequence, the beginning first."""


@dataclass(frozen=True)
class NeedleReport:
    """How many of the numbers at one depth of texts of one length the models found again."""

    length: int
    """Tokens of a sequence, the answer's included."""
    depth: float
    """Share of the text that stands before the number."""
    questions: int
    accuracy: PerSide
    """Share of the questions that were answered to the digit."""


@dataclass(frozen=True)
class TaskReport:
    """How many short questions of one kind the models answered to the letter, after examples."""

    task: str
    questions: int
    accuracy: PerSide


@dataclass(frozen=True)
class RecallReport:
    """What both models answered, by greedy generation."""

    needles: list[NeedleReport]
    """The shortest texts first, and in each length by depth."""
    tasks: list[TaskReport]


@dataclass(frozen=True)
class AnswerReport:
    """What both models went on with after a prompt, greedily."""

    prompt: str
    source: str
    converted: str


@dataclass(frozen=True)
class VerifyReport(ContextReport):
    """The result of `verify`; the field names are the JSON keys. What it inherits is of the shortest sequences."""

    contexts: list[ContextReport]
    """Sequences of up to 1024 tokens, and of the whole context that the model was trained for if that is more."""
    kv_bytes_per_token: PerSide
    """Measured from the caches after a forward pass."""
    absorbed_vs_expanded_max_error: float
    """Largest difference between logits of the prompt pass and of token-by-token decoding."""
    verdict: str
    passed: bool
    dtype: str
    """What both models computed and cached in."""
    needle: RecallReport | None = None
    """Only where it was asked for."""
    answers: list[AnswerReport] = field(default_factory=list)
    """Only where a page was asked for."""


@dataclass(frozen=True)
class HealReport:
    """The result of `heal`; the field names are the JSON keys."""

    train: str
    steps: int
    """That were to be taken."""
    tokens_per_step: int
    """Over all processes."""
    window: int
    trained_parameters: int
    memory_bytes: dict[str, int]
    """Of one process without sharding, by what it is for; an estimate."""
    steps_taken: int = 0
    stopped_early: bool = False
    """Because held-out perplexity did not fall any more."""
    seconds: float = 0.0
    """Of this run; what an interrupted one had done before is not counted."""
    history: list[dict[str, float]] = field(default_factory=list)
    """`step` with `divergence` (nats per position) and `tokens_per_second`, or with `perplexity` on held-back text."""
    verify: VerifyReport | None = None
    """The result against the source, on held-back text."""
    output: str = ""


@dataclass(frozen=True)
class ExportReport:
    """The result of `export`; the field names are the JSON keys. Of a refused checkpoint only the first two are set."""

    format: str
    refused: str | None
    """Why the format cannot hold the model; then nothing was written."""
    tensors: int | None = None
    bytes_written: int | None = None
    padded: Widths | None = None
    """Widths of what was written."""
    kv_floats_per_token_per_layer: PerSide | None = None
    """Of the checkpoint that was given, and of what was written."""
    engines: dict[str, str | None] = field(default_factory=dict)
    """For each engine, why its own class does not take such widths, or None."""
    output: str = ""


@dataclass(frozen=True)
class BenchContext:
    """Both models' decoding at one context."""

    context: int
    """Tokens in a sequence's cache when the last of them is decoded; all of the cache's room."""
    decode_tokens_per_second: PerSide
    """Of the whole batch."""
    decode_ms_per_token: PerSide
    """Time of a step, which gives one token to each sequence: the median of the stretches."""
    spread: PerSide
    """Between the fastest and the slowest stretch, as a share of the median."""
    cache_bytes: PerSide
    """Measured from the caches after the last step."""
    speedup: float
    """Tokens per second of the converted model over those of the source."""
    cache_ratio: float


@dataclass(frozen=True)
class BenchReport(BenchContext):
    """The result of `bench`; the field names are the JSON keys. What it inherits is of the longest context."""

    contexts: list[BenchContext]
    names: dict[str, str]
    """What `source` and `converted` are: these, or the attention implementations that one model was run with."""
    cache: str
    """"static" or "dynamic"."""
    batch: int
    new_tokens: int
    """Steps in a stretch."""
    repeats: int
    """Stretches."""
    device: str
    dtype: str
    torch: str
    transformers: str


@dataclass(frozen=True)
class FileChange:
    """A file that an older checkpoint should have otherwise."""

    file: str
    reason: str


@dataclass(frozen=True)
class RefreshReport:
    """The result of `refresh`; the field names are the JSON keys."""

    output: str
    version: str
    """Of hf_mla as it is installed."""
    version_before: str
    """That config.json named."""
    changes: list[FileChange]
    """In the order in which they are made."""
    backup: str | None = None
    """The folder with what was replaced; None if nothing was."""
    dry_run: bool = False


@dataclass(frozen=True)
class Generation:
    """What one model wrote, and what its cache held at the end."""

    text: str
    new_tokens: int
    cache_bytes: int


@dataclass(frozen=True)
class DemoReport:
    """The result of `demo`; the field names are the JSON keys."""

    convert: ConvertReport
    verify: VerifyReport
    prompt: str
    source: Generation
    converted: Generation
