"""RuntimeService: what every instance answers besides its own service."""

from __future__ import annotations

import time

from google.protobuf.message import DecodeError

from cryofleet.access.caller import current_caller
from cryofleet.access.projects import check_request
from cryofleet.artifacts import manifest_for
from cryofleet.errors import Failure, InvalidArgument, failure_from_status
from cryofleet.server.admission import Needs
from cryofleet.server.calls import CallContext
from cryofleet.server.computation import Question, identify, look_up
from cryofleet.server.execution import Execution
from cryofleet.server.recent_log import DEFAULT_LIMIT
from cryofleet.server.service import Service
from cryofleet.server.task import Reader, Task
from cryofleet.server.validation import validate
from cryofleet.settings import DEFAULT_PROJECT
from cryofleet.v1 import options_pb2, runtime_pb2

service = Service(runtime_pb2.DESCRIPTOR.services_by_name["RuntimeService"])

_STEP_SECONDS = 0.02


@service.rpc("GetCapacity")
async def get_capacity(
    request: runtime_pb2.GetCapacityRequest, context: CallContext
) -> runtime_pb2.GetCapacityResponse:
    """Slots, memory and devices as they are now."""
    instance = context.instance
    admission = instance.admission
    return runtime_pb2.GetCapacityResponse(
        service=instance.service_name,
        instance=instance.name,
        version=instance.version,
        slots_total=admission.slots_total,
        slots_free=admission.slots_free,
        memory_total_bytes=admission.memory_total_bytes,
        memory_free_bytes=admission.memory_free_bytes,
        devices=instance.devices(),
        draining=instance.draining,
        operations=list(instance.methods),
        store=instance.store.root,
        running=[_running(execution) for execution in context.executions.computing()],
    )


def _running(execution: Execution) -> runtime_pb2.RunningOperation:
    """What is computed; of which run only for those who may use its project."""
    fraction, phase, _ = execution.progress or (0.0, "", {})
    project = execution.about.project or DEFAULT_PROJECT
    own = current_caller().may_use(project)
    message = runtime_pb2.RunningOperation(
        operation=execution.method.operation.name,
        run_id=execution.about.run_id if own else "",
        project=project if own else "",
        fraction=fraction,
        phase=phase if own else "",
    )
    message.started_at.FromNanoseconds(int(execution.began_at * 1e9))
    return message


@service.rpc("GetLog")
async def get_log(request: runtime_pb2.GetLogRequest, context: CallContext) -> runtime_pb2.GetLogResponse:
    """Only what was logged for the project that the request names, which its caller may use."""
    recent = context.instance.recent_log
    lines, cut = recent.read(
        request.project or DEFAULT_PROJECT, request.run_id, request.task_key, request.limit or DEFAULT_LIMIT
    )
    return runtime_pb2.GetLogResponse(lines=lines, cut=cut)


@service.rpc("Estimate")
async def estimate(request: runtime_pb2.EstimateRequest, context: CallContext) -> runtime_pb2.EstimateResponse:
    """What a request of an operation of this instance would need; nothing is computed."""
    return await context.in_thread(_estimate, request, context)


def _estimate(request: runtime_pb2.EstimateRequest, context: CallContext) -> runtime_pb2.EstimateResponse:
    instance = context.instance
    method = instance.methods.get(request.operation)
    if method is None:
        known = ", ".join(instance.methods)
        raise InvalidArgument(f"operation {request.operation!r} is not of this instance, which has {known}")
    try:
        wanted = method.operation.request_class.FromString(request.request)
    except DecodeError:
        raise InvalidArgument(
            f"request is not a serialised {method.operation.request_class.DESCRIPTOR.full_name}"
        ) from None
    # The request within the request says which project it is of.
    check_request(current_caller(), wanted, instance.store)
    validate(wanted)
    question = identify(method, wanted, instance.store)
    with Reader(
        question.store, question.project, instance.scratch.new_folder, instance.settings.max_volume_bytes
    ) as reader:
        needs = method.needs(question.request, reader)
    return runtime_pb2.EstimateResponse(
        key=question.key,
        cached=look_up(question) is not None,
        memory_bytes=needs.memory_bytes,
        slots=needs.slots,
        pool=options_pb2.POOL_GPU if method.operation.pool == "gpu" else options_pb2.POOL_CPU,
        input_bytes=_input_bytes(question),
    )


def _input_bytes(question: Question) -> int:
    """Bytes of the inputs; of a folder, those of its objects."""
    total = 0
    for uri in {entry["uri"] for entries in question.inputs.values() for entry in entries if entry["uri"]}:
        manifest = manifest_for(question.store, uri)
        if manifest is None:
            total += sum(found.size_bytes for found in question.store.list(uri))
            continue
        name = uri.removeprefix(manifest.uri).strip("/")
        for blob in manifest.blobs:
            if not name or blob["name"] == name or blob["name"].startswith(name + "/"):
                total += blob["size_bytes"]
    return total


def _self_test_needs(request: runtime_pb2.SelfTestRequest, reader: Reader) -> Needs:
    return Needs(memory_bytes=0)


@service.operation(needs=_self_test_needs)
def self_test(request: runtime_pb2.SelfTestRequest, task: Task) -> runtime_pb2.SelfTestResult:
    """Takes the time asked for, then fails, or counts one on."""
    started = time.monotonic()
    while (passed := time.monotonic() - started) < request.seconds:
        task.progress(passed / request.seconds, "waiting", seconds=passed)
        time.sleep(min(_STEP_SECONDS, request.seconds - passed))
    if request.fail_with:
        raise _failure_named(request.fail_with)
    return runtime_pb2.SelfTestResult(
        index=request.index,
        first_row=request.rows.first,
        instance=task.instance,
        next_index=request.index + 1,
        counted=request.index + 1 >= request.count_to,
    )


def _failure_named(status: str) -> Failure:
    failure = failure_from_status(status, f"failed with {status}, as asked for")
    if failure.status != status:
        return InvalidArgument(f"fail_with is {status!r}; it must be the name of a gRPC status that is an error")
    return failure
