"""Any process may be killed in the middle of the main job: the result is the same."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest

from cryofleet.v1 import orchestrator_pb2
from tests.faults.conftest import Undisturbed, contents, discover_arguments
from tests.platform import SMALL_SCENE, Platform, running_platform

# The step during which each service is killed, and whether it must be held fast for that: these steps are over in less
# time than it takes to see that they began.
STEP_OF_SERVICE = {
    "io": ("ingest", True),
    "picking": ("pick", True),
    "learning": ("train", False),
    "alignment": ("average", False),
}


def _wait_until_running(platform: Platform, run_id: str, step_id: str) -> None:
    """Return once the step is running; fail where it has ended already."""
    deadline = time.monotonic() + 60
    with platform.client() as client:
        while time.monotonic() < deadline:
            run = client.get(run_id).record
            state = next(step.state for step in run.steps if step.id == step_id)
            if state == orchestrator_pb2.STEP_STATE_RUNNING:
                return
            waiting = (orchestrator_pb2.STEP_STATE_UNSPECIFIED, orchestrator_pb2.STEP_STATE_WAITING)
            assert state in waiting, (
                f"{step_id} is {orchestrator_pb2.StepState.Name(state)} before it could be disturbed"
            )
            time.sleep(0.02)
    raise AssertionError(f"step {step_id} never ran")


def _same(outputs: dict[str, Any], undisturbed: Undisturbed) -> None:
    found = contents(outputs)
    assert found.keys() == undisturbed.outputs.keys()
    for name, value in found.items():
        assert value == undisturbed.outputs[name], f"{name} differs from the undisturbed run's"


@pytest.mark.parametrize("service", STEP_OF_SERVICE)
def test_a_service_is_killed(undisturbed: Undisturbed, service: str) -> None:
    step, hold = STEP_OF_SERVICE[service]
    with running_platform() as platform, platform.client() as client:
        arguments = discover_arguments(platform, undisturbed)
        arguments |= {name: client.upload(arguments[name]) for name in ("tomogram", "truth")}
        killed = platform.process_id(service)
        if hold:
            os.kill(killed, signal.SIGSTOP)
        run = client.run("discover", **arguments)
        _wait_until_running(platform, run.id, step)
        os.kill(killed, signal.SIGKILL)
        run.wait()
        assert run.state == "succeeded"
        _same(run.outputs, undisturbed)
        assert platform.process_id(service) != killed, "the supervisor started it again"


def test_simulation_is_killed(undisturbed: Undisturbed) -> None:
    with running_platform() as platform, platform.client() as client:
        killed = platform.process_id("simulation")
        os.kill(killed, signal.SIGSTOP)
        run = client.run("simulate-tomogram", **SMALL_SCENE)
        _wait_until_running(platform, run.id, "scene")
        os.kill(killed, signal.SIGKILL)
        run.wait()
        assert run.outputs["tomogram"].read() == undisturbed.tomogram
        assert run.outputs["truth"].read() == undisturbed.truth


def test_the_orchestrator_is_killed(undisturbed: Undisturbed) -> None:
    with running_platform() as platform, platform.client() as client:
        run = client.run("discover", **discover_arguments(platform, undisturbed))
        _wait_until_running(platform, run.id, "train")
        before = {step.id for step in client.get(run.id).record.steps if step.tasks_done}
        assert before >= {"ingest", "filter", "pick", "extract"}
        os.kill(platform.process_id("orchestrator"), signal.SIGKILL)
        run.wait()
        assert run.state == "succeeded"
        assert run.record.attempt == 1, "the restarted orchestrator went on by itself"
        _same(run.outputs, undisturbed)
        executed = _executions(platform)
        for operation in ("io.Ingest", "io.Filter", "picking.DifferenceOfGaussians", "picking.MergeSubtomograms"):
            assert executed[operation] == 1, f"{operation} was done before the kill and must not be done again"
        # What was in flight is joined by, or repeated for, the orchestrator that came back.
        assert executed["learning.TrainAutoencoder"] in (1, 2)


def test_resume_after_a_cancellation(undisturbed: Undisturbed) -> None:
    with running_platform() as platform, platform.client() as client:
        run = client.run("discover", **discover_arguments(platform, undisturbed))
        _wait_until_running(platform, run.id, "train")
        run.cancel()
        while run.refresh().state != "cancelled":
            time.sleep(0.1)
        run.resume()
        run.wait()
        assert run.state == "succeeded"
        assert run.record.attempt == 2
        _same(run.outputs, undisturbed)


def _executions(platform: Platform) -> dict[str, int]:
    """How often each operation was computed, as the services logged it."""
    counts: dict[str, int] = {}
    for path in platform.settings.log_folder.glob("*.log"):
        for line in path.read_text().splitlines():
            if line.startswith("{"):
                entry = json.loads(line)
                if entry.get("message") == "computed":
                    counts[entry["operation"]] = counts.get(entry["operation"], 0) + 1
    return counts
