"""Texts as users have them: plain, in lines of JSON, in data sets; as far as they are read, and what is refused."""

import itertools
import json
import lzma
import os
import sys
from functools import partial

import pytest
from conftest import MODEL, make_source
from transformers import AutoTokenizer

from hf_mla_conversion import UserError, convert, heal, verify
from hf_mla_conversion.commands import heal as heal_module
from hf_mla_conversion.commands import verify as verify_module
from hf_mla_conversion.source import text as text_module
from hf_mla_conversion.source.text import joined, read_text, token_windows


TEMPLATE = "{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}<|eos|>{% endfor %}"
CHAT = [{"role": "user", "content": "Where is the sea?"}, {"role": "assistant", "content": "There, \u2713."}]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "chats.jsonl"
    file.write_text(f"{json.dumps({'messages': CHAT})}\n" * 100)
    return str(file)


NOT_TEXT = {
    "chat.json": '[{"text": "The sea"}]',
    "chat.JSON.xz": lzma.compress(b'{"text": "The sea"}'),
    "table.csv": "text\nThe sea\n",
    "table.parquet": b"PAR1",
    "text.txt.gz": b"\x1f\x8b",
}


@pytest.mark.parametrize(("name", "content"), NOT_TEXT.items())
def test_what_is_no_plain_text_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"is not plain text \(\.\w+\); write the text that is in it to a \.txt or \.jsonl"):
        read_text(str(tmp_path / name), 100)
    with pytest.raises(UserError, match="there is no text file"):
        read_text(str(tmp_path / f"no-{name}"), 100)


def test_encodings_of_text(tmp_path):
    (tmp_path / "marked.txt").write_text("The sea", encoding="utf-8-sig")
    assert read_text(str(tmp_path / "marked.txt"), 100) == "The sea"
    (tmp_path / "wide.txt").write_text("The sea", encoding="utf-16-le")
    with pytest.raises(UserError, match="zero bytes"):
        read_text(str(tmp_path / "wide.txt"), 100)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="is a pipe or device"):
        read_text(str(tmp_path / "pipe.txt"), 100)


def test_data_sets_are_not_asked_for_code_and_hold_strings(monkeypatch):
    rows = [{"text": "The sea"}, {"text": None}, {"text": "and the ship"}]

    def load_dataset(*_, **__):
        assert os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] == "0"
        return rows

    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "")
    monkeypatch.delenv("HF_DATASETS_TRUST_REMOTE_CODE")
    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    sys.modules["datasets"].load_dataset = load_dataset
    assert read_text("org/name", 100) == "The sea\n\n\n\nand the ship"
    rows.append({"text": ["The", "sea"]})
    with pytest.raises(UserError, match='row 4 has no string in "text" but list'):
        read_text("org/name", 100)


def test_chats_of_data_sets(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    rows = [{"messages": CHAT}, {"messages": None}]
    sys.modules["datasets"].load_dataset = lambda *_, **__: rows
    assert read_text("org/name", 100, tokenizer=tokenizer) == tokenizer.apply_chat_template(CHAT, tokenize=False) + "\n\n"
    rows.append({"answer": "The sea"})
    with pytest.raises(UserError, match='data set org/name, row 3 has answer; "text" or "messages" is needed'):
        read_text("org/name", 100, tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.JSONL.xz"])
def test_lines_of_json(tmp_path, tokenizer, name):
    rows = [{"text": "The sea\n"}, {"messages": CHAT}, {"text": None, "messages": None}, {"text": "and \ud83d", "messages": CHAT}]
    content = "".join(json.dumps(row) + "\r\n" for row in rows) + "\n" + '{"text": "the shi'  # as `head -c` leaves it
    (tmp_path / name).write_bytes(lzma.compress(content.encode()) if name.endswith("xz") else content.encode())
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False)
    text = read_text(str(tmp_path / name), 100, tokenizer=tokenizer)
    assert text == f"The sea\n\n\n{chat}\n\n\n\nand ?"


def test_special_tokens_of_a_chat_are_read_as_such(tokenizer, chats):
    expected = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert expected.count(tokenizer.eos_token_id) == 2
    windows = token_windows(read_text(chats, 100, tokenizer=tokenizer), tokenizer, len(expected), len(expected))
    assert windows.tolist() == [expected]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "The sea}', "is not JSON; each line must be an object"),
        ("[" * 100000, "is not JSON"),
        ('"The sea"', 'is no object; "text" or "messages" is needed'),
        ("{}", "has nothing"),
        ('{"prompt": "The", "answer": "sea"}', 'has prompt, answer; "text" or "messages" is needed'),
        ('{"text": ["The", "sea"]}', 'has no string in "text" but list'),
        ('{"messages": "The sea"}', "that are no list of objects"),
        ('{"messages": {"role": "user", "content": "The sea"}}', "that are no list of objects"),
        ('{"messages": [{"role": "user", "content": ["The sea"]}]}', '"role" and "content", strings both'),
        ('{"messages": [{"content": "The sea"}]}', '"role" and "content", strings both'),
        ('{"messages": [{"role": "user", "content": "The sea"}]}', "the chat template does not take: no sea"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, tokenizer, monkeypatch, line, message):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no sea') }}")
    (tmp_path / "chat.jsonl").write_text('{"text": "The sea"}\n' * 2 + line + "\n")
    with pytest.raises(UserError, match=r"chat\.jsonl, line 3 ") as caught:
        read_text(str(tmp_path / "chat.jsonl"), 100, tokenizer=tokenizer)
    assert message in str(caught.value)
    assert read_text(str(tmp_path / "chat.jsonl"), 1) == "The sea\n\nThe sea"  # what is not used is not read


def test_no_more_is_read_than_is_used(tmp_path, monkeypatch, tokenizer):
    assert joined(itertools.repeat(("", {"text": "sea"})), 8, tokenizer) == "sea\n\nsea"
    monkeypatch.setattr(text_module, "LINE", 20)
    (tmp_path / "long.jsonl").write_text('{"text": "The captain and the sea"}')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_text(str(tmp_path / "long.jsonl"), 100)


def test_a_chat_takes_a_template(chats):
    for tokenizer in (None, AutoTokenizer.from_pretrained(MODEL)):
        with pytest.raises(UserError, match='line 1 has "messages", for which the tokenizer has no chat template'):
            read_text(chats, 100, tokenizer=tokenizer)


def test_every_command_reads_chats(tmp_path, tokenizer, chats, monkeypatch):
    source, out = make_source(tmp_path / "source"), str(tmp_path / "out")
    tokenizer.save_pretrained(source)
    sizes = {"kv_lora_rank": 12, "qk_rope_head_dim": 8, "calibration_tokens": 512, "steps": 0, "device": "cpu"}
    convert(source, out, calibration=chats, **sizes)
    read = []

    def stop(text, *_):
        read.append(text)
        raise KeyboardInterrupt

    chat = tokenizer.apply_chat_template(CHAT, tokenize=False)
    for module, call in (
        (verify_module, partial(verify, out, against=source, text=chats, device="cpu")),
        (heal_module, partial(heal, out, str(tmp_path / "healed"), teacher=source, text=chats, steps=1, device="cpu")),
    ):
        monkeypatch.setattr(module, "token_windows", stop)
        with pytest.raises(KeyboardInterrupt):
            call()
        assert read.pop().startswith(f"{chat}\n\n{chat}")
