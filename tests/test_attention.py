"""Expanded and absorbed attention agree, and the absorbed path never forms keys or values of cached tokens."""

import copy

import pytest
import torch
from conftest import make_mla
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from hf_mla import MLACache, attention_mla, cache_bytes
from hf_mla.attention_mla import absorbed_attention, absorbing_is_cheaper
from hf_mla.cache_mla import CACHE_NAME


def caches(config, length):
    return {
        "latent": MLACache(config),
        "latent static": MLACache(config, max_cache_len=length),
        "DynamicCache": DynamicCache(config=config),
        "DynamicCache()": DynamicCache(),
        "StaticCache": StaticCache(config=config, max_cache_len=length),
    }


def feed(model, ids, cache, sizes):
    """Logits of feeding `ids` in pieces of the given sizes."""
    parts, seen = [], 0
    for size in sizes:
        parts.append(model(ids[:, seen : seen + size], cache=cache).logits)
        seen += size
    assert seen == ids.shape[1]
    return torch.cat(parts, dim=1)


CHUNKS = {"token by token": [20] + [1] * 12, "chunked prefill": [12, 3, 5, 4, 2, 6], "three at a time": [20, 3, 3, 3, 3]}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("padding", [0, 7], ids=["plain", "left-padded"])
@pytest.mark.parametrize("kind", ["latent", "latent static", "DynamicCache", "DynamicCache()", "StaticCache"])
@torch.no_grad()
def test_absorbed_equals_expanded(kind, padding, sizes, implementation, monkeypatch):
    model = make_mla(attn_implementation=implementation)
    ids = torch.randint(1, 97, (3, 32))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert expected.std() > 0.3

    taken = []
    decide = attention_mla.should_absorb
    monkeypatch.setattr(attention_mla, "should_absorb", lambda *a: taken.append(decide(*a)) or taken[-1])
    cache = caches(model.config, 40)[kind]
    parts, seen = [], 0
    for size in sizes:
        step = slice(seen, seen + size)
        outputs = model(ids[:, step], attention_mask=mask[:, : seen + size], position_ids=positions[:, step], cache=cache)
        parts.append(outputs.logits)
        seen += size
    assert any(taken), "the absorbed path was never taken"
    real = mask.bool()
    error = (torch.cat(parts, 1) - expected)[real].abs().max().item()
    assert error < 1e-5, error


def test_latents_apart_and_sinks():
    """Rotary keys in a tensor of their own change nothing; a sink is one more token, of a given score and with zero as value."""
    shapes = (2, 4, 3, 12), (2, 4, 3, 8), (2, 1, 20, 24 + 8), (4 * 22, 24), (2, 1, 3, 20), (4,)
    q_nope, q_rope, latent, weight, mask, sinks = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    apart = latent.split([24, 8], dim=-1)
    expected, weights = absorbed_attention(q_nope, q_rope, latent, weight, mask, 0.3)
    output, _ = absorbed_attention(q_nope, q_rope, apart[0], weight, mask, 0.3, rest=apart[1])
    assert (output - expected).abs().max() < 1e-13

    raw = torch.einsum("bhtn,hnr,bsr->bhts", q_nope, weight.view(4, 22, 24)[:, :12], latent[:, 0, :, :24])
    raw = (raw + torch.einsum("bhtp,bsp->bhts", q_rope, latent[:, 0, :, 24:])) * 0.3 + mask
    assert (weights - raw.softmax(-1)).abs().max() < 1e-12
    share = raw.logsumexp(-1).sub(sinks.view(4, 1)).sigmoid()  # what the sink leaves to the tokens
    output, sunk = absorbed_attention(q_nope, q_rope, latent, weight, mask, 0.3, sinks=sinks)
    assert (output - expected * share.transpose(1, 2).unsqueeze(-1)).abs().max() < 1e-12
    assert (sunk - weights * share.unsqueeze(-1)).abs().max() < 1e-12


@torch.no_grad()
def test_bfloat16_paths_agree():
    """To bfloat16's own accuracy: as close to the float32 model as the expanded bfloat16 path is, within a factor of two."""
    model = make_mla()
    ids = torch.randint(1, 97, (2, 48))
    exact = model(ids, use_cache=False).logits
    model.bfloat16()
    expanded = model(ids, use_cache=False).logits.float()
    absorbed = feed(model, ids, MLACache(model.config), [16] + [1] * 32).float()
    assert (absorbed - exact).square().mean().sqrt() < 2 * (expanded - exact).square().mean().sqrt()


def test_absorbed_attention_against_float64_definition():
    """The formula of the module's docstring, token by token and head by head."""
    batch, heads, tokens, cached, rank, rope, nope, value = 2, 3, 2, 9, 5, 4, 6, 7
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    q_nope, q_rope = torch.randn(batch, heads, tokens, nope, **double), torch.randn(batch, heads, tokens, rope, **double)
    latent, weight = torch.randn(batch, 1, cached, rank + rope, **double), torch.randn(heads * (nope + value), rank, **double)
    mask = torch.rand(batch, 1, tokens, cached) < 0.7
    mask[..., 0] = True
    output, weights = absorbed_attention(q_nope, q_rope, latent, weight, mask, 0.3)
    per_head = weight.view(heads, nope + value, rank)
    for b in range(batch):
        for h in range(heads):
            for s in range(tokens):
                scores = torch.full((cached,), -torch.inf, **double)
                for t in range(cached):
                    c, k_rope = latent[b, 0, t, :rank], latent[b, 0, t, rank:]
                    if mask[b, 0, s, t]:
                        scores[t] = 0.3 * (q_nope[b, h, s] @ (per_head[h, :nope] @ c) + q_rope[b, h, s] @ k_rope)
                probabilities = scores.softmax(0)
                expected = per_head[h, nope:] @ (probabilities @ latent[b, 0, :, :rank])
                assert torch.allclose(weights[b, h, s], probabilities, atol=1e-12)
                assert torch.allclose(output[b, s, h], expected, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation produced."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@torch.no_grad()
def test_decoding_never_forms_keys_or_values(monkeypatch):
    """No operation of a decode step yields a tensor as large as the keys of the cached tokens without their rotary part."""
    model = make_mla(num_attention_heads=8, hidden_size=64)
    config, cached = model.config, 600
    keys = cached * config.num_attention_heads * config.qk_nope_head_dim
    cache = MLACache(config)
    model(torch.randint(1, 97, (1, cached)), cache=cache)
    with LargestTensor() as absorbed:
        model(torch.tensor([[5]]), cache=cache)
    # The largest is the cache itself, when its buffer grows: R + P numbers a token, with a quarter to spare.
    assert absorbed.elements <= 1.3 * cached * (config.kv_lora_rank + config.qk_rope_head_dim) < keys
    # Transformers' way, for contrast: the same step expanded does form them.
    monkeypatch.setattr(attention_mla, "should_absorb", lambda *_: False)
    with LargestTensor() as expanded:
        model(torch.tensor([[5]]), cache=cache)
    assert expanded.elements >= keys


def test_cost_decides():
    """DeepSeek-V2's shapes: decoding and short chunks absorb, prefill and long chunks expand."""
    dims = (512, 64, 128, 128)
    assert absorbing_is_cheaper(1, 4096, *dims)
    assert absorbing_is_cheaper(16, 4096, *dims)
    assert not absorbing_is_cheaper(4096, 4096, *dims)
    assert not absorbing_is_cheaper(1024, 65536, *dims)
    assert not absorbing_is_cheaper(1, 1, *dims)
    # Where the weights must be recovered from an adapter, a short cache is expanded.
    assert not absorbing_is_cheaper(1, 100, *dims, weight_cost=512 * 512 * 256)


def test_training_takes_the_expanded_path_and_gradients_flow(mla):
    mla.train()
    ids = torch.randint(1, 97, (2, 16))
    mla(ids, labels=ids).loss.backward()
    for name, parameter in mla.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_adapter_on_kv_b_proj_counts_in_decoding(mla, use_dora):
    """Reading kv_b_proj.weight would ignore the adapter silently."""
    ids = torch.randint(1, 97, (2, 64))
    base = mla(ids).logits.detach()
    config = LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False, use_dora=use_dora)
    model = get_peft_model(copy.deepcopy(mla), config).eval()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        assert (expected - base).abs().max() > 0.1
        cache = MLACache(mla.config)
        parts = [model(input_ids=ids[:, :40], cache=cache).logits]
        parts += [model(input_ids=part, cache=cache).logits for part in ids[:, 40:].split(1, dim=1)]
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_attentions_are_returned(mla):
    mla.set_attn_implementation("eager")
    ids = torch.randint(1, 97, (2, 12))
    whole = mla(ids, output_attentions=True).attentions
    cache = MLACache(mla.config)
    mla(ids[:, :11], cache=cache)
    last = mla(ids[:, 11:], cache=cache, output_attentions=True).attentions
    assert len(whole) == len(last) == 2
    for all_rows, row in zip(whole, last, strict=True):
        assert (all_rows[:, :, -1:] - row).abs().max() < 1e-5


@torch.no_grad()
def test_batch_of_64(mla):
    ids = torch.randint(1, 97, (64, 24))
    cache = MLACache(mla.config)
    error = (feed(mla, ids, cache, [16] + [1] * 8) - mla(ids, use_cache=False).logits).abs().max()
    assert error < 1e-5
    assert cache_bytes(cache) >= 64 * 24 * 2 * 32 * 4


class Operations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("static", [True, False], ids=["static", "growing"])
def test_operations_of_a_step(static):
    """Beside reading weights, it is their number that a step costs on a CPU. A layer of Llama takes some 80."""

    def operations(family, layers):
        shape = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "vocab_size": 97,
            "num_hidden_layers": layers,
        }
        config = LlamaConfig(**shape, num_key_value_heads=2)
        model = LlamaForCausalLM(config) if family == "Llama" else make_mla(**shape)
        growing = DynamicCache(config=config) if family == "Llama" else MLACache(model.config)
        cache = StaticCache(model.config, max_cache_len=40) if static else growing
        ids = torch.randint(3, 97, (1, 9))
        with torch.no_grad():
            model.eval()(ids, **{CACHE_NAME: cache})
            with Operations() as step:
                model(ids[:, :1], **{CACHE_NAME: cache})
        return step.count

    ours, llamas = (operations(family, 3) - operations(family, 2) for family in ("MLA", "Llama"))
    assert ours <= llamas + 32
