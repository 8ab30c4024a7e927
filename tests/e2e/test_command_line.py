"""The command line against a running platform."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import termios
import time
import zipfile
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


def _shown_on_a_terminal(platform: Platform, *words: str, end_with: int) -> tuple[int, str]:
    """Exit code and all that a command wrote to its terminal; it gets the signal once it has shown the pools."""
    leader, follower = os.openpty()
    attributes = termios.tcgetattr(follower)
    environment = {**platform.environment, "TERM": "xterm-256color", "COLUMNS": "200", "LINES": "50"}
    process = subprocess.Popen(
        [sys.executable, "-m", "cryofleet", *words],
        env=environment, stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
        # Tests that a shell runs in the background have SIGINT ignored, and so has all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    shown = b""
    try:
        deadline = time.monotonic() + 60
        told = False
        while time.monotonic() < deadline and (process.poll() is None or select.select([leader], [], [], 0.2)[0]):
            if select.select([leader], [], [], 0.2)[0]:
                shown += os.read(leader, 65536)
            if not told and b"simulation" in shown:
                told = True
                process.send_signal(end_with)
        assert termios.tcgetattr(follower) == attributes
    finally:
        process.kill()
        os.close(follower)
        os.close(leader)
    return process.wait(), shown.decode(errors="replace")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_top_leaves_the_terminal_as_it_was(platform: Platform, number: int, code: int) -> None:
    ended, shown = _shown_on_a_terminal(platform, "top", end_with=number)
    assert ended == code, shown
    assert "simulation" in shown, shown
    assert shown.index("\x1b[?1049h") < shown.index("simulation") < shown.rindex("\x1b[?1049l"), "its own screen, left"
    assert shown.rindex("\x1b[?25l") < shown.rindex("\x1b[?25h"), "the cursor is back"
    assert "Traceback" not in shown


def test_top_prints_once_where_there_is_no_terminal(platform: Platform) -> None:
    run = json.loads(platform.command("run", "self-test", "--set", "seconds=8", "--detach", "--json").stdout)[0]["id"]
    deadline = time.monotonic() + 60
    picture = platform.json("top")
    # How far a run is, is written once a second.
    while not (picture["operations"] and [r for r in picture["runs"] if r["tasks"]]) and time.monotonic() < deadline:
        picture = platform.json("top")
    assert {pool["pool"] for pool in picture["pools"]} >= {"io", "picking", "simulation"}
    assert sum(pool["slots_busy"] for pool in picture["pools"]) >= 1
    assert all(pool["memory_bytes"] > 0 for pool in picture["pools"])
    (line,) = [each for each in picture["runs"] if each["run"] == run]
    assert (line["pipeline"], line["state"]) == ("self-test", "running")
    assert line["tasks"] in (8, 9), "of the steps that have begun"
    assert {each["operation"] for each in picture["operations"] if each["run"] == run} == {"runtime.SelfTest"}
    done = platform.command("top")
    assert done.returncode == 0, done.stderr
    kinds = {words.split("\t")[0] for words in done.stdout.splitlines()}
    assert kinds == {"pool", "run", "operation"}
    assert "\x1b" not in done.stdout
    assert platform.command("cancel", run).returncode == 0


def test_support_bundle_of_a_platform(platform: Platform, tmp_path: Path) -> None:
    pipeline = tmp_path / "failing.yaml"
    pipeline.write_text(
        "name: failing\nsteps:\n  - {id: one, op: runtime.SelfTest, with: {fail_with: NOT_FOUND}}\n"
        "outputs:\n  index: ${one.index}\n"
    )
    failed = platform.command("run", str(pipeline), "--json")
    run = json.loads(failed.stdout)["id"]
    told = platform.json("support-bundle", str(tmp_path / "bundle.zip"))
    assert told["missing"] == {}
    with zipfile.ZipFile(tmp_path / "bundle.zip") as archive:
        parts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert {pool["name"] for pool in json.loads(parts["pools.json"])} >= {"io", "picking"}
    (kept,) = [each for each in json.loads(parts["runs.json"]) if each["id"] == run]
    assert kept["state"] == "failed"
    assert "failed with NOT_FOUND, as asked for" in kept["error"]
    assert {"arguments", "outputs"}.isdisjoint(kept)
    assert all("outputs" not in step for step in kept["steps"])
    assert all(finding["ok"] for finding in json.loads(parts["doctor.json"]))
    assert run in parts["logs/orchestrator.log"]
    assert json.loads(parts["processes.json"])["io"] == platform.process_id("io")
    again = platform.command("support-bundle", str(tmp_path / "bundle.zip"))
    assert (again.returncode, again.stderr.strip()) == (1, f"error: {tmp_path}/bundle.zip exists")


def test_run_starts_the_platform_where_none_is_up() -> None:
    with platform_home() as platform:
        assert platform.command("runs").returncode == 5
        done = platform.command("run", "self-test")
        assert done.returncode == 0, done.stderr
        assert platform.command("up").stdout.startswith("the platform is up already")
        assert platform.command("down").returncode == 0
        assert platform.command("runs").returncode == 5
