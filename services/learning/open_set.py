"""The open-set classifier: classes far apart and close in themselves, so that what belongs to none of them is noticed.

After Du et al. 2019 (open-set recognition of macromolecules by a large-margin cosine loss, BMVC). The
code of the autoencoding classifier's encoder, 128 numbers, is followed by dropout of 50% and a dense layer of 64
numbers, scaled to unit length: the features.
The logit of a class is 16 times the cosine of the features with that class's weights, also of unit length; while
training, the right class's cosine is lowered by a margin of 0.3 (Wang et al. 2018, CosFace), so that each class is
drawn into a narrow cone about its weights and away from the others'. Features are of any sign: ReLU would leave them
one corner of the sphere.

A box's distance is 1 minus the largest cosine of its features with the known classes' prototypes, the means of their
training boxes' features. It is rejected where its distance is above that which 95% of the validation boxes, all of
known classes, keep within. Rejected boxes are clustered by their features into unseen classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor, nn

from cryofleet.errors import FailedPrecondition
from cryofleet.progress import Progress
from services.learning import classifiers, clustering
from services.learning.encoder import CODE_SIZE, Encoder
from services.learning.training import Batch

NAME = "open-set"
VERSION = 1
"""Raised when the same weights would compute something else."""

USE = (
    "Sorts subtomograms of one box size into the classes it was trained on, each with a calibrated probability, and "
    "rejects what looks like none of them; what is rejected can be clustered."
)
LIMITS = (
    "About one in twenty subtomograms of the known classes is rejected; an unseen structure that is like a known one "
    "may be taken for it."
)

FEATURES = 64
DROPOUT = 0.5
SCALE = 16.0
MARGIN = 0.3
KEPT_SHARE = 0.95
"""Of the validation boxes, by the threshold of rejection."""


class OpenSetClassifier(classifiers.Classifier):
    """The network for boxes of `box_size` voxels and so many known classes.

    `prototypes` (classes, 64) of unit length are set after the training. Raises InvalidArgument for a side that is not
    a positive multiple of 4, and for fewer than 2 classes.
    """

    prototypes: Tensor

    def __init__(self, box_size: int, classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__(box_size, classes)
        self.encoder = Encoder(box_size)
        self.embedding = nn.Linear(CODE_SIZE, FEATURES)
        self.output = nn.Linear(FEATURES, classes, bias=False)
        self.register_buffer("prototypes", torch.zeros(classes, FEATURES))
        classifiers.initialise(self, generator)

    def features(self, boxes: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, 64) of unit length, of boxes (batch, 1, n, n, n)."""
        # Normalised in float32: under mixed precision, cosines would be rounded to 8 bits.
        codes = self.dropout(self.encoder(boxes), DROPOUT, generator)
        return functional.normalize(self.embedding(codes).float(), dim=1)

    def logits(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, classes): 16 times the cosines of features (batch, 64) with the classes' weights."""
        with torch.autocast(features.device.type, enabled=False):
            return SCALE * features @ functional.normalize(self.output.weight, dim=1).t()


class OpenSetLoss:
    """The large-margin cosine loss: the cross-entropy with the right class's cosine lowered by the margin.

    Validation is without the margin, as the network is used.
    """

    NAME = "large-margin-cosine"

    def __init__(self, margin: float = MARGIN) -> None:
        self.margin = margin

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Means over the batch: `loss`, and `accuracy`, the share of boxes whose likeliest class is the right one."""
        logits, _ = model(batch["boxes"], generator)
        labels = batch["labels"]
        margin = SCALE * self.margin * functional.one_hot(labels, logits.shape[1]) if model.training else 0.0
        return {
            "loss": functional.cross_entropy(logits - margin, labels),
            "accuracy": classifiers.accuracy(logits, labels),
        }


def class_prototypes(features: NDArray[np.float32], labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """(classes, d): of each class the mean of its features (n, d), scaled to unit length; each has some."""
    means = np.stack([features[labels == label].mean(axis=0, dtype=np.float64) for label in range(classes)])
    prototypes: NDArray[np.float32] = (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)
    return prototypes


def distances(features: NDArray[np.float32], prototypes: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,): 1 minus the largest cosine of each row of features (n, d) with the prototypes (classes, d), 0 to 2."""
    nearest: NDArray[np.float32] = 1 - (features @ prototypes.T).max(axis=1)
    return nearest


def rejection_distance(validation_distances: NDArray[np.float32]) -> float:
    """The distance above which a box is rejected: the 95% quantile of those of known classes that were held back."""
    return float(np.quantile(validation_distances, KEPT_SHARE))


def unseen_classes(
    features: NDArray[np.float32], rejected: NDArray[np.bool_], classes: int, seed: int, progress: Progress
) -> NDArray[np.int32]:
    """(n,): the cluster, from 0 the largest, of each rejected row of features (n, d); -1 of those not rejected.

    By k-means with k = `classes`, or as many as there are different rejected rows.
    """
    labels = np.full(len(features), -1, np.int32)
    chosen = features[rejected]
    if len(chosen):
        k = min(classes, len(np.unique(chosen, axis=0)))
        labels[rejected] = clustering.cluster(chosen, k, seed, progress).labels
    return labels


def config(box_size: int, ids: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """What names the architecture in a model's config; `rejection_distance` is added after the training."""
    return classifiers.config(NAME, VERSION, box_size, ids, names)


def threshold_of(settings: Mapping[str, Any]) -> float:
    """The distance of rejection in a model's config; FailedPrecondition where there is none."""
    value = settings.get("rejection_distance")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2:
        raise FailedPrecondition(
            f"the model's config says rejection_distance is {value!r}: it is damaged, train the model again"
        )
    return float(value)


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> OpenSetClassifier:
    """The network of a model's config; FailedPrecondition for another's, or one that is not whole."""
    return OpenSetClassifier(*classifiers.check_config(settings, NAME, VERSION), generator)
