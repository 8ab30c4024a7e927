"""Parts of a segmentation as particles: touching ones parted by mean shift, those of the wrong size left out.

Moebel et al. 2021 (Nature Methods 18:1386-1394) find particles in a segmentation by mean shift of its voxels. With a
flat kernel that climbs the density of the voxels under Epanechnikov's kernel of the same radius (Cheng 1995, IEEE PAMI
17:790-799), so the modes are that density's maxima, which one convolution gives. Here it is done where it matters: in
parts that are clearly larger than a particle of their class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
import scipy.signal
import scipy.spatial
from numpy.typing import NDArray

from cryofleet.progress import Progress
from services.learning.connected_parts import Parts

SPLIT_ABOVE = 1.5
"""Parts of more than so many times their class's volume are looked at for more than one particle."""
MAX_VOXELS = 2**22
"""Parts that fill a larger box are no few particles that touch."""
SPLITTING_BYTES = 150
"""Memory of splitting for each voxel of the box: transforms, density, maxima, and the places of what is inside."""

ReadBox = Callable[[tuple[slice, slice, slice]], NDArray[np.uint8]]
"""Labels of a box `[z, y, x]`."""


@dataclass(frozen=True)
class SizedParts:
    """The parts that are of their class's size, and by class how many were split, too small and too large."""

    parts: Parts
    split: Mapping[int, int]
    too_small: Mapping[int, int]
    too_large: Mapping[int, int]


def sized_parts(
    parts: Parts,
    read_box: ReadBox,
    class_voxels: Mapping[int, float],
    min_share: float,
    max_share: float,
    progress: Progress,
) -> SizedParts:
    """Parts with touching particles parted, of `min_share` to `max_share` times their class's volume.

    `class_voxels` is the volume of a particle by its class; parts of classes that it does not name stay as they are.
    A piece has the score and the box of its part.
    """
    labels, voxels, centres, scores, starts, stops = [], [], [], [], [], []
    split = dict.fromkeys(class_voxels, 0)
    for row in range(len(parts)):
        label = int(parts.labels[row])
        volume = class_voxels.get(label)
        pieces = [(int(parts.voxels[row]), parts.centres[row], parts.starts[row], parts.stops[row])]
        extent = int(np.prod(parts.stops[row] - parts.starts[row]))
        if volume is not None and parts.voxels[row] > SPLIT_ABOVE * volume and extent <= MAX_VOXELS:
            start, stop = parts.starts[row], parts.stops[row]
            z, y, x = (slice(int(first), int(last)) for first, last in zip(start, stop, strict=True))
            inside = part_in_box(read_box((z, y, x)) == label, parts.voxels[row], parts.centres[row] - start[::-1])
            found = split_part(inside, volume)
            split[label] += len(found) > 1
            pieces = [(count, centre + start[::-1], start, stop) for count, centre in found]
        for count, centre, start, stop in pieces:
            labels.append(label)
            voxels.append(count)
            centres.append(centre)
            scores.append(parts.scores[row])
            starts.append(start)
            stops.append(stop)
        progress((row + 1) / len(parts), "parting touching particles", parts=row + 1)
    pieces_of = Parts(
        np.array(labels, np.int64),
        np.array(voxels, np.int64),
        np.array(centres, np.float64).reshape(-1, 3),
        np.array(scores, np.float64),
        np.array(starts, np.int64).reshape(-1, 3),
        np.array(stops, np.int64).reshape(-1, 3),
    )
    volumes = np.array([class_voxels.get(int(label), np.nan) for label in pieces_of.labels])
    shares = pieces_of.voxels / volumes  # NaN, which is neither too small nor too large, where no size is known
    small, large = shares < min_share, shares > max_share
    return SizedParts(
        pieces_of.chosen(~(small | large)),
        split,
        {label: int((small & (pieces_of.labels == label)).sum()) for label in class_voxels},
        {label: int((large & (pieces_of.labels == label)).sum()) for label in class_voxels},
    )


def part_in_box(inside: NDArray[np.bool_], voxels: int, centre: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The one of the box's parts that has so many voxels and that centre (x, y, z); others may reach into its box."""
    labelled, count = scipy.ndimage.label(inside)
    alike = np.flatnonzero(np.bincount(labelled.reshape(-1), minlength=count + 1)[1:] == voxels) + 1
    centres = np.array(scipy.ndimage.center_of_mass(inside, labelled, alike))[:, ::-1]
    part: NDArray[np.bool_] = labelled == alike[np.argmin(np.linalg.norm(centres - centre, axis=1))]
    return part


def split_part(inside: NDArray[np.bool_], particle_voxels: float) -> list[tuple[int, NDArray[np.float64]]]:
    """The particles in one part `[z, y, x]`: voxels and centre (x, y, z) of each, the largest first.

    Modes of the voxels' density within the radius of a sphere of a particle's volume, further apart than that and no
    more than the part's volume holds; each voxel belongs to the nearest. Hollow particles count as full.
    """
    radius = max(1.0, float(np.cbrt(0.75 / np.pi * particle_voxels)))
    steps = np.arange(-int(radius), int(radius) + 1)
    squared = steps[:, None, None] ** 2 + steps[:, None] ** 2 + steps**2
    kernel = np.maximum(0.0, 1 - squared / (radius + 1) ** 2).astype(np.float32)
    filled = scipy.ndimage.binary_fill_holes(inside)
    # Rounded, or a flat maximum would be many.
    density = np.round(scipy.signal.oaconvolve(filled.astype(np.float32), kernel, mode="same"), 2)
    peaks, count = scipy.ndimage.label(density == scipy.ndimage.maximum_filter(density, 3), np.ones((3, 3, 3)))
    numbers = np.arange(1, count + 1)
    heights = np.asarray(scipy.ndimage.maximum(density, peaks, numbers))
    centres = np.array(scipy.ndimage.center_of_mass(peaks > 0, peaks, numbers))
    modes: list[NDArray[np.float64]] = []
    for row in np.argsort(-heights, kind="stable"):
        if len(modes) == max(1, round(inside.sum() / particle_voxels)):
            break
        if all(np.linalg.norm(centres[row] - mode) > radius for mode in modes):
            modes.append(centres[row])
    places = np.argwhere(inside)
    _, nearest = scipy.spatial.cKDTree(np.array(modes)).query(places)
    pieces = [places[nearest == number] for number in range(len(modes))]
    found = [(len(piece), piece.mean(axis=0)[::-1]) for piece in pieces if len(piece)]
    return sorted(found, key=lambda each: -each[0])
