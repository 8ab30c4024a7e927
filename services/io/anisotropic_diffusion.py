"""Anisotropic diffusion: noise flows out, edges stand.

Perona & Malik 1990, IEEE Trans. Pattern Anal. 12, 629, in three dimensions: du/dt = div(c(|du|) grad u), explicit,
over the six neighbours. Each difference d to a neighbour lets c(d) d flow, c = exp(-(d / kappa)^2) or
1 / (1 + (d / kappa)^2), so that differences well above kappa, edges, remain. A step is stable up to 1/6: then a voxel
is at most replaced by the mean of its neighbours, and no value ever leaves the range of those around it. Nothing flows
through the border.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import Progress, no_progress, part
from cryofleet.scratch_array import ScratchVolume
from services.io.bricks import Array, ReadSlab, Shape, by_bricks
from services.io.bricks import memory_bytes as brick_bytes

Conductance = Literal["exponential", "rational"]

LARGEST_STEP = 1 / 6
#: Where kappa is not given, it is so many standard deviations of the differences between neighbours.
DEVIATIONS = 3.0
#: Steps that are made in one pass over the volume, which is the halo that a brick needs.
_PASS = 10
_COPIES = 3
# Median of the modulus of a normal variate, as a share of its standard deviation.
_MEDIAN_MODULUS = 0.6744897501960817
_SAMPLED_SECTIONS = 16


def anisotropic_diffusion(
    read: ReadSlab,
    shape: Shape,
    kappa: float,
    iterations: int,
    time_step: float,
    conductance: Conductance,
    write: Callable[[Array], object],
    scratch: Path,
    progress: Progress = no_progress,
    workers: int = 1,
) -> None:
    """Diffuses a volume.

    Ten steps are made brick by brick with a halo of ten voxels; then the volume lies in a file of the scratch folder,
    from which the next ten are made.

    Args:
        read: sections start to stop of the volume, [z, y, x].
        shape: (z, y, x) of the volume.
        kappa: the difference of two neighbours, in the volume's unit, that counts as an edge.
        iterations: steps.
        time_step: length of a step, at most 1/6.
        conductance: which c.
        write: takes the slabs in order.
        scratch: folder for the files between passes; none is needed up to ten steps, then two of the volume's size.
        progress: called after each brick.
        workers: threads.

    Raises InvalidArgument for a step or kappa out of range, ResourceExhausted where the scratch folder is full.
    """
    if not 0 < time_step <= LARGEST_STEP:
        raise InvalidArgument(f"time_step is {time_step:g}: it must be above 0 and at most 1/6, where it is stable")
    if not kappa > 0:
        raise InvalidArgument(f"kappa is {kappa:g}: it must be above 0")
    passes = [min(_PASS, iterations - done) for done in range(0, iterations, _PASS)]
    source: ScratchVolume | None = None
    with ExitStack() as stack:
        for number, steps in enumerate(passes):

            def diffused(brick: Array, steps: int = steps) -> Array:
                moving = brick.copy()
                for _ in range(steps):
                    _advance(moving, kappa, time_step, conductance)
                return moving

            told = part(progress, number / len(passes), (number + 1) / len(passes))
            if number == len(passes) - 1:
                by_bricks(read, shape, steps, diffused, write, told, "diffusing", workers)
                return
            target = stack.enter_context(ScratchVolume(scratch / f"diffused-{number}.float32", shape))
            by_bricks(read, shape, steps, diffused, _appending(target), told, "diffusing", workers)
            if source is not None:
                source.close()
            source, read = target, target.sections


def memory_bytes(shape: Shape, iterations: int, workers: int = 1) -> int:
    """What `anisotropic_diffusion` needs at most."""
    return brick_bytes(shape, min(iterations, _PASS), _COPIES, workers)


def estimated_kappa(read: ReadSlab, shape: Shape) -> float:
    """Three standard deviations of the differences between neighbours, those of noise and not of edges.

    The standard deviation is the median modulus over 0.6745, of differences along x and y in sixteen sections spread
    over the volume. Raises FailedPrecondition where more than half of the differences are 0.
    """
    sections = np.unique(np.linspace(0, shape[0] - 1, _SAMPLED_SECTIONS).astype(int))
    moduli = []
    for z in sections:
        section = read(int(z), int(z) + 1)[0]
        # of a large section, bands of rows
        rows = section[: max(2, (1 << 20) // max(1, shape[2]))]
        moduli += [np.abs(np.diff(rows, axis=axis)).ravel() for axis in (0, 1)]
    deviation = float(np.median(np.concatenate(moduli))) / _MEDIAN_MODULUS
    if not deviation > 0:
        raise FailedPrecondition("most neighbouring voxels are equal, which tells nothing of noise: give kappa")
    return DEVIATIONS * deviation


def _appending(target: ScratchVolume) -> Callable[[Array], None]:
    place = 0

    def append(slab: Array) -> None:
        nonlocal place
        for section in slab:
            target.write_section(place, section)
            place += 1

    return append


def _advance(volume: Array, kappa: float, time_step: float, conductance: Conductance) -> None:
    """One step, in place, section by section: what flows up from a section is kept for the next."""
    scale = np.float32(1 / kappa)
    step = np.float32(time_step)

    def flow(difference: Array) -> Array:
        share = difference * scale
        share *= share
        if conductance == "exponential":
            np.negative(share, out=share)
            np.exp(share, out=share)
            share *= difference
            return share
        share += np.float32(1)
        np.divide(difference, share, out=share)
        return share

    from_below: Array | None = None
    for z, section in enumerate(volume):
        gain = np.zeros_like(section)
        if from_below is not None:
            gain -= from_below
        if z + 1 < len(volume):
            from_below = flow(volume[z + 1] - section)
            gain += from_below
        along_y = flow(section[1:] - section[:-1])
        gain[:-1] += along_y
        gain[1:] -= along_y
        along_x = flow(section[:, 1:] - section[:, :-1])
        gain[:, :-1] += along_x
        gain[:, 1:] -= along_x
        gain *= step
        section += gain
