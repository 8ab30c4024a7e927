"""Classification over real gRPC: training, adapting, comparing, and what is said to what can't work."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cryofleet.artifacts import ResultWriter
from cryofleet.particles import Particles
from cryofleet.progress import no_progress
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import VolumeInfo, write_subtomograms
from services.learning import architectures, class_prediction, model_files
from services.learning.classifiers import Classifier
from services.learning.preparation import standardise
from services.learning.service import service
from tests.contract.conftest import channel_to
from tests.contract.test_learning import refused, table
from tests.unit.learning.shapes import two_kinds

STATUS = grpc.StatusCode
VOXEL = 13.5
COUNT = 32
SIDE = 8
IDS = 100 + np.arange(COUNT)
CLASSES = np.where(np.arange(COUNT) % 2 == 0, 3, 7)
NAMES = np.where(CLASSES == 3, "ball", "shell").astype(object)

channel = channel_to(service)


def committed(store: Store, name: str) -> ResultWriter:
    return ResultWriter(store, "default", hashlib.sha256(name.encode()).hexdigest())


def commit(writer: ResultWriter) -> None:
    writer.commit(
        operation="io.Upload", version=1, parameters={}, inputs={}, result={}, seconds=0.0, device="cpu",
        software="test", host="test",
    )  # fmt: skip


def particles(rows: NDArray[Any] | slice = slice(None), **columns: Any) -> Particles:
    """Particles i with the id 100 + i, and further columns; None leaves one out."""
    values: dict[str, Any] = {"id": IDS, "class_id": CLASSES, "class_name": NAMES} | columns
    columns = {name: np.asarray(value)[rows] for name, value in values.items() if value is not None}
    positions = np.arange(3 * COUNT).reshape(-1, 3)[rows]
    return Particles.from_positions(positions, VOXEL, "t").with_columns(**columns)


def put_particles(store: Store, name: str, content: Particles) -> str:
    writer = committed(store, name)
    uri = writer.put("particles.parquet", content.to_parquet())
    commit(writer)
    return uri


def put_boxes(store: Store, name: str, seed: int, contrast: str = "dark", side: int = SIDE, **columns: Any) -> str:
    boxes = two_kinds(COUNT, side, seed)[0]
    writer = committed(store, name)
    info = VolumeInfo(boxes.shape[1:], VOXEL, contrast, -60, 60)
    content = particles(**columns)
    uri = write_subtomograms(writer, store, "boxes", -boxes if contrast == "dark" else boxes, info, content)
    commit(writer)
    return uri


@pytest.fixture
def subtomograms(store: Store) -> str:
    return put_boxes(store, "two-kinds", 0)


def training(uri: str, **parameters: Any) -> learning_pb2.TrainClassifierRequest:
    values: dict[str, Any] = {
        "network": "autoencoding", "max_epochs": 6, "learning_rate": 0.003, "batch_size": 8, "rotations": "cube",
        "validation_fraction": 0.25,
    }  # fmt: skip
    return learning_pb2.TrainClassifierRequest(subtomograms_uri=uri, **(values | parameters))


def predicted(store: Store, model_uri: str, seed: int) -> class_prediction.ClassPrediction:
    """The classes of boxes that the model has not met."""
    config = model_files.read_config(store.get(f"{model_uri}/config.json"))
    weights = store.get(f"{model_uri}/model.safetensors")
    model = model_files.read_model(config, weights, architectures.build)
    assert isinstance(model, Classifier)
    boxes = standardise(two_kinds(COUNT, SIDE, seed)[0])
    return class_prediction.predict(model, config, [(0, boxes)], COUNT, torch.device("cpu"), no_progress)


async def test_train_adapt_and_predict(channel: grpc.aio.Channel, store: Store, subtomograms: str) -> None:
    """Of the labels, a half is enough; the rest is learnt from unlabelled."""
    half = np.where(np.arange(COUNT) % 4 < 2, CLASSES, -1)
    labelled = put_particles(store, "labelled", particles(class_id=half, class_name=NAMES))
    result = (await call_operation(channel, training(subtomograms, particles_uri=labelled))).result
    assert list(result.names) == ["ball", "shell"]
    assert result.accuracy == 1.0
    config = table(store, f"{result.model_uri}/config.json")
    assert (config["architecture"], config["box_size"]) == ("autoencoding", SIDE)
    assert (config["class_ids"], config["class_names"]) == ([3, 7], ["ball", "shell"])
    assert config["class_counts"] == {"ball": 8, "shell": 8}
    metrics = table(store, result.metrics_uri)
    # A quarter of the 8 of each class.
    assert metrics["confusion_matrix"]["counts"] == [[2, 0], [0, 2]]
    assert [row["recall"] for row in metrics["classes"]] == [1.0, 1.0]
    assert metrics["temperature"] == config["temperature"] > 0
    assert metrics["calibration_error"] == result.calibration_error
    assert metrics["unlabelled_subtomograms"] == 16
    assert len(metrics["losses"]) == result.epochs
    assert "ball" in store.get(f"{result.model_uri}/card.md").decode()
    found = predicted(store, result.model_uri, 5)
    assert (found.labels == np.arange(COUNT) % 2).mean() > 0.9
    assert found.probabilities.sum(axis=1) == pytest.approx(np.ones(COUNT), abs=1e-5)

    # The target has the other contrast, and no classes at all.
    target = put_boxes(store, "target", 9, contrast="light", class_id=None, class_name=None)
    request = learning_pb2.AdaptClassifierRequest(
        model_uri=result.model_uri, subtomograms_uri=subtomograms, target_uri=target, max_epochs=2, batch_size=8,
        rotations="none",
    )  # fmt: skip
    adapted = (await call_operation(channel, request)).result
    assert adapted.epochs == 2
    after = table(store, f"{adapted.model_uri}/config.json")
    assert after["architecture"] == "autoencoding"
    assert after["adapted_from_weights_sha256"] == config["weights_sha256"] != after["weights_sha256"]
    assert {"training_discrimination", "validation_domains_told"} <= table(store, adapted.metrics_uri)["losses"][
        0
    ].keys()
    assert (predicted(store, adapted.model_uri, 5).labels == np.arange(COUNT) % 2).mean() > 0.9

    for change, message in (
        (
            {"particles_uri": put_particles(store, "o", particles(class_name=None))},
            "class 3, '3', is none of the model",
        ),
        ({"particles_uri": put_particles(store, "b", particles(CLASSES == 3))}, "fewer than 2 particles .* 'shell'"),
    ):
        assert await refused_with(channel, request, change, STATUS.INVALID_ARGUMENT, message)
    large = put_boxes(store, "large", 9, side=16)
    assert await refused_with(channel, request, {"target_uri": large}, STATUS.FAILED_PRECONDITION, "boxes of 16 voxels")


async def refused_with(
    channel: grpc.aio.Channel, request: Any, change: dict[str, Any], status: grpc.StatusCode, message: str
) -> bool:
    changed = type(request)()
    changed.CopyFrom(request)
    for name, value in change.items():
        setattr(changed, name, value)
    code, details = await refused(channel, changed)
    assert code == status
    assert re.search(message, details), details
    return True


async def test_an_open_set_model_has_its_threshold(channel: grpc.aio.Channel, store: Store, subtomograms: str) -> None:
    result = (await call_operation(channel, training(subtomograms, network="open-set", max_epochs=2))).result
    config = table(store, f"{result.model_uri}/config.json")
    assert config["rejection_distance"] > 0
    assert config["view_rotations"] == "cube"
    found = predicted(store, result.model_uri, 5)
    assert found.distances is not None
    assert found.rejected is not None
    assert np.array_equal(found.rejected, found.distances > config["rejection_distance"])


async def test_what_can_not_be_trained_on(channel: grpc.aio.Channel, store: Store, subtomograms: str) -> None:
    def given(name: str, rows: Any = slice(None), **columns: Any) -> dict[str, Any]:
        return {"particles_uri": put_particles(store, name, particles(rows, **columns))}

    lonely = np.where(np.arange(COUNT) == 5, 9, CLASSES)
    two_names = np.where(np.arange(COUNT) == 0, "sphere", NAMES).astype(object)
    supervised = training(subtomograms, network="dsrf3d-v2")
    for change, message in (
        (given("no-classes", class_id=None), "has no column class_id"),
        (given("one-class", CLASSES == 3), "the particles are only of class 'ball'; a classifier needs at least 2"),
        (given("one-member", class_id=lonely, class_name=None), "class '9' has 1 particle"),
        (
            given("unlabelled", class_id=np.where(IDS == 104, -1, CLASSES)),
            "particle 104 has class_id -1.*'autoencoding'",
        ),
        (given("below", class_id=np.where(IDS == 104, -2, CLASSES)), "particle 104 has class_id -2"),
        (given("two-names", class_name=two_names), "class 3 is called 'sphere' and 'ball'"),
        (given("one-name", class_name=np.full(COUNT, "x", object)), "classes 3 and 7 are both called 'x'"),
        (given("strangers", id=IDS + 1000), "particle 1100 of .* has no subtomogram"),
        ({"binning": 4}, "a multiple of 4 voxels, after binning: it is 2"),
    ):
        assert await refused_with(channel, supervised, change, STATUS.INVALID_ARGUMENT, message)


async def test_compare_classes(channel: grpc.aio.Channel, store: Store) -> None:
    truth = put_particles(store, "truth", particles())
    # The first ball is taken for a shell; the last four particles are not there.
    wrong = np.where(np.arange(COUNT) == 0, 7, CLASSES)
    names = np.where(wrong == 3, "ball", "shell").astype(object)
    scores = np.where(CLASSES == 7, 0.9, 0.1)
    rows = np.arange(COUNT - 4)[::-1].copy()
    found = put_particles(store, "found", particles(rows, class_id=wrong, class_name=names, score=scores))
    request = learning_pb2.CompareClassesRequest(particles_uri=found, truth_uri=truth, known_classes=[7])
    result = (await call_operation(channel, request)).result
    assert result.accuracy == result.purity == pytest.approx(27 / 28)
    assert 0 < result.adjusted_rand_index < 1
    assert 0 < result.normalised_mutual_information < 1
    assert result.area_under_roc == 1.0
    metrics = table(store, result.metrics_uri)
    assert metrics["confusion_matrix"]["counts"] == [[13, 1], [0, 14]]
    assert (metrics["particles"], metrics["only_in_truth"]) == (28, 4)
    assert metrics["classes"][0]["recall"] == pytest.approx(13 / 14)

    # Clusters have no names, and numbers that mean nothing.
    clusters = put_particles(store, "clusters", particles(class_id=np.arange(COUNT) % 2, class_name=None))
    request = learning_pb2.CompareClassesRequest(particles_uri=clusters, truth_uri=truth)
    result = (await call_operation(channel, request)).result
    assert result.accuracy == result.normalised_mutual_information == 1.0
    assert not result.HasField("area_under_roc")

    request = learning_pb2.CompareClassesRequest(particles_uri=truth, truth_uri=found)
    code, message = await refused(channel, request)
    assert (code, "truth has no particle 128, and lacks 4 of 32" in message) == (STATUS.INVALID_ARGUMENT, True)
    request = learning_pb2.CompareClassesRequest(particles_uri=clusters, truth_uri=truth, known_classes=[7])
    assert await refused_with(channel, request, {}, STATUS.INVALID_ARGUMENT, "no column score")
