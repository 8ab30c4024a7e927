"""The environments of the pods are ones that the processes read, and the orchestrator answers what KEDA asks it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc
from minio import Minio
from moto.server import ThreadedMotoServer

from cryofleet.access.certificates import AUTHORITY, CERTIFICATE, KEY, make_set
from cryofleet.channels import open_channel
from cryofleet.server import Server
from cryofleet.server.runtime_service import service as runtime_service
from cryofleet.settings import Settings, TlsFiles
from cryofleet.testing import instance_process, running_server, settings_for
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import orchestrator_pb2_grpc, runtime_pb2, runtime_pb2_grpc
from orchestrator.service import service as orchestrator_service
from tests.unit.deploy.invariants import OWN
from tests.unit.deploy.manifests import OVERLAYS, environment, load, of_kind, one, pods
from tests.unit.orchestrator.fake import short_folder

_PEM = (CERTIFICATE, KEY, AUTHORITY)
_FOLDERS = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")


class _Recorded(Mapping[str, str]):
    """An environment that knows what was asked of it."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_processes_read_all_settings_of_their_pods(overlay: str) -> None:
    resources = load(overlay)
    for pod in pods(resources):
        for container in pod.containers:
            values = environment(container, resources)
            recorded = _Recorded(values)
            settings = Settings.from_environment(recorded)
            assert {name for name in values if name.startswith("CRYOFLEET_")} - recorded.asked == set(), pod.name
            if pod.labels["app.kubernetes.io/component"] in OWN:
                assert settings.tls is not None
                called_by_clients = pod.labels["app.kubernetes.io/name"] in ("orchestrator", "io", "picking")
                assert (settings.tokens is not None) == called_by_clients
                mounted = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
                files = [settings.tls.certificate, settings.tls.key, settings.tls.authority, settings.tokens]
                files.append(settings.project_rules)
                folders = [settings.home, settings.scratch, *(Path(values[name]) for name in _FOLDERS)]
                for path in filter(None, [*files, *folders]):
                    assert any(path.is_relative_to(folder) for folder in mounted), f"{pod.name}: {path} is not mounted"
                ports = {port["name"]: port["containerPort"] for port in container["ports"]}
                assert settings.address == f"0.0.0.0:{ports['grpc']}"
                assert (settings.metrics_port, settings.health_port) == (ports["metrics"], ports["health"])
                assert ("page" in ports) == (pod.labels["app.kubernetes.io/component"] == "page")
                assert "page" not in ports or settings.page == f"0.0.0.0:{ports['page']}"
                assert settings.metrics_host == "0.0.0.0"  # loopback would be out of Prometheus' reach


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        content: bytes = answer.read()
        return content


async def _get(url: str) -> Any:
    return json.loads(await asyncio.to_thread(_read, url))


@dataclass(frozen=True)
class Orchestrator:
    stub: Any
    """OrchestratorServiceStub; its types are for blocking channels."""
    url: str
    """Where its metrics and pages are."""
    home: Path


@pytest.fixture
async def orchestrator() -> AsyncIterator[Orchestrator]:
    """One that has no instance of any service."""
    home = short_folder()
    port = _free_port()
    settings = Settings(
        home=home,
        store=f"file://{home}/store",
        address=f"unix:{home}/run/o.sock",
        pools={
            name: f"unix:{home}/run/{name}.sock" for name in ("io", "picking", "alignment", "learning", "simulation")
        },
        database=f"sqlite:///{home}/orchestrator.sqlite",
        metrics_port=port,
    )
    server = Server(orchestrator_service, settings)
    await server.start()
    try:
        async with open_channel(server.address) as channel:
            yield Orchestrator(orchestrator_pb2_grpc.OrchestratorServiceStub(channel), f"http://127.0.0.1:{port}", home)
    finally:
        await server.stop()


PIPELINE = """
name: scaled
parameters:
  numbers: {type: list}
  subtomograms: {type: list}
steps:
  - id: scenes
    op: simulation.SimulateScene
    foreach: ${numbers}
    as: number
    with: {seed: "${number}", size_x: 16, size_y: 16, size_z: 16, voxel_size_angstrom: 10}
  - id: averages
    op: alignment.Average
    foreach: ${subtomograms}
    as: each
    with: {subtomograms_uri: "${each}"}
outputs:
  scenes: ${scenes.density_uri}
"""


async def test_scaled_objects_find_their_values(orchestrator: Orchestrator) -> None:
    page = await _get(f"{orchestrator.url}/slots")
    for overlay in ("facility", "gpu"):
        for scaled in of_kind(load(overlay), "ScaledObject"):
            value: Any = page
            about = scaled["spec"]["triggers"][0]["metadata"]
            for word in about["valueLocation"].split("."):
                value = value[word]
            assert value == 0
            assert about["url"].endswith(":9100/slots")


async def test_waiting_tasks_are_counted_by_what_they_can_use(orchestrator: Orchestrator) -> None:
    boxes = orchestrator.home / "store" / "default" / "uploaded" / "boxes.json"
    boxes.parent.mkdir(parents=True)
    boxes.write_text("{}")
    arguments = Struct()
    arguments.update({"numbers": [1, 2, 3], "subtomograms": [f"file://{boxes}"]})
    await orchestrator.stub.SubmitRun(pb.SubmitRunRequest(pipeline_yaml=PIPELINE, arguments=arguments))
    async with asyncio.timeout(30):
        pools: dict[str, dict[str, int]] = {}
        while not (pools and pools["simulation"]["all"] and pools["alignment"]["all"]):
            await asyncio.sleep(0.2)
            pools = (await _get(f"{orchestrator.url}/slots"))["pools"]
    assert pools["simulation"] == {"cpu": 3, "gpu": 0, "all": 3}
    assert pools["alignment"] == {"cpu": 0, "gpu": 1, "all": 1}
    assert pools["picking"] == {"cpu": 0, "gpu": 0, "all": 0}


async def test_port_of_the_probes_answers_the_health_service_alone(tmp_path: Path) -> None:
    port = _free_port()
    async with (
        running_server(runtime_service, settings_for(tmp_path, health_port=port)),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await runtime_pb2_grpc.RuntimeServiceStub(channel).GetCapacity(runtime_pb2.GetCapacityRequest(), timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_port_of_the_probes_says_that_an_instance_drains(tmp_path: Path) -> None:
    port = _free_port()
    server = Server(runtime_service, settings_for(tmp_path, health_port=port))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await server.drain()
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    finally:
        await server.stop()


async def test_process_serves_in_the_environment_of_its_pod(tmp_path: Path) -> None:
    resources = load("single-node")
    (pod,) = pods([one(resources, "Deployment/io")])
    values = environment(pod.containers[0], resources)
    make_set(tmp_path / "certificates")
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    ports = {name: _free_port() for name in ("grpc", "health", "metrics")}
    # What differs from the pod: where its volumes lie, its name, its Secrets, and ports that are free here.
    moved = {"/etc/cryofleet/tls": tmp_path / "certificates" / "io", "/etc/cryofleet/tokens/tokens": tokens}
    for folder in ("scratch", "projects"):
        (tmp_path / folder).mkdir()
    moved |= {"/scratch": tmp_path / "scratch", "/etc/cryofleet/projects": tmp_path / "projects"}
    (tmp_path / "projects" / "projects.yaml").write_text(
        one(resources, "ConfigMap/project-rules")["data"]["projects.yaml"]
    )
    for name, value in values.items():
        for there, here in moved.items():
            if value.startswith(there):
                values[name] = value.replace(there, str(here), 1)
    values |= {
        "CRYOFLEET_ADDRESS": f"127.0.0.1:{ports['grpc']}",
        "CRYOFLEET_HEALTH_PORT": str(ports["health"]),
        "CRYOFLEET_METRICS_PORT": str(ports["metrics"]),
    }
    settings = Settings.from_environment(values)
    async with instance_process("services.io", settings, values):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['health']}") as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        orchestrators = TlsFiles(*(tmp_path / "certificates" / "orchestrator" / name for name in _PEM))
        async with open_channel(settings.address, orchestrators, "io") as channel:
            stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
            capacity = await stub.GetCapacity(runtime_pb2.GetCapacityRequest(), timeout=5)
        assert capacity.slots_total == int(values["CRYOFLEET_SLOTS"])
        assert capacity.memory_total_bytes == int(values["CRYOFLEET_MEMORY_BYTES"])
        samples = await asyncio.to_thread(_read, f"http://127.0.0.1:{ports['metrics']}/metrics")
        assert f"cryofleet_slots {float(capacity.slots_total)}" in samples.decode()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async with grpc.aio.insecure_channel(settings.address) as channel:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_job_makes_the_bucket_of_the_store() -> None:
    (pod,) = pods([one(load("single-node"), "Job/bucket")])
    values = environment(pod.containers[0], load("single-node"))
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    storage = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    storage.start()
    try:
        host, port = storage.get_host_and_port()
        here = {"CRYOFLEET_S3_ENDPOINT": f"{host}:{port}", "CRYOFLEET_S3_SECURE": "false"}
        command = [sys.executable, *pod.containers[0]["command"][1:]]
        client = Minio(f"{host}:{port}", "key", "secret", secure=False, region="us-east-1")
        # Such servers of one process share their buckets.
        before = {bucket.name for bucket in client.list_buckets()}
        for _ in range(2):  # the second finds it there
            process = await asyncio.create_subprocess_exec(*command, env={**values, **here})
            assert await asyncio.wait_for(process.wait(), 60) == 0
        assert {bucket.name for bucket in client.list_buckets()} - before == {"cryofleet"}
        assert values["CRYOFLEET_STORE"].startswith("s3://cryofleet/")
    finally:
        storage.stop()
