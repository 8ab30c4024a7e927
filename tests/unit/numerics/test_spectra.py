import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.rotations import uniform_random
from cryofleet.numerics.spectra import SpectrumTable, centred_irfft, centred_rfft
from tests.unit.alignment.samples import asymmetric


def transform(
    volume: NDArray[np.float32], points: NDArray[np.float64], axis: int | None = None
) -> NDArray[np.complex128]:
    """The Fourier sum at `points` (x, y, z) in cycles per box, or its derivative along one of them."""
    n = volume.shape[0]
    r = np.arange(n) - n // 2
    factors = [np.exp(-2j * np.pi * np.outer(points[:, i], r) / n) for i in range(3)]
    if axis is not None:
        factors[axis] = factors[axis] * (-2j * np.pi * r / n)
    return np.asarray(np.einsum("zyx,pz,py,px->p", volume, factors[2], factors[1], factors[0], optimize=True))


def points_within(k_max: float, count: int = 400) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(count, 3))
    points *= rng.uniform(size=(count, 1)) ** (1 / 3) / np.linalg.norm(points, axis=1, keepdims=True)
    return k_max * points


@pytest.mark.parametrize(("oversampling", "tolerance"), [(2, 0.03), (4, 0.006)])
def test_tables_interpolate_the_transform(oversampling: int, tolerance: float) -> None:
    volume = asymmetric().volume(24)
    points = points_within(6.0)
    table = SpectrumTable(torch.from_numpy(volume)[None], 6.0, oversampling)
    expected = transform(volume, points)
    found = table.sample(torch.from_numpy(points).float()[None])[0].numpy()
    # Aliases of the linear kernel fall with the square of the oversampling.
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def test_slopes_are_those_of_the_transform() -> None:
    volume = asymmetric().volume(24)
    points = points_within(6.0)
    table = SpectrumTable(torch.from_numpy(volume)[None], 6.0, 8)
    _, gradient = table.sample_gradient(torch.from_numpy(points).float()[None])
    for axis in range(3):
        expected = transform(volume, points, axis)
        # A slope of a piecewise linear function: first order in the cell's size.
        assert np.linalg.norm(gradient[0, :, axis].numpy() - expected) < 0.1 * np.linalg.norm(expected)


def test_the_compiled_loop_and_the_tensors_agree() -> None:
    volumes = torch.from_numpy(np.stack([asymmetric(s).volume(16) for s in (1, 2, 3)]))
    table = SpectrumTable(volumes, 5.0, 3)
    points = torch.from_numpy(points_within(5.0, 50)).float()
    matrices = torch.from_numpy(uniform_random(6, np.random.default_rng(1)).as_matrix()).float().view(3, 2, 3, 3)
    compiled = table.rotated(points, matrices)
    tensors = table.sample(torch.matmul(points, matrices))
    torch.testing.assert_close(compiled, tensors, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(table.sample_gradient(torch.matmul(points, matrices))[0], tensors, rtol=1e-4, atol=1e-3)


def test_rotating_the_table_rotates_the_volume() -> None:
    blobs = asymmetric()
    rotation = Rotation.from_rotvec([0.3, 1.0, -0.6])
    points = points_within(5.0)
    table = SpectrumTable(torch.from_numpy(blobs.volume(24))[None], 5.0)
    matrix = torch.from_numpy(rotation.as_matrix()).float()[None, None]
    found = table.rotated(torch.from_numpy(points).float(), matrix)[0, 0].numpy()
    expected = transform(blobs.volume(24, rotation), points)
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("n", [8, 9])
def test_centred_transforms_have_no_phase_for_a_point_at_the_centre(n: int) -> None:
    volume = torch.zeros((n, n, n))
    volume[n // 2, n // 2, n // 2] = 1
    spectrum = centred_rfft(volume)
    torch.testing.assert_close(spectrum, torch.ones_like(spectrum))
    torch.testing.assert_close(centred_irfft(spectrum, n), volume, atol=1e-6, rtol=0)
