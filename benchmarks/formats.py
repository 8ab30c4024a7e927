"""A million particles and a tomogram through the readers and writers of formats, and how fast the command starts.

Each case runs in a process of its own, so that its peak of memory is its own: STAR read and converted, STAR written,
Parquet read and written; `cryofleet inspect` of a tomogram of 4 GiB; a tomogram of 1 GiB from MRC to each format and
back.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from benchmarks.harness import Row, main
from cryofleet.formats.particles import catalogue
from cryofleet.formats.particles.catalogue import FORMATS
from cryofleet.formats.volumes import catalogue as volumes
from cryofleet.formats.volumes.frame import VolumeData, VolumeFrame
from cryofleet.particles import Particles

_SHAPE = (500, 928, 960)
_GIBIBYTE = 1 << 30


def _particles(count: int) -> Particles:
    rng = np.random.default_rng(0)
    particles = Particles.from_positions(
        rng.uniform(0, 900, (count, 3)),
        7.84,
        "",
        _SHAPE,
        Rotation.from_quat(rng.normal(size=(count, 4))),
        score=rng.random(count),
        class_id=rng.integers(0, 5, count),
        half=rng.integers(1, 3, count),
    )
    names = np.array([f"TS_{i:03d}" for i in range(100)], object)
    shifts = dict(zip(("shift_x", "shift_y", "shift_z"), rng.normal(0, 2, (3, count)), strict=True))
    return particles.with_columns(tomogram=names[np.arange(count) % 100], **shifts)


def _read_star(path: Path) -> None:
    _, table = catalogue.read(path, path.name, voxel_size_angstrom=7.84, tomogram_shape=_SHAPE)
    table.particles()


def _write_star(path: Path) -> None:
    particles = Particles.from_parquet(path.with_suffix(".parquet").read_bytes())
    started = time.perf_counter()
    catalogue.write(path, particles, FORMATS["relion-5"])
    path.with_suffix(".seconds").write_text(str(time.perf_counter() - started))


def _write_parquet(path: Path) -> None:
    particles = Particles.from_parquet(path.read_bytes())
    started = time.perf_counter()
    path.with_suffix(".again").write_bytes(particles.to_parquet())
    path.with_suffix(".seconds").write_text(str(time.perf_counter() - started))


def _read_parquet(path: Path) -> None:
    Particles.from_parquet(path.read_bytes())


def _timed(work: Callable[[Path], None], path: Path) -> tuple[float, float]:
    started = time.perf_counter()
    path.with_suffix(".seconds").unlink(missing_ok=True)
    work(path)
    seconds = time.perf_counter() - started
    if path.with_suffix(".seconds").exists():
        seconds = float(path.with_suffix(".seconds").read_text())
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIBIBYTE


def measure(quick: bool) -> Iterator[Row]:
    count = 100_000 if quick else 1_000_000
    share = count / 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        parquet, star = Path(folder) / "particles.parquet", Path(folder) / "particles.star"
        parquet.write_bytes(_particles(count).to_parquet())
        for work, path, case, target in (
            (_write_star, star, "RELION 5 STAR written", 20.0),
            (_read_star, star, "RELION 5 STAR read and converted", 10.0),
            (_write_parquet, parquet, "Parquet written", 1.0),
            (_read_parquet, parquet, "Parquet read", 1.0),
        ):
            with get_context("spawn").Pool(1) as pool:
                seconds, memory = pool.apply(_timed, (work, path))
            yield Row(f"{count} particles", case, seconds, "s", "lower", target * share)
            yield Row(f"{count} particles", f"{case}, peak", memory, "GiB", "lower", 2.0)
        small = Path(folder) / "small.tbl"
        catalogue.write(small, _particles(100), FORMATS["dynamo"])
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cryofleet", "inspect", str(small)], check=True, capture_output=True)
        yield Row("100 particles", "cryofleet inspect", time.perf_counter() - started, "s", "lower", None)
    yield from _measure_volumes(quick)


def _write_tomogram(path: Path, sections: int) -> None:
    """Noise of 1024 x 1024 voxels a section."""
    some = np.random.default_rng(0).normal(0, 1, (32, 1024, 1024)).astype(np.float32)

    def read(start: int, stop: int) -> NDArray[np.float32]:
        return some[np.arange(start, stop) % len(some)]

    data = VolumeData("noise", (sections, 1024, 1024), read, VolumeFrame((7.84,) * 3))
    volumes.write(path, data, volumes.FORMATS["mrc"])


def _convert(source: Path, target: Path) -> tuple[float, float]:
    started = time.perf_counter()
    with volumes.open_volume(source, source.name, source.parent)[1] as reader:
        volumes.write(target, reader.data(), volumes.for_writing(target))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIBIBYTE
    return time.perf_counter() - started, peak


def _measure_volumes(quick: bool) -> Iterator[Row]:
    sections = 64 if quick else 1024
    case = f"tomogram of {sections / 256:g} GiB"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "tomogram.mrc"
        # in a process of its own: a child starts with its parent's peak of memory
        with get_context("spawn").Pool(1) as pool:
            pool.apply(_write_tomogram, (source, sections))
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cryofleet", "inspect", str(source)], check=True, capture_output=True)
        yield Row(case, "cryofleet inspect", time.perf_counter() - started, "s", "lower", 2.0)
    sections = 64 if quick else 256
    case = f"tomogram of {sections / 256:g} GiB"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "tomogram.mrc"
        # in a process of its own: a child starts with its parent's peak of memory
        with get_context("spawn").Pool(1) as pool:
            pool.apply(_write_tomogram, (source, sections))
        for ending in (".em", ".hdf", ".tif", ".zarr"):
            target = folder / f"other{ending}"
            for first, second, what in ((source, target, "MRC to"), (target, folder / "back.mrc", "MRC from")):
                with get_context("spawn").Pool(1) as pool:
                    seconds, memory = pool.apply(_convert, (first, second))
                yield Row(case, f"{what} {ending}", seconds, "s", "lower", None)
                yield Row(case, f"{what} {ending}, peak", memory, "GiB", "lower", 1.0)
            shutil.rmtree(target) if target.is_dir() else target.unlink()


if __name__ == "__main__":
    main("formats", measure)
