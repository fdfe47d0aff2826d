# SPDX-License-Identifier: Apache-2.0
"""Distillation of the original model into the converted one, on Transformers' own Trainer.

* The loss is the Kullback-Leibler divergence of the student's predictions from the teacher's at every position; in evaluation it
  is the student's own loss on the text, whose exponential is its perplexity.
* The Trainer brings what `accelerate launch` configures (several GPUs, FSDP2, DeepSpeed), accumulation, checkpoints and resume.
* A loss that is not finite stops the training before such weights can be saved, and names the layer that it came from.
"""

import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..errors import UserError
from ..source.checkpoint import save_file
from .scales import HEAD_TOKENS


PATIENCE = 10  # evaluations without a new best after which healing stops; a high learning rate hides what its decay will bring
BEST = "best.safetensors"


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of the student from the teacher, in nats per position.

    Args:
        student: logits [N, vocabulary].
        teacher: logits [N, vocabulary].

    Returns:
        A scalar. Probabilities are formed for a part of the positions at a time, again in the backward pass.
    """

    def part(ours: Tensor, theirs: Tensor) -> Tensor:
        ours, theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        return nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")

    pairs = zip(student.split(HEAD_TOKENS), teacher.split(HEAD_TOKENS), strict=True)
    parts = [checkpoint(part, ours, theirs, use_reentrant=False) for ours, theirs in pairs]
    return torch.stack(parts).sum() / len(student)


class DistillationTrainer(Trainer):
    """Trains a converted model to predict what its source predicts.

    Args:
        teacher: the source model, in evaluation mode; each process holds all of it.
        folder: where the best weights so far are kept.
        **kwargs: the Trainer's.
    """

    def __init__(self, *, teacher: Any, folder: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which the Trainer divides by the accumulated steps
        self.teacher = teacher.to(self.args.device)
        self.folder = folder
        student: Any = self.model
        self.trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        self._watched: list[tuple[int, Tensor]] | None = None
        for index, layer in enumerate(student.get_decoder().layers):
            layer.register_forward_hook(lambda _module, _args, output, index=index: self._watch(index, output))

    def _watch(self, layer: int, output: Any) -> None:
        if self._watched is not None:
            self._watched.append((layer, output[0] if isinstance(output, tuple) else output))

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The divergence from the teacher on `input_ids` [B, T]; of a model in evaluation mode, its cross-entropy."""
        ids = inputs["input_ids"]
        self._watched = []  # references to tensors that the backward pass keeps anyway
        logits = model(input_ids=ids, use_cache=False).logits  # [B, T, vocabulary]
        watched, self._watched = self._watched, None  # gradient checkpointing runs the layers again, unwatched
        if model.training:
            with torch.no_grad():
                target = self.teacher(input_ids=ids, use_cache=False).logits
            loss = divergence(logits.flatten(0, 1), target.flatten(0, 1))
        else:
            predictions, targets = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            pairs = zip(predictions.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True)
            losses = [nn.functional.cross_entropy(part.float(), right, reduction="sum") for part, right in pairs]
            loss = torch.stack(losses).sum() / len(targets)
        if not loss.isfinite():
            broken = next((f"layer {layer}" for layer, output in watched if not output.isfinite().all()), "the head")
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step}: {broken} is the first that computes what is not "
                f"finite; what was saved before is kept in {self.folder}. Begin again with a lower --learning-rate and --restart"
            )
        return (loss, {"logits": logits}) if return_outputs else loss

    def keep_best(self) -> None:
        """Save the weights that are trained; all processes take part, the main one writes."""
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        if self.accelerator.is_main_process:
            trained = {name: weight.detach().cpu().contiguous() for name, weight in weights.items() if name in self.trained}
            assert trained.keys() == self.trained
            save_file(trained, self.folder / BEST)


class Healing(TrainerCallback):
    """Shows progress, keeps the best weights, stops when nothing improves, and marks checkpoints that are complete.

    Args:
        tokens: in one step, over all processes.
    """

    trainer: DistillationTrainer

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the progress bar where the training begins."""
        self.logged = state.global_step, time.perf_counter()
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="healing", unit="step", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the progress bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Show loss and speed, and add the speed to what the Trainer remembers."""
        if logs is None or "loss" not in logs:
            return
        (step, since), now = self.logged, time.perf_counter()
        speed = (state.global_step - step) * self.tokens / (now - since)
        self.logged = state.global_step, now
        state.log_history[-1]["tokens_per_second"] = round(speed)
        if self.bar is not None:
            self.bar.set_postfix(divergence=f"{logs['loss']:.4f}", tokens_per_second=f"{speed:,.0f}")

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the weights if they are the best so far; stop after some evaluations without a new best."""
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if losses[-1] == min(losses):
            self.trainer.keep_best()
        since_start = losses[1:] or losses  # a good conversion gets worse at first
        if len(since_start) - since_start.index(min(since_start)) > PATIENCE:
            control.should_training_stop = True
        if self.bar is not None:
            self.bar.write(f"step {state.global_step}: held-out perplexity {math.exp(min(losses[-1], 700.0)):.4f}", file=sys.stderr)
        self.logged = state.global_step, time.perf_counter()  # the evaluation's own time is not the training's

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark a checkpoint that all of is written."""
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "complete").touch()

    def close(self) -> None:
        """Close the progress bar, if there is one."""
        if self.bar is not None:
            self.bar.close()


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written whole; those that were not are removed."""
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*")}
    for step in sorted(found, reverse=True):
        if (found[step] / "complete").exists():
            return str(found[step])
        shutil.rmtree(found[step])
    return None
