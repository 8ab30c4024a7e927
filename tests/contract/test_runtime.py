"""The server runtime over real gRPC on a Unix socket, and as a process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cryofleet.access.certificates import make_set
from cryofleet.artifacts import find, manifest_for
from cryofleet.channels import open_blocking_channel, open_channel, reason_of
from cryofleet.errors import FailedPrecondition, InvalidArgument, Unavailable
from cryofleet.logs import JsonFormatter
from cryofleet.operations import find_operation
from cryofleet.server import CallContext, Needs, Server, Service, Task, bootstrap, instance
from cryofleet.server.runtime_service import service as runtime_service
from cryofleet.settings import Settings, TlsFiles
from cryofleet.storage import Store
from cryofleet.testing import (
    call_operation,
    instance_process,
    run_operation,
    running_server,
    settings_for,
)
from cryofleet.v1 import common_pb2, io_pb2, picking_pb2, runtime_pb2, runtime_pb2_grpc
from tests.contract import runtime_instance
from tests.contract.conftest import channel_to

PROCESS = "tests.contract.runtime_instance"
PICKING = "cryofleet.v1.PickingService"

channel = channel_to(runtime_instance.service)


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    runtime_instance.runs.clear()
    runtime_instance.slow_may_end.clear()
    yield settings_for(tmp_path)
    runtime_instance.slow_may_end.set()


@pytest.fixture
def an_input(store: Store) -> str:
    uri = f"{store.root}/default/inputs/truth.csv"
    store.put(uri, b"truth")
    return uri


def slow_request(uri: str) -> picking_pb2.DifferenceOfGaussiansRequest:
    return picking_pb2.DifferenceOfGaussiansRequest(tomogram_uri=uri, particle_diameter_angstrom=100, max_picks=7)


@contextlib.contextmanager
def refused(status: grpc.StatusCode, *words: str, reason: str | None = None) -> Iterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    details = caught.value.details() or ""
    assert caught.value.code() is status, details
    assert "\n" not in details
    for word in words:
        assert word in details
    if reason is not None:
        assert reason_of(caught.value) == reason


async def capacity(channel: grpc.aio.Channel) -> runtime_pb2.GetCapacityResponse:
    stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
    response: runtime_pb2.GetCapacityResponse = await stub.GetCapacity(runtime_pb2.GetCapacityRequest())
    return response


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.01)


def objects(store: Store) -> list[str]:
    return [found.uri.removeprefix(store.root) for found in store.list(store.root)]


# --- What every server answers -------------------------------------------------------------------------------------


async def test_health_of_server_and_services(channel: grpc.aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    for name in ("", PICKING, "cryofleet.v1.RuntimeService"):
        response = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    with refused(grpc.StatusCode.NOT_FOUND):
        await stub.Check(health_pb2.HealthCheckRequest(service="cryofleet.v1.NoService"))


async def test_client_that_knows_nothing_calls_an_operation_by_reflection(settings: Settings) -> None:
    def call_dynamically() -> tuple[list[str], dict[str, Any]]:
        with open_blocking_channel(settings.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            services = list(database.get_services())
            pool = descriptor_pool.DescriptorPool(database)
            method = pool.FindServiceByName("cryofleet.v1.RuntimeService").methods_by_name["SelfTest"]
            request_class = message_factory.GetMessageClass(method.input_type)
            response_class = message_factory.GetMessageClass(method.output_type)
            assert request_class is not runtime_pb2.SelfTestRequest
            request: Any = request_class(index=5)
            request.context.task_key = "t5"
            call = channel.unary_stream(
                f"/{method.containing_service.full_name}/{method.name}",
                request_serializer=request_class.SerializeToString,
                response_deserializer=response_class.FromString,
            )
            events: list[Any] = list(call(request, timeout=10))
            return services, {"index": events[-1].result.index, "task_key": events[-1].provenance.task_key}

    async with running_server(runtime_instance.service, settings):
        services, result = await asyncio.to_thread(call_dynamically)
    assert {PICKING, "cryofleet.v1.RuntimeService", "grpc.health.v1.Health"} <= set(services)
    assert result == {"index": 5, "task_key": "t5"}


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_answers_under_both_its_names(channel: grpc.aio.Channel, version: str) -> None:
    ask = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=PICKING),
    ]
    listed, described = [answer async for answer in ask(iter(requests), timeout=10)]
    names = [each.name for each in listed.list_services_response.service]
    assert PICKING in names
    assert described.file_descriptor_response.file_descriptor_proto
    # Tools ask for the description of each service that is listed.
    asked = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in names]
    assert [answer.HasField("file_descriptor_response") async for answer in ask(iter(asked), timeout=10)] == [
        True for _ in names
    ]


async def test_capacity_names_instance_slots_and_operations(channel: grpc.aio.Channel, settings: Settings) -> None:
    found = await capacity(channel)
    assert (found.service, found.instance) == ("picking", "test")
    assert (found.slots_total, found.slots_free) == (2, 2)
    assert found.memory_total_bytes == found.memory_free_bytes == settings.memory_bytes
    assert list(found.devices) == ["cpu"]
    assert not found.draining
    assert "picking.Extract" in found.operations
    assert "runtime.SelfTest" in found.operations


async def test_estimate_computes_nothing(channel: grpc.aio.Channel, store: Store, an_input: str) -> None:
    stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
    request = picking_pb2.EvaluateRequest(particles_uri=an_input, truth_uri=an_input, distance_angstrom=3)
    asked = runtime_pb2.EstimateRequest(operation="picking.Evaluate", request=request.SerializeToString())
    before = await stub.Estimate(asked)
    assert (before.cached, before.memory_bytes, before.slots, before.input_bytes) == (False, 3 * 2**20, 1, 5)
    assert runtime_instance.runs == []
    reply = await call_operation(channel, request)
    after = await stub.Estimate(asked)
    assert after.cached
    assert after.key == before.key == reply.provenance.key
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "io.Ingest", "picking.Evaluate"):
        await stub.Estimate(runtime_pb2.EstimateRequest(operation="io.Ingest"))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "distance_angstrom"):
        request.distance_angstrom = -1
        asked.request = request.SerializeToString()
        await stub.Estimate(asked)


# --- Validation ----------------------------------------------------------------------------------------------------


async def test_request_that_breaks_a_rule_names_field_value_and_rule(channel: grpc.aio.Channel) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "seconds is -1.0", "greater than or equal to 0"):
        await call_operation(channel, runtime_pb2.SelfTestRequest(seconds=-1))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "context.project is 'a/../b'", "string.pattern"):
        await call_operation(channel, runtime_pb2.SelfTestRequest(), project="a/../b")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "particles_uris[1] is ''", "string.min_len"):
        await call_operation(channel, picking_pb2.MergeParticlesRequest(particles_uris=["file:///x", ""]))
    stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "operation is ''"):
        await stub.Estimate(runtime_pb2.EstimateRequest())


def _io_service() -> Service:
    """The io service with its streams, and methods that nobody calls here."""
    service = Service(io_pb2.DESCRIPTOR.services_by_name["IoService"])
    plain = {"Upload", "Download", "List", "CutSlice"}
    for name in (method.name for method in service.descriptor.methods if method.name not in plain):

        def unused(request: Message, task: object) -> Message:
            raise AssertionError("nobody calls it")

        unused.__name__ = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        service.operation(needs=lambda request, reader: Needs(0))(unused)

    @service.rpc("CutSlice")
    async def cut_slice(request: io_pb2.CutSliceRequest, context: CallContext) -> io_pb2.CutSliceResponse:
        raise AssertionError("nobody calls it")

    @service.rpc("Upload")
    async def upload(requests: AsyncIterator[io_pb2.UploadRequest], context: CallContext) -> io_pb2.UploadResponse:
        sizes = [len(part.chunk) async for part in requests]
        return io_pb2.UploadResponse(uri=f"{await context.in_thread(sum, sizes)}")

    @service.rpc("Download")
    async def download(request: io_pb2.DownloadRequest, context: CallContext) -> AsyncIterator[io_pb2.DownloadResponse]:
        for index in range(3):
            if index == request.offset_bytes:
                raise FailedPrecondition("no more")
            yield io_pb2.DownloadResponse(size_bytes=index)

    @service.rpc("List")
    async def list_objects(request: io_pb2.ListRequest, context: CallContext) -> AsyncIterator[io_pb2.ListResponse]:
        for size in (1, 0):
            yield io_pb2.ListResponse(size_bytes=1 // size)

    return service


async def test_plain_methods_of_all_kinds_are_validated_and_their_failures_told(settings: Settings) -> None:
    header = io_pb2.UploadRequest(header=io_pb2.UploadHeader(name="a.mrc", size_bytes=2, digest="0" * 64))
    bad = io_pb2.UploadRequest(header=io_pb2.UploadHeader(name="a/b", size_bytes=2, digest="0" * 64))
    chunk = io_pb2.UploadRequest(chunk=b"xy")
    async with running_server(_io_service(), settings) as channel:
        upload = channel.stream_unary(
            "/cryofleet.v1.IoService/Upload",
            request_serializer=io_pb2.UploadRequest.SerializeToString,
            response_deserializer=io_pb2.UploadResponse.FromString,
        )
        assert (await upload(iter([header, chunk, chunk]))).uri == "4"
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "header.name is 'a/b'"):
            await upload(iter([chunk, bad]))
        download = channel.unary_stream(
            "/cryofleet.v1.IoService/Download",
            request_serializer=io_pb2.DownloadRequest.SerializeToString,
            response_deserializer=io_pb2.DownloadResponse.FromString,
        )
        got = [r.size_bytes async for r in download(io_pb2.DownloadRequest(uri="file:///x", offset_bytes=9))]
        assert got == [0, 1, 2]
        got = []
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "no more"):
            async for response in download(io_pb2.DownloadRequest(uri="file:///x", offset_bytes=2)):
                got.append(response.size_bytes)
        assert got == [0, 1]
        listing = channel.unary_stream(
            "/cryofleet.v1.IoService/List",
            request_serializer=io_pb2.ListRequest.SerializeToString,
            response_deserializer=io_pb2.ListResponse.FromString,
        )
        with refused(grpc.StatusCode.INTERNAL, "internal error, see the log of test"):
            assert [response.size_bytes async for response in listing(io_pb2.ListRequest(uri="file:///x"))]


def test_service_with_a_missing_method_does_not_start(settings: Settings) -> None:
    service = Service(picking_pb2.DESCRIPTOR.services_by_name["PickingService"])
    with pytest.raises(LookupError, match=r"DifferenceOfGaussians.*Evaluate"):
        service.check()
    with pytest.raises(LookupError, match="no plain method Extract"):
        service.rpc("Extract")
    with pytest.raises(LookupError, match="no operation for the function sing"):

        @service.operation(needs=lambda request, reader: Needs(0))
        def sing(request: Message, task: object) -> Message:
            return request


# --- Results -------------------------------------------------------------------------------------------------------


async def test_second_call_is_answered_from_the_store(channel: grpc.aio.Channel, store: Store, an_input: str) -> None:
    request = picking_pb2.EvaluateRequest(particles_uri=an_input, truth_uri=an_input, distance_angstrom=1)
    first = await call_operation(channel, request, task_key="a", run_id="r1")
    second = await call_operation(channel, request, task_key="b", device=common_pb2.DEVICE_CPU)
    assert runtime_instance.runs == ["evaluate"]
    assert [first.provenance.cached, second.provenance.cached] == [False, True]
    assert [first.provenance.task_key, second.provenance.task_key] == ["a", "b"]
    assert first.provenance.key == second.provenance.key
    assert math.isnan(first.result.precision)
    assert math.isnan(second.result.precision)
    assert second.result.matched == 2**40
    assert second.result.metrics_uri == first.result.metrics_uri
    assert json.loads(store.get(first.result.metrics_uri)) == {"truth": "truth", "name": "truth.csv"}
    manifest = manifest_for(store, first.result.metrics_uri)
    assert manifest is not None
    assert manifest.operation == "picking.Evaluate"
    assert manifest.parameters["distance_angstrom"] == 1.0
    assert manifest.inputs["truth_uri"][0]["uri"] == an_input
    assert [blob["name"] for blob in manifest.blobs] == ["metrics.json"]
    assert second.provenance.manifest_uri == manifest.manifest_uri
    assert manifest.device == first.provenance.device == "cpu"


async def test_identity_is_of_content_and_parameters_not_of_uris(
    channel: grpc.aio.Channel, store: Store, an_input: str
) -> None:
    copy = f"{store.root}/default/elsewhere/other-name.csv"
    store.put(copy, b"truth")
    different = f"{store.root}/default/elsewhere/different.csv"
    store.put(different, b"trust")
    keys = []
    for uri, distance in ((an_input, 1), (copy, 1), (different, 1), (an_input, 2)):
        request = picking_pb2.EvaluateRequest(particles_uri=an_input, truth_uri=uri, distance_angstrom=distance)
        keys.append((await call_operation(channel, request)).provenance.key)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


async def test_result_that_lost_an_object_is_computed_again(
    channel: grpc.aio.Channel, store: Store, an_input: str
) -> None:
    request = picking_pb2.EvaluateRequest(particles_uri=an_input, truth_uri=an_input, distance_angstrom=1)
    first = await call_operation(channel, request)
    store.delete(first.result.metrics_uri)
    second = await call_operation(channel, request)
    assert not second.provenance.cached
    assert store.exists(second.result.metrics_uri)
    store.put(second.provenance.manifest_uri, b"{")
    third = await call_operation(channel, request)
    assert not third.provenance.cached
    assert (await call_operation(channel, request)).provenance.cached


async def test_calls_for_one_result_share_one_computation(channel: grpc.aio.Channel, an_input: str) -> None:
    calls = [asyncio.create_task(call_operation(channel, slow_request(an_input), task_key=str(i))) for i in range(3)]
    await until(lambda: runtime_instance.runs)
    await asyncio.sleep(0.3)
    assert (await capacity(channel)).slots_free == 1
    calls[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls[0]
    await asyncio.sleep(0.2)
    runtime_instance.slow_may_end.set()
    replies = await asyncio.gather(*calls[1:])
    assert runtime_instance.runs == ["slow"]
    assert [reply.provenance.task_key for reply in replies] == ["1", "2"]
    assert {reply.result.count for reply in replies} == {7}


async def test_checkpoint_carries_over_to_the_next_attempt(
    channel: grpc.aio.Channel, store: Store, an_input: str
) -> None:
    request = picking_pb2.MergeParticlesRequest(particles_uris=[an_input, an_input])
    with refused(grpc.StatusCode.UNAVAILABLE, "the store is away"):
        await call_operation(channel, request)
    kept = [uri for uri in objects(store) if "/_work/" in uri]
    assert len(kept) == 2, "the pointer and the one file of the last checkpoint"
    reply = await call_operation(channel, request)
    assert runtime_instance.runs == ["from the start", "from the middle"]
    assert reply.result.count == 10
    assert not [uri for uri in objects(store) if "/_work/" in uri]


def test_operation_runs_in_process_as_on_a_server(settings: Settings, store: Store, an_input: str) -> None:
    request = picking_pb2.EvaluateRequest(particles_uri=an_input, truth_uri=an_input, distance_angstrom=1)
    result = run_operation(runtime_instance.service, request, store)
    again = run_operation(runtime_instance.service, request, store)
    assert runtime_instance.runs == ["evaluate"]
    assert again.metrics_uri == result.metrics_uri
    request.distance_angstrom = 0
    with pytest.raises(InvalidArgument, match=r"distance_angstrom is 0\.0: must be greater than 0"):
        run_operation(runtime_instance.service, request, store)


# --- While a call goes on ------------------------------------------------------------------------------------------


async def test_progress_is_throttled_and_heartbeats_tell_of_silence(channel: grpc.aio.Channel, an_input: str) -> None:
    reply = await call_operation(channel, runtime_pb2.SelfTestRequest(seconds=2.6))
    fractions = [event.fraction for event in reply.progress]
    assert 3 <= len(fractions) <= 14, "about 5 a second, though the method reports 50 a second"
    assert fractions == sorted(fractions)
    assert all(0 <= fraction <= 1 for fraction in fractions)
    assert reply.progress[-1].phase == "waiting"
    assert 0 < reply.progress[-1].counters["seconds"] <= 2.6
    assert len(reply.heartbeats) == 1
    assert reply.heartbeats[0] < 1.0


async def test_cancelled_call_leaves_nothing(
    channel: grpc.aio.Channel, settings: Settings, store: Store, an_input: str
) -> None:
    before = objects(store)
    call = asyncio.create_task(call_operation(channel, slow_request(an_input)))
    await until(lambda: len(objects(store)) > len(before))
    assert (await capacity(channel)).slots_free == 1
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    async def slot_is_free() -> bool:
        return (await capacity(channel)).slots_free == 2

    await until(slot_is_free)
    assert objects(store) == before
    assert settings.scratch is not None
    assert [path.name for path in settings.scratch.rglob("*") if path.is_file()] == ["lock"]
    runtime_instance.slow_may_end.set()
    assert not (await call_operation(channel, slow_request(an_input))).provenance.cached


async def test_cancelled_call_ends_in_the_midst_of_a_transfer(
    channel: grpc.aio.Channel, store: Store, an_input: str
) -> None:
    before = objects(store)
    request = picking_pb2.MergeSubtomogramsRequest(subtomograms_uris=[an_input] * 3)
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
        await call_operation(channel, request, timeout=0.5)
    assert runtime_instance.runs == ["endless"]

    async def slot_is_free() -> bool:
        return (await capacity(channel)).slots_free == 2

    await until(slot_is_free)
    assert objects(store) == before


async def test_deadline_stops_the_computation(channel: grpc.aio.Channel, store: Store, an_input: str) -> None:
    before = objects(store)
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
        await call_operation(channel, slow_request(an_input), timeout=0.4)

    async def slot_is_free() -> bool:
        return (await capacity(channel)).slots_free == 2

    await until(slot_is_free)
    assert runtime_instance.runs == ["slow"]
    assert objects(store) == before


async def test_call_outlives_its_connections_age(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "MAX_CONNECTION_AGE_SECONDS", 0.5)
    async with running_server(runtime_service, settings) as channel:
        reply = await call_operation(channel, runtime_pb2.SelfTestRequest(index=1, seconds=2.0))
        assert reply.result.index == 1
        assert (await call_operation(channel, runtime_pb2.SelfTestRequest(index=2))).result.index == 2


# --- Refusals and failures -----------------------------------------------------------------------------------------


async def test_no_slot_and_no_memory_are_told_apart_from_never(settings: Settings, an_input: str) -> None:
    def evaluation(mebibytes: float) -> picking_pb2.EvaluateRequest:
        return picking_pb2.EvaluateRequest(particles_uri=an_input, truth_uri=an_input, distance_angstrom=mebibytes)

    settings = settings_for(settings.home, slots=1, memory_bytes=10 * 2**20)
    async with running_server(runtime_instance.service, settings) as channel:
        cached = await call_operation(channel, evaluation(4))
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "11.0 MiB", "10.0 MiB", reason="never-fits"):
            await call_operation(channel, evaluation(11))
        slow = asyncio.create_task(call_operation(channel, slow_request(an_input)))
        await until(lambda: "slow" in runtime_instance.runs)
        started = time.monotonic()
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "come back later", reason="busy"):
            await call_operation(channel, evaluation(5))
        assert time.monotonic() - started < 1.0
        again = await call_operation(channel, evaluation(4))
        assert again.provenance.cached, "what is in the store needs no slot"
        assert again.provenance.key == cached.provenance.key
        runtime_instance.slow_may_end.set()
        await slow
        assert (await call_operation(channel, evaluation(5))).result.recall == 0.25


async def test_unforeseen_error_shows_its_traceback_in_the_log_alone(
    channel: grpc.aio.Channel, store: Store, an_input: str
) -> None:
    before = objects(store)
    request = picking_pb2.MergeSubtomogramsRequest(subtomograms_uris=[an_input])
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(JsonFormatter("picking", "test"))
    logger = logging.getLogger("cryofleet.server.failures")
    logger.addHandler(handler)
    try:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_operation(channel, request, run_id="run-3", task_key="task-4")
    finally:
        logger.removeHandler(handler)
    details = caught.value.details() or ""
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert details.startswith("internal error, see the log of test (id ")
    assert "secret" not in details
    line = json.loads(log.getvalue())
    assert line["error_id"] in details
    assert (line["run_id"], line["task_key"]) == ("run-3", "task-4")
    assert (line["operation"], line["level"]) == ("picking.MergeSubtomograms", "ERROR")
    assert 'raise RuntimeError("the secret of the house")' in line["traceback"]
    assert objects(store) == before


async def test_what_was_logged_about_a_run_is_told_by_project_and_task(
    channel: grpc.aio.Channel, an_input: str
) -> None:
    stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
    request = picking_pb2.MergeSubtomogramsRequest(subtomograms_uris=[an_input])
    for task in ("task-1", "task-2"):
        with refused(grpc.StatusCode.INTERNAL):
            await call_operation(channel, request, run_id="run-3", task_key=task)
    with refused(grpc.StatusCode.NOT_FOUND):
        failing = runtime_pb2.SelfTestRequest(fail_with="NOT_FOUND")
        await call_operation(channel, failing, run_id="run-3", project="apo")
    found = (await stub.GetLog(runtime_pb2.GetLogRequest(run_id="run-3"))).lines
    assert {line.task_key for line in found} == {"task-1", "task-2"}
    (error, *_) = [line for line in found if line.task_key == "task-2" and line.level == "ERROR"]
    assert (error.service, error.instance, error.operation) == ("picking", "test", "picking.MergeSubtomograms")
    assert error.message == "internal error"
    assert "the secret of the house" not in str(found)
    assert len(error.fields["error_id"]) == 12
    assert abs(error.time.ToNanoseconds() / 1e9 - time.time()) < 60
    asked = runtime_pb2.GetLogRequest(run_id="run-3", task_key="task-1", limit=1)
    only = await stub.GetLog(asked)
    assert ([line.task_key for line in only.lines], only.cut) == (["task-1"], True)
    of_apo = (await stub.GetLog(runtime_pb2.GetLogRequest(run_id="run-3", project="apo"))).lines
    assert "failed with NOT_FOUND, as asked for" in of_apo[0].message
    assert not (await stub.GetLog(runtime_pb2.GetLogRequest(run_id="run-4"))).lines
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "run_id is ''"):
        await stub.GetLog(runtime_pb2.GetLogRequest())


async def test_want_of_memory_is_resource_exhausted(channel: grpc.aio.Channel, an_input: str) -> None:
    request = picking_pb2.MergeSubtomogramsRequest(subtomograms_uris=[an_input, an_input])
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "out of memory", reason="memory"):
        await call_operation(channel, request)
    assert (await capacity(channel)).slots_free == 2


@pytest.mark.parametrize(
    "status", ["NOT_FOUND", "DATA_LOSS", "UNAVAILABLE", "FAILED_PRECONDITION", "PERMISSION_DENIED"]
)
async def test_failures_travel_under_their_own_status(channel: grpc.aio.Channel, status: str) -> None:
    with refused(grpc.StatusCode[status], f"failed with {status}"):
        await call_operation(channel, runtime_pb2.SelfTestRequest(fail_with=status))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "fail_with is 'NONSENSE'"):
        await call_operation(channel, runtime_pb2.SelfTestRequest(fail_with="NONSENSE"))


@pytest.mark.parametrize(
    ("uri", "status"),
    [
        ("file:///etc/passwd", grpc.StatusCode.PERMISSION_DENIED),
        ("{root}/default/../other/secret", grpc.StatusCode.PERMISSION_DENIED),
        ("{root}/default/%2e%2e/other/secret", grpc.StatusCode.PERMISSION_DENIED),
        ("{root}/other/secret", grpc.StatusCode.PERMISSION_DENIED),
        ("{root}-beside/secret", grpc.StatusCode.PERMISSION_DENIED),
        ("{root}/default/none", grpc.StatusCode.NOT_FOUND),
        ("http://example.org/x", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_inputs_outside_of_the_project_are_refused(
    channel: grpc.aio.Channel, store: Store, an_input: str, uri: str, status: grpc.StatusCode
) -> None:
    store.put(f"{store.root}/other/secret", b"of another project")
    request = picking_pb2.EvaluateRequest(
        particles_uri=an_input, truth_uri=uri.format(root=store.root), distance_angstrom=1
    )
    with refused(status):
        await call_operation(channel, request)
    assert runtime_instance.runs == []


async def test_read_only_roots_are_open_to_all_projects(settings: Settings, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "truth.csv").write_text("from the microscope")
    settings = settings_for(settings.home, read_only_roots=(f"file://{raw}",))
    uri = f"file://{raw}/truth.csv"
    request = picking_pb2.EvaluateRequest(particles_uri=uri, truth_uri=uri, distance_angstrom=1)
    async with running_server(runtime_instance.service, settings) as channel:
        reply = await call_operation(channel, request, project="ribosomes")
    assert f"{settings.store}/ribosomes/{reply.provenance.key}/" in reply.result.metrics_uri
    assert json.loads(Store.open(settings).get(reply.result.metrics_uri))["truth"] == "from the microscope"


@pytest.mark.parametrize("whose", ["own", "read-only"])
def test_an_input_that_changes_while_it_is_read_makes_no_result(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    store = Store(settings.store, [f"file://{raw}"])
    uri = f"file://{raw}/truth.csv" if whose == "read-only" else f"{store.root}/default/inputs/truth.csv"
    path = Path(uri.removeprefix("file://"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("as it was hashed")
    local_copy = Task.local_copy

    def late(task: Task, uri: str) -> Path:
        path.with_suffix(".new").write_text("changed since")
        path.with_suffix(".new").rename(path)
        return local_copy(task, uri)

    request = picking_pb2.EvaluateRequest(particles_uri=uri, truth_uri=uri, distance_angstrom=1)
    with monkeypatch.context() as patched:
        patched.setattr(Task, "local_copy", late)
        with pytest.raises(Unavailable, match=f"{uri} changed while it was read"):
            run_operation(runtime_instance.service, request, store)
    assert [name for name in objects(store) if "/inputs/" not in name] == []
    result = run_operation(runtime_instance.service, request, store)
    assert json.loads(store.get(result.metrics_uri))["truth"] == "changed since"


def test_gpu_is_used_where_asked_for_and_there(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    running = instance.Instance([runtime_instance.service], settings, Store.open(settings))
    with contextlib.closing(running):
        on_gpu, on_cpu = find_operation("alignment.Align"), find_operation("picking.Extract")
        monkeypatch.setattr(instance, "cuda_available", lambda: False)
        assert running.device_for(on_gpu, common_pb2.DEVICE_AUTO) == "cpu"
        assert running.device_for(on_cpu, common_pb2.DEVICE_CUDA) == "cpu"
        with pytest.raises(FailedPrecondition, match=r"alignment\.Align.*no GPU"):
            running.device_for(on_gpu, common_pb2.DEVICE_CUDA)
        monkeypatch.setattr(instance, "cuda_available", lambda: True)
        assert running.device_for(on_gpu, common_pb2.DEVICE_UNSPECIFIED) == "cuda"
        assert running.device_for(on_gpu, common_pb2.DEVICE_CPU) == "cpu"


# --- Addresses -----------------------------------------------------------------------------------------------------


async def test_socket_in_a_folder_that_others_may_enter_is_refused(settings: Settings) -> None:
    settings.run_folder.mkdir(mode=0o755)
    settings.run_folder.chmod(0o755)
    with pytest.raises(FailedPrecondition, match="0700"):
        await Server(runtime_service, settings).start()


async def test_stale_socket_is_replaced_and_a_live_one_is_not(settings: Settings) -> None:
    settings.run_folder.mkdir(mode=0o700)
    path = settings.address.removeprefix("unix:")
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(path)
    async with running_server(runtime_service, settings) as channel:
        assert (await capacity(channel)).instance == "test"
        with pytest.raises(FailedPrecondition, match="another server is listening"):
            await Server(runtime_service, settings).start()
        assert (await capacity(channel)).instance == "test"
    assert not os.path.exists(path)


async def test_tcp_without_tls_is_refused(settings: Settings) -> None:
    settings = settings_for(settings.home, address="127.0.0.1:0")
    with pytest.raises(FailedPrecondition, match=r"refusing to listen on 127\.0\.0\.1:0 without authentication"):
        await Server(runtime_service, settings).start()
    with pytest.raises(FailedPrecondition, match="mutual TLS"):
        open_channel("127.0.0.1:50051")


def _tls(folder: Path) -> TlsFiles:
    """The orchestrator's certificate of a set that is made now."""
    make_set(folder)
    own = folder / "orchestrator"
    return TlsFiles(own / "tls.crt", own / "tls.key", own / "ca.crt")


async def test_tcp_with_mutual_tls(settings: Settings, tmp_path: Path) -> None:
    ours, strangers = _tls(tmp_path / "ours"), _tls(tmp_path / "strangers")
    server = Server(runtime_service, settings_for(settings.home, address="127.0.0.1:0", tls=ours))
    await server.start()
    try:
        async with open_channel(server.address, ours, server_name="localhost") as channel:
            assert (await call_operation(channel, runtime_pb2.SelfTestRequest(index=3))).result.index == 3
        stranger = TlsFiles(strangers.certificate, strangers.key, ours.authority)
        async with open_channel(server.address, stranger) as channel:
            with refused(grpc.StatusCode.UNAVAILABLE):
                await capacity(channel)
        anonymous = grpc.ssl_channel_credentials(ours.authority.read_bytes())
        async with grpc.aio.secure_channel(server.address, anonymous) as channel:
            with refused(grpc.StatusCode.UNAVAILABLE):
                await capacity(channel)
    finally:
        await server.stop()


# --- Metrics -------------------------------------------------------------------------------------------------------


def _value(lines: list[str], sample: str) -> float:
    (line,) = [line for line in lines if line.startswith(sample + " ")]
    return float(line.rpartition(" ")[2])


async def test_metrics_count_calls_by_status(settings: Settings, an_input: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    request = picking_pb2.EvaluateRequest(particles_uri=an_input, truth_uri=an_input, distance_angstrom=1)
    async with running_server(runtime_instance.service, settings_for(settings.home, metrics_port=port)) as channel:
        await call_operation(channel, request)
        await call_operation(channel, request)
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            await call_operation(channel, picking_pb2.EvaluateRequest())

        def scrape() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
                text: str = response.read().decode()
                return text

        lines = (await asyncio.to_thread(scrape)).splitlines()
    method = f"/{PICKING}/Evaluate"
    assert f'cryofleet_calls_total{{method="{method}",status="OK"}} 2.0' in lines
    assert f'cryofleet_calls_total{{method="{method}",status="INVALID_ARGUMENT"}} 1.0' in lines
    assert 'cryofleet_cached_results_total{operation="picking.Evaluate"} 1.0' in lines
    # The result's table, and the manifest with it; inputs are read to be hashed.
    assert _value(lines, 'cryofleet_store_bytes_total{direction="written",operation="picking.Evaluate"}') > 0
    assert _value(lines, 'cryofleet_store_bytes_total{direction="read",operation="picking.Evaluate"}') > 0
    assert _value(lines, 'cryofleet_store_bytes_total{direction="read",operation="runtime.SelfTest"}') == 0
    assert "cryofleet_slots 2.0" in lines
    assert "cryofleet_slots_free 2.0" in lines
    assert "cryofleet_calls_in_flight 0.0" in lines


# --- The process ---------------------------------------------------------------------------------------------------


async def test_worker_that_does_not_stop_ends_the_process(settings: Settings, an_input: str) -> None:
    request = picking_pb2.ExtractRequest(tomogram_uri=an_input, particles_uri=an_input, box_size_voxels=8)
    async with instance_process(PROCESS, settings) as process, open_channel(process.address) as channel:
        with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
            await call_operation(channel, request, timeout=1.0, run_id="run-7")
        health: Any = health_pb2_grpc.HealthStub(channel)
        seen = []
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for response in health.Watch(health_pb2.HealthCheckRequest(service=PICKING)):
                seen.append(response.status)  # noqa: PERF401 - the stream ends in an error
        assert await process.wait() == 70
    assert seen[-1] == health_pb2.HealthCheckResponse.NOT_SERVING
    line = next(line for line in process.lines if line["level"] == "CRITICAL")
    assert "picking.Extract did not stop" in line["message"]
    assert "time.sleep(3600)" in line["traceback"]


async def test_sigterm_lets_running_calls_end(settings: Settings) -> None:
    settings = settings_for(settings.home, drain_seconds=20.0)
    async with instance_process(PROCESS, settings) as process, open_channel(process.address) as channel:
        request = runtime_pb2.SelfTestRequest(index=9, seconds=1.5)
        call = asyncio.create_task(call_operation(channel, request, run_id="run-1"))

        async def slot_is_taken() -> bool:
            return (await capacity(channel)).slots_free == 1

        await until(slot_is_taken)
        process.terminate()
        await until(lambda: any(line["message"] == "draining" for line in process.lines))
        with refused(grpc.StatusCode.UNAVAILABLE, "stopping", reason="draining"):
            await call_operation(channel, runtime_pb2.SelfTestRequest(index=10))
        assert (await capacity(channel)).draining
        health: Any = health_pb2_grpc.HealthStub(channel)
        response = await health.Check(health_pb2.HealthCheckRequest())
        assert response.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await call).result.index == 9
        assert await process.wait() == 0
    done = next(line for line in process.lines if line.get("run_id") == "run-1")
    assert (done["service"], done["instance"], done["operation"]) == ("picking", "test", "runtime.SelfTest")
    assert not os.path.exists(settings.address.removeprefix("unix:"))


async def test_sigterm_stops_what_outlasts_the_drain(settings: Settings, store: Store, an_input: str) -> None:
    settings = settings_for(settings.home, drain_seconds=0.2)
    before = objects(store)
    async with instance_process(PROCESS, settings) as process, open_channel(process.address) as channel:
        call = asyncio.create_task(call_operation(channel, slow_request(an_input)))
        await until(lambda: len(objects(store)) > len(before))
        process.terminate()
        with refused(grpc.StatusCode.UNAVAILABLE, "stopping", reason="draining"):
            await call
        assert await process.wait() == 0
    assert objects(store) == before


async def test_killed_process_leaves_no_result_and_its_scratch_is_cleaned(
    settings: Settings, store: Store, an_input: str
) -> None:
    before = objects(store)
    async with instance_process(PROCESS, settings) as process, open_channel(process.address) as channel:
        call = asyncio.create_task(call_operation(channel, slow_request(an_input)))
        await until(lambda: len(objects(store)) > len(before))
        process.process.send_signal(signal.SIGKILL)
        with refused(grpc.StatusCode.UNAVAILABLE):
            await call
    left = next(uri for uri in objects(store) if uri not in before)
    assert find(store, "default", left.split("/")[2]) is None
    assert settings.scratch is not None
    assert list(settings.scratch.rglob("temporary"))
    runtime_instance.slow_may_end.set()
    async with running_server(runtime_instance.service, settings) as channel:
        assert not list(settings.scratch.rglob("temporary"))
        assert not (await call_operation(channel, slow_request(an_input))).provenance.cached


def test_process_that_may_not_listen_says_why(settings: Settings) -> None:
    environment = {**os.environ, "CRYOFLEET_HOME": str(settings.home), "CRYOFLEET_ADDRESS": "0.0.0.0:50051"}
    process = subprocess.run(
        [sys.executable, "-m", "cryofleet.server"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 1
    line = json.loads(process.stderr.splitlines()[-1])
    assert "refusing to listen on 0.0.0.0:50051 without authentication" in line["message"]
    assert "Traceback" not in process.stderr
