# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint to MLA, in two stages that share a folder of unfinished work.

The layers are converted one by one (`stages/layers.py`), all other weights stay as they are stored. Then the whole model is trained
to predict what its source predicts (`stages/end_to_end.py`), where there is memory for it or it was asked for. `stages/one_size.py`
has both for one size. With `max_ratio` it is called for several (`stages/frontier.py`).

This file settles all options and checks all that can go wrong before any work is done, and puts the result together after it.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..errors import UserError
from ..mathematics.closed_form import mla_config
from ..mathematics.scales import SCALES
from ..output.folder import check_output
from ..output.progress import earlier_recipe, layer_reports, size_folder, source_fingerprint, token_fingerprint, versions, work_on
from ..output.pushing import converted_before, make_repository, push
from ..output.reports import Candidate, ConvertReport, PlanReport
from ..output.writing import check_carried, write_record
from ..source.checkpoint import open_checkpoint, user_path
from ..source.families import refusal
from ..source.loading import choose_device, launched_processes
from ..source.lookups import LOOKUPS, lookup_windows
from ..source.matching import match_model
from ..source.own_text import ALONE, BUNDLED_NAME, OWN_TEXT, own_length, own_windows, text_names, write_own_text
from ..source.shards import DTYPES, ITEMSIZE, TORCH_NAMES, load_file, save_file
from ..source.text import calibration_windows
from ..source.tokenizer import first_token, load_tokenizer
from ..stages.end_to_end import MOST_WRITTEN, TIMES_READ, numbers_of_ends, tokens_of_each
from ..stages.end_to_end import disk_estimate as training_disk
from ..stages.frontier import search
from ..stages.layers import Job, best_split, repeatable
from ..stages.one_size import convert_size, trainable_tokens
from ..stages.windows import shorter, without_held_back
from .plan import check_memory, disk_estimate, export_fields, make_plan, possible_sizes, size_ladder


logger = logging.getLogger(__name__)

STEPS = 400
STEPS_BEFORE_TRAINING = 200  # what more give is gained faster on the whole model


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
    keep_own_text: bool = False,
    calibration_tokens: int | None = None,
    window: int | None = None,
    steps: int | None = None,
    heal_tokens: int | None = None,
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
        source: a checkpoint folder, a .gguf file or a Hub id.
        out: the folder to write; one that is not there appears when the conversion is complete.
        kv_budget: share of the original cache to keep, in (0, 1], split by measurement; or give the two sizes.
        kv_lora_rank: width of the latent.
        qk_rope_head_dim: width of the shared rotary key; an even divisor of the head width.
        max_ratio: or take the smallest cache whose perplexity, measured on held-back calibration text, is at most so many times the
            source's; several are converted to find it.
        qk_norm: for models with QK-norm: "exact" caches one more number per key/value head, "fold" replaces the norms by their
            means and gives a plain DeepSeek shape.
        calibration: a .txt file, a .jsonl file with texts or chats (see `read_text`), either as .xz, a data set of such, "self"
            for text that the source writes itself, or "lookups" for text, made of the others, in which things are looked up; or
            several of these, mixed evenly (the whole model is trained on half as much of "lookups" as of another). None for the
            bundled English prose, "lookups", and "self" where there is memory for it, on a CPU no more than a fifth of the time of
            the fit.
        keep_own_text: leave what the source wrote in the output, as own_text.jsonl.
        calibration_tokens: how many tokens of it to use; None for 2,097,152 on a GPU, 131,072 on the CPU.
        window: tokens of a sequence; None for the model's context, 2,048 at most; every second step of the end-to-end stage on a
            GPU then has sequences of 8,192, if the model is trained for them.
        steps: reconstruction steps per layer, of 16,384 tokens on a GPU and 1,024 on the CPU, or one sequence where that is longer;
            0 for the closed form alone. None for 400, and 200 where the whole model is trained afterwards.
        heal_tokens: then the whole model is trained to predict what the source predicts, on so many tokens; 0 for not at all.
            None for 24,000,000 on a GPU that has the memory, else 0.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: type of the output's numbers; "auto" keeps the source's.
        seed: chooses the calibration windows and their order, and what the source writes.
        revision: branch, tag or commit of a Hub id.
        restart: forget what an interrupted conversion to the same folder has done.
        overwrite: replace the output folder.
        push_to: a Hub repository to upload the result to; made, private, if it does not exist. When the upload was cut short, the
            same call goes on with it.
        trust_remote_code: run the code that the source's tokenizer comes with, if it does.

    Returns:
        What was done, and the error of each layer.

    Raises:
        UserError: something in the arguments or the source does not allow it.
    """
    asked = {name: value for name, value in locals().items() if name not in ("out", "restart", "overwrite")}
    started = time.perf_counter()
    if steps is not None and steps < 0:
        raise UserError(f"--steps is {steps}; allowed: 0 (the closed form alone) or more, {STEPS} are usual")
    checkpoint = open_checkpoint(source, revision)
    reason = refusal(checkpoint.config)
    if reason is not None:
        raise UserError(f"{source}: {reason}")
    sizes = sizes_to_try(checkpoint.config, kv_budget, kv_lora_rank, qk_rope_head_dim, max_ratio, qk_norm)
    checkpoint = match_model(checkpoint)
    plans = {size: make_plan(checkpoint, *size, dtype, qk_norm) for size in sizes}
    written = plans[sizes[0]].bytes_written
    assert written is not None and checkpoint.folder is not None

    # Where to compute, on what text, and for how long.
    run_device = choose_device(device)
    processes = launched_processes(run_device)
    if push_to is not None and not restart and not overwrite and (report := converted_before(out, asked)) is not None:
        if not processes.is_main_process:
            return replace(report, perplexity=None)  # the main one's to tell
        push(user_path(out).resolve(), make_repository(push_to))
        return report
    scale, context = SCALES[run_device.type], checkpoint.config.max_position_embeddings
    tokens = scale.calibration if calibration_tokens is None else calibration_tokens
    longest = min(scale.long, context) if window is None else window
    window = min(scale.window, context) if window is None else window
    if not 2 <= window <= context:
        raise UserError(f"--window is {window}; allowed: 2 to {context}, the context of {source}")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}; allowed: 0 to 2**63 - 1")
    stored = TORCH_NAMES[checkpoint.dtype] if dtype == "auto" else dtype
    config = mla_config(checkpoint.config, *sizes[0], stored, qk_norm)
    numbers = written // ITEMSIZE[DTYPES[stored]]
    # Each process has its own idea of the memory that is free.
    heal_tokens = broadcast_object_list([trainable_tokens(heal_tokens, checkpoint, config, numbers, window, run_device)])[0]
    # How many windows make a long sequence: not where attention keeps all scores, which are four times as many.
    eager = config.family.softcap or config.family.sinks
    run = max(1, longest // window) if heal_tokens and not eager else 1
    if steps is None:
        steps = STEPS_BEFORE_TRAINING if heal_tokens else STEPS
    earlier = None if restart else earlier_recipe(out).get("calibration")
    fitted = steps * max(scale.step, window)
    names = broadcast_object_list([text_names(calibration, checkpoint, run_device, tokens, fitted, earlier)])[0]
    check_texts(names, tokens, keep_own_text)
    share = tokens // len(names)

    # What would stand in the way of the result.
    most_own = max(share, min(heal_tokens, MOST_WRITTEN)) if OWN_TEXT in names else 0
    room = disk_estimate(checkpoint, written, tokens, window, run_device.type, most_own)
    if heal_tokens:
        room += written + training_disk(numbers, numbers - numbers_of_ends(checkpoint))
    if max_ratio is not None:
        room *= 2  # the best so far is kept beside the one at work
    path = check_output(out, [checkpoint.folder, *checkpoint.paths.values()], room, processes, overwrite=overwrite)
    repository = make_repository(push_to) if push_to is not None and processes.is_main_process else None
    tokenizer = load_tokenizer(checkpoint.folder, source, trust_remote_code)
    check_carried(checkpoint, config, tokenizer)

    # What is read of texts; that of its own the source writes later.
    read = max(share, *tokens_of_each(dict.fromkeys(names, math.inf), heal_tokens).values())
    texts = {
        name: calibration_windows(checkpoint, tokenizer, None if name == BUNDLED_NAME else name, read, window, seed, run)
        for name in names
        if name not in (OWN_TEXT, LOOKUPS)
    }
    check_memory(checkpoint, sizes, run_device)
    recipe = {
        "source": source,
        "revision": revision,
        "source_sha256": broadcast_object_list([source_fingerprint(checkpoint) if processes.is_main_process else None])[0],
        "calibration": " and ".join(names),
        "calibration_tokens": tokens,
        "window": window,
        "longest": run * window,
        "calibration_sha256": token_fingerprint(
            torch.cat([torch.empty(0, dtype=torch.long), *map(Tensor.flatten, texts.values())])
        ),
        "sizes": [list(size) for size in sizes],
        "qk_norm": qk_norm,
        "steps": steps,
        "heal_tokens": heal_tokens,
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
        lengths = {name: texts[name].numel() if name in texts else math.inf for name in names}
        trained_on = tokens_of_each(lengths, heal_tokens)
        if OWN_TEXT in names:
            own = max(share, min(trained_on[OWN_TEXT], MOST_WRITTEN))  # the more, the shorter the others are
            with processes.main_process_first():
                sequences = own_windows(checkpoint, tokenizer, folder, run_device, own, run * window, seed)
            texts[OWN_TEXT] = shorter(sequences, min(window, sequences.shape[1]))
            recipe["own_text_sha256"] = token_fingerprint(texts[OWN_TEXT])
        elif calibration is None and processes.is_main_process:
            logger.warning(ALONE, source)
        if LOOKUPS in names:
            count = max(4, max(share, trained_on[LOOKUPS] // TIMES_READ) // (run * window))
            known = [without_held_back(windows, share, run) for windows in texts.values()]
            write = partial(lookup_windows, known, tokenizer, count, run * window, seed)
            with processes.main_process_first():
                sequences = written_once(folder / "lookups.safetensors", write)
            texts[LOOKUPS] = shorter(sequences, window)
            recipe["lookups_sha256"] = token_fingerprint(texts[LOOKUPS])
        recipe |= {"max_ratio": max_ratio, "asked": asked}  # not what the work depends on: another may go on with it
        job = Job(checkpoint, folder, texts, share, run_device, steps, seed, qk_norm, first_token(tokenizer), run)

        @cache
        def convert_to(rank: int, rope_dim: int) -> tuple[Any, dict[str, Any]]:
            return convert_size(job, job.config(rank, rope_dim, stored), dtype, tokenizer, heal_tokens, processes)

        best, tried = choose_size(job, plans, max_ratio, convert_to, processes)
        config, measured = convert_to(best.kv_lora_rank, best.qk_rope_head_dim)
        layers, spectra = layer_reports(size_folder(folder, best), config.num_hidden_layers)
        planned = plans[best.kv_lora_rank, best.qk_rope_head_dim]
        report = ConvertReport(
            **vars(planned) | export_fields(config, tokenizer) | tried | measured,
            seconds=time.perf_counter() - started,
            calibration_tokens=job.windows.numel(),
            window=job.windows.shape[1],
            steps=steps,
            layers=layers,
            output=str(path),
            repository=repository,
        )
        if processes.is_main_process:
            output = folder / "output"
            shutil.rmtree(output, ignore_errors=True)
            (size_folder(folder, best) / "output").rename(output)
            write_record(output, checkpoint, config, report, recipe, spectra)
            if keep_own_text:
                write_own_text(tokenizer, texts[OWN_TEXT], own_length(checkpoint, run * window), output / "own_text.jsonl")
    if repository is not None:
        push(path, repository)
    return report


def written_once(file: Path, write: Callable[[], Tensor]) -> Tensor:
    """Token ids, as they are in a file; written to it if it is not there."""
    if not file.exists():
        save_file({"ids": write().int()}, file)
    return load_file(file)["ids"].long()


def sizes_to_try(
    config: Any,
    kv_budget: float | None,
    kv_lora_rank: int | None,
    qk_rope_head_dim: int | None,
    max_ratio: float | None,
    qk_norm: str,
) -> list[tuple[int, int]]:
    """Ranks and rotary widths among which a conversion chooses, from the arguments of `convert`."""
    if max_ratio is None:
        return possible_sizes(config, kv_budget, kv_lora_rank, qk_rope_head_dim, qk_norm)
    if (kv_budget, kv_lora_rank, qk_rope_head_dim) != (None, None, None):
        raise UserError("--max-ratio looks for the size; give it without --kv-budget, --kv-lora-rank and --qk-rope-head-dim")
    if not 1 < max_ratio < math.inf:
        raise UserError(f"--max-ratio is {max_ratio}; allowed: more than 1, the source's own perplexity; 1.05 is usual")
    return size_ladder(config, qk_norm)


def choose_size(
    job: Job,
    plans: dict[tuple[int, int], PlanReport],
    max_ratio: float | None,
    convert_to: Callable[[int, int], tuple[Any, dict[str, Any]]],
    processes: Any,
) -> tuple[Candidate, dict[str, list]]:
    """Try the sizes on a few layers, and choose the best split of a budget, or the smallest cache that keeps a perplexity ratio.

    Args:
        job: the conversion.
        plans: of each rank and rotary width.
        max_ratio: the ratio, for which some sizes are converted; None for the best split.
        convert_to: what converts to a rank and a rotary width, and returns what was measured as well.
        processes: Accelerate's state.

    Returns:
        The size, and what was tried, by the names of `ConvertReport`.
    """
    candidates = job.prepare([*plans], processes)
    if max_ratio is None:
        return best_split(candidates), {"candidates": candidates if len(candidates) > 1 else []}

    def measured_ratio(size: Candidate) -> float:
        return convert_to(size.kv_lora_rank, size.qk_rope_head_dim)[1].get("perplexity_ratio", math.nan)

    kv_ratios = [plan.kv_ratio for plan in plans.values() if plan.kv_ratio is not None]
    best, frontier = search(job.folder, candidates, kv_ratios, max_ratio, measured_ratio, processes)
    return best, {"frontier": frontier}


def check_texts(names: list[str], tokens: int, keep_own_text: bool) -> None:
    """Raise a UserError if there are too few tokens for the texts to calibrate on, or none of own text to keep."""
    if keep_own_text and OWN_TEXT not in names:
        raise UserError(
            f"--keep-own-text keeps what the source writes, the text here is {' and '.join(names)}; add --calibration self"
        )
    if names == [LOOKUPS]:
        raise UserError(f"--calibration {LOOKUPS} is made of other texts; give one beside it, or self")
    least = 4 * len(names)
    if tokens < least:
        raise UserError(f"--calibration-tokens is {tokens}; at least {least} are needed, 131072 and more are usual")
