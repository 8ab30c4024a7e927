"""A process is killed in the middle of the rounds of `average`: the run goes on there, and gives the same numbers."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from cryofleet.artifacts import ResultWriter
from cryofleet.client import RunHandle
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.volumes import VolumeInfo, write_subtomograms
from tests.faults.conftest import computed, contents
from tests.platform import Platform
from tests.unit.alignment.samples import asymmetric, sample

BOX, VOXEL, COUNT = 24, 12.0, 12
WEDGE = (-60.0, 60.0)
SHARDS, ROUNDS = 3, 4
EXPECT = "alignment.AverageExpect"


@dataclass(frozen=True)
class Averaging:
    """A platform, and what an undisturbed run in a project of its own gave and computed there."""

    platform: Platform
    outputs: dict[str, Any]
    results: Counter[str]
    """How many results each operation made."""


def begin(platform: Platform, project: str) -> RunHandle:
    """The same run in any project; no project finds the results of another."""
    data = sample(asymmetric(3), BOX, COUNT, 0.5, wedge=WEDGE)
    store = Store.open(platform.settings)
    writer = ResultWriter(store, project, "5" * 64)
    table = Particles.from_positions(np.full((COUNT, 3), 40.0), VOXEL, "t", id=np.arange(COUNT))
    info = VolumeInfo((BOX, BOX, BOX), VOXEL, "dark", *WEDGE)
    subtomograms = write_subtomograms(writer, store, "boxes", -data.particles, info, table)
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": subtomograms}, seconds=0)
    return (
        platform.client()
        .in_project(project)
        .run(
            "average",
            subtomograms=subtomograms,
            iterations=ROUNDS,
            max_candidates=10,
            shard_size=COUNT // SHARDS,
            reject_share=0.2,
            seed=3,
        )
    )


def by_operation(results: Counter[tuple[str, str]]) -> Counter[str]:
    """How many different results each operation made."""
    return Counter(operation for operation, _ in results)


@pytest.fixture(scope="module")
def averaging(platform: Platform) -> Averaging:
    run = begin(platform, "average-undisturbed").wait()
    assert run.outputs["iterations"] == ROUNDS
    results = Counter(computed(platform, run))
    assert set(results.values()) == {1}
    assert by_operation(results)[EXPECT] == SHARDS * (1 + ROUNDS)
    return Averaging(platform, contents(run.outputs), by_operation(results))


@pytest.mark.parametrize(("name", "in_round"), [("alignment", 2), ("orchestrator", 3)])
def test_the_run_goes_on_in_its_round(averaging: Averaging, name: str, in_round: int) -> None:
    platform = averaging.platform
    killed = platform.process_id(name)
    run = begin(platform, f"average-without-{name}")
    # `first` is done, the rounds before, and one shard of this one.
    point = SHARDS * in_round + 1
    deadline = time.monotonic() + 60
    while by_operation(Counter(computed(platform, run)))[EXPECT] < point:
        assert time.monotonic() < deadline, f"round {in_round} was not reached"
        time.sleep(0.005)
    os.kill(killed, signal.SIGKILL)
    before = Counter(computed(platform, run))
    assert by_operation(before)[EXPECT] <= SHARDS * (1 + in_round), "killed in the middle of the round"
    run.wait()
    assert (run.state, run.record.attempt) == ("succeeded", 1), "it went on by itself"
    assert platform.process_id(name) != killed, "the supervisor started it again"
    found = contents(run.outputs)
    assert found.keys() == averaging.outputs.keys()
    for output, value in found.items():
        assert value == averaging.outputs[output], f"{output} differs from the undisturbed run's"
    results = Counter(computed(platform, run))
    made = by_operation(results)
    assert made <= averaging.results
    # Of a result that a killed service had just finished, the log may say nothing.
    assert (averaging.results - made).total() <= 1
    again = [result for result in before if results[result] > 1]
    assert not again, "finished before the kill, and done once more"
