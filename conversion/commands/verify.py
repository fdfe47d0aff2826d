# SPDX-License-Identifier: Apache-2.0
"""Measure a converted model against its source: perplexity, divergence, agreement, cache, both ways to attend, and answers."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from hf_mla import cache_bytes, cache_of

from ..errors import UserError
from ..mathematics.closed_form import mla_config
from ..mathematics.measures import Comparison, edges
from ..mathematics.recall import PROMPTS, Questions, accuracies, answers, open_questions, questions
from ..output.page import PAGES, command_line, write_page
from ..output.plotting import check_file
from ..output.reports import (
    HEALING_RATIO,
    AnswerReport,
    ContextReport,
    NeedleReport,
    PerSide,
    PositionReport,
    RecallReport,
    TaskReport,
    VerifyReport,
    with_sides,
)
from ..source.checkpoint import Checkpoint, open_checkpoint
from ..source.families import refusal, rotary_width, source_head_dim
from ..source.loading import choose_device, device_name, load_model
from ..source.text import begun, read_text, token_windows
from ..source.tokenizer import check_same_tokenizer, check_vocabulary, first_token, load_tokenizer


logger = logging.getLogger(__name__)

VERIFICATION_WINDOW = 1024
DECODED_TOKENS = 16
PARTS = 8  # of a sequence, whose perplexities are told apart
SHORTEST = 1024  # of the texts to find a number in; each length is twice the one before


def verify(
    out: str,
    *,
    against: str,
    text: str,
    tokens: int = 98304,
    needle: bool = False,
    needle_lengths: Sequence[int] | None = None,
    html: str | None = None,
    max_ratio: float | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Compare a converted model with its source on held-out text.

    Both run in float32 on the CPU and in their stored types on a GPU, or spread over several with `device` "auto". Sequences
    are as long as the context that the model was trained for, and short ones are measured as well.

    Args:
        out: the converted checkpoint.
        against: its source, a folder, a .gguf file or a Hub id.
        text: a .txt or .jsonl file, or either as .xz, that neither training nor calibration saw, or a data set.
        tokens: how many tokens of it to use, from its start.
        needle: also let both models answer: find numbers in long text, and do short tasks by example.
        needle_lengths: tokens of these texts; None for 1024, 2048, 4096 and so on, up to the model's context. Implies `needle`.
        html: a file to write a page to that shows all this, and ten answers of both models side by side.
        max_ratio: the highest perplexity ratio that passes, at any length; None passes any.
        device: "auto", "cpu", "cuda" or "cuda:N".
        revision: branch, tag or commit of the source, if it is a Hub id.
        trust_remote_code: run the code that the tokenizers come with, if they do.

    Returns:
        What was measured.

    Raises:
        UserError: a checkpoint or the text cannot be used, the tokenizers differ, or the page cannot be written.
    """
    command = command_line(verify, locals())  # before there are others
    if html is not None:
        check_file("--html", html, PAGES)
    if max_ratio is not None and not max_ratio > 0:
        raise UserError(f"--max-ratio is {max_ratio}; it must be positive (1.05 allows 5 % more perplexity)")
    if tokens < 2:
        raise UserError(f"--tokens is {tokens}; at least 2 are needed, 98304 are usual")
    converted_checkpoint, source_checkpoint = open_checkpoint(out), open_checkpoint(against, revision)
    check_pair(converted_checkpoint, source_checkpoint)
    context = source_checkpoint.config.max_position_embeddings
    lengths = choose_lengths(needle, needle_lengths, context)
    tokenizer = load_tokenizer(source_checkpoint.folder, against, trust_remote_code)
    check_same_tokenizer(converted_checkpoint.folder, out, tokenizer, against, trust_remote_code)
    ids = token_windows(read_text(text, tokens, tokenizer=tokenizer), tokenizer, tokens, tokens)[0]
    check_vocabulary(ids, source_checkpoint)
    contexts = context_windows(ids, context, first_token(tokenizer))
    run_device = choose_device(device)
    asked = questions(tokenizer, lengths, run_device) if lengths else {}
    prompts = open_questions(tokenizer) if html is not None else []
    check_vocabulary(torch.tensor([max(each.ids) for each in chain(prompts, *asked.values())] or [0]), source_checkpoint)
    dtype = "auto" if run_device.type == "cuda" else torch.float32
    source, converted = (
        load_model(checkpoint, run_device, dtype, spread=device == "auto")
        for checkpoint in (source_checkpoint, converted_checkpoint)
    )
    report = compare(source, converted, contexts, max_ratio)
    if asked:
        report = replace(report, needle=compare_answers(source, converted, tokenizer, asked))
    if html is not None:
        said = [answers(model, tokenizer, prompts) for model in (source, converted)]
        report = replace(report, answers=[AnswerReport(*each) for each in zip(PROMPTS, *said, strict=True)])
        where = {"text": text, "device": device_name(run_device), "command": command}
        write_page(html, report, source_checkpoint, converted_checkpoint, **where)
    return report


def check_pair(converted: Checkpoint, source: Checkpoint) -> None:
    """Raise a UserError unless the first is an MLA model that can have come from the second."""
    if not converted.config.model_type.endswith("_mla"):
        raise UserError(f"{converted.name} is a {converted.config.model_type!r}, not a converted model; convert it first")
    reason = refusal(source.config)
    if reason is not None:
        raise UserError(f"{source.name}: {reason}")
    config, original = converted.config, source.config
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    pairs = [(key, getattr(config, key), getattr(original, key)) for key in shared]
    pairs.append(("qk_nope_head_dim", config.qk_nope_head_dim, source_head_dim(original)))
    if rotary_width(original) % config.qk_rope_head_dim:
        pairs.append(("qk_rope_head_dim", config.qk_rope_head_dim, rotary_width(original)))
    else:
        expected = mla_config(original, config.kv_lora_rank, config.qk_rope_head_dim, "float32")
        pairs.append(("rope_parameters", config.rope_parameters, expected.rope_parameters))
    for key, here, there in pairs:
        if here != there:
            hint = "; for another context, change rope_parameters in config.json of both" if key == "rope_parameters" else ""
            raise UserError(
                f"{converted.name} has {key} {here}, {source.name} has {there}: it was converted from another model{hint}"
            )


def context_windows(ids: Tensor, context: int, begin: int | None = None) -> list[Tensor]:
    """Cut a text to sequences of each length that is measured.

    Args:
        ids: tokens of the text [tokens].
        context: tokens that the model was trained to attend to.
        begin: the token that every sequence begins with, if there is one.

    Returns:
        Token windows [windows, tokens], the shortest first; there is always one, of the whole text if that is short.
    """
    lengths = [min(VERIFICATION_WINDOW, context, len(ids))]
    if context > VERIFICATION_WINDOW:
        if len(ids) >= context:
            lengths.append(context)
        else:
            logger.warning(
                "not measured at the model's full context of %s tokens: there are %s; more --tokens of a longer text are needed",
                f"{context:,}",
                f"{len(ids):,}",
            )
    return [begun(ids[: len(ids) // length * length].view(-1, length), begin) for length in lengths]


@torch.no_grad()
def compare(source: Any, converted: Any, contexts: list[Tensor], max_ratio: float | None) -> VerifyReport:
    """Measure two models on token windows [windows, tokens] of several lengths; see `verify`."""
    reports = [compare_at(source, converted, windows) for windows in contexts]
    prompt = contexts[0][:1]
    return VerifyReport(
        **vars(reports[0]),
        contexts=reports,
        kv_bytes_per_token=PerSide(measured_bytes(source, prompt), measured_bytes(converted, prompt)),
        absorbed_vs_expanded_max_error=decoding_error(converted, prompt),
        verdict=verdict(reports, max_ratio),
        passed=max_ratio is None or all(report.perplexity_ratio <= max_ratio for report in reports),
        dtype=str(converted.dtype).removeprefix("torch."),
    )


def compare_at(source: Any, converted: Any, windows: Tensor) -> ContextReport:
    """Measure two models on token windows [windows, tokens], as a whole and by position."""
    total, window = Comparison(), windows.shape[1]
    parts = min(PARTS, max(1, window // 2))  # two tokens or more in each: the first of all is not predicted
    found = [with_sides(part.result()) for part in total.add_models(source, converted, windows, parts)]
    positions = [
        PositionReport(start, end, part["perplexity"], part["perplexity_ratio"])
        for (start, end), part in zip(pairwise(edges(window, parts)), found, strict=True)
    ]
    return ContextReport(window=window, tokens=windows.numel(), positions=positions, **with_sides(total.result()))


def choose_lengths(needle: bool, lengths: Sequence[int] | None, context: int) -> list[int]:
    """How long the texts are that numbers are to be found in.

    Args:
        needle: as given to `verify`.
        lengths: likewise.
        context: tokens that the model was trained to attend to.

    Returns:
        Ascending, each once; none if there are to be no questions.

    Raises:
        UserError: one is beyond the model's context.
    """
    if lengths is None and not needle:
        return []
    if lengths is None:
        return [min(SHORTEST, context) << i for i in range(max(1, (context // SHORTEST).bit_length()))]
    for length in lengths:
        if length > context:
            raise UserError(
                f"--needle-lengths has {length}; the model was trained for {context}: give at most that, or write "
                "max_position_embeddings and rope_parameters (YaRN) of a longer context into config.json of both models"
            )
    return sorted({*lengths})


def compare_answers(source: Any, converted: Any, tokenizer: Any, asked: Questions) -> RecallReport:
    """Let both models answer questions; see `mathematics.recall`."""
    sides = [accuracies(model, tokenizer, asked) for model in (source, converted)]
    found: dict[Any, Any] = {
        key: {"questions": len(some), "accuracy": PerSide(*(side[key] for side in sides))} for key, some in asked.items()
    }
    return RecallReport(
        needles=[NeedleReport(*key, **each) for key, each in found.items() if isinstance(key, tuple)],
        tasks=[TaskReport(key, **each) for key, each in found.items() if isinstance(key, str)],
    )


def verdict(reports: list[ContextReport], max_ratio: float | None) -> str:
    """What the perplexity ratios mean, in words; the first report is of the shortest sequences."""
    words = []
    worst = max(reports, key=lambda report: report.perplexity_ratio)
    needy = [report for report in reports if report.perplexity_ratio > HEALING_RATIO]
    if max_ratio is not None and worst.perplexity_ratio > max_ratio:
        where = f" at {worst.window:,} tokens" if len(reports) > 1 else ""
        words.append(f"failed: the perplexity ratio {worst.perplexity_ratio:.4f}{where} is above {max_ratio}")
    if needy or not words:
        first = needy[0] if needy else reports[0]
        change = first.perplexity_ratio - 1
        said = f"needs fine-tuning: perplexity rose by {change:.1%}" if needy else f"good: perplexity changed by {change:+.1%}"
        said += f" at {first.window:,} tokens" if first is not reports[0] else ""
        others = [f"at {report.window:,} tokens: {report.perplexity_ratio - 1:+.1%}" for report in reports if report is not first]
        words.append(said + (f" ({', '.join(others)})" if others else ""))
    return "; ".join(words)


def measured_bytes(model: Any, prompt: Tensor) -> int:
    """Bytes per token of the cache that a forward pass over a prompt [1, T] leaves behind."""
    cache = cache_of(model(input_ids=prompt.to(model.device), use_cache=True, logits_to_keep=1))
    return cache_bytes(cache) // prompt.shape[1]


def decoding_error(model: Any, prompt: Tensor) -> float:
    """Largest logit difference between one expanded pass over a prompt [1, T] and decoding its end token by token."""
    prompt = prompt.to(model.device)
    decoded = min(DECODED_TOKENS, prompt.shape[1] - 1)
    expected = model(input_ids=prompt, use_cache=False, logits_to_keep=decoded).logits
    cache = cache_of(model(input_ids=prompt[:, :-decoded], use_cache=True, logits_to_keep=1))
    steps = [model(input_ids=ids, cache=cache).logits for ids in prompt[:, -decoded:].split(1, dim=1)]
    return (torch.cat(steps, dim=1) - expected).abs().max().item()
