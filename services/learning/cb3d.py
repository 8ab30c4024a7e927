"""CB3D: the classifier after C3D of Che et al. 2018 (Mach. Vis. Appl. 29:1227-1236), with five max-poolings.

    conv 3^3 x 32, pool, conv 3^3 x 64, pool, 2 x conv 3^3 x 128, pool, 2 x conv 3^3 x 128, pool, 2 x conv 3^3 x 128,
    pool, flatten, dense 512, ReLU, dropout 50%, dense 512, ReLU, dropout 50%, dense, softmax

ReLU follows each convolution. Convolutions lie between the poolings as in C3D (Tran et al. 2015: 1, 1, 2, 2 and 2);
widths are a half to a quarter of C3D's, whose classes are of videos of 112 pixels, and batch normalisation before each
ReLU of the convolutions lets the eight of them learn without C3D's million videos. All poolings are by
2^3, as the three directions of a particle are alike. At 32^3 the five of them leave 1^3. Boxes of any side that is a
multiple of 4: a voxel that is left over at an odd side is kept, so that of smaller boxes the last poolings, at 1^3,
change nothing, and larger ones leave more than one voxel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from services.learning import classifiers
from services.learning.autoencoder import memory_order
from services.learning.classifiers import normalise, pool
from services.learning.single_channel import convolve_from_one

NAME = "cb3d"
VERSION = 1
"""Raised when the same weights would compute something else."""

USE, LIMITS = classifiers.USE, classifiers.LIMITS

STAGES = ((32,), (64,), (128, 128), (128, 128), (128, 128))
"""Channels of the convolutions before each pooling."""

DENSE = 512
DROPOUT = 0.5


class CB3D(classifiers.Classifier):
    """The network for boxes of `box_size` voxels and so many classes.

    Raises InvalidArgument for a side that is not a positive multiple of 4, and for fewer than 2 classes.
    """

    def __init__(self, box_size: int, classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__(box_size, classes)
        channels = (1, *(width for stage in STAGES for width in stage))
        self.convolutions = nn.ModuleList(
            nn.Conv3d(before, after, 3, padding=1) for before, after in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm3d(width) for width in channels[1:])
        self.dense_1 = nn.Linear(channels[-1] * pooled_size(box_size) ** 3, DENSE)
        self.dense_2 = nn.Linear(DENSE, DENSE)
        self.output = nn.Linear(DENSE, classes)
        classifiers.initialise(self, generator, self.output)

    def features(self, boxes: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, 512) of boxes (batch, 1, n, n, n)."""
        features = memory_order(boxes)
        layers = iter(zip(self.convolutions, self.norms, strict=True))
        for stage in STAGES:
            for _ in stage:
                convolution, norm = next(layers)
                assert isinstance(convolution, nn.Conv3d)
                first = convolution.in_channels == 1
                features = convolve_from_one(features, convolution) if first else convolution(features)
                features = functional.relu(normalise(norm, features), inplace=True)
            features = pool(features)
        features = functional.relu(self.dense_1(features.contiguous().flatten(1)))
        return functional.relu(self.dense_2(self.dropout(features, DROPOUT, generator)))

    def logits(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, classes) of features (batch, 512)."""
        logits: Tensor = self.output(self.dropout(features, DROPOUT, generator))
        return logits


def pooled_size(box_size: int) -> int:
    """The side that the five poolings leave of a box."""
    for _ in STAGES:
        box_size = -(-box_size // 2)
    return box_size


def config(box_size: int, ids: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """What names the architecture in a model's config."""
    return classifiers.config(NAME, VERSION, box_size, ids, names)


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> CB3D:
    """The network of a model's config; FailedPrecondition for another's, or one that is not whole."""
    return CB3D(*classifiers.check_config(settings, NAME, VERSION), generator)
