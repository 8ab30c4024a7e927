"""Prometheus metrics of one instance."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600)


class Metrics:
    """The metrics, in a registry of their own, so that several instances can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
            "cryofleet_store_bytes", "Bytes read from and written to the store.", ("direction",), registry=self.registry
        )

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for at each scrape."""
        Gauge(name, help_text, registry=self.registry).set_function(value)

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Serves the metrics over HTTP in a thread of their own; call what is returned to end that."""
        server, thread = start_http_server(port, addr=host, registry=self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop
