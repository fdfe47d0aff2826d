"""The cache holds r + p numbers per token and layer, and survives what Transformers does to caches."""

import copy

import pytest
import torch
from conftest import make_mla
from transformers import AutoModelForCausalLM, DynamicCache

from hf_mla import LatentDynamicLayer, MLACache, cache_bytes


@pytest.mark.parametrize("batch", [1, 8])
def test_bytes_after_generating_1000_tokens(converted, batch):
    folder, report = converted
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.randint(3, 4096, (batch, 7))
    outputs = model.generate(prompt, min_new_tokens=1000, max_new_tokens=1000, do_sample=False, return_dict_in_generate=True)
    assert outputs.sequences.shape == (batch, 1007)
    cache = outputs.past_key_values
    assert all(type(layer) is LatentDynamicLayer for layer in cache.layers)
    tokens = 1006  # the last token was never fed back
    assert cache.get_seq_length() == tokens
    assert cache_bytes(cache) == batch * tokens * 6 * (report.kv_lora_rank + report.qk_rope_head_dim) * 4
    assert cache_bytes(cache) == batch * tokens * model.config.kv_bytes_per_token(itemsize=4)


def test_generate_gives_the_same_tokens_from_every_cache(converted):
    folder, _ = converted
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    prompt = torch.randint(3, 4096, (2, 9))
    expected = model.generate(prompt, use_cache=False, **options)
    for cache in (None, MLACache(model.config), MLACache(model.config, 64), DynamicCache(config=model.config)):
        assert torch.equal(model.generate(prompt, past_key_values=cache, **options), expected), cache
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), expected)
    beams = {"num_beams": 3, **options}
    assert torch.equal(model.generate(prompt, **beams), model.generate(prompt, use_cache=False, **beams))


def test_prompt_lookup_crops_the_cache(converted):
    folder, _ = converted
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    prompt = torch.randint(3, 4096, (1, 9)).repeat(1, 2)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **options), model.generate(prompt, **options))


@torch.no_grad()
def test_growth_is_amortised():
    """A thousand appended tokens move the buffer a few dozen times, not a thousand."""
    layer, buffers = LatentDynamicLayer(), set()
    for _ in range(1000):
        new = torch.randn(1, 1, 1, 32)
        layer.update(new, new[..., :0])
        buffers.add(layer._buffer.data_ptr())
    assert layer.get_seq_length() == 1000
    assert layer._buffer.shape[2] <= 1250
    assert len(buffers) < 40


@torch.no_grad()
def test_appending_equals_concatenating():
    torch.manual_seed(0)
    layer, reference = LatentDynamicLayer(max_length=20), None
    for size in (3, 1, 1, 5, 1, 8, 4):  # past max_length as well
        new = torch.randn(2, 1, size, 6)
        keys, values = layer.update(new, new[..., :0])
        reference = new if reference is None else torch.cat([reference, new], 2)
        assert torch.equal(keys, reference)
        assert values.shape == (2, 1, reference.shape[2], 0)


@torch.no_grad()
def test_crop_reorder_copy_and_reset(mla):
    ids = torch.randint(1, 97, (2, 20))
    expected = mla(ids, use_cache=False).logits

    def last(cache, rows=slice(None)):
        return mla(ids[rows, 19:], past_key_values=cache).logits[:, -1]

    cache = MLACache(mla.config)
    mla(ids[:, :19], past_key_values=cache)
    clone = copy.deepcopy(cache)
    assert torch.allclose(last(cache), expected[:, 19], atol=1e-5)
    cache.crop(-1)
    assert cache.get_seq_length() == 19
    assert torch.allclose(last(cache), expected[:, 19], atol=1e-5), "after a crop the same token is written again"
    assert clone.get_seq_length() == 19
    assert torch.allclose(last(clone), expected[:, 19], atol=1e-5), "a copy does not share memory"

    clone.crop(-1)
    clone.reorder_cache(torch.tensor([1, 0]))
    flipped = mla(ids.flip(0)[:, 19:], past_key_values=clone).logits[:, -1]
    assert torch.allclose(flipped, expected.flip(0)[:, 19], atol=1e-5)
    clone.crop(-1)
    clone.batch_select_indices(torch.tensor([1]))
    assert torch.allclose(last(clone, slice(0, 1)), expected[:1, 19], atol=1e-5)

    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache_bytes(cache) == 0
    mla(ids[:, :19], past_key_values=cache)
    assert torch.allclose(last(cache), expected[:, 19], atol=1e-5)


def test_prefill_in_inference_mode_then_decode_without(mla):
    ids = torch.randint(1, 97, (1, 10))
    cache = MLACache(mla.config)
    with torch.inference_mode():
        expected = mla(ids, use_cache=False).logits[:, -1].clone()
        mla(ids[:, :8], past_key_values=cache)
    with torch.no_grad():
        mla(ids[:, 8:9], past_key_values=cache)
        assert torch.allclose(mla(ids[:, 9:], past_key_values=cache).logits[:, -1], expected, atol=1e-5)


def test_cache_under_autograd(mla):
    """With gradients on, nothing is written in place: the loss through a cached prefix can be differentiated."""
    ids = torch.randint(1, 97, (1, 10))
    cache = MLACache(mla.config)
    mla(ids[:, :5], past_key_values=cache)
    mla(ids[:, 5:], past_key_values=cache).logits.sum().backward()
    assert mla.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.grad.abs().max() > 0


def test_config_states_the_cache_size():
    config = make_mla().config
    assert config.kv_floats_per_token_per_layer == 24 + 8
    assert config.kv_bytes_per_token(itemsize=2) == 2 * 32 * 2
