"""Point groups told from half maps of phantoms whose group is known."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import gaussian
from cryofleet.numerics.masks import soft_cylinder, soft_sphere
from cryofleet.numerics.rotations import point_group
from services.alignment.symmetry_detection import detect_symmetry, remove_radial_mean
from tests.unit.alignment.samples import asymmetric, symmetric

BOX = 28
VOXEL = 10.0
TILT = Rotation.from_rotvec([0.7, -0.4, 1.0])

Halves = tuple[NDArray[np.float32], NDArray[np.float32]]


def halves(volume: NDArray[np.float32], snr: float | None, seed: int = 0) -> Halves:
    """Two maps of a volume with independent white noise, SNR in the box."""
    rng = np.random.default_rng(seed)
    level = 0.0 if snr is None else float(volume.std()) / np.sqrt(snr)
    first, second = (volume + (level * rng.normal(size=volume.shape)).astype(np.float32) for _ in range(2))
    return first, second


@pytest.mark.parametrize(
    ("group", "candidates", "snr"),
    [
        ("D7", ("C7", "D7", "C14"), None),
        ("D7", ("C2", "C7", "D7", "C14"), 0.3),
        ("C7", ("C2", "C7", "D7", "C14"), 1.0),
        ("C4", ("C2", "C4", "D4", "O"), 1.0),
        ("O", ("C4", "T", "O", "D4", "C3"), 0.3),
    ],
)
def test_the_group_of_a_phantom_is_found(group: str, candidates: tuple[str, ...], snr: float | None) -> None:
    volume = symmetric(group, count=2).volume(BOX, TILT, np.array([0.6, -0.4, 0.3]))
    result = detect_symmetry(*halves(volume, snr), VOXEL, candidates=candidates)
    assert result.chosen == group
    best = result.fits[0]
    assert best.group == group
    assert best.fits
    assert best.correlation == pytest.approx(1, abs=0.07 + 3 * result.error)
    # T^-1 Q g Q^-1 T is one of the phantom's own rotations.
    elements = point_group(group)
    for member in elements:
        own = TILT.inv() * result.rotation * member * result.rotation.inv() * TILT
        assert np.degrees((elements.inv() * own).magnitude().min()) < 4
    order = [f.order for f in result.fits if f.fits]
    assert order == sorted(order, reverse=True)
    assert not any(f.fits for f in result.fits[len(order) :])


def test_c14_is_not_taken_for_c7() -> None:
    volume = symmetric("C14", count=2).volume(32)
    result = detect_symmetry(volume, volume, VOXEL, candidates=("C7", "C14", "D7"))
    assert result.chosen == "C14"
    fits = {f.group: f for f in result.fits}
    assert fits["C7"].half_step > 0.93  # which is C14
    assert fits["C14"].half_step < 0.7
    assert not fits["C7"].fits


@pytest.mark.parametrize("snr", [None, 0.5])
def test_what_has_no_symmetry_is_c1(snr: float | None) -> None:
    result = detect_symmetry(*halves(asymmetric(1).volume(BOX), snr), VOXEL, candidates=("C2", "C3", "D2"))
    assert result.chosen == "C1"
    assert result.remark == "no group fits"
    assert not any(f.fits for f in result.fits)
    assert len(result.fits) == 3


@pytest.mark.parametrize("snr", [None, 0.3])
def test_a_sphere_claims_nothing(snr: float | None) -> None:
    volume = gaussian(soft_sphere(BOX, 6, 3), 1.0)
    result = detect_symmetry(*halves(volume, snr), VOXEL, candidates=("C4", "O"))
    assert result.chosen == "C1"
    assert result.fits == ()
    assert "round" in result.remark or "agree too little" in result.remark


def test_a_cylinder_claims_no_order() -> None:
    volume = gaussian(soft_cylinder(BOX, 4, 8, 2), 1.0)
    result = detect_symmetry(*halves(volume, 1.0), VOXEL, candidates=("C2", "C7", "D7"))
    assert result.chosen == "C1"
    assert "round about an axis" in result.remark


def test_noise_claims_nothing() -> None:
    rng = np.random.default_rng(1)
    first, second = (rng.normal(size=(BOX, BOX, BOX)).astype(np.float32) for _ in range(2))
    for low_pass in (None, 40.0):
        result = detect_symmetry(first, second, VOXEL, candidates=("C2",), low_pass_angstrom=low_pass)
        assert result.chosen == "C1"
        assert result.fits == ()


def test_the_radial_mean_is_removed_and_nothing_else() -> None:
    ball = gaussian(soft_sphere(BOX, 6, 4), 1.5)
    assert np.abs(remove_radial_mean(ball)).max() < 0.02
    volume = asymmetric(3).volume(BOX)
    left = remove_radial_mean(volume)
    np.testing.assert_allclose(remove_radial_mean(left), left, atol=1e-5)
    np.testing.assert_allclose(remove_radial_mean(volume + 5 * ball), left, atol=0.1)
    odd = volume - np.roll(volume[::-1, ::-1, ::-1], 1, axis=(0, 1, 2))
    inner = soft_sphere(BOX, 10, 0) > 0
    np.testing.assert_allclose(remove_radial_mean(odd)[inner], odd[inner], atol=1e-4)


def test_bad_input_is_named() -> None:
    volume = symmetric("C4").volume(16)
    with pytest.raises(InvalidArgument, match="two cubes"):
        detect_symmetry(volume, volume[:8], VOXEL)
    with pytest.raises(InvalidArgument, match="second half map"):
        detect_symmetry(volume, np.ones_like(volume), VOXEL)
    with pytest.raises(InvalidArgument, match="candidates is empty"):
        detect_symmetry(volume, volume, VOXEL, candidates=())
    with pytest.raises(InvalidArgument, match="symmetry 'X3'"):
        detect_symmetry(volume, volume, VOXEL, candidates=("X3",))
