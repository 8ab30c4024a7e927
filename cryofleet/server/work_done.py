"""Metrics of what operations do: bytes, particles and voxels, and the memory of the GPU that they take."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

from cryofleet.metrics import Metrics

_PARTICLES = ("particles", "subtomograms")
"""Counters of a method's progress that count particles."""


class WorkDone:
    """Adds up what one running operation says it has done.

    Counters of progress begin anew with each phase: a particle that is aligned and then averaged counts twice.
    """

    def __init__(self, metrics: Metrics, operation: str) -> None:
        self._particles = metrics.particles.labels(operation)
        self._voxels = metrics.voxels.labels(operation)
        self._phase = ""
        self._particles_before = self._voxels_before = 0.0

    def note(self, phase: str, counters: dict[str, float]) -> None:
        """Takes the progress of the operation's function."""
        if phase != self._phase:
            self._phase = phase
            self._particles_before = self._voxels_before = 0.0
        particles = max((counters[name] for name in _PARTICLES if name in counters), default=None)
        if particles is not None:
            self._particles.inc(_more(self._particles_before, particles))
            self._particles_before = particles
        if (voxels := counters.get("voxels")) is not None:
            self._voxels.inc(_more(self._voxels_before, voxels))
            self._voxels_before = voxels


def _more(before: float, now: float) -> float:
    """What has been added to a counter; one that went back, say for the next iteration, began anew."""
    return max(0.0, now - before if now >= before else now)


class GpuMemory:
    """The most memory of a GPU that torch had for each operation since the instance began.

    torch counts for the whole process: of operations that ran at the same time each is told what all of them had.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._gauge = metrics.gpu_memory_peak
        self._peaks: dict[str, int] = {}
        self._running = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def watched(self, operation: str, device: str) -> Iterator[None]:
        """While the operation's function runs on the device."""
        if device != "cuda":
            yield
            return
        with self._lock:
            if self._running == 0:
                _forget_peaks()
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                self._peaks[operation] = max(self._peaks.get(operation, 0), _peak_bytes())
                self._gauge.labels(operation).set(self._peaks[operation])


def _devices() -> range:
    """The GPUs that torch has begun to use in this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return range(0)
    return range(torch.cuda.device_count())


def _forget_peaks() -> None:
    for device in _devices():
        sys.modules["torch"].cuda.reset_peak_memory_stats(device)


def _peak_bytes() -> int:
    return max((sys.modules["torch"].cuda.max_memory_allocated(device) for device in _devices()), default=0)
