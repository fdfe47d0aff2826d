# SPDX-License-Identifier: Apache-2.0
"""Heal a converted model: train it to predict what its source predicts, on text.

`stages/end_to_end.py` has the training; this file prepares both models and the text, writes the result as another checkpoint with
the record of what was done, and verifies it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..mathematics.scales import SCALES
from ..output.card import add_healing
from ..output.folder import check_output
from ..output.progress import source_fingerprint, token_fingerprint, versions, work_on, write_json
from ..output.reports import HealReport
from ..source.checkpoint import RECORD, Checkpoint, open_checkpoint, read_record
from ..source.loading import choose_device, compute_dtype, launched_processes, load_model
from ..source.lookups import LOOKUPS, lookup_windows
from ..source.matching import ModelCheckpoint, match_model
from ..source.text import begun, read_text, token_windows
from ..source.tokenizer import check_same_tokenizer, check_vocabulary, first_token, load_tokenizer
from ..stages.end_to_end import (
    LORA_RANK,
    RATES,
    STEP_TOKENS,
    Training,
    batches,
    disk_estimate,
    distil,
    plan_training,
    tokens_of_each,
    trained_names,
    write_trained,
)
from .verify import check_pair, compare


STEPS = 1000
PATIENCE = 10  # evaluations without a new best after which healing stops; a high learning rate hides what its decay will bring
HELD_BACK = 32  # windows, at most, that measure whether to go on


def heal(
    out: str,
    dest: str,
    *,
    teacher: str,
    text: str | Sequence[str],
    steps: int = STEPS,
    train: str = "attention",
    lora_rank: int = LORA_RANK,
    learning_rate: float | None = None,
    step_tokens: int | None = None,
    gradient_checkpointing: bool = False,
    device: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    restart: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
) -> HealReport:
    """Distil the original model into its conversion. When it was interrupted or killed, the same call goes on where it stopped.

    Runs on as many processes as `accelerate launch` starts, sharded as its configuration says.

    Args:
        out: the converted checkpoint.
        dest: the folder to write; one that is not there appears when all is done.
        teacher: what `out` was converted from; a folder, a .gguf file or a Hub id.
        text: a file or a data set, as for `convert`, or several, mixed evenly; a part of it is held back to measure on. With
            "lookups" among them the model is also trained on text, made of the others, in which things are looked up.
        steps: how many to take at most.
        train: "lora" (adapters on all linear layers, merged in the end), "attention" (all weights of the attention), "layers" (all
            weights but those of the embedding and the head) or "all".
        lora_rank: rank of the adapters.
        learning_rate: at its highest; None for 1e-3, and 2.5e-4 for "layers" and "all".
        step_tokens: in one step, over all processes; None for 16,384 on a GPU and 4,096 on the CPU.
        gradient_checkpointing: compute activations again in the backward pass, for less memory and more time.
        device: "auto", "cpu" or "cuda".
        seed: of the order of the text, and of new adapters.
        revision: branch, tag or commit of the teacher, if it is a Hub id.
        restart: forget what an interrupted healing to the same folder has done.
        overwrite: replace the output folder.
        dry_run: only say what it would take.
        trust_remote_code: run the code that the tokenizers come with, if they do.

    Returns:
        What was done, and how close the result is.

    Raises:
        UserError: something in the arguments, the checkpoints or the text does not allow it, or the loss became infinite.
    """
    started = time.perf_counter()
    check_options(steps, train, lora_rank, learning_rate, step_tokens)
    names = [text] if isinstance(text, str) else list(dict.fromkeys(text))
    if not {*names} - {LOOKUPS}:
        raise UserError(f"--text {LOOKUPS} is made of other texts; give one beside it")
    student, source = open_checkpoint(out), open_checkpoint(teacher, revision)
    check_pair(student, source)
    student, source = match_model(student), match_model(source)
    assert student.folder is not None and source.folder is not None
    widest = max(min(shape) for shape in linear_shapes(student))
    if train == "lora" and lora_rank > widest:
        raise UserError(f"--lora-rank is {lora_rank}; allowed: 1 to {widest}, the smaller side of this model's widest matrix")

    run_device = choose_device(device)
    processes = launched_processes(run_device)
    window = trained_window(student, run_device)
    wanted = STEP_TOKENS[run_device.type] if step_tokens is None else step_tokens
    micro, accumulated = batches(wanted, window, run_device, processes.num_processes)
    rate = RATES[train] if learning_rate is None else learning_rate
    training = Training(train, steps, rate, micro, accumulated, seed, PATIENCE, lora_rank, gradient_checkpointing)
    trained = trained_parameters(student, train, lora_rank)
    plan = plan_training(student, source, trained, training, window, run_device, processes.num_processes)
    room = student.bytes + disk_estimate(trained if train == "lora" else student.parameters, trained)
    path = check_output(dest, [student.folder, source.folder, *source.paths.values()], room, processes, overwrite=overwrite)
    if dry_run:
        return plan

    tokenizer = load_tokenizer(source.folder, teacher, trust_remote_code)
    check_same_tokenizer(student.folder, out, tokenizer, teacher, trust_remote_code)
    parts = tokens_of_each(dict.fromkeys(names, math.inf), steps * plan.tokens_per_step)
    windows = windows_of(
        {name: (part // window + HELD_BACK) * window for name, part in parts.items() if name != LOOKUPS}, tokenizer, window, seed
    )
    check_vocabulary(windows, student)
    held = held_back(windows, window, plan.tokens_per_step)
    if LOOKUPS in parts:
        written = lookup_windows([windows[held:]], tokenizer, max(1, parts[LOOKUPS] // window), window, seed)
        windows = torch.cat([windows, begun(written, first_token(tokenizer))])
    recipe = {  # gradient checkpointing changes no result, so it is no part of it
        "out": out,
        "out_sha256": source_fingerprint(student),
        "teacher": teacher,
        "teacher_sha256": source_fingerprint(source),
        "text": " and ".join(names),
        "text_sha256": token_fingerprint(windows),
        "train": train,
        "lora_rank": lora_rank if train == "lora" else None,
        "steps": steps,
        "learning_rate": rate,
        "tokens_per_step": plan.tokens_per_step,
        "seed": seed,
        "device": run_device.type,
        "versions": versions(),
    }

    report, sources, kept = plan, {"out_sha256": student, "teacher_sha256": source}, ["checkpoint-*/complete"]
    with work_on(path, recipe, sources, processes, restart=restart, overwrite=overwrite, worth=kept) as folder:
        original = load_model(source, torch.device("cpu"), compute_dtype(source, run_device))
        done = distil(student, original, windows[held:], windows[:held], folder, training, run_device, processes)
        if processes.is_main_process:
            output = write_trained(student, folder, training)
            check_same_tokenizer(output, dest, tokenizer, teacher, trust_remote_code)
            healed = load_model(open_checkpoint(str(output)), run_device, compute_dtype(student, run_device))
            seconds = time.perf_counter() - started
            verify = compare(original.to(run_device), healed, [windows[:held]], None)
            report = replace(plan, **done, seconds=seconds, verify=verify, output=str(path))
            record_healing(output, report, recipe, path.name)
        processes.wait_for_everyone()
    return report


def check_options(steps: int, train: str, lora_rank: int, learning_rate: float | None, step_tokens: int | None) -> None:
    """Raise a UserError if a number or name is out of range."""
    if train not in RATES:
        raise UserError(f"--train is {train}; allowed: {', '.join(RATES)}")
    if steps < 1:
        raise UserError(f"--steps is {steps}; allowed: 1 or more, {STEPS} are usual")
    if lora_rank < 1:
        raise UserError(f"--lora-rank is {lora_rank}; allowed: 1 or more, {LORA_RANK} is usual")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise UserError(f"--learning-rate is {learning_rate}; it must be positive, {RATES[train]} is usual")
    if step_tokens is not None and step_tokens < 1:
        raise UserError(f"--step-tokens is {step_tokens}; allowed: 1 or more, some thousands are usual")


def windows_of(texts: dict[str, int], tokenizer: Any, window: int, seed: int) -> Tensor:
    """Windows [windows, window] of texts, each with as many tokens at most as it is given, in an order of the seed."""
    cut = [
        token_windows(read_text(name, tokens, tokenizer=tokenizer), tokenizer, tokens, window, seed)
        for name, tokens in texts.items()
    ]
    if len(cut) == 1:  # which is drawn with the seed
        return cut[0]
    width = min(windows.shape[1] for windows in cut)
    whole = torch.cat([windows[:, :width] for windows in cut])
    return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))]


def held_back(windows: Tensor, window: int, step_tokens: int) -> int:
    """How many windows of a text are held back to measure on, whatever the number of processes: what is left is the training's.

    Args:
        windows: all of the text [windows, tokens].
        window: tokens that a sequence should have.
        step_tokens: tokens of a step.

    Returns:
        A power of two that is at most a twentieth of the text, and at most `HELD_BACK`.

    Raises:
        UserError: the text is too short for that, or the rest of it for a step.
    """
    held = 1 << max(1, min(HELD_BACK, len(windows) // 20)).bit_length() - 1
    if windows.shape[1] < window or len(windows) <= held:
        raise UserError(f"the text has {windows.numel():,} tokens; {(held + 1) * window:,} are the least here, millions are usual")
    left = (len(windows) - held) * window
    if step_tokens > left:
        raise UserError(
            f"a step takes {step_tokens:,} tokens, the text has {left:,} beside those held back; "
            "lower --step-tokens, or give more text"
        )
    return held


def trained_window(checkpoint: Checkpoint, device: torch.device) -> int:
    """Tokens in a sequence: what the conversion was fitted on, or the model's context, within what the device bears."""
    assert checkpoint.folder is not None
    window = min(SCALES[device.type].window, checkpoint.config.max_position_embeddings)
    try:
        fitted = int(read_record(checkpoint.folder)["report"]["window"])
        return min(window, fitted) if fitted >= 64 else window
    except (ValueError, KeyError, TypeError):
        return window


def linear_shapes(checkpoint: ModelCheckpoint) -> list[tuple[int, ...]]:
    """Shapes of all matrices that adapters are put on; experts and routers are none of these."""
    modules = checkpoint.model.base_model.modules()
    return [tuple(module.weight.shape) for module in modules if isinstance(module, torch.nn.Linear)]


def trained_parameters(checkpoint: ModelCheckpoint, train: str, lora_rank: int) -> int:
    """How many numbers are trained, from headers alone."""
    if train == "lora":
        return sum(lora_rank * sum(shape) for shape in linear_shapes(checkpoint))
    names = trained_names(checkpoint.model, train)
    return sum(tensor.parameters for name, tensor in checkpoint.tensors.items() if name in names)


def record_healing(output: Path, report: HealReport, recipe: dict, name: str) -> None:
    """Add what was done to the record and the card of a healed checkpoint, if it has them; `name` is its new one."""
    record, card_file = read_record(output), output / "README.md"
    entry = {"recipe": recipe, "report": asdict(report)}
    write_json(record | {"healing": [*record.get("healing", []), entry]}, output / RECORD)
    if card_file.exists():
        card_file.write_text(add_healing(card_file.read_text(encoding="utf-8"), report, recipe, name), encoding="utf-8")
