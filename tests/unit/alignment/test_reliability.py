"""How far a reference can be believed, on references whose particle and noise are known."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryofleet.numerics.masks import radius_grid
from cryofleet.numerics.transfer import wedge_transfer
from services.alignment.align import Search, align
from services.alignment.reliability import band_cycles, particle_sphere, weights
from tests.unit.alignment.samples import asymmetric, observed

BOX = 48
VOXEL = 8.0


def noisy(deviation: float, shift: tuple[float, float, float] = (0.0, 0.0, 0.0), seed: int = 0) -> np.ndarray:
    volume = asymmetric(2).volume(BOX, Rotation.identity(), np.array(shift))
    noise = np.random.default_rng(seed).normal(size=volume.shape) * deviation * volume.std()
    return np.asarray(volume + noise, dtype=np.float32)


def test_the_sphere_holds_the_particle_and_little_more() -> None:
    clean = asymmetric(2).volume(BOX)
    energy = np.sort(radius_grid(BOX)[np.square(clean) > 0.02 * np.square(clean).max()])
    reaches = float(energy[-1])
    spheres = [particle_sphere(noisy(3.0, (0.0, 0.0, 0.0), seed)) for seed in range(5)]
    assert all(s is not None for s in spheres)
    radii = [s.radius_voxels for s in spheres if s is not None]
    # It may lose what is weak at the rim; the box's own sphere would be 24.
    assert 0.5 * reaches < min(radii)
    assert max(radii) < 1.3 * reaches


def test_the_sphere_follows_the_particle() -> None:
    centred, moved = particle_sphere(noisy(2.0)), particle_sphere(noisy(2.0, (5.0, -4.0, 3.0)))
    assert centred is not None
    assert moved is not None
    assert np.abs(moved.centre - centred.centre - [5, -4, 3]).max() <= 2.5


def test_noise_alone_and_no_noise_have_no_sphere() -> None:
    assert particle_sphere(np.random.default_rng(1).normal(size=(BOX,) * 3).astype(np.float32)) is None
    assert particle_sphere(noisy(1e-3)) is None
    assert (weights(noisy(1e-3), None) == 1).all()


def test_weights_are_the_wiener_filter_of_the_particle() -> None:
    reference = noisy(2.0)
    sphere = particle_sphere(reference)
    assert sphere is not None
    found = weights(reference, sphere)
    mask = sphere.mask(BOX, 3.0)
    clean, noise = asymmetric(2).volume(BOX), reference - asymmetric(2).volume(BOX)
    shells = np.rint(np.linalg.norm(np.stack(np.meshgrid(*[np.fft.fftfreq(BOX) * BOX] * 3, indexing="ij")), axis=0))
    place = shells.astype(int).ravel()

    def power(volume: np.ndarray) -> np.ndarray:
        full = np.abs(np.fft.fftn(volume * mask)).ravel() ** 2
        return np.asarray(np.bincount(place, full) / np.bincount(place))[: BOX // 2 + 1]

    expected = power(clean) / (power(clean) + power(noise))
    # A shell k has some 6 k^2 independent components; smoothing over neighbours blurs what falls steeply.
    assert np.abs(found - expected / expected.max())[3:].max() < 0.2
    assert np.corrcoef(found[1:], expected[1:])[0, 1] > 0.97


def test_the_band_ends_where_nothing_is_told() -> None:
    clean = np.zeros((BOX,) * 3, np.float32)
    clean[BOX // 2, BOX // 2, BOX // 2] = 1
    sharp = band_cycles(clean, np.ones(BOX // 2 + 1))
    believed = np.where(np.arange(BOX // 2 + 1) <= 9, 1.0, 1e-4)
    assert band_cycles(clean, believed) <= 9.5
    # Of a point, k^2 times the shell's size: a share of 0.9 lies below 0.98 of the last shell.
    assert sharp > 0.9 * BOX / 2


def test_two_noisy_particles_find_each_other() -> None:
    """In the whole box and a fixed band they do not."""
    wedge, transfer = (-60.0, 60.0), wedge_transfer(BOX, -60.0, 60.0)
    rng = np.random.default_rng(3)
    rotations = Rotation.random(16, random_state=4)
    boxes = np.stack([observed(asymmetric(2).volume(BOX, r), wedge, 0.05, rng) for r in rotations])
    search = Search(BOX, VOXEL, transfer, max_shift_voxels=3.0, reference_transfer=transfer)

    def right(mask: np.ndarray | None, low_pass: float | None) -> float:
        good = 0.0
        for k in range(8):
            pair = boxes[2 * k + 1]
            chosen = Search(**{**vars(search), "low_pass_angstrom": low_pass})
            pose = align(lambda i, n, k=k: boxes[2 * k : 2 * k + 1], 1, pair, chosen, mask=mask)  # type: ignore[misc]
            true = rotations[2 * k] * rotations[2 * k + 1].inv()
            good += float(np.degrees(np.max((true.inv() * pose.rotations).magnitude())) < 10)
        return good / 8

    found = right(None, None)
    assert found >= 0.6
    assert found >= right(np.ones((BOX,) * 3, np.float32), 4 * VOXEL)


@pytest.mark.parametrize("size", [8, 9, 17])
def test_small_and_odd_boxes_are_no_trouble(size: int) -> None:
    reference = asymmetric(1).volume(size) + np.random.default_rng(0).normal(size=(size,) * 3).astype(np.float32)
    sphere = particle_sphere(reference)
    found = weights(reference, sphere)
    assert found.shape == (size // 2 + 1,)
    assert np.isfinite(found).all()
    assert 0 < band_cycles(reference, found) <= size / 2
