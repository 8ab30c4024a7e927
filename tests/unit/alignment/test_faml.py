"""FAML: every part against sums over all poses done the slow way, and the whole on particles whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import radial_frequency
from cryofleet.numerics.masks import soft_sphere
from cryofleet.numerics.rotations import (
    angular_distance_degrees,
    frame_between,
    point_group,
    rotation_grid,
    uniform_random,
)
from cryofleet.numerics.spectra import SpectrumTable, centred_rfft
from cryofleet.numerics.transfer import wedge_transfer
from services.alignment import expectation as expectations
from services.alignment import faml, likelihood_model
from services.alignment.align import Poses, Search, align, prepare_reference, standardise
from services.alignment.array_files import pack, unpack
from services.alignment.band import Band
from services.alignment.expectation import Expectation
from services.alignment.likelihood_model import Task
from services.alignment.pose_grid import PoseGrid, memory_bytes
from services.alignment.reconstruction import noise_share
from services.alignment.sufficient_statistics import Posterior, Statistics
from services.alignment.voronoi import VoronoiWeights
from tests.unit.alignment.samples import Blobs, Sample, asymmetric, observed, sample, symmetric

BOX, VOXEL = 24, 12.0
WEDGE = (-60.0, 60.0)
SEEN = wedge_transfer(BOX, *WEDGE)
TASK = Task(Search(BOX, VOXEL, SEEN, max_shift_voxels=2.0, low_pass_angstrom=40.0), 220.0)


def particles_of(data: Sample, sign: float = 1.0) -> faml.Particles:
    count = len(data)
    return faml.Particles(data.read, np.arange(100, 100 + count), np.arange(count) % 2, sign)


def mixed(first: Blobs, second: Blobs, counts: tuple[int, int], snr: float) -> tuple[Sample, NDArray[np.int64]]:
    one = sample(first, BOX, counts[0], snr, seed=1, wedge=WEDGE)
    two = sample(second, BOX, counts[1], snr, seed=2, wedge=WEDGE)
    order = np.random.default_rng(3).permutation(sum(counts))
    rotations = Rotation.concatenate([one.rotations, two.rotations])[order]
    boxes = np.concatenate([one.particles, two.particles])[order]
    return Sample(boxes, rotations, np.concatenate([one.shifts, two.shifts])[order]), np.repeat([0, 1], counts)[order]


# Integrals


def test_voronoi_cells_are_shares_of_the_rotations() -> None:
    """Four turns about z by 0, 90, 180 and 270 degrees have equal cells; a fifth close to the first halves its cell."""
    turns = Rotation.from_rotvec(np.array([[0, 0, a] for a in (0, np.pi / 2, np.pi, -np.pi / 2, 0.01)]))
    quaternions = torch.from_numpy(turns.as_quat()).float()[None]
    found = torch.tensor([[True, True, True, True, False]])
    weights = VoronoiWeights(0).of(quaternions, torch.zeros(1, 5, 3), found)
    np.testing.assert_allclose(weights[0].numpy(), [0.25, 0.25, 0.25, 0.25, 0], atol=4 * math.sqrt(0.19 / 10_000))
    weights = VoronoiWeights(0).of(quaternions, torch.zeros(1, 5, 3), torch.ones(1, 5, dtype=torch.bool))
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights[0, 0] + weights[0, 4]) == pytest.approx(0.25, abs=0.02)


def test_voronoi_cells_take_shifts_into_account() -> None:
    """One rotation at two shifts two voxels apart: each has half of the box between them."""
    quaternions = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(1, 2, 4)
    shifts = torch.tensor([[[-1.0, 0, 0], [1.0, 0, 0]]])
    weights = VoronoiWeights(1).of(quaternions, shifts, torch.ones(1, 2, dtype=torch.bool))
    np.testing.assert_allclose(weights[0].numpy(), 0.5, atol=4 * math.sqrt(0.25 / 10_000))


def direct_transform(volumes: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.complex128]:
    """F(k) = sum_r f(r) exp(-2 pi i k (r - c) / n), term by term; of each of several volumes (.., n, n, n)."""
    n = volumes.shape[-1]
    r = np.arange(n) - n // 2
    z, y, x = np.meshgrid(r, r, r, indexing="ij")
    phase = points @ np.stack([x.ravel(), y.ravel(), z.ravel()])
    result: NDArray[np.complex128] = volumes.reshape(*volumes.shape[:-3], -1) @ np.exp(-2j * np.pi / n * phase).T
    return result


def test_the_likelihood_of_the_grid_is_the_sum_over_components() -> None:
    band = Band(BOX, 1.0, 5.0, SEEN, "cpu", np.linspace(3.0, 1.0, BOX // 2 + 1))
    grid = PoseGrid(band, 30.0, 2.0, coarser=False)
    reference = asymmetric(2).volume(BOX)
    data = band.of(centred_rfft(torch.from_numpy(sample(asymmetric(2), BOX, 1, 0.5).particles)))[0]
    found = grid.likelihoods(SpectrumTable(torch.from_numpy(reference)[None], band.k_max, 6), data)
    assert found.values.shape == (len(grid.quaternions), len(grid.shifts))
    rng = np.random.default_rng(0)
    points = band.points.numpy().astype(np.float64)
    whitening = 1 / np.linspace(3.0, 1.0, BOX // 2 + 1)[np.rint(band.radius).astype(int)]
    for row, column in zip(rng.integers(0, len(found.values), 8), rng.integers(0, len(grid.shifts), 8), strict=True):
        turn = Rotation.from_quat(grid.quaternions[row].double().numpy())
        model = direct_transform(reference.astype(np.float64), turn.inv().apply(points)) * whitening
        model *= np.exp(-2j * np.pi / BOX * points @ grid.shifts[column].double().numpy())
        expected = 2 * (data.numpy() * model.conj()).real.sum() - np.square(np.abs(model)).sum()
        # The table interpolates to a percent of the model's amplitude.
        assert float(found.values[row, column]) == pytest.approx(expected, abs=0.02 * np.square(np.abs(model)).sum())


def test_two_passes_over_a_grid_keep_its_maximum() -> None:
    blobs = asymmetric(3)
    data = sample(blobs, BOX, 6, 0.2, wedge=WEDGE)
    band = Band(BOX, 1.0, 8.0, SEEN, "cpu", np.full(BOX // 2 + 1, 100.0))
    table = SpectrumTable(torch.from_numpy(prepare_reference(blobs.volume(BOX)) * 2)[None], band.k_max, 4)
    whole, twice = (PoseGrid(band, 10.0, 2.0, coarser=coarser) for coarser in (False, True))
    for particle in band.of(centred_rfft(torch.from_numpy(standardise(data.particles)))):
        every, some = whole.likelihoods(table, particle), twice.likelihoods(table, particle)
        assert len(some.rotations) < 0.5 * len(every.rotations)
        torch.testing.assert_close(some.values, every.values[some.rotations], rtol=1e-4, atol=1e-2)
        # Or one beside it that is as good to a fiftieth: particles are noisy, and the grid is coarse.
        assert float(some.values.max()) > 0.98 * float(every.values.max())


@pytest.mark.parametrize(("k_max", "limit"), [(5.0, 3.0), (8.0, 2.5), (4.0, 0.7), (6.0, 0.0)])
def test_a_grid_reaches_the_largest_shift_along_every_axis(k_max: float, limit: float) -> None:
    """To the corners of a cube, evenly, in steps of at most 1/2.7 of a period of the finest detail."""
    shifts = PoseGrid(Band(BOX, 1.0, k_max, None, "cpu"), 30.0, limit, coarser=False).shifts.double().numpy()
    sides = [np.unique(shifts[:, axis].round(5)) for axis in range(3)]
    assert len(shifts) == math.prod(len(side) for side in sides)
    for side in sides:
        np.testing.assert_allclose(side[[0, -1]], [-limit, limit], atol=1e-5)
        assert 0.0 in side
        steps = np.diff(side)
        assert (steps <= BOX / (2.7 * k_max) + 1e-5).all()
        np.testing.assert_allclose(steps, steps[:1].repeat(len(steps)), atol=1e-4)


def test_memory_of_a_grid_covers_what_it_holds() -> None:
    band = Band(BOX, 1.0, 8.0, None, "cpu")
    grid = PoseGrid(band, 12.0, 3.0, "C2")
    held = grid._phases.numel() * 8 + len(grid.quaternions) * len(grid.shifts) * 4
    assert held < memory_bytes(BOX, band.k_max, 12.0, 3.0, "C2", 1)
    more = [memory_bytes(BOX, 8.0, 12.0, shift, "C2", 1) for shift in (1.0, 3.0, 6.0)]
    assert more == sorted(more)


def test_shifts_at_the_corner_of_their_range_are_found() -> None:
    data = sample(asymmetric(1), BOX, 4, 1.0, wedge=WEDGE)
    shifts = np.array([[3.0, 3.0, -3.0], [-3.0, 3.0, 3.0], [3.0, -3.0, 3.0], [-3.0, -3.0, -3.0]])
    rng = np.random.default_rng(0)
    boxes = [observed(asymmetric(1).volume(BOX, data.rotations[i], shifts[i]), WEDGE, 1.0, rng) for i in range(4)]
    corner = Sample(np.stack(boxes), data.rotations, shifts)
    task = replace(TASK, search=replace(TASK.search, max_shift_voxels=3.0), candidates="grid")
    state = faml.begin(task, 4, Poses(data.rotations, shifts, np.zeros(4)), np.arange(4) % 2)
    for _ in range(2):
        state = faml.advance(state, *faml.sums_of(state, particles_of(corner)))
    np.testing.assert_allclose(state.posterior.shifts[:, 0], shifts, atol=1e-3)


# One iteration, against the integrals summed up pose by pose


def tiny() -> tuple[Task, faml.State, NDArray[np.float32]]:
    n = 8
    rng = np.random.default_rng(4)
    volumes = [asymmetric(seed, 4).volume(n) for seed in (1, 2)]
    boxes = np.stack([volumes[i % 2] + 0.15 * rng.normal(size=(n, n, n)) for i in range(6)]).astype(np.float32)
    transfer = wedge_transfer(n, *WEDGE)
    # All in one half set and joined at all resolutions, so that the averages are those of the paper.
    task = Task(
        Search(n, VOXEL, transfer, max_shift_voxels=1.0, low_pass_angstrom=33.0), 80.0, 2, "grid", 35.0, 1.0, seed=5
    )
    return task, faml.begin(task, 6, halves=np.zeros(6, np.int64)), boxes


def test_cells_of_a_symmetric_reference_do_not_depend_on_the_copies() -> None:
    """Of rotations that look alike, any one stands for all: the shares stay what they are."""
    group = point_group("D7")
    members = torch.from_numpy(group.as_quat()).float()
    rotations = Rotation.random(6, random_state=2)
    copies = rotations * group[np.random.default_rng(0).integers(0, len(group), 6)]
    shifts, found = torch.zeros(1, 6, 3), torch.ones(1, 6, dtype=torch.bool)
    weights = VoronoiWeights(0, group=members)
    one = weights.of(torch.from_numpy(rotations.as_quat()).float()[None], shifts, found)
    other = weights.of(torch.from_numpy(copies.as_quat()).float()[None], shifts, found)
    np.testing.assert_allclose(one, other, atol=1e-3)
    # Without the group they do depend on them, by far more than sampling does.
    blind = VoronoiWeights(0)
    apart = [blind.of(torch.from_numpy(r.as_quat()).float()[None], shifts, found) for r in (rotations, copies)]
    assert float((apart[0] - apart[1]).abs().max()) > 0.03


def test_the_sums_hold_as_much_noise_as_is_said() -> None:
    """Noise of the sums of boxes of nothing else, cut to a sphere, against `noise_share`; no power is seen in it."""
    count, n = 32, 24
    boxes = standardise(np.random.default_rng(0).normal(size=(count, n, n, n)).astype(np.float32))
    task = Task(Search(n, VOXEL, wedge_transfer(n, *WEDGE)), 0.6 * n * VOXEL)
    particles = faml.Particles(lambda i, c: boxes[i : i + c], np.arange(count), faml.random_halves(count, 0))
    state = faml.begin(task, count)
    state = faml.advance(state, *faml.sums_of(state, particles))
    model = state.model
    assert model is not None
    shell = likelihood_model.shells(Band(n, 1.0, model.k_reach, None, "cpu"))
    seen = model.weights[:, 0].sum(axis=0) > 0.1 * count
    expected = noise_share(n) * model.variance[shell] * model.weights[:, 0].sum(axis=0)
    # Hundreds of components, neighbours correlated by the sphere.
    assert np.mean((np.abs(model.sums[:, 0].sum(axis=0)) ** 2 / expected)[seen]) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("count", [2, 3])
def test_few_clear_particles_have_an_average(count: int) -> None:
    data = sample(asymmetric(1), BOX, count, 0.5, wedge=WEDGE)
    result = faml.faml(TASK, particles_of(data), iterations=3)
    assert np.ptp(result.volumes[0]) > 1
    assert result.model.power[0].any()


def test_an_iteration_is_the_sum_over_all_poses(monkeypatch: pytest.MonkeyPatch) -> None:
    """8^3 boxes, two classes, every rotation of a grid and every shift: posteriors (eqs. 14, 15) and the updates of
    A, alpha, sigma and xi (10 to 13) against loops over poses with exact transforms."""
    monkeypatch.setattr(expectations, "KEPT_POSES", 100_000)
    monkeypatch.setattr(expectations, "angular_step_degrees", lambda k_max, radius: 45.0)
    task, state, boxes = tiny()
    transfer = task.search.transfer
    assert transfer is not None
    particles = faml.Particles(lambda i, count: boxes[i : i + count], np.arange(6), state.halves)
    state = faml.advance(state, *faml.sums_of(state, particles))
    assert state.model is not None
    # Late enough for particles to change their classes.
    model = replace(state.model, iteration=expectations.SPLIT_ITERATIONS)
    step = Expectation(task, model)
    grid = step._grid
    assert grid is not None
    grid._coarse = None
    standard = standardise(boxes)
    statistics, posterior = step.of(standard, state.halves, state.posterior)

    # The references as the expectation has them: each without its particle's own part.
    references = step._references(torch.from_numpy(standard), torch.zeros(6, dtype=torch.int64), state.posterior)
    points = step.band.points.numpy().astype(np.float64)
    wide = step.wide.points.numpy().astype(np.float64)
    data = step.band.of(centred_rfft(torch.from_numpy(standard))).numpy().astype(np.complex128)
    whitening = 1 / step.deviation[np.rint(step.band.radius).astype(int)]
    rotations = Rotation.from_quat(grid.quaternions.double().numpy())
    shifts = grid.shifts.double().numpy()
    mask = soft_sphere(8, 8 / 2 - 2, 2.0).astype(np.float64)
    seen = np.fft.rfftn(np.fft.ifftshift(standard, axes=(1, 2, 3)), axes=(1, 2, 3)) * transfer
    masked = np.fft.fftshift(np.fft.irfftn(seen, (8, 8, 8), axes=(1, 2, 3)), axes=(1, 2, 3))
    observed = np.fft.fftshift(np.fft.irfftn(transfer, (8, 8, 8), axes=(0, 1, 2))) * mask

    sums = np.zeros((2, len(wide)), np.complex128)
    weights = np.zeros((2, len(wide)))
    shares, residual, squared = np.zeros(2), 0.0, 0.0
    # The reference's own sampling may be coarser than the box: k counts cycles per box in either.
    turned = [direct_transform(references.double().numpy(), r.inv().apply(points)) for r in rotations]
    moves = np.exp(-2j * np.pi / 8 * shifts @ points.T)
    posteriors = np.zeros((6, 2, len(rotations), len(shifts)))
    centres, backs = np.zeros((6, 2, 3)), np.zeros((6, 2, 8, 8, 8))
    for i in range(6):
        logs = np.zeros((2, len(rotations), len(shifts)))
        apart = np.zeros_like(logs)
        for k in range(2):
            for r in range(len(rotations)):
                m = turned[r][i, k] * whitening * moves
                apart[k, r] = np.square(np.abs(data[i] - m)).sum(axis=1)
                logs[k, r] = -apart[k, r] - np.square(shifts).sum(axis=1) / (2 * model.xi_voxels**2)
            logs[k] += math.log(model.alpha[k])
        p = np.exp(logs - logs.max())
        p /= p.sum()
        posteriors[i] = p
        shares += p.sum(axis=(1, 2))
        squared += (p * np.square(shifts).sum(axis=1)).sum()
        residual += (p * apart).sum()
        middle = (p.sum(axis=(0, 1))[:, None] * shifts).sum(axis=0)
        for k in range(2):
            own = p[k].sum()
            centre = (p[k].sum(axis=0)[:, None] * shifts).sum(axis=0) / own
            moved = np.fft.rfftn(np.fft.ifftshift(masked[i]))
            kz, ky, kx = np.meshgrid(*[np.fft.fftfreq(8)] * 2, np.fft.rfftfreq(8), indexing="ij")
            moved = moved * np.exp(2j * np.pi * (kx * centre[0] + ky * centre[1] + kz * centre[2]))
            backs[i, k] = np.fft.fftshift(np.fft.irfftn(moved, (8, 8, 8), axes=(0, 1, 2))) * mask
            centres[i, k] = centre
        assert np.isfinite(middle).all()
    for r in range(len(rotations)):
        there = rotations[r].apply(wide)
        values, cover = direct_transform(backs, there), direct_transform(observed, there).real.clip(0)
        for i in range(6):
            for k in range(2):
                phases = np.exp(2j * np.pi / 8 * there @ (shifts - centres[i, k]).T)
                sums[k] += values[i, k] * (phases @ posteriors[i, k, r])
                weights[k] += cover * posteriors[i, k, r].sum()

    found = posterior.responsibilities(2).sum(axis=0)
    np.testing.assert_allclose(found, shares, atol=0.1)
    np.testing.assert_allclose(statistics.responsibilities.sum(axis=0), shares, atol=0.1)
    assert statistics.squared_shift == pytest.approx(squared, rel=0.03)
    whitened = (statistics.residuals / np.square(step.deviation)).sum()
    assert whitened == pytest.approx(residual, rel=0.02)
    scale = np.abs(sums).max()
    assert np.abs(statistics.sums.sum(axis=0) - sums).max() < 0.05 * scale
    assert np.abs(statistics.weights.sum(axis=0) - weights).max() < 0.05 * weights.max()

    after = likelihood_model.maximise(task, model, statistics)
    np.testing.assert_allclose(after.alpha, shares / 6, atol=0.01)
    assert after.xi_voxels == pytest.approx(max(math.sqrt(squared / 18), likelihood_model.LEAST_SHIFT_VOXELS), rel=0.02)


def test_the_papers_update_moves_to_ours() -> None:
    """Eq. 10, A <- (S + (N - W) A) / N, again and again, ends at S / W, and fills what nobody saw from the model."""
    rng = np.random.default_rng(0)
    weights = np.array([0.0, 0.5, 3.0, 9.0, 10.0])
    sums = weights * rng.normal(size=5)
    filling = np.full(5, 7.0)
    paper = filling.copy()
    for _ in range(2000):
        paper = (sums + (10 - weights) * paper) / 10
    np.testing.assert_allclose(paper[1:], sums[1:] / weights[1:], rtol=1e-9)
    assert paper[0] == 7.0
    ours = likelihood_model.averages(
        torch.from_numpy(sums)[None],
        torch.from_numpy(weights)[None],
        torch.tensor([10.0], dtype=torch.float64),
        torch.from_numpy(filling)[None],
        torch.zeros(1, 5, dtype=torch.float64),
    )[0].numpy()
    covered = weights >= likelihood_model.LEAST_COVERAGE * 10
    np.testing.assert_allclose(ours[covered], (sums / np.maximum(weights, 1e-9))[covered])
    assert ours[0] == 7.0


def test_similar_classes_are_drawn_to_their_mean() -> None:
    values = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    counts = torch.tensor([10.0, 10.0], dtype=torch.float64)
    result = likelihood_model.averages(values * 10, torch.full((2, 1), 10.0), counts, values * 0, values * 0, 0.5)
    # (N a A_k + l sum A) / (N a + K l), l = lambda N / K = 5
    np.testing.assert_allclose(result[:, 0], [(10 + 20) / 20, (30 + 20) / 20])
    # It falls linearly to nothing.
    task = replace(TASK, classes=2, similarity=0.5)
    falling = [likelihood_model.similarity_at(task, i) for i in (0, 5, likelihood_model.SIMILAR_ITERATIONS, 15)]
    np.testing.assert_allclose(falling, [0.5, 0.25, 0, 0])


# All of it


def errors_of(data: Sample, poses: Poses, symmetry: str = "C1") -> NDArray[np.float64]:
    frame = frame_between(data.rotations, poses.rotations, symmetry)
    return angular_distance_degrees(data.rotations, poses.rotations * frame, symmetry)


@pytest.mark.parametrize("candidates", ["matching", "grid", "auto"])
def test_noisy_particles_find_one_another(candidates: Any) -> None:
    data = sample(asymmetric(1), BOX, 24, 0.1, wedge=WEDGE)
    result = faml.faml(replace(TASK, candidates=candidates), particles_of(data), iterations=10, threads=2)
    errors = errors_of(data, result.poses)
    # The grid alone is no finer than its step.
    assert np.median(errors) < (5 if candidates == "matching" else 12)
    assert errors.max() < 30
    history = result.model.history
    assert history[1].log_evidence > history[0].log_evidence
    assert result.model.converged
    np.testing.assert_allclose(result.probabilities, 1, atol=1e-6)


def test_particles_leave_the_pose_they_began_in() -> None:
    """At the identity all are in one frame with the average; each is compared without its own part, and leaves."""
    data = sample(asymmetric(1), 32, 20, 0.1, wedge=WEDGE)
    task = replace(TASK, search=Search(32, 9.0, wedge_transfer(32, *WEDGE), max_shift_voxels=3.0))
    start = Poses(Rotation.identity(20), np.zeros((20, 3)), np.zeros(20))
    before = np.median(errors_of(data, start))
    first = faml.faml(task, particles_of(data), iterations=1, start=start, threads=2)
    assert (np.degrees(first.poses.rotations.magnitude()) > 10).sum() >= 18
    last = faml.faml(task, particles_of(data), iterations=8, start=start, threads=2)
    assert before > 30
    assert np.median(errors_of(data, last.poses)) < 5


def test_two_structures_are_told_apart_and_counted() -> None:
    data, truth = mixed(asymmetric(1), asymmetric(9), (20, 10), 0.2)
    result = faml.faml(replace(TASK, classes=2), particles_of(data), iterations=9, threads=2)
    agreement = (result.classes == truth).mean()
    assert max(agreement, 1 - agreement) == 1.0
    np.testing.assert_allclose(sorted(result.model.alpha), [1 / 3, 2 / 3], atol=0.02)
    assert result.volumes.shape == (2, BOX, BOX, BOX)


def test_classes_that_nobody_is_in_stay_and_are_reported() -> None:
    data = sample(asymmetric(1), BOX, 12, 0.5, wedge=WEDGE)
    result = faml.faml(replace(TASK, classes=4), particles_of(data), iterations=6, threads=2)
    assert np.isfinite(result.volumes).all()
    assert np.isfinite(result.half_volumes).all()
    for done in result.model.history:
        assert sum(done.sizes) == pytest.approx(12)
        assert math.isfinite(done.log_evidence)
    assert min(result.model.history[-1].sizes) < 1


def test_a_point_group_is_imposed() -> None:
    data = sample(symmetric("C4", 3), BOX, 16, 0.2, wedge=WEDGE)
    task = replace(TASK, search=replace(TASK.search, symmetry="C4"))
    result = faml.faml(task, particles_of(data), iterations=6, threads=2)
    volume = result.volumes[0]
    quarter = np.rot90(volume[:, 1:, 1:], axes=(1, 2))
    assert np.corrcoef(quarter.ravel(), volume[:, 1:, 1:].ravel())[0, 1] > 0.99


def test_a_ctf_is_undone() -> None:
    blobs = asymmetric(3)
    ctf = (np.cos(radial_frequency((BOX, BOX, BOX)) * BOX * 1.1) * SEEN).astype(np.float32)
    rng = np.random.default_rng(2)
    rotations, shifts = uniform_random(24, rng), rng.uniform(-1, 1, (24, 3))
    clean = np.stack([blobs.volume(BOX, rotations[i], shifts[i]) for i in range(24)])
    noisy = np.fft.irfftn(np.fft.rfftn(clean, axes=(1, 2, 3)) * ctf, clean.shape[1:], axes=(1, 2, 3))
    noisy += rng.normal(size=noisy.shape) * noisy.std() * 1.5
    data = Sample(noisy.astype(np.float32), rotations, shifts)
    start = Poses(rotations, shifts, np.zeros(24))
    task = replace(TASK, search=replace(TASK.search, transfer=ctf))
    result = faml.faml(task, particles_of(data), iterations=2, start=start, threads=2)
    assert np.median(errors_of(data, result.poses)) < 4
    blind = faml.faml(TASK, particles_of(data), iterations=1, start=start, threads=2)
    truth = blobs.volume(BOX)[None]
    found, unaware = (
        align(lambda i, count: truth, 1, r.volumes[0], Search(BOX, VOXEL)).scores[0] for r in (result, blind)
    )
    assert found > 0.9
    assert found > unaware + 0.2


def test_shards_give_what_the_whole_gives() -> None:
    data = sample(asymmetric(2), BOX, 11, 0.3, wedge=WEDGE)
    particles = particles_of(data, sign=-1.0)
    data.particles[:] *= -1
    whole = faml.begin(replace(TASK, classes=2), 11)
    parts = whole
    for _ in range(3):
        whole = faml.advance(whole, *faml.sums_of(whole, particles, threads=2))
        found = [(a, faml.sums_of(parts, particles, range(a, b))) for a, b in ((0, 4), (4, 8), (8, 11))]
        # As the tasks of a cluster pass them on.
        written = [(a, unpack(pack(faml.sums_to_arrays(parts, a, *sums)), "part")) for a, sums in found]
        read = [faml.read_sums(parts, a, arrays, "part") for a, arrays in written]
        total = read[0][0] + read[1][0] + read[2][0]
        parts = faml.advance(parts, total, Posterior.together([p for _, p in read]))
        parts = faml.State.from_arrays(unpack(pack(parts.to_arrays()), "state"), "state")
    assert whole.model is not None
    assert parts.model is not None
    np.testing.assert_allclose(parts.model.sums, whole.model.sums, atol=1e-9 * np.abs(whole.model.sums).max())
    np.testing.assert_allclose(parts.model.variance, whole.model.variance, rtol=1e-9)
    assert parts.model.history[-1].sizes == pytest.approx(whole.model.history[-1].sizes, rel=1e-9)
    np.testing.assert_array_equal(parts.posterior.classes[:, 0], whole.posterior.classes[:, 0])
    np.testing.assert_allclose(parts.posterior.quaternions[:, 0], whole.posterior.quaternions[:, 0], atol=1e-6)


def test_the_same_seed_gives_the_same_result() -> None:
    data = sample(asymmetric(2), BOX, 8, 0.3, wedge=WEDGE)
    one = faml.faml(TASK, particles_of(data), iterations=2, threads=1)
    two = faml.faml(TASK, particles_of(data), iterations=2, threads=2)
    np.testing.assert_array_equal(one.volumes, two.volumes)
    other = faml.faml(replace(TASK, seed=1), particles_of(data), iterations=2, threads=2)
    assert not np.array_equal(one.volumes, other.volumes)


# Bad input


def test_broken_particles_are_named() -> None:
    data = sample(asymmetric(2), BOX, 4, 0.3)
    data.particles[2, 0, 0, 0] = np.nan
    with pytest.raises(InvalidArgument, match="particle 102 holds values that are not finite"):
        faml.faml(TASK, particles_of(data), iterations=1)
    data.particles[2] = 3.0
    with pytest.raises(InvalidArgument, match="particle 102 is constant"):
        faml.faml(TASK, particles_of(data), iterations=1)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (replace(TASK, diameter_angstrom=400.0), "particle_diameter_angstrom 400: must lie in 0 to the box, 288"),
        (replace(TASK, classes=0), "classes 0"),
        (replace(TASK, classes=5), "classes 5: there are only 4 particles"),
        (replace(TASK, similarity=-1.0), "similarity -1"),
        (replace(TASK, search=replace(TASK.search, symmetry="Q")), "symmetry 'Q'"),
        (replace(TASK, search=replace(TASK.search, transfer=np.zeros((24, 24, 13), np.float32))), "nothing was imaged"),
    ],
)
def test_a_task_that_can_not_work_is_refused(task: Task, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        faml.begin(task, 4)


def test_fewer_than_two_particles_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least 2 particles"):
        faml.begin(TASK, 1)


def test_states_and_sums_of_something_else_are_refused() -> None:
    data = sample(asymmetric(2), BOX, 4, 0.3)
    state = faml.begin(TASK, 4)
    sums, posterior = faml.sums_of(state, particles_of(data))
    later = faml.advance(state, sums, posterior)
    arrays = later.to_arrays()
    for name, broken in (
        ("model.sums", arrays["model.sums"][:, :, :-1]),
        ("model.variance", arrays["model.variance"] * np.nan),
        ("posterior.classes", arrays["posterior.classes"] + np.int16(1)),
        ("halves", arrays["halves"] + 2),
        ("task", np.frombuffer(b"{}", np.uint8)),
    ):
        with pytest.raises(InvalidArgument, match="x is no state"):
            faml.State.from_arrays({**arrays, name: broken}, "x")
    with pytest.raises(InvalidArgument, match="sums over 3 particles, and there are 4"):
        faml.advance(state, Statistics(**{**vars(sums), "count": 3.0}), posterior)
    written = faml.sums_to_arrays(state, 0, sums, posterior)
    without = {name: array for name, array in written.items() if not name.startswith("posterior.")}
    with pytest.raises(InvalidArgument, match="y holds no sums of this run"):
        faml.read_sums(state, 0, without, "y")
    with pytest.raises(InvalidArgument, match="y holds no sums of this run: sums over 4 particles, poses of 3"):
        faml.read_sums(state, 0, faml.sums_to_arrays(state, 0, sums, posterior.rows(slice(3))), "y")


def test_sums_of_other_rows_or_another_state_are_refused() -> None:
    data = sample(asymmetric(2), BOX, 4, 0.3)
    state = faml.begin(TASK, 4)
    found = {a: faml.sums_of(state, particles_of(data), range(a, a + 2)) for a in (0, 2)}
    written = {a: faml.sums_to_arrays(state, a, *sums) for a, sums in found.items()}
    kept = faml.State.from_arrays(unpack(pack(state.to_arrays()), "state"), "state")
    assert len(faml.read_sums(kept, 2, written[2], "y")[1]) == 2
    with pytest.raises(InvalidArgument, match="y holds the particles from row 2 on: those from row 0 on are missing"):
        faml.read_sums(state, 0, written[2], "y")
    sums = found[0][0] + found[2][0]
    later = faml.advance(state, sums, Posterior.together([posterior for _, posterior in found.values()]))
    again = faml.sums_of(later, particles_of(data), range(2))
    assert len(faml.read_sums(later, 0, faml.sums_to_arrays(later, 0, *again), "y")[1]) == 2
    # Of the same shapes, these would pass but for what they say of themselves.
    with pytest.raises(InvalidArgument, match="y holds sums of iteration -1, and the state is of 0"):
        faml.read_sums(later, 0, {**faml.sums_to_arrays(later, 0, *again), "iteration": np.array(-1)}, "y")
    other = faml.begin(replace(TASK, seed=1), 4)
    with pytest.raises(InvalidArgument, match="y holds sums that were made with another state"):
        faml.read_sums(other, 0, written[0], "y")


def test_a_grid_of_a_group_holds_each_rotation_once() -> None:
    band = Band(BOX, 1.0, 4.0, None, "cpu")
    assert len(PoseGrid(band, 20.0, 1.0, "D2").quaternions) == len(rotation_grid(20.0, "D2"))
