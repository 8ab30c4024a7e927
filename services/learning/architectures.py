"""All networks and objectives by the names under which models and jobs keep them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.learning import (
    annotator,
    autoencoder,
    autoencoding_classifier,
    cb3d,
    classifiers,
    cluster_model,
    conformation,
    deepfinder,
    domain_adaptation,
    dsrf3d,
    dual,
    edss3d,
    open_set,
    rb3d,
)
from services.learning.training import Objective


class Architecture(Protocol):
    """A network's module.

    It may also say `USE` and `LIMITS`, sentences for the cards of its models; what the network is, the first paragraph
    of its docstring says.
    """

    NAME: str
    VERSION: int
    __doc__: str | None

    def from_config(self, settings: Mapping[str, Any], generator: torch.Generator | None = None) -> nn.Module:
        """The network of a config, its first weights from the generator.

        Raises FailedPrecondition for another architecture or version, or a config that is not whole.
        """
        ...


ARCHITECTURES: Mapping[str, Architecture] = {
    annotator.NAME: annotator,
    autoencoder.NAME: autoencoder,
    autoencoding_classifier.NAME: autoencoding_classifier,
    cb3d.NAME: cb3d,
    cluster_model.NAME: cluster_model,
    conformation.NAME: conformation,
    deepfinder.NAME: deepfinder,
    domain_adaptation.NAME: domain_adaptation,
    dsrf3d.NAME: dsrf3d,
    dual.NAME: dual,
    edss3d.NAME: edss3d,
    open_set.NAME: open_set,
    rb3d.NAME: rb3d,
}
"""By `architecture` in a config."""

CLASSIFIERS = {module.NAME: module for module in (dsrf3d, rb3d, cb3d, autoencoding_classifier, open_set)}
"""The classifiers among them."""

OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    annotator.AnnotatorLoss.NAME: annotator.AnnotatorLoss,
    conformation.ConformationLoss.NAME: conformation.ConformationLoss,
    autoencoder.AutoencoderLoss.NAME: autoencoder.AutoencoderLoss,
    autoencoding_classifier.AutoencodingLoss.NAME: autoencoding_classifier.AutoencodingLoss,
    classifiers.ClassificationLoss.NAME: classifiers.ClassificationLoss,
    deepfinder.SegmentationLoss.NAME: deepfinder.SegmentationLoss,
    domain_adaptation.DomainAdversarialLoss.NAME: domain_adaptation.DomainAdversarialLoss,
    dual.DualLoss.NAME: dual.DualLoss,
    edss3d.SegmentationLoss.NAME: edss3d.SegmentationLoss,
    open_set.OpenSetLoss.NAME: open_set.OpenSetLoss,
}
"""By `name` in a spec, whose other entries are the arguments."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The module of a config's network. Raises FailedPrecondition where there is none of that name."""
    name = config.get("architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise FailedPrecondition(
            f"the model's architecture is {name!r}; those known here are {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[name]


def build(config: Mapping[str, Any], generator: torch.Generator | None = None) -> nn.Module:
    """The network of a config, as its module's `from_config`."""
    return architecture_of(config).from_config(config, generator)


def objective(spec: Mapping[str, Any]) -> Objective:
    """The objective of a spec: `{"name": ..., further arguments}`. Raises InvalidArgument for an unknown name."""
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if name not in OBJECTIVES:
        raise InvalidArgument(f"the objective is {name!r}; those known are {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[name](**arguments)
