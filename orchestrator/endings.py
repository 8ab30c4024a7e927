"""Waiting for workflows that may end in any orchestrator: one question to the database for all who wait."""

from __future__ import annotations

import asyncio
import logging

import sqlalchemy as sa
from dbos import DBOS

from orchestrator.runs import is_away

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
_ENDED = ["SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"]


class Endings:
    """Tells those who wait that a workflow has ended.

    Were each to ask by itself, as a handle of DBOS does, the database would have ten questions a second for each
    foreach and each of its items that runs.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def of(self, workflow_id: str) -> None:
        """Returns once the workflow has ended; its handle then has the result at once."""
        future = self._waiting.get(workflow_id)
        if future is None:
            future = self._waiting[workflow_id] = asyncio.get_running_loop().create_future()
        await asyncio.shield(future)

    def stop(self) -> None:
        """Ends the wait of all, as a cancellation."""
        for future in self._waiting.values():
            future.cancel()
        self._waiting.clear()

    async def keep_asking(self) -> None:
        """Until it is cancelled. Runs outside of all workflows, in which DBOS would keep what it is asked."""
        while True:
            if self._waiting:
                try:
                    await self._ask()
                except sa.exc.SQLAlchemyError as error:
                    # Were this to end, all that wait would wait for ever.
                    logger.log(logging.WARNING if is_away(error) else logging.ERROR, "endings are not seen: %s", error)
            await asyncio.sleep(POLL_SECONDS)

    async def _ask(self) -> None:
        found = await DBOS.list_workflows_async(
            workflow_ids=list(self._waiting), status=_ENDED, load_input=False, load_output=False
        )
        for workflow in found:
            future = self._waiting.pop(workflow.workflow_id, None)
            if future is not None and not future.done():
                future.set_result(None)
