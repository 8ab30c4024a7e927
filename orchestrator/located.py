"""YAML with the line that each value stands on, and what is wrong with it by these lines."""

from __future__ import annotations

from typing import Any

import yaml

from cryofleet.errors import InvalidArgument

Path = tuple[str | int, ...]


class Document:
    """A parsed YAML file; `data` is plain Python, `line` says where a value of it stands."""

    def __init__(self, text: str, source: str) -> None:
        """Raises InvalidArgument naming file and line where the text is no YAML or has a key twice."""
        self.text = text
        self.source = source
        self._lines: dict[Path, int] = {}
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            self.data: Any = None if node is None else self._construct(loader, node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise InvalidArgument(f"{source}:{line}: not YAML: {error.problem or error.context}") from None
        except yaml.YAMLError as error:
            raise InvalidArgument(f"{source}:1: not YAML: {' '.join(str(error).split())}") from None
        finally:
            loader.dispose()

    def line(self, path: Path) -> int:
        """Line, counted from 1, of the value at `path`, or of the nearest value around it."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def place(self, path: Path) -> str:
        """The line as messages name it: source:line."""
        return f"{self.source}:{self.line(path)}"

    def _construct(self, loader: yaml.SafeLoader, node: yaml.Node, path: Path) -> Any:
        line = node.start_mark.line + 1
        self._lines.setdefault(path, line)
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key_line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise InvalidArgument(f"{self.source}:{key_line}: a key must be a word")
                # YAML 1.1 reads a bare `on` or `no` as a truth value; a key is always meant as it is written.
                key = str(key_node.value)
                if key in mapping:
                    raise InvalidArgument(f"{self.source}:{key_line}: {key!r} stands here twice")
                self._lines[(*path, key)] = key_line
                mapping[key] = self._construct(loader, value_node, (*path, key))
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self._construct(loader, child, (*path, index)) for index, child in enumerate(node.value)]
        return loader.construct_object(node, deep=True)


class Problems:
    """What is wrong with a document."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._found: list[tuple[Path, str]] = []

    def add(self, path: Path, message: str) -> None:
        """Notes what is wrong with the value at `path`."""
        self._found.append((path, message))

    def raise_if_any(self) -> None:
        """Raises InvalidArgument, a line `source:line: what` for each problem, in the document's order."""
        if self._found:
            found = sorted(self._found, key=lambda problem: self._document.line(problem[0]))
            raise InvalidArgument("\n".join(f"{self._document.place(path)}: {message}" for path, message in found))
