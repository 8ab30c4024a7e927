"""Pipelines: what their YAML says, and what must be right before anything runs.

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
the `steps:` inside it, for each item, which is `${item}` or the name that `as` gives; its outputs are lists. `shards`
splits one operation over the rows of its particles or subtomograms; `reduce` joins the results, whose outputs are then
the step's; without it they are lists, in order of the rows. Steps run as soon as what they refer to is there.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import protovalidate

from cryofleet.errors import InvalidArgument
from cryofleet.operations import ARTIFACT_KINDS, Operation, Parameter, find_operation, request_from_mapping
from cryofleet.v1 import common_pb2
from orchestrator.expressions import NAME, Expression, Reference, Template, evaluate, look_up_in, parse, references
from orchestrator.located import Document, Path

PARAMETER_TYPES = ("number", "integer", "text", "boolean", "list", "structure")
MAX_FOREACH_DEPTH = 3
DEFAULT_SHARD_ROWS = 256
_validator = protovalidate.Validator()
_ROWS = common_pb2.RowRange.DESCRIPTOR.full_name


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


StepType = dict[str, Any]
"""Outputs of a step by name: ValueType, or the StepType of a step inside it."""


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
    def value_type(self) -> ValueType:
        optional = not self.required and self.default is None
        if self.type == "list":
            return ValueType("any", 1, optional)
        return ValueType(self.type, int(self.repeated), optional)


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
class Step:
    """One step: an operation or, with `steps`, a group that a foreach maps."""

    id: str
    operation: Operation | None
    fields: Mapping[str, Expression]
    condition: Reference | None = None
    foreach: Reference | None = None
    item: str = "item"
    shards: Shards | None = None
    steps: tuple[Step, ...] = ()

    def references(self) -> Iterator[Reference]:
        """All values that the step and what is inside it refer to, apart from its own."""
        if self.condition is not None:
            yield self.condition
        if self.foreach is not None:
            yield self.foreach
        own = {self.item} if self.foreach is not None else set()
        own |= {step.id for step in self.steps}
        inner = list(references(dict(self.fields)))
        if self.shards is not None:
            inner += references(self.shards.size)
            if self.shards.reduce is not None:
                inner += references(dict(self.shards.reduce.fields))
        for step in self.steps:
            inner += step.references()
        yield from (reference for reference in inner if reference.root not in own)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline that has been checked."""

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
            f"{self.source}: {self.name} takes no {name!r}{_closest(name, known)}"
            for name in given
            if name not in known
        ]
        values: dict[str, Any] = {}
        for argument in self.arguments:
            value = given.get(argument.name)
            if value is None:
                value = argument.default
            if value is None:
                if argument.required:
                    line = self.document.line(_argument_path(argument))
                    meaning = (argument.help or argument.type) + (f" in {argument.unit}" if argument.unit else "")
                    problems.append(f"{self.source}:{line}: {self.name} needs {argument.name!r}, {meaning}")
                values[argument.name] = None
                continue
            try:
                values[argument.name] = check_value(argument, value)
            except ValueError as error:
                problems.append(f"{self.source}: {argument.name} {error}")
        problems = problems or list(self._broken_rules(self.steps, ("steps",), values))
        if problems:
            raise InvalidArgument("\n".join(problems))
        return values

    def _broken_rules(self, steps: tuple[Step, ...], path: Path, values: Mapping[str, Any]) -> Iterator[str]:
        """What of the operations' fields is known before anything runs, and breaks a rule of the contract."""
        look_up = look_up_in(values)
        for index, step in enumerate(steps):
            here: Path = (*path, index)
            if step.condition is not None and step.condition.root in values and not look_up(step.condition):
                continue
            if step.operation is None:
                yield from self._broken_rules(step.steps, (*here, "steps"), values)
                continue
            checked = [(step.operation, step.fields, (*here, "with"))]
            if step.shards is not None and step.shards.reduce is not None:
                checked.append(
                    (step.shards.reduce.operation, step.shards.reduce.fields, (*here, "shards", "reduce", "with"))
                )
            for operation, fields, fields_path in checked:
                known = {
                    name: evaluate(expression, look_up)
                    for name, expression in fields.items()
                    if all(reference.root in values for reference in references(expression))
                }
                for name, message in broken_rules(operation, known):
                    yield f"{self.source}:{self.document.line((*fields_path, name))}: step {step.id!r}: {message}"


def broken_rules(operation: Operation, known: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
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


def _argument_path(argument: Argument) -> Path:
    return ("inputs" if argument.is_input else "parameters", argument.name)


def check_value(argument: Argument, value: Any) -> Any:
    """The value as the argument's type has it: 5.0 is 5 for an integer. Raises ValueError where it has another type."""
    if argument.is_input:
        if argument.repeated:
            if not isinstance(value, list) or not all(isinstance(uri, str) and "://" in uri for uri in value):
                raise ValueError(f"is {value!r}; it must be a list of URIs")
        elif not isinstance(value, str) or "://" not in value:
            raise ValueError(f"is {value!r}; it must be the URI of {_with_article(argument.type)}")
        return value
    match argument.type:
        case "number" | "integer":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"is {value!r}; it must be {_with_article(argument.type)}")
            if argument.type == "integer":
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
    if argument.choices and value not in argument.choices:
        raise ValueError(f"is {value!r}; it must be one of {', '.join(str(choice) for choice in argument.choices)}")
    return value


def load_file(path: FilePath) -> Pipeline:
    """Raises InvalidArgument, a line `file:line: what` for each thing that is wrong."""
    return load(path.read_text(encoding="utf-8"), path.name)


def load(text: str, source: str) -> Pipeline:
    """Raises InvalidArgument, a line `source:line: what` for each thing that is wrong."""
    return _Checker(Document(text, source)).pipeline()


def _closest(word: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(names)}" if names else ""


@dataclass(frozen=True)
class _Scope:
    """What can be referred to, and what is known to be there."""

    values: Mapping[str, ValueType]
    steps: Mapping[str, StepType]
    """Outputs of the steps, found so far; empty for a step with an error."""
    conditions: Mapping[str, Reference]
    """Of the steps that have one."""
    given: frozenset[Reference] = frozenset()
    """References that the conditions around a step have found to be there."""

    def names(self) -> list[str]:
        return [*self.values, *self.steps]


class _Checker:
    """Reads one document; collects all that is wrong with it."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._problems: list[str] = []

    def _problem(self, path: Path, message: str) -> None:
        self._problems.append(f"{self._document.source}:{self._document.line(path)}: {message}")

    def pipeline(self) -> Pipeline:
        data = self._mapping(self._document.data, (), "a pipeline")
        self._known_keys(data, (), ("name", "help", "inputs", "parameters", "steps", "outputs"), "a pipeline")
        name = self._text(data, (), "name", required=True)
        arguments = [*self._inputs(data), *self._parameters(data)]
        values: dict[str, ValueType] = {}
        for argument in arguments:
            if argument.name in values:
                self._problem(_argument_path(argument), f"{argument.name!r} is the name of an input already")
            values[argument.name] = argument.value_type
        scope = _Scope(values, {}, {})
        steps, scope = self._steps(data, (), scope, depth=0)
        if not steps and not self._problems:
            self._problem(("steps",), "a pipeline needs steps")
        outputs: dict[str, Expression] = {}
        for key, value in self._mapping(data.get("outputs"), ("outputs",), "outputs").items():
            path: Path = ("outputs", key)
            expression = self._expression(value, path)
            for reference in references(expression):
                self._type_of(reference, scope, path, f"output {key!r}")
            outputs[key] = expression
        if self._problems:
            raise InvalidArgument("\n".join(self._problems))
        return Pipeline(
            name=name,
            help=self._text(data, (), "help"),
            arguments=tuple(arguments),
            steps=steps,
            outputs=outputs,
            source=self._document.source,
            document=self._document,
        )

    # Plain YAML

    def _mapping(self, value: Any, path: Path, what: str) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._problem(path, f"{what} must be a mapping")
            return {}
        return value

    def _known_keys(self, mapping: Mapping[str, Any], path: Path, known: tuple[str, ...], what: str) -> None:
        for key in mapping:
            if key not in known:
                self._problem((*path, key), f"{what} has no {key!r}{_closest(key, known)}")

    def _text(self, mapping: Mapping[str, Any], path: Path, key: str, required: bool = False) -> str:
        value = mapping.get(key)
        if value is None:
            if required:
                self._problem(path, f"{key!r} is missing")
            return ""
        if not isinstance(value, str):
            self._problem((*path, key), f"{key!r} must be text")
            return str(value)
        return " ".join(value.split())

    def _flag(self, mapping: Mapping[str, Any], path: Path, key: str) -> bool:
        value = mapping.get(key, False)
        if not isinstance(value, bool):
            self._problem((*path, key), f"{key!r} must be true or false")
        return value is True

    def _expression(self, value: Any, path: Path) -> Expression:
        try:
            return parse(value)
        except ValueError as error:
            self._problem(path, str(error))
            return None

    def _reference(self, value: Any, path: Path, what: str) -> Reference | None:
        expression = self._expression(value, path)
        if isinstance(expression, Reference):
            return expression
        if expression is not None or value is None:
            self._problem(path, f"{what} must be a reference, as ${{name}} or ${{step.output}}")
        return None

    # Inputs and parameters

    def _names(self, data: Mapping[str, Any], section: str) -> Iterator[tuple[str, dict[str, Any], Path]]:
        for name, value in self._mapping(data.get(section), (section,), section).items():
            path: Path = (section, name)
            if not NAME.fullmatch(name):
                self._problem(path, f"{name!r} is no name; it takes letters, digits, - and _")
                continue
            yield name, self._mapping(value, path, repr(name)), path

    def _inputs(self, data: Mapping[str, Any]) -> Iterator[Argument]:
        for name, spec, path in self._names(data, "inputs"):
            self._known_keys(spec, path, ("kind", "help", "optional", "list"), "an input")
            kind = self._text(spec, path, "kind", required=True)
            if kind and kind not in ARTIFACT_KINDS:
                self._problem((*path, "kind"), f"unknown kind {kind!r}{_closest(kind, sorted(ARTIFACT_KINDS))}")
            yield Argument(
                name,
                kind if kind in ARTIFACT_KINDS else "file",
                help=self._text(spec, path, "help"),
                repeated=self._flag(spec, path, "list"),
                required=not self._flag(spec, path, "optional"),
            )

    def _parameters(self, data: Mapping[str, Any]) -> Iterator[Argument]:
        for name, spec, path in self._names(data, "parameters"):
            self._known_keys(spec, path, ("type", "default", "unit", "help", "choices", "optional"), "a parameter")
            kind = self._text(spec, path, "type", required=True)
            if kind and kind not in PARAMETER_TYPES:
                self._problem((*path, "type"), f"unknown type {kind!r}{_closest(kind, PARAMETER_TYPES)}")
                kind = "structure"
            choices = spec.get("choices") or []
            if not isinstance(choices, list):
                self._problem((*path, "choices"), "'choices' must be a list")
                choices = []
            argument = Argument(
                name,
                kind,
                help=self._text(spec, path, "help"),
                unit=self._text(spec, path, "unit"),
                required=spec.get("default") is None and not self._flag(spec, path, "optional"),
                choices=tuple(choices),
            )
            if spec.get("default") is not None:
                try:
                    argument = replace(argument, default=check_value(argument, spec["default"]))
                except ValueError as error:
                    self._problem((*path, "default"), f"the default of {name!r} {error}")
            yield argument

    # Steps

    def _steps(self, data: Mapping[str, Any], path: Path, scope: _Scope, depth: int) -> tuple[tuple[Step, ...], _Scope]:
        """The steps under `path`, checked in order of need, and the scope with them."""
        listed = data.get("steps")
        path = (*path, "steps")
        if not isinstance(listed, list):
            self._problem(path, "'steps' must be a list")
            return (), scope
        read: dict[str, tuple[Step, Path]] = {}
        for index, entry in enumerate(listed):
            step_path = (*path, index)
            found = self._step(self._mapping(entry, step_path, "a step"), step_path, depth)
            if found is None:
                continue
            if found.id in read or found.id in scope.names():
                self._problem((*step_path, "id"), f"the name {found.id!r} is taken already")
                continue
            read[found.id] = (found, step_path)
        order = self._in_order_of_need(read)
        checked: dict[str, Step] = {}
        steps = dict(scope.steps)
        conditions = dict(scope.conditions)
        for name in order:
            step, step_path = read[name]
            # A reference to a step that stands later, or nowhere, is found missing against all names.
            inside = _Scope(scope.values, {**{key: {} for key in read}, **steps}, conditions, scope.given)
            step, outputs = self._check_step(step, step_path, inside, depth)
            checked[name] = step
            steps[name] = outputs
            if step.condition is not None:
                conditions[name] = step.condition
        return tuple(checked[name] for name in read if name in checked), _Scope(
            scope.values, steps, conditions, scope.given
        )

    def _in_order_of_need(self, read: Mapping[str, tuple[Step, Path]]) -> list[str]:
        needs = {name: {r.root for r in step.references()} & set(read) for name, (step, _) in read.items()}
        order: list[str] = []
        while len(order) < len(read):
            ready = [name for name in read if name not in order and needs[name] <= set(order)]
            if not ready:
                left = {name: needs[name] - set(order) for name in read if name not in order}
                cycle = _a_cycle(left)
                self._problem(read[cycle[0]][1], f"steps need each other in a circle: {' -> '.join(cycle)}")
                return order
            order += ready
        return order

    def _step(self, data: dict[str, Any], path: Path, depth: int) -> Step | None:
        """Reads a step; what it refers to is checked later, when all steps are known."""
        self._known_keys(data, path, ("id", "op", "with", "if", "foreach", "as", "shards", "steps"), "a step")
        name = self._text(data, path, "id", required=True)
        if name and not NAME.fullmatch(name):
            self._problem((*path, "id"), f"{name!r} is no name; it takes letters, digits, - and _")
        if not name or not NAME.fullmatch(name):
            return None
        operation = None
        inner: tuple[Step, ...] = ()
        foreach = self._reference(data["foreach"], (*path, "foreach"), "'foreach'") if "foreach" in data else None
        if "steps" in data:
            for key in ("op", "with", "shards"):
                if key in data:
                    self._problem((*path, key), f"step {name!r} has 'steps', and takes no {key!r} beside them")
            if "foreach" not in data:
                self._problem(path, f"step {name!r} has 'steps', and needs a 'foreach' to map them over")
            inner = self._read_inner(data, path, depth)
        else:
            operation = self._operation(data, path, f"step {name!r}")
        if "foreach" in data and depth >= MAX_FOREACH_DEPTH:
            self._problem((*path, "foreach"), f"foreach goes {MAX_FOREACH_DEPTH} deep at most")
        if "as" in data and "foreach" not in data:
            self._problem((*path, "as"), "'as' names the item of a 'foreach', and there is none")
        item = self._text(data, path, "as") or "item"
        if not NAME.fullmatch(item):
            self._problem((*path, "as"), f"{item!r} is no name; it takes letters, digits, - and _")
        return Step(
            id=name,
            operation=operation,
            fields=self._fields(data, path),
            condition=self._reference(data["if"], (*path, "if"), "'if'") if "if" in data else None,
            foreach=foreach,
            item=item,
            steps=inner,
        )

    def _read_inner(self, data: Mapping[str, Any], path: Path, depth: int) -> tuple[Step, ...]:
        """The inner steps without their checks, for what they refer to; their own problems are found with these."""
        quiet = _Checker(self._document)
        listed = data.get("steps")
        entries = listed if isinstance(listed, list) else []
        found = [
            quiet._step(entry, (*path, "steps", index), depth + 1)
            for index, entry in enumerate(entries)
            if isinstance(entry, dict)
        ]
        return tuple(step for step in found if step is not None)

    def _fields(self, data: Mapping[str, Any], path: Path) -> dict[str, Expression]:
        path = (*path, "with")
        given = self._mapping(data.get("with"), path, "'with'")
        return {key: self._expression(value, (*path, key)) for key, value in given.items()}

    def _operation(self, data: Mapping[str, Any], path: Path, what: str) -> Operation | None:
        if data.get("op") is None:
            self._problem(path, f"{what} needs an 'op', as picking.Extract")
            return None
        try:
            return find_operation(str(data["op"]))
        except InvalidArgument as error:
            self._problem((*path, "op"), f"{what}: {error}")
            return None

    def _check_step(self, step: Step, path: Path, scope: _Scope, depth: int) -> tuple[Step, StepType]:
        what = f"step {step.id!r}"
        if step.condition is not None:
            self._type_of(step.condition, scope, (*path, "if"), what)
            scope = replace(scope, given=scope.given | {step.condition})
        data = self._data_at(path)
        if step.foreach is not None:
            scope = self._item_scope(step, path, scope)
        if step.steps or "steps" in data:
            inner, inside = self._steps(data, path, scope, depth + 1)
            step = replace(step, steps=inner)
            outputs: StepType = {name: inside.steps[name] for name in (s.id for s in inner)}
        elif step.operation is None:
            return step, {}
        else:
            operation = step.operation
            shards = None
            if "shards" in data:
                shards_path = (*path, "shards")
                shards = self._shards(
                    step, operation, self._mapping(data["shards"], shards_path, "'shards'"), shards_path, scope
                )
                step = replace(step, shards=shards)
            supplied = {shards.into} if shards is not None else set()
            self._check_fields(operation, step.fields, (*path, "with"), scope, what, supplied)
            outputs = _outputs_of(operation)
            if shards is not None:
                outputs = _outputs_of(shards.reduce.operation) if shards.reduce is not None else _listed(outputs)
        return step, _listed(outputs) if step.foreach is not None else outputs

    def _data_at(self, path: Path) -> dict[str, Any]:
        data: Any = self._document.data
        for key in path:
            data = data[key]
        return data if isinstance(data, dict) else {}

    def _item_scope(self, step: Step, path: Path, scope: _Scope) -> _Scope:
        if step.item in scope.names():
            self._problem((*path, "as"), f"the name {step.item!r} is taken already; give the item another with 'as'")
        item = ValueType("any")
        found = self._type_of(step.foreach, scope, (*path, "foreach"), f"step {step.id!r}") if step.foreach else None
        if found is not None:
            if found.depth < 1:
                self._problem((*path, "foreach"), f"foreach needs a list; {step.foreach} is {found}")
            else:
                item = ValueType(found.kind, found.depth - 1)
        return replace(scope, values={**scope.values, step.item: item})

    def _shards(
        self, step: Step, operation: Operation, data: dict[str, Any], path: Path, scope: _Scope
    ) -> Shards | None:
        self._known_keys(data, path, ("over", "size", "into", "reduce"), "'shards'")
        over = self._text(data, path, "over", required=True)
        into = self._text(data, path, "into") or "rows"
        parameters = {parameter.name: parameter for parameter in operation.parameters}
        sound = True
        if over:
            parameter = parameters.get(over)
            if parameter is None or parameter.repeated or parameter.type not in ("particles", "subtomograms"):
                able = [
                    p.name for p in operation.parameters if p.type in ("particles", "subtomograms") and not p.repeated
                ]
                self._problem((*path, "over"), f"{operation.name} cannot be split over {over!r}{_closest(over, able)}")
                sound = False
            elif over not in step.fields:
                self._problem((*path, "over"), f"step {step.id!r} is split over {over!r}, which 'with' does not set")
                sound = False
        field = operation.request_class.DESCRIPTOR.fields_by_name.get(into)
        if field is None or field.message_type is None or field.message_type.full_name != _ROWS:
            self._problem((*path, "into"), f"{operation.name} takes no range of rows in {into!r}")
            sound = False
        elif into in step.fields:
            self._problem(path, f"step {step.id!r} sets {into!r}, which 'shards' fills")
        size = self._expression(data.get("size", DEFAULT_SHARD_ROWS), (*path, "size"))
        if isinstance(size, Reference):
            found = self._type_of(size, scope, (*path, "size"), f"step {step.id!r}")
            if found is not None and (found.kind != "integer" or found.depth or found.optional):
                self._problem((*path, "size"), f"'size' must be an integer; {size} is {found}")
        elif isinstance(size, bool) or not isinstance(size, int) or size < 1:
            self._problem((*path, "size"), f"'size' is {data.get('size')!r}; it must be an integer of at least 1")
        reduce = None
        if data.get("reduce") is not None:
            reduce = self._reduce(
                operation, self._mapping(data["reduce"], (*path, "reduce"), "'reduce'"), (*path, "reduce"), scope, step
            )
        return Shards(over, size, into, reduce) if over and sound else None

    def _reduce(self, shard: Operation, data: dict[str, Any], path: Path, scope: _Scope, step: Step) -> Reduce | None:
        self._known_keys(data, path, ("op", "field", "output", "with"), "'reduce'")
        what = f"reduce of step {step.id!r}"
        operation = self._operation(data, path, what)
        name = self._text(data, path, "field", required=True)
        if operation is None or not name:
            return None
        field = {parameter.name: parameter for parameter in operation.parameters}.get(name)
        if field is None or not field.repeated or not field.is_artifact:
            able = [
                parameter.name for parameter in operation.parameters if parameter.repeated and parameter.is_artifact
            ]
            self._problem(
                (*path, "field"), f"{operation.name} takes no list of results in {name!r}{_closest(name, able)}"
            )
            return None
        fitting = [output.name for output in shard.outputs if output.type == field.type and not output.repeated]
        output = self._text(data, path, "output")
        if output and output not in fitting:
            self._problem(
                (*path, "output"),
                f"{shard.name} has no output {output!r} of kind {field.type}{_closest(output, fitting)}",
            )
            return None
        if not output and len(fitting) != 1:
            choice = f"; say which with 'output': {', '.join(fitting)}" if fitting else ""
            self._problem(
                (*path, "field"), f"{name!r} takes {field.type}, of which {shard.name} gives {len(fitting)}{choice}"
            )
            return None
        fields = self._fields(data, path)
        self._check_fields(operation, fields, (*path, "with"), scope, what, {name})
        return Reduce(operation, name, output or fitting[0], fields)

    # Fields and their types

    def _check_fields(
        self,
        operation: Operation,
        fields: Mapping[str, Expression],
        path: Path,
        scope: _Scope,
        what: str,
        supplied: set[str],
    ) -> None:
        parameters = {parameter.name: parameter for parameter in operation.parameters}
        for name, expression in fields.items():
            parameter = parameters.get(name)
            if parameter is None:
                self._problem(
                    (*path, name), f"{what}: {operation.name} has no parameter {name!r}{_closest(name, parameters)}"
                )
                for reference in references(expression):
                    self._type_of(reference, scope, (*path, name), what)
            else:
                label = f"{what}: {name}"
                self._check_expression(expression, parameter, parameter.repeated, scope, (*path, name), label)
        for parameter in operation.parameters:
            if parameter.required and parameter.name not in fields and parameter.name not in supplied:
                unit = f" in {parameter.unit}" if parameter.unit else ""
                self._problem(
                    path[:-1],
                    f"{what}: {operation.name} needs {parameter.name!r}: {parameter.help or parameter.type}{unit}",
                )
        literals = {
            name: value
            for name, value in fields.items()
            if name in parameters and not any(references(value)) and value is not None
        }
        for name, value in literals.items():
            try:
                request_from_mapping(operation, {name: value})
            except InvalidArgument as error:
                self._problem((*path, name), f"{what}: {error}")

    def _check_expression(
        self, expression: Expression, parameter: Parameter, repeated: bool, scope: _Scope, path: Path, label: str
    ) -> None:
        """Checks references' types; literals are checked by building the request."""
        if isinstance(expression, Reference):
            found = self._type_of(expression, scope, path, label)
            if found is None:
                return
            wanted = ValueType(parameter.type, int(repeated))
            if not _fits(found, wanted):
                self._problem(path, f"{label} takes {wanted}; {expression} is {found}")
            elif found.optional and parameter.required and not _is_given(expression, scope):
                self._problem(
                    path,
                    f"{label} is needed, and {expression} may be missing; "
                    f"make the step depend on it by 'if: {expression}'",
                )
        elif isinstance(expression, Template):
            for reference in references(expression):
                self._type_of(reference, scope, path, label)
            if repeated or parameter.type not in ("text", "choice"):
                self._problem(path, f"{label} takes {ValueType(parameter.type, int(repeated))}; this is text")
        elif isinstance(expression, list):
            if any(references(expression)):
                if not repeated:
                    self._problem(path, f"{label} takes {ValueType(parameter.type)}; this is a list")
                    return
                for index, item in enumerate(expression):
                    self._check_expression(
                        item, replace(parameter, required=False), False, scope, (*path, index), f"{label}[{index}]"
                    )
        elif isinstance(expression, dict):
            if not any(references(expression)):
                return
            if repeated or parameter.type != "structure":
                self._problem(path, f"{label} takes {ValueType(parameter.type, int(repeated))}; this is a mapping")
                return
            fields = {field.name: field for field in parameter.fields}
            for name, value in expression.items():
                if name not in fields:
                    self._problem((*path, name), f"{label} has no field {name!r}{_closest(name, fields)}")
                    continue
                field = fields[name]
                self._check_expression(value, field, field.repeated, scope, (*path, name), f"{label}.{name}")

    def _type_of(self, reference: Reference, scope: _Scope, path: Path, what: str) -> ValueType | None:
        """The type of what is referred to; None, and a problem noted, where there is no such thing."""
        if reference.root in scope.values:
            if len(reference.path) > 1:
                self._problem(path, f"{what}: {reference} asks for a part of {reference.root!r}, which has none")
                return None
            return scope.values[reference.root]
        if reference.root not in scope.steps:
            self._problem(path, f"{what}: unknown reference {reference}{_closest(reference.root, scope.names())}")
            return None
        found: Any = scope.steps[reference.root]
        if not found:
            return None
        optional = reference.root in scope.conditions
        for position, name in enumerate(reference.path[1:], start=1):
            if not isinstance(found, dict):
                self._problem(path, f"{what}: {'.'.join(reference.path[:position])!r} has no parts")
                return None
            if name not in found:
                outer = ".".join(reference.path[:position])
                self._problem(path, f"{what}: {outer!r} has no output {name!r}{_closest(name, found)}")
                return None
            found = found[name]
        if isinstance(found, dict):
            self._problem(path, f"{what}: {reference} is a step; say which of its outputs: {', '.join(found)}")
            return None
        assert isinstance(found, ValueType)
        return replace(found, optional=found.optional or optional)


def _a_cycle(needs: Mapping[str, set[str]]) -> list[str]:
    """Names along a circle of needs, the first again at the end."""
    way = [next(iter(needs))]
    while True:
        following = min(needs[way[-1]])
        if following in way:
            return [*way[way.index(following) :], following]
        way.append(following)


def _outputs_of(operation: Operation) -> StepType:
    return {output.name: ValueType(output.type, int(output.repeated)) for output in operation.outputs}


def _listed(outputs: StepType) -> StepType:
    """The outputs of a mapped step: each a list."""
    return {
        name: _listed(output) if isinstance(output, dict) else replace(output, depth=output.depth + 1, optional=False)
        for name, output in outputs.items()
    }


def _fits(found: ValueType, wanted: ValueType) -> bool:
    if found.kind == "any":
        return found.depth == 0 or wanted.depth >= 1
    if found.depth != wanted.depth:
        return False
    if found.kind == wanted.kind:
        return True
    if wanted.kind == "file":
        # Every artifact is bytes that can be read as a user's file would be.
        return found.kind in ARTIFACT_KINDS
    return (found.kind, wanted.kind) in {("integer", "number"), ("text", "choice"), ("choice", "text")}


def _is_given(reference: Reference, scope: _Scope) -> bool:
    """Whether the conditions around the step make sure of the value."""
    if reference in scope.given:
        return True
    roots = {given.root for given in scope.given if given.root in scope.steps}
    return reference.root in roots or scope.conditions.get(reference.root) in scope.given
