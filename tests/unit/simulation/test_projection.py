"""Projections are exact, have an exact adjoint, and lie where the geometry says."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics import fourier
from services.simulation.projection import ALIASING, back_project, project

ANGLES = np.array([-90.0, -61.3, -45.0, -20.0, 0.0, 33.3, 60.0])
METHODS: tuple[Literal["real_space", "central_slices"], ...] = ("real_space", "central_slices")


def gaussians(shape: tuple[int, int, int], width: float, count: int = 6) -> tuple[NDArray[np.float64], float]:
    """Centres (x, y, z) from the volume's centre, and their common width, well inside the volume."""
    rng = np.random.default_rng(3)
    reach = np.array(shape[::-1]) / 2 - 4.5 * width
    return rng.uniform(-1, 1, (count, 3)) * np.maximum(reach, 0), width


def rendered(shape: tuple[int, int, int], centres: NDArray[np.float64], width: float) -> NDArray[np.float32]:
    z, y, x = (np.arange(n) - n // 2 for n in shape)
    volume = np.zeros(shape)
    for cx, cy, cz in centres:
        squared = (z[:, None, None] - cz) ** 2 + (y[:, None] - cy) ** 2 + (x - cx) ** 2
        volume += np.exp(-squared / (2 * width**2))
    return volume.astype(np.float32)


def projected(shape: tuple[int, int], centres: NDArray[np.float64], width: float, angle: float) -> NDArray[np.float64]:
    """The integral of the Gaussians along the beam: they land on x cos + z sin."""
    v, u = (np.arange(n) - n // 2 for n in shape)
    theta = np.radians(angle)
    image = np.zeros(shape)
    for cx, cy, cz in centres:
        at = cx * np.cos(theta) + cz * np.sin(theta)
        image += np.exp(-((v[:, None] - cy) ** 2 + (u - at) ** 2) / (2 * width**2))
    return np.asarray(image * width * np.sqrt(2 * np.pi))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(40, 24, 48), (41, 23, 47)])
def test_projections_of_gaussians_are_gaussians(
    method: Literal["real_space", "central_slices"], shape: tuple[int, int, int]
) -> None:
    centres, width = gaussians(shape, 1.5)
    stack = project(rendered(shape, centres, width), ANGLES, 64, method)
    for image, angle in zip(stack, ANGLES, strict=True):
        expected = projected((shape[1], 64), centres, width, float(angle))
        # a Gaussian of 1.5 voxels has 1.5e-5 of its amplitude left at Nyquist: what counts is the kernel's error
        np.testing.assert_allclose(image, expected, atol=ALIASING * expected.max())


@pytest.mark.parametrize("method", METHODS)
def test_the_transform_of_a_projection_is_a_central_slice(method: Literal["real_space", "central_slices"]) -> None:
    """Against the volume's transform, evaluated at the slice's own points.

    Of noise, so that all frequencies count; those that a hard cut at Nyquist would make ring without end are left out.
    """
    shape = (36, 4, 52)
    volume = fourier.filter_radially(
        np.random.default_rng(0).standard_normal(shape).astype(np.float32),
        lambda k: fourier.soft_step(k, 0.35, 0.1),
    )
    edges = np.pad(np.ones((16, 1, 32), np.float32), ((10, 10), (0, 0), (10, 10)), mode="linear_ramp", end_values=0)
    volume *= edges
    width = 128
    stack = project(volume, ANGLES, width, method)
    k = np.fft.rfftfreq(width)[:-1]
    z, x = np.arange(shape[0]) - shape[0] // 2, np.arange(shape[2]) - shape[2] // 2
    for image, angle in zip(stack, ANGLES, strict=True):
        theta = np.radians(angle)
        own = np.fft.rfft(np.fft.ifftshift(image.astype(np.float64), axes=1), axis=1)[:, : len(k)]
        along_z = np.exp(-2j * np.pi * np.outer(k * np.sin(theta), z))
        along_x = np.exp(-2j * np.pi * np.outer(k * np.cos(theta), x))
        expected = np.einsum("kz,zyx,kx->yk", along_z, volume.astype(np.float64), along_x)
        error = np.abs(own - expected).max() / np.abs(expected).max()
        assert error < (ALIASING if method == "real_space" else 3e-4), angle


def test_back_projection_is_the_adjoint() -> None:
    rng = np.random.default_rng(1)
    for shape, width in (((20, 18, 30), 44), ((21, 5, 33), 25)):
        volume = rng.standard_normal(shape).astype(np.float32)
        projections = project(volume, ANGLES, width)
        images = rng.standard_normal(projections.shape).astype(np.float32)
        left = np.vdot(projections.astype(np.float64), images)
        right = np.vdot(volume.astype(np.float64), back_project(images, ANGLES, shape[0], shape[2]))
        scale = np.linalg.norm(projections) * np.linalg.norm(images)
        assert abs(left - right) <= 1e-5 * max(abs(left), 1e-3 * scale)


def test_threads_and_blocks_change_nothing() -> None:
    volume = np.random.default_rng(2).standard_normal((12, 50, 20)).astype(np.float32)
    whole = project(volume, ANGLES, workers=1)
    np.testing.assert_array_equal(project(volume, ANGLES, workers=3), whole)
    np.testing.assert_array_equal(project(volume[:, 16:32], ANGLES), whole[:, 16:32])
    back = back_project(whole, ANGLES, 12, 20, workers=1)
    np.testing.assert_array_equal(back_project(whole, ANGLES, 12, 20, workers=3), back)


@pytest.mark.parametrize("angles", [[], [91.0], [np.nan], [[0.0]]])
def test_angles_that_are_none(angles: list[float]) -> None:
    with pytest.raises(InvalidArgument, match="angle"):
        project(np.zeros((4, 4, 4), np.float32), angles)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(InvalidArgument, match="3 angles"):
        back_project(np.zeros((2, 4, 4), np.float32), [0, 1, 2], 4, 4)
    with pytest.raises(InvalidArgument, match="width"):
        project(np.zeros((4, 4, 4), np.float32), [0.0], 0)
