"""DSRF3D-v2: the classifier of small receptive fields of Che et al. 2018 (Mach. Vis. Appl. 29:1227-1236), after VGG.

    conv 3^3 x 32, ReLU, conv 3^3 x 32, max-pool 2^3, ReLU, conv 3^3 x 64, ReLU, conv 3^3 x 64, max-pool 2^3, ReLU,
    flatten, dense 512, ReLU, dropout 70%, dense 512, ReLU, dropout 70%, dense, softmax

The layers are those of its authors' forerunner DSRF3D; what the paper leaves open is chosen so: convolutions have
stride 1 and are padded with zeros to keep the size, dropout follows either dense layer as in VGG, first weights are
He's, and batch normalisation comes before each ReLU of the convolutions (`encoder` says what it is worth). Boxes of any
side that is a multiple of 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from services.learning import classifiers
from services.learning.autoencoder import max_pool, memory_order
from services.learning.classifiers import normalise
from services.learning.single_channel import convolve_from_one

NAME = "dsrf3d-v2"
VERSION = 1
"""Raised when the same weights would compute something else."""

USE, LIMITS = classifiers.USE, classifiers.LIMITS

CHANNELS = (32, 64)
DENSE = 512
DROPOUT = 0.7


class DSRF3D(classifiers.Classifier):
    """The network for boxes of `box_size` voxels and so many classes.

    Raises InvalidArgument for a side that is not a positive multiple of 4, and for fewer than 2 classes.
    """

    def __init__(self, box_size: int, classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__(box_size, classes)
        fine, coarse = CHANNELS
        self.convolution_1 = nn.Conv3d(1, fine, 3, padding=1)
        self.norm_1 = nn.BatchNorm3d(fine)
        self.convolution_2 = nn.Conv3d(fine, fine, 3, padding=1)
        self.norm_2 = nn.BatchNorm3d(fine)
        self.convolution_3 = nn.Conv3d(fine, coarse, 3, padding=1)
        self.norm_3 = nn.BatchNorm3d(coarse)
        self.convolution_4 = nn.Conv3d(coarse, coarse, 3, padding=1)
        self.norm_4 = nn.BatchNorm3d(coarse)
        self.dense_1 = nn.Linear(coarse * (box_size // 4) ** 3, DENSE)
        self.dense_2 = nn.Linear(DENSE, DENSE)
        self.output = nn.Linear(DENSE, classes)
        classifiers.initialise(self, generator, self.output)

    def features(self, boxes: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, 512) of boxes (batch, 1, n, n, n)."""
        features = normalise(self.norm_1, convolve_from_one(memory_order(boxes), self.convolution_1))
        features = functional.relu(features, inplace=True)
        # The maximum before the normalisation: an eighth of the voxels to normalise.
        features = functional.relu(normalise(self.norm_2, max_pool(self.convolution_2(features))), inplace=True)
        features = functional.relu(normalise(self.norm_3, self.convolution_3(features)), inplace=True)
        features = functional.relu(normalise(self.norm_4, max_pool(self.convolution_4(features))), inplace=True)
        features = functional.relu(self.dense_1(features.contiguous().flatten(1)))
        return functional.relu(self.dense_2(self.dropout(features, DROPOUT, generator)))

    def logits(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, classes) of features (batch, 512)."""
        logits: Tensor = self.output(self.dropout(features, DROPOUT, generator))
        return logits


def config(box_size: int, ids: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """What names the architecture in a model's config."""
    return classifiers.config(NAME, VERSION, box_size, ids, names)


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> DSRF3D:
    """The network of a model's config; FailedPrecondition for another's, or one that is not whole."""
    return DSRF3D(*classifiers.check_config(settings, NAME, VERSION), generator)
