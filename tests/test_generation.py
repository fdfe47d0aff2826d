"""Every way Transformers generates gives the tokens of the reference, and caches r + p numbers per token and layer.

The reference is the same model in float32 without a cache: `use_cache=False` runs the expanded path over all tokens at every
step, and `test_random.py` holds that path against the formula. Contrastive search, diverse and constrained beams and DoLa are no
longer part of the library; they come as code from the Hub.
"""

import copy
import shutil
import warnings

import pytest
import torch
from conftest import LLAMA3_ROPE, make_mla
from transformers import DynamicCache, LlamaConfig, StaticCache, TextIteratorStreamer, set_seed
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_mla import MLACache, attention_mla, cache_bytes, cache_of
from hf_mla.cache_mla import CACHE_NAME
from hf_mla_conversion.commands.verify import decoding_error, measured_bytes


WINDOW = 16
SHAPES = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},  # of two layers, the second
    "Qwen3": {"num_key_norms": 2},
}
UNWINDOWED = ("Llama", "Qwen3")  # elsewhere some layers cache no more than the window
NEW = 24
all_families = pytest.mark.parametrize("family", SHAPES)


def make(family="Llama", **changes):
    model = make_mla(family, **(SHAPES[family] | changes))
    model.generation_config.eos_token_id = None  # all sequences run to their full length
    return model


def make_prompt(rows=2, length=9):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def generate(model, prompt, cache=None, **options):
    """Sequences and cache after generating NEW tokens."""
    options = {"max_new_tokens": NEW, "do_sample": False} | ({} if cache is None else {CACHE_NAME: cache}) | options
    outputs = model.generate(prompt, return_dict_in_generate=True, **options)
    return outputs.sequences, cache_of(outputs)


def check(model, prompt, exact=True, **options):
    """The same tokens with a cache as without, and r + p numbers for each token in the cache: no more, or a quarter to spare."""
    reference = {k: v for k, v in options.items() if k not in ("cache_implementation", "max_cache_len")}
    set_seed(0)
    expected, none = generate(model, prompt, use_cache=False, **reference)
    assert none is None
    set_seed(0)
    sequences, cache = generate(model, prompt, **options)
    assert torch.equal(sequences, expected)
    check_size(model, cache, exact)
    return sequences, cache


def check_size(model, cache, exact=True):
    numbers = model.config.kv_floats_per_token_per_layer
    needed = 0
    for layer in cache.layers:
        rows, _, tokens, _ = layer.keys.shape
        assert layer.keys.shape[1:] == (1, tokens, numbers) and layer.values.shape == (rows, 1, tokens, 0)
        needed += rows * tokens * numbers * 4
    assert needed == cache_bytes(cache) if exact else needed <= cache_bytes(cache) <= 1.3 * needed


@pytest.mark.mode("Greedy search", since="5.15", costs="none: the buffer is written in place, and ends without spare room")
@all_families
def test_greedy(family):
    model = make(family)
    sequences, cache = check(model, make_prompt(), exact=family in UNWINDOWED)
    assert len(set(sequences[0].tolist())) > NEW / 3, "tokens of some variety"
    assert cache.get_seq_length() == sequences.shape[1] - 1  # the last token was never fed back


@pytest.mark.mode("Sampling, several sequences of one prompt", since="5.15", costs="none")
def test_sampling():
    model, prompt = make(), make_prompt()
    sequences, _ = check(model, prompt, do_sample=True, temperature=1.5, num_return_sequences=3)
    assert len({tuple(row) for row in sequences.tolist()}) == 6
    assert not torch.equal(sequences[::3], generate(model, prompt)[0])


@pytest.mark.mode("Beam search", since="5.15", costs="the latents are copied twice a step, to reorder them and to append")
@all_families
def test_beams(family):
    check(make(family), make_prompt(), num_beams=3)


@pytest.mark.mode("Beam search, static cache", since="5.15", costs="the latents are copied once a step")
@all_families
def test_beams_static(family):
    check(make(family), make_prompt(), num_beams=3, cache_implementation="static")


@pytest.mark.mode("Beam sampling", since="5.15", costs="as beam search")
def test_beam_sampling():
    check(make(), make_prompt(), num_beams=3, do_sample=True)


@pytest.mark.mode("Streaming", since="5.15", costs="none")
def test_streaming():
    class Tokens:
        """Stands for a tokenizer."""

        def decode(self, tokens, **_):
            return "".join(f"{token} " for token in tokens)

    model, prompt = make(), make_prompt(rows=1)
    streamer = TextIteratorStreamer(Tokens())
    sequences, _ = generate(model, prompt, streamer=streamer)
    assert [int(token) for token in "".join(streamer).split()] == sequences[0].tolist()
    assert torch.equal(sequences, generate(model, prompt, use_cache=False)[0])


@pytest.mark.mode("Assisted decoding", since="5.15", costs="rejected tokens are cropped, by a view")
@pytest.mark.parametrize("noise", [0.0, 0.02], ids=["exact", "noisy"])
@all_families
def test_assisted(family, noise):
    model, prompt = make(family), make_prompt(rows=1)
    assistant = copy.deepcopy(model)
    set_seed(0)
    for parameter in assistant.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    expected, _ = generate(model, prompt, use_cache=False)
    guesses = assistant(expected[:, :-1]).logits.argmax(-1)
    right = (guesses == expected[:, 1:])[0, prompt.shape[1] - 1 :].float().mean()
    assert 0.2 < right < 1 if noise else right == 1
    sequences, cache = generate(model, prompt, assistant_model=assistant)
    assert torch.equal(sequences, expected)
    if family in UNWINDOWED:
        assert cache.get_seq_length() == sequences.shape[1] - 1
        check_size(model, cache, exact=False)


@pytest.mark.mode("Prompt lookup", since="5.15", costs="rejected tokens are cropped, by a view")
@all_families
def test_prompt_lookup(family):
    model, prompt = make(family), make_prompt(rows=1).repeat(1, 3)
    expected, _ = generate(model, prompt, use_cache=False)
    assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=4)[0], expected)


@pytest.mark.mode("Left-padded batches", since="5.15", costs="none")
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=["greedy", "static", "beams"])
@all_families
def test_left_padding(family, options):
    """A batch of prompts of unequal lengths continues each as if it were alone."""
    model, lengths = make(family), (3, 20, 11)
    prompts = [make_prompt(rows=1, length=length) for length in lengths]
    width = max(lengths)
    batch = torch.cat([torch.nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    sequences, _ = generate(model, batch, attention_mask=mask.long(), **options)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        alone, _ = generate(model, prompt, use_cache=False, num_beams=options.get("num_beams", 1))
        assert torch.equal(sequence[width:], alone[0, prompt.shape[1] :])


@pytest.mark.mode("Chunked prefill", since="5.15", costs="chunks after the first expand the cached latents again, or absorb")
@all_families
def test_chunked_prefill(family):
    model, prompt = make(family), make_prompt(length=40)
    expected, _ = generate(model, prompt, use_cache=False)
    sequences, cache = generate(model, prompt, prefill_chunk_size=7)
    assert torch.equal(sequences, expected)
    check_size(model, cache, exact=family in UNWINDOWED)


@pytest.mark.mode("Prefix reuse: a cache copied and continued", since="5.15", costs="one copy of the latents a time")
@pytest.mark.parametrize("length", [None, 64], ids=["growing", "static"])
@all_families
def test_prefix_reuse(family, length):
    model, prefix, suffixes = make(family), make_prompt(length=20), make_prompt(rows=4, length=5).split(2)
    cache = MLACache(model.config, max_cache_len=length)
    with torch.no_grad():
        model(prefix, cache=cache)
    for suffix in suffixes:
        prompt = torch.cat([prefix, suffix], 1)
        sequences, _ = generate(model, prompt, cache=copy.deepcopy(cache))
        assert torch.equal(sequences, generate(model, prompt, use_cache=False)[0])
    assert cache.get_seq_length() == 20, "the copies were written to, not the original"


@pytest.mark.mode("Several turns over one cache", since="5.15", costs="none: only new tokens are computed")
@all_families
def test_turns(family):
    model, conversation = make(family), make_prompt()
    cache = MLACache(model.config)
    for _ in range(3):
        conversation = torch.cat([conversation, make_prompt(length=4)], 1)
        expected, _ = generate(model, conversation, use_cache=False, max_new_tokens=9)
        conversation, cache = generate(model, conversation, cache=cache, max_new_tokens=9)
        assert torch.equal(conversation, expected)
    assert cache.get_seq_length() == conversation.shape[1] - 1


@pytest.mark.mode("Cropping a cache", since="5.15", costs="none: a view of fewer tokens")
def test_crop():
    model, prompt = make(), make_prompt(length=20)
    sequences, cache = generate(model, prompt)
    before = cache_bytes(cache)
    cache.crop(-(NEW + 4))
    assert cache.get_seq_length() == 15 and cache_bytes(cache) == before
    other = torch.cat([sequences[:, :15], make_prompt(length=6).flip(1)], 1)
    assert torch.equal(generate(model, other, cache=cache)[0], generate(model, other, use_cache=False)[0])


@pytest.mark.mode("Repeating and selecting sequences of a cache", since="5.15", costs="one copy of the latents")
@all_families
def test_repeat_and_select(family):
    model, prompt = make(family), make_prompt(length=20)
    _, cache = generate(model, prompt, max_new_tokens=1)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([4, 1, 1]))
    ids = torch.cat([prompt[[1, 0, 0]], make_prompt(rows=3, length=5)], 1)
    sequences, cache = generate(model, ids, cache=cache)
    assert torch.equal(sequences, generate(model, ids, use_cache=False)[0])
    check_size(model, cache, exact=False)


def reset_and_reuse(model, cache):
    for prompt in make_prompt(rows=4).split(2):
        sequences, _ = generate(model, prompt, cache=cache)
        assert torch.equal(sequences, generate(model, prompt, use_cache=False)[0])
        cache.reset()
        assert cache.get_seq_length() == 0


@pytest.mark.mode("Reset and reuse of a cache", since="5.15", costs="a growing cache gives its memory back, a static one keeps it")
@pytest.mark.parametrize("family, length", [("Llama", None), ("Qwen3", None), *((family, 48) for family in SHAPES)])
def test_reset(family, length):
    model = make(family)
    cache = MLACache(model.config, max_cache_len=length)
    reset_and_reuse(model, cache)
    assert length or cache_bytes(cache) == 0


@pytest.mark.mode(
    "Reset and reuse of a growing cache with windows", since="5.18", costs="none; older versions keep zeros in the window"
)
@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
def test_reset_windows(family):
    model = make(family)
    reset_and_reuse(model, MLACache(model.config))


@pytest.mark.mode("Saving and loading a cache (torch.save)", since="5.15", costs="spare room of the buffer is saved too")
@pytest.mark.parametrize("length", [None, 48], ids=["growing", "static"])
@all_families
def test_save_and_load(family, length, tmp_path):
    model, prompt = make(family), make_prompt()
    sequences, cache = generate(model, prompt, cache=MLACache(model.config, max_cache_len=length), max_new_tokens=9)
    torch.save(cache, tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert cache_bytes(loaded) == cache_bytes(cache)
    assert torch.equal(generate(model, sequences, cache=loaded)[0], generate(model, sequences, use_cache=False)[0])


@pytest.mark.mode(
    "Taking caches apart and joining them (DataParallel)", since="5.15", costs="one copy; then as DynamicCache; not quantized ones"
)
@pytest.mark.parametrize("own", [False, True], ids=["DynamicCache", "MLACache"])
@all_families
def test_gathering(family, own):
    """What data parallelism does: a cache of each replica is iterated over, tensors are joined, a cache is built from them.

    The sequences are shorter than the window here: a longer length is lost where the library rebuilds its windowed layers.
    """
    model, prompt = make(family), make_prompt(rows=4)
    caches, rows = [], []
    for part in prompt.split(2):
        sequences, cache = generate(model, part, max_new_tokens=5, cache=MLACache(model.config) if own else None)
        caches.append(cache)
        rows.append(sequences)
    layers = [
        (torch.cat([keys, other_keys]), torch.cat([values, other_values]), None if window is None else window.view(1))
        for (keys, values, window), (other_keys, other_values, _) in zip(*caches, strict=True)
    ]
    ids = torch.cat(rows)
    sequences, cache = generate(model, ids, cache=DynamicCache(ddp_cache_data=layers))
    assert torch.equal(sequences, generate(model, ids, use_cache=False)[0])
    check_size(model, cache, exact=False)


@pytest.mark.mode("Static cache, max_cache_len", since="5.15", costs="memory and attention for all tokens it could hold")
@all_families
def test_static(family):
    model, prompt = make(family), make_prompt()
    _, cache = check(model, prompt, cache_implementation="static", max_cache_len=60)
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths == {"Mistral": [WINDOW, WINDOW], "Qwen2": [60, WINDOW]}.get(family, [60, 60])
    for cache in (MLACache(model.config, 60), StaticCache(model.config, 60)):
        assert torch.equal(generate(model, prompt, cache=cache)[0], generate(model, prompt, use_cache=False)[0])


@pytest.mark.mode("The library's own DynamicCache", since="5.15", costs="the latents are copied once a step")
@all_families
def test_dynamic(family):
    model, prompt = make(family), make_prompt()
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        sequences, cache = generate(model, prompt, cache=cache)
        assert torch.equal(sequences, generate(model, prompt, use_cache=False)[0])
        check_size(model, cache, exact=False)


@pytest.mark.mode("Compiled decoding, static cache", since="5.15", costs="compiling once, not anew as tokens come")
@pytest.mark.parametrize("family, backend", [*((family, "eager") for family in SHAPES), ("Llama", "inductor")])
@torch.no_grad()
def test_compiled(family, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("needs a compiler")
    model, prompt = make(family, num_hidden_layers=1 if backend == "inductor" else 2), make_prompt(length=WINDOW + 4)
    expected, _ = generate(model, prompt, use_cache=False)
    cache = MLACache(model.config, max_cache_len=48)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend=backend)
    ids = [*prompt.split(1, dim=1), model(prompt, cache=cache).logits[:, -1:].argmax(-1)]
    for i in range(NEW - 1):
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            positions = torch.full((2, 1), len(ids) - 1)
            ids.append(step(ids[-1], cache=cache, position_ids=positions).logits.argmax(-1))
    assert torch.equal(torch.cat(ids, 1), expected)


# Where all layers have windows, as in this Mistral, the library looks in vain for one that has none.
some_families = pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])


@pytest.mark.mode("Offloaded cache", since="5.15", costs="the latents of each layer cross the bus once a step", gpu=True)
@pytest.mark.parametrize("how", ["generate", "MLACache"])
@some_families
def test_offloaded(family, how):
    model, prompt = make(family).cuda(), make_prompt().cuda()
    options = {"cache_implementation": "offloaded"}
    if how == "MLACache":
        options = {"cache": MLACache(model.config, offloading=True)}
    sequences, cache = generate(model, prompt, **options)
    assert torch.equal(sequences, generate(model, prompt, use_cache=False)[0])
    # After the last layer the first one is on its way back; the library leaves windows on the GPU.
    assert family not in UNWINDOWED or cache.layers[-1].keys.device.type == "cpu"
    check_size(model, cache, exact=False)


@pytest.mark.mode(
    "Offloaded static cache", since="5.15", costs="as offloaded, for all tokens it could hold; not compiled", gpu=True
)
@pytest.mark.parametrize("how", ["generate", "MLACache"])
@some_families
def test_offloaded_static(family, how):
    model, prompt = make(family).cuda(), make_prompt().cuda()
    options = {"cache_implementation": "offloaded_static"}
    if how == "MLACache":
        options = {"cache": MLACache(model.config, max_cache_len=40, offloading=True)}
    # Compiled, the library's own Llama makes torch 2.11 crash here.
    sequences, cache = generate(model, prompt, disable_compile=True, **options)
    assert torch.equal(sequences, generate(model, prompt, use_cache=False)[0])
    check_size(model, cache)


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    | {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
    "llama3": LLAMA3_ROPE | {"original_max_position_embeddings": 32},
}


@pytest.mark.mode("Contexts beyond max_position_embeddings, every RoPE", since="5.15", costs="none")
@pytest.mark.parametrize("kind", ROPES)
@torch.no_grad()
def test_rope_beyond_the_trained_length(kind, monkeypatch):
    """Angles are those of the library's own Llama whose heads are as wide as our rotary key; cached tokens keep theirs."""
    length = 128 if kind == "yarn" else 32
    model, prompt = make(max_position_embeddings=length, rope_parameters=ROPES[kind]), make_prompt(length=40)
    rotary = LlamaRotaryEmbedding(LlamaConfig(head_dim=8, max_position_embeddings=length, rope_parameters=ROPES[kind]))
    for positions in (torch.arange(20)[None], torch.arange(100)[None]):
        for ours, theirs in zip(model.model.rotary_emb(torch.ones(1), positions), rotary(torch.ones(1), positions), strict=True):
            assert ours.shape[-1] == 8 and torch.equal(ours, theirs)

    fresh = copy.deepcopy(model)  # rotary embeddings remember the longest sequence they have seen
    sequences, cache = generate(model, prompt, max_new_tokens=110)
    check_size(model, cache)
    if kind == "dynamic":  # the angles depend on the length: without a cache, those of the old tokens would change with it
        monkeypatch.setattr(attention_mla, "should_absorb", lambda *_: False)
        expected, _ = generate(fresh, prompt, max_new_tokens=110, cache=DynamicCache())
    else:
        expected, _ = generate(fresh, prompt, max_new_tokens=110, use_cache=False)
    assert torch.equal(sequences, expected)


@pytest.mark.mode("Sliding windows", since="5.15", costs="no more tokens than the window are cached, copied once a step")
@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
def test_window_bounds_the_cache(family):
    model, prompt = make(family), make_prompt()
    _, cache = check(model, prompt, exact=False, max_new_tokens=60)
    token = 2 * model.config.kv_floats_per_token_per_layer * 4  # bytes of two rows
    windowed = cache_bytes(cache) - (0 if family == "Mistral" else 68 * token)
    assert windowed <= WINDOW * token * (2 if family == "Mistral" else 1)
    assert cache.layers[1].keys.shape[2] == WINDOW - 1


def test_both_names_of_the_cache(mla, monkeypatch):
    """`cache`, and what it was called before 5.24: in a model's forward everywhere, elsewhere as the library has them."""
    prompt = make_prompt()
    with torch.no_grad():
        expected = mla(prompt).logits[:, -1:]
        for base in (mla, mla.model):
            results = []
            for name in ("cache", "past_key_values"):
                cache = MLACache(mla.config)
                with warnings.catch_warnings(action="ignore"):
                    base(prompt[:, :-1], **{name: cache})
                    outputs = base(prompt[:, -1:], **{name: cache})
                assert cache.get_seq_length() == prompt.shape[1] and cache_of(outputs) is cache
                results.append(outputs[0])
            assert torch.equal(*results)
        assert (mla(prompt[:, -1:], cache=cache_of(mla(prompt[:, :-1]))).logits - expected).abs().max() < 1e-5
    reference = generate(mla, prompt)[0]
    with warnings.catch_warnings(action="ignore"):
        outputs = mla.generate(
            prompt, past_key_values=MLACache(mla.config), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
        )
        assert torch.equal(outputs.sequences, reference)
        assert outputs.past_key_values is cache_of(outputs)


def test_our_own_code_warns_of_nothing(monkeypatch, mla):
    """In no way of using a cache; the library tells of old names by warnings and by its logger, the latter once a process."""
    said = []
    monkeypatch.setattr("logging.Logger.warning_once", lambda logger, message, *args, **kwargs: said.append(message))
    prompt = make_prompt()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for how in ({}, {"cache": MLACache(mla.config)}, {"num_beams": 2}, {"cache_implementation": "static"}):
            generate(mla, prompt, **how)
        generate(mla, prompt, cache_implementation="quantized", cache_config={"backend": "int8"})
        generate(mla, prompt[:1], prompt_lookup_num_tokens=3)
        assert measured_bytes(mla, prompt) == mla.config.kv_bytes_per_token(itemsize=4) * len(prompt)
        assert decoding_error(mla, prompt) < 1e-4
    assert not [message for message in said if "deprecated" in str(message)]
