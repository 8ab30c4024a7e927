"""Predict over real gRPC: all kinds of networks, on subtomograms and on whole tomograms."""

from __future__ import annotations

import hashlib
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cryofleet.artifacts import ResultWriter
from cryofleet.numerics.fourier import fourier_crop
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import VolumeInfo, encode_volume, open_volume
from services.learning import architectures, autoencoder, classifiers, dsrf3d, edss3d, open_set
from services.learning.edss3d import EDSS3D
from services.learning.overlap_tile import standardise_locally
from services.learning.service import service
from tests.contract.conftest import channel_to
from tests.contract.learning_models import VOXEL, data_facts, put_model, put_weights
from tests.contract.test_learning import put_particles, put_subtomograms, refused, table
from tests.unit.learning.shapes import two_kinds

STATUS = grpc.StatusCode
NAMES = ["background", "membrane", "globule"]

channel = channel_to(service)


def put_tomogram(store: Store, name: str, voxels: NDArray[np.float32], voxel_size: float = VOXEL, **more: Any) -> str:
    """A tomogram with dark protein, of voxels with protein positive."""
    writer = ResultWriter(store, "default", hashlib.sha256(name.encode()).hexdigest())
    shape = voxels.shape[-3:]
    info = VolumeInfo((shape[0], shape[1], shape[2]), voxel_size, "dark", -60, 60, **more)
    uri = writer.put("tomogram.mrc", encode_volume(-voxels, info))
    writer.commit(
        operation="io.Ingest", version=1, parameters={}, inputs={}, result={}, seconds=0.0, device="cpu",
        software="test", host="test",
    )  # fmt: skip
    return uri


def noise(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def segmenter(binning: int = 1) -> dict[str, Any]:
    return edss3d.config(NAMES) | data_facts(8, binning)


async def test_codes(channel: grpc.aio.Channel, store: Store) -> None:
    model = put_model(store, "autoencoder", autoencoder.config(8) | data_facts())
    subtomograms = put_subtomograms(store, "boxes", two_kinds(6, 16, 0)[0])
    chosen = put_particles(store, "some", [103, 100])
    request = learning_pb2.PredictRequest(model_uri=model, subtomograms_uri=subtomograms, particles_uri=chosen)
    result = (await call_operation(channel, request)).result
    codes = table(store, result.table_uri)
    assert codes["id"] == [103, 100]
    assert np.array(codes["codes"]).shape == (2, 32)
    assert not result.labels_uri
    tomogram = put_tomogram(store, "tomogram", noise(16, 16, 16))
    code, message = await refused(channel, learning_pb2.PredictRequest(model_uri=model, tomogram_uri=tomogram))
    assert code == STATUS.INVALID_ARGUMENT
    assert "gives codes of subtomograms" in message


async def test_labels_of_subtomograms(channel: grpc.aio.Channel, store: Store) -> None:
    model = put_model(store, "segmenter", segmenter(binning=2))
    boxes = two_kinds(5, 16, 0)[0] * np.array([1, 2, 4, 1, 1], np.float32)[:, None, None, None]
    request = learning_pb2.PredictRequest(
        model_uri=model,
        subtomograms_uri=put_subtomograms(store, "boxes", boxes),
        particles_uri=put_particles(store, "some", [104, 101, 102]),
        probabilities=True,
    )
    result = (await call_operation(channel, request)).result
    labels = open_volume(store, result.labels_uri)
    assert labels.info == VolumeInfo((16, 16, 16), VOXEL, "light", -60, 60, count=3)
    assert list(result.names) == NAMES
    # Counted as the network sees them, binned by 2.
    assert sum(result.sizes) == 3 * 8**3
    chances = np.stack([open_volume(store, uri).read() for uri in result.probability_uris])
    np.testing.assert_allclose(chances.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(chances.argmax(axis=0), labels.read())
    # One scale for all five, the two that were not chosen among them.
    binned = fourier_crop(boxes, 2)
    network = architectures.build(segmenter(binning=2), torch.Generator().manual_seed(0)).eval()
    assert isinstance(network, EDSS3D)
    with torch.no_grad():
        scaled = torch.from_numpy((binned - binned.mean()) / binned.std())[[4, 1, 2]]
        expected = network.probabilities(scaled[:, None]).numpy()
    np.testing.assert_allclose(chances.swapaxes(0, 1)[..., ::2, ::2, ::2], expected, rtol=0, atol=1e-5)
    assert Particles.from_parquet(store.get(result.particles_uri)).table["id"].tolist() == [104, 101, 102]


async def test_labels_of_a_tomogram(channel: grpc.aio.Channel, store: Store) -> None:
    model = put_model(store, "segmenter", segmenter())
    voxels = noise(18, 24, 30)
    request = learning_pb2.PredictRequest(
        model_uri=model, tomogram_uri=put_tomogram(store, "tomogram", voxels), tile_size_voxels=16, probabilities=True
    )
    result = (await call_operation(channel, request)).result
    assert open_volume(store, result.labels_uri).info == VolumeInfo((18, 24, 30), VOXEL, "light", -60, 60)
    network = architectures.build(segmenter(), torch.Generator().manual_seed(0)).eval()
    assert isinstance(network, EDSS3D)
    whole = np.pad(standardise_locally(voxels, 16), [(0, 2), (0, 0), (0, 2)])
    with torch.no_grad():
        expected = network.probabilities(torch.from_numpy(whole)[None, None])[0, :, :18, :, :30].numpy()
    chances = np.stack([open_volume(store, uri).read() for uri in result.probability_uris])
    np.testing.assert_allclose(chances, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(open_volume(store, result.scores_uri).read(), chances.max(axis=0))
    assert sum(result.sizes) == voxels.size
    metrics = table(store, result.metrics_uri)
    assert metrics["mean_probabilities"] == pytest.approx(expected.mean(axis=(1, 2, 3)).tolist(), rel=1e-4)


async def test_a_tomogram_that_is_binned_for_the_network(channel: grpc.aio.Channel, store: Store) -> None:
    model = put_model(store, "segmenter", segmenter(binning=2))
    tomogram = put_tomogram(store, "tomogram", noise(17, 20, 24))
    result = (await call_operation(channel, learning_pb2.PredictRequest(model_uri=model, tomogram_uri=tomogram))).result
    labels = open_volume(store, result.labels_uri)
    assert labels.info.shape == (17, 20, 24)
    assert sum(result.sizes) == 8 * 10 * 12
    assert open_volume(store, result.scores_uri).info == labels.info
    found = labels.read()
    np.testing.assert_array_equal(found[0:16:2, ::2, ::2], found[1:16:2, 1::2, 1::2])


def classifier(name: str, **more: Any) -> dict[str, Any]:
    module = {"dsrf3d-v2": dsrf3d, "open-set": open_set}[name]
    config = classifiers.config(name, module.VERSION, 8, [3, 7], ["ball", "shell"])
    return config | data_facts() | {"temperature": 1.5} | more


async def test_classes_of_subtomograms(channel: grpc.aio.Channel, store: Store) -> None:
    subtomograms = put_subtomograms(store, "boxes", two_kinds(6, 16, 0)[0])
    model = put_model(store, "classifier", classifier("dsrf3d-v2"))
    result = (
        await call_operation(channel, learning_pb2.PredictRequest(model_uri=model, subtomograms_uri=subtomograms))
    ).result
    chances = np.array(table(store, result.table_uri)["probabilities"])
    found = Particles.from_parquet(store.get(result.particles_uri)).table
    assert found["class_id"].tolist() == np.array([3, 7])[chances.argmax(axis=1)].tolist()
    assert found["class_name"].tolist() == np.array(["ball", "shell"])[chances.argmax(axis=1)].tolist()
    assert found["score"].tolist() == pytest.approx(chances.max(axis=1).tolist(), abs=1e-5)
    assert list(result.names) == ["ball", "shell"]
    assert sum(result.sizes) == 6


async def test_rejected_subtomograms_are_in_further_classes(channel: grpc.aio.Channel, store: Store) -> None:
    subtomograms = put_subtomograms(store, "boxes", two_kinds(6, 16, 0)[0])
    # So near a class is none.
    config = classifier("open-set", rejection_distance=1e-6, view_rotations="cube")
    network = architectures.build(config, torch.Generator().manual_seed(0))
    assert isinstance(network, open_set.OpenSetClassifier)
    model = put_weights(store, "open-set", network, config)
    request = learning_pb2.PredictRequest(model_uri=model, subtomograms_uri=subtomograms, unseen_classes=2)
    result = (await call_operation(channel, request)).result
    assert list(result.names) == ["ball", "shell", "unseen 1", "unseen 2"]
    assert list(result.sizes[:2]) == [0, 0]
    assert sum(result.sizes) == 6
    assert set(Particles.from_parquet(store.get(result.particles_uri)).table["class_id"]) == {8, 9}


async def test_a_classifier_over_a_tomogram(channel: grpc.aio.Channel, store: Store) -> None:
    config = classifier("dsrf3d-v2", class_names=["background", "shell"])
    voxels = noise(20, 24, 24)
    voxels[:, :, 20:] = 0.5
    tomogram = put_tomogram(store, "tomogram", voxels)
    request = learning_pb2.PredictRequest(
        model_uri=put_model(store, "classifier", config), tomogram_uri=tomogram, probabilities=True
    )
    result = (await call_operation(channel, request)).result
    assert list(result.names) == ["background", "shell"]
    chances = np.stack([open_volume(store, uri).read() for uri in result.probability_uris])
    labels = open_volume(store, result.labels_uri).read()
    np.testing.assert_allclose(chances.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(labels, chances.argmax(axis=0))
    code, message = await refused(
        channel,
        learning_pb2.PredictRequest(
            model_uri=put_model(store, "classifier", config), tomogram_uri=put_tomogram(store, "thin", noise(8, 24, 24))
        ),
    )
    assert code == STATUS.INVALID_ARGUMENT
    assert "side of 4 voxels, and the network takes boxes of 8" in message


async def test_what_does_not_fit(channel: grpc.aio.Channel, store: Store) -> None:
    model = put_model(store, "segmenter", segmenter())
    tomogram = put_tomogram(store, "tomogram", noise(16, 16, 16))
    subtomograms = put_subtomograms(store, "boxes", two_kinds(3, 16, 0)[0])

    async def fails(status: grpc.StatusCode, words: str, **fields: Any) -> None:
        code, message = await refused(channel, learning_pb2.PredictRequest(**({"model_uri": model} | fields)))
        assert (code, words in message) == (status, True), message

    await fails(STATUS.INVALID_ARGUMENT, "one of the two")
    await fails(STATUS.INVALID_ARGUMENT, "one of the two", tomogram_uri=tomogram, subtomograms_uri=subtomograms)
    await fails(STATUS.INVALID_ARGUMENT, "particles_uri", tomogram_uri=tomogram, particles_uri=tomogram)
    await fails(STATUS.FAILED_PRECONDITION, "boxes of 16 voxels", subtomograms_uri=subtomograms)
    other = put_tomogram(store, "fine", noise(16, 16, 16), voxel_size=5.0)
    await fails(STATUS.FAILED_PRECONDITION, "voxels of 5 Å; the model was trained", tomogram_uri=other)
    stack = put_tomogram(store, "stack", noise(2, 16, 16, 16), count=2)
    await fails(STATUS.FAILED_PRECONDITION, "a stack of 2 volumes", tomogram_uri=stack)

    brought = f"{store.root}/default/brought/model"
    weights = store.get(f"{model}/model.safetensors")
    config = store.get(f"{model}/config.json")
    store.put(f"{brought}/model.safetensors", weights)
    store.put(f"{brought}/config.json", config.replace(b'"edss3d"', b'"section-annotator"'))
    await fails(STATUS.FAILED_PRECONDITION, "'section-annotator'", tomogram_uri=tomogram, model_uri=brought)
    store.put(f"{brought}/config.json", config)
    store.put(f"{brought}/model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    await fails(STATUS.DATA_LOSS, "model.safetensors", tomogram_uri=tomogram, model_uri=brought)
    store.put(f"{model}/model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    await fails(STATUS.DATA_LOSS, "model.safetensors", tomogram_uri=tomogram)
