"""EDSS3D: the encoder-decoder network for semantic segmentation of Zeng et al. 2018 (J. Struct. Biol. 202:150-160).

Section 2.4 and figure 2b:

    conv 3^3 x 32, ReLU, max-pool 2^3, conv 3^3 x 32, ReLU, max-pool 2^3, conv 3^3 x 32, ReLU, upsample 2^3,
    conv 3^3 x 32, ReLU, upsample 2^3, conv 3^3 x 32, ReLU, conv 3^3 x classes, softmax

All convolutions have stride 1 and are padded with zeros to keep the size. There is no dense layer, so a network trained
on boxes takes regions of any sides that are multiples of 4. It is computed by the identities of `autoencoder`. The
output layer leaves logits: cross-entropy is computed from them without overflow, and `probabilities` is their softmax.

What it says of a voxel has passed two poolings, and it has no way around them: edges of small structures are blurred.
With `skip`, which the paper does not have, a convolution 3^3 of the input is added to the logits, so that edges follow
the voxels themselves, from which the labels were cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.learning.architecture_version import check_architecture
from services.learning.autoencoder import initialise, kernel_spread, max_pool, memory_order, upsample_and_convolve
from services.learning.single_channel import convolve_from_one
from services.learning.training import Batch

NAME = "edss3d"
VERSION = 1
"""Raised when the same weights would compute something else."""

CHANNELS = 32
POOLING = 4
"""Two poolings by 2: the sides of boxes and of tiles are multiples of this."""

REACH = 14
"""How far away, in voxels along an axis, a voxel of the input can be that an output voxel depends on.

From the output: 1 + 1 voxels by the last two convolutions, 1 by that at half the size, 1 at a quarter, 1 at half and
1 at the full size, each rounded outwards to the grid of its size.
"""

MARGIN = 16
"""The first multiple of 4 at or above the reach: tiles with so much around them give what the whole volume gives."""

INTENSITY = "all boxes of a set together have mean 0 and standard deviation 1"
"""So that a bright structure is told from a faint one by its brightness too. What a tomogram is scaled by is said in
`overlap_tile`."""

BACKGROUND = "background"
"""The name of class 0."""

USE = "Gives each voxel of tomograms or subtomograms of the same voxel size one of its classes, or the background."
LIMITS = (
    "Its labels were weak: decoded subtomograms cut at a level, not drawn by anybody. Structures of other kinds than "
    "its classes are called whichever of them they look most like."
)


class EDSS3D(nn.Module):
    """The network for so many classes, the background among them; `skip` adds a convolution of the input.

    Weights start as in Keras, with which the authors trained: Glorot's uniform distribution, and zeros for the biases.
    Raises InvalidArgument for fewer than 2 classes.
    """

    spread: Tensor

    def __init__(self, classes: int, generator: torch.Generator | None = None, *, skip: bool = False) -> None:
        super().__init__()
        if classes < 2:
            raise InvalidArgument(f"a segmentation needs at least 2 classes, one of them the background: not {classes}")
        self.classes = classes
        self.convolution_1 = nn.Conv3d(1, CHANNELS, 3, padding=1)
        self.convolution_2 = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
        self.convolution_3 = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
        self.convolution_4 = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
        self.convolution_5 = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
        self.convolution_6 = nn.Conv3d(CHANNELS, classes, 3, padding=1)
        self.skip = nn.Conv3d(1, classes, 3, padding=1) if skip else None
        initialise(self, generator)
        self.register_buffer("spread", kernel_spread(), persistent=False)

    def forward(self, boxes: Tensor) -> Tensor:
        """Logits (batch, classes, z, y, x) of boxes (batch, 1, z, y, x), sides multiples of 4."""
        features = memory_order(boxes)
        features = functional.relu(max_pool(convolve_from_one(features, self.convolution_1)), inplace=True)
        features = functional.relu(max_pool(self.convolution_2(features)), inplace=True)
        features = functional.relu(self.convolution_3(features), inplace=True)
        features = functional.relu(upsample_and_convolve(features, self.convolution_4, self.spread), inplace=True)
        features = functional.relu(upsample_and_convolve(features, self.convolution_5, self.spread), inplace=True)
        logits: Tensor = self.convolution_6(features)
        return logits if self.skip is None else logits + self.skip(boxes)

    def probabilities(self, boxes: Tensor) -> Tensor:
        """The softmax of the logits: of each voxel, the classes' probabilities."""
        return functional.softmax(self(boxes), dim=1)

    def probabilities_by_boxes(self, region: Tensor, side: int) -> Tensor:
        """Probabilities (classes, z, y, x) of a region (z, y, x) as boxes of `side` that overlap by half have them.

        Boxes as small as the network's reach teach it to count on their faces, where its convolutions see zeros; a
        region has none inside. Each box counts by a window sin^2(pi (i + 1/2) / side) along each axis. The region's
        sides are multiples of half a box; one shorter than a box is followed by zeros.
        """
        shape = region.shape
        region = functional.pad(region, [pad for length in reversed(shape) for pad in (0, max(0, side - length))])
        steps = torch.arange(side, dtype=region.dtype, device=region.device)
        line = torch.sin(torch.pi * (steps + 0.5) / side) ** 2
        window = line[:, None, None] * line[:, None] * line
        sums = region.new_zeros((self.classes, *region.shape))
        weights = region.new_zeros(region.shape)
        z_starts, y_starts, x_starts = (range(0, length - side + 1, side // 2) for length in region.shape)
        for z in z_starts:
            for y in y_starts:
                row = region[z : z + side, y : y + side].unfold(2, side, side // 2).permute(2, 0, 1, 3)
                found = self.probabilities(row[:, None].contiguous()) * window
                for x, box in zip(x_starts, found, strict=True):
                    place = (slice(z, z + side), slice(y, y + side), slice(x, x + side))
                    sums[(slice(None), *place)] += box
                    weights[place] += window
        joined: Tensor = sums / weights
        return joined[:, : shape[0], : shape[1], : shape[2]]


class SegmentationLoss:
    """What EDSS3D is trained on: the cross-entropy of each voxel's class, its mean over voxels and boxes."""

    NAME = "voxel-cross-entropy"

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Means over the batch: `loss`, and `accuracy`, the share of voxels whose likeliest class is the right one.

        `batch` holds "boxes" (b, 1, n, n, n) and "targets" (b, n, n, n), the voxels' classes.
        """
        targets = batch["targets"].long()
        logits = model(batch["boxes"])
        return {"loss": cross_entropy(logits, targets), "accuracy": accuracy(logits.detach(), targets)}


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all voxels of -log softmax(logits)[class], for logits (b, classes, z, y, x) and classes (b, z, y, x).

    By a product with the classes' indicators: what torch has for maps of more than a line is not deterministic on CUDA.
    """
    indicators = functional.one_hot(targets, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    return -(functional.log_softmax(logits.float(), dim=1) * indicators).sum(dim=1).mean()


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """The share of voxels whose likeliest class is the given one."""
    return (logits.argmax(dim=1) == targets).to(torch.float32).mean()


def config(names: Sequence[str], skip: bool = False) -> dict[str, Any]:
    """What names the architecture in a model's config; `names` of the classes, background first."""
    return {"architecture": NAME, "architecture_version": VERSION, "class_names": list(names), "skip": skip}


def check_config(settings: Mapping[str, Any]) -> None:
    """FailedPrecondition where a model's config describes another architecture, or is not whole."""
    check_architecture(settings, NAME, VERSION)
    names = settings.get("class_names")
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) and name for name in names):
        raise FailedPrecondition(
            f"the model's config says its classes are {names!r}: it is damaged, train the model again"
        )


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> EDSS3D:
    """The network of a model's config; FailedPrecondition as `check_config`."""
    check_config(settings)
    return EDSS3D(len(settings["class_names"]), generator, skip=settings.get("skip", False))


def weight_bytes(classes: int, skip: bool = False) -> int:
    """Size of the network's parameters as float32."""
    return 4 * (27 * CHANNELS * (1 + 4 * CHANNELS + classes) + 5 * CHANNELS + classes + 28 * classes * skip)


def inference_bytes(voxels: int, classes: int) -> int:
    """Peak memory of `probabilities` for so many voxels, all boxes of a batch together.

    Measured at 80^3. Two outputs of 32 channels at the full size are held where the last two layers meet; before, the
    27 neighbours that the first layer is computed from; behind them the logits, their softmax and copies.
    """
    return 4 * voxels * (7 * CHANNELS // 2 + 4 * classes)
