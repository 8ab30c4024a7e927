from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.progress import no_progress
from services.learning import weak_labels
from services.learning.autoencoder import Autoencoder3D
from services.learning.pose_normalisation import find_poses, structure_weights, turn_back
from services.learning.preparation import standardise
from services.learning.weak_labels import Levels, inverse, label_boxes, parse_levels, structure, thresholds
from tests.unit.learning.shapes import CHIRAL, blobs, correlation, two_kinds

CPU = torch.device("cpu")


class Itself(Autoencoder3D):
    """Decodes what it encodes."""

    def forward(self, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return boxes, boxes.flatten(1)


def test_the_level_is_a_share_of_the_way_from_the_median_to_the_brightest() -> None:
    box = np.zeros((1, 10, 10, 10), np.float32)
    box[0, 0, :6] = 8  # 60 of 1000, so the 95th percentile is 8
    box[0, 9] = -3
    assert thresholds(box, 0.5).tolist() == [4]
    assert thresholds(2 * box + 7, 0.25).tolist() == [7 + 4]
    assert thresholds(np.concatenate([box, box]), np.array([0.5, 0.25], np.float32)).tolist() == [4, 2]
    box[0, 5, 5, 5] = 3.9
    assert structure(box, 0.5).sum() == 60
    assert structure(box, 0.48).sum() == 61
    assert not structure(np.full((2, 4, 4, 4), 3, np.float32), 0.5).any()


def test_levels_of_classes_are_given_by_name() -> None:
    assert parse_levels(["globule: 0.4", "a:b :0.75"]) == {"globule": 0.4, "a:b": 0.75}
    for wrong in ("globule", "globule:", ":0.4", "globule:high", "globule:1", "globule:nan"):
        with pytest.raises(InvalidArgument, match=r"between 0 and 1, as globule:0\.4"):
            parse_levels([wrong])
    with pytest.raises(InvalidArgument, match="'globule' is given twice"):
        parse_levels(["globule:0.4", "globule:0.5"])


def test_one_voxel_more_or_less_does_not_move_the_level() -> None:
    box = blobs(CHIRAL, 32)[None]
    spike = box.copy()
    spike[0, 0, 0, 0] = 100
    assert thresholds(spike, 0.5) == pytest.approx(thresholds(box, 0.5), rel=0.02)


def labels(
    boxes: NDArray[np.float32],
    classes: list[int],
    pose_normalisation: bool,
    smoothing_voxels: float = 0.0,
    level: Levels = 0.5,
) -> NDArray[np.uint8]:
    targets = np.full(boxes.shape, 9, np.uint8)
    label_boxes(
        Itself(boxes.shape[-1]),
        boxes,
        np.array(classes, np.int32),
        targets,
        level=level,
        smoothing_voxels=smoothing_voxels,
        pose_normalisation=pose_normalisation,
        device=CPU,
        progress=no_progress,
    )
    return targets


def test_each_member_is_labelled_by_its_own_decoded_self() -> None:
    boxes = standardise(two_kinds(4, 16, 0)[0])
    found = labels(boxes, [1, 2, 1, 2], pose_normalisation=False)
    np.testing.assert_array_equal(found > 0, structure(boxes, 0.5))
    assert [set(np.unique(each)) for each in found] == [{0, 1}, {0, 2}, {0, 1}, {0, 2}]
    assert not np.array_equal(found[0], found[2])


def test_each_box_is_cut_at_its_own_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weak_labels, "batch_size", lambda side: 3)
    boxes = standardise(two_kinds(4, 16, 0)[0])
    levels = np.array([0.5, 0.3, 0.7, 0.4], np.float32)
    found = labels(boxes, [1, 2, 1, 2], pose_normalisation=False, level=levels)
    for box, level, label in zip(boxes, levels, found, strict=True):
        np.testing.assert_array_equal(label > 0, structure(box[None], float(level))[0])


def test_smoothed_boxes_are_cut_as_they_lie_and_hold_less_noise() -> None:
    clean = standardise(np.stack([blobs(CHIRAL, 24, turn) for turn in Rotation.random(3, random_state=1)]))
    truth = structure(clean, 0.5)
    noise = np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
    boxes = standardise(clean + noise)

    def agreement(found: NDArray[np.bool_]) -> float:
        return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))

    smoothed = labels(boxes, [1] * 3, pose_normalisation=False, smoothing_voxels=0.8) > 0
    assert agreement(smoothed) > agreement(structure(boxes, 0.5)) + 0.1
    posed = labels(boxes, [1] * 3, pose_normalisation=True, smoothing_voxels=0.8) > 0
    np.testing.assert_array_equal(posed, smoothed, "no pose comes into it")
    apart = labels(boxes[:1], [1], pose_normalisation=False, smoothing_voxels=0.8) > 0
    np.testing.assert_array_equal(apart, smoothed[:1], "boxes are smoothed one by one")


def test_labels_are_turned_back_to_where_structures_lie() -> None:
    turns = Rotation.random(4, random_state=1)
    boxes = standardise(np.stack([blobs(CHIRAL, 24, turn, (1.5, -1, 0.5)) for turn in turns]))
    found = labels(boxes, [1] * 4, pose_normalisation=True) > 0
    expected = structure(boxes, 0.5)
    overlap = 2 * (found & expected).sum(axis=(1, 2, 3)) / (found.sum(axis=(1, 2, 3)) + expected.sum(axis=(1, 2, 3)))
    # Interpolated twice, an edge moves by a part of a voxel: of a body of 8 voxels across, one twentieth or so.
    assert (overlap > 0.85).all(), overlap
    assert min(overlap) > max(
        2 * (a & b).sum() / (a.sum() + b.sum()) for i, a in enumerate(found) for j, b in enumerate(expected) if i != j
    )


def test_the_inverse_pose_undoes_a_pose() -> None:
    boxes = np.stack([blobs(CHIRAL, 24, turn, (1, 2, -1)) for turn in Rotation.random(3, random_state=2)])
    poses = find_poses(structure_weights(boxes))
    back = turn_back(turn_back(boxes, poses), inverse(poses))
    for before, after in zip(boxes, back, strict=True):
        assert correlation(before, after) > 0.97
