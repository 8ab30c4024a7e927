"""copick projects: picks as JSON, a file a tomogram and object, under ExperimentRuns/RUN/Picks; docs/geometry.md there.

Locations are Å, voxel index times voxel spacing. The matrix takes the object onto the particle, active; its translation
is a shift in Å that is added to the location. A point's instance is its filament, from 1, and 0 where there is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument, NotFound
from cryofleet.formats.frames import Frame
from cryofleet.formats.particles.files import MAX_JSON_BYTES, number, parse_json, read_file, text_of
from cryofleet.formats.particles.table import (
    ParticleTable,
    classes_of_names,
    finite_numbers,
    rotations_of_matrices,
)

FRAME = Frame(unit="angstrom", shift_unit="angstrom", rotation="matrix")
CONFIG = "copick_config.json"

_RUNS, _PICKS = "ExperimentRuns", "Picks"
_MAX_FILES = 100_000
_USER, _SESSION = "cryofleet", "0"
# what copick replaces in names of objects; runs may have underscores
_NOT_IN_NAMES = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f\s_]')
_NOT_IN_RUNS = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f\s]')
_COLOURS = ([90, 200, 90, 255], [80, 160, 255, 255], [255, 160, 60, 255], [230, 80, 200, 255], [240, 220, 60, 255])
_RADIUS_ANGSTROM = 100.0


def read(path: Path, source: str) -> ParticleTable:
    """Reads a project's folder, its configuration beside ExperimentRuns, or one file of picks.

    Nothing outside the folder is opened, whatever the configuration says. Raises InvalidArgument, with the file and
    point, for what is no pick, and NotFound for a folder without picks.
    """
    if path.is_dir():
        return _project(path, source)
    document = parse_json(text_of(read_file(path, source, MAX_JSON_BYTES), source), source)
    if isinstance(document, dict) and "pickable_objects" in document:
        return _project(path.parent, source)
    return _table([_picks(document, source)], source)


def _project(folder: Path, source: str) -> ParticleTable:
    runs = folder / _RUNS
    if not runs.is_dir():
        raise NotFound(f"{source}: no folder {_RUNS}: name the folder that holds it, copick's overlay_root")
    files = []
    inside = folder.resolve()
    for file in sorted(runs.glob(f"*/{_PICKS}/*.json")):
        if not file.resolve().is_relative_to(inside):
            raise InvalidArgument(f"{source}: {file.relative_to(folder)} leads out of the project")
        files.append(file)
        if len(files) > _MAX_FILES:
            raise InvalidArgument(f"{source} has more than {_MAX_FILES} files of picks")
    if not files:
        raise NotFound(f"{source}: no picks under {_RUNS}")
    picks = []
    for file in files:
        name = str(file)
        found = _picks(parse_json(text_of(read_file(file, name, MAX_JSON_BYTES), name), name), name)
        found.run = file.parent.parent.name
        picks.append(found)
    return _table(picks, source)


class _Picks:
    """One file's points."""

    def __init__(self, name: str, run: str, voxel_size: float | None, by: str) -> None:
        self.name, self.run, self.voxel_size, self.by = name, run, voxel_size, by
        self.positions: list[list[float]] = []
        self.matrices: list[list[list[float]]] = []
        self.shifts: list[list[float]] = []
        self.scores: list[float | None] = []
        self.instances: list[int] = []
        self.oriented = False


def _picks(document: Any, source: str) -> _Picks:
    if not isinstance(document, dict) or not isinstance(document.get("pickable_object_name"), str):
        raise InvalidArgument(f"{source}: not picks of copick: it has no pickable_object_name")
    if document.get("unit", "angstrom") != "angstrom":
        raise InvalidArgument(f"{source}: picks in {str(document['unit'])[:20]!r}; angstrom is read")
    spacing = document.get("voxel_spacing")
    size = None if spacing is None else number(spacing, "voxel_spacing", source)
    if size is not None and not (np.isfinite(size) and size > 0):
        raise InvalidArgument(f"{source}: voxel_spacing is {size}; it must be above 0")
    by = f"{document.get('user_id')}, session {document.get('session_id')}"
    picks = _Picks(document["pickable_object_name"], str(document.get("run_name") or ""), size, by)
    points = document.get("points") or []
    if not isinstance(points, list):
        raise InvalidArgument(f"{source}: points is no list")
    identity = np.eye(4).tolist()
    for row, point in enumerate(points, start=1):
        where = f"{source}, point {row}"
        location = point.get("location") if isinstance(point, dict) else None
        if not isinstance(location, dict):
            raise InvalidArgument(f"{where} has no location")
        picks.positions.append([number(location.get(axis), axis, where) for axis in "xyz"])
        matrix = point.get("transformation_") or identity
        if not (
            isinstance(matrix, list) and len(matrix) == 4 and all(isinstance(r, list) and len(r) == 4 for r in matrix)
        ):
            raise InvalidArgument(f"{where}: transformation_ is no 4 x 4 matrix")
        rows = [[number(value, "transformation_", where) for value in line] for line in matrix]
        if rows[3] != [0, 0, 0, 1]:
            raise InvalidArgument(f"{where}: the last row of transformation_ must be 0, 0, 0, 1")
        picks.matrices.append([line[:3] for line in rows[:3]])
        picks.shifts.append([line[3] for line in rows[:3]])
        score, instance = point.get("score"), point.get("instance_id") or 0
        picks.scores.append(None if score is None else number(score, "the score", where))
        if isinstance(instance, bool) or not isinstance(instance, int) or not 0 <= instance <= 2**31 - 1:
            raise InvalidArgument(f"{where}: instance_id is {str(instance)[:20]}; it must be a whole number from 0")
        picks.instances.append(instance)
    trusted = document.get("trust_orientation")
    picks.oriented = (trusted is None or bool(trusted)) and any(
        matrix != np.eye(3).tolist() for matrix in picks.matrices
    )
    return picks


def _table(picks: list[_Picks], source: str) -> ParticleTable:
    sizes = {found.voxel_size for found in picks if found.voxel_size is not None}
    warnings = []
    if len(sizes) > 1:
        warnings.append(f"picks at several voxel spacings; all are given in voxels of {min(sizes)} Å")
    authors = {found.by for found in picks}
    if len(authors) > 1:
        warnings.append(f"picks of {len(authors)} users and sessions are put together")
    if any(found.positions and not found.oriented for found in picks) and any(found.oriented for found in picks):
        warnings.append("some files have no orientations, or none to be trusted; their rotations are the identity")
    eye = np.eye(3).tolist()
    positions = np.array([p for found in picks for p in found.positions], np.float64).reshape(-1, 3)
    shifts = np.array([p for found in picks for p in found.shifts], np.float64).reshape(-1, 3)
    matrices = [m if found.oriented else eye for found in picks for m in found.matrices]
    scores = [s for found in picks for s in found.scores]
    instances = np.array([i for found in picks for i in found.instances], np.int64)
    names = [found.name for found in picks for _ in found.positions]
    runs = [found.run for found in picks for _ in found.positions]
    columns = classes_of_names(names)
    if any(score is not None for score in scores):
        columns["score"] = finite_numbers([1.0 if s is None else s for s in scores], "the score", source)
    if instances.any():
        columns["filament"] = instances - 1
    return ParticleTable(
        Frame(
            unit="angstrom",
            shift_unit="angstrom",
            rotation="matrix",
            voxel_size_angstrom=min(sizes, default=None),
        ),
        finite_numbers(positions, "a location", source),
        source,
        rotations_of_matrices(np.array(matrices).reshape(-1, 3, 3), source) if any(p.oriented for p in picks) else None,
        finite_numbers(shifts, "a shift", source) if shifts.any() else None,
        columns,
        runs[:1] if len(set(runs)) == 1 else runs or ("",),
        ("location", "transformation_", "score", "instance_id"),
        (),
        tuple(warnings),
    )


def write(path: Path, table: ParticleTable) -> tuple[str, ...]:
    """Writes a project into a new or empty folder: the configuration and a file of picks a tomogram and object."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InvalidArgument(f"{path}: a copick project is written into a new or empty folder")
    names = np.array(table.class_names("particle"), object)
    objects, renamed = _renamed(names, _NOT_IN_NAMES, "object")
    tomograms = table.tomogram_column()
    tomograms = np.where(tomograms == "", "tomogram", tomograms)
    runs, renamed_runs = _renamed(tomograms, _NOT_IN_RUNS, "run")
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "config_type": "filesystem",
        "name": "Cryofleet",
        "description": "Particles of Cryofleet",
        "version": "0.2.0",
        "pickable_objects": [
            {
                "name": name,
                "is_particle": True,
                "label": label,
                "color": _COLOURS[(label - 1) % len(_COLOURS)],
                "radius": _RADIUS_ANGSTROM,
            }
            for label, name in enumerate(dict.fromkeys(objects.values()), start=1)
        ],
        "overlay_root": f"local://{path.resolve()}",
        "overlay_fs_args": {"auto_mkdir": True},
    }
    (path / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    for run, name in runs.items():
        folder = path / _RUNS / name / _PICKS
        folder.mkdir(parents=True)
        of_run = tomograms == run
        for object_name, file_name in objects.items():
            rows = np.flatnonzero(of_run & (names == object_name))
            if len(rows) == 0:
                continue
            document = {
                "pickable_object_name": file_name,
                "user_id": _USER,
                "session_id": _SESSION,
                "run_name": name,
                "voxel_spacing": table.frame.voxel_size_angstrom,
                "unit": "angstrom",
                "points": list(_points(table, rows)),
                "trust_orientation": table.rotations is not None,
            }
            file = folder / f"{_USER}_{_SESSION}_{file_name}.json"
            file.write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
    return (*renamed, *renamed_runs)


def _points(table: ParticleTable, rows: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    matrices = np.tile(np.eye(4), (len(rows), 1, 1))
    if table.rotations is not None:
        matrices[:, :3, :3] = Rotation.from_quat(table.rotations.as_quat()[rows]).as_matrix()
    matrices[:, :3, 3] = table.shifts_or_zero()[rows]
    scores = table.columns["score"][rows].tolist() if "score" in table.columns else None
    filaments = table.column("filament", -1)[rows].tolist()
    for i, (x, y, z) in enumerate(table.positions[rows].tolist()):
        point: dict[str, Any] = {
            "location": {"x": x, "y": y, "z": z},
            "transformation_": matrices[i].tolist(),
            "instance_id": int(filaments[i]) + 1,
        }
        if scores is not None:
            point["score"] = scores[i]
        yield point


def _renamed(names: Any, forbidden: re.Pattern[str], what: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names as copick and a file system take them, by the names that there are."""
    new: dict[str, str] = {}
    for name in dict.fromkeys(str(name) for name in names.tolist()):
        # of a path the last part is the name
        base = name.replace("\\", "/").rstrip("/").rpartition("/")[2] if what == "run" else name
        new[name] = forbidden.sub("-", base).strip("-.") or what
        if len(new[name]) > 120:
            raise InvalidArgument(f"the {what} {name[:40]!r}... has a name of over 120 characters")
    if len(set(new.values())) < len(new):
        raise InvalidArgument(f"several {what}s would have one name in copick: {', '.join(sorted(new))[:200]}")
    changed = [f"{old} is {now}" for old, now in new.items() if old != now]
    return new, (f"{what}s renamed as copick needs it: {', '.join(changed[:20])}",) if changed else ()
