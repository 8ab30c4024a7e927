from __future__ import annotations

import numpy as np
import pytest

from cryofleet.errors import InvalidArgument
from services.picking.difference_of_gaussians import TILE_BYTES
from services.picking.scale_space import ScaleSpacePicks, diameters, memory_bytes, scale_space_picks
from services.picking.slabs import Array

BALLS = [((16, 18, 18), 8), ((44, 18, 20), 14), ((24, 48, 24), 20), ((50, 50, 12), 8)]


def balls(noise: float = 0.0) -> Array:
    shape = (48, 70, 66)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    volume = noise * np.random.default_rng(1).standard_normal(shape)
    for centre, diameter in BALLS:
        distance = np.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2)
        volume += np.clip(diameter / 2 + 0.5 - distance, 0, 1)
    return volume.astype(np.float32)


def pick(volume: Array, low: float = 60, high: float = 280, *, tile_bytes: int = TILE_BYTES) -> ScaleSpacePicks:
    return scale_space_picks(
        lambda z0, z1: volume[z0:z1],
        volume.shape,
        10.0,
        low,
        high,
        contrast="light",
        threshold=5,
        tile_bytes=tile_bytes,
    )


def test_balls_of_mixed_sizes_are_found_each_with_its_diameter() -> None:
    picks = pick(balls(noise=0.3))
    assert len(picks.scores) == len(BALLS)
    for centre, diameter in BALLS:
        distances = np.linalg.norm(picks.positions - np.array(centre), axis=1)
        nearest = distances.argmin()
        assert distances[nearest] <= 1.5
        assert abs(np.log2(picks.diameters_angstrom[nearest] / (10 * diameter))) <= 0.25
    assert (np.diff(picks.scores) <= 0).all()
    assert sum(scale.count for scale in picks.scales) == len(BALLS)
    strongest = max(picks.scales, key=lambda scale: scale.strength)
    assert picks.best_diameter_angstrom == strongest.diameter_angstrom
    assert strongest.strength == pytest.approx(strongest.count * strongest.mean_score)


def test_tiles_do_not_show() -> None:
    volume = balls(noise=0.3)
    whole, tiled = pick(volume), pick(volume, tile_bytes=1)
    np.testing.assert_array_equal(whole.positions, tiled.positions)
    np.testing.assert_array_equal(whole.diameters_angstrom, tiled.diameters_angstrom)


def test_diameters_rise_in_equal_ratios() -> None:
    np.testing.assert_allclose(diameters(80, 320, 2), 80 * 2 ** (np.arange(5) / 2))
    assert diameters(80, 80) == [80]
    for low, high, number in ((0, 10, 4), (20, 10, 4), (10, 20, 0)):
        with pytest.raises(InvalidArgument):
            diameters(low, high, number)


def test_memory_is_of_one_filter_not_of_all_scales() -> None:
    shape = (300, 500, 500)
    assert memory_bytes(shape, 10, 150, 300) < 1.2 * memory_bytes(shape, 10, 300, 300) + (64 << 20)
