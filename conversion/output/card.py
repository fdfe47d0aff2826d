# SPDX-License-Identifier: Apache-2.0
"""The model card (README.md) of a converted checkpoint."""

import re
from typing import Any

from ..errors import UserError
from ..source.checkpoint import Checkpoint, DecoderCheckpoint, user_path
from ..source.matching import ModelCheckpoint
from ..source.own_text import OWN_TEXT
from ..source.tokenizer import custom_code
from .reports import HEALING_RATIO, ConvertReport, ExportReport, HealReport


CARD = """---
{metadata}
---

# {name} with Multi-head Latent Attention

Converted from {source} by hf_mla {version}: the KV cache holds {converted} numbers per token and layer,
a latent of {rank} and a rotary key of {rope}, in place of {original} ({saved:.2%} less).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{load}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{load}", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

With `hf_mla` installed and imported, `trust_remote_code` is not needed{but}.

## How it was made

From {tokens:,} tokens of calibration text ({calibration}), seed {seed}: {method}. {copied} is copied
unchanged. `conversion.json` has all options, the fingerprints of source and text, and each layer's errors.

On {held:,} tokens of that text which nothing was fitted to:

| | source | converted |
|---|---|---|
| perplexity | {before:.3f} | {after:.3f} (x {ratio:.4f}) |
| same likeliest token | | {agreement:.1%} |
| KL divergence, nats per token | | {kl:.4f} |
| relative squared error of the attention output, by layer{alone} | | {least:.4f} to {most:.4f} |
| KV cache, bytes per token | {source_bytes:,} | {converted_bytes:,} |

## Limits

It is an approximation of its source. Text like the calibration text flatters it, and text that the source was trained on need not
show what other text would: measure it on yours (`hf-mla verify`){healing}. It was fitted on sequences of {window:,} tokens.
What the source's licence and card say holds for it too.
"""


TRAINED = {
    "lora": "adapters of rank {rank} on all linear layers, merged",
    "attention": "all weights of the attention",
    "all": "all weights",
}


def model_card(source: ModelCheckpoint, config: Any, report: ConvertReport, recipe: dict) -> str:
    """Compose the card of a converted checkpoint; the licence is carried over from the source's card."""
    assert source.folder is not None and report.kv_floats_per_token_per_layer is not None and report.kv_ratio is not None
    metadata = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [mla, hf_mla]"]
    if not user_path(source.name).exists():  # else it is a path, which the Hub would not take
        metadata.append(f"base_model: {source.name}")
    metadata += licence(source)
    errors = [layer.error for layer in report.layers]
    assert report.perplexity is not None and report.perplexity_ratio is not None and report.kv_bytes_per_token is not None
    steps = f"each layer was then fitted to the original's attention output in {report.steps:,} steps"
    stage = report.end_to_end
    whole = (
        f"; then {TRAINED[stage.train]} were trained to predict what the source predicts (Kullback-Leibler divergence), on "
        f"{stage.steps_taken * stage.tokens_per_step:,} tokens of the same text"
        if stage
        else ""
    )
    return CARD.format(
        metadata="\n".join(metadata),
        name=source.name.rstrip("/").rsplit("/", 1)[-1],
        source="the text decoder of " * isinstance(source.stored, DecoderCheckpoint) + f"`{source.name}`",
        version=recipe["versions"]["hf_mla"],
        converted=report.kv_floats_per_token_per_layer.converted,
        original=report.kv_floats_per_token_per_layer.source,
        saved=1 - report.kv_ratio,
        rank=config.kv_lora_rank,
        rope=config.qk_rope_head_dim,
        but=" for the model; the tokenizer comes with code of its own" if custom_code(source.folder, source.name) else "",
        load=report.output.rstrip("/").rsplit("/", 1)[-1],
        tokens=report.calibration_tokens,
        calibration=" and ".join("what the source writes itself" if text.name == OWN_TEXT else text.name for text in report.texts),
        method="the closed form" + (f", and {steps}" if report.steps else " alone, nothing fitted") + whole,
        copied="Nothing but the tokenizer" if stage and stage.train == "all" else "Everything but the attention",
        held=report.held_back_tokens,
        before=report.perplexity.source,
        after=report.perplexity.converted,
        ratio=report.perplexity_ratio,
        agreement=report.top1_agreement,
        kl=report.kl,
        source_bytes=report.kv_bytes_per_token.source,
        converted_bytes=report.kv_bytes_per_token.converted,
        healing=", and fine-tune it before relying on it" if report.perplexity_ratio > HEALING_RATIO else "",
        window=report.window,
        seed=recipe["seed"],
        alone=", before all weights were trained" if stage else "",
        least=min(errors),
        most=max(errors),
    )


def licence(source: Checkpoint) -> list[str]:
    """What a source's card says of the licence: lines of its metadata; a UserError if it is there and cannot be read."""
    assert source.folder is not None
    if not (source.folder / "README.md").is_file():
        return []
    try:
        text = (source.folder / "README.md").read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"{source.name}/README.md cannot be read: {error.strerror}; it says what the licence is") from None
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return [line for line in (front[1] if front else "").splitlines() if re.match(r"license\w*:", line)]


HEALING = """## Healing

Then trained to predict what `{teacher}` predicts (Kullback-Leibler divergence): {what}, {steps:,} steps of {tokens:,} tokens of
{text}, in sequences of {window:,}.{stopped} On {held:,} tokens of that text which were held back:

| | source | healed |
|---|---|---|
| perplexity | {source:.3f} | {healed:.3f} (x {ratio:.4f}) |
| same likeliest token | | {agreement:.1%} |
| KL divergence, nats per token | | {kl:.4f} |

"""


def add_healing(card: str, report: HealReport, recipe: dict, name: str) -> str:
    """Put what healing did and measured into a converted checkpoint's card, before its limits, and its new name."""
    assert report.verify is not None
    card = re.sub(r'(from_pretrained\(")[^"]*"', rf'\g<1>{name}"', card)
    section = HEALING.format(
        teacher=recipe["teacher"],
        what=TRAINED[recipe["train"]].format(rank=recipe["lora_rank"]),
        steps=report.steps_taken,
        tokens=report.tokens_per_step,
        text=recipe["text"],
        window=report.window,
        stopped=" It stopped by itself: nothing improved any more." if report.stopped_early else "",
        held=report.verify.tokens,
        source=report.verify.perplexity.source,
        healed=report.verify.perplexity.converted,
        ratio=report.verify.perplexity_ratio,
        agreement=report.verify.top1_agreement,
        kl=report.verify.kl,
    )
    return before_limits(card, section)


EXPORT = """## Export

Then written by `hf-mla export` as a dense `{format}`, which loads without code from elsewhere: the latent is {rank} wide,
the rotary key {rope}, heads {nope} and {value}. The cache holds {floats} numbers per token and layer.

"""
NOT_NEEDED = re.compile(r"With `hf_mla` installed and imported, `trust_remote_code` is not needed(.*)\.\n\n")


def add_export(card: str, report: ExportReport, name: str) -> str:
    """Put what an export did into a converted checkpoint's card, with its new name, and take out that it needs code."""
    assert report.padded is not None
    coded = NOT_NEEDED.search(card)
    free = "AutoModelForCausalLM" if coded and coded[1] else r"\w+"  # else the tokenizer comes with code
    card = re.sub(r'(from_pretrained\(")[^"]*"', rf'\g<1>{name}"', NOT_NEEDED.sub("", card))
    card = re.sub(rf'({free}\.from_pretrained\("[^"]*"), trust_remote_code=True', r"\1", card)
    section = EXPORT.format(
        format=report.format,
        rank=report.padded.kv_lora_rank,
        rope=report.padded.qk_rope_head_dim,
        nope=report.padded.qk_nope_head_dim,
        value=report.padded.v_head_dim,
        floats=report.padded.kv_floats_per_token_per_layer,
    )
    return before_limits(card, section)


def before_limits(card: str, section: str) -> str:
    """A card with one more section, before its limits."""
    before, limits, after = card.partition("## Limits\n")
    return before.rstrip("\n") + "\n\n" + section + limits + after if limits else card + "\n" + section
