"""TrainSegmenter."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.operations import parameters_of
from cryofleet.progress import part
from cryofleet.scratch_array import reserved_array
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import VolumeInfo
from services.learning import autoencoder, datasets, edss3d, jobs, training, weak_labels
from services.learning.preparation import CONTRAST, Preparation
from services.learning.service import encoding, inputs
from services.learning.service.registry import service

#: What a training step keeps for a box, in outputs of the largest layer: measured at 32^3, with their gradients.
TRAINING_LAYERS = 8
#: So many members of each class are shown with their labels.
SHOWN = 4
MAX_CLASSES = 254


@dataclass(frozen=True)
class _Classes:
    """The particles' classes as labels: `labels` (n,), 0 for those of a class that is named as the background, whose
    boxes hold nothing to be found; `names` with the background first.
    """

    labels: NDArray[np.int32]
    names: list[str]


@dataclass(frozen=True)
class _TrainingSet:
    """Subtomograms of chosen clusters, their classes, and what is done to them before the network sees them."""

    encoding: encoding.EncodingSet
    classes: _Classes
    levels: dict[str, float]
    """Of each class but the background, where its boxes are cut."""
    preparation: Preparation

    @property
    def chosen(self) -> inputs.Chosen:
        return self.encoding.chosen


def _training_set(request: learning_pb2.TrainSegmenterRequest, reader: Reader) -> _TrainingSet:
    what = encoding.encoding_set(reader, request.subtomograms_uri, request.model_uri, request.particles_uri)
    if len(what.chosen) < 2:
        raise InvalidArgument(f"{request.particles_uri} has 1 particle; training needs at least 2, one for validation")
    # Tomograms can't be turned to anything's pose, so the network sees boxes as they were extracted.
    preparation = inputs.preparation(what.chosen.subtomograms, what.preparation.binning, pose_normalisation=False)
    classes = _classes(what.chosen)
    return _TrainingSet(what, classes, _levels(request, classes.names), preparation)


def _levels(request: learning_pb2.TrainSegmenterRequest, names: list[str]) -> dict[str, float]:
    """InvalidArgument where `class_levels` names no class or one twice, or gives no level."""
    levels = weak_labels.parse_levels(request.class_levels)
    for name in levels:
        if name not in names[1:]:
            raise InvalidArgument(f"class_levels: {name!r} is no class; there are {', '.join(map(repr, names[1:]))}")
    return dict.fromkeys(names[1:], request.level) | levels


def _classes(chosen: inputs.Chosen) -> _Classes:
    """InvalidArgument where a particle's class is none, or a class has no name, two, or that of another."""
    table = chosen.particles.table
    needed = "give the particles as SelectClusters writes them"
    for column in ("class_id", "class_name"):
        if column not in table:
            raise InvalidArgument(f"{chosen.source} has no column {column}: {needed}")
    numbers = table["class_id"].to_numpy()
    if numbers.min() < 1:
        particle = chosen.ids[int((numbers < 1).argmax())]
        raise InvalidArgument(f"particle {particle} of {chosen.source} has class {numbers.min()}, below 1: {needed}")
    ids = np.unique(numbers)
    if len(ids) > MAX_CLASSES:
        raise InvalidArgument(f"{chosen.source} has {len(ids)} classes; {MAX_CLASSES} are possible")
    names, labels = [edss3d.BACKGROUND], np.zeros(len(numbers), np.int32)
    for number in ids:
        found = sorted(set(table["class_name"].to_numpy()[numbers == number].tolist()))
        if len(found) > 1:
            raise InvalidArgument(f"{chosen.source}: class {number} is named {found[0]!r} and {found[1]!r}: {needed}")
        if found[0] == edss3d.BACKGROUND:
            continue
        if not found[0] or found[0] in names:
            raise InvalidArgument(
                f"{chosen.source}: class {number} is named {found[0]!r}; each class needs a name of its own"
            )
        labels[numbers == number] = len(names)
        names.append(found[0])
    if len(names) == 1:
        raise InvalidArgument(f"{chosen.source} has no class but {edss3d.BACKGROUND!r}: give one of a structure too")
    return _Classes(labels, names)


def _train_needs(request: learning_pb2.TrainSegmenterRequest, reader: Reader) -> Needs:
    found = _training_set(request, reader)
    inputs.augmentation(request, found.chosen.info)
    side = found.preparation.prepared_size
    needs = inputs.training_needs(
        found.preparation,
        len(found.chosen),
        batch_size=request.batch_size,
        box_bytes=TRAINING_LAYERS * autoencoder.activation_bytes(side),
        weight_bytes=edss3d.weight_bytes(len(found.classes.names), request.skip),
        row_bytes=side**3,
    )
    # Labelling comes before training, and what it takes is free again.
    labelling = found.encoding.memory_bytes + len(found.chosen) * side**3
    return Needs(max(needs.memory_bytes, labelling))


@service.operation(needs=_train_needs)
def train_segmenter(request: learning_pb2.TrainSegmenterRequest, task: Task) -> learning_pb2.TrainSegmenterResult:
    """Train the segmentation network (EDSS3D) on decoded members of chosen clusters."""
    found = _training_set(request, task)
    chosen, classes, preparation = found.chosen, found.classes, found.preparation
    training.use_deterministic_algorithms(task.threads)
    targets = _label_boxes(request, task, found)
    scaled = inputs.scaled(chosen.subtomograms, preparation, part(task.progress, 0.05, 0.07))
    boxes = datasets.load_prepared(chosen.read, chosen.ids, scaled, task.scratch, part(task.progress, 0.07, 0.1))
    labels_info = VolumeInfo(
        shape=(preparation.prepared_size,) * 3,
        voxel_size_angstrom=chosen.info.voxel_size_angstrom * preparation.binning,
        contrast=CONTRAST,
        tilt_min_degrees=chosen.info.tilt_min_degrees,
        tilt_max_degrees=chosen.info.tilt_max_degrees,
    )
    shown = np.concatenate([np.flatnonzero(classes.labels == number)[:SHOWN] for number in np.unique(classes.labels)])
    labels_uri = task.write_volume(
        "labels.mrc",
        targets[shown].astype(np.float32),
        replace(labels_info, count=len(shown)),
    )

    counts = inputs.class_counts(classes.labels, dict(enumerate(classes.names)))
    config = (
        edss3d.config(classes.names, request.skip)
        | inputs.data_facts(task, chosen, preparation)
        | {
            "box_size": preparation.prepared_size,
            "levels": found.levels,
            "box_smoothing_angstrom": request.box_smoothing_angstrom,
            "intensity": edss3d.INTENSITY,
            "class_counts": {name: count for name, count in counts.items() if count},
        }
    )
    job = jobs.Job(
        network=config,
        objective={"name": edss3d.SegmentationLoss.NAME},
        options=inputs.training_options(request, patience_epochs=request.patience_epochs),
        batch_size=request.batch_size,
        validation_fraction=request.validation_fraction,
        augmentation=inputs.augmentation(request, chosen.info),
        stratify="classes",
    )
    arrays: dict[str, NDArray[Any]] = {"boxes": boxes, "targets": targets, "classes": classes.labels}
    trained = inputs.run_job(task, job, arrays, part(task.progress, 0.1, 1.0))
    training_rows, validation_rows = jobs.split(job, arrays)
    metrics = {
        "training_subtomograms": len(training_rows),
        "validation_subtomograms": len(validation_rows),
        "shares_of_voxels": _shares(targets, classes.names),
    }
    model_uri, metrics_uri = inputs.write_trained(
        task, trained, config | {"parameters": parameters_of(request)}, metrics
    )
    return learning_pb2.TrainSegmenterResult(
        model_uri=model_uri,
        metrics_uri=metrics_uri,
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        best_validation_loss=trained.best_validation_loss,
        labels_uri=labels_uri,
        names=classes.names,
    )


def _label_boxes(request: learning_pb2.TrainSegmenterRequest, task: Task, found: _TrainingSet) -> NDArray[np.uint8]:
    """The voxels' classes `[i, z, y, x]` of the chosen boxes; in memory where the boxes would fit there four times
    over.
    """
    chosen, preparation = found.chosen, found.preparation
    model, _ = encoding.open_autoencoder(task, request.model_uri)
    # A box of the background is labelled as such throughout, whatever its level.
    levels = np.array([request.level, *found.levels.values()], np.float32)[found.classes.labels]
    shape = (len(chosen), *(preparation.prepared_size,) * 3)
    targets: NDArray[np.uint8]
    if math.prod(shape) <= datasets.MEMORY_LIMIT_BYTES:
        targets = np.empty(shape, np.uint8)
    else:
        targets = reserved_array(task.scratch / "targets.uint8", shape, np.uint8)
    for first, boxes in datasets.prepared_chunks(chosen.read, chosen.ids, preparation):
        stop = first + len(boxes)
        weak_labels.label_boxes(
            model,
            boxes,
            found.classes.labels[first:stop],
            targets[first:stop],
            level=levels[first:stop],
            smoothing_voxels=request.box_smoothing_angstrom / (chosen.info.voxel_size_angstrom * preparation.binning),
            pose_normalisation=found.encoding.preparation.pose_normalisation,
            device=torch.device(task.device),
            progress=part(task.progress, 0.05 * first / len(chosen), 0.05 * stop / len(chosen)),
        )
    return targets


def _shares(targets: NDArray[np.uint8], names: list[str]) -> dict[str, float]:
    """The share of all boxes' voxels that each class has."""
    counts = np.zeros(len(names), np.int64)
    for first in range(0, len(targets), 64):
        counts += np.bincount(targets[first : first + 64].reshape(-1), minlength=len(names))
    return {name: int(count) / targets.size for name, count in zip(names, counts, strict=True)}
