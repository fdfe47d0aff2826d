"""The cache holds r + p numbers per token and layer, and survives what Transformers does to caches."""

import copy
import pickle

import pytest
import torch
from conftest import make_mla
from transformers import AutoModelForCausalLM

from hf_mla import LatentDynamicLayer, MLACache, cache_bytes, cache_of


def test_bytes_after_generating_1000_tokens(converted):
    (folder, report), batch = converted, 2
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.randint(3, 4096, (batch, 7))
    outputs = model.generate(prompt, min_new_tokens=1000, max_new_tokens=1000, do_sample=False, return_dict_in_generate=True)
    assert outputs.sequences.shape == (batch, 1007)
    cache = cache_of(outputs)
    assert all(type(layer) is LatentDynamicLayer for layer in cache.layers)
    tokens = 1006  # the last token was never fed back
    assert cache.get_seq_length() == tokens
    assert cache_bytes(cache) == batch * tokens * 6 * (report.kv_lora_rank + report.qk_rope_head_dim) * 4
    assert cache_bytes(cache) == batch * tokens * model.config.kv_bytes_per_token(itemsize=4)
    with torch.no_grad():
        logits = model(outputs.sequences[:, :-1], use_cache=False).logits[:, 6:]
    chosen = logits.gather(2, outputs.sequences[:, 7:, None]).squeeze(2)
    assert (logits.amax(-1) - chosen).max() < 1e-4, "each token is the likeliest after those before it"


@torch.no_grad()
def test_growth_is_amortised():
    """A thousand appended tokens move the buffer a few dozen times, not a thousand."""
    layer, buffers = LatentDynamicLayer(), set()
    for _ in range(1000):
        new = torch.randn(1, 1, 1, 32)
        layer.update(new, new[..., :0])
        buffers.add(layer.keys.data_ptr())
    assert layer.get_seq_length() == 1000
    assert layer.buffers[0].tensor.shape[2] <= 1250
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
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_go_on_by_themselves(duplicate):
    new = torch.randn(2, 1, 8, 6)
    layer = LatentDynamicLayer(max_length=64)
    for part in new[:, :, :6].split(2, dim=2):
        layer.update(part, part[..., :0])
    twin = duplicate(layer)
    assert type(twin) is LatentDynamicLayer and twin.buffers[0].max_length == 64
    for either, last in ((layer, new[:, :, 6:]), (twin, -new[:, :, 6:])):
        either.update(last, last[..., :0])
    assert torch.equal(layer.keys, new)
    assert torch.equal(twin.keys, torch.cat([new[:, :, :6], -new[:, :, 6:]], dim=2))


@torch.no_grad()
def test_a_deep_copy_has_no_spare_room(mla):
    cache = MLACache(mla.config)
    for part in torch.randint(1, 97, (2, 9)).split([8, 1], dim=1):
        mla(part, cache=cache)
    assert cache_bytes(cache) == 2 * 11 * mla.config.kv_bytes_per_token(itemsize=4)
    assert cache_bytes(copy.deepcopy(cache)) == 2 * 9 * mla.config.kv_bytes_per_token(itemsize=4)


def test_prefill_in_inference_mode_then_decode_without(mla):
    ids = torch.randint(1, 97, (1, 10))
    cache = MLACache(mla.config)
    with torch.inference_mode():
        expected = mla(ids, use_cache=False).logits[:, -1].clone()
        mla(ids[:, :8], cache=cache)
    with torch.no_grad():
        mla(ids[:, 8:9], cache=cache)
        assert torch.allclose(mla(ids[:, 9:], cache=cache).logits[:, -1], expected, atol=1e-5)


def test_cache_under_autograd(mla):
    """With gradients on, nothing is written in place: the loss through a cached prefix can be differentiated."""
    ids = torch.randint(1, 97, (1, 10))
    cache = MLACache(mla.config)
    mla(ids[:, :5], cache=cache)
    mla(ids[:, 5:], cache=cache).logits.sum().backward()
    assert mla.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.grad.abs().max() > 0


def test_config_states_the_cache_size():
    config = make_mla().config
    assert config.kv_floats_per_token_per_layer == 24 + 8
    assert config.kv_bytes_per_token(itemsize=2) == 2 * 32 * 2
