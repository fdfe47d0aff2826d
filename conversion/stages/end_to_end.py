# SPDX-License-Identifier: Apache-2.0
"""The second stage of a conversion, and what `heal` does: the whole model is trained to predict what its source predicts.

`distill.py` has the training. This file prepares the models, resumes where an earlier run was killed, and writes the result: the
best weights that held-back text has seen, the unchanged model among them.
"""

import gc
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerState, TrainingArguments
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer import TRAINER_STATE_NAME

from ..errors import brief
from ..mathematics.closed_form import keep_closed_form, make_trainable
from ..mathematics.distill import BEST, DistillationTrainer, Healing, last_checkpoint
from ..mathematics.measures import perplexity
from ..mathematics.scales import HEAD_TOKENS
from ..output.folder import entries
from ..output.reports import HealReport
from ..source.attention import attention_of
from ..source.checkpoint import Checkpoint
from ..source.families import mlp_width
from ..source.loading import compute_dtype, load_model
from ..source.lookups import LOOKUPS
from ..source.matching import ModelCheckpoint
from ..source.own_text import BUNDLED_NAME
from ..source.shards import TORCH_NAMES, ShardWriter, load_file


RATES = {"lora": 1e-3, "attention": 1e-3, "layers": 2.5e-4, "all": 2.5e-4}
LORA_RANK = 16
STEP_TOKENS = {"cuda": 1 << 14, "cpu": 1 << 12}
MICRO_TOKENS = {"cuda": 1 << 14, "cpu": 1 << 12}  # in one forward pass; the rest of a step is accumulated
EVALUATIONS = 20
TIMES_READ = 2  # a text; what is read more often is learnt by heart
SHARES = {LOOKUPS: 0.5, BUNDLED_NAME: 0.4}  # of a text in the training, beside 1 of each other
MOST_READ = 8  # the text that is too short beside others, for the sake of variety
MOST_WRITTEN = 1 << 24  # tokens of own text, which is read once; writing one takes as long as training on one
CHECKPOINTS = 4  # of evaluations: a checkpoint takes as long as many steps of a small model


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Args:
        what: "lora" (adapters on all linear layers, merged in the end), "attention" (all weights of the attention), "layers" (all
            weights but those of the embedding and the head) or "all".
        steps: at most.
        rate: learning rate at its highest.
        micro: windows in one forward pass of a process.
        accumulated: forward passes in a step.
        seed: of the order of the text, and of new adapters.
        patience: evaluations without a new best after which to stop.
        lora_rank: rank of the adapters.
        gradient_checkpointing: compute activations again in the backward pass.
    """

    what: str
    steps: int
    rate: float
    micro: int
    accumulated: int
    seed: int
    patience: int
    lora_rank: int = LORA_RANK
    gradient_checkpointing: bool = False

    def tokens_per_step(self, window: int, processes: int) -> int:
        """Of windows of so many tokens, over all processes."""
        return self.micro * self.accumulated * processes * window


def batches(tokens: int, window: int, device: torch.device, processes: int) -> tuple[int, int]:
    """Windows in a forward pass of a process, and forward passes in a step of about so many tokens over all processes."""
    share = max(1, tokens // window // processes)
    micro = min(share, max(1, MICRO_TOKENS[device.type] // window))
    return micro, round(share / micro)


def tokens_of_each(lengths: dict[str, float], tokens: int) -> dict[str, int]:
    """How many tokens to train on of each text: as evenly as `SHARES` has it, none more than `MOST_READ` times.

    Args:
        lengths: tokens that each text has, by its name.
        tokens: to train on.

    Returns:
        Tokens of each; together fewer if all texts are too short.
    """
    result: dict[str, int] = {}
    shares = {name: SHARES.get(name, 1.0) for name in lengths}
    for name in sorted(lengths, key=lambda name: lengths[name] / shares[name]):
        left = sum(share for other, share in shares.items() if other not in result)
        result[name] = int(min((tokens - sum(result.values())) * shares[name] / left, MOST_READ * lengths[name]))
    return result


def plan_training(
    student: Checkpoint, teacher: Checkpoint, trained: int, training: Training, window: int, device: torch.device, processes: int
) -> HealReport:
    """What a training is to be, and what it takes.

    Args:
        student: the converted model.
        teacher: its source.
        trained: how many numbers are trained.
        training: how.
        window: tokens in a sequence.
        device: where.
        processes: how many.

    Returns:
        The report of a training that has not begun.
    """
    numbers = student.parameters, teacher.parameters, trained
    dtypes = compute_dtype(student, device), compute_dtype(teacher, device)
    return HealReport(
        train=training.what,
        steps=training.steps,
        tokens_per_step=training.tokens_per_step(window, processes),
        window=window,
        trained_parameters=trained,
        memory_bytes=memory(student.config, numbers, dtypes, training, window, device),
    )


def distil(
    student_checkpoint: Checkpoint,
    original: Any,
    windows: Tensor,
    held: Tensor,
    folder: Path,
    training: Training,
    device: torch.device,
    processes: Any,
    cut: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Train a converted model to predict what the original predicts; goes on where an earlier call in `folder` was killed.

    Runs on as many processes as `accelerate launch` has started, sharded as its configuration says.

    Args:
        student_checkpoint: the converted model.
        original: its source, in evaluation mode, anywhere.
        windows: token ids to train on [windows, tokens].
        held: token ids that tell which weights are the best, and when to stop [windows, tokens].
        folder: where checkpoints and the best weights are kept.
        training: how.
        device: of this process.
        processes: Accelerate's state.
        cut: what every second step makes shorter windows with, None for one length.

    Returns:
        What was done, on the main process, by the names of `HealReport`: `steps_taken`, `stopped_early` and `history`.

    Raises:
        OSError: a file could not be written.
    """
    main, trained = processes.is_main_process, folder / "trained.json"
    resumed = last_checkpoint(folder) if main else None
    resumed, done = broadcast_object_list([resumed, trained.exists() and (folder / BEST).exists()])
    if not done:
        callback = Healing(training.tokens_per_step(windows.shape[1], processes.num_processes), training.patience)
        trainer = DistillationTrainer(
            teacher=original.requires_grad_(False),
            folder=folder,
            cut=cut,
            model=student_to_train(student_checkpoint, training, device),
            args=training_arguments(folder, training, device, len(held), resumed is not None),
            train_dataset=Windows(windows),
            eval_dataset=Windows(held),
            callbacks=[callback],
        )
        callback.trainer = trainer
        for shown in (PrinterCallback, ProgressCallback):  # on stdout, where results go and nothing else
            trainer.remove_callback(shown)
        if resumed is not None and main:
            trainer.best = load_file(Path(resumed) / BEST)
        try:
            with full_disks():
                if resumed is not None:
                    trainer.state = TrainerState.load_from_json(str(Path(resumed) / TRAINER_STATE_NAME))
                if trainer.state.global_step < training.steps:  # else it would take a step more
                    trainer.train(resume_from_checkpoint=resumed)
                trainer.write_best(folder)
        finally:
            callback.close()
        if main:
            trainer.state.save_to_json(str(trained))
        del trainer, callback
        gc.collect()  # they refer to each other, and to all that was trained
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if not main:
        return {}
    state = TrainerState.load_from_json(str(trained))
    stopped_early = state.global_step < training.steps
    return {"steps_taken": state.global_step, "stopped_early": stopped_early, "history": history(state.log_history)}


def student_to_train(checkpoint: Checkpoint, training: Training, device: torch.device) -> Any:
    """The converted model, what is trained of it in float32."""
    dtype = compute_dtype(checkpoint, device) if training.what == "lora" else torch.float32
    student = prepare(load_model(checkpoint, torch.device("cpu"), dtype), training)
    if training.gradient_checkpointing:
        # Transformers 5.23 has a new name for it.
        name = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
        getattr(student, f"{name}_checkpointing_enable")({"use_reentrant": False})
    return student


@contextmanager
def full_disks() -> Iterator[None]:
    """Make an OSError of what arrives as others when a disk is full."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in ("inline_container", "iostream")):
            raise
        raise OSError(f"a file could not be written, is the disk full? ({brief(error)})") from error


def memory(
    config: Any,
    numbers: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    training: Training,
    window: int,
    device: torch.device,
) -> dict[str, int]:
    """Bytes that one process takes without sharding, by what they are for.

    Args:
        config: of the converted model.
        numbers: weights of the converted model, of its source, and how many are trained.
        dtypes: what the two are computed in.
        training: how.
        window: tokens in a sequence.
        device: where.

    Returns:
        Bytes of `student`, `teacher`, `gradients_and_optimizer` and `activations`, and their `total`.
    """
    (weights, theirs, trained), lora = numbers, training.what == "lora"
    width = 2 if device.type == "cuda" else 4  # of an activation
    heads, hidden = config.num_attention_heads, config.hidden_size
    layer = 8 * hidden + heads * (3 * config.qk_head_dim + 2 * config.v_head_dim) + 4 * mlp_width(config)
    kept = config.num_hidden_layers * (hidden if training.gradient_checkpointing else layer)
    kept += layer if training.gradient_checkpointing else 0
    head = config.vocab_size * hidden * 8 if training.what == "all" else 0  # its gradient, and a chunk's share of it
    parts = {
        "student": weights * (dtypes[0] if lora else torch.float32).itemsize,
        "teacher": theirs * dtypes[1].itemsize,
        "gradients_and_optimizer": trained * (16 if lora else 12),
        "activations": training.micro * window * kept * width + HEAD_TOKENS * config.vocab_size * 16 + head,
    }
    return parts | {"total": sum(parts.values())}


def disk_estimate(model: int, trained: int) -> int:
    """Bytes on disk of the best weights and of three checkpoints with theirs: the oldest goes when the newest is written.

    Args:
        model: numbers that a checkpoint has, in float32: of adapters, or of the whole model.
        trained: numbers that are trained.

    Returns:
        Bytes.
    """
    return 4 * trained + 3 * (4 * model + 12 * trained)


def prepare(student: Any, training: Training) -> Any:
    """Choose what is trained; for "lora", put adapters on all linear layers but the head."""
    for layer in student.get_decoder().layers:
        make_trainable(attention_of(layer))
    if training.what == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(training.seed)
        rank = training.lora_rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(student, config)
    names = trained_names(student, training.what)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    return student


def trained_names(model: Any, what: str) -> set[str]:
    """Names of a model's parameters that are trained: of the "attention", the "layers" or "all"; see `Training`."""
    named = dict(model.named_parameters())
    if what == "attention":
        return {name for name in named if f".{model.config.family.attention_name}." in name}
    ends = nn.ModuleList([model.get_input_embeddings(), model.get_output_embeddings()] if what == "layers" else [])
    left = {id(parameter) for parameter in ends.parameters()}
    return {name for name, parameter in named.items() if id(parameter) not in left}


def numbers_of_ends(checkpoint: ModelCheckpoint) -> int:
    """How many numbers the embedding and the head of a model have, a tied head too if it is stored."""
    layers = trained_names(checkpoint.model, "layers")
    return sum(tensor.parameters for name, tensor in checkpoint.tensors.items() if name not in layers)


class Windows(torch.utils.data.Dataset):
    """Token windows [windows, tokens] as the Trainer takes them."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def training_arguments(folder: Path, training: Training, device: torch.device, held: int, resumed: bool) -> Any:
    """The Trainer's settings: AdamW, cosine decay to zero, 20 evaluations on so many windows, and 5 checkpoints."""
    every = math.ceil(training.steps / EVALUATIONS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=training.steps,
        per_device_train_batch_size=training.micro,
        # Whole batches alone are left out again where processes have more of them than others.
        per_device_eval_batch_size=max(size for size in range(1, training.micro + 1) if held % size == 0),
        gradient_accumulation_steps=training.accumulated,
        learning_rate=training.rate,
        lr_scheduler_type="cosine",
        warmup_steps=training.steps // 20,  # whose first trains nothing
        adam_beta2=0.95,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=not resumed,
        prediction_loss_only=True,
        save_steps=CHECKPOINTS * every,
        save_total_limit=2,  # the older one until the newer is marked complete
        logging_steps=max(1, every // 5),
        logging_nan_inf_filter=False,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        dataloader_num_workers=0,
        accelerator_config={"non_blocking": device.type == "cuda"},  # else each step waits for the one before
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        seed=training.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else one process would share its batches out to all GPUs that it sees
    return arguments


def write_trained(checkpoint: ModelCheckpoint, folder: Path, training: Training) -> Path:
    """Write the trained checkpoint: the best weights, merged, each in the type it was stored in; all else as it was.

    Args:
        checkpoint: what was trained.
        folder: with the best weights.
        training: how.

    Returns:
        `folder`/output.
    """
    assert checkpoint.folder is not None
    student = load_model(checkpoint, torch.device("cpu"), torch.float32)
    trained = prepare(student, training)
    missing, unexpected = trained.load_state_dict(load_file(folder / BEST), strict=False)
    assert not unexpected and not {name for name, p in trained.named_parameters() if p.requires_grad} & set(missing)
    if training.what == "lora":
        trained = trained.merge_and_unload()
    for layer in trained.get_decoder().layers:
        attention = attention_of(layer)
        if attention.kv_a_layernorm.variance_epsilon != trained.config.kv_a_layernorm_eps:  # see `make_trainable`
            keep_closed_form(attention, trained.config.kv_a_layernorm_eps)
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    for entry in entries(checkpoint.folder):
        if entry.name.startswith(".") or entry.name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        # Contents only: the modes of a read-only checkpoint would keep the card from being written.
        copy = partial(shutil.copytree, copy_function=shutil.copyfile) if entry.is_dir() else shutil.copyfile
        copy(entry, output / entry.name)
    tensors = {name: checkpoint.stored.tensors[part] for name, part in checkpoint.written.items()}
    state = revert_weight_conversion(trained, trained.state_dict())  # experts one by one, say, as the library would save them
    ShardWriter(output, tensors).write(lambda name: state[name].to(getattr(torch, TORCH_NAMES[tensors[name].dtype])))
    return output


def history(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """What the Trainer logged, in this module's terms."""
    entries: list[dict[str, float]] = []
    for entry in log:
        if "eval_loss" in entry:
            entries.append({"step": entry["step"], "perplexity": perplexity(entry["eval_loss"])})
        elif "loss" in entry:
            speed = entry.get("tokens_per_second", 0.0)
            entries.append({"step": entry["step"], "divergence": entry["loss"], "tokens_per_second": speed})
    return entries
