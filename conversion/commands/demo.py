# SPDX-License-Identifier: Apache-2.0
"""The main job on the bundled model: convert, verify, generate from both, and say what each step gave."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from hf_mla import cache_bytes, cache_of

from ..errors import UserError
from ..output.reports import DemoReport, Generation
from ..source.checkpoint import open_checkpoint
from ..source.loading import load_model
from ..source.text import BUNDLED
from ..source.tokenizer import load_tokenizer
from .convert import convert
from .verify import verify


PROMPT = "The captain looked at the sea and"
NEW_TOKENS = 48
STEPS = 320  # fewer than usual, for a newcomer's patience: perplexity x 1.046, x 1.044 with 400


def demo(*, out: str | None = None) -> DemoReport:
    """Convert the bundled model to 31 % of its cache, verify it on held-out text, and generate from both models.

    Args:
        out: where to keep the converted checkpoint; None removes it at the end.

    Returns:
        The reports of the steps and the two generations.

    Raises:
        UserError: `out` cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = out if out is not None else str(Path(scratch) / "demo-mla")
        source = str(BUNDLED / "model")
        try:
            unseen = str(BUNDLED / "calibration.txt.xz")  # the bundled prose is what this model was trained on
            converted = convert(source, folder, kv_lora_rank=44, qk_rope_head_dim=16, calibration=unseen, steps=STEPS, device="cpu")
        except UserError as error:  # its advice is for `convert`
            what, _, advice = str(error).partition("; ")
            advice = (
                "make room there, or give another folder by --out" if out is None else advice.removesuffix(", or pass --overwrite")
            )
            raise UserError(f"{what}; {advice}") from None
        verified = verify(folder, against=source, text=str(BUNDLED / "validation.txt.xz"), tokens=32768, device="cpu")
        return DemoReport(converted, verified, PROMPT, generate(source), generate(folder))


def generate(folder: str) -> Generation:
    """Continue the prompt greedily with a checkpoint, and measure the cache that `generate` used."""
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(checkpoint.folder, folder)
    model: Any = load_model(checkpoint, torch.device("cpu"), torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    outputs = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
    new = outputs.sequences[0, inputs["input_ids"].shape[1] :]
    return Generation(tokenizer.decode(new), len(new), cache_bytes(cache_of(outputs)))
