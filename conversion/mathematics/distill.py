# SPDX-License-Identifier: Apache-2.0
"""Distillation of the original model into the converted one, on Transformers' own Trainer.

* The loss is the Kullback-Leibler divergence of the student's predictions from the teacher's at every position; in evaluation it
  is the student's own loss on the text, whose exponential is its perplexity.
* The Trainer brings what `accelerate launch` configures (several GPUs, FSDP2, DeepSpeed), accumulation, checkpoints and resume.
* Logits are never there for more than some positions at a time, and on GPUs a decoder layer is compiled, which serves for all; on
  one GPU a step is captured as a graph.
* A loss that is not finite stops the training before such weights can be saved, and names the layer that it came from.
"""

import functools
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AttentionInterface, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_mla.configuration_mla import ropes

from ..errors import UserError
from ..source.families import experts_per_token
from ..source.loading import head_of
from ..source.shards import save_file
from .captured import CapturedSteps
from .measures import perplexity
from .scales import HEAD_TOKENS


BEST = "best.safetensors"
# The library's SDPA by another name. To see that no mask is needed, the library looks at positions, and waits for the GPU; for a
# name that it does not know it makes none.
UNMASKED = "sdpa_unmasked"
AttentionInterface.register(UNMASKED, ALL_ATTENTION_FUNCTIONS["sdpa"])


def divergence(student: Tensor, teacher: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Sum of the Kullback-Leibler divergences of a student's predictions from a teacher's.

    Args:
        student: logits [N, vocabulary].
        teacher: logits [N, vocabulary].
        positions: over how many the mean is taken that is trained on.

    Returns:
        The sum, in nats, and the gradient of the mean at the student's logits: (softmax(student) - softmax(teacher)) / positions.
    """
    ours, theirs = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    total = nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
    return total, ((ours.exp() - theirs.exp()) / positions).to(student.dtype)


class ChunkedDivergence(torch.autograd.Function):
    """Mean Kullback-Leibler divergence between what two heads make of hidden states, and its gradient, a chunk at a time.

    Logits of a vocabulary of 100,000 outweigh all else that a step computes. Here those of a few positions are there at a time:
    their gradient is taken back through the head at once, and what the backward pass needs is as small as hidden states and head.
    """

    @staticmethod
    def forward(ctx: Any, functions: tuple, states: Tensor, target: Tensor, *parameters: Tensor) -> Tensor:
        """The divergence in nats per position.

        Args:
            ctx: PyTorch's.
            functions: the heads of student and teacher, [N, D] -> [N, vocabulary], and `divergence`.
            states: what enters the student's head [N, D].
            target: what enters the teacher's [N, D].
            *parameters: of the student's head.

        Returns:
            A scalar.
        """
        student, teacher, compare = functions
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        slope, slopes = torch.empty_like(states), [torch.zeros_like(parameter) for parameter in wanted]
        total = torch.zeros((), device=states.device)
        for part, theirs, out in zip(states.split(HEAD_TOKENS), target.split(HEAD_TOKENS), slope.split(HEAD_TOKENS), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                logits = student(part)
            share, at_logits = compare(logits.detach(), teacher(theirs), len(states))
            total += share
            at_states, *at_parameters = torch.autograd.grad(logits, [part, *wanted], at_logits)
            out.copy_(at_states)
            for whole, added in zip(slopes, at_parameters, strict=True):
                whole += added
        ctx.save_for_backward(slope, *slopes)
        return total / len(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        """The gradients that the forward pass has taken, times that of what follows."""
        slope, *slopes = (saved * gradients[0] for saved in ctx.saved_tensors)
        wanted = iter(slopes)
        return None, slope, None, *(next(wanted) if needed else None for needed in ctx.needs_input_grad[3:])


def needs_no_mask(config: Any, tokens: int) -> bool:
    """Whether in sequences of so many tokens each attends to all before it, and that by the library's SDPA alone."""
    window, family = getattr(config, "sliding_window", None), getattr(config, "family", None)
    eager = family is not None and (family.softcap or family.sinks)  # in a converted model, whatever its configuration says
    return config._attn_implementation == "sdpa" and not eager and (not window or window >= tokens)


class DistillationTrainer(Trainer):
    """Trains a converted model to predict what its source predicts.

    Args:
        teacher: the source model, in evaluation mode; each process holds all of it.
        folder: where the best weights so far are kept.
        cut: what every second step makes shorter windows with [windows, tokens], None for one length: a model that sees long
            sequences alone loses what near text tells, and one that sees short ones alone what is far.
        **kwargs: the Trainer's.
    """

    def __init__(self, *, teacher: Any, folder: Path, cut: Callable[[Tensor], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which the Trainer divides by the accumulated steps
        self.teacher = teacher.to(self.args.device)
        self.folder, self.cut = folder, cut
        student: Any = self.model
        if not hasattr(student, "merge_and_unload"):
            # The Trainer goes on from what it saves by the model's own names; experts, for one, have others in a checkpoint.
            student.save_pretrained = functools.partial(student.save_pretrained, save_original_format=False)
        self.trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        self.best: dict[str, Tensor] = {}
        self._watched: list[Tensor] | None = None
        # A step, whether each layer and the loss were finite, on the CPU, and when this is there.
        self._finite: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        for layer in student.get_decoder().layers:
            layer.register_forward_hook(lambda _module, _args, output: self._watch(output))
        # The loss is computed in the head's place, inside the model's forward pass: what shards or casts weights does it there.
        # What a model does to logits after that, it must not do to a loss.
        language_model = student.get_base_model() if hasattr(student, "get_base_model") else student
        self._head = student.get_output_embeddings()
        self._logits, self._head.forward = head_of(language_model, self._head.forward), self._loss

        def forward(input_ids: Tensor, use_cache: bool, **_: Any) -> CausalLMOutput:
            states = language_model.get_decoder()(input_ids=input_ids, use_cache=use_cache).last_hidden_state
            return CausalLMOutput(logits=self._head(states))

        language_model.forward = forward
        self._divergence = divergence
        if self.args.device.type == "cuda" and not self.is_deepspeed_enabled:  # which gathers weights in hooks of its own
            # Elementwise work is most of a step of a small model. One layer is compiled, and serves for all.
            self._divergence = torch.compile(divergence, dynamic=False)
            if not experts_per_token(self.teacher.config):  # whose products in float32 cannot be compiled
                for layer in (*student.get_decoder().layers, *self.teacher.get_decoder().layers):
                    layer.compile(dynamic=False)
        texts: Any = self.train_dataset
        self._configs = [language_model.config, self.teacher.config]
        self._unmasked = all(needs_no_mask(config, len(texts[0]["input_ids"])) for config in self._configs)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._steps = CapturedSteps(trained, self._step) if self._can_be_captured(student) else None

    def _can_be_captured(self, student: Any) -> bool:
        """Whether nothing in a step waits for the GPU, or takes part in what others do."""
        ropes_of_both = [rope["rope_type"] for config in self._configs for rope in ropes(config).values()]
        return (
            self.args.device.type == "cuda"
            and self.accelerator.distributed_type == DistributedType.NO  # FSDP puts other parameters in place of the model's
            and self.args.gradient_accumulation_steps == 1
            and self._unmasked
            and not {"dynamic", "longrope"}.intersection(ropes_of_both)  # which look at positions
            and not experts_per_token(self.teacher.config)
            and not any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
        )

    def _watch(self, output: Any) -> None:
        if self._watched is not None:
            self._watched.append(output[0] if isinstance(output, tuple) else output)

    def _loss(self, states: Tensor) -> Tensor:
        ids, target = self._batch
        if target is not None:
            functions = self._logits, head_of(self.teacher), self._divergence
            return ChunkedDivergence.apply(functions, states.flatten(0, 1), target.flatten(0, 1), *self._head.parameters())
        states, targets = states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        losses = [
            nn.functional.cross_entropy(self._logits(part).float(), right, reduction="sum")
            for part, right in zip(states.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True)
        ]
        return torch.stack(losses).sum() / len(targets)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; the library makes no masks where none are needed."""
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs if self._unmasked else ():
                config._attn_implementation = UNMASKED
            return super().train(*args, **kwargs)
        finally:
            for config, implementation in zip(self._configs, before, strict=True):
                config._attn_implementation = implementation

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's, or its forward and backward pass alone, replayed."""
        if self._steps is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self.check_finite()
        model.train()
        loss, finite = self._steps(self._shortened(self._prepare_inputs(inputs)["input_ids"]))
        self._remember(finite)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The divergence from the teacher on `input_ids` [B, T]; of a model in evaluation mode, its cross-entropy."""
        self.check_finite()
        loss, finite = self._compute(model, self._shortened(inputs["input_ids"]) if model.training else inputs["input_ids"])
        self._remember(finite)
        if not model.training:
            self.check_finite()
        return (loss, {}) if return_outputs else loss

    def _shortened(self, ids: Tensor) -> Tensor:
        return self.cut(ids) if self.cut is not None and self.state.global_step % 2 else ids

    def _step(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        loss, finite = self._compute(self.model_wrapped, ids)
        loss.backward()
        return loss.detach(), finite

    def _compute(self, model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and whether the output of each layer and the loss are finite [layers + 1]."""
        target = None
        if model.training:
            with torch.no_grad():
                target = self.teacher.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        self._batch, self._watched = (ids, target), []
        loss = model(input_ids=ids, use_cache=False).logits
        watched, self._watched = self._watched, None  # gradient checkpointing runs the layers again, unwatched
        del self._batch
        return loss, torch.stack([*(output.isfinite().all() for output in watched), loss.isfinite()])

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, not compiled: its shapes and modes are others."""
        with torch.compiler.set_stance("force_eager"):
            return super().evaluate(*args, **kwargs)

    def _remember(self, finite: Tensor) -> None:
        copied = finite.to("cpu", non_blocking=True)
        event = torch.cuda.current_stream().record_event() if finite.device.type == "cuda" else None
        self._finite = self.state.global_step, copied, event

    def check_finite(self) -> None:
        """Raise a UserError if the last loss was not finite. Asked one step later, what a GPU does after it is not waited for."""
        if self._finite is None:
            return
        (step, finite, event), self._finite = self._finite, None
        if event is not None:
            event.synchronize()
        *layers, loss = finite.tolist()
        if not loss:
            broken = f"layer {layers.index(False)}" if False in layers else "the head"
            raise UserError(
                f"the loss is not finite at step {step}: {broken} is the first that computes what is not; "
                f"what was saved before is kept in {self.folder}. Begin again with a lower --learning-rate and --restart"
            )

    def keep_best(self) -> None:
        """Keep the weights that are trained in memory, of the main process; all processes take part."""
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        if self.accelerator.is_main_process:
            self.best = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items() if name in self.trained}
            assert self.best.keys() == self.trained

    def write_best(self, folder: Path) -> None:
        """Write what was kept to a folder."""
        if self.accelerator.is_main_process:
            save_file({name: weight.contiguous() for name, weight in self.best.items()}, folder / BEST)


class Healing(TrainerCallback):
    """Shows progress, keeps the best weights, stops when nothing improves, and marks checkpoints that are complete.

    Args:
        tokens: in one step, over all processes.
        patience: evaluations without a new best after which to stop.
    """

    trainer: DistillationTrainer

    def __init__(self, tokens: int, patience: int) -> None:
        self.tokens, self.patience = tokens, patience
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the progress bar where the training begins."""
        self.logged = state.global_step, time.perf_counter()
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="healing", unit="step", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the progress bar; before anything is saved, see that it is worth it."""
        if control.should_save or control.should_evaluate or control.should_training_stop:
            self.trainer.check_finite()
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
        if len(since_start) - since_start.index(min(since_start)) > self.patience:
            control.should_training_stop = True
        if self.bar is not None:
            self.bar.write(f"step {state.global_step}: held-out perplexity {perplexity(losses[-1]):.4f}", file=sys.stderr)
        self.logged = state.global_step, time.perf_counter()  # the evaluation's own time is not the training's

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the best weights so far to a checkpoint, and mark that all of it is written."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self.trainer.write_best(folder)
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            (folder / "complete").touch()

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
