"""Any process may be killed in the middle of the main job: the result is the same."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from typing import Any

import pytest

from cryofleet.client import RunHandle
from cryofleet.v1 import orchestrator_pb2
from tests.faults.conftest import Undisturbed, computed, contents, discover_arguments
from tests.platform import SMALL_SCENE, Platform

# The step during which each service is killed, and whether it must be held fast for that: these steps are over in less
# time than it takes to see that they began. (`test_training_killed` kills a training in its middle.)
STEP_OF_SERVICE = {
    "io": ("ingest", True),
    "picking": ("pick", True),
    "learning": ("train", True),
    "alignment": ("average", False),
}
WAITING = (orchestrator_pb2.STEP_STATE_UNSPECIFIED, orchestrator_pb2.STEP_STATE_WAITING)


def _wait_until_begun(run: RunHandle, step_id: str) -> orchestrator_pb2.StepState.ValueType:
    """The step's state once it has begun; fails where the run has ended by then."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        state = next(step.state for step in run.refresh().record.steps if step.id == step_id)
        assert run.state in ("queued", "running"), f"the run has {run.state} before it could be disturbed"
        if state not in WAITING:
            return state
        time.sleep(0.02)
    raise AssertionError(f"step {step_id} never began")


def _wait_until_running(run: RunHandle, step_id: str) -> None:
    """Return once the step is running; fail where it has ended already."""
    state = _wait_until_begun(run, step_id)
    assert state == orchestrator_pb2.STEP_STATE_RUNNING, (
        f"{step_id} is {orchestrator_pb2.StepState.Name(state)} before it could be disturbed"
    )


def _same(outputs: dict[str, Any], undisturbed: Undisturbed) -> None:
    found = contents(outputs)
    assert found.keys() == undisturbed.outputs.keys()
    for name, value in found.items():
        assert value == undisturbed.outputs[name], f"{name} differs from the undisturbed run's"


@pytest.mark.parametrize("service", STEP_OF_SERVICE)
def test_a_service_is_killed(platform: Platform, undisturbed: Undisturbed, service: str) -> None:
    step, hold = STEP_OF_SERVICE[service]
    with platform.client() as shared:
        client = shared.in_project(f"without-{service}")
        arguments = discover_arguments(platform, undisturbed)
        arguments |= {name: client.upload(arguments[name]) for name in ("tomogram", "truth")}
        killed = platform.process_id(service)
        if hold:
            os.kill(killed, signal.SIGSTOP)
        try:
            run = client.run("discover", **arguments)
            _wait_until_running(run, step)
        finally:
            os.kill(killed, signal.SIGKILL)
        run.wait()
        assert run.state == "succeeded"
        _same(run.outputs, undisturbed)
        assert platform.process_id(service) != killed, "the supervisor started it again"


def test_simulation_is_killed(platform: Platform, undisturbed: Undisturbed) -> None:
    with platform.client() as client:
        killed = platform.process_id("simulation")
        os.kill(killed, signal.SIGSTOP)
        try:
            run = client.in_project("without-simulation").run("simulate-tomogram", **SMALL_SCENE)
            _wait_until_running(run, "scene")
        finally:
            os.kill(killed, signal.SIGKILL)
        run.wait()
        assert run.outputs["tomogram"].read() == undisturbed.tomogram
        assert run.outputs["truth"].read() == undisturbed.truth


def test_the_orchestrator_is_killed(platform: Platform, undisturbed: Undisturbed) -> None:
    with platform.client() as shared:
        client = shared.in_project("without-orchestrator")
        run = client.run("discover", **discover_arguments(platform, undisturbed))
        _wait_until_begun(run, "train")
        before = {step.id for step in run.refresh().record.steps if step.tasks_done}
        assert before >= {"ingest", "filter", "pick", "extract"}
        os.kill(platform.process_id("orchestrator"), signal.SIGKILL)
        run.wait()
        assert run.state == "succeeded"
        assert run.record.attempt == 1, "the restarted orchestrator went on by itself"
        _same(run.outputs, undisturbed)
        executed = Counter(operation for operation, _ in computed(platform, run))
        for operation in ("io.Ingest", "io.Filter", "picking.DifferenceOfGaussians", "picking.MergeSubtomograms"):
            assert executed[operation] == 1, f"{operation} was done before the kill and must not be done again"
        # What was in flight is joined by, or repeated for, the orchestrator that came back.
        assert executed["learning.TrainAutoencoder"] in (1, 2)


def test_resume_after_a_cancellation(platform: Platform, undisturbed: Undisturbed) -> None:
    with platform.client() as shared:
        client = shared.in_project("cancelled")
        run = client.run("discover", **discover_arguments(platform, undisturbed))
        _wait_until_begun(run, "train")
        run.cancel()
        while run.refresh().state != "cancelled":
            time.sleep(0.1)
        run.resume()
        run.wait()
        assert run.state == "succeeded"
        assert run.record.attempt == 2
        _same(run.outputs, undisturbed)
