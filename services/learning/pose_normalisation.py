"""Pose normalisation: each box moved to its centre of mass and turned to its principal axes.

Zeng et al. 2018 (J. Struct. Biol. 202:150-160), section 2.5, equations 1 and 2:

    c = sum f r / sum f,    W = sum f^2 (r - c)(r - c)^T = Q L Q^T,    eigenvalues L descending

What the paper leaves open is fixed here:

- f is positive where there is structure. At the noise of tomograms a mere shift to positive values leaves c and W to
  the noise (in simulated boxes at SNR 0.05, clean structures turned by the poses of their noisy boxes then correlate by
  0.7; with the f below by 0.97). So f is the box smoothed by a Gaussian of n/16 voxels (2 voxels at 32, as the paper
  smooths for display), minus its mean and one standard deviation inside the inscribed sphere, and zero where that is
  negative and outside the sphere.
- Signs: along the first and the second axis the third moment, sum f^2 ((r - c) q)^3, is positive. The third axis is
  their vector product, so that Q is a rotation: mirror images stay apart. Where a structure has no third moment along
  an axis, the axis's largest component is positive.
- The eigenvectors become the axes x, y and z in this order: a membrane ends up horizontal, as in the paper's figure 3.
- Missing corners are filled with the box's mean: the paper fills from the tomogram, which a box does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage
import torch
from numpy.typing import NDArray

SMOOTHING = 1 / 16
"""Of the smoothing Gaussian: sigma in sides of the box."""

SYMMETRIC = 1e-6
"""A third moment below this, in units of the second to the power 3/2, has no sign."""


@dataclass(frozen=True)
class Poses:
    """Where the structures are in n boxes.

    `centres` (n, 3): the centre of mass as (x, y, z), voxels from the box centre n // 2.
    `axes` (n, 3, 3): columns are the principal axes as (x, y, z) vectors, longest first; each matrix is a rotation,
    which takes the normalised structure onto that in the box.
    """

    centres: NDArray[np.float64]
    axes: NDArray[np.float64]


def normalise_poses(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Boxes `[i, z, y, x]` with protein positive, each turned and shifted to its own pose; trilinear interpolation."""
    return turn_back(boxes, find_poses(structure_weights(boxes)))


def structure_weights(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """The f of the equations for boxes `[i, z, y, x]` with protein positive: zero or more, and zero outside of the
    inscribed sphere.
    """
    side = boxes.shape[-1]
    sigma = side * SMOOTHING
    smooth = scipy.ndimage.gaussian_filter(boxes, (0.0, sigma, sigma, sigma), mode="nearest")
    offset = np.arange(side) - side // 2
    inside = offset[:, None, None] ** 2 + offset[None, :, None] ** 2 + offset[None, None, :] ** 2 <= (side / 2) ** 2
    values = smooth[:, inside].astype(np.float64)
    threshold = values.mean(axis=1) + values.std(axis=1)
    weights = np.zeros(boxes.shape, np.float32)
    weights[:, inside] = np.maximum(values - threshold[:, None], 0.0)
    return weights


def find_poses(weights: NDArray[np.float32]) -> Poses:
    """Equations 1 and 2 for weights f `[i, z, y, x]`. A box without any weight keeps its pose."""
    count, side = weights.shape[0], weights.shape[-1]
    offset = np.arange(side, dtype=np.float64) - side // 2
    z, y, x = (axis.ravel() for axis in np.meshgrid(offset, offset, offset, indexing="ij"))
    places = np.stack([x, y, z])
    flat = weights.reshape(count, -1).astype(np.float64)
    mass = flat.sum(axis=1)
    centres = flat @ places.T / np.where(mass > 0, mass, 1.0)[:, None]

    # Raw moments of f^2 of order 0 to 3 about the box centre: one product for all boxes.
    second_products = np.einsum("iv,jv->ijv", places, places).reshape(9, -1)
    third_products = np.einsum("iv,jv->ijv", second_products, places).reshape(27, -1)
    squares = flat * flat
    moment_0 = squares.sum(axis=1)
    moment_1 = squares @ places.T
    moment_2 = (squares @ second_products.T).reshape(count, 3, 3)
    moment_3 = (squares @ third_products.T).reshape(count, 3, 3, 3)

    cross = np.einsum("ni,nj->nij", centres, moment_1)
    covariance = (
        moment_2
        - cross
        - cross.transpose(0, 2, 1)
        + moment_0[:, None, None] * np.einsum("ni,nj->nij", centres, centres)
    )
    axes = np.linalg.eigh(covariance)[1][:, :, ::-1]

    # sum f^2 ((r - c) q)^3 for each axis q, from the raw moments.
    along = np.einsum("ni,niq->nq", centres, axes)
    skewness = (
        np.einsum("nijk,niq,njq,nkq->nq", moment_3, axes, axes, axes, optimize=True)
        - 3 * along * np.einsum("nij,niq,njq->nq", moment_2, axes, axes, optimize=True)
        + 3 * along**2 * np.einsum("ni,niq->nq", moment_1, axes)
        - along**3 * moment_0[:, None]
    )
    variance = np.einsum("nij,niq,njq->nq", covariance, axes, axes, optimize=True)
    scale = np.sqrt(np.maximum(moment_0, np.finfo(np.float64).tiny))[:, None]
    # Skewness is of the order variance^(3/2) / moment_0^(1/2).
    undecided = np.abs(skewness) * scale <= SYMMETRIC * np.maximum(variance, 0.0) ** 1.5
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None, :], axis=1)[:, 0, :]
    axes = axes * np.where(np.where(undecided, largest, skewness) < 0, -1.0, 1.0)[:, None, :]
    axes[:, :, 2] = np.cross(axes[:, :, 0], axes[:, :, 1])
    axes[mass <= 0] = np.eye(3)
    return Poses(centres, axes)


def turn_back(boxes: NDArray[np.float32], poses: Poses) -> NDArray[np.float32]:
    """Boxes `[i, z, y, x]` with their structures' centres in the box centre and their axes along x, y and z; the mean
    fills corners.
    """
    side = boxes.shape[-1]
    centre = side // 2
    offset = torch.arange(side, dtype=torch.float32) - centre
    z, y, x = torch.meshgrid(offset, offset, offset, indexing="ij")
    targets = torch.stack([x, y, z], dim=-1).view(1, -1, 3)
    axes = torch.from_numpy(poses.axes.astype(np.float32))
    sources = targets @ axes.transpose(1, 2) + torch.from_numpy(poses.centres.astype(np.float32))[:, None, :] + centre
    # Sampling wants (x, y, z) with -1 the centre of the first voxel and 1 that of the last.
    grid = (sources * (2 / (side - 1)) - 1).view(len(boxes), side, side, side, 3)
    means = boxes.mean(axis=(1, 2, 3), dtype=np.float64).astype(np.float32)[:, None, None, None]
    volumes = torch.from_numpy(boxes - means)[:, None]
    sampled = torch.nn.functional.grid_sample(volumes, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    turned: NDArray[np.float32] = sampled[:, 0].numpy() + means
    return turned
