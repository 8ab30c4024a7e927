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
from tests.platform import Platform, running_platform

# The step during which each service is killed.
STEP_OF_SERVICE = {
    "io": "filter",
    "picking": "extract",
    "learning": "train",
    "alignment": "average",
}


def _wait_for_step(platform: Platform, run_id: str, step_id: str) -> None:
    """Return as soon as the step is running."""
    with platform.client() as client:
        for run in client.watch(run_id):
            states = {step.id: step.state for step in run.steps}
            if states[step_id] not in (orchestrator_pb2.STEP_STATE_UNSPECIFIED, orchestrator_pb2.STEP_STATE_WAITING):
                return
    raise AssertionError(f"step {step_id} never ran")


def _same(outputs: dict[str, Any], undisturbed: Undisturbed) -> None:
    found = contents(outputs)
    assert found.keys() == undisturbed.outputs.keys()
    for name, value in found.items():
        assert value == undisturbed.outputs[name], f"{name} differs from the undisturbed run's"


@pytest.mark.parametrize("service", STEP_OF_SERVICE)
def test_a_service_is_killed(undisturbed: Undisturbed, service: str) -> None:
    with running_platform() as platform, platform.client() as client:
        run = client.run("discover", **discover_arguments(platform, undisturbed))
        _wait_for_step(platform, run.id, STEP_OF_SERVICE[service])
        killed = platform.process_id(service)
        os.kill(killed, signal.SIGKILL)
        run.wait()
        assert run.state == "succeeded"
        _same(run.outputs, undisturbed)
        assert platform.process_id(service) != killed, "the supervisor started it again"


def test_the_orchestrator_is_killed(undisturbed: Undisturbed) -> None:
    with running_platform() as platform, platform.client() as client:
        run = client.run("discover", **discover_arguments(platform, undisturbed))
        _wait_for_step(platform, run.id, "train")
        before = {step.id: step.tasks_done for step in client.get(run.id).record.steps}
        os.kill(platform.process_id("orchestrator"), signal.SIGKILL)
        run.wait()
        assert run.state == "succeeded"
        assert run.record.attempt == 1, "the restarted orchestrator went on by itself"
        _same(run.outputs, undisturbed)
        executed = _executions(platform)
        finished = {step.id: step.operation for step in run.record.steps if before[step.id]}
        for step_id, operation in finished.items():
            if operation in ("io.Ingest", "io.Filter", "picking.DifferenceOfGaussians"):
                assert executed[operation] == 1, f"{step_id} was recorded before the kill and must not run again"


def test_resume_after_a_cancellation(undisturbed: Undisturbed) -> None:
    with running_platform() as platform, platform.client() as client:
        run = client.run("discover", **discover_arguments(platform, undisturbed))
        _wait_for_step(platform, run.id, "extract")
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
