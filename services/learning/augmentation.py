"""Changes of training batches that leave their meaning as it is: what a network should not depend on.

A box's wedge is widened, the box is turned, its contrast is changed and noise is added, in this order: the wedge first,
while it lies where the tilt range says, and the noise last, which interpolation would blur.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.wedge import wedge_mask
from services.learning.training import Batch

ROTATIONS = ("none", "half", "beam", "cube", "any")

HALF_TURNS = ((), (1, 2), (1, 3), (2, 3))
"""The axes of boxes `[i, z, y, x]` that no turn and those by 180 degrees about x, y and z reverse."""

Turn = tuple[tuple[int, ...], tuple[int, ...]]
"""An order of axes, and the axes that are then reversed."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to the boxes of a batch, each drawing its own numbers.

    rotations: about the box's centre, voxel n // 2.
        "none"
        "half": by 180 degrees about x, y or z, or not at all, exact; about the middle of an even box, (n - 1) / 2.
        "beam": about z by any angle.
        "cube": one of the 24 rotations of a cube, exact: no value is changed. 2D boxes are also mirrored (8 ways).
        "any": uniform among all rotations.
      Whatever a box shows is turned as a whole, and its missing wedge with it: about the beam too the wedge moves, as
      the tilt axis does. It stays where it is by none but the turns by 180 degrees, of a tilt range that reaches as far
      to either side. "beam" and "any" interpolate once, trilinearly; what comes from beyond the box gets its mean.
      Label volumes are turned alike, to nearest neighbours; what comes from beyond is 0.
    contrast_jitter: s; boxes are multiplied by 1 + N(0, s), and N(0, s) is added.
    noise_jitter: boxes get white noise whose standard deviation is uniform between 0 and this; boxes have mean 0 and
      standard deviation 1.
    wedge_jitter_degrees: the tilt range of each box is narrowed at each end by an angle uniform between 0 and this.

    A box that was filtered, by a wedge or by interpolation, is given back the mean and standard deviation it had: that
    is how networks meet boxes of less information, too. Raises InvalidArgument for a wedge that could close the range.
    """

    rotations: str = "none"
    contrast_jitter: float = 0.0
    noise_jitter: float = 0.0
    wedge_jitter_degrees: float = 0.0
    tilt_min_degrees: float = -90.0
    tilt_max_degrees: float = 90.0

    def __post_init__(self) -> None:
        if self.rotations not in ROTATIONS:
            raise InvalidArgument(f"rotations is {self.rotations!r}, it must be one of {', '.join(ROTATIONS)}")
        if 2 * self.wedge_jitter_degrees >= self.tilt_max_degrees - self.tilt_min_degrees:
            raise InvalidArgument(
                f"wedge_jitter is {self.wedge_jitter_degrees:g} degrees at either end: of tilts from "
                f"{self.tilt_min_degrees:g} to {self.tilt_max_degrees:g} degrees nothing may be left"
            )

    @property
    def changes_nothing(self) -> bool:
        """Whether batches stay as they are."""
        return self.rotations == "none" and not (self.contrast_jitter or self.noise_jitter or self.wedge_jitter_degrees)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with its "boxes" (b, 1, ...) changed, and every other tensor (b, ...) of their size in space turned
        alike. All numbers follow from the generator, which is on the CPU; the work is done where the batch is.
        """
        changed = dict(batch)
        boxes = batch["boxes"]
        if boxes.dim() != 5 and (self.wedge_jitter_degrees or self.rotations in ("half", "beam", "any")):
            raise InvalidArgument("only boxes in 3D have a wedge, or can be turned by any angle")
        labels = [name for name, value in batch.items() if value.shape == boxes.shape[:1] + boxes.shape[2:]]
        if self.wedge_jitter_degrees:
            boxes = self._widen_wedges(boxes, generator)
        if self.rotations == "half":
            drawn = torch.randint(len(HALF_TURNS), (len(boxes),), generator=generator)
            boxes = half_turned(boxes[:, 0], drawn)[:, None]
            for name in labels:
                changed[name] = half_turned(batch[name], drawn)
        elif self.rotations == "cube":
            turns = cube_turns(boxes.dim() - 2)
            chosen = [turns[i] for i in torch.randint(len(turns), (len(boxes),), generator=generator).tolist()]
            boxes = torch.stack([turn(box[0], how) for box, how in zip(boxes, chosen, strict=True)])[:, None]
            for name in labels:
                changed[name] = torch.stack([turn(each, how) for each, how in zip(batch[name], chosen, strict=True)])
        elif self.rotations != "none":
            matrices = random_rotations(len(boxes), self.rotations, generator).to(boxes.device)
            boxes = rotate(boxes, matrices)
            for name in labels:
                changed[name] = rotate_labels(batch[name], matrices)
        if self.contrast_jitter:
            drawn = self.contrast_jitter * torch.randn(2, len(boxes), generator=generator)
            factors, shifts = drawn.to(boxes.device).view(2, -1, *(1,) * (boxes.dim() - 1))
            boxes = boxes * (1 + factors) + shifts
        if self.noise_jitter:
            deviations = self.noise_jitter * torch.rand(len(boxes), generator=generator)
            seed = int(torch.randint(2**63 - 1, (), generator=generator))
            there = torch.Generator(boxes.device).manual_seed(seed)
            noise = torch.randn(boxes.shape, generator=there, device=boxes.device)
            boxes = boxes + noise * deviations.to(boxes.device).view(-1, *(1,) * (boxes.dim() - 1))
        return changed | {"boxes": boxes}

    def _widen_wedges(self, boxes: Tensor, generator: torch.Generator) -> Tensor:
        """Boxes (b, 1, n, n, n) without what a narrower tilt range would not have sampled."""
        side = boxes.shape[-1]
        angles = self.wedge_jitter_degrees * torch.rand(len(boxes), 2, generator=generator, dtype=torch.float64)
        # The mask is the same for all y.
        masks = np.stack(
            [
                wedge_mask((side, 1, side), self.tilt_min_degrees + low, self.tilt_max_degrees - high, half=True)
                for low, high in angles.tolist()
            ]
        )
        spectra = torch.fft.rfftn(boxes, dim=(2, 3, 4)) * torch.from_numpy(masks)[:, None].to(boxes.device)
        return _restored(torch.fft.irfftn(spectra, s=boxes.shape[2:], dim=(2, 3, 4)), boxes)


def half_turned(boxes: Tensor, turns: Tensor) -> Tensor:
    """Boxes (b, z, y, x), each turned by its own of `HALF_TURNS`."""
    turned = boxes.clone()
    for number, axes in enumerate(HALF_TURNS):
        rows = (turns == number).to(boxes.device)
        turned[rows] = torch.flip(boxes[rows], axes)
    return turned


def cube_turns(dimensions: int) -> list[Turn]:
    """The 24 rotations of a cube or, in 2 dimensions, the 8 rotations and reflections of a square."""
    axes = range(dimensions)
    turns: list[Turn] = []
    for order in itertools.permutations(axes):
        parity = sum(order[i] > order[j] for i, j in itertools.combinations(axes, 2))
        for count in range(dimensions + 1):
            if dimensions == 2 or (parity + count) % 2 == 0:
                turns.extend((order, reversed_axes) for reversed_axes in itertools.combinations(axes, count))
    return turns


def turn(box: Tensor, how: Turn) -> Tensor:
    """A box turned about voxel n // 2. Of an even box, voxel 0 of a reversed axis has no mate and stays where it is."""
    order, reversed_axes = how
    turned = torch.flip(box.permute(order), reversed_axes)
    if box.shape[0] % 2 == 0 and reversed_axes:
        turned = torch.roll(turned, (1,) * len(reversed_axes), reversed_axes)
    return turned


def random_rotations(count: int, kind: str, generator: torch.Generator) -> Tensor:
    """Matrices (count, 3, 3) that act on (x, y, z): "beam" about z, "any" uniform (by uniform unit quaternions)."""
    if kind == "beam":
        half = math.pi * torch.rand(count, generator=generator)
        zero = torch.zeros(count)
        quaternions = torch.stack([zero, zero, half.sin(), half.cos()], dim=1)
    else:
        quaternions = functional.normalize(torch.randn(count, 4, generator=generator), dim=1)
    x, y, z, w = quaternions.unbind(1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def rotate(boxes: Tensor, rotations: Tensor) -> Tensor:
    """Boxes (b, 1, n, n, n) turned by matrices (b, 3, 3): trilinear, the mean beyond the box, mean and standard
    deviation as before.
    """
    means = boxes.mean(dim=(1, 2, 3, 4), keepdim=True)
    turned = functional.grid_sample(boxes - means, _places(boxes.shape[-1], rotations), "bilinear", align_corners=True)
    return _restored(turned, boxes)


def rotate_labels(labels: Tensor, rotations: Tensor) -> Tensor:
    """Labels (b, n, n, n) turned by matrices (b, 3, 3): those of the nearest voxels, 0 beyond the box."""
    as_numbers = labels[:, None].to(torch.float32)
    turned = functional.grid_sample(as_numbers, _places(labels.shape[-1], rotations), "nearest", align_corners=True)
    return turned[:, 0].to(labels.dtype)


def _places(side: int, rotations: Tensor) -> Tensor:
    """Where in the box each voxel of the turned box comes from, R^T r: (b, n, n, n, 3) as `grid_sample` counts, from -1
    to 1 between the centres of the outermost voxels.
    """
    centre = side // 2
    line = torch.arange(side, dtype=torch.float32, device=rotations.device) - centre
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    places = torch.stack([x, y, z], dim=-1).view(1, -1, 3) @ rotations
    return ((places + centre) * (2 / (side - 1)) - 1).view(-1, side, side, side, 3)


def _restored(changed: Tensor, boxes: Tensor) -> Tensor:
    """Changed boxes with the means and standard deviations of the boxes that they were; all dimensions but the first
    are a box.
    """
    dimensions = tuple(range(1, boxes.dim()))
    deviations, means = torch.std_mean(boxes, dim=dimensions, correction=0, keepdim=True)
    present, mean = torch.std_mean(changed, dim=dimensions, correction=0, keepdim=True)
    return (changed - mean) * (deviations / present.clamp_min(torch.finfo(present.dtype).tiny)) + means
