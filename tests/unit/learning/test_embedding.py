from __future__ import annotations

import numpy as np
import pytest

from services.learning.embedding import MAX_POINTS, principal_components, sampled_rows


def test_principal_components_of_points_on_known_axes() -> None:
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.standard_normal((8, 8)))[0]
    spread = np.array([5.0, 2.0, *[0.1] * 6])
    codes = (random.standard_normal((4000, 8)) * spread @ axes.T + 3).astype(np.float32)
    found = principal_components(codes)
    for number in range(2):
        # With n = 4000 the axes are found to within some spread ratio / sqrt(n).
        assert abs(float(found.axes[number] @ axes[:, number])) > 0.999
        assert found.axes[number, np.abs(found.axes[number]).argmax()] > 0
    assert found.explained == pytest.approx([25 / 29.06, 4 / 29.06], rel=0.06)
    points = found.points(codes)
    assert points.mean(axis=0) == pytest.approx([0, 0], abs=1e-6)
    assert points.var(axis=0) / codes.var(axis=0).sum() == pytest.approx(found.explained, rel=1e-4)


def test_numpys_own_decomposition_agrees() -> None:
    codes = np.random.default_rng(1).gamma(1.0, size=(300, 32)).astype(np.float32)
    found = principal_components(codes)
    singular = np.linalg.svd(codes - codes.mean(axis=0, dtype=np.float64), compute_uv=False)
    assert found.explained == pytest.approx(singular[:2] ** 2 / (singular**2).sum(), rel=1e-9)


def test_codes_that_do_not_vary() -> None:
    found = principal_components(np.ones((5, 32), np.float32))
    assert found.explained.tolist() == [0, 0]
    assert not found.points(np.ones((5, 32), np.float32)).any()


def test_rows_are_spread_evenly() -> None:
    assert sampled_rows(7, 10).tolist() == list(range(7))
    assert sampled_rows(10, 4).tolist() == [0, 2, 5, 7]
    rows = sampled_rows(1_000_003)
    assert len(rows) == MAX_POINTS
    assert set(np.diff(rows).tolist()) == {50, 51}
