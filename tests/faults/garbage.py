"""A server in a pool that says it is an instance and answers every operation with garbage."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from cryofleet.operations import Operation, operations
from cryofleet.v1 import common_pb2, runtime_pb2

KINDS = ("no message", "no result", "another task's result", "another request's result", "a result that is not stored")
_NOWHERE = f"file:///nowhere/default/{'0' * 64}/density.mrc"


class _Garbage(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._operations = {operation.full_name: operation for operation in operations().values()}
        self.asked: list[str] = []
        """Task keys of the operations that it was asked for."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method: str = handler_call_details.method
        if method.endswith("/GetCapacity"):
            return grpc.unary_unary_rpc_method_handler(self._capacity)
        operation = self._operations.get(method)
        if operation is None:
            return None

        def answer(request: bytes, context: Any) -> Iterator[bytes]:
            about = operation.request_class.FromString(request).context  # type: ignore[attr-defined]
            self.asked.append(about.task_key)
            yield from self._answers(operation, about.task_key)

        return grpc.unary_stream_rpc_method_handler(answer)

    def _capacity(self, request: bytes, context: Any) -> bytes:
        answer = runtime_pb2.GetCapacityResponse(instance="garbage", slots_total=4, slots_free=4, devices=["cpu"])
        return answer.SerializeToString()

    def _answers(self, operation: Operation, task_key: str) -> Iterator[bytes]:
        if self._kind == "no message":
            yield b"\xff<html>502 Bad Gateway</html>"
            return
        if self._kind == "no result":
            return
        result = operation.result_class()
        for field in result.DESCRIPTOR.fields:
            if field.name.endswith("_uri"):
                setattr(result, field.name, _NOWHERE)
        if self._kind == "another task's result":
            task_key = "another:1/task"
        key = "" if self._kind == "a result that is not stored" else "1" * 64
        provenance = common_pb2.Provenance(task_key=task_key, key=key, manifest_uri=f"{_NOWHERE}/manifest.json")
        yield operation.response_class(result=result, provenance=provenance).SerializeToString()


@contextmanager
def garbage_at(address: str, kind: str) -> Iterator[list[str]]:
    """The server at an address; the keys of the tasks that it was asked for."""
    handler = _Garbage(kind)
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(address)
    server.start()
    try:
        yield handler.asked
    finally:
        server.stop(None).wait()
