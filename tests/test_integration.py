"""What the ecosystem does with models: offloads, splits, quantizes, trains them and calls them through pipelines."""

import copy

import accelerate
import pytest
import torch
import transformers
import two_processes
from conftest import MODEL, make_mla, run_apart
from native_models import config_and_class, native, read
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, Trainer, TrainingArguments, pipeline
from two_processes import IDS, counted_absorption, speak, train

import hf_mla
from hf_mla import cache_of
from hf_mla.configuration_mla import release


EXACT_NORMS = {"num_key_norms": 2, "kv_lora_rank": 16, "vocab_size": 96}


def assert_same_speech(one, other, error=1e-5):
    assert (one[0] - other[0]).abs().max() < error
    assert (one[1] - other[1]).abs().max() < error
    assert torch.equal(one[2], other[2])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with all that the attention has, key norms included, and its folder."""
    model, folder = make_mla("Qwen3", **EXACT_NORMS), tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.mode("output_attentions, output_hidden_states", since="5.15", costs="prefill needs `eager` for weights")
@torch.no_grad()
def test_attentions_and_hidden_states():
    """Absorbed decoding returns the weights and states of eager attention; every other prompt is padded on the left."""
    model = make_mla("Qwen3", **EXACT_NORMS)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    outputs = {"output_attentions": True, "output_hidden_states": True}
    cache = cache_of(model(IDS[:, :-1], attention_mask=mask[:, :-1]))
    with counted_absorption() as absorbed:
        step = model(IDS[:, -1:], attention_mask=mask, cache=cache, **outputs)
    assert absorbed.call_count == 2
    model.set_attn_implementation("eager")
    whole = model(IDS, attention_mask=mask, **outputs)
    assert [weights.shape for weights in whole.attentions] == [(2, 4, 72, 72)] * 2
    assert [states.shape for states in whole.hidden_states] == [(2, 72, 64)] * 3
    for name in ("attentions", "hidden_states"):
        for all_tokens, last in zip(whole[name], step[name], strict=True):
            torch.testing.assert_close(last, all_tokens[..., -1:, :], atol=1e-5, rtol=1e-5)


@pytest.mark.mode("Gradient checkpointing", since="5.15", costs="each layer's forward pass runs twice; no cache meanwhile")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = make_mla("Qwen3", **EXACT_NORMS).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # before 5.23
            enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        calls = []
        handle = model.model.layers[0].self_attn.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        model(IDS, labels=IDS).loss.backward()
        handle.remove()
        assert len(calls) == 1 + checkpointing
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.mode(
    'device_map="auto" and offloaded weights',
    since="5.15",
    costs="weights are read at every step; `kv_b_proj` by identity push",
)
@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_offloaded_weights(saved, where, tmp_path):
    """Read from disk, or from a copy in memory, each time that a layer is called."""
    model, folder = saved
    if where == "disk":
        memory = {"cpu": int(0.75 * model.get_memory_footprint())}
        options = {"device_map": "auto", "max_memory": memory, "offload_folder": tmp_path}
        offloaded = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    else:
        offloaded = accelerate.cpu_offload(AutoModelForCausalLM.from_pretrained(folder), torch.device("cpu"))
    assert offloaded.model.layers[0].self_attn.kv_b_proj.weight.is_meta
    with counted_absorption() as absorbed:
        assert_same_speech(speak(offloaded), speak(model))
    assert absorbed.call_count == 2 * 2 * (8 + 7)  # both models, two layers, the tokens fed and generated


@pytest.fixture(scope="module")
def together(saved, tmp_path_factory):
    """What two processes compute."""
    file, other = (tmp_path_factory.mktemp("together") / name for name in ("results.pt", "native"))
    copy.deepcopy(native("minicpm3")).float().save_pretrained(other)
    code, said = run_apart(file.with_name("log"), two_processes.together, saved[1], other, file)
    assert code == 0, said[-2000:]
    return torch.load(file) | {"native folder": other}


@pytest.mark.mode(
    "Tensor parallel", since="5.15", costs="every process caches all latents; identity push (5.17), before that decoding expands"
)
def test_tensor_parallel(saved, together):
    """Two processes with two heads each, and the norms of those heads' keys, are one process with four."""
    result, model = together["tensor parallel"], copy.deepcopy(saved[0])
    assert_same_speech(result["spoken"], speak(model))
    assert result["cache"].shape == (2, 1, 20, 16 + 8 + 1)
    ids = torch.arange(1, 41).view(2, 20)
    model(ids, labels=ids).loss.backward()
    assert len(result["gradients"]) > 8
    for name, gradient in result["gradients"].items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-5, rtol=1e-4, msg=name)
    if release(transformers.__version__) >= (5, 17):
        assert result["absorbed"] == 2 * (8 + 7)


@pytest.mark.mode("The library's own MLA models, tensor parallel", since="5.15", costs="as for ours")
@torch.no_grad()
def test_native_tensor_parallel(together):
    model = AutoModelForCausalLM.from_pretrained(together["native folder"])
    expected = read(model, [16, 1, 1, 1, 1, 1, 1], DynamicCache(config=model.config))
    assert (together["native"]["logits"] - expected).abs().max() < 5e-5
    if release(transformers.__version__) >= (5, 17):
        assert together["native"]["absorbed"] == 3 * 6


def assert_fully_sharded(result, model):
    """It has trained as one process does, and says the same by steps, absorbed, as of all tokens at once."""
    losses, _ = train(model)
    assert result["layer"].startswith("FSDP")
    assert losses[-1] < losses[0] - 1
    torch.testing.assert_close(result["losses"], losses, atol=1e-4, rtol=1e-4)
    assert (result["logits"][0] - result["logits"][1]).abs().max() < 5e-5
    assert result["absorbed"] == 6 * len(model.model.layers)


@pytest.mark.mode("FSDP2 through Accelerate", since="5.15", costs="a layer's weights are gathered when it is called")
def test_fully_sharded(saved, together):
    assert_fully_sharded(together["fully sharded"], copy.deepcopy(saved[0]))


@pytest.mark.mode("The library's own MLA models, FSDP2 through Accelerate", since="5.15", costs="as for ours")
def test_native_fully_sharded(together):
    model = AutoModelForCausalLM.from_pretrained(together["native folder"])
    assert_fully_sharded(together["native, fully sharded"], model)


def quantization(kind):
    if kind == "torchao int8":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "bitsandbytes int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return transformers.BitsAndBytesConfig(load_in_4bit=True, **options)


@pytest.mark.mode("Weights quantized by bitsandbytes or torchao", since="5.15", costs="`kv_b_proj` takes the identity push")
@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes int8", "bitsandbytes nf4"])
def test_quantized_weights(kind, tmp_path):
    """Prefill and decoding read the same quantized weights; bitsandbytes also rounds activations, to int8 or to bfloat16."""
    model = make_mla("Qwen3", num_key_norms=2, kv_lora_rank=64, qk_rope_head_dim=32, intermediate_size=128, vocab_size=128)
    model.save_pretrained(tmp_path)
    options = {"quantization_config": quantization(kind), "device_map": "cpu", "dtype": torch.float32}
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    ids = IDS.flatten()[None]
    with counted_absorption() as absorbed:
        prefill, decoded, tokens = speak(quantized, ids, prompt=136)
    assert tokens.shape[1] == ids.shape[1] + 8 and absorbed.call_count == 2 * (8 + 7)
    rounding = (prefill - model(ids).logits).abs().max()
    assert rounding > 0.01
    allowed = {"torchao int8": 1e-4, "bitsandbytes int8": rounding, "bitsandbytes nf4": 0.1}
    assert (decoded - prefill[:, 136:]).abs().max() < allowed[kind]


@pytest.mark.mode(
    "The library's own MLA models, weights quantized by bitsandbytes or torchao",
    since="5.15",
    costs="as for ours; not int8 of bitsandbytes, which the library's own attention does not stand",
)
@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes nf4"])
@torch.no_grad()
def test_native_quantized_weights(kind, tmp_path):
    """What is decoded over the latents is what the library's own attention says of the same quantized weights."""
    shape = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    config, model_class = config_and_class("minicpm3", **shape, intermediate_size=128, vocab_size=128)
    model = model_class._from_config(config)
    model.save_pretrained(tmp_path)
    options = {"quantization_config": quantization(kind), "device_map": "cpu", "dtype": torch.float32}
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    sizes, logits = [64, *[1] * 8], []
    for name in "sdpa", "hf_mla":
        quantized.set_attn_implementation(name)
        with counted_absorption() as absorbed:
            logits.append(read(quantized, sizes, DynamicCache(config=config), ids=IDS))
    assert absorbed.call_count == 3 * 8
    assert (logits[0] - read(model, sizes, DynamicCache(config=config), ids=IDS)).abs().max() > 0.01
    assert (logits[0] - logits[1]).abs().max() < {"torchao int8": 1e-4, "bitsandbytes nf4": 0.1}[kind]


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.mode('pipeline("text-generation"), pipeline("text-classification")', since="5.15", costs="nothing beyond the model")
@torch.no_grad()
def test_pipelines(tmp_path):
    """From the folder alone, and in batches."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = ["The captain looked at the sea and", "She said"]
    model = make_mla(vocab_size=4096, pad_token_id=tokenizer.pad_token_id)
    generate = pipeline("text-generation", save(model, tokenizer, tmp_path / "language"))
    options = {"max_new_tokens": 8, "do_sample": False}
    together = generate(texts, batch_size=2, return_full_text=False, **options)
    for text, result in zip(texts, together, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert result[0]["generated_text"] == tokenizer.decode(tokens, skip_special_tokens=True)

    model.config.num_labels = 3
    classifier = hf_mla.LlamaMLAForSequenceClassification(model.config).eval()
    classify = pipeline("text-classification", save(classifier, tokenizer, tmp_path / "classifier"), top_k=None)
    for text, result in zip(texts, classify(texts, batch_size=2), strict=True):
        expected = classifier(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        scores = torch.tensor([entry["score"] for entry in sorted(result, key=lambda entry: entry["label"])])
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.mode("Trainer, with label smoothing", since="5.15", costs="training takes the expanded path")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_trainer(smoothing, tmp_path):
    """The losses are those of the library's own language model around the same decoder: labels shifted by one token."""
    model = make_mla()
    own = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_diff_dict()))
    own.model, own.lm_head = copy.deepcopy(model.model), copy.deepcopy(model.lm_head)
    options = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    options |= {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    losses = []
    for either in (own, model):
        arguments = TrainingArguments(tmp_path, label_smoothing_factor=smoothing, **options)
        trainer = Trainer(either, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in IDS])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and len(losses[1]) == 3
    assert losses[1][-1] < losses[1][0]
