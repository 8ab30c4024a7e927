"""A microtubule's wall as a template, and how far its picks lie from the wall: python -m benchmarks.microtubule.

The figures need the folder of real data beside the repository (`../shared/data`); a line says so where it is not there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import mrcfile
import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from benchmarks.crowded import DATA
from benchmarks.harness import Row, main
from cryofleet.numerics.cylindrical import frames_along, trace_axis
from cryofleet.numerics.rotations import rotation_grid
from cryofleet.numerics.transfer import wedge_transfer
from services.picking import template_matching
from services.picking.score_peaks import Peaks, peaks
from services.picking.template import Template


@dataclass(frozen=True)
class Patch:
    """A template and its soft mask, both (z, y, x); outwards is +x, the tube's axis +z, the wall's middle the box's."""

    template: NDArray[np.float32]
    mask: NDArray[np.float32]
    voxel_size_angstrom: float


def lattice_patch(
    tubulin: NDArray[np.floating],
    radius_angstrom: float = 112.0,
    protofilaments: int = 13,
    rise_angstrom: float = 40.5,
    *,
    map_voxel_size_angstrom: float = 5.144,
    voxel_size_angstrom: float = 10.52,
    box_size: int = 22,
    across: int = 3,
    along: int = 3,
    starts: int = -3,
) -> Patch:
    """A patch of a microtubule's wall, cut from a model of the wall.

    Args:
        tubulin: (z, y, x), a monomer, protein positive, +z along the protofilament and +y outwards.
        radius_angstrom: of the monomers' centres of mass from the tube's axis.
        protofilaments: around the tube.
        rise_angstrom: from a monomer to the next along a protofilament.
        map_voxel_size_angstrom: of the map.
        voxel_size_angstrom: of the template.
        box_size: its side, voxels.
        across: protofilaments in the mask, odd.
        along: monomers in the mask along each, odd.
        starts: of the lateral helix; from one protofilament to the next, counter-clockwise seen from +z, monomers
            climb starts * rise / protofilaments. Negative is left-handed, as a microtubule's 3-start helix is.
    """
    density = np.clip(np.asarray(tubulin, np.float64), 0, None)
    centre = np.array(ndimage.center_of_mass(density))[::-1]
    # what the coarser template cannot carry must not fold into it
    blurred = ndimage.gaussian_filter(density, 0.5 * voxel_size_angstrom / map_voxel_size_angstrom, mode="constant")
    ticks = (np.arange(box_size) - box_size // 2) * voxel_size_angstrom
    z, y, x = np.meshgrid(ticks, ticks, ticks, indexing="ij")
    grid = np.stack([x, y, z], axis=-1)
    axis = np.array([-radius_angstrom, 0.0, 0.0])

    def monomer(filament: int, number: int) -> NDArray[np.float64]:
        turn = Rotation.from_euler("z", 360 * filament / protofilaments, degrees=True)
        place = axis + turn.apply([radius_angstrom, 0.0, 0.0])
        place[2] += (number + starts * filament / protofilaments) * rise_angstrom
        # the map's outward +y is laid onto +x before the turn about the tube's axis
        laid = turn * Rotation.from_euler("z", -90, degrees=True)
        inside = laid.inv().apply((grid - place).reshape(-1, 3)) / map_voxel_size_angstrom + centre
        values = ndimage.map_coordinates(blurred, inside[:, ::-1].T, order=3, mode="constant")
        return np.asarray(values, np.float64).reshape(grid.shape[:3])

    reach = int(np.ceil(box_size * voxel_size_angstrom / 2 / rise_angstrom)) + 2
    wall, patch = np.zeros(grid.shape[:3]), np.zeros(grid.shape[:3])
    for filament in range(-(protofilaments // 2), protofilaments - protofilaments // 2):
        for number in range(-reach, reach + 1):
            values = monomer(filament, number)
            wall += values
            if abs(filament) <= across // 2 and abs(number) <= along // 2:
                patch += values
    envelope = ndimage.binary_dilation(patch > 0.1 * patch.max(), iterations=1)
    mask = np.clip(ndimage.gaussian_filter(envelope.astype(np.float64), 1.0, mode="constant"), 0, 1)
    return Patch((wall * mask).astype(np.float32), mask.astype(np.float32), voxel_size_angstrom)


def wall_distance(positions: NDArray[np.floating], axis: NDArray[np.floating], radius: float) -> NDArray[np.float64]:
    """How far positions lie from a tube's wall, |r - R|; everything in (x, y, z) voxels.

    Args:
        positions: (n, 3).
        axis: (m, 3), points on the axis in their order.
        radius: R, of the wall.
    """
    distance, _ = cKDTree(frames_along(axis, 0.05).points).query(np.asarray(positions, np.float64))
    return np.asarray(np.abs(distance - radius), np.float64)


def wall_picks(
    tomogram: NDArray[np.float32], tubulin: NDArray[np.floating], step_degrees: float = 20.0, separation: float = 4.0
) -> Peaks:
    """Picks of a lattice patch in a tomogram with tilts of +-60 degrees, protein bright, the best first.

    Args:
        tomogram: float32 [z, y, x], voxels of 10.52 Å.
        tubulin: as for `lattice_patch`.
        step_degrees: between two orientations.
        separation: least distance of two picks, voxels; a monomer is 3.9 long.
    """
    patch = lattice_patch(tubulin, rise_angstrom=41.0)
    box = patch.template.shape[0]
    template = Template(patch.template, np.clip(patch.mask, 0, 1), True, wedge_transfer(box, -60, 60))
    shape = (tomogram.shape[0], tomogram.shape[1], tomogram.shape[2])
    measured = template_matching.survey(lambda a, b: tomogram[a:b], shape)
    searched = template_matching.Tomogram(lambda a, b: tomogram[a:b], shape, *measured)
    rotations = rotation_grid(step_degrees)
    plan = template_matching.layout(shape, box, disturbed=False, mask_turns=True, variants=1)
    scores = np.zeros(shape, np.float32)
    work = template_matching.pieces(plan, len(rotations))
    for match in template_matching.search(searched, [template], rotations, plan, work, threads=2):
        scores[tuple(slice(a, b) for a, b in zip(match.tile.start, match.tile.stop, strict=True))] = match.scores[0]
    return peaks(lambda a, b: scores[a:b], shape, separation)


def measure(quick: bool) -> Iterator[Row]:
    tomogram = DATA / "real" / "microtubule_13pf.tif"
    if not tomogram.exists():
        print(f"{tomogram} is not there: no figures of it", file=sys.stderr)
        return
    volume = tifffile.imread(tomogram).astype(np.float32)
    with mrcfile.open(DATA / "maps" / "beta-tubulin.mrc") as file:
        tubulin = np.array(file.data, np.float32)
    axis = trace_axis(volume, 10.5, along="y")
    found = wall_picks(volume, tubulin, 30.0 if quick else 20.0)
    distance = wall_distance(found.positions[:100].astype(np.float64), axis, 10.5)
    case = "microtubule of 13 protofilaments, best 100 picks"
    yield Row(case, "within_3_nm_of_the_wall", float((distance * 1.052 <= 3).mean()), "", "higher", 0.8)
    yield Row(case, "median_distance", float(np.median(distance)) * 1.052, "nm", "lower")


if __name__ == "__main__":
    main("microtubule", measure)
