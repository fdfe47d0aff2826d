"""Quantized latent caches: what is stored, what it costs, and that all that is done to caches can be done to them."""

import copy
import io

import pytest
import torch
from conftest import VALIDATION, make_mla
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_mla import LlamaMLAConfig, MLACache, cache_bytes, cache_of
from hf_mla.cache_mla import CACHE_NAME, LARGEST_CODE, QUANTIZATIONS, dequantize, quantize
from hf_mla_conversion.source.text import read_text, token_windows


both = pytest.mark.parametrize("quantization", ["int8", "fp8"])
mode = pytest.mark.mode(
    "Quantized cache, int8 or fp8",
    since="5.15",
    costs="r + 2 (p + 1) bytes a token (bf16), and 2 for each key norm; perplexity +0.1 % (fp8 +0.3 %) at most",
)
GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_of_a_code(quantization, dtype):
    """Half a step of the token's scale for int8; 2**-4 of the number for fp8, or half the smallest step near zero."""
    torch.manual_seed(0)
    latent = torch.randn(2, 1, 50, 24 + 8) * torch.logspace(-1, 3, 50).unsqueeze(-1)
    latent[0, 0, 0] = 0
    latent[:, 0, 1:10, 3] *= 50  # one channel far beyond the others
    latent = latent.to(dtype)
    codes, rest = quantize(latent, 24, QUANTIZATIONS[quantization])
    assert codes.dtype == QUANTIZATIONS[quantization]
    assert rest.dtype == dtype
    assert torch.equal(rest[..., :-1], latent[..., 24:])

    exact, scale = latent[..., :24].double(), rest[..., -1:].double()
    error = (codes.double() * scale - exact).abs()
    rounding = 1e-5 * scale  # of the division, in float32
    bound = scale / 2 if quantization == "int8" else torch.maximum(exact.abs() * 2**-4, scale * 2**-10)
    assert (error <= bound + rounding).all()
    largest = codes.double().abs().amax(-1)
    assert largest[0, 0, 0] == 0
    assert (largest.flatten()[1:] >= 0.99 * LARGEST_CODE[codes.dtype]).all(), "the range of codes is used"
    assert torch.allclose(dequantize(codes, rest)[..., :24].double(), codes.double() * scale, rtol=2**-8, atol=0)


@mode
@both
@pytest.mark.parametrize("batch", [1, 8])
def test_bytes_after_1000_tokens(quantization, batch):
    model = make_mla("Qwen3", num_key_norms=2, max_position_embeddings=1024).bfloat16()
    prompt = torch.randint(1, 97, (batch, 950))
    quantized = {"cache_implementation": "quantized", "cache_config": {"backend": quantization}}
    new = {"max_new_tokens": 51, "min_new_tokens": 51}  # the last token is not fed back
    growing = cache_of(model.generate(prompt, do_sample=False, return_dict_in_generate=True, **new, **quantized))
    static = MLACache(model.config, max_cache_len=1000, quantization=quantization)
    with torch.no_grad():
        model(prompt, cache=static)
    for cache in (growing, static):
        assert cache_bytes(cache) == batch * 1000 * 2 * (24 + 2 * (8 + 2 + 1))
    assert growing.get_seq_length() == 1000


@both
@pytest.mark.parametrize("length", [None, 16])
def test_642_bytes_of_1152(quantization, length):
    """DeepSeek's dimensions in bfloat16: 512 codes of one byte, 64 numbers of the rotary key and the scale."""
    config = LlamaMLAConfig(kv_lora_rank=512, qk_rope_head_dim=64, num_hidden_layers=1)
    for kind, size in ((None, 1152), (quantization, 642)):
        cache = MLACache(config, length, quantization=kind)
        new = torch.randn(1, 1, 16, 576, dtype=torch.bfloat16)
        cache.update(new, new[..., :0], 0)
        assert cache_bytes(cache) == 16 * size


def save_and_load(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_place(operation):
    """An operation on a cache, as a function that returns the cache."""
    return lambda cache: operation(cache) or cache


OPERATIONS = {
    "crop": (in_place(lambda cache: cache.crop(-4)), lambda x: x[:, :, :-4]),
    "reorder": (in_place(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))), lambda x: x[[2, 0, 0]]),
    "repeat": (in_place(lambda cache: cache.batch_repeat_interleave(2)), lambda x: x.repeat_interleave(2, 0)),
    "select": (in_place(lambda cache: cache.batch_select_indices(torch.tensor([1]))), lambda x: x[1:2]),
    "offload": (in_place(lambda cache: [layer.offload() for layer in cache.layers].clear()), lambda x: x),
    "reset": (in_place(lambda cache: cache.reset()), lambda x: x[:, :, :0]),
    "deepcopy": (copy.deepcopy, lambda x: x),
    "save and load": (save_and_load, lambda x: x),
}


@both
@pytest.mark.parametrize("operation", OPERATIONS)
@torch.no_grad()
def test_operations_equal_a_fresh_cache(quantization, operation):
    """After every operation and two more tokens the cache gives what a fresh one fed the same tokens gives, bit for bit."""
    torch.manual_seed(0)
    config = make_mla(num_hidden_layers=1).config
    latent, cache = torch.randn(3, 1, 13, 24 + 8), MLACache(config, quantization=quantization)
    for part in latent.split([9, 1, 3], dim=2):
        cache.update(part, part[..., :0], 0)
    change, expected_change = OPERATIONS[operation]
    changed, expected = change(cache), expected_change(latent)
    for _ in range(2):
        new = torch.randn(expected.shape[0], 1, 1, 24 + 8)
        expected = torch.cat([expected, new], 2)
        after = changed.update(new, new[..., :0], 0)
        fresh = MLACache(config, quantization=quantization).update(expected, expected[..., :0], 0)
        assert torch.equal(dequantize(*after), dequantize(*fresh))
        assert changed.get_seq_length() == expected.shape[2]
    if changed is not cache:
        assert cache.get_seq_length() == 13, "a copy does not share memory"


@mode
@both
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])
def test_generate(quantization, family):
    """By name and by cache, growing and static, with a sliding window (Mistral) and with key norms (Qwen3)."""
    model = make_mla(family, **{"Mistral": {"sliding_window": 12}, "Qwen3": {"num_key_norms": 2}}.get(family, {}))
    prompt = torch.randint(1, 97, (2, 9))
    cache_config = {"backend": quantization}
    options = {"cache_implementation": "quantized", "cache_config": cache_config, "return_dict_in_generate": True, **GREEDY}
    outputs = model.generate(prompt, **options)
    assert cache_config == {"backend": quantization}
    assert isinstance(cache_of(outputs), DynamicCache)
    for cache in (cache_of(outputs), static := MLACache(model.config, 33, quantization=quantization)):
        assert all(layer.code_dtype == QUANTIZATIONS[quantization] for layer in cache.layers)
    expected = outputs.sequences
    for cache in (MLACache(model.config, quantization=quantization), static):
        assert torch.equal(model.generate(prompt, **{CACHE_NAME: cache}, **GREEDY), expected)
    static.reset()
    assert torch.equal(model.generate(prompt, **{CACHE_NAME: static}, **GREEDY), expected)
    beams = [
        model.generate(prompt, num_beams=3, **{CACHE_NAME: MLACache(model.config, length, quantization=quantization)}, **GREEDY)
        for length in (None, 33)
    ]
    assert torch.equal(*beams)

    padded = torch.nn.functional.pad(prompt[:1], (4, 0))
    mask = (padded != 0).long()
    assert torch.equal(model.generate(padded, attention_mask=mask, **options).sequences[:, 4:], expected[:1])


def test_int8_unless_something_else_is_asked_for(mla):
    outputs = mla.generate(torch.tensor([[5]]), cache_implementation="quantized", max_new_tokens=3, return_dict_in_generate=True)
    assert {layer.code_dtype for layer in cache_of(outputs).layers} == {torch.int8}


@both
def test_prompt_lookup(quantization, mla):
    prompt = torch.randint(1, 97, (1, 9)).repeat(1, 2)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": quantization}, **GREEDY}
    assert torch.equal(mla.generate(prompt, prompt_lookup_num_tokens=3, **options), mla.generate(prompt, **options))


@torch.no_grad()
def test_rotary_keys_and_key_norms_are_stored_as_they_are():
    model = make_mla("Qwen3", num_key_norms=2)
    ids = torch.randint(1, 97, (2, 16))
    plain, quantized = MLACache(model.config), MLACache(model.config, quantization="int8")
    for cache in (plain, quantized):
        model(ids, cache=cache)
    assert torch.equal(plain.layers[0].keys[..., 24:], quantized.layers[0].values[..., :-1])


def test_prefill_in_inference_mode_and_decoding_under_autograd(mla):
    ids = torch.randint(1, 97, (1, 10))
    logits = []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        cache = MLACache(mla.config, quantization="int8")
        with mode():
            mla(ids[:, :8], cache=cache)
        mla(ids[:, 8:9], cache=cache)
        logits.append(mla(ids[:, 9:], cache=cache).logits)
        assert not cache.layers[0].values.requires_grad
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert torch.allclose(logits[0], logits[2], atol=1e-5)


def test_refusals(mla):
    with pytest.raises(ValueError, match="quantization is 'int4'; it must be None or one of 'int8', 'fp8'"):
        MLACache(mla.config, quantization="int4")
    for cache_config in ({"backend": "quanto"}, {"backend": "int8", "nbits": 4}):
        with pytest.raises(ValueError, match="it must be one of {'backend': 'int8'}, {'backend': 'fp8'}"):
            mla.generate(torch.tensor([[5]]), cache_implementation="quantized", cache_config=cache_config)
    with pytest.raises(ValueError, match="cache_implementation"):
        mla.generate(torch.tensor([[5]]), cache_implementation="quantized", **{CACHE_NAME: MLACache(mla.config)})


@mode
@torch.inference_mode()
def test_perplexity(converted):
    """On the trained model, with tokens attending to quantized ones: int8 within 0.1 %, fp8 within 0.3 %."""
    folder, _ = converted
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = token_windows(read_text(VALIDATION, 8192), AutoTokenizer.from_pretrained(folder), 8192, 512)
    losses = {}
    for quantization in (None, "int8", "fp8"):
        cache = MLACache(model.config, quantization=quantization)
        logits = torch.cat([model(part, cache=cache).logits for part in windows.split(128, dim=1)], dim=1)
        losses[quantization] = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()
    assert losses["int8"] - losses[None] < 0.001
    assert losses["fp8"] - losses[None] < 0.003
    assert len(set(losses.values())) == 3, "the quantized caches were used"
