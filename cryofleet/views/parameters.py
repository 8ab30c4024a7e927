"""A form for any pipeline, made from what it says of its parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

import panel as pn
from google.protobuf import json_format

from cryofleet.errors import InvalidArgument
from cryofleet.operations import ARTIFACT_KINDS
from cryofleet.v1 import orchestrator_pb2
from cryofleet.views.text import text

_UNSET = ""
_UNITS = {"angstrom": "Å", "degrees": "°", "voxels": "voxels", "seconds": "s"}


class PipelineForm(pn.viewable.Viewer):
    """One widget for each input and parameter of a pipeline; what is left empty keeps its default."""

    def __init__(self, pipeline: orchestrator_pb2.PipelineDescription, given: Mapping[str, Any] | None = None) -> None:
        """`given` are values to begin with, an earlier run's arguments for instance."""
        super().__init__()
        self.pipeline = pipeline
        self._given = dict(given or {})
        self._widgets = {parameter.name: self._widget(parameter) for parameter in pipeline.parameters}

    def __panel__(self) -> pn.viewable.Viewable:
        needed: list[Any] = []
        further: list[Any] = []
        for parameter in self.pipeline.parameters:
            place = needed if parameter.required or parameter.type in ARTIFACT_KINDS else further
            place.append(self._widgets[parameter.name])
        help_text = text(self.pipeline.help, font_style="italic")
        rest = pn.Accordion(("Further parameters", pn.Column(*further)), sizing_mode="stretch_width")
        return pn.Column(help_text, *needed, *([rest] if further else []), sizing_mode="stretch_width")

    def arguments(self) -> dict[str, Any]:
        """What is filled in. Raises InvalidArgument naming the parameter and what would be right."""
        found = {}
        for parameter in self.pipeline.parameters:
            value = _value(parameter, self._widgets[parameter.name].value)
            if value is None and parameter.required:
                raise InvalidArgument(f"{parameter.name} is missing: {parameter.help}")
            if value is not None:
                found[parameter.name] = value
        return found

    def _widget(self, parameter: orchestrator_pb2.PipelineParameter) -> Any:
        label = _label(parameter) + (" *" if parameter.required else "")
        # What a description is, Panel reads as Markdown, in which HTML counts.
        shared = {"label": label, "description": escape(parameter.help) or None, "sizing_mode": "stretch_width"}
        given = self._given.get(parameter.name)
        default = json_format.MessageToDict(parameter.default_value) if parameter.HasField("default_value") else None
        choices: list[Any] = [json_format.MessageToDict(choice) for choice in parameter.choices]
        if not choices and parameter.type == "boolean":
            choices = [True, False]
        if choices:
            unset = f"as by default: {_text(default)}" if default is not None else "not set"
            options = {unset: _UNSET, **{_text(choice): choice for choice in choices}}
            return pn.widgets.Select(options=options, value=given if given in choices else _UNSET, **shared)
        placeholder = _text(default) if default is not None else ""
        if parameter.type in ARTIFACT_KINDS and not placeholder:
            placeholder = "URIs, one a line" if parameter.repeated else f"URI of {_a(parameter.type)}"
        value = _text(given) if given is not None else ""
        if parameter.repeated or parameter.type in ("list", "structure"):
            if parameter.repeated and isinstance(given, list):
                value = "\n".join(map(str, given))
            return pn.widgets.TextAreaInput(value=value, placeholder=placeholder, rows=3, **shared)
        return pn.widgets.TextInput(value=value, placeholder=placeholder, **shared)


def _label(parameter: orchestrator_pb2.PipelineParameter) -> str:
    """The name in words, its unit as a sign and not in words as well."""
    name = parameter.name
    for word, sign in _UNITS.items():
        if parameter.unit == sign:
            name = name.removesuffix(f"_{word}")
    return name[:1].upper() + name[1:].replace("_", " ") + (f" ({parameter.unit})" if parameter.unit else "")


def _a(kind: str) -> str:
    """As a tomogram, particles, an average."""
    return kind if kind.endswith("s") else f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _value(parameter: orchestrator_pb2.PipelineParameter, entered: Any) -> Any:
    """A widget's value as the pipeline takes it; None where nothing was entered."""
    if not isinstance(entered, str):
        return entered
    text = entered.strip()
    if not text:
        return None
    match parameter.type:
        case _ if parameter.repeated:
            return [line.strip() for line in text.splitlines() if line.strip()]
        case "number" | "integer":
            try:
                return int(text) if parameter.type == "integer" else float(text)
            except ValueError:
                kind = "a whole number" if parameter.type == "integer" else "a number"
                raise InvalidArgument(f"{parameter.name} is {text!r}; it must be {kind}") from None
        case "list" | "structure":
            try:
                return json.loads(text)
            except ValueError as error:
                raise InvalidArgument(f"{parameter.name} must be JSON: {error}") from None
    return text
