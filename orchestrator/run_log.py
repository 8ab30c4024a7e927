"""What the platform's processes logged about a run, brought together.

Each process keeps its latest lines of a run in memory. Those are asked for when somebody wants to read them: this
orchestrator's own, and those of all instances that it knows then. What was logged about a task that fails is asked for
at once, and kept in the record of runs: the instance may be gone when somebody wants to know why.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import grpc
from google.protobuf import json_format

from cryofleet.errors import Unavailable
from cryofleet.server.recent_log import RecentLog
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import runtime_pb2, runtime_pb2_grpc
from orchestrator.placement import Instance
from orchestrator.runs import RunRow
from orchestrator.tasks import Outcome, TaskRequest

if TYPE_CHECKING:
    from orchestrator.engine import Engine

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 2.0
"""How long an instance is waited for."""
MOST_BYTES = 4 * 2**20
"""Of an answer; of more the oldest lines are left out."""
KEPT_TASKS = 50
"""Tasks of an attempt whose lines are kept: the first that fail, and those that do so at the same time."""
_KEPT_LINES = 40
_KEPT_BYTES = 32 * 2**10


class RunLog:
    """Reads the log of a run, and keeps that of its failed tasks."""

    def __init__(self, engine: Engine, own: RecentLog) -> None:
        """`own` is this orchestrator's."""
        self._engine = engine
        self._own = own

    async def read(self, run: RunRow, limit: int) -> pb.ReadLogResponse:
        """The newest lines, and which instances could not be asked. Raises Unavailable where the database is away."""
        kept = await self._engine.answer(self._engine.runs.kept_log, run.run_id)
        found = [line for text in kept for line in _from_json(text)]
        own, cut = self._own.read(run.project, run.run_id, limit=limit)
        of_any, any_cut = self._own.read("", run.run_id, limit=limit)
        # Another run, since forgotten, may have had the id.
        found += own + [line for line in of_any if line.time.ToNanoseconds() >= (run.created_at - 0.001) * 1e9]
        response = pb.ReadLogResponse(cut=cut or any_cut)
        request = runtime_pb2.GetLogRequest(project=run.project, run_id=run.run_id, limit=limit)
        pools = self._engine.placement.pools
        asked = [(name, instance) for name, pool in pools.items() for instance in pool.instances.values()]
        answers = await asyncio.gather(*(_ask(instance, request) for _, instance in asked))
        for (name, instance), answer in zip(asked, answers, strict=True):
            if isinstance(answer, str):
                response.unread.add(pool=name, instance=instance.name, address=instance.address, cause=answer)
            else:
                found += answer.lines
                response.cut |= answer.cut
        distinct = _distinct(found)
        response.lines.extend(_newest(distinct, limit, MOST_BYTES))
        response.cut |= len(response.lines) < len(distinct)
        return response

    async def keep(self, task: TaskRequest, outcome: Outcome) -> None:
        """Keeps what was logged about a task that has failed, if not too many of its attempt did before."""
        runs = self._engine.runs
        attempt = task.attempt
        try:
            if await self._engine.answer(runs.logs_kept, task.run_id, attempt) >= KEPT_TASKS:
                return
            request = runtime_pb2.GetLogRequest(
                project=task.project, run_id=task.run_id, task_key=task.key, limit=_KEPT_LINES
            )
            tried = outcome.get("tried", ())
            pools = self._engine.placement.pools.values()
            instances = {i.address: i for pool in pools for i in pool.instances.values() if i.address in tried}
            answers = await asyncio.gather(*(_ask(instance, request) for instance in instances.values()))
            found, _ = self._own.read(task.project, task.run_id, task.key)
            for answer in answers:
                found += [] if isinstance(answer, str) else answer.lines
            text = _to_json(_newest(_distinct(found), _KEPT_LINES, _KEPT_BYTES))
            await self._engine.answer(runs.keep_log, task.run_id, attempt, task.key, text)
        except Unavailable as failure:
            logger.warning("the log of a failed task is not kept: %s", failure)


async def _ask(instance: Instance, request: runtime_pb2.GetLogRequest) -> runtime_pb2.GetLogResponse | str:
    """What the instance has, or why it didn't say."""
    stub = runtime_pb2_grpc.RuntimeServiceStub(instance.channel)
    try:
        answer: runtime_pb2.GetLogResponse = await stub.GetLog(request, timeout=PATIENCE_SECONDS)
        return answer
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"it did not answer within {PATIENCE_SECONDS:g} s"
        return f"{error.code().name}: {' '.join((error.details() or '').split())}"
    except grpc.aio.UsageError:
        return "it is gone"


def _distinct(lines: Iterable[runtime_pb2.LogLine]) -> list[runtime_pb2.LogLine]:
    """Each line once, in order of time; those of one moment in the order given."""
    by_content = {line.SerializeToString(deterministic=True): line for line in lines}
    return sorted(by_content.values(), key=lambda line: line.time.ToNanoseconds())


def _newest(lines: list[runtime_pb2.LogLine], limit: int, most_bytes: int) -> list[runtime_pb2.LogLine]:
    """The last so many that have so many bytes together at most."""
    first, size_bytes = len(lines), 0
    while first > max(0, len(lines) - limit):
        size_bytes += lines[first - 1].ByteSize()
        if size_bytes > most_bytes:
            break
        first -= 1
    return lines[first:]


def _to_json(lines: Iterable[runtime_pb2.LogLine]) -> str:
    return json.dumps([json_format.MessageToDict(line) for line in lines])


def _from_json(text: str) -> list[runtime_pb2.LogLine]:
    # A newer version may have kept more of a line.
    return [json_format.ParseDict(line, runtime_pb2.LogLine(), ignore_unknown_fields=True) for line in json.loads(text)]
