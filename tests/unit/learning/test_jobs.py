"""Jobs: as JSON and back, in this process and in several."""

from __future__ import annotations

import fcntl
import itertools
import json
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed
from numpy.typing import NDArray

from cryofleet.errors import Cancelled, FailedPrecondition, Internal, InvalidArgument
from cryofleet.progress import no_progress
from cryofleet.scratch_array import reserved_array
from services.learning import autoencoder, distributed
from services.learning.augmentation import Augmentation
from services.learning.jobs import Job, run_job, shown_rows, split
from services.learning.preparation import standardise
from services.learning.training import TrainingOptions
from tests.unit.learning.shapes import two_kinds

CPU = torch.device("cpu")
SIDE = 8

NETWORK = autoencoder.config(SIDE) | {
    "binning": 1,
    "pose_normalisation": False,
    "subtomogram_box_size": SIDE,
    "subtomogram_voxel_size_angstrom": 10.0,
}
JOB = Job(
    network=NETWORK,
    objective={"name": "reconstruction-and-l1", "l1_penalty": 1e-4},
    options=TrainingOptions(max_epochs=3, patience_epochs=5, learning_rate=1e-3, seed=2, report_seconds=0.0),
    # Batches of 7, 7 and 1: of odd sizes, and one that is smaller than two processes.
    batch_size=7,
    validation_fraction=0.2,
    augmentation=Augmentation("any", 0.1, 0.1, 5.0, -60, 60),
)


def arrays(count: int = 19) -> dict[str, NDArray[Any]]:
    return {"boxes": standardise(two_kinds(count, SIDE, 1)[0]), "labels": np.arange(count) % 3}


def run(job: Job, **arguments: Any) -> Any:
    values: dict[str, Any] = {"device": CPU, "progress": no_progress, "save_checkpoint": lambda files: None}
    return run_job(job, arrays(), **(values | arguments))


def test_a_job_is_json() -> None:
    assert Job.from_mapping(json.loads(json.dumps(JOB.to_mapping()))) == JOB


def test_rows_are_split_by_class_where_asked() -> None:
    by_class = replace(JOB, stratify="labels", validation_fraction=1 / 3)
    training_rows, validation_rows = split(by_class, arrays(18))
    assert np.bincount(arrays(18)["labels"][validation_rows]).tolist() == [2, 2, 2]
    assert sorted([*training_rows, *validation_rows]) == list(range(18))


def test_rows_are_held_back_where_that_is_said() -> None:
    arrays: dict[str, NDArray[Any]] = {"boxes": np.zeros((5, 1)), "apart": np.array([0, 1, 0, 0, 1], np.uint8)}
    training_rows, validation_rows = split(replace(JOB, held_back="apart"), arrays)
    assert (training_rows.tolist(), validation_rows.tolist()) == ([0, 2, 3], [1, 4])


def test_labelled_rows_are_shown_more_often() -> None:
    few = {"labels": np.array([2, -1, -1, 0, -1, 1])}
    rows = np.array([1, 2, 3, 5])
    assert shown_rows(JOB, few, rows).tolist() == [1, 2, 3, 5]
    assert sorted(shown_rows(replace(JOB, labelled_repeats=3), few, rows)) == [1, 2, 3, 3, 3, 5, 5, 5]


def test_augmentation_acts_on_training_alone_and_is_the_same_again() -> None:
    plain = run(replace(JOB, augmentation=Augmentation()))
    augmented, again = run(JOB), run(JOB)
    assert augmented.history == again.history
    assert augmented.history[0].training != plain.history[0].training
    noisy = run(replace(JOB, augmentation=Augmentation(noise_jitter=10.0), options=replace(JOB.options, max_epochs=1)))
    # Noise of 5 standard deviations is in what training has to reconstruct, and in no validation box.
    assert noisy.history[0].training["reconstruction"] > 5
    assert noisy.history[0].validation["reconstruction"] < 2


def test_first_weights_replace_those_of_their_names() -> None:
    given = {"to_code.bias": torch.full((32,), 0.25)}
    short = replace(JOB, options=replace(JOB.options, max_epochs=1, learning_rate=1e-9))
    trained = run(short, first_weights=given)
    torch.testing.assert_close(trained.model.get_parameter("to_code.bias").detach(), given["to_code.bias"])
    with pytest.raises(InvalidArgument, match="no_such"):
        run(short, first_weights={"no_such": torch.zeros(1)})


def test_a_job_of_unknown_network_or_objective_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="'unknown'"):
        run(replace(JOB, network={"architecture": "unknown"}))
    with pytest.raises(InvalidArgument, match="'other'"):
        run(replace(JOB, objective={"name": "other"}))


def test_several_gpus_train_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def note(*_: Any, **arguments: Any) -> str:
        asked.append(arguments)
        return "trained"

    monkeypatch.setattr(distributed, "run_in_processes", note)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert run(JOB, device=torch.device("cuda"), scratch=tmp_path) == "trained"
    assert (asked[0]["processes"], asked[0]["scratch"]) == (4, tmp_path)
    assert run(replace(JOB, options=replace(JOB.options, max_epochs=1)), scratch=tmp_path).epochs == 1
    assert len(asked) == 1, "on a CPU one process works"


def test_what_is_no_json_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="JSON"):
        run(replace(JOB, objective={"name": "reconstruction-and-l1", "l1_penalty": np.float32(1e-4)}))


# --- Two processes, on the CPU -------------------------------------------------------------------------------------


def in_two(job: Job, scratch: Path, **arguments: Any) -> Any:
    values: dict[str, Any] = {"device": CPU, "progress": no_progress, "save_checkpoint": lambda files: None}
    given = arguments.pop("arrays", arrays())
    return distributed.run_in_processes(job, given, processes=2, scratch=scratch, **(values | arguments))


def close(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Rounding of float32 in another order of sums, after a dozen steps of Adam."""
    return all(a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5) for name in a)


def test_two_processes_train_as_one_and_resume(tmp_path: Path) -> None:
    alone = run(JOB)
    boxes = arrays()["boxes"]
    mapped = reserved_array(tmp_path / "boxes.float32", boxes.shape, np.float32)
    mapped[:] = boxes
    saved: list[dict[str, bytes]] = []
    reports: list[tuple[float, str]] = []

    def stop_after_the_second_epoch(fraction: float, phase: str = "", **counters: float) -> None:
        reports.append((fraction, phase))
        if counters.get("epoch") == 3:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        in_two(
            JOB,
            tmp_path,
            arrays={"boxes": mapped, "labels": arrays()["labels"]},
            progress=stop_after_the_second_epoch,
            save_checkpoint=saved.append,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["boxes.float32"], "nothing is left behind"
    assert reports[0][1].startswith("starting")
    assert {"training epoch 1", "validating epoch 1", "training epoch 2"} <= {phase for _, phase in reports}
    fractions = [fraction for fraction, _ in reports]
    assert fractions == sorted(fractions)
    assert set(saved[0]) == {"state.safetensors", "state.json"}

    resumed = in_two(JOB, tmp_path, checkpoint=saved[1])
    assert len(resumed.history) == len(alone.history) == 3
    for ours, theirs in zip(resumed.history, alone.history, strict=True):
        assert close(ours.training, theirs.training), (ours, theirs)
        assert close(ours.validation, theirs.validation), (ours, theirs)
    assert resumed.best_epoch == alone.best_epoch
    for name, value in alone.model.state_dict().items():
        # Adam divides by the gradients' size: where a gradient is near zero, its rounding is a step.
        difference = (resumed.model.state_dict()[name] - value).norm()
        assert float(difference) < 0.02 * float(value.norm()) + 1e-4, name

    # One process goes on from what two left.
    mixed = run(JOB, checkpoint=saved[1])
    assert close(mixed.history[-1].validation, alone.history[-1].validation)
    assert safetensors.torch.load(saved[1]["state.safetensors"])


def test_what_fails_in_a_process_is_said_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only process of its group, here in the test's own: what the launcher would start."""
    wild = replace(JOB, options=replace(JOB.options, learning_rate=1.0), augmentation=Augmentation())
    distributed._write_job(tmp_path, wild, {"boxes": np.full((9, 8, 8, 8), np.inf, np.float32)}, 1, CPU, None, None)
    (tmp_path / distributed._LOG).write_text("what the process printed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    with (tmp_path / distributed._LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FailedPrecondition, match="no longer a number"):
            distributed.work(tmp_path)
    torch.distributed.destroy_process_group()
    torch.use_deterministic_algorithms(False)
    said = distributed._failure(tmp_path, 1)
    assert isinstance(said, FailedPrecondition)
    assert "no longer a number in epoch 1" in said.message
    (tmp_path / "failure-0.json").unlink()
    assert isinstance(distributed._failure(tmp_path, -9), Internal)


def test_a_process_whose_parent_is_gone_ends(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with (tmp_path / distributed._LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = distributed._Parent(tmp_path, 0)
        request.addfinalizer(process.close)
        process._looked_at -= 2
        process.progress(0.5, "training")
        fcntl.flock(lock, fcntl.LOCK_UN)
        process.progress(0.6, "training")  # it looks once a second
        process._looked_at -= 2
        with pytest.raises(Cancelled, match="parent"):
            process.progress(0.7, "training")
    reported = [json.loads(line)["fraction"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert reported == [0.5, 0.6]


def test_parts_of_a_batch_are_disjoint_and_whole() -> None:
    """Of every size of batch and group: each box once, or all of them everywhere for a share each."""

    def parts(boxes: int, size: int) -> list[tuple[list[int], float]]:
        found = []
        for rank in range(size):
            group = distributed.Group.__new__(distributed.Group)
            group.rank, group._size = rank, size
            part, weight = group.part({"boxes": torch.arange(boxes)})
            found.append((part["boxes"].tolist(), weight))
        return found

    for boxes, size in itertools.product(range(1, 9), range(1, 5)):
        found = parts(boxes, size)
        assert sum(weight for _, weight in found) == pytest.approx(boxes)
        if boxes >= size:
            assert [number for part, _ in found for number in part] == list(range(boxes))
        else:
            assert all(part == list(range(boxes)) for part, _ in found)
