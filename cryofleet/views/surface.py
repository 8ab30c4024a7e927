"""The surface of an average at a threshold, turned by hand.

The browser gets a small map once, and casts rays through it. Neither a graphics card nor a library is needed there, and
a threshold is moved without asking anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import param
from numpy.typing import NDArray
from panel.custom import JSComponent

from cryofleet.client import Client
from cryofleet.errors import FailedPrecondition
from cryofleet.views.boxes import open_boxes, read_box

LARGEST_SIDE = 64
"""Of the map that the browser gets, in voxels: 256 KiB."""
_LEVELS = 255


@dataclass(frozen=True, eq=False)
class Density:
    """A map `[z, y, x]`, protein positive, finite and not all of one value."""

    values: NDArray[np.float32]
    voxel_size_angstrom: float

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        return float(self.values.min()), float(self.values.max())

    def deviations(self, threshold: float) -> float:
        """How many standard deviations a threshold lies above the mean."""
        return (threshold - float(self.values.mean(dtype=np.float64))) / float(self.values.std(dtype=np.float64))

    def volume_nm3(self, threshold: float) -> float:
        """Of the voxels above a threshold."""
        return int(np.count_nonzero(self.values > threshold)) * (self.voxel_size_angstrom / 10) ** 3

    def otsu(self) -> float:
        """Between the means of those voxels on either side that differ least among themselves, of 256 steps (Otsu 1979,
        IEEE Trans. Syst. Man Cybern. 9, 62): where io.MakeMesh has its surface, too.
        """
        counts, edges = np.histogram(self.values, 256)
        middles = (edges[:-1] + edges[1:]) / 2
        below = np.cumsum(counts)[:-1].astype(np.float64)
        above = counts.sum() - below
        sums = np.cumsum(counts * middles)
        low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / above
        best = int(np.argmax(below * above * (high - low) ** 2))
        return float(low[best] + high[best]) / 2

    def levels(self) -> NDArray[np.uint8]:
        """The map in 8 bits, from its lowest value to its highest."""
        low, high = self.range
        levels: NDArray[np.uint8] = np.rint((self.values - low) * (_LEVELS / (high - low))).astype(np.uint8)
        return levels


def read_density(client: Client, uri: str) -> Density:
    """An average by its URI; one with a side above 64 voxels is shrunk by the io service first.

    Raises FailedPrecondition where it holds no surface, and what the platform answers.
    """
    boxes = open_boxes(client, uri)
    factor = max(boxes.info.shape) / LARGEST_SIDE
    if factor > 1:
        boxes = open_boxes(client, client.call("io.Rescale", volume_uri=uri, factor=factor)["volume_uri"])
    values = read_box(client, boxes, 0)
    if not np.isfinite(values).all() or not values.min() < values.max():
        raise FailedPrecondition(f"{uri} has no surface: its voxels are all alike, or not numbers")
    sign = np.float32(-1 if boxes.info.contrast == "dark" else 1)
    return Density(sign * values, boxes.info.voxel_size_angstrom)


class Surface(JSComponent):
    """Draws a density's surface. Drag or arrows turn it, wheel, + and - zoom, 0 shows all."""

    data = param.Bytes(b"", doc="Voxels in 8 bits, x fastest.")
    sides = param.List([1, 1, 1], doc="Of the map: x, y, z in voxels.")
    level = param.Number(128.0, doc="Of the surface, in the map's 8 bits.")
    voxel_size = param.Number(1.0, doc="In Å.")
    note = param.String("")

    _esm = Path(__file__).with_name("surface.js")
    _stylesheets = [Path(__file__).with_name("surface.css").read_text()]  # noqa: RUF012

    def display(self, density: Density | None, note: str = "") -> None:
        """Another map, or none."""
        if density is None:
            self.param.update(data=b"", note=note)
            return
        z, y, x = density.values.shape
        self.param.update(
            sides=[x, y, z], voxel_size=density.voxel_size_angstrom, data=density.levels().tobytes(), note=note
        )

    def cut(self, density: Density, threshold: float) -> None:
        """Put the surface at a threshold in the density's own unit."""
        low, high = density.range
        self.level = _LEVELS * (threshold - low) / (high - low)
