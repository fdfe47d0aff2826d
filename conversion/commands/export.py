# SPDX-License-Identifier: Apache-2.0
"""Write a converted model in a layout that serving engines have of their own."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..output.card import add_export
from ..output.deepseek import ENGINE_WIDTHS, FORMATS, DeepseekV3Export, engine_refusals, refusal, widths_of
from ..output.folder import check_output
from ..output.gguf import export_gguf
from ..output.gguf_vocabulary import tokenizer_refusal
from ..output.progress import source_fingerprint, versions, work_on, write_json
from ..output.reports import ExportReport, PerSide
from ..output.writing import GENERATION, carry, generation_settings
from ..source.checkpoint import RECORD, Checkpoint, open_checkpoint, read_record
from ..source.loading import launched_processes
from ..source.matching import match_model
from ..source.shards import ShardWriter
from ..source.tokenizer import load_tokenizer


logger = logging.getLogger(__name__)

PADS = {"auto": None, "engine": ENGINE_WIDTHS}


def export(
    out: str,
    dest: str,
    *,
    format: str,
    pad: str = "auto",
    outtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> ExportReport:
    """Write a converted model in the layout of another, a tensor at a time; exact, but for rounding where weights are scaled.

    Args:
        out: the converted checkpoint.
        dest: the folder to write; one that is not there appears when all is done. For "gguf", the file.
        format: "deepseek_v3": a dense model of that type, for Transformers, vLLM and SGLang without code of ours;
            "gguf": a file for llama.cpp and what stands on it.
        pad: "auto" keeps the widths; "engine" fills them up to DeepSeek's, 512 + 64 and heads of 128, as engines want it.
        outtype: of the matrices in a .gguf file: "f32", "bf16", "f16" or "q8_0"; None for what the checkpoint stores.
        overwrite: replace the output folder or file.
        trust_remote_code: run the code that the tokenizer comes with, if it does.

    Returns:
        What was written; or why nothing was, if the format cannot hold the model.

    Raises:
        UserError: something in the arguments or the checkpoint does not allow it.
    """
    check_options(out, format, pad, outtype)
    checkpoint: Checkpoint = open_checkpoint(out)
    if checkpoint.config.model_type == format:
        raise UserError(f"{out} is a {format!r} already; there is nothing to export")
    if not checkpoint.config.model_type.endswith("_mla"):
        raise UserError(f"{out} is a {checkpoint.config.model_type!r}, not a converted model; convert it first")
    reason = refusal(checkpoint.config)
    if reason is not None:
        return ExportReport(format, reason)
    checkpoint = match_model(checkpoint)
    assert checkpoint.folder is not None
    if format == "gguf":
        tokenizer = load_tokenizer(checkpoint.folder, out, trust_remote_code)
        reason = tokenizer_refusal(tokenizer, checkpoint.config.vocab_size)
        if reason is not None:
            return ExportReport(format, reason)
        return export_gguf(checkpoint, dest, tokenizer, outtype, overwrite=overwrite)

    exported = DeepseekV3Export(checkpoint, widths_of(checkpoint.config, PADS[pad]))
    written = sum(header.bytes for header in exported.headers.values())
    processes = launched_processes(torch.device("cpu"))
    path = check_output(dest, [checkpoint.folder, *checkpoint.paths.values()], written, processes, overwrite=overwrite)
    tokenizer = load_tokenizer(checkpoint.folder, out, trust_remote_code)
    floats = PerSide(checkpoint.config.kv_floats_per_token_per_layer, exported.widths.kv_floats_per_token_per_layer)
    original = source_floats(checkpoint.folder)
    if original is not None and floats.converted >= original:
        logger.warning(
            "the export caches %s numbers a token and layer, the source %s: nothing is saved; --pad auto caches %s",
            f"{floats.converted:,}",
            f"{original:,}",
            f"{floats.source:,}",
        )
    report = ExportReport(
        format=format,
        refused=None,
        tensors=len(exported.headers),
        bytes_written=written,
        padded=exported.widths,
        kv_floats_per_token_per_layer=floats,
        engines=engine_refusals(exported.widths),
        output=str(path),
    )
    recipe = {
        "out": out,
        "out_sha256": source_fingerprint(checkpoint),
        "format": format,
        "pad": pad,
        "versions": versions(),
    }
    sources = {"out_sha256": checkpoint}
    with work_on(path, recipe, sources, processes, restart=True, overwrite=overwrite, worth=[]) as folder:
        if processes.is_main_process:
            output = folder / "partial" / path.name  # the library keeps copies of a tokenizer's code by this name
            output.mkdir(parents=True)
            write_json(exported.config, output / "config.json")
            ShardWriter(output, exported.headers).write(exported.load)
            carry(checkpoint, output, tokenizer)
            settings = generation_settings(checkpoint)
            if settings.get("cache_implementation") == "quantized":  # latents; others know nothing of it
                kept = {key: value for key, value in settings.items() if key not in ("cache_implementation", "cache_config")}
                write_json(kept, output / GENERATION)
            record_export(checkpoint.folder, output, report, recipe, path.name)
            output.rename(folder / "output")
    return report


def check_options(out: str, format: str, pad: str, outtype: str | None) -> None:
    """Raise a UserError if there is no such option, or if it does not go with the format."""
    if format not in FORMATS:
        raise UserError(f"--format is {format}; allowed: {', '.join(FORMATS)}")
    if pad not in PADS:
        raise UserError(f"--pad is {pad}; allowed: {', '.join(PADS)}")
    if format == "gguf" and pad != "auto":
        raise UserError(f"--pad is {pad}; a .gguf file keeps the widths, which llama.cpp takes as they are")
    if format != "gguf" and outtype is not None:
        raise UserError(f"--outtype is of --format gguf; {format} stores numbers as {out} does")


def source_floats(folder: Path) -> int | None:
    """Numbers that the source of a converted checkpoint cached for a token in a layer, if its record says so."""
    try:
        return int(read_record(folder)["report"]["kv_floats_per_token_per_layer"]["source"])
    except (KeyError, TypeError, ValueError):
        return None


def record_export(folder: Path, output: Path, report: ExportReport, recipe: dict[str, Any], name: str) -> None:
    """Give an export the record and the card of the checkpoint in `folder`, with what was done; `name` is its new one."""
    write_json(read_record(folder) | {"export": {"recipe": recipe, "report": asdict(report)}}, output / RECORD)
    card = folder / "README.md"
    if card.is_file():
        (output / "README.md").write_text(add_export(card.read_text(encoding="utf-8"), report, name), encoding="utf-8")
