"""DeepFinder's 3D U-Net for the segmentation of whole tomograms (Moebel et al. 2021, Nature Methods 18:1386-1394).

Layers as in the authors' published program, with `channels` c = 32 in theirs, every convolution followed by ReLU:

    full size      2 x conv 3^3 x c
    pool 2^3       2 x conv 3^3 x 3c/2
    pool 2^3       4 x conv 3^3 x 2c
    upsample 2^3   conv 2^3 x 2c, joined with what was there before the second pooling, 2 x conv 3^3 x 3c/2
    upsample 2^3   conv 2^3 x 3c/2, joined with what was there before the first pooling, 2 x conv 3^3 x c
    output         conv 1^3 x classes, softmax

Convolutions have stride 1 and keep the size, with zeros around; those of 2^3 see the voxel and the one behind it. There
is no normalisation, so what is said of a voxel follows from the voxels within `REACH` alone. The output layer leaves
logits.

The loss is the cross-entropy and the soft Dice loss together. The authors' is the Tversky loss with both weights 1/2,
which is soft Dice alone: it has next to no gradient while a class is not found at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.learning import edss3d
from services.learning.architecture_version import check_architecture
from services.learning.autoencoder import max_pool, memory_order
from services.learning.single_channel import convolve_from_one
from services.learning.training import Batch

NAME = "deepfinder"
VERSION = 1
"""Raised when the same weights would compute something else."""

CHANNELS = 32
"""The authors' at the full size."""
POOLING = 4
"""Two poolings by 2: the sides of patches and tiles are multiples of this."""

REACH = (31, 34)
"""How far before and behind it, in voxels along an axis, a voxel of the input can be that an output voxel depends on.

The convolutions of 2^3 look behind alone, so the two differ.
"""
MARGIN = 36
"""The first multiple of 4 at or above the reach: tiles with so much around them give what the whole volume gives."""

USE = "Predict gives each voxel of tomograms of the same voxel size one of its classes, or the background."
LIMITS = (
    "It knows the classes and the imaging of the labelled tomograms. Structures of other kinds are called whichever "
    "class they look most like: average what was picked of each class, and look at it."
)


class DeepFinder(nn.Module):
    """The network for so many classes, the background among them.

    Weights start from He's uniform distribution (2015), biases from zeros. The authors' start from Glorot's, by which
    each of fourteen layers with ReLU halves the variance: six epochs on two shapes in noise ended at a mean Dice of
    0.86 from the one, and of 0.37 from the other.

    Raises InvalidArgument for fewer than 2 classes, and for channels that are no positive even number.
    """

    spread: Tensor

    def __init__(self, classes: int, channels: int = CHANNELS, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if classes < 2:
            raise InvalidArgument(f"a segmentation needs at least 2 classes, one of them the background: not {classes}")
        if channels < 2 or channels % 2:
            raise InvalidArgument(f"channels: {channels}; it must be an even number of 2 or more")
        self.classes = classes
        fine, middle, coarse = channels, 3 * channels // 2, 2 * channels
        self.fine_1 = _convolution(1, fine)
        self.fine_2 = _convolution(fine, fine)
        self.middle_1 = _convolution(fine, middle)
        self.middle_2 = _convolution(middle, middle)
        self.coarse_1 = _convolution(middle, coarse)
        self.coarse_2 = _convolution(coarse, coarse)
        self.coarse_3 = _convolution(coarse, coarse)
        self.coarse_4 = _convolution(coarse, coarse)
        self.up_middle = nn.Conv3d(coarse, coarse, 2)
        self.joined_middle_1 = _convolution(coarse + middle, middle)
        self.joined_middle_2 = _convolution(middle, middle)
        self.up_fine = nn.Conv3d(middle, middle, 2)
        self.joined_fine_1 = _convolution(middle + fine, fine)
        self.joined_fine_2 = _convolution(fine, fine)
        self.output = nn.Conv3d(fine, classes, 1)
        for module in self.children():
            assert isinstance(module, nn.Conv3d)
            assert module.bias is not None
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(module.bias)
            module.weight.data = memory_order(module.weight.data)
        self.register_buffer("spread", kernel_spread(), persistent=False)

    def forward(self, boxes: Tensor) -> Tensor:
        """Logits (batch, classes, z, y, x) of boxes (batch, 1, z, y, x), sides multiples of 4."""
        fine = _relu(convolve_from_one(memory_order(boxes), self.fine_1))
        fine = _relu(self.fine_2(fine))
        middle = _relu(self.middle_1(max_pool(fine)))
        middle = _relu(self.middle_2(middle))
        features = max_pool(middle)
        for layer in (self.coarse_1, self.coarse_2, self.coarse_3, self.coarse_4):
            features = _relu(layer(features))
        features = _relu(upsample_and_convolve(features, self.up_middle, self.spread))
        features = _relu(self.joined_middle_1(torch.cat([features, middle], dim=1)))
        features = _relu(self.joined_middle_2(features))
        features = _relu(upsample_and_convolve(features, self.up_fine, self.spread))
        features = _relu(self.joined_fine_1(torch.cat([features, fine], dim=1)))
        features = _relu(self.joined_fine_2(features))
        logits: Tensor = self.output(features)
        return logits

    def probabilities(self, boxes: Tensor) -> Tensor:
        """The softmax of the logits: of each voxel, the classes' probabilities."""
        return functional.softmax(self(boxes).float(), dim=1)


def _convolution(inputs: int, outputs: int) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, 3, padding=1)


def _relu(features: Tensor) -> Tensor:
    return functional.relu(features, inplace=True)


def upsample_and_convolve(features: Tensor, convolution: nn.Conv3d, spread: Tensor) -> Tensor:
    """The 2^3 convolution of features upsampled by 2^3 to nearest neighbours, zeros behind the last voxel, as one
    transposed convolution.

    `spread` is what `kernel_spread` gives.
    """
    outputs, inputs = convolution.weight.shape[:2]
    kernel = (convolution.weight.transpose(0, 1).reshape(-1, 8) @ spread).view(inputs, outputs, 3, 3, 3)
    return functional.conv_transpose3d(features, kernel, convolution.bias, stride=2, padding=1, output_padding=1)


def kernel_spread() -> Tensor:
    """The matrix (8, 27) that turns a 2^3 kernel into that of the transposed convolution.

    Along an axis voxel j of the coarse grid gives w1 to voxel 2j - 1 of the fine one, w0 + w1 to 2j, and w0 to 2j + 1.
    """
    line = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    return torch.kron(torch.kron(line, line), line)


class SegmentationLoss:
    """What DeepFinder is trained on: the mean cross-entropy of the voxels' classes, and 1 - the mean soft Dice
    coefficient.

    Dice is of all voxels of a batch together and the mean of the classes that the batch has, so that a rare class
    weighs as much as a common one. Where several processes share a batch, it is that of each one's part.
    """

    NAME = "cross-entropy-and-soft-dice"

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """`loss`, its two terms, and `accuracy`, the share of voxels whose likeliest class is the right one.

        `batch` holds "boxes" (b, 1, n, n, n) and "targets" (b, n, n, n), the voxels' classes.
        """
        targets = batch["targets"].long()
        logits = model(batch["boxes"]).float()
        cross_entropy = edss3d.cross_entropy(logits, targets)
        dice_loss = 1 - soft_dice(functional.softmax(logits, dim=1), targets)
        return {
            "loss": cross_entropy + dice_loss,
            "cross_entropy": cross_entropy,
            "dice_loss": dice_loss,
            "accuracy": edss3d.accuracy(logits.detach(), targets),
        }


def soft_dice(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean over the classes that occur of 2 sum(p g) / (sum(p) + sum(g)), for probabilities p (b, classes, z, y, x) and
    classes (b, z, y, x) whose indicators are g (Milletari et al. 2016, without the squares).
    """
    indicators = functional.one_hot(targets, probabilities.shape[1]).movedim(-1, 1).to(probabilities.dtype)
    dimensions = (0, 2, 3, 4)
    sizes = indicators.sum(dim=dimensions)
    both = (probabilities * indicators).sum(dim=dimensions)
    present = (sizes > 0).to(probabilities.dtype)
    dice = 2 * both / (probabilities.sum(dim=dimensions) + sizes).clamp_min(1e-6)
    return (dice * present).sum() / present.sum()


def config(names: Sequence[str], channels: int) -> dict[str, Any]:
    """What names the architecture in a model's config; `names` of the classes, background first."""
    return {"architecture": NAME, "architecture_version": VERSION, "class_names": list(names), "channels": channels}


def check_config(settings: Mapping[str, Any]) -> None:
    """FailedPrecondition where a model's config describes another architecture, or is not whole."""
    check_architecture(settings, NAME, VERSION)
    names, channels = settings.get("class_names"), settings.get("channels")
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) and name for name in names):
        raise FailedPrecondition(
            f"the model's config says its classes are {names!r}: it is damaged, train the model again"
        )
    if type(channels) is not int or channels < 2 or channels % 2:
        raise FailedPrecondition(
            f"the model's config says channels is {channels!r}: it is damaged, train the model again"
        )


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> DeepFinder:
    """The network of a model's config; FailedPrecondition as `check_config`."""
    check_config(settings)
    return DeepFinder(len(settings["class_names"]), settings["channels"], generator)


def parameter_count(classes: int, channels: int) -> int:
    """Of the network."""
    fine, middle, coarse = channels, 3 * channels // 2, 2 * channels
    kernels = 27 * (fine + fine**2 + fine * middle + middle**2 + middle * coarse + 3 * coarse**2)
    kernels += 27 * ((coarse + middle) * middle + middle**2 + (middle + fine) * fine + fine**2)
    kernels += 8 * (coarse**2 + middle**2) + fine * classes
    return kernels + 4 * fine + 5 * middle + 5 * coarse + classes


def inference_bytes(voxels: int, classes: int, channels: int) -> int:
    """Peak memory of `probabilities` for so many voxels, all boxes of a batch together.

    Measured at 80^3 and 96^3. At the last joint: the fine level twice, once joined, what comes up from the middle
    twice, and the output; behind it the logits, their softmax and copies.
    """
    return 4 * voxels * (7 * channels + 4 * classes + 4)


def training_bytes(voxels: int, classes: int, channels: int) -> int:
    """What a training step keeps for so many voxels, measured at 40^3 and 48^3: outputs, joints, and gradients."""
    return 4 * voxels * (17 * channels + 8 * classes + 16)
