"""From a user's volume file to a float32 tomogram that lacks nothing: checked, measured, rewritten slab by slab."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.statistics import RunningStatistics, Statistics
from cryofleet.formats.volume import VolumeFile
from cryofleet.formats.volumes.frame import slab_thickness
from cryofleet.progress import Progress, no_progress

NanPolicy = Literal["refuse", "fill_mean"]

SLAB_BYTES = 16 << 20
_VOXEL_SIZE_TOLERANCE = 0.01
_LARGEST_VOXEL_ANGSTROM = 1000.0


@dataclass(frozen=True)
class Measured:
    """What one pass over a volume found."""

    statistics: Statistics
    """Of the finite voxels."""
    non_finite_voxels: int


def voxel_size(volume: VolumeFile, given_angstrom: float = 0, overrule: bool = False) -> float:
    """The voxel size in Å: the given one, or the file's where 0 is given.

    A file that says its voxel size is believed: a given one that differs is taken with `overrule` alone.

    Raises:
        FailedPrecondition: the file has none, an impossible one, or sides that differ by more than 1%.
        InvalidArgument: the given one differs from the file's by more than 1%.
    """
    sizes = volume.voxel_size_angstrom
    if given_angstrom > 0 and (overrule or sizes is None or max(sizes) > _LARGEST_VOXEL_ANGSTROM):
        return given_angstrom
    advice = "give it with --set voxel_size_angstrom=..."
    overruling = "--set overrule_voxel_size=true"
    if sizes is None:
        raise FailedPrecondition(f"{volume.name}: the file does not say its voxel size: {advice}")
    said = f"{sizes[0]:.5g}" if len({f"{size:.5g}" for size in sizes}) == 1 else " x ".join(f"{s:.5g}" for s in sizes)
    if max(sizes) > _LARGEST_VOXEL_ANGSTROM:
        raise FailedPrecondition(f"{volume.name}: the file says a voxel of {said} Å, which cannot be: {advice}")
    if given_angstrom > 0:
        if any(abs(size / given_angstrom - 1) > _VOXEL_SIZE_TOLERANCE for size in sizes):
            raise InvalidArgument(
                f"{volume.name}: the file says a voxel of {said} Å, voxel_size_angstrom is {given_angstrom:.5g}: "
                f"leave voxel_size_angstrom out or, if the file is wrong, add {overruling}"
            )
        return given_angstrom
    if max(sizes) / min(sizes) > 1 + _VOXEL_SIZE_TOLERANCE:
        raise FailedPrecondition(
            f"{volume.name}: the file says a voxel of {said} Å (x, y, z); its sides must be equal: "
            f"resample the volume or, if the file is wrong, {advice} {overruling}"
        )
    # Headers hold the cell in float32: its seventh digit is noise.
    return round(math.fsum(sizes) / 3, 5)


def measure(volume: VolumeFile, nan_policy: NanPolicy, progress: Progress = no_progress) -> Measured:
    """Statistics of a volume, in one pass and the memory of a slab.

    Raises:
        FailedPrecondition: the voxels are all equal, or some are NaN or infinite and the policy refuses that.
    """
    running = RunningStatistics()
    non_finite = 0
    first_bad = ""
    for start, slab in _slabs(volume, progress, "checking"):
        finite = np.isfinite(slab)
        if finite.all():
            running.update(slab)
            continue
        if not non_finite:
            z, y, x = np.unravel_index(int(np.argmin(finite)), finite.shape)
            first_bad = f"the first ({slab[z, y, x]}) at voxel x={x}, y={y}, z={start + z}"
        non_finite += int(finite.size - np.count_nonzero(finite))
        running.update(slab[finite])

    if running.count == 0:
        raise FailedPrecondition(f"{volume.name}: no voxel is a finite number, {first_bad}")
    if non_finite and nan_policy == "refuse":
        raise FailedPrecondition(
            f"{volume.name}: {non_finite} voxels are NaN or infinite, {first_bad}: "
            "repair the file, or give them the mean of the others with --set nan_policy=fill_mean"
        )
    statistics = running.result()
    if statistics.minimum == statistics.maximum:
        raise FailedPrecondition(f"{volume.name}: all voxels are {statistics.minimum:g}: there is nothing to see in it")
    return Measured(statistics, non_finite)


def convert(
    volume: VolumeFile,
    measured: Measured,
    write: Callable[[NDArray[np.float32]], object],
    progress: Progress = no_progress,
) -> None:
    """Hands the volume over as float32 slabs [z, y, x], in order; what is not finite becomes the mean."""
    for _, slab in _slabs(volume, progress, "writing"):
        if measured.non_finite_voxels:
            slab[~np.isfinite(slab)] = measured.statistics.mean
        write(slab)


def _slabs(volume: VolumeFile, progress: Progress, phase: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
    depth, height, width = volume.shape
    thickness = slab_thickness(volume.shape, volume.layer, SLAB_BYTES)
    for start in range(0, depth, thickness):
        progress(start / depth, phase, sections=float(start), voxels=float(start * height * width))
        yield start, volume.slab(start, min(start + thickness, depth))
    progress(1.0, phase, sections=float(depth), voxels=float(depth * height * width))
