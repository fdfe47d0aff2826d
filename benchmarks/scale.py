"""What several GPUs give: conversion, healing, decoding, serving, a long sequence; all in one go, with results as they come.

python benchmarks/scale.py [--parts convert,heal,...] [--gpus N] [--seconds 400] [--layers 4] [--out FILE]

`scale_page.py` writes the tables in docs/scale.md from what this leaves in results/scale.json.

What is measured is in scaling/.

Every measurement is a process, or several, of its own (`scale_tasks.py`, or the commands that users run); one that fails or runs
out of its time shows the end of its log, and the others go on. Parts are cut into lanes. Those of a round run side by side, as far
as there are GPUs; rounds come one after the other, the most important first. `--seconds` ends it, whatever is at work.
Without GPUs, or with `--tiny`, the same is done with small models by processes on the CPU.

Memory of a GPU is what nvidia-smi shows, host memory what the processes have for themselves, both looked at five times a second.
"""

import argparse
import signal
import sys
from functools import partial

from scaling import convert, decode, heal
from scaling.runs import HERE, ROOT, Runs, Step


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--parts", default="convert,heal,zero,decode,batching,serve,long,plan")
parser.add_argument("--gpus", type=int, help="how many to use (all; without GPUs 2 processes)")
parser.add_argument("--seconds", type=float, default=400.0)
parser.add_argument(
    "--layers", type=int, default=4, help="of a Llama-3-8B that is converted; more than GPUs, for all 32 to be computed"
)
parser.add_argument("--steps", type=int, help="of the conversion of a layer (its default)")
parser.add_argument("--requests", type=int, default=2000)
parser.add_argument("--work", default="/tmp/scale", help="a folder for models and logs; emptied")
parser.add_argument("--out", default=str(HERE / "results" / "scale.json"))
parser.add_argument("--tiny", action="store_true", help="small models and processes on the CPU")


def everything(runs: Runs) -> None:
    """All parts that were asked for, in rounds."""
    parts, several = set(runs.arguments.parts.split(",")), runs.count

    def lane(part: str, *steps: Step) -> list[Step]:
        return [*steps] if part in parts else []

    write_texts(runs)
    make_source = ("make-source", convert.make_llama(runs, "8b", runs.arguments.layers, convert.SOURCE))
    make_8b = ("make-8b", convert.make_llama(runs, "8b", 4, "llama-8b"))
    make_1b = ("make-1b", convert.make_llama(runs, "1b", 4 if runs.tiny else 16, "llama-1b"))
    closed_8b = ("make-8b-mla", convert.closed_form(runs, "llama-8b", "8b-mla"))
    closed_1b = ("make-1b-mla", convert.closed_form(runs, "llama-1b", "1b-mla"))
    make_wide = ("make-wide", partial(decode.make_wide, runs))
    batching = lane("batching", ("batching", partial(decode.batching, runs)))
    serve, long = lane("serve", ("serve", partial(decode.serve, runs))), lane("long", ("long", partial(decode.long, runs)))

    # What one GPU does.
    conversion = [make_source] if parts & {"convert", "plan"} else []
    conversion += lane("convert", ("convert-1", convert.converted(runs, "convert-1", 1)))
    conversion += lane("plan", ("plan", partial(convert.planned, runs)))
    decoding = [make_wide] if parts & {"decode", "batching"} else []
    decoding += lane("decode", ("decode-1", decode.decoded(runs, 1)))
    decoding += batching + long if several == 1 else []
    healing = [make_1b, closed_1b] if parts & {"heal", "zero"} else []
    healing += lane("heal", ("heal-1b-1", heal.healed(runs, "1b", 1)))
    runs.lanes(
        (1, conversion),
        (1, healing),
        (1, decoding),
        (1, lane("heal", make_8b, closed_8b, ("heal-8b-1", heal.healed(runs, "8b", 1)))),
    )
    if several == 1:
        convert.compare(runs)
        runs.lanes((1, serve))
        return

    # What several do together; serving says nothing of speed, and so shares its GPU.
    runs.lanes((several, lane("convert", ("convert-n", convert.converted(runs, "convert-n", several)))))
    convert.compare(runs)
    both = [(f"heal-{model}-{several}", heal.healed(runs, model, several)) for model in ("1b", "8b")]
    if several > 2:
        runs.lanes((several, lane("heal", *both)))
        heal.compare(runs)
        runs.lanes((several, lane("decode", (f"decode-{several}", decode.decoded(runs, several)))))
    deepspeed = [(f"heal-1b-2-zero-{stage}", heal.healed(runs, "1b", 2, stage=stage)) for stage in (3, 2)]
    runs.lanes((2, lane("zero", *deepspeed)), (1, long), (1, batching))
    spread = ("decode-spread", decode.decoded(runs, 1, spread=True))
    runs.lanes(
        (2, lane("convert", ("convert-killed-and-resumed", convert.converted(runs, "convert-again", 2, kill=True)))),
        (2, lane("decode", ("decode-2", decode.decoded(runs, 2)), spread)),
        (0, serve),
    )
    convert.compare(runs)
    runs.lanes(*((2, lane("heal", (f"heal-{model}-2", heal.healed(runs, model, 2)))) for model in ("1b", "8b")))
    heal.compare(runs)
    runs.lanes(
        (2, lane("heal", ("heal-8b-2-lora", heal.healed(runs, "8b", 2, train="lora")))),
        (2, lane("heal", ("heal-1b-2-killed", heal.healed(runs, "1b", 2, kill=True)))),
    )
    heal.compare(runs)


def write_texts(runs: Runs) -> None:
    """What to calibrate and to heal on, and how processes on CPUs are sharded."""
    convert.write_books(runs.work / "books.txt", 1_300_000 if runs.tiny else 8_000_000)
    convert.write_books(runs.work / "short.txt", 1_300_000 if runs.tiny else 2_700_000)  # to heal with: tokenizing takes seconds
    if runs.tiny:
        example = (ROOT / "examples" / "heal_accelerate.yaml").read_text()
        (runs.work / "fsdp.yaml").write_text(example.replace("mixed_precision: bf16", "mixed_precision: 'no'\nuse_cpu: true"))


if __name__ == "__main__":
    arguments = parser.parse_args()
    runs = Runs(arguments)
    signal.signal(signal.SIGTERM, lambda *_: (runs.stop(), sys.exit(1)))
    runs.say(f"{runs.count} {'processes' if runs.tiny else 'GPUs'}, {arguments.seconds:.0f} s")
    try:
        everything(runs)
    finally:
        runs.stop()
        with runs.lock:
            runs.save()
    runs.say(f"done; {len(runs.results)} results in {arguments.out}; not run: {', '.join(runs.not_run) or 'nothing'}")
