"""What all classifiers share: their configs, how they are called, dropout and first weights, and the supervised loss.

A classifier is called as `model(boxes, generator)` and gives logits (batch, classes) and features (batch, d), the
output of the layer before the last. The classes are numbered from 0 in the order of the config's `class_ids`, whose
names are `class_names`; in a batch, "labels" (b,) are these numbers, and -1 is a box of unknown class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.learning.architecture_version import check_architecture
from services.learning.autoencoder import max_pool, memory_order
from services.learning.training import Batch

POOLING = 4
"""Box sides are multiples of this, as those of the platform's other networks."""

UNLABELLED = -1
"""The label of boxes whose class is not known."""

DECAY_FROM = 0.5
"""From this share of the epochs on, the learning rate falls to nothing: steps of full length end where the last few
batches happened to lead."""

USE = "Sorts subtomograms of one box size into the classes it was trained on, each with a calibrated probability."
LIMITS = (
    "Each subtomogram is given one of the known classes, whatever it holds; other imaging conditions than those of its "
    "training cost accuracy and calibration (AdaptClassifier)."
)
"""What the model cards of those say that know only their classes."""


class Classifier(nn.Module, ABC):
    """A network for boxes of one side, `box_size` voxels, and so many classes.

    `output` is the last layer. Raises InvalidArgument for a side that is not a positive multiple of 4, and for fewer
    than 2 classes.
    """

    output: nn.Linear

    def __init__(self, box_size: int, classes: int) -> None:
        super().__init__()
        check_box_size(box_size)
        if classes < 2:
            raise InvalidArgument(f"a classifier needs at least 2 classes: there is {classes}")
        self.box_size = box_size
        self.classes = classes

    @property
    def feature_size(self) -> int:
        """Numbers of a box's features."""
        return self.output.in_features

    @abstractmethod
    def features(self, boxes: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, d) of boxes (batch, 1, n, n, n); the generator is for dropout while training."""

    @abstractmethod
    def logits(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, classes) of features (batch, d)."""

    def forward(self, boxes: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Logits (batch, classes) and features (batch, d) of boxes (batch, 1, n, n, n).

        While training, `generator` (on the CPU) draws what dropout leaves out; it is not needed in use.
        """
        features = self.features(boxes, generator)
        return self.logits(features, generator), features

    def dropout(self, features: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
        """While training, a share of the features at zero, and the others scaled to the same mean.

        torch's own draws from a generator that all of a process share, so a resumed run would draw others.
        """
        if not self.training:
            return features
        if generator is None:
            raise ValueError("a classifier in training needs a generator")
        kept = torch.rand(features.shape, generator=generator) >= share
        return features * (kept.to(features.device) / (1 - share))


class ClassificationLoss:
    """What supervised classifiers are trained on: the cross-entropy of the classes."""

    NAME = "classification"

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Means over the batch: `loss`, and `accuracy`, the share of boxes whose likeliest class is the right one."""
        logits, _ = model(batch["boxes"], generator)
        labels = batch["labels"]
        return {"loss": functional.cross_entropy(logits.float(), labels), "accuracy": accuracy(logits, labels)}


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of rows of (b, classes) whose largest logit is that of the label (b,)."""
    return (logits.detach().argmax(dim=1) == labels).to(torch.float32).mean()


def initialise(module: nn.Module, generator: torch.Generator | None, *outputs: nn.Linear | nn.Conv3d) -> None:
    """First weights of all convolutions and dense layers: He's uniform distribution, and zeros for the biases.

    It keeps the signal's variance from layer to layer under ReLU (He et al. 2015), whatever the depth. Output layers
    start with zeros: all classes are equally probable at first, and no wrong certainty has to be unlearnt.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv3d | nn.Linear):
            nn.init.kaiming_uniform_(part.weight, nonlinearity="relu", generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
            part.weight.data = memory_order(part.weight.data)
    for part in outputs:
        nn.init.zeros_(part.weight)


def pool(features: Tensor) -> Tensor:
    """Max-pooling by 2^3; what is left over at an odd side makes a voxel of its own, so a side of 1 stays 1."""
    odd = [side % 2 for side in features.shape[2:]]
    if any(odd):
        if max(features.shape[2:]) == 1:
            return features
        features = functional.pad(features, (0, odd[2], 0, odd[1], 0, odd[0]), value=-torch.inf)
    return max_pool(features)


def normalise(norm: nn.Module, features: Tensor) -> Tensor:
    """Batch normalisation, by the running statistics where a batch has one value of each channel: a single box whose
    voxels have all been pooled into one. A last batch may be one box.
    """
    if isinstance(norm, nn.BatchNorm3d) and norm.training and features.numel() == features.shape[1]:
        return functional.batch_norm(
            features, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
        )
    normalised: Tensor = norm(features)
    return normalised


def config(name: str, version: int, box_size: int, ids: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """What names the architecture in a model's config; `ids` and `names` of the classes in the order of the outputs."""
    return {
        "architecture": name,
        "architecture_version": version,
        "box_size": box_size,
        "class_ids": [int(number) for number in ids],
        "class_names": list(names),
    }


def check_config(settings: Mapping[str, Any], name: str, version: int) -> tuple[int, int]:
    """The box's side and the number of classes.

    Raises FailedPrecondition where a model's config describes another architecture, or is not whole.
    """
    check_architecture(settings, name, version)
    size, ids, names = settings.get("box_size"), settings.get("class_ids"), settings.get("class_names")
    if type(size) is not int or size < POOLING or size % POOLING:
        raise FailedPrecondition(f"the model's config says box_size is {size!r}: it is damaged, train the model again")
    if not _are(ids, int) or not _are(names, str) or len(ids) != len(names) or len(ids) < 2:
        raise FailedPrecondition(
            f"the model's config says its classes are {ids!r}, named {names!r}: it is damaged, train the model again"
        )
    return size, len(ids)


def _are(values: object, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def check_box_size(box_size: int) -> None:
    """InvalidArgument unless a side is a positive multiple of 4."""
    if box_size < POOLING or box_size % POOLING:
        raise InvalidArgument(
            f"the network needs boxes whose side is a multiple of {POOLING} voxels, after binning: it is {box_size}"
        )


def parameter_count(model: nn.Module) -> int:
    """Numbers that are learnt."""
    return sum(parameter.numel() for parameter in model.parameters())
