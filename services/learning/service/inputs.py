"""What several operations of the learning service share: their subtomograms and models, and what they write."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cryofleet.artifacts import content_digest
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.particles import Particles
from cryofleet.progress import Progress
from cryofleet.server import Needs, Reader, Task
from cryofleet.volumes import Subtomograms, VolumeInfo
from services.learning import architectures, datasets, jobs, model_card, model_files, training
from services.learning.augmentation import Augmentation
from services.learning.preparation import CONTRAST, Preparation

#: torch itself, buffers of reading and writing artifacts, and small things.
BASE_BYTES = 256 << 20
#: What a training step keeps for a box, in outputs of the largest layer: measured at 32^3, with their gradients.
TRAINING_LAYERS = 14
#: The same of encoding and decoding.
INFERENCE_LAYERS = 5
#: Weights, gradients, two moments of Adam, the best weights, and a checkpoint as tensors and as bytes.
WEIGHT_COPIES = 13
#: Of each process of a training on several GPUs: torch itself, and its context on the GPU.
PROCESS_BYTES = 1 << 30
#: What augmentation keeps for a box besides it, in boxes: coordinates, spectra, noise.
AUGMENTATION_COPIES = 12
#: Relative difference of voxel sizes that is rounding.
VOXEL_SIZE_TOLERANCE = 1e-3


class TrainingRequest(Protocol):
    """What every request that trains a network says of how."""

    max_epochs: int
    learning_rate: float
    seed: int
    mixed_precision: bool


@dataclass(frozen=True)
class Chosen:
    """Subtomograms that an operation works on: row i is box `rows[i]` of the set, and row i of `particles`."""

    subtomograms: Subtomograms
    rows: NDArray[np.int64]
    particles: Particles
    """As the request gives them, with their classes; the set's own where it gives none."""
    source: str
    """The URI of the particles that were given, else of the set."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def info(self) -> VolumeInfo:
        """Of one box."""
        return self.subtomograms.info

    @property
    def ids(self) -> NDArray[np.int64]:
        """The particles' ids."""
        return ids(self.particles)

    def read(self, first: int, count: int) -> NDArray[np.float32]:
        """Boxes `[i, z, y, x]` of rows first to first + count; those that lie side by side are read at once."""
        rows = self.rows[first : first + count]
        order = np.argsort(rows)
        runs = np.split(order, np.flatnonzero(np.diff(rows[order]) != 1) + 1)
        if len(runs) == 1 and len(rows) and (np.diff(order) == 1).all():
            return self.subtomograms.read(int(rows[0]), len(rows))
        boxes = np.empty((len(rows), *self.info.shape), np.float32)
        for run in runs if len(rows) else []:
            boxes[run] = self.subtomograms.read(int(rows[run[0]]), len(run))
        return boxes


def chosen(reader: Reader, subtomograms_uri: str, particles_uri: str = "") -> Chosen:
    """The subtomograms that the particles name, in their order; all where no particles are given.

    Raises FailedPrecondition where there is none, InvalidArgument for a particle that has no subtomogram there.
    """
    subtomograms = reader.open_subtomograms(subtomograms_uri)
    if subtomograms.count == 0:
        raise FailedPrecondition(f"{subtomograms_uri} holds no subtomogram")
    own = subtomograms.particles()
    if not particles_uri:
        return Chosen(subtomograms, np.arange(len(own)), own, subtomograms_uri)
    given = reader.read_particles(particles_uri)
    if len(given) == 0:
        raise FailedPrecondition(f"{particles_uri} holds no particle")
    row_of = {int(name): row for row, name in enumerate(ids(own))}
    names = [int(name) for name in ids(given)]
    for name in names:
        if name not in row_of:
            raise InvalidArgument(f"particle {name} of {particles_uri} has no subtomogram in {subtomograms_uri}")
    return Chosen(subtomograms, np.array([row_of[name] for name in names], np.int64), given, particles_uri)


def preparation(subtomograms: Subtomograms, binning: int, pose_normalisation: bool) -> Preparation:
    """What is done to the subtomograms before a network sees them."""
    return Preparation(
        box_size=subtomograms.box_size,
        binning=binning,
        pose_normalisation=pose_normalisation,
        contrast=subtomograms.info.contrast,
        source=subtomograms.uri,
    )


def scaled(subtomograms: Subtomograms, preparation: Preparation, progress: Progress) -> Preparation:
    """The preparation with one scale for all boxes: that of the whole set, whichever of its subtomograms are chosen."""
    scale = datasets.measure_scale(subtomograms.read, subtomograms.count, preparation, progress)
    return replace(preparation, scale=scale)


def ids(particles: Particles) -> NDArray[np.int64]:
    """The particles' ids, row by row."""
    return particles.table["id"].to_numpy()


def augmentation(request: Any, info: VolumeInfo, pose_normalisation: bool = False) -> Augmentation:
    """What the request's rotations and jitters ask for.

    Raises InvalidArgument where a wedge is to be widened in boxes that were turned, which have none in common.
    """
    if request.wedge_jitter and pose_normalisation:
        raise InvalidArgument(
            "wedge_jitter: boxes whose pose was normalised lie each another way, and so do their wedges; "
            "leave out one of the two"
        )
    return Augmentation(
        rotations=request.rotations,
        contrast_jitter=request.contrast_jitter,
        noise_jitter=request.noise_jitter,
        wedge_jitter_degrees=request.wedge_jitter,
        tilt_min_degrees=info.tilt_min_degrees,
        tilt_max_degrees=info.tilt_max_degrees,
    )


def training_options(request: TrainingRequest, *, patience_epochs: int, **more: Any) -> training.TrainingOptions:
    """How the request asks to train; `more` are further `TrainingOptions`."""
    return training.TrainingOptions(
        max_epochs=request.max_epochs,
        patience_epochs=patience_epochs,
        learning_rate=request.learning_rate,
        seed=request.seed,
        mixed_precision=request.mixed_precision,
        **more,
    )


def training_needs(
    preparation: Preparation, count: int, *, batch_size: int, box_bytes: int, weight_bytes: int, row_bytes: int = 0
) -> Needs:
    """The memory of a training on `count` boxes.

    `box_bytes` is what a step keeps for each box of a batch, `TRAINING_LAYERS * activation_bytes(side)` for instance;
    `weight_bytes` are the network's parameters; `row_bytes` what is kept of each box besides it, labels for instance.
    """
    prepared = 4 * preparation.prepared_size**3
    kept = min(prepared * count, datasets.MEMORY_LIMIT_BYTES) + row_bytes * count
    # Batches wait ready, and each is augmented.
    batch = min(batch_size, count) * (box_bytes + (4 + AUGMENTATION_COPIES) * prepared)
    # The particle table, as it is read and with ids in a dictionary.
    table = 1000 * count
    gpus = torch.cuda.device_count()
    processes = gpus * PROCESS_BYTES if gpus > 1 else 0
    loading = datasets.loading_bytes(preparation)
    return Needs(BASE_BYTES + processes + loading + kept + batch + table + WEIGHT_COPIES * weight_bytes)


def data_facts(task: Task, chosen: Chosen, preparation: Preparation) -> dict[str, Any]:
    """What a model's config says of the data it was trained on, and of how data must be to be used with it.

    No URI: a model may go elsewhere.
    """
    info = chosen.info
    facts: dict[str, Any] = {
        "binning": preparation.binning,
        "pose_normalisation": preparation.pose_normalisation,
        "contrast": CONTRAST,
        "intensity": "each box has mean 0 and standard deviation 1",
        "subtomogram_box_size": chosen.subtomograms.box_size,
        "subtomogram_voxel_size_angstrom": info.voxel_size_angstrom,
        "subtomogram_contrast": info.contrast,
        "subtomogram_tilt_degrees": [info.tilt_min_degrees, info.tilt_max_degrees],
        "subtomograms": len(chosen),
        "subtomograms_digest": content_digest(task.store, chosen.subtomograms.uri),
    }
    if chosen.source != chosen.subtomograms.uri:
        facts["particles_digest"] = content_digest(task.store, chosen.source)
    return facts


def weight_bytes(config: Mapping[str, Any]) -> int:
    """Size of a network's parameters as float32, without making them."""
    with torch.device("meta"):
        return 4 * sum(weights.numel() for weights in architectures.build(config).parameters())


def class_counts(labels: NDArray[np.integer[Any]], names: Mapping[int, str]) -> dict[str, int]:
    """How many boxes each class has, by its name, for `class_counts` in a config."""
    return {name: int((labels == number).sum()) for number, name in names.items()}


def run_job(
    task: Task,
    job: jobs.Job,
    arrays: Mapping[str, NDArray[Any]],
    progress: Progress,
    first_weights: Mapping[str, torch.Tensor] | None = None,
    saved: Callable[[training.Checkpoint], object] = lambda files: None,
) -> training.Training:
    """`jobs.run_job` on the task's device, with its checkpoints; `saved` is called with each."""

    def save(files: training.Checkpoint) -> None:
        task.save_checkpoint(files)
        saved(files)

    return jobs.run_job(
        job,
        arrays,
        device=torch.device(task.device),
        progress=progress,
        save_checkpoint=save,
        checkpoint=task.load_checkpoint(),
        first_weights=first_weights,
        scratch=task.scratch,
    )


def write_trained(
    task: Task, trained: training.Training, config: Mapping[str, Any], metrics: Mapping[str, Any]
) -> tuple[str, str]:
    """Write a model, `model/` with its weights, config and card, and `metrics.json`; their URIs.

    `config` is the network's with `data_facts`, "parameters" (`parameters_of(request)`), and whatever else its use
    needs, "class_names" and "class_counts" (by name) for instance; `metrics` are the operation's own figures. Both get
    the training's figures, the config only single numbers, and the metrics its losses by epoch too.
    """
    figures = training_figures(trained) | dict(metrics)
    scalars = {name: value for name, value in figures.items() if isinstance(value, bool | int | float | str)}
    document = dict(config) | {"figures": scalars}
    files = model_files.write_model(trained.model, document)
    files[model_files.CARD_FILE] = model_card.card(document, architectures.architecture_of(document)).encode()
    for name, data in files.items():
        task.write_bytes(f"model/{name}", data)
    return task.folder_uri("model"), task.write_table("metrics.json", figures | training_curves(trained))


def training_figures(trained: training.Training) -> dict[str, Any]:
    """How a training went, in single numbers."""
    return {
        "epochs": trained.epochs,
        "best_epoch": trained.best_epoch,
        "best_validation_loss": trained.best_validation_loss,
        "stopped_early": trained.stopped_early,
        "restarts": trained.restarts,
    }


def training_curves(trained: training.Training) -> dict[str, Any]:
    """Rows by epoch: "losses" of the attempt that counts and, where there were others, "collapsed_attempts".

    A row has epoch, and training_NAME and validation_NAME for the loss and each other value of the objective.
    """
    curves: dict[str, Any] = {
        "losses": [_loss_row(line) for line in trained.history if line.attempt == trained.restarts]
    }
    collapsed = [
        {"attempt": line.attempt + 1} | _loss_row(line) for line in trained.history if line.attempt < trained.restarts
    ]
    return curves | ({"collapsed_attempts": collapsed} if collapsed else {})


def _loss_row(line: training.Epoch) -> dict[str, Any]:
    row: dict[str, Any] = {
        "epoch": line.epoch,
        "training_loss": line.training["loss"],
        "validation_loss": line.validation["loss"],
    }
    row |= {f"training_{name}": value for name, value in line.training.items()}
    return row | {f"validation_{name}": value for name, value in line.validation.items()}


def model_config(reader: Reader, uri: str, *architecture_names: str) -> dict[str, Any]:
    """A model's config, read alone. Raises FailedPrecondition where its architecture is none of those named, if any
    are, or is not known here.
    """
    config = model_files.read_config(reader.read_file(f"{uri.rstrip('/')}/{model_files.CONFIG_FILE}"))
    name = config.get("architecture")
    if architecture_names and name not in architecture_names:
        needed = " or ".join(repr(each) for each in architecture_names)
        raise FailedPrecondition(f"{uri}: the model's architecture is {name!r}, {needed} is needed")
    architectures.architecture_of(config)
    return config


def open_model(reader: Reader, uri: str, *architecture_names: str) -> tuple[dict[str, Any], torch.nn.Module]:
    """A model's config and its network, ready for use, on the CPU.

    Raises FailedPrecondition as `model_config`, DataLoss where its files are not those that were written.
    """
    config = model_config(reader, uri, *architecture_names)
    weights = reader.read_file(f"{uri.rstrip('/')}/{model_files.WEIGHTS_FILE}")
    return config, model_files.read_model(config, weights, architectures.build)


def check_fits(config: Mapping[str, Any], subtomograms: Subtomograms) -> None:
    """FailedPrecondition where the subtomograms are not of the size that a model was trained on."""
    size, voxel_size = config["subtomogram_box_size"], config["subtomogram_voxel_size_angstrom"]
    found = subtomograms.info.voxel_size_angstrom
    if subtomograms.box_size != size or not math.isclose(found, voxel_size, rel_tol=VOXEL_SIZE_TOLERANCE):
        raise FailedPrecondition(
            f"{subtomograms.uri} has boxes of {subtomograms.box_size} voxels of {found:g} Å; the model was trained on "
            f"boxes of {size} voxels of {voxel_size:g} Å: extract the subtomograms alike, or train a model on them"
        )
