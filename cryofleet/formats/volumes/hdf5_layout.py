"""Where in an HDF5 file the voxels lie: run as a process of its own, for a damaged file may crash or hang the library.

    python -P hdf5_layout.py FILE DATASET

prints a line of JSON, then the chunks as int64: offset and bytes in the file, filters left out, first z, y, x.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import numpy as np

MEMORY_BYTES = 2 << 30
SECONDS = 60
MAX_CHUNKS = 2_000_000
_COMPACT_BYTES = 1 << 16
_PREFIX = "EMAN."


class _Refused(Exception):
    """What is wrong with the file, in words for its user."""


def layout(path: str, dataset: str) -> tuple[dict[str, Any], Any]:
    """What is known of a dataset and its group, and its chunks.

    Nothing is read from other files: links and data outside of the file are refused.
    """
    import h5py

    with h5py.File(path, "r") as file:
        place: Any = file
        for part in dataset.strip("/").split("/"):
            if not isinstance(place, h5py.Group) or part not in place:
                raise _Refused(f"no {dataset} in it, where EMAN2 keeps its first image")
            if not isinstance(place.get(part, getlink=True), h5py.HardLink):
                raise _Refused(f"{dataset} is a link, which is not followed")
            place = place[part]
        if not isinstance(place, h5py.Dataset):
            raise _Refused(f"{dataset} is no dataset")
        if place.is_virtual or place.external:
            raise _Refused("the voxels are in other files, which are not opened")
        create = place.id.get_create_plist()
        images = file[dataset.strip("/").rpartition("/")[0].rpartition("/")[0]]
        found = {
            "shape": list(place.shape),
            "dtype": place.dtype.str if place.dtype.kind in "iuf" else str(place.dtype),
            "offset": place.id.get_offset() if place.chunks is None else None,
            "chunks": None if place.chunks is None else list(place.chunks),
            "filters": [int(create.get_filter(i)[0]) for i in range(create.get_nfilters())],
            "fill": float(place.fillvalue) if place.dtype.kind in "iuf" else 0.0,
            "images": len(images),
            "attributes": {**_numbers(images.attrs, ""), **_numbers(place.parent.attrs, _PREFIX)},
        }
        if place.chunks is None and found["offset"] is None and place.nbytes <= _COMPACT_BYTES:
            found["data"] = np.asarray(place[()]).tobytes().hex()
        return found, _chunks(place)


def _numbers(attributes: Any, prefix: str) -> dict[str, float | str]:
    """The attributes that are single numbers or texts."""
    found: dict[str, float | str] = {}
    for name in attributes:
        if not name.startswith(prefix):
            continue
        shape, kind = attributes.get_id(name).shape, attributes.get_id(name).dtype.kind
        if kind not in "iufSOU" or (shape not in ((), (1,))):
            continue
        value = np.asarray(attributes[name]).reshape(-1)[0] if kind in "iuf" else attributes[name]
        if kind in "iuf":
            found[name.removeprefix(prefix)] = float(value)
        elif isinstance(value, (str, bytes)) and len(value) < 1000:
            found[name.removeprefix(prefix)] = value if isinstance(value, str) else value.decode("latin-1")
    return found


def _chunks(dataset: Any) -> Any:
    if dataset.chunks is None:
        return np.zeros((0, 6), np.int64)
    if dataset.id.get_num_chunks() > MAX_CHUNKS:
        raise _Refused(f"it has more than {MAX_CHUNKS} chunks")
    rows: list[tuple[int, ...]] = []

    def note(chunk: Any) -> None:
        place = (0,) * (3 - len(chunk.chunk_offset)) + tuple(chunk.chunk_offset)
        rows.append((chunk.byte_offset, chunk.size, chunk.filter_mask, *place[:3]))

    dataset.id.chunk_iter(note)
    return np.array(rows, np.int64).reshape(-1, 6)


def main() -> None:
    """Prints the layout; an error is JSON too, and any other ending is the library's."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        found, chunks = layout(*sys.argv[1:3])
    except _Refused as refused:
        found, chunks = {"refused": str(refused)}, np.zeros((0, 6), np.int64)
    except Exception as error:  # whatever a hostile file makes the library raise
        found = {"damaged": " ".join(str(error).split())[:200] or type(error).__name__}
        chunks = np.zeros((0, 6), np.int64)
    sys.stdout.buffer.write(json.dumps(found).encode() + b"\n" + chunks.astype("<i8").tobytes())


if __name__ == "__main__":
    main()
