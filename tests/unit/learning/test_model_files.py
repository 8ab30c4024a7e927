from __future__ import annotations

import hashlib
import json
import pickle
from typing import Any

import pytest
import safetensors.torch
import torch

from cryofleet.errors import DataLoss, FailedPrecondition
from services.learning import autoencoder
from services.learning.architectures import ARCHITECTURES
from services.learning.model_card import card
from services.learning.model_files import CONFIG_FILE, WEIGHTS_FILE, read_config, read_model, write_model

CONFIG: dict[str, Any] = autoencoder.config(8) | {
    "binning": 2,
    "pose_normalisation": True,
    "subtomogram_box_size": 16,
    "subtomogram_voxel_size_angstrom": 13.5,
}


def network(seed: int = 0, side: int = 8) -> autoencoder.Autoencoder3D:
    return autoencoder.Autoencoder3D(side, torch.Generator().manual_seed(seed))


def read(files: dict[str, bytes]) -> autoencoder.Autoencoder3D:
    return read_model(read_config(files[CONFIG_FILE]), files[WEIGHTS_FILE], autoencoder.from_config)


def test_a_model_comes_back_as_it_was_and_in_the_same_bytes() -> None:
    model = network()
    files = write_model(model, CONFIG)
    again = read(files)
    boxes = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(boxes)[0], again(boxes)[0])
    assert not again.training
    assert write_model(again, CONFIG) == files
    assert json.loads(files[CONFIG_FILE])["architecture"] == "autoencoder3d"


def test_tampered_weights_are_data_loss() -> None:
    files = write_model(network(), CONFIG)
    weights = bytearray(files[WEIGHTS_FILE])
    weights[-1] ^= 1
    with pytest.raises(DataLoss, match=WEIGHTS_FILE):
        read(files | {WEIGHTS_FILE: bytes(weights)})
    with pytest.raises(DataLoss):
        read(files | {WEIGHTS_FILE: write_model(network(1), CONFIG)[WEIGHTS_FILE]})


def test_a_foreign_architecture_is_refused() -> None:
    files = write_model(network(), CONFIG | {"architecture": "edss3d"})
    with pytest.raises(FailedPrecondition, match="edss3d"):
        read(files)


def test_weights_of_another_size_are_refused_by_name_and_shape() -> None:
    files = write_model(network(side=12), CONFIG)
    with pytest.raises(FailedPrecondition, match=r"from_code.bias .*\(864,\).*\(256,\)"):
        read(files)


def test_missing_and_unknown_tensors_are_refused_by_name() -> None:
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.something = torch.nn.Linear(2, 2)

    with pytest.raises(FailedPrecondition, match=r"convolution_1.bias.*something.weight"):
        read(write_model(Other(), CONFIG))


def test_pickles_and_other_files_are_refused_unread() -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("a pickle was run",))

    files = write_model(network(), CONFIG)
    for weights in (pickle.dumps(Bomb()), b"", b"\xff" * 64):
        config = json.loads(files[CONFIG_FILE])
        config["weights_sha256"] = hashlib.sha256(weights).hexdigest()
        with pytest.raises(FailedPrecondition, match="safetensors"):
            read_model(config, weights, autoencoder.from_config)
    for text in (b"{", b"[1]", b"\xff\xfe"):
        with pytest.raises(FailedPrecondition, match=CONFIG_FILE):
            read_config(text)


def test_weights_are_plain_safetensors() -> None:
    files = write_model(network(), CONFIG)
    tensors = safetensors.torch.load(files[WEIGHTS_FILE])
    assert tensors["convolution_2.weight"].shape == (32, 32, 3, 3, 3)
    assert len(tensors) == 14


def test_the_card_tells_network_data_parameters_and_figures() -> None:
    config = CONFIG | {
        "subtomograms": 40,
        "subtomograms_digest": "d" * 64,
        "class_counts": {"ribosome": 30, "odd | name": 10},
        "parameters": {"learning_rate": 0.001, "rotations": "any"},
        "figures": {"training_subtomograms": 36, "best_validation_loss": 0.123456789},
    }
    lines = card(config, autoencoder).splitlines()
    assert lines[0] == "# autoencoder3d, version 1"
    assert (
        lines[2] == "Autoencoder3D: the convolutional autoencoder of Zeng et al. 2018 (J. Struct. Biol. 202:150-160)."
    )
    for line in (
        "- Subtomograms: 40",
        "- Subtomograms trained on: 36",
        "- Voxel size (Å): 13.5",
        "- Poses normalised: yes",
        "| ribosome | 30 |",
        "| odd \\| name | 10 |",
        "- learning rate: 0.001",
        "- best validation loss: 0.123457",
    ):
        assert line in lines
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == ["## Data", "## Parameters", "## Figures", "## Use", "## Limits"]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_network_says_what_it_is(name: str) -> None:
    about = card({"architecture": name, "architecture_version": 1}, ARCHITECTURES[name]).splitlines()[2]
    assert len(about) > 40
    assert about.endswith(".")
