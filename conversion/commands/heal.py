# SPDX-License-Identifier: Apache-2.0
"""Heal a converted model: train it to predict what its source predicts, on text.

`stages/end_to_end.py` has the training; this file prepares both models and the text, writes the result as another checkpoint with
the record of what was done, and verifies it.
"""

import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..errors import UserError
from ..mathematics.scales import SCALES
from ..output.card import add_healing
from ..output.folder import check_output
from ..output.progress import source_fingerprint, token_fingerprint, versions, work_on, write_json
from ..output.reports import HealReport
from ..source.checkpoint import RECORD, Checkpoint, open_checkpoint, read_record
from ..source.loading import choose_device, compute_dtype, launched_processes, load_model
from ..source.matching import ModelCheckpoint, match_model
from ..source.text import read_text, token_windows
from ..source.tokenizer import check_same_tokenizer, check_vocabulary, load_tokenizer
from ..stages.end_to_end import (
    LORA_RANK,
    RATES,
    STEP_TOKENS,
    Training,
    batches,
    disk_estimate,
    distil,
    history,
    memory,
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
    text: str,
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
        text: a file or a data set, as for `convert`; a part of it is held back to measure on.
        steps: how many to take at most.
        train: "lora" (adapters on all linear layers, merged in the end), "attention" (all weights of the attention) or "all".
        lora_rank: rank of the adapters.
        learning_rate: at its highest; None for 1e-3, and 2.5e-4 for all weights.
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
    student_checkpoint, teacher_checkpoint = open_checkpoint(out), open_checkpoint(teacher, revision)
    check_pair(student_checkpoint, teacher_checkpoint)
    student_checkpoint, teacher_checkpoint = match_model(student_checkpoint), match_model(teacher_checkpoint)
    assert student_checkpoint.folder is not None and teacher_checkpoint.folder is not None
    widest = max(min(shape) for shape in linear_shapes(student_checkpoint))
    if train == "lora" and lora_rank > widest:
        raise UserError(f"--lora-rank is {lora_rank}; allowed: 1 to {widest}, the smaller side of this model's widest matrix")
    run_device = choose_device(device)
    processes = launched_processes(run_device)
    window = trained_window(student_checkpoint, run_device)
    wanted = STEP_TOKENS[run_device.type] if step_tokens is None else step_tokens
    micro, accumulated = batches(wanted, window, run_device, processes.num_processes)
    step_tokens = micro * accumulated * processes.num_processes * window
    trained = trained_parameters(student_checkpoint, train, lora_rank)
    plan = HealReport(
        train=train,
        steps=steps,
        tokens_per_step=step_tokens,
        window=window,
        trained_parameters=trained,
        memory_bytes=memory(
            student_checkpoint.config,
            (student_checkpoint.parameters, teacher_checkpoint.parameters, trained),
            (compute_dtype(student_checkpoint, run_device), compute_dtype(teacher_checkpoint, run_device)),
            Training(train, steps, 0.0, micro, accumulated, seed, PATIENCE, lora_rank, gradient_checkpointing),
            window,
            run_device,
        ),
    )
    folders = [student_checkpoint.folder, teacher_checkpoint.folder, *teacher_checkpoint.paths.values()]
    room = student_checkpoint.bytes + disk_estimate(trained if train == "lora" else student_checkpoint.parameters, trained)
    path = check_output(dest, folders, room, processes, overwrite=overwrite)
    if dry_run:
        return plan
    tokenizer = load_tokenizer(teacher_checkpoint.folder, teacher, trust_remote_code)
    check_same_tokenizer(student_checkpoint.folder, out, tokenizer, teacher, trust_remote_code)
    most = (steps * step_tokens // window + HELD_BACK) * window
    windows = token_windows(read_text(text, most, tokenizer=tokenizer), tokenizer, most, window, seed)
    check_vocabulary(windows, student_checkpoint)
    unit = micro * processes.num_processes  # windows in a forward pass of all processes, which evaluations are whole numbers of
    held = max(unit, min(HELD_BACK, len(windows) // 20) // unit * unit)
    if windows.shape[1] < window or len(windows) <= held:
        raise UserError(f"the text has {windows.numel():,} tokens; {(held + 1) * window:,} are the least here, millions are usual")
    if step_tokens > (len(windows) - held) * window:
        raise UserError(
            f"a step takes {step_tokens:,} tokens, the text has {(len(windows) - held) * window:,} beside those held back; "
            "lower --step-tokens, or give more text"
        )
    rate = RATES[train] if learning_rate is None else learning_rate
    # Gradient checkpointing changes no result, so the recipe does not mention it.
    training = Training(train, steps, rate, micro, accumulated, seed, PATIENCE, lora_rank, gradient_checkpointing)
    recipe = {
        "out": out,
        "out_sha256": source_fingerprint(student_checkpoint),
        "teacher": teacher,
        "teacher_sha256": source_fingerprint(teacher_checkpoint),
        "text": text,
        "text_sha256": token_fingerprint(windows),
        "train": train,
        "lora_rank": lora_rank if train == "lora" else None,
        "steps": steps,
        "learning_rate": rate,
        "tokens_per_step": step_tokens,
        "seed": seed,
        "device": run_device.type,
        "versions": versions(),
    }
    sources, kept = {"out_sha256": student_checkpoint, "teacher_sha256": teacher_checkpoint}, ["checkpoint-*/complete"]
    with work_on(path, recipe, sources, processes, restart=restart, overwrite=overwrite, worth=kept) as folder:
        original = load_model(teacher_checkpoint, torch.device("cpu"), compute_dtype(teacher_checkpoint, run_device))
        state = distil(student_checkpoint, original, windows[held:], windows[:held], folder, training, run_device, processes)
        report = plan
        if processes.is_main_process:
            output = write_trained(student_checkpoint, folder, training)
            check_same_tokenizer(output, dest, tokenizer, teacher, trust_remote_code)
            healed = load_model(open_checkpoint(str(output)), run_device, compute_dtype(student_checkpoint, run_device))
            report = replace(
                plan,
                steps_taken=state.global_step,
                stopped_early=state.global_step < steps,
                seconds=time.perf_counter() - started,
                history=history(state.log_history),
                verify=compare(original.to(run_device), healed, [windows[:held]], None),
                output=str(path),
            )
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
    tensors = checkpoint.tensors
    if train == "lora":
        return sum(lora_rank * sum(shape) for shape in linear_shapes(checkpoint))
    return sum(
        tensor.parameters
        for name, tensor in tensors.items()
        if train == "all" or f".{checkpoint.config.family.attention_name}." in name
    )


def record_healing(output: Path, report: HealReport, recipe: dict, name: str) -> None:
    """Add what was done to the record and the card of a healed checkpoint, if it has them; `name` is its new one."""
    record, card_file = read_record(output), output / "README.md"
    entry = {"recipe": recipe, "report": asdict(report)}
    write_json(record | {"healing": [*record.get("healing", []), entry]}, output / RECORD)
    if card_file.exists():
        card_file.write_text(add_healing(card_file.read_text(encoding="utf-8"), report, recipe, name), encoding="utf-8")
