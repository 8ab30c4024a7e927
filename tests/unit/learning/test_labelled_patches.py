"""Patches of labelled tomograms: balanced by class, apart for validation, and what can't be learnt from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.progress import no_progress
from services.learning import connected_parts, labelled_patches, tomogram_scale
from services.learning.labelled_patches import Classes, LabelCounts, LabelledTomogram, Places

SIZE = 16


def labelled(volume: NDArray[Any], labels: NDArray[Any], name: str = "labels") -> LabelledTomogram:
    def read(first: int, last: int) -> NDArray[np.float32]:
        return volume[first:last].astype(np.float32)

    return LabelledTomogram(volume.shape, read, lambda first, last: labels[first:last].astype(np.float32), name)


def specimen(seed: int, shape: tuple[int, int, int]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Each voxel's value is its own number, so that patches tell where they come from; class 2 is rare."""
    random = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    labels[5:15, 5:-5, 10:30] = 1
    labels[tuple(random.integers(0, side, 40) for side in shape)] = 3
    return np.arange(labels.size, dtype=np.float32).reshape(shape), labels


@pytest.fixture
def tomograms(monkeypatch: pytest.MonkeyPatch) -> list[LabelledTomogram]:
    monkeypatch.setattr(tomogram_scale, "SLAB_BYTES", 4 * 60 * 40 * 7)  # slabs of seven planes
    return [labelled(*specimen(1, (20, 60, 40))), labelled(*specimen(2, (24, 40, 60)))]


def placed(tomograms: list[LabelledTomogram], **changes: Any) -> tuple[LabelCounts, Classes, Places]:
    names = ["ice", "slab", "never", "speck"]
    counts = labelled_patches.count_labels(tomograms, 4, SIZE, 0.3, no_progress)
    classes = labelled_patches.choose_classes(names, [], counts)
    options: dict[str, Any] = {"size": SIZE, "patches": 90, "validation_fraction": 0.3, "seed": 3} | changes
    return counts, classes, labelled_patches.place_patches(tomograms, classes, counts, progress=no_progress, **options)


def test_as_many_patches_of_each_class_and_none_that_is_seen_twice(tomograms: list[LabelledTomogram]) -> None:
    counts, classes, places = placed(tomograms)
    assert classes.names == ["background", "slab", "speck"]
    assert classes.of_label.tolist() == [0, 1, 0, 2]
    assert sum(int(each.sum()) for each in counts.counts) == 20 * 60 * 40 + 24 * 40 * 60
    # Of 30 for each class, 9 are for validation.
    for kind, number in ((0, 21), (1, 9)):
        assert np.bincount(places.classes[places.held_back == kind]).tolist() == [number] * 3
    boxes = np.empty((len(places), *(SIZE,) * 3), np.float32)
    targets = np.empty(boxes.shape, np.uint8)
    labelled_patches.cut_patches(tomograms, classes, places, boxes, targets, no_progress)
    for tomogram, (volume, labels) in enumerate((specimen(1, (20, 60, 40)), specimen(2, (24, 40, 60)))):
        rows = places.tomograms == tomogram
        assert rows.sum() > 20, "both are drawn from"
        for row in np.flatnonzero(rows):
            z, y, x = places.starts[row]
            here = (slice(z, z + SIZE), slice(y, y + SIZE), slice(x, x + SIZE))
            np.testing.assert_array_equal(boxes[row], volume[here])
            np.testing.assert_array_equal(targets[row], classes.of_label[labels[here]])
            assert (targets[row] == places.classes[row]).any()
        trained, held = (np.unique(boxes[rows & (places.held_back == kind)]) for kind in (0, 1))
        assert not np.intersect1d(trained, held).size
    # Not always in the middle: a network would learn that from the patches' faces.
    middle = targets[:, SIZE // 2, SIZE // 2, SIZE // 2] == places.classes
    assert middle.mean() < 0.9


def test_patches_follow_from_the_seed(tomograms: list[LabelledTomogram]) -> None:
    first, again, other = (placed(tomograms, seed=seed)[2].starts for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_voxels_of_a_class_are_drawn_alike() -> None:
    labels = np.zeros((16, 80, 16), np.uint8)
    labels[:, 3, 3] = labels[5, 20:52, 9] = 1  # 16 and 32 voxels, in the part for training
    tomogram = labelled(np.zeros(labels.shape), labels)
    counts = labelled_patches.count_labels([tomogram], 2, 16, 0.1, no_progress)
    classes = labelled_patches.choose_classes(["", "thing"], [], counts)
    places = labelled_patches.place_patches(
        [tomogram], classes, counts, size=16, patches=2000, validation_fraction=0.1, seed=0, progress=no_progress
    )
    of_thing = places.starts[(places.classes == 1) & (places.held_back == 0)]
    near = (of_thing[:, 1] <= 3).mean()
    # Of 900 draws a third, within four standard deviations.
    assert abs(near - 1 / 3) < 4 * np.sqrt(2 / 9 / 900)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ((slice(3, 4), slice(5, 6), slice(6, 7), 7), "x=6, y=5, z=3 is 7; labels are whole numbers, and 2 of them"),
        ((slice(3, 4), slice(5, 6), slice(6, 7), 0.5), "x=6, y=5, z=3 is 0.5"),
        ((slice(3, 4), slice(5, 6), slice(6, 7), -1), "is -1"),
        ((slice(3, 4), slice(5, 6), slice(6, 7), np.nan), "is nan"),
    ],
)
def test_labels_without_a_name_are_refused(change: tuple[Any, ...], expected: str) -> None:
    labels = np.zeros((16, 40, 20))
    labels[change[:3]] = change[3]
    with pytest.raises(InvalidArgument, match=expected):
        labelled_patches.count_labels([labelled(labels, labels)], 2, SIZE, 0.1, no_progress)


def counted(*present: int) -> LabelCounts:
    return LabelCounts((np.array([[list(present)], [[5] * len(present)]], np.int64),))


def test_classes_are_those_that_occur_or_are_asked_for() -> None:
    names = ["ice", "a", "b", "a", "background", "c"]
    counts = counted(9, 3, 2, 1, 1, 0)
    found = labelled_patches.choose_classes(names, [], counts)
    assert (found.names, found.of_label.tolist()) == (["background", "a", "b"], [0, 1, 2, 1, 0, 0])
    found = labelled_patches.choose_classes(names, ["b"], counts)
    assert (found.names, found.of_label.tolist()) == (["background", "b"], [0, 0, 1, 0, 0, 0])
    for wanted, present, expected in (
        (["d"], counts, "no label is named 'd'; there are 'a', 'b', 'a', 'c'"),
        (["c"], counts, "no voxel of 'c'"),
        ([], counted(9, 0, 0, 0, 3, 0), "nothing but the background, 'ice'"),
    ):
        with pytest.raises(InvalidArgument, match=expected):
            labelled_patches.choose_classes(names, wanted, present)
    with pytest.raises(InvalidArgument, match="label 1 occurs and has no name"):
        labelled_patches.choose_classes(["ice", ""], [], counted(9, 1))


@pytest.mark.parametrize(("shape", "fits"), [((16, 32, 16), True), ((16, 31, 31), False), ((15, 40, 40), False)])
def test_a_tomogram_has_room_for_both_kinds(shape: tuple[int, int, int], fits: bool) -> None:
    if fits:
        assert [(each.start, each.stop) for each in labelled_patches.regions(shape, SIZE, 0.1, "t")] == [
            (0, 16),
            (16, 32),
        ]
    else:
        with pytest.raises(InvalidArgument, match=r"t: .*no room for patches of 16"):
            labelled_patches.regions(shape, SIZE, 0.1, "t")


def test_a_typical_part_is_not_moved_by_crumbs() -> None:
    labels = np.zeros((20, 40, 40), np.uint8)
    labels[2:8, 2:8, 2:8] = labels[10:16, 2:8, 2:8] = 1
    labels[2:7, 20:25, 20:25] = 1
    labels[18, ::2, ::2] = 1  # 400 single voxels
    gathered = connected_parts.ConnectedParts(2)
    gathered.add(labels)
    assert connected_parts.typical_voxels([gathered.parts()], 2).tolist() == [0, 125, 0]
