"""Volumes for tests of their formats."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryofleet.formats.volumes import catalogue
from cryofleet.formats.volumes.frame import VolumeData, VolumeFrame

ENDINGS = {name: each.endings[0] for name, each in catalogue.FORMATS.items()} | {"mrc.gz": ".mrc.gz"}
FRAME = VolumeFrame((2.5, 2.5, 2.5), (10.0, -20.0, 30.5))


def volume_of(array: NDArray[np.float32], frame: VolumeFrame = FRAME, **known: object) -> VolumeData:
    shape = (array.shape[0], array.shape[1], array.shape[2])
    return VolumeData("a volume", shape, lambda start, stop: array[start:stop], frame, **known)  # type: ignore[arg-type]


def written(folder: Path, name: str, volume: VolumeData, stem: str = "volume") -> Path:
    path = folder / f"{stem}{ENDINGS[name]}"
    catalogue.write(path, volume, catalogue.FORMATS[name])
    return path


def read(path: Path, scratch: Path, thickness: int = 2) -> tuple[NDArray[np.float32], VolumeData]:
    """A volume's voxels, read in slabs, and what is known of it."""
    _, reader = catalogue.open_volume(path, path.name, scratch)
    with reader:
        data = reader.data()
        return np.concatenate(list(data.slabs(thickness=thickness))), data


def noise(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(3, 2, shape).astype(np.float32)
