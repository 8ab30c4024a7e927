"""Features found in all sections of a tomogram by one network each; where several claim a voxel, the strongest counts.

Chen et al. 2017 (Nature Methods 14:983-985). A tomogram is read in slabs of sections, and a section that is large goes
through the networks in tiles whose margins overlap: memory is that of a slab and a tile, whatever the tomogram's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cryofleet.progress import Progress, no_progress
from services.learning.annotator import MARGIN, POOLING, activation_bytes
from services.learning.tomogram_scale import ReadSlab, Scale, slab_sections

TILE = 512
"""Side of the tiles that larger sections are cut into, in voxels without their margins."""


@dataclass(frozen=True)
class AnnotatedSlab:
    """Sections from `first` on: `labels[z, y, x]`, the number of each voxel's feature from 1 in the networks' order, 0
    for none; `scores[z, y, x]`, the probability of its strongest feature.
    """

    first: int
    labels: NDArray[np.uint8]
    scores: NDArray[np.float32]


def annotate(
    networks: Sequence[nn.Module],
    read_slab: ReadSlab,
    shape: tuple[int, int, int],
    scale: Scale,
    threshold: float,
    device: torch.device,
    progress: Progress = no_progress,
) -> Iterator[AnnotatedSlab]:
    """The slabs of a tomogram (z, y, x), in order. A voxel belongs to its strongest feature where that is at least as
    probable as `threshold`; of equally strong ones, to the first.
    """
    step = slab_sections(shape)
    for first in range(0, shape[0], step):
        slab = scale(read_slab(first, min(first + step, shape[0])))
        labels = np.zeros(slab.shape, np.uint8)
        scores = np.zeros(slab.shape, np.float32)
        for z, section in enumerate(slab):
            for number, network in enumerate(networks, start=1):
                found = probabilities(network, section, device, progress, (first + z) / shape[0])
                stronger = found > scores[z]
                labels[z][stronger] = number
                np.maximum(scores[z], found, out=scores[z])
            # A threshold of 0 takes what is probable at all.
            labels[z][scores[z] < threshold] = 0
        yield AnnotatedSlab(first, labels, scores)


def probabilities(
    network: nn.Module,
    section: NDArray[np.float32],
    device: torch.device,
    progress: Progress = no_progress,
    fraction: float = 0.0,
) -> NDArray[np.float32]:
    """The probability of the network's feature at each voxel of `section[y, x]`, which is in the tomogram's scale.

    Tiled or not, the result is the same: tiles begin at multiples of the pooling and bring as much around them as the
    network sees. Beyond the section's edge lies its mirror image.
    """
    height, width = section.shape
    extra = [-side % POOLING for side in section.shape]
    padded = np.pad(section, [(MARGIN, MARGIN + more) for more in extra], mode="symmetric")
    result = np.empty(section.shape, np.float32)
    with torch.inference_mode():
        for y in range(0, height, TILE):
            for x in range(0, width, TILE):
                tile = padded[y : y + TILE + 2 * MARGIN, x : x + TILE + 2 * MARGIN]
                batch = torch.from_numpy(np.ascontiguousarray(tile))[None, None].to(device)
                found = torch.sigmoid(network(batch)[0]).cpu().numpy()
                part = result[y : y + TILE, x : x + TILE]
                part[...] = found[: part.shape[0], : part.shape[1]]
                progress(fraction, "annotating sections")
    return result


def memory_bytes(shape: tuple[int, int, int]) -> int:
    """What annotating a tomogram (z, y, x) takes: a slab as read, scaled, labelled and scored, a padded section and its
    maps, and a tile's layers.
    """
    plane = shape[1] * shape[2]
    tile = min(plane, TILE**2) + 4 * MARGIN * TILE
    return 16 * slab_sections(shape) * plane + 16 * (plane + 4 * MARGIN * max(shape[1:])) + 3 * activation_bytes(tile)
