# SPDX-License-Identifier: Apache-2.0
"""The program `hf-mla`: parse, call the function of the same name, print.

Results go to stdout (`--json`: one JSON object), progress and logs to stderr. Exit codes: 0 done, 1 a verdict below its
threshold, 2 an error of the user's, 130 interrupted. torch and Transformers are imported inside commands only.
"""

import argparse
import json
import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError
from .output.tables import (
    bench_table,
    convert_table,
    demo_table,
    export_table,
    heal_table,
    plan_table,
    refresh_table,
    rows,
    verify_table,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the program on the words after `hf-mla` (None: the command line's) and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Threads that wait for each other by spinning become some ten times slower where other programs use the processor.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported, later
    options = vars(parser().parse_args(arguments))
    if options.get("config") is not None:
        try:
            from_file = read_options(options["config"])
        except UserError as error:
            print(f"hf-mla: {error}", file=sys.stderr)
            return 2
        # Through the parser as well, so that a file is checked like flags; what comes later wins.
        after = arguments.index(options["command"]) + 1
        options = vars(parser().parse_args([*arguments[:after], *from_file, *arguments[after:]]))
    options.pop("config", None)
    command, run = options.pop("command"), options.pop("run")
    verbose, as_json = options.pop("verbose"), options.pop("json", False)
    quiet_libraries(verbose)
    try:
        os.getcwd()
    except OSError:  # the libraries need one to be imported
        print("hf-mla: the current folder is no more; change to one that is there", file=sys.stderr)
        return 2
    try:
        with interruptions():
            return run(options, as_json)
    except KeyboardInterrupt as interruption:
        what = "go on" if command in ("convert", "heal") else "start again"
        words = [word for word in arguments if word not in ("--restart", *interruption.args)]
        print(f"hf-mla: interrupted; to {what}: {shlex.join(['hf-mla', *words])}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hf-mla info ... | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or the interpreter complains when it flushes
        return 0
    except (UserError, OSError) as error:
        if verbose:
            raise
        # The latter are of a file that is there and cannot be read.
        at_fault = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"hf-mla: {at_fault}", file=sys.stderr)
        return 2


@contextmanager
def interruptions() -> Iterator[None]:
    """Have Ctrl-C end in a KeyboardInterrupt: compiled code that it comes upon may make another error of it."""
    asked = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.default_int_handler(number, frame)

    in_main = threading.current_thread() is threading.main_thread()  # elsewhere no handler can be set
    ours = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with 2."""
        print(f"hf-mla: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """The argument parser; every option but `--config` is a keyword of the function that its command calls."""
    top = Parser(prog="hf-mla", description="Give a Transformers model a small KV cache: Multi-head Latent Attention.")
    top.add_argument("--version", action="version", version=version("hf-mla"))
    verbosity: dict[str, Any] = {"action": "store_true", "help": "library logs, and tracebacks of errors"}
    top.add_argument("-v", "--verbose", **verbosity)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable, text: str, *, json_output: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument("-v", "--verbose", default=argparse.SUPPRESS, **verbosity)  # or it would undo one before the command
        if json_output:
            sub.add_argument("--json", action="store_true", help="print one JSON object")
        return sub

    demo = command("demo", run_demo, "convert, verify and use the bundled model")
    demo.add_argument("--out", metavar="DIR", help="keep the converted checkpoint there")

    plan = command("plan", run_plan, "say what a conversion would give and take; reads headers only")
    plan.add_argument("source", metavar="SOURCE", help="checkpoint folder, .gguf file or Hub id")
    add_size(plan)
    add_dtype(plan)
    add_revision(plan)

    convert = command("convert", run_convert, "convert a checkpoint")
    convert.add_argument("source", metavar="SOURCE", help="checkpoint folder, .gguf file or Hub id")
    convert.add_argument("out", metavar="OUT", help="folder to write")
    add_size(convert)
    convert.add_argument(
        "--max-ratio",
        type=float,
        metavar="R",
        help="or: the smallest cache whose perplexity, measured, is at most R times the source's",
    )
    convert.add_argument(
        "--calibration",
        action="append",
        metavar="TEXT",
        help="a text (.txt, .jsonl with text or messages, either as .xz), a data set, self, which the source writes, or lookups, "
        "made of the others; may be repeated (bundled prose, lookups, and self where there is memory and time)",
    )
    convert.add_argument("--keep-own-text", action="store_true", default=None, help="leave what the source wrote in own_text.jsonl")
    convert.add_argument("--calibration-tokens", type=int, metavar="N", help="tokens of it to use (GPU 2097152, CPU 131072)")
    convert.add_argument("--window", type=int, metavar="N", help="tokens of a sequence (the context, at most 2048; then 8192 too)")
    convert.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="reconstruction steps a layer; 0: closed form alone (400, or 200 before the whole model is trained)",
    )
    convert.add_argument(
        "--heal-tokens",
        type=int,
        metavar="N",
        help="then train the whole model on so many (24000000 on a GPU with room for it, else 0)",
    )
    add_device(convert)
    add_dtype(convert)
    convert.add_argument("--seed", type=int, metavar="N", help="chooses the calibration windows (0)")
    add_revision(convert)
    convert.add_argument("--config", metavar="FILE.yaml", help="options from a file, one `name: value` a line; flags win")
    convert.add_argument("--restart", action="store_true", default=None, help="forget what an interrupted conversion has done")
    convert.add_argument("--overwrite", action="store_true", default=None, help="replace the checkpoint at OUT")
    add_trust(convert)
    convert.add_argument("--push-to", metavar="REPO", help="upload the result to the Hub, to a private repository if it is new")

    verify = command("verify", run_verify, "measure a converted model against its source")
    verify.add_argument("out", metavar="OUT", help="converted checkpoint")
    verify.add_argument("--against", required=True, metavar="SOURCE", help="what it was converted from: folder, .gguf or Hub id")
    verify.add_argument("--text", required=True, metavar="FILE", help="held-out text (.txt, .jsonl, or either as .xz) or data set")
    verify.add_argument("--tokens", type=int, metavar="N", help="tokens of it to use (98304)")
    verify.add_argument("--max-ratio", type=float, metavar="R", help="exit with 1 if the perplexity ratio is above R")
    verify.add_argument(
        "--needle",
        action="store_true",
        default=None,
        help="also let both find numbers in texts of 1024, 2048, 4096, ... tokens, and do short tasks; many minutes on a CPU",
    )
    verify.add_argument(
        "--needle-lengths", type=int, nargs="+", metavar="N", help="in texts of so many tokens (up to the model's context)"
    )
    verify.add_argument(
        "--html", metavar="FILE", help="also write a page: tables, pictures, ten answers of both models side by side"
    )
    add_device(verify)
    add_revision(verify)
    add_trust(verify)

    heal = command("heal", run_heal, "train a converted model to predict what its source predicts")
    heal.add_argument("out", metavar="OUT", help="converted checkpoint")
    heal.add_argument("dest", metavar="DEST", help="folder to write")
    heal.add_argument("--teacher", required=True, metavar="SOURCE", help="what it was converted from: folder, .gguf or Hub id")
    heal.add_argument("--text", required=True, action="append", metavar="TEXT", help="as convert's, but self; a part is held back")
    heal.add_argument("--steps", type=int, metavar="N", help="at most so many (1000)")
    heal.add_argument("--train", metavar="WHAT", help="lora, attention, layers or all weights (attention)")
    heal.add_argument("--lora-rank", type=int, metavar="R", help="rank of the adapters (16)")
    heal.add_argument("--learning-rate", type=float, metavar="R", help="at its highest (0.001; layers, all 0.00025)")
    heal.add_argument("--step-tokens", type=int, metavar="N", help="tokens in a step, over all processes (GPU 16384, CPU 4096)")
    heal.add_argument("--gradient-checkpointing", action="store_true", default=None, help="less memory, more time")
    add_device(heal)
    heal.add_argument("--seed", type=int, metavar="N", help="of the order of the text (0)")
    add_revision(heal)
    heal.add_argument("--restart", action="store_true", default=None, help="forget what an interrupted healing has done")
    heal.add_argument("--overwrite", action="store_true", default=None, help="replace the checkpoint at DEST")
    add_trust(heal)
    heal.add_argument("--dry-run", action="store_true", default=None, help="only say what it would take; reads no text")

    export = command("export", run_export, "write a converted model in a layout that serving engines have of their own")
    export.add_argument("out", metavar="OUT", help="converted checkpoint")
    export.add_argument("dest", metavar="DEST", help="folder to write, or .gguf file")
    export.add_argument("--format", required=True, metavar="F", help="deepseek_v3, for engines that have it; gguf, for llama.cpp")
    export.add_argument("--pad", metavar="P", help="auto: widths as they are; engine: filled up to 512 + 64, heads of 128 (auto)")
    export.add_argument("--outtype", metavar="T", help="numbers of a .gguf file: f32, bf16, f16 or q8_0 (what OUT stores)")
    export.add_argument("--overwrite", action="store_true", default=None, help="replace the checkpoint at DEST")
    add_trust(export)

    bench = command("bench", run_bench, "time decoding with a converted model and with its source")
    bench.add_argument("out", metavar="OUT", help="converted checkpoint; or a model that has MLA by itself, without --against")
    bench.add_argument("--against", metavar="SOURCE", help="what OUT was converted from: folder, .gguf file or Hub id")
    bench.add_argument("--batch", type=int, metavar="N", help="sequences decoded at once (1)")
    bench.add_argument("--context", type=int, nargs="+", metavar="N", help="tokens in each; several may be given (2048)")
    bench.add_argument("--new-tokens", type=int, metavar="N", help="steps that are timed together (32)")
    bench.add_argument("--cache", metavar="C", help="static or dynamic, which grows (static)")
    add_device(bench)
    bench.add_argument("--dtype", metavar="T", help="auto, float32, bfloat16 or float16 (auto: the source's, float32 on a CPU)")
    bench.add_argument("--plot", metavar="FILE", help="draw speed and cache against context to a .png, .svg or .pdf file")
    add_revision(bench)

    info = command("info", run_info, "describe a checkpoint, converted or not")
    info.add_argument("source", metavar="SOURCE", help="checkpoint folder, .gguf file or Hub id")
    info.add_argument("--plot", metavar="FILE", help="draw a conversion's spectra and errors to a .png, .svg or .pdf file")
    add_revision(info)

    refresh = command("refresh", run_refresh, "bring code and configuration in an older converted checkpoint up to this version")
    refresh.add_argument("out", metavar="OUT", help="folder of a converted checkpoint; what is replaced is kept in it")
    refresh.add_argument("--dry-run", action="store_true", default=None, help="only say which files would change, and why")

    command("env", run_env, "print versions and devices, for a bug report")
    return top


def add_size(sub: argparse.ArgumentParser) -> None:
    """Options that say how small the cache becomes."""
    sub.add_argument("--kv-budget", type=float, metavar="F", help="share of the original cache to keep (0.3125)")
    sub.add_argument("--kv-lora-rank", type=int, metavar="N", help="or: numbers in the latent,")
    sub.add_argument("--qk-rope-head-dim", type=int, metavar="N", help="and in the shared rotary key")
    sub.add_argument("--qk-norm", metavar="exact|fold", help="norms of queries and keys: cached, or plain DeepSeek (exact)")


def add_device(sub: argparse.ArgumentParser) -> None:
    """Where to compute."""
    sub.add_argument("--device", metavar="D", help="auto, cpu, cuda or cuda:N (auto)")


def add_dtype(sub: argparse.ArgumentParser) -> None:
    """What to store."""
    sub.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="numbers of the output (auto: the source's)"
    )


def add_revision(sub: argparse.ArgumentParser) -> None:
    """Which version of a Hub checkpoint."""
    sub.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub id")


def add_trust(sub: argparse.ArgumentParser) -> None:
    """Whether code of others may run."""
    sub.add_argument("--trust-remote-code", action="store_true", default=None, help="run code that the tokenizer comes with")


def quiet_libraries(verbose: bool) -> None:
    """Warnings of ours on stderr; the chatter of the libraries only when asked for."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("hf-mla: %(message)s"))
    handler.addFilter(lambda record: verbose or record.name.startswith("hf_mla") or record.levelno >= logging.ERROR)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    if not verbose:
        warnings.simplefilter("ignore", append=True)  # after what the user has asked for with -W
        os.environ.setdefault("TORCH_LOGS", "-all")  # errors alone; read when torch is imported
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; the functions have the defaults."""
    from transformers.utils import logging as transformers_logging

    if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":
        transformers_logging.disable_progress_bar()
    return {key: value for key, value in options.items() if value is not None}


def show(result: Any, as_json: bool, table: Callable[[], str]) -> None:
    """Print a result as JSON or as a table."""
    data = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
    print(json.dumps(data, indent=2) if as_json else table())


def run_plan(options: dict[str, Any], as_json: bool) -> int:
    """`hf-mla plan`."""
    from .commands.plan import plan

    result = plan(**given(options))
    if not result.supported:
        if as_json:
            show(result, as_json, str)
        raise UserError(f"{options['source']}: {result.reason}")
    show(result, as_json, lambda: plan_table(result))
    return 0


def run_convert(options: dict[str, Any], as_json: bool) -> int:
    """`hf-mla convert`."""
    from .commands.convert import convert

    result: Any = convert(**given(options))
    if result.perplexity is not None:  # of several processes, the main one knows the result
        show(result, as_json, lambda: convert_table(result))
    return 0


def read_options(path: str) -> list[str]:
    """The options of `convert` in a YAML file, as words of a command line; a UserError if it holds anything else."""
    import yaml

    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        raise UserError(f"--config {path} holds no options; write lines like kv_budget: 0.25")
    words = []
    for key, value in options.items():
        flag = f"--{str(key).replace('_', '-')}"
        values = value if isinstance(value, list) and key == "calibration" else [value]
        for each in values:
            if isinstance(each, (list, dict)) or each is None:
                raise UserError(f"--config {path}: {key} is {each!r}; give one value")
            if isinstance(each, bool):
                words += [flag] if each else []
            else:
                words.append(f"{flag}={each}")
    return words


def run_verify(options: dict[str, Any], as_json: bool) -> int:
    """`hf-mla verify`."""
    from .commands.verify import verify

    result = verify(**given(options))
    show(result, as_json, lambda: verify_table(result))
    return 0 if result.passed else 1


def run_heal(options: dict[str, Any], as_json: bool) -> int:
    """`hf-mla heal`."""
    from .commands.heal import heal

    result: Any = heal(**given(options))
    if result.output or options.get("dry_run"):  # of several processes, the main one knows the result
        show(result, as_json, lambda: heal_table(result))
    return 0


def run_export(options: dict[str, Any], as_json: bool) -> int:
    """`hf-mla export`."""
    from .commands.export import export

    result = export(**given(options))
    if result.refused is not None:
        if as_json:
            show(result, as_json, str)
        raise UserError(f"{options['out']} cannot be exported as {result.format}: {result.refused}")
    show(result, as_json, lambda: export_table(result))
    return 0


def run_bench(options: dict[str, Any], as_json: bool) -> int:
    """`hf-mla bench`."""
    from .commands.bench import bench

    result = bench(**given(options))
    show(result, as_json, lambda: bench_table(result))
    return 0


def run_info(options: dict[str, Any], as_json: bool) -> int:
    """`hf-mla info`."""
    from .commands.info import info

    result = info(**given(options))
    show(result, as_json, lambda: rows(result))
    return 0


def run_refresh(options: dict[str, Any], as_json: bool) -> int:
    """`hf-mla refresh`."""
    from .commands.refresh import refresh

    result = refresh(**given(options))
    show(result, as_json, lambda: refresh_table(result))
    return 0


def run_env(options: dict[str, Any], as_json: bool) -> int:
    """`hf-mla env`."""
    from .commands.env import env

    result = env(**given(options))
    show(result, as_json, lambda: rows(result))
    return 0


def run_demo(options: dict[str, Any], as_json: bool) -> int:
    """`hf-mla demo`."""
    from .commands.demo import demo

    result = demo(**given(options))
    show(result, as_json, lambda: demo_table(result))
    if not as_json and options["out"] is None:
        print("\nTo keep the converted checkpoint: hf-mla demo --out DIR", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
