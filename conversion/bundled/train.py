# SPDX-License-Identifier: Apache-2.0
"""How the bundled checkpoint came to be: one file, one GPU, a few minutes.

    python train.py prepare --train-text TRAIN.txt.xz --validation-text VALIDATION.txt --work DIR
    python train.py train --work DIR --out model [--steps 2500]

`prepare` cuts the calibration text *out of* the training text, so the model never saw it, cuts the validation text from
other books, copies pieces of the training text as prose for conversions of other models, and trains the tokenizer. `train`
trains a 3.2 M parameter GQA Llama on what is left. The architecture is a scale model of what people convert: 6 query heads on 3
key/value heads of width 32, so 192 cached numbers per token and layer, a llama-style MLP and a tied head.
"""

import argparse
import lzma
import math
import re
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|pad|>"]
# Words with their leading blank, digits in groups of up to three, punctuation: the pattern of GPT-4's family.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTEXT = 1024
LONG = 80  # characters from which on a paragraph is no heading


def read_paragraphs(path: Path) -> list[str]:
    """Paragraphs of a text file (.txt or .txt.xz), without distributors' notices."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        paragraphs = [paragraph.strip() for paragraph in file.read().split("\n\n")]
    return [p for p in paragraphs if p and "gutenberg" not in p.lower() and "etext" not in p.lower()]


def without_late_books(paragraphs: list[str], characters: int = 60_000) -> list[str]:
    """Paragraphs without those of books of 1930 and later, protected in some countries: so many characters after their notice."""
    kept, late = [], 0
    for paragraph in paragraphs:
        if re.search(r"copyright,? 19[3-9]\d", paragraph, re.IGNORECASE):
            late = characters
        if late <= 0:
            kept.append(paragraph)
        late -= len(paragraph)
    return kept


def hold_out(paragraphs: list[str], characters: int, pieces: int) -> tuple[list[str], list[str]]:
    """Cut `pieces` evenly spaced runs of paragraphs, `characters` in all; returns (the rest, the cut)."""
    rest, cut = [], []
    stride = len(paragraphs) // pieces
    for start in range(0, len(paragraphs), stride):
        room = characters // pieces if start + stride <= len(paragraphs) else 0
        for paragraph in paragraphs[start : start + stride]:
            (cut if room > 0 else rest).append(paragraph)
            room -= len(paragraph)
    return rest, cut


def prepare(train_text: Path, validation_text: Path, work: Path, vocab_size: int = 4096) -> None:
    """Write calibration.txt.xz, validation.txt.xz, prose.txt.xz, train.txt and tokenizer.json into `work`."""
    work.mkdir(parents=True, exist_ok=True)
    train, calibration = hold_out(read_paragraphs(train_text), characters=1_300_000, pieces=60)
    _, validation = hold_out(read_paragraphs(validation_text), characters=400_000, pieces=20)
    known = {paragraph for paragraph in calibration if len(paragraph) > LONG}  # what books have in common
    others = [paragraph for paragraph in without_late_books(train) if paragraph not in known]
    _, prose = hold_out([*dict.fromkeys(others)], characters=6_500_000, pieces=34)
    for name, paragraphs in (("calibration", calibration), ("validation", validation), ("prose", prose)):
        with lzma.open(work / f"{name}.txt.xz", "wt", encoding="utf-8", preset=9) as file:
            file.write("\n\n".join(paragraphs) + "\n")
    (work / "train.txt").write_text("\n\n".join(train) + "\n", encoding="utf-8")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    tokenizer.train([str(work / "train.txt")], trainer)
    tokenizer.save(str(work / "tokenizer.json"))


def learning_rate(step: int, steps: int, peak: float = 4e-3, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Exp of the mean next-token loss over consecutive windows of CONTEXT tokens."""
    rows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        losses = [model(input_ids=row, labels=row).loss.float() for row in rows.split(16)[:8]]
    return torch.stack(losses).mean().exp().item()


def train(work: Path, out: Path, steps: int, batch: int = 64) -> None:
    """Train with AdamW in bfloat16 autocast and save the checkpoint in bfloat16."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"),
        **dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True)),
        model_max_length=CONTEXT,
    )
    text = (work / "train.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids, device=device)
    with lzma.open(work / "validation.txt.xz", "rt", encoding="utf-8") as file:
        held_out = torch.tensor(tokenizer.backend_tokenizer.encode(file.read()).ids, device=device)
    print(f"{len(tokens):,} training tokens, {len(held_out):,} validation tokens", flush=True)

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 1.0}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device == "cuda")
    compiled = torch.compile(model)

    started, mean = time.time(), torch.zeros((), device=device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        starts = torch.randint(len(tokens) - CONTEXT, (batch, 1), device=device)
        rows = tokens[starts + torch.arange(CONTEXT, device=device)]  # [batch, CONTEXT]
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean += loss.detach()
        if (step + 1) % 500 == 0:
            print(
                f"step {step + 1}: training loss {mean.item() / 500:.4f}, validation perplexity "
                f"{perplexity(model, held_out):.2f}, {time.time() - started:.0f} s",
                flush=True,
            )
            mean.zero_()
        if (step + 1) % 2500 == 0 or step + 1 == steps:
            LlamaForCausalLM.save_pretrained(model, out)

    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16).to(device)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    prompt = torch.tensor([tokenizer.encode("The captain looked at the sea and")], device=device)
    for seed in range(3):
        torch.manual_seed(seed)
        sample = model.generate(prompt, max_new_tokens=120, do_sample=True, temperature=0.7, top_p=0.95, pad_token_id=2)
        print(tokenizer.decode(sample[0]), "\n", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare")
    command.add_argument("--train-text", type=Path, required=True)
    command.add_argument("--validation-text", type=Path, required=True)
    command.add_argument("--work", type=Path, required=True)
    command = commands.add_parser("train")
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--steps", type=int, default=2_500)
    options = vars(parser.parse_args())
    {"prepare": prepare, "train": train}[options.pop("command")](**options)
