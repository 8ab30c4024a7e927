"""Forms of pipelines: one widget for each parameter, and what is filled in."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import ParseDict

from cryofleet.errors import InvalidArgument
from cryofleet.v1 import orchestrator_pb2
from cryofleet.views.parameters import PipelineForm

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
    assert "diameter angstrom (Å)" in made._widgets["diameter_angstrom"].label


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
