"""TrainConformation, DecodeConformations."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.fourier import fourier_crop
from cryofleet.operations import parameters_of
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import VolumeInfo
from services.learning import (
    conformation,
    conformation_boxes,
    conformation_path,
    datasets,
    orientation_share,
    training,
)
from services.learning.preparation import CONTRAST, Preparation
from services.learning.service import inputs
from services.learning.service.registry import service

Array = NDArray[np.float32]

#: What a training step keeps for a box, in outputs of the largest layer: three encodings, two decodings, spectra.
TRAINING_LAYERS = 20
#: What turning a box and taking its difference to the average takes, in boxes.
TURNING_COPIES = 30
#: A row of the points' table, as numbers and as text.
ROW_BYTES = 2000


@dataclass(frozen=True)
class _TrainingSet:
    """Aligned subtomograms, and what is done to them before the network sees them."""

    chosen: inputs.Chosen
    preparation: Preparation
    rotations: Rotation
    shifts: NDArray[np.float64]
    """(n, 3) as x, y, z in voxels of the prepared boxes."""
    cutoff: float

    @property
    def voxel_size_angstrom(self) -> float:
        """Of the prepared boxes."""
        return self.chosen.info.voxel_size_angstrom * self.preparation.binning

    @property
    def tilts(self) -> tuple[float, float]:
        return self.chosen.info.tilt_min_degrees, self.chosen.info.tilt_max_degrees


def _training_set(request: learning_pb2.TrainConformationRequest, reader: Reader) -> _TrainingSet:
    chosen = inputs.chosen(reader, request.subtomograms_uri, request.particles_uri)
    preparation = inputs.preparation(chosen.subtomograms, request.binning, pose_normalisation=False)
    conformation.check_box_size(preparation.prepared_size)
    if len(chosen) < 2:
        raise InvalidArgument(f"{chosen.source} has 1 particle; training needs at least 2, one for validation")
    rotations = chosen.particles.rotations()
    if rotations is None:
        raise FailedPrecondition(
            f"{chosen.source} holds no orientations, and conformations can only be told apart in aligned subtomograms: "
            "give as particles_uri the particles that alignment.Align, or the last round of an average, wrote"
        )
    voxel_size = chosen.info.voxel_size_angstrom * preparation.binning
    return _TrainingSet(
        chosen=chosen,
        preparation=preparation,
        rotations=rotations,
        shifts=chosen.particles.shifts() * (chosen.particles.voxel_size_angstrom / voxel_size),
        cutoff=conformation.cutoff_of(request.low_pass_angstrom, voxel_size),
    )


def _train_needs(request: learning_pb2.TrainConformationRequest, reader: Reader) -> Needs:
    found = _training_set(request, reader)
    if request.mask_uri:
        _check_mask(reader.open_volume(request.mask_uri).info, request.mask_uri, found)
    side = found.preparation.prepared_size
    needs = inputs.training_needs(
        found.preparation,
        len(found.chosen),
        batch_size=request.batch_size,
        box_bytes=TRAINING_LAYERS * conformation.activation_bytes(side),
        weight_bytes=conformation.weight_bytes(side),
        row_bytes=ROW_BYTES,
    )
    mask = 4 * 4 * found.preparation.box_size**3 if request.mask_uri else 0
    return Needs(needs.memory_bytes + mask + TURNING_COPIES * 4 * side**3 + conformation.BATCH_BYTES)


@service.operation(needs=_train_needs)
def train_conformation(
    request: learning_pb2.TrainConformationRequest, task: Task
) -> learning_pb2.TrainConformationResult:
    """Train an autoencoder of aligned subtomograms that maps each to a point in the space of conformations."""
    found = _training_set(request, task)
    chosen, preparation = found.chosen, found.preparation
    mask = _read_mask(request, task, found)
    training.use_deterministic_algorithms(task.threads)
    device = torch.device(task.device)
    average, differences = conformation_boxes.differences(
        datasets.prepared_chunks(chosen.read, chosen.ids, preparation),
        found.rotations,
        found.shifts,
        box_size=preparation.prepared_size,
        tilts=found.tilts,
        cutoff=found.cutoff,
        scratch=task.scratch,
        memory_limit_bytes=datasets.MEMORY_LIMIT_BYTES,
        progress=part(task.progress, 0.0, 0.2),
    )
    turns = found.rotations.as_matrix().astype(np.float32)
    network = conformation.config(preparation.prepared_size, request.dimensions, found.cutoff, found.tilts)

    def build(generator: torch.Generator) -> torch.nn.Module:
        model = conformation.from_config(network, generator)
        model.average.copy_(torch.from_numpy(average))
        model.mask.copy_(torch.from_numpy(mask))
        return model

    training_rows, validation_rows = datasets.split_rows(len(chosen), request.validation_fraction, request.seed)
    trained = training.train(
        build,
        conformation.ConformationLoss(),
        datasets.ArrayBatches(
            {"boxes": differences, "rotations": turns},
            training_rows,
            validation_rows,
            batch_size=request.batch_size,
            seed=request.seed,
            device=device,
        ),
        inputs.training_options(request, patience_epochs=request.patience_epochs),
        device=device,
        progress=part(task.progress, 0.2, 0.95),
        save_checkpoint=task.save_checkpoint,
        checkpoint=task.load_checkpoint(),
    )
    assert isinstance(trained.model, conformation.ConformationAutoencoder)
    points = conformation.points_of(trained.model, differences, turns, device, part(task.progress, 0.95, 1.0))
    best = next(line for line in trained.history if line.epoch == trained.best_epoch)
    share, shuffled = orientation_share.orientation_share(points.astype(np.float64), found.rotations, request.seed)
    metrics = {
        "training_subtomograms": len(training_rows),
        "validation_subtomograms": len(validation_rows),
        "explained_share": 1 - best.validation["error"] / best.validation["without"],
        "share_of_orientations_told": share,
        "share_of_orientations_told_by_chance": float(np.percentile(shuffled, 95)),
        "point_standard_deviations": points.std(axis=0, dtype=np.float64).tolist(),
    }
    config = (
        network
        | inputs.data_facts(task, chosen, preparation)
        | {
            "voxel_size_angstrom": found.voxel_size_angstrom,
            "points_sha256": _points_digest(chosen.ids, points),
            "parameters": parameters_of(request),
        }
    )
    model_uri, metrics_uri = inputs.write_trained(task, trained, config, metrics)
    table = {"dimensions": request.dimensions, "ids": chosen.ids.tolist(), "points": points.tolist()}
    return learning_pb2.TrainConformationResult(
        model_uri=model_uri,
        metrics_uri=metrics_uri,
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        best_validation_loss=trained.best_validation_loss,
        points_uri=task.write_table("points.json", table),
    )


def _check_mask(info: VolumeInfo, uri: str, found: _TrainingSet) -> None:
    """Raises InvalidArgument unless a mask is of the boxes' size, as extracted."""
    box = found.chosen.info
    size_fits = math.isclose(info.voxel_size_angstrom, box.voxel_size_angstrom, rel_tol=0.01)
    if info.count is not None or info.shape != box.shape or not size_fits:
        raise InvalidArgument(
            f"the mask {uri} is {info.array_shape} voxels of {info.voxel_size_angstrom:g} Å; one volume of the boxes' "
            f"{box.shape} voxels of {box.voxel_size_angstrom:g} Å is needed"
        )


def _read_mask(request: learning_pb2.TrainConformationRequest, task: Task, found: _TrainingSet) -> Array:
    """Where conformations may differ, of the prepared boxes' size: the request's mask within the box's sphere.

    Raises InvalidArgument for values outside 0 to 1 and for a mask that is zero there.
    """
    sphere = conformation.box_sphere(found.preparation.prepared_size)
    if not request.mask_uri:
        return sphere
    volume = task.open_volume(request.mask_uri)
    _check_mask(volume.info, request.mask_uri, found)
    given = volume.read()
    # Written so that NaN is refused too.
    if not (given.min() >= 0 and given.max() <= 1 + 1e-6):
        raise InvalidArgument(f"the mask {request.mask_uri} holds values outside 0 to 1")
    mask: Array = np.clip(fourier_crop(given, found.preparation.binning), 0, 1) * sphere
    if mask.max() < 0.5:
        raise InvalidArgument(
            f"the mask {request.mask_uri} is zero throughout the sphere of the box, outside of which boxes that are "
            "turned have nothing"
        )
    return mask


def _points_digest(ids: NDArray[np.int64], points: Array) -> str:
    """Of the points that a model gave, by which they are known as its own."""
    return hashlib.sha256(ids.astype("<i8").tobytes() + points.astype("<f4").tobytes()).hexdigest()


@dataclass(frozen=True)
class _Points:
    ids: NDArray[np.int64]
    points: Array


def _read_points(uri: str, table: Mapping[str, Any], config: Mapping[str, Any]) -> _Points:
    """Raises InvalidArgument for a table that is none of points, FailedPrecondition for one of another model."""
    wrong = InvalidArgument(f"{uri} is no table of points: give the points_uri that TrainConformation wrote")
    try:
        ids, points = np.array(table["ids"]), np.array(table["points"], np.float32)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise wrong from None
    if ids.ndim != 1 or ids.dtype.kind != "i" or points.ndim != 2 or len(ids) != len(points) or len(ids) < 2:
        raise wrong
    if not np.isfinite(points).all():
        raise InvalidArgument(f"{uri}: some of its points are not finite numbers")
    if points.shape[1] != config["dimensions"]:
        raise FailedPrecondition(
            f"{uri} holds points of {points.shape[1]} dimensions; the model's space has {config['dimensions']}: give "
            "the points of the same training"
        )
    if _points_digest(ids, points) != config.get("points_sha256"):
        raise FailedPrecondition(f"{uri} holds points of another model: give the points of the same training")
    return _Points(ids, points)


def _decode_config(request: learning_pb2.DecodeConformationsRequest, reader: Reader) -> dict[str, Any]:
    """The model's config, whole. Raises FailedPrecondition."""
    config = inputs.model_config(reader, request.model_uri, conformation.NAME)
    conformation.check_config(config)
    size = config.get("voxel_size_angstrom")
    if not isinstance(size, int | float) or isinstance(size, bool) or not 0 < size < math.inf:
        raise FailedPrecondition(
            f"the model's config says voxel_size_angstrom is {size!r}: it is damaged, train it again"
        )
    return config


def _decode_needs(request: learning_pb2.DecodeConformationsRequest, reader: Reader) -> Needs:
    side = _decode_config(request, reader)["box_size"]
    # A table's text, its numbers as objects, and the graph of neighbours.
    table = 20 * reader.open_blob(request.points_uri).size_bytes
    volumes = 3 * 4 * request.steps * side**3
    layers = inputs.INFERENCE_LAYERS * max(conformation.BATCH_BYTES, conformation.activation_bytes(side))
    return Needs(inputs.BASE_BYTES + table + volumes + layers + 4 * conformation.weight_bytes(side))


@service.operation(needs=_decode_needs)
def decode_conformations(
    request: learning_pb2.DecodeConformationsRequest, task: Task
) -> learning_pb2.DecodeConformationsResult:
    """Decode volumes along a path through the space of conformations."""
    config = _decode_config(request, task)
    found = _read_points(request.points_uri, task.read_table(request.points_uri), config)
    points = found.points.astype(np.float64)
    training.use_deterministic_algorithms(task.threads)
    device = torch.device(task.device)
    table: dict[str, Any]
    if request.waypoints:
        path = conformation_path.through_crowd(points, _rows_of(request, found.ids), request.steps)
        table = {"waypoints": list(request.waypoints)}
    else:
        path = conformation_path.along_component(points, request.component, request.steps)
        _, _, shares = conformation_path.principal_components(points)
        table = {"component": request.component, "shares_of_variance": shares.tolist()}
    _, model = inputs.open_model(task, request.model_uri, conformation.NAME)
    assert isinstance(model, conformation.ConformationAutoencoder)
    volumes = conformation.volumes_of(model.to(device), path.astype(np.float32), device, task.progress)
    info = VolumeInfo((config["box_size"],) * 3, config["voxel_size_angstrom"], CONTRAST, count=request.steps)
    table |= {"points": path.tolist(), "nearest_subtomograms": conformation_path.nearest_counts(points, path).tolist()}
    return learning_pb2.DecodeConformationsResult(
        volumes_uri=task.write_volume("volumes.mrc", volumes, info),
        path_uri=task.write_table("path.json", table),
    )


def _rows_of(request: learning_pb2.DecodeConformationsRequest, ids: NDArray[np.int64]) -> list[int]:
    """The waypoints' rows. Raises InvalidArgument for particles that have no point, and for fewer than two."""
    row_of = {int(name): row for row, name in enumerate(ids)}
    for name in request.waypoints:
        if name not in row_of:
            raise InvalidArgument(f"waypoints: particle {name} has no point in {request.points_uri}")
    if len(request.waypoints) < 2:
        raise InvalidArgument("waypoints: a path needs two particles at least, 1 is given")
    return [row_of[name] for name in request.waypoints]
