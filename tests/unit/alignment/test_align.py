from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import Cancelled, InvalidArgument
from cryofleet.numerics.fourier import radial_frequency
from cryofleet.numerics.rotations import angular_distance_degrees, rotation_grid, uniform_random
from cryofleet.numerics.spectra import SpectrumTable, centred_rfft
from cryofleet.numerics.transfer import wedge_transfer
from services.alignment.align import Aligner, Poses, Search, align, prepare_reference, search_exhaustively
from services.alignment.band import Band, rotation_matrices, turn, turn_between
from services.alignment.refinement import _sums, _sums_by_tensors, correlations, refine
from services.alignment.rotational_matching import RotationalMatcher
from services.alignment.translation import ShiftSearch
from tests.unit.alignment.samples import WEDGE, Sample, asymmetric, observed, sample, symmetric

BOX = 32
SEEN = wedge_transfer(BOX, *WEDGE)
SEARCH = Search(BOX, 12.0, SEEN, max_candidates=30)


def align_sample(
    data: Sample, reference: NDArray[np.float32], search: Search = SEARCH
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Errors of the rotations in degrees and of the shifts in voxels, and the scores."""
    poses = align(data.read, len(data), reference, search)
    errors = angular_distance_degrees(data.rotations, poses.rotations)
    return errors, np.linalg.norm(poses.shifts - data.shifts, axis=1), poses.scores


def test_noise_free_poses_are_found_to_a_fraction_of_a_degree() -> None:
    blobs = asymmetric()
    errors, offsets, scores = align_sample(sample(blobs, BOX, 12, None), blobs.volume(BOX))
    assert np.median(errors) < 0.2
    assert errors.max() < 0.5
    assert offsets.max() < 0.05
    # All that X observes is explained; interpolation costs less than a percent.
    assert scores.min() > 0.99


def test_noisy_poses_are_found() -> None:
    blobs = asymmetric(2)
    errors, offsets, _ = align_sample(sample(blobs, BOX, 16, 0.1), blobs.volume(BOX))
    assert np.median(errors) < 2.0
    assert errors.max() < 10
    assert np.median(offsets) < 0.4


def test_poses_are_found_modulo_the_symmetry_of_the_reference() -> None:
    blobs = symmetric("D7")
    data = sample(blobs, BOX, 8, 0.1)
    poses = align(data.read, 8, blobs.volume(BOX), SEARCH)
    assert angular_distance_degrees(data.rotations, poses.rotations, "D7").max() < 6


def test_odd_boxes_and_boxes_without_a_wedge_work() -> None:
    blobs = asymmetric(3)
    data = sample(blobs, 25, 4, None, wedge=(-90.0, 90.0))
    errors, offsets, scores = align_sample(data, blobs.volume(25), Search(25, 10.0, None))
    assert errors.max() < 0.5
    assert offsets.max() < 0.05
    assert scores.min() > 0.99


def test_the_mirror_image_is_another_structure() -> None:
    blobs = asymmetric()
    data = sample(blobs, BOX, 4, None)
    mirrored = np.ascontiguousarray(np.roll(blobs.volume(BOX)[::-1], 1, axis=0))
    _, _, right = align_sample(data, blobs.volume(BOX))
    _, _, wrong = align_sample(data, mirrored)
    assert (right > wrong + 0.02).all()


def test_the_score_takes_only_what_the_particle_observes() -> None:
    blobs = asymmetric(4)
    rng = np.random.default_rng(0)
    particle = observed(blobs.volume(BOX), (-40.0, 50.0), None, rng)
    data = Sample(particle[None], Rotation.identity(1), np.zeros((1, 3)))
    _, _, within = align_sample(data, blobs.volume(BOX), Search(BOX, 12.0, wedge_transfer(BOX, -40.0, 50.0)))
    _, _, beyond = align_sample(data, blobs.volume(BOX), Search(BOX, 12.0, None))
    assert within[0] > 0.995
    # Taken as whole, the missing half of the particle lowers the correlation.
    assert beyond[0] < 0.95


def test_shifts_stay_within_their_limit() -> None:
    blobs = asymmetric()
    rng = np.random.default_rng(1)
    particle = observed(blobs.volume(BOX, None, np.array([3.0, 0.0, 0.0])), WEDGE, None, rng)
    limited = align(
        lambda i, n: particle[None],
        1,
        blobs.volume(BOX),
        Search(BOX, 12.0, SEEN, max_shift_voxels=1.0),
    )
    assert np.abs(limited.shifts).max() <= 1.0 + 1e-6
    none = align(
        lambda i, n: particle[None],
        1,
        blobs.volume(BOX),
        Search(BOX, 12.0, SEEN, max_shift_voxels=0.0),
    )
    assert np.abs(none.shifts).max() == 0


def test_a_ctf_is_part_of_the_model() -> None:
    """Particles whose every other shell is inverted fit a reference that is imaged alike, and no other."""
    blobs = asymmetric(3)
    radius = radial_frequency((BOX, BOX, BOX)) * BOX
    ctf = (np.cos(radius * 1.1) * SEEN).astype(np.float32)
    rng = np.random.default_rng(2)
    rotations, shifts = uniform_random(6, rng), rng.uniform(-2, 2, (6, 3))
    clean = np.stack([blobs.volume(BOX, rotations[i], shifts[i]) for i in range(6)])
    particles = np.fft.irfftn(np.fft.rfftn(clean, axes=(1, 2, 3)) * ctf, clean.shape[1:], axes=(1, 2, 3))
    data = Sample(particles.astype(np.float32), rotations, shifts)
    errors, offsets, scores = align_sample(data, blobs.volume(BOX), Search(BOX, 12.0, ctf, max_candidates=30))
    assert errors.max() < 1.0
    assert offsets.max() < 0.1
    assert scores.min() > 0.97
    _, _, blind = align_sample(data, blobs.volume(BOX))
    assert blind.max() < 0.8


def test_a_search_around_a_start_stays_there() -> None:
    blobs = symmetric("C4", seed=3)
    data = sample(blobs, BOX, 6, 0.5)
    turned = Rotation.from_rotvec([0, 0, np.pi / 2])
    near = Rotation.from_rotvec(np.radians([4.0, -3.0, 2.0]))
    start = Poses(near * data.rotations * turned, data.shifts + 1.0, np.zeros(6))
    search = replace(SEARCH, max_angle_degrees=12.0, max_shift_voxels=2.0)
    poses = align(data.read, 6, blobs.volume(BOX), search, start=start)
    # The very one of the four that look alike at which it started.
    assert angular_distance_degrees(data.rotations * turned, poses.rotations).max() < 4
    assert np.abs(poses.shifts - start.shifts).max() <= 2 + 1e-5
    assert np.linalg.norm(poses.shifts - data.shifts, axis=1).max() < 0.6
    frozen = align(data.read, 6, blobs.volume(BOX), replace(search, max_shift_voxels=0.0), start=start)
    np.testing.assert_allclose(frozen.shifts, start.shifts, atol=1e-5)


@pytest.mark.parametrize("limit", [0.0, 5.0])
def test_rotations_stay_within_their_limit(limit: float) -> None:
    """Starts 20 degrees off, further than a refinement climbs back: what it may not turn by stays as it is."""
    blobs = asymmetric(9)
    data = sample(blobs, BOX, 6, None)
    turns = np.random.default_rng(0).normal(size=(6, 3))
    turns *= np.radians(20) / np.linalg.norm(turns, axis=1, keepdims=True)
    start = Poses(Rotation.from_rotvec(turns) * data.rotations, data.shifts, np.zeros(6))
    search = replace(SEARCH, max_angle_degrees=limit)
    poses = align(data.read, 6, blobs.volume(BOX), search, start=start)
    away = np.degrees((poses.rotations * start.rotations.inv()).magnitude())
    assert away.max() <= limit + 1e-3
    errors = np.degrees((poses.rotations * data.rotations.inv()).magnitude())
    # As far towards the truth as the limit lets them: no other way of so many degrees leads as far.
    assert errors.max() < 20 - 0.8 * limit + 1e-3
    free = align(data.read, 6, blobs.volume(BOX), replace(search, max_angle_degrees=25.0), start=start)
    assert angular_distance_degrees(data.rotations, free.rotations).max() < 1


def test_shifts_are_refined_where_rotations_may_not_turn() -> None:
    """At the true rotation and no other, a shift between the points of the grid is found as well as with it free."""
    blobs = asymmetric(9)
    data = sample(blobs, BOX, 6, None)
    start = Poses(data.rotations, np.zeros((6, 3)), np.zeros(6))
    poses = align(data.read, 6, blobs.volume(BOX), replace(SEARCH, max_angle_degrees=0.0), start=start)
    assert np.degrees((poses.rotations * data.rotations.inv()).magnitude()).max() < 1e-3
    assert np.abs(poses.shifts - data.shifts).max() < 0.05


def test_the_shift_is_the_best_for_a_rotation_that_stopped_at_its_limit() -> None:
    """15 degrees off the truth turn and shift go together: the best shift is not that of the turn it may not take."""
    n = 32
    blobs = asymmetric(9)
    data = sample(blobs, n, 6, None)
    band = Band(n, 1.0, 8.0, wedge_transfer(n, *WEDGE), "cpu")
    table = SpectrumTable(torch.from_numpy(blobs.volume(n))[None], 8.0)
    spectra = band.of(centred_rfft(torch.from_numpy(data.particles)))
    turns = np.random.default_rng(0).normal(size=(6, 3))
    turns *= np.radians(15) / np.linalg.norm(turns, axis=1, keepdims=True)
    start = torch.from_numpy((Rotation.from_rotvec(turns) * data.rotations).as_quat()).float()
    shifts = torch.from_numpy(data.shifts).float()[:, None]
    found = refine(band, spectra, table, start[:, None], shifts, 8.0, 6, (start, 2.0))
    away = turn_between(start[:, None], found.quaternions).norm(dim=-1).rad2deg()
    torch.testing.assert_close(away, torch.full((6, 1), 2.0), rtol=0, atol=1e-3)
    for axis in range(3):
        for step in (-0.1, 0.1):
            moved = found.shifts.clone()
            moved[..., axis] += step
            assert (correlations(band, spectra, table, found.quaternions, moved) < found.scores).all()


def test_turns_between_rotations_lead_from_one_to_the_other() -> None:
    first, second = (uniform_random(50, np.random.default_rng(seed)) for seed in (1, 2))
    tensors = [torch.from_numpy(r.as_quat() * sign) for r, sign in ((first, 1), (second, -1))]
    found = turn_between(tensors[0], tensors[1])
    expected = (second * first.inv()).as_rotvec()
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)
    reached = turn(tensors[0], found)
    torch.testing.assert_close((reached * tensors[1]).sum(-1).abs(), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(turn_between(tensors[0], tensors[0]), torch.zeros(50, 3, dtype=torch.float64))


def test_candidates_of_a_symmetric_reference_differ_modulo_its_group() -> None:
    blobs = symmetric("D7")
    data = sample(blobs, BOX, 1, 0.2)
    aligner = Aligner(replace(SEARCH, symmetry="D7", max_candidates=12))
    references = aligner.references(torch.from_numpy(prepare_reference(blobs.volume(BOX)))[None])
    quaternions, found = aligner.candidates(torch.from_numpy(data.particles), references)
    rotations = Rotation.from_quat(quaternions[0][found[0]].double().numpy())
    for i in range(1, len(rotations)):
        assert angular_distance_degrees(rotations[i], rotations[:i], "D7").min() > 5
    assert angular_distance_degrees(data.rotations, rotations, "D7").min() < 6


def test_the_exhaustive_search_agrees() -> None:
    blobs = asymmetric(5)
    data = sample(blobs, 24, 2, 0.5)
    search = Search(24, 12.0, wedge_transfer(24, *WEDGE))
    poses = align(data.read, 2, blobs.volume(24), search)
    for i in range(2):
        slow = search_exhaustively(data.particles[i], blobs.volume(24), search, rotation_grid(12.0))
        # The best of a grid of 12 degrees lies within its covering radius, and never scores higher.
        assert angular_distance_degrees(slow.rotations, poses.rotations[i : i + 1])[0] < 12
        assert slow.scores[0] <= poses.scores[i] + 5e-3


def test_every_rotation_of_a_grid_leads_to_the_same_pose() -> None:
    """In place of the matching's candidates, and within a range of the start where there is one."""
    blobs = asymmetric()
    data = sample(blobs, BOX, 3, 0.5, wedge=WEDGE)
    search = replace(SEARCH, transfer=wedge_transfer(BOX, *WEDGE), exhaustive_step_degrees=20.0)
    quick = align(data.read, 3, blobs.volume(BOX), replace(search, exhaustive_step_degrees=None))
    slow = align(data.read, 3, blobs.volume(BOX), search)
    assert np.degrees((slow.rotations * quick.rotations.inv()).magnitude()).max() < 0.5
    away = Poses(Rotation.from_rotvec([0, 0, 1.0]) * data.rotations, data.shifts, np.zeros(3))
    kept = align(data.read, 3, blobs.volume(BOX), replace(search, max_angle_degrees=25.0), start=away)
    assert np.degrees((kept.rotations * away.rotations.inv()).magnitude()).max() <= 25 + 1e-3


def test_threads_do_not_change_the_result() -> None:
    blobs = asymmetric()
    data = sample(blobs, BOX, 9, 0.2)
    one = align(data.read, 9, blobs.volume(BOX), SEARCH, threads=1)
    two = align(data.read, 9, blobs.volume(BOX), SEARCH, threads=2)
    np.testing.assert_array_equal(one.rotations.as_quat(), two.rotations.as_quat())
    np.testing.assert_array_equal(one.shifts, two.shifts)


def test_progress_counts_and_stops() -> None:
    blobs = asymmetric()
    data = sample(blobs, BOX, 9, None)
    seen: list[float] = []

    def report(fraction: float, phase: str = "", **counters: float) -> None:
        seen.append(counters["particles"])
        if len(seen) == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        align(data.read, 9, blobs.volume(BOX), SEARCH, progress=report)
    assert seen == [4, 8]


# The parts


def test_rotational_correlation_is_the_sum_over_the_grid_of_the_particle() -> None:
    """Eq. 2, numerator and denominator, against sums over components with the rotated reference interpolated."""
    blobs = asymmetric(6)
    band = Band(24, 1.0, 5.0, wedge_transfer(24, *WEDGE), "cpu")
    matcher = RotationalMatcher(band)
    table = SpectrumTable(torch.from_numpy(blobs.volume(24))[None], matcher.reach, 6)
    model = matcher.model(table)
    particle = observed(blobs.volume(24, Rotation.from_rotvec([1.0, 0.3, 0.2])), WEDGE, 0.5, np.random.default_rng(0))
    magnitudes = band.of(centred_rfft(torch.from_numpy(particle)[None])).abs()
    found = matcher.correlation(magnitudes, model)[0].flatten()
    index = np.random.default_rng(1).integers(0, len(found), 200)
    matrices = rotation_matrices(matcher.grid.quaternions(torch.from_numpy(index)))
    rotated = table.rotated(band.points, matrices[None])[0].abs()
    # About the means over shells: of the particle's imaged components, of the reference's directions.
    shells = np.rint(2 * band.radius).astype(int)
    own = np.bincount(shells, magnitudes[0].numpy()) / np.maximum(np.bincount(shells), 1)
    directions = Rotation.random(4000, random_state=0).apply([0.0, 0.0, 1.0])
    radii = np.arange(1.0, 5.6, 0.5)
    points = torch.from_numpy((radii[:, None, None] * directions).reshape(-1, 3).astype(np.float32))
    of_shells = table.rotated(points, torch.eye(3)[None, None])[0, 0].abs().view(len(radii), -1).mean(1)
    rotated = rotated - torch.from_numpy(np.interp(band.radius, radii, of_shells.numpy())).float()
    numerator = (rotated * (magnitudes - torch.from_numpy(own[shells]).float())).sum(-1)
    expected = numerator / (rotated * rotated).sum(-1).sqrt()
    # Equal but for the cut of the expansion and what lies between shells.
    assert float((found[index] - expected).std()) < 0.06 * float(expected.std())
    assert float((found[index] * expected).sum() / expected.square().sum()) == pytest.approx(1, abs=0.05)


def test_neither_noise_nor_wedges_draw_rotations_together() -> None:
    """Two boxes of noise, both wedged: their magnitudes match best anywhere, not where the wedges overlap."""
    n, transfer = 24, wedge_transfer(24, *WEDGE)
    matcher = RotationalMatcher(Band(n, 1.0, 7.0, transfer, "cpu"), None, transfer)
    rng = np.random.default_rng(5)
    overlapping = []
    for _ in range(12):
        a, b = (
            centred_rfft(
                torch.from_numpy(observed(rng.normal(size=(n,) * 3).astype(np.float32), WEDGE, None, rng))[None]
            )
            for _ in range(2)
        )
        table = SpectrumTable(torch.fft.fftshift(torch.fft.irfftn(b, s=(n,) * 3, dim=(1, 2, 3)), dim=(1, 2, 3)), 8.0)
        values = matcher.correlation(matcher.band.of(a).abs(), matcher.model(table))[0].flatten()
        best = matcher.grid.quaternions(values.argmax()[None]).double().numpy()[0]
        overlapping.append(np.degrees(Rotation.from_quat(best).magnitude()) < 30)
    # 30 degrees about the identity are 0.4 % of all rotations; there and at its mirror the wedges lie on one another.
    assert sum(overlapping) <= 1


def test_candidates_hold_the_true_rotation_among_the_first() -> None:
    blobs = asymmetric(7)
    data = sample(blobs, BOX, 6, None)
    aligner = Aligner(SEARCH)
    references = aligner.references(torch.from_numpy(prepare_reference(blobs.volume(BOX)))[None])
    quaternions, found = aligner.candidates(torch.from_numpy(data.particles), references)
    for i in range(6):
        candidates = Rotation.from_quat(quaternions[i][found[i]].double().numpy())
        # Magnitudes don't tell a structure from its inversion, so the first few may be wrong.
        assert angular_distance_degrees(data.rotations[i], candidates[:5]).min() < 6


def test_the_shift_search_follows_the_convention() -> None:
    n = 24
    band = Band(n, 1.0, 6.0, wedge_transfer(n, *WEDGE), "cpu")
    volume = asymmetric().volume(n)
    shifts = np.array([[2.0, -1.0, 3.5], [0.3, 0.7, -2.2]])
    moved = torch.from_numpy(np.stack([asymmetric().volume(n, None, s) for s in shifts]))
    still = band.of(centred_rfft(torch.from_numpy(volume)[None]))
    products = band.of(centred_rfft(moved)) * still.conj()
    found, value = ShiftSearch(band, 5.0).best(products)
    np.testing.assert_allclose(found.numpy(), shifts, atol=0.15)
    # At the peak every product has phase 0.
    np.testing.assert_allclose(value.numpy(), products.abs().sum(-1).numpy(), rtol=0.03)


def test_derivatives_are_those_of_the_score() -> None:
    n = 24
    band = Band(n, 1.0, 5.0, wedge_transfer(n, *WEDGE), "cpu")
    blobs = asymmetric(8)
    table = SpectrumTable(torch.from_numpy(blobs.volume(n))[None], 5.0, 4)
    data = band.of(
        centred_rfft(
            torch.from_numpy(
                np.stack([blobs.volume(n), blobs.volume(n, uniform_random(1, np.random.default_rng(0))[0])])
            )
        )
    )
    quaternions = torch.from_numpy(uniform_random(6, np.random.default_rng(1)).as_quat()).float().view(2, 3, 4)
    shifts = torch.randn((2, 3, 3), generator=torch.Generator().manual_seed(0))
    compiled = _sums(band, data, table, rotation_matrices(quaternions), shifts)
    tensors = _sums_by_tensors(band, data, table, rotation_matrices(quaternions), shifts)
    for name in ("norm", "overlap", "gram", "along", "towards"):
        expected = getattr(tensors, name)
        torch.testing.assert_close(
            getattr(compiled, name), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )


def test_refinement_climbs_back_from_a_few_degrees_and_a_voxel() -> None:
    n = 32
    blobs = asymmetric(9)
    data = sample(blobs, n, 6, None)
    band = Band(n, 1.0, 8.0, wedge_transfer(n, *WEDGE), "cpu")
    table = SpectrumTable(torch.from_numpy(blobs.volume(n))[None], 8.0)
    spectra = band.of(centred_rfft(torch.from_numpy(data.particles)))
    rng = np.random.default_rng(0)
    turns = rng.normal(size=(6, 3))
    turns *= np.radians(4) / np.linalg.norm(turns, axis=1, keepdims=True)
    start = torch.from_numpy((Rotation.from_rotvec(turns) * data.rotations).as_quat()).float()[:, None]
    shifts = torch.from_numpy(data.shifts + rng.uniform(-0.8, 0.8, (6, 3))).float()[:, None]
    before = correlations(band, spectra, table, start, shifts)
    result = refine(band, spectra, table, start, shifts, 8.0, 6)
    errors = angular_distance_degrees(data.rotations, Rotation.from_quat(result.quaternions[:, 0].double().numpy()))
    assert errors.max() < 0.3
    assert np.abs(result.shifts[:, 0].numpy() - data.shifts).max() < 0.05
    assert (result.scores > before).all()
    torch.testing.assert_close(
        result.scores, correlations(band, spectra, table, result.quaternions, result.shifts), rtol=1e-4, atol=1e-5
    )


def test_a_band_holds_one_of_each_pair_within_wedge_and_limits() -> None:
    band = Band(16, 2.0, 6.0, wedge_transfer(16, *WEDGE), "cpu")
    points = {tuple(p) for p in band.points.long().tolist()}
    assert len(points) == len(band)
    assert not any((-x, -y, -z) in points for x, y, z in points)
    radii = np.sqrt([x * x + y * y + z * z for x, y, z in points])
    assert radii.min() == 2.0
    assert radii.max() == 6.0
    assert (5, 0, -3) in points  # -31 degrees
    assert (2, 0, -5) not in points  # -68 degrees
    assert (2, 0, 5) in points  # +68 degrees


# What can't work


def read_of(particles: NDArray[np.float32]) -> Sample:
    return Sample(particles, Rotation.identity(len(particles)), np.zeros((len(particles), 3)))


def test_a_constant_or_broken_particle_is_named() -> None:
    reference = asymmetric().volume(16)
    particles = np.random.default_rng(0).normal(size=(3, 16, 16, 16)).astype(np.float32)
    particles[1] = 4.0
    names = np.array([70, 71, 72])
    search = Search(16, 10.0, wedge_transfer(16, *WEDGE))
    with pytest.raises(InvalidArgument, match="particle 71 is constant"):
        align(read_of(particles).read, 3, reference, search, names=names)
    particles[1] = 0
    particles[2, 3, 3, 3] = np.nan
    particles[1, 0, 0, 0] = 1
    with pytest.raises(InvalidArgument, match="particle 72 holds values that are not finite"):
        align(read_of(particles).read, 3, reference, search, names=names)
    with pytest.raises(InvalidArgument, match=r"particle 70 is a box of \(16, 16, 16\)"):
        align(
            read_of(particles).read,
            3,
            asymmetric().volume(24),
            Search(24, 10.0, wedge_transfer(24, *WEDGE)),
            names=names,
        )


def test_a_reference_that_can_not_work_is_refused() -> None:
    particles = read_of(np.random.default_rng(0).normal(size=(2, 16, 16, 16)).astype(np.float32))
    search = Search(16, 10.0, wedge_transfer(16, *WEDGE))
    with pytest.raises(InvalidArgument, match="reference is constant"):
        align(particles.read, 2, np.ones((16, 16, 16), np.float32), search)
    with pytest.raises(InvalidArgument, match="boxes of 16 voxels"):
        align(particles.read, 2, asymmetric().volume(24), search)
    with pytest.raises(InvalidArgument, match="not finite"):
        align(particles.read, 2, np.full((16, 16, 16), np.nan, np.float32), search)


@pytest.mark.parametrize(
    ("search", "words"),
    [
        (Search(16, 10.0, wedge_transfer(24, *WEDGE)), r"boxes of 16 voxels need \(16, 16, 9\)"),
        (Search(16, 10.0, np.zeros((16, 16, 9), np.float32)), "nothing was imaged"),
        (Search(16, 10.0, symmetry="X3"), "symmetry 'X3'"),
        (Search(16, 10.0, wedge_transfer(16, *WEDGE), low_pass_angstrom=150.0), "low_pass_angstrom"),
        (Search(16, 10.0, wedge_transfer(16, *WEDGE), high_pass_angstrom=30.0), "high_pass_angstrom"),
        (Search(4, 10.0), "too small"),
        (Search(16, 0.0, wedge_transfer(16, *WEDGE)), "voxel_size_angstrom"),
    ],
)
def test_a_search_that_can_not_work_is_refused(search: Search, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        search.check()
