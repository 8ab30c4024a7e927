"""A facility's run, simulated: the real orchestrator on a real PostgreSQL, and a cluster that is only modelled.

`python -m benchmarks.platform.simulation [--tomograms 1000] [--rounds 3] [--json]`. Tomograms are prepared, picked, cut
and sorted one by one; all particles together are then averaged in classes over several rounds, each split over tasks.
Time is the loop's, which jumps over what is only waited for: hours of the cluster take minutes, and the orchestrator's
work takes none of it. What that work costs is measured in CPU time, and in what the database counts.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.harness import Row, print_rows
from benchmarks.platform import cluster_model
from benchmarks.platform.cluster_model import SCALED, Cluster, FakeChannel, rows_of
from benchmarks.platform.site import database_counts, folder, postgres, postgres_cpu_seconds
from benchmarks.platform.virtual_time import VirtualEvent, VirtualLoop, use
from cryofleet.operations import Operation

_TOMOGRAMS = 200
_QUICK_TOMOGRAMS = 2
ROUNDS = 3
SHARD = 256
SEED = 1

_PIPELINE = """
name: facility
inputs:
  tomograms: {kind: file, list: true}
parameters:
  iterations: {type: integer}
  size: {type: integer}
steps:
  - id: tomogram
    foreach: ${tomograms}
    as: file
    steps:
      - id: ingest
        op: io.Ingest
        with: {source_uri: "${file}", contrast: dark, tilt_min_degrees: -60, tilt_max_degrees: 60}
      - id: filter
        op: io.Filter
        with: {volume_uri: "${ingest.tomogram_uri}", kind: gaussian, sigma_angstrom: 15}
      - id: pick
        op: picking.DifferenceOfGaussians
        with: {tomogram_uri: "${filter.volume_uri}", particle_diameter_angstrom: 200, threshold: 3}
      - id: extract
        op: picking.Extract
        with: {tomogram_uri: "${ingest.tomogram_uri}", particles_uri: "${pick.particles_uri}", box_size_voxels: 32}
        shards:
          over: particles_uri
          size: ${size}
          reduce: {op: picking.MergeSubtomograms, field: subtomograms_uris}
      - id: train
        op: learning.TrainAutoencoder
        with: {subtomograms_uri: "${extract.subtomograms_uri}"}
      - id: cluster
        op: learning.Cluster
        with: {subtomograms_uri: "${extract.subtomograms_uri}", model_uri: "${train.model_uri}"}
      - id: star
        op: io.Export
        with: {format: relion5_star, particles_uri: "${cluster.particles_uri}", volume_uri: "${ingest.tomogram_uri}"}
  - id: all
    op: picking.MergeSubtomograms
    with: {subtomograms_uris: "${tomogram.extract.subtomograms_uri}"}
  - id: start
    op: alignment.FamlStart
    with: {subtomograms_uri: "${all.subtomograms_uri}", particle_diameter_angstrom: 200}
  - id: first
    op: alignment.FamlExpect
    with:
      subtomograms_uri: ${all.subtomograms_uri}
      particles_uri: ${start.particles_uri}
      model_uri: ${start.model_uri}
    shards:
      over: particles_uri
      size: ${size}
      reduce: {op: alignment.FamlMaximise, field: statistics_uris, with: {model_uri: "${start.model_uri}"}}
  - id: rounds
    repeat: ${iterations}
    carry: {model_uri: "${first.model_uri}"}
    next: {model_uri: "${iteration.model_uri}"}
    steps:
      - id: iteration
        op: alignment.FamlExpect
        with:
          subtomograms_uri: ${all.subtomograms_uri}
          particles_uri: ${start.particles_uri}
          model_uri: ${rounds.model_uri}
        shards:
          over: particles_uri
          size: ${size}
          reduce: {op: alignment.FamlMaximise, field: statistics_uris, with: {model_uri: "${rounds.model_uri}"}}
  - id: finish
    op: alignment.FamlFinish
    with:
      subtomograms_uri: ${all.subtomograms_uri}
      particles_uri: ${start.particles_uri}
      model_uri: ${rounds.model_uri}
outputs:
  averages: ${finish.average_uris}
"""
POLLS = {
    "orchestrator.engine": {"PROGRESS_SECONDS": 30.0, "HEARTBEAT_SECONDS": 15.0, "QUEUE_POLL_SECONDS": 2.0},
    "orchestrator.endings": {"POLL_SECONDS": 2.0},
    "orchestrator.placement": {"POLL_SECONDS": 10.0},
    "dbos._core": {"_PREEMPTIBLE_POLL_INTERVAL_SEC": 30.0},
}
"""What is asked again and again is asked less often here, since each question takes real time and the simulated day is
long. Two seconds of waiting for the queue are little beside the tasks; the load test measures what polling costs."""


@dataclass(frozen=True)
class _Kept:
    """What is used of a manifest."""

    result: dict[str, Any]


class _Results:
    """In place of the store: no result is there when a task begins; what an instance has answered is afterwards."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def look_up(self, _operation: Operation, request: Any, _project: str) -> tuple[str, None]:
        return request.context.task_key, None

    def kept(self, _project: str, key: str) -> _Kept:
        return _Kept(self._cluster.results.pop(key))

    def take_back_damaged(self, *_: Any) -> list[str]:
        return []


async def _simulate(
    loop: VirtualLoop, home: Path, database: str, tomograms: int, rounds: int, losses: float, verbose: bool
) -> dict[str, Any]:
    from cryofleet.settings import Settings
    from cryofleet.storage import Store
    from orchestrator import engine as engine_module
    from orchestrator import placement as placement_module
    from orchestrator.pipeline_reading import load
    from orchestrator.run_message import ENDED
    from orchestrator.runs import RunRow

    cluster = Cluster(SEED, losses)
    pools = dict.fromkeys((scaling.pool for scaling in SCALED), "")
    settings = Settings(
        home=home,
        store=f"file://{home}/store",
        instance="sim",
        pools=pools,
        database=database,
        pool_wait_seconds=7200.0,
    )
    for name, values in POLLS.items():
        for key, value in values.items():
            setattr(sys.modules[name], key, value)
    use(loop, "orchestrator")
    placement: Any = placement_module
    placement.open_channel = lambda address, *_: FakeChannel(cluster, address)
    engine_code: Any = engine_module
    engine_code.count_rows = lambda store, kind, uri: rows_of(uri)
    dbos_module: Any = importlib.import_module("dbos._dbos")
    original = dbos_module.queue_thread
    # The thread that starts what is queued waits in the loop's time.
    dbos_module.queue_thread = lambda _event, dbos: original(_stop_event(loop, dbos), dbos)

    engine = engine_module.Engine(settings, Store(settings.store))
    engine.tasks._cache = _Results(cluster)  # type: ignore[assignment]
    cluster.begin()

    async def keep_names() -> None:
        while True:
            for name, pool in engine.placement.pools.items():
                pool._addresses = cluster.addresses(name)
            await asyncio.sleep(5.0)

    background = [asyncio.create_task(keep_names())]
    await asyncio.sleep(0)
    await engine.start()
    background.append(asyncio.create_task(cluster.keep_scaling(engine.tasks_left_by_kind)))

    inputs = [f"s3://raw/session/tomogram-{number:05}.mrc" for number in range(tomograms)]
    arguments = {"tomograms": inputs, "iterations": rounds, "size": SHARD}
    load(_PIPELINE, "facility.yaml").bind(arguments)
    connection = engine._database.connect() if engine._database is not None else None
    assert connection is not None
    before = database_counts(connection)
    connection.rollback()
    statements = _count_statements()
    began, cpu, postgres_cpu = time.perf_counter(), time.process_time(), postgres_cpu_seconds(home)
    row = RunRow("facility", "default", "facility", "facility.yaml", _PIPELINE, arguments, _now(loop))
    started_at = loop.time()
    await engine.in_thread(engine.runs.create, row)
    await engine.start_attempt("facility", 1)
    told = 0.0 if verbose else None
    while True:
        run = await engine.views.run("facility")
        if run.state in ENDED:
            break
        if told is not None and time.perf_counter() - told > 10:
            told = time.perf_counter()
            print(
                f"{told - began:6.0f} s: {loop.time() / 3600:6.2f} h simulated, {len(cluster.counts.done)} tasks done,",
                f"{len(cluster.instances)} instances, left:",
                {name: sum(engine.tasks_left_by_kind(name).values()) for name in pools},
                file=sys.stderr,
            )
        await asyncio.sleep(20.0)
    makespan = loop.time() - started_at
    real_seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    cluster.tally()
    message_bytes = run.ByteSize()
    read_began = time.perf_counter()
    engine.views.drop("facility")
    engine.views._views.clear()
    await engine.views.run("facility", 0.0)
    read_seconds = time.perf_counter() - read_began
    count_began = time.perf_counter()
    await engine.count_tasks()
    count_seconds = time.perf_counter() - count_began
    after = database_counts(connection)
    tables = {
        row.name: row.size
        for row in connection.execute(
            sa.text(
                "SELECT relname AS name, pg_total_relation_size(oid) AS size FROM pg_class "
                "WHERE relkind = 'r' AND relname IN ('operation_outputs', 'workflow_status', 'cryofleet_progress')"
            )
        )
    }
    units = connection.execute(sa.text("SELECT count(*) FROM cryofleet_progress")).scalar_one()
    connection.close()
    counts = cluster.counts
    found = {
        "state": run.state,
        "error": run.error,
        "steps": {step.id: [step.tasks_total, step.tasks_done, step.tasks_set_aside] for step in run.steps},
        "makespan_seconds": makespan,
        "critical_path_seconds": _critical_path(counts.seconds, rounds),
        "work_seconds": sum(counts.seconds.values()),
        "tasks": len(counts.done),
        "done_twice": sum(count > 1 for count in counts.done.values()),
        "calls": sum(counts.begun.values()),
        "failed": counts.failed,
        "lost": counts.lost,
        "losses": counts.losses,
        "refused": counts.refused,
        "added": dict(counts.added),
        "slot_seconds": dict(counts.slot_seconds),
        "busy_seconds": dict(counts.busy_seconds),
        "real_seconds": real_seconds,
        "cpu_seconds": cpu_seconds,
        "postgres_cpu_seconds": postgres_cpu_seconds(home) - postgres_cpu,
        "statements": statements["statements"],
        "database": {name: after[name] - before[name] for name in after},
        "tables": tables,
        "units": units,
        "message_bytes": message_bytes,
        "read_seconds": read_seconds,
        "count_seconds": count_seconds,
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    for task in background:
        task.cancel()
    return found


def _now(loop: VirtualLoop) -> float:
    return 1_700_000_000.0 + loop.time()


def _stop_event(loop: VirtualLoop, dbos: Any) -> VirtualEvent:
    event = VirtualEvent(loop)
    dbos.background_thread_stop_events.append(event)
    return event


def _count_statements() -> Counter[str]:
    counts: Counter[str] = Counter()

    def count(*_: Any) -> None:
        counts["statements"] += 1

    sa.event.listen(sa.Engine, "after_cursor_execute", count)
    return counts


def _critical_path(seconds: dict[str, float], rounds: int) -> float:
    """What no cluster could go below: the longest chain of tasks of one tomogram, then those of the rounds."""
    chains: defaultdict[str, float] = defaultdict(float)
    longest: dict[tuple[str, str], float] = {}
    rest: dict[str, float] = {}
    for key, took in seconds.items():
        place = key.partition("/")[2]
        item, dot, inner = place.partition("].")
        step = (inner if dot else place).partition("[")[0]
        if dot:
            longest[item, step] = max(longest.get((item, step), 0.0), took)
        else:
            rest[step] = max(rest.get(step, 0.0), took)
    for (item, _), took in longest.items():
        chains[item] += took
    return max(chains.values(), default=0.0) + sum(rest.values())


def simulate(tomograms: int, rounds: int = ROUNDS, losses: float = 1.0, verbose: bool = False) -> dict[str, Any]:
    """What came of it. To be called once in a process, whose time it bends."""
    import dbos._core  # noqa: F401

    import orchestrator.endings
    import orchestrator.engine
    import orchestrator.placement  # noqa: F401

    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    with folder() as home, postgres(home) as database:
        return loop.run_until_complete(_simulate(loop, home, database, tomograms, rounds, losses, verbose))


def rows_from(found: dict[str, Any], tomograms: int) -> Iterator[Row]:
    """The figures."""
    case = f"{tomograms} tomograms, {tomograms * cluster_model.PARTICLES} particles"
    hours, tasks, database = found["makespan_seconds"] / 3600, found["tasks"], found["database"]
    yield Row(case, "makespan", hours, "h", "lower")
    yield Row(case, "critical path", found["critical_path_seconds"] / 3600, "h", "lower")
    yield Row(case, "tasks", tasks, "", "lower")
    yield Row(case, "calls for each task", found["calls"] / tasks, "", "lower")
    yield Row(case, "tasks done twice", found["done_twice"], "", "lower", 0.0)
    yield Row(case, "instances lost", found["losses"], "", "lower")
    for label in found["slot_seconds"]:
        busy = found["busy_seconds"].get(label, 0.0)
        yield Row(case, f"idle: {label}", (1 - busy / found["slot_seconds"][label]) * 100, "%", "lower")
    slots = sum(v for k, v in found["slot_seconds"].items() if k.endswith("GPUs"))
    busy = sum(v for k, v in found["busy_seconds"].items() if k.endswith("GPUs"))
    yield Row(case, "idle GPU time", (1 - busy / slots) * 100 if slots else 0.0, "%", "lower")
    yield Row(case, "CPU of the orchestrator", found["cpu_seconds"] / tasks * 1000, "ms/task", "lower")
    yield Row(case, "CPU of PostgreSQL", found["postgres_cpu_seconds"] / tasks * 1000, "ms/task", "lower")
    yield Row(case, "database: statements", found["statements"] / tasks, "per task", "lower")
    yield Row(case, "database: transactions", database["transactions"] / tasks, "per task", "lower")
    yield Row(case, "database: rows written", (database["inserted"] + database["updated"]) / tasks, "per task", "lower")
    yield Row(case, "database: size", database["size_bytes"] / 2**20, "MiB", "lower")
    yield Row(case, "units of progress", found["units"], "rows", "lower")
    yield Row(case, "run's message", found["message_bytes"] / 2**20, "MiB", "lower")
    yield Row(case, "reading the run", found["read_seconds"] * 1000, "ms", "lower")
    yield Row(case, "counting what is left", found["count_seconds"] * 1000, "ms", "lower")
    yield Row(case, "memory of the orchestrator", found["memory_bytes"] / 2**20, "MiB", "lower")
    yield Row(case, "took really", found["real_seconds"], "s", "lower")


def measure(quick: bool) -> Iterator[Row]:
    """200 tomograms; a quick run two. In a process of its own, whose time is bent."""
    tomograms = _QUICK_TOMOGRAMS if quick else _TOMOGRAMS
    command = [sys.executable, "-m", "benchmarks.platform.simulation", "--json", f"--tomograms={tomograms}"]
    command.append(f"--rounds={1 if quick else ROUNDS}")
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    yield from rows_from(json.loads(done.stdout), tomograms)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.platform.simulation")
    parser.add_argument("--tomograms", type=int, default=_TOMOGRAMS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--losses", type=float, default=1.0, help="instances are lost so many times as often")
    parser.add_argument("--json", action="store_true", help="all that was counted, as one JSON object")
    parser.add_argument("-v", "--verbose", action="store_true", help="say how far it is")
    options = parser.parse_args()
    found = simulate(options.tomograms, options.rounds, options.losses, options.verbose)
    if not found["tasks"] or found["error"]:
        raise SystemExit(f"the run failed: {found['error']}")
    if options.json:
        print(json.dumps(found))
    else:
        print_rows("simulation", rows_from(found, options.tomograms), False)
    # Threads of the orchestrator wait in a time that has ended.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main()
