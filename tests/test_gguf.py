"""Sources in .gguf files: written here as llama.cpp's converter writes them, read like the models that they were made of."""

import gc
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
from conftest import MODEL, make_source
from test_cli import refuses
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mla_conversion import UserError, convert, heal, info, plan, verify
from hf_mla_conversion.output import progress
from hf_mla_conversion.source import gguf_file
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.gguf_file import LAYER_NAMES, NAMES
from hf_mla_conversion.source.loading import load_model
from hf_mla_conversion.source.tokenizer import load_tokenizer


gguf = pytest.importorskip("gguf")

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
OPTIONS = {"kv_lora_rank": 16, "qk_rope_head_dim": 16, "calibration_tokens": 512, "steps": 0, "device": "cpu"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def interleaved(weight, heads):
    """Rows of queries or keys as llama.cpp has them."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, kind="F32", architecture=None, fields=None, tensors=None, merges=40):
    """Write a model with the bundled tokenizer, or the beginning of that.

    Args:
        path: the file.
        model: one of the library's, in float32.
        kind: type of the matrices.
        architecture: as llama.cpp names it.
        fields: more of the header, as `GGUFWriter` methods and their arguments.
        tensors: more tensors, in float32.
        merges: how many pairs of tokens the tokenizer joins, of 3,837.

    Returns:
        The path, as a string.
    """
    config, kind = model.config, gguf.GGMLQuantizationType[kind]
    architecture = architecture or {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("A captain")
    writer.add_license("apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type != "qwen2":
        writer.add_key_length(config.head_dim)
    tokenizer = json.loads((Path(MODEL) / "tokenizer.json").read_text())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    vocabulary, joined = tokenizer["model"]["vocab"], [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    words = sorted(vocabulary, key=vocabulary.get)[: len(vocabulary) - len(joined) + merges]
    writer.add_token_list(words)
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    writer.add_token_types([3 if word in special else 1 for word in words])
    writer.add_token_merges(joined[:merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(3)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for method, *arguments in fields or ():
        getattr(writer, method)(*arguments)
    short = {long: name for name, long in {**NAMES, **LAYER_NAMES}.items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight, base = tensor.float().numpy(), name.rpartition(".")[0]
        if architecture == "llama" and base.split(".")[-1] in heads:
            weight = interleaved(weight, heads[base.split(".")[-1]])
        if base not in short:
            _, _, layer, inside = base.split(".", 3)
            base = f"blk.{layer}.{short[inside]}"
        else:
            base = short[base]
        used = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{base}.{name.rpartition('.')[2]}", gguf.quantize(weight, used), raw_dtype=used)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, numpy.array(values, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def original(folder, family="Llama", **changes):
    return AutoModelForCausalLM.from_pretrained(make_source(folder, family, **(SHAPE | changes))).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small Llama whose keys lose nothing: one key head; the model and its file."""
    folder = tmp_path_factory.mktemp("gguf")
    model = original(folder / "llama", num_key_value_heads=1)
    return model, write_gguf(folder / "captain.gguf", model)


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 99)[None]).logits


FAMILIES = {
    "Llama": {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "Mistral": {"sliding_window": None, "tie_word_embeddings": True},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 32},
}
KINDS = [*((family, "F32") for family in FAMILIES), ("Llama", "Q4_1"), ("Mistral", "F16"), ("Qwen2", "BF16"), ("Qwen3", "Q8_0")]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_weights_are_those_of_the_library(tmp_path, monkeypatch, family, kind):
    """The library's loader, given the configuration; and in float32 the model that the file was made of."""
    monkeypatch.setattr(gguf_file, "CHUNK", 1000)  # several to a matrix
    model = original(tmp_path / "model", family, **FAMILIES[family])
    checkpoint = open_checkpoint(write_gguf(tmp_path / "it.gguf", model, kind))
    loaded = load_model(checkpoint, CPU, "auto")
    dtype = torch.float32 if kind == "F32" else torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="it.gguf", config=checkpoint.config, dtype=dtype)
    expected, found = theirs.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name
    if kind == "F32":
        assert torch.equal(logits(loaded), logits(model))
        fields = ("hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size")
        for key in (*fields, "max_position_embeddings", "num_hidden_layers", "intermediate_size", "bos_token_id", "eos_token_id"):
            assert getattr(checkpoint.config, key) == getattr(model.config, key), key
    assert loaded.generation_config.eos_token_id == [1, 3]


def divisors(parameters, width=16):
    """As llama.cpp's converter computes them."""
    factors = []
    for index in range(0, width, 2):
        length = 2 * numpy.pi * parameters["rope_theta"] ** (index / width)
        smooth = (parameters["original_max_position_embeddings"] / length - 1) / 3
        plain = 1 if smooth > 1 else parameters["factor"] if smooth < 0 else 1 / ((1 - smooth) / parameters["factor"] + smooth)
        factors.append(plain)
    return factors


@pytest.mark.parametrize(
    ("parameters", "fields"),
    [
        (LLAMA3, []),
        (LLAMA3 | {"original_max_position_embeddings": 64}, [("add_rope_scaling_orig_ctx_len", 64)]),
        (
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)],
        ),
    ],
    ids=["llama3", "llama3 of a shorter context", "linear"],
)
def test_scaled_frequencies(tmp_path, parameters, fields):
    model = original(tmp_path / "model", rope_parameters=parameters)
    frequencies = {"rope_freqs.weight": divisors(parameters)} if parameters["rope_type"] == "llama3" else {}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "it.gguf", model, fields=fields, tensors=frequencies))
    assert checkpoint.config.rope_parameters == parameters
    assert torch.equal(logits(load_model(checkpoint, CPU, torch.float32)), logits(model))


def test_whole_way(tmp_path, llama):
    """Converted with nothing dropped, the model is what it was; what goes with it comes out of the file."""
    model, out = llama[0], str(tmp_path / "out")
    (tmp_path / "files").mkdir()
    file = write_gguf(tmp_path / "files" / "captain.gguf", model, merges=3837)
    planned = plan(file, kv_lora_rank=16, qk_rope_head_dim=16)
    report = convert(file, out, **OPTIONS)
    converted = AutoModelForCausalLM.from_pretrained(out)
    assert converted.dtype == torch.float32
    assert (logits(converted) - logits(model)).abs().max() < 1e-3 * logits(model).std()
    assert planned.bytes_written == report.bytes_written == open_checkpoint(out).bytes
    assert planned.bytes_read == info(file)["bytes"] < Path(file).stat().st_size
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["recipe"]["source"] == file
    assert record["recipe"]["source_sha256"] == {"captain.gguf": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "# captain.gguf with" in card
    assert converted.generation_config.eos_token_id == [1, 3]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token) == (0, 1, 2, None)
    text = "The captain looked at the sea and"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == text
    (tmp_path / "text.txt").write_text(f"{text} the sky. " * 20)
    measured = verify(out, against=file, text=str(tmp_path / "text.txt"), device="cpu")
    assert abs(measured.perplexity_ratio - 1) < 1e-3
    healing = {"teacher": file, "text": str(tmp_path / "text.txt"), "device": "cpu", "dry_run": True}
    assert heal(out, str(tmp_path / "healed"), **healing).memory_bytes["teacher"] == 4 * info(file)["parameters"]
    with pytest.raises(UserError, match="choose another output folder"):
        heal(out, str(tmp_path / "files"), **healing)


def test_quantized_is_converted_as_if_it_had_been_unpacked(tmp_path, llama):
    file, folder = write_gguf(tmp_path / "it.gguf", llama[0], "Q8_0"), tmp_path / "unpacked"
    checkpoint = open_checkpoint(file)
    load_model(checkpoint, CPU, torch.bfloat16).save_pretrained(folder)
    load_tokenizer(checkpoint.folder, file).save_pretrained(folder)
    reports = [convert(source, str(tmp_path / out), **OPTIONS) for source, out in ((file, "out"), (str(folder), "same"))]
    assert reports[0].bytes_read < reports[1].bytes_read
    assert {tensor.dtype for tensor in open_checkpoint(str(tmp_path / "out")).tensors.values()} == {"BF16"}
    first, second = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "same"))
    assert first == second


def test_interrupted_work_goes_on_with_the_same_file_alone(tmp_path, monkeypatch, llama):
    file, out = shutil.copy(llama[1], tmp_path / "it.gguf"), str(tmp_path / "out")

    def stop(*_arguments):
        raise KeyboardInterrupt

    def interrupted():
        with monkeypatch.context() as patch:
            patch.setattr(progress, "put_in_place", stop)
            with pytest.raises(KeyboardInterrupt):
                convert(str(file), out, **OPTIONS)

    interrupted()
    write_gguf(tmp_path / "it.gguf", llama[0], fields=[("add_description", "another")])
    with pytest.raises(UserError, match="unfinished work with other it.gguf of source_sha256"):
        convert(str(file), out, **OPTIONS)
    shutil.copy(llama[1], file)
    layers = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.incomplete").rglob("layer-*")}
    interrupted()
    assert layers == {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.incomplete").rglob("layer-*")} != {}


def test_nothing_is_left_behind(tmp_path, monkeypatch, llama):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    checkpoint = open_checkpoint(llama[1])
    assert [place.parent for place in (checkpoint.folder, *tmp_path.iterdir())] == [tmp_path, tmp_path]
    assert not list(checkpoint.folder.glob("*.gguf")) and load_tokenizer(checkpoint.folder, "it").eos_token_id == 1
    assert list(progress.source_fingerprint(checkpoint)) == ["captain.gguf"]
    del checkpoint
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_output_where_the_file_lies_is_refused(capsys, tmp_path, llama):
    file = shutil.copy(llama[1], tmp_path / "it.gguf")
    assert "choose another output folder" in refuses(capsys, "convert", file, tmp_path, "--overwrite", "--device", "cpu")
    assert file.exists()


REFUSED = {  # what of the file is otherwise, and what is said
    "another architecture": ({"architecture": "gemma3"}, "'gemma3'; .gguf files of llama, mistral, qwen2, qwen3 are read: give a"),
    "gpt2": ({"architecture": "gpt2"}, "is of architecture 'gpt2'"),
    "a part": ({"fields": [("add_uint16", "split.count", 3)]}, "is one of 3 parts; give one file, as llama-gguf-split --merge"),
    "projector": ({"fields": [("add_type", "mmproj")]}, "holds no language model but 'mmproj'"),
    "adapter": ({"fields": [("add_type", "adapter")]}, "holds no language model but 'adapter'"),
    "experts": ({"fields": [("add_expert_count", 8)]}, "is a mixture of 8 experts"),
    "yarn": (
        {"fields": [("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0)]},
        "rope type 'yarn' is not supported",
    ),
    "frequencies of its own": ({"tensors": {"rope_freqs.weight": [1, 2, 3, 1, 1, 1, 1, 1]}}, "are not those of rope type llama3"),
    "half of a head turned": ({"fields": [("add_rope_dimension_count", 8)]}, "turned in part"),
    "another tensor": ({"tensors": {"blk.0.attn_sinks.weight": [1, 2]}}, "holds blk.0.attn_sinks.weight, which is none"),
    "bias": ({"tensors": {"blk.0.attn_q.bias": [0.0] * 64}}, "has no tensor model.layers.0.self_attn.k_proj.bias"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_its_header(capsys, tmp_path, llama, changes, message):
    file = write_gguf(tmp_path / "it.gguf", llama[0], **changes)
    for words in (["plan", file], ["convert", file, tmp_path / "out", "--device", "cpu"]):
        assert message in refuses(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["it.gguf"]


def test_refused_for_how_it_is_stored(capsys, tmp_path, monkeypatch, llama):
    whole, file = Path(llama[1]).read_bytes(), tmp_path / "it.gguf"
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\n", "is not a GGUF file: it does not begin with GGUF; download it again"),
        (b"", "is not a GGUF file"),
        (whole[:1000], "is damaged, truncated"),
        (whole[:-1000], "is damaged, truncated"),
        (whole.replace(b"\0\0llama.block_count", b"\0\0llama.block_xxxxx"), "does not describe a 'llama' model"),
    ):
        file.write_bytes(content)
        assert message in refuses(capsys, "info", file)
    assert f"give one of its .gguf files, such as {tmp_path}/it.gguf" in refuses(capsys, "plan", tmp_path)
    (tmp_path / "text").write_bytes(b"text")
    assert "is a file; give a .gguf file, or the folder" in refuses(capsys, "plan", tmp_path / "text")
    assert "hf download REPOSITORY FILE" in refuses(capsys, "plan", "org/name-GGUF/name.Q4_K_M.gguf")
    (tmp_path / "blob").write_bytes(whole)  # as Ollama names them
    assert plan(str(tmp_path / "blob")).supported

    def unknown(*_arguments):
        raise NotImplementedError("Dequantization for F32 is not yet implemented")

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "dequantize", unknown)
        assert ".weight is stored as F32, which the package gguf cannot dequantize" in refuses(capsys, "plan", llama[1])
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert 'takes the package gguf, which is not installed: pip install "hf-mla[gguf]"' in refuses(capsys, "plan", llama[1])
