# SPDX-License-Identifier: Apache-2.0
"""The model card (README.md) of a converted checkpoint."""

import re
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint


if TYPE_CHECKING:
    from .converter import ConvertReport

CARD = """---
{metadata}
---

# {name} with Multi-head Latent Attention

Converted from `{source}` by hf_mla {version}: the KV cache holds {converted} numbers per token and layer,
a latent of {rank} and a rotary key of {rope}, in place of {original} ({saved:.2%} less).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{load}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{load}", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

With `hf_mla` installed and imported, `trust_remote_code` is not needed.

## How it was made

In closed form, without training: {tokens:,} tokens of calibration text ({calibration}), {weighting}, seed {seed}.
Everything but the attention is copied unchanged. The relative squared error of a layer's attention output on that text is
{least:.4f} to {most:.4f}; `conversion.json` has it for each layer.

## Limits

It is an approximation of its source: measure it (`hf-mla verify`), and fine-tune it on your data before relying on it. What the
source's licence and card say holds for it too.
"""


def model_card(source: Checkpoint, config: Any, report: "ConvertReport", recipe: dict) -> str:
    """Compose the card of a converted checkpoint; the licence is carried over from the source's card."""
    assert report.kv_floats_per_token_per_layer is not None and report.kv_ratio is not None
    metadata = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [mla, hf_mla]"]
    if source.folder is not None and not source.name.startswith((".", "/", "~")):
        metadata.append(f"base_model: {source.name}")
    if source.folder is not None and (source.folder / "README.md").is_file():
        text = (source.folder / "README.md").read_text(encoding="utf-8", errors="replace")
        front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        metadata += [line for line in (front[1] if front else "").splitlines() if re.match(r"license\w*:", line)]
    errors = [layer.error_closed_form for layer in report.layers]
    return CARD.format(
        metadata="\n".join(metadata),
        name=source.name.rstrip("/").rsplit("/", 1)[-1],
        source=source.name,
        version=recipe["hf_mla"],
        converted=report.kv_floats_per_token_per_layer.converted,
        original=report.kv_floats_per_token_per_layer.source,
        saved=1 - report.kv_ratio,
        rank=config.kv_lora_rank,
        rope=config.qk_rope_head_dim,
        load=report.output.rstrip("/").rsplit("/", 1)[-1],
        tokens=report.calibration_tokens,
        calibration=recipe["calibration"],
        weighting="weighted by the loss gradient" if report.weighting == "gradient" else "weighted layer by layer",
        seed=recipe["seed"],
        least=min(errors),
        most=max(errors),
    )
