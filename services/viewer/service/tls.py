"""The certificate that the page shows, as its files are now: they are renewed while visitors are there."""

from __future__ import annotations

import logging
import ssl

from cryofleet.channels import version_of
from cryofleet.errors import FailedPrecondition
from cryofleet.settings import TlsFiles

logger = logging.getLogger(__name__)


def page_context(tls: TlsFiles) -> ssl.SSLContext:
    """A context that looks at each handshake whether its files have changed; connections that are open go on.

    Raises FailedPrecondition where the files hold no certificate with its key.
    """
    shown = _read(tls)
    seen = version_of(tls)
    context = _read(tls)

    def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal shown, seen
        try:
            found = version_of(tls)
            if found != seen:
                shown, seen = _read(tls), found
                logger.info("the page's certificate was read anew")
        except FailedPrecondition as failure:  # half of the files is new, perhaps: the next handshake looks again
            logger.error("going on with the certificate that was read before: %s", failure)
        connection.context = shown

    context.sni_callback = renew
    return context


def _read(tls: TlsFiles) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.certificate, tls.key)
    except OSError as error:  # SSLError is one
        raise FailedPrecondition(f"{tls.certificate}, {tls.key}: no certificate with its key: {error}") from None
    return context
