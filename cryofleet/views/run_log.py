"""What happened in a run, in order of time, and what of it goes on: told by its record, the pools, and the log of the
platform's processes.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from cryofleet.client import state_name
from cryofleet.v1 import orchestrator_pb2, runtime_pb2


def step_state(step: orchestrator_pb2.StepStatus) -> str:
    """waiting, running, succeeded, partial, failed, cancelled or skipped."""
    return orchestrator_pb2.StepState.Name(step.state).removeprefix("STEP_STATE_").lower()


def run_log(run: orchestrator_pb2.Run) -> list[str]:
    """One line for each thing that happened, the earliest first, with its time (UTC); then what was set aside."""
    happened: list[tuple[int, str]] = []

    def note(stamp: Timestamp, known: bool, what: str) -> None:
        if known:
            happened.append((stamp.ToNanoseconds(), f"{stamp.ToDatetime():%H:%M:%S}  {what}"))

    by = f" by {run.owner}" if run.owner else ""
    note(run.created_at, run.HasField("created_at"), f"submitted{by}")
    attempt = f", attempt {run.attempt}" if run.attempt > 1 else ""
    note(run.started_at, run.HasField("started_at"), f"started{attempt}")
    for step in run.steps:
        name = f"{step.id} ({step.operation})" if step.operation else step.id
        note(step.started_at, step.HasField("started_at"), f"{name}: began")
        note(step.finished_at, step.HasField("finished_at"), f"{name}: {_outcome(step)}")
    ended = state_name(run) + (f": {run.error}" if run.error else "")
    note(run.finished_at, run.HasField("finished_at"), ended)
    lines = [line for _, line in sorted(happened, key=lambda entry: entry[0])]
    # Of these only the record's order is known.
    return lines + [f"set aside: {each.step} {each.item}: {each.status} {each.cause}" for each in run.set_aside]


def running_lines(run: orchestrator_pb2.Run, pools: Iterable[orchestrator_pb2.PoolStatus]) -> list[str]:
    """What instances work on for the run just now, and how far its steps are that wait for a place."""
    busy = [
        f"now: {each.operation} on {instance.instance or instance.address}: {each.fraction:.0%} {each.phase}".rstrip()
        for pool in pools
        for instance in pool.instances
        for each in instance.running
        if each.run_id == run.id
    ]
    active = [step for step in run.steps if step.operation and step_state(step) == "running"]
    steps = [f"now: {step.id}: {step.fraction:.0%} {step.phase}".rstrip() for step in active]
    return steps + busy


def logged_lines(log: orchestrator_pb2.ReadLogResponse) -> list[str]:
    """What the processes logged; then which of them did not say."""
    lines = ["logged:", "(older lines are not kept)"] if log.cut else ["logged:"] if log.lines else []
    return [
        *lines,
        *map(_logged, log.lines),
        *(
            f"{each.instance or each.address} ({each.pool}) does not say what it logged: {each.cause}"
            for each in log.unread
        ),
    ]


def _logged(line: runtime_pb2.LogLine) -> str:
    at = f"{line.time.ToDatetime():%H:%M:%S}.{line.time.nanos // 1_000_000:03d}"
    # The place of a task in the run, without the run's id.
    where = " ".join(part for part in (line.instance, line.operation, line.task_key.partition("/")[2]) if part)
    # By which the traceback is found in the process's own log.
    error = f" (error_id {line.fields['error_id']})" if line.fields.get("error_id") else ""
    return f"{at}  {line.level}  {where}: {line.message}{error}"


def pool_row(pool: orchestrator_pb2.PoolStatus) -> dict[str, str]:
    """A pool as a line of a table; slots and memory are those of its ready instances."""
    ready = [instance for instance in pool.instances if instance.ready]
    aside = sum(instance.HasField("set_aside_until") for instance in ready)
    state = "open"
    if pool.HasField("paused_at"):
        state = f"paused by {pool.paused_by}" + (f": {pool.paused_because}" if pool.paused_because else "")
    causes = dict.fromkeys(instance.error for instance in pool.instances if instance.error)
    free, total = (sum(each.slots_free for each in ready), sum(each.slots_total for each in ready))
    memory = [sum(getattr(each, f"memory_{what}_bytes") for each in ready) / 1024**3 for what in ("free", "total")]
    return {
        "pool": pool.name,
        "state": "; ".join([state, *causes]),
        "instances": f"{len(ready)} of {len(pool.instances)} ready" + (f", {aside} set aside" if aside else ""),
        "slots free": f"{free} of {total}",
        "memory free": f"{memory[0]:.1f} of {memory[1]:.1f} GiB",
        "running": str(pool.tasks_running),
        "queued": str(pool.tasks_queued),
    }


def _outcome(step: orchestrator_pb2.StepStatus) -> str:
    parts = [step_state(step)]
    if step.tasks_total > 1:
        parts.append(f"{step.tasks_done} of {step.tasks_total} tasks")
    if step.tasks_cached:
        parts.append(f"{step.tasks_cached} known already")
    if step.tasks_set_aside:
        parts.append(f"{step.tasks_set_aside} set aside")
    if step.compute_seconds:
        parts.append(f"computed {step.compute_seconds:.1f} s")
    return ", ".join(parts)
