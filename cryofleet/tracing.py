"""OpenTelemetry traces of what this process does.

They are exported by OTLP over gRPC where OTEL_EXPORTER_OTLP_ENDPOINT, or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, names a
collector; the other standard OTEL_ variables hold too. Otherwise nothing of OpenTelemetry is loaded, and what is here
does nothing. A program that uses the client and has loaded OpenTelemetry itself keeps its own set-up: its calls carry
its trace.

Attributes have the names that log lines have, so that both join. What looks like a secret is hidden in all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import cryofleet
from cryofleet.errors import Failure
from cryofleet.redaction import Redaction

if TYPE_CHECKING:
    # Loaded where there is a collector alone: they take a third of a second.
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

STOP_SECONDS = 3.0
"""How long a process that ends waits for the collector to take its last spans."""
QUIET_SECONDS = 600.0
"""That spans can't be exported is logged no more often."""

Kind = Literal["internal", "server", "client"]
ParametersT = ParamSpec("ParametersT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Identity:
    """A span's ids, where they follow from what it is about instead of from chance.

    Whoever does a part of a run, in whichever process and at whichever try, so finds the span that it hangs below.
    """

    trace_id: int
    span_id: int

    @staticmethod
    def of(run_id: str, part: str) -> Identity:
        """That of a part of a run. The trace's id is the first half of the SHA-256 of "cryofleet run RUN_ID", the
        span's the first quarter of that of "cryofleet part PART"; `part` is a name that no other run's part has.
        """
        return Identity(
            int.from_bytes(hashlib.sha256(f"cryofleet run {run_id}".encode()).digest()[:16]),
            int.from_bytes(hashlib.sha256(f"cryofleet part {part}".encode()).digest()[:8]),
        )


@dataclass(frozen=True)
class _Tracing:
    provider: TracerProvider
    exporter: SpanExporter
    tracer: Tracer
    redaction: Redaction
    complaints: logging.Handler


_tracing: _Tracing | None = None
_chosen: contextvars.ContextVar[Identity | None] = contextvars.ContextVar("cryofleet_span_identity", default=None)


# Life


def start(service: str, instance: str) -> None:
    """Exports this process's spans from now on, where the environment names a collector.

    What is wrong with the OTEL_ variables is logged, and stops nothing.
    """
    global _tracing
    if _tracing is not None or not _wanted(os.environ):
        return
    try:
        _tracing = _started(service, instance)
    except Exception as error:
        # Whatever a library says of the environment, the work goes on without traces.
        logger.error("no traces: %s: %s", type(error).__name__, Redaction(os.environ).hide(str(error)))


def _wanted(environment: Mapping[str, str]) -> bool:
    def setting(name: str) -> str:
        of_traces = environment.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}", "").strip()
        return of_traces or environment.get(f"OTEL_EXPORTER_OTLP_{name}", "").strip()

    if not setting("ENDPOINT") or environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip() not in ("", "otlp"):
        return False
    if setting("PROTOCOL") not in ("", "grpc"):
        logger.error("no traces: they are exported by OTLP over grpc alone, not over %s", setting("PROTOCOL"))
        return False
    return True


def _started(service: str, instance: str) -> _Tracing:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Ids(RandomIdGenerator):
        """Ids that were chosen, else random ones."""

        def generate_span_id(self) -> int:
            chosen = _chosen.get()
            return super().generate_span_id() if chosen is None else chosen.span_id

        def generate_trace_id(self) -> int:
            chosen = _chosen.get()
            return super().generate_trace_id() if chosen is None else chosen.trace_id

    redaction = Redaction(os.environ)
    complaints = _Complaints(redaction)
    own = {"service.name": f"cryofleet-{service}", "service.instance.id": instance, "service.version": _version()}
    # The environment's last: OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have the last word.
    resource = Resource.create().merge(Resource(own)).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False, id_generator=Ids())
    exporter = OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    library = logging.getLogger("opentelemetry")
    library.addHandler(complaints)
    library.propagate = False
    return _Tracing(provider, exporter, provider.get_tracer("cryofleet", _version()), redaction, complaints)


def _version() -> str:
    return cryofleet.__version__


class _Complaints(logging.Handler):
    """Passes on what OpenTelemetry complains of, rarely: a collector that is away is away for every batch."""

    def __init__(self, redaction: Redaction) -> None:
        super().__init__(logging.WARNING)
        self._redaction = redaction
        self._quiet_until = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + QUIET_SECONDS
            logger.warning("traces: %s", self._redaction.hide(record.getMessage()))


def stop() -> None:
    """Exports what is left, for STOP_SECONDS at most, and no more."""
    global _tracing
    stopped, _tracing = _tracing, None
    if stopped is None:
        return
    # The library would wait half a minute for a collector that is away.
    thread = threading.Thread(target=stopped.provider.shutdown, name="last-spans", daemon=True)
    thread.start()
    thread.join(STOP_SECONDS)
    if thread.is_alive():
        stopped.exporter.shutdown()
        thread.join(0.5)
    library = logging.getLogger("opentelemetry")
    library.removeHandler(stopped.complaints)
    library.propagate = True


def is_on() -> bool:
    """Whether this process exports its spans."""
    return _tracing is not None


# Spans


def _tracer() -> Tracer | None:
    if _tracing is not None:
        return _tracing.tracer
    # Where nobody has loaded it, there is no trace to add to.
    api = sys.modules.get("opentelemetry.trace")
    return None if api is None else api.get_tracer("cryofleet")


def _shown(attributes: dict[str, Any]) -> dict[str, Any]:
    redaction = _tracing.redaction if _tracing is not None else Redaction({})
    return {
        name: redaction.hide(value) if isinstance(value, str) else value
        for name, value in attributes.items()
        if value not in (None, "")
    }


@contextlib.contextmanager
def span(
    name: str,
    kind: Kind = "internal",
    parent: Context | None = None,
    link_from_current: bool = False,
    **attributes: Any,
) -> Iterator[None]:
    """A span of what happens inside, below `parent`, else below the current span; what is raised there is its error.

    `link_from_current` links it with the current span, which `parent` takes it away from.
    """
    tracer = _tracer()
    if tracer is None:
        yield
        return
    from opentelemetry.trace import Link, SpanKind, get_current_span

    current = get_current_span().get_span_context()
    links = [Link(current)] if link_from_current and current.is_valid else []
    with tracer.start_as_current_span(
        name,
        context=parent,
        kind=SpanKind[kind.upper()],
        attributes=_shown(attributes),
        links=links,
        record_exception=False,  # a traceback stays in the log
        set_status_on_exception=False,
    ):
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            note(status="CANCELLED")
            raise
        except BaseException as error:
            failed(*_status_of(error))
            raise


def _status_of(error: BaseException) -> tuple[str, str]:
    """A gRPC status and what may be said of an error: of others than our own and gRPC's, no more than their kind."""
    if isinstance(error, Failure):
        return error.status, str(error)
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    if callable(code) and callable(details) and code() is not None:
        return code().name, str(details() or "")
    return "INTERNAL", type(error).__name__.lstrip("_")


def spanned(name: str) -> Callable[[Callable[ParametersT, ResultT]], Callable[ParametersT, ResultT]]:
    """Makes each call of a function, no coroutine, a span."""

    def decorate(function: Callable[ParametersT, ResultT]) -> Callable[ParametersT, ResultT]:
        @functools.wraps(function)
        def call(*arguments: ParametersT.args, **named: ParametersT.kwargs) -> ResultT:
            if _tracer() is None:
                return function(*arguments, **named)
            with span(name):
                return function(*arguments, **named)

        return call

    return decorate


def note(**attributes: Any) -> None:
    """Adds attributes to the current span."""
    if _tracer() is not None:
        from opentelemetry.trace import get_current_span

        get_current_span().set_attributes(_shown(attributes))


def failed(status: str, cause: str) -> None:
    """Says that what the current span is about has failed."""
    if _tracer() is not None:
        from opentelemetry.trace import Status, StatusCode, get_current_span

        note(status=status)
        get_current_span().set_status(Status(StatusCode.ERROR, _description(status, cause)))


def _description(status: str, cause: str) -> str:
    redaction = _tracing.redaction if _tracing is not None else Redaction({})
    return redaction.hide(f"{status}: {cause}" if cause else status)


def write(
    name: str,
    identity: Identity,
    parent: Identity | None,
    began_at: float,
    ended_at: float,
    failure: tuple[str, str] | None = None,
    **attributes: Any,
) -> None:
    """A span of what has ended, with its own ids; times are Unix times. `failure` is a status and its cause.

    Written twice, it is the same span.
    """
    if _tracing is None:
        return
    from opentelemetry.context import Context
    from opentelemetry.trace import Status, StatusCode

    token = _chosen.set(identity)
    try:
        written = _tracing.tracer.start_span(
            name,
            context=Context() if parent is None else below(parent),
            start_time=int(began_at * 1e9),
            attributes=_shown(attributes),
        )
    finally:
        _chosen.reset(token)
    if failure is not None:
        written.set_status(Status(StatusCode.ERROR, _description(*failure)))
    written.end(int(max(began_at, ended_at) * 1e9))


# Context


def below(identity: Identity) -> Context | None:
    """The `parent` of a span that hangs below the one with these ids."""
    if _tracing is None:
        return None
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.sampling import Decision
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    # All who hang spans below it must find the same, so the sampler is asked as for the first span of the trace.
    sampled = _tracing.provider.sampler.should_sample(Context(), identity.trace_id, "run")
    flags = TraceFlags(TraceFlags.SAMPLED if sampled.decision == Decision.RECORD_AND_SAMPLE else TraceFlags.DEFAULT)
    context = SpanContext(identity.trace_id, identity.span_id, is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(context), Context())


@contextlib.contextmanager
def inside(identity: Identity) -> Iterator[None]:
    """Hangs what happens inside below the span with these ids, which is written once it has ended."""
    parent = below(identity)
    if parent is None:
        yield
        return
    from opentelemetry.context import attach, detach

    token = attach(parent)
    try:
        yield
    finally:
        detach(token)


def trace_id() -> str:
    """Of the current span, as traces are looked up by; empty where there is none."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return ""
    context = api.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


def metadata() -> tuple[tuple[str, str], ...]:
    """What a call carries along: W3C's traceparent of the current span; nothing where there is none."""
    if not trace_id():
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())


def parent_in(received: Iterable[tuple[str, str | bytes]] | None) -> Context | None:
    """The span that a call's metadata names as its parent; None where it names none."""
    carrier = {key: value for key, value in received or () if isinstance(value, str)}
    if _tracing is None or "traceparent" not in carrier:
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace import get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract(carrier, Context())
    return parent if get_current_span(parent).get_span_context().is_valid else None
