"""Every overlay keeps the rules of invariants.py, and every rule is broken by what breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.deploy import invariants
from tests.unit.deploy.invariants import CHECKS, Check
from tests.unit.deploy.manifests import OVERLAYS, Resource, load, one

_Change = Callable[[list[Resource]], object]


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_overlay_keeps_rule(overlay: str, check: Check) -> None:
    assert list(check(load(overlay))) == []


def _spec(resources: list[Resource], name: str = "Deployment/picking-gpu") -> Any:
    return one(resources, name)["spec"]["template"]["spec"]


def _container(resources: list[Resource], name: str = "Deployment/picking-gpu") -> Any:
    return _spec(resources, name)["containers"][0]


def _set_variable(resources: list[Resource], name: str, value: str, of: str = "Deployment/picking-gpu") -> None:
    variables = _container(resources, of)["env"]
    variables[:] = [each for each in variables if each["name"] != name] + [{"name": name, "value": value}]


def _drop(resources: list[Resource], name: str) -> None:
    resources.remove(one(resources, name))


def _allow(name: str, direction: str, rule: dict[str, Any]) -> _Change:
    return lambda resources: one(resources, f"NetworkPolicy/{name}")["spec"].setdefault(direction, []).append(rule)


def _port(container: Any, name: str) -> Any:
    return next(port for port in container["ports"] if port["name"] == name)


BREAKS: tuple[tuple[Check, str, _Change], ...] = (
    (invariants.sizes_are_said, "no limits of memory", lambda r: _container(r)["resources"]["limits"].pop("memory")),
    (invariants.sizes_are_said, "no requests of cpu", lambda r: _container(r)["resources"]["requests"].pop("cpu")),
    (
        invariants.sizes_are_said,
        "without sizeLimit",
        lambda r: next(v for v in _spec(r)["volumes"] if "emptyDir" in v)["emptyDir"].clear(),
    ),
    (
        invariants.sizes_are_said,
        "more than its ephemeral-storage",
        lambda r: _container(r)["resources"]["limits"].update({"ephemeral-storage": "1Gi"}),
    ),
    (
        invariants.sizes_are_said,
        "is not requested",
        lambda r: _container(r)["resources"]["requests"].update(memory="1Gi"),
    ),
    (invariants.probes_are_there, "no livenessProbe", lambda r: _container(r).pop("livenessProbe")),
    (
        invariants.probes_are_there,
        "readinessProbe does not ask",
        lambda r: _container(r)["readinessProbe"]["grpc"].update(port=50051),
    ),
    (
        invariants.probes_are_there,
        "less than two minutes",
        lambda r: _container(r)["startupProbe"].update(failureThreshold=3),
    ),
    (invariants.pods_are_restricted, "token", lambda r: _spec(r).pop("automountServiceAccountToken")),
    (invariants.pods_are_restricted, "may run as root", lambda r: _spec(r)["securityContext"].pop("runAsNonRoot")),
    (invariants.pods_are_restricted, "may run as root", lambda r: _spec(r)["securityContext"].update(runAsUser=0)),
    (invariants.pods_are_restricted, "no seccomp", lambda r: _spec(r)["securityContext"].pop("seccompProfile")),
    (invariants.pods_are_restricted, "host's namespaces", lambda r: _spec(r).update(hostNetwork=True)),
    (
        invariants.pods_are_restricted,
        "a kind that is not allowed",
        lambda r: _spec(r)["volumes"].append({"name": "root", "hostPath": {"path": "/"}}),
    ),
    (
        invariants.pods_are_restricted,
        "can be written to",
        lambda r: _container(r)["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    (
        invariants.pods_are_restricted,
        "gain privileges",
        lambda r: _container(r)["securityContext"].pop("allowPrivilegeEscalation"),
    ),
    (invariants.pods_are_restricted, "capabilities", lambda r: _container(r)["securityContext"].pop("capabilities")),
    (invariants.pods_are_restricted, "port of the host", lambda r: _container(r)["ports"][0].update(hostPort=50051)),
    (
        invariants.namespace_is_restricted,
        "enforce is not restricted",
        lambda r: one(r, "Namespace/cryofleet")["metadata"]["labels"].update(
            {"pod-security.kubernetes.io/enforce": "baseline"}
        ),
    ),
    (
        invariants.namespace_is_restricted,
        "not in the namespace",
        lambda r: one(r, "Service/io")["metadata"].update(namespace="default"),
    ),
    (invariants.images_are_exact, "no exact version", lambda r: _container(r).update(image="localhost/cryofleet-io")),
    (
        invariants.images_are_exact,
        "no exact version",
        lambda r: _container(r).update(image="registry:5000/cryofleet-picking:latest"),
    ),
    (
        invariants.images_are_exact,
        "not of this version",
        lambda r: _container(r).update(image="localhost/cryofleet-picking:0.0.1-cuda"),
    ),
    (
        invariants.images_are_exact,
        "runs localhost/cryofleet-io",
        lambda r: _container(r).update(image="localhost/cryofleet-io:0.1.0-cuda"),
    ),
    (
        invariants.images_are_exact,
        "either a GPU",
        lambda r: _container(r).update(image=_container(r)["image"].removesuffix("-cuda")),
    ),
    (
        invariants.memory_suffices,
        "do not fit",
        lambda r: _set_variable(r, "CRYOFLEET_MEMORY_BYTES", str(14 * 2**30)),
    ),
    (
        invariants.memory_suffices,
        "by the machine's",
        lambda r: _set_variable(r, "CRYOFLEET_MEMORY_BYTES", "0"),
    ),
    (invariants.cores_suffice, "other numbers", lambda r: _set_variable(r, "OMP_NUM_THREADS", "64")),
    (invariants.cores_suffice, "threads and", lambda r: _set_variable(r, "CRYOFLEET_SLOTS", "64")),
    (invariants.pods_end_in_time, "drains for", lambda r: _set_variable(r, "CRYOFLEET_DRAIN_SECONDS", "599")),
    (
        invariants.pods_end_in_time,
        "killed before",
        lambda r: _spec(r).update(terminationGracePeriodSeconds=600),
    ),
    (
        invariants.pods_end_in_time,
        "killed before",
        lambda r: _spec(r, "StatefulSet/orchestrator").pop("terminationGracePeriodSeconds"),
    ),
    (invariants.disruption_budgets_are_there, "has 0", lambda r: _drop(r, "PodDisruptionBudget/io")),
    (
        invariants.disruption_budgets_are_there,
        "keeps nodes",
        lambda r: one(r, "PodDisruptionBudget/io")["spec"].update(maxUnavailable=0),
    ),
    (
        invariants.orchestrators_have_names,
        "not the pod's name",
        lambda r: _set_variable(r, "CRYOFLEET_INSTANCE", "orchestrator", "StatefulSet/orchestrator"),
    ),
    (
        invariants.orchestrators_have_names,
        "headless",
        lambda r: one(r, "StatefulSet/orchestrator")["spec"].update(serviceName="orchestrator"),
    ),
    (
        invariants.names_lead_somewhere,
        "pods of 0",
        lambda r: one(r, "Service/io")["spec"]["selector"].update({"app.kubernetes.io/name": "oi"}),
    ),
    (
        invariants.names_lead_somewhere,
        "a port that its pods do not have",
        lambda r: _port(_container(r, "Deployment/io"), "grpc").update(name="http"),
    ),
    (
        invariants.names_lead_somewhere,
        "no headless",
        lambda r: one(r, "Service/io")["spec"].update(clusterIP="10.0.0.9"),
    ),
    (invariants.names_lead_somewhere, "no headless", lambda r: _drop(r, "Service/picking-gpu")),
    (
        invariants.names_lead_somewhere,
        "knows others: ['io']",
        lambda r: _drop(r, "Deployment/io"),
    ),
    (
        invariants.names_lead_somewhere,
        "does not bear",
        lambda r: one(r, "Certificate/io")["spec"].update(dnsNames=["io.example.org"]),
    ),
    (
        invariants.names_lead_somewhere,
        "not a server's",
        lambda r: one(r, "Certificate/io")["spec"].update(usages=["client auth"]),
    ),
    (
        invariants.secrets_are_elsewhere,
        "a Secret in",
        lambda r: r.append({"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "storage"}}),
    ),
    (
        invariants.secrets_are_elsewhere,
        "stands in the manifest",
        lambda r: _set_variable(r, "CRYOFLEET_S3_SECRET_KEY", "hunter2"),
    ),
    (
        invariants.secrets_are_elsewhere,
        "holds a secret",
        lambda r: next(x for x in r if x["kind"] == "ConfigMap")["data"].update(url="postgresql://me:pass@host/db"),
    ),
    (invariants.secrets_are_elsewhere, "nobody makes", lambda r: _drop(r, "Certificate/io")),
    (
        invariants.secrets_are_elsewhere,
        "others may read",
        lambda r: next(v for v in _spec(r)["volumes"] if v["name"] == "tls")["secret"].update(defaultMode=0o444),
    ),
    (invariants.denied_by_default, "no policy denies", lambda r: _drop(r, "NetworkPolicy/default-deny")),
    (
        invariants.only_what_is_needed_flows,
        "picking reaches outside 0.0.0.0/0 on 443",
        _allow("to-storage", "egress", {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"port": 443}]}),
    ),
    (
        invariants.only_what_is_needed_flows,
        "outside reaches io on 8081",
        _allow("clients", "ingress", {}),
    ),
    (
        invariants.only_what_is_needed_flows,
        "orchestrator does not reach picking-gpu on 50051",
        lambda r: _drop(r, "NetworkPolicy/services-from-orchestrator"),
    ),
    (
        invariants.only_what_is_needed_flows,
        "keda-operator does not reach orchestrator",
        lambda r: _drop(r, "NetworkPolicy/scaling"),
    ),
    (invariants.pools_are_scaled, "without a ScaledObject", lambda r: _drop(r, "ScaledObject/io")),
    (
        invariants.pools_are_scaled,
        "down to zero after ten minutes",
        lambda r: one(r, "ScaledObject/picking-gpu")["spec"].update(cooldownPeriod=60),
    ),
    (
        invariants.pools_are_scaled,
        "every run begins with",
        lambda r: one(r, "ScaledObject/io")["spec"].update(minReplicaCount=0),
    ),
    (
        invariants.pools_are_scaled,
        "its target is 5",
        lambda r: one(r, "ScaledObject/io")["spec"]["triggers"][0]["metadata"].update(targetValue="5"),
    ),
    (
        invariants.pools_are_scaled,
        "is scaled by pools.picking.all",
        lambda r: one(r, "ScaledObject/picking")["spec"]["triggers"][0]["metadata"].update(
            valueLocation="pools.picking.all"
        ),
    ),
    (
        invariants.pools_are_scaled,
        "would undo its scaling",
        lambda r: one(r, "Deployment/io")["spec"].update(replicas=0),
    ),
    (
        invariants.pools_have_nodes,
        "asks for",
        lambda r: _container(r)["resources"]["limits"].pop("nvidia.com/gpu"),
    ),
    (invariants.pools_have_nodes, "not kept to the nodes", lambda r: _spec(r).pop("nodeSelector")),
    (invariants.pools_have_nodes, "taint of its pool", lambda r: _spec(r).pop("tolerations")),
    (
        invariants.names_lead_somewhere,
        "leads to viewer",
        lambda r: one(r, "Service/viewer")["spec"]["ports"][0].update(name="https"),
    ),
    (
        invariants.only_what_is_needed_flows,
        "viewer reaches outside 192.0.2.16/28 on 443",
        lambda r: one(r, "NetworkPolicy/to-storage")["spec"]["podSelector"]["matchExpressions"][0]["values"].append(
            "page"
        ),
    ),
    (
        invariants.only_what_is_needed_flows,
        "namespace true does not reach viewer on 8443",
        lambda r: _drop(r, "NetworkPolicy/visitors"),
    ),
    (
        invariants.the_page_has_no_rights,
        "is given CRYOFLEET_S3_SECRET_KEY",
        lambda r: _set_variable(r, "CRYOFLEET_S3_SECRET_KEY", "key", "Deployment/viewer"),
    ),
    (
        invariants.the_page_has_no_rights,
        "stands for the platform",
        lambda r: one(r, "Certificate/viewer")["spec"]["dnsNames"].append("io"),
    ),
    (
        invariants.the_page_has_no_rights,
        "another may be asked",
        lambda r: one(r, "Deployment/viewer")["spec"].update(replicas=2),
    ),
    (
        invariants.the_page_has_no_rights,
        "which it does not take",
        lambda r: _set_variable(r, "CRYOFLEET_PAGE_ORIGINS", "localhost:8443", "Deployment/viewer"),
    ),
    (
        invariants.the_page_has_no_rights,
        "Deployment/picking: does not know",
        lambda r: _container(r, "Deployment/picking")["env"].remove(
            {"name": "CRYOFLEET_TOKENS", "value": "/etc/cryofleet/tokens/tokens"}
        ),
    ),
)


@pytest.mark.parametrize(
    ("check", "expected", "change"), BREAKS, ids=[f"{check.__name__}-{text}" for check, text, _ in BREAKS]
)
def test_rule_is_broken_by(check: Check, expected: str, change: _Change) -> None:
    resources = load("gpu")
    change(resources)
    assert [problem for problem in check(resources) if expected in problem]


def test_every_rule_can_be_broken() -> None:
    assert {check for check, _, _ in BREAKS} == set(CHECKS)
