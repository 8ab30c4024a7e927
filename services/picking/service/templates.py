"""The template and the tomogram of a search, as its request has them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics import transfer
from cryofleet.numerics.fourier import Profile, band_profile
from cryofleet.requests import CONTRASTS, tilt_series_transfer
from cryofleet.server import Reader, Task
from cryofleet.v1 import picking_pb2
from cryofleet.volumes import Volume, VolumeInfo
from services.picking import template as templates
from services.picking import template_matching as matching

SearchRequest = picking_pb2.TemplateMatchRequest | picking_pb2.RefinePicksRequest

#: Voxel sizes of template and tomogram that differ by more than this are an error.
VOXEL_SIZE_TOLERANCE = 0.01


def template_info(uri: str, binning: int, info: VolumeInfo, reader: Reader) -> VolumeInfo:
    """The template's header, once it is sure that it fits the tomogram, its shape as it is searched for.

    A template in the tomogram's own voxels is reduced with it.
    """
    found = reader.open_volume(uri).info
    if found.count is not None:
        raise FailedPrecondition(f"{uri} is a stack of {found.count} boxes; one map is needed as template")
    searched = info.voxel_size_angstrom * binning
    if not any(_same_size(found.voxel_size_angstrom, size) for size in (searched, info.voxel_size_angstrom)):
        raise FailedPrecondition(
            f"the template {uri} has voxels of {found.voxel_size_angstrom:g} Å and the tomogram is searched in voxels "
            f"of {searched:g} Å: bring the template to {searched:g} Å (simulation.SimulateDensity does)"
        )
    if len(set(found.shape)) != 1:
        raise InvalidArgument(f"the template {uri} has {found.shape} voxels (z, y, x); it must be a cube")
    if not _same_size(found.voxel_size_angstrom, searched):
        half = -(-found.shape[0] // (2 * binning))
        found = replace(found, shape=(2 * half,) * 3)
    matching.check_size(binned_shape(info, binning), found.shape[0])
    return found


def _same_size(one: float, other: float) -> bool:
    return abs(one - other) <= VOXEL_SIZE_TOLERANCE * other


def mask_turns(request: SearchRequest) -> bool:
    """Whether the mask is no sphere, and so turns with the template."""
    return bool(request.mask_uri) or len(request.mask_radii_angstrom) == 3


def is_filtered(request: SearchRequest) -> bool:
    """Whether the tomogram is, before it is searched."""
    return request.whiten or request.HasField("low_pass_angstrom") or request.HasField("high_pass_angstrom")


def template_of(
    request: SearchRequest, info: VolumeInfo, binning: int, profile: Profile | None, task: Task
) -> templates.Template:
    """The template with its mask, and its transfer function for the tomogram."""
    header = template_info(request.template_uri, binning, info, task)
    box, voxel_size = header.shape[0], info.voxel_size_angstrom * binning
    density = task.open_volume(request.template_uri).read()
    if header.contrast == "dark":
        density = -density
    reduced = 1 if _same_size(header.voxel_size_angstrom, voxel_size) else binning
    mask = _mask(request, density, reduced, voxel_size, task)
    density = templates.binned(density, reduced)
    weights = None
    if request.tilts_uri:
        weights = tilt_series_transfer(request, task, box, voxel_size)
    elif (info.tilt_min_degrees, info.tilt_max_degrees) != (-90.0, 90.0):
        weights = transfer.wedge_transfer(box, info.tilt_min_degrees, info.tilt_max_degrees)
    if profile is not None:
        weights = transfer.filtered(
            np.ones((box, box, box // 2 + 1), np.float32) if weights is None else weights, profile
        )
    return templates.Template(density, mask, mask_turns(request), weights)


def _mask(
    request: SearchRequest, density: NDArray[np.float32], reduced: int, voxel_size: float, task: Task
) -> NDArray[np.float32]:
    """The mask in the box that the template is searched for in."""
    if request.mask_uri:
        mask = task.open_volume(request.mask_uri).read()
        if mask.shape != density.shape:
            raise InvalidArgument(
                f"the mask {request.mask_uri} has {mask.shape} voxels (z, y, x) and the template {density.shape}; they "
                "must be the same"
            )
        return np.clip(templates.binned(mask, reduced), 0, 1) if reduced > 1 else mask
    density = templates.binned(density, reduced)
    box = density.shape[0]
    if len(request.mask_radii_angstrom) == 3:
        x, y, z = (radius / voxel_size for radius in request.mask_radii_angstrom)
        return templates.ellipsoid(box, (x, y, z))
    if request.mask_radii_angstrom:
        return templates.sphere(box, request.mask_radii_angstrom[0] / voxel_size)
    return templates.sphere(box, templates.extent(density) + templates.MASK_EDGE)


def searched_tomogram(
    request: SearchRequest, volume: Volume, binning: int, measured: tuple[float, float]
) -> matching.Tomogram:
    """The tomogram as the request has it searched, with its filter."""
    info = volume.info
    contrast = CONTRASTS[request.contrast] if request.HasField("contrast") else info.contrast
    tomogram = matching.Tomogram(
        volume.slab,
        info.shape,
        *measured,
        sign=-1 if contrast == "dark" else 1,
        binning=binning,
        gold_deviations=request.gold_deviations,
    )
    if not is_filtered(request):
        return tomogram
    white = matching.whitening(tomogram) if request.whiten else None
    band = band_profile(
        info.voxel_size_angstrom * binning,
        request.high_pass_angstrom if request.HasField("high_pass_angstrom") else None,
        request.low_pass_angstrom if request.HasField("low_pass_angstrom") else None,
    )

    def profile(frequency: NDArray[np.float32]) -> NDArray[np.float32]:
        kept = band(frequency)
        return kept if white is None else kept * white(frequency)

    return replace(tomogram, profile=profile)


def binned_shape(info: VolumeInfo, binning: int) -> tuple[int, int, int]:
    """The tomogram's, as it is searched."""
    z, y, x = info.shape
    return (z // binning, y // binning, x // binning)
