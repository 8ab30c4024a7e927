"""Ingestion, filters and export on arrays and local files."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.particles.csv import encode_csv
from cryofleet.numerics import fourier
from services.io import filter as filters
from services.io import ingest

Volume = NDArray[np.float32]


class Memory:
    """A volume file that is an array."""

    def __init__(self, array: Volume, size: tuple[float, float, float] | None = (10.0, 10.0, 10.0)) -> None:
        self.name = "tomo.mrc"
        self.array = array
        self.shape: tuple[int, int, int] = (array.shape[0], array.shape[1], array.shape[2])
        self.voxel_size_angstrom = size
        self.layer = 1

    def slab(self, start: int, stop: int) -> Volume:
        return self.array[start:stop].copy()

    def close(self) -> None: ...

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None: ...


def noise(*shape: int, seed: int = 0) -> Volume:
    return np.random.default_rng(seed).normal(3, 2, shape).astype(np.float32)


def collected(run: Callable[[Callable[[Volume], object]], None]) -> Volume:
    slabs: list[Volume] = []
    run(slabs.append)
    return np.concatenate(slabs)


# --- Ingest --------------------------------------------------------------------------------------------------------


def test_statistics_and_voxels_over_several_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "SLAB_BYTES", 3 * 4 * 20 * 30)
    volume = Memory(noise(11, 20, 30))
    measured = ingest.measure(volume, "refuse")
    exact = volume.array.astype(np.float64)
    assert measured.statistics.mean == pytest.approx(exact.mean(), rel=1e-12)
    assert measured.statistics.standard_deviation == pytest.approx(exact.std(), rel=1e-12)
    assert measured.non_finite_voxels == 0
    np.testing.assert_array_equal(collected(lambda write: ingest.convert(volume, measured, write)), volume.array)


def test_ingestion_takes_the_memory_of_slabs_not_of_the_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "SLAB_BYTES", 1 << 20)
    volume = Memory(noise(256, 128, 128))
    tracemalloc.start()
    try:
        ingest.convert(volume, ingest.measure(volume, "refuse"), lambda slab: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # the slab, a boolean of each voxel, and its deviations in float64
    assert peak < 5 * (1 << 20) < volume.array.nbytes


def test_non_finite_voxels_are_counted_placed_and_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "SLAB_BYTES", 2 * 4 * 5 * 6)
    array = noise(7, 5, 6)
    good = np.ones(array.shape, bool)
    for place, value in {(3, 4, 1): np.nan, (3, 4, 5): np.inf, (6, 0, 0): -np.inf}.items():
        array[place], good[place] = value, False
    volume = Memory(array)
    expected = r"tomo.mrc: 3 voxels are NaN or infinite, the first \(nan\) at voxel x=1, y=4, z=3: .*=fill_mean"
    with pytest.raises(FailedPrecondition, match=expected):
        ingest.measure(volume, "refuse")
    measured = ingest.measure(volume, "fill_mean")
    assert measured.non_finite_voxels == 3
    assert measured.statistics.mean == pytest.approx(array[good].mean(dtype=np.float64), rel=1e-12)
    filled = collected(lambda write: ingest.convert(volume, measured, write))
    np.testing.assert_array_equal(filled[good], array[good])
    np.testing.assert_array_equal(filled[~good], np.float32(measured.statistics.mean))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((3, 3, 3), -2.5, np.float32), "tomo.mrc: all voxels are -2.5"),
        (np.full((3, 3, 3), np.nan, np.float32), "no voxel is a finite number"),
    ],
)
def test_volumes_without_content_are_refused(array: Volume, message: str) -> None:
    with pytest.raises(FailedPrecondition, match=message):
        ingest.measure(Memory(array), "fill_mean")


def test_the_voxel_size_given_or_in_the_file() -> None:
    array = noise(3, 3, 3)
    assert ingest.voxel_size(Memory(array, (13.48, 13.48, 13.5))) == pytest.approx(13.48667)
    # float32 noise of a header's cell is not kept
    assert ingest.voxel_size(Memory(array, (2.7000002, 2.7000002, 2.7000002))) == 2.7
    assert ingest.voxel_size(Memory(array, None), 7.5) == 7.5
    assert ingest.voxel_size(Memory(array, (10.0, 10.0, 20.0)), 10.0, overrule=True) == 10.0
    for sizes, message in (
        (None, "does not say its voxel size: give it with --set voxel_size_angstrom="),
        ((10.0, 10.0, 10.2), r"a voxel of 10 x 10 x 10.2 Å \(x, y, z\); its sides must be equal"),
        ((7840.0, 7840.0, 7840.0), "a voxel of 7840 Å, which cannot be: give it with"),
    ):
        with pytest.raises(FailedPrecondition, match=f"tomo.mrc: .*{message}"):
            ingest.voxel_size(Memory(array, sizes))


def test_a_file_s_voxel_size_is_overruled_only_where_that_is_said() -> None:
    tomogram = Memory(noise(3, 3, 3), (10.0, 10.0, 10.0))
    assert ingest.voxel_size(tomogram, 10.09) == 10.09, "files round"
    with pytest.raises(
        InvalidArgument, match=r"tomo.mrc: the file says a voxel of 10 Å, voxel_size_angstrom is 13.6: "
    ):
        ingest.voxel_size(tomogram, 13.6)
    assert ingest.voxel_size(tomogram, 13.6, overrule=True) == 13.6
    assert ingest.voxel_size(Memory(noise(3, 3, 3), (7840.0,) * 3), 7.84) == 7.84, "what cannot be is not believed"
    with pytest.raises(InvalidArgument, match="10 x 10 x 20 Å"):
        ingest.voxel_size(Memory(noise(3, 3, 3), (10.0, 10.0, 20.0)), 10.0)


# --- Filters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "sigma"), [(40, 1.0), (40, 2.6), (7, 3.0), (3, 8.0), (1, 1.5)])
def test_gaussian_in_slabs_is_scipys_to_the_last_bit(depth: int, sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "_BLOCK_BYTES", 1)  # the thinnest slabs there are
    array = noise(depth, 12, 15)
    whole = scipy.ndimage.gaussian_filter(array, sigma)
    slabs = collected(lambda write: filters.gaussian(lambda i, j: array[i:j], (depth, 12, 15), sigma, write))
    np.testing.assert_array_equal(slabs, whole)


def test_gaussian_memory_stays_within_what_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "_BLOCK_BYTES", 1 << 20)
    shape = (200, 128, 128)
    array = np.ones(shape, np.float32)
    tracemalloc.start()
    try:
        filters.gaussian(lambda i, j: array[i:j].copy(), shape, 2.0, lambda slab: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    stated = filters.gaussian_memory_bytes(shape, 2.0)
    assert peak < stated < array.nbytes


@pytest.mark.parametrize(("low", "high"), [(40.0, None), (None, 150.0), (35.0, 120.0)])
@pytest.mark.parametrize("shape", [(12, 18, 20), (9, 13, 15)])
def test_band_pass_in_slabs_is_that_of_the_whole_volume(
    shape: tuple[int, int, int], low: float | None, high: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filters, "_BLOCK_BYTES", 1)
    array = noise(*shape)
    slabs = collected(lambda write: filters.band_pass(lambda i, j: array[i:j], shape, 10.0, low, high, write))
    np.testing.assert_allclose(slabs, fourier.band_pass(array, high, low, 10.0), atol=5e-5)


def test_band_pass_keeps_a_wave_inside_and_removes_those_outside() -> None:
    z = np.arange(64, dtype=np.float32)[:, None, None]
    waves = {period: np.broadcast_to(np.cos(2 * np.pi * z / period), (64, 4, 4)) for period in (4, 16, 64)}
    volume = (5 + waves[4] + waves[16] + waves[64]).astype(np.float32)
    # Periods of 40, 160 and 640 Å, and a mean; of them 160 Å lie between 90 and 300 Å. The edge of the high-pass begins
    # at DC, since 1/300 Å is closer to it than the edge is wide: 640 Å are 300/640 of the way up its half cosine.
    kept = collected(lambda write: filters.band_pass(lambda i, j: volume[i:j], (64, 4, 4), 10.0, 90.0, 300.0, write))
    share = 0.5 - 0.5 * np.cos(np.pi * 300 / 640)
    np.testing.assert_allclose(kept, waves[16] + share * waves[64], atol=1e-5)


# --- Export --------------------------------------------------------------------------------------------------------


def test_csv_keeps_every_digit_and_folds_shifts_into_angstroms(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    names = ("x", "y", "z", "shift_x", "shift_y", "shift_z", "score")
    table = pd.DataFrame({"id": np.arange(9), **{name: rng.normal(0, 50, 9) for name in names}})
    path = tmp_path / "a.csv"
    path.write_bytes(b"".join(encode_csv(table, "TS_01, left", 7.84)))
    read = pd.read_csv(path)
    # pandas' own reader may be off by a unit in the last place
    pd.testing.assert_frame_equal(read[list(table.columns)], table, rtol=4e-16)
    np.testing.assert_allclose(read["y_angstrom"], (table["y"] + table["shift_y"]) * 7.84, rtol=4e-16)
    assert set(read["tomogram"]) == {"TS_01, left"}
    assert set(read["voxel_size_angstrom"]) == {7.84}
