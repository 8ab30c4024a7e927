"""The autoencoding classifier: classes learnt from few labelled boxes and from many others.

After Liu et al. 2019 (semi-supervised classification by a 3D autoencoding classifier, BMVC): one encoder, whose code is
decoded to the box and sorted into classes; both losses teach it.

    encoder:    Encoder: three convolutions to a code of 128
    decoder:    dense (n/4)^3 x 32, ReLU, upsample 2^3, conv 3^3 x 32, ReLU, upsample 2^3, conv 3^3 x 32, ReLU,
                conv 3^3 x 1
    classifier: dropout 50%, dense, softmax

The decoder is that of Autoencoder3D, and the code wider than its, as one that tells classes apart in any orientation
holds more than one that is clustered. First weights are He's. Boxes of any side that is a multiple of 4.

What a box looks like says little of its class where most of it is noise, so the unlabelled boxes teach in a second way
that the paper has not: boxes that are turned must keep their class (`AutoencodingLoss`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from cryofleet.errors import InvalidArgument
from services.learning import classifiers
from services.learning.augmentation import Augmentation
from services.learning.autoencoder import kernel_spread, memory_order, upsample_and_convolve
from services.learning.encoder import CODE_SIZE, Encoder
from services.learning.single_channel import convolve_to_one
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

DECODED = 32
"""Channels of the decoder."""
DROPOUT = 0.5

CONFIDENCE = 0.8
"""How probable a class must be for an unlabelled box to be taught it."""

SHOWN_LABELLED = 0.5
"""The share of labelled boxes in what an epoch shows, where they are fewer."""

SECOND_VIEW = Augmentation("cube", contrast_jitter=0.1, noise_jitter=0.1)
"""How an unlabelled box is changed to be seen again: by turns that interpolate nothing, whatever the training's own."""


class AutoencodingClassifier(classifiers.Classifier):
    """The network for boxes of `box_size` voxels and so many classes.

    Raises InvalidArgument for a side that is not a positive multiple of 4, and for fewer than 2 classes.
    """

    spread: Tensor

    def __init__(self, box_size: int, classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__(box_size, classes)
        self.coarse_size = box_size // 4
        self.encoder = Encoder(box_size)
        self.output = nn.Linear(CODE_SIZE, classes)
        self.from_code = nn.Linear(CODE_SIZE, DECODED * self.coarse_size**3)
        self.convolution_1 = nn.Conv3d(DECODED, DECODED, 3, padding=1)
        self.convolution_2 = nn.Conv3d(DECODED, DECODED, 3, padding=1)
        self.convolution_3 = nn.Conv3d(DECODED, 1, 3, padding=1)
        classifiers.initialise(self, generator, self.output, self.convolution_3)
        self.register_buffer("spread", kernel_spread(), persistent=False)

    def features(self, boxes: Tensor, generator: torch.Generator | None) -> Tensor:
        """Codes (batch, 128), none negative, of boxes (batch, 1, n, n, n)."""
        codes: Tensor = self.encoder(boxes)
        return codes

    def logits(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, classes) of codes (batch, 128)."""
        logits: Tensor = self.output(self.dropout(features, DROPOUT, generator))
        return logits

    def decode(self, codes: Tensor) -> Tensor:
        """Boxes (batch, 1, n, n, n) of codes (batch, 128)."""
        side = self.coarse_size
        features = memory_order(functional.relu(self.from_code(codes)).view(-1, DECODED, side, side, side))
        features = functional.relu(upsample_and_convolve(features, self.convolution_1, self.spread), inplace=True)
        features = functional.relu(upsample_and_convolve(features, self.convolution_2, self.spread), inplace=True)
        return convolve_to_one(features, self.convolution_3)


class AutoencodingLoss:
    """What the autoencoding classifier is trained on.

    loss = mean over the labelled boxes of the cross-entropy
         + reconstruction_weight * mean over all boxes and voxels of (x - x')^2
         + consistency_weight * mean over the unlabelled boxes of the surprise of a pseudo-label

    An unlabelled box is seen twice: as the batch has it, and changed by `SECOND_VIEW`. Its pseudo-label is the
    likeliest class of the mean of both probabilities, and counts where that is at least `CONFIDENCE`; its surprise is
    the mean of the two cross-entropies, 0 where it does not count (after FixMatch, Sohn et al. 2020). So nothing is
    taught at first, and more and more as the labelled boxes make some of the others sure. Validation is without it.

    `labelled_share` is the share of labelled boxes in the set; an epoch of training shows each of them
    `labelled_repeats` times (`jobs.Job`). The first mean is taken as a sum over the labelled boxes of a batch over its
    size times their share of what is shown: batches then sum to the whole set's loss however the labelled ones fall
    among them, and few labels weigh as much as many. The third is taken likewise. Without the two weights, the
    unlabelled boxes teach nothing: the supervised training of the same encoder. Raises InvalidArgument for a share that
    is not within (0, 1].
    """

    NAME = "classification-and-reconstruction"

    def __init__(
        self,
        reconstruction_weight: float,
        labelled_share: float = 1.0,
        consistency_weight: float = 0.0,
        labelled_repeats: int = 1,
    ) -> None:
        if not 0 < labelled_share <= 1:
            raise InvalidArgument(f"labelled_share is {labelled_share:g}, it must be above 0 and at most 1")
        self.reconstruction_weight = reconstruction_weight
        self.consistency_weight = consistency_weight
        self.labelled_share = labelled_share
        self.shown_share = labelled_share * labelled_repeats / (1 + labelled_share * (labelled_repeats - 1))

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Means over the batch: `loss`, its terms `classification`, `reconstruction` and `consistency`, and `accuracy`,
        the share of the labelled boxes whose class is found.
        """
        assert isinstance(model, AutoencodingClassifier)
        boxes, labels = batch["boxes"], batch["labels"]
        labelled = labels != classifiers.UNLABELLED
        share = self.shown_share if model.training else self.labelled_share
        consistent = model.training and self.consistency_weight > 0 and share < 1
        again = boxes[~labelled] if consistent else boxes[:0]
        seen = torch.cat([boxes, SECOND_VIEW({"boxes": again}, generator)["boxes"]]) if len(again) else boxes
        every_logits, every_code = model(seen, generator)
        logits, codes = every_logits[: len(boxes)].float(), every_code[: len(boxes)]
        expected = share * len(labels)
        entropies = functional.cross_entropy(logits, labels, ignore_index=classifiers.UNLABELLED, reduction="sum")
        right = (logits.detach().argmax(dim=1) == labels) & labelled
        values = {"classification": entropies / expected, "accuracy": right.to(torch.float32).sum() / expected}
        loss = values["classification"]
        if self.reconstruction_weight:
            values["reconstruction"] = functional.mse_loss(model.decode(codes).float(), boxes)
            loss = loss + self.reconstruction_weight * values["reconstruction"]
        if consistent:
            surprise = pseudo_label_surprise(logits[~labelled], every_logits[len(boxes) :].float())
            values["consistency"] = surprise / ((1 - share) * len(labels))
            loss = loss + self.consistency_weight * values["consistency"]
        return {"loss": loss, **values}


def pseudo_label_surprise(first: Tensor, second: Tensor) -> Tensor:
    """The sum over boxes of the surprise of their pseudo-labels, by the logits (n, classes) of two views of each."""
    chances = (first.detach().softmax(dim=1) + second.detach().softmax(dim=1)) / 2
    confidence, found = chances.max(dim=1)
    both = functional.cross_entropy(first, found, reduction="none") + functional.cross_entropy(
        second, found, reduction="none"
    )
    return (both * (confidence >= CONFIDENCE)).sum() / 2


def labelled_repeats(labelled_share: float) -> int:
    """How often an epoch shows each labelled box, so that `SHOWN_LABELLED` or more of what it shows are labelled."""
    others = (1 - labelled_share) * SHOWN_LABELLED / (1 - SHOWN_LABELLED)
    return max(1, math.ceil(others / labelled_share))


def config(box_size: int, ids: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """What names the architecture in a model's config."""
    return classifiers.config(NAME, VERSION, box_size, ids, names)


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> AutoencodingClassifier:
    """The network of a model's config; FailedPrecondition for another's, or one that is not whole."""
    return AutoencodingClassifier(*classifiers.check_config(settings, NAME, VERSION), generator)
