"""The policy linter finds nothing in the overlays, and would."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.deploy.manifests import K8S, OVERLAYS, load, one, rendered, tool


def _lint(folder: Path) -> list[dict[str, Any]]:
    """The failed checks of all files in a folder."""
    command = [
        tool("checkov"),
        "--config-file",
        str(K8S / "checks" / "checkov.yaml"),
        "--directory",
        str(folder),
        "--output",
        "json",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={"HOME": str(folder), "PATH": "/usr/bin:/bin"}
    )
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["resource_count"] > 0
    failed: list[dict[str, Any]] = report["results"]["failed_checks"]
    return failed


def test_overlays_pass_and_a_weakened_pod_does_not(tmp_path: Path) -> None:
    for overlay in OVERLAYS:
        (tmp_path / f"{overlay}.yaml").write_text(rendered(overlay))
    weakened = one(load("facility"), "Deployment/io")
    weakened["metadata"]["name"] = "weakened"
    weakened["spec"]["template"]["spec"]["hostPID"] = True
    (tmp_path / "weakened.yaml").write_text(yaml.safe_dump(weakened))
    failed = {(check["check_id"], check["resource"]) for check in _lint(tmp_path)}
    assert failed == {("CKV_K8S_17", "Deployment.cryofleet.weakened")}


def test_skipped_checks_have_their_reasons() -> None:
    lines = (K8S / "checks" / "checkov.yaml").read_text().splitlines()
    skipped = [number for number, line in enumerate(lines) if line.lstrip().startswith("- CKV")]
    assert skipped
    for number in skipped:
        assert lines[number - 1].lstrip().startswith("#")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_skips_of_single_resources_have_their_reasons(overlay: str) -> None:
    for resource in load(overlay):
        for name, value in resource["metadata"].get("annotations", {}).items():
            if name.startswith("checkov.io/skip"):
                assert len(value.partition("=")[2].split()) > 3
