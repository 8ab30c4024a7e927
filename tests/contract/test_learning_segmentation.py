"""TrainSegmenter over real gRPC."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import open_volume
from services.learning import autoencoder
from services.learning.service import service
from tests.contract.conftest import channel_to
from tests.contract.learning_models import VOXEL, data_facts, put_model
from tests.contract.test_learning import put_subtomograms, refused, table
from tests.unit.learning.shapes import two_kinds

STATUS = grpc.StatusCode
COUNT = 14

channel = channel_to(service)


def put_selected(store: Store, **columns: Any) -> str:
    """Particles 100, 101, ... as SelectClusters gives them, balls and shells by turns."""
    values: dict[str, Any] = {
        "id": 100 + np.arange(COUNT),
        "class_id": np.arange(COUNT) % 2 + 1,
        "class_name": np.array(["ball", "shell"], object)[np.arange(COUNT) % 2],
    }
    values = {name: np.resize(value, COUNT) for name, value in (values | columns).items() if value is not None}
    particles = Particles.from_positions(np.zeros((COUNT, 3)), VOXEL, "t", **values)
    uri = f"{store.root}/default/brought/selected-{len(list(store.list(store.root)))}.parquet"
    store.put(uri, particles.to_parquet())
    return uri


def request(store: Store, subtomograms: str, model: str, **parameters: Any) -> learning_pb2.TrainSegmenterRequest:
    values: dict[str, Any] = {
        "subtomograms_uri": subtomograms,
        "model_uri": model,
        "max_epochs": 3,
        "batch_size": 4,
        "validation_fraction": 0.25,
    }
    values |= parameters
    values.setdefault("particles_uri", put_selected(store))
    return learning_pb2.TrainSegmenterRequest(**values)


@pytest.mark.parametrize("pose_normalisation", [False, True])
async def test_training(channel: grpc.aio.Channel, store: Store, pose_normalisation: bool) -> None:
    subtomograms = put_subtomograms(store, "boxes", two_kinds(COUNT, 16, 0)[0])
    facts = data_facts(pose_normalisation=pose_normalisation)
    model = put_model(store, "autoencoder", autoencoder.config(8) | facts)
    trained = (await call_operation(channel, request(store, subtomograms, model))).result
    assert list(trained.names) == ["background", "ball", "shell"]
    assert trained.epochs == 3
    config = table(store, f"{trained.model_uri}/config.json")
    assert config["architecture"] == "edss3d"
    assert config["class_names"] == ["background", "ball", "shell"]
    assert config["class_counts"] == {"ball": 7, "shell": 7}
    assert config["pose_normalisation"] is False
    assert (config["box_size"], config["levels"]) == (8, {"ball": 0.5, "shell": 0.5})
    assert config["intensity"].startswith("all boxes of a set together")
    metrics = table(store, trained.metrics_uri)
    assert metrics["validation_subtomograms"] == 4
    assert metrics["losses"][-1]["training_loss"] < metrics["losses"][0]["training_loss"]
    assert sum(metrics["shares_of_voxels"].values()) == pytest.approx(1)
    labels = open_volume(store, trained.labels_uri)
    assert labels.info.count == 8
    assert labels.info.voxel_size_angstrom == 2 * VOXEL
    shown = labels.read()
    assert set(np.unique(shown[:4])) == {0, 1}
    assert set(np.unique(shown[4:])) == {0, 2}
    assert 0 < (shown > 0).mean() < 0.5


async def test_boxes_of_background(channel: grpc.aio.Channel, store: Store) -> None:
    subtomograms = put_subtomograms(store, "boxes", two_kinds(COUNT, 16, 0)[0])
    model = put_model(store, "autoencoder", autoencoder.config(8) | data_facts())
    selected = put_selected(store, class_name=np.array(["background", "shell"], object))
    trained = (await call_operation(channel, request(store, subtomograms, model, particles_uri=selected))).result
    assert list(trained.names) == ["background", "shell"]
    assert table(store, f"{trained.model_uri}/config.json")["class_counts"] == {"background": 7, "shell": 7}
    shown = open_volume(store, trained.labels_uri).read()
    assert not shown[:4].any()
    assert set(np.unique(shown[4:])) == {0, 1}


async def test_a_network_with_a_skip(channel: grpc.aio.Channel, store: Store) -> None:
    subtomograms = put_subtomograms(store, "boxes", two_kinds(COUNT, 16, 0)[0])
    model = put_model(store, "autoencoder", autoencoder.config(8) | data_facts())
    trained = (await call_operation(channel, request(store, subtomograms, model, skip=True, max_epochs=1))).result
    assert table(store, f"{trained.model_uri}/config.json")["skip"] is True
    predict = learning_pb2.PredictRequest(model_uri=trained.model_uri, subtomograms_uri=subtomograms)
    assert list((await call_operation(channel, predict)).result.names) == ["background", "ball", "shell"]


async def test_levels_of_classes(channel: grpc.aio.Channel, store: Store) -> None:
    subtomograms = put_subtomograms(store, "boxes", two_kinds(COUNT, 16, 0)[0])
    model = put_model(store, "autoencoder", autoencoder.config(8) | data_facts())
    made = {"max_epochs": 1, "box_smoothing_angstrom": VOXEL}
    trained = (await call_operation(channel, request(store, subtomograms, model, **made))).result
    lower = (
        await call_operation(channel, request(store, subtomograms, model, class_levels=["shell: 0.2"], **made))
    ).result
    assert table(store, f"{lower.model_uri}/config.json")["levels"] == {"ball": 0.5, "shell": 0.2}
    before, after = (open_volume(store, each.labels_uri).read() for each in (trained, lower))
    np.testing.assert_array_equal(before[:4], after[:4])
    assert (after[4:] >= before[4:]).all()
    assert after[4:].sum() > 1.1 * before[4:].sum()

    wrong = request(store, subtomograms, model, class_levels=["cube:0.2"])
    code, message = await refused(channel, wrong)
    assert (code, "'cube' is no class; there are 'ball', 'shell'" in message) == (STATUS.INVALID_ARGUMENT, True)


async def test_particles_that_are_no_classes(channel: grpc.aio.Channel, store: Store) -> None:
    subtomograms = put_subtomograms(store, "boxes", two_kinds(COUNT, 16, 0)[0])
    model = put_model(store, "autoencoder", autoencoder.config(8) | data_facts())
    names = np.array(["ball"] * 13 + ["shell"], object)
    for columns, words in (
        ({"class_id": None}, "has no column class_id"),
        ({"class_name": None}, "has no column class_name"),
        ({"class_id": np.arange(COUNT)}, "particle 100 of"),
        ({"class_id": np.ones(COUNT, int), "class_name": names}, "class 1 is named 'ball' and 'shell'"),
        ({"class_name": np.array(["ball"], object)}, "class 2 is named 'ball'; each class needs a name of its own"),
        ({"class_name": np.array(["background"], object), "class_id": 1}, "has no class but 'background'"),
        ({"id": 100 + 2 * np.arange(COUNT)}, "has no subtomogram in"),
    ):
        wrong = request(store, subtomograms, model, particles_uri=put_selected(store, **columns))
        code, message = await refused(channel, wrong)
        assert code == STATUS.INVALID_ARGUMENT
        assert words in message
    other = put_subtomograms(store, "other", two_kinds(COUNT, 16, 0)[0], voxel_size=10.0)
    code, message = await refused(channel, request(store, other, model))
    assert code == STATUS.FAILED_PRECONDITION
    assert "voxels of 10 Å" in message
