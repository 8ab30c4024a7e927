"""The scale of a volume that is read slab by slab, against that of all its voxels."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from services.learning import tomogram_scale, volume_scale
from services.learning.volume_scale import measure_scale

SHAPE = (11, 12, 13)


def volume() -> NDArray[np.float32]:
    # A gradient along z, so that slabs differ; far from 0 beside its deviation.
    values = np.random.default_rng(0).standard_normal(SHAPE, np.float32) + 1000
    return values + np.arange(11, dtype=np.float32)[:, None, None]


@pytest.mark.parametrize("sections", [1, 4, 11])
@pytest.mark.parametrize(("contrast", "sign"), [("dark", -1), ("light", 1)])
def test_the_scale_is_that_of_all_voxels(
    monkeypatch: pytest.MonkeyPatch, sections: int, contrast: str, sign: int
) -> None:
    monkeypatch.setattr(tomogram_scale, "SLAB_BYTES", 4 * 12 * 13 * sections)
    values = volume()
    scale = measure_scale(lambda a, b: values[a:b], SHAPE, contrast, "t.mrc")
    assert scale.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-9)
    assert scale.deviation == pytest.approx(sign * values.std(dtype=np.float64), rel=1e-6)
    scaled = scale(values)
    assert scaled.dtype == np.float32
    assert scaled.std() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(scale.back(scaled), values, rtol=2e-7)
    assert np.sign(scaled[-1].mean()) == sign


def test_what_has_no_scale_is_refused() -> None:
    values = volume()
    values[7, 3, 5] = np.nan
    with pytest.raises(InvalidArgument, match=r"t\.mrc: the voxel x=5, y=3, z=7 is nan"):
        measure_scale(lambda a, b: values[a:b], SHAPE, "dark", "t.mrc")
    # A constant that float32 rounds is one all the same.
    constant = np.full(SHAPE, 0.1, np.float32)
    with pytest.raises(InvalidArgument, match=r"t\.mrc is constant, 0\.1 everywhere"):
        measure_scale(lambda a, b: constant[a:b], SHAPE, "dark", "t.mrc")
    assert volume_scale.MEASURING_BYTES > tomogram_scale.SLAB_BYTES
