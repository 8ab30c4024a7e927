"""Autoencoder3D: the convolutional autoencoder of Zeng et al. 2018 (J. Struct. Biol. 202:150-160).

Section 2.2 and figure 2a:

    encoder: conv 3^3 x 32, ReLU, max-pool 2^3, conv 3^3 x 32, ReLU, max-pool 2^3, flatten, dense 32, ReLU
    decoder: dense (n/4)^3 x 32, ReLU, upsample 2^3, conv 3^3 x 32, ReLU, upsample 2^3, conv 3^3 x 32, ReLU,
             conv 3^3 x 1

All convolutions have stride 1 and are padded with zeros to keep the size. Three identities make it several times as
fast on a CPU without changing what is computed, apart from rounding: ReLU commutes with max-pooling, so it follows the
pooling; an upsampling to nearest neighbours followed by a 3^3 convolution is one transposed convolution of stride 2,
whose 4^3 kernel is the 3^3 kernel convolved with 2^3 ones; and the convolutions of one channel are matrix products
(`single_channel`). The second dimension of all 5D tensors is the channel, which comes last in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.learning.single_channel import convolve_from_one, convolve_to_one
from services.learning.training import Batch

NAME = "autoencoder3d"
VERSION = 1
"""Raised when the same weights would compute something else."""

USE = "learning.Cluster sorts subtomograms by its codes; learning.Predict gives the codes themselves."
LIMITS = (
    "It has seen no labels: codes tell what makes boxes differ most, which may be size, contrast or pose rather than "
    "structure."
)

CODE_SIZE = 32
CHANNELS = 32
POOLING = 4
"""Two poolings by 2: box sides are multiples of this."""

CONFIG_FIELDS: Mapping[str, tuple[type, ...]] = {
    "box_size": (int,),
    "binning": (int,),
    "pose_normalisation": (bool,),
    "subtomogram_box_size": (int,),
    "subtomogram_voxel_size_angstrom": (int, float),
}
"""What a model's config must say besides its architecture, to be used on further subtomograms."""


class Autoencoder3D(nn.Module):
    """The network for boxes of one side, `box_size` voxels.

    Weights start as in Keras, with which the authors trained: Glorot's uniform distribution, and zeros for the biases.
    Raises InvalidArgument for a side that is not a positive multiple of 4.
    """

    spread: Tensor

    def __init__(self, box_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_box_size(box_size)
        self.box_size = box_size
        self.coarse_size = box_size // POOLING
        features = CHANNELS * self.coarse_size**3
        self.convolution_1 = nn.Conv3d(1, CHANNELS, 3, padding=1)
        self.convolution_2 = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
        self.to_code = nn.Linear(features, CODE_SIZE)
        self.from_code = nn.Linear(CODE_SIZE, features)
        self.convolution_3 = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
        self.convolution_4 = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
        self.convolution_5 = nn.Conv3d(CHANNELS, 1, 3, padding=1)
        initialise(self, generator)
        self.register_buffer("spread", kernel_spread(), persistent=False)

    def encode(self, boxes: Tensor) -> Tensor:
        """Codes (batch, 32), none negative, of boxes (batch, 1, n, n, n)."""
        features = memory_order(boxes)
        features = functional.relu(max_pool(convolve_from_one(features, self.convolution_1)), inplace=True)
        features = functional.relu(max_pool(self.convolution_2(features)), inplace=True)
        return functional.relu(self.to_code(features.contiguous().flatten(1)))

    def decode(self, codes: Tensor) -> Tensor:
        """Boxes (batch, 1, n, n, n) of codes (batch, 32)."""
        side = self.coarse_size
        features = functional.relu(self.from_code(codes)).view(-1, CHANNELS, side, side, side)
        features = memory_order(features)
        features = functional.relu(upsample_and_convolve(features, self.convolution_3, self.spread), inplace=True)
        features = functional.relu(upsample_and_convolve(features, self.convolution_4, self.spread), inplace=True)
        return convolve_to_one(features, self.convolution_5)

    def forward(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstructions of boxes (batch, 1, n, n, n), and their codes."""
        codes = self.encode(boxes)
        return self.decode(codes), codes


class AutoencoderLoss:
    """What Autoencoder3D is trained on: mean squared error plus an L1 activity penalty on the codes.

    loss = mean over batch and voxels of (x - x')^2 + l1_penalty * mean over the batch of sum_j |c_j|
    """

    NAME = "reconstruction-and-l1"

    def __init__(self, l1_penalty: float) -> None:
        self.l1_penalty = l1_penalty

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Means over the batch: `loss`, its two terms, and `active`, the share of codes above zero."""
        boxes = batch["boxes"]
        reconstructions, codes = model(boxes)
        reconstruction = functional.mse_loss(reconstructions, boxes)
        penalty = self.l1_penalty * codes.abs().sum(dim=1).mean()
        active = (codes.detach() > 0).to(torch.float32).mean()
        return {
            "loss": reconstruction + penalty,
            "reconstruction": reconstruction,
            "penalty": penalty,
            "active": active,
        }

    def collapsed(self, training: Mapping[str, float], validation: Mapping[str, float]) -> bool:
        """True where every code was zero in a whole epoch: the code's ReLU is dead, no gradient reaches the encoder any
        more.
        """
        return training["active"] == 0.0 and validation["active"] == 0.0


def config(box_size: int) -> dict[str, Any]:
    """What names the architecture in a model's config."""
    return {"architecture": NAME, "architecture_version": VERSION, "box_size": box_size, "code_size": CODE_SIZE}


def check_config(settings: Mapping[str, Any]) -> None:
    """FailedPrecondition where a model's config describes another architecture, or is not whole."""
    if settings.get("architecture") != NAME:
        raise FailedPrecondition(f"the model's architecture is {settings.get('architecture')!r}, {NAME!r} is needed")
    if settings.get("architecture_version") != VERSION or settings.get("code_size") != CODE_SIZE:
        raise FailedPrecondition(
            f"the model is {NAME} version {settings.get('architecture_version')!r} with "
            f"{settings.get('code_size')!r} codes; version {VERSION} with {CODE_SIZE} is needed: train it again"
        )
    for name, kind in CONFIG_FIELDS.items():
        value = settings.get(name)
        positive = isinstance(value, bool) or (isinstance(value, int | float) and value > 0)
        if type(value) not in kind or not positive:
            raise FailedPrecondition(
                f"the model's config says {name} is {value!r}: it is damaged, train the model again"
            )
    if settings["box_size"] * settings["binning"] != settings["subtomogram_box_size"] or settings["box_size"] % POOLING:
        raise FailedPrecondition("the model's box_size, binning and subtomogram_box_size contradict each other")


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> Autoencoder3D:
    """The network of a model's config; FailedPrecondition as `check_config`."""
    check_config(settings)
    return Autoencoder3D(settings["box_size"], generator)


def check_box_size(box_size: int) -> None:
    """InvalidArgument unless the two poolings divide the side."""
    if box_size < POOLING or box_size % POOLING:
        raise InvalidArgument(
            f"the network needs boxes whose side is a multiple of {POOLING} voxels, after binning: it is {box_size}"
        )


def activation_bytes(box_size: int) -> int:
    """Memory of the largest layer's output for one box: 32 channels of float32 at the full size."""
    return 4 * CHANNELS * box_size**3


def weight_bytes(box_size: int) -> int:
    """Size of the network's parameters as float32."""
    coarse = CHANNELS * (box_size // POOLING) ** 3
    dense = 2 * coarse * CODE_SIZE + coarse + CODE_SIZE
    convolutions = 27 * CHANNELS * (2 + 3 * CHANNELS) + 4 * CHANNELS + 1
    return 4 * (dense + convolutions)


def initialise(network: nn.Module, generator: torch.Generator | None) -> None:
    """First weights of a network of convolutions and dense layers: Glorot's uniform distribution, and zeros for the
    biases.
    """
    for module in network.children():
        assert isinstance(module, nn.Conv3d | nn.Linear)
        assert module.bias is not None
        nn.init.xavier_uniform_(module.weight, generator=generator)
        nn.init.zeros_(module.bias)
        module.weight.data = memory_order(module.weight.data)


def memory_order(tensor: Tensor) -> Tensor:
    """5D tensors with channels last in memory, which makes convolutions on a CPU twice as fast; others as they are."""
    return tensor.contiguous(memory_format=torch.channels_last_3d) if tensor.dim() == 5 else tensor


def max_pool(features: Tensor) -> Tensor:
    """Max-pooling by 2^3. CUDA has no deterministic gradient of its own max-pooling in 3D; the maximum over a view
    has.
    """
    if features.device.type == "cpu":
        return functional.max_pool3d(features, 2)
    return max_pool_by_view(features)


def max_pool_by_view(features: Tensor) -> Tensor:
    """Max-pooling by 2^3 in operations that are deterministic on any device."""
    batch, channels, z, y, x = features.shape
    return features.view(batch, channels, z // 2, 2, y // 2, 2, x // 2, 2).amax(dim=(3, 5, 7))


def upsample_and_convolve(features: Tensor, convolution: nn.Conv3d, spread: Tensor) -> Tensor:
    """`convolution(upsample(features))`, upsampling by 2^3 to nearest neighbours, as one transposed convolution.

    `spread` is what `kernel_spread` gives.
    """
    outputs, inputs = convolution.weight.shape[:2]
    kernel = (convolution.weight.transpose(0, 1).reshape(-1, 27) @ spread).view(inputs, outputs, 4, 4, 4)
    return functional.conv_transpose3d(features, kernel, convolution.bias, stride=2, padding=1)


def kernel_spread() -> Tensor:
    """The matrix (27, 64) that turns a 3^3 kernel into that of the transposed convolution: convolved with 2^3 ones, and
    reversed.

    Reversed, as a convolution layer correlates and its transpose convolves.
    """
    line = torch.zeros(3, 4)
    for tap in range(3):
        line[tap, 2 - tap : 4 - tap] = 1.0
    return torch.kron(torch.kron(line, line), line)
