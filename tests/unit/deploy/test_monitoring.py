"""Alerts and the dashboard ask for metrics that exist, in expressions that Prometheus takes; alerts fire in time."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cryofleet.server import Server
from cryofleet.settings import Settings
from orchestrator.service import service as orchestrator_service
from tests.unit.deploy.manifests import load, matches, of_kind, one, pods, tool
from tests.unit.orchestrator.fake import short_folder

OTHERS = {
    "up": "Prometheus itself",
    "certmanager_certificate_expiration_timestamp_seconds": "cert-manager",
}
"""Metrics that others export."""
TARGET_LABELS = {"namespace", "pod", "workload", "le", "name"}
"""Labels that Prometheus adds to what a pod exports, by the PodMonitor; `name` is cert-manager's."""


@pytest.fixture
async def exported() -> dict[str, set[str]]:
    """Samples that the processes export, and their labels: an orchestrator has all that a service has, and its own."""
    home = short_folder()
    settings = Settings(
        home=home, store=f"file://{home}/store", address=f"unix:{home}/run/o.sock", database=f"sqlite:///{home}/o.sqlite",
        pools={"io": f"unix:{home}/run/io.sock"},
    )  # fmt: skip
    server = Server(orchestrator_service, settings)
    await server.start()
    try:
        found: dict[str, set[str]] = {}
        for metric in server.instance.metrics.registry._collector_to_names.items():
            collector: Any = metric[0]
            for name in metric[1]:
                found[name] = set(getattr(collector, "_labelnames", ()))
    finally:
        await server.stop()
    return found


def _rules() -> Any:
    return one(load("facility"), "PrometheusRule/cryofleet")["spec"]


def _expressions() -> Iterator[tuple[str, str]]:
    """Where it stands, and the expression."""
    for group in _rules()["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in _dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def _dashboard() -> Any:
    return json.loads(one(load("facility"), "ConfigMap/cryofleet-dashboard")["data"]["cryofleet.json"])


def _metrics(expression: str) -> set[str]:
    words = set(re.findall(r"\b[a-z][a-z0-9_]*_[a-z0-9_]+\b(?!\s*\()", re.sub(r'"[^"]*"', '""', expression)))
    words |= set(re.findall(r"\bup\b", expression))
    return words - {"cryofleet_pool_slots"}


def test_rules_and_dashboard_use_metrics_that_are_exported(exported: dict[str, set[str]]) -> None:
    recorded = {rule["record"] for group in _rules()["groups"] for rule in group["rules"] if "record" in rule}
    used = {}
    for place, expression in _expressions():
        for name in recorded:
            expression = expression.replace(name, "")
        for metric in _metrics(expression):
            used[metric] = place
            assert metric in exported or metric in OTHERS, f"{place}: nobody exports {metric}"
    assert len(used) > 10


def test_every_metric_is_documented(exported: dict[str, set[str]]) -> None:
    documented = {}
    for line in (Path(__file__).parents[3] / "docs" / "operation.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `cryofleet_"):
            labels = set(re.findall(r"`(\w+)`", cells[1]))
            documented.update(dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), labels))
    # Beside each counter, and beside a histogram's own name, the client exports samples of derived names.
    known = {
        name: labels
        for name, labels in exported.items()
        if not name.endswith(("_created", "_bucket", "_sum", "_count"))
    }
    known = {name: labels for name, labels in known.items() if f"{name}_total" not in known}
    assert documented == known


def test_rules_and_dashboard_use_labels_that_there_are(exported: dict[str, set[str]]) -> None:
    for place, expression in _expressions():
        for metric, selectors in re.findall(r"\b([a-z_]+)\{([^}]*)\}", expression):
            labels = set(re.findall(r"(\w+)\s*[=!]~?", re.sub(r'"[^"]*"', '""', selectors)))
            assert labels <= exported.get(metric, set()) | TARGET_LABELS, f"{place}: {metric} has no {labels}"


def test_metrics_that_nobody_exports_would_be_found(exported: dict[str, set[str]]) -> None:
    assert _metrics('sum by (pool) (rate(cryofleet_calls{status="x_y"}[5m])) > up') == {"cryofleet_calls", "up"}
    assert "cryofleet_calls" not in exported or "cryofleet_calls_total" in exported
    assert {"cryofleet_calls_total", "cryofleet_call_seconds_bucket", "cryofleet_pool_tasks"} <= set(exported)


def test_prometheus_takes_the_rules_and_they_fire_when_they_should(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(_rules()))
    shutil.copy(Path(__file__).parent / "rules_test.yaml", tmp_path)
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
        done = subprocess.run([tool("promtool"), *command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    alerts = [rule for group in _rules()["groups"] for rule in group["rules"] if "alert" in rule]
    tests = yaml.safe_load((Path(__file__).parent / "rules_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert {alert["alert"] for alert in alerts} == fired
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert alert["annotations"]["summary"]
        assert alert["annotations"]["description"]


def test_prometheus_takes_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": "panel", "expr": target["expr"].replace("$__rate_interval", "5m").replace("$namespace", "cryofleet")}
        for panel in _dashboard()["panels"]
        for target in panel["targets"]
    ]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    command = [tool("promtool"), "check", "rules", "--lint=none", str(tmp_path / "panels.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pod_monitor_finds_every_instance() -> None:
    for overlay in ("facility", "gpu"):
        resources = load(overlay)
        spec = one(resources, "PodMonitor/cryofleet")["spec"]
        for pod in pods(resources):
            assert matches(spec["selector"], pod.labels), pod.name
            (endpoint,) = spec["podMetricsEndpoints"]
            assert endpoint["port"] in {port["name"] for port in pod.containers[0]["ports"]}
        assert len(of_kind(resources, "PrometheusRule")) == 1
