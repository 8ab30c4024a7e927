"""The command line against a running platform."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cryofleet.errors import NotFound
from tests.platform import Platform, platform_home


def test_ops_show_parameters_units_and_defaults(platform: Platform) -> None:
    operation = platform.json("ops", "picking.DifferenceOfGaussians")[0]
    diameter = next(p for p in operation["parameters"] if p["name"] == "particle_diameter_angstrom")
    assert diameter["unit"] == "Å"
    assert diameter["required"]


def test_status_names_every_service(platform: Platform) -> None:
    pools = platform.json("status")
    assert {pool["name"] for pool in pools} >= {"io", "picking", "alignment", "learning", "simulation"}
    assert all(instance["ready"] for pool in pools for instance in pool["instances"])


def test_doctor_finds_all_well(platform: Platform) -> None:
    findings = platform.json("doctor")
    assert {f["check"] for f in findings} >= {"store", "database", "disk", "service picking", "service orchestrator"}
    assert all(f["ok"] for f in findings)


def test_io_and_the_orchestrator_never_load_torch(platform: Platform) -> None:
    def loaded(name: str) -> bool:
        return "libtorch" in Path(f"/proc/{platform.process_id(name)}/maps").read_text()

    assert not loaded("io")
    assert not loaded("orchestrator")
    assert loaded("learning"), "the check itself works"


def test_put_ls_get(platform: Platform, tmp_path: Path) -> None:
    source = tmp_path / "notes.txt"
    source.write_bytes(b"grid 3, square 7\n" * 1000)
    uri = platform.command("put", str(source)).stdout.strip()
    assert uri.startswith(platform.settings.store)
    assert platform.command("put", str(source)).stdout.strip() == uri, "the same content has the same place"
    listed = platform.json("ls", uri)
    assert [entry["size_bytes"] for entry in listed] in ([len(source.read_bytes())], [str(len(source.read_bytes()))])
    target = tmp_path / "back.txt"
    assert platform.command("get", uri, str(target)).returncode == 0
    assert target.read_bytes() == source.read_bytes()


def test_get_of_nothing(platform: Platform) -> None:
    done = platform.command("get", f"{platform.settings.store}/default/nothing")
    assert done.returncode == 4
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_prints_plain_lines_when_piped(platform: Platform) -> None:
    done = platform.command("run", "self-test")
    assert done.returncode == 0, done.stderr
    assert any("succeeded after" in line for line in done.stderr.splitlines())
    assert "\x1b[" not in done.stderr


def test_runs_show_logs(platform: Platform) -> None:
    run = json.loads(platform.command("run", "self-test", "--detach", "--json").stdout)[0]["id"]
    assert platform.command("watch", run).returncode == 0
    assert platform.json("show", run)["state"] == "RUN_STATE_SUCCEEDED"
    assert run in [r["id"] for r in platform.json("runs")]
    lines = platform.command("logs", run).stdout.splitlines()
    assert "attempt 1 begins" in lines[0]
    assert "attempt 1 ended as succeeded" in lines[-1]


def test_forget(platform: Platform) -> None:
    run = json.loads(platform.command("run", "self-test", "--json").stdout)["id"]
    assert platform.json("forget", run) == {"forgotten": run}
    assert run not in [r["id"] for r in platform.json("runs")]
    done = platform.command("forget", run)
    assert (done.returncode, done.stderr.strip()) == (4, f"error: there is no run '{run}'")
    with platform.client() as client:
        handle = client.run("self-test").wait()
        handle.forget()
        with pytest.raises(NotFound):
            handle.refresh()


def test_estimate_changes_nothing(platform: Platform, scene: dict[str, Any]) -> None:
    before = len(platform.json("runs"))
    done = platform.command("run", "discover", "--tomogram", scene["tomogram"].uri, "--estimate", "--json")
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert steps[0]["operation"] == "io.Ingest"
    assert steps[0]["known"]
    assert len(platform.json("runs")) == before


def test_unknown_pipeline_and_parameter(platform: Platform) -> None:
    done = platform.command("run", "discoverr", "--tomogram", "file:///x")
    assert done.returncode in (2, 4)
    assert "discover" in done.stderr
    done = platform.command("run", "self-test", "--set", "nonsense=3")
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def test_gc_is_a_dry_run_unless_told(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "junk.bin").write_bytes(b"nobody needs this")
    uri = platform.command("put", str(tmp_path / "junk.bin")).stdout.strip()
    an_hour_ago = time.time() - 3600
    for path in Path(uri.removeprefix("file://")).parent.iterdir():
        os.utime(path, (an_hour_ago, an_hour_ago))
    found = platform.json("gc", "--older-than-hours", "0")
    assert any(uri.startswith(g["uri"]) for g in found["results"])
    assert platform.command("get", uri, str(tmp_path / "a")).returncode == 0, "nothing was deleted"
    assert platform.command("pin", uri).returncode == 0
    assert not any(uri.startswith(g["uri"]) for g in platform.json("gc", "--older-than-hours", "0").get("results", []))
    assert platform.command("pin", uri, "--remove").returncode == 0
    platform.json("gc", "--older-than-hours", "0", "--delete")
    assert platform.command("get", uri, str(tmp_path / "b")).returncode == 4


def test_run_starts_the_platform_where_none_is_up() -> None:
    with platform_home() as platform:
        assert platform.command("runs").returncode == 5
        done = platform.command("run", "self-test")
        assert done.returncode == 0, done.stderr
        assert platform.command("up").stdout.startswith("the platform is up already")
        assert platform.command("down").returncode == 0
        assert platform.command("runs").returncode == 5
