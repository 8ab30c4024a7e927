"""A training as a job: plain values, so that other processes can run it as this one does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryofleet.errors import InvalidArgument
from cryofleet.progress import Progress
from services.learning import architectures, datasets, training
from services.learning.augmentation import Augmentation


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and how.

    `network` is a config as `architectures.build` takes it, `objective` a spec as `architectures.objective` takes it;
    both are JSON. `stratify` names the array of classes that are split evenly between training and validation, ""
    for none. `augmentation` changes the batches of training alone. An epoch shows each labelled box `labelled_repeats`
    times, where some of "labels" are -1 and these few would be rare among the others. `held_back` names the array that
    is 1 for the boxes of validation, "" where they are drawn. `unpaired` names arrays that have rows of their own and
    belong to none of the boxes, as those of a second domain; they are split and shuffled by themselves.
    """

    network: Mapping[str, Any]
    objective: Mapping[str, Any]
    options: training.TrainingOptions
    batch_size: int
    validation_fraction: float
    augmentation: Augmentation = field(default_factory=Augmentation)
    stratify: str = ""
    labelled_repeats: int = 1
    held_back: str = ""
    unpaired: tuple[str, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @staticmethod
    def from_mapping(document: Mapping[str, Any]) -> Job:
        """The job that `to_mapping` wrote."""
        options = dict(document["options"])
        options["betas"] = tuple(options["betas"])
        values = dict(document) | {
            "options": training.TrainingOptions(**options),
            "augmentation": Augmentation(**document["augmentation"]),
            "unpaired": tuple(document["unpaired"]),
        }
        return Job(**values)


def split(job: Job, arrays: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The rows of the arrays that are trained on, and those that are held back for validation; both in rising order.

    Raises InvalidArgument where either would be empty.
    """
    if job.held_back:
        held_back = arrays[job.held_back] == 1
        return np.flatnonzero(~held_back), np.flatnonzero(held_back)
    classes = arrays[job.stratify] if job.stratify else None
    return datasets.split_rows(len(arrays["boxes"]), job.validation_fraction, job.options.seed, classes)


def shown_rows(job: Job, arrays: Mapping[str, NDArray[Any]], training_rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """What an epoch shows of the rows that are trained on: each once, and labelled ones `labelled_repeats` times."""
    if job.labelled_repeats == 1:
        return training_rows
    labelled = training_rows[arrays["labels"][training_rows] >= 0]
    return np.concatenate([training_rows, np.repeat(labelled, job.labelled_repeats - 1)])


def run_job(
    job: Job,
    arrays: Mapping[str, NDArray[Any]],
    *,
    device: torch.device,
    progress: Progress,
    save_checkpoint: Callable[[training.Checkpoint], None],
    checkpoint: Mapping[str, bytes] | None = None,
    first_weights: Mapping[str, Tensor] | None = None,
    scratch: Path | None = None,
) -> training.Training:
    """Train as the job says; see `training.train`.

    `arrays` have the boxes as first dimension: "boxes" (n, z, y, x) or (n, y, x) float32, and what the objective needs
    besides, as "labels" (n,) or "targets" (n, z, y, x), which batches hold as int64; unpaired ones have any number of
    rows. `first_weights` replace those of the same names that the network starts with, an earlier model's for
    instance. An objective with a method `collapsed` is asked after each epoch whether the network must start again.

    Where several GPUs are seen, all of them work, in processes of their own that share the job by a folder of
    `scratch`: figures then agree with those of one but for rounding.
    """
    # As other processes get it, so that what is no JSON is noticed with one GPU too.
    job = Job.from_mapping(json.loads(json.dumps(job.to_mapping(), allow_nan=False)))
    if device.type == "cuda" and torch.cuda.device_count() > 1 and scratch is not None:
        from services.learning import distributed

        return distributed.run_in_processes(
            job,
            arrays,
            processes=torch.cuda.device_count(),
            device=device,
            progress=progress,
            save_checkpoint=save_checkpoint,
            checkpoint=checkpoint,
            first_weights=first_weights,
            scratch=scratch,
        )
    return run_alone(
        job,
        arrays,
        device=device,
        progress=progress,
        save_checkpoint=save_checkpoint,
        checkpoint=checkpoint,
        first_weights=first_weights,
    )


def run_alone(
    job: Job,
    arrays: Mapping[str, NDArray[Any]],
    *,
    device: torch.device,
    progress: Progress,
    save_checkpoint: Callable[[training.Checkpoint], None],
    checkpoint: Mapping[str, bytes] | None = None,
    first_weights: Mapping[str, Tensor] | None = None,
    peers: training.Peers | None = None,
) -> training.Training:
    """`run_job` in this process, as one of `peers` where there are some."""
    training_rows, validation_rows = split(job, arrays)
    batches = datasets.ArrayBatches(
        arrays,
        shown_rows(job, arrays, training_rows),
        validation_rows,
        batch_size=job.batch_size,
        seed=job.options.seed,
        device=device,
        change=None if job.augmentation.changes_nothing else job.augmentation,
        unpaired={
            name: datasets.split_rows(len(arrays[name]), job.validation_fraction, job.options.seed)
            for name in job.unpaired
        },
    )
    objective = architectures.objective(job.objective)

    def build(generator: torch.Generator) -> torch.nn.Module:
        model = architectures.build(job.network, generator)
        if first_weights:
            foreign = first_weights.keys() - model.state_dict().keys()
            if foreign:
                raise InvalidArgument(
                    f"first_weights has tensors that the network has not: {', '.join(sorted(foreign))}"
                )
            model.load_state_dict(dict(first_weights), strict=False)
        return model

    return training.train(
        build,
        objective,
        batches,
        job.options,
        device=device,
        progress=progress,
        save_checkpoint=save_checkpoint,
        checkpoint=checkpoint,
        collapsed=objective.collapsed if isinstance(objective, training.MayCollapse) else training.never,
        peers=peers,
    )
