"""Pipelines: what one consists of, and the values that its arguments take for a run.

This is how one is written:

    name: discover
    help: Find, sort and average particles of one size.
    inputs:
      tomogram: {kind: volume, help: the tomogram}
      truth: {kind: particles, optional: true}
    parameters:
      diameter_angstrom: {type: number, unit: Å, default: 200, help: the particles' diameter}
    steps:
      - id: pick
        op: picking.DifferenceOfGaussians
        with: {tomogram_uri: "${tomogram}", particle_diameter_angstrom: "${diameter_angstrom}"}
      - id: boxes
        op: picking.Extract
        with: {tomogram_uri: "${tomogram}", particles_uri: "${pick.particles_uri}", box_size_voxels: 32}
        shards: {over: particles_uri, size: 256, reduce: {op: picking.MergeSubtomograms, field: subtomograms_uris}}
      - id: evaluate
        if: ${truth}
        op: picking.Evaluate
        with: {particles_uri: "${pick.particles_uri}", truth_uri: "${truth}", distance_angstrom: 50}
    outputs:
      particles: ${pick.particles_uri}

`if` names a value: the step is left out where that is missing, false, zero or empty. `foreach: ${list}` runs a step, or
the `steps:` inside it, for each item, which is `${item}` or the name that `as` gives; its outputs are lists. Items that
fail are set aside, unless the step is `strict: true`; once all have ended, it then fails. `shards` splits one operation
over the rows of its particles or subtomograms; `reduce` joins the results, whose outputs are then the step's; without
it they are lists, in order of the rows. Steps run as soon as what they refer to is there.

`repeat` runs the `steps:` inside a step in rounds, one behind the other:

      - id: refine
        repeat: ${iterations}
        carry: {model_uri: "${start.model_uri}"}
        next: {model_uri: "${maximise.model_uri}"}
        until: ${maximise.converged}
        steps: [...]

Inside, `${refine.model_uri}` is what the round was given, by `carry` the first and by the `next` of the one before any
other, and `${refine.round}` is its number, from 1. `until` ends the rounds after the one in which it is true, `repeat`
says how many they are at most. The step's outputs are what a further round would be given, the number of `rounds`, and
the outputs of the steps inside in the last round.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import protovalidate

from cryofleet.errors import InvalidArgument
from cryofleet.operations import Operation, request_from_mapping, suggestion
from orchestrator.arguments import Argument
from orchestrator.expressions import Expression, Reference, evaluate, look_up_in, references
from orchestrator.located import Document, Path

MAX_ROUNDS = 1000
ROUND = "round"
"""The number of the round, which the steps inside a repeat can refer to."""
ROUNDS = "rounds"
"""How many there were, an output of the repeat."""

_validator = protovalidate.Validator()


@dataclass(frozen=True)
class Reduce:
    """The operation that joins the shards' results."""

    operation: Operation
    field: str
    """Its repeated field that takes the shards' results, in order."""
    output: str
    """The shards' output that goes there."""
    fields: Mapping[str, Expression]


@dataclass(frozen=True)
class Shards:
    """How an operation is split over rows."""

    over: str
    size: Expression
    into: str
    reduce: Reduce | None


@dataclass(frozen=True)
class Repeat:
    """How often a group of steps runs, and what each round gets from the one before."""

    rounds: Expression
    """How many at most: an integer or a reference to one."""
    carry: Mapping[str, Expression]
    """What the first round gets."""
    next: Mapping[str, Expression]
    """What each other round gets, from the outputs of the one before; the same names."""
    until: Reference | None
    """Where it is true at the end of a round, that was the last."""


def check_rounds(value: Any) -> int:
    """The number of rounds that a repeat is given. Raises ValueError where it is none."""
    # What a caller's own list has may come as 5.0.
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value <= MAX_ROUNDS
    if not sound or int(value) != value:
        raise ValueError(f"'repeat' is {value!r}; it must be an integer from 1 to {MAX_ROUNDS}")
    return int(value)


@dataclass(frozen=True)
class Step:
    """One step: an operation or, with `steps`, a group that a foreach maps or a repeat goes through again and again."""

    id: str
    document_path: Path
    """Where it stands in the pipeline's document."""
    operation: Operation | None
    fields: Mapping[str, Expression]
    conditions: tuple[Reference, ...] = ()
    """What must be there, and be neither false, zero nor empty, for the step to run."""
    foreach: Reference | None = None
    item: str = "item"
    strict: bool = False
    """Whether a foreach fails where any of its items does, instead of setting that aside."""
    repeat: Repeat | None = None
    shards: Shards | None = None
    steps: tuple[Step, ...] = ()

    def left_out(self, known: Container[str], look_up: Callable[[Reference], Any]) -> bool:
        """Whether a condition fails, as far as what they refer to is known."""
        return any(reference.root in known and not look_up(reference) for reference in self.conditions)

    def calls(self) -> Iterator[tuple[Operation, Mapping[str, Expression], Path]]:
        """The operations that the step itself calls, their fields, and where these stand in the document."""
        if self.operation is not None:
            yield self.operation, self.fields, (*self.document_path, "with")
        if self.shards is not None and self.shards.reduce is not None:
            reduce = self.shards.reduce
            yield reduce.operation, reduce.fields, (*self.document_path, "shards", "reduce", "with")

    def references(self) -> Iterator[Reference]:
        """All values that the step and what is inside it refer to, apart from its own."""
        yield from self.conditions
        if self.foreach is not None:
            yield self.foreach
        own = {self.item} if self.foreach is not None else set()
        own |= {step.id for step in self.steps}
        inner = list(references(dict(self.fields)))
        if self.repeat is not None:
            yield from references(self.repeat.rounds)
            yield from references(dict(self.repeat.carry))
            own.add(self.id)
            inner += references(dict(self.repeat.next))
            inner += references(self.repeat.until)
        if self.shards is not None:
            inner += references(self.shards.size)
            if self.shards.reduce is not None:
                inner += references(dict(self.shards.reduce.fields))
        for step in self.steps:
            inner += step.references()
        yield from (reference for reference in inner if reference.root not in own)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline; what `pipeline_reading.load` returns has been checked."""

    name: str
    help: str
    arguments: tuple[Argument, ...]
    """Inputs, then parameters."""
    steps: tuple[Step, ...]
    outputs: Mapping[str, Expression]
    source: str
    document: Document

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values of all arguments by name, defaults filled in.

        Raises InvalidArgument, a line for each argument that is unknown, missing or of the wrong type, and for each
        operation's field that the values break a rule of.
        """
        known = {argument.name: argument for argument in self.arguments}
        problems = [
            f"{self.source}: {self.name} takes no {name!r}{suggestion(name, known)}"
            for name in given
            if name not in known
        ]
        values: dict[str, Any] = {}
        for argument in self.arguments:
            value = given.get(argument.name)
            if value is None:
                value = argument.default
            try:
                values[argument.name] = None if value is None else argument.checked(value)
            except ValueError as error:
                problems.append(f"{self.source}: {argument.name} {error}")
            if argument.required and value is None:
                place = self.document.place(argument.document_path)
                meaning = (argument.help or argument.type) + (f" in {argument.unit}" if argument.unit else "")
                problems.append(f"{place}: {self.name} needs {argument.name!r}, {meaning}")
        problems = problems or list(self._broken_rules(self.steps, values))
        if problems:
            raise InvalidArgument("\n".join(problems))
        return values

    def _broken_rules(self, steps: tuple[Step, ...], values: Mapping[str, Any]) -> Iterator[str]:
        """What of the operations' fields is known before anything runs, and breaks a rule of the contract."""
        look_up = look_up_in(values)
        for step in steps:
            if step.left_out(values, look_up):
                continue
            if step.repeat is not None and all(r.root in values for r in references(step.repeat.rounds)):
                try:
                    check_rounds(evaluate(step.repeat.rounds, look_up))
                except ValueError as error:
                    yield f"{self.document.place((*step.document_path, 'repeat'))}: step {step.id!r}: {error}"
            yield from self._broken_rules(step.steps, values)
            for operation, fields, path in step.calls():
                known = {
                    name: evaluate(expression, look_up)
                    for name, expression in fields.items()
                    if all(reference.root in values for reference in references(expression))
                }
                for name, message in _wrong_fields(operation, known):
                    yield f"{self.document.place((*path, name))}: step {step.id!r}: {message}"


def _wrong_fields(operation: Operation, known: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The given fields of an operation that have a wrong value, each with what is wrong; others may yet be missing."""
    sound: dict[str, Any] = {}
    for name, value in known.items():
        try:
            request_from_mapping(operation, {name: value})
            sound[name] = value
        except InvalidArgument as error:
            yield name, str(error)
    for violation in _validator.collect_violations(request_from_mapping(operation, sound)):
        elements = violation.proto.field.elements if violation.proto.field is not None else ()
        if elements and sound.get(elements[0].field_name) is not None:
            name = elements[0].field_name
            yield name, f"{name} is {sound[name]!r}: {violation.proto.message or violation.proto.rule_id}"
