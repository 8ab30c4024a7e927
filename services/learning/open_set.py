"""The open-set classifier: classes far apart and close in themselves, so that what belongs to none of them is noticed.

After Du et al. 2019 (open-set recognition of macromolecules by a large-margin cosine loss, BMVC). The code of the
autoencoding classifier's encoder, 128 numbers, is followed by dropout of 50% and a dense layer of 64 numbers, scaled to
unit length, the embedding. The logit of a class is 16 times the cosine of the embedding with that class's weights, also
of unit length; while training, the right class's cosine is lowered by a margin of 0.3 (Wang et al. 2018, CosFace), so
that each class is drawn into a narrow cone about its weights and away from the others'. Embeddings are of any sign:
ReLU would leave them one corner of the sphere.

In use, the code of a box is the mean of those of its turned copies (`views`), by rotations that it was trained with:
what noise does to it is another in each, what it shows is not.

A box's distance is Mahalanobis' of its code from the nearest known class: from the means of the training boxes' codes,
by their covariance within the classes, which all share (Lee et al. 2018, A simple unified framework for detecting
out-of-distribution samples, NeurIPS), shrunk as Ledoit & Wolf have it. Not of its embedding, which keeps little but
what tells the known classes apart: as the training went on, unseen classes fell into their cones. It is rejected where
its distance is above that which 95% of the validation boxes, all of known classes, keep within.
Rejected boxes are clustered by the directions of their codes into unseen classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn

from cryofleet.errors import FailedPrecondition
from cryofleet.progress import Progress
from services.learning import classifiers, clustering
from services.learning.augmentation import ROTATIONS, Turn, cube_turns, turn
from services.learning.encoder import CODE_SIZE, Encoder
from services.learning.training import Batch

NAME = "open-set"
VERSION = 2
"""Raised when the same weights would compute something else."""

USE = (
    "Sorts subtomograms of one box size into the classes it was trained on, each with a calibrated probability, and "
    "rejects what looks like none of them; what is rejected can be clustered."
)
LIMITS = (
    "About one in twenty subtomograms of the known classes is rejected; an unseen structure that is like a known one "
    "may be taken for it."
)

EMBEDDING = 64
DROPOUT = 0.5
SCALE = 16.0
MARGIN = 0.3
KEPT_SHARE = 0.95
"""Of the validation boxes, by the threshold of rejection."""


class OpenSetClassifier(classifiers.Classifier):
    """The network for boxes of `box_size` voxels and so many known classes, trained with such rotations.

    `whitening` (128, 128), which makes the codes' covariance within the classes the identity, and `centres`
    (classes, 128), the classes' means of codes times it, are set after the training. Raises InvalidArgument for a side
    that is not a positive multiple of 4, and for fewer than 2 classes.
    """

    whitening: Tensor
    centres: Tensor

    def __init__(
        self, box_size: int, classes: int, generator: torch.Generator | None = None, rotations: str = "cube"
    ) -> None:
        super().__init__(box_size, classes)
        self.views = views(rotations)
        self.encoder = Encoder(box_size)
        self.embedding = nn.Linear(CODE_SIZE, EMBEDDING)
        self.output = nn.Linear(EMBEDDING, classes, bias=False)
        self.register_buffer("whitening", torch.eye(CODE_SIZE))
        self.register_buffer("centres", torch.zeros(classes, CODE_SIZE))
        classifiers.initialise(self, generator)

    @property
    def feature_size(self) -> int:
        """The code's."""
        return CODE_SIZE

    def features(self, boxes: Tensor, generator: torch.Generator | None) -> Tensor:
        """Codes (batch, 128), none negative, of boxes (batch, 1, n, n, n); in use, means of those of their views."""
        if self.training:
            codes: Tensor = self.encoder(boxes)
            return codes
        turned = ([turn(box[0], how) for box in boxes] for how in self.views)
        return torch.stack([self.encoder(torch.stack(view)[:, None]) for view in turned]).mean(dim=0)

    def logits(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, classes) of codes (batch, 128): 16 times the cosines of their embedding with the classes' weights."""
        embedded = self.embedding(self.dropout(features, DROPOUT, generator))
        # In float32: under mixed precision, cosines would be rounded to 8 bits.
        with torch.autocast(features.device.type, enabled=False):
            directions = functional.normalize(embedded.float(), dim=1)
            return SCALE * directions @ functional.normalize(self.output.weight, dim=1).t()


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


def views(rotations: str) -> list[Turn]:
    """How a box is turned to be looked at, by a network that was trained with such `augmentation.ROTATIONS`: not at
    all, four ways about the beam, or eight of the cube's 24.
    """
    turns = cube_turns(3)
    if rotations == "none":
        return turns[:1]
    if rotations == "beam":
        return [(order, reversed_axes) for order, reversed_axes in turns if order[0] == 0 and 0 not in reversed_axes]
    return turns[::3]


def fit_classes(
    codes: NDArray[np.float32], labels: NDArray[np.int64], classes: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`whitening` (d, d) and `centres` (classes, d) of codes (n, d) of known classes; each class has some."""
    means = np.stack([codes[labels == label].mean(axis=0, dtype=np.float64) for label in range(classes)])
    covariance, _ = ledoit_wolf(codes - means[labels], assume_centered=True)
    # Numbers that no box has anything in would make it singular, were all codes of a class alike.
    covariance += np.finfo(np.float32).eps * np.eye(len(covariance))
    whitening = np.linalg.cholesky(np.linalg.inv(covariance))
    return whitening.astype(np.float32), (means @ whitening).astype(np.float32)


def distances(whitened: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,): how far each of the codes (n, d), times the whitening, is from the nearest of the centres (classes, d)."""
    nearest: NDArray[np.float32] = cdist(whitened, centres).min(axis=1).astype(np.float32)
    return nearest


def rejection_distance(validation_distances: NDArray[np.float32]) -> float:
    """The distance above which a box is rejected: the 95% quantile of those of known classes that were held back."""
    return float(np.quantile(validation_distances, KEPT_SHARE))


def unseen_classes(
    features: NDArray[np.float32], rejected: NDArray[np.bool_], classes: int, seed: int, progress: Progress
) -> NDArray[np.int32]:
    """(n,): the cluster, from 0 the largest, of each rejected row of features (n, d); -1 of those not rejected.

    Of the features, scaled to unit length, by k-means with k = `classes`, or as many as there are different rejected
    rows.
    """
    labels = np.full(len(features), -1, np.int32)
    chosen = features[rejected]
    if len(chosen):
        chosen = chosen / np.maximum(np.linalg.norm(chosen, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        k = min(classes, len(np.unique(chosen, axis=0)))
        labels[rejected] = clustering.cluster(chosen, k, seed, progress).labels
    return labels


def config(box_size: int, ids: Sequence[int], names: Sequence[str], rotations: str = "cube") -> dict[str, Any]:
    """What names the architecture in a model's config; `rotations` are those of the training, and
    `rejection_distance` is added after it.
    """
    return classifiers.config(NAME, VERSION, box_size, ids, names) | {"view_rotations": rotations}


def threshold_of(settings: Mapping[str, Any]) -> float:
    """The distance of rejection in a model's config; FailedPrecondition where there is none."""
    value = settings.get("rejection_distance")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise FailedPrecondition(
            f"the model's config says rejection_distance is {value!r}: it is damaged, train the model again"
        )
    return float(value)


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> OpenSetClassifier:
    """The network of a model's config; FailedPrecondition for another's, or one that is not whole."""
    box_size, classes = classifiers.check_config(settings, NAME, VERSION)
    rotations = settings.get("view_rotations")
    if rotations not in ROTATIONS:
        raise FailedPrecondition(
            f"the model's config says view_rotations is {rotations!r}: it is damaged, train the model again"
        )
    return OpenSetClassifier(box_size, classes, generator, rotations)
