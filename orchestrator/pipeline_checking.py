"""Pipelines checked against the contract: what is referred to exists, and fits the field that takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cryofleet.errors import InvalidArgument
from cryofleet.operations import ARTIFACT_KINDS, Operation, Parameter, request_from_mapping, suggestion
from cryofleet.v1 import common_pb2
from orchestrator.arguments import ValueType
from orchestrator.expressions import Expression, Reference, Template, references
from orchestrator.located import Path, Problems
from orchestrator.pipeline import ROUND, ROUNDS, Pipeline, Reduce, Repeat, Shards, Step

_ROWS = common_pb2.RowRange.DESCRIPTOR.full_name
#: Kinds of artifacts that have rows; of a table those that its `rows` says.
_WITH_ROWS = ("particles", "subtomograms", "table")

StepType = dict[str, Any]
"""Outputs of a step by name: ValueType, or the StepType of a step inside it."""


def check(pipeline: Pipeline, problems: Problems) -> None:
    """Notes all that is wrong with the pipeline; it may lack what was malformed in its document."""
    _Checker(problems).pipeline(pipeline)


def outputs_for(operation: Operation, field: str, shard: Operation) -> list[str]:
    """The outputs of a shard's operation that fit a field of the operation that joins the shards' results."""
    parameter = _parameter(operation, field)
    if parameter is None:
        return []
    return [output.name for output in shard.outputs if output.type == parameter.type and not output.repeated]


@dataclass(frozen=True)
class _Scope:
    """What can be referred to, and what is known to be there."""

    values: Mapping[str, ValueType]
    steps: Mapping[str, StepType]
    """Outputs of the steps, found so far; empty for a step with an error."""
    conditions: Mapping[str, tuple[Reference, ...]]
    """Of the steps that have one."""
    given: frozenset[Reference] = frozenset()
    """References that the conditions around a step have found to be there."""

    def names(self) -> list[str]:
        return [*self.values, *self.steps]

    def has(self, reference: Reference) -> bool:
        """Whether the conditions around the step make sure of the value."""
        if reference in self.given:
            return True
        found: Any = self.steps.get(reference.root)
        for name in reference.path[1:]:
            found = found[name] if isinstance(found, dict) and name in found else None
        if isinstance(found, ValueType) and found.optional:
            # The step may run without it.
            return False
        roots = {given.root for given in self.given if given.root in self.steps}
        if reference.root in roots:
            return True
        return reference.root in self.conditions and self.given.issuperset(self.conditions[reference.root])


class _Checker:
    def __init__(self, problems: Problems) -> None:
        self._problem = problems.add

    def pipeline(self, pipeline: Pipeline) -> None:
        values: dict[str, ValueType] = {}
        for argument in pipeline.arguments:
            if argument.name in values:
                self._problem(argument.document_path, f"{argument.name!r} is the name of an input already")
            values[argument.name] = argument.value_type
        scope = self._steps(pipeline.steps, _Scope(values, {}, {}))
        for name, expression in pipeline.outputs.items():
            self._check_references(expression, scope, ("outputs", name), f"output {name!r}")

    # Steps

    def _steps(self, steps: tuple[Step, ...], scope: _Scope) -> _Scope:
        """Checks steps that stand beside each other, in order of need; the scope with them."""
        named: dict[str, Step] = {}
        for step in steps:
            if step.id in named or step.id in scope.names():
                self._problem((*step.document_path, "id"), f"the name {step.id!r} is taken already")
            else:
                named[step.id] = step
        # Steps that need each other are never checked, but have names.
        scope = replace(scope, steps={**{name: {} for name in named}, **scope.steps})
        for step in self._in_order_of_need(named):
            outputs = self._step(step, scope)
            conditions = scope.conditions
            if step.conditions:
                conditions = {**conditions, step.id: step.conditions}
            scope = replace(scope, steps={**scope.steps, step.id: outputs}, conditions=conditions)
        return scope

    def _in_order_of_need(self, named: Mapping[str, Step]) -> list[Step]:
        needs = {name: {r.root for r in step.references()} & set(named) for name, step in named.items()}
        order: list[str] = []
        while len(order) < len(named):
            ready = [name for name in named if name not in order and needs[name] <= set(order)]
            if not ready:
                cycle = _a_cycle({name: needs[name] - set(order) for name in named if name not in order})
                path = named[cycle[0]].document_path
                self._problem(path, f"steps need each other in a circle: {' -> '.join(cycle)}")
                break
            order += ready
        return [named[name] for name in order]

    def _step(self, step: Step, scope: _Scope) -> StepType:
        what = f"step {step.id!r}"
        for condition in step.conditions:
            self._type_of(condition, scope, (*step.document_path, "if"), what)
        scope = replace(scope, given=scope.given.union(step.conditions))
        if step.foreach is not None:
            scope = self._with_item(step, step.foreach, scope)
        if step.repeat is not None:
            outputs: StepType = self._rounds(step, step.repeat, scope)
        elif step.steps:
            inner = self._steps(step.steps, scope)
            outputs = {each.id: inner.steps[each.id] for each in step.steps if each.id in inner.steps}
        elif step.operation is not None:
            outputs = self._call(step, step.operation, scope)
        else:
            return {}
        return _listed(outputs) if step.foreach is not None else outputs

    def _with_item(self, step: Step, foreach: Reference, scope: _Scope) -> _Scope:
        if step.item in scope.names():
            path = (*step.document_path, "as")
            self._problem(path, f"the name {step.item!r} is taken already; give the item another with 'as'")
        item = ValueType("any")
        path = (*step.document_path, "foreach")
        found = self._type_of(foreach, scope, path, f"step {step.id!r}")
        if found is not None:
            if found.depth < 1:
                self._problem(path, f"foreach needs a list; {foreach} is {found}")
            else:
                item = ValueType(found.kind, found.depth - 1)
        return replace(scope, values={**scope.values, step.item: item})

    def _rounds(self, step: Step, repeat: Repeat, scope: _Scope) -> StepType:
        """Outputs of a repeat; each round refers to what it was given as to outputs of the repeat itself."""
        path = step.document_path
        what = f"step {step.id!r}"
        if isinstance(repeat.rounds, Reference):
            found = self._type_of(repeat.rounds, scope, (*path, "repeat"), what)
            if found is not None and (found.kind not in ("integer", "any") or found.depth or found.optional):
                self._problem((*path, "repeat"), f"'repeat' must be an integer; {repeat.rounds} is {_told(found)}")
        carried: StepType = {}
        for name, first in repeat.carry.items():
            here = (*path, "carry", name)
            if name in (ROUND, ROUNDS):
                self._problem(here, f"{what}: {name!r} is the number of rounds; carry the value by another name")
            if first is None:
                self._problem(here, f"{what} carries nothing as {name!r}; give the first round a value")
            carried[name] = self._type_of_value(first, scope, here, f"{what} carries {name!r}") or ValueType("any")
        for inner_step in step.steps:
            if inner_step.id in {*carried, ROUND, ROUNDS}:
                told = f"the name {inner_step.id!r} is taken already, by what {what} carries"
                self._problem((*inner_step.document_path, "id"), told)
        given = {**carried, ROUND: ValueType("integer")}
        inner = self._steps(step.steps, replace(scope, steps={**scope.steps, step.id: given}))
        self._check_next(step, repeat, carried, inner)
        if repeat.until is not None:
            found = self._type_of(repeat.until, inner, (*path, "until"), what)
            if found is not None and (found.kind not in ("boolean", "any") or found.depth):
                self._problem((*path, "until"), f"'until' must be true or false; {repeat.until} is {found}")
        outputs: StepType = {**carried, ROUNDS: ValueType("integer")}
        for each in step.steps:
            if each.id in inner.steps:
                last = inner.steps[each.id]
                outputs[each.id] = _optional(last) if each.conditions else last
        return outputs

    def _check_next(self, step: Step, repeat: Repeat, carried: StepType, inner: _Scope) -> None:
        """Checks that each round gets what the first one gets; `inner` has what a round ends with."""
        path = (*step.document_path, "next")
        what = f"step {step.id!r}"
        for name in carried:
            if name not in repeat.next:
                self._problem(path, f"{what} carries {name!r}; say what it is in the following round")
        for name, following in repeat.next.items():
            here = (*path, name)
            if name not in carried:
                told = f"{what} carries no {name!r}{suggestion(name, carried)}"
                self._problem(here, told)
                self._check_references(following, inner, here, what)
                continue
            if following is None:
                self._problem(here, f"{what} carries nothing as {name!r} into the following round")
            found = self._type_of_value(following, inner, here, f"{what} carries {name!r}")
            if found is not None and not _continues(found, carried[name]):
                told = f"{name!r} is {_told(carried[name])} in the first round, and {_told(found)} in the following"
                self._problem(here, f"{what}: {told}")

    def _call(self, step: Step, operation: Operation, scope: _Scope) -> StepType:
        """The step's operation, whole or in shards."""
        supplied = "" if step.shards is None else step.shards.into
        path = (*step.document_path, "with")
        self._check_fields(operation, step.fields, path, scope, f"step {step.id!r}", supplied)
        if step.shards is None:
            return _outputs_of(operation)
        self._check_shards(step, operation, step.shards, scope)
        reduce = step.shards.reduce
        return _listed(_outputs_of(operation)) if reduce is None else _outputs_of(reduce.operation)

    def _check_shards(self, step: Step, operation: Operation, shards: Shards, scope: _Scope) -> None:
        path = (*step.document_path, "shards")
        what = f"step {step.id!r}"
        able = [
            p.name for p in operation.parameters if p.type in ("particles", "subtomograms", "table") and not p.repeated
        ]
        if shards.over and shards.over not in able:
            told = f"{operation.name} cannot be split over {shards.over!r}{suggestion(shards.over, able)}"
            self._problem((*path, "over"), told)
        elif shards.over and shards.over not in step.fields:
            self._problem((*path, "over"), f"{what} is split over {shards.over!r}, which 'with' does not set")
        field = operation.request_class.DESCRIPTOR.fields_by_name.get(shards.into)
        if field is None or field.message_type is None or field.message_type.full_name != _ROWS:
            self._problem((*path, "into"), f"{operation.name} takes no range of rows in {shards.into!r}")
        elif shards.into in step.fields:
            self._problem(path, f"{what} sets {shards.into!r}, which 'shards' fills")
        if isinstance(shards.size, Reference):
            found = self._type_of(shards.size, scope, (*path, "size"), what)
            if found is not None and (found.kind != "integer" or found.depth or found.optional):
                self._problem((*path, "size"), f"'size' must be an integer; {shards.size} is {found}")
        if shards.reduce is not None:
            self._check_reduce(shards.reduce, operation, (*path, "reduce"), scope, f"reduce of {what}")

    def _check_reduce(self, reduce: Reduce, shard: Operation, path: Path, scope: _Scope, what: str) -> None:
        operation, name = reduce.operation, reduce.field
        field = _parameter(operation, name)
        if field is None or not field.repeated or not field.is_artifact:
            able = [p.name for p in operation.parameters if p.repeated and p.is_artifact]
            told = f"{operation.name} takes no list of results in {name!r}{suggestion(name, able)}"
            self._problem((*path, "field"), told)
            return
        fitting = outputs_for(operation, name, shard)
        if not reduce.output:
            choice = f"; say which with 'output': {', '.join(fitting)}" if fitting else ""
            told = f"{name!r} takes {field.type}, of which {shard.name} gives {len(fitting)}{choice}"
            self._problem((*path, "field"), told)
        elif reduce.output not in fitting:
            hint = suggestion(reduce.output, fitting)
            told = f"{shard.name} has no output {reduce.output!r} of kind {field.type}{hint}"
            self._problem((*path, "output"), told)
        self._check_fields(operation, reduce.fields, (*path, "with"), scope, what, supplied=name)

    # Fields and their types

    def _check_fields(
        self,
        operation: Operation,
        fields: Mapping[str, Expression],
        path: Path,
        scope: _Scope,
        what: str,
        supplied: str,
    ) -> None:
        """`supplied`: the field that is filled when the step runs, if any."""
        parameters = {parameter.name: parameter for parameter in operation.parameters}
        for name, expression in fields.items():
            here = (*path, name)
            if name not in parameters:
                hint = suggestion(name, parameters)
                self._problem(here, f"{what}: {operation.name} has no parameter {name!r}{hint}")
                self._check_references(expression, scope, here, what)
                continue
            parameter = parameters[name]
            self._check_expression(expression, parameter, parameter.repeated, scope, here, f"{what}: {name}")
            if expression is not None and not any(references(expression)):
                try:
                    request_from_mapping(operation, {name: expression})
                except InvalidArgument as error:
                    self._problem(here, f"{what}: {error}")
        for parameter in operation.parameters:
            if parameter.required and parameter.name not in fields and parameter.name != supplied:
                meaning = (parameter.help or parameter.type) + (f" in {parameter.unit}" if parameter.unit else "")
                self._problem(path[:-1], f"{what}: {operation.name} needs {parameter.name!r}: {meaning}")

    def _check_expression(
        self,
        expression: Expression,
        parameter: Parameter,
        repeated: bool,
        scope: _Scope,
        path: Path,
        label: str,
        in_list: bool = False,
    ) -> None:
        """Checks references' types; literals are checked by building the request. `in_list`: among the items of a list,
        where a list stands for its items.
        """
        wanted = ValueType(parameter.type, int(repeated))
        if isinstance(expression, Reference):
            found = self._type_of(expression, scope, path, label)
            if found is None:
                return
            taken = replace(found, depth=0) if in_list else _as_a_field_takes_it(found)
            if not _fits(taken, wanted):
                self._problem(path, f"{label} takes {wanted}; {expression} is {found}")
            elif found.optional and parameter.required and not scope.has(expression):
                self._problem(
                    path,
                    f"{label} is needed, and {expression} may be missing; "
                    f"make the step depend on it by 'if: {expression}'",
                )
        elif not any(references(expression)):
            return
        elif isinstance(expression, Template):
            self._check_references(expression, scope, path, label)
            if repeated or parameter.type not in ("text", "choice"):
                self._problem(path, f"{label} takes {wanted}; this is text")
        elif isinstance(expression, list):
            if not repeated:
                self._problem(path, f"{label} takes {wanted}; this is a list")
                return
            one = replace(parameter, required=False)
            for index, item in enumerate(expression):
                self._check_expression(item, one, False, scope, (*path, index), f"{label}[{index}]", in_list=True)
        elif isinstance(expression, dict):
            if repeated or parameter.type != "structure":
                self._problem(path, f"{label} takes {wanted}; this is a mapping")
                return
            fields = {field.name: field for field in parameter.fields}
            for name, value in expression.items():
                if name not in fields:
                    self._problem((*path, name), f"{label} has no field {name!r}{suggestion(name, fields)}")
                    continue
                field = fields[name]
                self._check_expression(value, field, field.repeated, scope, (*path, name), f"{label}.{name}")

    def _type_of_value(self, expression: Expression, scope: _Scope, path: Path, what: str) -> ValueType | None:
        """The type of a value that no field takes; None where that is not known, or a problem was noted."""
        match expression:
            case Reference():
                return self._type_of(expression, scope, path, what)
            case list():
                found = [self._type_of_value(item, scope, (*path, i), what) for i, item in enumerate(expression)]
                kinds = {(each.kind, each.depth) for each in found if each is not None}
                (kind, depth) = kinds.pop() if len(kinds) == 1 else ("any", 0)
                return ValueType(kind, depth + 1)
        self._check_references(expression, scope, path, what)
        match expression:
            case Template() | str():
                return ValueType("text")
            case bool():
                return ValueType("boolean")
            case int():
                return ValueType("integer")
            case float():
                return ValueType("number")
            case dict():
                return ValueType("structure")
        return None

    def _check_references(self, expression: Expression, scope: _Scope, path: Path, what: str) -> None:
        for reference in references(expression):
            self._type_of(reference, scope, path, what)

    def _type_of(self, reference: Reference, scope: _Scope, path: Path, what: str) -> ValueType | None:
        """The type of what is referred to; None, and a problem noted, where there is no such thing."""
        if reference.root in scope.values:
            if len(reference.path) > 1 and scope.values[reference.root] in (ValueType("any"), ValueType("structure")):
                # an item of a list, or a structure, of the user's own; a part that it lacks is left out
                return ValueType("any")
            if len(reference.path) > 1:
                self._problem(path, f"{what}: {reference} asks for a part of {reference.root!r}, which has none")
                return None
            return scope.values[reference.root]
        if reference.root not in scope.steps:
            self._problem(path, f"{what}: unknown reference {reference}{suggestion(reference.root, scope.names())}")
            return None
        found: StepType | ValueType = scope.steps[reference.root]
        if not found:
            return None
        for position, name in enumerate(reference.path[1:], start=1):
            outer = ".".join(reference.path[:position])
            if isinstance(found, ValueType):
                self._problem(path, f"{what}: {outer!r} has no parts")
                return None
            if name not in found:
                self._problem(path, f"{what}: {outer!r} has no output {name!r}{suggestion(name, found)}")
                return None
            found = found[name]
        if isinstance(found, ValueType):
            return replace(found, optional=found.optional or reference.root in scope.conditions)
        self._problem(path, f"{what}: {reference} is a step; say which of its outputs: {', '.join(found)}")
        return None


def _a_cycle(needs: Mapping[str, set[str]]) -> list[str]:
    """Names along a circle of needs, the first again at the end."""
    way = [next(iter(needs))]
    while True:
        following = min(needs[way[-1]])
        if following in way:
            return [*way[way.index(following) :], following]
        way.append(following)


def _parameter(operation: Operation, name: str) -> Parameter | None:
    return next((parameter for parameter in operation.parameters if parameter.name == name), None)


def _outputs_of(operation: Operation) -> StepType:
    return {output.name: ValueType(output.type, int(output.repeated)) for output in operation.outputs}


def _listed(outputs: StepType) -> StepType:
    """The outputs of a mapped step: each a list."""
    return {
        name: _listed(output) if isinstance(output, dict) else replace(output, depth=output.depth + 1, optional=False)
        for name, output in outputs.items()
    }


def _optional(outputs: StepType) -> StepType:
    """The outputs of a step that may be left out."""
    return {
        name: _optional(output) if isinstance(output, dict) else replace(output, optional=True)
        for name, output in outputs.items()
    }


def _told(found: ValueType) -> str:
    return f"{found} that may be missing" if found.optional else str(found)


def _continues(following: ValueType, first: ValueType) -> bool:
    """Whether a value can take the place of what was carried first."""
    if following.optional and not first.optional:
        return False
    if first.kind == "any":
        return following.kind == "any" or following.depth >= first.depth
    return _fits(following, first)


def _as_a_field_takes_it(found: ValueType) -> ValueType:
    """A list of lists is one list to a field."""
    return replace(found, depth=min(found.depth, 1))


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
