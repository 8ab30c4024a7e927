"""The manifests as kubectl renders them, and how to find one's way in them."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[3]
K8S = REPOSITORY / "deploy" / "k8s"
OVERLAYS = ("single-node", "facility", "gpu")
WORKLOADS = ("Deployment", "StatefulSet")

Resource = dict[str, Any]


def tool(name: str) -> str:
    """A program that `make manifests` installs; MANIFEST_TOOLS names another folder of them."""
    path = Path(os.environ.get("MANIFEST_TOOLS", REPOSITORY / ".venv" / "manifests")) / "bin" / name
    if not path.exists():
        reason = f"{path} is not there: run `make manifests` once, which installs it"
        # A machine without Debian's packages can still run all other tests; where changes are judged none is left out.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return str(path)


@functools.cache
def rendered(overlay: str) -> str:
    """The overlay's YAML."""
    command = [tool("kubectl"), "kustomize", str(K8S / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"kustomize warns: {done.stderr}"
    return str(done.stdout)


@functools.cache
def _parsed(overlay: str) -> list[Resource]:
    return list(yaml.load_all(rendered(overlay), yaml.CSafeLoader))


def load(overlay: str) -> list[Resource]:
    """The overlay's resources, the caller's own to change."""
    return copy.deepcopy(_parsed(overlay))


def name_of(resource: Resource) -> str:
    """As Deployment/io."""
    return f"{resource['kind']}/{resource['metadata']['name']}"


def of_kind(resources: list[Resource], *kinds: str) -> list[Resource]:
    return [resource for resource in resources if resource["kind"] in kinds]


def one(resources: list[Resource], name: str) -> Resource:
    """The resource of a name as Deployment/io."""
    (found,) = [resource for resource in resources if name_of(resource) == name]
    return found


@dataclass
class Pod:
    """A workload's pods."""

    name: str
    """Of the workload, as Deployment/io."""
    labels: dict[str, str]
    spec: dict[str, Any]
    containers: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.containers = [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(resources: list[Resource]) -> Iterator[Pod]:
    """Of all workloads, jobs too."""
    for resource in of_kind(resources, *WORKLOADS, "DaemonSet", "Job"):
        template = resource["spec"]["template"]
        yield Pod(name_of(resource), template["metadata"]["labels"], template["spec"])


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes what has these labels; an empty one takes everything."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", f"only In is understood here: {expression}"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def environment(container: Mapping[str, Any], resources: list[Resource]) -> dict[str, str]:
    """The variables of a container; those from Secrets and the pod's fields stand as `<NAME>`."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found.update(one(resources, f"ConfigMap/{source['configMapRef']['name']}")["data"])
    for variable in container.get("env", []):
        found[variable["name"]] = variable.get("value", f"<{variable['name']}>")
    return found


_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3, "": 1}


def quantity(text: str | int) -> float:
    """A quantity of Kubernetes in cores or bytes."""
    number = str(text).rstrip("KMGTim")
    return float(number) * _UNITS[str(text)[len(number) :]]
