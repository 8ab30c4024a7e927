from __future__ import annotations

import json
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store

from cryofleet.access.certificates import make_set
from cryofleet.cli import cli
from cryofleet.errors import AlreadyExists, InvalidArgument
from cryofleet.settings import SERVICES


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_each_process_has_a_certificate_that_its_peers_take(tmp_path: Path) -> None:
    make_set(tmp_path, ["cryo.site.example", "10.1.2.3"], namespace="em")
    authority = load(tmp_path / "authority" / "tls.crt")
    policy = PolicyBuilder().store(Store([authority])).time(datetime.now(UTC))
    for name in (*SERVICES, "orchestrator"):
        found = load(tmp_path / name / "tls.crt")
        assert load(tmp_path / name / "ca.crt") == authority
        # By the rules of the web's authorities, stricter than gRPC's.
        for host in (name, f"{name}.em", f"{name}.em.svc", f"{name}.em.svc.cluster.local", "cryo.site.example"):
            policy.build_server_verifier(x509.DNSName(host)).verify(found, [])
        policy.build_client_verifier().verify(found, [])
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert {"127.0.0.1", "::1", "10.1.2.3"} == {str(ip) for ip in names.get_values_for_type(x509.IPAddress)}


def test_a_clients_certificate_serves_nobody_and_bears_no_name_of_the_platform(tmp_path: Path) -> None:
    make_set(tmp_path)
    found = load(tmp_path / "client" / "tls.crt")
    uses = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["client"]


def test_keys_belong_to_their_certificates_and_to_their_owner_alone(tmp_path: Path) -> None:
    made = make_set(tmp_path / "set")
    keys = set()
    for each in made:
        path = each.folder / "tls.key"
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        assert key.public_key() == load(each.folder / "tls.crt").public_key()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(each.folder.stat().st_mode) == 0o700
        keys.add(path.read_bytes())
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(each.folder / "tls.crt", path)
    assert len(keys) == len(made) == len(SERVICES) + 3
    assert not list(tmp_path.rglob("*.new"))


def test_an_authority_that_makes_no_authorities(tmp_path: Path) -> None:
    make_set(tmp_path)
    basic = load(tmp_path / "authority" / "tls.crt").extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    own = load(tmp_path / "io" / "tls.crt").extensions.get_extension_for_class(x509.BasicConstraints)
    assert (own.critical, own.value.ca) == (True, False)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    make_set(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "authority" / "tls.crt").unlink()
    with pytest.raises(AlreadyExists, match="--replace"):
        make_set(tmp_path)
    del before[tmp_path / "authority" / "tls.crt"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "io" / "tls.key").chmod(0o644)
    make_set(tmp_path, replace=True)
    for path, content in before.items():
        assert path.read_bytes() != content
    assert stat.S_IMODE((tmp_path / "io" / "tls.key").stat().st_mode) == 0o600


def test_the_command_says_how_long_they_are_valid(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["certificates", str(tmp_path), "--name", "here", "--days", "7", "--json"])
    assert done.exit_code == 0, done.output
    for each in json.loads(done.stdout):
        found = load(Path(each["folder"]) / "tls.crt")
        assert found.not_valid_after_utc == datetime.fromisoformat(each["not_after"])
        assert timedelta(days=6.9) < found.not_valid_after_utc - datetime.now(UTC) <= timedelta(days=7)
    assert "here" in next(each["names"] for each in json.loads(done.stdout) if each["name"] == "orchestrator")


def test_names_and_times_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no name of a host"):
        make_set(tmp_path / "a", ["höst"])
    with pytest.raises(InvalidArgument, match="at least 1"):
        make_set(tmp_path / "b", days=0)
