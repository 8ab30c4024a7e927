"""DUAL in the training loop: two domains of different sizes, and a run that resumes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cryofleet.progress import no_progress
from services.learning import dual
from services.learning.jobs import Job, run_job
from services.learning.training import TrainingOptions

SIDE = 16
JOB = Job(
    network=dual.config(SIDE, 2),
    objective={"name": "dual"},
    options=TrainingOptions(
        max_epochs=2, patience_epochs=2, learning_rate=1e-3, seed=3, keep_last=True, report_seconds=0.0
    ),
    batch_size=2,
    validation_fraction=0.05,
    unpaired=("densities",),
)


class Killed(BaseException):
    pass


def arrays(tomograms: int = 4, densities: int = 7) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    return {
        "boxes": rng.standard_normal((tomograms, SIDE, SIDE, SIDE), np.float32),
        "densities": rng.standard_normal((densities, SIDE, SIDE, SIDE), np.float32),
    }


def run(job: Job = JOB, **arguments: Any) -> Any:
    values: dict[str, Any] = {"device": torch.device("cpu"), "progress": no_progress, "save_checkpoint": lambda _: None}
    return run_job(job, arrays(), **(values | arguments))


def test_a_killed_run_resumes_bit_for_bit() -> None:
    undisturbed = run()
    # Three batches an epoch: the larger domain has 6 for training.
    assert [line.epoch for line in undisturbed.history] == [1, 2]
    assert undisturbed.epochs == undisturbed.best_epoch == 2
    saved: list[dict[str, bytes]] = []
    calls = itertools.count(1)

    def die(fraction: float, phase: str = "", **counters: float) -> None:
        if phase.startswith("training") and next(calls) > 5:
            raise Killed

    often = replace(JOB, options=replace(JOB.options, checkpoint_seconds=0.0))
    with pytest.raises(Killed):
        run(often, progress=die, save_checkpoint=saved.append)
    resumed = run(checkpoint=saved[-1])
    assert resumed.history == undisturbed.history
    pairs = zip(resumed.model.state_dict().values(), undisturbed.model.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_curves_tell_how_the_networks_fare() -> None:
    (line,) = run(replace(JOB, options=replace(JOB.options, max_epochs=1))).history
    judged = {f"{kind}_{domain}" for kind in ("real", "made") for domain in ("tomograms", "densities")}
    assert {"loss", "deviation", *judged} <= set(line.training)
    assert line.training["deviation"] > 0
