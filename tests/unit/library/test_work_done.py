"""Work is counted as methods tell of it, and the memory of a GPU as torch does."""

from __future__ import annotations

import numpy as np
import pytest

from cryofleet.metrics import Metrics
from cryofleet.server.work_done import GpuMemory, WorkDone


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def _value(metrics: Metrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"operation": "a.Method"})


def test_particles_and_voxels_of_all_phases_are_added_up(metrics: Metrics) -> None:
    done = WorkDone(metrics, "a.Method")
    assert _value(metrics, "cryofleet_particles_total") == 0, "from the beginning, so that rates are right"
    for phase, counters in (
        ("reading", {"voxels": 100.0}),
        ("reading", {"voxels": 250.0}),
        ("reading", {"peaks": 7.0}),
        ("aligning", {"particles": 64.0}),
        ("aligning", {"particles": 64.0}),
        ("aligning", {"particles": 100.0, "voxels": 50.0}),
        ("averaging", {"subtomograms": 30.0, "particles": 20.0}),
    ):
        done.note(phase, counters)
    assert _value(metrics, "cryofleet_voxels_total") == 300
    assert _value(metrics, "cryofleet_particles_total") == 130


def test_a_counter_that_goes_back_began_anew(metrics: Metrics) -> None:
    done = WorkDone(metrics, "a.Method")
    for _ in range(3):  # iterations, whose phases have one name
        for count in (np.float32(5), 10):
            done.note("aligning", {"particles": float(count)})
    WorkDone(metrics, "a.Method").note("aligning", {"particles": 10})
    assert _value(metrics, "cryofleet_particles_total") == 40


def test_memory_of_a_gpu_is_told_where_one_is_used(metrics: Metrics) -> None:
    memory = GpuMemory(metrics)
    with memory.watched("a.Method", "cpu"):
        pass
    assert _value(metrics, "cryofleet_gpu_memory_peak_bytes") is None
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.cuda.init()
    for megabytes, peak in ((64, 64), (16, 64), (128, 128)):
        with memory.watched("a.Method", "cuda"):
            held = torch.empty(megabytes * 2**20, dtype=torch.uint8, device="cuda")
            del held
        assert _value(metrics, "cryofleet_gpu_memory_peak_bytes") == peak * 2**20
