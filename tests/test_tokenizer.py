"""The output's tokenizer is the source's; what goes with it is carried, and what cannot be is said before any work."""

import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MODEL, VALIDATION, make_source
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig

from hf_mla_conversion import convert, heal, verify
from hf_mla_conversion.commands import convert as converter_module
from hf_mla_conversion.commands import heal as healer_module
from hf_mla_conversion.errors import UserError
from hf_mla_conversion.mathematics.closed_form import mla_config
from hf_mla_conversion.output.writing import REMOTE_FILES, carry, check_carried
from hf_mla_conversion.source import tokenizer as tokenizer_module
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.text import read_text
from hf_mla_conversion.source.tokenizer import difference, load_tokenizer


QUICK = {"kv_lora_rank": 24, "qk_rope_head_dim": 16, "device": "cpu", "steps": 0, "calibration_tokens": 1024}
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CODE = """
from transformers import PreTrainedTokenizerFast
from .words_of_sources import SEA


class SourceTokenizer(PreTrainedTokenizerFast):
    def _encode_plus(self, text, *arguments, **options):
        texts = [text] if isinstance(text, str) else text
        changed = [each.replace("sea", SEA) for each in texts]
        return super()._encode_plus(changed[0] if isinstance(text, str) else changed, *arguments, **options)
"""


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Small random models of each family, to be copied."""
    folder = tmp_path_factory.mktemp("sources")
    return {family: make_source(folder / family, family, num_hidden_layers=1) for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}


@pytest.fixture
def source(sources, tmp_path):
    """A Llama to change."""
    return Path(shutil.copytree(sources["Llama"], tmp_path / "source"))


@pytest.fixture(scope="session")
def metaspace(tmp_path_factory):
    """A tokenizer.json as SentencePiece models are converted to, of 300 tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([read_text(VALIDATION, 1000)], trainer)
    path = tmp_path_factory.mktemp("metaspace") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def settings(folder, **changes):
    """Change tokenizer_config.json; None removes a key."""
    path = Path(folder) / "tokenizer_config.json"
    changed = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def custom(folder, module="words_of_sources"):
    """Give a source a tokenizer with code of its own, in two files."""
    (folder / "tokenization_of_sources.py").write_text(CODE.replace("words_of_sources", module))
    (folder / f"{module}.py").write_text('SEA = "ocean"\n')
    reference = "tokenization_of_sources.SourceTokenizer"
    settings(folder, tokenizer_class="SourceTokenizer", auto_map={"AutoTokenizer": [None, reference]})


def carried_to(folder, source, **options):
    """What a conversion of a source carries, its configuration and code in a folder; and the source's tokenizer."""
    checkpoint, out = open_checkpoint(str(source)), Path(folder)
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.name, **options)
    out.mkdir()
    mla_config(checkpoint.config, 24, 16, "float32").save_pretrained(out)
    for file in REMOTE_FILES:
        shutil.copy(Path(tokenizer_module.__file__).parents[2] / "hf_mla" / file, out)
    carry(checkpoint, out, tokenizer)
    return tokenizer


# What the library goes by: the class that is named, the family, and the vocabulary.
NAMED = {
    "Llama, plain": ("Llama", "LlamaTokenizer"),
    "Mistral, which overrules it": ("Mistral", "LlamaTokenizer"),
    "Mistral, fast": ("Mistral", "LlamaTokenizerFast"),
    "Qwen2, which overrules it": ("Qwen2", "LlamaTokenizerFast"),
    "Qwen2, none named": ("Qwen2", None),
    "Qwen3, none named": ("Qwen3", None),
    "Qwen3, which believes it": ("Qwen3", "LlamaTokenizer"),
}


def named(source, metaspace, tokenizer_class):
    """Give a source a tokenizer of 300 tokens, and the name of its class."""
    shutil.copy(metaspace, source)
    settings(source, tokenizer_class=tokenizer_class, backend=None, bos_token="<s>", eos_token="</s>", pad_token=None)


@pytest.mark.parametrize(("family", "tokenizer_class"), NAMED.values(), ids=NAMED)
def test_class_and_ids_are_the_sources(sources, metaspace, tmp_path, family, tokenizer_class):
    source = Path(shutil.copytree(sources[family], tmp_path / "source"))
    named(source, metaspace, tokenizer_class)
    carried_to(tmp_path / "out", source)
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "out"))
    assert type(after) is type(before)
    for text in ("The Captain  looked\n at the sea", " <s>", ""):
        assert after(text)["input_ids"] == before(text)["input_ids"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == metaspace.read_bytes()


def test_a_process_without_hf_mla_gets_the_same(sources, metaspace, tmp_path):
    """What is compared here, where hf_mla is imported, is what a user gets where it is not."""
    expected = {}
    for name, family, tokenizer_class in (
        ("mistral", "Mistral", "LlamaTokenizer"),
        ("qwen", "Qwen2", None),
        ("custom", "Llama", ""),
    ):
        source = Path(shutil.copytree(sources[family], tmp_path / f"{name}-source"))
        if name == "custom":
            custom(source)
        else:
            named(source, metaspace, tokenizer_class)
        tokenizer = carried_to(tmp_path / name, source, trust_remote_code=name == "custom")
        expected[name] = [type(tokenizer).__name__, tokenizer("The Captain looked at the sea.")["input_ids"]]
    code = (
        "import sys, json; sys.modules['hf_mla'] = None; from transformers import AutoTokenizer; found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)\n"
        "    found[name] = [type(tokenizer).__name__, tokenizer('The Captain looked at the sea.')['input_ids']]\n"
        "print(json.dumps(found))"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", code, *expected]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def change_json(file, change):
    """A function that changes a JSON file of a folder."""

    def apply(folder):
        data = json.loads((folder / file).read_text())
        change(data)
        (folder / file).write_text(json.dumps(data))

    return apply


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}
DIFFERENCES = {
    "class": (
        lambda folder: settings(folder, tokenizer_class="Qwen2Tokenizer"),
        "class is 'Qwen2Tokenizer', not 'TokenizersBackend'",
    ),
    "special token": (lambda folder: settings(folder, eos_token="<|pad|>"), "special tokens map"),
    "added token": (lambda folder: settings(folder, extra_special_tokens=["<|new|>"]), "vocabulary size is 4097, not 4096"),
    "vocabulary": (change_json("tokenizer.json", lambda data: swap(data["model"]["vocab"], "a", "b")), "vocabulary is {"),
    "splitting": (
        change_json("tokenizer.json", lambda data: data.update(pre_tokenizer=DIGITS)),
        "ids with special",
    ),
    "decoding": (change_json("tokenizer.json", lambda data: data.update(decoder=None)), "text of the ids of"),
    "template": (lambda folder: (folder / "chat_template.jinja").write_text(TEMPLATE + " "), "chat template 'default' is"),
    "one more template": (lambda folder: more_templates(folder, "new"), "names of chat templates is"),
}


def swap(vocabulary, first, second):
    """Exchange two tokens."""
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def more_templates(folder, name):
    """Give a folder another chat template."""
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / f"{name}.jinja").write_text("{{ eos_token }}" + TEMPLATE)


@pytest.mark.parametrize(("change", "message"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_differences_are_seen(source, tmp_path, change, message):
    (source / "chat_template.jinja").write_text(TEMPLATE)
    other = Path(shutil.copytree(source, tmp_path / "other"))
    change(other)
    original = load_tokenizer(source, "source")
    assert difference(load_tokenizer(source, "source"), original) is None
    assert difference(load_tokenizer(other, "other"), original).startswith(message)


def test_rendered_templates_are_compared(source):
    """The same template can give another text, and where it refuses a conversation, the other must too."""
    (source / "chat_template.jinja").write_text(TEMPLATE + "{% if tools %}{{ raise_exception('no') }}{% endif %}")
    behaviour = tokenizer_module.behaviour(load_tokenizer(source, "source"))
    assert behaviour["a chat with tools by template 'default'"] == "TemplateError"
    system = behaviour["a chat with a system and a generation prompt by template 'default'"]
    assert system == "[system]Be brief.[user] Why is the sky blue?\n[assistant]"


def test_chat_templates_are_carried_by_name(source, tmp_path):
    (source / "chat_template.jinja").write_text(TEMPLATE)
    more_templates(source, "rag")
    carried_to(tmp_path / "out", source)
    templates = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert templates == {"default": TEMPLATE, "rag": "{{ eos_token }}" + TEMPLATE}


def test_what_the_files_do_not_give_is_saved_anew(source, tmp_path):
    """As a tokenizer that is put right on loading because of what config.json says, which is not said any more."""
    checkpoint, out = open_checkpoint(str(source)), tmp_path / "out"
    tokenizer = load_tokenizer(source, "source")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    out.mkdir()
    mla_config(checkpoint.config, 24, 16, "float32").save_pretrained(out)
    carry(checkpoint, out, tokenizer)
    assert AutoTokenizer.from_pretrained(out)("sea")["input_ids"] == tokenizer("sea")["input_ids"]
    assert tokenizer("sea")["input_ids"] != AutoTokenizer.from_pretrained(source)("sea")["input_ids"]


@pytest.fixture
def no_questions(monkeypatch):
    """Fails where something is asked on stdin."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on stdin"))


def test_code_of_a_tokenizer(source, tmp_path, no_questions):
    """It is carried with what it imports, and runs only where that is allowed."""
    custom(source)
    with pytest.raises(UserError, match=r"\(tokenization_of_sources.py, words_of_sources.py\).*pass --trust-remote-code"):
        convert(str(source), str(tmp_path / "out"), **QUICK)
    assert not (tmp_path / "out").exists()
    convert(str(source), str(tmp_path / "out"), trust_remote_code=True, **QUICK)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer("the sea")["input_ids"] == AutoTokenizer.from_pretrained(MODEL)("the ocean")["input_ids"]
    assert "the tokenizer comes with code" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="pass --trust-remote-code"):
        verify(str(tmp_path / "out"), against=str(source), text=VALIDATION, tokens=64, device="cpu")
    report = verify(str(tmp_path / "out"), against=str(source), text=VALIDATION, tokens=64, device="cpu", trust_remote_code=True)
    assert report.tokens == 64


def test_code_that_cannot_be_carried(source, tmp_path):
    custom(source, "layer_mla")
    with pytest.raises(UserError, match="has code of its tokenizer in layer_mla.py, where the output has the model's"):
        carried_to(tmp_path / "out", source, trust_remote_code=True)
    (source / "tokenization_of_sources.py").unlink()
    with pytest.raises(UserError, match="names code for the tokenizer, tokenization_of_sources.py, which cannot be read"):
        load_tokenizer(source, "source", trust_remote_code=True)


def test_convert_checks_before_and_after_the_work(source, tmp_path, monkeypatch):
    real, calls = converter_module.Job.measure, []
    monkeypatch.setattr(converter_module.Job, "measure", lambda *words: calls.append("measured") or real(*words))

    def compare(answers):
        monkeypatch.setattr("hf_mla_conversion.output.writing.difference", lambda *_: next(answers, "ids of 'a' is [1], not [2]"))
        with pytest.raises(UserError, match="would not be that of .*source: ids of 'a' is") as caught:
            convert(str(source), str(tmp_path / "out"), **QUICK)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    compare(iter([]))
    assert not calls and sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    compare(iter([None]))  # all is well at first
    assert calls == ["measured"]


def test_verify_and_heal_tell_of_another_tokenizer(source, tmp_path, caplog):
    out = tmp_path / "out"
    convert(str(source), str(out), **QUICK)
    healing = {"teacher": str(source), "text": VALIDATION, "device": "cpu", "steps": 1}
    (out / "chat_template.jinja").write_text(TEMPLATE)  # as after fine-tuning
    assert verify(str(out), against=str(source), text=VALIDATION, tokens=64, device="cpu").tokens == 64
    assert "out is not quite that of" in caplog.text and "names of chat templates is ['default'], not []" in caplog.text

    stored = json.loads((out / "tokenizer.json").read_text())
    stored["model"]["merges"] = stored["model"]["merges"][:100]
    (out / "tokenizer.json").write_text(json.dumps(stored))
    message = r"the tokenizer of .*out is not that of .*source: ids with"
    with pytest.raises(UserError, match=message):
        verify(str(out), against=str(source), text=VALIDATION, tokens=64, device="cpu")
    with pytest.raises(UserError, match=message):
        heal(str(out), str(tmp_path / "healed"), **healing)


def test_heal_checks_the_finished_folder(source, tmp_path, monkeypatch):
    convert(str(source), str(tmp_path / "out"), **QUICK)
    checked = []
    monkeypatch.setattr(
        healer_module, "check_same_tokenizer", lambda folder, *_: checked.append((folder, sorted(os.listdir(folder))))
    )
    options = {"steps": 1, "step_tokens": 256, "train": "lora", "device": "cpu"}
    heal(str(tmp_path / "out"), str(tmp_path / "healed"), teacher=str(source), text=VALIDATION, **options)
    (before, _), (after, files) = checked
    assert before == tmp_path / "out" and after.name == "output" and files == sorted(os.listdir(tmp_path / "healed"))


QUANTO = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}
INT8 = {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}}


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(("cache", "kept"), [(QUANTO, False), (INT8, True), ({"cache_implementation": "static"}, True)])
def test_settings_of_generate(source, tmp_path, caplog, file, cache, kept):
    """Carried, wherever the source has them, but for those that no converted model can do."""
    (source / "generation_config.json").unlink()
    known = json.loads((source / file).read_text()) if file == "config.json" else {}
    (source / file).write_text(json.dumps(known | {"do_sample": True, "temperature": 0.5} | cache))
    carried_to(tmp_path / "out", source)
    loaded = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (loaded.do_sample, loaded.temperature) == (True, 0.5)
    assert loaded.cache_implementation == (cache["cache_implementation"] if kept else None)
    assert loaded.cache_config == (cache.get("cache_config") if kept else None)
    assert "cache_implementation" not in json.loads((tmp_path / "out" / "config.json").read_text())
    if kept and file == "generation_config.json":
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    checkpoint = open_checkpoint(str(source))
    check_carried(checkpoint, mla_config(checkpoint.config, 24, 16, "float32"), load_tokenizer(source, "source"))
    assert ("'backend': 'quanto', 'nbits': 4}} is left out" in caplog.text) == (not kept)


def test_files_are_carried_and_not_what_is_named_like_them(source, tmp_path):
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "of_others.json").write_text("{}")
    (source / "LICENSES").mkdir()
    (source / "LICENSES" / "MIT.txt").write_text("MIT")
    (tmp_path / "blob").write_bytes((source / "tokenizer.json").read_bytes())
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")  # as in the Hub's cache
    carried_to(tmp_path / "out", source)
    assert not (tmp_path / "out" / "tokenizer").exists() and not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "LICENSES" / "MIT.txt").read_text() == "MIT"
    (source / "NOTICE").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="source/NOTICE cannot be read: No such file or directory"):
        convert(str(source), str(tmp_path / "converted"), **QUICK)


@pytest.mark.parametrize(
    ("file", "message"),
    {
        "tokenizer.model": "takes sentencepiece and protobuf: pip install sentencepiece protobuf",
        "tekken.json": "takes mistral-common and pillow: pip install mistral-common pillow",
        "qwen.tiktoken": "takes tiktoken: pip install tiktoken",
    }.items(),
)
def test_missing_packages_are_named(source, monkeypatch, file, message):
    (source / "tokenizer.json").rename(source / file)
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        load_tokenizer(source, "source")
