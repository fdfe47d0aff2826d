"""Continuous batching: `generate_batch` over pages of packed latents equals `generate`, and the pages hold no more than those."""

import copy
import gc
import sys
from unittest import mock

import pytest
import torch
import transformers
from conftest import make_mla
from native_models import TYPES, absorbing, native
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_mla import attention_mla
from hf_mla.configuration_mla import release
from hf_mla.native_mla import attend


ARRIVED = release(transformers.__version__) >= (5, 19)
PREFIX = list(range(20, 60))
PROMPTS = [PREFIX + [61, 62], PREFIX + [71, 72, 73], [5, 6, 7], list(range(11, 90))]  # a shared beginning, short, long


def settings(tokens=24, **changes):
    """Greedy, and no token ends a sequence: all are of the same length."""
    return GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, **changes)


def expected(model, prompts, tokens=24):
    """What `generate` makes of each prompt alone, by recomputing all keys and values at every step."""
    config = settings(tokens, use_cache=False)
    return [model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist() for prompt in prompts]


def batched(model, prompts, monkeypatch, tokens=24):
    """What `generate_batch` makes of all prompts, and the numbers that a token takes in the pages of each layer."""
    from transformers.generation.continuous_batching import cache as paging

    sizes = []

    class Watched(paging.PagedAttentionCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            layers = self.config.num_hidden_layers
            views = [self.layer_to_allocator[layer]._kv_token_views[layer] for layer in range(layers)]
            sizes.extend(key[0].numel() + value[0].numel() for key, value in views)

    monkeypatch.setattr("transformers.generation.continuous_batching.continuous_api.PagedAttentionCache", Watched)
    monkeypatch.setattr(gc, "collect", lambda: None)  # which the library does twice, and takes longer than all else
    config = ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=64)  # the long prompt comes in chunks
    outputs = model.generate_batch(
        inputs=prompts, generation_config=settings(tokens), continuous_batching_config=config, progress_bar=False, warmup=False
    )
    results = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [results[tuple(prompt)] for prompt in prompts], sizes


@pytest.mark.skipif(not ARRIVED, reason="Transformers hands the pages to the attention since 5.19")
@pytest.mark.mode(
    "Continuous batching",
    since="5.19",
    costs="pages of r + p numbers a token (an even number), never quantized; not the block-table kernel of flash",
)
@pytest.mark.parametrize(
    ("family", "implementation", "changes"),
    [
        ("Llama", "sdpa", {}),
        ("Llama", "eager", {}),
        ("Llama", "sdpa", {"kv_lora_rank": 23}),  # an odd number: one is added
        ("Mistral", "sdpa", {"sliding_window": 32}),
        ("Qwen2", "sdpa", {}),
        ("Qwen3", "sdpa", {"num_key_norms": 2}),
    ],
)
def test_a_batch_equals_generate(family, implementation, changes, monkeypatch):
    model = make_mla(family, **changes)
    model.set_attn_implementation(implementation)
    results, sizes = batched(model, PROMPTS, monkeypatch)
    assert results == expected(model, PROMPTS)
    floats = model.config.kv_floats_per_token_per_layer
    assert sizes == [floats + floats % 2] * model.config.num_hidden_layers
    assert model.config.head_dim == model.config.qk_rope_head_dim  # as before


DENSE = ["axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "mistral4", "youtu"]


@pytest.mark.skipif(not ARRIVED, reason="Transformers hands the pages to the attention since 5.19")
@pytest.mark.mode(
    "The library's own MLA models, continuous batching",
    since="5.19",
    costs="as for ours, by SDPA unless FlashAttention is named as the base; not with sparse or linear attention",
)
@pytest.mark.parametrize("name", DENSE)
def test_native_models_in_a_batch(name, monkeypatch):
    model, layers = absorbing(name), native(name).config.num_hidden_layers
    with mock.patch.object(attention_mla, "absorbed_attention", wraps=attention_mla.absorbed_attention) as absorbed:
        results, sizes = batched(model, PROMPTS, monkeypatch)
    assert results == expected(native(name), PROMPTS)
    assert sizes == [24 + 8] * layers  # latents and rotary keys, where keys and values are 4 * (20 + 10) numbers
    assert absorbed.call_count >= 20 * layers
    assert model.config._attn_implementation == "hf_mla"


@pytest.mark.skipif(not ARRIVED, reason="Transformers hands the pages to the attention since 5.19")
@pytest.mark.parametrize("base", ["eager", "my_flash"])
def test_any_base_in_a_batch(base, monkeypatch):
    """FlashAttention, which is not here, gets no mask: it is told where each request begins and ends, and nothing is absorbed."""

    def flash(module, query, key, value, attention_mask, cu_seq_lens_q, cu_seq_lens_k, **kwargs):
        assert attention_mask is None
        requests = [t.split(lengths.diff().tolist(), dim=2) for t, lengths in ((query, cu_seq_lens_q), (key, cu_seq_lens_k))]
        values, outputs = value.split(cu_seq_lens_k.diff().tolist(), dim=2), []
        for q, k, v in zip(*requests, values, strict=True):
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            outputs.append(sdpa_attention_forward(module, q, k, v, mask, scaling=kwargs["scaling"])[0])
        return torch.cat(outputs, dim=1), None

    monkeypatch.setattr(AttentionInterface, "_global_mapping", AttentionInterface._global_mapping | {"my_flash": flash})
    model = copy.deepcopy(absorbing("deepseek_v3", "hf_mla|eager"))
    model.config._attn_implementation = f"hf_mla|{base}"
    AttentionInterface.register(f"hf_mla|{base}", attend)
    with mock.patch.object(attention_mla, "absorbed_attention", wraps=attention_mla.absorbed_attention) as absorbed:
        for prompts in PROMPTS, PROMPTS[2:3]:  # the latter's steps are of one token
            assert batched(model, prompts, monkeypatch)[0] == expected(native("deepseek_v3"), prompts)
    assert (absorbed.call_count > 0) == (base == "eager")
    assert model.config._attn_implementation == f"hf_mla|{base}"


@pytest.mark.skipif(not ARRIVED, reason="Transformers hands the pages to the attention since 5.19")
@pytest.mark.parametrize("name", [name for name in TYPES if name not in DENSE])
def test_native_models_that_cache_more_than_latents_are_refused(name):
    with pytest.raises(NotImplementedError, match="caches more than latents, and the pages of generate_batch cannot hold that"):
        absorbing(name).generate_batch(inputs=[[5, 6]], generation_config=settings())


@pytest.mark.skipif(not ARRIVED, reason="Transformers hands the pages to the attention since 5.19")
@pytest.mark.parametrize("kind", ["Mistral", "Qwen3", "native"])
def test_the_decode_kernel_in_a_batch(kind, monkeypatch):
    """As it would run on a GPU, through Triton's interpreter: all requests' tokens are in one row."""
    decode_triton = pytest.importorskip("hf_mla.decode_triton")
    if not decode_triton.triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")
    if kind == "native":
        model, before = (copy.deepcopy(each).float() for each in (absorbing("minicpm3"), native("minicpm3")))
    else:
        model = before = make_mla(kind, **{"Mistral": {"sliding_window": 32}, "Qwen3": {"num_key_norms": 2}}[kind])
    right = expected(before, PROMPTS[1:3], tokens=8)
    kernel = mock.Mock(wraps=decode_triton.latent_decode)
    monkeypatch.setattr(attention_mla, "latent_decode", kernel)
    monkeypatch.setattr(attention_mla, "runs_in_kernel", lambda *_: True)
    assert batched(model, PROMPTS[1:3], monkeypatch, tokens=8)[0] == right
    shapes = {call.args[0].shape[:3] for call in kernel.call_args_list}
    assert (2, 4, 1) in shapes  # two requests, each a sequence of its own


@pytest.mark.skipif(ARRIVED, reason="works")
@pytest.mark.parametrize("make", [make_mla, lambda: absorbing("deepseek_v3")], ids=["ours", "native"])
def test_older_versions_are_refused_in_one_line(make):
    with pytest.raises(NotImplementedError, match="needs Transformers 5.19 or newer; this is 5"):
        make().generate_batch(inputs=[[5, 6]], generation_config=settings())


@pytest.mark.skipif(not ARRIVED, reason="needs Transformers 5.19")
def test_a_manager_that_is_kept_can_be_asked_for_any_number_of_times():
    model = make_mla()
    manager = model.init_continuous_batching(settings(), ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=64))
    model._cached_continuous_batching_manager = manager
    for _ in range(sys.getrecursionlimit()):
        assert model.init_continuous_batching() is manager
    processor = manager._create_batch_processor()
    assert processor.cache.cache_allocators["full_attention"].head_dim == model.config.kv_floats_per_token_per_layer // 2
