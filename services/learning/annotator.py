"""The section annotator: a small 2D network that finds one feature in the sections of a tomogram.

Chen et al. 2017 (Nature Methods 14:983-985) train one small network for each feature on 2D patches of sections that
somebody painted, a few convolutions with max-pooling that end in a map of one channel, and apply it to every section.
Theirs has wide kernels and a map of a quarter of the section's pixels. This one, of version 1, is fully convolutional
with 3^2 kernels and gives a map of the section's own size:

    2 x (conv 8, ReLU), pool 2, 2 x (conv 16, ReLU), pool 2, 2 x (conv 32, ReLU), then up again by 2 to nearest
    neighbours, joined with what was there before the pooling: conv 16, ReLU, up by 2, joined, conv 8, ReLU, conv 1^2.
    Before each ReLU stands a batch normalisation: with it, few patches train in few steps.

It sees 17 to 20 voxels to either side, as much as a ribosome or two bilayers measure at the 10 to 14 Å of a binned
tomogram, in 26,000 weights (wide kernels would need a million): a few patches do not train more, and a section of
1024^2 takes a second on a core. The joints keep edges sharp: a bilayer is two or three voxels wide.

Convolutions are padded with zeros. So that neither training nor use ever sees them, patches and tiles are cut with
`MARGIN` voxels of the section around them, of which the network gives nothing back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from cryofleet.errors import FailedPrecondition
from services.learning.training import Batch

NAME = "section-annotator"
VERSION = 1
"""Raised when the same weights would compute something else."""

CHANNELS = (8, 16, 32)
POOLING = 4
"""Two poolings by 2: sides are multiples of this."""
MARGIN = 20
"""How far the network sees, in voxels, rounded up to a multiple of `POOLING`."""

USE = "Annotate applies it to the sections of tomograms of the same voxel size."
LIMITS = (
    "It knows what was painted: another specimen, defocus or way of reconstruction needs patches of its own. It sees "
    "single sections, so what only differs along z is the same to it."
)

NOT_LOOKED_AT, FEATURE, NOT_FEATURE = 0, 1, 2
"""What painted masks hold."""

CONTRAST_JITTER = 0.2
NOISE_JITTER = 0.3
"""Of the augmentation, in standard deviations of the tomogram."""


class SectionAnnotator(nn.Module):
    """The network. Weights start from the uniform distribution of He et al. 2015."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        fine, middle, coarse = CHANNELS
        self.down_1 = nn.Sequential(*_layer(1, fine), *_layer(fine, fine))
        self.down_2 = nn.Sequential(*_layer(fine, middle), *_layer(middle, middle))
        self.bottom = nn.Sequential(*_layer(middle, coarse), *_layer(coarse, coarse))
        self.up_2 = nn.Sequential(*_layer(coarse + middle, middle))
        self.up_1 = nn.Sequential(*_layer(middle + fine, fine))
        self.to_map = nn.Conv2d(fine, 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, sections: Tensor) -> Tensor:
        """The logit of the feature at each voxel (batch, y - 2 * MARGIN, x - 2 * MARGIN), of sections (batch, 1, y, x)
        whose sides are multiples of 4: positive where it is more probable than not.
        """
        fine = self.down_1(sections.contiguous(memory_format=torch.channels_last))
        middle = self.down_2(_max_pool(fine))
        coarse = self.bottom(_max_pool(middle))
        joined = self.up_2(torch.cat([_upsample(coarse), middle], dim=1))
        joined = self.up_1(torch.cat([_upsample(joined), fine], dim=1))
        result: Tensor = self.to_map(joined)[:, 0, MARGIN:-MARGIN, MARGIN:-MARGIN]
        return result


def _layer(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


class AnnotatorLoss:
    """Binary cross-entropy over the voxels that somebody looked at.

    A batch holds "boxes", patches (b, 1, p + 2 * MARGIN, p + 2 * MARGIN), and "painted" (b, p, p): 1 the feature, 2
    not the feature, 0 not looked at. With `augment`, patches for training are turned and mirrored, each in one of the 8
    ways of a square, and vary in contrast and noise.
    """

    NAME = "section-annotator"

    def __init__(self, augment: bool) -> None:
        self.augment = augment

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """`loss` over all painted voxels of the batch, and `right`, the share of them that are told correctly."""
        patches, painted = batch["boxes"], batch["painted"]
        if self.augment and model.training:
            patches, painted = augmented(patches, painted, generator)
        logits = model(patches).to(torch.float32)
        looked_at = (painted != NOT_LOOKED_AT).to(torch.float32)
        feature = (painted == FEATURE).to(torch.float32)
        count = looked_at.sum().clamp(min=1.0)
        losses = functional.binary_cross_entropy_with_logits(logits, feature, reduction="none")
        right = ((logits > 0) == (feature > 0)).to(torch.float32)
        return {"loss": (losses * looked_at).sum() / count, "right": (right * looked_at).sum() / count}


def augmented(patches: Tensor, painted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches (b, 1, n, n) and what is painted on them (b, p, p), turned alike; contrast and noise differ by patch."""
    count, device = len(patches), patches.device
    turns = torch.randint(8, (count,), generator=generator).tolist()
    patches = torch.stack([_turned(patch, turn) for patch, turn in zip(patches, turns, strict=True)])
    painted = torch.stack([_turned(mask, turn) for mask, turn in zip(painted, turns, strict=True)])

    def random_normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    gain = 1 + CONTRAST_JITTER * random_normal(count, 1, 1, 1)
    offset = CONTRAST_JITTER * random_normal(count, 1, 1, 1)
    level = NOISE_JITTER * torch.rand(count, 1, 1, 1, generator=generator).to(device)
    return patches * gain + offset + level * random_normal(*patches.shape), painted


def _turned(image: Tensor, turn: int) -> Tensor:
    """One of the 8 turns and mirrors of the last two dimensions."""
    return torch.rot90(image if turn < 4 else image.flip(-1), turn % 4, dims=(-2, -1))


def _max_pool(features: Tensor) -> Tensor:
    """Max-pooling by 2^2, in an operation whose gradient is deterministic on any device."""
    batch, channels, y, x = features.shape
    return features.reshape(batch, channels, y // 2, 2, x // 2, 2).amax(dim=(3, 5))


def _upsample(features: Tensor) -> Tensor:
    """Twice the size, to nearest neighbours, in operations whose gradient is deterministic on any device."""
    batch, channels, y, x = features.shape
    wide = features[:, :, :, None, :, None].expand(batch, channels, y, 2, x, 2)
    return wide.reshape(batch, channels, 2 * y, 2 * x)


def config() -> dict[str, Any]:
    """What names the architecture in a model's config."""
    return {"architecture": NAME, "architecture_version": VERSION}


def check_config(settings: Mapping[str, Any], name: str = "the model") -> None:
    """FailedPrecondition where a model's config, called `name`, describes another architecture, or is not whole."""
    if settings.get("architecture") != NAME:
        raise FailedPrecondition(
            f"{name} is of the architecture {settings.get('architecture')!r}, {NAME!r} is needed, as TrainAnnotator "
            "gives it"
        )
    if settings.get("architecture_version") != VERSION:
        raise FailedPrecondition(
            f"{name} is {NAME} version {settings.get('architecture_version')!r}; version {VERSION} is needed: "
            "train it again"
        )
    feature, voxel_size = settings.get("feature"), settings.get("voxel_size_angstrom")
    if not isinstance(feature, str) or not feature:
        raise FailedPrecondition(f"{name}: its config says feature is {feature!r}: it is damaged, train it again")
    if not isinstance(voxel_size, int | float) or isinstance(voxel_size, bool) or not 0 < voxel_size < float("inf"):
        raise FailedPrecondition(
            f"{name}: its config says voxel_size_angstrom is {voxel_size!r}: it is damaged, train it again"
        )


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> SectionAnnotator:
    """The network of a model's config; FailedPrecondition for another architecture or version."""
    if settings.get("architecture") != NAME or settings.get("architecture_version") != VERSION:
        check_config(settings)
    return SectionAnnotator(generator)


def activation_bytes(voxels: int) -> int:
    """Memory of all layers' outputs for so many voxels of sections, float32, without what a gradient needs."""
    fine, middle, coarse = CHANNELS
    channels = 5 * fine + middle + (4 * middle + coarse) / 4 + 3 * coarse / 16
    return int(4 * channels * voxels)
