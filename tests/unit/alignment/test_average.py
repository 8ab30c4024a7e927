from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import fsc
from cryofleet.numerics.rotations import angular_distance_degrees, frame_between, point_group, uniform_random
from cryofleet.numerics.transfer import wedge_transfer
from services.alignment.align import Poses, Search, prepare_reference
from services.alignment.average import Averaged, State, average
from services.alignment.band import Band
from services.alignment.reconstruction import Contributions, components_of, divide, volume_of
from services.alignment.symmetry_axes import find_axes
from tests.unit.alignment.samples import WEDGE, Sample, asymmetric, sample, symmetric

BOX = 24
SEARCH = Search(BOX, 12.0, wedge_transfer(BOX, *WEDGE), max_candidates=15)


def errors_of(data: Sample, rotations: Rotation, symmetry: str = "C1") -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    frame = frame_between(data.rotations, rotations, symmetry)
    return angular_distance_degrees(data.rotations, rotations * frame, symmetry)


def test_a_set_is_averaged_from_nothing() -> None:
    blobs = asymmetric(1)
    data = sample(blobs, BOX, 20, 0.2, wedge=(-60.0, 60.0))
    search = replace(SEARCH, transfer=wedge_transfer(BOX, -60.0, 60.0))
    result = average(data.read, 20, search, iterations=2, threads=2)
    errors = errors_of(data, result.poses.rotations)
    assert np.median(errors) < 4
    assert (errors < 15).mean() >= 0.9
    assert sorted(np.bincount(result.halves).tolist()) == [0, 10, 10]
    frame = frame_between(data.rotations, result.poses.rotations)
    # particle(r) = truth(R^-1 (r - t)) = average(E^-1 (r - u)) with R = E Q: the average is the truth turned by Q and
    # shifted by E^-1 (t - u).
    offset = np.median(result.poses.rotations.inv().apply(data.shifts - result.poses.shifts), axis=0)
    truth = blobs.volume(BOX, frame, offset)
    # 0.5 at 48 Å, four voxels, at least.
    curve = fsc(truth, result.average)[1]
    assert (curve[1:6] > 0.5).all()
    assert result.resolution_angstrom < 60
    table = result.table()
    assert table["resolution_angstrom"] == result.resolution_angstrom
    assert len(result.iterations) == 2
    assert all(np.isfinite([i.mean_score, i.resolution_angstrom, i.low_pass_angstrom]).all() for i in result.iterations)


def test_no_particle_is_locked_to_its_start() -> None:
    """Poses all at the identity, SNR 0.1: an average that holds the particle itself would keep it there."""
    data = sample(asymmetric(2), 32, 20, 0.1, seed=3, wedge=(-60.0, 60.0))
    search = Search(32, 12.0, wedge_transfer(32, -60.0, 60.0), max_candidates=20)
    start = Poses(Rotation.identity(20), np.zeros((20, 3)), np.zeros(20))
    states: list[State] = []
    result = average(data.read, 20, search, iterations=4, start=start, threads=2, checkpoint=states.append)
    first = np.degrees(Rotation.from_quat(states[1].quaternions).magnitude())
    assert (first > 5).sum() >= 18
    assert np.median(errors_of(data, result.poses.rotations)) < np.median(errors_of(data, start.rotations)) / 2


def run(data: Sample, **options: object) -> Averaged:
    return average(data.read, len(data), SEARCH, iterations=2, seed=5, **options)  # type: ignore[arg-type]


def test_a_resumed_run_and_other_threads_end_in_the_same_bytes() -> None:
    data = sample(asymmetric(3), BOX, 7, 0.5)
    states: list[State] = []
    whole = run(data, checkpoint=states.append)
    assert [s.iteration for s in states] == [0, 1, 2]
    for state in states:
        again = run(data, resume=State.from_arrays(state.to_arrays()), threads=2)
        assert again.average.tobytes() == whole.average.tobytes()
        assert again.half_maps[1].tobytes() == whole.half_maps[1].tobytes()
        assert again.poses.rotations.as_quat().tobytes() == whole.poses.rotations.as_quat().tobytes()
        assert again.table() == whole.table()


def test_the_sign_of_protein_is_kept() -> None:
    data = sample(asymmetric(3), BOX, 4, 1.0)
    light = run(data)
    dark = average(lambda i, n: -data.read(i, n), 4, SEARCH, iterations=2, seed=5, contrast="dark")
    np.testing.assert_array_equal(dark.average, -light.average)
    np.testing.assert_array_equal(dark.poses.shifts, light.poses.shifts)
    centre = slice(BOX // 2 - 4, BOX // 2 + 4)
    assert light.average[centre, centre, centre].mean() > 0


def test_a_reference_gives_the_frame() -> None:
    blobs = asymmetric(4)
    data = sample(blobs, BOX, 10, 0.5)
    result = average(data.read, 10, SEARCH, iterations=1, reference=blobs.volume(BOX))
    assert np.median(angular_distance_degrees(data.rotations, result.poses.rotations)) < 4


def test_given_poses_are_where_it_begins() -> None:
    data = sample(asymmetric(4), BOX, 10, 0.5)
    states: list[State] = []
    start = Poses(data.rotations, data.shifts, np.zeros(10))
    result = average(data.read, 10, SEARCH, iterations=1, start=start, checkpoint=states.append)
    np.testing.assert_array_equal(states[0].quaternions, data.rotations.as_quat())
    assert np.median(angular_distance_degrees(data.rotations, result.poses.rotations)) < 5


def test_symmetric_sets_are_averaged_with_their_axis_along_z() -> None:
    blobs = symmetric("C4", seed=3, count=4)
    data = sample(blobs, BOX, 12, 0.5, wedge=(-60.0, 60.0))
    search = replace(SEARCH, transfer=wedge_transfer(BOX, -60.0, 60.0))
    result = average(data.read, 12, search, iterations=1, symmetry="C4", threads=2)
    assert np.median(errors_of(data, result.poses.rotations, "C4")) < 5
    # Without its first row and column an even box is symmetric about its centre.
    turned = np.rot90(result.average[:, 1:, 1:], axes=(1, 2))
    assert np.corrcoef(turned.ravel(), result.average[:, 1:, 1:].ravel())[0, 1] > 0.98


@pytest.mark.parametrize("name", ["C5", "D3", "O"])
def test_axes_of_symmetry_are_found(name: str) -> None:
    blobs = symmetric(name, count=2)
    tilted = Rotation.from_rotvec([0.7, -0.4, 1.0])
    group = point_group(name)
    found = find_axes(blobs.volume(BOX, tilted), 6.0, group)
    # Q g Q^-1 is a symmetry of the tilted volume, so T^-1 Q g Q^-1 T is one of the group.
    for member in group:
        own = tilted.inv() * found * member * found.inv() * tilted
        assert np.degrees((group.inv() * own).magnitude().min()) < 4


def test_contributions_put_the_particle_back_onto_the_reference() -> None:
    blobs = asymmetric(5)
    data = sample(blobs, BOX, 5, None)
    band = Band(BOX, 1.0, 8.0, None, "cpu")
    contributions = Contributions(band, wedge_transfer(BOX, *WEDGE), Rotation.identity(1), "cpu")
    quaternions = torch.from_numpy(data.rotations.as_quat()).float()
    terms, coverage = contributions.of(
        torch.from_numpy(data.particles), quaternions, torch.from_numpy(data.shifts).float()
    )
    expected = components_of(band, blobs.volume(BOX))
    scale = float(expected.abs().square().mean().sqrt())
    for i in range(5):
        # 120 degrees of 180 are there.
        assert float(coverage[i].mean()) == pytest.approx(2 / 3, abs=0.05)
        error = (terms[i] - coverage[i] * expected[0]).abs().square().mean().sqrt()
        # Where the particle's transform changes within the kernel's width, at the wedge's planes, something is left.
        assert float(error) < 0.2 * scale
    together = divide(terms.sum(dim=0), coverage.sum(dim=0), 5)
    restored = volume_of(band, together[None])[0].numpy()
    assert np.corrcoef(restored.ravel(), volume_of(band, expected)[0].numpy().ravel())[0, 1] > 0.98


def test_symmetric_contributions_are_the_mean_over_the_group() -> None:
    data = sample(asymmetric(6), BOX, 2, None)
    band = Band(BOX, 1.0, 6.0, None, "cpu")
    particles, shifts = torch.from_numpy(data.particles), torch.from_numpy(data.shifts).float()
    group = point_group("D2")
    together = Contributions(band, wedge_transfer(BOX, *WEDGE), group, "cpu").of(
        particles, torch.from_numpy(data.rotations.as_quat()).float(), shifts
    )
    one = Contributions(band, wedge_transfer(BOX, *WEDGE), Rotation.identity(1), "cpu")
    each = [one.of(particles, torch.from_numpy((data.rotations * g).as_quat()).float(), shifts) for g in group]
    for k in (0, 1):
        mean = torch.stack([e[k] for e in each]).mean(dim=0)
        torch.testing.assert_close(together[k], mean, rtol=1e-3, atol=1e-3 * float(mean.abs().max()))


@pytest.mark.parametrize("n", [16, 17])
def test_components_and_volumes_are_inverse(n: int) -> None:
    band = Band(n, 1.0, n / 2 - 0.5, None, "cpu")
    volume = asymmetric().volume(n)
    components = components_of(band, volume)
    torch.testing.assert_close(
        components_of(band, volume_of(band, components)[0].numpy()), components, rtol=1e-4, atol=1e-3
    )
    low = Band(n, 1.0, 3.0, None, "cpu")
    fine = volume_of(low, components_of(low, volume))[0]
    # A cropped sampling of half the side holds the same function: its voxels are every other one.
    if n == 16:
        torch.testing.assert_close(
            volume_of(low, components_of(low, volume), 8)[0], fine[::2, ::2, ::2], rtol=1e-3, atol=1e-5
        )


def test_the_average_is_centred() -> None:
    blobs = asymmetric(7)
    data = sample(blobs, BOX, 10, 1.0)
    off_centre = np.roll(prepare_reference(blobs.volume(BOX)), 3, axis=2)
    result = average(data.read, 10, SEARCH, iterations=1, reference=off_centre)
    # The first pass moved every particle by the reference's 3 voxels; the centre's shift takes that back.
    density = np.maximum(result.average - 0.25 * result.average.max(), 0)
    x = (density.sum(axis=(0, 1)) * (np.arange(BOX) - BOX // 2)).sum() / density.sum()
    assert abs(x) < 1.0


def test_pure_noise_claims_no_detail_beyond_the_joined_band() -> None:
    rng = np.random.default_rng(0)
    particles = rng.normal(size=(16, BOX, BOX, BOX)).astype(np.float32)
    result = average(lambda i, n: particles[i : i + n], 16, SEARCH, iterations=2, threads=2)
    assert result.resolution_angstrom > 0.8 * result.joined_angstrom


def test_what_can_not_be_averaged_is_refused() -> None:
    data = sample(asymmetric(), BOX, 3, 1.0)
    with pytest.raises(InvalidArgument, match="at least 2 particles"):
        average(data.read, 1, SEARCH)
    with pytest.raises(InvalidArgument, match="symmetry"):
        average(data.read, 3, SEARCH, symmetry="Q7")
    with pytest.raises(InvalidArgument, match="starting poses of 2"):
        average(data.read, 3, SEARCH, start=Poses(Rotation.identity(2), np.zeros((2, 3)), np.zeros(2)))
    broken = data.particles.copy()
    broken[2] = 1.0
    with pytest.raises(InvalidArgument, match="particle 12 is constant"):
        average(lambda i, n: broken[i : i + n], 3, SEARCH, names=np.array([10, 11, 12]))


def test_two_particles_are_enough() -> None:
    rotations = uniform_random(2, np.random.default_rng(1))
    blobs = asymmetric(8)
    particles = np.stack([blobs.volume(BOX, rotations[i]) for i in range(2)])
    result = average(lambda i, n: particles[i : i + n], 2, replace(SEARCH, transfer=None), iterations=2)
    # Without a common frame, the turn from one particle to the other is known all the same.
    found = result.poses.rotations[1] * result.poses.rotations[0].inv()
    assert np.degrees((found.inv() * rotations[1] * rotations[0].inv()).magnitude()) < 2
