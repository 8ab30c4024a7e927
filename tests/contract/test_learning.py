"""The learning service over real gRPC: training, resuming, clustering, and what it says to what can't work."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow.parquet as pq
import pytest
from google.protobuf.message import Message
from numpy.typing import NDArray

from cryofleet.artifacts import ResultWriter
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import Reply, call_operation, running_server, settings_for
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import VolumeInfo, open_volume, write_subtomograms
from services.learning.service import service
from tests.contract.conftest import channel_to
from tests.unit.learning.shapes import two_kinds

STATUS = grpc.StatusCode
VOXEL = 13.5
COUNT = 36
SIDE = 16

channel = channel_to(service)


def put_subtomograms(
    store: Store, name: str, boxes: NDArray[np.float32], voxel_size: float = VOXEL, contrast: str = "dark"
) -> str:
    """Boxes with protein positive, stored in the contrast; particle i has the id 100 + i and a class's name."""
    writer = ResultWriter(store, "default", hashlib.sha256(name.encode()).hexdigest())
    positions = np.arange(3 * len(boxes)).reshape(-1, 3)
    ids = 100 + np.arange(len(boxes))
    names = np.array(["ball", "shell"], object)[np.arange(len(boxes)) % 2]
    particles = Particles.from_positions(positions, voxel_size, "t", id=ids, class_name=names)
    info = VolumeInfo(boxes.shape[1:], voxel_size, contrast, -60, 60)
    uri = write_subtomograms(writer, store, "boxes", -boxes if contrast == "dark" else boxes, info, particles)
    writer.commit(
        operation="picking.Extract", version=1, parameters={}, inputs={}, result={}, seconds=0.0, device="cpu",
        software="test", host="test",
    )  # fmt: skip
    return uri


def put_particles(store: Store, name: str, ids: list[int]) -> str:
    """A table of particles with those ids."""
    writer = ResultWriter(store, "default", hashlib.sha256(name.encode()).hexdigest())
    table = Particles.from_positions(np.zeros((len(ids), 3)), VOXEL, "t", id=np.array(ids))
    uri = writer.put("particles.parquet", table.to_parquet())
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0.0)
    return uri


@pytest.fixture
def subtomograms(store: Store) -> str:
    return put_subtomograms(store, "two-kinds", two_kinds(COUNT, SIDE, 0)[0])


def training(uri: str, **parameters: Any) -> learning_pb2.TrainAutoencoderRequest:
    values: dict[str, Any] = {"binning": 2, "max_epochs": 5, "learning_rate": 0.003}
    return learning_pb2.TrainAutoencoderRequest(subtomograms_uri=uri, **(values | parameters))


async def refused(channel: grpc.aio.Channel, request: Message) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call_operation(channel, request)
    assert error.value.details() is not None
    return error.value.code(), str(error.value.details())


def table(store: Store, uri: str) -> dict[str, Any]:
    content = json.loads(store.get(uri))
    assert isinstance(content, dict)
    return content


async def test_train_and_cluster(channel: grpc.aio.Channel, store: Store, subtomograms: str) -> None:
    trained = await call_operation(channel, training(subtomograms, validation_fraction=0.25, max_epochs=20))
    model = trained.result
    assert model.epochs == 20
    assert 1 <= model.best_epoch <= 20
    config = table(store, f"{model.model_uri}/config.json")
    assert (config["architecture"], config["box_size"], config["binning"]) == ("autoencoder3d", 8, 2)
    assert config["subtomogram_voxel_size_angstrom"] == VOXEL
    assert config["contrast"] == "light"
    assert config["figures"]["validation_subtomograms"] == 9
    metrics = table(store, model.metrics_uri)
    assert [row["epoch"] for row in metrics["losses"]] == list(range(1, 21))
    assert min(row["validation_loss"] for row in metrics["losses"]) == pytest.approx(model.best_validation_loss)
    assert metrics["losses"][-1]["training_loss"] < metrics["losses"][0]["training_loss"]
    assert metrics["restarts"] == 0

    request = learning_pb2.ClusterRequest(
        subtomograms_uri=subtomograms, model_uri=model.model_uri, clusters=2, largest=5
    )
    result = (await call_operation(channel, request)).result
    assert sorted(result.sizes) == [COUNT // 2, COUNT // 2]
    classified = Particles.from_parquet(store.get(result.particles_uri))
    classes = classified.table["class_id"].to_numpy()
    assert (classes[::2] == classes[0]).all()
    assert (classes[1::2] == 1 - classes[0]).all()
    assert classified.table["id"].tolist() == list(range(100, 100 + COUNT))
    assert "class_name" not in classified.table
    assert len(result.largest_uris) == 2
    for number, uri in enumerate(result.largest_uris):
        members = Particles.from_parquet(store.get(uri)).table
        assert (members["class_id"] == number).all()
        assert members["id"].tolist() == [100 + i for i in range(COUNT) if classes[i] == number]

    centres = open_volume(store, result.centres_uri)
    assert centres.info == VolumeInfo((8, 8, 8), 2 * VOXEL, "light", -60, 60, count=2)
    pictures = centres.read()
    ball, shell = pictures[classes[0]], pictures[classes[1]]
    assert ball[4, 4, 4] > 1.0, "a ball is bright in its middle"
    assert shell[4, 4, 4] < ball[4, 4, 4] - 1.0

    codes = pq.read_table(io.BytesIO(store.get(result.particles_uri.rpartition("/")[0] + "/codes.parquet")))
    assert codes.column_names == ["id", *(f"code_{i}" for i in range(32))]
    assert codes["id"].to_pylist() == list(range(100, 100 + COUNT))
    figures = table(store, result.metrics_uri)
    assert figures["sizes"] == list(result.sizes)
    assert figures["code_standard_deviations"] == pytest.approx(
        [float(codes[f"code_{i}"].to_numpy().astype(np.float64).std()) for i in range(32)]
    )


async def test_some_of_the_subtomograms_are_trained_on_and_the_card_says_how(
    channel: grpc.aio.Channel, store: Store, subtomograms: str
) -> None:
    table = put_particles(store, "chosen", [103, 101, 130, 120, 121, 122, 135])
    request = training(
        subtomograms,
        particles_uri=table,
        max_epochs=2,
        validation_fraction=0.3,
        rotations="cube",
        contrast_jitter=0.1,
        noise_jitter=0.2,
        wedge_jitter=5,
    )
    result = (await call_operation(channel, request)).result
    config = json.loads(store.get(f"{result.model_uri}/config.json"))
    assert config["subtomograms"] == 7
    assert (config["figures"]["training_subtomograms"], config["figures"]["validation_subtomograms"]) == (5, 2)
    assert config["parameters"]["rotations"] == "cube"
    assert len(config["particles_digest"]) == len(config["subtomograms_digest"]) == 64
    card = store.get(f"{result.model_uri}/card.md").decode()
    assert card.startswith("# autoencoder3d, version 1\n")
    for line in (
        "- Subtomograms trained on: 5",
        "- Box side (voxels): 16",
        "- Voxel size (Å): 13.5",
        "- Contrast of the subtomograms: dark",
        "- Tilt range (degrees): -60, 60",
        f"- Digest of the subtomograms: {config['subtomograms_digest']}",
        "- rotations: cube",
        "- epochs: 2",
        "## Use",
        "## Limits",
    ):
        assert line in card.splitlines(), card
    assert "Zeng et al. 2018" in card
    # It may be given away: neither it nor the config says where anything lies.
    for text in (card, json.dumps(config)):
        assert store.root not in text
        assert "store:/" not in text
    # Boxes of other sets are in the digest that names the result.
    plain = (await call_operation(channel, training(subtomograms, max_epochs=2))).result
    assert plain.model_uri != result.model_uri
    entries = [found.uri for found in store.list(f"{store.root}/default/_models")]
    assert len(entries) == 2


async def test_augmentation_and_choices_that_can_not_be(
    channel: grpc.aio.Channel, store: Store, subtomograms: str
) -> None:
    code, message = await refused(channel, training(subtomograms, wedge_jitter=5, pose_normalisation=True))
    assert code == STATUS.INVALID_ARGUMENT
    assert "wedge_jitter" in message
    code, message = await refused(channel, training(subtomograms, wedge_jitter=60))
    assert code == STATUS.INVALID_ARGUMENT
    assert "from -60 to 60 degrees nothing may be left" in message
    code, message = await refused(channel, training(subtomograms, rotations="all"))
    assert code == STATUS.INVALID_ARGUMENT
    assert "rotations" in message
    strange = put_particles(store, "strange", [100, 7])
    code, message = await refused(channel, training(subtomograms, particles_uri=strange))
    assert code == STATUS.INVALID_ARGUMENT
    assert f"particle 7 of {strange} has no subtomogram" in message
    one = put_particles(store, "one-particle", [100])
    code, message = await refused(channel, training(subtomograms, particles_uri=one))
    assert code == STATUS.INVALID_ARGUMENT
    assert f"{one} has 1 subtomogram" in message


async def test_models_with_pose_normalisation(channel: grpc.aio.Channel, store: Store, subtomograms: str) -> None:
    request = training(subtomograms, pose_normalisation=True, max_epochs=1)
    model = (await call_operation(channel, request)).result
    assert table(store, f"{model.model_uri}/config.json")["pose_normalisation"] is True
    clusters = learning_pb2.ClusterRequest(
        subtomograms_uri=subtomograms, model_uri=model.model_uri, clusters=3, largest=0
    )
    result = (await call_operation(channel, clusters)).result
    assert not result.largest_uris
    # Each box was turned another way, so the centres have no missing wedge in common.
    info = open_volume(store, result.centres_uri).info
    assert (info.tilt_min_degrees, info.tilt_max_degrees) == (-90, 90)


async def test_a_cancelled_training_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    results = []
    for name, cancel in (("cancelled", True), ("undisturbed", False)):
        settings = settings_for(tmp_path / name, address=f"unix:{tmp_path}/{name}.sock")
        store = Store.open(settings)
        uri = put_subtomograms(store, "two-kinds", two_kinds(COUNT, SIDE, 0)[0])
        request = training(uri, max_epochs=12)
        async with running_server(service, settings) as channel:
            if cancel:
                call = channel.unary_stream(
                    "/cryofleet.v1.LearningService/TrainAutoencoder",
                    request_serializer=learning_pb2.TrainAutoencoderRequest.SerializeToString,
                    response_deserializer=learning_pb2.TrainAutoencoderResponse.FromString,
                )(request)
                while not any("_work" in found.uri for found in store.list(store.root)):
                    await asyncio.sleep(0.02)
                call.cancel()
                # The next call of the same name is refused until the first one has stopped.
                reply = await call_once_free(channel, request)
                epochs_seen = {report.counters["epoch"] for report in reply.progress if "epoch" in report.counters}
                assert 1 not in epochs_seen, "the second call began where the first was stopped"
            else:
                reply = await call_operation(channel, request)
        assert not any("_work" in found.uri for found in store.list(store.root)), "checkpoints go with the commit"
        results.append(store.get(f"{reply.result.model_uri}/model.safetensors"))
    assert results[0] == results[1]


async def call_once_free(channel: grpc.aio.Channel, request: Message) -> Reply:
    for _ in range(100):
        try:
            return await call_operation(channel, request)
        except grpc.aio.AioRpcError as error:
            if error.code() != STATUS.RESOURCE_EXHAUSTED:
                raise
        await asyncio.sleep(0.1)
    raise TimeoutError("the service did not get free")


async def test_sets_that_can_not_be_learnt_from(channel: grpc.aio.Channel, store: Store, subtomograms: str) -> None:
    code, message = await refused(channel, training(subtomograms, binning=3))
    assert code == STATUS.INVALID_ARGUMENT
    assert "binning" in message
    code, message = await refused(channel, training(subtomograms, binning=8))
    assert code == STATUS.INVALID_ARGUMENT
    assert "multiple of 4" in message
    one = put_subtomograms(store, "one", two_kinds(1, SIDE, 0)[0])
    code, message = await refused(channel, training(one))
    assert code == STATUS.INVALID_ARGUMENT
    assert "has 1 subtomogram" in message
    boxes = two_kinds(5, SIDE, 0)[0]
    boxes[3] = 1.5
    code, message = await refused(channel, training(put_subtomograms(store, "constant", boxes)))
    assert code == STATUS.INVALID_ARGUMENT
    assert "particle 103 is constant" in message
    code, message = await refused(channel, training(f"{store.root}/default/inputs-none/boxes.json"))
    assert code == STATUS.NOT_FOUND
    code, message = await refused(channel, training(subtomograms, batch_size=0))
    assert code == STATUS.INVALID_ARGUMENT
    assert "batch_size" in message


async def test_models_that_do_not_fit(channel: grpc.aio.Channel, store: Store, subtomograms: str) -> None:
    model = (await call_operation(channel, training(subtomograms, max_epochs=1))).result.model_uri

    def clusters(uri: str = subtomograms, model_uri: str = model, count: int = 2) -> learning_pb2.ClusterRequest:
        return learning_pb2.ClusterRequest(subtomograms_uri=uri, model_uri=model_uri, clusters=count)

    code, message = await refused(channel, clusters(count=COUNT + 1))
    assert code == STATUS.INVALID_ARGUMENT
    assert "clusters is 37, and there are 36 subtomograms" in message
    other = put_subtomograms(store, "other-voxels", two_kinds(4, SIDE, 0)[0], voxel_size=10.0)
    code, message = await refused(channel, clusters(other))
    assert code == STATUS.FAILED_PRECONDITION
    assert "10 Å" in message
    assert "13.5 Å" in message
    code, message = await refused(channel, clusters(put_subtomograms(store, "other-box", two_kinds(4, 8, 0)[0])))
    assert code == STATUS.FAILED_PRECONDITION
    assert "boxes of 8 voxels" in message

    # The same model under another architecture's name, as a folder that somebody brought.
    config = table(store, f"{model}/config.json")
    foreign = f"{store.root}/default/brought/model"
    store.put(f"{foreign}/config.json", json.dumps(config | {"architecture": "edss3d"}).encode())
    store.put(f"{foreign}/model.safetensors", store.get(f"{model}/model.safetensors"))
    code, message = await refused(channel, clusters(model_uri=foreign))
    assert code == STATUS.FAILED_PRECONDITION
    assert "'edss3d'" in message

    weights = bytearray(store.get(f"{model}/model.safetensors"))
    weights[-1] ^= 1
    store.put(f"{foreign}/config.json", json.dumps(config).encode())
    store.put(f"{foreign}/model.safetensors", bytes(weights))
    code, message = await refused(channel, clusters(model_uri=foreign))
    assert code == STATUS.DATA_LOSS
    store.put(f"{model}/model.safetensors", bytes(weights))
    code, message = await refused(channel, clusters())
    assert code == STATUS.DATA_LOSS
    assert "model.safetensors" in message
