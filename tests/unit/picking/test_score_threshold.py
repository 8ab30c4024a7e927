"""The background's distribution and the threshold that lets a number of its peaks pass; peaks of maps; hands."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition
from cryofleet.numerics.rotations import rotation_grid
from services.picking.score_peaks import peaks
from services.picking.score_threshold import background, compare_hands
from services.picking.template import Template, sphere
from services.picking.template_matching import Tomogram, layout, pieces, search, survey


def mixture(
    rng: np.random.Generator, noise: int, structured: int, particles: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Heights of background and of particles."""
    tail = rng.normal(0.08, 0.006, structured) + rng.exponential(0.015, structured)
    return np.concatenate([rng.normal(0.08, 0.006, noise), tail]), rng.normal(0.3, 0.03, particles)


@pytest.mark.parametrize(("structured", "particles"), [(0, 0), (1500, 0), (1500, 60)])
def test_as_many_false_positives_as_asked_for_within_a_factor_of_two(structured: int, particles: int) -> None:
    asked = (10.0, 30.0, 100.0)
    passed = np.zeros((2, len(asked)))
    for seed in range(2):
        below, above = mixture(np.random.default_rng(seed), 4000, structured, particles)
        fitted = background(np.concatenate([below, above]))
        for index, count in enumerate(asked):
            threshold = fitted.threshold(count)
            assert fitted.false_positives(threshold) == pytest.approx(count, rel=1e-6)
            passed[seed, index] = (below >= threshold).sum()
            assert (above >= threshold).all()
        assert fitted.particles_expected == pytest.approx(particles, rel=0.15, abs=0.02 * fitted.peaks)
    means = passed.mean(axis=0)
    assert (means >= np.array(asked) / 2).all()
    assert (means <= 2 * np.array(asked)).all()


def test_other_kinds_of_complexes_are_background() -> None:
    rng = np.random.default_rng(3)
    below, above = mixture(rng, 4000, 400, 60)
    others = rng.normal(0.18, 0.015, 80)
    fitted = background(np.concatenate([below, others, above]))
    assert fitted.particles is not None
    assert fitted.particles.mean == pytest.approx(0.3, abs=0.01)
    for asked in (20, 60, 120):
        passed = (np.concatenate([below, others]) >= fitted.threshold(asked)).sum()
        assert asked / 2 <= passed <= 2 * asked
    # Halfway between the kinds all of the lower one are below, and under it all are above.
    assert fitted.others_above(0.24) < 1
    assert fitted.others_above(0.13) == pytest.approx(80, rel=0.25)
    assert fitted.others_above(0.13) <= fitted.false_positives(0.13)


def test_a_few_background_peaks_below_many_particles_are_told_apart() -> None:
    """As after a refinement of candidates, most of which are particles."""
    rng = np.random.default_rng(4)
    below, above = rng.normal(0.1, 0.01, 150), rng.normal(0.3, 0.03, 400)
    fitted = background(np.concatenate([below, above]))
    assert fitted.particles_expected == pytest.approx(400, rel=0.1)
    assert (above >= fitted.threshold(1)).mean() > 0.99
    assert (below >= fitted.threshold(1)).sum() <= 3


def test_noise_alone_passes_about_as_many_peaks_as_expected() -> None:
    """The whole search on noise, with another noise's density for a template."""
    rng = np.random.default_rng(0)
    volume = rng.standard_normal((72, 84, 90)).astype(np.float32)
    template = Template((rng.standard_normal((8, 8, 8)) * sphere(8, 2.5)).astype(np.float32), sphere(8, 3))
    tomogram = Tomogram(lambda a, b: volume[a:b], volume.shape, *survey(lambda a, b: volume[a:b], volume.shape))
    rotations = rotation_grid(50)
    plan = layout(volume.shape, 8, disturbed=False, mask_turns=False, variants=1)
    scores = np.zeros(volume.shape, np.float32)
    count, squares = 0, 0.0
    for match in search(tomogram, [template], rotations, plan, pieces(plan, len(rotations))):
        scores[tuple(slice(a, b) for a, b in zip(match.tile.start, match.tile.stop, strict=True))] = match.scores[0]
        count, squares = count + match.count, squares + match.squares
    # the deviation of a correlation with white noise over so many voxels
    assert np.sqrt(squares / count) == pytest.approx(1 / np.sqrt(template.mask.sum()), rel=0.1)
    found = peaks(lambda a, b: scores[a:b], volume.shape, 3.0)
    fitted = background(found.heights)
    for asked in (15, 50, 150):
        assert asked / 2 <= (found.heights >= fitted.threshold(asked)).sum() <= 2 * asked


def test_too_few_or_equal_peaks_are_an_error() -> None:
    with pytest.raises(FailedPrecondition, match="49 separate peaks, too few"):
        background(np.linspace(0, 1, 49))
    with pytest.raises(FailedPrecondition, match="equally high"):
        background(np.ones(100))


def test_hands_are_told_apart_only_where_they_differ() -> None:
    rng = np.random.default_rng(1)
    higher, lower = (np.sort(rng.normal(mean, 0.02, 60))[::-1] for mean in (0.3, 0.25))
    assert compare_hands(higher, lower, 40).hand == "as given"
    assert compare_hands(lower, higher, 40).hand == "mirrored"
    assert compare_hands(higher, higher + 0.001, 40).hand == "undecided"
    assert compare_hands(higher[:1], lower, 40).hand == "undecided"


def test_peaks_are_separated_and_slabs_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    scores = rng.random((30, 31, 32)).astype(np.float32)
    whole = peaks(lambda a, b: scores[a:b], scores.shape, 4.5)
    monkeypatch.setattr("services.picking.score_peaks.READ_BYTES", 4 * 31 * 32 * 3)
    slabs = peaks(lambda a, b: scores[a:b], scores.shape, 4.5)
    assert np.array_equal(whole.positions, slabs.positions)
    assert np.array_equal(whole.heights, slabs.heights)
    assert (np.diff(whole.heights) <= 0).all()
    gaps = np.linalg.norm(whole.positions[:, None] - whole.positions[None], axis=2)
    assert gaps[np.triu_indices(len(gaps), 1)].min() >= 4.5
    x, y, z = whole.positions[0]
    assert scores[z, y, x] == scores.max() == np.float32(whole.scores[0])


def test_top_hat_prefers_sharp_peaks_to_broad_ones() -> None:
    z, y, x = np.indices((24, 24, 48))
    broad = 0.5 * np.exp(-((x - 12) ** 2 + (y - 12) ** 2 + (z - 12) ** 2) / (2 * 6**2))
    sharp = 0.3 * np.exp(-((x - 36) ** 2 + (y - 12) ** 2 + (z - 12) ** 2) / (2 * 1.2**2))
    scores = (broad + sharp).astype(np.float32)
    plain = peaks(lambda a, b: scores[a:b], scores.shape, 6.0)
    ranked = peaks(lambda a, b: scores[a:b], scores.shape, 6.0, top_hat_radius_voxels=3.0)
    assert plain.positions[0, 0] < 16
    assert tuple(ranked.positions[0]) == (36, 12, 12)
    assert ranked.scores[0] == pytest.approx(0.3, abs=0.01)
