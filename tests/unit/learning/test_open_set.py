"""Open-set recognition: the margin, prototypes, the threshold of rejection, and the clustering of what is rejected."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cryofleet.errors import FailedPrecondition
from cryofleet.progress import no_progress
from services.learning import class_prediction, open_set
from services.learning.training import generator_for

CPU = torch.device("cpu")


def test_logits_are_cosines_and_the_margin_lowers_the_right_one() -> None:
    model = open_set.OpenSetClassifier(8, 3, generator_for(0)).eval()
    boxes = torch.randn(4, 1, 8, 8, 8, generator=generator_for(1))
    labels = torch.tensor([0, 1, 2, 2])
    with torch.no_grad():
        logits, features = model(boxes)
        assert features.norm(dim=1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
        cosines = torch.nn.functional.cosine_similarity(features[:, None], model.output.weight[None], dim=2)
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


def test_prototypes_and_distances() -> None:
    features = np.array([[1, 0], [0.6, 0.8], [0, -1], [0, -1]], np.float32)
    prototypes = open_set.class_prototypes(features, np.array([0, 0, 1, 1]), 2)
    # The mean of the first two is along (1.6, 0.8).
    assert prototypes == pytest.approx(np.array([[2, 1], [0, -np.sqrt(5)]]) / np.sqrt(5), abs=1e-6)
    looked_at = np.array([[0, -1], [-1, 0], [1, 0]], np.float32)
    assert open_set.distances(looked_at, prototypes) == pytest.approx([0, 1, 1 - 2 / np.sqrt(5)], abs=1e-6)


def test_one_in_twenty_of_the_known_is_rejected() -> None:
    distances = np.linspace(0, 1, 1001).astype(np.float32)
    assert (distances > open_set.rejection_distance(distances)).mean() == pytest.approx(0.05, abs=0.001)


def test_rejected_boxes_are_clustered_and_others_left() -> None:
    directions = np.eye(3, dtype=np.float32)[[0, 1, 1, 2, 2, 2]]
    rejected = np.array([False, True, True, True, True, True])
    labels = open_set.unseen_classes(directions, rejected, 2, 0, no_progress)
    assert labels.tolist() == [-1, 1, 1, 0, 0, 0]
    # More classes than different features are not there; none rejected, none clustered.
    assert open_set.unseen_classes(directions, rejected, 9, 0, no_progress).max() == 1
    assert (open_set.unseen_classes(directions, np.zeros(6, bool), 2, 0, no_progress) == -1).all()


def test_a_prediction_rejects_what_is_far_from_all_prototypes() -> None:
    model = open_set.OpenSetClassifier(8, 2, generator_for(0)).eval()
    boxes = np.random.default_rng(0).standard_normal((3, 8, 8, 8)).astype(np.float32)
    _, features = class_prediction.outputs(model, [(0, boxes)], 3, CPU, no_progress)
    model.prototypes.copy_(torch.from_numpy(features[:2]))
    limit = float(open_set.distances(features, features[:2])[2]) / 2
    config = open_set.config(8, [1, 5], ["a", "b"]) | {"temperature": 2.0, "rejection_distance": limit}
    found = class_prediction.predict(model, config, [(0, boxes)], 3, CPU, no_progress)
    assert found.rejected is not None
    assert found.rejected.tolist() == [False, False, True]
    assert found.scores == pytest.approx(1 - open_set.distances(features, features[:2]) / 2)
    for field, value in (("temperature", None), ("temperature", 0.0), ("rejection_distance", "far")):
        with pytest.raises(FailedPrecondition, match=field):
            class_prediction.predict(model, config | {field: value}, [(0, boxes)], 3, CPU, no_progress)
