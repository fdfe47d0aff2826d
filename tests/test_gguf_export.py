"""A .gguf file of a converted model holds the model, as llama.cpp would read it; the tokenizer is carried only if it is known."""

import errno
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from byte_level import LLAMA3, SPLITS, by_pattern, byte_level
from conftest import MODEL, make_mla
from gguf import GGUFReader, GGUFWriter, TokenType, dequantize
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from hf_mla_conversion import UserError, export
from hf_mla_conversion.cli import main
from hf_mla_conversion.output.folder import locked, work_folder
from hf_mla_conversion.output.gguf import encoded
from hf_mla_conversion.output.gguf_vocabulary import tokenizer_refusal, vocabulary
from hf_mla_conversion.source.checkpoint import Checkpoint


CASES = {
    "Llama": {},
    "Llama, tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "Mistral": {"family": "Mistral", "sliding_window": None},
    "Qwen3": {"family": "Qwen3"},
    "closed form": {"kv_a_layernorm_eps": 2.0**40, "rms_norm_eps": 1e-5},
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(by_pattern(LLAMA3), ignore_merges=True)


def make(folder, tokenizer, dtype=torch.float32, **changes):
    """A converted checkpoint with that tokenizer; the folder and the model."""
    model = make_mla(**({"vocab_size": 1000, "hidden_size": 64, "max_position_embeddings": 256} | changes))
    for layer in model.model.layers:
        norm = layer.self_attn.kv_a_layernorm.weight.data
        norm.fill_(2.0**20) if model.config.kv_a_layernorm_eps > 1 else norm.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), model


def read(path):
    """Header and tensors of a file, in float32."""
    reader = GGUFReader(path)
    tensors = {t.name: torch.tensor(np.array(dequantize(t.data, t.tensor_type))) for t in reader.tensors}
    for tensor in reader.tensors:
        tensors[tensor.name] = tensors[tensor.name].reshape([int(size) for size in reversed(tensor.shape)])
    return (
        {key: field.contents() for key, field in reader.fields.items()},
        tensors,
        {t.name: t.tensor_type.name for t in reader.tensors},
    )


def as_deepseek(header, tensors):
    """The library's own model of what a file says, by what llama.cpp makes of it."""
    own = {key.removeprefix("deepseek2."): value for key, value in header.items() if key.startswith("deepseek2.")}
    heads, layers = own["attention.head_count"], own["block_count"]
    rope, value = own["rope.dimension_count"], own["attention.value_length_mla"]
    nope = own["attention.key_length_mla"] - rope
    assert own["attention.head_count_kv"] == 1 and own["attention.q_lora_rank"] == own["expert_shared_count"] == 0
    assert own["attention.key_length"] == own["attention.kv_lora_rank"] + rope
    assert own["attention.value_length"] == own["attention.kv_lora_rank"] and own["leading_dense_block_count"] == layers
    config = DeepseekV3Config(
        vocab_size=own["vocab_size"],
        hidden_size=own["embedding_length"],
        intermediate_size=own["feed_forward_length"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=own["context_length"],
        rms_norm_eps=own["attention.layer_norm_rms_epsilon"],
        kv_lora_rank=own["attention.kv_lora_rank"],
        q_lora_rank=None,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value,
        first_k_dense_replace=layers,
        rope_parameters={"rope_type": "default", "rope_theta": own["rope.freq_base"]},
        rope_interleave=True,
        tie_word_embeddings=False,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    state = {"model.embed_tokens.weight": tensors["token_embd.weight"], "model.norm.weight": tensors["output_norm.weight"]}
    state["lm_head.weight"] = tensors.get("output.weight", tensors["token_embd.weight"])
    for layer in range(layers):
        part = {name.split(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"blk.{layer}.")}
        kv_b = torch.cat([part["attn_k_b"].transpose(1, 2), part["attn_v_b"]], dim=1).flatten(0, 1)
        named = {"self_attn.kv_b_proj": kv_b, "self_attn.q_proj": part["attn_q"], "self_attn.o_proj": part["attn_output"]}
        named |= {"self_attn.kv_a_proj_with_mqa": part["attn_kv_a_mqa"], "self_attn.kv_a_layernorm": part["attn_kv_a_norm"]}
        named |= {"input_layernorm": part["attn_norm"], "post_attention_layernorm": part["ffn_norm"]}
        named |= {f"mlp.{name}_proj": part[f"ffn_{name}"] for name in ("gate", "up", "down")}
        state |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in named.items()}
    model.load_state_dict(state)
    for layer in model.model.layers:  # llama.cpp has one epsilon
        layer.self_attn.kv_a_layernorm.variance_epsilon = config.rms_norm_eps
    return model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_file_is_the_model(tmp_path, tokenizer, case):
    folder, model = make(tmp_path / "mla", tokenizer, **CASES[case])
    report = export(folder, str(tmp_path / "m.gguf"), format="gguf")
    header, tensors, kinds = read(tmp_path / "m.gguf")
    assert header["general.architecture"] == "deepseek2" and set(kinds.values()) == {"F32"}
    assert ("output.weight" in tensors) != CASES[case].get("tie_word_embeddings", False)
    assert (report.tensors, report.bytes_written) == (len(tensors), sum(4 * t.numel() for t in tensors.values()))
    assert (report.padded.kv_lora_rank, report.kv_floats_per_token_per_layer.converted) == (24, 32)
    ids = torch.randint(0, 900, (2, 40))
    torch.testing.assert_close(as_deepseek(header, tensors)(ids).logits, model(ids).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("closed", [False, True], ids=["fitted", "closed form"])
@pytest.mark.parametrize("outtype", ["bf16", "f16", "q8_0"])
def test_numbers_are_rounded_once(tmp_path, tokenizer, outtype, closed):
    """A matrix whose rows are no whole blocks is in float16; latents of the closed form are too small for that."""
    changes = {"kv_a_layernorm_eps": 2.0**40} if closed else {}
    folder, _ = make(tmp_path / "mla", tokenizer, **changes)
    export(folder, str(tmp_path / "exact.gguf"), format="gguf")
    assert main(["export", folder, str(tmp_path / "m.gguf"), "--format", "gguf", "--outtype", outtype]) == 0
    (_, exact, _), (header, tensors, kinds) = read(tmp_path / "exact.gguf"), read(tmp_path / "m.gguf")
    assert header["general.file_type"] == {"bf16": 32, "f16": 1, "q8_0": 7}[outtype]
    latent, values = "blk.1.attn_kv_a_mqa.weight", "blk.1.attn_v_b.weight"  # rows of 64 and of 24 numbers
    assert kinds[latent] == ("F32" if closed else outtype.upper()) and kinds["blk.0.ffn_up.weight"] == outtype.upper()
    assert kinds[values] == ("F16" if outtype == "q8_0" else outtype.upper()) and kinds["blk.0.ffn_norm.weight"] == "F32"
    for name, tensor in tensors.items():
        kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.get(kinds[name])
        if kind:
            assert torch.equal(tensor, exact[name].to(kind).float()), name
        else:
            blocks, whole = (each.reshape(-1, 32) for each in (tensor, exact[name]))
            step = whole.abs().amax(1, keepdim=True) / 127
            assert ((blocks - whole).abs() <= 0.51 * step + 1e-3 * whole.abs()).all(), name


def test_weights_in_bfloat16_are_carried_as_they_are(tmp_path, tokenizer):
    folder, model = make(tmp_path / "mla", tokenizer, torch.bfloat16)
    export(folder, str(tmp_path / "m.gguf"), format="gguf")
    _, tensors, kinds = read(tmp_path / "m.gguf")
    assert kinds["token_embd.weight"] == "BF16"
    state = {name: weight.float() for name, weight in model.state_dict().items()}
    values = state["model.layers.0.self_attn.kv_b_proj.weight"].unflatten(0, (4, 32))[:, 16:]
    assert torch.equal(tensors["blk.0.attn_v_b.weight"], values)
    assert torch.equal(tensors["token_embd.weight"], state["model.embed_tokens.weight"])
    down = state["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(tensors["blk.1.ffn_down.weight"], down)


def test_tensors_are_read_one_at_a_time_and_quantized_in_parts(tmp_path, tokenizer, monkeypatch):
    folder, _ = make(tmp_path / "mla", tokenizer)
    asked, load = [], Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self, names, *rest: asked.append(len(names)) or load(self, names, *rest))
    export(folder, str(tmp_path / "whole.gguf"), format="gguf", outtype="q8_0")
    assert len(asked) > 20 and asked.count(1) >= len(asked) - 1  # the norms on the latent, which are small, come together
    monkeypatch.setattr("hf_mla_conversion.output.gguf.CHUNK", 100)
    export(folder, str(tmp_path / "parts.gguf"), format="gguf", outtype="q8_0")
    assert (tmp_path / "whole.gguf").read_bytes()[4096:] == (tmp_path / "parts.gguf").read_bytes()[4096:]
    assert encoded(torch.ones(3, 2, 32), GGUFReader(tmp_path / "parts.gguf").get_tensor(0).tensor_type).size == 6 * 34


@pytest.mark.parametrize("name", SPLITS)
def test_pre_tokenizers_have_llamacpps_names(name):
    _, splits, ignore_merges = SPLITS[name]
    nfc = {"type": "NFC"} if name == "qwen2" else None
    words = vocabulary(byte_level(splits(), ignore_merges, size=300, normalizer=nfc), 310, [1])
    assert words.pre == name and len(words.tokens) == 310 and words.tokens[309] == "[PAD309]"


def test_tokens_have_their_types_and_meanings(tmp_path, tokenizer):
    folder, model = make(tmp_path / "mla", tokenizer, eos_token_id=1)
    (tmp_path / "mla" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 5]}))
    (tmp_path / "mla" / "README.md").write_text("---\nlicense:\n- apache-2.0\nlicense_link: LICENSE\n---\n")
    changed = AutoTokenizer.from_pretrained(folder)
    changed.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    ends = processors.TemplateProcessing(single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)])
    changed.backend_tokenizer.post_processor = ends
    changed.save_pretrained(folder)
    export(folder, str(tmp_path / "m.gguf"), format="gguf")
    header, _, _ = read(tmp_path / "m.gguf")
    assert (header["general.name"], header["general.license"], header["general.license.link"]) == ("m", "apache-2.0", "LICENSE")
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in header.items() if key.startswith("tokenizer.")}
    assert (own["model"], own["pre"]) == ("gpt2", "llama-bpe")
    ids = [own[f"{role}_token_id"] for role in ("bos", "eos", "padding", "eot", "eom")]
    assert ids == [0, 1, 2, 2, 5] and own["add_bos_token"] and own["add_eos_token"]
    vocabulary, think = changed.get_vocab(), changed.convert_tokens_to_ids("<think>")
    assert len(own["tokens"]) == model.config.vocab_size and all(
        own["tokens"][number] == word for word, number in vocabulary.items()
    )
    assert [own["token_type"][number] for number in (0, 50, think, 999)] == [
        TokenType.CONTROL,
        TokenType.NORMAL,
        TokenType.USER_DEFINED,
        TokenType.UNUSED,
    ]
    merges = json.loads(changed.backend_tokenizer.to_str())["model"]["merges"]
    assert own["merges"] == [" ".join(pair) for pair in merges]
    assert header["tokenizer.chat_template"] == "{{ messages }}" and header["tokenizer.chat_template.tool_use"] == "{{ tools }}"


def test_a_text_begins_and_ends_as_the_tokenizer_has_it(tmp_path, tokenizer):
    words = vocabulary(tokenizer, 1000, [])
    assert (words.add_bos, words.add_eos, words.ids) == (False, False, {"bos": 0, "eos": 1, "pad": 2})


def unknown_tokenizer(kind):
    """A tokenizer that must not be carried over, and what its refusal says."""
    if kind == "pattern":  # close to that of Llama 3
        return AutoTokenizer.from_pretrained(MODEL), "splits text in a way that llama.cpp has no name for; known are llama-bpe"
    if kind == "merges":  # a pattern that is known, but only with merges of whole words
        return byte_level(SPLITS["qwen2"][1](), ignore_merges=True, size=300), "splits text in a way"
    if kind == "normalizer":
        return byte_level(SPLITS["gpt-2"][1](), size=300, normalizer={"type": "Lowercase"}), "splits text in a way"
    if kind == "sentencepiece":
        backend = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], byte_fallback=True, unk_token="<unk>"))
        return PreTrainedTokenizerFast(tokenizer_object=backend), "is not byte-level BPE"
    known = byte_level(by_pattern(LLAMA3), ignore_merges=True, size=300)
    if kind == "spaces":
        known.add_tokens([AddedToken("<x>", lstrip=True)])
        return known, "has '<x>', which depends on the spaces or letters beside it"
    if kind == "many":
        known.add_tokens([f"<{number}>" for number in range(100)])
        return known, "has 401 tokens, the model 310"
    assert kind == "template"
    special = [("<|bos|>", 0), ("<|pad|>", 2)]
    known.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> <|pad|> $A", special_tokens=special)
    return known, "adds more to a text than llama.cpp can"


@pytest.mark.parametrize("kind", ["pattern", "merges", "normalizer", "sentencepiece", "spaces", "many", "template"])
def test_other_tokenizers_are_refused(kind):
    given, message = unknown_tokenizer(kind)
    reason = tokenizer_refusal(given, 5000 if kind == "pattern" else 310)
    assert reason.startswith(f"its tokenizer {message}") and "\n" not in reason


def test_a_tokenizer_is_refused_before_any_work(tmp_path, capsys):
    folder, _ = make(tmp_path / "mla", AutoTokenizer.from_pretrained(MODEL), vocab_size=4096)
    assert main(["export", folder, str(tmp_path / "m.gguf"), "--format", "gguf", "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["refused"].startswith("its tokenizer splits text")
    assert printed.err.startswith(f"hf-mla: {folder} cannot be exported as gguf: its tokenizer splits text")
    assert [path.name for path in tmp_path.iterdir()] == ["mla"]


@pytest.mark.parametrize(
    ("dest", "options", "message"),
    [
        ("m.gguf", {"outtype": "q4_k"}, "--outtype is q4_k; allowed: f32, bf16, f16, q8_0"),
        ("m.gguf", {"pad": "engine"}, "--pad is engine; a .gguf file keeps the widths"),
        ("m.bin", {}, "m.bin is no name of a .gguf file"),
        ("mla", {}, "mla is no name of a .gguf file"),
        ("mla/m.gguf", {}, "lies in the checkpoint"),
        ("there.gguf", {}, "there.gguf exists; choose another name, or pass --overwrite"),
        ("nowhere/m.gguf", {}, "there is no folder .*nowhere; make it first"),
        ("loop.gguf", {}, "cannot write .*loop"),
        (f"{'n' * 300}.gguf", {}, "File name too long"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, tokenizer, dest, options, message):
    folder, _ = make(tmp_path / "mla", tokenizer)
    (tmp_path / "there.gguf").write_bytes(b"old")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    with pytest.raises(UserError, match=message):
        export(folder, str(tmp_path / dest), format="gguf", **options)
    export(folder, str(tmp_path / "there.gguf"), format="gguf", overwrite=True)
    assert (tmp_path / "there.gguf").read_bytes()[:4] == b"GGUF"


def test_too_little_room_is_known_before(tmp_path, tokenizer, monkeypatch):
    folder, _ = make(tmp_path / "mla", tokenizer)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"has 1.0 kB free, the file takes [\d.]+ kB; make room or write elsewhere"):
        export(folder, str(tmp_path / "m.gguf"), format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["mla"]


def test_outtype_is_of_gguf(tmp_path, tokenizer):
    folder, _ = make(tmp_path / "mla", tokenizer)
    with pytest.raises(UserError, match="--outtype is of --format gguf"):
        export(folder, str(tmp_path / "m"), format="deepseek_v3", outtype="f16")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["interrupted", "full"]
)
def test_cut_short_it_leaves_nothing(tmp_path, tokenizer, monkeypatch, error):
    folder, _ = make(tmp_path / "mla", tokenizer)
    (tmp_path / "m.gguf").write_bytes(b"old")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", fail)
    if isinstance(error, OSError):  # what is buffered has no room either
        monkeypatch.setattr(GGUFWriter, "close", fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
    with pytest.raises(expected) as raised:
        export(folder, str(tmp_path / "m.gguf"), format="gguf", overwrite=True)
    assert expected is KeyboardInterrupt or "No space left on device; nothing is kept" in str(raised.value)
    assert (tmp_path / "m.gguf").read_bytes() == b"old" and {path.name for path in tmp_path.iterdir()} == {"mla", "m.gguf"}


def test_two_processes_do_not_write_one_file(tmp_path, tokenizer):
    folder, _ = make(tmp_path / "mla", tokenizer)
    path = tmp_path / "m.gguf"
    with locked(work_folder(path), path), pytest.raises(UserError, match="is being written already, by process"):
        export(folder, str(path), format="gguf")
    export(folder, str(path), format="gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"mla", "m.gguf"}
