"""`hf-mla heal`, whose every step is logged; each process says what it held.

SCALE_STOP ends it after the last step, and there is no evaluation: speed is measured. Otherwise there are evaluations and
checkpoints in the middle and at the end.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from hf_mla_conversion.cli import main
from hf_mla_conversion.mathematics.distill import DistillationTrainer
from hf_mla_conversion.stages import end_to_end

from .process import RANK, WORLD, peak


STOP = os.environ.get("SCALE_STOP") == "1"
TESTS = Path(__file__).resolve().parents[3] / "tests"


def heal(words: list[str], tiny: bool) -> None:
    """Run the program on these words."""
    log_every_step()
    if tiny and WORLD > 1:
        sys.path.append(str(TESTS))
        from fsdp_on_cpu import shard_on_cpus

        shard_on_cpus()
    tell(planned_memory())
    sys.exit(main(["heal", *words]))


def log_every_step() -> None:
    """Have every step logged, and evaluate seldom, or not at all."""
    arguments_of = end_to_end.training_arguments
    end_to_end.EVALUATIONS, end_to_end.CHECKPOINTS = 2, 1

    def logged(*args: Any) -> Any:
        made = arguments_of(*args)
        made.logging_steps = 1
        if STOP:
            made.eval_strategy, made.save_strategy, made.eval_on_start = "no", "no", False
        return made

    end_to_end.training_arguments = logged


def planned_memory() -> dict[str, int]:
    """What the program will count before it begins; empty until then."""
    memory_of, planned = end_to_end.memory, {}

    def remembered(*args: Any) -> Any:
        planned.update(memory_of(*args))
        return planned

    end_to_end.memory = remembered
    return planned


def tell(planned: dict[str, int]) -> None:
    """Have each process say after the training what it held, and end there if only speed is wanted."""
    train = DistillationTrainer.train

    def trained(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = train(self, *args, **kwargs)
        said: dict[str, Any] = {"rank": RANK, "peak": peak(), "planned": planned}
        said["layer"] = type(self.model.get_decoder().layers[0]).__name__
        said["types"] = sorted({str(parameter.dtype) for parameter in self.model.parameters()})
        if RANK == 0 and STOP:
            said["history"] = end_to_end.history(self.state.log_history)
        sys.stderr.write(f"\nPROCESS {json.dumps(said)}\n")  # at once, for others write too
        sys.stderr.flush()
        if STOP:
            self.accelerator.wait_for_everyone()
            os._exit(0)
        return output

    DistillationTrainer.train = trained
