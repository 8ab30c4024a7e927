"""Boxes of EMAN2's tomogram boxer: info/NAME_info.json.

``boxes_3d`` holds [x, y, z, method, score, class] in pixels of the unbinned data (``apix_unbin``) from the tomogram's
centre, voxel floor(n / 2); without ``apix_unbin``, as older versions wrote it, in the tomogram's voxels from the first.
Boxes have no orientations: EMAN2 keeps these with the extracted particles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cryofleet.errors import InvalidArgument
from cryofleet.formats.frames import Frame
from cryofleet.formats.particles.files import MAX_JSON_BYTES, number, parse_json, read_file, text_of
from cryofleet.formats.particles.table import ParticleTable, classes_of_names, finite_numbers

FRAME = Frame(origin="centre", centre="floor(size/2)")

_READ = {"boxes_3d", "class_list", "apix_unbin"}
_NAME_ENDING = "_info"
_BOX_PIXELS = 32


def read(path: Path, source: str) -> ParticleTable:
    """Raises InvalidArgument, with the box, for what is not such a file."""
    document = parse_json(text_of(read_file(path, source, MAX_JSON_BYTES), source), source)
    if not isinstance(document, dict) or not isinstance(document.get("boxes_3d"), list):
        raise InvalidArgument(f"{source}: not an EMAN2 info file: it has no list boxes_3d")
    classes = _class_names(document.get("class_list"), source)
    positions, scores, names = [], [], []
    for row, box in enumerate(document["boxes_3d"], start=1):
        where = f"{source}, box {row}"
        if not isinstance(box, list) or len(box) < 3:
            raise InvalidArgument(f"{where}: expected [x, y, z, method, score, class]")
        positions.append([number(value, what, where) for value, what in zip(box[:3], "xyz", strict=True)])
        scores.append(number(box[4], "the score", where) if len(box) > 4 else 0.0)
        key = str(box[5]) if len(box) > 5 else ""
        names.append(classes.get(key, key if key in ("", "0") else f"class-{key}"[:80]))
    size: float | None = None
    if "apix_unbin" in document:
        size = number(document["apix_unbin"], "apix_unbin", source)
        if not (np.isfinite(size) and size > 0):
            raise InvalidArgument(f"{source}: apix_unbin is {size}; it must be above 0")
    frame = Frame() if size is None else Frame("voxel", "centre", "floor(size/2)", size, binning=1.0)
    columns: dict[str, Any] = classes_of_names(["" if name == "0" else name for name in names])
    if any(len(box) > 4 for box in document["boxes_3d"]):
        columns["score"] = finite_numbers(scores, "the score", source)
    return ParticleTable(
        frame,
        finite_numbers(np.array(positions, np.float64).reshape(-1, 3), "a position", source),
        source,
        columns=columns,
        tomograms=(path.stem.removesuffix(_NAME_ENDING),),
        found=tuple(document)[:100],
        not_carried=tuple(name for name in document if name not in _READ)[:100],
        warnings=()
        if size is not None
        else ("an older info file, without apix_unbin: positions are taken to count from the first voxel",),
    )


def _class_names(classes: Any, source: str) -> dict[str, str]:
    if classes is None:
        return {}
    if not isinstance(classes, dict):
        raise InvalidArgument(f"{source}: class_list is no object")
    names = {}
    for key, value in classes.items():
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str):
            raise InvalidArgument(f"{source}: class {key[:40]!r} of class_list has no name")
        names[key] = name
    return names


def write(path: Path, table: ParticleTable) -> tuple[str, ...]:
    """Writes the boxes of one tomogram; positions hold the shifts."""
    table.of_one_tomogram()
    names = table.class_names("particle")
    keys = {name: key for key, name in enumerate(dict.fromkeys(names))}
    scores = table.column("score", 0.0).tolist()
    boxes = [
        [x, y, z, "cryofleet", score, keys[name]]
        for (x, y, z), score, name in zip(table.positions.tolist(), scores, names, strict=True)
    ]
    document = {
        "apix_unbin": table.frame.voxel_size_angstrom,
        "boxes_3d": boxes,
        "class_list": {str(key): {"boxsize": _BOX_PIXELS, "name": name} for name, key in keys.items()},
    }
    path.write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
    return ()
