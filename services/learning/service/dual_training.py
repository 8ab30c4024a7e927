"""TrainDual."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cryofleet.artifacts import content_digest
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.operations import parameters_of
from cryofleet.progress import Progress, part
from cryofleet.scratch_array import reserved_array
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import Volume
from services.learning import (
    collapse,
    comparison_picture,
    datasets,
    dual,
    jobs,
    noise_field,
    subvolumes,
    training,
    translation,
    volume_scale,
    wedge_filling,
)
from services.learning.augmentation import Augmentation
from services.learning.preparation import CONTRAST, Preparation
from services.learning.service import inputs
from services.learning.service.registry import service

logger = logging.getLogger(__name__)

#: What a training step keeps for a subvolume of each domain, in outputs of the largest layer: 35 to 39 were measured.
TRAINING_LAYERS = 44
#: AdamW's, as Zeng et al. 2024 have them.
BETAS, WEIGHT_DECAY = (0.9, 0.999), 1e-6
#: Tilts that reach so much farther to one side than to the other lack about the same when a tomogram is turned over.
EVEN_DEGREES = 4.0
#: Share of either domain whose losses are shown, and that is not trained on.
VALIDATION_FRACTION = 0.05
#: Of a volume of the second domain, protein positive. Crowded scenes have 2 to 13, tomograms 0.1, and either the
#: opposite where its contrast is labelled wrongly.
LEAST_SKEWNESS = -1.5
#: The picture's sections at most, (z, y, x) of what the networks see for it.
SHOWN = (48, 160, 160)

Array = NDArray[np.float32]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class _Domain:
    """Volumes of one kind, and how many subvolumes they have."""

    volumes: list[Volume]
    count: int


@dataclass(frozen=True)
class _Domains:
    tomograms: _Domain
    densities: _Domain
    """The tomograms again where these are to be turned on their side."""


def _spacing(request: learning_pb2.TrainDualRequest) -> int:
    """Voxels from a subvolume to the next."""
    return request.spacing_voxels or request.box_size_voxels


def _domain(reader: Reader, field: str, uris: list[str], request: learning_pb2.TrainDualRequest) -> _Domain:
    """InvalidArgument where volumes differ in contrast or are too few for two subvolumes."""
    volumes = [reader.open_volume(uri) for uri in uris]
    for volume in volumes:
        if volume.info.count is not None:
            raise FailedPrecondition(f"{volume.uri} is a stack of {volume.info.count} volumes; single ones are needed")
        if volume.info.contrast != volumes[0].info.contrast:
            raise InvalidArgument(
                f"{field}: {volumes[0].uri} has {volumes[0].info.contrast} protein, {volume.uri} "
                f"{volume.info.contrast}: one of them is labelled wrongly, or belongs elsewhere; ingest it again with "
                "the contrast that it has"
            )
    box, spacing = request.box_size_voxels, _spacing(request)
    count = sum(subvolumes.subvolume_count(volume.info.shape, box, spacing) for volume in volumes)
    if count < 2:
        shapes = ", ".join(str(volume.info.shape) for volume in volumes)
        raise InvalidArgument(
            f"{field}: there are {count} whole subvolumes of {box} voxels in volumes of shape {shapes} (z, y, x); "
            "at least 2 are needed, one of them for validation: give more, or smaller box_size_voxels or spacing_voxels"
        )
    return _Domain(volumes, count)


def _domains(request: learning_pb2.TrainDualRequest, reader: Reader) -> _Domains:
    """Both domains, refused before voxels are read where they can't be trained on together."""
    box = request.box_size_voxels
    if box % dual.POOLING:
        raise InvalidArgument(f"box_size_voxels: {box} is no multiple of {dual.POOLING}")
    tomograms = _domain(reader, "tomograms_uris", list(request.tomograms_uris), request)
    if request.transposed_pair:
        _check_wedges(tomograms.volumes)
        densities = tomograms
    else:
        densities = _domain(reader, "densities_uris", list(request.densities_uris), request)
    first = tomograms.volumes[0]
    needed = first.info.voxel_size_angstrom
    for volume in (*tomograms.volumes, *densities.volumes):
        found = volume.info.voxel_size_angstrom
        if not math.isclose(found, needed, rel_tol=inputs.VOXEL_SIZE_TOLERANCE):
            raise InvalidArgument(
                f"{volume.uri} has voxels of {found:g} Å, {first.uri} of {needed:g} Å: all volumes of both domains "
                "need one size; io.Rescale brings them to it"
            )
    return _Domains(tomograms, densities)


def _check_wedges(volumes: list[Volume]) -> None:
    """FailedPrecondition where a tomogram's wedge and that of the same tomogram on its side overlap or are none."""
    for volume in volumes:
        low, high = volume.info.tilt_min_degrees, volume.info.tilt_max_degrees
        if high - low >= 180:
            raise FailedPrecondition(f"{volume.uri} has no missing wedge: its tilts reach from {low:g}° to {high:g}°")
        if high - low < 90:
            raise FailedPrecondition(
                f"{volume.uri} was tilted from {low:g}° to {high:g}°: on its side it lacks some of what it lacks "
                "upright; a range of 90° at least is needed for a transposed pair"
            )


def _box_bytes(request: learning_pb2.TrainDualRequest) -> int:
    """What a training step keeps for a subvolume of each domain."""
    return TRAINING_LAYERS * 4 * request.channels * request.box_size_voxels**3


def _train_needs(request: learning_pb2.TrainDualRequest, reader: Reader) -> Needs:
    found = _domains(request, reader)
    box = request.box_size_voxels
    trained = inputs.training_needs(
        Preparation(box, 1, False, CONTRAST),
        max(found.tomograms.count, found.densities.count),
        batch_size=request.batch_size,
        box_bytes=_box_bytes(request),
        weight_bytes=inputs.weight_bytes(dual.config(box, request.channels)),
    )
    other = min(4 * box**3 * found.densities.count, datasets.MEMORY_LIMIT_BYTES)
    volumes = [volume.info.shape for volume in (*found.tomograms.volumes, *found.densities.volumes)]
    # Sections as read, scaled, and cut by rows.
    reading = (
        max(4 * box * shape[2] * (2 * shape[1] + 2 * box * -(-box // _spacing(request))) for shape in volumes)
        + volume_scale.MEASURING_BYTES
    )
    shown = translation.LAYERS * 4 * request.channels * math.prod(SHOWN)
    return Needs(trained.memory_bytes + other + reading + shown)


def _check_gpu(request: learning_pb2.TrainDualRequest) -> None:
    """FailedPrecondition, with the batch that would fit, where the GPU's free memory is too small for a step."""
    free, _ = torch.cuda.mem_get_info()
    fitting = free // _box_bytes(request)
    if fitting < request.batch_size:
        raise FailedPrecondition(
            f"a step with {request.batch_size} subvolumes of {request.box_size_voxels} voxels at {request.channels} "
            f"channels needs {request.batch_size * _box_bytes(request) / 2**30:.1f} GiB of the GPU's memory, "
            f"{free / 2**30:.1f} GiB are free: "
            + (f"batch_size {fitting} would fit" if fitting else "take a smaller box_size_voxels or fewer channels")
        )


@service.operation(needs=_train_needs)
def train_dual(request: learning_pb2.TrainDualRequest, task: Task) -> learning_pb2.TrainDualResult:
    """Train DUAL on tomograms and density maps that need not belong together."""
    found = _domains(request, task)
    device = torch.device(task.device)
    if device.type == "cuda":
        _check_gpu(request)
    training.use_deterministic_algorithms(task.threads)
    boxes, scales = _read(task, found.tomograms, request, "boxes", part(task.progress, 0.0, 0.03))
    if request.transposed_pair:
        densities = _array(task, "densities", boxes.shape)
        for first in range(0, len(boxes), 64):
            densities[first : first + 64] = wedge_filling.on_its_side(boxes[first : first + 64])
        density_scales = scales
    else:
        densities, density_scales = _read(task, found.densities, request, "densities", part(task.progress, 0.03, 0.05))
        _check_signs(found.densities, densities, _spacing(request))
    config = dual.config(request.box_size_voxels, request.channels) | _facts(request, task, found)
    job = jobs.Job(
        network=config,
        objective={
            "name": dual.DualLoss.NAME,
            "reconstruction_weight": request.reconstruction_weight,
            "adversarial_weight": request.adversarial_weight,
            "divergence_weight": request.divergence_weight,
            "matching_weight": request.matching_weight,
            "joint_steps": _joint_steps(request, max(len(boxes), len(densities))),
        },
        # An adversarial loss does not say which epoch is best, and the networks swing about what they have learnt.
        options=inputs.training_options(
            request,
            patience_epochs=request.max_epochs,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            decoupled_weight_decay=True,
            decay_from=dual.DECAY_FROM,
            keep_last=True,
            averaging=dual.AVERAGING,
        ),
        batch_size=request.batch_size,
        validation_fraction=VALIDATION_FRACTION,
        augmentation=_augmentation(found.tomograms.volumes),
        unpaired=("densities",),
    )
    arrays: dict[str, NDArray[Any]] = {"boxes": boxes, "densities": densities}
    trained = inputs.run_job(task, job, arrays, part(task.progress, 0.05, 0.98), saved=_log_warnings())
    warnings = collapse.warnings_of([line.training for line in trained.history])
    model = trained.model.eval()
    assert isinstance(model, dual.Dual)
    dual.correct_transfer(model, boxes, densities, request.seed, device)
    tomogram = _shown(found.tomograms.volumes[0], scales[0])
    density = (
        np.ascontiguousarray(wedge_filling.on_its_side(tomogram))
        if request.transposed_pair
        else _shown(found.densities.volumes[0], density_scales[0])
    )
    picture_uri = task.write_bytes("samples.png", _picture(model, tomogram, density, request.seed, device))
    metrics = {
        "tomogram_subvolumes": len(boxes),
        "density_subvolumes": len(densities),
        "tomogram_deviations": [abs(scale.deviation) for scale in scales],
        "warnings": warnings,
    }
    model_uri, metrics_uri = inputs.write_trained(
        task, trained, config | {"parameters": parameters_of(request)}, metrics
    )
    return learning_pb2.TrainDualResult(
        model_uri=model_uri,
        metrics_uri=metrics_uri,
        picture_uri=picture_uri,
        epochs=trained.epochs,
        tomogram_subvolumes=len(boxes),
        density_subvolumes=len(densities),
        warnings=warnings,
    )


def _joint_steps(request: learning_pb2.TrainDualRequest, subvolumes: int) -> int:
    """Of so many of the larger domain."""
    an_epoch = math.ceil((1 - VALIDATION_FRACTION) * subvolumes / request.batch_size)
    return round(dual.JOINT_SHARE * request.max_epochs * an_epoch)


def _augmentation(tomograms: list[Volume]) -> Augmentation:
    """Turns by 180°, where they leave the wedges where they are."""
    even = all(abs(volume.info.tilt_min_degrees + volume.info.tilt_max_degrees) <= EVEN_DEGREES for volume in tomograms)
    return Augmentation("half" if even else "none")


def _log_warnings() -> Callable[[training.Checkpoint], None]:
    """Says in the log, with the checkpoints of a training, what goes wrong in it: nobody need wait for its end."""
    said: set[str] = set()

    def saved(files: training.Checkpoint) -> None:
        history = json.loads(files[training.STATE_FILE])["history"]
        for warning in collapse.warnings_of([line["training"] for line in history]):
            if warning not in said:
                logger.warning("TrainDual: %s", warning)
            said.add(warning)

    return saved


def _array(task: Task, name: str, shape: tuple[int, ...]) -> Array:
    """In memory up to the limit, else in a file of scratch that is mapped into memory."""
    if 4 * math.prod(shape) <= datasets.MEMORY_LIMIT_BYTES:
        return np.empty(shape, np.float32)
    mapped: Array = reserved_array(task.scratch / f"{name}.float32", shape, np.float32)
    return mapped


def _read(
    task: Task, domain: _Domain, request: learning_pb2.TrainDualRequest, name: str, progress: Progress
) -> tuple[Array, list[volume_scale.VolumeScale]]:
    """The subvolumes (n, z, y, x) of a domain in the scale of their volumes, and the scales."""
    box, spacing = request.box_size_voxels, _spacing(request)
    boxes = _array(task, name, (domain.count, box, box, box))
    scales, done = [], 0
    for number, volume in enumerate(domain.volumes):
        report = part(progress, number / len(domain.volumes), (number + 1) / len(domain.volumes))
        info = volume.info
        scale = volume_scale.measure_scale(volume.slab, info.shape, info.contrast, volume.uri, part(report, 0.0, 0.5))
        total, first = subvolumes.subvolume_count(info.shape, box, spacing), done
        for cut in subvolumes.subvolumes(volume.slab, info.shape, box, spacing):
            boxes[done : done + len(cut)] = scale(cut)
            done += len(cut)
            report(0.5 + 0.5 * (done - first) / total, "cutting subvolumes", subvolumes=done)
        scales.append(scale)
    return boxes, scales


def _check_signs(domain: _Domain, boxes: Array, spacing: int) -> None:
    """InvalidArgument where what is labelled protein in a density map is rather the nothing around it."""
    first = 0
    for volume in domain.volumes:
        last = first + subvolumes.subvolume_count(volume.info.shape, boxes.shape[1], spacing)
        # The third moment about 0, as the boxes are standardised: of structures in nothing far above 0.
        cubes = sum(float(np.power(box, 3, dtype=np.float64).sum()) for box in boxes[first:last])
        skewness = cubes / max(1, boxes[first:last].size)
        if skewness < LEAST_SKEWNESS:
            raise InvalidArgument(
                f"densities_uris: {volume.uri} is labelled as of {volume.info.contrast} protein, but far more of its "
                f"voxels lie on that side of its mean than on the other (skewness {skewness:.1f}): give it the other "
                "contrast"
            )
        first = last


def _facts(request: learning_pb2.TrainDualRequest, task: Task, found: _Domains) -> dict[str, Any]:
    """What a model's config says of its data; no URI, as a model may go elsewhere."""
    infos = [volume.info for volume in found.tomograms.volumes]
    facts: dict[str, Any] = {
        "voxel_size_angstrom": infos[0].voxel_size_angstrom,
        "contrast": CONTRAST,
        "intensity": "each volume has mean 0 and standard deviation 1",
        "tomogram_contrast": infos[0].contrast,
        "tomogram_tilt_degrees": [
            min(info.tilt_min_degrees for info in infos),
            max(info.tilt_max_degrees for info in infos),
        ],
        "transposed_pair": request.transposed_pair,
        "tomogram_digests": [content_digest(task.store, volume.uri) for volume in found.tomograms.volumes],
    }
    if not request.transposed_pair:
        facts["density_digests"] = [content_digest(task.store, volume.uri) for volume in found.densities.volumes]
    return facts


def _shown(volume: Volume, scale: volume_scale.VolumeScale) -> Array:
    """The middle of a volume, of sides that the U-Nets can take."""
    step = 1 << dual.DEPTH
    spans = []
    for side, limit in zip(volume.info.shape, SHOWN, strict=True):
        length = min(side, limit) // step * step
        spans.append(slice((side - length) // 2, (side - length) // 2 + length))
    return scale(volume.slab(spans[0].start, spans[0].stop)[:, spans[1], spans[2]])


def _picture(model: dual.Dual, tomogram: Array, density: Array, seed: int, device: torch.device) -> bytes:
    depth, height, width = density.shape
    noise = noise_field.random_noise(model.noise, (depth, height, width), seed, 0, device)
    volumes = {
        "tomogram": tomogram,
        "made of it": translation.on_device(model.denoiser, device)(tomogram),
        "second domain": density,
        "made of that": translation.on_device(partial(model.made, periodic=False), device)(
            density + noise.sections(0, depth)
        ),
    }
    return comparison_picture.picture([(name, volume[len(volume) // 2]) for name, volume in volumes.items()])
