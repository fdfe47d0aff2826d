"""What a quantized latent cache costs and saves: perplexity with the cache in use, and its bytes.

python benchmarks/quantized_cache.py MODEL TEXT [--tokens 16384] [--window 1024] [--chunk 64]

The text goes through the model a chunk at a time, so that all but the first tokens of a window attend to what the cache gives
back. Everything runs in the type that the checkpoint is stored in. The error of a ratio is its standard error over windows.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mla import MLACache, cache_bytes
from hf_mla.cache_mla import CACHE_NAME
from hf_mla_conversion.source.text import read_text, token_windows


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a converted checkpoint")
parser.add_argument("text", help="a .txt or .txt.xz file that neither training nor calibration saw")
parser.add_argument("--tokens", type=int, default=16384)
parser.add_argument("--window", type=int, default=1024)
parser.add_argument("--chunk", type=int, default=64)
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").to(device).eval()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
text = read_text(arguments.text, arguments.tokens, tokenizer=tokenizer)
windows = token_windows(text, tokenizer, arguments.tokens, arguments.window).to(device)

losses, sizes = {}, {}
with torch.inference_mode():
    for quantization in (None, "int8", "fp8"):
        losses[quantization] = torch.zeros(len(windows), dtype=torch.float64)  # nats per token of each window
        for index, ids in enumerate(windows):
            cache = MLACache(model.config, quantization=quantization)
            logits = torch.cat([model(part[None], **{CACHE_NAME: cache}).logits[0] for part in ids.split(arguments.chunk)])
            losses[quantization][index] = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:])
        tokens = cache.get_seq_length()
        one = MLACache(model.config, max_cache_len=tokens, quantization=quantization)  # allocates what its tokens take
        model(windows[:1], **{CACHE_NAME: one})
        sizes[quantization] = cache_bytes(one) / tokens

config = model.config
print(f"{windows.numel():,} tokens in windows of {windows.shape[1]}, {arguments.chunk} at a time; {model.dtype} on {device}")
print(f"latent {config.kv_lora_rank} + rotary key {config.qk_rope_head_dim} + key norms {config.num_key_norms}")
print(f"{'cache':16}{'perplexity':>12}{'ratio':>20}{'bytes/token':>13}{'share':>8}")
for quantization, loss in losses.items():
    difference = loss - losses[None]
    error = difference.std().item() / len(difference) ** 0.5 if len(difference) > 1 else float("nan")
    ratio = f"{difference.mean().exp():.5f} +- {error:.5f}"
    share = sizes[quantization] / sizes[None]
    print(f"{quantization or model.dtype!s:16}{loss.mean().exp():12.4f}{ratio:>20}{sizes[quantization]:13,.0f}{share:8.3f}")
