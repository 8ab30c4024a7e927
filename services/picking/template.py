"""A template as it is looked for: turned, weighted as the data were imaged, and normalised under its mask.

Templates are cubes `[z, y, x]` with protein positive, that turn about voxel n // 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.ndimage
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import fourier_crop
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.masks import radius_grid, soft_sphere
from cryofleet.numerics.rotations import point_group

Array = NDArray[np.float32]

#: A template's own extent: where its density is above this part of its largest.
EXTENT_LEVEL = 0.1
#: Width of the edge of a mask that is made here, voxels.
MASK_EDGE = 1.0
#: Values between two voxels that turning interpolates between, and taps of the interpolation that made them.
_FINER = 2


@dataclass(frozen=True, eq=False)
class Template:
    """What to look for.

    Attributes:
        density: float32 `[n, n, n]`, protein positive.
        mask: float32 `[n, n, n]`, 0 to 1: where the template is compared with the tomogram.
        mask_turns: whether the mask turns with the template; False for one that looks the same from all sides.
        transfer: float32 `[n, n, n // 2 + 1]` on the half grid of the FFT: what imaging and filters leave of each
            Fourier component, in the tomogram's frame. None for all.
    """

    density: Array
    mask: Array
    mask_turns: bool = False
    transfer: Array | None = None

    def __post_init__(self) -> None:
        _check_cube("the template", self.density)
        _check_cube("the mask", self.mask)
        if self.mask.shape != self.density.shape:
            raise InvalidArgument(
                f"the mask has {self.mask.shape} voxels and the template {self.density.shape}; they must be the same"
            )
        if float(self.density.std()) == 0:
            raise InvalidArgument("the template is constant, there is nothing to look for")
        if float(self.mask.min()) < 0 or float(self.mask.max()) > 1 + 1e-3:
            raise InvalidArgument(
                f"the mask's values go from {self.mask.min():g} to {self.mask.max():g}; they must lie in 0 to 1"
            )
        if float(self.mask.sum()) <= 1:
            raise InvalidArgument("the mask is zero everywhere: nothing would be compared")
        if float(self.density[self.mask > 0].std()) == 0:
            raise InvalidArgument("the template is constant inside the mask, there is nothing to look for")

    @property
    def box(self) -> int:
        """The template's side in voxels."""
        return int(self.density.shape[0])

    def mirrored(self) -> Template:
        """Its other hand: density and mask reflected in x about their centre."""
        return Template(_reflected(self.density), _reflected(self.mask), self.mask_turns, self.transfer)

    def with_random_phases(self, seed: int) -> Template:
        """Noise with the template's own power in each Fourier component: what it finds is background."""
        spectrum = scipy.fft.rfftn(self.density)
        phases = scipy.fft.rfftn(np.random.default_rng(seed).standard_normal(self.density.shape).astype(np.float32))
        size = np.abs(phases)
        spectrum = np.abs(spectrum) * np.divide(phases, size, out=np.ones_like(phases), where=size > 0)
        density = scipy.fft.irfftn(spectrum, self.density.shape).astype(np.float32)
        # as compact as the template is
        density = (density - density.mean()) * soft_sphere(self.box, extent(self.density), MASK_EDGE)
        return Template(density, self.mask, self.mask_turns, self.transfer)


def _check_cube(what: str, volume: Array) -> None:
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise InvalidArgument(f"{what} has shape {volume.shape}; it must be a cube")
    if volume.shape[0] < 4:
        raise InvalidArgument(f"{what} has a side of {volume.shape[0]} voxels; it must have at least 4")
    if not np.isfinite(volume).all():
        raise InvalidArgument(f"{what} has voxels that are not finite (NaN or infinity)")


def _reflected(volume: Array) -> Array:
    """Reflected in x about voxel n // 2."""
    flipped = volume[:, :, ::-1]
    return np.ascontiguousarray(np.roll(flipped, 1 - volume.shape[2] % 2, axis=2))


LEAST_SYMMETRY = 0.85
"""A template's correlation with itself under each rotation of the point group that it is said to have."""


def check_symmetry(density: Array, symmetry: str) -> None:
    """Raise InvalidArgument where a density `[z, y, x]` does not look alike under a point group whose main axis lies
    along z: a search by the fewer rotations of that group would miss most of its orientations.
    """
    group = point_group(symmetry)[1:]
    alike = [float(np.corrcoef(transform_volume(density, turn).ravel(), density.ravel())[0, 1]) for turn in group]
    if min(alike, default=1.0) < LEAST_SYMMETRY:
        raise InvalidArgument(
            f"symmetry {symmetry}: the template correlates only {min(alike):.2f} with itself turned by that group; "
            "turn it so that its main axis lies along z (and a twofold of Dn along x), or leave symmetry out"
        )


def binned(volume: Array, factor: int) -> Array:
    """A cube reduced by a factor in Fourier space, its centre at voxel n // 2 as before; padded where that needs it."""
    if factor == 1:
        return volume
    side = volume.shape[0]
    half = factor * -(-side // (2 * factor))
    before = half - side // 2
    padded = np.pad(volume, (before, 2 * half - side - before))
    return fourier_crop(padded, factor)


def extent(density: Array) -> float:
    """The radius in voxels of the sphere about the centre that holds all density above `EXTENT_LEVEL` of its largest,
    at most what the box holds.
    """
    side = density.shape[0]
    level = float(np.median(density)) + EXTENT_LEVEL * float(density.max() - np.median(density))
    radius = float(radius_grid(side)[density >= level].max(initial=1.0))
    return min(radius, float((side - 1) // 2))


def sphere(box: int, radius_voxels: float) -> Array:
    """A sphere about the centre with a soft edge."""
    return soft_sphere(box, radius_voxels, MASK_EDGE)


def ellipsoid(box: int, radii_voxels: tuple[float, float, float]) -> Array:
    """An ellipsoid about the centre with the radii (x, y, z), its edge about as soft as the sphere's."""
    axis = np.arange(box, dtype=np.float32) - box // 2
    x, y, z = (axis / radius for radius in radii_voxels)
    reach = np.sqrt(z[:, None, None] ** 2 + y[None, :, None] ** 2 + x[None, None, :] ** 2)
    ramp = np.clip((reach - 1) * min(radii_voxels) / MASK_EDGE, 0, 1)
    return np.asarray(0.5 + 0.5 * np.cos(np.pi * ramp), np.float32)


class Turner:
    """Turns a template and gives it as kernels for `correlation`, on the CPU or a GPU.

    The template is interpolated once by cubic splines between its voxels, and from there linearly for each rotation:
    close to a cubic spline at an eighth of its price.
    """

    def __init__(self, template: Template, device: str = "cpu") -> None:
        self._template = template
        self.device = torch.device(device)
        volumes = [template.density] + ([template.mask] if template.mask_turns else [])
        self._fine = torch.stack([torch.from_numpy(_finer(volume)) for volume in volumes])[None].to(self.device)
        self._mask = torch.from_numpy(template.mask).to(self.device)
        self._transfer = None if template.transfer is None else torch.from_numpy(template.transfer).to(self.device)
        box = template.box
        axis = (torch.arange(box, device=self.device) - box // 2).float()
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        self._points = torch.stack([x, y, z], dim=-1).reshape(-1, 3)
        #: grid_sample counts from -1, the first fine voxel's centre, to 1, the last one's.
        self._first = -(box // 2) - 1.0
        self._extent = (self._fine.shape[-1] - 1) / _FINER

    def kernels(self, rotations: Rotation) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Kernels `[n, z, y, x]` for rotations of the template, and their masks where these turn."""
        volumes = self._turned(rotations)
        density = volumes[:, 0]
        if self._transfer is not None:
            spectrum = torch.fft.rfftn(density, dim=(1, 2, 3))
            density = torch.fft.irfftn(spectrum * self._transfer, s=density.shape[1:], dim=(1, 2, 3))
        masks = volumes[:, 1].clamp(0, 1) if self._template.mask_turns else None
        weights = self._mask[None] if masks is None else masks
        mean = (density * weights).sum((1, 2, 3), keepdim=True) / weights.sum((1, 2, 3), keepdim=True)
        density = density - mean
        norm = (density.square() * weights).sum((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-20)
        return density.mul_(weights).div_(norm), masks

    def _turned(self, rotations: Rotation) -> torch.Tensor:
        """Density (and mask) `[n, 1 or 2, z, y, x]`: out(r) = template(R^-1 (r - c) + c)."""
        # row vectors: (R^-1 r)^T = r^T R
        matrices = torch.from_numpy(rotations.as_matrix().reshape(-1, 3, 3).astype(np.float32)).to(self.device)
        places = (torch.matmul(self._points, matrices) - self._first) * (2 / self._extent) - 1
        box, count = self._template.box, len(matrices)
        return torch.nn.functional.grid_sample(
            self._fine.expand(count, -1, -1, -1, -1),
            places.reshape(count, box, box, box, 3),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=True,
        )


def _finer(volume: Array) -> Array:
    """Values at every half voxel, from one voxel before the first to one after the last, by cubic splines; 0
    outside."""
    side = volume.shape[0]
    padded = np.pad(volume, 2)
    line = np.arange(1, side + 2 + 1 / _FINER, 1 / _FINER)
    coefficients = scipy.ndimage.spline_filter(padded.astype(np.float64), order=3, mode="constant")
    fine = scipy.ndimage.map_coordinates(
        coefficients, np.meshgrid(line, line, line, indexing="ij"), order=3, mode="constant", prefilter=False
    )
    return np.ascontiguousarray(fine, np.float32)
