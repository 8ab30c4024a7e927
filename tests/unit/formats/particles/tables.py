"""Tables for the tests, and what two of them must share after a way through files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from cryofleet.formats.particles import catalogue
from cryofleet.formats.particles.catalogue import FORMATS, Format
from cryofleet.particles import Particles

ENDINGS = {name: each.endings[0] for name, each in FORMATS.items()} | {"copick": ""}
ONE_TOMOGRAM = ("eman", "imod", "portal")
# float32 between 4096 and 8192 is spaced by 4.9e-4
TOLERANCES = {"em": 3e-4, "imod": 3e-4}


def table_of(
    count: int = 7,
    seed: int = 1,
    shape: tuple[int, int, int] = (301, 400, 511),
    voxel_size: float = 7.84,
    tomograms: tuple[str, ...] = ("TS_01",),
    **only: Any,
) -> Particles:
    """Particles with everything that a table may hold, beyond the borders and between voxels."""
    rng = np.random.default_rng(seed)
    positions = rng.uniform(-400, 5000, (count, 3))
    positions[:, 0] = np.sort(positions[:, 0]) + 9.5 * np.arange(count)  # told apart by x, shifts added
    columns: dict[str, Any] = {
        "id": rng.permutation(1000)[:count],
        "score": rng.normal(0, 1, count),
        "class_id": rng.integers(-1, 4, count),
        "half": rng.integers(1, 3, count),
        "filament": rng.integers(-1, 3, count),
    } | only
    columns |= dict(zip(("shift_x", "shift_y", "shift_z"), rng.uniform(-4, 4, (3, count)), strict=True))
    particles = Particles.from_positions(
        positions,
        voxel_size,
        tomograms[0] if len(tomograms) == 1 else "",
        shape,
        Rotation.random(count, rng=rng),
        **columns,
    )
    if len(tomograms) == 1:
        return particles
    return particles.with_columns(tomogram=np.array([tomograms[i % len(tomograms)] for i in range(count)], object))


def through(particles: Particles, name: str, folder: Path) -> Particles:
    """Written in a format and read again: what the format does not say is given, as a user does."""
    path = folder / f"table{ENDINGS[name]}"
    target = FORMATS[name]
    catalogue.write(path, particles, target)
    found, table = catalogue.read(
        path,
        path.name,
        voxel_size_angstrom=None if "voxel_size" in target.holds else particles.voxel_size_angstrom,
        tomogram_shape=particles.tomogram_shape,
    )
    assert found.name == name
    return table.particles()


def same(one: Particles, other: Particles, *ways: Format) -> None:
    """Both hold the same as far as all the ways can carry it."""
    holds = frozenset.intersection(*(way.holds for way in ways))
    tolerance = max(TOLERANCES.get(way.name, 2e-6) for way in ways)
    assert len(other) == len(one)
    places = one.positions() + one.shifts()
    others = other.positions() + other.shifts()
    first, second = np.argsort(places[:, 0]), np.argsort(others[:, 0])
    np.testing.assert_allclose(others[second], places[first], atol=tolerance * len(ways))
    np.testing.assert_allclose(other.voxel_size_angstrom, one.voxel_size_angstrom, rtol=1e-6)
    if "shift" in holds:
        np.testing.assert_allclose(other.shifts()[second], one.shifts()[first], atol=tolerance * len(ways))
    rotations, read = one.rotations(), other.rotations()
    if "rotation" in holds and rotations is not None:
        if read is None:  # copick can't tell the identity from what is not known
            read = Rotation.identity(len(other))
        turned = (rotations[first].inv() * read[second]).magnitude()
        # float32 degrees up to 180 are spaced by 1.5e-5
        assert np.rad2deg(turned).max() < 1e-4
    for what, column, within in (
        ("score", "score", 1e-6),
        ("class", "class_id", 0),
        ("half", "half", 0),
        ("id", "id", 0),
    ):
        if what in holds and column in one.table:
            np.testing.assert_allclose(
                other.table[column].to_numpy()[second], one.table[column].to_numpy()[first], atol=within
            )
    if "tomogram" in holds:
        names = [_tomograms(table)[order] for table, order in ((one, first), (other, second))]
        numbers = any(way.name in ("em", "stopgap") for way in ways)
        for a, b in zip(*names, strict=True):
            assert numbers or a == b
        assert len(set(zip(*names, strict=True))) == len(set(names[0])) == len(set(names[1]))
    if "filament" in holds and "filament" in other.table:
        groups = [table.table["filament"].to_numpy()[order] for table, order in ((one, first), (other, second))]
        if not any(way.name == "imod" for way in ways):
            np.testing.assert_array_equal(groups[1], groups[0])
        else:  # contours are of one object
            # which may split a filament of several, and joins none
            rows = list(zip(one.table["class_id"].to_numpy()[first], *groups, strict=True))
            assert len({(contour, filament) for _, filament, contour in rows}) == len({row[2] for row in rows})
            assert len(set(rows)) == len({row[:2] for row in rows})


def _tomograms(particles: Particles) -> Any:
    if "tomogram" in particles.table:
        return particles.table["tomogram"].to_numpy(dtype=object)
    return np.full(len(particles), particles.tomogram, object)
