"""What a request names, and whose it is."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import Message

from cryofleet.access.caller import TOKEN, Caller, calling, current_caller
from cryofleet.access.projects import check_request, projects_of, uris_of
from cryofleet.access.roles import Role
from cryofleet.errors import Failure, InvalidArgument, PermissionDenied
from cryofleet.operations import operations
from cryofleet.settings import S3Settings
from cryofleet.storage import Store
from cryofleet.v1 import io_pb2, orchestrator_pb2, picking_pb2
from cryofleet.v1.common_pb2 import Context

ROOT = "file:///data/store"
STORE = Store(ROOT, ("file:///data/raw",))
ANA = Caller("ana", Role.OPERATOR, frozenset({"apo", "default"}), TOKEN)
EVERYBODY = Caller("eve", Role.ADMIN, None, TOKEN)


def submit(**arguments: Any) -> orchestrator_pb2.SubmitRunRequest:
    request = orchestrator_pb2.SubmitRunRequest(project="apo")
    request.arguments.update(arguments)
    return request


def refused(request: Message, every_project: bool = False) -> bool:
    try:
        check_request(ANA, request, STORE, every_project)
    except PermissionDenied:
        return True
    return False


def test_every_operation_names_a_project_and_its_inputs() -> None:
    """For each operation, a URI of another project is noticed in each field that holds one."""
    for operation in operations().values():
        request: Any = operation.request_class()
        assert list(projects_of(request)) == [""], operation.name
        for parameter in operation.parameters:
            if not parameter.is_artifact:
                continue
            request = operation.request_class()
            request.context.project = "apo"
            for project, expected in (("apo", False), ("other", True)):
                uri = f"{ROOT}/{project}/x"
                if parameter.repeated:
                    del getattr(request, parameter.name)[:]
                    getattr(request, parameter.name).extend([f"{ROOT}/apo/fine", uri])
                else:
                    setattr(request, parameter.name, uri)
                assert refused(request) is expected, f"{operation.name} {parameter.name}"


def test_uris_in_structures_within_a_request() -> None:
    """For each operation that takes a list of structures with URIs in them."""
    found = 0
    for operation in operations().values():
        for outer in operation.parameters:
            for inner in outer.fields if outer.repeated else ():
                if inner.is_artifact:
                    request: Any = operation.request_class()
                    setattr(getattr(request, outer.name).add(), inner.name, f"{ROOT}/other/x")
                    assert list(uris_of(request)) == [f"{ROOT}/other/x"]
                    assert refused(request)
                    found += 1
    assert found


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f"{ROOT}/apo/x", False),
        (f"{ROOT}/other/x", True),
        ([f"{ROOT}/apo/x", [f"{ROOT}/other/x"]], True),
        ({"a": {"b": f"{ROOT}/other/x"}}, True),
        ("a text that speaks of s3://other/x", False),
        ("file:///etc/passwd", True),
        ("s3://elsewhere/x", True),
        (f"{ROOT}/apo/../other/x", True),
        ("file:///data/raw/t.mrc", False),
        (3.5, False),
    ],
)
def test_uris_among_a_runs_arguments(value: Any, expected: bool) -> None:
    assert refused(submit(value=value)) is expected


@pytest.mark.parametrize(
    "uri",
    [
        f"{ROOT}/other/x",
        f"{ROOT}/other",
        f"{ROOT}/apo2/x",
        ROOT,
        f"{ROOT}/",
        "file:///data",
        "file:///etc/passwd",
        f"{ROOT}/apo/../other/x",
        f"{ROOT}/apo/%2e%2e/other/x",
        f"{ROOT}//other/x",
        f"{ROOT}/apo/./x",
        "file://host/data/store/apo/x",
    ],
)
def test_what_is_not_the_callers(uri: str) -> None:
    assert refused(io_pb2.DownloadRequest(context=Context(project="apo"), uri=uri))
    assert refused(orchestrator_pb2.PinArtifactRequest(uri=uri))


def test_a_store_in_a_bucket() -> None:
    store = Store("s3://bucket/cryofleet", (), S3Settings())
    check_request(ANA, io_pb2.DownloadRequest(uri="s3://bucket/cryofleet/apo/x"), store)
    for uri in ("s3://bucket/cryofleet/other/x", "s3://bucket/apo/x", "s3://bucket2/cryofleet/apo/x", "s3://bucket"):
        with pytest.raises(PermissionDenied):
            check_request(ANA, io_pb2.DownloadRequest(uri=uri), store)


def test_no_uri_at_all_is_the_callers_mistake() -> None:
    with pytest.raises(InvalidArgument):
        check_request(ANA, io_pb2.DownloadRequest(uri="/etc/passwd"), STORE)


def test_the_callers_own_and_what_is_open_to_all() -> None:
    for uri in (f"{ROOT}/apo", f"{ROOT}/apo/x/y", f"{ROOT}/default/x", "file:///data/raw/t.mrc"):
        check_request(ANA, io_pb2.DownloadRequest(uri=uri), STORE)


def test_a_project_that_is_left_out_is_the_default_one() -> None:
    apo_only = Caller("ben", Role.OPERATOR, frozenset({"apo"}), TOKEN)
    for request in (
        picking_pb2.ExtractRequest(),
        orchestrator_pb2.SubmitRunRequest(),
        io_pb2.UploadRequest(header=io_pb2.UploadHeader(name="x")),
        io_pb2.ListRequest(uri=f"{ROOT}/apo"),
    ):
        with pytest.raises(PermissionDenied, match="no access to project 'default'"):
            check_request(apo_only, request, STORE)
        check_request(ANA, request, STORE)
    check_request(apo_only, io_pb2.UploadRequest(chunk=b"x"), STORE)
    check_request(apo_only, orchestrator_pb2.ListRunsRequest(), STORE, every_project=True)
    with pytest.raises(PermissionDenied):
        check_request(apo_only, orchestrator_pb2.ListRunsRequest(project="other"), STORE, every_project=True)


def test_who_may_use_every_project_is_not_held_up() -> None:
    check_request(EVERYBODY, io_pb2.DownloadRequest(context=Context(project="x"), uri=f"{ROOT}/other/x"), STORE)


def test_the_caller_is_known_only_within_the_call() -> None:
    with calling(ANA):
        assert current_caller() is ANA
    with pytest.raises(Failure, match="nobody is known"):
        current_caller()
