"""One training by several processes, each on a GPU of its own, started by torch's launcher.

The parent writes the job as JSON and its arrays as files into a folder, and starts

    python -m torch.distributed.run --standalone --nproc-per-node N -m services.learning.distributed FOLDER

Every process makes the same batches and computes its part of each; gradients and figures are averaged, weighted by the
parts' sizes, so that all hold the same weights. The first process writes what the parent hands on to `progress` and
`save_checkpoint`, and at the end the result. What crosses between processes is JSON, NumPy arrays and safetensors.

The parent holds a lock on a file of the folder: a process that gets the lock knows that nobody waits for it any more,
and ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import mmap
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor, nn

from cryofleet import errors
from cryofleet.progress import Progress
from services.learning import architectures, jobs, training

logger = logging.getLogger(__name__)

_JOB = "job.json"
_ARRAYS = "arrays"
_START = "start"
_FIRST_WEIGHTS = "first_weights.safetensors"
_EVENTS = "events.jsonl"
_RESULT = "result.json"
_RESULT_WEIGHTS = "result.safetensors"
_LOG = "log.txt"
_LOCK = "parent.lock"

POLL_SECONDS = 0.1
STARTING_SECONDS = 120.0
"""So long the first report may take: loading torch and finding one another."""
ENDING_SECONDS = 10.0
_LOGGED_CHARACTERS = 10_000


class Group:
    """Peers in a process group of torch.distributed."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self._size = torch.distributed.get_world_size()

    def adapted(self, model: nn.Module) -> nn.Module:
        """With batch normalisation over whole batches, which torch has on GPUs alone: on a CPU it is over parts."""
        if next(model.parameters()).device.type != "cuda":
            return model
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted

    def part(self, batch: training.Batch) -> tuple[training.Batch, float]:
        """An even part of the batch. Of one smaller than the group each peer takes all, and counts for a share."""
        boxes = training.boxes_of(batch)
        if boxes < self._size:
            return batch, boxes / self._size
        first, last = boxes * self.rank // self._size, boxes * (self.rank + 1) // self._size
        return {name: value[first:last] for name, value in batch.items()}, float(last - first)

    def average(self, tensors: Sequence[Tensor], boxes: float) -> None:
        """All in one message, as small ones cost more than their bytes."""
        if not tensors:
            return
        weight = torch.full((1,), boxes, device=tensors[0].device)
        message = torch.cat([*(tensor.detach().reshape(-1) * boxes for tensor in tensors), weight])
        torch.distributed.all_reduce(message)
        message /= message[-1].clone()
        means = torch.split(message[:-1], [each.numel() for each in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view(tensor.shape))


def run_in_processes(
    job: jobs.Job,
    arrays: Mapping[str, NDArray[Any]],
    *,
    processes: int,
    device: torch.device,
    progress: Progress,
    save_checkpoint: Callable[[training.Checkpoint], None],
    checkpoint: Mapping[str, bytes] | None = None,
    first_weights: Mapping[str, Tensor] | None = None,
    scratch: Path,
) -> training.Training:
    """`jobs.run_job` by so many processes; the result's model is on `device`.

    Raises what a process raises, and Internal, with the end of its log, where one ends otherwise. All of them end with
    this call, also where `progress` or `save_checkpoint` raises.
    """
    folder = scratch / f"training-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        _write_job(folder, job, arrays, processes, device, checkpoint, first_weights)
        _run(folder, processes, progress, save_checkpoint)
        return _read_result(folder, job, device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_job(
    folder: Path,
    job: jobs.Job,
    arrays: Mapping[str, NDArray[Any]],
    processes: int,
    device: torch.device,
    checkpoint: Mapping[str, bytes] | None,
    first_weights: Mapping[str, Tensor] | None,
) -> None:
    (folder / _ARRAYS).mkdir()
    files: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        mapped = _mapped_file(array)
        if mapped is not None:
            files[name] = {"path": str(mapped), "dtype": array.dtype.str, "shape": list(array.shape)}
        else:
            np.save(folder / _ARRAYS / f"{name}.npy", array, allow_pickle=False)
            files[name] = {"path": str(folder / _ARRAYS / f"{name}.npy")}
    if checkpoint is not None:
        _write_files(folder / _START, checkpoint)
    if first_weights is not None:
        tensors = {name: value.detach().cpu().contiguous() for name, value in first_weights.items()}
        (folder / _FIRST_WEIGHTS).write_bytes(safetensors.torch.save(tensors))
    document = {
        "job": job.to_mapping(),
        "arrays": files,
        "device": device.type,
        "threads": max(1, torch.get_num_threads() // processes),
    }
    (folder / _JOB).write_text(json.dumps(document))


def _mapped_file(array: NDArray[Any]) -> Path | None:
    """The file that an array is mapped to, from its first byte to its last; None where there is none."""
    base: Any = array.base
    if not isinstance(array, np.memmap) or not isinstance(base, mmap.mmap):
        return None
    path = Path(str(array.filename))
    whole = array.flags.c_contiguous and array.offset == 0 and path.stat().st_size == array.nbytes
    return path if whole else None


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _run(
    folder: Path, processes: int, progress: Progress, save_checkpoint: Callable[[training.Checkpoint], None]
) -> None:
    """Start the processes and hand on what the first one says, until they have ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", __name__, str(folder)]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    with (folder / _LOCK).open("w") as lock, (folder / _LOG).open("w") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        launcher = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _hand_on(folder, launcher, processes, progress, save_checkpoint)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
            _end(launcher)
    if launcher.returncode:
        raise _failure(folder, launcher.returncode)


def _hand_on(
    folder: Path,
    launcher: subprocess.Popen[bytes],
    processes: int,
    progress: Progress,
    save_checkpoint: Callable[[training.Checkpoint], None],
) -> None:
    started = time.monotonic()
    read = 0
    while True:
        ended = launcher.poll() is not None
        lines = _lines(folder / _EVENTS, read)
        read += sum(len(line) + 1 for line in lines)
        for line in lines:
            event = json.loads(line)
            if "checkpoint" in event:
                saved = folder / event["checkpoint"]
                save_checkpoint(_read_files(saved))
                shutil.rmtree(saved)
            else:
                progress(event["fraction"], event["phase"], **event["counters"])
        if ended:
            return
        if not read and time.monotonic() - started < STARTING_SECONDS:
            # Later, only what the processes report is progress: one that hangs must be noticed.
            progress(0.0, f"starting {processes} processes")
        time.sleep(POLL_SECONDS)


def _lines(path: Path, first_byte: int) -> list[bytes]:
    """The whole lines of a growing file from a byte on."""
    try:
        with path.open("rb") as file:
            file.seek(first_byte)
            return file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """End the launcher, which ends its processes; they end by themselves too, as nobody holds the lock."""
    if launcher.poll() is None:
        launcher.terminate()
        try:
            launcher.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            launcher.kill()
            launcher.wait()


def _failure(folder: Path, code: int) -> errors.Failure:
    """What the process that failed first said."""
    log = (folder / _LOG).read_text(errors="replace")
    logger.error("the training's processes ended with code %d: %s", code, log[-_LOGGED_CHARACTERS:])
    said = sorted(folder.glob("failure-*.json"), key=lambda path: path.stat().st_mtime_ns)
    if not said:
        return errors.Internal(f"the training's processes ended with code {code}, as when they are killed")
    failure = json.loads(said[0].read_text())
    kinds = {kind.status: kind for kind in errors.Failure.__subclasses__()}
    return kinds.get(failure["status"], errors.Internal)(failure["message"])


def _read_result(folder: Path, job: jobs.Job, device: torch.device) -> training.Training:
    document = json.loads((folder / _RESULT).read_text())
    document["history"] = [training.Epoch(**line) for line in document["history"]]
    model = architectures.build(job.network).to(device)
    model.load_state_dict(safetensors.torch.load((folder / _RESULT_WEIGHTS).read_bytes()))
    return training.Training(model=model, **document)


# --- In each of the processes ---------------------------------------------------------------------------------------


class _Parent:
    """Where a process reports to."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._first = rank == 0
        self._lock = (folder / _LOCK).open("r")
        self._looked_at = time.monotonic()
        self._checkpoints = 0

    def close(self) -> None:
        self._lock.close()

    def progress(self, fraction: float, phase: str = "", **counters: float) -> None:
        """Report, and raise Cancelled where the parent is gone."""
        now = time.monotonic()
        if now - self._looked_at > 1.0:
            self._looked_at = now
            try:
                fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                raise errors.Cancelled("the training's parent process has ended")
        if self._first:
            self._say({"fraction": fraction, "phase": phase, "counters": counters})

    def save_checkpoint(self, files: training.Checkpoint) -> None:
        if self._first:
            self._checkpoints += 1
            name = f"checkpoint-{self._checkpoints}"
            _write_files(self._folder / name, files)
            self._say({"checkpoint": name})

    def _say(self, event: Mapping[str, Any]) -> None:
        with (self._folder / _EVENTS).open("ab") as file:
            file.write(json.dumps(event).encode() + b"\n")


def _array(file: Mapping[str, Any]) -> NDArray[Any]:
    array: NDArray[Any]
    if "dtype" in file:
        array = np.memmap(file["path"], np.dtype(file["dtype"]), "r", shape=tuple(file["shape"]))
    else:
        array = np.load(file["path"], mmap_mode="r", allow_pickle=False)
    return array


def work(folder: Path) -> None:
    """Be one of the processes of the job in a folder."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    document = json.loads((folder / _JOB).read_text())
    job = jobs.Job.from_mapping(document["job"])
    training.use_deterministic_algorithms(document["threads"])
    if document["device"] == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        torch.distributed.init_process_group("gloo")
    weights = folder / _FIRST_WEIGHTS
    try:
        with contextlib.closing(_Parent(folder, rank)) as parent:
            trained = jobs.run_alone(
                job,
                {name: _array(file) for name, file in document["arrays"].items()},
                device=device,
                progress=parent.progress,
                save_checkpoint=parent.save_checkpoint,
                checkpoint=_read_files(folder / _START) if (folder / _START).exists() else None,
                first_weights=safetensors.torch.load(weights.read_bytes()) if weights.exists() else None,
                peers=Group(),
            )
    except Exception as error:  # the process ends with it
        if not isinstance(error, errors.Failure):
            said: errors.Failure = errors.Internal(f"process {rank} of the training: {type(error).__name__}: {error}")
        else:
            said = error
        failure = {"status": said.status, "message": said.message}
        (folder / f"failure-{rank}.json").write_text(json.dumps(failure))
        raise
    if rank == 0:
        tensors = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in trained.model.state_dict().items()
        }
        (folder / _RESULT_WEIGHTS).write_bytes(safetensors.torch.save(tensors))
        (folder / _RESULT).write_text(json.dumps(_figures(trained)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _figures(trained: training.Training) -> dict[str, Any]:
    """A training without its model."""
    figures = {name: value for name, value in vars(trained).items() if name != "model"}
    return figures | {"history": [asdict(line) for line in trained.history]}


if __name__ == "__main__":
    work(Path(sys.argv[1]))
