"""TrainAnnotator and Annotate over real gRPC: from painted patches to labels and picks, and what can't be painted."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from numpy.typing import NDArray
from PIL import Image

from cryofleet.artifacts import ResultWriter
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import VolumeInfo, encode_volume, open_volume
from services.learning.service import service
from tests.contract.conftest import channel_to
from tests.unit.learning.painted_tomogram import GLOBULE, painted_patches, tomogram

STATUS = grpc.StatusCode
VOXEL = 12.0
SHAPE = (24, 96, 64)
PLACES = [(10, 0, 0), (10, 32, 32), (15, 0, 32), (15, 64, 0), (19, 64, 32), (19, 32, 0)]

channel = channel_to(service)


def put(store: Store, name: str, data: bytes) -> str:
    writer = ResultWriter(store, "default", hashlib.sha256(name.encode()).hexdigest())
    uri = writer.put(name, data)
    writer.commit(
        operation="io.Upload", version=1, parameters={}, inputs={}, result={}, seconds=0.0, device="cpu",
        software="test", host="test",
    )  # fmt: skip
    return uri


def put_volume(store: Store, name: str, array: NDArray[Any], voxel_size: float = VOXEL) -> str:
    info = VolumeInfo(array.shape, voxel_size, "dark", -60, 60)
    return put(store, name, encode_volume(array.astype(np.float32), info))


def png(section: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.choose(section, [128, 255, 0]).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def density() -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    return tomogram(SHAPE, 0, noise=0.3)


@pytest.fixture
def tomogram_uri(store: Store, density: tuple[NDArray[np.float32], NDArray[np.uint8]]) -> str:
    return put_volume(store, "tomogram.mrc", density[0])


def training(tomogram_uri: str, painted: list[str], **parameters: Any) -> learning_pb2.TrainAnnotatorRequest:
    values: dict[str, Any] = {
        "feature": "globule",
        "patch_size_voxels": 32,
        "max_epochs": 3,
        "batch_size": 4,
        "learning_rate": 0.01,
        "validation_fraction": 0.2,
    }
    return learning_pb2.TrainAnnotatorRequest(tomogram_uri=tomogram_uri, painted_uris=painted, **(values | parameters))


async def refused(channel: grpc.aio.Channel, request: Message) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call_operation(channel, request)
    return error.value.code(), str(error.value.details())


def table(store: Store, uri: str) -> dict[str, Any]:
    content = json.loads(store.get(uri))
    assert isinstance(content, dict)
    return content


async def test_from_patches_to_picks(
    channel: grpc.aio.Channel,
    store: Store,
    density: tuple[NDArray[np.float32], NDArray[np.uint8]],
    tomogram_uri: str,
) -> None:
    kinds = density[1]
    masks = painted_patches(kinds, GLOBULE, PLACES, 32)
    # Some as a mask, some as pictures of their sections.
    mask_uri = put_volume(store, "mask.mrc", np.where(np.arange(24)[:, None, None] == 10, masks, 0))
    pictures = [put(store, f"section-{z}.png", png(masks[z])) for z in (15, 19)]
    found = (await call_operation(channel, training(tomogram_uri, [mask_uri, *pictures], sections=[15, 19]))).result
    assert 3 <= found.patches <= 5
    assert found.epochs == 3
    metrics = table(store, found.metrics_uri)
    assert metrics["patches"] == found.patches
    assert metrics["dice"] == found.dice
    assert metrics["feature_voxels"] == (masks == 1).sum()
    assert metrics["other_voxels"] == (masks == 2).sum()
    config = table(store, f"{found.model_uri}/config.json")
    assert (config["architecture"], config["feature"], config["voxel_size_angstrom"]) == (
        "section-annotator", "globule", VOXEL,
    )  # fmt: skip
    assert "globule" in store.get(f"{found.model_uri}/card.md").decode()
    inverse = np.choose(masks, [0, 2, 1])
    other = (
        await call_operation(
            channel,
            training(
                tomogram_uri, [put_volume(store, "other.mrc", inverse)], feature="rest", max_epochs=1, augment=False
            ),
        )
    ).result

    request = learning_pb2.AnnotateRequest(
        tomogram_uri=tomogram_uri, model_uris=[found.model_uri, other.model_uri], min_diameter_angstrom=60
    )
    result = (await call_operation(channel, request)).result
    assert list(result.names) == ["globule", "rest"]
    labels, scores = open_volume(store, result.labels_uri), open_volume(store, result.scores_uri)
    assert labels.info == scores.info == VolumeInfo(SHAPE, VOXEL, "light")
    drawn = labels.read()
    assert set(np.unique(drawn)) <= {0, 1, 2}
    assert list(result.voxels) == [(drawn == 1).sum(), (drawn == 2).sum()]
    strength = scores.read()
    assert (strength[drawn > 0] >= 0.5).all()
    assert (strength[drawn == 0] < 0.5).all()
    # One epoch of the rest, three of the globules: enough to tell what is what from chance.
    assert (drawn == 1)[kinds == GLOBULE].mean() > 3 * (drawn == 1)[kinds != GLOBULE].mean()

    picks = Particles.from_parquet(store.get(result.particles_uri))
    features = table(store, result.metrics_uri)["features"]
    assert [row["voxels"] for row in features] == list(result.voxels)
    assert sum(row["particles"] for row in features) == len(picks)
    assert picks.tomogram_shape == SHAPE
    assert set(picks.table["class_name"]) <= {"globule", "rest"}
    assert (picks.table["diameter_angstrom"] >= 60).all()
    for row in picks.table.itertuples():
        assert row.class_name == ["globule", "rest"][int(str(row.class_id)) - 1]

    request.model_uris[1] = found.model_uri
    code, message = await refused(channel, request)
    assert code == STATUS.INVALID_ARGUMENT
    assert "two models find the feature 'globule'" in message
    del request.model_uris[1]
    code, message = await refused(
        channel,
        learning_pb2.AnnotateRequest(
            tomogram_uri=put_volume(store, "coarse.mrc", density[0], 24.0), model_uris=[found.model_uri]
        ),
    )
    assert code == STATUS.FAILED_PRECONDITION
    assert "voxels of 24 Å" in message
    assert "voxels of 12 Å" in message
    constant = put_volume(store, "constant.mrc", np.full(SHAPE, 3))
    code, message = await refused(
        channel, learning_pb2.AnnotateRequest(tomogram_uri=constant, model_uris=[found.model_uri])
    )
    assert code == STATUS.INVALID_ARGUMENT
    assert "is constant, 3 everywhere" in message
    # Without picks there is no table; and a folder that somebody brought, of another architecture.
    bare = learning_pb2.AnnotateRequest(tomogram_uri=tomogram_uri, model_uris=[found.model_uri], picks=False)
    assert not (await call_operation(channel, bare)).result.particles_uri
    foreign = f"{store.root}/default/brought/model"
    store.put(f"{foreign}/config.json", json.dumps(config | {"architecture": "autoencoder3d"}).encode())
    store.put(f"{foreign}/model.safetensors", store.get(f"{found.model_uri}/model.safetensors"))
    code, message = await refused(
        channel, learning_pb2.AnnotateRequest(tomogram_uri=tomogram_uri, model_uris=[foreign])
    )
    assert code == STATUS.FAILED_PRECONDITION
    assert "'autoencoder3d'" in message


async def test_what_is_not_painted_right(channel: grpc.aio.Channel, store: Store, tomogram_uri: str) -> None:
    masks = np.zeros(SHAPE, np.uint8)
    masks[10, :32, :32], masks[10, 50:60, 50:60], masks[20, 30:50, 10:30] = 1, 2, 2
    masks[20, 35:45, 15:25] = 1
    mask = put_volume(store, "mask.mrc", masks)
    picture = put(store, "picture.png", png(masks[10]))
    nothing = put_volume(store, "nothing.mrc", np.zeros(SHAPE))
    small = put_volume(store, "small.mrc", masks[:, ::2, ::2])
    cut = put(store, "cut.png", png(masks[10])[:60])
    turned = put(store, "turned.png", png(masks[10].T.copy()))
    text = put(store, "notes.txt", b"white is the membrane")
    for request, word in (
        (training(tomogram_uri, [small]), "32 x 48 x 24 voxels; the tomogram has 64 x 96 x 24"),
        (training(tomogram_uri, [nothing]), "nothing is painted"),
        (training(tomogram_uri, [put_volume(store, "only.mrc", masks == 1)]), "what is not the feature is painted no"),
        (training(tomogram_uri, [picture]), "sections: 0 are given for 1 PNG pictures"),
        (training(tomogram_uri, [mask], sections=[3]), "sections: 1 are given for 0 PNG pictures"),
        (training(tomogram_uri, [picture], sections=[24]), "has sections 0 to 23"),
        (training(tomogram_uri, [picture], sections=[-1]), "has sections 0 to 23"),
        (training(tomogram_uri, [cut], sections=[3]), "cut.png: a damaged PNG"),
        (training(tomogram_uri, [turned], sections=[3]), "96 x 64 pixels; the tomogram's sections are 64 x 96"),
        (training(tomogram_uri, [text]), "notes.txt"),
        (training(tomogram_uri, [mask], patch_size_voxels=80), "sections are 64 x 96 voxels"),
        (training(put_volume(store, "constant.mrc", np.ones(SHAPE)), [mask]), "is constant"),
    ):
        code, message = await refused(channel, request)
        assert (code, word in message) == (STATUS.INVALID_ARGUMENT, True), message
