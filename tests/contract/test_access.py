"""Access to an instance over TCP with TLS: who is let in, what they may do, what is theirs, and what is recorded."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from cryofleet.access.certificates import _issue, make_set
from cryofleet.access.roles import Role
from cryofleet.access.tokens import new_entry
from cryofleet.artifacts import digest_of
from cryofleet.channels import MESSAGE_LIMIT_BYTES, REASON_TOO_LARGE, open_channel, reason_of
from cryofleet.errors import FailedPrecondition
from cryofleet.server import Server
from cryofleet.settings import Settings, TlsFiles
from cryofleet.storage import Store
from cryofleet.testing import call_operation, instance_process, settings_for
from cryofleet.v1 import common_pb2, io_pb2, io_pb2_grpc, runtime_pb2, runtime_pb2_grpc
from cryofleet.volumes import VolumeInfo, encode_volume
from services.io.service import service as io_service
from tests.unit.access.keys import Provider

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_set(folder)
    return folder


def tls_of(certificates: Path, name: str) -> TlsFiles:
    own = certificates / name
    return TlsFiles(own / "tls.crt", own / "tls.key", own / "ca.crt")


class Site:
    """An io instance on TCP that takes tokens, static ones and a provider's."""

    def __init__(self, folder: Path, certificates: Path) -> None:
        self.certificates = certificates
        self.provider = Provider()
        self.tokens_file = folder / "tokens"
        self.tokens_file.touch()
        self.audit_file = folder / "audit.log"
        self.settings = settings_for(
            folder,
            address="localhost:0",
            tls=tls_of(certificates, "io"),
            tokens=self.tokens_file,
            oidc=self.provider.settings(folder),
            audit=str(self.audit_file),
            read_only_roots=(f"file://{folder}/raw",),
        )
        self.store = Store.open(self.settings)
        self.tokens = {
            name: self.add(name, role, projects)
            for name, role, projects in (
                ("vera", Role.VIEWER, ["apo"]),
                ("ana", Role.OPERATOR, ["apo", "default"]),
                ("rita", Role.ADMIN, ["*"]),
            )
        }
        self.address = ""

    def add(self, user: str, role: Role, projects: list[str]) -> str:
        token, entry = new_entry(user, role, projects)
        with self.tokens_file.open("a") as file:
            file.write(entry.to_line() + "\n")
        return token

    def channel(self, user: str = "", token: str = "", certificate: str = "client") -> grpc.aio.Channel:
        """With the token of a user, with another, or with none."""
        sent = self.tokens[user] if user else token
        return open_channel(
            self.address, tls_of(self.certificates, certificate), token=(lambda: sent) if sent else None
        )

    def put(self, project: str, name: str, data: bytes) -> str:
        uri = f"{self.store.root}/{project}/files/{name}"
        self.store.put(uri, data)
        return uri

    def audited(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit_file.read_text().splitlines()]


@pytest.fixture
async def site(tmp_path: Path, certificates: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path, certificates)
    server = Server(io_service, made.settings)
    await server.start()
    made.address = server.address
    try:
        yield made
    finally:
        await server.stop()


@contextlib.contextmanager
def refused(status: grpc.StatusCode, words: str = "") -> Iterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert caught.value.code() is status, caught.value.details()
    assert words in (caught.value.details() or "")


async def download(
    channel: grpc.aio.Channel, uri: str, project: str = "apo", offset: int = 0, length: int = 0
) -> bytes:
    stub: Any = io_pb2_grpc.IoServiceStub(channel)
    request = io_pb2.DownloadRequest(
        context=common_pb2.Context(project=project), uri=uri, offset_bytes=offset, length_bytes=length
    )
    return b"".join([answer.chunk async for answer in stub.Download(request, timeout=20)])


async def listed(channel: grpc.aio.Channel, uri: str, project: str = "apo") -> list[str]:
    stub: Any = io_pb2_grpc.IoServiceStub(channel)
    request = io_pb2.ListRequest(context=common_pb2.Context(project=project), uri=uri)
    return [answer.uri async for answer in stub.List(request, timeout=20)]


async def upload(channel: grpc.aio.Channel, data: bytes, project: str = "apo", name: str = "a.bin") -> str:
    stub: Any = io_pb2_grpc.IoServiceStub(channel)
    header = io_pb2.UploadHeader(
        context=common_pb2.Context(project=project), name=name, size_bytes=len(data), digest=digest_of(data)
    )
    parts = [io_pb2.UploadRequest(header=header), io_pb2.UploadRequest(chunk=data)]
    return str((await stub.Upload(iter(parts), timeout=20)).uri)


async def capacity(channel: grpc.aio.Channel, timeout: float = 20.0) -> runtime_pb2.GetCapacityResponse:
    stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
    answer: runtime_pb2.GetCapacityResponse = await stub.GetCapacity(runtime_pb2.GetCapacityRequest(), timeout=timeout)
    return answer


# --- Who is let in -------------------------------------------------------------------------------------------------


async def test_who_has_no_token_that_is_taken(site: Site) -> None:
    uri = site.put("apo", "t.bin", b"1234")
    for token, words in (
        ("", "a token is needed"),
        ("cryofleet_wrong", "not known here"),
        (site.tokens["ana"][:-1], "not known here"),
        (site.provider.token(exp=time.time() - 3600), "it has expired"),
        (site.provider.token(aud="another"), "another audience"),
        (site.provider.token(iss="https://evil.example"), "another issuer"),
        (Provider().token(), "its signature is wrong"),
    ):
        async with site.channel(token=token) as channel:
            with refused(Code.UNAUTHENTICATED, words):
                await download(channel, uri)
            with refused(Code.UNAUTHENTICATED, words):
                await capacity(channel)
            with refused(Code.UNAUTHENTICATED, words):
                await upload(channel, b"1234")
            with refused(Code.UNAUTHENTICATED, words):
                await call_operation(channel, runtime_pb2.SelfTestRequest())
    lines = site.audited()
    assert len(lines) == 28
    assert {(line["status"], line["authenticated"], line["certificate"]) for line in lines} == {
        ("UNAUTHENTICATED", "none", "client")
    }
    assert lines[0]["method"] == "cryofleet.v1.IoService/Download"
    assert lines[0]["refused"].startswith("a token is needed")
    assert lines[0]["peer"].startswith("ipv")


async def test_health_is_told_without_a_token_and_nothing_else(site: Site) -> None:
    async with site.channel() as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        ask = channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        with refused(Code.UNAUTHENTICATED):
            [each async for each in ask(iter(asked), timeout=20)]


async def test_tokens_of_both_kinds(site: Site) -> None:
    uri = site.put("apo", "t.bin", b"1234")
    for token in (site.tokens["vera"], site.provider.token()):
        async with site.channel(token=token) as channel:
            assert await download(channel, uri) == b"1234"
    first, second = site.audited()
    assert (first["user"], first["role"], first["authenticated"]) == ("vera", "viewer", "token")
    assert (second["user"], second["role"], second["authenticated"]) == ("ana", "operator", "oidc")
    assert (first["project"], first["status"]) == ("apo", "OK")


async def test_a_token_that_is_added_is_taken_and_one_taken_out_is_not(site: Site) -> None:
    uri = site.put("apo", "t.bin", b"1234")
    late = site.add("lea", Role.VIEWER, ["apo"])
    async with site.channel(token=late) as channel:
        assert await download(channel, uri) == b"1234"
        kept = [line for line in site.tokens_file.read_text().splitlines() if '"lea"' not in line]
        site.tokens_file.write_text("\n".join(kept))
        with refused(Code.UNAUTHENTICATED, "not known here"):
            await download(channel, uri)


async def test_connections_without_a_certificate_of_the_authority(site: Site, tmp_path: Path) -> None:
    make_set(tmp_path / "strangers")
    strangers = tls_of(tmp_path / "strangers", "orchestrator")
    ours = tls_of(site.certificates, "client")
    foreign = TlsFiles(strangers.certificate, strangers.key, ours.authority)
    token = site.tokens["rita"]
    async with open_channel(site.address, foreign, token=lambda: token) as channel:
        with refused(Code.UNAVAILABLE):
            await capacity(channel)
    anonymous = grpc.ssl_channel_credentials(ours.authority.read_bytes())
    async with grpc.aio.secure_channel(site.address, anonymous) as channel:
        with refused(Code.UNAVAILABLE):
            await capacity(channel)
    async with grpc.aio.insecure_channel(site.address) as channel:
        with refused(Code.UNAVAILABLE):
            await capacity(channel)
    # A server of another authority gets neither the call nor the token.
    async with open_channel(site.address, strangers, token=lambda: token) as channel:
        with refused(Code.UNAVAILABLE):
            await capacity(channel)
    assert not site.audited(), "none of them got so far as to call"


async def test_a_certificate_that_has_expired(site: Site, tmp_path: Path) -> None:
    own = site.certificates / "authority"
    authority = x509.load_pem_x509_certificate((own / "tls.crt").read_bytes())
    key = serialization.load_pem_private_key((own / "tls.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    then = datetime.now(UTC) - timedelta(days=2)
    for end, expected in ((then + timedelta(days=1), Code.UNAVAILABLE), (then + timedelta(days=3), None)):
        folder = tmp_path / str(end.timestamp())
        _issue(folder, "orchestrator", ["orchestrator"], True, authority, key, then, end)
        files = TlsFiles(folder / "tls.crt", folder / "tls.key", folder / "ca.crt")
        async with open_channel(site.address, files) as channel:
            if expected is None:
                assert (await capacity(channel)).service == "io"
            else:
                with refused(expected):
                    await capacity(channel)


async def test_what_the_platforms_own_processes_do(site: Site) -> None:
    uri = site.put("other", "t.bin", b"1234")
    async with site.channel(certificate="orchestrator") as channel:
        assert (await capacity(channel)).service == "io"
        request = runtime_pb2.SelfTestRequest(index=3)
        reply = await call_operation(channel, request, project="other", run_id="run-1", task_key="run-1:1/a")
        assert reply.result.index == 3
        with refused(Code.PERMISSION_DENIED, "takes a user's token"):
            await download(channel, uri, "other")
        with refused(Code.PERMISSION_DENIED, "takes a user's token"):
            await upload(channel, b"1234", "other")
    done, *denied = site.audited()
    assert (done["user"], done["role"], done["authenticated"]) == ("orchestrator", "platform", "certificate")
    assert (done["project"], done["run_id"], done["task_key"]) == ("other", "run-1", "run-1:1/a")
    assert [line["status"] for line in denied] == ["PERMISSION_DENIED"] * 2


async def test_a_client_that_calls_itself_by_a_name_of_the_platform(site: Site) -> None:
    """A name in the call's metadata is no name in a certificate."""
    async with site.channel() as channel:
        stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
        metadata = (("x509_common_name", "orchestrator"), ("x509_subject_alternative_name", "orchestrator"))
        with refused(Code.UNAUTHENTICATED):
            await stub.GetCapacity(runtime_pb2.GetCapacityRequest(), metadata=metadata, timeout=20)


# --- What they may do ----------------------------------------------------------------------------------------------


async def test_a_viewer_reads_and_does_not_work(site: Site) -> None:
    uri = site.put("apo", "t.bin", b"1234")
    async with site.channel("vera") as channel:
        assert await download(channel, uri, offset=1, length=2) == b"23"
        assert await listed(channel, f"{site.store.root}/apo") == [uri]
        assert (await capacity(channel)).service == "io"
        with refused(Code.PERMISSION_DENIED, "IoService/Upload takes the role operator; vera is viewer"):
            await upload(channel, b"1234")
        with refused(Code.PERMISSION_DENIED, "takes the role operator"):
            await call_operation(channel, io_pb2.IngestRequest(source_uri=uri), project="apo")
        with refused(Code.PERMISSION_DENIED, "takes the role operator"):
            await call_operation(channel, runtime_pb2.SelfTestRequest(), project="apo")
    denied = [line for line in site.audited() if line["status"] == "PERMISSION_DENIED"]
    assert [line["user"] for line in denied] == ["vera"] * 3
    assert denied[0]["refused"].startswith("IoService/Upload takes the role operator")


async def test_an_operator_works(site: Site) -> None:
    async with site.channel("ana") as channel:
        uri = await upload(channel, b"1234")
        assert await download(channel, uri) == b"1234"
        reply = await call_operation(channel, runtime_pb2.SelfTestRequest(index=1), project="apo", run_id="by-hand")
        assert reply.result.index == 1
    assert [(line["user"], line["method"].rpartition("/")[2], line["status"]) for line in site.audited()] == [
        ("ana", "Upload", "OK"),
        ("ana", "Download", "OK"),
        ("ana", "SelfTest", "OK"),
    ]


# --- What is theirs ------------------------------------------------------------------------------------------------


async def test_what_others_have_is_refused_whether_it_is_there_or_not(site: Site) -> None:
    theirs = site.put("ribo", "t.bin", b"secret")
    root = site.store.root
    refusals = []
    for user in ("vera", "ana"):
        async with site.channel(user) as channel:
            for uri in (theirs, f"{root}/ribo/files/none.bin", f"{root}/none/t.bin"):
                for project in ("apo", "ribo"):
                    for call in (download, listed):
                        with pytest.raises(grpc.aio.AioRpcError) as caught:
                            await call(channel, uri, project)
                        assert caught.value.code() is Code.PERMISSION_DENIED
                        refusals.append((caught.value.details() or "").replace(uri, "URI"))
                with refused(Code.PERMISSION_DENIED):
                    await download(channel, uri, offset=1, length=1)
            for uri in (f"{root}/ribo", root, f"{root}/"):
                with refused(Code.PERMISSION_DENIED):
                    await listed(channel, uri)
    # What is said does not tell whether it exists.
    assert set(refusals) == {
        f"{user} has no access to {what}" for user in ("vera", "ana") for what in ("URI", "project 'ribo'")
    }
    async with site.channel("rita") as channel:
        assert await download(channel, theirs, "ribo") == b"secret"
    assert {line["status"] for line in site.audited() if line["user"] != "rita"} == {"PERMISSION_DENIED"}


async def test_a_project_that_is_left_out_is_the_default_one(site: Site) -> None:
    uri = site.put("default", "t.bin", b"1234")
    async with site.channel("vera") as channel:
        with refused(Code.PERMISSION_DENIED, "project 'default'"):
            await download(channel, uri, "")
    async with site.channel("ana") as channel:
        assert await download(channel, uri, "") == b"1234"


@pytest.mark.parametrize("user", ["vera", "ana", "rita"])
async def test_nobody_gets_out_of_the_store(site: Site, user: str) -> None:
    site.put("ribo", "t.bin", b"secret")
    (site.settings.home / "outside.txt").write_text("secret")
    root = site.store.root
    async with site.channel(user) as channel:
        for uri in (
            "file:///etc/passwd",
            f"file://{site.settings.home}/outside.txt",
            f"{root}/../outside.txt",
            f"{root}/apo/../ribo/files/t.bin",
            f"{root}/apo/files/../../ribo/files/t.bin",
            f"{root}/apo/%2e%2e/ribo/files/t.bin",
            f"{root}//ribo/files/t.bin",
            f"{root}/apo/./x",
            f"{root}/apo/x\0",
            "file://host/etc/passwd",
            "s3://elsewhere/t.bin",
        ):
            with refused(Code.PERMISSION_DENIED):
                await download(channel, uri)
            with refused(Code.PERMISSION_DENIED):
                await listed(channel, uri)
        for uri in ("/etc/passwd", "../ribo/files/t.bin", "http://localhost/", "store:/ribo/files/t.bin"):
            with refused(Code.INVALID_ARGUMENT):
                await download(channel, uri)


async def test_names_of_uploads_lead_nowhere_else(site: Site) -> None:
    async with site.channel("ana") as channel:
        for name in ("../a.bin", "../../ribo/a.bin", "a/../../b", "/etc/passwd", "..\\a", "a\0b", ""):
            with refused(Code.INVALID_ARGUMENT, "name"):
                await upload(channel, b"1234", name=name)
        for name in ("..", "manifest.json", ".hidden"):
            uri = await upload(channel, b"1234", name=name)
            folder, _, kept = uri.rpartition("/")
            assert folder.startswith(f"{site.store.root}/apo/")
            assert kept not in (name, "", ".", "..")
    assert not (site.settings.home / "store" / "ribo").exists()


async def test_links_within_the_store_lead_nowhere_else(site: Site) -> None:
    site.put("apo", "t.bin", b"1234")
    (site.settings.home / "outside.txt").write_text("secret")
    os.symlink(site.settings.home / "outside.txt", site.settings.home / "store" / "apo" / "files" / "link")
    async with site.channel("ana") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await download(channel, f"{site.store.root}/apo/files/link")
    assert caught.value.code() in (Code.PERMISSION_DENIED, Code.NOT_FOUND)


async def test_an_operation_on_what_others_have(site: Site) -> None:
    theirs, mine = site.put("ribo", "t.mrc", b"secret"), site.put("apo", "t.json", b"{}")
    async with site.channel("ana") as channel:
        for request in (
            io_pb2.IngestRequest(source_uri=theirs),
            io_pb2.ReportRequest(title="x", metrics_uris=[mine, theirs]),
            io_pb2.IngestRequest(source_uri="file:///etc/passwd"),
        ):
            with refused(Code.PERMISSION_DENIED):
                await call_operation(channel, request, project="apo")
            with refused(Code.PERMISSION_DENIED):
                await call_operation(channel, request, project="ribo")
            # What it would need says how large it is, and whether it is there.
            stub: Any = runtime_pb2_grpc.RuntimeServiceStub(channel)
            name = "io." + type(request).__name__.removesuffix("Request")
            for project in ("apo", "ribo"):
                request.context.project = project
                with refused(Code.PERMISSION_DENIED):
                    asked = runtime_pb2.EstimateRequest(operation=name, request=request.SerializeToString())
                    await stub.Estimate(asked, timeout=20)
    assert not list((site.settings.home / "store" / "ribo").glob("*/manifest.json"))


async def test_read_only_roots_are_open_to_all_projects(site: Site) -> None:
    (site.settings.home / "raw").mkdir()
    (site.settings.home / "raw" / "t.bin").write_bytes(b"1234")
    async with site.channel("vera") as channel:
        assert await download(channel, f"file://{site.settings.home}/raw/t.bin") == b"1234"


# --- Limits --------------------------------------------------------------------------------------------------------


async def test_messages_that_are_too_large(site: Site) -> None:
    tls = tls_of(site.certificates, "client")
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(tls.authority.read_bytes(), tls.key.read_bytes(), tls.certificate.read_bytes()),
        grpc.access_token_call_credentials(site.tokens["ana"]),
    )
    # Our clients' own limit is no hindrance to those who mean it.
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.secure_channel(site.address, credentials, options=options) as opened:
        channel: Any = opened
        raw = channel.unary_stream("/cryofleet.v1.IoService/Download")
        stream = channel.stream_unary("/cryofleet.v1.IoService/Upload")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [each async for each in raw(bytes(MESSAGE_LIMIT_BYTES + 1), timeout=20)]
        assert (caught.value.code(), reason_of(caught.value)) == (Code.RESOURCE_EXHAUSTED, REASON_TOO_LARGE)
        with refused(Code.RESOURCE_EXHAUSTED, "are taken"):
            await stream(iter([bytes(MESSAGE_LIMIT_BYTES + 1)]), timeout=20)
        with refused(Code.RESOURCE_EXHAUSTED):
            [each async for each in raw(bytes(3 * MESSAGE_LIMIT_BYTES), timeout=20)]
        with refused(Code.INVALID_ARGUMENT, "not of the method's type"):
            [each async for each in raw(b"\xff\xff", timeout=20)]
    first, second, *_ = site.audited()
    for line in (first, second):
        assert (line["user"], line["status"]) == ("ana", "RESOURCE_EXHAUSTED")
        assert f"{MESSAGE_LIMIT_BYTES + 1} bytes" in line["refused"]


async def test_volumes_that_are_too_large(tmp_path: Path, certificates: Path) -> None:
    most = 4 * 16**3
    site = Site(tmp_path, certificates)
    server = Server(io_service, replace(site.settings, max_volume_bytes=most))
    await server.start()
    site.address = server.address
    try:
        fits, large = (
            site.put(
                "apo",
                f"{side}.mrc",
                encode_volume(
                    np.eye(16, side, dtype=np.float32)[None].repeat(16, 0), VolumeInfo((16, 16, side), 10.0, "dark")
                ),
            )
            for side in (16, 17)
        )
        async with site.channel("ana") as channel:
            for request in (io_pb2.FilterRequest(volume_uri=large), io_pb2.IngestRequest(source_uri=large)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call_operation(channel, request, project="apo")
                assert (caught.value.code(), reason_of(caught.value)) == (Code.RESOURCE_EXHAUSTED, REASON_TOO_LARGE)
                assert f"{4 * 16 * 16 * 17} bytes" in (caught.value.details() or "")
            for request in (io_pb2.FilterRequest(volume_uri=fits), io_pb2.IngestRequest(source_uri=fits)):
                await call_operation(channel, request, project="apo")
            with refused(Code.RESOURCE_EXHAUSTED, "CRYOFLEET_MAX_VOLUME_BYTES"):
                await upload(channel, bytes(most + 2**20 + 1))
            await upload(channel, bytes(2**20))
    finally:
        await server.stop()


# --- What is shown, and what is not ----------------------------------------------------------------------------------


async def test_a_certificate_that_was_renewed_is_shown_without_a_restart(tmp_path: Path) -> None:
    make_set(tmp_path / "set")
    site = Site(tmp_path, tmp_path / "set")
    server = Server(io_service, site.settings)
    await server.start()
    site.address = server.address
    try:
        old = tls_of(site.certificates, "client")
        kept = tmp_path / "old"
        kept.mkdir()
        before = TlsFiles(*(kept / name for name in ("tls.crt", "tls.key", "ca.crt")))
        for name in ("certificate", "key", "authority"):
            getattr(before, name).write_bytes(getattr(old, name).read_bytes())
        async with site.channel("vera") as channel:
            await capacity(channel)
        make_set(tmp_path / "set", replace=True)
        async with site.channel("vera") as channel:
            await capacity(channel)
        # The authority is another one too: what it had made is worth nothing any more.
        token = site.tokens["vera"]
        async with open_channel(site.address, before, token=lambda: token) as channel:
            with refused(Code.UNAVAILABLE):
                await capacity(channel)
    finally:
        await server.stop()


async def test_a_server_that_could_let_anybody_in_does_not_start(site: Site) -> None:
    for changes, words in (
        ({"tls": None}, "without authentication"),
        ({"tokens": site.settings.home / "none"}, "cannot read the tokens"),
        ({"audit": "/none/audit.log"}, "cannot write the audit log"),
    ):
        with pytest.raises(FailedPrecondition, match=words):
            await Server(io_service, replace(site.settings, **changes)).start()
    site.tokens_file.chmod(0o666)
    with pytest.raises(FailedPrecondition, match="may be changed by others"):
        await Server(io_service, site.settings).start()


async def test_over_a_socket_nothing_is_asked_and_no_token_is_sent(site: Site) -> None:
    seen: list[Any] = []

    class Listening(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
        async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
            seen.append(dict(details.invocation_metadata))
            return await continuation(details)

    settings = settings_for(site.settings.home, audit=str(site.audit_file))
    server = Server(io_service, settings)
    make: Any = grpc.aio.server

    def listening(interceptors: list[Any], options: Any) -> grpc.aio.Server:
        made: grpc.aio.Server = make(interceptors=[Listening(), *interceptors], options=options)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpc.aio, "server", listening)
        await server.start()
    try:
        async with open_channel(settings.address, token=lambda: "secret") as channel:
            uri = await upload(channel, b"1234", "any")
            assert await download(channel, uri, "any") == b"1234"
    finally:
        await server.stop()
    assert len(seen) == 2
    assert not [name for metadata in seen for name in metadata if name == "authorization"]
    assert [(line["role"], line["authenticated"]) for line in site.audited()] == [("admin", "socket")] * 2


async def test_no_secret_is_in_logs_errors_or_settings(tmp_path: Path, certificates: Path) -> None:
    """Of a process that is given secrets of all kinds and bad calls of all kinds."""
    site = Site(tmp_path, certificates)
    (tmp_path / "client-token").write_text("SECRET-client-token")
    (tmp_path / "client-token").chmod(0o600)
    secrets = {
        "CRYOFLEET_S3_ACCESS_KEY": "SECRET-access-key",
        "CRYOFLEET_S3_SECRET_KEY": "SECRET-s3-key",
        "CRYOFLEET_DATABASE": "postgresql://user:SECRET-database@localhost/x",
        "CRYOFLEET_TOKEN": "SECRET-token",
        "CRYOFLEET_TOKEN_FILE": str(tmp_path / "client-token"),
        "CRYOFLEET_LOG_LEVEL": "DEBUG",
        "CRYOFLEET_AUDIT": "log",
        "CRYOFLEET_TOKENS": str(site.tokens_file),
    }
    tls = tls_of(certificates, "io")
    secrets |= {
        "CRYOFLEET_TLS_CERTIFICATE": str(tls.certificate),
        "CRYOFLEET_TLS_KEY": str(tls.key),
        "CRYOFLEET_TLS_AUTHORITY": str(tls.authority),
        "CRYOFLEET_OIDC_ISSUER": "https://login.site.example",
        "CRYOFLEET_OIDC_AUDIENCE": "cryofleet",
        "CRYOFLEET_OIDC_JWKS": str(tmp_path / "jwks.json"),
    }
    told = []
    expired, unknown = site.provider.token(exp=1.0), "cryofleet_SECRET-unknown"
    async with instance_process("services.io", replace(site.settings, address="localhost:0"), secrets) as process:
        serving = next(line for line in process.lines if line["message"] == "serving")
        site.address = serving["address"]
        for token in (unknown, expired, site.tokens["vera"], site.tokens["ana"], site.provider.token()):
            async with site.channel(token=token) as channel:
                calls: list[Any] = [
                    download(channel, "file:///etc/passwd"),
                    upload(channel, b"SECRET-body"),
                    listed(channel, f"{site.store.root}/apo"),
                ]
                for call in calls:
                    try:
                        await call
                    except grpc.aio.AioRpcError as error:
                        told.append(f"{error.details()} {error.debug_error_string()}")
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await call_operation(channel, io_pb2.IngestRequest(source_uri="SECRET-body"), project="apo")
        async with grpc.aio.insecure_channel(site.address) as channel:
            with refused(Code.UNAVAILABLE):
                await capacity(channel, 5.0)
        process.process.send_signal(signal.SIGTERM)
        await process.wait()
        lines = process.lines
    audited = [line for line in lines if line.get("event") == "audit"]
    assert {"UNAUTHENTICATED", "PERMISSION_DENIED", "OK"} <= {line["status"] for line in audited}
    assert {line["user"] for line in audited if "user" in line} == {"vera", "ana"}
    hashes = [json.loads(line)["sha256"] for line in site.tokens_file.read_text().splitlines()]
    key = tls.key.read_text().splitlines()[1]
    settings = Settings.from_environment(secrets)
    # gRPC itself writes of connections that never became a call.
    assert any("Handshake failed" in line["message"] for line in lines)
    searched = "\n".join([*(json.dumps(line) for line in lines), *told, repr(settings), str(settings), f"{settings!r}"])
    assert "ana" in searched
    for secret in ("SECRET-access", "SECRET-s3", "SECRET-database", "SECRET-token", "SECRET-client", "SECRET-unknown"):
        assert secret not in searched, secret
    for token in (*site.tokens.values(), expired, expired.rpartition(".")[2], *hashes, key):
        assert token not in searched
    for line in audited:
        assert "SECRET-body" not in json.dumps(line)
