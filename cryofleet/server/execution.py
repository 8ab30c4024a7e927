"""Running computations in worker threads: joining, admission, progress, stopping."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from cryofleet import tracing
from cryofleet.artifacts import Manifest
from cryofleet.errors import Cancelled, Failure
from cryofleet.server.admission import Busy
from cryofleet.server.computation import compute, identify, look_up, project_of, result_of
from cryofleet.server.failures import Draining, failure_of
from cryofleet.server.instance import Instance
from cryofleet.server.service import Method
from cryofleet.server.task import Reader
from cryofleet.server.watched_store import WatchedStore
from cryofleet.server.work_done import GpuMemory, WorkDone
from cryofleet.space import SMALL_BYTES
from cryofleet.v1 import common_pb2

logger = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""How long a worker that was told to stop may go on before the process is ended."""
EXIT_HUNG = 70
"""Exit code of a process that was ended because a worker did not stop."""

# Threads beyond the slots: they look into the store for results that are there already.
_LOOKING_UP = 32


@dataclass(frozen=True)
class Answer:
    """What a computation came to: a result with its manifest, or a failure."""

    result: Message | None
    manifest: Manifest | None
    cached: bool
    failure: Failure | None = None


class Execution:
    """One computation, and how many calls wait for it."""

    def __init__(self, method: Method, key: str, about: common_pb2.Context, work_done: WorkDone) -> None:
        """`about` is the context of the call that began it."""
        self.work_done = work_done
        self.method = method
        self.key = key
        self.about = about
        self.began_at = 0.0
        """When its function was called; 0 before."""
        self.waiting = 1
        self.answer: Future[Answer] = Future()
        self.answer.set_running_or_notify_cancel()  # so that no waiting call can cancel it
        self.stop_with: Failure | None = None
        self.thread: int | None = None
        """Set while the operation's function runs."""
        self.progress: tuple[float, str, dict[str, float]] | None = None
        self.progressed_at = time.monotonic()

    def go_on(self) -> None:
        """Notes that something went forward. Raises what the computation must stop with."""
        if self.stop_with is not None:
            # Raised anew each time: a method that catches it once is told again.
            raise type(self.stop_with)(str(self.stop_with))
        self.progressed_at = time.monotonic()

    def report(self, fraction: float, phase: str = "", **counters: float) -> None:
        """The `progress` of the operation's function."""
        self.go_on()
        # max and min in this order also turn NaN into 0.
        self.progress = (min(max(0.0, float(fraction)), 1.0), phase, counters)
        self.work_done.note(phase, counters)


@dataclass
class Ticket:
    """One call's hold on its execution."""

    left: bool = False
    execution: Execution | None = None
    opened_at: float = field(default_factory=time.monotonic)

    def go_on(self) -> None:
        """Raises where nobody waits for what this call began."""
        if self.execution is not None:
            self.execution.go_on()
        elif self.left:
            raise Cancelled("the caller has left")


class Executions:
    """All computations of an instance."""

    def __init__(self, instance: Instance, on_hung: Callable[[], None]) -> None:
        """`on_hung` is called on the event loop before the process ends because a worker did not stop."""
        self._instance = instance
        self._on_hung = on_hung
        self._store_bytes = {
            (operation, direction): instance.metrics.store_bytes.labels(operation, direction)
            for operation in instance.methods
            for direction in ("read", "written")
        }
        self._gpu_memory = GpuMemory(instance.metrics)
        self._running: dict[str, Execution] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(instance.settings.slots + _LOOKING_UP, thread_name_prefix="worker")
        self._loop = asyncio.get_running_loop()

    @property
    def count(self) -> int:
        """Computations going on."""
        return len(self._running)

    def computing(self) -> list[Execution]:
        """Those whose function runs, the longest first."""
        with self._lock:
            running = [execution for execution in self._running.values() if execution.thread is not None]
        return sorted(running, key=lambda execution: execution.began_at)

    def submit(self, method: Method, request: Message, ticket: Ticket) -> asyncio.Future[Answer | Execution]:
        """Starts a call in a worker thread. Gives its answer, or the execution that it has joined."""
        context = contextvars.copy_context()
        future: asyncio.Future[Answer | Execution] = self._loop.run_in_executor(
            self._pool, context.run, self._work, method, request, ticket
        )
        # A caller that has left asks for no outcome; asyncio would complain of an error that nobody saw.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return future

    def in_thread(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Runs blocking work in a worker thread."""
        return self._loop.run_in_executor(self._pool, contextvars.copy_context().run, function, *arguments)

    @tracing.spanned("computation")
    def _work(self, method: Method, request: Any, ticket: Ticket) -> Answer | Execution:
        def on_bytes(direction: str, count: int) -> None:
            store_bytes[name, direction].inc(count)
            ticket.go_on()
            if direction == "written":
                quotas.wrote(project, count)

        store_bytes, name = self._store_bytes, method.operation.name
        quotas, project = self._instance.quotas, project_of(request)
        store = WatchedStore(self._instance.store, on_bytes, functools.partial(quotas.check, project))
        question = identify(method, request, store)
        with self._lock:
            ticket.go_on()
            execution = self._running.get(question.key)
            if execution is not None:
                if execution.stop_with is not None:
                    raise Busy("a cancelled computation of the same result is just stopping; come back later")
                execution.waiting += 1
                ticket.execution = execution
                tracing.note(joined=True)
                return execution
            execution = ticket.execution = Execution(
                method, question.key, request.context, WorkDone(self._instance.metrics, name)
            )
            self._running[question.key] = execution
        try:
            answer = self._answer(execution, question)
        except BaseException as error:
            # Without its traceback, which would keep the method's arrays alive as long as somebody holds the answer.
            failure = failure_of(error, self._instance.name).with_traceback(None)
            failure.__cause__ = failure.__context__ = None
            tracing.failed(failure.status, str(failure))
            if not isinstance(failure, (Busy, Draining)):
                logger.warning("%s: %s", failure.status, failure, extra={"key": question.key})
            answer = Answer(None, None, False, failure)
        finally:
            with self._lock:
                del self._running[question.key]
        execution.answer.set_result(answer)
        return answer

    def _answer(self, execution: Execution, question: Any) -> Answer:
        instance, method = self._instance, execution.method
        manifest = look_up(question)
        if manifest is not None:
            return Answer(result_of(question, manifest), manifest, True)
        if instance.draining:
            raise Draining(f"instance {instance.name} is stopping")
        # Before anything is computed that could not be kept.
        question.store.check_space(SMALL_BYTES + 1)
        device = instance.device_for(method.operation, question.request.context.device)
        most_bytes = instance.settings.max_volume_bytes
        with Reader(question.store, question.project, instance.scratch.new_folder, most_bytes) as reader:
            needs = method.needs(question.request, reader)
        instance.admission.acquire(needs)
        try:
            instance.limit_threads()
            execution.progressed_at = time.monotonic()
            execution.began_at = time.time()
            execution.thread = threading.get_ident()
            with self._gpu_memory.watched(method.operation.name, device):
                manifest = compute(
                    question,
                    progress=execution.report,
                    device=device,
                    threads=instance.settings.threads,
                    instance=instance.name,
                    software=f"cryofleet {instance.version}",
                    new_scratch=instance.scratch.new_folder,
                    max_volume_bytes=most_bytes,
                )
        finally:
            execution.thread = None
            instance.admission.release(needs)
        instance.metrics.compute_seconds.labels(method.operation.name).inc(manifest.seconds)
        logger.info("computed", extra={"key": question.key, "seconds": round(manifest.seconds, 3)})
        return Answer(result_of(question, manifest), manifest, False)

    def leave(self, ticket: Ticket, why: Failure) -> None:
        """A call no longer waits; the computation that nobody waits for is stopped."""
        with self._lock:
            ticket.left = True
            if ticket.execution is not None:
                ticket.execution.waiting -= 1
                if ticket.execution.waiting == 0:
                    self._stop(ticket.execution, why)

    def stop_all(self, why: Failure) -> None:
        """Tells all computations to stop."""
        with self._lock:
            for execution in self._running.values():
                self._stop(execution, why)

    def _stop(self, execution: Execution, why: Failure) -> None:
        """Under the lock, so that no call joins what is about to stop."""
        if execution.stop_with is None and not execution.answer.done():
            execution.stop_with = why
            self._loop.call_later(STOP_SECONDS, self._check_stopped, execution)

    def _check_stopped(self, execution: Execution) -> None:
        thread = execution.thread
        if execution.answer.done() or thread is None:
            return
        frame = sys._current_frames().get(thread)
        logger.critical(
            "%s did not stop within %g s; this process ends with exit code %d",
            execution.method.operation.name,
            STOP_SECONDS,
            EXIT_HUNG,
            extra={"traceback": "".join(traceback.format_stack(frame)) if frame else ""},
        )
        self._on_hung()
        # A moment for the health service to tell those who watch it.
        self._loop.call_later(0.2, os._exit, EXIT_HUNG)

    def close(self) -> None:
        """Ends the idle threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
