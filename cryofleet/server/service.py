"""The registry of one service: which function answers which method of its descriptor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

from cryofleet.operations import Operation, operations
from cryofleet.server.admission import Needs

if TYPE_CHECKING:
    from cryofleet.server.calls import CallContext
    from cryofleet.server.instance import Instance
    from cryofleet.server.task import Reader, Task

RequestT = TypeVar("RequestT", bound=Message)
ResultT = TypeVar("ResultT", bound=Message)
HandlerT = TypeVar("HandlerT", bound=Callable[..., Any])
Lifespan = Callable[["Instance"], AbstractAsyncContextManager[None]]


@dataclass(frozen=True)
class Method:
    """An operation with the functions that say what it needs and do it."""

    operation: Operation
    function: Callable[[Any, Task], Message]
    needs: Callable[[Any, Reader], Needs]


class Service:
    """Collects the functions of one service of the contract.

    Operations are registered by `operation`, all other methods by `rpc`; `check` finds what is missing.
    """

    def __init__(self, descriptor: ServiceDescriptor) -> None:
        self.descriptor = descriptor
        self.name = PurePosixPath(descriptor.file.name).stem
        """As pools and operations call it: io, picking, …"""
        self.methods: dict[str, Method] = {}
        """Operations by method name, as Extract."""
        self.rpcs: dict[str, Callable[[Any, CallContext], Any]] = {}
        """Hand-written handlers by method name, as Upload."""
        self.lifespan: Lifespan | None = None
        """Entered before the server listens, left after its last call: a context manager of the instance."""

    def _operation(self, function_name: str) -> Operation:
        wanted = function_name.replace("_", "").lower()
        for method in self.descriptor.methods:
            operation = operations().get(f"{self.name}.{method.name}")
            if operation is not None and method.name.lower() == wanted:
                return operation
        raise LookupError(f"{self.descriptor.full_name} has no operation for the function {function_name}")

    def operation(
        self, *, needs: Callable[[Any, Reader], Needs]
    ) -> Callable[[Callable[[RequestT, Task], ResultT]], Callable[[RequestT, Task], ResultT]]:
        """Registers a function as the operation of its own name: `template_match` is TemplateMatch.

        The function runs in a worker thread with a validated request whose defaults are resolved; `needs`
        runs there too, before, and may read the inputs' headers.
        """

        def register(function: Callable[[RequestT, Task], ResultT]) -> Callable[[RequestT, Task], ResultT]:
            operation = self._operation(function.__name__)
            self._refuse_twice(operation.method)
            self.methods[operation.method] = Method(operation, function, needs)
            return function

        return register

    def rpc(self, name: str) -> Callable[[HandlerT], HandlerT]:
        """Registers an asynchronous function as the method `name`, which is no operation.

        It takes the request, or an asynchronous iterator of requests where the method streams them, and a
        `CallContext`. It returns the response or, where the method streams responses, is an asynchronous
        generator of them. It raises `cryofleet.errors`; blocking work goes through `CallContext.in_thread`.
        """

        if name not in self.descriptor.methods_by_name or f"{self.name}.{name}" in operations():
            raise LookupError(f"{self.descriptor.full_name} has no plain method {name}")

        def register(handler: HandlerT) -> HandlerT:
            self._refuse_twice(name)
            self.rpcs[name] = handler
            return handler

        return register

    def _refuse_twice(self, name: str) -> None:
        if name in self.methods or name in self.rpcs:
            raise LookupError(f"{self.descriptor.full_name}/{name} has a function already")

    def check(self) -> None:
        """Raises LookupError naming the methods of the descriptor that nothing answers."""
        missing = [m.name for m in self.descriptor.methods if m.name not in self.methods and m.name not in self.rpcs]
        if missing:
            raise LookupError(f"{self.descriptor.full_name} has no function for {', '.join(missing)}")
