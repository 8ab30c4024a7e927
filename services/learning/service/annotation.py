"""TrainAnnotator, Annotate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cryofleet.artifacts import content_digest
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.in_tomogram import tomogram_name
from cryofleet.operations import parameters_of
from cryofleet.particles import Particles
from cryofleet.progress import Progress, part
from cryofleet.scratch_array import reserved_array
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import Volume, VolumeInfo
from services.learning import (
    annotator,
    connected_parts,
    datasets,
    painted,
    section_annotation,
    tomogram_scale,
    training,
)
from services.learning.preparation import CONTRAST
from services.learning.service import inputs
from services.learning.service.registry import service

#: What a training step keeps of a patch, in all layers' outputs: those, batch normalisation's, and gradients.
TRAINING_OUTPUTS = 5
#: What measuring the scale takes: samples, all of them together, and sorted.
SCALE_BYTES = 4 * 4 * tomogram_scale.SAMPLES + 3 * tomogram_scale.SLAB_BYTES
#: What a picture takes while it is read, for each of its pixels.
PICTURE_BYTES = 48
#: An epoch shows each patch in so many of its 8 turns and mirrors.
TURNS = 8


@dataclass(frozen=True)
class _PaintedFile:
    uri: str
    section: int | None
    """Of a picture; None for a mask."""


def _open_tomogram(reader: Reader, uri: str) -> Volume:
    volume = reader.open_volume(uri)
    if volume.info.count is not None:
        raise FailedPrecondition(f"{uri} is a stack of {volume.info.count} volumes; a tomogram is needed")
    return volume


def _painted_files(request: learning_pb2.TrainAnnotatorRequest, reader: Reader) -> list[_PaintedFile]:
    """The painted files, pictures with their sections. Raises InvalidArgument where there are not as many of both."""
    pictures = [
        reader.open_blob(uri).read(0, len(painted.PNG_START)) == painted.PNG_START for uri in request.painted_uris
    ]
    if sum(pictures) != len(request.sections):
        raise InvalidArgument(
            f"sections: {len(request.sections)} are given for {sum(pictures)} PNG pictures among painted_uris; give "
            "the section (z, from 0) of each picture, in their order, and none for masks"
        )
    sections = iter(request.sections)
    return [
        _PaintedFile(uri, next(sections) if picture else None)
        for uri, picture in zip(request.painted_uris, pictures, strict=True)
    ]


def _train_needs(request: learning_pb2.TrainAnnotatorRequest, reader: Reader) -> Needs:
    shape = _open_tomogram(reader, request.tomogram_uri).info.shape
    _painted_files(request, reader)
    size = request.patch_size_voxels
    # As many patches as cover all sections.
    all_patches = shape[0] * math.prod(-(-side // size) for side in shape[1:])
    patches = min(painted.patch_limit(size), all_patches) * painted.patch_bytes(size)
    outputs = annotator.activation_bytes((size + 2 * annotator.MARGIN) ** 2)
    step = request.batch_size * (TRAINING_OUTPUTS * outputs + 4 * painted.patch_bytes(size))
    reading = SCALE_BYTES + PICTURE_BYTES * shape[1] * shape[2]
    return Needs(inputs.BASE_BYTES + patches + max(reading, step))


@service.operation(needs=_train_needs)
def train_annotator(request: learning_pb2.TrainAnnotatorRequest, task: Task) -> learning_pb2.TrainAnnotatorResult:
    """Train a small 2D network to find one feature in a tomogram's sections, from painted patches."""
    volume = _open_tomogram(task, request.tomogram_uri)
    files = _painted_files(request, task)
    training.use_deterministic_algorithms(task.threads)
    device = torch.device(task.device)
    size = request.patch_size_voxels

    masks = _read_painted(task, files, volume.info.shape, part(task.progress, 0.0, 0.03))
    places = painted.place_patches(masks, size, request.seed, part(task.progress, 0.03, 0.05))
    training_rows, validation_rows = painted.split_patches(places, size, request.validation_fraction, request.seed)
    scale = tomogram_scale.measure_scale(
        volume.slab, volume.info.shape, volume.info.contrast, volume.uri, part(task.progress, 0.05, 0.08)
    )
    arrays = painted.cut_patches(volume.slab, masks, places, size, scale, part(task.progress, 0.08, 0.1))
    shown = painted.balanced(training_rows, places)
    batches = datasets.ArrayBatches(
        arrays,
        np.tile(shown, TURNS) if request.augment else shown,
        validation_rows,
        batch_size=request.batch_size,
        seed=request.seed,
        device=device,
    )
    trained = training.train(
        annotator.SectionAnnotator,
        annotator.AnnotatorLoss(request.augment),
        batches,
        inputs.training_options(request, patience_epochs=request.patience_epochs),
        device=device,
        progress=part(task.progress, 0.1, 1.0),
        save_checkpoint=task.save_checkpoint,
        checkpoint=task.load_checkpoint(),
    )
    dice = _dice(trained.model.eval(), arrays, validation_rows, device)
    metrics = {
        "patches": len(training_rows),
        "validation_patches": len(validation_rows),
        "patches_left_out": len(places) - len(training_rows) - len(validation_rows),
        "feature_voxels": sum(place.feature_voxels for place in places),
        "other_voxels": sum(place.other_voxels for place in places),
        "dice": dice,
    }
    config = annotator.config() | {
        "feature": request.feature,
        "voxel_size_angstrom": volume.info.voxel_size_angstrom,
        "contrast": CONTRAST,
        "intensity": tomogram_scale.INTENSITY,
        "tomogram_digest": content_digest(task.store, volume.uri),
        "painted_digests": [content_digest(task.store, file.uri) for file in files],
        "parameters": parameters_of(request),
    }
    model_uri, metrics_uri = inputs.write_trained(task, trained, config, metrics)
    return learning_pb2.TrainAnnotatorResult(
        model_uri=model_uri,
        metrics_uri=metrics_uri,
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        best_validation_loss=trained.best_validation_loss,
        patches=len(training_rows),
        dice=dice,
    )


def _read_painted(
    task: Task, files: list[_PaintedFile], shape: tuple[int, int, int], progress: Progress
) -> NDArray[np.uint8]:
    """What is painted, `[z, y, x]`, in a file of scratch that is mapped into memory."""
    masks = reserved_array(task.scratch / "painted.uint8", shape, np.uint8)
    for number, file in enumerate(files):
        path: Path = task.local_copy(file.uri)
        if file.section is None:
            share = part(progress, number / len(files), (number + 1) / len(files))
            painted.add_mask(masks, path, file.uri, task.scratch / f"unpacked-{number}", share)
        else:
            painted.add_picture(masks, file.section, path, file.uri)
        progress((number + 1) / len(files), "reading what was painted", files=number + 1)
    return masks


def _dice(
    model: torch.nn.Module, arrays: dict[str, NDArray[Any]], rows: NDArray[np.int64], device: torch.device
) -> float:
    """Of the painted voxels of patches `rows`."""

    def logits_of(patch: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = model(torch.from_numpy(patch)[None, None].to(device))[0].cpu().numpy()
        return logits

    return painted.dice_of(logits_of, arrays, rows)


@dataclass(frozen=True)
class _Annotation:
    """A tomogram, and the features that the models find in it."""

    volume: Volume
    features: list[str]


def _annotation(request: learning_pb2.AnnotateRequest, reader: Reader) -> _Annotation:
    """Raises FailedPrecondition where a model is none of an annotator, or of tomograms of another voxel size."""
    volume = _open_tomogram(reader, request.tomogram_uri)
    features: list[str] = []
    for uri in request.model_uris:
        config = inputs.model_config(reader, uri, annotator.NAME)
        annotator.check_config(config, uri)
        size, found = config["voxel_size_angstrom"], volume.info.voxel_size_angstrom
        if not math.isclose(found, size, rel_tol=inputs.VOXEL_SIZE_TOLERANCE):
            raise FailedPrecondition(
                f"{volume.uri} has voxels of {found:g} Å; {uri} was trained on a tomogram of voxels of {size:g} Å: bin "
                "the tomogram to that size, or paint and train on this one"
            )
        if config["feature"] in features:
            raise InvalidArgument(f"model_uris: two models find the feature {config['feature']!r}; give one of them")
        features.append(config["feature"])
    return _Annotation(volume, features)


def _annotate_needs(request: learning_pb2.AnnotateRequest, reader: Reader) -> Needs:
    found = _annotation(request, reader)
    shape = found.volume.info.shape
    slab = tomogram_scale.slab_sections(shape) * shape[1] * shape[2]
    work = section_annotation.memory_bytes(shape)
    if request.picks:
        work += connected_parts.memory_bytes(slab, math.prod(shape))
    return Needs(inputs.BASE_BYTES + max(SCALE_BYTES, work) + (len(found.features) << 20))


@service.operation(needs=_annotate_needs)
def annotate(request: learning_pb2.AnnotateRequest, task: Task) -> learning_pb2.AnnotateResult:
    """Find features in all sections of a tomogram, the strongest counting where several claim a voxel."""
    found = _annotation(request, task)
    volume, features = found.volume, found.features
    training.use_deterministic_algorithms(task.threads)
    device = torch.device(task.device)
    networks = [inputs.open_model(task, uri, annotator.NAME)[1].to(device) for uri in request.model_uris]
    info = VolumeInfo(volume.info.shape, volume.info.voxel_size_angstrom, CONTRAST)
    scale = tomogram_scale.measure_scale(
        volume.slab, info.shape, volume.info.contrast, volume.uri, part(task.progress, 0.0, 0.1)
    )
    counts = np.zeros(len(features) + 1, np.int64)
    gathered = connected_parts.ConnectedParts(len(features))
    slabs = section_annotation.annotate(
        networks, volume.slab, info.shape, scale, request.threshold, device, part(task.progress, 0.1, 1.0)
    )
    with task.volume_writer("labels.mrc", info) as labels, task.volume_writer("scores.mrc", info) as scores:
        for slab in slabs:
            labels.write(slab.labels)
            scores.write(slab.scores)
            counts += np.bincount(slab.labels.reshape(-1), minlength=len(counts))
            if request.picks:
                gathered.add(slab.labels, slab.scores)
    voxels = counts[1:].tolist()
    metrics: dict[str, Any] = {"features": [{"name": n, "voxels": v} for n, v in zip(features, voxels, strict=True)]}
    result = learning_pb2.AnnotateResult(labels_uri=labels.uri, scores_uri=scores.uri, names=features, voxels=voxels)
    if request.picks:
        parts = gathered.parts()
        kept = parts.at_least(request.min_diameter_angstrom, info.voxel_size_angstrom)
        for number, row in enumerate(metrics["features"], start=1):
            row |= {"parts": int((parts.labels == number).sum()), "particles": int((kept.labels == number).sum())}
        name = tomogram_name(task.store, volume)
        result.particles_uri = task.write_particles("particles.parquet", _particles(kept, features, info, name))
    result.metrics_uri = task.write_table("metrics.json", metrics)
    return result


def _particles(parts: connected_parts.Parts, features: list[str], info: VolumeInfo, tomogram: str) -> Particles:
    """The parts' centres; a particle's class is its feature's number in the label volume."""
    return Particles.from_positions(
        parts.centres,
        info.voxel_size_angstrom,
        tomogram,
        info.shape,
        score=parts.scores,
        diameter_angstrom=parts.diameters_angstrom(info.voxel_size_angstrom),
        class_id=parts.labels.astype(np.int32),
        class_name=np.array([features[label - 1] for label in parts.labels], object),
    )
