"""What a run left of averages: volumes, their FSC and their particles, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from cryofleet.v1 import orchestrator_pb2


@dataclass(frozen=True)
class RunAverage:
    """One average by its URIs, which are empty where the run left none."""

    name: str
    volume: str
    fsc: str = ""
    particles: str = ""


@dataclass(frozen=True)
class AverageSet:
    """The averages of one step, in the order of their classes."""

    step: str
    averages: tuple[RunAverage, ...]
    particles: str = ""
    """The particles of all of them in one table, with their classes."""
    history: str = ""
    """A table of what each iteration reached."""


@dataclass(frozen=True)
class ClassTables:
    """The particles of one step: one table with classes, or one for each class."""

    step: str
    uris: tuple[str, ...]
    one_each: bool


def average_sets(run: orchestrator_pb2.Run) -> list[AverageSet]:
    """The averages of a run, those of its last step first."""
    found = []
    whole = json_format.MessageToDict(run.outputs)
    for step in run.steps:
        outputs = json_format.MessageToDict(step.outputs)
        volumes = _texts(outputs.get("average_uris") or outputs.get("average_uri"))
        if not step.operation or not volumes:
            continue
        several = outputs.get("average_uris") is not None
        curves = _texts(outputs.get("fsc_uris") or outputs.get("fsc_uri"))
        tables = _texts(outputs.get("class_particles_uris") if several else outputs.get("particles_uri"))
        joint = outputs.get("particles_uri") if several or len(volumes) == 1 else None
        if several and not tables and whole.get("averages") == volumes:
            # Their particles were settled by a step before.
            tables, joint = _texts(whole.get("class_particles")), whole.get("particles")
        averages = tuple(
            RunAverage(
                f"{step.id} {number}" if len(volumes) > 1 else step.id,
                volume,
                curves[number - 1] if len(curves) == len(volumes) else "",
                tables[number - 1] if len(tables) == len(volumes) else "",
            )
            for number, volume in enumerate(volumes, start=1)
        )
        history = outputs.get("history_uri")
        found.append(
            AverageSet(
                step.id,
                averages,
                joint if isinstance(joint, str) else "",
                history if isinstance(history, str) else "",
            )
        )
    return found[::-1]


def class_tables(run: orchestrator_pb2.Run) -> list[ClassTables]:
    """The tables that say which particle was of which class, step by step, each once."""
    found: list[ClassTables] = []
    for step in run.steps:
        uris = json_format.MessageToDict(step.outputs).get("particles_uri") if step.operation else None
        texts = tuple(_texts(uris))
        if texts and not any(set(texts) == set(before.uris) for before in found):
            found.append(ClassTables(step.id, texts, isinstance(uris, list)))
    return found


def tomograms(run: orchestrator_pb2.Run) -> dict[str, str]:
    """Volumes of the run that are tomograms, by what steps call them."""
    named: dict[str, str] = {}
    for prefix, values in (*((f"{step.id}: ", step.outputs) for step in run.steps), ("", run.arguments)):
        for name, value in json_format.MessageToDict(values).items():
            if "tomogram" not in name:
                continue
            uris = [uri for uri in _texts(value) if uri.endswith(".mrc") and uri not in named.values()]
            for number, uri in enumerate(uris, start=1):
                named[prefix + name.removesuffix("_uri") + (f" {number}" if len(uris) > 1 else "")] = uri
    return named


def _texts(value: Any) -> list[str]:
    """The texts in a value, however deep the lists are that hold them."""
    return list(_walk(value))


def _walk(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _walk(each)
