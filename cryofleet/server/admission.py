"""Whether a call may start: an instance's slots and memory, counted."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from cryofleet import tracing
from cryofleet.errors import FailedPrecondition, ResourceExhausted


@dataclass(frozen=True)
class Needs:
    """What one call takes while it runs."""

    memory_bytes: int
    slots: int = 1


class Busy(ResourceExhausted):
    """Everything is taken at present; the call was not tried and another instance, or later, will do."""


class NeverFits(FailedPrecondition):
    """The call needs more than the whole instance has; waiting does not help."""


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


class Admission:
    """Counts slots and memory. There is no queue: what does not fit now is refused now."""

    def __init__(self, slots: int, memory_bytes: int) -> None:
        self.slots_total = slots
        self.memory_total_bytes = memory_bytes
        self._slots = 0
        self._memory_bytes = 0
        self._lock = threading.Lock()

    @property
    def slots_free(self) -> int:
        """Slots that no call holds."""
        return self.slots_total - self._slots

    @property
    def memory_free_bytes(self) -> int:
        """Memory that no call was granted."""
        return self.memory_total_bytes - self._memory_bytes

    @tracing.spanned("admission")
    def acquire(self, needs: Needs) -> None:
        """Takes what `needs` says; the caller gives it back by `release`.

        Raises NeverFits where the whole instance is too small, Busy where others hold too much of it.
        """
        if needs.slots > self.slots_total:
            raise NeverFits(f"needs {needs.slots} slots; this instance has {self.slots_total}")
        if needs.memory_bytes > self.memory_total_bytes:
            raise NeverFits(
                f"needs {_size(needs.memory_bytes)} of memory; this instance has {_size(self.memory_total_bytes)}"
            )
        with self._lock:
            if needs.slots > self.slots_free:
                raise Busy(f"all {self.slots_total} slots are taken; come back later")
            if needs.memory_bytes > self.memory_free_bytes:
                raise Busy(
                    f"needs {_size(needs.memory_bytes)} of memory and {_size(self.memory_free_bytes)} of "
                    f"{_size(self.memory_total_bytes)} are free; come back later"
                )
            self._slots += needs.slots
            self._memory_bytes += needs.memory_bytes

    def release(self, needs: Needs) -> None:
        """Gives back what `acquire` took."""
        with self._lock:
            self._slots -= needs.slots
            self._memory_bytes -= needs.memory_bytes


def machine_memory_bytes() -> int:
    """Memory of this machine or, where that is less, of this container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total
