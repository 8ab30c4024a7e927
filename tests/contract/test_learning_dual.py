"""TrainDual, Denoise, CompensateWedge and SimulateStyle over real gRPC, on volumes of a few thousand voxels."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.message import Message
from numpy.typing import NDArray
from PIL import Image

from cryofleet.artifacts import ResultWriter
from cryofleet.errors import FailedPrecondition
from cryofleet.numerics.wedge import wedge_mask
from cryofleet.server import Reader
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import VolumeInfo, encode_volume, open_volume
from services.learning import dual
from services.learning.service import dual_training, inputs, service
from tests.contract.conftest import channel_to
from tests.contract.learning_models import put_model

STATUS = grpc.StatusCode
VOXEL = 10.0
SHAPE = (18, 40, 36)
"""At a box of 16, 1 x 2 x 2 subvolumes."""

channel = channel_to(service)

Array = NDArray[np.float32]


def put(
    store: Store, name: str, array: Array, contrast: str = "dark", voxel_size: float = VOXEL, tilt: float = 60
) -> str:
    info = VolumeInfo(array.shape, voxel_size, contrast, -tilt, tilt)
    writer = ResultWriter(store, "default", hashlib.sha256(name.encode()).hexdigest())
    uri = writer.put(name, encode_volume(array.astype(np.float32), info))
    writer.commit(
        operation="io.Upload", version=1, parameters={}, inputs={}, result={}, seconds=0.0, device="cpu",
        software="test", host="test",
    )  # fmt: skip
    return uri


def density(seed: int) -> Array:
    """Blobs in nothing."""
    rng = np.random.default_rng(seed)
    z, y, x = np.indices(SHAPE)
    volume = np.zeros(SHAPE, np.float32)
    for _ in range(12):
        cz, cy, cx = (rng.uniform(0, side) for side in SHAPE)
        volume += np.exp(-((z - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2) / 18)
    return volume


def tomogram(seed: int) -> Array:
    """Dark blobs in noise, on a scale of their own."""
    noise = np.random.default_rng(seed).standard_normal(SHAPE, np.float32)
    return 7 - 3 * (density(seed) + noise)


def training(tomograms: list[str], densities: list[str], **parameters: Any) -> learning_pb2.TrainDualRequest:
    values: dict[str, Any] = {"box_size_voxels": 16, "channels": 2, "max_epochs": 1, "batch_size": 4}
    return learning_pb2.TrainDualRequest(tomograms_uris=tomograms, densities_uris=densities, **(values | parameters))


def facts(**others: Any) -> dict[str, Any]:
    return {
        "voxel_size_angstrom": VOXEL,
        "tomogram_contrast": "dark",
        "tomogram_tilt_degrees": [-60.0, 60.0],
        "transposed_pair": False,
        **others,
    }


async def refused(channel: grpc.aio.Channel, request: Message) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call_operation(channel, request)
    return error.value.code(), str(error.value.details())


def table(store: Store, uri: str) -> dict[str, Any]:
    content = json.loads(store.get(uri))
    assert isinstance(content, dict)
    return content


async def test_trained_on_unpaired_volumes(channel: grpc.aio.Channel, store: Store) -> None:
    tomograms = [put(store, f"t{seed}.mrc", tomogram(seed)) for seed in range(2)]
    request = training(tomograms, [put(store, "d.mrc", density(5), "light")], max_epochs=2)
    found = (await call_operation(channel, request)).result
    assert (found.epochs, found.tomogram_subvolumes, found.density_subvolumes) == (2, 8, 4)
    metrics = table(store, found.metrics_uri)
    assert metrics["warnings"] == list(found.warnings)
    assert metrics["tomogram_deviations"] == pytest.approx([float(tomogram(seed).std()) for seed in range(2)], rel=1e-5)
    # The larger domain has 7 for training: 2 batches of 4 and one of 3, whose means are over all.
    assert [row["epoch"] for row in metrics["losses"]] == [1, 2]
    assert {"training_deviation", "training_made_densities", "validation_reconstruction"} <= metrics["losses"][0].keys()
    config = table(store, f"{found.model_uri}/config.json")
    assert config["architecture"] == dual.NAME
    assert {name: config[name] for name in facts()} == facts()
    assert len(config["tomogram_digests"]) == 2
    card = store.get(f"{found.model_uri}/card.md").decode()
    assert "Contrast of the tomograms: dark" in card
    assert "structures that the density maps lack" in card
    assert tomograms[0] not in card
    picture = Image.open(io.BytesIO(store.get(found.picture_uri)))
    assert picture.width > 4 * picture.height / 2


def expected_of(model_uri: str, store: Store, network: str, volume: Array) -> Array:
    """What a network of the model makes of a whole volume."""
    reader = Reader(store, "default", Path)
    model = getattr(inputs.open_model(reader, model_uri, dual.NAME)[1], network)
    padded = np.pad(volume, [(0, -side % 4) for side in volume.shape]).astype(np.float32)
    values = torch.from_numpy(padded)[None, None]
    with torch.inference_mode():
        values = model(values)
    made: Array = values[0, 0].numpy()
    return made[tuple(slice(side) for side in volume.shape)]


def in_four_positions(model_uri: str, store: Store, volume: Array) -> list[Array]:
    """What the denoiser makes of a volume whose sides are multiples of 4, and of it turned, turned back."""
    return [
        np.flip(expected_of(model_uri, store, "denoiser", np.flip(volume, axes)), axes)
        for axes in ((), (0, 1), (0, 2), (1, 2))
    ]


async def test_denoised_as_strongly_as_wanted(channel: grpc.aio.Channel, store: Store) -> None:
    model = put_model(store, "model", dual.config(16, 2) | facts())
    values = np.pad(tomogram(3), [(0, 2), (0, 0), (0, 0)], mode="reflect")
    uri = put(store, "tomogram.mrc", values, tilt=50)

    async def denoised(strength: float, tile: int = 128) -> tuple[Array, dict[str, Any]]:
        request = learning_pb2.DenoiseRequest(
            model_uri=model, tomogram_uri=uri, strength=strength, tile_size_voxels=tile
        )
        result = (await call_operation(channel, request)).result
        volume = open_volume(store, result.volume_uri)
        assert volume.info == VolumeInfo(values.shape, VOXEL, "dark", -50, 50)
        return volume.read(), table(store, result.metrics_uri)

    none, metrics = await denoised(0)
    np.testing.assert_array_equal(none, values)
    assert metrics["correlation"] == pytest.approx(1)
    assert metrics["tomogram_deviation"] == metrics["denoised_deviation"] == pytest.approx(values.std(), rel=1e-5)
    whole, metrics = await denoised(1)
    # Protein is dark here and light for the network; the result is on the tomogram's own scale again.
    scaled = -(values - values.mean()) / values.std()
    expected = values.mean() - values.std() * expected_of(model, store, "denoiser", scaled)
    np.testing.assert_allclose(whole, expected, atol=2e-4)
    assert metrics["correlation"] == pytest.approx(np.corrcoef(values.ravel(), whole.ravel())[0, 1], abs=1e-4)
    np.testing.assert_allclose((await denoised(0.25))[0], 0.75 * values + 0.25 * whole, atol=1e-4)
    np.testing.assert_allclose((await denoised(1, tile=16))[0], whole, atol=1e-4)
    # Beyond 1 it leaves from there, and ends at the mean over four positions.
    np.testing.assert_allclose((await denoised(1 + 1e-6))[0], whole, atol=1e-3)
    mean = values.mean() - values.std() * np.mean(in_four_positions(model, store, scaled), axis=0)
    turned, _ = await denoised(2)
    np.testing.assert_allclose(turned, mean, atol=2e-4)
    assert np.abs(turned - whole).max() > 0.01
    np.testing.assert_allclose((await denoised(1.5, tile=16))[0], (whole + turned) / 2, atol=2e-4)


async def test_uncertain_is_what_differs_from_turn_to_turn(channel: grpc.aio.Channel, store: Store) -> None:
    model = put_model(store, "model", dual.config(16, 2) | facts())
    values = np.random.default_rng(2).normal(4, 3, (20, 40, 36)).astype(np.float32)
    uri = put(store, "tomogram.mrc", values)

    async def asked(**parameters: Any) -> learning_pb2.DenoiseResult:
        request = learning_pb2.DenoiseRequest(model_uri=model, tomogram_uri=uri, **parameters)
        result: learning_pb2.DenoiseResult = (await call_operation(channel, request)).result
        return result

    assert not (await asked()).uncertainty_uri
    scaled = -(values - values.mean()) / values.std()
    expected = values.std() * np.std(in_four_positions(model, store, scaled), axis=0, ddof=1)
    assert expected.min() > 0
    for tile in (128, 16):
        found = await asked(uncertainty=True, tile_size_voxels=tile)
        deviations = open_volume(store, found.uncertainty_uri).read()
        np.testing.assert_allclose(deviations, expected, atol=1e-4)
    half = await asked(uncertainty=True, strength=0.5)
    np.testing.assert_allclose(open_volume(store, half.uncertainty_uri).read(), expected / 2, atol=1e-4)


async def test_simulated_in_the_style_of_the_tomograms(channel: grpc.aio.Channel, store: Store) -> None:
    model = put_model(store, "model", dual.config(16, 2) | facts(tomogram_tilt_degrees=[-50.0, 70.0]))
    uri = put(store, "density.mrc", density(2), "light", tilt=90)

    async def simulated(**parameters: Any) -> tuple[list[Array], list[dict[str, Any]]]:
        request = learning_pb2.SimulateStyleRequest(model_uri=model, density_uri=uri, **parameters)
        result = (await call_operation(channel, request)).result
        volumes = [open_volume(store, each) for each in result.tomograms_uris]
        assert all(volume.info == VolumeInfo(SHAPE, VOXEL, "dark", -50, 70) for volume in volumes)
        return [volume.read() for volume in volumes], table(store, result.metrics_uri)["tomograms"]

    (first, second), rows = await simulated(number=2, seed=4)
    assert np.abs(first - second).max() > 1e-3
    for made, row in zip((first, second), rows, strict=True):
        assert row["mean"] == pytest.approx(made.mean(), abs=1e-5)
        assert row["deviation"] == pytest.approx(made.std(), rel=1e-4)
    # One alone is the first of several, in whatever tiles.
    ((again,), _) = await simulated(seed=4, tile_size_voxels=16)
    np.testing.assert_allclose(again, first, atol=1e-5)
    ((other,), _) = await simulated(seed=5)
    assert np.abs(other - first).max() > 1e-3


async def test_the_missing_wedge_is_filled_and_nothing_else(channel: grpc.aio.Channel, store: Store) -> None:
    values = tomogram(1)
    uri = put(store, "tomogram.mrc", values)
    found = (await call_operation(channel, training([uri], [], transposed_pair=True, spacing_voxels=8))).result
    # 1 x 4 x 3 that overlap by half.
    assert found.tomogram_subvolumes == found.density_subvolumes == 12
    assert table(store, f"{found.model_uri}/config.json")["transposed_pair"] is True
    request = learning_pb2.CompensateWedgeRequest(model_uri=found.model_uri, tomogram_uri=uri)
    volume = open_volume(store, (await call_operation(channel, request)).result.volume_uri)
    assert volume.info == VolumeInfo(SHAPE, VOXEL, "dark", -90, 90)
    mask = wedge_mask(SHAPE, -60, 60).astype(bool)
    spectrum, measured = (np.fft.fftn(each, norm="ortho") for each in (volume.read(), values))
    np.testing.assert_allclose(spectrum[mask], measured[mask], atol=2e-3)
    scaled = -(values - values.mean()) / values.std()
    made = values.mean() - values.std() * expected_of(found.model_uri, store, "denoiser", scaled)
    np.testing.assert_allclose(spectrum[~mask], np.fft.fftn(made, norm="ortho")[~mask], atol=2e-3)

    code, message = await refused(channel, learning_pb2.DenoiseRequest(model_uri=found.model_uri, tomogram_uri=uri))
    assert code == STATUS.FAILED_PRECONDITION
    assert "learning.CompensateWedge" in message
    request.model_uri = put_model(store, "model", dual.config(16, 2) | facts())
    code, message = await refused(channel, request)
    assert code == STATUS.FAILED_PRECONDITION
    assert "transposed_pair is needed" in message
    request.model_uri = found.model_uri
    request.tomogram_uri = put(store, "whole.mrc", values, tilt=90)
    code, message = await refused(channel, request)
    assert code == STATUS.FAILED_PRECONDITION
    assert "no missing wedge" in message


async def test_domains_that_do_not_go_together(channel: grpc.aio.Channel, store: Store) -> None:
    dark, clean = put(store, "dark.mrc", tomogram(0)), put(store, "clean.mrc", density(1), "light")
    light = put(store, "light.mrc", -tomogram(1), "light")
    coarse = put(store, "coarse.mrc", density(1), "light", 13.6)
    constant = put(store, "constant.mrc", np.full(SHAPE, 3))
    wrong = put(store, "wrong.mrc", density(1))
    small = put(store, "small.mrc", tomogram(0)[:17, :30, :30])
    broad = put(store, "broad.mrc", tomogram(0), tilt=90)
    narrow = put(store, "narrow.mrc", tomogram(0), tilt=40)
    for request, words in (
        (training([dark], [coarse]), ["coarse.mrc has voxels of 13.6 Å", "of 10 Å", "io.Rescale"]),
        (training([dark, light], [clean]), ["tomograms_uris", "dark.mrc has dark protein", "light.mrc light"]),
        (training([dark], [clean, put(store, "d2.mrc", density(2))]), ["densities_uris", "d2.mrc dark"]),
        (training([constant], [clean]), ["constant.mrc is constant, 3 everywhere"]),
        (training([small], [clean]), ["tomograms_uris: there are 1 whole subvolumes of 16 voxels", "(17, 30, 30)"]),
        (training([dark], [small]), ["densities_uris: there are 1 whole"]),
        (training([dark], [clean], box_size_voxels=20), ["box_size_voxels: 20 is no multiple of 8"]),
        (training([dark], [wrong]), ["wrong.mrc is labelled as of dark protein", "give it the other contrast"]),
        (training([dark], []), ["densities_uris or transposed_pair"]),
        (training([dark], [clean], transposed_pair=True), ["densities_uris or transposed_pair"]),
    ):
        code, message = await refused(channel, request)
        assert code == STATUS.INVALID_ARGUMENT, message
        assert all(word in message for word in words), message
    for uri, word in ((broad, "no missing wedge"), (narrow, "from -40° to 40°")):
        code, message = await refused(channel, training([uri], [], transposed_pair=True))
        assert code == STATUS.FAILED_PRECONDITION
        assert word in message


async def test_models_and_volumes_that_do_not_fit(channel: grpc.aio.Channel, store: Store) -> None:
    config = dual.config(16, 2) | facts()
    model, uri = put_model(store, "model", config), put(store, "tomogram.mrc", tomogram(0))
    later = f"{store.root}/default/later/model"
    store.put(f"{later}/model.safetensors", store.get(f"{model}/model.safetensors"))
    for changed, words in (
        ({"architecture_version": dual.VERSION + 1}, [f"version {dual.VERSION + 1}", "train it again"]),
        ({"architecture": "edss3d"}, ["'dual' is needed"]),
        ({"tomogram_contrast": None}, ["config is damaged", "contrast None"]),
        ({"tomogram_tilt_degrees": [60]}, ["config is damaged"]),
        # Terabytes, were it made.
        ({"box_size": 1 << 13}, ["larger networks than its weights"]),
    ):
        store.put(f"{later}/config.json", json.dumps(config | changed).encode())
        for request in (
            learning_pb2.DenoiseRequest(model_uri=later, tomogram_uri=uri),
            learning_pb2.SimulateStyleRequest(model_uri=later, density_uri=uri),
        ):
            code, message = await refused(channel, request)
            assert code == STATUS.FAILED_PRECONDITION
            assert all(word in message for word in words), message
    coarse = put(store, "coarse.mrc", tomogram(0), voxel_size=13.6)
    code, message = await refused(channel, learning_pb2.DenoiseRequest(model_uri=model, tomogram_uri=coarse))
    assert code == STATUS.FAILED_PRECONDITION
    assert "voxels of 13.6 Å; the model was trained on voxels of 10 Å" in message
    code, message = await refused(channel, learning_pb2.DenoiseRequest(model_uri=model, tomogram_uri=uri, strength=2.5))
    assert code == STATUS.INVALID_ARGUMENT
    assert "strength" in message


def test_a_collapse_is_in_the_log_once_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    epoch = {"deviation": 0.01} | {
        f"{kind}_{domain}": 0.5 for kind in ("real", "made") for domain in ("tomograms", "densities")
    }
    saved = dual_training._log_warnings()
    for epochs in (0, 1, 1, 2):
        saved({"state.json": json.dumps({"history": [{"training": epoch}] * epochs}).encode()})
    assert [record.message.rpartition("in epoch ")[2][0] for record in caplog.records] == ["1", "2"]


def test_a_gpu_that_is_too_small_is_told_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    request = learning_pb2.TrainDualRequest(box_size_voxels=32, channels=8, batch_size=8)
    step = dual_training._box_bytes(request)
    for free, word in ((5 * step, "batch_size 5 would fit"), (step // 2, "smaller box_size_voxels or fewer channels")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, free))
        with pytest.raises(FailedPrecondition, match=word):
            dual_training._check_gpu(request)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9 * step, 9 * step))
    dual_training._check_gpu(request)
