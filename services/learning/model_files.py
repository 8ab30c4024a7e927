"""Models as files: weights in safetensors, everything else in JSON. Reading one runs no code of the file's author."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import nn

from cryofleet.errors import DataLoss, FailedPrecondition

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "card.md"

Network = TypeVar("Network", bound=nn.Module)


def write_model(model: nn.Module, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a model by name: the same model gives the same bytes.

    `config` says what the network is and what it was trained on; the digest of the weights is added as
    `weights_sha256`.
    """
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    weights = safetensors.torch.save(tensors)
    document = dict(config) | {"weights_sha256": hashlib.sha256(weights).hexdigest()}
    return {
        WEIGHTS_FILE: weights,
        CONFIG_FILE: (json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n").encode(),
    }


def read_config(data: bytes) -> dict[str, Any]:
    """The contents of `config.json`; FailedPrecondition where it is not JSON of that kind."""
    try:
        config = json.loads(data)
    except ValueError as error:
        raise FailedPrecondition(f"the model's {CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise FailedPrecondition(f"the model's {CONFIG_FILE} must hold an object")
    return config


def read_model(config: Mapping[str, Any], weights: bytes, build: Callable[[Mapping[str, Any]], Network]) -> Network:
    """The network that `build` makes of the config, with the weights of `model.safetensors`.

    Raises DataLoss where the weights are not those the config was written with, FailedPrecondition where they are not
    safetensors or do not fit the network, or what `build` raises for an architecture it does not know.
    """
    model = build(config)
    if hashlib.sha256(weights).hexdigest() != config.get("weights_sha256"):
        raise DataLoss(
            f"the model's {WEIGHTS_FILE} is not the file that its {CONFIG_FILE} was written with: the digests differ"
        )
    try:
        tensors = safetensors.torch.load(weights)
    except safetensors.SafetensorError as error:
        raise FailedPrecondition(f"the model's {WEIGHTS_FILE} is not in the safetensors format: {error}") from error
    expected = model.state_dict()
    if tensors.keys() != expected.keys():
        names = ", ".join(sorted(tensors.keys() ^ expected.keys()))
        raise FailedPrecondition(f"the model's {WEIGHTS_FILE} and its architecture differ in the tensors {names}")
    for name, value in sorted(tensors.items()):
        if value.shape != expected[name].shape or value.dtype != expected[name].dtype:
            raise FailedPrecondition(
                f"tensor {name} of the model's {WEIGHTS_FILE} is {value.dtype} {tuple(value.shape)}, "
                f"its architecture needs {expected[name].dtype} {tuple(expected[name].shape)}"
            )
    model.load_state_dict(tensors)
    return model.eval()
