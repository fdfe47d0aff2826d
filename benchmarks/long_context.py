"""What conversion costs far from a text's beginning: numbers found by length and depth, short tasks, and loss by position.

python benchmarks/long_context.py SOURCE CONVERTED [CONVERTED ...] --text FILE --out long_context.json

Of each model, the source first: numbers to be found in texts of 1,024 tokens and twice as many each time up to its context, and the
short tasks (`hf_mla_conversion.mathematics.recall`, which `hf-mla verify --needle` asks too); the loss on windows of the whole
context, in eighths, as a perplexity ratio to the source's with the standard error over windows. Then the same at twice the context
with YaRN of a factor of 2 (--factor), which is written into a copy of each config.json, as a user extends a model.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_mla_conversion.commands.verify import PARTS, choose_lengths
from hf_mla_conversion.mathematics.measures import edges, token_losses
from hf_mla_conversion.mathematics.recall import DEPTHS, Questions, accuracies, needles, tasks
from hf_mla_conversion.source.checkpoint import Checkpoint, open_checkpoint
from hf_mla_conversion.source.loading import load_model
from hf_mla_conversion.source.text import read_text, token_windows
from hf_mla_conversion.source.tokenizer import load_tokenizer


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def losses(model: Any, windows: Tensor) -> Tensor:
    """Mean loss in each part of each window: [windows, tokens] -> [windows, parts]."""
    each, parts = token_losses(model, windows), pairwise(edges(windows.shape[1], PARTS))
    return torch.stack([each[:, max(start - 1, 0) : end - 1].mean(1) for start, end in parts], dim=1)  # nothing predicts the first


def extended(checkpoint: Checkpoint, factor: float, folder: Path) -> Checkpoint:
    """A checkpoint with YaRN beyond its context in config.json; its other files are linked to."""
    for file in checkpoint.folder.resolve().iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    context, theta = checkpoint.config.max_position_embeddings, checkpoint.config.rope_parameters["rope_theta"]
    yarn = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": context}
    config |= {"max_position_embeddings": int(factor * context), "rope_parameters": yarn}
    config.pop("rope_scaling", None)  # an older name
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return open_checkpoint(str(folder))


def line(name: str, entry: dict[str, Any]) -> None:
    """Print what was measured of a model in one way, a line for each thing."""
    parts = ", ".join(f"{part['ratio']:.4f} (+- {part['error']:.4f})" for part in entry["positions"])
    print(f"{name}: {entry['window']:,} tokens, perplexity {entry['perplexity']:.2f}, ratio by position {parts}", flush=True)
    for length, depths in entry["needles"].items():
        print(f"{name}: {length:,} tokens, found {', '.join(f'{share:.0%}' for share in depths.values())}", flush=True)
    if entry["tasks"]:
        print(f"{name}: {', '.join(f'{task} {share:.0%}' for task, share in entry['tasks'].items())}", flush=True)
    print(f"{name}: {entry['seconds']:.1f} s", flush=True)


def measured(model: Any, tokenizer: Any, asked: Questions, windows: Tensor, source: Tensor | None) -> tuple[dict, Tensor]:
    """What a model answers, and its loss in windows [windows, tokens] by position, beside the source's [windows, parts]."""
    started, found = time.perf_counter(), losses(model, windows)
    apart = found - (found if source is None else source)
    errors = apart.std(0, correction=0) / max(1, len(apart) - 1) ** 0.5  # of the mean
    parts = [
        {"ratio": ratio, "error": ratio * error} for ratio, error in zip(apart.mean(0).exp().tolist(), errors.tolist(), strict=True)
    ]
    entry: dict[str, Any] = {"window": windows.shape[1], "windows": len(windows), "perplexity": found.mean().exp().item()}
    entry |= {"positions": parts, "needles": {}}
    shares = accuracies(model, tokenizer, asked)
    for key, share in shares.items():
        if isinstance(key, tuple):
            entry["needles"].setdefault(key[0], {})[key[1]] = share
    entry["tasks"] = {key: share for key, share in shares.items() if isinstance(key, str)}
    return entry | {"seconds": time.perf_counter() - started}, found


def asked_at(tokenizer: Any, lengths: Sequence[int], count: int) -> Questions:
    """Questions for numbers in so many texts of each length."""
    return {(length, depth): some for length in lengths for depth, some in needles(tokenizer, length, count).items()}


def measure(options: argparse.Namespace) -> None:
    """Measure all models; what is measured is written and printed as it comes."""
    if options.source.endswith(".gguf"):  # whose folder has no weights that a copy could be made of
        raise SystemExit(f"{options.source} is a .gguf file; give a folder: load it with Transformers, and save_pretrained")
    checkpoint = open_checkpoint(options.source)
    tokenizer = load_tokenizer(checkpoint.folder, options.source)
    context = checkpoint.config.max_position_embeddings
    longer = int(options.factor * context)
    lengths = choose_lengths(True, options.lengths, context)
    text = read_text(options.text, options.tokens, tokenizer=tokenizer)
    windows = {length: token_windows(text, tokenizer, options.tokens, length) for length in (context, longer)}
    asked: Questions = {**asked_at(tokenizer, lengths, options.questions), **tasks(tokenizer, options.tasks)}
    asked_beyond = asked_at(tokenizer, [longer], options.questions)
    results: dict[str, Any] = {
        "model": Path(options.source).name,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        "questions": options.questions,
        "depths": DEPTHS,
        "task_questions": options.tasks,
        "factor": options.factor,
        "models": [],
    }
    of_source: dict[str, Tensor] = {}
    for folder in (options.source, *options.converted):
        opened = open_checkpoint(folder)
        entry: dict[str, Any] = {"name": Path(folder).name}
        if hasattr(opened.config, "kv_lora_rank"):
            entry |= {"kv_lora_rank": opened.config.kv_lora_rank, "qk_rope_head_dim": opened.config.qk_rope_head_dim}
            record = json.loads((opened.folder / "conversion.json").read_text(encoding="utf-8"))
            entry["calibration_window"] = record["report"]["window"]
        results["models"].append(entry)
        for way, questions, some in (("trained", asked, windows[context]), ("yarn", asked_beyond, windows[longer])):
            with tempfile.TemporaryDirectory() as scratch:
                there = opened if way == "trained" else extended(opened, options.factor, Path(scratch))
                model = load_model(there, DEVICE, DTYPE)
                entry[way], found = measured(model, tokenizer, questions, some, of_source.get(way))
            of_source.setdefault(way, found)
            line(f"{entry['name']}, {way}", entry[way])
            Path(options.out).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            del model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the original: a folder or a Hub id")
    parser.add_argument("converted", nargs="+", help="what `hf-mla convert` made of it")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--out", required=True, help="JSON file")
    parser.add_argument("--tokens", type=int, default=131072, help="of the text, for the loss by position")
    parser.add_argument("--lengths", type=int, nargs="+", help="of the texts that numbers are in")
    parser.add_argument("--questions", type=int, default=10, help="at each length and depth")
    parser.add_argument("--tasks", type=int, default=100, help="questions of each task")
    parser.add_argument("--factor", type=float, default=2.0, help="of YaRN")
    measure(parser.parse_args())
