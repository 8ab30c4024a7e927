import io
import math
import zipfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import fsc, shell_sums
from cryofleet.numerics.masks import soft_sphere
from cryofleet.numerics.rotations import angular_distance_degrees, frame_between, point_group, uniform_random
from cryofleet.numerics.transfer import wedge_transfer
from cryofleet.v1 import alignment_pb2
from services.alignment.align import Poses, Search, prepare_reference
from services.alignment.array_files import pack, unpack
from services.alignment.average import Averaged, average, begin, finish
from services.alignment.average_expectation import _Expectation, expect
from services.alignment.average_model import Helix, Job, Mask, Model, Options, Statistics
from services.alignment.average_update import joint_map, update
from services.alignment.band import Band
from services.alignment.helical import Cylinder, HelicalSymmetry, helical_correlation
from services.alignment.reconstruction import Contributions, components_of, divide, volume_of
from services.alignment.rejection import BELOW_MEDIAN, KEPT, LOWEST, NO_SIGNAL, Rejection, rejected
from services.alignment.symmetry_axes import find_axes
from tests.unit.alignment.samples import WEDGE, Blobs, Sample, asymmetric, observed, sample, symmetric

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
    states: list[Model] = []
    result = average(data.read, 20, search, iterations=4, start=start, threads=2, checkpoint=states.append)
    first = np.degrees(Rotation.from_quat(states[1].quaternions).magnitude())
    assert (first > 5).sum() >= 18
    assert np.median(errors_of(data, result.poses.rotations)) < np.median(errors_of(data, start.rotations)) / 2


def run(data: Sample, **options: object) -> Averaged:
    return average(data.read, len(data), SEARCH, iterations=2, seed=5, **options)  # type: ignore[arg-type]


def test_a_resumed_run_and_other_threads_end_in_the_same_bytes() -> None:
    data = sample(asymmetric(3), BOX, 7, 0.5)
    states: list[Model] = []
    whole = run(data, checkpoint=states.append)
    assert [s.iteration for s in states] == [0, 1, 2]
    for state in states:
        again = run(data, resume=Model.from_arrays(state.to_arrays()), threads=2)
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
    states: list[Model] = []
    start = Poses(data.rotations, data.shifts, np.zeros(10))
    result = average(data.read, 10, SEARCH, iterations=1, start=start, checkpoint=states.append)
    np.testing.assert_allclose(states[0].quaternions, data.rotations.as_quat(), atol=1e-6)
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
    with pytest.raises(InvalidArgument, match="half set 2 has no particle"):
        average(data.read, 3, SEARCH, halves=np.ones(3, np.int64))
    with pytest.raises(InvalidArgument, match="1 or 2 of each of the 3 particles"):
        average(data.read, 3, SEARCH, halves=np.arange(3))
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


# Parts of a run


JOB = Job(replace(SEARCH, transfer=None), seed=5)
NAMES = np.arange(100)


def test_shards_and_files_between_them_change_nothing() -> None:
    data = sample(asymmetric(3), BOX, 9, 0.5)
    options = Options(rejection=Rejection(lowest_share=0.25, signal_deviations=1.0))
    reference = asymmetric(3).volume(BOX)
    whole = run(data, options=options, reference=reference)

    def kept(model: Model) -> Model:
        return Model.from_arrays(unpack(pack(model.to_arrays()), "model"))

    def sharded(size: int) -> Averaged:
        job = replace(JOB, options=options)
        model = kept(begin(job, 9, data.read, transfer=SEARCH.transfer, reference=reference))
        for _ in range(3):
            parts = [expect(model, data.read, NAMES, range(i, min(i + size, 9))) for i in range(0, 9, size)]
            files = [pack(part.to_arrays()) for part in parts]
            model = kept(update(model, [Statistics.from_arrays(unpack(f, "part"), len(job.band())) for f in files]))
        return finish(model)

    once = sharded(9)
    assert once.average.tobytes() == whole.average.tobytes()
    assert once.table() == whole.table()
    # Batches are cut elsewhere, and sums are added up in another order.
    split = sharded(2)
    # Poses that differ as little as is asked below move the steepest slopes by several times this.
    np.testing.assert_allclose(split.average, whole.average, atol=1e-3 * np.abs(whole.average).max())
    np.testing.assert_allclose(split.poses.shifts, whole.poses.shifts, atol=0.01)
    assert angular_distance_degrees(split.poses.rotations, whole.poses.rotations).max() < 0.1
    assert split.left_out == whole.left_out
    assert sum(not reason for reason in whole.left_out) == 7
    model = begin(JOB, 9, data.read, reference=reference)
    late = expect(model, data.read, NAMES, range(3, 5))
    with pytest.raises(InvalidArgument, match="row 0 on are missing"):
        update(model, [late])


def test_the_average_without_a_particle_is_that_of_the_others() -> None:
    data = sample(asymmetric(3), BOX, 6, 1.0)
    start = Poses(data.rotations, data.shifts + 1.5, np.zeros(6))
    model = begin(JOB, 6, data.read, transfer=SEARCH.transfer, poses=start)
    whole = update(model, [expect(model, data.read, NAMES)])
    # The average lies off its centre, and is moved there.
    assert np.abs(whole.move).max() > 0.5
    leaving = np.zeros(6, np.int8)
    leaving[2] = LOWEST
    others = replace(model, leaving=leaving)
    others = update(others, [expect(others, data.read, NAMES)])
    rows = np.array([2])
    step = _Expectation(whole, "cpu")
    boxes = torch.from_numpy((data.particles[2:3] - data.particles[2].mean()) / data.particles[2].std())
    poses = [torch.from_numpy(a[rows]).float() for a in (whole.quaternions, whole.shifts)]
    found = step._without(rows, boxes, (poses[0], poses[1]))[0].numpy()
    half = int(others.halves[2]) - 1
    band = others.job.band().below(whole.k_max + 1.5)
    counts = others.counts()
    joined = band.radius <= others.job.k_joined
    sums, weights = others.sums[:, : len(band)], others.weights[:, : len(band)]
    every = sums.sum(axis=0) / np.maximum(weights.sum(axis=0), 0.1 * sum(counts))
    own = sums[half] / np.maximum(weights[half], 0.1 * counts[half])
    expected = np.where(joined, every, own)
    assert 0 < joined.mean() < 1
    # Rounding of single precision, times how little of a component may be left in the weight.
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_run_ends_when_nothing_changes() -> None:
    data = sample(asymmetric(3), BOX, 6, None)
    result = average(data.read, 6, SEARCH, iterations=15, reference=asymmetric(3).volume(BOX))
    assert result.converged
    assert 3 <= len(result.iterations) < 15


def test_the_first_low_pass_can_be_chosen() -> None:
    data = sample(asymmetric(3), BOX, 4, 1.0)
    start = Poses(data.rotations, data.shifts, np.zeros(4))
    for options, expected in ((Options(start_low_pass_angstrom=96.0), 96.0), (Options(), BOX * 12 / 5)):
        result = average(data.read, 4, SEARCH, iterations=1, start=start, options=options)
        assert result.iterations[0].low_pass_angstrom == pytest.approx(expected)


def test_sharpening_raises_what_the_b_factor_says() -> None:
    data = sample(asymmetric(3), BOX, 6, 1.0)
    models: list[Model] = []
    reference = asymmetric(3).volume(BOX)
    plain = average(data.read, 6, SEARCH, iterations=1, reference=reference, checkpoint=models.append)
    job = models[-1].job
    sharp = finish(replace(models[-1], job=replace(job, options=Options(b_factor_angstrom2=-4000.0))))
    unfiltered = joint_map(models[-1])
    before, after = (
        np.sqrt(shell_sums(np.abs(scipy.fft.rfftn(v.astype(np.float64))) ** 2, BOX))
        for v in (unfiltered, sharp.average)
    )
    for shell in (2, 3, 4):
        correlation = sharp.curves.corrected[shell]
        expected = math.sqrt(2 * correlation / (1 + correlation)) * math.exp(4000 / 4 * (shell / (BOX * 12)) ** 2)
        # A shell's components differ by half a shell in frequency.
        assert after[shell] / before[shell] == pytest.approx(expected, rel=0.1)
    assert sharp.table()["b_factor_angstrom2"] == -4000
    assert "b_factor_angstrom2" not in plain.table()


def test_the_table_has_all_curves() -> None:
    data = sample(asymmetric(3), BOX, 8, 1.0)
    start = Poses(data.rotations, data.shifts, np.zeros(8))
    table: dict[str, Any] = average(data.read, 8, SEARCH, iterations=1, start=start).table()
    curves = {name: np.array(table[name]) for name in ("fsc", "fsc_masked", "fsc_randomised", "fsc_unmasked")}
    assert {len(c) for c in curves.values()} == {BOX // 2 + 1}
    assert (curves["fsc"] <= curves["fsc_masked"] + 1e-9).mean() > 0.7
    assert table["resolution_angstrom"] < table["randomised_from_angstrom"]


# Masks


def test_a_given_mask_is_what_a_sphere_of_its_radius_is() -> None:
    # With D2 there is nothing to centre, which is not done under a given mask.
    data = sample(symmetric("D2"), BOX, 6, 1.0)
    radius = 100.0
    start = Poses(data.rotations, data.shifts, np.zeros(6))
    volume = soft_sphere(BOX, radius / 12, 2.0)
    options = Options(mask=Mask("given"))
    common: dict[str, Any] = {"iterations": 1, "symmetry": "D2", "start": start}
    given = average(data.read, 6, SEARCH, mask=volume, options=options, **common)
    sphere = average(data.read, 6, SEARCH, options=Options(mask=Mask("sphere", radius)), **common)
    np.testing.assert_allclose(given.iterations[0].mean_score, sphere.iterations[0].mean_score, rtol=1e-5)
    np.testing.assert_allclose(given.curves.masked, sphere.curves.masked, atol=1e-4)
    plain = average(data.read, 6, SEARCH, **common)
    assert abs(given.iterations[0].mean_score - plain.iterations[0].mean_score) > 1e-3
    assert given.mask == "given"
    assert sphere.mask == "soft sphere of radius 100 Å"


def test_a_mask_keeps_neighbours_out() -> None:
    """Each box has another bright particle beside its own, in a place of its own."""
    blobs = asymmetric(4)
    data = sample(blobs, BOX, 12, 2.0, wedge=(-60.0, 60.0))
    rng = np.random.default_rng(3)
    crowded = data.particles.copy()
    for i in range(12):
        direction = rng.normal(size=3)
        centre = 0.44 * direction / np.linalg.norm(direction)
        neighbour = Blobs(centre[None], np.array([0.05]), np.array([3.0])).volume(BOX)
        crowded[i] += observed(neighbour, (-60.0, 60.0), None, rng)
    search = replace(SEARCH, transfer=wedge_transfer(BOX, -60.0, 60.0))
    start = Poses(data.rotations * Rotation.from_rotvec([0.3, 0.2, 0.0]), data.shifts, np.zeros(12))

    def boxes(first: int, count: int) -> NDArray[np.float32]:
        return crowded[first : first + count]

    def reached(mask: Mask) -> Averaged:
        return average(boxes, 12, search, iterations=2, start=start, options=Options(mask=mask), threads=2)

    masked, own = reached(Mask("sphere", 0.3 * BOX * 12)), reached(Mask("auto"))
    assert np.median(errors_of(data, masked.poses.rotations)) < 8
    assert own.mask == "made from the average"
    # The particle, and little of what is around it.
    inside = own.curves.masked[1:4]
    assert (inside > 0.5).all()


def test_an_automatic_mask_of_noise_is_the_sphere_and_says_so() -> None:
    rng = np.random.default_rng(0)
    particles = rng.normal(size=(6, BOX, BOX, BOX)).astype(np.float32)
    start = Poses(Rotation.identity(6), np.zeros((6, 3)), np.zeros(6))
    model = begin(replace(JOB, options=Options(mask=Mask("auto"))), 6, lambda i, n: particles[i : i + n], poses=start)
    model = update(model, [expect(model, lambda i, n: particles[i : i + n], NAMES)])
    assert "no particle stood out" in finish(model).mask


# Rejection


def test_rules_of_rejection_by_hand() -> None:
    halves = np.array([1, 2] * 10, dtype=np.int32)
    scores = np.linspace(0.5, 0.6, 20)
    scores[[4, 7]] = 0.1
    signals = np.full(20, 5.0)
    signals[10] = -0.3
    found = rejected(Rejection(lowest_share=0.2), halves, scores, signals)
    assert np.flatnonzero(found == LOWEST).tolist() == [0, 1, 4, 7]
    assert np.bincount(halves[found != KEPT]).tolist() == [0, 2, 2]
    found = rejected(Rejection(score_deviations=4.0), halves, scores, signals)
    assert np.flatnonzero(found == BELOW_MEDIAN).tolist() == [4, 7]
    found = rejected(Rejection(signal_deviations=2.0), halves, scores, signals)
    assert np.flatnonzero(found == NO_SIGNAL).tolist() == [10]
    # However much is asked for, half of each half set stays, the best.
    found = rejected(Rejection(signal_deviations=100.0), halves, scores, signals)
    assert np.bincount(halves[found == KEPT]).tolist() == [0, 5, 5]
    assert scores[found == KEPT].min() > np.median(scores)
    assert (rejected(Rejection(), halves, scores, signals) == KEPT).all()
    assert (rejected(Rejection(0.5), halves[:4], scores[:4], signals[:4]) == KEPT).all()


def test_planted_junk_is_found_and_said() -> None:
    data = sample(asymmetric(1), BOX, 20, 0.15, wedge=(-60.0, 60.0))
    rng = np.random.default_rng(5)
    transfer = wedge_transfer(BOX, -60.0, 60.0)
    junk = [1, 6, 10, 15]
    mixed = data.particles.copy()
    for i in junk:
        noise = scipy.fft.rfftn(rng.normal(size=(BOX,) * 3)) * transfer
        mixed[i] = scipy.fft.irfftn(noise, (BOX,) * 3)
    result = average(
        lambda i, n: mixed[i : i + n],
        20,
        replace(SEARCH, transfer=transfer),
        iterations=3,
        options=Options(rejection=Rejection(signal_deviations=2.5)),
        threads=2,
    )
    assert np.flatnonzero(~result.kept).tolist() == junk
    assert result.signals is not None
    # Of noise, however well it was fitted: within three deviations of 0.
    assert np.abs(result.signals[junk]).max() < 3
    table: dict[str, Any] = result.table(100 + np.arange(20))
    assert [r["id"] for r in table["rejected"]] == [101, 106, 110, 115]
    assert all("signal below 2.5 deviations" in r["reason"] for r in table["rejected"])
    assert table["particles"] == 16
    assert table["iterations"][-1]["rejected"] == 4
    good = np.flatnonzero(result.kept)
    frame = frame_between(data.rotations[good], result.poses.rotations[good])
    assert np.median(angular_distance_degrees(data.rotations[good], result.poses.rotations[good] * frame)) < 5


# Helices


HELIX = HelicalSymmetry(27.0, 65.0)
VOXEL = 7.5


def filament(rotation: Rotation, shift: NDArray[np.float64]) -> NDArray[np.float32]:
    """A helix of Gaussians, longer than its box of 32 voxels."""
    subunit = np.array([(40.0, 0.0, 0.0, 9.0, 1.0), (25.0, 30.0, 8.0, 7.0, 0.8), (48.0, -20.0, -6.0, 7.0, 0.7)])
    steps = np.arange(-8, 9)
    radius, azimuth, height, width, weight = subunit.T[:, :, None]
    angle = np.radians(azimuth + steps * HELIX.twist_degrees)
    places = [radius * np.cos(angle), radius * np.sin(angle), height + steps * HELIX.rise_angstrom]
    blobs = Blobs(
        np.stack(places, axis=-1).reshape(-1, 3) / (32 * VOXEL),
        np.broadcast_to(width, angle.shape).ravel() / (32 * VOXEL),
        np.broadcast_to(weight, angle.shape).ravel(),
    )
    return blobs.volume(32, rotation, shift)


def test_a_helix_is_put_upright_refined_and_imposed() -> None:
    rng = np.random.default_rng(1)
    count = 10
    angles = np.stack([rng.uniform(0, 360, count), rng.uniform(75, 105, count), rng.uniform(0, 360, count)], axis=1)
    rotations = Rotation.from_euler("zyz", angles, degrees=True)
    shifts = rng.uniform(-2, 2, (count, 3))
    boxes = [observed(filament(rotations[i], shifts[i]), (-60.0, 60.0), 0.1, rng) for i in range(count)]
    particles = np.stack(boxes)
    # In a frame where the filament leans by 25 degrees, each pose a little off.
    lean = Rotation.from_euler("y", 25, degrees=True)
    start = Poses(rotations * lean * Rotation.from_rotvec(rng.normal(0, 0.05, (count, 3))), shifts, np.zeros(count))
    search = Search(32, VOXEL, wedge_transfer(32, -60.0, 60.0), max_candidates=15)
    # Three percent and two degrees off.
    given = Helix(HelicalSymmetry(27.8, 63.0), outer_radius_angstrom=75.0)
    result = average(
        lambda i, n: particles[i : i + n], count, search, iterations=2, start=start, options=Options(helix=given)
    )
    assert result.helix is not None
    assert result.helix.rise_angstrom == pytest.approx(HELIX.rise_angstrom, rel=0.015)
    assert result.helix.twist_degrees == pytest.approx(HELIX.twist_degrees, abs=1.0)
    axes, truth = result.poses.rotations.apply([0, 0, 1]), rotations.apply([0, 0, 1])
    assert np.median(np.degrees(np.arccos(np.abs((axes * truth).sum(axis=1)).clip(max=1)))) < 4
    cylinder = Cylinder(75.0)
    # The halves are as they were averaged, the map has the helix.
    imposed = helical_correlation(result.average, HELIX, VOXEL, cylinder, low_pass_angstrom=25)
    plain = helical_correlation(result.half_maps[0], HELIX, VOXEL, cylinder, low_pass_angstrom=25)
    assert imposed > 0.95
    assert plain < 0.95 * imposed
    table: dict[str, Any] = result.table()
    assert table["rise_angstrom"] == result.helix.rise_angstrom
    assert {"rise_angstrom", "twist_degrees"} <= set(table["iterations"][0])


def test_what_is_no_helix_is_refused() -> None:
    data = sample(asymmetric(), BOX, 3, 1.0)
    helix = Helix(HelicalSymmetry(30.0, 40.0))
    with pytest.raises(InvalidArgument, match="symmetry C4 and a helix"):
        average(data.read, 3, SEARCH, symmetry="C4", options=Options(helix=helix))
    with pytest.raises(InvalidArgument, match="rise_angstrom 150"):
        average(data.read, 3, SEARCH, options=Options(helix=Helix(HelicalSymmetry(150.0, 40.0))))
    with pytest.raises(InvalidArgument, match="at least 2 iterations"):
        average(data.read, 3, SEARCH, iterations=1, options=Options(rejection=Rejection(0.1)))
    with pytest.raises(InvalidArgument, match="radius_angstrom"):
        average(data.read, 3, SEARCH, options=Options(mask=Mask("cylinder")))
    with pytest.raises(InvalidArgument, match="belong together"):
        average(data.read, 3, SEARCH, options=Options(mask=Mask("given")))


# Files


def test_files_that_are_no_models_are_refused() -> None:
    data = sample(asymmetric(3), BOX, 4, 1.0)
    options = Options(helix=Helix(HelicalSymmetry(30.0, 40.0)), rejection=Rejection(0.1, 3.0, 1.0))
    start = Poses(data.rotations, data.shifts, np.zeros(4))
    model = begin(replace(JOB, options=options), 4, data.read, transfer=SEARCH.transfer, poses=start)
    arrays = model.to_arrays()
    assert Model.from_arrays(arrays).job == model.job

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(InvalidArgument, match=message):
            Model.from_arrays({**arrays, **changes}, "it")

    refused("it is no model", more=np.zeros(1))
    refused("it: shifts is", shifts=np.zeros((3, 3)))
    refused("it: scores holds values that are not finite", scores=np.full(4, np.nan))
    refused("halves must be 1 or 2", halves=np.array([1, 2, 3, 1]))
    refused("it: transfer is", transfer=np.zeros((3, 3, 3)))
    refused("does not fit its sums", scalars=np.array([3.0, 5.0, 0.0]))
    refused("it is no model", scalars=np.array([np.inf, 5.0, 0.0]))
    refused("it is no model", job=np.frombuffer(b'{"search": 3}', np.uint8))
    refused("helix", helix=np.zeros(0))
    huge = arrays["job"].tobytes().replace(b'"box_size": 24', b'"box_size": 99999')
    refused("it", job=np.frombuffer(huge, np.uint8), sums=np.zeros((2, 5)), weights=np.zeros((2, 5)))
    part = expect(model, data.read, NAMES).to_arrays()
    with pytest.raises(InvalidArgument, match="sums holds values"):
        Statistics.from_arrays({**part, "sums": np.full_like(part["sums"], np.inf)}, part["sums"].shape[1])
    with pytest.raises(InvalidArgument, match="weights is"):
        Statistics.from_arrays({**part, "weights": part["weights"][:, 1:]}, part["sums"].shape[1])


def test_files_that_are_no_arrays_are_refused() -> None:
    def archive(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as file:
            file.writestr("a.npy", content)
        return buffer.getvalue()

    def saved(array: NDArray[Any], allow_pickle: bool = False) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=allow_pickle)
        return buffer.getvalue()

    whole = saved(np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(unpack(archive(whole), "f")["a"], np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(unpack(archive(saved(np.asfortranarray(np.eye(3)))), "f")["a"], np.eye(3))
    many = whole.replace(b"(2, 3)", b"(9, 9)")
    for content in (
        b"no archive",
        archive(b"no array"),
        archive(whole[:-3]),
        archive(many),
        archive(saved(np.array([{"a": 1}], dtype=object), allow_pickle=True)),
        archive(saved(np.zeros(10**6)), zipfile.ZIP_DEFLATED),
    ):
        with pytest.raises(InvalidArgument, match="f is no file of arrays"):
            unpack(content, "f")


def test_an_averaging_takes_the_same_whole_or_in_tasks() -> None:
    whole = {f.name: f for f in alignment_pb2.AverageRequest.DESCRIPTOR.fields}
    start = {f.name: f for f in alignment_pb2.AverageStartRequest.DESCRIPTOR.fields}
    assert set(whole) - set(start) == {"iterations"}
    assert set(start) <= set(whole)
    for name, field in start.items():
        assert field.number == whole[name].number
        assert field.GetOptions() == whole[name].GetOptions(), name
