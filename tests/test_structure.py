"""The rules of the layout that a machine can check."""

import ast
import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from transformers.dynamic_module_utils import get_relative_import_files

import hf_mla
import hf_mla_conversion
from hf_mla_conversion.output.writing import REMOTE_FILES


RUNTIME = Path(hf_mla.__file__).parent
CONVERTER = Path(hf_mla_conversion.__file__).parent
SOURCES = sorted([*RUNTIME.glob("*.py"), *CONVERTER.glob("*.py"), *CONVERTER.glob("[!b]*/*.py")])


def imports(path, *, top_level_only=False):
    """(module, relative level) of each import statement."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node.level


@pytest.mark.parametrize("file", REMOTE_FILES)
def test_remote_files_import_only_what_travels(file):
    path = RUNTIME / file
    for module, level in imports(path):
        if level:
            assert level == 1 and f"{module}.py" in REMOTE_FILES, module
        elif (file, module) != ("attention_mla.py", "hf_mla.decode_triton"):  # the one that may be missing
            assert module.split(".")[0] in {*sys.stdlib_module_names, "torch", "transformers", "huggingface_hub"}, module
    # Transformers finds relative imports by a regular expression over the text, docstrings included.
    found = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", path.read_text(), re.MULTILINE))
    assert found == {module for module, level in imports(path) if level}


def test_entry_file_reaches_all_remote_files():
    needed = {Path(file).name for file in get_relative_import_files(RUNTIME / "modeling_mla.py")}
    assert needed | {"modeling_mla.py"} == set(REMOTE_FILES)


def test_runtime_never_imports_the_converter():
    for path in RUNTIME.glob("*.py"):
        assert not {(module or "").split(".")[0] for module, _ in imports(path)} & {"conversion", "hf_mla_conversion"}, path


# What files of each folder may import; None is the converter's own folder, which has the command line.
WINGS = {
    "source": {"source"},
    "mathematics": {"mathematics", "source"},
    "output": {"output", "mathematics", "source"},
    "stages": {"stages", "output", "mathematics", "source"},
    "commands": {"commands", "stages", "output", "mathematics", "source"},
    None: {"commands", "output", "source"},
}


def converter_imports(path):
    """The files of the converter that one of them imports, anywhere in it, as paths without suffix."""
    for module, level in imports(path):
        if level:
            yield path.parents[level - 1] / (module or "").replace(".", "/")


def test_the_converter_is_of_five_folders_without_circles():
    files = [path.with_suffix("") for path in SOURCES if path.is_relative_to(CONVERTER)]
    graph = {path: set(converter_imports(path.with_suffix(".py"))) for path in files}
    for path, imported in graph.items():
        wing = path.parent.name if path.parent != CONVERTER else None
        for other in imported:
            assert other in graph, f"{path} imports {other}"
            if other.parent != CONVERTER:
                assert other.parent.name in WINGS[wing], f"{path} imports {other}"
    list(TopologicalSorter(graph).static_order())  # raises on a circle


def test_every_folder_is_installed():
    packages = (CONVERTER.parent / "pyproject.toml").read_text()
    for package in CONVERTER.glob("*/__init__.py"):
        assert f'"hf_mla_conversion.{package.parent.name}",' in packages


def test_every_command_has_a_file_of_its_name():
    commands = {path.stem for path in (CONVERTER / "commands").glob("[!_]*.py")}
    assert commands == set(hf_mla_conversion.__all__) - {"UserError"}
    for command in commands:
        assert inspect.getmodule(getattr(hf_mla_conversion, command)).__name__ == f"hf_mla_conversion.commands.{command}"


@pytest.mark.parametrize("file", ["mathematics/rotary.py", "mathematics/factorize.py"])
def test_mathematics_imports_torch_and_nothing_of_ours(file):
    for module, level in imports(CONVERTER / file):
        assert level == 0 and module.split(".")[0] in {"torch", "typing"}, module


def test_help_imports_no_library():
    code = (
        "import sys; from hf_mla_conversion.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout


def test_library_code_does_not_print():
    for path in SOURCES:
        if path.name == "cli.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"), path


def test_everything_public_has_a_docstring():
    """Modules, classes, functions and methods; not functions inside functions, nor names with an underscore."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for owner in (tree, *classes):
            for node in owner.body:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                    assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_every_file_carries_its_licence():
    for path in SOURCES:
        assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n"), path


def test_attention_keeps_the_shape_that_engines_recognise():
    """One `expand_kv` call and one attention-interface call in `MLAAttention.forward`."""
    tree = ast.parse((RUNTIME / "layer_mla.py").read_text())
    attention = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "MLAAttention")
    forward = next(n for n in attention.body if isinstance(n, ast.FunctionDef) and n.name == "forward")
    calls = [node.func.attr for node in ast.walk(forward) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert calls.count("expand_kv") == 1
    assert calls.count("get_interface") == 1


def test_version_is_the_packages():
    from importlib.metadata import version

    assert version("hf-mla") == hf_mla.__version__


def test_the_version_stands_once():
    root, stated = CONVERTER.parent, f'"{hf_mla.__version__}"'
    places = [path.name for path in (*SOURCES, root / "pyproject.toml", root / "Makefile") if stated in path.read_text()]
    assert places == ["configuration_mla.py"] and (RUNTIME / places[0]).read_text().count(stated) == 1
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert citation["version"] == hf_mla.__version__ and citation["authors"] == [{"name": "The hf_mla authors"}]
    (newest, date) = re.search(r"^## (\S+) \((.+)\)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    assert (newest, date) == (citation["version"], str(citation["date-released"]))
