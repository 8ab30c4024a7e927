"""TrainTomogramSegmenter, Predict with its model, and PickSegmentation over real gRPC."""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import VolumeInfo, encode_volume, open_volume
from services.learning import deepfinder
from services.learning.service import service, tomogram_segmentation
from tests.contract.conftest import channel_to
from tests.contract.learning_models import put_model
from tests.contract.test_learning import put_subtomograms, refused, table
from tests.contract.test_learning_annotation import put
from tests.unit.learning.labelled_tomogram import NAMES, two_shapes
from tests.unit.learning.shapes import two_kinds

STATUS = grpc.StatusCode
VOXEL = 12.0
TINY: dict[str, Any] = {
    "patch_size_voxels": 16,
    "patches": 12,
    "channels": 2,
    "max_epochs": 2,
    "batch_size": 4,
    "label_names": NAMES,
}

channel = channel_to(service)


def put_volume(store: Store, name: str, array: NDArray[Any], contrast: str = "light", voxel: float = VOXEL) -> str:
    """A volume of protein-positive values, stored in the contrast."""
    values = -array if contrast == "dark" else array
    return put(store, name, encode_volume(values.astype(np.float32), VolumeInfo(array.shape, voxel, contrast, -60, 60)))


def training(tomograms: list[str], labels: list[str], **parameters: Any) -> learning_pb2.TrainTomogramSegmenterRequest:
    return learning_pb2.TrainTomogramSegmenterRequest(
        tomogram_uris=tomograms, labels_uris=labels, **{name: v for name, v in parameters.items() if v is not None}
    )


async def test_two_shapes_are_learnt_found_and_picked(channel: grpc.aio.Channel, store: Store) -> None:
    """Shapes in another tomogram are found: mean Dice 0.85 to 0.94 with three seeds."""
    volume, labels, _, _ = two_shapes(0)
    request = training(
        [put_volume(store, "t.mrc", volume)],
        [put_volume(store, "l.mrc", labels)],
        label_names=NAMES,
        patch_size_voxels=20,
        patches=80,
        channels=8,
        max_epochs=7,
        batch_size=3,
        learning_rate=0.003,
    )
    trained = (await call_operation(channel, request, timeout=300)).result
    assert list(trained.names) == ["background", "ball", "rod"]
    ball, rod = (float(np.cbrt(6 / np.pi * (labels == n).sum() / 7) * VOXEL) for n in (1, 2))
    # Parts of one kind are of nearly one size.
    assert list(trained.diameters_angstrom) == pytest.approx([0, ball, rod], rel=0.03)
    config = table(store, f"{trained.model_uri}/config.json")
    assert (config["architecture"], config["voxel_size_angstrom"], config["contrast"]) == ("deepfinder", VOXEL, "light")
    metrics = table(store, trained.metrics_uri)
    assert metrics["training_patches"] + metrics["validation_patches"] == 81
    assert metrics["dice"] == trained.dice == pytest.approx(np.mean([metrics["class_dice"][n] for n in NAMES[1:]]))
    card = store.get(f"{trained.model_uri}/card.md").decode()
    assert "| Class | Boxes | Dice |" in card
    assert f"| ball | 27 | {metrics['class_dice']['ball']:.6g} |" in card

    # Another tomogram, in the other contrast and another unit.
    other, truth, centres, kinds = two_shapes(5)
    predict = learning_pb2.PredictRequest(
        model_uri=trained.model_uri,
        tomogram_uri=put_volume(store, "other.mrc", 40 * other + 7, "dark"),
        tile_size_voxels=32,
    )
    found = (await call_operation(channel, predict)).result
    drawn = open_volume(store, found.labels_uri).read()
    dice = [2 * ((drawn == n) & (truth == n)).sum() / ((drawn == n).sum() + (truth == n).sum()) for n in (1, 2)]
    assert np.mean(dice) > 0.7
    assert list(found.sizes) == [(drawn == n).sum() for n in range(3)]

    picking = learning_pb2.PickSegmentationRequest(
        labels_uri=found.labels_uri,
        names=found.names,
        diameters_angstrom=trained.diameters_angstrom,
        scores_uri=found.scores_uri,
    )
    result = (await call_operation(channel, picking)).result
    picks = Particles.from_parquet(store.get(result.particles_uri))
    assert list(result.names) == ["ball", "rod"]
    assert list(result.counts) == [(picks.table["class_id"] == n).sum() for n in (1, 2)]
    assert result.count == len(picks)
    assert (picks.table["class_name"] == np.array(NAMES)[picks.table["class_id"]]).all()
    # Most voxels of a part are surer of its class than of the two others together.
    assert picks.table["score"].between(0.4, 1).all()
    distances = np.linalg.norm(picks.positions()[:, None] - centres[None], axis=2)
    assert (distances.min(axis=1) < 3).all(), "nothing is picked where nothing is"
    right = kinds[distances.argmin(axis=1)] == picks.table["class_id"]
    # 14 shapes, of which a segmentation of that quality misses or mistakes a few.
    assert right.sum() >= 10
    assert right.mean() >= 0.75


async def test_tiny_training_of_several_tomograms(channel: grpc.aio.Channel, store: Store) -> None:
    sets = [two_shapes(seed, 32, 4) for seed in (1, 2)]
    tomograms = [put_volume(store, f"t{n}.mrc", each[0]) for n, each in enumerate(sets)]
    labels = [put_volume(store, f"l{n}.mrc", each[1]) for n, each in enumerate(sets)]
    tables = [put(store, f"names{n}.json", json.dumps({"label_names": NAMES}).encode()) for n in range(2)]
    settings = TINY | {"label_names": [], "names_uris": tables, "classes": ["rod"]}
    trained = (await call_operation(channel, training(tomograms, labels, **settings))).result
    assert list(trained.names) == ["background", "rod"]
    assert list(trained.structures) == ["rod"]
    assert trained.epochs == 2
    config = table(store, f"{trained.model_uri}/config.json")
    assert config["class_counts"] == {"background": 6, "rod": 6}
    assert (config["tomograms"], config["channels"], config["patch_size_voxels"]) == (2, 2, 16)
    assert len(config["tomogram_digests"]) == len(config["labels_digests"]) == 2
    again = (await call_operation(channel, training(tomograms, labels, **settings))).result
    assert again.model_uri == trained.model_uri


@pytest.mark.parametrize(
    ("change", "status", "expected"),
    [
        ({"labels": "small"}, STATUS.INVALID_ARGUMENT, "32 x 32 x 16 voxels, its tomogram .* 32 x 32 x 32"),
        ({"labels": "coarse"}, STATUS.INVALID_ARGUMENT, "voxels of 24 Å, its tomogram .* of 12 Å"),
        ({"labels": "empty"}, STATUS.INVALID_ARGUMENT, "nothing but the background, 'ice'"),
        ({"label_names": NAMES[:2]}, STATUS.INVALID_ARGUMENT, "is 2; labels are whole numbers, and 2 of them"),
        ({"label_names": None}, STATUS.INVALID_ARGUMENT, "give label_names or names_uris"),
        ({"classes": ["tube"]}, STATUS.INVALID_ARGUMENT, "no label is named 'tube'; there are 'ball', 'rod'"),
        ({"label_names": None, "names_uris": "others"}, STATUS.INVALID_ARGUMENT, "name the labels differently"),
        ({"label_names": None, "names_uris": "no names"}, STATUS.INVALID_ARGUMENT, "has no label_names"),
        ({"patch_size_voxels": 18}, STATUS.INVALID_ARGUMENT, "patch_size_voxels is 18; it must be a multiple of 4"),
        ({"patch_size_voxels": 20}, STATUS.INVALID_ARGUMENT, "no room for patches of 20"),
        ({"channels": 3}, STATUS.INVALID_ARGUMENT, "channels is 3; it must be an even number"),
        ({"more": "coarse"}, STATUS.FAILED_PRECONDITION, "voxels of 24 Å and .* of 12 Å"),
        ({"more": "lonely"}, STATUS.INVALID_ARGUMENT, "labels_uris must be as many as tomogram_uris"),
        ({"tomogram": "constant"}, STATUS.INVALID_ARGUMENT, "constant"),
    ],
)
async def test_what_cannot_be_learnt_from_is_refused(
    channel: grpc.aio.Channel, store: Store, change: dict[str, Any], status: grpc.StatusCode, expected: str
) -> None:
    volume, labels, _, _ = two_shapes(1, 32, 4)
    tomograms = [put_volume(store, "t.mrc", np.ones_like(volume) if change.get("tomogram") else volume)]
    made = {
        "small": (labels[:16], VOXEL),
        "coarse": (labels, 2 * VOXEL),
        "empty": (0 * labels, VOXEL),
        None: (labels, VOXEL),
    }
    values, voxel = made[change.get("labels")]
    label_volumes = [put_volume(store, "l.mrc", values, voxel=voxel)]
    if change.get("more"):
        tomograms.append(put_volume(store, "more.mrc", volume, voxel=2 * VOXEL))
    if change.get("more") == "coarse":
        label_volumes.append(put_volume(store, "more-labels.mrc", labels, voxel=2 * VOXEL))
    settings = TINY | {name: value for name, value in change.items() if name not in ("labels", "more", "tomogram")}
    tables: dict[str, list[dict[str, Any]]] = {
        "others": [{"label_names": NAMES}, {"label_names": NAMES[:2]}],
        "no names": [{"label_names": "ice"}],
    }
    if "names_uris" in settings:
        documents = tables[settings["names_uris"]]
        settings["names_uris"] = [put(store, f"n{n}.json", json.dumps(d).encode()) for n, d in enumerate(documents)]
    code, message = await refused(channel, training(tomograms, label_volumes, **settings))
    assert code == status
    assert_matches(message, expected)


def test_a_gpu_that_is_too_small_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    request = learning_pb2.TrainTomogramSegmenterRequest(patch_size_voxels=56, channels=32, batch_size=8)
    step = deepfinder.training_bytes(56**3, 5, 32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * step, 8 * step))
    tomogram_segmentation._check_gpu(request, 5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * step, 8 * step))
    with pytest.raises(FailedPrecondition, match=r"a step with 8 patches of 56 voxels .* batch_size 4 would fit"):
        tomogram_segmentation._check_gpu(request, 5)


def assert_matches(message: str, expected: str) -> None:
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(message)


async def test_a_segmenter_of_tomograms_takes_nothing_else(channel: grpc.aio.Channel, store: Store) -> None:
    config = deepfinder.config(["background", "ball"], 2) | {"binning": 1, "voxel_size_angstrom": VOXEL}
    model = put_model(store, "model", config)
    damaged = put_model(store, "damaged", config | {"voxel_size_angstrom": "12"})
    tomogram = put_volume(store, "t.mrc", two_shapes(1, 32, 4)[0])
    coarse = put_volume(store, "c.mrc", two_shapes(1, 32, 4)[0], voxel=2 * VOXEL)
    boxes = put_subtomograms(store, "boxes", two_kinds(4, 16, 0)[0])
    for request, status, expected in (
        ({"model_uri": model, "subtomograms_uri": boxes}, STATUS.INVALID_ARGUMENT, "give tomogram_uri"),
        (
            {"model_uri": model, "tomogram_uri": tomogram, "overlapping_boxes": True},
            STATUS.INVALID_ARGUMENT,
            "learnt from patches of tomograms",
        ),
        ({"model_uri": model, "tomogram_uri": coarse}, STATUS.FAILED_PRECONDITION, "trained on voxels of 12 Å"),
        ({"model_uri": damaged, "tomogram_uri": tomogram}, STATUS.FAILED_PRECONDITION, "damaged"),
    ):
        code, message = await refused(channel, learning_pb2.PredictRequest(**request))
        assert code == status
        assert expected in message


def balls() -> NDArray[np.uint8]:
    """Two balls of class 1 that touch, one of class 2, a membrane of class 3, and a crumb of class 1."""
    z, y, x = np.mgrid[:24, :40, :48]
    labels = np.zeros(z.shape, np.uint8)
    for number, (cx, cy, cz) in ((1, (10, 10, 12)), (1, (22, 10, 12)), (2, (38, 28, 12))):
        labels[(x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 <= 6**2] = number
    labels[:, 37:39] = 3
    labels[12, 25, 10:13] = 1
    return labels


async def test_parts_become_particles(channel: grpc.aio.Channel, store: Store) -> None:
    labels_uri = put_volume(store, "labels.mrc", balls())
    names = ["background", "ball", "globe", "membrane"]
    diameter = 12 * VOXEL
    request = learning_pb2.PickSegmentationRequest(
        labels_uri=labels_uri,
        names=names,
        left_out=["membrane", "gold"],
        diameters_angstrom=[0, diameter, diameter, 0],
    )
    result = (await call_operation(channel, request)).result
    picks = Particles.from_parquet(store.get(result.particles_uri))
    assert (list(result.names), list(result.counts), result.count) == (["ball", "globe"], [2, 1], 3)
    order = np.argsort(picks.positions()[:, 0])
    np.testing.assert_allclose(picks.positions()[order], [(10, 10, 12), (22, 10, 12), (38, 28, 12)], atol=0.1)
    assert picks.table["class_id"].to_numpy()[order].tolist() == [1, 1, 2]
    assert "score" not in picks.table
    # A sphere's voxels make up its volume to the rounding of its surface.
    np.testing.assert_allclose(picks.table["diameter_angstrom"], diameter, rtol=0.03)
    assert table(store, result.metrics_uri)["classes"][0] == {
        "name": "ball", "voxels": int((balls() == 1).sum()), "parts": 2, "parted": 1, "too_small": 1, "too_large": 0,
        "particles": 2,
    }  # fmt: skip

    whole = learning_pb2.PickSegmentationRequest(labels_uri=labels_uri, names=names, classes=["ball", "membrane"])
    result = (await call_operation(channel, whole)).result
    assert (list(result.names), list(result.counts)) == (["ball", "membrane"], [1, 1])


async def test_segmentations_that_cannot_be_picked_from(channel: grpc.aio.Channel, store: Store) -> None:
    labels_uri = put_volume(store, "labels.mrc", balls())
    small = put_volume(store, "p.mrc", np.zeros((4, 4, 4)))
    names = ["background", "ball", "globe", "membrane"]
    for changes, expected in (
        ({"names": names[:3]}, "is 3; labels are whole numbers, and 3 of them"),
        ({"classes": ["rod"]}, "'rod' is no class; there are 'ball', 'globe', 'membrane'"),
        ({"left_out": names}, "no class is left to pick"),
        ({"diameters_angstrom": [1, 2]}, "diameters_angstrom must be as many as names"),
        ({"scores_uri": small}, "4 x 4 x 4 voxels"),
    ):
        settings: dict[str, Any] = {"labels_uri": labels_uri, "names": names} | changes
        code, message = await refused(channel, learning_pb2.PickSegmentationRequest(**settings))
        assert code == STATUS.INVALID_ARGUMENT
        assert expected in message
