# SPDX-License-Identifier: Apache-2.0
"""Heal a converted model: train it to predict what its source predicts, on text.

`distill.py` has the training; this file prepares both models and the text, merges what was trained, writes the result as
another checkpoint with the record of what was done, and verifies it.
"""

import json
import math
import shutil
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerState, TrainingArguments

from ..errors import UserError, brief
from ..mathematics.closed_form import make_trainable
from ..mathematics.distill import BEST, DistillationTrainer, Healing, last_checkpoint
from ..mathematics.scales import HEAD_TOKENS, SCALES
from ..output.card import add_healing
from ..output.folder import check_output, entries
from ..output.progress import source_fingerprint, token_fingerprint, versions, work_on, write_json
from ..output.reports import HealReport
from ..source.checkpoint import DTYPES, RECORD, Checkpoint, ShardWriter, load_file, open_checkpoint
from ..source.loading import choose_device, compute_dtype, launched_processes, load_model
from ..source.matching import match_model
from ..source.text import read_text, token_windows
from ..source.tokenizer import check_same_tokenizer, check_vocabulary, load_tokenizer
from .verify import check_pair, compare


STEPS = 1000
RATES = {"lora": 1e-3, "attention": 1e-3, "all": 5e-4}
LORA_RANK = 16
STEP_TOKENS = {"cuda": 1 << 14, "cpu": 1 << 12}
MICRO_TOKENS = {"cuda": 1 << 13, "cpu": 1 << 12}  # in one forward pass; the rest of a step is accumulated
EVALUATIONS = 20
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
        text: a .txt or .txt.xz file, or a data set; a part of it is held back to measure on.
        steps: how many to take at most.
        train: "lora" (adapters on all linear layers, merged in the end), "attention" (all weights of the attention) or "all".
        lora_rank: rank of the adapters.
        learning_rate: at its highest; None for 1e-3, and 5e-4 for all weights.
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
    share = max(1, wanted // window // processes.num_processes)  # sequences of a process in a step
    micro = min(share, max(1, MICRO_TOKENS[run_device.type] // window))
    accumulated = round(share / micro)
    step_tokens = micro * accumulated * processes.num_processes * window
    plan = HealReport(
        train=train,
        steps=steps,
        tokens_per_step=step_tokens,
        window=window,
        trained_parameters=trained_parameters(student_checkpoint, train, lora_rank),
        memory_bytes=memory(
            student_checkpoint, teacher_checkpoint, train, lora_rank, micro * window, run_device, gradient_checkpointing
        ),
    )
    folders = [student_checkpoint.folder, teacher_checkpoint.folder, *teacher_checkpoint.paths.values()]
    path = check_output(dest, folders, disk_estimate(student_checkpoint, train, plan), processes, overwrite=overwrite)
    if dry_run:
        return plan
    tokenizer = load_tokenizer(teacher_checkpoint.folder, teacher, trust_remote_code)
    check_same_tokenizer(student_checkpoint.folder, out, tokenizer, teacher, trust_remote_code)
    most = (steps * step_tokens // window + HELD_BACK) * window
    windows = token_windows(read_text(text, most), tokenizer, most, window, seed)
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
        trained, resumed = folder / "trained.json", None  # the Trainer's state after the last step
        if processes.is_main_process:
            resumed = last_checkpoint(folder)
        original = load_model(teacher_checkpoint, torch.device("cpu"), compute_dtype(teacher_checkpoint, run_device))
        resumed, done = broadcast_object_list([resumed, trained.exists()])
        if not done:
            student = load_model(
                student_checkpoint,
                torch.device("cpu"),
                compute_dtype(student_checkpoint, run_device) if train == "lora" else torch.float32,
            )
            student = prepare(student, train, lora_rank, seed)
            if gradient_checkpointing:  # changes no result, so the recipe does not mention it
                # Transformers 5.23 has a new name for it.
                name = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
                getattr(student, f"{name}_checkpointing_enable")({"use_reentrant": False})
            callback = Healing(step_tokens)
            trainer = DistillationTrainer(
                teacher=original.requires_grad_(False),
                folder=folder,
                model=student,
                args=training_arguments(folder, steps, rate, micro, accumulated, seed, run_device, resumed is not None),
                train_dataset=Windows(windows[held:]),
                eval_dataset=Windows(windows[:held]),
                callbacks=[callback],
            )
            callback.trainer = trainer
            silence(trainer)
            try:
                trainer.train(resume_from_checkpoint=resumed)
            except (SafetensorError, RuntimeError) as error:  # as these a full disk arrives, not as an OSError
                if isinstance(error, RuntimeError) and not any(word in str(error) for word in ("inline_container", "iostream")):
                    raise
                raise OSError(f"a file could not be written, is the disk full? ({brief(error)})") from error
            finally:
                callback.close()
            if processes.is_main_process:
                trainer.state.save_to_json(str(trained))
            del trainer, student
        report = plan
        if processes.is_main_process:
            output = write_healed(student_checkpoint, folder, recipe)
            check_same_tokenizer(output, dest, tokenizer, teacher, trust_remote_code)
            healed = load_model(open_checkpoint(str(output)), run_device, compute_dtype(student_checkpoint, run_device))
            state = TrainerState.load_from_json(str(trained))
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
        record = json.loads((checkpoint.folder / RECORD).read_text(encoding="utf-8"))
        return min(window, int(record["report"]["window"])) if record["report"]["window"] >= 64 else window
    except (OSError, ValueError, KeyError, TypeError):
        return window


def linear_shapes(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    """Shapes of all matrices that adapters are put on."""
    return [tensor.shape for name, tensor in checkpoint.tensors.items() if ".layers." in name and len(tensor.shape) == 2]


def trained_parameters(checkpoint: Checkpoint, train: str, lora_rank: int) -> int:
    """How many numbers are trained, from headers alone."""
    tensors = checkpoint.tensors
    if train == "lora":
        return sum(lora_rank * sum(shape) for shape in linear_shapes(checkpoint))
    return sum(tensor.parameters for name, tensor in tensors.items() if train == "all" or ".self_attn." in name)


def memory(
    student: Checkpoint,
    teacher: Checkpoint,
    train: str,
    lora_rank: int,
    tokens: int,
    device: torch.device,
    gradient_checkpointing: bool,
) -> dict[str, int]:
    """Bytes that one process takes without sharding, by what they are for.

    Args:
        student: the converted model.
        teacher: its source.
        train: what is trained.
        lora_rank: of adapters.
        tokens: in one forward pass.
        device: where.
        gradient_checkpointing: whether activations are computed again.

    Returns:
        Bytes of `student`, `teacher`, `gradients_and_optimizer` and `activations`, and their `total`.
    """
    config, trained = student.config, trained_parameters(student, train, lora_rank)
    width = 2 if device.type == "cuda" else 4  # of an activation
    weights = sum(tensor.parameters for tensor in student.tensors.values())
    theirs = sum(tensor.parameters for tensor in teacher.tensors.values())
    heads, hidden = config.num_attention_heads, config.hidden_size
    layer = 8 * hidden + heads * (3 * config.qk_head_dim + 2 * config.v_head_dim) + 4 * config.intermediate_size
    kept = config.num_hidden_layers * hidden + layer if gradient_checkpointing else config.num_hidden_layers * layer
    parts = {
        "student": weights * (compute_dtype(student, device) if train == "lora" else torch.float32).itemsize,
        "teacher": theirs * compute_dtype(teacher, device).itemsize,
        "gradients_and_optimizer": trained * (16 if train == "lora" else 12),
        "activations": tokens * (kept * width + config.vocab_size * (width + 8)) + HEAD_TOKENS * config.vocab_size * 16,
    }
    return parts | {"total": sum(parts.values())}


def disk_estimate(student: Checkpoint, train: str, plan: HealReport) -> int:
    """Bytes on disk of the output, the best weights, and three checkpoints: the oldest goes when the newest is written."""
    trained = plan.trained_parameters
    model = 4 * (trained if train == "lora" else sum(tensor.parameters for tensor in student.tensors.values()))
    return student.bytes + 4 * trained + 3 * (model + 8 * trained)


class Windows(torch.utils.data.Dataset):
    """Token windows [windows, tokens] as the Trainer takes them."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def training_arguments(
    folder: Path,
    steps: int,
    rate: float,
    micro: int,
    accumulated: int,
    seed: int,
    device: torch.device,
    resumed: bool,
) -> Any:
    """The Trainer's settings: AdamW, cosine decay to zero, an evaluation and a checkpoint every twentieth of the steps."""
    every = math.ceil(steps / EVALUATIONS)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,  # whose first trains nothing
        adam_beta2=0.95,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=not resumed,
        prediction_loss_only=True,
        save_steps=every,
        save_total_limit=2,  # the older one until the newer is marked complete
        logging_steps=max(1, every // 5),
        logging_nan_inf_filter=False,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        dataloader_num_workers=0,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
    )


def prepare(student: Any, train: str, lora_rank: int, seed: int) -> Any:
    """Choose what is trained; for "lora", put adapters on all linear layers but the head."""
    for layer in student.model.layers:
        make_trainable(layer.self_attn)
    if train == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(student, config)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(train == "all" or ".self_attn." in name)
    return student


def silence(trainer: Any) -> None:
    """Results go to stdout, and to nothing else: the Trainer's own progress goes there too."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


def write_healed(checkpoint: Checkpoint, folder: Path, recipe: dict) -> Path:
    """Write the healed checkpoint: the best weights, merged, each in the type it was stored in; all else as it was.

    Args:
        checkpoint: what was healed.
        folder: with the best weights.
        recipe: what the result depends on.

    Returns:
        `folder`/output.
    """
    assert checkpoint.folder is not None
    student = load_model(checkpoint, torch.device("cpu"), torch.float32)
    healed = prepare(student, recipe["train"], recipe["lora_rank"] or LORA_RANK, recipe["seed"])
    missing, unexpected = healed.load_state_dict(load_file(folder / BEST), strict=False)
    assert not unexpected and not {name for name, p in healed.named_parameters() if p.requires_grad} & set(missing)
    if recipe["train"] == "lora":
        healed = healed.merge_and_unload()
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    for entry in entries(checkpoint.folder):
        if entry.name.startswith(".") or entry.name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        # Contents only: the modes of a read-only checkpoint would keep the card from being written.
        copy = partial(shutil.copytree, copy_function=shutil.copyfile) if entry.is_dir() else shutil.copyfile
        copy(entry, output / entry.name)
    state, types = healed.state_dict(), {header: getattr(torch, name) for name, header in DTYPES.items()}
    ShardWriter(output, checkpoint.tensors).write(lambda name: state[name].to(types[checkpoint.tensors[name].dtype]))
    return output


def record_healing(output: Path, report: HealReport, recipe: dict, name: str) -> None:
    """Add what was done to the record and the card of a healed checkpoint, if it has them; `name` is its new one."""
    record_file, card_file = output / RECORD, output / "README.md"
    record = json.loads(record_file.read_text(encoding="utf-8")) if record_file.exists() else {}
    entry = {"recipe": recipe, "report": asdict(report)}
    write_json(record | {"healing": [*record.get("healing", []), entry]}, record_file)
    if card_file.exists():
        card_file.write_text(add_healing(card_file.read_text(encoding="utf-8"), report, recipe, name), encoding="utf-8")


def history(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """What the Trainer logged, in this module's terms."""
    entries: list[dict[str, float]] = []
    for entry in log:
        if "eval_loss" in entry:
            entries.append({"step": entry["step"], "perplexity": math.exp(min(entry["eval_loss"], 700.0))})
        elif "loss" in entry:
            speed = entry.get("tokens_per_second", 0.0)
            entries.append({"step": entry["step"], "divergence": entry["loss"], "tokens_per_second": speed})
    return entries
