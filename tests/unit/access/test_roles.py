"""The table of roles against the contract."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from google.protobuf.descriptor import MethodDescriptor

import cryofleet.v1
from cryofleet.access.caller import CERTIFICATE, TOKEN, Caller
from cryofleet.access.roles import RULES, Role, rule_of
from cryofleet.errors import InvalidArgument, PermissionDenied
from cryofleet.v1 import options_pb2


def contract() -> dict[str, MethodDescriptor]:
    """All methods of the contract by the names that gRPC gives them."""
    found = {}
    for path in Path(cryofleet.v1.__path__[0]).glob("*_pb2.py"):
        descriptor = importlib.import_module(f"cryofleet.v1.{path.stem}").DESCRIPTOR
        for service in descriptor.services_by_name.values():
            for method in service.methods:
                found[f"/{service.full_name}/{method.name}"] = method
    return found


def test_every_method_of_the_contract_has_a_rule() -> None:
    methods = contract()
    assert len(methods) > 50
    without = [name for name in methods if rule_of(name) is None]
    assert not without, "say in cryofleet/access/roles.py who may call it"


def test_the_table_names_no_method_that_is_not_there() -> None:
    methods = contract()
    plain = {name for name, m in methods.items() if not m.GetOptions().HasExtension(options_pb2.operation)}
    assert {"/" + name for name in RULES if name.startswith("cryofleet.")} == plain


def test_an_unknown_method_has_no_rule() -> None:
    assert rule_of("/cryofleet.v1.IoService/Uploads") is None
    assert rule_of("/cryofleet.v1.IoService") is None
    assert rule_of("") is None


def test_nobody_is_asked_for_health_alone() -> None:
    anonymous = [name for name, rule in RULES.items() if rule.role is None]
    assert anonymous == ["grpc.health.v1.Health"]


@pytest.mark.parametrize(
    ("method", "least"),
    [
        ("OrchestratorService/GetRun", Role.VIEWER),
        ("OrchestratorService/WatchRun", Role.VIEWER),
        ("OrchestratorService/ListRuns", Role.VIEWER),
        ("IoService/Download", Role.VIEWER),
        ("OrchestratorService/SubmitRun", Role.OPERATOR),
        ("OrchestratorService/CancelRun", Role.OPERATOR),
        ("IoService/Upload", Role.OPERATOR),
        ("PickingService/Extract", Role.OPERATOR),
        ("OrchestratorService/CollectGarbage", Role.ADMIN),
    ],
)
def test_each_role_may_do_what_those_below_it_may(method: str, least: Role) -> None:
    name = f"/cryofleet.v1.{method}"
    rule = rule_of(name)
    assert rule is not None
    for role in Role:
        caller = Caller("ana", role, frozenset(), TOKEN)
        if role >= least:
            caller.check_role(name, rule)
        else:
            with pytest.raises(PermissionDenied, match=f"takes the role {least.word}; ana is {role.word}"):
                caller.check_role(name, rule)


def test_a_certificate_alone_does_what_the_orchestrator_does_and_no_more() -> None:
    platform = Caller("orchestrator", Role.OPERATOR, None, CERTIFICATE)
    allowed = set()
    for name in contract():
        rule = rule_of(name)
        assert rule is not None
        try:
            platform.check_role(name, rule)
        except PermissionDenied:
            continue
        allowed.add(name)
    operations = {n for n, m in contract().items() if m.GetOptions().HasExtension(options_pb2.operation)}
    runtime = {f"/cryofleet.v1.RuntimeService/{method}" for method in ("GetCapacity", "Estimate", "GetLog")}
    assert allowed == operations | runtime | {"/cryofleet.v1.OrchestratorService/GetPools"}


def test_a_role_by_its_word() -> None:
    assert Role.of("operator") is Role.OPERATOR
    with pytest.raises(InvalidArgument, match="one of viewer, operator, admin"):
        Role.of("root")
