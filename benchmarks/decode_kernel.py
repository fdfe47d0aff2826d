"""One layer's attention of a decode step on one GPU: this project's kernel against what else could do it, side by side.

python benchmarks/decode_kernel.py [--out FILE]

Random bfloat16 data, 512 + 64 latents, heads of 128; every time is the median over replays of a captured graph, with the 10th and
90th percentiles. The floor is the bytes of the latents over the speed of a device-to-device copy, measured in the same run.

* kernel: absorbed attention by `latent_decode`, all tokens attended to; masked: with a mask, as a static cache brings one, and the
  range that it leaves, which a step finds once for all its layers; int8: a quantized cache.
* gqa_flash: the original, 8 heads of keys and values, by PyTorch's FlashAttention; gqa_packed: the heads that share a key
  given to it as so many tokens.
* torch: absorbed attention in matrix products and softmax of PyTorch, what runs where Triton is missing.
* reexpansion: keys and values of all heads formed from the latents at every step, then PyTorch's attention, as Transformers does.
"""

import argparse
import json
from pathlib import Path

import torch
import triton
from llama_width import machine
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention
from triton.testing import do_bench, do_bench_cudagraph

from hf_mla.decode_triton import attended_range, latent_decode


SHAPES = [(64, 8192, 32), (128, 4096, 32), (16, 8192, 32), (1, 131072, 32), (64, 8192, 16), (64, 8192, 64)]
SHAPES += [(64, 4096, 128), (16, 8192, 128), (1, 65536, 128)]
RANK, ROPE, HEAD, KV_HEADS = 512, 64, 128, 8

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", help="a JSON file to write")
arguments = parser.parse_args()


def milliseconds(function):
    """Median, 10th and 90th percentile."""
    return do_bench_cudagraph(function, rep=60, quantiles=[0.5, 0.1, 0.9])


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def contestants(batch, context, heads):
    """Names and functions that each attend from one new token."""
    latent, query = random(batch, context, RANK + ROPE), random(batch, heads, 1, RANK + ROPE)
    parts = latent[..., :RANK], latent[..., RANK:]
    scale = (HEAD + ROPE) ** -0.5
    yield "kernel", lambda: latent_decode(query, *parts, RANK, scale)
    mask = torch.ones(batch, 1, 1, context, dtype=torch.bool, device="cuda")
    attended = attended_range(mask)
    yield "masked", lambda: latent_decode(query, *parts, RANK, scale, mask, attended)
    codes, rest = torch.randint(-127, 128, parts[0].shape, dtype=torch.int8, device="cuda"), random(batch, context, ROPE + 1)
    yield "int8", lambda: latent_decode(query, codes, rest, RANK, scale)

    def in_torch():
        scores = query[:, :, 0] @ latent.transpose(1, 2) * scale
        return scores.softmax(-1, dtype=torch.float32).to(torch.bfloat16) @ latent[..., :RANK]

    yield "torch", in_torch
    key, value = random(batch, KV_HEADS, context, HEAD), random(batch, KV_HEADS, context, HEAD)
    original = random(batch, heads, 1, HEAD)

    def flash():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(original, key, value, enable_gqa=True)

    yield "gqa_flash", flash
    original_packed = original.view(batch, KV_HEADS, -1, HEAD)

    def packed():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(original_packed, key, value)

    yield "gqa_packed", packed
    weight, wide = random(heads * 2 * HEAD, RANK), random(batch, heads, 1, HEAD + ROPE)

    def expand():
        key, value = linear(parts[0], weight).unflatten(-1, (heads, -1)).transpose(1, 2).split(HEAD, dim=-1)
        key = torch.cat([key, parts[1].unsqueeze(1).expand(-1, heads, -1, -1)], dim=-1)
        return scaled_dot_product_attention(wide, key, value)

    yield "reexpansion", expand


source, target = torch.randn(2, 1 << 30, device="cuda", dtype=torch.bfloat16).view(torch.uint8)
speed = 2 * source.numel() / do_bench(lambda: target.copy_(source), return_mode="median") / 1e9  # bytes read and written
print(machine(), "triton", triton.__version__, f"copy {speed:.2f} TB/s")
rows = []
for batch, context, heads in SHAPES:
    floor = batch * context * (RANK + ROPE) * 2 / speed / 1e9
    row = {"batch": batch, "context": context, "heads": heads, "latent": f"{RANK} + {ROPE}", "floor": floor}
    row |= {"milliseconds": {}, "spread": {}}
    for name, function in contestants(batch, context, heads):
        try:
            median, *row["spread"][name] = milliseconds(function)
        except torch.OutOfMemoryError:
            median = None
        row["milliseconds"][name] = median
    rows.append(row)
    times = "  ".join(f"{name} {time:.4f}" if time else f"{name} -" for name, time in row["milliseconds"].items())
    print(f"{batch:4} x {context:6}, {heads:3} heads: floor {floor:.4f}  {times}", flush=True)
    torch.cuda.empty_cache()
if arguments.out:
    report = {"machine": machine() | {"triton": triton.__version__}, "copy_terabytes_per_second": speed, "rows": rows}
    Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")
