# SPDX-License-Identifier: Apache-2.0
"""What `convert` reports; the field names are the JSON keys."""

from dataclasses import dataclass, field

from ..commands.plan import PerSide, PlanReport


@dataclass(frozen=True)
class LayerReport:
    """How well one layer was converted; errors are relative squared ones of the attention output, on held-back text."""

    layer: int
    energy_kept: float
    """Share of the gradient-weighted energy of keys and values that the latent keeps."""
    error_closed_form: float
    error_reconstructed: float | None = None

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
    layers: list[LayerReport] = field(default_factory=list)
    held_back_tokens: int = 0
    """Calibration text that nothing was fitted to; what follows is measured on it."""
    perplexity: PerSide | None = None
    perplexity_ratio: float | None = None
    kl: float | None = None
    """Mean Kullback-Leibler divergence of the converted model from the source, in nats per token."""
    top1_agreement: float | None = None
    """Share of positions at which both models find the same token likeliest."""
    output: str = ""
