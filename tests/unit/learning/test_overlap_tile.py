"""Tiles against the whole volume at once."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cryofleet.progress import no_progress
from services.learning import edss3d, overlap_tile
from services.learning.edss3d import EDSS3D
from services.learning.overlap_tile import Array, Tiling, segment, standardise_locally, tiling

SMALL = Tiling(tile=12, margin=16, window=8, multiple=4)


def network(classes: int = 3) -> EDSS3D:
    return EDSS3D(classes, torch.Generator().manual_seed(0)).eval()


def predictor(model: EDSS3D) -> overlap_tile.Predict:
    def predict(region: Array) -> Array:
        with torch.inference_mode():
            found: Array = model.probabilities(torch.from_numpy(region)[None, None])[0].numpy()
        return found

    return predict


def noise(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape, np.float32) * 3 + 5


def joined(slabs: list[overlap_tile.Slab]) -> tuple[NDArray[np.uint8], Array]:
    assert [slab.start for slab in slabs] == list(
        itertools.accumulate((len(slab.labels) for slab in slabs[:-1]), initial=0)
    )
    kept = [slab.probabilities for slab in slabs if slab.probabilities is not None]
    return np.concatenate([slab.labels for slab in slabs]), np.concatenate(kept, axis=1)


@pytest.mark.parametrize("shape", [(10, 16, 44), (29, 9, 7)])
def test_tiles_give_what_the_whole_volume_gives(shape: tuple[int, int, int]) -> None:
    volume, predict = noise(*shape), predictor(network())
    slabs = list(segment(predict, lambda z0, z1: volume[z0:z1], shape, 3, SMALL, no_progress, keep_probabilities=True))
    labels, probabilities = joined(slabs)
    padding = [(0, -side % 4) for side in shape]
    whole = np.pad(standardise_locally(volume, SMALL.half_window), padding)
    expected = predict(whole)[:, : shape[0], : shape[1], : shape[2]]
    # float32 sums of up to 864 terms, in another order; probabilities are at most 1
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=2e-6)
    clear = np.ptp(np.sort(expected, axis=0)[-2:], axis=0) > 1e-5
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(labels[clear], expected.argmax(axis=0)[clear])
    np.testing.assert_allclose(sum(slab.sums for slab in slabs), expected.sum(axis=(1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("shape", [(10, 16, 44), (29, 9, 7)])
def test_tiles_of_boxes_that_overlap_leave_no_seams(shape: tuple[int, int, int]) -> None:
    model, side, volume = network(), 8, noise(*shape)

    def predict(region: Array) -> Array:
        with torch.inference_mode():
            return np.asarray(model.probabilities_by_boxes(torch.from_numpy(region), side).numpy())

    def found(tile: int) -> Array:
        tiles = tiling(tile, side // 2, side, side // 2)
        return joined(list(segment(predict, lambda z0, z1: volume[z0:z1], shape, 3, tiles, no_progress, True)))[1]

    np.testing.assert_allclose(found(12), found(48), rtol=0, atol=2e-6)


def test_a_margin_below_the_reach_leaves_seams() -> None:
    volume, predict = noise(8, 8, 44), predictor(network())
    close = Tiling(tile=12, margin=4, window=8, multiple=4)
    found = [
        joined(list(segment(predict, lambda z0, z1: volume[z0:z1], (8, 8, 44), 3, tiles, no_progress, True)))[1]
        for tiles in (SMALL, close)
    ]
    assert np.abs(found[0] - found[1]).max() > 1e-4


def test_the_scale_is_that_of_the_window_around_each_voxel() -> None:
    volume = noise(9, 12, 15)
    scaled = standardise_locally(volume, 2)
    mirrored = np.pad(volume.astype(np.float64), 2, mode="symmetric")
    for place in ((4, 6, 7), (0, 0, 0), (8, 5, 14)):
        window = mirrored[tuple(slice(at, at + 5) for at in place)]
        assert scaled[place] == pytest.approx((volume[place] - window.mean()) / window.std(), abs=1e-4)
    np.testing.assert_allclose(standardise_locally(volume * 7 - 1000, 2), scaled, atol=1e-3)


def test_constant_regions_are_zero() -> None:
    volume = np.full((8, 8, 40), 1234.5, np.float32)
    volume[..., 30:] += noise(8, 8, 10)
    scaled = standardise_locally(volume, 2)
    assert not scaled[..., :28].any()
    assert scaled[..., 32:].std() > 0.5


def test_sides_of_tiles_are_rounded_up() -> None:
    tiles = tiling(18, edss3d.MARGIN, 16, edss3d.POOLING)
    assert (tiles.tile, tiles.region, tiles.half_window) == (20, 52, 32)
    assert overlap_tile.voxels((30, 60, 60), tiles) == 32 * 52 * 52


def test_memory_is_that_of_slabs() -> None:
    asked: list[tuple[int, int]] = []

    def read(z0: int, z1: int) -> Array:
        asked.append((z0, z1))
        return np.broadcast_to(np.arange(z0, z1, dtype=np.float32)[:, None, None], (z1 - z0, 32, 32)).copy()

    def predict(region: Array) -> Array:
        found: Array = np.stack([region, -region])
        return found

    peaks = []
    for depth in (64, 320):
        shape = (depth, 32, 32)
        tracemalloc.start()
        count = sum(len(slab.labels) for slab in segment(predict, read, shape, 2, SMALL, no_progress))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == depth
    assert max(z1 - z0 for z0, z1 in asked) == SMALL.slab_planes(320) == 12 + 2 * 16 + 2 * 4
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < overlap_tile.memory_bytes((320, 32, 32), 2, SMALL, False) + 12 * SMALL.region**3
