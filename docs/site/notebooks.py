"""Notebooks as Markdown pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def with_outputs(source: Path, executed: Path) -> dict[str, Any]:
    """The executed notebook where it is there and its cells are the source's, else the source."""
    notebook = _read(source)
    if executed.is_file():
        run = _read(executed)
        if [cell["source"] for cell in run["cells"]] == [cell["source"] for cell in notebook["cells"]]:
            return run
    return notebook


def as_markdown(notebook: dict[str, Any], name: str) -> str:
    """The page of a notebook of the file `name`."""
    parts = []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown":
            parts.append(_text(cell["source"]))
        else:
            parts.append(_fenced(_text(cell["source"]), "python"))
            parts += [shown for output in cell["outputs"] for shown in _output(output)]
        if number == 0:
            parts.append(f"*This page is a notebook: [take it home]({name}).*")
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _output(output: dict[str, Any]) -> Iterator[str]:
    data = output.get("data", {})
    if "image/png" in data:
        yield f"![The cell's picture](data:image/png;base64,{_text(data['image/png']).replace(chr(10), '')})"
    elif text := _text(output.get("text", data.get("text/plain", ""))).rstrip():
        yield _fenced(text, "text")


def _fenced(text: str, language: str) -> str:
    return f"~~~~ {{ .{language} }}\n{text}\n~~~~"


def _text(lines: str | list[str]) -> str:
    """A notebook's text, which its file may have as a list of lines."""
    return lines if isinstance(lines, str) else "".join(lines)
