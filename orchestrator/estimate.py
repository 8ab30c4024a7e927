"""What a run would take, as far as that follows from its arguments and from what the store has already."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from cryofleet.artifacts import Manifest
from cryofleet.channels import failure_from_rpc
from cryofleet.errors import InvalidArgument
from cryofleet.operations import Operation
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import runtime_pb2, runtime_pb2_grpc
from orchestrator.engine import Engine
from orchestrator.expressions import Expression, evaluate, look_up_in, references
from orchestrator.pipeline import ROUND, ROUNDS, Pipeline, Repeat, Shards, Step, check_rounds
from orchestrator.row_count import count_rows
from orchestrator.tasks import TaskRequest, build_request

_LONGEST_LOOK = 4096
"""Tasks of a step that are looked up in the store one by one."""
_TIMEOUT_SECONDS = 30.0

Values = dict[str, Any]


async def estimate_run(engine: Engine, pipeline: Pipeline, values: Values, project: str) -> pb.EstimateRunResponse:
    """The figures of each step, and of all together."""
    estimator = _Estimator(engine, project)
    await estimator.steps(pipeline.steps, dict(values), "")
    response = pb.EstimateRunResponse(steps=list(estimator.found.values()))
    response.tasks = sum(step.tasks for step in response.steps)
    response.input_bytes = sum(step.input_bytes for step in response.steps)
    for step in response.steps:
        if step.operation:
            slots = max(1, engine.placement.pool(step.operation.partition(".")[0]).slots)
            together = max(1, min(slots, step.tasks - step.tasks_cached))
            response.peak_memory_bytes = max(response.peak_memory_bytes, step.memory_bytes * together)
    return response


class _Estimator:
    def __init__(self, engine: Engine, project: str) -> None:
        self._engine = engine
        self._project = project
        self.found: dict[str, pb.StepEstimate] = {}

    async def steps(self, steps: Sequence[Step], values: Values, path: str) -> Values:
        """Adds the steps' figures; returns the outputs that are known, those in the store already."""
        waiting = list(steps)
        ids = {step.id for step in steps}
        settled: set[str] = set()
        outputs: Values = {}
        while waiting:
            for step in waiting:
                if {reference.root for reference in step.references()} & ids <= settled:
                    break
            waiting.remove(step)
            settled.add(step.id)
            known = await self._step(step, {**values, **outputs}, path + step.id)
            if known is not None:
                outputs[step.id] = known
        return outputs

    def _figures(self, path: str, step: Step) -> pb.StepEstimate:
        if path not in self.found:
            name = step.operation.name if step.operation is not None else ""
            self.found[path] = pb.StepEstimate(id=path, operation=name, known=True)
        return self.found[path]

    async def _step(self, step: Step, values: Values, path: str) -> Values | None:
        """The step's outputs where they are known; {} of a step that is left out."""
        figures = self._figures(path, step)
        look_up = look_up_in(values)
        if step.left_out(values, look_up):
            return {}
        if step.repeat is not None and _all_known([*step.conditions, step.repeat.rounds], values):
            return await self._rounds(step, step.repeat, values, path)
        if any(reference.root not in values for reference in step.references()):
            await self._unknown(step, values, path)
            return None
        if step.foreach is None:
            return await self._once(step, values, figures)
        results: list[Values | None] = []
        for item in look_up(step.foreach) or []:
            if item is None:
                results.append({})
                continue
            inside = {**values, step.item: item}
            if step.steps:
                known = await self.steps(step.steps, inside, path + ".")
                results.append(known if len(known) == len(step.steps) else None)
            else:
                results.append(await self._once(step, inside, figures))
        if any(result is None for result in results):
            return None
        return _listed([result for result in results if result is not None])

    async def _rounds(self, step: Step, repeat: Repeat, values: Values, path: str) -> Values | None:
        """The figures of each round as far as those before it are in the store; each further one takes as much."""
        try:
            rounds = check_rounds(evaluate(repeat.rounds, look_up_in(values)))
        except ValueError as error:
            raise InvalidArgument(f"step {path!r}: {error}") from None
        carried = _evaluated(repeat.carry, values)
        round_ = 0
        while True:
            round_ += 1
            given = values if carried is None else {**values, step.id: {**carried, ROUND: round_}}
            before = {name: (figures.tasks, figures.input_bytes) for name, figures in self.found.items()}
            inner = await self.steps(step.steps, given, path + ".")
            ended = {**given, **inner}
            carried = _evaluated(repeat.next, ended)
            if carried is None or not _all_known(repeat.until, ended):
                self._add_rounds(path, before, rounds - round_)
                if repeat.until is not None:
                    self._figures(path, step).known = False
                return None
            if round_ == rounds or (repeat.until is not None and look_up_in(ended)(repeat.until)):
                return {**carried, ROUNDS: round_, **inner} if len(inner) == len(step.steps) else None

    def _add_rounds(self, path: str, before: Mapping[str, tuple[int, int]], rounds: int) -> None:
        """Counts so many more rounds like the last of the repeat at `path`; `before` has the figures before that."""
        for name, figures in self.found.items():
            if rounds and name.startswith(path + "."):
                tasks, input_bytes = before.get(name, (0, 0))
                figures.tasks += (figures.tasks - tasks) * rounds
                figures.input_bytes += (figures.input_bytes - input_bytes) * rounds
                figures.known = False

    async def _unknown(self, step: Step, values: Values, path: str) -> None:
        figures = self._figures(path, step)
        figures.known = False
        if step.foreach is None and not step.steps:
            if step.shards is None:
                figures.tasks += 1
            elif _all_known([step.fields[step.shards.over], step.shards.size], values):
                figures.tasks += len(await self._ranges(step, step.shards, values))
                figures.tasks += 1 if step.shards.reduce is not None else 0
        for inner in step.steps:
            inner_figures = self._figures(f"{path}.{inner.id}", inner)
            inner_figures.known = False

    async def _once(self, step: Step, values: Values, figures: pb.StepEstimate) -> Values | None:
        operation = step.operation
        assert operation is not None
        look_up = look_up_in(values)
        fields = {name: evaluate(expression, look_up) for name, expression in step.fields.items()}
        if step.shards is None:
            return await self._task(operation, fields, figures, ask=True)
        shards = step.shards
        results: list[Values | None] = []
        for index, rows in enumerate(await self._ranges(step, shards, values)):
            own = {**fields, shards.into: rows}
            if index >= _LONGEST_LOOK:
                figures.tasks += 1
                figures.known = False
                results.append(None)
                continue
            results.append(await self._task(operation, own, figures, ask=index == 0))
        whole = [result for result in results if result is not None]
        if shards.reduce is None:
            return _listed(whole) if len(whole) == len(results) else None
        if len(whole) < len(results):
            figures.tasks += 1
            return None
        fields = {name: evaluate(expression, look_up) for name, expression in shards.reduce.fields.items()}
        fields[shards.reduce.field] = [result[shards.reduce.output] for result in whole]
        return await self._task(shards.reduce.operation, fields, figures, ask=False)

    async def _ranges(self, step: Step, shards: Shards, values: Values) -> list[dict[str, int]]:
        """The rows of each shard."""
        operation = step.operation
        assert operation is not None
        look_up = look_up_in(values)
        kind = next(p.type for p in operation.parameters if p.name == shards.over)
        store = self._engine.store.for_project(self._project)
        uri = evaluate(step.fields[shards.over], look_up)
        rows = await self._engine.tasks.in_thread(count_rows, store, kind, uri)
        size = max(1, int(evaluate(shards.size, look_up)))
        return [{"first": first, "count": min(size, rows - first)} for first in range(0, rows, size)]

    async def _task(
        self, operation: Operation, fields: Mapping[str, Any], figures: pb.StepEstimate, ask: bool
    ) -> Values | None:
        """Adds one task; its outputs where the store has them. `ask`: also ask an instance what it would need."""
        request = build_request(operation, TaskRequest("", "", self._project, operation.name, dict(fields)))
        figures.tasks += 1
        look = functools.partial(self._engine.cache.look_up, operation, request, self._project)
        manifest: Manifest | None
        _, manifest = await self._engine.tasks.in_thread(look)
        if ask:
            await self._ask(operation, request, figures)
        if manifest is None:
            return None
        figures.tasks_cached += 1
        return dict(manifest.result)

    async def _ask(self, operation: Operation, request: Any, figures: pb.StepEstimate) -> None:
        pool = self._engine.placement.pool(operation.service)
        instance = next((each for each in pool.instances.values() if each.ready), None)
        if instance is None:
            figures.known = False
            return
        stub = runtime_pb2_grpc.RuntimeServiceStub(instance.channel)
        asked = runtime_pb2.EstimateRequest(operation=operation.name, request=request.SerializeToString())
        try:
            answer = await stub.Estimate(asked, timeout=_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            failure = failure_from_rpc(error)
            if isinstance(failure, InvalidArgument):
                raise InvalidArgument(f"step {figures.id!r}: {failure}") from None
            figures.known = False
            return
        figures.memory_bytes = max(figures.memory_bytes, answer.memory_bytes)
        figures.input_bytes += answer.input_bytes


def _all_known(expression: Expression, values: Values) -> bool:
    return all(reference.root in values for reference in references(expression))


def _evaluated(expressions: Mapping[str, Expression], values: Values) -> Values | None:
    """The values, as far as all are known."""
    if not _all_known(dict(expressions), values):
        return None
    look_up = look_up_in(values)
    return {name: evaluate(value, look_up, keep_places=True) for name, value in expressions.items()}


def _listed(results: list[Values]) -> Values:
    names = dict.fromkeys(name for result in results for name in result)
    return {name: [result.get(name) for result in results] for name in names}
