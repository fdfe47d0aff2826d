"""Numbers in long text and short tasks: the questions as they were asked for, and how answers are scored."""

import json
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import MODEL, VALIDATION
from transformers import AutoTokenizer, GenerationMixin

from hf_mla_conversion import verify
from hf_mla_conversion.cli import main
from hf_mla_conversion.commands.verify import choose_lengths
from hf_mla_conversion.errors import UserError
from hf_mla_conversion.mathematics import recall
from hf_mla_conversion.mathematics.recall import DEPTHS, EXAMPLES, FACT, NUMBER_ROOM, TASKS, Question


CHAT = "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
LENGTHS = [300, 513]


@pytest.fixture(scope="module", params=[None, CHAT], ids=["plain", "chat"])
def tokenizer(request):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = request.param
    return tokenizer


@pytest.mark.parametrize("length", LENGTHS)
def test_numbers_are_where_they_were_asked_for(tokenizer, length):
    found, frame = recall.needles(tokenizer, length, 3), recall.frame(tokenizer)
    longest = max(map(len, recall.prose(tokenizer)[0]))
    assert [*found] == [*DEPTHS]
    for depth, questions in found.items():
        assert len({question.answer for question in questions}) == 3
        for question in questions:
            assert len(question.ids) + NUMBER_ROOM == length
            text = tokenizer.decode(question.ids)
            assert text.count(question.answer) == 1
            facts = dict(re.findall(r"The special magic number for (\w+) is (\d{4})\.\n", text))
            key = next(key for key, value in facts.items() if value == question.answer)
            assert len(facts) == len(DEPTHS) and text.endswith(FACT.format(key=key))
            # The share of the text around that stands before: to half of a line.
            places = {}
            for name, value in facts.items():
                ids = tokenizer(f"{FACT.format(key=name)} {value}.\n")["input_ids"]
                places[name] = next(i for i in range(length) if question.ids[i : i + len(ids)] == ids), len(ids)
            first, last = len(frame[0]), len(tokenizer(f"\nWhat is the special magic number for {key}?\n")["input_ids"])
            last += len(frame[1]) + len(tokenizer(FACT.format(key=key))["input_ids"])
            around = len(question.ids) - first - last - sum(size for _, size in places.values())
            before = places[key][0] - first - sum(size for place, size in places.values() if place < places[key][0])
            assert abs(before - depth * around) <= longest / 2 < 50


def test_a_chat_is_the_templates_and_the_model_has_begun_to_answer():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = CHAT
    question = recall.needles(tokenizer, 300, 1)[0.5][0]
    text = tokenizer.decode(question.ids)
    assert text.startswith("<s>user:")
    assert re.search(r"\nWhat is the special magic number for (\w+)\?\n</s><s>assistant:The special magic number for \1 is$", text)


def test_questions_are_drawn_with_the_seed(tokenizer):
    assert recall.needles(tokenizer, 300, 2) == recall.needles(tokenizer, 300, 2)
    assert recall.needles(tokenizer, 300, 2) != recall.needles(tokenizer, 300, 2, seed=1)
    assert recall.tasks(tokenizer, 2) == recall.tasks(tokenizer, 2)
    assert recall.tasks(tokenizer, 2) != recall.tasks(tokenizer, 2, seed=1)


def test_a_text_begins_again_where_it_ends():
    lines = [[1, 2, 3], [4, 5], [6]]
    assert recall.filler(lines, 2, 4) == [[2, 3], [4, 5]]
    assert recall.filler(lines, 1, 8) == [[2, 3], [4, 5], [6], [1, 2, 3]]
    assert recall.filler(lines, 0, 2) == [[5], [6]]


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_asked_after_examples_that_are_right(name):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    answers = {
        "copy": lambda given: given,
        "last": lambda given: given.split(", ")[-1],
        "reverse": lambda given: ", ".join(reversed(given.split(", "))),
        "sort": lambda given: ", ".join(sorted(given.split(", "))),
        "add": lambda given: str(sum(map(int, given.split(" + ")))),
    }
    for question in recall.tasks(tokenizer, 3)[name]:
        text = tokenizer.decode(question.ids)
        pairs = re.findall(r"Input: (.*)\nOutput:(?: (.*))?", text)
        assert len(pairs) == EXAMPLES + 1 and pairs[-1][1] == "" and text.endswith("Output:")
        for given, answer in [*pairs[:-1], (pairs[-1][0], question.answer)]:
            assert answers[name](given) == answer
        assert len(tokenizer(f" {question.answer}")["input_ids"]) < question.room


SAID = [
    (" 4217.", True),
    (" 4217.\nThe", True),
    ("4217", True),
    (" 4217\n\nInput:", True),
    (" 42170.", False),
    (" 4217, 12", False),
    (" about 4217.", False),
    ("", False),
]


@pytest.mark.parametrize(("said", "right"), SAID)
def test_an_answer_is_all_that_is_said_in_a_line(said, right):
    assert recall.correct(said, "4217") is right


class Parrot(GenerationMixin):
    """A model that has an answer for every prompt, and looks at what it is given."""

    def __init__(self, tokenizer, answers, attention="sdpa"):
        self.tokenizer, self.answers, self.batches = tokenizer, answers, []
        self.config, self.device = SimpleNamespace(_attn_implementation=attention), torch.device("cpu")

    def generate(self, ids, attention_mask, max_new_tokens, do_sample, pad_token_id, **options):
        assert not do_sample and options == {"num_beams": 1, "repetition_penalty": 1.0}
        self.batches.append(len(ids))
        prompts = [tuple(row[mask.bool()].tolist()) for row, mask in zip(ids, attention_mask, strict=True)]
        said = [self.tokenizer(f" {self.answers[prompt]}")["input_ids"] for prompt in prompts]
        assert max(map(len, said)) <= max_new_tokens
        said = [each + [pad_token_id] * (max_new_tokens - len(each)) for each in said]
        return torch.cat([ids, torch.tensor(said)], dim=1)


@pytest.mark.parametrize(("attention", "batches"), [("sdpa", [4, 1, 5]), ("eager", [1] * 10)])
def test_the_share_that_is_right(monkeypatch, attention, batches):
    monkeypatch.setitem(recall.BATCH_TOKENS, "cpu", 40)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    source = random.Random(0)
    asked = {
        (10, 0.5): [Question(source.choices(range(3, 4000), k=10), "4217", 8) for _ in range(5)],
        "copy": [Question(source.choices(range(3, 4000), k=k), "river, sea", 12) for k in (8, 7, 8, 3, 4)],
    }
    answers = {tuple(question.ids): question.answer for some in asked.values() for question in some}
    answers[tuple(asked[10, 0.5][3].ids)] = "4218"
    answers[tuple(asked["copy"][0].ids)] = "river, sea, sea"
    model = Parrot(tokenizer, answers, attention)
    assert recall.accuracies(model, tokenizer, asked) == {(10, 0.5): 0.8, "copy": 0.8}
    assert model.batches == batches


def test_verify_asks_both_models(capsys, converted, monkeypatch):
    monkeypatch.setattr(recall, "NEEDLE_COUNTS", (1, 1))
    monkeypatch.setitem(recall.TASK_COUNT, "cpu", 1)
    words = ["verify", converted[0], "--against", MODEL, "--text", VALIDATION, "--tokens", "64", "--device", "cpu"]
    assert main([*words, "--needle-lengths", "300", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["needle"]
    assert [(each["length"], each["depth"], each["questions"]) for each in result["needles"]] == [(300, x, 1) for x in DEPTHS]
    assert [(each["task"], each["questions"]) for each in result["tasks"]] == [(name, 1) for name in TASKS]
    for each in result["needles"] + result["tasks"]:
        assert set(each["accuracy"]) == {"source", "converted"} and set(each["accuracy"].values()) <= {0.0, 1.0}


def test_a_table_of_answers(capsys, converted, monkeypatch):
    asked = {(length, depth): [Question([5], "1", 2)] for length in (300, 600) for depth in DEPTHS}
    monkeypatch.setattr("hf_mla_conversion.commands.verify.questions", lambda *_: {**asked, "copy": [Question([5], "1", 2)]})
    shares = iter([{**dict.fromkeys(asked, 1.0), "copy": 0.5}, {**dict.fromkeys(asked, 0.6), "copy": 0.25}])
    monkeypatch.setattr("hf_mla_conversion.commands.verify.accuracies", lambda *_: next(shares))
    words = ["verify", converted[0], "--against", MODEL, "--text", VALIDATION, "--tokens", "64", "--device", "cpu"]
    assert main([*words, "--needle"]) == 0
    lines = [re.split(" {2,}", line) for line in capsys.readouterr().out.splitlines()[-5:]]
    assert lines == [
        ["numbers found at depth", "0%", "25%", "50%", "75%", "100%"],
        ["300 tokens", *["100 -> 60 %"] * 5],
        ["600 tokens", *["100 -> 60 %"] * 5],
        ["short tasks", "copy"],
        ["answered exactly", "50 -> 25 %"],
    ]


def test_lengths():
    assert choose_lengths(False, None, 8192) == []
    assert choose_lengths(True, None, 8192) == [1024, 2048, 4096, 8192]
    assert choose_lengths(True, None, 3000) == [1024, 2048]
    assert choose_lengths(True, None, 512) == [512]
    assert choose_lengths(False, [600, 300, 600], 1024) == [300, 600]
    with pytest.raises(UserError, match="--needle-lengths has 2048; the model was trained for 1024: give at most that"):
        choose_lengths(True, [2048], 1024)


def test_beyond_the_context_of_training(capsys, converted, tmp_path, monkeypatch):
    """With the library's YaRN, written into config.json of both models."""
    monkeypatch.setattr(recall, "NEEDLE_COUNTS", (1, 1))
    monkeypatch.setitem(recall.TASK_COUNT, "cpu", 1)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 1024}
    folders = [shutil.copytree(folder, tmp_path / name) for folder, name in ((converted[0], "mla"), (MODEL, "source"))]
    words = ["verify", str(folders[0]), "--against", str(folders[1]), "--text", VALIDATION, "--tokens", "64", "--device", "cpu"]
    words += ["--needle-lengths", "1200", "--json"]
    for folder, said in zip(
        folders, ("give at most that, or write max_position", "rope_parameters in config.json of both"), strict=True
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048, "rope_parameters": yarn}))
    seen = []

    def answers(model, _tokenizer, asked):
        model.get_decoder().register_forward_hook(lambda _module, _inputs, output: seen.append(output.last_hidden_state))
        model(torch.tensor([asked[1200, 1.0][0].ids]), logits_to_keep=1)
        return dict.fromkeys(asked, 1.0)

    monkeypatch.setattr("hf_mla_conversion.commands.verify.accuracies", answers)
    assert main(words) == 0
    assert {each["length"] for each in json.loads(capsys.readouterr().out)["needle"]["needles"]} == {1200}
    original, ours = (states[0, 1024:] for states in seen)
    assert len(original) > 100 and torch.nn.functional.cosine_similarity(original, ours, dim=-1).median() > 0.9


def test_a_length_without_room(converted):
    with pytest.raises(UserError, match=r"^100 tokens have no room for 5 numbers and a question; \d+ have$"):
        verify(converted[0], against=MODEL, text=VALIDATION, tokens=64, needle_lengths=[100], device="cpu")
