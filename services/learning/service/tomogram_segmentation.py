"""TrainTomogramSegmenter and PickSegmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
from cryofleet.volumes import Volume
from services.learning import (
    connected_parts,
    datasets,
    deepfinder,
    jobs,
    labelled_patches,
    tomogram_scale,
    touching_parts,
    training,
)
from services.learning.augmentation import Augmentation
from services.learning.labelled_patches import Classes, LabelledTomogram
from services.learning.preparation import CONTRAST
from services.learning.service import inputs
from services.learning.service.registry import service

#: The share of max_epochs from which on the learning rate falls.
DECAY_FROM = 0.5


@dataclass(frozen=True)
class _Labelled:
    """Tomograms with their labels, and what the labels are called."""

    tomograms: list[Volume]
    labels: list[Volume]
    names: list[str]


def _labelled(request: learning_pb2.TrainTomogramSegmenterRequest, reader: Reader) -> _Labelled:
    """Raises InvalidArgument for labels of another shape or voxel size than their tomogram's, for tables that disagree,
    and for patches that the network can't take; FailedPrecondition for stacks and tomograms of several voxel sizes.
    """
    if request.patch_size_voxels % deepfinder.POOLING:
        raise InvalidArgument(
            f"patch_size_voxels is {request.patch_size_voxels}; it must be a multiple of {deepfinder.POOLING}"
        )
    if request.channels % 2:
        raise InvalidArgument(f"channels is {request.channels}; it must be an even number")
    tomograms = [_open_volume(reader, uri, "a tomogram") for uri in request.tomogram_uris]
    labels = [_open_volume(reader, uri, "a label volume") for uri in request.labels_uris]
    for tomogram, label in zip(tomograms, labels, strict=True):
        size, needed = tomogram.info.voxel_size_angstrom, tomograms[0].info.voxel_size_angstrom
        if not math.isclose(size, needed, rel_tol=inputs.VOXEL_SIZE_TOLERANCE):
            raise FailedPrecondition(
                f"{tomogram.uri} has voxels of {size:g} Å and {tomograms[0].uri} of {needed:g} Å; a network learns at "
                "one voxel size: rescale the tomograms and their labels"
            )
        if label.info.shape != tomogram.info.shape:
            raise InvalidArgument(
                f"labels_uris: {label.uri} has {_xyz(label)} voxels, its tomogram {tomogram.uri} {_xyz(tomogram)} "
                "(x, y, z): labels must be of the tomogram's size, in the order of the tomograms"
            )
        found = label.info.voxel_size_angstrom
        if not math.isclose(found, size, rel_tol=inputs.VOXEL_SIZE_TOLERANCE):
            raise InvalidArgument(
                f"labels_uris: {label.uri} has voxels of {found:g} Å, its tomogram {tomogram.uri} of {size:g} Å: "
                "labels must be of the tomogram's voxels"
            )
        labelled_patches.regions(
            tomogram.info.shape, request.patch_size_voxels, request.validation_fraction, tomogram.uri
        )
    return _Labelled(tomograms, labels, _label_names(request, reader))


def _label_names(request: learning_pb2.TrainTomogramSegmenterRequest, reader: Reader) -> list[str]:
    """Of labels 0 and on. Raises InvalidArgument for a table that has none, or others than the first."""
    names = list(request.label_names)
    for uri in request.names_uris:
        found = reader.read_table(uri).get("label_names")
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found) or not found:
            raise InvalidArgument(
                f"names_uris: {uri} has no label_names, a list of what the labels 0, 1, 2 and so on are called"
            )
        if len(found) > labelled_patches.MAX_LABELS:
            raise InvalidArgument(
                f"names_uris: {uri} names {len(found)} labels; {labelled_patches.MAX_LABELS} are possible"
            )
        if names and found != names:
            raise InvalidArgument(
                f"names_uris: {uri} and {request.names_uris[0]} name the labels differently; tomograms that are learnt "
                "from together need labels of the same meaning"
            )
        names = found
    return names


def _open_volume(reader: Reader, uri: str, what: str) -> Volume:
    volume = reader.open_volume(uri)
    if volume.info.count is not None:
        raise FailedPrecondition(f"{uri} is a stack of {volume.info.count} volumes; {what} is needed")
    return volume


def _xyz(volume: Volume) -> str:
    return " x ".join(str(side) for side in reversed(volume.info.shape))


def _train_needs(request: learning_pb2.TrainTomogramSegmenterRequest, reader: Reader) -> Needs:
    found = _labelled(request, reader)
    classes = min(254, len(request.classes) or len(found.names)) + 1
    voxels = request.patch_size_voxels**3
    patches = _array_bytes(request.patches + classes, voxels)
    counting = sum(16 * volume.info.shape[0] * len(found.names) for volume in found.labels)
    reading = max(_slab_bytes(volume) for volume in found.labels)
    step = min(request.batch_size, request.patches) * (
        deepfinder.training_bytes(voxels, classes, request.channels) + (4 + inputs.AUGMENTATION_COPIES) * 4 * voxels
    )
    weights = inputs.WEIGHT_COPIES * 4 * deepfinder.parameter_count(classes, request.channels)
    return Needs(inputs.BASE_BYTES + patches + counting + max(reading, step) + weights)


def _check_gpu(request: learning_pb2.TrainTomogramSegmenterRequest, classes: int) -> None:
    """FailedPrecondition, with the batch that would fit, where the GPU's free memory is too small for a step."""
    free, _ = torch.cuda.mem_get_info()
    each = deepfinder.training_bytes(request.patch_size_voxels**3, classes, request.channels)
    if free < request.batch_size * each:
        raise FailedPrecondition(
            f"a step with {request.batch_size} patches of {request.patch_size_voxels} voxels at {request.channels} "
            f"channels needs {request.batch_size * each / 2**30:.1f} GiB of the GPU's memory, "
            f"{free / 2**30:.1f} GiB are free: batch_size {free // each} would fit; smaller patches or fewer channels "
            "need less"
        )


def _array_bytes(patches: int, voxels: int) -> int:
    """What is in memory of so many patches and their labels; larger sets are mapped files."""
    return 5 * min(patches * voxels, datasets.MEMORY_LIMIT_BYTES // 4)


def _slab_bytes(volume: Volume) -> int:
    """Of reading a slab of a tomogram and its labels, and of gathering the labels' parts."""
    shape = volume.info.shape
    slab = tomogram_scale.slab_sections(shape) * shape[1] * shape[2]
    scale = 16 * tomogram_scale.SAMPLES + 3 * tomogram_scale.SLAB_BYTES
    return scale + 24 * slab + connected_parts.memory_bytes(slab, math.prod(shape))


@service.operation(needs=_train_needs)
def train_tomogram_segmenter(
    request: learning_pb2.TrainTomogramSegmenterRequest, task: Task
) -> learning_pb2.TrainTomogramSegmenterResult:
    """Train DeepFinder's network on patches of labelled tomograms."""
    found = _labelled(request, task)
    training.use_deterministic_algorithms(task.threads)
    device = torch.device(task.device)
    tomograms = _in_scale(found, part(task.progress, 0.0, 0.02))
    size, fraction = request.patch_size_voxels, request.validation_fraction
    counts = labelled_patches.count_labels(tomograms, len(found.names), size, fraction, part(task.progress, 0.02, 0.03))
    classes = labelled_patches.choose_classes(found.names, request.classes, counts)
    if device.type == "cuda":
        _check_gpu(request, len(classes.names))
    places = labelled_patches.place_patches(
        tomograms,
        classes,
        counts,
        size=size,
        patches=request.patches,
        validation_fraction=fraction,
        seed=request.seed,
        progress=part(task.progress, 0.03, 0.04),
    )
    boxes, targets = _arrays(task, len(places), size)
    labelled_patches.cut_patches(tomograms, classes, places, boxes, targets, part(task.progress, 0.04, 0.06))
    typical = _typical_voxels(tomograms, classes, part(task.progress, 0.06, 0.08))
    voxel_size = found.tomograms[0].info.voxel_size_angstrom
    diameters = (np.cbrt(6 / np.pi * typical) * voxel_size).tolist()

    network = deepfinder.config(classes.names, request.channels)
    job = jobs.Job(
        network=network,
        objective={"name": deepfinder.SegmentationLoss.NAME},
        options=inputs.training_options(request, patience_epochs=request.patience_epochs, decay_from=DECAY_FROM),
        batch_size=request.batch_size,
        validation_fraction=fraction,
        augmentation=Augmentation(
            rotations=request.rotations,
            contrast_jitter=request.contrast_jitter,
            noise_jitter=request.noise_jitter,
        ),
        held_back="held_back",
    )
    arrays: dict[str, NDArray[Any]] = {"boxes": boxes, "targets": targets, "held_back": places.held_back}
    trained = inputs.run_job(task, job, arrays, part(task.progress, 0.08, 0.97))
    training_rows, validation_rows = jobs.split(job, arrays)
    measuring = part(task.progress, 0.97, 1.0)
    dice = _dice(trained.model.to(device).eval(), boxes, targets, validation_rows, len(classes.names), measuring)
    by_class = {name: value for name, value in zip(classes.names, dice, strict=True) if value is not None}
    structures = [value for value in dice[1:] if value is not None]
    mean = sum(structures) / len(structures) if structures else 0.0
    metrics = {
        "training_patches": len(training_rows),
        "validation_patches": len(validation_rows),
        "dice": mean,
        "class_dice": by_class,
        "diameters_angstrom": dict(zip(classes.names, diameters, strict=True)),
    }
    config = network | {
        "binning": 1,
        "contrast": CONTRAST,
        "voxel_size_angstrom": voxel_size,
        "intensity": tomogram_scale.INTENSITY,
        "tomograms": len(tomograms),
        "patch_size_voxels": size,
        "tomogram_digests": [content_digest(task.store, volume.uri) for volume in found.tomograms],
        "labels_digests": [content_digest(task.store, volume.uri) for volume in found.labels],
        "class_counts": {name: int((places.classes == number).sum()) for number, name in enumerate(classes.names)},
        "class_dice": by_class,
        "class_diameters_angstrom": diameters,
        "parameters": parameters_of(request),
    }
    model_uri, metrics_uri = inputs.write_trained(task, trained, config, metrics)
    return learning_pb2.TrainTomogramSegmenterResult(
        model_uri=model_uri,
        metrics_uri=metrics_uri,
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        best_validation_loss=trained.best_validation_loss,
        dice=mean,
        names=classes.names,
        diameters_angstrom=diameters,
        structures=classes.names[1:],
    )


def _in_scale(found: _Labelled, progress: Progress) -> list[LabelledTomogram]:
    """The tomograms, each in a scale of its own, as `Predict` sees one."""
    tomograms = []
    for number, (volume, labels) in enumerate(zip(found.tomograms, found.labels, strict=True)):
        share = part(progress, number / len(found.tomograms), (number + 1) / len(found.tomograms))
        scale = tomogram_scale.measure_scale(volume.slab, volume.info.shape, volume.info.contrast, volume.uri, share)
        read = tomogram_scale.scaled(volume.slab, scale)
        tomograms.append(LabelledTomogram(volume.info.shape, read, labels.slab, labels.uri))
    return tomograms


def _arrays(task: Task, count: int, size: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Room for patches and their labels: in memory up to a limit, else in files that are mapped into it."""
    shape = (count, size, size, size)
    if 4 * math.prod(shape) <= datasets.MEMORY_LIMIT_BYTES:
        return np.empty(shape, np.float32), np.empty(shape, np.uint8)
    return (
        reserved_array(task.scratch / "patches.float32", shape, np.float32),
        reserved_array(task.scratch / "targets.uint8", shape, np.uint8),
    )


def _typical_voxels(tomograms: list[LabelledTomogram], classes: Classes, progress: Progress) -> NDArray[np.int64]:
    """Of each class, the size of a typical connected part of its labels."""
    features = len(classes.names) - 1
    gathered = []
    for number, tomogram in enumerate(tomograms):
        parts = connected_parts.ConnectedParts(features)
        for first, labels in labelled_patches.label_slabs(tomogram, len(classes.of_label)):
            parts.add(classes.of_label[labels])
            progress((number + first / tomogram.shape[0]) / len(tomograms), "measuring the labels' parts")
        gathered.append(parts.parts())
    return connected_parts.typical_voxels(gathered, features)


def _dice(
    model: torch.nn.Module,
    boxes: NDArray[np.float32],
    targets: NDArray[np.uint8],
    rows: NDArray[np.int64],
    classes: int,
    progress: Progress,
) -> list[float | None]:
    """Of each class, 2 |A and B| / (|A| + |B|) over the patches of `rows`; None where it is neither there nor found."""
    device = next(model.parameters()).device
    both, sizes = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    with torch.inference_mode():
        for number, row in enumerate(rows):
            progress(number / len(rows), "measuring Dice", patches=number)
            found = model(torch.from_numpy(boxes[row])[None, None].to(device)).argmax(dim=1)[0].cpu().numpy()
            target = targets[row]
            both += np.bincount(target[found == target], minlength=classes)
            sizes += np.bincount(found.reshape(-1), minlength=classes)
            sizes += np.bincount(target.reshape(-1), minlength=classes)
    return [float(2 * same / size) if size else None for same, size in zip(both, sizes, strict=True)]


def _picked_classes(request: learning_pb2.PickSegmentationRequest) -> list[int]:
    """Numbers of the classes to pick. Raises InvalidArgument for a name that is no class, and where none is left."""
    names = list(request.names)
    for name in request.classes:
        if name not in names[1:]:
            raise InvalidArgument(f"classes: {name!r} is no class; there are {', '.join(map(repr, names[1:]))}")
    wanted = list(request.classes) or names[1:]
    picked = [n for n, name in enumerate(names) if n and name in wanted and name not in request.left_out]
    if not picked:
        raise InvalidArgument(f"left_out: no class is left to pick; there are {', '.join(map(repr, names[1:]))}")
    return picked


@dataclass(frozen=True)
class _Segmentation:
    labels: Volume
    scores: Volume | None
    picked: list[int]


def _segmentation(request: learning_pb2.PickSegmentationRequest, reader: Reader) -> _Segmentation:
    """Raises InvalidArgument where the scores are not of the labels' size, and as `_picked_classes`."""
    labels = _open_volume(reader, request.labels_uri, "a label volume")
    scores = _open_volume(reader, request.scores_uri, "a volume of scores") if request.scores_uri else None
    if scores is not None and scores.info.shape != labels.info.shape:
        raise InvalidArgument(
            f"scores_uri: {scores.uri} has {_xyz(scores)} voxels, {labels.uri} {_xyz(labels)} (x, y, z)"
        )
    return _Segmentation(labels, scores, _picked_classes(request))


def _pick_needs(request: learning_pb2.PickSegmentationRequest, reader: Reader) -> Needs:
    found = _segmentation(request, reader)
    shape = found.labels.info.shape
    slab = tomogram_scale.slab_sections(shape) * shape[1] * shape[2]
    gathering = 24 * slab + connected_parts.memory_bytes(slab, math.prod(shape))
    parting = touching_parts.SPLITTING_BYTES * min(touching_parts.MAX_VOXELS, math.prod(shape))
    return Needs(inputs.BASE_BYTES + gathering + parting)


@service.operation(needs=_pick_needs)
def pick_segmentation(request: learning_pb2.PickSegmentationRequest, task: Task) -> learning_pb2.PickSegmentationResult:
    """Make particles of a segmentation's connected parts."""
    found = _segmentation(request, task)
    names, info = list(request.names), found.labels.info
    gathered = connected_parts.ConnectedParts(len(names) - 1)
    voxels = np.zeros(len(names), np.int64)
    step = tomogram_scale.slab_sections(info.shape)
    source = LabelledTomogram(info.shape, found.labels.slab, found.labels.slab, found.labels.uri)
    for first, slab in labelled_patches.label_slabs(source, len(names)):
        labels = slab.astype(np.uint8)
        voxels += np.bincount(labels.reshape(-1), minlength=len(names))
        labels[~np.isin(labels, found.picked)] = 0
        gathered.add(labels, None if found.scores is None else found.scores.slab(first, first + len(labels)))
        task.progress(0.7 * min(1.0, (first + step) / info.shape[0]), "finding connected parts", planes=first)
    all_parts = gathered.parts()
    parts = all_parts.at_least(request.min_diameter_angstrom, info.voxel_size_angstrom)

    def read_box(box: tuple[slice, slice, slice]) -> NDArray[np.uint8]:
        z, y, x = box
        rows = [found.labels.slab(plane, plane + 1)[:, y, x] for plane in range(z.start, z.stop)]
        return np.concatenate(rows).astype(np.uint8)

    class_voxels = {
        number: math.pi / 6 * (request.diameters_angstrom[number] / info.voxel_size_angstrom) ** 3
        for number in found.picked
        if request.diameters_angstrom and request.diameters_angstrom[number] > 0
    }
    sized = touching_parts.sized_parts(
        parts,
        read_box,
        class_voxels,
        request.min_volume_share,
        request.max_volume_share,
        part(task.progress, 0.7, 1.0),
    )
    kept = sized.parts
    counts = [int((kept.labels == number).sum()) for number in found.picked]
    rows = [
        {
            "name": names[number],
            "voxels": int(voxels[number]),
            "parts": int((all_parts.labels == number).sum()),
            "parted": sized.split.get(number, 0),
            "too_small": int((all_parts.labels == number).sum() - (parts.labels == number).sum())
            + sized.too_small.get(number, 0),
            "too_large": sized.too_large.get(number, 0),
            "particles": count,
        }
        for number, count in zip(found.picked, counts, strict=True)
    ]
    columns: dict[str, Any] = {} if found.scores is None else {"score": kept.scores}
    particles = Particles.from_positions(
        kept.centres,
        info.voxel_size_angstrom,
        tomogram_name(task.store, found.labels),
        info.shape,
        diameter_angstrom=kept.diameters_angstrom(info.voxel_size_angstrom),
        class_id=kept.labels.astype(np.int32),
        class_name=np.array([names[label] for label in kept.labels], object),
        **columns,
    )
    return learning_pb2.PickSegmentationResult(
        particles_uri=task.write_particles("particles.parquet", particles),
        names=[names[number] for number in found.picked],
        counts=counts,
        count=len(kept),
        metrics_uri=task.write_table("metrics.json", {"classes": rows, "particles": len(kept)}),
    )
