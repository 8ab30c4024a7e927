"""Open-set recognition: the margin, the distance from known classes, its threshold, the clustering of the rejected."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cryofleet.errors import FailedPrecondition
from cryofleet.progress import no_progress
from services.learning import class_prediction, open_set
from services.learning.augmentation import turn
from services.learning.training import generator_for

CPU = torch.device("cpu")


def test_logits_are_cosines_and_the_margin_lowers_the_right_one() -> None:
    model = open_set.OpenSetClassifier(8, 3, generator_for(0)).eval()
    boxes = torch.randn(4, 1, 8, 8, 8, generator=generator_for(1))
    labels = torch.tensor([0, 1, 2, 2])
    with torch.no_grad():
        logits, codes = model(boxes)
        embedded = model.embedding(codes)
        cosines = torch.nn.functional.cosine_similarity(embedded[:, None], model.output.weight[None], dim=2)
        assert torch.allclose(logits, 16 * cosines, atol=1e-4)
        batch = {"boxes": boxes, "labels": labels}
        used = open_set.OpenSetLoss(0.3)(model, batch, generator_for(2))["loss"]
        assert float(used) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
        # In training: as if the right class's cosine were 0.3 lower. Dropout draws the same numbers twice.
        model.train()
        dropped = model(boxes, generator_for(2))[0]
        dropped[torch.arange(4), labels] -= 16 * 0.3
        trained = open_set.OpenSetLoss(0.3)(model, batch, generator_for(2))["loss"]
    assert float(trained) == pytest.approx(float(torch.nn.functional.cross_entropy(dropped, labels)), rel=1e-5)


@pytest.mark.parametrize(("rotations", "count"), [("none", 1), ("beam", 4), ("cube", 8), ("any", 8)])
def test_codes_in_use_are_means_over_views(rotations: str, count: int) -> None:
    config = open_set.config(8, [0, 1], ["a", "b"], rotations)
    model = open_set.from_config(config, generator_for(0)).eval()
    boxes = torch.randn(2, 1, 8, 8, 8, generator=generator_for(1))
    assert len({str(how) for how in model.views}) == count
    with torch.no_grad():
        found = model(boxes)[1]
        codes = [torch.stack([model.encoder(turn(box[0], how)[None, None])[0] for box in boxes]) for how in model.views]
        assert torch.allclose(found, torch.stack(codes).mean(dim=0), atol=1e-5)
        if rotations == "beam":
            along = torch.arange(8.0).view(8, 1, 1).expand(8, 8, 8)
            assert all(torch.equal(turn(along, how), along) for how in model.views), "z stays z"
        # While training, boxes are turned by the augmentation.
        assert torch.equal(model.train()(boxes, generator_for(2))[1], model.encoder(boxes))
    with pytest.raises(FailedPrecondition, match="view_rotations is None"):
        open_set.from_config(config | {"view_rotations": None})


def test_distances_are_those_of_mahalanobis() -> None:
    random = np.random.default_rng(0)
    spread = np.array([[1.0, 0.0, 0.0], [3.0, 0.5, 0.0], [0.0, 0.0, 0.1]])
    labels = np.repeat([0, 1], 4000)
    codes = (random.standard_normal((8000, 3)) @ spread.T + np.outer(labels, [0, 4, 0])).astype(np.float32)
    whitening, centres = open_set.fit_classes(codes, labels, 2)
    looked_at = np.array([[0, 4, 0], [0, 4, 1], [1, 3, 0], [0, 2, 0]], np.float32)
    found = open_set.distances(looked_at @ whitening, centres)
    inverse = np.linalg.inv(spread @ spread.T)
    from_means = looked_at[:, None] - np.array([[0, 0, 0], [0, 4, 0]])
    expected = np.sqrt(np.einsum("ikd,de,ike->ik", from_means, inverse, from_means)).min(axis=1)
    # Shrinking takes 0.2 of the last axis, of least variance, at this many codes.
    assert found == pytest.approx(expected, rel=0.25, abs=0.15)
    # Numbers that no box has anything in, and classes of one box.
    whitening, centres = open_set.fit_classes(np.eye(2, 5, dtype=np.float32), np.array([0, 1]), 2)
    assert np.isfinite(whitening).all()
    assert open_set.distances(np.eye(2, 5, dtype=np.float32) @ whitening, centres) == pytest.approx([0, 0], abs=1e-3)


def test_one_in_twenty_of_the_known_is_rejected() -> None:
    distances = np.linspace(0, 1, 1001).astype(np.float32)
    assert (distances > open_set.rejection_distance(distances)).mean() == pytest.approx(0.05, abs=0.001)


def test_rejected_boxes_are_clustered_and_others_left() -> None:
    # Of any length.
    directions = np.eye(3, dtype=np.float32)[[0, 1, 1, 2, 2, 2]] * np.array([[1], [1], [9], [1], [2], [9]], np.float32)
    rejected = np.array([False, True, True, True, True, True])
    labels = open_set.unseen_classes(directions, rejected, 2, 0, no_progress)
    assert labels.tolist() == [-1, 1, 1, 0, 0, 0]
    # More classes than different features are not there; none rejected, none clustered.
    assert open_set.unseen_classes(directions, rejected, 9, 0, no_progress).max() == 1
    assert (open_set.unseen_classes(directions, np.zeros(6, bool), 2, 0, no_progress) == -1).all()


def test_a_prediction_rejects_what_is_far_from_all_classes() -> None:
    model = open_set.OpenSetClassifier(8, 2, generator_for(0)).eval()
    boxes = np.random.default_rng(0).standard_normal((3, 8, 8, 8)).astype(np.float32)
    _, codes = class_prediction.outputs(model, [(0, boxes)], 3, CPU, no_progress)
    whitening = np.diag(np.linspace(0.5, 2, codes.shape[1])).astype(np.float32)
    model.whitening.copy_(torch.from_numpy(whitening))
    model.centres.copy_(torch.from_numpy(codes[:2] @ whitening))
    far = np.linalg.norm((codes[2] - codes[:2]) @ whitening, axis=1).min()
    config = open_set.config(8, [1, 5], ["a", "b"]) | {"temperature": 2.0, "rejection_distance": float(far) / 2}
    found = class_prediction.predict(model, config, [(0, boxes)], 3, CPU, no_progress)
    assert found.rejected is not None
    assert found.rejected.tolist() == [False, False, True]
    # A half would be at the distance of rejection.
    assert found.scores == pytest.approx([1, 1, 1 / 3], abs=1e-3)
    for field, value in (("temperature", None), ("temperature", 0.0), ("rejection_distance", "far")):
        with pytest.raises(FailedPrecondition, match=field):
            class_prediction.predict(model, config | {field: value}, [(0, boxes)], 3, CPU, no_progress)
