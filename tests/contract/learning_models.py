"""Models for the contract tests of the learning service, made without training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from cryofleet.artifacts import ResultWriter
from cryofleet.storage import Store
from services.learning import architectures, model_files

VOXEL = 13.5


def data_facts(box_size: int = 8, binning: int = 2, pose_normalisation: bool = False) -> dict[str, Any]:
    """What a config says of the data, for subtomograms of box_size * binning voxels of 13.5 Å."""
    return {
        "box_size": box_size,
        "binning": binning,
        "pose_normalisation": pose_normalisation,
        "subtomogram_box_size": box_size * binning,
        "subtomogram_voxel_size_angstrom": VOXEL,
    }


def put_model(store: Store, name: str, config: Mapping[str, Any], seed: int = 0) -> str:
    """A model with its first weights, as a result in the store; its URI."""
    model = architectures.build(config, torch.Generator().manual_seed(seed))
    return put_weights(store, name, model, config)


def put_weights(store: Store, name: str, model: torch.nn.Module, config: Mapping[str, Any]) -> str:
    """A model as a result in the store; its URI."""
    writer = ResultWriter(store, "default", hashlib.sha256(name.encode()).hexdigest())
    uris = [writer.put(f"model/{file}", data) for file, data in model_files.write_model(model, config).items()]
    writer.commit(
        operation="learning.Train", version=1, parameters={}, inputs={}, result={}, seconds=0.0, device="cpu",
        software="test", host="test",
    )  # fmt: skip
    return uris[0].rpartition("/")[0]
