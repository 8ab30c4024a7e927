"""`python -m cryofleet.health`: whether the instance that this environment describes is serving.

For the health checks of containers, which know the instance's environment but no gRPC with mutual TLS. Exit code 0
where it is serving, else 1 with the reason on stderr.
"""

from __future__ import annotations

import sys

import grpc
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cryofleet.channels import failure_from_rpc, is_unix, open_blocking_channel, read_file
from cryofleet.errors import FailedPrecondition, Failure, Unavailable
from cryofleet.settings import Settings

_TIMEOUT_SECONDS = 5.0
_ALL_INTERFACES = ("0.0.0.0", "[::]")


def check(settings: Settings) -> None:
    """Returns where the instance that listens on `settings.address` is serving; raises a Failure that says why not."""
    if not settings.address:
        raise FailedPrecondition("CRYOFLEET_ADDRESS is not set: it says where the instance listens")
    with open_blocking_channel(_own_address(settings.address), settings.tls, _own_name(settings)) as channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise failure_from_rpc(error) from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _own_address(address: str) -> str:
    """Where this machine reaches what listens on `address`, which may stand for all interfaces."""
    host, _, port = address.rpartition(":")
    return f"localhost:{port}" if host in _ALL_INTERFACES else address


def _own_name(settings: Settings) -> str | None:
    """A name in the instance's own certificate: its pool's, as a rule, and not the one that it is called by here."""
    if settings.tls is None or is_unix(settings.address):
        return None
    certificate = x509.load_pem_x509_certificate(read_file(settings.tls.certificate))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return next(iter(names.get_values_for_type(x509.DNSName)), None)


def main() -> None:
    """Check the instance of this process's environment."""
    try:
        check(Settings.from_environment())
    except Failure as failure:
        sys.exit(failure.message)


if __name__ == "__main__":
    main()
