"""The conformation network: an autoencoder of aligned subtomograms that maps each to a point in a space of few
dimensions, comparing only what the missing wedge has left of it.

Chen et al. 2017 (Microsc. Microanal. 23, Suppl. 1): a deep autoencoder maps subvolumes to a conformation space and
compensates for the missing wedge. This one, of version 1, is written for

    V(p) = A + B M D(p)

A is the average of the aligned subtomograms, each component over those that observed it; M the mask of where
conformations differ; B the low-pass; D the decoder of a point p: dense 64, dense 16 x (n/4)^3, upsample 2^3, conv 8,
upsample 2^3, conv 8, conv 1. So a network that has learnt nothing gives the average, and nothing changes outside the
mask. A subtomogram X is turned into the average's frame, and its own wedge W with it; what it could show of a volume is
S W V, S being the sphere that is in a box however it is turned. The loss is

    mean over the sphere of (S (B X - W V(p)))^2 + s^2 / N |p|^2

As X has nothing outside its wedge, only observed components are compared. (The wedge comes before the sphere: a wedge
smears a particle beyond the sphere, and what is cut off there depends on the orientation.) The last term is what a
point costs, the negative logarithm of a Gaussian prior: s^2 is the boxes' variance about the average, N the sphere's
voxels. In training points are shaken by `POINT_NOISE`, so distances in the space are in units of what they tell, and a
dimension that tells nothing shrinks to nothing.

The encoder sees the difference of the box to the average, within the mask: conv 8 of stride 2, conv 16 of stride 2,
dense 64, dense to p. All but the last layer of either end in leaky ReLU.

What is missing from a box depends on how its particle lay, and must not look like a conformation. A difference whose
missing components are 0, that is, filled in from the average, is too weak a sign by as much as is missing, so points
would tell orientations. Therefore a box is encoded again and again, its missing components filled in from the volume
that its last point decodes to, as an expectation maximisation would: each time the bias shrinks by the missing share of
what differs, a third or so of it is left. Nor is there anything to gain from an orientation: the loss compares observed
components alone, and of these the same volume is expected whichever they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor, nn

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.fourier import radial_frequency, soft_step
from cryofleet.numerics.masks import soft_sphere, usual_edge_voxels
from cryofleet.numerics.wedge import is_sampled
from cryofleet.progress import Progress
from services.learning.autoencoder import initialise, kernel_spread, memory_order, upsample_and_convolve
from services.learning.single_channel import convolve_to_one
from services.learning.training import Batch

NAME = "conformation"
VERSION = 1
"""Raised when the same weights would compute something else."""

USE = "DecodeConformations decodes volumes along paths through its space."
LIMITS = (
    "The points are of the subtomograms it was trained on, aligned as they were: what the alignment did wrong is a "
    "conformation to it. The axes of the space have no order and no unit."
)

POOLING = 4
CHANNELS = (8, 16)
HIDDEN = 64
FILLS = 2
"""How often the missing components are filled in from the decoded volume, in training."""
FINAL_FILLS = 6
"""The same of the points that come out: nothing is gained by more."""
POINT_NOISE = 0.3
"""Standard deviation of what is added to each number of a point in training."""
SLOPE = 0.1
"""Of the leaky ReLU."""
BATCH_BYTES = 32 * 2**20
"""Boxes are encoded and decoded so many at once that no layer's output is larger, and one at least."""


class ConformationAutoencoder(nn.Module):
    """The network for boxes of one side, `box_size` voxels, a positive multiple of 4.

    `cutoff` is the low-pass in cycles per voxel, up to which details are kept whole; at most 0.5, beyond which rotated
    boxes have nothing. `tilts` are the smallest and largest tilt in degrees of the boxes' own wedge. The average and
    the mask are kept with the weights: `average` and `mask`, both `[z, y, x]`.
    """

    average: Tensor
    mask: Tensor
    band: Tensor
    frequencies: Tensor
    sphere: Tensor
    spread: Tensor

    def __init__(
        self,
        box_size: int,
        dimensions: int,
        cutoff: float,
        tilts: tuple[float, float],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_box_size(box_size)
        self.box_size, self.dimensions, self.tilts = box_size, dimensions, tilts
        fine, coarse = CHANNELS
        self.coarse_size = box_size // POOLING
        features = coarse * self.coarse_size**3
        self.encode_1 = nn.Conv3d(1, fine, 3, stride=2, padding=1)
        self.encode_2 = nn.Conv3d(fine, coarse, 3, stride=2, padding=1)
        self.encode_3 = nn.Linear(features, HIDDEN)
        self.to_point = nn.Linear(HIDDEN, dimensions)
        self.from_point = nn.Linear(dimensions, HIDDEN)
        self.decode_1 = nn.Linear(HIDDEN, features)
        self.decode_2 = nn.Conv3d(coarse, fine, 3, padding=1)
        self.decode_3 = nn.Conv3d(fine, fine, 3, padding=1)
        self.decode_4 = nn.Conv3d(fine, 1, 3, padding=1)
        initialise(self, generator)
        side = (box_size,) * 3
        self.register_buffer("average", torch.zeros(side))
        self.register_buffer("mask", torch.ones(side))
        self.register_buffer("band", torch.from_numpy(band(box_size, cutoff)), persistent=False)
        self.register_buffer("frequencies", torch.from_numpy(_frequencies(box_size)), persistent=False)
        self.register_buffer("sphere", torch.from_numpy(box_sphere(box_size)), persistent=False)
        self.register_buffer("spread", kernel_spread(), persistent=False)

    def observed(self, rotations: Tensor) -> Tensor:
        """Which components (b, n, n, n // 2 + 1) of boxes in the average's frame were imaged, as 0 and 1 float32.

        `rotations` (b, 3, 3) take the average onto the particles, so a component k of the average is component R k of
        the tomogram, where the wedge is.
        """
        # No matrix product: mixed precision would round frequencies to two digits.
        turns = rotations[..., None, None, None]
        x, z = (sum(turns[:, row, axis] * self.frequencies[axis] for axis in range(3)) for row in (0, 2))
        sampled: Tensor = is_sampled(x, z, *self.tilts)
        return sampled.to(torch.float32)

    def encode(self, differences: Tensor, observed: Tensor, fills: int = FILLS) -> Tensor:
        """Points (b, dimensions) of differences to the average (b, 1, n, n, n) of which `observed` was imaged."""
        points = self._encode_once(differences)
        for _ in range(fills):
            with torch.no_grad():
                missing = self.sphere * self.filtered(self.change(points), 1 - observed)
            points = self._encode_once(differences + missing[:, None])
        return points

    def filtered(self, volumes: Tensor, transfer: Tensor) -> Tensor:
        """Volumes (b, n, n, n) times a transfer function on their half grid."""
        spectra = torch.fft.rfftn(volumes, dim=(-3, -2, -1)) * transfer
        result: Tensor = torch.fft.irfftn(spectra, s=(self.box_size,) * 3, dim=(-3, -2, -1))
        return result

    def _encode_once(self, differences: Tensor) -> Tensor:
        features = functional.leaky_relu(self.encode_1(memory_order(differences * self.mask)), SLOPE)
        features = functional.leaky_relu(self.encode_2(features), SLOPE)
        hidden = functional.leaky_relu(self.encode_3(features.contiguous().flatten(1)), SLOPE)
        points: Tensor = self.to_point(hidden).to(torch.float32)
        return points

    def change(self, points: Tensor) -> Tensor:
        """B M D(p): what points (b, dimensions) add to the average, (b, n, n, n) float32."""
        hidden = functional.leaky_relu(self.from_point(points), SLOPE)
        side = self.coarse_size
        features = functional.leaky_relu(self.decode_1(hidden), SLOPE).view(-1, CHANNELS[1], side, side, side)
        features = memory_order(features)
        features = functional.leaky_relu(upsample_and_convolve(features, self.decode_2, self.spread), SLOPE)
        features = functional.leaky_relu(upsample_and_convolve(features, self.decode_3, self.spread), SLOPE)
        # Fourier transforms have no bfloat16.
        masked = convolve_to_one(features, self.decode_4)[:, 0].to(torch.float32) * self.mask
        return self.filtered(masked, self.band)

    def decode(self, points: Tensor) -> Tensor:
        """V(p): volumes (b, n, n, n) of points (b, dimensions)."""
        return self.average + self.change(points)

    def forward(self, differences: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """The volumes of differences to the average, and their points."""
        points = self.encode(differences, observed)
        return self.decode(points), points


class ConformationLoss:
    """Mean squared error of what was imaged, and what the points cost, as above.

    A batch holds "boxes" (b, 1, n, n, n), the differences to the average, and "rotations" (b, 3, 3).
    """

    NAME = "conformation"

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """`loss`; its part `error`, and `without`, which that would be were every box the average: in squares of the
        boxes' unit.
        """
        assert isinstance(model, ConformationAutoencoder)
        differences = batch["boxes"]
        observed = model.observed(batch["rotations"])
        points = model.encode(differences, observed)
        shaken = points
        if model.training:
            shaken = points + POINT_NOISE * torch.randn(points.shape, generator=generator).to(points.device)
        imaged = model.sphere * model.filtered(model.change(shaken), observed)
        voxels = model.sphere.square().sum()
        error = (differences[:, 0] - imaged).square().sum(dim=(1, 2, 3)).mean() / voxels
        without = differences.square().sum(dim=(1, 2, 3, 4)).mean() / voxels
        cost = without.detach() / voxels * points.square().sum(dim=1).mean()
        return {"loss": error + cost, "error": error, "without": without}


def box_sphere(box_size: int) -> NDArray[np.float32]:
    """The sphere of a box that is in it whichever way it is turned, with a soft edge."""
    edge = usual_edge_voxels(box_size)
    return soft_sphere(box_size, box_size / 2 - 1 - edge, edge)


def band(box_size: int, cutoff: float) -> NDArray[np.float32]:
    """The low-pass on the half grid: 1 up to `cutoff` cycles per voxel, then falling to 0 over 0.05; 0 from 0.5 on."""
    frequency = radial_frequency((box_size,) * 3)
    kept: NDArray[np.float32] = soft_step(frequency, cutoff) * (frequency < 0.5 - 1e-6)
    return kept.astype(np.float32)


def _frequencies(box_size: int) -> NDArray[np.float32]:
    """(kx, ky, kz) in cycles per voxel on the half grid, as (3, n, n, n // 2 + 1)."""
    full, half = np.fft.fftfreq(box_size), np.fft.rfftfreq(box_size)
    z, y, x = np.meshgrid(full, full, half, indexing="ij")
    return np.stack([x, y, z]).astype(np.float32)


def points_of(
    model: ConformationAutoencoder,
    differences: NDArray[np.float32],
    rotations: NDArray[np.float32],
    device: torch.device,
    progress: Progress,
) -> NDArray[np.float32]:
    """Points (n, dimensions) of differences to the average `[i, z, y, x]`, with rotations (n, 3, 3)."""
    points = np.empty((len(differences), model.dimensions), np.float32)
    step = _batch_size(model.box_size)
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(differences), step):
            boxes = torch.from_numpy(np.array(differences[first : first + step]))[:, None].to(device)
            turns = torch.from_numpy(rotations[first : first + step]).to(device)
            points[first : first + step] = model.encode(boxes, model.observed(turns), FINAL_FILLS).cpu().numpy()
            progress(min(1.0, (first + step) / len(differences)), "mapping subtomograms to points")
    return points


def volumes_of(
    model: ConformationAutoencoder, points: NDArray[np.float32], device: torch.device, progress: Progress
) -> NDArray[np.float32]:
    """Volumes `[i, z, y, x]` of points (n, dimensions), protein positive, in standard deviations of a box."""
    volumes = np.empty((len(points), *(model.box_size,) * 3), np.float32)
    step = _batch_size(model.box_size)
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(points), step):
            batch = torch.from_numpy(np.ascontiguousarray(points[first : first + step], np.float32)).to(device)
            volumes[first : first + step] = model.decode(batch).cpu().numpy()
            progress(min(1.0, (first + step) / len(points)), "decoding the path")
    return volumes


def _batch_size(box_size: int) -> int:
    return max(1, min(64, BATCH_BYTES // activation_bytes(box_size)))


def config(box_size: int, dimensions: int, cutoff: float, tilts: tuple[float, float]) -> dict[str, Any]:
    """What names the network in a model's config."""
    return {
        "architecture": NAME,
        "architecture_version": VERSION,
        "box_size": box_size,
        "dimensions": dimensions,
        "low_pass_cycles_per_voxel": cutoff,
        "tilt_min_degrees": tilts[0],
        "tilt_max_degrees": tilts[1],
    }


def check_config(settings: Mapping[str, Any]) -> None:
    """FailedPrecondition where a model's config describes another architecture, or is not whole."""
    if settings.get("architecture") != NAME:
        raise FailedPrecondition(
            f"the model's architecture is {settings.get('architecture')!r}, {NAME!r} is needed, as TrainConformation "
            "gives it"
        )
    if settings.get("architecture_version") != VERSION:
        raise FailedPrecondition(
            f"the model is {NAME} version {settings.get('architecture_version')!r}; version {VERSION} is needed: "
            "train it again"
        )
    limits: Mapping[str, tuple[type, float, float]] = {
        "box_size": (int, POOLING, 4096),
        "dimensions": (int, 1, 32),
        "low_pass_cycles_per_voxel": (float, 1e-6, 0.5),
        "tilt_min_degrees": (float, -90, 90),
        "tilt_max_degrees": (float, -90, 90),
    }
    for name, (kind, low, high) in limits.items():
        value = settings.get(name)
        number = type(value) is int or (kind is float and type(value) is float)
        if not number or not low <= float(value or 0) <= high:
            raise FailedPrecondition(f"the model's config says {name} is {value!r}: it is damaged, train it again")
    if settings["box_size"] % POOLING or settings["tilt_min_degrees"] >= settings["tilt_max_degrees"]:
        raise FailedPrecondition("the model's box_size or tilt range makes no sense: it is damaged, train it again")


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> ConformationAutoencoder:
    """The network of a model's config; FailedPrecondition as `check_config`."""
    check_config(settings)
    tilts = float(settings["tilt_min_degrees"]), float(settings["tilt_max_degrees"])
    cutoff = float(settings["low_pass_cycles_per_voxel"])
    return ConformationAutoencoder(settings["box_size"], settings["dimensions"], cutoff, tilts, generator)


def check_box_size(box_size: int) -> None:
    """InvalidArgument unless the side is a multiple of 4."""
    if box_size < POOLING or box_size % POOLING:
        raise InvalidArgument(
            f"the network needs boxes whose side is a multiple of {POOLING} voxels, after binning: it is {box_size}"
        )


def cutoff_of(low_pass_angstrom: float, voxel_size_angstrom: float) -> float:
    """The low-pass in cycles per voxel; 0 Å is none. Raises InvalidArgument where it would leave nothing."""
    if low_pass_angstrom <= 0:
        return 0.5
    cutoff = voxel_size_angstrom / low_pass_angstrom
    if cutoff > 0.5:
        raise InvalidArgument(
            f"low_pass_angstrom is {low_pass_angstrom:g}; voxels of {voxel_size_angstrom:g} Å, as binned, hold details "
            f"down to {2 * voxel_size_angstrom:g} Å: give that or more, or 0 for all there is"
        )
    return cutoff


def activation_bytes(box_size: int) -> int:
    """Memory of the largest layer's output for one box, as float32: 8 channels at the full size."""
    return 4 * CHANNELS[0] * box_size**3


def weight_bytes(box_size: int) -> int:
    """Size of the network's parameters and buffers as float32."""
    features = CHANNELS[1] * (box_size // POOLING) ** 3
    return 4 * (2 * HIDDEN * features + features + 20_000 + 5 * box_size**3)
