from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cryofleet.errors import FailedPrecondition
from services.learning import architectures, autoencoder, model_files
from services.learning.autoencoder import Autoencoder3D
from services.learning.cluster_model import (
    FAR,
    QUANTILES,
    Assignment,
    ClusterModel,
    autoencoder_config,
    check_config,
    config,
    distance_quantiles,
    farther_away,
    nearest,
    with_centres,
)

FACTS = {
    "binning": 1,
    "pose_normalisation": False,
    "subtomogram_box_size": 8,
    "subtomogram_voxel_size_angstrom": 10.0,
}


def codes(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(count).random((count, 32), np.float32)


def model_of_clusters() -> tuple[ClusterModel, dict[str, Any]]:
    inner = autoencoder.config(8) | FACTS | {"weights_sha256": "of the autoencoder alone"}
    centres = codes(3)
    quantiles = distance_quantiles(nearest(codes(50), centres), 3)
    model = with_centres(Autoencoder3D(8, torch.Generator().manual_seed(0)), centres)
    return model, config(inner, quantiles)


def test_a_model_holds_its_autoencoder_and_centres() -> None:
    model, settings = model_of_clusters()
    files = model_files.write_model(model, settings)
    document = model_files.read_config(files["config.json"])
    read = model_files.read_model(document, files["model.safetensors"], architectures.build)
    assert isinstance(read, ClusterModel)
    assert torch.equal(read.centres, model.centres)
    boxes = torch.randn(2, 1, 8, 8, 8)
    assert torch.equal(read.autoencoder.encode(boxes), model.autoencoder.encode(boxes))
    inner = autoencoder_config(document)
    assert (inner["architecture"], inner["box_size"]) == ("autoencoder3d", 8)
    assert autoencoder_config(autoencoder.config(8) | FACTS)["architecture"] == "autoencoder3d"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"architecture": "autoencoder3d"}, "'autoencoder3d-clusters' is needed"),
        ({"architecture_version": 9}, "version 9"),
        ({"autoencoder_version": 9}, "autoencoder3d version 9"),
        ({"clusters": 4}, "distances"),
        ({"clusters": True}, "distances"),
        ({"distances": {"all": [0.0], "clusters": []}}, "distances"),
        ({"binning": 2}, "contradict"),
    ],
)
def test_configs_that_are_damaged(wrong: dict[str, Any], message: str) -> None:
    _, settings = model_of_clusters()
    check_config(settings)
    with pytest.raises(FailedPrecondition, match=message):
        check_config(settings | wrong)


def test_the_nearest_centre() -> None:
    points, centres = codes(5000), codes(7)
    found = nearest(points, centres)
    apart = np.linalg.norm(points[:, None].astype(np.float64) - centres[None], axis=2)
    np.testing.assert_array_equal(found.labels, apart.argmin(axis=1))
    np.testing.assert_allclose(found.distances, apart.min(axis=1), rtol=1e-12)
    assert nearest(centres[:1], np.repeat(centres[:1], 3, axis=0)).labels.tolist() == [0]


def test_how_many_lie_farther_away() -> None:
    labels = np.repeat([0, 1], [100, 300]).astype(np.int32)
    distances = np.concatenate([np.arange(100.0), np.arange(300.0) / 10])
    known = distance_quantiles(Assignment(labels, distances), 3)
    assert known["clusters"][2] is None
    assert known["clusters"][0] == pytest.approx(np.quantile(np.arange(100), QUANTILES))
    everywhere, shares = farther_away(Assignment(labels, distances), known)
    assert everywhere == pytest.approx(0.05)
    assert shares == [pytest.approx(0.05), pytest.approx(0.05), None]
    far = Assignment(np.array([0, 1, 1], np.int32), np.array([known["clusters"][0][FAR] + 1, 0.0, 1e6]))
    assert farther_away(far, known)[1] == [1.0, 0.5, None]
