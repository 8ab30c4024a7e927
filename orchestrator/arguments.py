"""The inputs and parameters of a pipeline: what values each takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cryofleet.operations import ARTIFACT_KINDS
from orchestrator.located import Path

PARAMETER_TYPES = ("number", "integer", "text", "boolean", "list", "structure")


@dataclass(frozen=True)
class ValueType:
    """What a value is: the word of its kind, how many lists stand around it, and whether it may be missing."""

    kind: str
    """A scalar's type, an artifact's kind, structure, or any."""
    depth: int = 0
    optional: bool = False

    def __str__(self) -> str:
        if self.kind == "any":
            return "a list" if self.depth else "a value"
        return "a list of " * self.depth + (self.kind if self.depth else _with_article(self.kind))


def _with_article(kind: str) -> str:
    if kind in ("text", "particles", "subtomograms"):
        return kind
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


@dataclass(frozen=True)
class Argument:
    """An input (an artifact) or a parameter (a value) of a pipeline."""

    name: str
    type: str
    """An artifact's kind, or one of PARAMETER_TYPES."""
    help: str = ""
    unit: str = ""
    repeated: bool = False
    """An input that takes a list of artifacts."""
    required: bool = True
    default: Any = None
    choices: tuple[Any, ...] = ()

    @property
    def is_input(self) -> bool:
        return self.type in ARTIFACT_KINDS

    @property
    def document_path(self) -> Path:
        """Where it stands in the pipeline's document."""
        return ("inputs" if self.is_input else "parameters", self.name)

    @property
    def value_type(self) -> ValueType:
        optional = not self.required and self.default is None
        if self.type == "list":
            return ValueType("any", 1, optional)
        return ValueType(self.type, int(self.repeated), optional)

    def checked(self, value: Any) -> Any:
        """The value as the argument's type has it: 5.0 is 5 for an integer. Raises ValueError where it has another."""
        if self.is_input:
            if self.repeated:
                if not isinstance(value, list) or not all(isinstance(uri, str) and "://" in uri for uri in value):
                    raise ValueError(f"is {value!r}; it must be a list of URIs")
            elif not isinstance(value, str) or "://" not in value:
                raise ValueError(f"is {value!r}; it must be the URI of {ValueType(self.type)}")
            return value
        match self.type:
            case "number" | "integer":
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                    raise ValueError(f"is {value!r}; it must be {ValueType(self.type)}")
                if self.type == "integer":
                    if not float(value).is_integer():
                        raise ValueError(f"is {value!r}; it must be an integer")
                    value = int(value)
            case "text":
                if not isinstance(value, str):
                    raise ValueError(f"is {value!r}; it must be text")
            case "boolean":
                if not isinstance(value, bool):
                    raise ValueError(f"is {value!r}; it must be true or false")
            case "list":
                if not isinstance(value, list):
                    raise ValueError(f"is {value!r}; it must be a list")
            case _:
                if not isinstance(value, dict):
                    raise ValueError(f"is {value!r}; it must be a mapping")
        if self.choices and value not in self.choices:
            raise ValueError(f"is {value!r}; it must be one of {', '.join(str(choice) for choice in self.choices)}")
        return value
