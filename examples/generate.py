# SPDX-License-Identifier: Apache-2.0
"""Convert the bundled model, load it as remote code, and stream a continuation while watching its cache.

python examples/generate.py ["A prompt"]
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from hf_mla import cache_bytes, cache_of
from hf_mla_conversion import convert
from hf_mla_conversion.source.text import BUNDLED


with tempfile.TemporaryDirectory() as scratch:
    out = str(Path(scratch) / "bundled-mla")
    # In closed form, for the example's sake; leave `steps` and `calibration_tokens` out for a good conversion.
    report = convert(str(BUNDLED / "model"), out, kv_lora_rank=80, qk_rope_head_dim=16, steps=0, calibration_tokens=4096)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(out)

    prompt = sys.argv[1] if len(sys.argv) > 1 else "The captain looked at the sea and"
    inputs = tokenizer(prompt, return_tensors="pt")
    streamer = TextStreamer(tokenizer)
    outputs = model.generate(**inputs, max_new_tokens=60, streamer=streamer, return_dict_in_generate=True)

    cached = outputs.sequences.shape[1] - 1  # the last token was never fed back
    print(f"\ncached {cached} tokens in {cache_bytes(cache_of(outputs)):,} bytes;")
    print(f"the original takes {report.kv_ratio:.2f} to 1: {cache_bytes(cache_of(outputs)) / report.kv_ratio:,.0f} bytes")
