from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import no_progress
from services.learning import clustering
from services.learning.autoencoder import Autoencoder3D
from services.learning.clustering import cluster, decode, encode

CPU = torch.device("cpu")


def three_groups() -> NDArray[np.float32]:
    random = np.random.default_rng(0)
    centres = random.normal(0, 10, (3, 32))
    members = np.array([0] * 5 + [1] * 20 + [2] * 20 + [0] * 5)
    codes: NDArray[np.float32] = (centres[members] + 0.1 * random.standard_normal((50, 32))).astype(np.float32)
    return codes


def test_clusters_are_numbered_by_size_then_by_first_member() -> None:
    codes = three_groups()
    found = cluster(codes, 3, 0, no_progress)
    assert found.sizes.tolist() == [20, 20, 10]
    assert found.labels.tolist() == [2] * 5 + [0] * 20 + [1] * 20 + [2] * 5
    for number in range(3):
        np.testing.assert_allclose(
            found.centres[number], codes[found.labels == number].mean(axis=0), rtol=1e-5, atol=1e-5
        )
    residual = codes - found.centres[found.labels]
    assert found.inertia == pytest.approx(float((residual**2).sum()), rel=1e-4)
    assert 0.99 < found.explained(codes) < 1


def test_numbers_do_not_depend_on_the_seed_where_groups_are_clear() -> None:
    codes = three_groups()
    labels = [cluster(codes, 3, seed, no_progress).labels.tolist() for seed in (0, 1, 2)]
    assert labels[0] == labels[1] == labels[2]


def test_the_same_seed_gives_the_same_clusters_where_nothing_is_clear() -> None:
    codes = np.random.default_rng(1).random((200, 32), np.float32)
    first, second = cluster(codes, 7, 3, no_progress), cluster(codes, 7, 3, no_progress)
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.centres, second.centres)
    assert (np.diff(first.sizes) <= 0).all()


def test_more_clusters_than_subtomograms_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="clusters is 51, and there are 50 subtomograms"):
        cluster(three_groups(), 51, 0, no_progress)


def test_more_clusters_than_different_codes_are_refused() -> None:
    codes = np.zeros((9, 32), np.float32)
    codes[4] = 1
    with pytest.raises(FailedPrecondition, match="only 2 different codes"):
        cluster(codes, 3, 0, no_progress)
    assert cluster(codes, 2, 0, no_progress).sizes.tolist() == [8, 1]


def test_codes_and_centres_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Autoencoder3D(8, torch.Generator().manual_seed(0)).eval()
    boxes = np.random.default_rng(2).standard_normal((11, 8, 8, 8), np.float32)
    with torch.no_grad():
        expected = model.encode(torch.from_numpy(boxes)[:, None])
        pictures = model.decode(expected)[:, 0].numpy()
    monkeypatch.setattr(clustering, "BATCH_BYTES", 3 * 4 * 32 * 8**3)
    assert clustering.batch_size(8) == 3
    fractions: list[float] = []
    codes = encode(
        model, [(0, boxes[:7]), (7, boxes[7:])], 11, CPU, lambda fraction, *_, **__: fractions.append(fraction)
    )
    np.testing.assert_allclose(codes, expected.numpy(), rtol=1e-4, atol=1e-6)
    assert fractions == pytest.approx([3 / 11, 6 / 11, 7 / 11, 10 / 11, 1])
    np.testing.assert_allclose(decode(model, codes, CPU, no_progress), pictures, rtol=1e-3, atol=1e-6)
