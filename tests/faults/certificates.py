"""Certificates of services: good ones, and ones that have expired."""

from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cryofleet.access.certificates import _issue


def issue(certificates: Path, name: str, days: float) -> None:
    """A new certificate of the set's authority for a service, in the place of its old one; expired where days < 0."""
    own = certificates / "authority"
    authority = x509.load_pem_x509_certificate((own / "tls.crt").read_bytes())
    key = serialization.load_pem_private_key((own / "tls.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    now = datetime.now(UTC)
    end = now + timedelta(days=days)
    _issue(certificates / name, name, [name, "127.0.0.1"], True, authority, key, min(now, end - timedelta(days=1)), end)


def tls_variables(certificates: Path, name: str) -> dict[str, str]:
    """The settings of a process that shows this certificate."""
    own = certificates / name
    files = {"CERTIFICATE": "tls.crt", "KEY": "tls.key", "AUTHORITY": "ca.crt"}
    return {f"TLS_{variable}": str(own / file) for variable, file in files.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
