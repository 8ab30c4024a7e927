"""The component `tracing` lets spans out to the collector, over TLS, and nothing else."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.unit.deploy.invariants import CHECKS, OWN, Check, flows, only_what_is_needed_flows
from tests.unit.deploy.manifests import (
    K8S,
    OVERLAYS,
    Resource,
    environment,
    load,
    of_kind,
    one,
    pods,
    tool,
)


@functools.cache
def _rendered(overlay: str) -> str:
    """The overlay with the component, as a site adds it."""
    with tempfile.TemporaryDirectory() as folder:
        site = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "cryofleet",
            "resources": [os.path.relpath(K8S / "overlays" / overlay, Path(folder).resolve())],
            "components": [os.path.relpath(K8S / "components" / "tracing", Path(folder).resolve())],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(site))
        done = subprocess.run([tool("kubectl"), "kustomize", folder], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def _traced(overlay: str) -> list[Resource]:
    return list(yaml.load_all(_rendered(overlay), yaml.CSafeLoader))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_processes_reach_the_collector_that_they_are_told_of(overlay: str) -> None:
    resources = _traced(overlay)
    (policy,) = [each for each in of_kind(resources, "NetworkPolicy") if each["metadata"]["name"] == "to-collector"]
    assert policy["metadata"]["namespace"] == "cryofleet"
    certificate = one(resources, "Certificate/collector")
    own = set()
    for pod in pods(resources):
        if pod.labels["app.kubernetes.io/component"] not in OWN:
            continue
        own.add(pod.labels["app.kubernetes.io/name"])
        (container,) = pod.containers
        values = environment(container, resources)
        endpoint = urlsplit(values["OTEL_EXPORTER_OTLP_ENDPOINT"])
        assert endpoint.scheme == "https"
        assert endpoint.hostname in certificate["spec"]["dnsNames"]
        assert policy["spec"]["egress"][0]["ports"] == [{"protocol": "TCP", "port": endpoint.port}]
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert str(Path(values["OTEL_EXPORTER_OTLP_CERTIFICATE"]).parent) in mounted
    collector = "namespace observability opentelemetry-collector"
    assert flows(resources) - flows(load(overlay)) == {(name, collector, 4317) for name in own}


@pytest.mark.parametrize("check", [each for each in CHECKS if each is not only_what_is_needed_flows])
def test_it_keeps_the_rules(check: Check) -> None:
    assert list(check(_traced("facility"))) == []


def test_it_fits_the_schemas() -> None:
    resources = _traced("single-node")
    schema = json.loads((Path(__file__).parent / "schemas" / "Certificate.json").read_text())
    jsonschema.Draft7Validator(schema).validate(one(resources, "Certificate/collector"))
    kubernetes_validate.validate(one(resources, "NetworkPolicy/to-collector"), "1.35", strict=True)
