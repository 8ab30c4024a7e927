from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cryofleet.numerics.fourier import fourier_crop
from cryofleet.progress import no_progress
from services.learning import binned_volume
from services.learning.binned_volume import bin_volume, binned_shape, nearest_voxels


@pytest.mark.parametrize("factor", [2, 3])
def test_in_pieces_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: int) -> None:
    volume = np.random.default_rng(0).standard_normal((14, 19, 22), np.float32)
    monkeypatch.setattr(binned_volume, "CHUNK_BYTES", 4 * 19 * 22 * 3)
    with bin_volume(lambda a, b: volume[a:b], volume.shape, factor, tmp_path, no_progress) as binned:
        assert binned.shape == binned_shape(volume.shape, factor)
        found = binned.sections(0, binned.shape[0])
    np.testing.assert_allclose(found, fourier_crop(volume, factor), atol=1e-5)
    assert not list(tmp_path.iterdir())


def test_each_voxel_is_told_by_the_nearest_binned_one() -> None:
    assert nearest_voxels(6, 3, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert nearest_voxels(10, 3, 3).tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert nearest_voxels(4, 4, 1).tolist() == [0, 1, 2, 3]
    for factor in (2, 3, 4, 5):
        found = nearest_voxels(40, 40 // factor, factor)
        assert (np.abs(found * factor - np.arange(40)) <= factor / 2).sum() >= 40 - factor
