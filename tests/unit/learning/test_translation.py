"""Volumes of volumes: tiles against the whole at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryofleet.progress import no_progress
from services.learning import dual, unet
from services.learning.overlap_tile import Tiling
from services.learning.training import generator_for
from services.learning.translation import Translate, fitting_tile, memory_bytes, on_device, tiling, translate

CPU = torch.device("cpu")
MULTIPLE, MARGIN = 1 << dual.DEPTH, unet.margin(dual.DEPTH)


def noise(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def network() -> unet.UNet:
    return unet.UNet(2, dual.DEPTH, generator=generator_for(0)).eval()


def whole(make: Translate, volume: NDArray[np.float32]) -> NDArray[np.float32]:
    padded = np.pad(volume, [(0, -side % MULTIPLE) for side in volume.shape])
    depth, height, width = volume.shape
    return make(padded)[:depth, :height, :width]


def by_tiles(make: Translate, volume: NDArray[np.float32], tiles: Tiling) -> NDArray[np.float32]:
    depth, height, width = volume.shape
    slabs = list(translate(make, lambda a, b: volume[a:b], (depth, height, width), tiles, no_progress))
    assert [z for z, _ in slabs] == list(range(0, depth, tiles.tile))
    return np.concatenate([made for _, made in slabs])


@pytest.mark.parametrize("shape", [(10, 16, 90), (37, 9, 42)])
def test_tiles_give_what_the_whole_volume_gives(shape: tuple[int, int, int]) -> None:
    make, volume = on_device(network(), CPU), noise(*shape)
    found = by_tiles(make, volume, tiling(16, MARGIN, MULTIPLE))
    # float32 sums in another order
    np.testing.assert_allclose(found, whole(make, volume), rtol=0, atol=1e-5)


def test_a_margin_below_the_reach_leaves_seams() -> None:
    make, volume = on_device(network(), CPU), noise(8, 8, 90)
    found = by_tiles(make, volume, tiling(16, 4, MULTIPLE))
    assert np.abs(found - whole(make, volume)).max() > 1e-3


def test_two_in_a_row_need_twice_the_margin() -> None:
    model, volume = network(), noise(8, 8, 150)

    def twice(volumes: Tensor) -> Tensor:
        result: Tensor = model(model(volumes))
        return result

    make = on_device(twice, CPU)
    found = by_tiles(make, volume, tiling(16, 2 * MARGIN, MULTIPLE))
    np.testing.assert_allclose(found, whole(make, volume), rtol=0, atol=1e-5)


def test_tiles_fit_into_memory() -> None:
    assert tiling(18, MARGIN, MULTIPLE).tile == 20
    assert fitting_tile(128, MARGIN, MULTIPLE, 8, 1 << 40) == 128
    tile = fitting_tile(128, MARGIN, MULTIPLE, 8, 1 << 28)
    assert 4 <= tile < 128
    assert tile % MULTIPLE == 0
    # What the network then takes is what it was given at most, and a step more would be more.
    region = tiling(tile, MARGIN, MULTIPLE).region
    sections = memory_bytes((region, 1, 1), tiling(tile, MARGIN, MULTIPLE), 8)
    assert sections < memory_bytes((region,) * 3, tiling(tile, MARGIN, MULTIPLE), 8)
    assert 9 * 4 * 8 * region**3 <= 1 << 28 < 9 * 4 * 8 * (region + 2 * MULTIPLE) ** 3
    assert fitting_tile(128, MARGIN, MULTIPLE, 8, 1000) == MULTIPLE
