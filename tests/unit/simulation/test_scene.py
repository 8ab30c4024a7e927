"""Placing: no overlap, the stated gap, and a truth that is where the density is."""

from __future__ import annotations

import re

import numpy as np
import pytest
import scipy.ndimage
from scipy.spatial.transform import Rotation

from cryofleet.errors import Cancelled, FailedPrecondition, InvalidArgument
from cryofleet.numerics.interpolation import transform_volume
from services.simulation import density
from services.simulation.phantoms import phantom
from services.simulation.potential import render
from services.simulation.scene import Scene, build_scene

VOXEL = 12.0
SHAPE = (48, 80, 72)
GAP = 2.0


@pytest.fixture(scope="module")
def structures() -> list[density.Density]:
    return [density.build(name, None, "", VOXEL, 30.0) for name in ("hexameric-ring", "two-subunit-globule", "barrel")]


@pytest.fixture(scope="module")
def scene(structures: list[density.Density]) -> Scene:
    return build_scene(structures, [12, 5, 8], SHAPE, GAP, np.random.default_rng(11))


def test_all_are_placed_inside(scene: Scene) -> None:
    assert np.bincount(scene.classes).tolist() == [12, 5, 8]
    assert scene.density.shape == scene.instances.shape == SHAPE
    x, y, z = scene.positions.T
    for values, length in ((x, SHAPE[2]), (y, SHAPE[1]), (z, SHAPE[0])):
        # half a hexameric ring is 37 Å or 3 voxels at its thinnest
        assert values.min() > 2
        assert values.max() < length - 3


def test_no_voxel_belongs_to_two_and_all_keep_their_distance(scene: Scene, structures: list[density.Density]) -> None:
    sizes = np.bincount(scene.instances.ravel(), minlength=26)
    assert scene.occupancy == pytest.approx(1 - sizes[0] / scene.instances.size)
    for number, (kind, size) in enumerate(zip(scene.classes, sizes[1:], strict=True)):
        # whole: a voxel taken by another would be missing here (sampling moves the count by a few per cent)
        assert size == pytest.approx(structures[kind].shape_voxels, rel=0.08)
        others = (scene.instances != 0) & (scene.instances != number + 1)
        distance = scipy.ndimage.distance_transform_edt(~others)
        assert distance[scene.instances == number + 1].min() > GAP


def test_the_truth_is_where_the_density_is(structures: list[density.Density]) -> None:
    for kind in range(3):
        alone = build_scene([structures[kind]], [1], SHAPE, GAP, np.random.default_rng(kind))
        weights = alone.density.astype(np.float64)
        centroid = scipy.ndimage.center_of_mass(weights)[::-1]
        np.testing.assert_allclose(alone.positions[0], centroid, atol=0.06)


def test_the_truth_has_the_orientation_of_the_density(structures: list[density.Density]) -> None:
    """The reference, rendered apart, turned by the truth's rotation and put to its position, is what is there."""
    alone = build_scene([structures[1]], [1], (48, 48, 48), GAP, np.random.default_rng(3))
    reference = render(phantom("two-subunit-globule").scatterers(), 48, VOXEL, 30.0)
    shift = alone.positions[0] - 24
    placed = transform_volume(reference, alone.rotations[0], shift)
    assert np.corrcoef(placed.ravel(), alone.density.ravel())[0, 1] > 0.99
    inverted = transform_volume(reference, alone.rotations[0].inv(), shift)
    assert np.corrcoef(inverted.ravel(), alone.density.ravel())[0, 1] < 0.95


def test_density_is_higher_inside_every_instance_than_outside(scene: Scene) -> None:
    inside = scipy.ndimage.mean(scene.density, scene.instances, np.arange(1, 26))
    assert inside.min() > 10 * abs(float(scene.density[scene.instances == 0].mean()))


def test_orientations_are_uniform(structures: list[density.Density]) -> None:
    many = build_scene([structures[0]], [80], (64, 128, 128), 1.0, np.random.default_rng(5))
    axes = many.rotations.apply([0, 0, 1])
    # of uniform axes the mean is 0 +- 1/sqrt(3 n), and the mean square of each component is 1/3 +- 0.3/sqrt(n)
    assert np.abs(axes.mean(axis=0)).max() < 4 / np.sqrt(3 * 80)
    np.testing.assert_allclose((axes**2).mean(axis=0), 1 / 3, atol=4 * 0.3 / np.sqrt(80))


def test_same_seed_same_scene_and_another_seed_another(structures: list[density.Density], scene: Scene) -> None:
    again = build_scene(structures, [12, 5, 8], SHAPE, GAP, np.random.default_rng(11))
    assert again.density.tobytes() == scene.density.tobytes()
    assert again.positions.tobytes() == scene.positions.tobytes()
    other = build_scene(structures, [12, 5, 8], SHAPE, GAP, np.random.default_rng(12))
    assert not np.allclose(other.positions, scene.positions)


def test_too_many_say_how_many_were_placed(structures: list[density.Density]) -> None:
    with pytest.raises(
        FailedPrecondition, match=r"placed \d+ of 500 complexes, .*no place is left.*occupied"
    ) as caught:
        build_scene(structures[:1], [500], (24, 40, 40), GAP, np.random.default_rng(0))
    placed = int(re.search(r"placed (\d+)", str(caught.value))[1])  # type: ignore[index]
    # a ring with its gap takes about 12 voxels cubed at most; a place remains only where none is free
    assert 12 <= placed <= 60


def test_every_free_place_is_found(structures: list[density.Density]) -> None:
    """A volume that a turned structure only just fits into has it placed nevertheless."""
    mask = structures[0].rotated_shape(Rotation.identity(), np.zeros(3))
    side = int(np.ceil(np.sqrt(3) * max(np.ptp(np.argwhere(mask), axis=0) + 1))) + 1
    alone = build_scene(structures[:1], [1], (side, side, side), 0.0, np.random.default_rng(0))
    assert len(alone.positions) == 1


def test_a_structure_larger_than_the_volume_is_refused(structures: list[density.Density]) -> None:
    with pytest.raises(
        InvalidArgument, match="'two-subunit-globule' does not fit into the empty volume of 80 x 80 x 8"
    ):
        build_scene([structures[1]], [1], (8, 80, 80), 0.0, np.random.default_rng(0))


def test_placing_stops_when_told_to(structures: list[density.Density]) -> None:
    def stop(fraction: float, phase: str = "", **counters: float) -> None:
        if counters.get("placed", 0) >= 3:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        build_scene(structures, [12, 5, 8], SHAPE, GAP, np.random.default_rng(0), stop)
