"""A development set of certificates for mutual TLS: an authority of its own, and one certificate for each process.

Laid out as cert-manager's secrets are, so that what runs with these runs with those: a folder for each name with
`tls.crt`, `tls.key` and `ca.crt`.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cryofleet.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from cryofleet.settings import SERVICES

CERTIFICATE, KEY, AUTHORITY = "tls.crt", "tls.key", "ca.crt"
AUTHORITY_FOLDER = "authority"
SERVERS = (*SERVICES, "orchestrator")
CLIENT = "client"
_SKEW = timedelta(minutes=5)
"""Valid since then, for machines whose clocks are slow."""

_Key = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Made:
    """A certificate of the set."""

    name: str
    folder: Path
    names: tuple[str, ...]
    """Its alternative names."""
    not_after: datetime


def make_set(
    folder: Path,
    names: Sequence[str] = (),
    *,
    namespace: str = "cryofleet",
    days: int = 365,
    replace: bool = False,
) -> list[Made]:
    """Makes the set under `folder`; `names` are further hosts or addresses that the servers are reached by.

    A server bears its service's names, in a cluster's `namespace` too, and this machine's; it is a client too, where it
    calls another one. The key of the authority stays in its own folder: who has it can make certificates.

    Raises AlreadyExists where files are there and `replace` is not set; nothing is written then.
    """
    if days < 1:
        raise InvalidArgument(f"days is {days}; it must be at least 1")
    folders = {name: folder / name for name in (AUTHORITY_FOLDER, *SERVERS, CLIENT)}
    there = [
        path for each in folders.values() for file in (CERTIFICATE, KEY, AUTHORITY) if (path := each / file).exists()
    ]
    if there and not replace:
        raise AlreadyExists(f"{there[0]} is there already; --replace makes all certificates of {folder} anew")
    now = datetime.now(UTC).replace(microsecond=0)
    not_after = now + timedelta(days=days)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _authority(authority_key, now, not_after)
    made = [Made(AUTHORITY_FOLDER, folders[AUTHORITY_FOLDER], (), not_after)]
    _write(folders[AUTHORITY_FOLDER], authority, authority, authority_key)
    for server in SERVERS:
        bears = [
            *(f"{server}{ending}" for ending in _endings(namespace)),
            "localhost",
            "127.0.0.1",
            "::1",
            *names,
        ]
        made.append(_issue(folders[server], server, bears, True, authority, authority_key, now, not_after))
    made.append(_issue(folders[CLIENT], CLIENT, [CLIENT], False, authority, authority_key, now, not_after))
    return made


def _endings(namespace: str) -> Iterable[str]:
    """Of the names that Kubernetes gives a Service."""
    return "", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local"


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise InvalidArgument(f"{name!r} is no name of a host; give international names in their ASCII form") from None


def _builder(
    common_name: str, issuer: x509.Name | None, key: _Key, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,  # of RSA; elliptic curves agree on a key instead
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _authority(key: _Key, now: datetime, end: datetime) -> x509.Certificate:
    return (
        _builder("Cryofleet development authority", None, key, now, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _issue(
    folder: Path,
    name: str,
    names: Sequence[str],
    serves: bool,
    authority: x509.Certificate,
    authority_key: _Key,
    now: datetime,
    end: datetime,
) -> Made:
    key = ec.generate_private_key(ec.SECP256R1())
    bears = list(dict.fromkeys(names))
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if serves:
        uses.insert(0, ExtendedKeyUsageOID.SERVER_AUTH)
    certificate = (
        _builder(name, authority.subject, key, now, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(each) for each in bears]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write(folder, certificate, authority, key)
    return Made(name, folder, tuple(bears), end)


def _write(folder: Path, certificate: x509.Certificate, authority: x509.Certificate, key: _Key) -> None:
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content, mode in (
            (KEY, private, 0o600),
            (CERTIFICATE, certificate.public_bytes(pem), 0o644),
            (AUTHORITY, authority.public_bytes(pem), 0o644),
        ):
            temporary = folder / f".{name}.new"
            temporary.unlink(missing_ok=True)
            # Never readable by others, not even before its mode is set.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, mode)
                file.write(content)
            temporary.replace(folder / name)
    except OSError as error:
        raise FailedPrecondition(f"cannot write certificates to {folder}: {error.strerror}") from None
