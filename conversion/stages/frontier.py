# SPDX-License-Identifier: Apache-2.0
"""The smallest cache that keeps a perplexity ratio, out of a ladder of sizes of which few are converted.

All sizes are tried on a few layers (`Job.try_sizes`). The logarithm of a model's perplexity ratio goes with a power of that error,
by a factor that is a model's own: it starts as a guess, and every conversion corrects it for the sizes near its own. The smallest
size that is predicted to keep the ratio is converted next, until that one is measured. What is measured is a file, so a
search goes on where it was stopped, also with another ratio. docs/reconstruction.md has the figures behind the constants.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..mathematics.measures import perplexity
from ..output.progress import size_folder, write_json
from ..output.reports import Candidate, FrontierPoint


FACTOR, POWER = 1.0, 1.5  # of the error that sizes are tried with, to the logarithm of the ratio
CONVERSIONS = 3  # at most, and more only until one keeps the ratio
LEAST = 1e-6  # an error or a logarithm below is rounding


def predicted(error: float, measured: list[FrontierPoint]) -> float:
    """The perplexity ratio of a size by its error, from what was measured of the size with the nearest error."""
    logarithm, factor = math.log(max(error, LEAST)), FACTOR
    if measured:
        near = min(measured, key=lambda point: abs(math.log(max(point.error, LEAST)) - logarithm))
        assert near.measured_ratio is not None
        factor = max(math.log(near.measured_ratio), LEAST) / max(near.error, LEAST) ** POWER
    return perplexity(factor * math.exp(POWER * logarithm))


def with_predictions(points: list[FrontierPoint]) -> list[FrontierPoint]:
    """The sizes, what is predicted of those not measured brought up to date."""
    measured = [point for point in points if point.measured_ratio is not None]
    return [p if p.measured_ratio is not None else replace(p, predicted_ratio=predicted(p.error, measured)) for p in points]


def keeps(point: FrontierPoint, max_ratio: float) -> bool:
    """Whether a size keeps the ratio, as far as is known."""
    return (point.predicted_ratio if point.measured_ratio is None else point.measured_ratio) <= max_ratio


def smallest(points: list[FrontierPoint], max_ratio: float) -> FrontierPoint:
    """The smallest size that keeps the ratio, as far as is known; if there is none, the largest."""
    fitting = [point for point in points if keeps(point, max_ratio)]
    return min(fitting, key=lambda point: point.kv_ratio) if fitting else max(points, key=lambda point: point.kv_ratio)


def search(
    folder: Path,
    candidates: list[Candidate],
    kv_ratios: list[float],
    max_ratio: float,
    measure: Callable[[FrontierPoint], float],
    processes: Any,
) -> tuple[FrontierPoint, list[FrontierPoint]]:
    """Convert sizes until the smallest one that keeps a perplexity ratio is known.

    Args:
        folder: where results are kept; those of sizes that are out of the question are removed.
        candidates: the sizes, with errors; of those with as large a cache, the one with the least is meant.
        kv_ratios: of their caches to the source's.
        max_ratio: the ratio.
        measure: converts to a size, and returns the ratio that the main process measured.
        processes: the main one keeps what was measured, the others read it.

    Returns:
        The size, and one of each cache, from small to large, with what is known of their ratios.

    Raises:
        UserError: the largest size does not keep the ratio.
    """

    def file(point: FrontierPoint) -> Path:
        return folder / f"measured-{size_folder(folder, point).name}.json"

    def known(point: FrontierPoint) -> FrontierPoint:
        return replace(point, **json.loads(file(point).read_text(encoding="utf-8"))) if file(point).exists() else point

    splits: dict[float, FrontierPoint] = {}  # the better one of each cache
    for size, kv_ratio in zip(candidates, kv_ratios, strict=True):
        if kv_ratio not in splits or size.error < splits[kv_ratio].error:
            splits[kv_ratio] = FrontierPoint(**asdict(size), kv_ratio=kv_ratio, predicted_ratio=1.0)
    points = [splits[kv_ratio] for kv_ratio in sorted(splits)]
    while True:
        points = with_predictions([known(point) for point in points])
        measured = [point for point in points if point.measured_ratio is not None]
        kept = [point for point in measured if keeps(point, max_ratio)]
        point = smallest(kept if kept and len(measured) >= CONVERSIONS else points, max_ratio)
        if point.measured_ratio is not None:
            break
        ratio = measure(point)
        if processes.is_main_process:
            write_json({"predicted_ratio": point.predicted_ratio, "measured_ratio": ratio}, file(point))
            best = smallest([*kept, replace(point, measured_ratio=ratio)], max_ratio)
            for other in (*measured, point):
                if size_folder(folder, other) != size_folder(folder, best):
                    shutil.rmtree(size_folder(folder, other), ignore_errors=True)
        processes.wait_for_everyone()
    if not keeps(point, max_ratio):
        raise UserError(
            f"--max-ratio is {max_ratio}; the largest cache that is tried, {point.kv_lora_rank} + {point.qk_rope_head_dim} "
            f"({point.kv_ratio:.2%} of the source's), reaches x {point.measured_ratio:.4f}; give a larger ratio, "
            "which goes on from here, or --restart with more --steps or text"
        )
    return point, points
