"""How the command line says what a run has set aside."""

from __future__ import annotations

from cryofleet.cli.output import set_aside_counts
from cryofleet.v1 import orchestrator_pb2 as pb


def test_counts_are_those_of_the_outermost_steps() -> None:
    run = pb.Run()
    for step, total, done, set_aside in (
        ("tomogram", 100, 97, 3),
        ("tomogram.pick", 100, 98, 2),
        ("tomograms", 4, 3, 1),
        ("average", 1, 1, 0),
    ):
        run.steps.add(id=step, tasks_total=total, tasks_done=done, tasks_set_aside=set_aside)
    assert set_aside_counts(run) == ["tomogram: 97 of 100 done, 3 set aside", "tomograms: 3 of 4 done, 1 set aside"]
