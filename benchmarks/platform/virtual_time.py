"""A clock that jumps: an event loop on which hours of waiting take no time, while all work is really done.

The loop's clock stands still while anything is at work: a callback, a thread that the loop has given something to, or a
thread of the queue. Where all of them wait, it jumps to the next timer. So what is measured in its time has no part of
how fast this machine is: work of the orchestrator takes none of it.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
import sys
import threading
import time as real
from collections.abc import Callable
from typing import Any

_EPOCH = 1_700_000_000.0


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop; `time` and everything that asyncio waits for is in its time."""

    def __init__(self) -> None:
        self._now = 0.0
        self._lock = threading.Condition()
        self._busy = 0
        self._sleepers: list[tuple[float, int, threading.Event]] = []
        self._count = 0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self._now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        self.begin()
        try:
            future = super().run_in_executor(executor, func, *args)
        except BaseException:
            self.end()
            raise
        future.add_done_callback(lambda _: self.end())
        return future

    def begin(self) -> None:
        """Something is at work."""
        with self._lock:
            self._busy += 1

    def end(self) -> None:
        """It waits, or is over."""
        with self._lock:
            self._busy -= 1
        if self.is_running():
            self.call_soon_threadsafe(lambda: None)

    def sleep_thread(self, seconds: float, ended: Callable[[], bool]) -> None:
        """Of a thread that has called `begin` before: it waits, and is at work again when it returns."""
        wake = threading.Event()
        with self._lock:
            self._count += 1
            heapq.heappush(self._sleepers, (self._now + seconds, self._count, wake))
            self._busy -= 1
        self.call_soon_threadsafe(lambda: None)
        while not wake.wait(0.2):
            if ended():
                self.begin()
                return

    def advance(self, timeout: float | None) -> bool:
        """Jumps by so long, or less where a thread wakes earlier; false where something is at work."""
        with self._lock:
            if self._busy:
                return False
            until = self._now + timeout if timeout is not None else float("inf")
            if self._sleepers and self._sleepers[0][0] <= until:
                until, _, wake = heapq.heappop(self._sleepers)
                self._busy += 1
                wake.set()
            if until != float("inf"):
                self._now = max(self._now, until)
            return True


class _Selector(selectors.DefaultSelector):
    """Waits for nothing but work."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        ready = super().select(0)
        if ready:
            return ready
        if not self._loop.advance(timeout):
            return super().select(0.05)
        return ready


class VirtualClock:
    """Stands for the module `time` where it is asked for the time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def time(self) -> float:
        return _EPOCH + self._loop.time()

    def monotonic(self) -> float:
        return self._loop.time()

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)


class VirtualEvent(threading.Event):
    """The event by which a thread of the queue is stopped; what it waits is in the loop's time."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop
        self._threads: set[int] = set()

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is None:
            return super().wait()
        thread = threading.get_ident()
        if thread not in self._threads:
            self._threads.add(thread)
            self._loop.begin()
        if not self.is_set():
            self._loop.sleep_thread(timeout, self.is_set)
        return self.is_set()


def use(loop: VirtualLoop, package: str) -> None:
    """All modules of a package that are loaded tell the loop's time."""
    clock = VirtualClock(loop)
    for name, module in list(sys.modules.items()):
        if (name == package or name.startswith(package + ".")) and getattr(module, "time", None) is real:
            module.time = clock  # type: ignore[attr-defined]
