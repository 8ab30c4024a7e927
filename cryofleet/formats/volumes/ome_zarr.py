"""Volumes as OME-Zarr 0.4: a pyramid of Zarr arrays, with axes, units and where each level lies.

Specification: ngff.openmicroscopy.org/0.4. A folder, or one zip file of the same content. Level k of the pyramid
averages blocks of 2^k voxels a side, so that its first voxel lies (2^k - 1) / 2 voxels of level 0 further: that is its
translation.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.volumes.frame import LAYER_BYTES, Shape, Sizes, VolumeData, VolumeFrame
from cryofleet.formats.volumes.zarr_array import FolderStore, Store, ZarrArray, ZipStore, document, is_path
from cryofleet.progress import Progress, no_progress

_ANGSTROM = {"angstrom": 1.0, "picometer": 0.01, "nanometer": 10.0, "micrometer": 1e4, "millimeter": 1e7, "meter": 1e10}
_MAX_LEVELS = 32
_CHUNK_SIDE = 128
_DEEPEST_CHUNK = 64
_COARSEST_SIDE = 64
_NOTE = "cryofleet"
_PACKED_ENDINGS = (".zip", ".ozx")


@dataclass(frozen=True)
class Level:
    """One level of a pyramid."""

    path: str
    shape: Shape
    voxel_size_angstrom: Sizes | None


class OmeZarrVolume:
    """The finest level of the first image of an OME-Zarr folder or zip file, read slab by slab.

    Raises on opening:
        InvalidArgument: it is damaged, or no OME-Zarr.
        FailedPrecondition: it is of another version, or does not hold one volume of real numbers.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name = name or path.name
        self._store: Store = FolderStore(path, self.name) if path.is_dir() else ZipStore(path, self.name)
        try:
            self._open()
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            self._store.close()
            raise InvalidArgument(
                f"{self.name}: .zattrs makes no sense: {type(error).__name__} {str(error)[:80]}"
            ) from None
        except BaseException:
            self._store.close()
            raise

    def _open(self) -> None:
        attributes = document(self._store, ".zattrs")
        if attributes is None or "multiscales" not in attributes:
            if self._store.read("zarr.json", 1 << 20) is not None:
                raise FailedPrecondition(f"{self.name}: Zarr format 3 (OME-Zarr 0.5); OME-Zarr 0.4 is read")
            raise InvalidArgument(f"{self.name}: no OME-Zarr image: no multiscales in its .zattrs")
        image = attributes["multiscales"][0]
        version = image.get("version", "0.4")
        if version != "0.4":
            raise FailedPrecondition(f"{self.name}: OME-Zarr {str(version)[:20]!r}; 0.4 is read")
        axes = image["axes"]
        names = [str(axis["name"]) for axis in axes]
        if names[-3:] != ["z", "y", "x"] or len(names) > 5 or set(names[:-3]) - {"t", "c"}:
            raise FailedPrecondition(f"{self.name}: axes {', '.join(names)[:80]}; one volume of z, y, x is needed")
        units = [_ANGSTROM.get(str(axis.get("unit"))) for axis in axes[-3:]]
        levels = image["datasets"]
        if not 1 <= len(levels) <= _MAX_LEVELS or not all(is_path(level["path"]) for level in levels):
            raise InvalidArgument(f"{self.name}: its datasets are no paths of arrays inside of it")
        outer = _transform(image.get("coordinateTransformations", []), len(names))
        self._array = ZarrArray(self._store, levels[0]["path"])
        self.shape = self._array.shape
        self.layer = self._array.layer
        found: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        for level in levels:
            scale, translation = _transform(level.get("coordinateTransformations", []), len(names))
            found.append((scale * outer[0], translation * outer[0] + outer[1]))
        known = np.array([np.nan if unit is None else unit for unit in units])
        arrays = [self._array, *(ZarrArray(self._store, level["path"]) for level in levels[1:])]
        self.levels = tuple(
            Level(level["path"], array.shape, _sizes(scale[-3:] * known))
            for level, array, (scale, _) in zip(levels, arrays, found, strict=True)
        )
        self.voxel_size_angstrom = self.levels[0].voxel_size_angstrom
        origin = found[0][1][-3:][::-1] * known[::-1]
        self._origin: Sizes | None = tuple(origin.tolist()) if np.isfinite(origin).all() else None
        note = attributes.get(_NOTE)
        self._note = [note] if isinstance(note, str) else []

    def slab(self, start: int, stop: int) -> NDArray[np.float32]:
        """Sections start to stop, float32 [z, y, x]; memory is the slab's and a chunk's."""
        return self._array.slab(start, stop)

    def data(self) -> VolumeData:
        frame = VolumeFrame(self.voxel_size_angstrom, self._origin).with_note(self._note)
        stored = self._array.dtype.name
        return VolumeData(self.name, self.shape, self.slab, frame, stored_as=stored, layer=self.layer)

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _transform(steps: Any, dimensions: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale and translation, in the order of the axes."""
    scale, translation = np.ones(dimensions), np.zeros(dimensions)
    for step in steps:
        kind = step["type"]
        if kind == "identity":
            continue
        if kind not in ("scale", "translation"):
            raise ValueError(f"unknown transformation {str(kind)[:40]!r}")
        values = np.array(step[kind], np.float64)
        if values.shape != (dimensions,) or not np.isfinite(values).all():
            raise ValueError(f"a {kind} of other than {dimensions} numbers")
        if kind == "scale":
            scale, translation = scale * values, translation * values
        else:
            translation = translation + values
    return scale, translation


def _sizes(values: NDArray[np.float64]) -> Sizes | None:
    if not np.isfinite(values).all() or (values <= 0).any():
        return None
    z, y, x = values.tolist()
    return x, y, z


# --- Writing -------------------------------------------------------------------------------------------------------


def write(path: Path, volume: VolumeData, progress: Progress = no_progress) -> tuple[str, ...]:
    """Writes a pyramid of float32, compressed with Blosc, as a folder or, by a name in .zip or .ozx, one file.

    Memory is twice that of a layer of chunks: 64 sections, or as many fewer as take 128 MiB.

    Raises FailedPrecondition for a stack of images, and where numcodecs is not installed.
    """
    if volume.kind == "stack":
        raise FailedPrecondition(f"{volume.name}: a stack of images is no volume: OME-Zarr has no place for it")
    try:
        from numcodecs import blosc
    except ImportError:
        raise FailedPrecondition(f"{path}: writing OME-Zarr needs numcodecs: install cryofleet[io]") from None
    blosc.set_nthreads(1)

    def pack(chunk: NDArray[np.float32]) -> bytes:
        return bytes(blosc.compress(np.ascontiguousarray(chunk), b"zstd", 3, blosc.SHUFFLE))

    section = 4 * volume.shape[1] * volume.shape[2]
    # even, so that whole layers are halved
    depth = max(2, min(_DEEPEST_CHUNK, 1 << max(1, (LAYER_BYTES // section).bit_length() - 1)))
    shapes = [volume.shape]
    while max(shapes[-1]) > _COARSEST_SIDE:
        z, y, x = shapes[-1]
        shapes.append(((z + 1) // 2, (y + 1) // 2, (x + 1) // 2))
    packed = path.suffix.lower() in _PACKED_ENDINGS
    with _ZipTarget(path) if packed else _FolderTarget(path) as target:
        target.put(".zgroup", json.dumps({"zarr_format": 2}).encode())
        attributes = _attributes(volume, len(shapes))
        target.put(".zattrs", json.dumps(attributes, indent=1, ensure_ascii=False).encode())
        level: _LevelWriter | None = None
        for k in reversed(range(len(shapes))):
            level = _LevelWriter(target, str(k), shapes[k], depth, pack, level)
        assert level is not None
        for slab in volume.slabs(progress, "writing", depth if volume.layer <= depth else None):
            level.take(slab)
        level.finish()
    return ()


def _attributes(volume: VolumeData, levels: int) -> dict[str, Any]:
    frame = volume.frame
    unit = {"unit": "angstrom"} if frame.voxel_size_angstrom is not None else {}
    sizes = np.array(frame.voxel_size_angstrom or (1.0, 1.0, 1.0))[::-1]
    origin = np.array(frame.origin_angstrom or (0.0, 0.0, 0.0))[::-1]
    datasets = []
    for k in range(levels):
        steps = [{"type": "scale", "scale": (sizes * 2**k).tolist()}]
        translation = origin + sizes * (2**k - 1) / 2
        if translation.any():
            steps.append({"type": "translation", "translation": translation.tolist()})
        datasets.append({"path": str(k), "coordinateTransformations": steps})
    said: dict[str, Any] = {
        "multiscales": [
            {
                "version": "0.4",
                "name": Path(volume.name).name,
                "axes": [{"name": axis, "type": "space", **unit} for axis in "zyx"],
                "datasets": datasets,
                "type": "mean",
            }
        ]
    }
    if note := frame.note():
        said[_NOTE] = note
    return said


class _FolderTarget:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir()

    def put(self, key: str, data: bytes) -> None:
        path = self._path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class _ZipTarget:
    """Members are stored as they are, for chunks are compressed; the same content gives the same bytes."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)

    def put(self, key: str, data: bytes) -> None:
        self._zip.writestr(zipfile.ZipInfo(key), data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()


class _LevelWriter:
    """Takes sections in order, writes them in layers of chunks, and hands their averages to the next level."""

    def __init__(
        self,
        target: _FolderTarget | _ZipTarget,
        path: str,
        shape: Shape,
        depth: int,
        pack: Callable[[NDArray[np.float32]], bytes],
        coarser: _LevelWriter | None,
    ) -> None:
        self._target, self._path, self._shape, self._pack, self._coarser = target, path, shape, pack, coarser
        self._chunk = (depth, _CHUNK_SIDE, _CHUNK_SIDE)
        self._waiting: list[NDArray[np.float32]] = []
        self._layer = 0
        array = {
            "zarr_format": 2,
            "shape": list(shape),
            "chunks": list(self._chunk),
            "dtype": "<f4",
            "compressor": {"id": "blosc", "cname": "zstd", "clevel": 3, "shuffle": 1, "blocksize": 0},
            "fill_value": 0.0,
            "order": "C",
            "filters": None,
            "dimension_separator": "/",
        }
        target.put(f"{path}/.zarray", json.dumps(array, indent=1).encode())

    def take(self, sections: NDArray[np.float32]) -> None:
        while len(sections):
            room = self._chunk[0] - sum(map(len, self._waiting))
            self._waiting.append(sections[:room])
            sections = sections[room:]
            if sum(map(len, self._waiting)) == self._chunk[0]:
                self._write_layer()

    def finish(self) -> None:
        if self._waiting:
            self._write_layer()
        if self._coarser is not None:
            self._coarser.finish()

    def _write_layer(self) -> None:
        layer = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        self._waiting = []
        for y in range(0, self._shape[1], _CHUNK_SIDE):
            for x in range(0, self._shape[2], _CHUNK_SIDE):
                part = layer[:, y : y + _CHUNK_SIDE, x : x + _CHUNK_SIDE]
                if part.shape != self._chunk:
                    whole = np.zeros(self._chunk, np.float32)
                    whole[: part.shape[0], : part.shape[1], : part.shape[2]] = part
                    part = whole
                key = f"{self._path}/{self._layer}/{y // _CHUNK_SIDE}/{x // _CHUNK_SIDE}"
                self._target.put(key, self._pack(part))
        self._layer += 1
        if self._coarser is not None:
            self._coarser.take(halved(layer))


def halved(volume: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean of blocks of 2 x 2 x 2 voxels; at the end of an odd side, of those that there are."""
    for axis in range(3):
        even = volume.shape[axis] // 2 * 2
        pairs = np.moveaxis(volume, axis, 0)
        # halves first: the sum of two numbers could be beyond float32
        mean = pairs[0:even:2] * np.float32(0.5) + pairs[1:even:2] * np.float32(0.5)
        if even < len(pairs):
            mean = np.concatenate([mean, pairs[even:]])
        volume = np.moveaxis(mean, 0, axis)
    return np.ascontiguousarray(volume)
