# SPDX-License-Identifier: Apache-2.0
"""The model card (README.md) of a converted checkpoint, with metadata as the Hub reads them.

What was measured stands in them as a model index, which the Hub shows as evaluation results; healing puts in what it measured.
"""

import logging
import math
import re
import shlex
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import UserError
from ..source.checkpoint import Checkpoint, DecoderCheckpoint, user_path
from ..source.lookups import LOOKUPS
from ..source.matching import ModelCheckpoint
from ..source.own_text import OWN_TEXT
from ..source.tokenizer import custom_code
from .reports import HEALING_RATIO, Closeness, ConvertReport, ExportReport, HealReport


logger = logging.getLogger(__name__)

PICTURE = "conversion.png"
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

With `hf_mla` installed and imported, `trust_remote_code` is not needed{but}. Its program
measures the model against its source, on a text of yours, and times both:

```bash
hf-mla verify {words} --text your.txt
hf-mla bench {words} --context 2048
```

## How it was made

From {tokens:,} tokens of calibration text ({calibration}), seed {seed}: {method}. {copied} is copied
unchanged. `conversion.json` has all options, the fingerprints of source and text, and each layer's errors.

{picture}On {held:,} tokens of that text which nothing was fitted to:

| | source | converted |
|---|---|---|
| perplexity | {before:.3f} | {after:.3f} (x {ratio:.4f}) |
| same likeliest token | | {agreement:.1%} |
| KL divergence, nats per token | | {kl:.4f} |
| relative squared error of the attention output, by layer{alone} | | {least:.4f} to {most:.4f} |
| KV cache, bytes per token | {source_bytes:,} | {converted_bytes:,} |

## Limits

It is an approximation of its source. Text like the calibration text flatters it, and text that the source was trained on need not
show what other text would: measure it on yours (`hf-mla verify`){healing}. It was fitted on sequences of {window} tokens.
What the source's licence and card say holds for it too.
"""


TRAINED = {
    "lora": "adapters of rank {rank} on all linear layers, merged",
    "attention": "all weights of the attention",
    "layers": "all weights but those of the embedding and the head",
    "all": "all weights",
}


def model_card(source: ModelCheckpoint, config: Any, report: ConvertReport, recipe: dict, *, pictured: bool) -> str:
    """Compose the card of a converted checkpoint.

    Args:
        source: the source; the licence is carried over from its card.
        config: of the converted model.
        report: what was done.
        recipe: how.
        pictured: whether `PICTURE` goes with it.

    Returns:
        The text of README.md.
    """
    assert source.folder is not None and report.kv_floats_per_token_per_layer is not None and report.kv_ratio is not None
    load = report.repository or report.output.rstrip("/").rsplit("/", 1)[-1]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mla", "hf_mla"],
        base_model=None if user_path(source.name).exists() else source.name,  # a path is no name on the Hub
        model_name=load.rsplit("/", 1)[-1],
        eval_results=[result for text in report.texts if text.name != LOOKUPS for result in results(text, text_title(text.name))],
        **licence(source),
    )
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
        metadata=metadata.to_yaml(),
        name=source.name.rstrip("/").rsplit("/", 1)[-1],
        source="the text decoder of " * isinstance(source.stored, DecoderCheckpoint) + f"`{source.name}`",
        version=recipe["versions"]["hf_mla"],
        converted=report.kv_floats_per_token_per_layer.converted,
        original=report.kv_floats_per_token_per_layer.source,
        saved=1 - report.kv_ratio,
        rank=config.kv_lora_rank,
        rope=config.qk_rope_head_dim,
        but=" for the model; the tokenizer comes with code of its own" if custom_code(source.folder, source.name) else "",
        load=load,
        words=f"{shlex.quote(load)} --against {shlex.quote(source.name)}",
        picture=f"![Spectra and errors of all layers]({PICTURE})\n\n" if pictured else "",
        tokens=report.calibration_tokens,
        calibration=" and ".join(text_title(text.name) for text in report.texts),
        method="the closed form" + (f", and {steps}" if report.steps else " alone, nothing fitted") + whole,
        copied="Nothing but embedding, head and tokenizer" if stage else "Everything but the attention",
        held=report.held_back_tokens,
        before=report.perplexity.source,
        after=report.perplexity.converted,
        ratio=report.perplexity_ratio,
        agreement=report.top1_agreement,
        kl=report.kl,
        source_bytes=report.kv_bytes_per_token.source,
        converted_bytes=report.kv_bytes_per_token.converted,
        healing=", and fine-tune it before relying on it" if report.perplexity_ratio > HEALING_RATIO else "",
        window=f"{report.window:,}" + (f" and {stage.window:,}" if stage and stage.window != report.window else ""),
        seed=recipe["seed"],
        alone=", before all layers were trained" if stage else "",
        least=min(errors),
        most=max(errors),
    )


def text_title(name: str) -> str:
    """What a calibration text is called in a card."""
    titles = {OWN_TEXT: "what the source writes itself", LOOKUPS: "lookups made of these"}
    file = user_path(name)  # a card may be published, and says no path
    return titles.get(name, file.name if file.is_file() else name)


def results(measured: Closeness, text: str) -> list[EvalResult]:
    """What was measured on held-back text, as evaluation results of the Hub; `text` is its title."""
    metrics = {
        "perplexity": ("perplexity", measured.perplexity.converted),
        "perplexity_ratio": ("perplexity, ratio to the source's", measured.perplexity_ratio),
        "kl_divergence": ("KL divergence from the source, nats per token", measured.kl),
        "top1_agreement": ("share of tokens where both find the same one likeliest", measured.top1_agreement),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w./-]+", "-", text).strip("-"),
            dataset_name=f"{text}, held back",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 5),
        )
        for kind, (name, value) in metrics.items()
        if math.isfinite(value)
    ]


def licence(source: Checkpoint) -> dict[str, Any]:
    """What a source's card says of the licence, by the names of its metadata; a UserError if it is there and cannot be read."""
    assert source.folder is not None
    if not (source.folder / "README.md").is_file():
        return {}
    try:
        text = (source.folder / "README.md").read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"{source.name}/README.md cannot be read: {error.strerror}; it says what the licence is") from None
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        said = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError:
        logger.warning("the metadata in %s/README.md are not YAML: the licence is not carried over", source.name)
        said = {}
    return (
        {key: said[key] for key in ("license", "license_name", "license_link") if said.get(key)} if isinstance(said, dict) else {}
    )


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
    card = rename(card, name)
    parsed: Any = ModelCard(card, ignore_metadata_errors=True)
    if parsed.data.eval_results:
        parsed.data.eval_results = results(report.verify, recipe["text"])
        card = str(parsed)
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
# The paragraph on hf_mla, and its commands, which are not in older cards.
NOT_NEEDED = re.compile(
    r"With `hf_mla` installed and imported, `trust_remote_code` is not needed(.*?)\.(?: Its program\n.*?```bash.*?```)?\n\n",
    re.DOTALL,
)


def add_export(card: str, report: ExportReport, name: str) -> str:
    """Put what an export did into a converted checkpoint's card, with its new name, and take out that it needs code."""
    assert report.padded is not None
    coded = NOT_NEEDED.search(card)
    free = "AutoModelForCausalLM" if coded and coded[1] else r"\w+"  # else the tokenizer comes with code
    card = re.sub(rf"!\[.*\]\({PICTURE}\)\n\n", "", rename(NOT_NEEDED.sub("", card), name))  # which stays behind
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


def rename(card: str, name: str) -> str:
    """A card with another name to load the model by."""
    card = re.sub(r'(from_pretrained\(")[^"]*"', lambda found: f'{found[1]}{name}"', card)
    return re.sub(r"(hf-mla (?:verify|bench) ).*?(?= --against)", lambda found: found[1] + shlex.quote(name), card)


def before_limits(card: str, section: str) -> str:
    """A card with one more section, before its limits."""
    before, limits, after = card.partition("## Limits\n")
    return before.rstrip("\n") + "\n\n" + section + limits + after if limits else card + "\n" + section
