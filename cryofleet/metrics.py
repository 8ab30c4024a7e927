"""Prometheus metrics of one instance."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600)


class Metrics:
    """The metrics, in a registry of their own, so that several instances can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.pages: dict[str, Callable[[], Any]] = {}
        """What is served as JSON beside the metrics, by path: for those who scale by a value and read no metrics."""
        self.calls = Counter(
            "cryofleet_calls",
            "Calls that ended, by method and gRPC status.",
            ("method", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "cryofleet_call_seconds", "How long calls took.", ("method",), buckets=_SECONDS, registry=self.registry
        )
        self.in_flight = Gauge("cryofleet_calls_in_flight", "Calls going on.", registry=self.registry)
        self.cached = Counter(
            "cryofleet_cached_results", "Calls answered from the store.", ("operation",), registry=self.registry
        )
        self.refused = Counter(
            "cryofleet_refused_calls",
            "Calls refused for want of slots or memory.",
            ("operation",),
            registry=self.registry,
        )
        self.compute_seconds = Counter(
            "cryofleet_compute_seconds", "Time spent computing, by operation.", ("operation",), registry=self.registry
        )
        self.store_bytes = Counter(
            "cryofleet_store_bytes",
            "Bytes read from and written to the store, by operation.",
            ("operation", "direction"),
            registry=self.registry,
        )
        self.particles = Counter(
            "cryofleet_particles",
            "Particles that operations have worked on, in each of their phases.",
            ("operation",),
            registry=self.registry,
        )
        self.voxels = Counter(
            "cryofleet_voxels",
            "Voxels that operations have worked on, in each of their phases.",
            ("operation",),
            registry=self.registry,
        )
        self.gpu_memory_peak = Gauge(
            "cryofleet_gpu_memory_peak_bytes",
            "The most memory of a GPU that an operation had since the instance began.",
            ("operation",),
            registry=self.registry,
        )

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for at each scrape."""
        Gauge(name, help_text, registry=self.registry).set_function(value)

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Serves the metrics and the pages over HTTP in threads of their own; call what is returned to end that."""
        metrics = make_wsgi_app(self.registry)

        def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            page = self.pages.get(environ.get("PATH_INFO", ""))
            if page is None:
                samples: Iterable[bytes] = metrics(environ, start_response)
                return samples
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(page()).encode()]

        server = make_server(host, port, answer, _ThreadingServer, _QuietHandler)
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # its name in the class above
        """Scrapes are no news."""
