"""The runtime that all services share: a gRPC server that runs operations and keeps their results.

A service's `service` module or package registers its functions with a `Service`; its `__main__.py` calls `main`.
"""

from cryofleet.server.admission import Needs
from cryofleet.server.bootstrap import Server, main
from cryofleet.server.calls import CallContext
from cryofleet.server.instance import Instance
from cryofleet.server.service import Service
from cryofleet.server.task import Reader, Task

__all__ = ["CallContext", "Instance", "Needs", "Reader", "Server", "Service", "Task", "main"]
