"""How a method reports how far it is, and how it is told to stop."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called by a method as it goes along, at least once a second where it can.

    Raises `errors.Cancelled` or `errors.DeadlineExceeded` when the caller must stop: a method
    lets that pass through.
    """

    def __call__(self, fraction: float, phase: str = "", **counters: float) -> None: ...


def no_progress(fraction: float, phase: str = "", **counters: float) -> None:
    """For calls that nobody watches."""


def part(progress: Progress, start: float, stop: float) -> Progress:
    """The progress of one part of a method: its 0 to 1 is `start` to `stop` of the whole."""

    def report(fraction: float, phase: str = "", **counters: float) -> None:
        progress(start + (stop - start) * fraction, phase, **counters)

    return report
