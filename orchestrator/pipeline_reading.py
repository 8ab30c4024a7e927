"""Pipelines read from YAML: the document's form, without regard to what its names refer to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from cryofleet.errors import InvalidArgument
from cryofleet.operations import ARTIFACT_KINDS, Operation, find_operation, suggestion
from orchestrator.arguments import PARAMETER_TYPES, Argument
from orchestrator.expressions import NAME, Expression, Reference, parse
from orchestrator.located import Document, Path, Problems
from orchestrator.pipeline import Pipeline, Reduce, Repeat, Shards, Step, check_rounds
from orchestrator.pipeline_checking import check, outputs_for

MAX_FOREACH_DEPTH = 3
DEFAULT_SHARD_ROWS = 256
_REPEAT_KEYS = ("carry", "next", "until")
_STEP_KEYS = ("id", "op", "with", "if", "foreach", "as", "strict", "shards", "repeat", *_REPEAT_KEYS, "steps")


def load(text: str, source: str) -> Pipeline:
    """A pipeline that has been checked, from its YAML; `source` is the file's name in messages.

    Raises InvalidArgument, a line `source:line: what` for each thing that is wrong.
    """
    document = Document(text, source)
    problems = Problems(document)
    pipeline = _Reader(document, problems).pipeline()
    check(pipeline, problems)
    problems.raise_if_any()
    return pipeline


class _Reader:
    """Reads one document. What is malformed is noted and left out, so that the rest can still be checked."""

    def __init__(self, document: Document, problems: Problems) -> None:
        self._document = document
        self._problem = problems.add

    def pipeline(self) -> Pipeline:
        data = self._mapping(self._document.data, (), "a pipeline")
        self._known_keys(data, (), ("name", "help", "inputs", "parameters", "steps", "outputs"), "a pipeline")
        outputs = self._mapping(data.get("outputs"), ("outputs",), "outputs")
        return Pipeline(
            name=self._text(data, (), "name", required=True),
            help=self._text(data, (), "help"),
            arguments=(*self._inputs(data), *self._parameters(data)),
            steps=self._steps(data, (), depth=0),
            outputs={name: self._expression(value, ("outputs", name)) for name, value in outputs.items()},
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
                self._problem((*path, key), f"{what} has no {key!r}{suggestion(key, known)}")

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

    def _is_name(self, word: str, path: Path) -> bool:
        if NAME.fullmatch(word):
            return True
        self._problem(path, f"{word!r} is no name; it takes letters, digits, - and _")
        return False

    def _expression(self, value: Any, path: Path) -> Expression:
        try:
            return parse(value)
        except ValueError as error:
            self._problem(path, str(error))
            return None

    def _reference(self, data: Mapping[str, Any], path: Path, key: str) -> Reference | None:
        return self._as_reference(data[key], (*path, key), key) if key in data else None

    def _as_reference(self, value: Any, path: Path, key: str) -> Reference | None:
        expression = self._expression(value, path)
        if isinstance(expression, Reference):
            return expression
        if expression is not None or value is None:
            self._problem(path, f"{key!r} must be a reference, as ${{name}} or ${{step.output}}")
        return None

    def _conditions(self, data: Mapping[str, Any], path: Path) -> tuple[Reference, ...]:
        """Those of `if`: a reference, or a list of them that must all hold."""
        value = data.get("if")
        if isinstance(value, list):
            found = [self._as_reference(each, (*path, "if", index), "if") for index, each in enumerate(value)]
        else:
            found = [self._reference(data, path, "if")]
        return tuple(reference for reference in found if reference is not None)

    # Inputs and parameters

    def _named(self, data: Mapping[str, Any], section: str) -> Iterator[tuple[str, dict[str, Any], Path]]:
        for name, value in self._mapping(data.get(section), (section,), section).items():
            path: Path = (section, name)
            if self._is_name(name, path):
                yield name, self._mapping(value, path, repr(name)), path

    def _inputs(self, data: Mapping[str, Any]) -> Iterator[Argument]:
        for name, entry, path in self._named(data, "inputs"):
            self._known_keys(entry, path, ("kind", "help", "optional", "list"), "an input")
            kind = self._text(entry, path, "kind", required=True)
            if kind and kind not in ARTIFACT_KINDS:
                self._problem((*path, "kind"), f"unknown kind {kind!r}{suggestion(kind, sorted(ARTIFACT_KINDS))}")
            yield Argument(
                name,
                kind if kind in ARTIFACT_KINDS else "file",
                help=self._text(entry, path, "help"),
                repeated=self._flag(entry, path, "list"),
                required=not self._flag(entry, path, "optional"),
            )

    def _parameters(self, data: Mapping[str, Any]) -> Iterator[Argument]:
        for name, entry, path in self._named(data, "parameters"):
            self._known_keys(entry, path, ("type", "default", "unit", "help", "choices", "optional"), "a parameter")
            kind = self._text(entry, path, "type", required=True)
            if kind and kind not in PARAMETER_TYPES:
                self._problem((*path, "type"), f"unknown type {kind!r}{suggestion(kind, PARAMETER_TYPES)}")
            choices = entry.get("choices") or []
            if not isinstance(choices, list):
                self._problem((*path, "choices"), "'choices' must be a list")
                choices = []
            default = entry.get("default")
            argument = Argument(
                name,
                kind if kind in PARAMETER_TYPES else "structure",
                help=self._text(entry, path, "help"),
                unit=self._text(entry, path, "unit"),
                required=default is None and not self._flag(entry, path, "optional"),
                choices=tuple(choices),
            )
            if default is not None:
                try:
                    argument = replace(argument, default=argument.checked(default))
                except ValueError as error:
                    self._problem((*path, "default"), f"the default of {name!r} {error}")
            yield argument

    # Steps

    def _steps(self, data: Mapping[str, Any], path: Path, depth: int) -> tuple[Step, ...]:
        path = (*path, "steps")
        listed = data.get("steps")
        if not isinstance(listed, list) or not listed:
            self._problem(path, "'steps' must be a list of one step at least")
            return ()
        read = (
            self._step(self._mapping(entry, (*path, index), "a step"), (*path, index), depth)
            for index, entry in enumerate(listed)
        )
        return tuple(step for step in read if step is not None)

    def _step(self, data: dict[str, Any], path: Path, depth: int) -> Step | None:
        self._known_keys(data, path, _STEP_KEYS, "a step")
        name = self._text(data, path, "id", required=True)
        if not name or not self._is_name(name, (*path, "id")):
            return None
        what = f"step {name!r}"
        operation = None
        shards = None
        steps: tuple[Step, ...] = ()
        if "steps" in data:
            for key in ("op", "with", "shards"):
                if key in data:
                    self._problem((*path, key), f"{what} has 'steps', and takes no {key!r} beside them")
            if "foreach" not in data and "repeat" not in data:
                told = f"{what} has 'steps', and needs a 'foreach' to map them over or a 'repeat' to run them in rounds"
                self._problem(path, told)
            steps = self._steps(data, path, depth + int("foreach" in data))
        else:
            operation = self._operation(data, path, what)
            if operation is not None and "shards" in data:
                shards = self._shards(data, path, what, operation)
        if "foreach" in data and depth >= MAX_FOREACH_DEPTH:
            self._problem((*path, "foreach"), f"foreach goes {MAX_FOREACH_DEPTH} deep at most")
        if "as" in data and "foreach" not in data:
            self._problem((*path, "as"), "'as' names the item of a 'foreach', and there is none")
        if "strict" in data and "foreach" not in data:
            self._problem((*path, "strict"), "'strict' is said of a 'foreach', and there is none")
        repeat = self._repeat(data, path, what)
        item = self._text(data, path, "as") or "item"
        self._is_name(item, (*path, "as"))
        return Step(
            id=name,
            document_path=path,
            operation=operation,
            fields=self._fields(data, path),
            conditions=self._conditions(data, path),
            foreach=self._reference(data, path, "foreach"),
            item=item,
            strict=self._flag(data, path, "strict"),
            repeat=repeat,
            shards=shards,
            steps=steps,
        )

    def _fields(self, data: Mapping[str, Any], path: Path, key: str = "with") -> dict[str, Expression]:
        path = (*path, key)
        given = self._mapping(data.get(key), path, repr(key))
        return {name: self._expression(value, (*path, name)) for name, value in given.items()}

    def _repeat(self, data: Mapping[str, Any], path: Path, what: str) -> Repeat | None:
        if "repeat" not in data:
            for key in _REPEAT_KEYS:
                if key in data:
                    self._problem((*path, key), f"{key!r} belongs to a 'repeat', and there is none")
            return None
        if "foreach" in data:
            told = f"{what} has a 'foreach', and takes no 'repeat' beside it; make it a step inside the foreach"
            self._problem((*path, "repeat"), told)
        if "steps" not in data:
            self._problem(path, f"{what} has a 'repeat', and needs 'steps' to run in each round")
        rounds = self._expression(data["repeat"], (*path, "repeat"))
        if not isinstance(rounds, Reference):
            try:
                check_rounds(rounds)
            except ValueError as error:
                self._problem((*path, "repeat"), f"{what}: {error}")
        carry = self._fields(data, path, "carry")
        for name in carry:
            self._is_name(name, (*path, "carry", name))
        return Repeat(rounds, carry, self._fields(data, path, "next"), self._reference(data, path, "until"))

    def _operation(self, data: Mapping[str, Any], path: Path, what: str) -> Operation | None:
        if data.get("op") is None:
            self._problem(path, f"{what} needs an 'op', as picking.Extract")
            return None
        try:
            return find_operation(str(data["op"]))
        except InvalidArgument as error:
            self._problem((*path, "op"), f"{what}: {error}")
            return None

    def _shards(self, step: Mapping[str, Any], path: Path, what: str, operation: Operation) -> Shards:
        path = (*path, "shards")
        data = self._mapping(step["shards"], path, "'shards'")
        self._known_keys(data, path, ("over", "size", "into", "reduce"), "'shards'")
        over = self._text(data, path, "over", required=True)
        into = self._text(data, path, "into") or "rows"
        size = self._expression(data.get("size", DEFAULT_SHARD_ROWS), (*path, "size"))
        if not isinstance(size, Reference) and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            self._problem((*path, "size"), f"'size' is {data.get('size')!r}; it must be an integer of at least 1")
        reduce = self._reduce(data, path, what, operation) if data.get("reduce") is not None else None
        return Shards(over, size, into, reduce)

    def _reduce(self, shards: Mapping[str, Any], path: Path, what: str, shard: Operation) -> Reduce | None:
        path = (*path, "reduce")
        data = self._mapping(shards["reduce"], path, "'reduce'")
        self._known_keys(data, path, ("op", "field", "output", "with"), "'reduce'")
        operation = self._operation(data, path, f"reduce of {what}")
        field = self._text(data, path, "field", required=True)
        output = self._text(data, path, "output")
        if operation is None or not field:
            return None
        if not output:
            fitting = outputs_for(operation, field, shard)
            output = fitting[0] if len(fitting) == 1 else ""
        return Reduce(operation, field, output, self._fields(data, path))
