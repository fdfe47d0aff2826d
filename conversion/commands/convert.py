# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint to MLA: the layers one by one (`stages/layers.py`), and all other weights as they are stored."""

import math
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..mathematics.closed_form import mla_config
from ..mathematics.scales import SCALES
from ..output.folder import check_output
from ..output.progress import source_fingerprint, token_fingerprint, versions, work_on
from ..output.reports import Candidate, ConvertReport, FrontierPoint, PlanReport
from ..output.writing import check_carried, check_repository, upload, write_checkpoint
from ..source.checkpoint import DTYPES, open_checkpoint
from ..source.families import refusal
from ..source.loading import choose_device, launched_processes
from ..source.matching import match_model
from ..source.own_text import BUNDLED_NAME, OWN_TEXT, own_windows, text_names
from ..source.text import calibration_windows
from ..source.tokenizer import load_tokenizer
from ..stages.frontier import search
from ..stages.layers import Job, repeatable
from .plan import check_memory, disk_estimate, make_plan, possible_sizes, size_ladder


STEPS = 400


def convert(
    source: str,
    out: str,
    *,
    kv_budget: float | None = None,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    max_ratio: float | None = None,
    qk_norm: str = "exact",
    calibration: str | Sequence[str] | None = None,
    calibration_tokens: int | None = None,
    window: int | None = None,
    steps: int = STEPS,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    restart: bool = False,
    overwrite: bool = False,
    push_to: str | None = None,
    trust_remote_code: bool = False,
) -> ConvertReport:
    """Convert a GQA or MHA checkpoint to MLA. When it was interrupted or killed, the same call goes on where it stopped.

    Args:
        source: a checkpoint folder or a Hub id.
        out: the folder to write; one that is not there appears when the conversion is complete.
        kv_budget: share of the original cache to keep, in (0, 1], split by measurement; or give the two sizes.
        kv_lora_rank: width of the latent.
        qk_rope_head_dim: width of the shared rotary key; an even divisor of the head width.
        max_ratio: or take the smallest cache whose perplexity, measured on held-back calibration text, is at most so many times the
            source's; several are converted to find it.
        qk_norm: for models with QK-norm: "exact" caches one more number per key/value head, "fold" replaces the norms by their
            means and gives a plain DeepSeek shape.
        calibration: a .txt or .txt.xz file, a data set, or "self" for text that the source writes itself; or several of these,
            mixed evenly. None for the bundled English prose, on a GPU mixed with "self".
        calibration_tokens: how many tokens of it to use; None for 2,097,152 on a GPU, 131,072 on the CPU.
        window: tokens of a sequence; None for the model's context, 2,048 at most.
        steps: reconstruction steps per layer, of 16,384 tokens on a GPU and 1,024 on the CPU, or one sequence where that is longer;
            0 for the closed form alone.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: type of the output's numbers; "auto" keeps the source's.
        seed: chooses the calibration windows and their order, and what the source writes.
        revision: branch, tag or commit of a Hub id.
        restart: forget what an interrupted conversion to the same folder has done.
        overwrite: replace the output folder.
        push_to: a Hub repository to upload the result to.
        trust_remote_code: run the code that the source's tokenizer comes with, if it does.

    Returns:
        What was done, and the error of each layer.

    Raises:
        UserError: something in the arguments or the source does not allow it.
    """
    started = time.perf_counter()
    if steps < 0:
        raise UserError(f"--steps is {steps}; allowed: 0 (the closed form alone) or more, {STEPS} are usual")
    checkpoint = open_checkpoint(source, revision)
    reason = refusal(checkpoint.config)
    if reason is not None:
        raise UserError(f"{source}: {reason}")
    if max_ratio is None:
        sizes = possible_sizes(checkpoint.config, kv_budget, kv_lora_rank, qk_rope_head_dim, qk_norm)
    elif (kv_budget, kv_lora_rank, qk_rope_head_dim) != (None, None, None):
        raise UserError("--max-ratio looks for the size; give it without --kv-budget, --kv-lora-rank and --qk-rope-head-dim")
    elif not 1 < max_ratio < math.inf:
        raise UserError(f"--max-ratio is {max_ratio}; allowed: more than 1, the source's own perplexity; 1.05 is usual")
    else:
        sizes = size_ladder(checkpoint.config, qk_norm)
    checkpoint = match_model(checkpoint)
    plans = [make_plan(checkpoint, *size, dtype, qk_norm) for size in sizes]
    planned = plans[0 if max_ratio is None else -1]
    assert planned.bytes_written is not None and checkpoint.folder is not None
    run_device = choose_device(device)
    processes = launched_processes(run_device)
    tokens = SCALES[run_device.type].calibration if calibration_tokens is None else calibration_tokens
    context = checkpoint.config.max_position_embeddings
    window = min(SCALES[run_device.type].window, context) if window is None else window
    if not 2 <= window <= context:
        raise UserError(f"--window is {window}; allowed: 2 to {context}, the context of {source}")
    names = text_names(calibration, checkpoint, run_device)
    least = 4 * len(names)
    if tokens < least:
        raise UserError(f"--calibration-tokens is {tokens}; at least {least} are needed, 131072 and more are usual")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}; allowed: 0 to 2**63 - 1")
    share = tokens // len(names)
    room = disk_estimate(checkpoint, planned.bytes_written, tokens, window, run_device.type, 1 if max_ratio is None else 2)
    path = check_output(out, [checkpoint.folder], room, processes, overwrite=overwrite)
    if push_to is not None and processes.is_main_process:
        check_repository(push_to)
    tokenizer = load_tokenizer(checkpoint.folder, source, trust_remote_code)
    stored = next(name for name, header in DTYPES.items() if header == checkpoint.dtype) if dtype == "auto" else dtype
    check_carried(checkpoint, mla_config(checkpoint.config, *sizes[0], stored, qk_norm), tokenizer)
    texts = {
        name: calibration_windows(checkpoint, tokenizer, None if name == BUNDLED_NAME else name, share, window, seed)
        for name in names
        if name != OWN_TEXT
    }
    check_memory(checkpoint, sizes, run_device)
    recipe = {
        "source": source,
        "revision": revision,
        "source_sha256": source_fingerprint(checkpoint),
        "calibration": " and ".join(names),
        "calibration_tokens": tokens,
        "window": window,
        "calibration_sha256": token_fingerprint(
            torch.cat([torch.empty(0, dtype=torch.long), *map(Tensor.flatten, texts.values())])
        ),
        "sizes": [list(size) for size in sizes],
        "qk_norm": qk_norm,
        "steps": steps,
        "dtype": dtype,
        "seed": seed,
        "device": run_device.type,
        "versions": versions(),
    }
    if processes.num_processes > 1:
        run_device = processes.device
    sources, kept = {"source_sha256": checkpoint}, ["own-text-*.safetensors", "gradient-*"]
    with (
        repeatable(),
        work_on(path, recipe, sources, processes, restart=restart, overwrite=overwrite, worth=kept) as folder,
    ):
        if OWN_TEXT in names:
            if processes.is_main_process:
                own_windows(checkpoint, tokenizer, folder, run_device, share, window, seed)
            processes.wait_for_everyone()
            texts[OWN_TEXT] = own_windows(checkpoint, tokenizer, folder, run_device, share, window, seed)
            recipe["own_text_sha256"] = token_fingerprint(texts[OWN_TEXT])
        recipe["max_ratio"] = max_ratio  # not what the work depends on: another may go on with it
        job = Job(checkpoint, folder, texts, run_device, steps, seed, qk_norm)
        candidates = job.prepare(sizes, processes)

        @cache
        def convert_to(rank: int, rope_dim: int) -> tuple[Any, dict[str, Any]]:
            config = job.config(rank, rope_dim, stored)
            job.convert_layers(config, processes)
            processes.wait_for_everyone()
            return config, job.measure(config) if processes.is_main_process else {}

        def measured_ratio(size: Candidate) -> float:
            return convert_to(size.kv_lora_rank, size.qk_rope_head_dim)[1].get("perplexity_ratio", math.nan)

        frontier: list[FrontierPoint] = []
        if max_ratio is None:
            best = min(candidates, key=lambda candidate: candidate.error)
        else:
            kv_ratios = [plan.kv_ratio for plan in plans if plan.kv_ratio is not None]
            best, frontier = search(folder, candidates, kv_ratios, max_ratio, measured_ratio, processes)
            candidates = []
        config, measures = convert_to(best.kv_lora_rank, best.qk_rope_head_dim)
        layers, spectra = job.reports(config)
        planned = plans[sizes.index((best.kv_lora_rank, best.qk_rope_head_dim))]
        report = ConvertReport(
            **{key: getattr(planned, key) for key in PlanReport.__dataclass_fields__},
            **measures,
            seconds=time.perf_counter() - started,
            calibration_tokens=job.windows.numel(),
            window=job.windows.shape[1],
            steps=steps,
            candidates=candidates if len(candidates) > 1 else [],
            frontier=frontier,
            layers=layers,
            output=str(path),
        )
        if processes.is_main_process:
            write_checkpoint(folder, checkpoint, config, report, recipe, spectra, tokenizer)
    if push_to is not None and processes.is_main_process:
        upload(path, push_to)
    return report
