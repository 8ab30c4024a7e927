"""Subtomograms have the SNR asked for, the pose drawn, and the missing wedge of their series."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.wedge import wedge_mask
from services.simulation import detector, imaging, subtomograms
from services.simulation.density import Density, build
from services.simulation.poses import Poses, draw_poses
from services.simulation.subtomograms import Setup, calibrate, specimen
from services.simulation.tilt_scheme import tilt_scheme

VOXEL, SIDE = 10.0, 24


@cache
def density(name: str) -> Density:
    return build(name, None, "", VOXEL, 20.0)


def setup(names: tuple[str, ...] = ("hexameric-ring",), step: float = 6.0, **changes: Any) -> Setup:
    parameters = imaging.ImagingParameters(
        pixel_size_angstrom=VOXEL, **({"defocus_um": 1.0, "radiation_damage": False} | changes)
    )
    scheme = tilt_scheme(-60, 60, step)
    series = imaging.draw_tilt_series(scheme, parameters, np.random.default_rng(0))
    return Setup([density(name) for name in names], SIDE, series, parameters, detector.sinc_mtf)


def seeds(count: int, entropy: int) -> list[np.random.SeedSequence]:
    return np.random.SeedSequence(entropy).spawn(count)


def boxes(setup: Setup, poses: Poses, *args: Any) -> NDArray[np.float32]:
    return np.concatenate(list(subtomograms.subtomograms(setup, poses, *args)))


@pytest.mark.parametrize("snr", [0.003, 0.1, 1.0])
def test_the_snr_is_the_one_asked_for(snr: float) -> None:
    """Of two structures of unlike strength, which share the noise; by variances, and by pairs where 60 tell."""
    own, count = setup(("hexameric-ring", "single-ring")), 60
    poses = draw_poses([count // 2, count // 2], np.random.default_rng(1), max_shift_voxels=2)
    level = calibrate(own, poses, snr, np.random.SeedSequence(2))
    clean = boxes(own, poses, None, [])
    first, second = (boxes(own, poses, level, seeds(count, entropy)) for entropy in (3, 4))
    signal = clean.var(axis=(1, 2, 3), dtype=np.float64).mean()
    noise = (first - clean).var(axis=(1, 2, 3), dtype=np.float64).mean()
    assert signal / noise == pytest.approx(snr, rel=0.1)
    assert level.noise_variance == pytest.approx(noise, rel=0.05)
    if snr >= 0.1:
        covariance = np.mean([np.cov(a.ravel(), b.ravel())[0, 1] for a, b in zip(first, second, strict=True)])
        rho = covariance / np.mean([a.var() for a in (*first, *second)])
        assert rho / (1 - rho) == pytest.approx(snr, rel=0.1)


def test_the_noise_of_a_part_is_that_of_the_whole() -> None:
    own = setup(step=20)
    poses = draw_poses([6], np.random.default_rng(1))
    level = calibrate(own, poses, 0.1, np.random.SeedSequence(2))
    whole = boxes(own, poses, level, seeds(6, 5))
    part = Poses(poses.classes[2:5], poses.rotations[2:5], poses.shifts_voxels[2:5])
    np.testing.assert_array_equal(boxes(own, part, level, seeds(6, 5)[2:5]), whole[2:5])


def test_a_specimen_lies_at_its_pose() -> None:
    structure = density("barrel")
    shift = np.array([2.25, -1.5, 0.75])
    rotation = Rotation.from_euler("y", 90, degrees=True)
    cube = specimen(structure, rotation, shift, 40).astype(np.float64)
    grids = np.indices(cube.shape).reshape(3, -1)
    centre = (grids @ cube.ravel()) / cube.sum() - 20
    np.testing.assert_allclose(centre[::-1], shift, atol=0.02)
    # the long axis z is turned onto x
    spread = [float((((grids[axis] - 20 - centre[axis]) ** 2) @ cube.ravel()) / cube.sum()) for axis in range(3)]
    assert spread[2] > 1.5 * spread[0]


def test_a_noise_free_box_is_the_particle_within_the_wedge() -> None:
    """Perfect optics and a dense series give back minus twice the phase, where the wedge is not missing."""
    own = setup(step=1.0, contrast_transfer=False)
    own = Setup(own.densities, SIDE, own.series, own.parameters, None)
    pose = Poses(np.zeros(1, np.int32), Rotation.from_euler("x", [[40]], degrees=True), np.array([[1.0, 0.5, -1.0]]))
    box = boxes(own, pose, None, [])[0]
    truth = specimen(own.densities[0], pose.rotations[0], pose.shifts_voxels[0], SIDE)
    # two degrees within the range, where no slice's edge is met
    inside = wedge_mask(truth.shape, -58, 58, half=True) > 0
    there, own_box = np.fft.rfftn(truth)[inside], np.fft.rfftn(box)[inside]
    correlation = np.real(np.vdot(there, own_box)) / (np.linalg.norm(there) * np.linalg.norm(own_box))
    assert correlation < -0.97
    outside = wedge_mask(truth.shape, -64, 64, half=True) == 0
    assert (np.abs(np.fft.rfftn(box)[outside]) ** 2).mean() < 0.05 * (np.abs(own_box) ** 2).mean()


def test_phase_flipped_boxes_fit_the_structure_better() -> None:
    own = setup(step=3.0, defocus_um=4.0)
    flipped = Setup(own.densities, SIDE, own.series, own.parameters, own.mtf, "phase_flip")
    poses = draw_poses([4], np.random.default_rng(3))
    plain, corrected = boxes(own, poses, None, []), boxes(flipped, poses, None, [])
    scores = np.zeros(2)
    for index in range(4):
        truth = specimen(own.densities[0], poses.rotations[index], poses.shifts_voxels[index], SIDE)
        scores += [-np.corrcoef(truth.ravel(), box[index].ravel())[0, 1] for box in (plain, corrected)]
    assert scores[1] > scores[0] > 0


def test_structures_that_do_not_fit() -> None:
    with pytest.raises(InvalidArgument, match=r"'icosahedral-shell' is \d+ voxels across, the box has 24"):
        subtomograms.check_sizes(setup(("icosahedral-shell",)))
    subtomograms.check_sizes(setup())
