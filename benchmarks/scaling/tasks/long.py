"""One long sequence, and how long one could be."""

import statistics
import time

import torch
from llama_width import make_config, make_model

from hf_mla.cache_mla import CACHE_NAME, cache_of

from .process import DEVICE, peak, result


@torch.no_grad()
def long(layers: int, tiny: bool) -> None:
    """Prefill of one sequence in chunks and 32 tokens after it, at growing lengths; and what caches of the original take."""
    contexts, chunk = ([256, 512], 128) if tiny else ([65536, 131072, 524288], 4096)
    torch.manual_seed(0)
    model = make_model("converted", layers, tiny)
    model.config.max_position_embeddings = 1 << 20
    if DEVICE == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        weights = 2 * 8.03e9
        for name in ("gqa", "converted"):
            config = make_config(name, 32, tiny)
            width = config.kv_lora_rank + config.qk_rope_head_dim if name == "converted" else 2 * 8 * 128
            per_token = 32 * width * 2
            largest = int((total - weights - 4e9) / per_token)  # 4 GB: chunks of the prefill, the context of CUDA
            result(model=f"{name}, 8B, 32 layers", cache_bytes_per_token=per_token, largest_context_computed=largest, memory=total)
    for context in contexts:
        cache, ids = None, torch.randint(1000, (1, context), device=DEVICE)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        for part in ids.split(chunk, dim=1):
            outputs = model(part, **({CACHE_NAME: cache} if cache is not None else {}), use_cache=True, logits_to_keep=1)
            cache = cache_of(outputs)
        token = outputs.logits[:, -1:].argmax(-1)
        token.tolist()  # waits
        prefill, steps = time.perf_counter() - begun, []
        for _ in range(32):
            begun = time.perf_counter()
            token = model(token, **{CACHE_NAME: cache}).logits[:, -1:].argmax(-1)
            token.tolist()
            steps.append(1000 * (time.perf_counter() - begun))
        held = sum(layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)
        decoded = {"milliseconds_per_token": statistics.median(steps), "peak": peak(), "cache_bytes": held}
        result(context=context, layers=layers, chunk=chunk, prefill_seconds=prefill, **decoded)
        del cache, outputs
