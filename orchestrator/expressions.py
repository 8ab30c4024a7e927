"""The values of a pipeline's fields: literals, `${references}` and text with references in it.

A value that is one reference as a whole takes the type of what it refers to. `$${` stands for a plain `${`.
There is no arithmetic: what is computed is computed by operations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
_REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")


@dataclass(frozen=True)
class Reference:
    """`${name}`, `${step.output}` or, of a step inside a foreach, `${step.inner.output}`."""

    path: tuple[str, ...]

    @property
    def root(self) -> str:
        return self.path[0]

    def __str__(self) -> str:
        return "${" + ".".join(self.path) + "}"


@dataclass(frozen=True)
class Template:
    """Text with references in it."""

    parts: tuple[str | Reference, ...]


Expression = Any
"""A Reference, a Template, a literal, or lists and mappings of these."""


def parse(value: Any) -> Expression:
    """Raises ValueError where a reference is malformed."""
    if isinstance(value, str):
        return _parse_text(value)
    if isinstance(value, list):
        return [parse(item) for item in value]
    if isinstance(value, dict):
        return {key: parse(item) for key, item in value.items()}
    return value


def _parse_text(text: str) -> Expression:
    parts: list[str | Reference] = []
    literal = ""
    position = 0
    for match in _REFERENCE.finditer(text):
        literal += text[position : match.start()]
        position = match.end()
        if match.group(1) is None:
            literal += "${"
            continue
        if literal:
            parts.append(literal)
            literal = ""
        parts.append(_parse_reference(match.group(0)))
    literal += text[position:]
    if literal:
        parts.append(literal)
    if not any(isinstance(part, Reference) for part in parts):
        return "".join(str(part) for part in parts)
    if len(parts) == 1:
        return parts[0]
    return Template(tuple(parts))


def _parse_reference(text: str) -> Reference:
    names = tuple(text.removeprefix("${").removesuffix("}").strip().split("."))
    if not text.endswith("}") or not all(NAME.fullmatch(name) for name in names):
        raise ValueError(f"{text!r} is no reference; write ${{name}} or ${{step.output}}")
    return Reference(names)


def references(expression: Expression) -> Iterator[Reference]:
    """All references in the expression, in order."""
    if isinstance(expression, Reference):
        yield expression
    elif isinstance(expression, Template):
        yield from (part for part in expression.parts if isinstance(part, Reference))
    elif isinstance(expression, list):
        for item in expression:
            yield from references(item)
    elif isinstance(expression, dict):
        for item in expression.values():
            yield from references(item)


def evaluate(expression: Expression, look_up: Callable[[Reference], Any], keep_places: bool = False) -> Any:
    """The expression's value, as a field takes it. What refers to a value that was left out (None) is left out of
    lists and mappings too, and a list of lists is one list: those of its items, one behind the other.

    With `keep_places` a list stays what it is, with None where a value was left out, so that the others stay where they
    were.
    """
    if isinstance(expression, Reference):
        value = look_up(expression)
        return value if keep_places else _joined(value)
    if isinstance(expression, Template):
        return "".join(part if isinstance(part, str) else _as_text(look_up(part)) for part in expression.parts)
    if isinstance(expression, list):
        items = [evaluate(item, look_up, keep_places) for item in expression]
        return items if keep_places else _joined(items)
    if isinstance(expression, dict):
        values = {key: evaluate(item, look_up, keep_places) for key, item in expression.items()}
        return {key: value for key, value in values.items() if value is not None}
    return expression


def _joined(value: Any) -> Any:
    """A list without what was left out, and without lists in it."""
    return list(_items(value)) if isinstance(value, list) else value


def _items(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _items(value)
        elif value is not None:
            yield value


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return ", ".join(_as_text(item) for item in value)
    return str(value)


def look_up_in(values: Mapping[str, Any]) -> Callable[[Reference], Any]:
    """Looks references up in nested mappings. A part of a value that was left out is left out as well, and a part of
    a list is the list of its items' parts."""

    def look_up(reference: Reference) -> Any:
        value: Any = values[reference.root]
        for name in reference.path[1:]:
            value = _part(value, name)
        return value

    return look_up


def _part(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_part(item, name) for item in value]
    return value.get(name) if isinstance(value, dict) else None
