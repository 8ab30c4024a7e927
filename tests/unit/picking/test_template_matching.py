"""Template matching: the field's planted template, bounds and invariances of the score, tiles, masks, hands, errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from cryofleet.numerics import transfer
from cryofleet.numerics.fourier import apply_transfer, fourier_crop, gaussian
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.masks import radius_grid
from cryofleet.numerics.rotations import point_group, rotation_grid
from services.picking import template_matching as matching
from services.picking import tiles
from services.picking.correlation import Best, FftwCorrelator, TorchCorrelator, fetch
from services.picking.score_maps import MapPiece, ScoreMaps
from services.picking.template import Template, Turner, ellipsoid, extent, sphere

Array = NDArray[np.float32]
LOCATION = (77, 26, 40)
GRID = rotation_grid(38.53)
PLANTED = 100


def block() -> Array:
    """A template of sharp edges without symmetry."""
    template = np.zeros((12, 12, 12), np.float32)
    template[3:8, 4:8, 3:7] = 1
    template[7, 8, 5:7] = 1
    return template


def planted(sigma: float = 0.0, side: int = 100, location: tuple[int, int, int] = LOCATION) -> Array:
    volume = (sigma * np.random.default_rng(1).standard_normal((side,) * 3)).astype(np.float32)
    x, y, z = location
    volume[z - 6 : z + 6, y - 6 : y + 6, x - 6 : x + 6] += transform_volume(block(), GRID[PLANTED])
    return volume


def searched(
    volume: Array,
    template: Template,
    rotations: Rotation = GRID,
    others: Sequence[Template] = (),
    pieces: slice = slice(None),
    **options: object,
) -> tuple[list[matching.Match], Array, NDArray[np.int32]]:
    """What was found, and the whole maps."""
    mean, deviation = matching.survey(lambda a, b: volume[a:b], volume.shape)
    tomogram = matching.Tomogram(lambda a, b: volume[a:b], volume.shape, mean, deviation)
    tomogram = replace(tomogram, **options)  # type: ignore[arg-type]
    plan = matching.layout(
        tomogram.binned_shape,
        template.box,
        disturbed=tomogram.profile is not None or tomogram.binning > 1,
        mask_turns=template.mask_turns,
        variants=1 + len(others),
    )
    work = matching.pieces(plan, len(rotations), 100)[pieces]
    found = list(matching.search(tomogram, [template, *others], rotations, plan, work))
    scores = np.zeros(tomogram.binned_shape, np.float32)
    numbers = np.zeros(tomogram.binned_shape, np.int32)
    for match in found:
        own = tuple(slice(a, b) for a, b in zip(match.tile.start, match.tile.stop, strict=True))
        scores[own], numbers[own] = match.scores[0], match.rotations
    return found, scores, numbers


TEMPLATE = Template(block(), sphere(12, 5))


@pytest.mark.parametrize(("sigma", "least"), [(0.0, 0.99), (0.1, 0.93)])
def test_planted_template_is_found_at_its_voxel_with_its_rotation(sigma: float, least: float) -> None:
    _, scores, numbers = searched(planted(sigma), TEMPLATE)
    z, y, x = (int(i) for i in np.unravel_index(scores.argmax(), scores.shape))
    assert (x, y, z) == LOCATION
    assert numbers[z, y, x] == PLANTED
    assert scores[z, y, x] > least
    assert np.abs(scores).max() <= 1


def test_scores_do_not_depend_on_scale_and_offset() -> None:
    volume = planted(0.1, side=40, location=(20, 18, 22))
    _, scores, _ = searched(volume, TEMPLATE)
    _, other, _ = searched(250 * volume + 1000, TEMPLATE)
    assert np.abs(scores - other).max() < 1e-4


def test_score_is_the_masked_correlation_of_its_definition() -> None:
    rng = np.random.default_rng(3)
    volume = rng.standard_normal((24, 26, 28)).astype(np.float32)
    template = Template(rng.standard_normal((7, 7, 7)).astype(np.float32), sphere(7, 2.2))
    rotations = rotation_grid(90)
    _, scores, numbers = searched(volume, template, rotations)
    kernels, _ = Turner(template).kernels(rotations)
    mean, deviation = matching.survey(lambda a, b: volume[a:b], volume.shape)
    data = (volume - mean) / deviation
    mask = template.mask.astype(np.float64)
    for z, y, x in ((10, 12, 13), (5, 20, 9), (19, 6, 22)):
        box = data[z - 3 : z + 4, y - 3 : y + 4, x - 3 : x + 4].astype(np.float64)
        spread = np.sqrt((mask * (box - (mask * box).sum() / mask.sum()) ** 2).sum())
        expected = [(kernel.numpy() * box).sum() / spread for kernel in kernels]
        assert scores[z, y, x] == pytest.approx(max(expected), abs=2e-6)
        assert numbers[z, y, x] == int(np.argmax(expected))


@pytest.mark.parametrize("turning", [False, True])
def test_pytorch_and_fftw_find_the_same(turning: bool) -> None:
    rng = np.random.default_rng(4)
    shape, box = (20, 22, 24), 8
    tile = rng.standard_normal(shape).astype(np.float32)
    mask = ellipsoid(box, (2, 3, 3.5)) if turning else sphere(box, 3)
    template = Template(rng.standard_normal((box,) * 3).astype(np.float32), mask, turning)
    kernels, masks = Turner(template).kernels(rotation_grid(80))
    found = []
    valid = (13, 15, 20)  # along x kernels meet the near face
    for correlator in (FftwCorrelator(shape, box, valid, 2), TorchCorrelator(shape, valid, "cpu")):
        correlator.load(tile)
        allowed = np.ones(correlator.valid, np.bool_)
        allowed[3] = False
        best = Best.empty(correlator.valid)
        if masks is None:
            correlator.search(kernels, 5, correlator.inverse_norms(mask, allowed), best)
        else:
            correlator.search_masked(kernels, masks, 5, allowed, best)
        found.append((*fetch(best), best.count, best.squares))
        correlator.close()
    (a, numbers_a, count_a, squares_a), (b, numbers_b, count_b, squares_b) = found
    assert np.abs(a - b).max() < 2e-6
    assert (numbers_a != numbers_b).mean() < 1e-3
    assert count_a == count_b
    assert squares_a == pytest.approx(squares_b, rel=1e-4)
    assert (a[3] == 0).all()


def test_a_mask_that_turns_gives_the_same_as_one_that_need_not() -> None:
    volume = planted(0.1, side=36, location=(18, 17, 19))
    # so smooth that interpolation changes it little
    mask = np.exp(-(radius_grid(12) ** 2) / 8).astype(np.float32)
    round_ = Template(block(), mask)
    _, scores, _ = searched(volume, round_)
    _, turned, _ = searched(volume, replace(round_, mask_turns=True))
    # interpolating linearly between half voxels errs by h^2 / (8 sigma^2) along each axis: 2% of this mask in all
    assert np.abs(scores - turned).max() < 0.02


@pytest.mark.parametrize("budget", [5 << 20, 7 << 20])
def test_tiles_find_what_the_whole_finds(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    volume = planted(0.1, side=48, location=(24, 15, 30))
    rotations = GRID[90:110]
    whole, scores, numbers = searched(volume, TEMPLATE, rotations)
    monkeypatch.setattr(matching, "TILE_BYTES", budget)
    tiled, tiled_scores, tiled_numbers = searched(volume, TEMPLATE, rotations)
    assert len(whole) == 1
    assert len(tiled) > 1
    assert np.abs(scores - tiled_scores).max() < 1e-6
    assert (numbers != tiled_numbers).mean() < 1e-4
    assert sum(match.count for match in tiled) == whole[0].count


def test_tiles_with_a_filter_find_the_same_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = planted(0.1, side=48, location=(24, 15, 30))

    def profile(k: Array) -> Array:
        return np.asarray(np.exp(-20 * k * k), np.float32)

    weights = transfer.filtered(np.ones((12, 12, 7), np.float32), profile)
    template = Template(block(), sphere(12, 5), False, weights)
    _, scores, _ = searched(volume, template, profile=profile)
    monkeypatch.setattr(matching, "TILE_BYTES", 7 << 20)
    _, tiled, _ = searched(volume, template, profile=profile)
    assert scores.argmax() == tiled.argmax()
    assert np.abs(scores - tiled).max() < 0.02


def test_pieces_of_orientations_join_to_the_whole() -> None:
    volume = planted(0.1, side=32, location=(16, 15, 14))
    whole, scores, numbers = searched(volume, TEMPLATE)
    parts = [searched(volume, TEMPLATE, pieces=slice(i, i + 1))[0][0] for i in range(3)]

    def piece(match: matching.Match) -> MapPiece:
        rotations = match.rotations.astype(np.float32)
        return MapPiece(
            match.tile.start, match.tile.shape, lambda a, b: match.scores[0][a:b], lambda a, b: rotations[a:b]
        )

    maps = ScoreMaps.of([piece(part) for part in parts], volume.shape)
    assert np.array_equal(maps.scores(0, 32), scores)
    assert np.array_equal(maps.rotations(0, 32), numbers)
    assert sum(part.count for part in parts) == whole[0].count


def test_symmetric_template_needs_a_part_of_the_grid() -> None:
    for symmetry in ("C1", "C7", "D2", "D7", "T", "O", "I"):
        full, reduced = rotation_grid(12), rotation_grid(12, symmetry)
        order = len(point_group(symmetry))
        assert len(reduced) == pytest.approx(len(full) / order, rel=0.1)
        # every rotation is as near to the reduced grid as to the full one
        probes = Rotation.random(50, rng=np.random.default_rng(0))
        group = point_group(symmetry)
        for probe in probes:
            alike = probe * group
            nearest = min(float((reduced.inv() * one).magnitude().min()) for one in alike)
            assert np.degrees(nearest) < 12


def test_wedge_weighting_raises_the_score_of_a_tomogram_with_a_wedge() -> None:
    rng = np.random.default_rng(5)
    density = (rng.standard_normal((12, 12, 12)) * sphere(12, 4)).astype(np.float32)
    volume = np.zeros((32, 32, 32), np.float32)
    volume[10:22, 10:22, 10:22] = transform_volume(density, GRID[7])
    full = transfer.wedge_transfer(32, -50, 60)
    tomogram = apply_transfer(volume, full)
    plain = Template(density, sphere(12, 5))
    weighted = replace(plain, transfer=transfer.wedge_transfer(12, -50, 60))
    _, without, _ = searched(tomogram, plain, GRID[5:9])
    _, scores, numbers = searched(tomogram, weighted, GRID[5:9])
    assert scores[16, 16, 16] > without[16, 16, 16] + 0.03
    assert numbers[16, 16, 16] == 2


def test_only_the_region_is_searched_and_gold_and_empty_space_are_left_out() -> None:
    volume = planted(0.1, side=48, location=(24, 15, 30))
    region = np.zeros(volume.shape, np.float32)
    region[25:40] = 1
    _, scores, _ = searched(volume, TEMPLATE, GRID[95:105], read_mask=lambda a, b: region[a:b])
    assert (scores[:25] == 0).all()
    assert scores.argmax() == np.ravel_multi_index((30, 15, 24), volume.shape)
    volume[5:12, 30:37, 30:37] = 60
    volume[:, :, 34:] = 0
    _, scores, _ = searched(volume, TEMPLATE, GRID[95:105], gold_deviations=8.0)
    assert (scores[5:12, 30:37, 30:37] == 0).all()
    assert (scores[8:40, 8:40, 41] == 0).all()
    assert np.abs(scores).max() < 0.96
    assert scores.argmax() == np.ravel_multi_index((30, 15, 24), volume.shape)


def test_binned_search_finds_the_place_on_the_coarse_grid() -> None:
    rng = np.random.default_rng(6)
    density = gaussian((rng.standard_normal((24, 24, 24)) * sphere(24, 9)).astype(np.float32), 2.5)
    volume = (0.1 * density.std() * rng.standard_normal((64, 64, 64))).astype(np.float32)
    volume[20:44, 16:40, 24:48] += transform_volume(density, GRID[PLANTED])
    coarse = Template(fourier_crop(density, 2), sphere(12, 5))
    _, scores, numbers = searched(volume, coarse, binning=2)
    assert scores.argmax() == np.ravel_multi_index((16, 14, 18), scores.shape)
    assert numbers[16, 14, 18] == PLANTED
    assert scores.max() > 0.9


def test_the_mirror_image_scores_less_and_random_phases_little() -> None:
    rng = np.random.default_rng(7)
    density = (rng.standard_normal((12, 12, 12)) * sphere(12, 4)).astype(np.float32)
    volume = (0.05 * rng.standard_normal((32, 32, 32))).astype(np.float32)
    volume[10:22, 10:22, 10:22] += transform_volume(density, GRID[7])
    template = Template(density, sphere(12, 5))
    found, scores, _ = searched(volume, template, others=[template.mirrored(), template.with_random_phases(0)])
    mirrored, random = found[0].scores[1], found[0].scores[2]
    assert scores.max() > 0.95
    assert mirrored.max() < 0.8
    assert random.max() < 0.8
    twice = template.mirrored().mirrored()
    assert np.array_equal(twice.density[:, :, 1:], density[:, :, 1:])


def test_background_is_taken_off_but_never_added() -> None:
    scores, random = np.full((4, 5, 6), 0.5, np.float32), np.zeros((4, 5, 6), np.float32)
    random[1] = 0.4
    piece = MapPiece((0, 0, 0), (4, 5, 6), lambda a, b: scores[a:b], lambda a, b: scores[a:b], lambda a, b: random[a:b])
    maps = ScoreMaps.of([piece], (4, 5, 6))
    assert maps.mean_background == pytest.approx(0.1)
    corrected = maps.scores(0, 4)
    assert corrected[1] == pytest.approx(0.2)
    assert corrected[0] == pytest.approx(0.5)


def test_extent_and_masks() -> None:
    assert extent(sphere(20, 6)) == pytest.approx(6.7, abs=0.5)
    assert extent(np.ones((9, 9, 9), np.float32)) <= 4
    mask = ellipsoid(21, (3, 5, 8))
    assert mask[10, 10, 13] == 1
    assert mask[10, 10, 15] == 0
    assert mask[17, 10, 10] == 1
    assert mask[10, 16, 10] < 0.5


def test_the_layout_covers_every_voxel_once() -> None:
    plan = tiles.plan((50, 61, 47), 9, 2, lambda padded: int(np.prod(padded)), 30_000)
    seen = np.zeros((50, 61, 47), np.int32)
    for tile in plan.tiles:
        seen[tuple(slice(a, b) for a, b in zip(tile.start, tile.stop, strict=True))] += 1
        assert all(core + 4 + 4 <= side for core, side in zip(tile.shape, plan.padded, strict=True))
    assert plan.padded[0] >= plan.valid[0] + 2 + 4
    assert (seen == 1).all()
    assert len(plan.tiles) > 1
    with pytest.raises(ResourceExhausted, match=r"take a smaller template or more memory"):
        tiles.plan((50, 61, 47), 40, 2, lambda padded: int(np.prod(padded)), 1000)


def test_reading_over_the_faces_fills_with_the_value() -> None:
    volume = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    region, inside = tiles.read(lambda a, b: volume[a:b], volume.shape, (-2, 3, 4), (5, 4, 4), -1.0)
    assert inside == (slice(2, 5), slice(0, 2), slice(0, 2))
    assert np.array_equal(region[inside], volume[0:3, 3:5, 4:6])
    outside = np.ones(region.shape, np.bool_)
    outside[inside] = False
    assert (region[outside] == -1).all()


def test_bad_input_is_named() -> None:
    density, mask = block(), sphere(12, 5)
    with pytest.raises(InvalidArgument, match="mask is zero everywhere"):
        Template(density, 0 * mask)
    with pytest.raises(InvalidArgument, match="template is constant"):
        Template(np.ones((12, 12, 12), np.float32), mask)
    with pytest.raises(InvalidArgument, match=r"must be the same"):
        Template(density, sphere(10, 4))
    with pytest.raises(InvalidArgument, match=r"must be a cube"):
        Template(density[:10], mask[:10])
    with pytest.raises(InvalidArgument, match=r"not finite"):
        Template(np.where(density > 0, np.nan, density).astype(np.float32), mask)
    with pytest.raises(InvalidArgument, match=r"must lie in 0 to 1"):
        Template(density, 2 * mask)
    with pytest.raises(InvalidArgument, match=r"larger than the tomogram"):
        matching.layout((10, 40, 40), 12, disturbed=False, mask_turns=False, variants=1)
    volume = np.zeros((6, 7, 8), np.float32)
    with pytest.raises(FailedPrecondition, match="constant"):
        matching.survey(lambda a, b: volume[a:b], volume.shape)
    volume[4, 1, 1] = np.nan
    with pytest.raises(FailedPrecondition, match=r"not finite .* planes 0 to 5"):
        matching.survey(lambda a, b: volume[a:b], volume.shape)
