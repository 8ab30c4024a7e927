"""Starting a run: what is checked before, whoever asks for it."""

from __future__ import annotations

import time
from typing import Any

from cryofleet.errors import Failure, NotFound
from cryofleet.server.quotas import Quotas
from cryofleet.space import SMALL_BYTES
from cryofleet.storage import Store
from orchestrator.engine import Engine
from orchestrator.pipeline import Pipeline
from orchestrator.runs import RunRow


def check_inputs(store: Store, pipeline: Pipeline, values: dict[str, Any]) -> None:
    """Raises NotFound for an input that is not stored, and whatever the store says of it. Blocks."""
    for argument in pipeline.arguments:
        if not argument.is_input or values[argument.name] is None:
            continue
        for uri in values[argument.name] if argument.repeated else [values[argument.name]]:
            try:
                found = any(True for _ in store.list(uri))
            except Failure as failure:
                raise type(failure)(f"input {argument.name}: {failure}") from None
            if not found:
                raise NotFound(f"input {argument.name}: {uri} does not exist")


def check_space(store: Store, quotas: Quotas, project: str) -> None:
    """Raises ResourceExhausted where nothing more can be stored: no task would come to its end. Blocks."""
    quotas.check(project)
    store.check_space(SMALL_BYTES + 1)


def run_row(
    pipeline: Pipeline, definition: str, values: dict[str, Any], *, run_id: str, project: str, owner: str
) -> RunRow:
    """A new run of a pipeline; `values` are those of all its arguments."""
    return RunRow(
        run_id=run_id,
        project=project,
        pipeline=pipeline.name,
        source=pipeline.source,
        definition=definition,
        arguments={name: value for name, value in values.items() if value is not None},
        created_at=time.time(),
        owner=owner,
    )


async def start(engine: Engine, run: RunRow) -> None:
    """Keeps a run and starts it; nothing where it is there already.

    Raises ResourceExhausted where its owner may start no more, AlreadyExists where the id is another run's, and
    Unavailable.
    """
    if await engine.answer(engine.runs.create, run, engine.settings.max_runs_per_user):
        await engine.start_attempt(run.run_id, 1)
