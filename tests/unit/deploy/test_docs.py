"""docs/kubernetes.md says what the manifests do, and its commands make the Secrets that they use."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.unit.deploy.manifests import (
    OVERLAYS,
    REPOSITORY,
    Resource,
    environment,
    load,
    of_kind,
    one,
    pods,
    quantity,
    tool,
)

PAGE = (REPOSITORY / "docs" / "kubernetes.md").read_text()


def _secrets_used(resources: list[Resource]) -> dict[str, set[str]]:
    """The Secrets that no Certificate makes, and their keys."""
    made = {each["spec"]["secretName"] for each in of_kind(resources, "Certificate")}
    used: dict[str, set[str]] = {}
    for pod in pods(resources):
        for container in pod.containers:
            for variable in container.get("env", []):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    used.setdefault(reference["name"], set()).add(reference["key"])
            mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
            for volume in pod.spec["volumes"]:
                if (secret := volume.get("secret")) and secret["secretName"] not in made:
                    keys = {item["key"] for item in secret.get("items", [])}
                    if not keys:  # all of them; one is named as the file that a setting names, if there is but one
                        files = [Path(str(v.get("value"))) for v in container["env"]]
                        keys = {path.name for path in files if path.parent == mounts[volume["name"]]}
                    used.setdefault(secret["secretName"], set()).update(keys)
    return used


def _run_commands(block: str, folder: Path) -> dict[str, dict[str, str]]:
    """The Secrets that a block of commands makes; kubectl prints them instead of sending them anywhere."""
    (folder / "tokens.jsonl").touch()
    (folder / "database-ca.crt").touch()
    (folder / "kubectl").write_text(
        f'#!/bin/sh\n[ "$1" = apply ] && exit\nexec {tool("kubectl")} "$@" --dry-run=client -o yaml\n'
    )
    (folder / "kubectl").chmod(0o700)
    given = {f"DATABASE_{name}": "given" for name in ("USER", "PASSWORD", "HOST", "NAME")}
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "S3_ACCESS_KEY": "a", "S3_SECRET_KEY": "b", **given}
    command = ["bash", "-euc", block]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = [
        each for each in yaml.safe_load_all(re.sub(r"^apiVersion", "---\napiVersion", done.stdout, flags=re.M)) if each
    ]
    assert {each["metadata"]["namespace"] for each in found} == {"cryofleet"}
    return {each["metadata"]["name"]: each["data"] for each in found}


@pytest.mark.parametrize(("number", "overlays"), [(0, ["single-node"]), (1, ["facility", "gpu"])])
def test_commands_make_the_secrets_that_are_used(number: int, overlays: list[str], tmp_path: Path) -> None:
    blocks = [block for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) if "create secret" in block]
    made = _run_commands(blocks[number], tmp_path)
    for overlay in overlays:
        assert _secrets_used(load(overlay)) == {name: set(keys) for name, keys in made.items()}


def test_file_in_the_url_of_the_database_is_mounted() -> None:
    for overlay in OVERLAYS:
        container = one(load(overlay), "StatefulSet/orchestrator")["spec"]["template"]["spec"]["containers"][0]
        mounted = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
        files = re.findall(r"sslrootcert=(/[^\s\"]+)", PAGE)
        assert len(files) == 2
        path = Path(files[0] if overlay == "single-node" else files[1])
        assert path.parent in mounted, overlay


def test_sizes_are_those_of_the_page() -> None:
    rows = re.findall(r"^\| ([a-z, -]+) \| (\d) × (\d) \| (\d+) GiB \| (\d+) GiB \| (\d+) GiB \|", PAGE, re.MULTILINE)
    said = {
        name: tuple(map(int, (slots, threads, granted, limit, scratch)))
        for names, slots, threads, granted, limit, scratch in rows
        for name in names.split(", ")
    }
    found = {}
    resources = load("gpu")
    for pod in pods(of_kind(resources, "Deployment")):
        (container,) = pod.containers
        values = environment(container, resources)
        scratch = next(volume["emptyDir"] for volume in pod.spec["volumes"] if volume["name"] == "scratch")
        found[pod.labels["app.kubernetes.io/name"]] = (
            int(values["CRYOFLEET_SLOTS"]),
            int(values["CRYOFLEET_THREADS"]),
            int(values["CRYOFLEET_MEMORY_BYTES"]) // 2**30,
            int(quantity(container["resources"]["limits"]["memory"])) // 2**30,
            int(quantity(scratch["sizeLimit"])) // 2**30,
        )
    assert found == said


def test_times_are_those_of_the_page() -> None:
    rows = re.findall(r"^\| ([a-z, ]+) \| (?:\d+ s)? ?\| (\d+) s \| (\d+) s \|", PAGE, re.MULTILINE)
    said = {name: (int(drain), int(grace)) for names, drain, grace in rows for name in names.split(", ")}
    resources = load("facility")
    found = {
        pod.labels["app.kubernetes.io/name"]: (
            int(environment(pod.containers[0], resources)["CRYOFLEET_DRAIN_SECONDS"]),
            pod.spec["terminationGracePeriodSeconds"],
        )
        for pod in pods(resources)
    }
    assert found == said


def test_small_site_fits_on_its_machine() -> None:
    requests = [
        container["resources"]["requests"]
        for pod in pods(of_kind(load("single-node"), "Deployment", "StatefulSet"))
        for container in pod.containers
    ]
    memory = sum(quantity(request["memory"]) for request in requests) / 2**30
    assert f"{memory:.0f} GiB in all" in PAGE
    assert memory < 28  # of 32 GiB: the rest is for Kubernetes itself
    assert sum(quantity(request["cpu"]) for request in requests) < 7  # of 8 cores


def test_alerts_are_those_of_the_page() -> None:
    said = dict(re.findall(r"^\| (Cryofleet\w+) \| (\w+) \|", PAGE, re.MULTILINE))
    groups = one(load("facility"), "PrometheusRule/cryofleet")["spec"]["groups"]
    rules = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert {rule["alert"]: rule["labels"]["severity"] for rule in rules} == said


def test_scaling_is_that_of_the_page() -> None:
    bounds = {each["metadata"]["name"]: each["spec"] for each in of_kind(load("gpu"), "ScaledObject")}
    for kind, least in (("CPU", 1), ("GPU", 0)):
        (row,) = re.findall(rf"^\| {kind} \| {least} \| (.*?) \| (\d+) minutes \|", PAGE, re.MULTILINE)
        for most, names in re.findall(r"(\d+) \(([a-z, ]+)\)", row[0]):
            for name in names.split(", "):
                spec = bounds.pop(name + ("-gpu" if kind == "GPU" else ""))
                assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (least, int(most))
                assert spec["cooldownPeriod"] == 60 * int(row[1])
    assert not bounds
