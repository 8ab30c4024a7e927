"""Every resource is one that Kubernetes and the operators take."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.unit.deploy.manifests import OVERLAYS, Resource, load, name_of, one

KUBERNETES = ("1.29", "1.35")
"""The oldest version that the manifests are for, and a newer one."""
_SCHEMAS = Path(__file__).parent / "schemas"


@functools.cache
def _schema(kind: str) -> jsonschema.protocols.Validator:
    schema = json.loads((_SCHEMAS / f"{kind}.json").read_text())
    return jsonschema.Draft7Validator(schema)


@pytest.fixture(autouse=True)
def _read_schemas_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubernetes_validate.utils.schema_contents", _schema_contents)


_schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def _errors(resource: Resource, version: str) -> list[str]:
    if (_SCHEMAS / f"{resource['kind']}.json").exists():
        return [
            f"{name_of(resource)}: {error.json_path}: {error.message}"
            for error in _schema(resource["kind"]).iter_errors(resource)
        ]
    try:
        used = kubernetes_validate.validate(resource, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{name_of(resource)}: {error.message}"]
    assert used == version
    return []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_resources_fit_their_schemas(overlay: str, version: str) -> None:
    assert [error for resource in load(overlay) for error in _errors(resource, version)] == []


def _with(resource: Resource, path: str, value: Any) -> Resource:
    *folders, last = path.split(".")
    inside: Any = resource
    for name in folders:
        inside = inside[int(name) if name.isdigit() else name]
    inside[last] = value
    return resource


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("Deployment/io", "spec.template.spec.containers.0.readinesProbe", {}),
        ("Deployment/io", "spec.template.spec.terminationGracePeriodSeconds", "180"),
        ("NetworkPolicy/dns", "spec.egres", []),
        ("ScaledObject/io", "spec.triggers.0.metadata.targetValue", 4),
        ("ScaledObject/io", "spec.coolDownPeriod", 600),
        ("Certificate/io", "spec.dnsName", ["io"]),
        ("Certificate/io", "spec.usages", ["server authentication"]),
        ("Issuer/cryofleet", "spec.ca", {"secret": "authority"}),
        ("PodMonitor/cryofleet", "spec.podMetricsEndpoints.0.targetport", "metrics"),
        ("PrometheusRule/cryofleet", "spec.groups.0.rules.0.expression", "up"),
    ],
)
def test_misspelt_field_is_refused(name: str, path: str, value: Any) -> None:
    resource = one(load("gpu"), name)
    assert _errors(resource, KUBERNETES[0]) == []
    assert _errors(_with(resource, path, value), KUBERNETES[0])


def test_resources_have_names_of_their_own() -> None:
    for overlay in OVERLAYS:
        names = [name_of(resource) for resource in load(overlay)]
        assert len(names) == len(set(names))
