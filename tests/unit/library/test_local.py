"""Starting the platform of this machine, with an orchestrator that knows what the test says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cryofleet import local
from cryofleet.errors import Internal
from cryofleet.settings import Settings
from cryofleet.v1 import orchestrator_pb2
from tests.unit.orchestrator.fake import short_folder


class Orchestrator:
    """Sees the picking service once it has been asked so many times; and an instance elsewhere never."""

    def __init__(self, picking: str, patience: int) -> None:
        self.picking = picking
        self.patience = patience
        self.asked = 0

    def pools(
        self, request: orchestrator_pb2.GetPoolsRequest, context: grpc.ServicerContext
    ) -> orchestrator_pb2.GetPoolsResponse:
        self.asked += 1
        response = orchestrator_pb2.GetPoolsResponse()
        pool = response.pools.add(name="picking")
        pool.instances.add(address=self.picking, ready=self.asked > self.patience)
        pool.instances.add(address="elsewhere:7000", ready=False)
        return response


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Of a platform whose processes all come up at the second look."""
    home = short_folder()
    looks: dict[str, int] = {}

    def is_serving(address: str, settings: Settings) -> bool:
        looks[address] = looks.get(address, 0) + 1
        return looks[address] > 1

    monkeypatch.setattr(local, "is_serving", is_serving)
    monkeypatch.setattr(local, "is_up", lambda settings: True)
    yield Settings.from_environment({"CRYOFLEET_HOME": str(home)})
    shutil.rmtree(home)


@pytest.fixture
def orchestrator(settings: Settings) -> Iterator[Orchestrator]:
    addresses = {member.name: member.address for member in local.members(settings)}
    settings.run_folder.mkdir(parents=True)
    orchestrator = Orchestrator(addresses["picking"], patience=3)
    answer = grpc.unary_unary_rpc_method_handler(
        orchestrator.pools,
        orchestrator_pb2.GetPoolsRequest.FromString,
        orchestrator_pb2.GetPoolsResponse.SerializeToString,
    )
    server = grpc.server(ThreadPoolExecutor(2))
    name = orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, {"GetPools": answer})])
    server.add_insecure_port(addresses["orchestrator"])
    server.start()
    yield orchestrator
    server.stop(0).wait()


def test_the_platform_is_up_once_the_orchestrator_knows_its_services(
    settings: Settings, orchestrator: Orchestrator
) -> None:
    local.start(settings, wait_seconds=20)
    assert orchestrator.asked == 4
    local.start(settings, wait_seconds=20)
    assert orchestrator.asked == 4, "nothing more is asked of one that was up"


def test_a_service_that_the_orchestrator_does_not_reach_is_named(
    settings: Settings, orchestrator: Orchestrator
) -> None:
    orchestrator.patience = 10**6
    with pytest.raises(Internal, match=r"^picking did not come up within 1 s"):
        local.start(settings, wait_seconds=1)
