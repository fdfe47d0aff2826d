"""What README.md and the pages of docs/ say is true: links, names, options, keys, commands and code."""

import ast
import doctest
import importlib
import re
import shlex
import shutil
from argparse import _SubParsersAction
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import MODEL, make_mla
from native_models import config_and_class

from hf_mla.cache_mla import CACHE_NAME
from hf_mla_conversion import info
from hf_mla_conversion.cli import parser
from hf_mla_conversion.output import reports


ROOT = Path(__file__).parent.parent
FOLDERS = {"hf_mla": "hf_mla", "conversion": "hf_mla_conversion"}  # by their import names
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    """The blocks of code of a page in a language; "" for those that name none."""
    return [code for name, code in CODE.findall(text_of(page)) if name == language]


@cache
def anchors(page):
    """What links into a page may name: its headings, as GitHub and the site spell them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sections(page):
    """A page in parts: what stands under each heading of the second level, by its name."""
    first, *parts = re.split(r"^## (.*)\n", text_of(page), flags=re.MULTILINE)
    return {"": first} | dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_readme_is_short():
    assert text_of("README.md").count("\n") <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", text_of(page))):
        if link.startswith(("https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.is_file(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_walk_names_what_is_there():
    """`path:function` or `path:Class.method`."""
    named = set(re.findall(r"`([\w/]+\.py):([\w.]+)`", text_of("docs/walk.md")))
    assert len(named) > 40
    for path, name in named:
        tree = ast.parse(text_of(path))
        for part in name.split("."):
            found = [node for node in tree.body if getattr(node, "name", None) == part]
            assert found, f"{path} has no {name}"
            tree = found[0]


def test_every_picture_names_its_command():
    shown = set()
    for page in (page for page in PAGES if page.parent.name == "docs"):
        for section in sections(page).values():
            for picture in re.findall(r"^!\[.+\]\(pictures/(\w+)\.svg\)$", section, re.MULTILINE):
                shown.add(picture)
                scripts = [ROOT / script for script in re.findall(r"`(?:python )?(benchmarks/\w+\.py)`", section)]
                assert any(f"def {picture}(" in script.read_text(encoding="utf-8") for script in scripts), picture
    assert shown | {"decoding"} == {file.stem for file in ROOT.glob("docs/pictures/*")}  # that one is in the README


def commands():
    """The parsers of all commands."""
    return next(action for action in parser()._actions if isinstance(action, _SubParsersAction)).choices


def keys(kind):
    """The names of a report's fields, and of those of the reports in it that have no command of their own."""
    found = set()
    for name, hint in get_type_hints(kind, vars(reports)).items():
        found.add(name)
        for inner in (hint, *get_args(hint)):
            if is_dataclass(inner) and inner not in set(REPORTS.values()) - {kind}:
                found |= keys(inner)
    assert found >= {each.name for each in fields(kind)}
    return found


REPORTS = {name: getattr(reports, f"{name.capitalize()}Report") for name in
           ("plan", "convert", "verify", "heal", "bench", "export", "refresh", "demo")}  # fmt: skip


@pytest.mark.parametrize("name", REPORTS)
def test_every_key_is_on_the_page(name):
    said = sections("docs/commands.md")
    section = said[""] + said[name] + (said["plan"] if name == "convert" else "")
    assert not {key for key in keys(REPORTS[name]) if f"`{key}`" not in section}


def test_every_key_of_info_is_on_the_page(closed_form):
    section = sections("docs/commands.md")["info"]
    assert not {key for source in (MODEL, closed_form) for key in info(source) if f"`{key}`" not in section}


def test_every_option_is_on_the_page():
    said = sections("docs/commands.md")
    everywhere = said[""] + said["What they take"]
    for name, command in commands().items():
        options = {option for action in command._actions for option in action.option_strings if option.startswith("--")}
        section = said.get(name, "") + everywhere
        missing = {option for option in options - {"--help", "--verbose"} if not re.search(rf"{option}\b", section)}
        assert not missing, name


def test_every_command_line_is_one():
    lines = []
    for page in PAGES:
        for block in blocks(page, ""):
            lines += [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("hf-mla ")]
    assert len(lines) > 20
    for line in lines:
        parser().parse_args(shlex.split(line, comments=True)[1:])  # exits where it is none


@pytest.fixture(scope="module")
def folder(closed_form, tmp_path_factory):
    """A folder with what the code of the pages names."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(closed_form, folder / "llama-mla")
    shutil.copytree(MODEL, folder / "meta-llama" / "Llama-3.2-1B")
    config, model_class = config_and_class("deepseek_v2", vocab_size=4096)
    model_class._from_config(config).save_pretrained(folder / "deepseek-ai" / "DeepSeek-V2-Lite")
    (folder / "my.txt").write_text("The captain looked at the sea.\n\nHe said nothing.\n")
    return folder


@pytest.mark.parametrize("page", ["README.md", "docs/commands.md", "docs/finetuning.md", "docs/using.md"])
def test_code_runs(page, folder, monkeypatch):
    """All of a page's Python, as if it were one file."""
    monkeypatch.chdir(folder)
    code = blocks(page, "python")
    assert code
    exec("".join(code), {})
    if page == "docs/finetuning.md":
        assert (folder / "llama-mla-tuned" / "tokenizer.json").is_file()


FILES = [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]
EXAMPLES = [path for path in FILES if " >>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL, tmp_path / "llama")
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join([FOLDERS[folder], *parts]))
    given = {"model": make_mla(), "inputs": {"input_ids": torch.arange(3, 8)[None]}}
    ran = 0
    for test in doctest.DocTestFinder().find(module, extraglobs=given):
        for example in test.examples:
            example.source = example.source.replace("cache=cache", f"{CACHE_NAME}=cache")
        result = doctest.DocTestRunner().run(test)
        assert result.failed == 0, test.name
        ran += result.attempted
    assert ran
