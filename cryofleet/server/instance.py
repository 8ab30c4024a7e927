"""One running instance: its settings, its store, and what it has to give."""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading

import cryofleet
from cryofleet.errors import FailedPrecondition
from cryofleet.metrics import Metrics
from cryofleet.operations import Operation
from cryofleet.project_rules import ProjectRules
from cryofleet.server.admission import Admission, machine_memory_bytes
from cryofleet.server.quotas import Quotas
from cryofleet.server.recent_log import RecentLog
from cryofleet.server.scratch import Scratch
from cryofleet.server.service import Method, Service
from cryofleet.settings import Settings
from cryofleet.space import free_bytes
from cryofleet.storage import Store
from cryofleet.v1 import common_pb2


@functools.cache
def cuda_available() -> bool:
    """Whether torch is installed and sees a GPU. Imports torch, so ask only where an operation can use one."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


class Instance:
    """What the parts of one server share."""

    def __init__(self, services: list[Service], settings: Settings, store: Store) -> None:
        """`services` are the services that this instance answers, its own first."""
        self.services = services
        self.settings = settings
        self.store = store
        self.quotas = Quotas(store, ProjectRules(settings.project_rules))
        self.name = settings.instance
        self.service_name = services[0].name
        self.version = cryofleet.__version__
        self.recent_log = RecentLog(self.service_name, self.name)
        self.methods: dict[str, Method] = {
            method.operation.name: method for service in services for method in service.methods.values()
        }
        memory_bytes = settings.memory_bytes or machine_memory_bytes() * 3 // 4
        self.admission = Admission(settings.slots, memory_bytes)
        self.metrics = Metrics()
        self.metrics.watch("cryofleet_slots", "Slots.", lambda: self.admission.slots_total)
        self.metrics.watch("cryofleet_slots_free", "Slots that are free.", lambda: self.admission.slots_free)
        self.metrics.watch(
            "cryofleet_memory_bytes", "Memory for operations.", lambda: self.admission.memory_total_bytes
        )
        self.metrics.watch(
            "cryofleet_memory_free_bytes", "Memory not granted to operations.", lambda: self.admission.memory_free_bytes
        )
        if store.free_bytes() is not None:
            self.metrics.watch(
                "cryofleet_store_free_bytes", "Free on the store's disk.", lambda: store.free_bytes() or 0
            )
        self.scratch = Scratch(settings.scratch, settings.reserve_bytes)
        self.metrics.watch(
            "cryofleet_scratch_free_bytes", "Free for temporary files.", lambda: free_bytes(self.scratch.folder)
        )
        self.draining = False
        self._threads = threading.local()

    def close(self) -> None:
        """Removes the temporary files."""
        self.scratch.close()

    def devices(self) -> list[str]:
        """cpu, and cuda where an operation of this instance can use a GPU and there is one."""
        uses_gpu = any(method.operation.pool == "gpu" for method in self.methods.values())
        return ["cpu", "cuda"] if uses_gpu and cuda_available() else ["cpu"]

    def device_for(self, operation: Operation, asked: int) -> str:
        """The device that a call runs on: "cpu" or "cuda".

        An operation that has no use for a GPU runs on the CPU, whatever was asked for: a run's device is
        meant for those of its steps that have the choice.

        Raises FailedPrecondition where a GPU was asked for and there is none.
        """
        if operation.pool != "gpu" or asked == common_pb2.DEVICE_CPU:
            return "cpu"
        if cuda_available():
            return "cuda"
        if asked == common_pb2.DEVICE_CUDA:
            raise FailedPrecondition(f"{operation.name}: device cuda was asked for and instance {self.name} has no GPU")
        return "cpu"

    def limit_threads(self) -> None:
        """Holds the calling worker thread to the settings' cores, where its operation uses torch."""
        torch = sys.modules.get("torch")
        # torch keeps the number per thread; a thread that has it needs no second call.
        if torch is not None and not getattr(self._threads, "limited", False):
            torch.set_num_threads(self.settings.threads)
            self._threads.limited = True
