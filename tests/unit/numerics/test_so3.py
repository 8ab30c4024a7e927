import numpy as np
import pytest
import scipy.special
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.harmonics import spherical_harmonics, wigner_d
from cryofleet.numerics.rotations import uniform_random
from cryofleet.numerics.so3 import RotationGrid, local_maxima, suppress


def directions(count: int, seed: int = 0) -> NDArray[np.float64]:
    vectors = np.random.default_rng(seed).normal(size=(count, 3))
    vectors[0] = [0, 0, 1]
    vectors[1] = [0, 0, -2]
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def sphere_rule(rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    cosine, weight = np.polynomial.legendre.leggauss(rows)
    phi = np.arange(2 * rows) * np.pi / rows
    sine = np.sqrt(1 - cosine**2)
    nodes = np.stack(
        [np.outer(sine, np.cos(phi)), np.outer(sine, np.sin(phi)), np.repeat(cosine[:, None], 2 * rows, 1)], axis=-1
    )
    return nodes.reshape(-1, 3), np.repeat(weight * np.pi / rows, 2 * rows)


def coefficients(rng: np.random.Generator, degrees: tuple[int, ...], shells: int) -> NDArray[np.complex128]:
    """Of a random real function: (1, shells, degrees, m = 0..L)."""
    size = (1, shells, len(degrees), degrees[-1] + 1)
    values = rng.normal(size=size) + 1j * rng.normal(size=size)
    values[..., 0] = values[..., 0].real
    for i, degree in enumerate(degrees):
        values[:, :, i, degree + 1 :] = 0
    return values


def evaluate(
    values: NDArray[np.complex128], degrees: tuple[int, ...], points: NDArray[np.float64]
) -> NDArray[np.float64]:
    terms = np.einsum("rlm,plm->rpm", values[0], spherical_harmonics(points, degrees)).real
    return np.asarray(terms[..., 0] + 2 * terms[..., 1:].sum(-1))


def test_harmonics_agree_with_scipy() -> None:
    points = directions(40)
    degrees = (0, 1, 5, 24)
    values = spherical_harmonics(points, degrees)
    polar, azimuth = np.arccos(points[:, 2]), np.arctan2(points[:, 1], points[:, 0])
    for i, degree in enumerate(degrees):
        for m in range(25):
            expected = scipy.special.sph_harm_y(degree, m, polar, azimuth) if m <= degree else 0
            np.testing.assert_allclose(values[:, i, m], expected, atol=1e-11)


@pytest.mark.parametrize("degree", [0, 1, 2, 7, 48])
def test_wigner_matrices_are_representations(degree: int) -> None:
    a, b, both = wigner_d(degree, np.array([0.3, 0.9, 1.2]))
    np.testing.assert_allclose(a @ b, both, atol=1e-12)
    np.testing.assert_allclose(a @ a.T, np.eye(2 * degree + 1), atol=1e-12)


def test_wigner_matrix_of_degree_one_is_the_known_one() -> None:
    beta = 0.7
    c, s = np.cos(beta), np.sin(beta) / np.sqrt(2)
    expected = [[(1 + c) / 2, s, (1 - c) / 2], [-s, c, s], [(1 - c) / 2, -s, (1 + c) / 2]]
    np.testing.assert_allclose(wigner_d(1, np.array([beta]))[0], expected, atol=1e-14)


@pytest.mark.parametrize("degrees", [(0, 1, 2, 3, 4), (0, 2, 4, 6)])
def test_correlation_is_the_sum_over_the_sphere_at_every_rotation(degrees: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    grid = RotationGrid(degrees, 16, "cpu")
    p, q = coefficients(rng, degrees, 2), coefficients(rng, degrees, 2)
    correlation = grid.correlate(torch.from_numpy(p).to(torch.complex64), torch.from_numpy(q).to(torch.complex64))
    nodes, weights = sphere_rule(degrees[-1] + 2)
    index = rng.integers(0, correlation.numel(), 60)
    for i, rotation in zip(index, grid.rotations(index), strict=True):
        # (R q)(x) = q(R^-1 x)
        turned = evaluate(q, degrees, rotation.inv().apply(nodes))
        expected = float((evaluate(p, degrees, nodes) * turned * weights).sum())
        assert float(correlation.flatten()[i]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_grid_rotations_are_their_euler_angles() -> None:
    grid = RotationGrid((0, 2), 8, "cpu")
    for b, a, g in [(0, 0, 0), (1, 3, 7), (3, 5, 2)]:
        expected = Rotation.from_euler("ZYZ", [a * np.pi / 4, (b + 0.5) * np.pi / 4, g * np.pi / 4])
        found = grid.rotations(np.array([(b * 8 + a) * 8 + g]))[0]
        assert (found.inv() * expected).magnitude() < 1e-6


def test_local_maxima_are_found_across_the_seams_and_sorted() -> None:
    values = torch.zeros((1, 4, 8, 8))
    values[0, 1, 0, 0] = 3.0
    values[0, 1, 7, 7] = 2.0  # a neighbour of the first across both seams
    values[0, 3, 4, 4] = 1.0
    values[0, 0, 4, 4] = 4.0  # beta does not go round: no neighbour of the one before
    values -= 1e-3 * torch.arange(values.numel()).view(values.shape) / values.numel()
    found, index = local_maxima(values, 3)
    assert index[0].tolist() == [(0 * 8 + 4) * 8 + 4, 1 * 64, (3 * 8 + 4) * 8 + 4]
    assert (found[0].diff() < 0).all()


def test_suppression_keeps_apart_by_angle_also_at_the_poles() -> None:
    base = Rotation.from_euler("ZYZ", [[0, 1, 0], [180, 1, -180], [0, 30, 0], [0, 31, 0], [0, 90, 0]], degrees=True)
    quaternions = torch.from_numpy(base.as_quat()).float()[None]
    values = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    # The first two are 2 degrees apart though their Euler angles are not.
    assert suppress(values, quaternions, 5, 8.0).tolist() == [[0, 2, 4, -1, -1]]
    assert suppress(values, -quaternions, 2, 8.0).tolist() == [[0, 2]]


def test_suppressed_candidates_of_random_rotations_keep_their_distance() -> None:
    rotations = uniform_random(400, np.random.default_rng(5))
    quaternions = torch.from_numpy(rotations.as_quat()).float()[None]
    chosen = suppress(torch.linspace(1, 0, 400)[None], quaternions, 30, 20.0)[0].numpy()
    kept = rotations[chosen]
    for i in range(30):
        others = np.delete(np.arange(30), i)
        assert np.degrees((kept[i].inv() * kept[others]).magnitude()).min() >= 20 - 1e-3
