"""Noise of the voxels of one box, for a volume of any size."""

from __future__ import annotations

import numpy as np
import torch

from services.learning import dual
from services.learning.noise_field import NoiseField, random_noise
from services.learning.training import generator_for

CPU = torch.device("cpu")


def test_a_voxels_noise_does_not_depend_on_what_is_asked_for() -> None:
    field = NoiseField(np.arange(100, dtype=np.float32), 20, 30, (5, 8, 0))
    whole = field.sections(0, 12)
    assert whole.shape == (12, 20, 30)
    np.testing.assert_array_equal(field.sections(3, 7), whole[3:7])
    assert not np.array_equal(whole[0], whole[1])
    assert not np.array_equal(NoiseField(field.pool, 20, 30, (5, 8, 1)).sections(0, 12), whole)


def test_all_values_are_drawn_alike_and_no_others() -> None:
    field = NoiseField(np.arange(8, dtype=np.float32), 64, 64, (1,))
    counts = np.bincount(field.sections(0, 16).ravel().astype(int), minlength=8)
    assert len(counts) == 8
    # Of 65,536 draws 8,192 each, with a standard deviation of 85.
    assert np.abs(counts - 8192).max() < 5 * 85


def test_each_number_has_a_code_of_its_own() -> None:
    model = dual.Dual(16, 2, generator_for(0)).eval()
    first, again, second = (random_noise(model.noise, (4, 6, 6), 3, number, CPU) for number in (0, 0, 1))
    assert first.pool.shape == (16**3,)
    np.testing.assert_array_equal(first.pool, again.pool)
    np.testing.assert_array_equal(first.sections(0, 4), again.sections(0, 4))
    assert not np.array_equal(first.pool, second.pool)
    assert not np.array_equal(first.pool, random_noise(model.noise, (4, 6, 6), 4, 0, CPU).pool)
