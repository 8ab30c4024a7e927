"""The certificate that a server shows, as its files are now: they are renewed while the server runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import cast

import grpc

from cryofleet.channels import read_file, version_of
from cryofleet.errors import FailedPrecondition
from cryofleet.settings import TlsFiles

logger = logging.getLogger(__name__)


def server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Credentials for mutual TLS: every client must have a certificate of the authority.

    Raises FailedPrecondition where a file can't be read.
    """
    renewing = _Renewing(tls)
    # Where nothing has changed gRPC takes None for an answer, which its stubs do not know.
    newer = cast("Callable[[], grpc.ServerCertificateConfiguration]", renewing.newer)
    return grpc.dynamic_ssl_server_credentials(renewing.first, newer, require_client_authentication=True)


class _Renewing:
    def __init__(self, tls: TlsFiles) -> None:
        self._tls = tls
        self._seen = version_of(self._tls)
        self.first = self._configuration()

    def newer(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked at each handshake: the files' certificate where they have changed."""
        try:
            seen = version_of(self._tls)
            if seen == self._seen:
                return None
            found = self._configuration()
        except FailedPrecondition as failure:
            logger.error("going on with the certificate that was read before: %s", failure)
            return None
        self._seen = seen
        logger.info("the certificate was read anew")
        return found

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = (read_file(self._tls.key), read_file(self._tls.certificate))
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=read_file(self._tls.authority))
