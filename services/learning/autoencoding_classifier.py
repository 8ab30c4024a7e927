"""The autoencoding classifier: classes learnt from few labelled boxes and, by their reconstruction, from many others.

After Liu et al. 2019 (semi-supervised classification by a 3D autoencoding classifier, BMVC): one encoder, whose code is
decoded to the box and sorted into classes; both losses teach it.

    encoder:    conv 3^3 x 32, ReLU, max-pool 2^3, conv 3^3 x 64, ReLU, max-pool 2^3, flatten, dense 128, ReLU
    decoder:    dense (n/4)^3 x 32, ReLU, upsample 2^3, conv 3^3 x 32, ReLU, upsample 2^3, conv 3^3 x 32, ReLU,
                conv 3^3 x 1
    classifier: dropout 50%, dense, softmax

Encoder and decoder are those of Autoencoder3D with a wider code, as a code that tells classes apart in any orientation
holds more than one that is clustered; first weights are He's. Boxes of any side that is a multiple of 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from cryofleet.errors import InvalidArgument
from services.learning import classifiers
from services.learning.autoencoder import kernel_spread, max_pool, memory_order, upsample_and_convolve
from services.learning.single_channel import convolve_from_one, convolve_to_one
from services.learning.training import Batch

NAME = "autoencoding"
VERSION = 1
"""Raised when the same weights would compute something else."""

USE = (
    "Sorts subtomograms of one box size into the classes it was trained on, each with a calibrated probability, where "
    "few of many were labelled."
)
LIMITS = (
    "Each subtomogram is given one of the known classes, whatever it holds; what else the unlabelled ones hold is not "
    "noticed."
)

CHANNELS = (32, 64)
CODE_SIZE = 128
DROPOUT = 0.5


class AutoencodingClassifier(classifiers.Classifier):
    """The network for boxes of `box_size` voxels and so many classes.

    Raises InvalidArgument for a side that is not a positive multiple of 4, and for fewer than 2 classes.
    """

    spread: Tensor

    def __init__(self, box_size: int, classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__(box_size, classes)
        fine, coarse = CHANNELS
        self.coarse_size = box_size // 4
        voxels = self.coarse_size**3
        self.convolution_1 = nn.Conv3d(1, fine, 3, padding=1)
        self.convolution_2 = nn.Conv3d(fine, coarse, 3, padding=1)
        self.to_code = nn.Linear(coarse * voxels, CODE_SIZE)
        self.output = nn.Linear(CODE_SIZE, classes)
        self.from_code = nn.Linear(CODE_SIZE, fine * voxels)
        self.convolution_3 = nn.Conv3d(fine, fine, 3, padding=1)
        self.convolution_4 = nn.Conv3d(fine, fine, 3, padding=1)
        self.convolution_5 = nn.Conv3d(fine, 1, 3, padding=1)
        classifiers.initialise(self, generator, self.output, self.convolution_5)
        self.register_buffer("spread", kernel_spread(), persistent=False)

    def features(self, boxes: Tensor, generator: torch.Generator | None) -> Tensor:
        """Codes (batch, 128), none negative, of boxes (batch, 1, n, n, n)."""
        features = functional.relu(max_pool(convolve_from_one(memory_order(boxes), self.convolution_1)), inplace=True)
        features = functional.relu(max_pool(self.convolution_2(features)), inplace=True)
        return functional.relu(self.to_code(features.contiguous().flatten(1)))

    def logits(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, classes) of codes (batch, 128)."""
        logits: Tensor = self.output(self.dropout(features, DROPOUT, generator))
        return logits

    def decode(self, codes: Tensor) -> Tensor:
        """Boxes (batch, 1, n, n, n) of codes (batch, 128)."""
        side = self.coarse_size
        features = memory_order(functional.relu(self.from_code(codes)).view(-1, CHANNELS[0], side, side, side))
        features = functional.relu(upsample_and_convolve(features, self.convolution_3, self.spread), inplace=True)
        features = functional.relu(upsample_and_convolve(features, self.convolution_4, self.spread), inplace=True)
        return convolve_to_one(features, self.convolution_5)


class AutoencodingLoss:
    """What the autoencoding classifier is trained on.

    loss = mean over the labelled boxes of the cross-entropy
         + reconstruction_weight * mean over all boxes and voxels of (x - x')^2

    `labelled_share` is the share of labelled boxes in the set. The first mean is taken as a sum over the labelled boxes
    of a batch over its size times this share: batches then sum to the whole set's loss however the labelled ones fall
    among them, and few labels weigh as much as many. Without reconstruction_weight nothing is decoded, which is the
    supervised training of the same encoder. Raises InvalidArgument for a share that is not within (0, 1].
    """

    NAME = "classification-and-reconstruction"

    def __init__(self, reconstruction_weight: float, labelled_share: float = 1.0) -> None:
        if not 0 < labelled_share <= 1:
            raise InvalidArgument(f"labelled_share is {labelled_share:g}, it must be above 0 and at most 1")
        self.reconstruction_weight = reconstruction_weight
        self.labelled_share = labelled_share

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Means over the batch: `loss`, its two terms `classification` and `reconstruction`, and `accuracy`, the share
        of the labelled boxes whose class is found.
        """
        assert isinstance(model, AutoencodingClassifier)
        boxes, labels = batch["boxes"], batch["labels"]
        logits, codes = model(boxes, generator)
        labelled = labels != classifiers.UNLABELLED
        expected = self.labelled_share * len(labels)
        entropies = functional.cross_entropy(
            logits.float(), labels, ignore_index=classifiers.UNLABELLED, reduction="sum"
        )
        right = (logits.detach().argmax(dim=1) == labels) & labelled
        values = {"classification": entropies / expected, "accuracy": right.to(torch.float32).sum() / expected}
        if not self.reconstruction_weight:
            return {"loss": values["classification"], **values}
        reconstruction = functional.mse_loss(model.decode(codes).float(), boxes)
        loss = values["classification"] + self.reconstruction_weight * reconstruction
        return {"loss": loss, "reconstruction": reconstruction, **values}


def config(box_size: int, ids: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """What names the architecture in a model's config."""
    return classifiers.config(NAME, VERSION, box_size, ids, names)


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> AutoencodingClassifier:
    """The network of a model's config; FailedPrecondition for another's, or one that is not whole."""
    return AutoencodingClassifier(*classifiers.check_config(settings, NAME, VERSION), generator)
