"""`verify --html`: what the page holds, that it asks for nothing and trusts no text, and one line where it cannot be written."""

import json
import os
import shlex
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from conftest import MODEL, VALIDATION
from test_plot import refuses
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mla_conversion.cli import main, parser
from hf_mla_conversion.commands import verify as verifier
from hf_mla_conversion.errors import UserError
from hf_mla_conversion.mathematics import recall
from hf_mla_conversion.output.page import element, joined, layers, ticks, write_page
from hf_mla_conversion.output.plotting import check_file
from hf_mla_conversion.output.reports import AnswerReport
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.text import read_text


NASTY = "<i onclick=alert(1)>&amp; \"both' {quotes}"
VOID = {"meta", "link"}


class Page(HTMLParser):
    """The elements of a page in order, each with its attributes and its text; every tag must be closed by its own."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append(
            SimpleNamespace(tag=tag, text="", inside=[each.tag for each in self.open], **{"given": dict(attributes)})
        )
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        for each in self.open:
            each.text += data

    def all(self, tag, kind=None):
        return [each for each in self.elements if each.tag == tag and (kind is None or kind in each.given.get("class", "").split())]

    def texts(self, tag, kind=None):
        return [each.text for each in self.all(tag, kind)]


@pytest.fixture(scope="module")
def shown(tmp_path_factory, closed_form):
    """The page of the bundled pair under nasty names at two lengths, what the command printed, and the command."""
    folder = tmp_path_factory.mktemp("page")
    names = {key: folder / f"{key} {NASTY}" for key in ("out", "source", "text")}
    names["text"] = names["text"].with_name(f"text {NASTY}.txt")
    names["out"].symlink_to(closed_form)
    names["source"].symlink_to(MODEL)
    names["text"].write_text(read_text(VALIDATION, 1100), encoding="utf-8")
    file = folder / "report.html"
    words = ["verify", names["out"], "--against", names["source"], "--text", names["text"], "--tokens", 1024, "--device", "cpu"]
    words = [str(word) for word in [*words, "--needle-lengths", 300, 400, "--html", file, "--json"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifier, "VERIFICATION_WINDOW", 256)
        patch.setattr(recall, "NEEDLE_COUNTS", (1, 1))
        patch.setattr(recall, "ANSWER_ROOM", 8)
        patch.setitem(recall.TASK_COUNT, "cpu", 1)
        patch.setitem(sys.modules, "matplotlib", None)  # it is not needed
        patch.setattr("builtins.print", lambda text: names.setdefault("printed", text))
        assert main(words) == 0
    text = file.read_text(encoding="utf-8")
    assert os.listdir(folder).count("report.html") == 1 and len(os.listdir(folder)) == 4  # nothing half-written
    return SimpleNamespace(page=Page(text), raw=text, report=json.loads(names["printed"]), words=words, names=names)


def test_it_asks_for_nothing_and_runs_nothing(shown):
    assert shown.raw.startswith("<!doctype html>\n")
    assert not shown.page.all("script") and not shown.page.all("i")
    for each in shown.page.elements:
        assert not [name for name in each.given if name.startswith("on")]
        assert {each.given[name] for name in ("src", "href", "action") if name in each.given} <= {"data:,"}
    (style,) = shown.page.texts("style")
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    (policy,) = [each.given["content"] for each in shown.page.all("meta") if "http-equiv" in each.given]
    assert policy.startswith("default-src 'none'; ")


def test_names_stand_there_as_they_are(shown):
    assert shown.page.texts("h1") == [f"out {NASTY} beside source {NASTY}"]
    cells = shown.page.texts("td")
    assert cells[:2] == [str(shown.names["source"]), str(shown.names["out"])]
    assert f"Perplexity on {shown.names['text']}" in shown.page.texts("h2")
    (command,) = shown.page.texts("pre")
    given = [vars(parser().parse_args(words)) for words in (shlex.split(command)[1:], shown.words)]
    assert given[0] == given[1] | {"json": False}


def test_all_that_was_measured_is_there(shown):
    report, cells = shown.report, [*shown.page.texts("td"), *shown.page.texts("th")]
    assert shown.page.texts("p", "verdict") == [report["verdict"]]
    assert len(report["contexts"]) == 2
    for context in report["contexts"]:
        assert f"{context['window']:,}" in cells and f"{context['top1_agreement']:.1%}" in cells and f"{context['kl']:.4f}" in cells
        for measured in [context, *context["positions"]]:
            for side in ("source", "converted"):
                assert f"{measured['perplexity'][side]:.3f}" in cells
            assert f"x {measured['perplexity_ratio']:.4f}" in cells
        assert f"{context['positions'][-1]['start']:,} to {context['window'] - 1:,}" in cells
    assert cells[2:6] == ["192", "60", "4,608", "1,440, 68.8% less"]  # numbers a layer, and bytes of six in float32
    for each in report["needle"]["needles"] + report["needle"]["tasks"]:
        assert f"{100 * each['accuracy']['source']:.0f} -> {100 * each['accuracy']['converted']:.0f} %" in cells
    assert {"300 tokens", "400 tokens", "copy", "answered exactly"} <= {*cells}
    assert "Questions: 1 at 300 tokens, 1 at 400 tokens, 1 of copy" in " ".join(shown.page.texts("p", "note"))
    assert {torch.__version__, sys.version.split()[0], "float32"} <= {*cells}


def test_a_picture_for_each_length_and_for_the_layers(shown):
    with open(shown.names["out"] / "conversion.json", encoding="utf-8") as file:
        errors = [(layer["layer"], layer["error_closed_form"]) for layer in json.load(file)["report"]["layers"]]
    expected = [errors]
    for context in shown.report["contexts"]:
        middles = [(part["start"] + part["end"]) // 2 for part in context["positions"]]
        for side in ("source", "converted"):
            expected.append([*zip(middles, [part["perplexity"][side] for part in context["positions"]], strict=True)])
    assert len(shown.page.all("svg")) == len(shown.page.all("figure")) == 3
    lines = [[tuple(map(float, point.split(","))) for point in each.given["points"].split()] for each in shown.page.all("polyline")]
    for line, points in zip(lines, [*expected[1:], expected[0]], strict=True):
        places = {value: [place[axis] for place in line] for axis, value in enumerate("xy")}
        for axis, value in enumerate("xy"):  # to scale
            wanted = [point[axis] for point in points]
            least, most = wanted.index(min(wanted)), wanted.index(max(wanted))  # far apart: places are rounded
            slope = (places[value][most] - places[value][least]) / (wanted[most] - wanted[least])
            assert slope > 0 if value == "x" else slope < 0  # the picture's y points down
            for place, number in zip(places[value], wanted, strict=True):
                assert place == pytest.approx(places[value][least] + slope * (number - wanted[least]), abs=0.3)
    said = [each.text for each in shown.page.all("title") if "circle" in each.inside]
    assert f"closed form, layer 2: {errors[2][1]:,.4g}" in said and len(said) == sum(map(len, expected))


def test_answers_are_transformers_own(shown):
    assert shown.page.texts("h3") == [*recall.PROMPTS]
    said = shown.page.texts("div", "said")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for place, (path, side) in enumerate([(MODEL, "original"), (shown.words[1], "converted")]):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for prompt, answer in zip(recall.PROMPTS, said[place::2], strict=True):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            output = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
            assert answer == side + tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    keys = {"original": "source", "converted": "converted"}
    assert said == [name + each[key] for each in shown.report["answers"] for name, key in keys.items()]


def test_a_chat_is_the_templates():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    turns = [{"role": "user", "content": recall.PROMPTS[5]}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert recall.open_questions(tokenizer)[5].ids == ids
    assert tokenizer.decode(ids) == "<s>What is 17 plus 25?</s><s>"
    tokenizer.chat_template = "{{ raise_exception('only for experts') }}"
    assert tokenizer.decode(recall.open_questions(tokenizer)[5].ids) == "What is 17 plus 25?"


def test_what_models_say_is_text(tmp_path, shown):
    """Markup, the beginnings and ends of it, nothing, and half a character, which a path may have."""
    report = verifier_report(shown.report, [("</p><script>alert(1)</script>", "<!--"), ("", "\udce9"), ("a\n  b", "a\n  b")])
    checkpoints = open_checkpoint(MODEL), open_checkpoint(shown.words[1])
    write_page(str(tmp_path / "a.html"), report, *checkpoints, text="t", device="d", command="c")
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    said = [each.text for each in page.all("p") if "dir" in each.given]
    assert said == ["</p><script>alert(1)</script>", "<!--", "", "?", "a\n  b", "a\n  b"]
    assert not page.all("script")
    assert "1 of 3 are the same to the letter" in page.texts("p", "note")[0]
    assert not [heading for heading in page.texts("h2") if heading.startswith("Numbers found")]


def verifier_report(printed, answers):
    """A report of what was measured before, with other answers and no needles."""
    contexts = [context_report(each) for each in printed["contexts"]]
    fixed = {key: printed[key] for key in ("absorbed_vs_expanded_max_error", "verdict", "passed", "dtype")}
    return verifier.VerifyReport(
        **vars(contexts[0]),
        contexts=contexts,
        kv_bytes_per_token=verifier.PerSide(**printed["kv_bytes_per_token"]),
        answers=[AnswerReport("a prompt", *each) for each in answers],
        **fixed,
    )


def context_report(printed):
    positions = [verifier.PositionReport(**verifier.with_sides(part)) for part in printed["positions"]]
    return verifier.ContextReport(**verifier.with_sides({**printed, "positions": positions}))


@pytest.mark.parametrize(
    "record",
    [
        None,
        "{",
        "[]",
        '{"report": []}',
        '{"report": {}}',
        '{"report": {"layers": []}}',
        '{"report": {"layers": [{"layer": 0, "error_closed_form": "<b>", "error_reconstructed": "x"}]}}',
    ],
)
def test_without_a_record_the_layers_are_left_out(tmp_path, record):
    if record is not None:
        (tmp_path / "conversion.json").write_text(record, encoding="utf-8")
    page = Page(layers(SimpleNamespace(folder=tmp_path, name=NASTY)))
    assert page.texts("p") == [f"{NASTY} has no conversion.json that says how well each layer was converted."]
    assert not page.all("svg")


@pytest.mark.parametrize("trained", [{}, {"healing": [{}]}])
def test_layers_of_a_model_that_was_trained_since(tmp_path, trained):
    layer = {"layer": 0, "error_closed_form": 0.0, "error_reconstructed": None}  # a single point, exact
    (tmp_path / "conversion.json").write_text(json.dumps({"report": {"layers": [layer]}, **trained}), encoding="utf-8")
    page = Page(layers(SimpleNamespace(folder=tmp_path, name="a")))
    assert page.texts("p") == ["Before the whole model was trained."] * bool(trained)
    assert len(page.all("polyline")) == len(page.all("circle")) == 1


def test_ticks():
    for most in (0, 1e-7, 0.3, 1, 5, 6, 29, 1023, 1e6, 1e304):
        marks = ticks(most)
        assert 2 <= len(marks) <= 7 and marks[0] == 0 and marks[-1] >= most
        assert most == 0 or marks[-2] < most
        assert f"{marks[1]:.0e}"[0] in "125"
    assert ticks(3, 1.0) == [0, 1, 2, 3]


def test_elements_escape_all_but_markup():
    inner = element("b", NASTY, class_=NASTY, text_anchor="end")
    (made,) = Page(inner).elements
    assert (made.text, made.given) == (NASTY, {"class": NASTY, "text-anchor": "end"})
    assert joined([inner, "<"]) == inner + "&lt;"


def test_where_it_cannot_be_written_is_known_before_the_work(capsys, tmp_path):
    words = ["verify", "no such checkpoint", "--against", MODEL, "--text", VALIDATION, "--html"]
    assert "must end in one of .html, .htm" in refuses(capsys, *words, tmp_path / "report.txt")
    assert "must end in one of .html, .htm" in refuses(capsys, *words, tmp_path)
    assert "cannot be written: No such file" in refuses(capsys, *words, tmp_path / "none" / "a.html")
    (tmp_path / "folder.html").mkdir()
    assert "cannot be written: Is a directory" in refuses(capsys, *words, tmp_path / "folder.html")
    assert "an empty path was given" in refuses(capsys, *words, "")
    assert "no such checkpoint" in refuses(capsys, *words, tmp_path / "a.html")
    assert os.listdir(tmp_path) == ["folder.html"]


def test_a_page_that_fails_leaves_what_was_there(tmp_path, monkeypatch, shown):
    file = tmp_path / "a.html"
    file.write_text("before")
    check_file("--html", str(file), [".html"])
    assert file.read_text() == "before"

    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    report, checkpoints = verifier_report(shown.report, []), (open_checkpoint(MODEL), open_checkpoint(shown.words[1]))
    with pytest.raises(UserError, match="a.html cannot be written: No space left"):
        write_page(str(file), report, *checkpoints, text="t", device="d", command="c")
    assert os.listdir(tmp_path) == ["a.html"] and file.read_text() == "before"
