"""What keeps the store in order: the collection of garbage, and for how long a site's rules keep runs."""

from __future__ import annotations

import asyncio
import logging
import time

import sqlalchemy as sa

from cryofleet.errors import Failure
from cryofleet.project_rules import EVERY_OTHER, ProjectRules, Rules
from cryofleet.server.quotas import Usage, usage_by_project
from cryofleet.storage import Store
from orchestrator import garbage
from orchestrator.engine import Engine
from orchestrator.recovery import EXPIRY_SECONDS

logger = logging.getLogger(__name__)

FIRST_SECONDS = 600.0
"""An orchestrator that has just started has other things to do, and perhaps stops again."""
EVERY_SECONDS = 6 * 3600.0
_DAY = 86400.0


def usage(store: Store, rules: ProjectRules, project: str = "") -> dict[str, tuple[Usage, Rules]]:
    """What each project has stored and may, one project's or all; those that have nothing yet but rules too. Blocks."""
    found = usage_by_project(store.root, store.list(f"{store.root}/{project}" if project else store.root))
    known = {project} if project else {*found, *rules.all()} - {EVERY_OTHER}
    return {name: (found.get(name, Usage()), rules.of(name)) for name in sorted(known)}


async def collect(engine: Engine, older_than_seconds: float, project: str, delete: bool) -> list[garbage.Garbage]:
    """`garbage.collect` with what the runs hold."""
    loop = asyncio.get_running_loop()

    async def held() -> garbage.Held:
        # What tasks here have found since the last second's record, too.
        await engine.answer(engine.tracker.flush)
        return await engine.answer(engine.runs.held, time.time() - older_than_seconds)

    return await asyncio.to_thread(
        garbage.collect,
        engine.store,
        lambda: asyncio.run_coroutine_threadsafe(held(), loop).result(),
        older_than_seconds,
        project,
        delete,
    )


async def forget_old(engine: Engine, project: str, keep_days: float) -> int:
    """Forgets a project's runs that ended longer ago, and deletes what nothing needs any more; the bytes of that."""
    older_than_seconds = keep_days * _DAY
    for run_id in await engine.answer(engine.runs.ended_before, project, time.time() - older_than_seconds):
        await engine.forget(run_id)
    found = await collect(engine, older_than_seconds, project, delete=True)
    size_bytes = sum(each.size_bytes for each in found)
    if found:
        logger.info(
            "deleted %d results of project %s, %d bytes, which are older than %g days and which nothing needs",
            len(found), project, size_bytes, keep_days,
        )  # fmt: skip
    return size_bytes


async def keep_rules(engine: Engine, rules: ProjectRules) -> None:
    """Goes through the projects now and then, for ever. Of several orchestrators one does, the first by name."""
    pause = FIRST_SECONDS
    while True:
        await asyncio.sleep(pause)
        pause = EVERY_SECONDS
        if not any(each.keep_days for each in rules.all().values()):
            continue
        try:
            if min(await engine.answer(engine.runs.alive, EXPIRY_SECONDS)) != engine.settings.instance:
                continue
            for project, (_, of_project) in (await asyncio.to_thread(usage, engine.store, rules)).items():
                if of_project.keep_days:
                    await forget_old(engine, project, of_project.keep_days)
        except (Failure, sa.exc.SQLAlchemyError) as error:
            logger.warning("keeping the projects' rules broke off, and goes on later: %s", error)
