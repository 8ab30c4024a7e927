"""Instances that fail what others do: they get no new work for a while, and are then tried with one task.

Where a task fails, the task may be at fault or the instance. What has failed on one instance speaks against that
instance, until it fails on a second one too: then it speaks against neither, unless a third one does it after all.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

TASKS = 3
"""An instance that fails so many different tasks is set aside."""
WINDOW_SECONDS = 600.0
"""Failures that are older don't count any more."""
SECONDS = (60.0, 3600.0)
"""How long an instance is set aside for at first, and at most: twice as long each time that its trial fails."""
LOST_TOGETHER_SECONDS = 5.0
"""Calls that an instance loses within this time were lost by one event, such as the end of its process."""
_MOST_CAUSES = 5


@dataclass(frozen=True)
class _Fault:
    at: float
    cause: str
    shared: bool
    """Whether it may well lie in what all instances share."""


@dataclass
class _Standing:
    """What speaks against an instance."""

    faults: dict[str, _Fault] = field(default_factory=dict)
    """By the content of the tasks."""
    since: float = 0.0
    """When it was set aside."""
    until: float = 0.0
    """It is set aside until then, and on trial afterwards; 0 where it is neither."""
    needed: int = TASKS
    """So many faults it was set aside for."""
    times: int = 0
    """How often one behind the other it was set aside."""
    last_lost: float = -math.inf
    last_done: float = -math.inf


class SetAside:
    """The instances of one pool, by their addresses, as the tasks of this orchestrator have found them."""

    def __init__(self, pool: str, others_work: Callable[[str], bool]) -> None:
        """`others_work` says whether other instances than the one at an address take work: the last one is kept."""
        self._pool = pool
        self._others_work = others_work
        self._standings: dict[str, _Standing] = {}
        self._failed: dict[str, dict[str, _Fault]] = {}
        """Of tasks that have failed and are still being tried, by content: on which instances."""

    # What tasks report

    def failed(self, address: str, content: str, cause: str, shared: bool = False) -> None:
        """A task of that content failed at an instance.

        `shared` says that all instances may fail so at once, with the store for instance; that counts only where others
        have done something meanwhile.
        """
        faults = self._failed.setdefault(content, {})
        if address in faults:
            return
        faults[address] = fault = _Fault(time.monotonic(), cause, shared)
        if len(faults) == 1:
            self._count(address, content, fault)
            return
        for each in faults:
            self._excuse(each, content)

    def lost(self, address: str, content: str, cause: str) -> None:
        """A call broke off; of those that were lost together, as where a process ends, one counts."""
        standing, now = self._standing(address), time.monotonic()
        if now - standing.last_lost >= LOST_TOGETHER_SECONDS:
            standing.last_lost = now
            self.failed(address, content, cause)

    def done(self, address: str, content: str, began: float) -> None:
        """A task that began at a time of the monotonic clock is done, wherever it failed before."""
        for other, fault in self._failed.pop(content, {}).items():
            if other == address or fault.shared:
                self._excuse(other, content)
            else:
                self._count(other, content, fault)
        standing = self._standing(address)
        standing.last_done = time.monotonic()
        if standing.until and began >= standing.since:
            self._take_back(address, standing, "its trial went well")
            standing.times = 0
            standing.faults.clear()

    def given_up(self, content: str) -> None:
        """The task failed wherever it was tried."""
        for address in self._failed.pop(content, {}):
            self._excuse(address, content)

    def left(self, content: str) -> None:
        """The task is not tried any more, with no word of how it would have gone on."""
        self._failed.pop(content, None)

    def forget(self, address: str) -> None:
        """The instance is gone."""
        self._standings.pop(address, None)

    # What it comes to

    def works(self, address: str) -> bool:
        """Whether the instance takes work as usual."""
        standing = self._standings.get(address)
        return standing is None or not standing.until

    def on_trial(self, address: str) -> bool:
        """Whether the instance was set aside, and may have one task at a time now."""
        standing = self._standings.get(address)
        return standing is not None and 0 < standing.until <= time.monotonic()

    def until(self, address: str) -> float | None:
        """Unix time until which the instance is, or was, set aside; None where it takes work as usual."""
        standing = self._standings.get(address)
        if standing is None or not standing.until:
            return None
        return time.time() + standing.until - time.monotonic()

    def causes(self, address: str) -> list[str]:
        """What speaks against the instance, each cause once."""
        standing = self._standings.get(address)
        found = dict.fromkeys(fault.cause for fault in standing.faults.values()) if standing is not None else {}
        return list(found)[:_MOST_CAUSES]

    # How it comes to it

    def _standing(self, address: str) -> _Standing:
        return self._standings.setdefault(address, _Standing())

    def _count(self, address: str, content: str, fault: _Fault) -> None:
        standing, now = self._standing(address), time.monotonic()
        if standing.until:
            if fault.at < standing.since:
                return
            if now >= standing.until:
                # It was on trial.
                standing.faults = {content: fault}
                self._put_aside(address, standing, 1)
            return
        standing.faults = {k: v for k, v in standing.faults.items() if now - v.at < WINDOW_SECONDS}
        standing.faults[content] = fault
        if self._weight(address, standing) >= TASKS and self._others_work(address):
            self._put_aside(address, standing, TASKS)

    def _weight(self, address: str, standing: _Standing) -> int:
        """How many tasks speak against the instance."""
        shared = [fault.at for fault in standing.faults.values() if fault.shared]
        done = max((s.last_done for other, s in self._standings.items() if other != address), default=-math.inf)
        return len(standing.faults) - (len(shared) if shared and done < min(shared) else 0)

    def _excuse(self, address: str, content: str) -> None:
        standing = self._standings.get(address)
        if standing is None or standing.faults.pop(content, None) is None or not standing.until:
            return
        if len(standing.faults) < standing.needed:
            standing.times -= 1
            self._take_back(address, standing, "what failed there fails elsewhere, too")

    def _put_aside(self, address: str, standing: _Standing, needed: int) -> None:
        shortest, longest = SECONDS
        seconds = min(longest, shortest * 2.0**standing.times)
        standing.times += 1
        standing.needed = needed
        standing.since = time.monotonic()
        standing.until = standing.since + seconds
        causes = "; ".join(self.causes(address))
        logger.warning("pool %s: instance %s is set aside for %.0f s: %s", self._pool, address, seconds, causes)

    def _take_back(self, address: str, standing: _Standing, why: str) -> None:
        standing.until = 0.0
        logger.info("pool %s: instance %s takes work again: %s", self._pool, address, why)
