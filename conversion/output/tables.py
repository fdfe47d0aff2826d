# SPDX-License-Identifier: Apache-2.0
"""What the commands print, unless asked for JSON."""

import statistics
from typing import Any


def rows(pairs: dict[str, Any]) -> str:
    """Align names and values in two columns."""
    width = max(map(len, pairs))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in pairs.items())


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def spread(errors: list[float]) -> str:
    """The range of the layers' errors."""
    return f"{min(errors):.4f} to {max(errors):.4f}"


def exports_line(result: Any) -> str:
    """Of a plan: to which formats the result can be exported, or why not; and where nothing would be saved with `--pad engine`."""
    lines = [name if reason is None else f"not as {name}: {reason}" for name, reason in result.exports.items()]
    source, padded = result.kv_floats_per_token_per_layer.source, result.engine_kv_floats_per_token_per_layer
    if padded is not None and padded >= source:
        lines.append(f"--pad engine would cache {padded:,} numbers, the source {source:,}: nothing saved")
    return "; ".join(lines)


def plan_table(result: Any) -> str:
    """A plan for people."""
    return rows(
        {
            "model": f"{result.model_type}, {result.num_hidden_layers} layers",
            "cache per token and layer": f"{result.kv_floats_per_token_per_layer.source:,} -> "
            f"{result.kv_floats_per_token_per_layer.converted:,} numbers "
            f"(latent {result.kv_lora_rank} + rotary key {result.qk_rope_head_dim})",
            "cache per token": f"{result.kv_bytes_per_token.source:,} -> {result.kv_bytes_per_token.converted:,} bytes "
            f"({1 - result.kv_ratio:.2%} less)",
            "memory to convert": size(result.peak_memory_bytes),
            "read": size(result.bytes_read),
            "written": size(result.bytes_written),
            "export": exports_line(result),
        }
    )


def convert_table(result: Any) -> str:
    """A conversion for people: its plan, then what it gave."""
    summary = {"calibration": f"{result.calibration_tokens:,} tokens, {result.steps:,} steps a layer"}
    if result.candidates:
        tried = ", ".join(f"{c.kv_lora_rank} + {c.qk_rope_head_dim}: {c.error:.4f}" for c in result.candidates)
        summary["sizes tried"] = (
            f"{tried} (held-back error of the attention output; the widest rotary key of those with nearly the least is taken)"
        )
    summary["attention error"] = f"{spread([x.error_closed_form for x in result.layers])} in closed form"
    if result.steps:
        summary["attention error"] += f", {spread([x.error_reconstructed for x in result.layers])} reconstructed"
        closed = [str(x.layer) for x in result.layers if not x.steps_kept]
        if closed:
            summary["attention error"] += f"; no step improved layer {', '.join(closed)}, in closed form: heal before training"
    stage = result.end_to_end
    if stage:
        speeds = [entry["tokens_per_second"] for entry in stage.history if "tokens_per_second" in entry]
        trained = f"{stage.steps_taken * stage.tokens_per_step:,} tokens, {statistics.median(speeds or [0]):,.0f} a second"
        trained += f", about {size(stage.memory_bytes['total'])} of memory"
        summary["end to end"] = f"{trained}; perplexity x {result.layers_alone.perplexity_ratio:.4f} before"
    summary |= {
        "perplexity": f"{result.perplexity.source:.3f} -> {result.perplexity.converted:.3f} (x {result.perplexity_ratio:.4f}) "
        f"on {result.held_back_tokens:,} held-back tokens of the calibration text",
        "on each text": "; ".join(f"{text.name} x {text.perplexity_ratio:.4f}" for text in result.texts),
        "time": f"{result.seconds:.0f} s",
        "output": result.output,
        "on the Hub": result.repository,
    }
    if len(result.texts) < 2:
        del summary["on each text"]
    if result.repository is None:
        del summary["on the Hub"]
    tables = [plan_table(result) + "\n" + rows(summary)]
    if result.frontier:
        tables.append(frontier_table(result))
    return "\n\n".join(tables)


def frontier_table(result: Any) -> str:
    """The sizes that were looked at for people: cache, and what it costs in perplexity."""
    lines = [f"{'cache':<12}{'share':>8}{'error':>9}{'predicted':>12}{'measured':>12}"]
    for point in result.frontier:
        chosen = (point.kv_lora_rank, point.qk_rope_head_dim) == (result.kv_lora_rank, result.qk_rope_head_dim)
        measured = "" if point.measured_ratio is None else f"x {point.measured_ratio:.4f}"
        cache = f"{point.kv_lora_rank} + {point.qk_rope_head_dim}"
        predicted = f"x {point.predicted_ratio:.4f}"
        lines.append(
            f"{cache:<12}{point.kv_ratio:>8.2%}{point.error:>9.4f}{predicted:>12}{measured:>12}{'  chosen' * chosen}".rstrip()
        )
    return "\n".join(lines)


def verify_table(result: Any) -> str:
    """A verification for people: a line for each context length and for the parts of the longest, the rest, then answers."""
    lines = {
        f"at {context.window:,} tokens": f"perplexity {context.perplexity.source:.3f} -> {context.perplexity.converted:.3f} "
        f"(x {context.perplexity_ratio:.4f}), KL divergence {context.kl:.4f} nats, same likeliest token "
        f"{context.top1_agreement:.1%}; on {context.tokens:,} tokens"
        for context in result.contexts
    }
    longest = result.contexts[-1]
    lines |= {
        f"ratio by position, to {longest.window:,}": ", ".join(f"{part.perplexity_ratio:.4f}" for part in longest.positions),
        "cache per token, measured": f"{result.kv_bytes_per_token.source:,} -> {result.kv_bytes_per_token.converted:,} bytes "
        f"({result.dtype})",
        "absorbed against expanded": f"{result.absorbed_vs_expanded_max_error:.1e} largest logit difference",
        "verdict": result.verdict,
    }
    if result.needle is None:
        return rows(lines)
    answered = [line for table in recall_cells(result.needle) for line in table]
    table = "\n".join(f"{line[0]:<24}" + "".join(f"{cell:>16}" for cell in line[1:]).rstrip() for line in answered)
    return f"{rows(lines)}\n\n{table}"


def recall_cells(result: Any) -> tuple[list[list[str]], list[list[str]]]:
    """What both models answered: a line for each length of text and a column for each depth, and the tasks; each with its head."""

    def sides(accuracy: Any) -> str:
        return f"{100 * accuracy.source:.0f} -> {100 * accuracy.converted:.0f} %"

    cells: dict[str, list[Any]] = {}
    for each in result.needles:
        cells.setdefault(f"{each.length:,} tokens", []).append(each)
    depths = list(dict.fromkeys(each.depth for each in result.needles))
    lines = [["numbers found at depth", *(f"{depth:.0%}" for depth in depths)]]
    lines += [[name, *(sides(each.accuracy) for each in some)] for name, some in cells.items()]
    tasks = [["short tasks", *(each.task for each in result.tasks)]]
    tasks += [["answered exactly", *(sides(each.accuracy) for each in result.tasks)]]
    return lines, tasks


def heal_table(result: Any) -> str:
    """A healing for people."""
    lines = {
        "trained": f"{result.train}, {result.trained_parameters:,} numbers",
        "steps": f"{result.steps:,} of {result.tokens_per_step:,} tokens, in sequences of {result.window:,}",
        "memory": ", ".join(f"{name.replace('_', ' ')} {size(count)}" for name, count in result.memory_bytes.items()),
    }
    if result.output:
        first = next(entry["perplexity"] for entry in result.history if "perplexity" in entry)
        taken = f"{result.steps_taken:,}" + (" (nothing improved any more)" if result.stopped_early else "")
        lines |= {
            "steps taken": taken,
            "held-out perplexity": f"{first:.3f} -> {result.verify.perplexity.converted:.3f}; "
            f"source {result.verify.perplexity.source:.3f} (x {result.verify.perplexity_ratio:.4f})",
            "verdict": result.verify.verdict,
            "time": f"{result.seconds:.0f} s",
            "output": result.output,
        }
    return rows(lines)


def export_table(result: Any) -> str:
    """An export for people."""
    widths, floats = result.padded, result.kv_floats_per_token_per_layer
    names = {"vllm": "vLLM's own class", "sglang": "SGLang"}
    return rows(
        {
            "format": f"{result.format}, {result.tensors:,} tensors",
            "widths": f"latent {widths.kv_lora_rank}, rotary key {widths.qk_rope_head_dim}, heads {widths.qk_nope_head_dim} "
            f"and {widths.v_head_dim}",
            "cache per token and layer": f"{floats.source:,} -> {floats.converted:,} numbers",
            **{names[name]: reason or "takes these widths" for name, reason in result.engines.items()},
            "written": size(result.bytes_written),
            "output": result.output,
        }
    )


def bench_table(result: Any) -> str:
    """A benchmark for people: a line for each context and model, each ratio after what it is of."""
    lines = [("context", "model", "ms a step", "spread", "tokens a second", "ratio", "cache", "ratio")]
    for context in result.contexts:
        ratios = f"x {context.speedup:.2f}", f"x {context.cache_ratio:.3f}"
        for side, length, faster, smaller in (("source", f"{context.context:,}", "", ""), ("converted", "", *ratios)):
            step, spread, rate, held = (
                getattr(getattr(context, name), side)
                for name in ("decode_ms_per_token", "spread", "decode_tokens_per_second", "cache_bytes")
            )
            lines.append((length, result.names[side], f"{step:.3f}", f"{spread:.1%}", f"{rate:,.0f}", faster, size(held), smaller))
    widths = (-9, -11, 9, 9, 17, 9, 11, 9)  # negative: to the left
    table = "\n".join(
        "".join(f"{cell:{'<' if width < 0 else '>'}{abs(width)}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return f"{result.device}, {result.dtype}, batch {result.batch}, {result.cache} cache\n{table}"


def refresh_table(result: Any) -> str:
    """A refresh for people: the files and why, then what was done."""
    versions = f"{result.version_before} -> {result.version}"
    if not result.changes:
        return f"{result.output} is as hf_mla {result.version} writes it; nothing to do"
    done = "nothing is written: a dry run" if result.dry_run else "what was replaced is in " + (result.backup or "no folder")
    return rows({change.file: change.reason for change in result.changes} | {"hf_mla": versions, "backup": done})


def demo_table(result: Any) -> str:
    """The demo for people: both texts, then one table."""
    texts = [f"{name}: {result.prompt}{side.text}" for name, side in (("original", result.source), ("converted", result.converted))]
    measured = result.verify
    lines = [("", "original (GQA)", "converted (MLA)")]
    lines.append(
        ("KV cache, bytes per token", f"{measured.kv_bytes_per_token.source:,}", f"{measured.kv_bytes_per_token.converted:,}")
    )
    lines.append(("perplexity, held-out text", f"{measured.perplexity.source:.2f}", f"{measured.perplexity.converted:.2f}"))
    lines.append(("tokens generated", f"{result.source.new_tokens}", f"{result.converted.new_tokens}"))
    lines.append(("KV cache after them, bytes", f"{result.source.cache_bytes:,}", f"{result.converted.cache_bytes:,}"))
    table = "\n".join(f"{name:<27}{source:>16}{converted:>17}" for name, source, converted in lines)
    return "\n\n".join([*texts, table, f"verdict: {measured.verdict}, for {1 - result.convert.kv_ratio:.2%} less cache"])
