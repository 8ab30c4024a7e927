"""docs/kubernetes.md says what the manifests do; the commands of docs/deploy.md make what they use."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cryofleet.access.certificates import AUTHORITY, CERTIFICATE, KEY, make_set
from cryofleet.access.tokens import digest_of, read_entries
from cryofleet.settings import Settings
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
DEPLOY = (REPOSITORY / "docs" / "deploy.md").read_text().partition("## Kubernetes")[2]


_PEM = (CERTIFICATE, KEY, AUTHORITY)


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


def _stand_in(command: Path, text: str) -> None:
    command.write_text(f"#!/bin/sh\n{text}\n")
    command.chmod(0o700)


def _section(name: str) -> str:
    """The commands of a section of the page that need no cluster, or of which a stand-in takes its place."""
    return "".join(
        re.findall(r"```sh\n(.*?)```", DEPLOY.partition(f"### {name}\n")[2].partition("\n###")[0], re.DOTALL)
    )


def _run_commands(block: str, folder: Path) -> dict[str, dict[str, str]]:
    """The Secrets that a block of commands makes; kubectl prints them instead of sending them anywhere."""
    (folder / "tokens.jsonl").touch()
    (folder / "database-ca.crt").touch()
    _stand_in(folder / "kubectl", f'[ "$1" = apply ] && exit\nexec {tool("kubectl")} "$@" --dry-run=client -o yaml')
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
    blocks = re.findall(r"```sh\n(.*?)```", DEPLOY.partition("### Secrets")[2].partition("\n###")[0], re.DOTALL)
    made = _run_commands(blocks[number], tmp_path)
    for overlay in overlays:
        assert _secrets_used(load(overlay)) == {name: set(keys) for name, keys in made.items()}


def test_every_overlay_is_put_up_from_the_sites_registry(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "deploy", tmp_path / "deploy")
    _stand_in(tmp_path / "kubectl", f'[ "$1 $2" = "apply -k" ] && exec {tool("kubectl")} kustomize "$3"; exit 1')
    script = "REGISTRY=images.example.net\n" + _section("Images") + _section("Up").replace("\n", " && echo ---\n")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    images = {
        container["image"].rpartition("/")[0]
        for each in yaml.safe_load_all(done.stdout)
        if each is not None and each["kind"] in ("Deployment", "StatefulSet")
        for container in each["spec"]["template"]["spec"]["containers"]
        if "/cryofleet-" in container["image"]
    }
    assert images == {"localhost", "images.example.net"}
    assert set(re.findall(r"overlays/([a-z-]+)\n", _section("Up"))) == set(OVERLAYS)


def test_commands_make_a_user_who_can_then_call(tmp_path: Path) -> None:
    make_set(tmp_path / "certificates")
    certificates = tmp_path / "certificates" / "client"
    _stand_in(
        tmp_path / "kubectl",
        'case "$*" in *port-forward*) exec sleep 5;; esac\n'
        '[ "$1 $2 $3 $4 $5 $6" = "-n cryofleet get secret client-tls -o" ] || exit 1\n'
        r'name=$(echo "$7" | sed "s/jsonpath={.data.\([a-z]*\)\\\\\([.a-z]*\)}/\1\2/")' + "\n"
        f'base64 < "{certificates}/$name"',
    )
    for name in ("python3.11", "pip"):
        _stand_in(tmp_path / name, "exit 0")
    cryofleet = Path(sys.executable).parent / "cryofleet"
    _stand_in(tmp_path / "cryofleet", f'[ "$1" = tokens ] && exec {cryofleet} "$@"; env >> called')
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    done = subprocess.run(
        ["bash", "-euc", _section("Users") + _section("A first run") + "kill $(jobs -p)\n"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    entries, problems = read_entries((tmp_path / "tokens.jsonl").read_text().splitlines())
    assert (len(entries), problems) == (1, [])
    token = (tmp_path / "ana.token").read_text().strip()
    assert (entries[0].user, entries[0].digest) == ("ana", digest_of(token))
    called = dict(line.split("=", 1) for line in (tmp_path / "called").read_text().splitlines() if "=" in line)
    settings = Settings.from_environment(called)
    assert settings.tls is not None
    for path, name in zip((settings.tls.certificate, settings.tls.key, settings.tls.authority), _PEM, strict=True):
        assert path.read_text() == (certificates / name).read_text()
    assert settings.token_file == tmp_path / "ana.token"
    assert (settings.orchestrator, settings.pools["io"]) == ("localhost:50051", "localhost:50052")
    for name in ("ana.token", "tls.key"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0


def test_images_are_made_by_targets_that_there_are() -> None:
    block = re.search(r"```\n(REGISTRY=.*?)```", DEPLOY, re.DOTALL)
    assert block is not None
    commands = [line for line in block[1].splitlines() if line.startswith("make ")]
    assert len(commands) == 2
    for command in commands:
        done = subprocess.run(
            ["bash", "-euc", f"REGISTRY=r\n{command.replace('make', 'make -n', 1)}"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "images/build.sh" in done.stdout, done.stderr


def test_file_in_the_url_of_the_database_is_mounted() -> None:
    for overlay in OVERLAYS:
        container = one(load(overlay), "StatefulSet/orchestrator")["spec"]["template"]["spec"]["containers"][0]
        mounted = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
        files = re.findall(r"sslrootcert=(/[^\s\"]+)", DEPLOY)
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
        if pod.labels["app.kubernetes.io/component"] != "service":
            continue
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
