"""Tomograms as networks take them, and the volumes of classes and probabilities that come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import Progress
from cryofleet.server import Reader, Task
from cryofleet.volumes import Volume, VolumeInfo, VolumeWriter
from services.learning import tomogram_scale
from services.learning.binned_volume import bin_volume, binned_shape, nearest_voxels
from services.learning.preparation import CONTRAST
from services.learning.service import inputs

Array = NDArray[np.float32]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Tomogram:
    """A tomogram and the factor that a network wants it binned by."""

    volume: Volume
    binning: int

    @property
    def shape(self) -> Shape:
        """(z, y, x) after binning."""
        return binned_shape(self.volume.info.shape, self.binning)


def open_tomogram(reader: Reader, uri: str, config: Mapping[str, Any]) -> Tomogram:
    """Raises FailedPrecondition for a stack and for another voxel size than that which the model was trained on,
    InvalidArgument for a tomogram thinner than a binned voxel.
    """
    volume = reader.open_volume(uri)
    if volume.info.count is not None:
        raise FailedPrecondition(f"{uri} is a stack of {volume.info.count} volumes; a tomogram is needed")
    found = volume.info.voxel_size_angstrom
    needed = config.get("subtomogram_voxel_size_angstrom", config.get("voxel_size_angstrom"))
    if not isinstance(needed, int | float) or isinstance(needed, bool) or not needed > 0:
        raise FailedPrecondition(
            f"the model's config says voxels of {needed!r} Å: it is damaged, train the model again"
        )
    if not math.isclose(found, needed, rel_tol=inputs.VOXEL_SIZE_TOLERANCE):
        raise FailedPrecondition(
            f"{uri} has voxels of {found:g} Å; the model was trained on voxels of {needed:g} Å: bin the tomogram to "
            "that size, or train a model on data of its own"
        )
    if min(volume.info.shape) < config["binning"]:
        raise InvalidArgument(f"{uri} of shape {volume.info.shape} can't be binned by {config['binning']}")
    return Tomogram(volume, config["binning"])


@contextmanager
def opened(task: Task, tomogram: Tomogram, progress: Progress) -> Iterator[Callable[[int, int], Array]]:
    """`read(z0, z1)` of the tomogram, binned and with protein positive."""
    sign = np.float32(-1 if tomogram.volume.info.contrast == "dark" else 1)
    if tomogram.binning == 1:
        yield lambda z0, z1: sign * tomogram.volume.slab(z0, z1)
        return
    slab, shape = tomogram.volume.slab, tomogram.volume.info.shape
    with bin_volume(slab, shape, tomogram.binning, task.scratch, progress) as binned:
        yield lambda z0, z1: sign * binned.sections(z0, z1)


@contextmanager
def in_own_scale(tomogram: Tomogram, progress: Progress) -> Iterator[Callable[[int, int], Array]]:
    """`read(z0, z1)` of a tomogram that is not binned, in the scale that is measured in it."""
    volume = tomogram.volume
    scale = tomogram_scale.measure_scale(volume.slab, volume.info.shape, volume.info.contrast, volume.uri, progress)
    yield tomogram_scale.scaled(volume.slab, scale)


def stack_info(box: VolumeInfo, count: int) -> VolumeInfo:
    """Of a stack of so many boxes."""
    return replace(box, count=count)


class ClassVolumes:
    """Writes labels and, where wanted, each class's probabilities at the voxels of what was binned for the network; of
    a tomogram also the scores, which are the probability of each voxel's class.

    Each voxel gets what was found for the binned voxel that is nearest. A context manager, after which `labels_uri`,
    `scores_uri` and `probability_uris` are set.
    """

    def __init__(self, task: Task, info: VolumeInfo, binning: int, classes: int, probabilities: bool) -> None:
        """`info` is of the tomogram, or of a stack of boxes as extracted."""
        self.labels_uri = self.scores_uri = ""
        self.probability_uris: list[str] = []
        found = replace(info, contrast=CONTRAST)
        self._binning = binning
        self._places = [nearest_voxels(side, side // binning, binning) for side in info.shape]
        self._labels = task.volume_writer("labels.mrc", found)
        self._scores = task.volume_writer("scores.mrc", found) if info.count is None else None
        names = [f"probabilities-{number:03d}.mrc" for number in range(classes)] if probabilities else []
        self._probabilities = [task.volume_writer(name, found) for name in names]
        self._stack = ExitStack()

    def __enter__(self) -> ClassVolumes:
        for writer in (self._labels, self._scores, *self._probabilities):
            if writer is not None:
                self._stack.enter_context(writer)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        self.labels_uri = self._labels.uri
        self.scores_uri = self._scores.uri if self._scores is not None else ""
        self.probability_uris = [writer.uri for writer in self._probabilities]

    def write_planes(
        self, first: int, labels: NDArray[np.integer[Any]], scores: Array, probabilities: Array | None
    ) -> None:
        """The next binned planes `[z, y, x]` of a tomogram, from `first` on; probabilities `[class, z, y, x]`."""
        assert self._scores is not None
        planes = np.flatnonzero((self._places[0] >= first) & (self._places[0] < first + len(labels)))
        for plane in planes:
            z = self._places[0][plane] - first
            _write(self._labels, self._widened(labels[z]))
            _write(self._scores, self._widened(scores[z]))
            for number, writer in enumerate(self._probabilities):
                assert probabilities is not None
                _write(writer, self._widened(probabilities[number, z]))

    def write_boxes(self, labels: NDArray[np.integer[Any]], probabilities: Array) -> None:
        """The next boxes of a stack, `[i, z, y, x]`; probabilities `[i, class, z, y, x]`."""
        for number, box in enumerate(labels):
            self._labels.write(self._widened_box(box).astype(np.float32))
            for each, writer in enumerate(self._probabilities):
                writer.write(self._widened_box(probabilities[number, each]).astype(np.float32))

    def _widened(self, plane: NDArray[Any]) -> NDArray[Any]:
        if self._binning == 1:
            return plane
        return plane[np.ix_(self._places[1], self._places[2])]

    def _widened_box(self, box: NDArray[Any]) -> NDArray[Any]:
        return box if self._binning == 1 else box[np.ix_(*self._places)]


def _write(writer: VolumeWriter, plane: NDArray[Any]) -> None:
    writer.write(plane[np.newaxis].astype(np.float32))
