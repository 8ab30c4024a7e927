"""Denoise, CompensateWedge, SimulateStyle: what a trained DUAL is good for."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import part
from cryofleet.scratch_array import ScratchVolume
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import Volume, VolumeInfo
from services.learning import dual, model_files, noise_field, training, translation, unet, volume_scale, wedge_filling
from services.learning.overlap_tile import Tiling
from services.learning.service import inputs
from services.learning.service.registry import service
from services.learning.tomogram_scale import slab_sections

Array = NDArray[np.float32]

MULTIPLE = 1 << dual.DEPTH
MARGIN = unet.margin(dual.DEPTH)
TURNS: tuple[tuple[int, ...], ...] = ((), (1, 2), (0, 2), (0, 1))
"""Axes that are reversed by no turn, and by those of 180° about z, y and x."""


@dataclass(frozen=True)
class _Trained:
    """A model of TrainDual, without its weights."""

    config: dict[str, Any]
    style: VolumeInfo
    """Of the tomograms that it was trained on, but for their shape."""

    @property
    def channels(self) -> int:
        """Of the U-Nets at full size."""
        return int(self.config["channels"])

    @property
    def transfer_reach(self) -> int:
        """Of G_s beyond its U-Net's, in voxels."""
        return int(self.config["box_size"]) // 2


def _trained(reader: Reader, uri: str, transposed_pair: bool) -> _Trained:
    """Raises FailedPrecondition for a model that is none of TrainDual, or was trained for something else."""
    config = inputs.model_config(reader, uri, dual.NAME)
    dual.check_config(config)
    try:
        low, high = config["tomogram_tilt_degrees"]
        style = VolumeInfo((1, 1, 1), config["voxel_size_angstrom"], config["tomogram_contrast"], low, high)
        found = config["transposed_pair"]
    except (KeyError, TypeError, ValueError, InvalidArgument) as error:
        raise FailedPrecondition(f"{uri}: its config is damaged ({error}): train the model again") from error
    weights = reader.open_blob(f"{uri.rstrip('/')}/{model_files.WEIGHTS_FILE}").size_bytes
    if inputs.weight_bytes(config) > weights:
        raise FailedPrecondition(f"{uri}: its config is of larger networks than its weights: it is damaged")
    if found != transposed_pair:
        raise FailedPrecondition(
            f"{uri} was trained to compensate the missing wedge, for learning.CompensateWedge"
            if found
            else f"{uri} was trained to denoise and simulate; one that was trained with transposed_pair is needed"
        )
    return _Trained(config, style)


def _open(reader: Reader, uri: str, trained: _Trained) -> Volume:
    """FailedPrecondition for a stack, and for another voxel size than the model's."""
    volume = reader.open_volume(uri)
    if volume.info.count is not None:
        raise FailedPrecondition(f"{uri} is a stack of {volume.info.count} volumes; a single one is needed")
    found, needed = volume.info.voxel_size_angstrom, trained.style.voxel_size_angstrom
    if not math.isclose(found, needed, rel_tol=inputs.VOXEL_SIZE_TOLERANCE):
        raise FailedPrecondition(
            f"{uri} has voxels of {found:g} Å; the model was trained on voxels of {needed:g} Å: bring it to that size "
            "by io.Rescale, or train a model on volumes of its own"
        )
    return volume


def _open_model(task: Task, uri: str) -> dual.Dual:
    """Ready for use on the task's device."""
    training.use_deterministic_algorithms(task.threads)
    _, model = inputs.open_model(task, uri, dual.NAME)
    assert isinstance(model, dual.Dual)
    return model.to(torch.device(task.device)).eval()


def _tiles(tile: int, channels: int, device: torch.device, reach: int = 0) -> Tiling:
    """Tiles for a U-Net, and something of a reach beyond its own; smaller ones where half of a GPU's free memory asks
    for it.
    """
    margin = MARGIN + reach
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0] // 2
        tile = translation.fitting_tile(tile, margin, MULTIPLE, channels, free)
    return translation.tiling(tile, margin, MULTIPLE)


def _needs(trained: _Trained, volume: Volume, tile: int, reach: int = 0) -> Needs:
    weights = 3 * inputs.weight_bytes(trained.config)
    tiles = _tiles(tile, trained.channels, torch.device("cpu"), reach)
    work = translation.memory_bytes(volume.info.shape, tiles, trained.channels)
    return Needs(inputs.BASE_BYTES + weights + volume_scale.MEASURING_BYTES + work)


# --- Denoise -------------------------------------------------------------------------------------------------------


def _denoise_needs(request: learning_pb2.DenoiseRequest, reader: Reader) -> Needs:
    trained = _trained(reader, request.model_uri, False)
    volume = _open(reader, request.tomogram_uri, trained)
    needs = _needs(trained, volume, request.tile_size_voxels)
    if request.strength <= 1 and not request.uncertainty:
        return needs
    # What is made in four positions, its mean and its deviations as they are computed, and a slab of the latter.
    tiles = _tiles(request.tile_size_voxels, trained.channels, torch.device("cpu"))
    depth, height, width = volume.info.shape
    four = 10 * math.prod(min(tiles.region, side + 4) for side in volume.info.shape)
    return Needs(needs.memory_bytes + 4 * (four + 3 * min(tiles.tile, depth) * height * width))


@service.operation(needs=_denoise_needs)
def denoise(request: learning_pb2.DenoiseRequest, task: Task) -> learning_pb2.DenoiseResult:
    """Take the noise from a tomogram by a denoiser that was trained on tomograms like it."""
    trained = _trained(task, request.model_uri, False)
    volume = _open(task, request.tomogram_uri, trained)
    info, strength, device = volume.info, request.strength, torch.device(task.device)
    model = _open_model(task, request.model_uri)
    scale = volume_scale.measure_scale(
        volume.slab, info.shape, info.contrast, volume.uri, part(task.progress, 0.0, 0.05)
    )
    make = translation.on_device(model.denoiser, device)
    tiles = _tiles(request.tile_size_voxels, trained.channels, device)

    slabs = translation.translate(
        partial(_made, make, strength, request.uncertainty),
        lambda z0, z1: scale(volume.slab(z0, z1)),
        info.shape,
        tiles,
        part(task.progress, 0.05, 1.0),
    )
    share = np.float32(min(strength, 1.0))
    # Of the tomogram's values x and the result's y, in the scale: sums of x, y, x^2, y^2 and xy.
    sums = np.zeros(5)
    with ExitStack() as writers:
        denoised = writers.enter_context(task.volume_writer("denoised.mrc", info))
        uncertain = writers.enter_context(task.volume_writer("uncertainty.mrc", info)) if request.uncertainty else None
        for z, (made, *deviation) in slabs:
            values = volume.slab(z, z + len(made))
            mixed = (1 - share) * values + share * scale.back(made)
            denoised.write(mixed)
            if uncertain:
                uncertain.write(share * abs(scale.deviation) * deviation[0])
            x, y = (scale(each).ravel().astype(np.float64) for each in (values, mixed))
            sums += x.sum(), y.sum(), x @ x, y @ y, x @ y
    mean_x, mean_y, squares_x, squares_y, products = sums / math.prod(info.shape)
    deviation_x, deviation_y = math.sqrt(squares_x - mean_x**2), math.sqrt(max(squares_y - mean_y**2, 0.0))
    metrics = {
        "strength": strength,
        "tomogram_deviation": deviation_x * abs(scale.deviation),
        "denoised_deviation": deviation_y * abs(scale.deviation),
        "correlation": (products - mean_x * mean_y) / (deviation_x * deviation_y) if deviation_y else None,
    }
    return learning_pb2.DenoiseResult(
        volume_uri=denoised.uri,
        uncertainty_uri=uncertain.uri if uncertain else "",
        metrics_uri=task.write_table("metrics.json", metrics),
    )


def _made(make: translation.Translate, strength: float, uncertainty: bool, region: Array) -> Array:
    """(1, z, y, x): what the denoiser makes of a region, above a strength of 1 the mean over four positions by its
    share; or (2, z, y, x) with the deviation over these: where a network is sure of what it sees, it makes the same of
    all.
    """
    if strength <= 1 and not uncertainty:
        return make(region)[None]
    share = np.float32(max(strength - 1, 0.0))
    four = _in_four_positions(make, region)
    made = (1 - share) * four[0] + share * four.mean(axis=0)
    return np.stack([made, four.std(axis=0, ddof=1)] if uncertainty else [made])


def _in_four_positions(make: translation.Translate, region: Array) -> Array:
    """(4, z, y, x): what is made of a region as it is, and turned by 180° about each axis, turned back."""
    return np.stack([np.flip(make(np.ascontiguousarray(np.flip(region, axes))), axes) for axes in TURNS])


# --- CompensateWedge -----------------------------------------------------------------------------------------------


def _compensate_needs(request: learning_pb2.CompensateWedgeRequest, reader: Reader) -> Needs:
    trained = _trained(reader, request.model_uri, True)
    volume = _open_with_wedge(reader, request.tomogram_uri, trained)
    needs = _needs(trained, volume, request.tile_size_voxels)
    return Needs(needs.memory_bytes + wedge_filling.memory_bytes(volume.info.shape))


def _open_with_wedge(reader: Reader, uri: str, trained: _Trained) -> Volume:
    volume = _open(reader, uri, trained)
    low, high = volume.info.tilt_min_degrees, volume.info.tilt_max_degrees
    if high - low >= 180:
        raise FailedPrecondition(f"{uri} has no missing wedge: its tilts reach from {low:g}° to {high:g}°")
    return volume


@service.operation(needs=_compensate_needs)
def compensate_wedge(request: learning_pb2.CompensateWedgeRequest, task: Task) -> learning_pb2.CompensateWedgeResult:
    """Fill a tomogram's missing wedge by what a network makes of it."""
    trained = _trained(task, request.model_uri, True)
    volume = _open_with_wedge(task, request.tomogram_uri, trained)
    info, device = volume.info, torch.device(task.device)
    model = _open_model(task, request.model_uri)
    scale = volume_scale.measure_scale(
        volume.slab, info.shape, info.contrast, volume.uri, part(task.progress, 0.0, 0.05)
    )
    slabs = translation.translate(
        translation.on_device(model.denoiser, device),
        lambda z0, z1: scale(volume.slab(z0, z1)),
        info.shape,
        _tiles(request.tile_size_voxels, trained.channels, device),
        part(task.progress, 0.05, 0.9),
    )
    with (
        ScratchVolume(task.scratch / "measured.float32", info.shape) as measured,
        ScratchVolume(task.scratch / "made.float32", info.shape) as filled,
        task.volume_writer("compensated.mrc", replace(info, tilt_min_degrees=-90, tilt_max_degrees=90)) as writer,
    ):
        for z, made in slabs:
            for section, plane in enumerate(scale.back(made), start=z):
                filled.write_section(section, plane)
                measured.write_section(section, volume.slab(section, section + 1)[0])
        wedge_filling.fill_volume(
            measured, filled, info.tilt_min_degrees, info.tilt_max_degrees, part(task.progress, 0.9, 1.0)
        )
        step = slab_sections(info.shape)
        for z in range(0, info.shape[0], step):
            writer.write(filled.sections(z, min(z + step, info.shape[0])))
    return learning_pb2.CompensateWedgeResult(volume_uri=writer.uri)


# --- SimulateStyle -------------------------------------------------------------------------------------------------


def _simulate_needs(request: learning_pb2.SimulateStyleRequest, reader: Reader) -> Needs:
    trained = _trained(reader, request.model_uri, False)
    volume = _open(reader, request.density_uri, trained)
    needs = _needs(trained, volume, request.tile_size_voxels, reach=trained.transfer_reach)
    # The noise of a slab, and one section's random numbers.
    tiles = _tiles(request.tile_size_voxels, trained.channels, torch.device("cpu"), reach=trained.transfer_reach)
    planes = 4 * tiles.slab_planes(volume.info.shape[0]) + 32
    return Needs(needs.memory_bytes + planes * volume.info.shape[1] * volume.info.shape[2])


@service.operation(needs=_simulate_needs)
def simulate_style(request: learning_pb2.SimulateStyleRequest, task: Task) -> learning_pb2.SimulateStyleResult:
    """Make tomograms of a density map in the style of those that DUAL was trained on."""
    trained = _trained(task, request.model_uri, False)
    volume = _open(task, request.density_uri, trained)
    shape, device = volume.info.shape, torch.device(task.device)
    model = _open_model(task, request.model_uri)
    scale = volume_scale.measure_scale(
        volume.slab, shape, volume.info.contrast, volume.uri, part(task.progress, 0.0, 0.05)
    )
    info = replace(trained.style, shape=shape, voxel_size_angstrom=volume.info.voxel_size_angstrom)
    sign = np.float32(-1 if info.contrast == "dark" else 1)
    tiles = _tiles(request.tile_size_voxels, trained.channels, device, reach=trained.transfer_reach)
    make = translation.on_device(partial(model.made, periodic=False), device)
    uris: list[str] = []
    rows: list[dict[str, float]] = []
    for number in range(request.number):
        noise = noise_field.random_noise(model.noise, shape, request.seed, number, device)

        def noisy(z0: int, z1: int, noise: noise_field.NoiseField = noise) -> Array:
            return scale(volume.slab(z0, z1)) + noise.sections(z0, z1)

        report = part(task.progress, 0.05 + 0.95 * number / request.number, 0.05 + 0.95 * (number + 1) / request.number)
        sums, squares = 0.0, 0.0
        with task.volume_writer(f"tomogram-{number + 1}.mrc", info) as writer:
            for _, made in translation.translate(make, noisy, shape, tiles, report):
                writer.write(sign * made)
                sums += float(made.sum(dtype=np.float64))
                squares += float(np.square(made, dtype=np.float64).sum())
        uris.append(writer.uri)
        mean = sums / math.prod(shape)
        deviation = math.sqrt(max(squares / math.prod(shape) - mean**2, 0.0))
        rows.append({"tomogram": number + 1, "mean": float(sign) * mean, "deviation": deviation})
    return learning_pb2.SimulateStyleResult(
        tomograms_uris=uris, metrics_uri=task.write_table("metrics.json", {"tomograms": rows})
    )
