"""MakeMask: a soft mask in the box of a volume."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.masks import soft_cylinder, soft_dilation, soft_ellipsoid, soft_sphere
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import alignment_pb2 as pb
from services.alignment.auto_mask import auto_mask
from services.alignment.service.inputs import BASE_BYTES, check_density, optional, protein_sign, read_cube
from services.alignment.service.registry import service

_MASK_BYTES = 80

_SHAPES: Mapping[int, tuple[str, int, frozenset[str]]] = {
    pb.MASK_SHAPE_SPHERE: ("sphere", 1, frozenset()),
    pb.MASK_SHAPE_CYLINDER: ("cylinder", 1, frozenset({"height_angstrom"})),
    pb.MASK_SHAPE_ELLIPSOID: ("ellipsoid", 3, frozenset()),
    pb.MASK_SHAPE_AUTO: ("auto", 0, frozenset({"low_pass_angstrom", "threshold_sigma", "dilation_angstrom"})),
    pb.MASK_SHAPE_DILATE: ("dilate", 0, frozenset({"threshold", "dilation_angstrom"})),
}
"""Name, number of radii and other parameters of each shape."""


def _check_shape(request: pb.MakeMaskRequest) -> None:
    name, radii, own = _SHAPES[request.shape]
    if len(request.radii_angstrom) != radii:
        raise InvalidArgument(f"a mask of shape {name} takes {radii} radii_angstrom, not {len(request.radii_angstrom)}")
    for other in ("height_angstrom", "low_pass_angstrom", "threshold_sigma", "threshold", "dilation_angstrom"):
        if other not in own and optional(request, other) is not None:
            raise InvalidArgument(f"a mask of shape {name} takes no {other}")
    if request.shape == pb.MASK_SHAPE_CYLINDER and not request.HasField("height_angstrom"):
        raise InvalidArgument("a mask of shape cylinder needs its height_angstrom")


def _mask_needs(request: pb.MakeMaskRequest, reader: Reader) -> Needs:
    return Needs(BASE_BYTES + _MASK_BYTES * math.prod(reader.open_volume(request.volume_uri).info.shape))


@service.operation(needs=_mask_needs)
def make_mask(request: pb.MakeMaskRequest, task: Task) -> pb.MakeMaskResult:
    """A soft mask in the box of a volume."""
    _check_shape(request)
    volume, info = read_cube(task, request.volume_uri)
    n, voxel = info.shape[0], info.voxel_size_angstrom
    radii = [radius / voxel for radius in request.radii_angstrom]
    edge = request.edge_angstrom / voxel if request.HasField("edge_angstrom") else max(4.0, n / 12)
    dilation = request.dilation_angstrom / voxel if request.HasField("dilation_angstrom") else max(2.0, n / 32)
    match request.shape:
        case pb.MASK_SHAPE_SPHERE:
            mask = soft_sphere(n, radii[0], edge)
        case pb.MASK_SHAPE_CYLINDER:
            mask = soft_cylinder(n, radii[0], request.height_angstrom / (2 * voxel), edge)
        case pb.MASK_SHAPE_ELLIPSOID:
            mask = soft_ellipsoid(n, (radii[0], radii[1], radii[2]), edge)
        case pb.MASK_SHAPE_AUTO:
            check_density(volume, request.volume_uri)
            mask = auto_mask(
                protein_sign(info) * volume,
                voxel,
                low_pass_angstrom=optional(request, "low_pass_angstrom"),
                threshold_sigma=optional(request, "threshold_sigma"),
                dilation_voxels=dilation,
                edge_voxels=edge,
            ).mask
        case _:
            inside = volume > (request.threshold if request.HasField("threshold") else 0.5)
            if not inside.any():
                raise InvalidArgument(f"no voxel of {request.volume_uri} is above the threshold: nothing to dilate")
            mask = soft_dilation(inside, dilation, edge)
    return pb.MakeMaskResult(mask_uri=task.write_volume("mask.mrc", mask, info), share=float(mask.mean()))
