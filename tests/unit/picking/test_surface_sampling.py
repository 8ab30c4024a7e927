"""Positions and normals on surfaces whose shape is known, grids, and distances to objects."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial import KDTree

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.picking import surface_sampling
from services.picking.slabs import ReadSlab
from services.picking.surface_sampling import grid, onto_normals, sample

SHAPE = (56, 60, 64)
CENTRE = np.array([31.3, 29.6, 27.4])  # (x, y, z)


def radius(centre: NDArray[np.float64] = CENTRE) -> NDArray[np.float64]:
    z, y, x = np.indices(SHAPE)
    return np.asarray(((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2) ** 0.5)


def reader(volume: NDArray[np.bool_]) -> ReadSlab:
    data = volume.astype(np.float32)
    return lambda a, b: data[a:b]


@pytest.mark.parametrize("block", [1 << 22, 20_000])
def test_middle_of_a_spherical_shell(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(surface_sampling, "BLOCK_VOXELS", block)
    picks = sample(reader(np.abs(radius() - 18) < 2), SHAPE, 5.0)
    away = picks.positions - CENTRE
    distance = np.linalg.norm(away, axis=1)
    assert np.abs(distance - 18).max() < 0.5
    # outwards, within 5 degrees
    assert ((picks.normals * away).sum(axis=1) / distance).min() > np.cos(np.radians(5))
    tree = KDTree(picks.positions)
    assert np.asarray(tree.query(picks.positions, 2)[0])[:, 1].min() >= 5.0 - 1e-9
    # no room is left: every point of the sphere is within the spacing, and the distance of two candidates, of a pick
    golden = np.arange(2000) * np.pi * (3 - np.sqrt(5))
    height = 1 - 2 * (np.arange(2000) + 0.5) / 2000
    ring = np.sqrt(1 - height**2)
    sphere = CENTRE + 18 * np.stack([ring * np.cos(golden), ring * np.sin(golden), height], axis=1)
    assert np.max(tree.query(sphere)[0]) < 5.0 + 1.5
    assert np.allclose(picks.rotations().apply([0, 0, 1]), picks.normals)


def test_boundary_of_a_ball_and_an_offset() -> None:
    picks = sample(reader(radius() < 16), SHAPE, 4.0, surface="boundary", offset_voxels=3.0)
    away = picks.positions - CENTRE
    distance = np.linalg.norm(away, axis=1)
    # the level set of a smoothed ball of radius R lies sigma^2 / R inside
    assert np.abs(distance - (16 + 3 - 4 / 16)).max() < 0.5
    assert ((picks.normals * away).sum(axis=1) / distance).min() > np.cos(np.radians(5))


def test_open_sheet_has_one_side() -> None:
    z, y, x = np.indices(SHAPE)
    normal = np.array([0.2, 0.1, np.sqrt(1 - 0.05)])
    height = (x - 32) * normal[0] + (y - 30) * normal[1] + (z - 28) * normal[2]
    picks = sample(reader(np.abs(height) < 2), SHAPE, 6.0)
    inner = ((picks.positions > 8) & (picks.positions < np.array(SHAPE[::-1]) - 9)).all(axis=1)
    assert inner.sum() > 20
    off = (picks.positions - [32, 30, 28]) @ normal
    assert np.abs(off[inner]).max() < 0.5
    assert (picks.normals[inner] @ normal).min() > np.cos(np.radians(5))


def test_two_vesicles_each_point_outwards() -> None:
    centres = np.array([[17.0, 28, 28], [46.0, 30, 28]])
    shells = (np.abs(radius(centres[0]) - 11) < 1.6) | (np.abs(radius(centres[1]) - 12) < 1.6)
    picks = sample(reader(shells), SHAPE, 4.0, sigma_voxels=1.5)
    for centre in centres:
        away = picks.positions - centre
        near = np.linalg.norm(away, axis=1) < 15
        assert near.sum() > 30
        assert ((picks.normals[near] * away[near]).sum(axis=1) > 0).all()


def test_no_surface_is_an_error() -> None:
    empty = reader(np.zeros(SHAPE, np.bool_))
    with pytest.raises(FailedPrecondition, match="no surface"):
        sample(empty, SHAPE, 5.0)
    with pytest.raises(InvalidArgument, match="at least 1"):
        sample(empty, SHAPE, 0.5)


def test_onto_normals_of_both_poles() -> None:
    normals = np.array([[0, 0, 1.0], [0, 0, -1.0], [1.0, 0, 0], [0, -1.0, 0]])
    assert np.allclose(onto_normals(normals).apply([0, 0, 1]), normals)


def test_grid_is_regular_centred_and_masked() -> None:
    positions = grid((21, 31, 41), 10)
    assert len(positions) == 3 * 4 * 5
    assert np.allclose(positions.mean(axis=0), [20, 15, 10])
    mask = np.zeros((21, 31, 41), np.bool_)
    mask[:, :, 20:] = True
    masked = grid((21, 31, 41), 10, reader(mask))
    assert len(masked) == 3 * 4 * 3
    assert masked[:, 0].min() == 20
    with pytest.raises(FailedPrecondition, match="mask is 0"):
        grid((21, 31, 41), 10, reader(np.zeros((21, 31, 41), np.bool_)))
