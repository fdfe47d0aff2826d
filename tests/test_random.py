"""Random shapes, families, paddings, chunks, caches and crops, against `reference.py` in float64."""

import copy
from functools import partial

import hypothesis.strategies as st
import pytest
import reference
import torch
from conftest import make_mla
from hypothesis import given, settings
from transformers import DynamicCache, StaticCache

from hf_mla import MLACache
from hf_mla.cache_mla import use_latent_layers
from hf_mla.layer_mla import MLARMSNorm


VOCABULARY, LONGEST = 31, 48
CACHES = ["latent"] * 4 + ["latent static", "DynamicCache", "DynamicCache()", "StaticCache", None]


def in_float64(model):
    """The library computes rotary angles and its RMSNorm in float32 whatever the type of the model; here neither is."""

    def rotary(x, position_ids):
        turn = reference.angles(position_ids, model.config.qk_rope_head_dim, model.config.rope_parameters["rope_theta"])
        return turn.cos().repeat(1, 1, 2), turn.sin().repeat(1, 1, 2)

    def norm(weight, eps, x):
        return x / reference.rms(x, eps) * weight

    model.double().model.rotary_emb.forward = rotary
    for module in model.modules():
        if hasattr(module, "variance_epsilon") and not isinstance(module, MLARMSNorm):
            module.forward = partial(norm, module.weight, module.variance_epsilon)
    return model


@st.composite
def models(draw):
    family = draw(st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3"]))
    heads = draw(st.integers(1, 6))
    shape = {
        "num_attention_heads": heads,
        "hidden_size": heads * draw(st.integers(2, 9)),
        "intermediate_size": draw(st.integers(1, 20)),
    }
    shape |= {"kv_lora_rank": draw(st.integers(1, 24)), "qk_rope_head_dim": 2 * draw(st.integers(1, 6))}
    shape |= {"qk_nope_head_dim": draw(st.integers(1, 17)), "v_head_dim": draw(st.integers(1, 17))}
    window = draw(st.integers(2, 12))
    if family == "Mistral":
        shape["sliding_window"] = window
    elif family == "Qwen2":  # of two layers, the second has the window
        shape |= {"use_sliding_window": draw(st.booleans()), "sliding_window": window, "max_window_layers": 1}
    elif family == "Qwen3":
        shape["num_key_norms"] = draw(st.sampled_from([g for g in range(heads + 1) if g == 0 or heads % g == 0]))
    else:
        shape["attention_bias"] = draw(st.booleans())
    return in_float64(make_mla(family, vocab_size=VOCABULARY, **shape))


def make_cache(kind, config, max_length):
    if kind == "latent":
        cache = DynamicCache(config=config)
        use_latent_layers(cache, config, max_length)
        return cache
    return {
        "latent static": partial(MLACache, config, max_cache_len=LONGEST),
        "DynamicCache": partial(DynamicCache, config=config),
        "DynamicCache()": DynamicCache,
        "StaticCache": partial(StaticCache, config=config, max_cache_len=LONGEST),
    }[kind]()


@pytest.mark.filterwarnings("ignore")
@settings(derandomize=True, deadline=None, max_examples=300, database=None)
@given(model=models(), kind=st.sampled_from(CACHES), data=st.data())
def test_any_session_equals_the_reference(model, kind, data):
    """Feed, crop, reorder, select, repeat and copy as they come; after each feed, all rows agree with the reference."""
    draw, growing = data.draw, kind in ("latent", "DynamicCache", "DynamicCache()")
    windowed = getattr(model.config, "sliding_window", None)
    cache = kind and make_cache(kind, model.config, draw(st.none() | st.integers(1, LONGEST)))
    recording = growing and draw(st.booleans())  # a window of the library's can be cropped if it was told to remember
    if recording:
        cache.activate_past_recording()
    gradients = growing and draw(st.sampled_from([False, False, True]))
    rows = draw(st.integers(1, 4))
    ids, real = torch.empty(rows, 0, dtype=torch.long), torch.empty(rows, 0, dtype=torch.bool)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    for _ in range(draw(st.integers(1, 8))):
        new = draw(st.integers(1, 12 if ids.shape[1] == 0 else 5))
        ids = torch.cat([ids, torch.randint(VOCABULARY, (rows, new), generator=generator)], 1)
        # Padding may be anywhere; with a window, which is counted in slots, only where no token came before.
        padding = torch.tensor(draw(st.lists(st.integers(0, new), min_size=rows, max_size=rows)))[:, None]
        left = draw(st.booleans()) or windowed
        padded = torch.arange(new) < padding if left else torch.arange(new) >= new - padding
        real = torch.cat([real, ~padded | (real.any(1, keepdim=True) if windowed else False)], 1)
        positions = (real.cumsum(1) - 1).clamp_min(0)
        mask = None if real.all() and draw(st.booleans()) else real.long()
        fed = ids.shape[1] if cache is None else new
        inference = kind == "latent" and not gradients and draw(st.booleans())
        with torch.inference_mode() if inference else torch.set_grad_enabled(gradients):
            logits = model(
                ids[:, -fed:],
                attention_mask=mask,
                position_ids=positions[:, -fed:],
                cache=cache,
                use_cache=cache is not None,
            ).logits
        for row in range(rows):
            last = real[row, -fed:]
            if last.any():
                expected = reference.logits(model, ids[row, real[row]])[-last.sum() :]
                error = (logits[row, last] - expected).abs().max().item()
                assert error < 1e-9, error
        if growing and (recording or not windowed):
            removed = draw(st.integers(0, min(new, ids.shape[1] - 1)))
            cache.crop(-removed)
            ids, real = ids[:, : ids.shape[1] - removed], real[:, : ids.shape[1] - removed]
        changes = ["none", "reorder"] + ["select"] * growing + ["repeat"] * (growing and rows < 4) + ["copy"] * (not gradients)
        change = draw(st.sampled_from(changes))
        if cache is None or change == "none":
            continue
        if change == "copy":
            cache = copy.deepcopy(cache)
            continue
        index = torch.tensor(draw(st.permutations(range(rows))))
        if change == "reorder":
            cache.reorder_cache(index)
        elif change == "select":
            index = index[: draw(st.integers(1, rows))]
            cache.batch_select_indices(index)
        else:
            index = torch.arange(rows).repeat_interleave(2)
            cache.batch_repeat_interleave(2)
        ids, real, rows = ids[index], real[index], len(index)
