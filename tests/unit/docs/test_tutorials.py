"""The tutorials without running them: sound notebooks that name pipelines, operations and parameters that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from cryofleet.operations import operations
from cryofleet.settings import Settings
from orchestrator.library import Library

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "docs" / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
ABSOLUTE = re.compile(r"""["'\s=](/(?:home|root|Users|tmp|work|opt|data|mnt|srv|var)\b|[A-Z]:\\)""")

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path) -> list[Any]:
    return list(nbformat.read(path, as_version=4).cells)


def code(path: Path) -> ast.Module:
    """All code of a notebook, its shell commands left out."""
    lines = "\n".join(cell.source for cell in cells(path) if cell.cell_type == "code").split("\n")
    return ast.parse("\n".join(re.sub(r"^(\s*)!.*", r"\1pass", line) for line in lines))


def calls(tree: ast.Module, method: str) -> Iterator[tuple[str, set[str]]]:
    """What `client.METHOD` is called with: its first argument and the names of the others."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
            match node.func.value, node.args:
                case ast.Name(id="client"), [ast.Constant(value=str() as name), *_]:
                    yield name, {keyword.arg for keyword in node.keywords if keyword.arg is not None}


def test_is_a_sound_notebook_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, "make tutorials leaves outputs in build/tutorials; here there are none"
            assert cell.execution_count is None


def test_its_code_parses_and_checks_its_figures(path: Path) -> None:
    assert any(isinstance(node, ast.Assert) for node in ast.walk(code(path)))


def test_it_names_no_place_of_one_machine(path: Path) -> None:
    for cell in cells(path):
        assert not ABSOLUTE.search(cell.source), cell.source


def test_it_is_written_as_users_write(path: Path) -> None:
    """Through the client, not through what lies behind it."""
    for node in ast.walk(code(path)):
        match node:
            case ast.ImportFrom(module=str() as module) if module.split(".")[0] in ("cryofleet", "services"):
                assert (module, [alias.name for alias in node.names]) == ("cryofleet", ["Client"])
            case ast.Import():
                assert not {alias.name for alias in node.names} & {"services", "orchestrator"}


def test_what_it_calls_exists(path: Path) -> None:
    library = Library(Settings.from_environment({}))
    tree = code(path)
    called = list(calls(tree, "run"))
    for name, given in called:
        assert given <= {argument.name for argument in library.get(name).arguments}, name
    operated = list(calls(tree, "call"))
    for name, given in operated:
        assert given <= {"on_progress", *(parameter.name for parameter in operations()[name].parameters)}, name
    assert called or operated or path.stem.startswith("10"), "a tutorial without a run"


def test_it_is_listed(path: Path) -> None:
    assert f"({path.name})" in (FOLDER / "index.md").read_text()
    assert f"- tutorials/{path.stem}.md" in (ROOT / "mkdocs.yml").read_text()
