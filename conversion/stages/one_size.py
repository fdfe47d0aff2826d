# SPDX-License-Identifier: Apache-2.0
"""A conversion to one size, through both stages: the layers one by one, then the whole model where there is memory for it.

What is written is never further from the source than what the layers gave, in sequences as long as those that were trained on.
"""

import json
import logging
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..errors import UserError
from ..mathematics.measures import Comparison, token_losses
from ..mathematics.survey import trained_context
from ..output.progress import size_folder, write_json
from ..output.reports import Closeness, HealReport
from ..output.writing import write_model
from ..source.checkpoint import Checkpoint, open_checkpoint
from ..source.loading import compute_dtype, free_memory, load_model
from ..source.lookups import LOOKUPS
from ..source.matching import ModelCheckpoint, match_model
from ..source.own_text import BUNDLED_NAME, OWN_TEXT
from ..source.text import begun
from .end_to_end import (
    EVALUATIONS,
    RATES,
    STEP_TOKENS,
    TIMES_READ,
    Training,
    batches,
    distil,
    memory,
    numbers_of_ends,
    plan_training,
    tokens_of_each,
    write_trained,
)
from .layers import Job, repeatable
from .windows import shorter, whole_runs


logger = logging.getLogger(__name__)

HEAL_TOKENS = {"cuda": 24_000_000, "cpu": 0}
LONG_ROWS = 16  # of each text, to see whether the original is trained for long sequences
TRAINED = "layers"  # by the end-to-end stage


def convert_size(job: Job, config: Any, dtype: str, tokenizer: Any, heal_tokens: int, processes: Any) -> tuple[Any, dict[str, Any]]:
    """Convert to one size, through both stages; the model is left in `output` of the size's folder.

    Args:
        job: the conversion.
        config: of the converted model.
        dtype: type of the output's numbers; "auto" keeps the source's.
        tokenizer: of the source.
        heal_tokens: of the end-to-end stage; 0 for none.
        processes: Accelerate's state.

    Returns:
        The configuration, and on the main process what was measured, by the names of `ConvertReport`.
    """
    main, place = processes.is_main_process, size_folder(job.folder, config)
    job.convert_layers(config, processes)
    processes.wait_for_everyone()
    measured = job.closeness(job.measure(config, processes))  # by all: what is not finite, all of them say in a line
    measured = measured if main else {}
    layers = place / ("layers" if heal_tokens else "output")
    if not broadcast_object_list([heal_tokens and layers.exists()])[0]:
        write_model(place, layers, job.checkpoint, config, dtype, tokenizer, processes)
    processes.wait_for_everyone()
    if not heal_tokens:
        return config, measured
    stage, comparisons, gained = end_to_end(open_checkpoint(str(layers)), job, place, heal_tokens, processes)
    if main:
        trained = job.closeness(comparisons)
        if gained:
            alone = Closeness(**{name: measured[name] for name in Closeness.__dataclass_fields__})
            return config, measured | {"end_to_end": stage, "layers_alone": alone, **trained}
        logger.warning("training the whole model gained nothing: what the layers gave is written")
        shutil.rmtree(place / "output")
        shutil.copytree(layers, place / "output")
    return config, measured


def end_to_end(
    converted: Checkpoint, job: Job, folder: Path, tokens: int, processes: Any
) -> tuple[HealReport, dict[str, Comparison], bool]:
    """Train the whole model to predict what its source predicts, and write it to `folder`/output.

    Args:
        converted: what the layers gave.
        job: their work, with the source and the text.
        folder: where the work is kept.
        tokens: to train on.
        processes: Accelerate's state.

    Returns:
        What was done, and on the main process how close the models are on each text's held-back windows, and whether this is
        closer than before, in sequences as long as those trained on.
    """
    source, count, main = job.checkpoint, processes.num_processes, processes.is_main_process
    original = load_model(source, torch.device("cpu"), compute_dtype(source, job.device))
    run = broadcast_object_list([windows_in_a_row(job, original.to(job.device)) if main else 1])[0]
    texts, held = job.rows(run)
    unasked = BUNDLED_NAME in texts and tokens == HEAL_TOKENS[job.device.type]  # what nobody chose is not to be mended
    windows = windows_to_train_on(texts, tokens, warn=main and not unasked)
    window = windows.shape[1]
    training = training_of_all(min(STEP_TOKENS[job.device.type], windows.numel()), window, job.device, count, job.seed)
    windows = windows[: whole_runs(len(windows), training.micro)]  # what is compiled, is so for each number of them
    training = replace(training, steps=max(1, tokens // training.tokens_per_step(window, count)))
    trained = converted.parameters - numbers_of_ends(source)
    plan = plan_training(converted, source, trained, training, window, job.device, count)
    started = time.perf_counter()
    cut = partial(cut_rows, window=window // run, begin=job.begin) if run > 1 else None
    with repeatable(job.device.type == "cpu"):  # on a GPU that takes half as long again
        done = distil(converted, original, windows, held, folder, training, job.device, processes, cut)
    report = replace(plan, **done, seconds=time.perf_counter() - started)
    comparisons, gained = dict[str, Comparison](), False
    if main:
        output = write_trained(match_model(converted), folder, training)
        trained_model = load_model(open_checkpoint(str(output)), job.device, compute_dtype(converted, job.device))
        original = original.to(job.device)
        for name, places in job.held.items():
            comparisons[name] = Comparison()
            comparisons[name].add_models(original, trained_model, job.windows[places])
        untrained = load_model(converted, job.device, compute_dtype(converted, job.device))
        before, after = Comparison(), Comparison()
        before.add_models(original, untrained, held)
        after.add_models(original, trained_model, held)
        gained = after.result()["kl"] <= before.result()["kl"]
    return report, comparisons, gained


def windows_in_a_row(job: Job, original: Any) -> int:
    """How many windows make a long sequence: `run`, or 1 if the original is not trained for so long ones, or text is short."""
    settled = job.folder / "sequences.json"  # for a resumed training to go on with the same
    if not settled.exists():
        length, texts = job.run * job.windows.shape[1], job.rows(job.run)[0]
        rows = [text[:LONG_ROWS] for name, text in texts.items() if name not in (OWN_TEXT, LOOKUPS)]
        short = [name for name, places in job.held.items() if len(places) < job.run]
        reason = f"there is little text of {', '.join(short)}" if short else None
        if reason is None and job.run > 1:
            context = trained_context(token_losses(original, torch.cat(rows))) if rows else 0
            reason = f"{job.checkpoint.name} does not show to be trained for such" if context < length else None
        if reason is not None:
            logger.warning("the whole model is not trained on sequences of %s tokens: %s", f"{length:,}", reason)
        write_json({"windows": 1 if reason is not None else job.run}, settled)
    return json.loads(settled.read_text(encoding="utf-8"))["windows"]


def cut_rows(rows: Tensor, window: int, begin: int | None) -> Tensor:
    """Cut long sequences [rows, tokens] into windows [windows, window], each begun as a text is."""
    return begun(shorter(rows, window), begin)


def windows_to_train_on(texts: dict[str, Tensor], tokens: int, *, warn: bool) -> Tensor:
    """Windows of all texts to train the whole model on, those of a short text several times.

    Args:
        texts: token ids [windows, window] of each, by its name.
        tokens: to train on, in all.
        warn: whether to say so if the text is too short for so many.

    Returns:
        Token ids [windows, window], text by text.
    """
    there = sum(text.numel() for text in texts.values())
    if warn and (times := round(tokens / there)) > TIMES_READ:
        logger.warning(
            "the end-to-end stage reads its text, %s tokens, %s times; what is read more than twice is learnt by heart: "
            "more text or fewer --heal-tokens may give more",
            f"{there:,}",
            f"{times:,}",
        )
    parts = tokens_of_each({name: text.numel() for name, text in texts.items()}, tokens)
    return torch.cat([text[torch.arange(max(1, parts[name] // text.shape[1])) % len(text)] for name, text in texts.items()])


def training_of_all(tokens: int, window: int, device: torch.device, processes: int, seed: int = 0) -> Training:
    """How the whole model is trained, in steps of about so many tokens over all processes; of one step."""
    return Training(TRAINED, 1, RATES[TRAINED], *batches(tokens, window, device, processes), seed, EVALUATIONS)


def trainable_tokens(
    wanted: int | None, source: ModelCheckpoint, config: Any, numbers: int, window: int, device: torch.device
) -> int:
    """Tokens of the end-to-end stage: as many as wanted, or what is usual where there is memory for it.

    Args:
        wanted: as given, or None.
        source: the source.
        config: of the converted model.
        numbers: weights of the converted model.
        window: tokens in a sequence.
        device: where to compute.

    Returns:
        Tokens; 0 for no such stage.

    Raises:
        UserError: it was asked for, and there is not the memory.
    """
    if wanted is not None and wanted < 0:
        raise UserError(
            f"--heal-tokens is {wanted}; allowed: 0 (the layers alone) or more, {HEAL_TOKENS['cuda']} are usual on a GPU"
        )
    tokens = HEAL_TOKENS[device.type] if wanted is None else wanted
    if not tokens:
        return 0
    dtype = compute_dtype(source, device)
    training = training_of_all(STEP_TOKENS[device.type], window, device, 1)
    sizes = numbers, source.parameters, numbers - numbers_of_ends(source)
    needed = memory(config, sizes, (dtype, dtype), training, window, device)["total"]
    free = free_memory(device)
    if needed <= free:
        return tokens
    lack = f"training the whole model takes about {needed / 1e9:.1f} GB on {device}, {free / 1e9:.1f} GB are free"
    if wanted is not None:
        raise UserError(f"{lack}; give --heal-tokens 0, and use `hf-mla heal` afterwards: with --train lora, or on several GPUs")
    logger.warning("%s: the layers alone are converted; use `hf-mla heal` afterwards, with --train lora or on several GPUs", lack)
    return 0
