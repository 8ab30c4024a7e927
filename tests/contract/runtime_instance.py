"""A service of badly and well behaved operations under the names of the picking service.

`python -m tests.contract.runtime_instance` runs it as a process, whose workers have a second to stop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np

from cryofleet.errors import Unavailable
from cryofleet.server import Needs, Reader, Service, Task, execution, main
from cryofleet.v1 import picking_pb2 as pb

service = Service(pb.DESCRIPTOR.services_by_name["PickingService"])

runs: list[str] = []
"""Names of the operations that were run in this process, in order."""
slow_may_end = threading.Event()


def _one_slot(request: object, reader: Reader) -> Needs:
    return Needs(memory_bytes=0)


def _memory_by_name(request: pb.EvaluateRequest, reader: Reader) -> Needs:
    return Needs(memory_bytes=int(request.distance_angstrom * 2**20))


@service.operation(needs=_one_slot)
def difference_of_gaussians(request: pb.DifferenceOfGaussiansRequest, task: Task) -> pb.DifferenceOfGaussiansResult:
    """Writes something, then goes on until it is stopped or `slow_may_end` is set."""
    runs.append("slow")
    uri = task.write_bytes("picks.parquet", b"not whole")
    (task.scratch / "temporary").write_bytes(b"x")
    while not slow_may_end.is_set():
        task.progress(0.5, "waiting")
        time.sleep(0.01)
    return pb.DifferenceOfGaussiansResult(particles_uri=uri, count=request.max_picks)


@service.operation(needs=_one_slot)
def extract(request: pb.ExtractRequest, task: Task) -> pb.ExtractResult:
    """Hangs: never asks whether it must stop."""
    time.sleep(3600)
    return pb.ExtractResult()


def _endless() -> Iterator[bytes]:
    while True:
        time.sleep(0.001)
        yield bytes(2**16)


@service.operation(needs=_one_slot)
def merge_subtomograms(request: pb.MergeSubtomogramsRequest, task: Task) -> pb.MergeSubtomogramsResult:
    """Fails as nobody foresaw, or for want of memory where there are two inputs; of three, writes without end."""
    if len(request.subtomograms_uris) == 3:
        runs.append("endless")
        task.write_bytes("endless", _endless())
    task.write_bytes("half", b"half of it")
    if len(request.subtomograms_uris) == 2:
        np.empty(2**60, dtype=np.uint8)
    raise RuntimeError("the secret of the house")


@service.operation(needs=_one_slot)
def merge_particles(request: pb.MergeParticlesRequest, task: Task) -> pb.MergeParticlesResult:
    """Fails once it has saved a checkpoint; its next attempt goes on from there."""
    done = task.load_checkpoint()
    runs.append("from the start" if done is None else f"from {done['state'].decode()}")
    if done is None:
        task.save_checkpoint({"state": b"a third"})
        task.save_checkpoint({"state": b"the middle"})
        raise Unavailable("the store is away")
    data = b"".join(task.read_file(uri) for uri in request.particles_uris)
    return pb.MergeParticlesResult(particles_uri=task.write_bytes("all", data), count=len(data))


@service.operation(needs=_memory_by_name)
def evaluate(request: pb.EvaluateRequest, task: Task) -> pb.EvaluateResult:
    """Needs `distance_angstrom` MiB; its precision is no number."""
    runs.append("evaluate")
    copy = task.local_copy(request.truth_uri)
    uri = task.write_table("metrics.json", {"truth": copy.read_text(), "name": copy.name})
    return pb.EvaluateResult(metrics_uri=uri, precision=float("nan"), recall=0.25, matched=2**40)


def _unused(request: object, task: Task) -> pb.EvaluateResult:
    raise AssertionError("no test calls this operation")


# a server starts only where every method has a function
for method in service.descriptor.methods:
    if method.name not in service.methods:
        _unused.__name__ = method.name
        service.operation(needs=_one_slot)(_unused)


if __name__ == "__main__":
    execution.STOP_SECONDS = 1.0
    main(service)
