"""Runs that stand still: of orchestrators that are gone, broken off, never started, or begun by another version."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from dbos import DBOS

from orchestrator import run_trace, workflows
from orchestrator.runs import ACTIVE, CANCELLED, FAILED, QUEUED

if TYPE_CHECKING:
    from orchestrator.engine import Engine

logger = logging.getLogger(__name__)

EXPIRY_SECONDS = 20.0
"""An orchestrator whose heartbeat is older is taken for dead, and its runs are adopted."""
_LOST_SECONDS = 15.0


class Recovery:
    """Looks for runs that stand still, and goes on with them."""

    def __init__(self, engine: Engine, version: str) -> None:
        """`version` is that of the steps which this orchestrator knows."""
        self._engine = engine
        self._version = version
        self._unstarted: dict[str, float] = {}
        """Workflows of runs that should be there and are not, with when that was first seen."""
        self._missing: dict[str, float] = {}
        """Own workflows that should run and don't, likewise."""

    async def look(self) -> None:
        """Looks once. Raises the database's errors, and Unavailable."""
        await self._adopt()
        await self._put_right()

    async def _adopt(self) -> None:
        """Takes over the workflows of orchestrators that are gone, and goes on with own ones that broke off."""
        pending = await DBOS.list_workflows_async(
            status="PENDING", app_version=self._version, load_input=False, load_output=False
        )
        owners = {workflow.executor_id for workflow in pending if workflow.executor_id}
        own = self._engine.settings.instance
        await self._go_on({workflow.workflow_id for workflow in pending if workflow.executor_id == own})
        if not owners - {own}:
            return
        gone = await self._engine.in_thread(self._engine.runs.claim_expired, own, owners, EXPIRY_SECONDS, self._version)
        for owner in gone:
            logger.warning("orchestrator %s is gone; its runs go on here", owner)
            # DBOS's own recovery takes only what still belongs to that owner, so that two who do this at once do no
            # harm; `resume_workflow` does not check that.
            await asyncio.to_thread(DBOS._recover_pending_workflows, [owner])

    async def _go_on(self, own: set[str]) -> None:
        """Own workflows that should run and don't: an error that DBOS could not record has ended them here."""
        lost = own - set(self._engine.dbos._active_workflows_set.activeList())
        now = asyncio.get_running_loop().time()
        self._missing = {name: self._missing.get(name, now) for name in lost}
        for name in [name for name, since in self._missing.items() if now - since > _LOST_SECONDS]:
            logger.warning("workflow %s had broken off; it goes on", name)
            del self._missing[name]
            await DBOS.resume_workflow_async(name)

    async def _put_right(self) -> None:
        """Attempts whose workflow never started, or ended without saying so."""
        active = await self._engine.in_thread(self._engine.runs.in_state, ACTIVE)
        by_id = {workflows.workflow_id(each.run_id, each.attempt): each for each in active}
        self._engine.tracker.keep({each.run_id for each in active})
        if not by_id:
            return
        found = await DBOS.list_workflows_async(workflow_ids=list(by_id), load_input=False, load_output=True)
        status = {workflow.workflow_id: workflow for workflow in found}
        now = asyncio.get_running_loop().time()
        alive = await self._engine.in_thread(self._engine.runs.alive, EXPIRY_SECONDS)
        versions = {version for name, version in alive.items() if name != self._engine.settings.instance}
        for name, attempt in by_id.items():
            workflow = status.get(name)
            if workflow is None:
                # Its orchestrator died between the record and the start.
                first_seen = self._unstarted.setdefault(name, now)
                if attempt.state == QUEUED and now - first_seen > _LOST_SECONDS:
                    await self._engine.start_attempt(attempt.run_id, attempt.attempt)
                continue
            self._unstarted.pop(name, None)
            if workflow.status in ("ERROR", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"):
                error = f"the orchestrator failed: {workflow.error or workflow.status}"
                logger.error("run %s: %s", attempt.run_id, error)
                await self._engine.in_thread(
                    self._engine.runs.set_finished, attempt.run_id, attempt.attempt, FAILED, error
                )
                self._engine.announce(attempt.run_id)
            elif workflow.app_version != self._version and workflow.app_version not in versions:
                await self._begin_anew(attempt.run_id, attempt.attempt, str(workflow.app_version))
            elif workflow.status == "CANCELLED":
                await self._engine.in_thread(
                    self._engine.runs.set_finished, attempt.run_id, attempt.attempt, CANCELLED, "the run was cancelled"
                )
                self._engine.announce(attempt.run_id)

    async def _begin_anew(self, run_id: str, attempt: int, version: str) -> None:
        """Goes on with a run whose steps had another order when it was begun: the next attempt finds what is done.

        Its old workflows end first. Where this is cut off in the middle, the next look finds the attempt as it was.
        """
        await self._engine.cancel_workflows(run_id, attempt)
        why = f"no orchestrator with the steps of version {version} is left; the run goes on as attempt {attempt + 1}"
        if await self._engine.in_thread(self._engine.runs.supersede, run_id, attempt, why):
            await self._engine.in_thread(run_trace.run_ended, self._engine.runs, run_id, attempt, FAILED)
            logger.warning("attempt %d: %s", attempt, why, extra={"run_id": run_id})
            self._engine.tracker.forget(run_id)
            await self._engine.start_attempt(run_id, attempt + 1)
            self._engine.announce(run_id)
