"""Refining the position and orientation of picks, finer than the grid they were found on.

Around each pick the score of template matching is evaluated at the neighbouring voxels for the pick's orientation, for
turns about three axes, and for the turn to the vertex of the parabolas through their scores. The best orientation and
voxel become the next centre, and the turns are halved. In the end the vertex of parabolas through the neighbouring
voxels gives the position between voxels; the score is the one at the nearest voxel, as in a search.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.progress import Progress, no_progress
from services.picking.correlation import LEAST_DEVIATION
from services.picking.slabs import RollingWindow, Shape, read_memory_bytes
from services.picking.template import Template, Turner
from services.picking.template_matching import DISTURBED, Tomogram, cut, margin

#: Picks refined together: few enough to stay in the cache.
BATCH = 2
#: Turns tried about each axis: the first twice, then halved each time.
ROUNDS = 5
#: Voxels (z, y, x) that are tried in a round, from the present one: itself and its neighbours before and after.
_STEPS = np.concatenate([np.zeros((1, 3), np.int64), -np.eye(3, dtype=np.int64), np.eye(3, dtype=np.int64)])

_AXES = np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3)])


@dataclass(frozen=True)
class Refined:
    """Refined picks, in their order.

    Attributes:
        positions: float64 `[n, 3]`, (x, y, z) voxels.
        rotations: of the template.
        scores: float64 `[n]`, -1 to 1.
    """

    positions: NDArray[np.float64]
    rotations: Rotation
    scores: NDArray[np.float64]


def memory_bytes(shape: Shape, box: int, max_shift_voxels: int, *, disturbed: bool) -> int:
    """What `refine` takes at most beside the picks."""
    side = box + 2 * (max_shift_voxels + 1) + (2 * DISTURBED if disturbed else 0)
    window = 8 * min(side, shape[0]) * shape[1] * shape[2] + read_memory_bytes(shape)
    kernels = 7 * BATCH * 12 * box**3
    return window + 4 * (kernels + 4 * BATCH * side**3 + 90 * box**3 + 3 * (2 * box + 3) ** 3) + (64 << 20)


def refine(
    tomogram: Tomogram,
    template: Template,
    positions: NDArray[np.float64],
    rotations: Rotation,
    *,
    angle_degrees: float,
    max_shift_voxels: int = 4,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
) -> Refined:
    """Refine picks.

    Args:
        tomogram: with its filter; not binned.
        template: of the tomogram's voxels.
        positions: float64 `[n, 3]`, (x, y, z) voxels.
        rotations: the picks' orientations.
        angle_degrees: the first turn tried; about half the step of the grid they were found on.
        max_shift_voxels: a pick moves at most so far along each axis.
        device: "cpu" or "cuda".
        threads: cores to use.
        progress: told how far the work is.
    """
    torch.set_num_threads(threads)
    turner = Turner(template, device)
    found = np.array(positions, np.float64)
    quaternions = rotations.as_quat().reshape(-1, 4).copy()
    scores = np.zeros(len(positions))
    # in the order of z every plane is read once
    order = np.argsort(positions[:, 2], kind="stable")
    side = template.box + 2 * (max_shift_voxels + 1)
    rolling = _rolled(tomogram, side + 2 * margin(tomogram))
    for start in range(0, len(order), BATCH):
        members = order[start : start + BATCH]
        centres = np.rint(positions[members]).astype(np.int64)
        reach = template.box // 2 + max_shift_voxels + 1
        regions = np.stack([cut(rolling, (z - reach, y - reach, x - reach), side) for x, y, z in centres.tolist()])
        search = _Search(turner, template, torch.from_numpy(regions).to(turner.device), max_shift_voxels)
        moved, quaternions[members], scores[members] = search.run(quaternions[members], angle_degrees)
        found[members] = centres + moved
        progress((start + len(members)) / len(order), "refining", particles=start + len(members))
    turned = Rotation.from_quat(quaternions) if len(quaternions) else Rotation.identity(0)
    return Refined(found, turned, scores)


def _rolled(tomogram: Tomogram, depth: int) -> Tomogram:
    """The same tomogram, read through a window that keeps the planes read last."""
    depth = min(depth, tomogram.shape[0])
    window = RollingWindow(tomogram.read_slab, tomogram.shape, depth, (0, tomogram.shape[1]))

    def read(z0: int, z1: int) -> NDArray[np.float32]:
        window.advance(z0, z1)
        planes: NDArray[np.float32] = window.planes[window.slots(z0, z1)]
        return planes

    return dataclasses.replace(tomogram, read_slab=read)


class _Search:
    """Refines a few picks together, in the regions around them `[n, z, y, x]`."""

    def __init__(self, turner: Turner, template: Template, regions: torch.Tensor, max_shift: int) -> None:
        self._turner = turner
        self._box = template.box
        self._template = template
        self._mask = torch.from_numpy(template.mask).to(turner.device).reshape(1, -1)
        self._regions = regions
        self._max_shift = max_shift

    def run(
        self, quaternions: NDArray[np.float64], angle_degrees: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Shifts from the regions' centres (x, y, z), quaternions and scores."""
        best = quaternions.copy()
        shifts = np.zeros((len(best), 3), np.int64)  # (z, y, x)
        scores = np.full(len(best), -np.inf)

        def take(orientations: NDArray[np.float64], values: NDArray[np.float32], centres: NDArray[np.int64]) -> None:
            for i, found in enumerate(values):
                if found.max() > scores[i]:
                    which, step = np.unravel_index(int(found.argmax()), found.shape)
                    scores[i], best[i] = found.max(), orientations[i, which]
                    shifts[i] = np.clip(centres[i] + _STEPS[step], -self._max_shift, self._max_shift)

        for round_ in range(ROUNDS):
            turns = Rotation.from_rotvec(math.radians(angle_degrees / 2 ** max(0, round_ - 1)) * _AXES)
            centres = shifts.copy()
            tried = np.stack([(Rotation.from_quat(q) * turns).as_quat() for q in best])
            windows = [self._windows(i, shift) for i, shift in enumerate(centres)]
            values = self._scores(tried, windows)
            vertices = np.empty((len(best), 1, 4))
            for i, found in enumerate(values):
                along = found[:, int(found[0].argmax())]
                steps = np.array([_vertex(along[4 + axis], along[0], along[1 + axis]) for axis in range(3)])
                turn = Rotation.from_rotvec(steps * turns[1].magnitude())
                vertices[i, 0] = (Rotation.from_quat(best[i]) * turn).as_quat()
            take(tried, values, centres)
            take(vertices, self._scores(vertices, windows), centres)
        windows = [self._windows(i, shift) for i, shift in enumerate(shifts)]
        around = self._scores(best[:, None], windows)[:, 0]
        between = [[_vertex(values[1 + axis], values[0], values[4 + axis]) for axis in range(3)] for values in around]
        return (shifts + np.array(between))[:, ::-1], best, scores

    def _windows(self, pick: int, shift: NDArray[np.int64]) -> _Windows:
        """The boxes `[voxel, 7]` at the voxels `_STEPS` from a shift."""
        box, region = self._box, self._regions[pick]
        boxes = []
        for z, y, x in (shift + self._max_shift + 1 + _STEPS).tolist():
            boxes.append(region[z : z + box, y : y + box, x : x + box].reshape(-1))
        stacked = torch.stack(boxes).T
        return _Windows(stacked, None if self._template.mask_turns else self._inverse_norms(stacked, self._mask))

    @staticmethod
    def _inverse_norms(boxes: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """1 / the score's denominator of each box under each mask, `[mask, box]`; 0 where a box is empty."""
        total = masks.sum(dim=1, keepdim=True)
        variance = masks @ boxes.square() - (masks @ boxes).square() / total
        usable = variance > LEAST_DEVIATION**2 * total
        return torch.where(usable, variance.clamp_min(1e-20).rsqrt(), 0)

    def _scores(self, quaternions: NDArray[np.float64], windows: list[_Windows]) -> NDArray[np.float32]:
        """The score `[n, m, 7]` of m orientations `[n, m, 4]` of each pick in its windows."""
        count, orientations = quaternions.shape[:2]
        kernels, masks = self._turner.kernels(Rotation.from_quat(quaternions.reshape(-1, 4)))
        kernels = kernels.reshape(count, orientations, -1)
        result = np.empty((count, orientations, len(_STEPS)), np.float32)
        for i, (boxes, norms) in enumerate((w.boxes, w.inverse_norms) for w in windows):
            if norms is None:
                assert masks is not None
                norms = self._inverse_norms(boxes, masks.reshape(count, orientations, -1)[i])
            result[i] = (kernels[i] @ boxes * norms).clamp(-1, 1).cpu().numpy()
        return result


@dataclass(frozen=True)
class _Windows:
    boxes: torch.Tensor
    inverse_norms: torch.Tensor | None


def _vertex(before: float, here: float, after: float) -> float:
    """Where the parabola through three values one step apart is highest, at most one step away; 0 where it has no
    top."""
    bend = before - 2 * here + after
    return 0.0 if bend >= 0 else float(np.clip(0.5 * (before - after) / bend, -1, 1))
