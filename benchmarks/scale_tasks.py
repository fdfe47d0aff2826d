"""What benchmarks/scale.py runs in processes of their own; each prints what it found as lines `RESULT {json}`.

python benchmarks/scale_tasks.py make-llama 8b|1b FOLDER [--layers N]   random weights, drawn where they are written from
python benchmarks/scale_tasks.py make-converted FOLDER [--layers N]     a Llama of 8B width with MLA, for decoding
python benchmarks/scale_tasks.py heal ...                               `hf-mla heal` that evaluates at the start and the end alone
python benchmarks/scale_tasks.py decode FOLDER REFERENCE [--spread]     under torchrun: tensor parallel
python benchmarks/scale_tasks.py batching FOLDER GQA                    `generate_batch` beside the GQA original
python benchmarks/scale_tasks.py serve FOLDER [--requests 2000]
python benchmarks/scale_tasks.py long                                   one sequence
python benchmarks/scale_tasks.py plan FOLDER TOKENS                    what a conversion takes, by `hf-mla plan`
python benchmarks/scale_tasks.py fits FOLDER results/fits.json          what fits where, by `hf-mla plan`; needs no weights

`--tiny` makes all of it small enough for two CPU cores.
"""

import argparse
import os
import sys

import torch


def main() -> None:
    """Run the task that the command line names; its file is imported then."""
    if sys.argv[1:2] == ["heal"]:
        from scaling.tasks.heal import heal

        heal(sys.argv[2:], tiny=os.environ.get("SCALE_TINY") == "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--spread", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    words, tiny = arguments.words, arguments.tiny
    torch.set_grad_enabled(False)
    match arguments.task:
        case "make-llama":
            from scaling.tasks.models import make_llama

            make_llama(*words, arguments.layers, tiny)
        case "make-converted":
            from scaling.tasks.models import make_converted

            make_converted(*words, arguments.layers, tiny)
        case "decode":
            from scaling.tasks.decode import decode

            decode(*words, arguments.spread, tiny)
        case "batching":
            from scaling.tasks.decode import batching

            batching(*words, tiny)
        case "serve":
            from scaling.tasks.serve import serve

            serve(*words, arguments.requests, tiny)
        case "long":
            from scaling.tasks.long import long

            long(arguments.layers, tiny)
        case "plan":
            from scaling.tasks.fits import planned

            planned(words[0], int(words[1]), tiny)
        case "fits":
            from scaling.tasks.fits import fits

            fits(*words)
        case task:
            parser.error(f"there is no task {task}")


if __name__ == "__main__":
    main()
