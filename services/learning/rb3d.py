"""RB3D: the classifier of four residual blocks of Che et al. 2018 (Mach. Vis. Appl. 29:1227-1236).

    conv 3^3 x 32, ReLU, max-pool 2^3, block x 64, block x 64, max-pool 2^3, block x 128, block x 128, mean over the
    voxels, dropout 50%, dense, softmax
    block x c: conv 1^3 x c/4, ReLU, conv 3^3 x c/4, ReLU, conv 1^3 x c; added to a shortcut conv 3^3 x c; ReLU

Each convolution of a block is followed by batch normalisation, as in the residual networks of He et al. 2016 that the
paper goes back to. (Normalising each box by itself would take away what the filters' strengths say: at low SNR, most of
what there is.) What else it leaves open is chosen so: a quarter of the channels within a block (as theirs),
convolutions padded with zeros to keep the size, the mean over voxels in place of a dense layer (as theirs, so weights
do not grow with the box), and first weights by He. Boxes of any side that is a multiple of 4.
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

NAME = "rb3d"
VERSION = 1
"""Raised when the same weights would compute something else."""

USE, LIMITS = classifiers.USE, classifiers.LIMITS

STEM = 32
CHANNELS = (64, 64, 128, 128)
REDUCTION = 4
DROPOUT = 0.5


class Bottleneck(nn.Module):
    """A residual block: 1^3 to a quarter of the channels, 3^3, 1^3 back to all, and a 3^3 shortcut beside them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        narrow = outputs // REDUCTION
        # The normalisation that follows has a bias of its own.
        self.reduce = nn.Conv3d(inputs, narrow, 1, bias=False)
        self.reduce_norm = nn.BatchNorm3d(narrow)
        self.spatial = nn.Conv3d(narrow, narrow, 3, padding=1, bias=False)
        self.spatial_norm = nn.BatchNorm3d(narrow)
        self.restore = nn.Conv3d(narrow, outputs, 1, bias=False)
        self.restore_norm = nn.BatchNorm3d(outputs)
        self.shortcut = nn.Conv3d(inputs, outputs, 3, padding=1, bias=False)
        self.shortcut_norm = nn.BatchNorm3d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, inputs, n, n, n) to (batch, outputs, n, n, n)."""
        path = functional.relu(normalise(self.reduce_norm, self.reduce(features)), inplace=True)
        path = functional.relu(normalise(self.spatial_norm, self.spatial(path)), inplace=True)
        path = normalise(self.restore_norm, self.restore(path))
        return functional.relu(path + normalise(self.shortcut_norm, self.shortcut(features)), inplace=True)


class RB3D(classifiers.Classifier):
    """The network for boxes of `box_size` voxels and so many classes.

    Raises InvalidArgument for a side that is not a positive multiple of 4, and for fewer than 2 classes.
    """

    def __init__(self, box_size: int, classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__(box_size, classes)
        self.stem = nn.Conv3d(1, STEM, 3, padding=1)
        inputs = (STEM, *CHANNELS[:-1])
        self.block_1, self.block_2, self.block_3, self.block_4 = (
            Bottleneck(before, after) for before, after in zip(inputs, CHANNELS, strict=True)
        )
        self.output = nn.Linear(CHANNELS[-1], classes)
        classifiers.initialise(self, generator, self.output)

    def features(self, boxes: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, 128) of boxes (batch, 1, n, n, n)."""
        features = functional.relu(max_pool(convolve_from_one(memory_order(boxes), self.stem)), inplace=True)
        features = max_pool(self.block_2(self.block_1(features)))
        means: Tensor = self.block_4(self.block_3(features)).mean(dim=(2, 3, 4))
        return means

    def logits(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, classes) of features (batch, 128)."""
        logits: Tensor = self.output(self.dropout(features, DROPOUT, generator))
        return logits


def config(box_size: int, ids: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """What names the architecture in a model's config."""
    return classifiers.config(NAME, VERSION, box_size, ids, names)


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> RB3D:
    """The network of a model's config; FailedPrecondition for another's, or one that is not whole."""
    return RB3D(*classifiers.check_config(settings, NAME, VERSION), generator)
