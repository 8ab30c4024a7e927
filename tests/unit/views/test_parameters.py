"""Forms of pipelines: one widget for each parameter, and what is filled in."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct

from cryofleet.errors import InvalidArgument
from cryofleet.settings import Settings
from cryofleet.v1 import orchestrator_pb2
from cryofleet.views.parameters import PipelineForm
from orchestrator.arguments import Argument
from orchestrator.library import Library
from orchestrator.service import _description

PARAMETERS: list[dict[str, Any]] = [
    {"name": "tomogram", "type": "volume", "required": True, "help": "the tomogram"},
    {"name": "halves", "type": "volume", "repeated": True},
    {"name": "diameter_angstrom", "type": "number", "unit": "Å", "defaultValue": 200},
    {"name": "clusters", "type": "integer"},
    {"name": "contrast", "type": "text", "choices": ["dark", "light"], "defaultValue": "dark"},
    {"name": "quick", "type": "boolean", "defaultValue": False},
    {"name": "structures", "type": "structure"},
]


def form(**given: Any) -> PipelineForm:
    described = orchestrator_pb2.PipelineDescription(name="p", help="<b>finds</b>")
    return PipelineForm(ParseDict({"parameters": PARAMETERS}, described), given)


def test_what_is_left_empty_keeps_its_default() -> None:
    made = form()
    with pytest.raises(InvalidArgument, match="tomogram is missing: the tomogram"):
        made.arguments()
    made._widgets["tomogram"].value = " file:///t.mrc "
    assert made.arguments() == {"tomogram": "file:///t.mrc"}
    assert made._widgets["diameter_angstrom"].placeholder == "200"
    assert made._widgets["diameter_angstrom"].label == "Diameter (Å)"


def test_values_have_their_types() -> None:
    made = form(tomogram="file:///t.mrc", halves=["file:///a.mrc", "file:///b.mrc"], contrast="light", clusters=4.0)
    assert made.arguments() == {
        "tomogram": "file:///t.mrc",
        "halves": ["file:///a.mrc", "file:///b.mrc"],
        "contrast": "light",
        "clusters": 4,
    }
    for name, value in (("diameter_angstrom", "150.5"), ("quick", True), ("structures", '[{"name": "ring"}]')):
        made._widgets[name].value = value
    arguments = made.arguments()
    assert (arguments["diameter_angstrom"], arguments["quick"]) == (150.5, True)
    assert arguments["structures"] == [{"name": "ring"}]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("clusters", "4.5", "clusters is '4.5'; it must be a whole number"),
        ("diameter_angstrom", "wide", "it must be a number"),
        ("structures", "[", "structures must be JSON"),
    ],
)
def test_what_is_wrong_is_named(name: str, value: str, words: str) -> None:
    made = form(tomogram="file:///t.mrc")
    made._widgets[name].value = value
    with pytest.raises(InvalidArgument, match=words.replace("[", r"\[")):
        made.arguments()


def sample(argument: Argument) -> Any:
    """A value that the argument takes: its default, one of its choices, or one with structures in it."""
    if argument.default is not None:
        return argument.default
    if argument.choices:
        return argument.choices[-1]
    if argument.is_input:
        return ["file:///a.mrc", "file:///b.mrc"] if argument.repeated else "file:///a.mrc"
    nested = {"name": "Ring", "counts": [1, 2.5], "inner": {"text": "a: b", "none": None, "on": True}}
    kinds = {"number": 0.25, "integer": 3, "text": "C7", "boolean": True, "list": [nested, [1]], "structure": nested}
    return kinds[argument.type]


def test_every_pipeline_that_ships_has_a_form() -> None:
    pipelines = Library(Settings.from_environment({})).all()
    assert len(pipelines) > 20
    for pipeline in pipelines:
        described = orchestrator_pb2.PipelineDescription.FromString(_description(pipeline).SerializeToString())
        # What an earlier run was given comes back as it was, numbers as a Struct has them.
        given = Struct()
        given.update({argument.name: sample(argument) for argument in pipeline.arguments})
        form = PipelineForm(described, MessageToDict(given))
        form.__panel__()
        arguments = form.arguments()
        for argument in pipeline.arguments:
            place = f"{pipeline.name}: {argument.name}"
            assert argument.checked(arguments[argument.name]) == sample(argument), place
        # An empty form asks for what must be given, and for nothing else.
        empty = PipelineForm(described)
        for argument in pipeline.arguments:
            if argument.required:
                with pytest.raises(InvalidArgument, match=f"^{argument.name} is missing"):
                    empty.arguments()
                empty._widgets[argument.name].value = form._widgets[argument.name].value
        assert set(empty.arguments()) == {argument.name for argument in pipeline.arguments if argument.required}
