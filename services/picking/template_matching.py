"""Template matching: the locally normalised correlation of a tomogram with a template in many orientations.

The tomogram is worked on in tiles (see `tiles`), each correlated with the template in all orientations (see
`correlation`), of which the best score at each position and its orientation are kept. A *piece* of the work is a tile
and a run of orientations, so that a search can be shared by machines: where pieces have the same tile, the larger score
counts.

Along with the template the same template with random phases can be searched for, which says what the background would
score (Wan et al., STOPGAP, Acta Cryst. D80 (2024) 336), and its mirror image, which tells the hand of the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.fft
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.fourier import Profile, filter_radially, fourier_crop, radial_frequency
from cryofleet.progress import Progress, no_progress
from services.picking import tiles
from services.picking.correlation import Best, correlator, fetch
from services.picking.correlation import memory_bytes as correlation_bytes
from services.picking.slabs import READ_BYTES, ReadSlab
from services.picking.template import Template, Turner
from services.picking.tiles import Layout, Shape, Tile

Array = NDArray[np.float32]

#: Memory that tiles are laid out for. Part of what a result depends on, by rounding.
TILE_BYTES = 1 << 30
#: Voxels at a tile's faces that a filter or binning disturbs.
DISTURBED = 8
#: Orientations whose kernels are made together.
BATCH = 4
#: A position counts if so much of the mask lies inside the tomogram there, and no more than so much of it on gold.
LEAST_INSIDE, MOST_GOLD = 0.5, 0.02
#: Orientations in one piece of work, as it is planned: a few minutes on a few cores.
PIECE_ROTATIONS = 2000
#: The spectrum of a tomogram is measured in cubes of this side, so many of them.
_SPECTRUM_SIDE, _SPECTRUM_CUBES = 64, 27


@dataclass(frozen=True)
class Tomogram:
    """A tomogram as it is searched.

    Attributes:
        read_slab, shape: planes z0 to z1 - 1, and (z, y, x) of the tomogram.
        mean, deviation: of its voxels.
        sign: -1 where protein is dark.
        binning: voxels that are joined to one, by cropping in Fourier space.
        profile: a filter, of |k| in cycles per (binned) voxel; applied to the template too.
        gold_deviations: voxels so far to the side of protein are gold; 0 where there is none.
        read_mask: planes of a mask of the positions to search (not 0); all where None.
    """

    read_slab: ReadSlab
    shape: Shape
    mean: float
    deviation: float
    sign: int = 1
    binning: int = 1
    profile: Profile | None = None
    gold_deviations: float = 0.0
    read_mask: ReadSlab | None = None

    @property
    def binned_shape(self) -> Shape:
        """(z, y, x) of what is searched: the tomogram's sides over the binning, rounded down."""
        z, y, x = self.shape
        return (z // self.binning, y // self.binning, x // self.binning)


@dataclass(frozen=True)
class Piece:
    """A tile and the orientations `first` to `stop - 1`."""

    tile: Tile
    first: int
    stop: int


@dataclass(frozen=True)
class Match:
    """What a piece of work found.

    Attributes:
        tile: where.
        scores: for each template searched for, float32 `[z, y, x]` of the tile's core: the best score of any of the
            orientations, -1 to 1; 0 at positions left out.
        rotations: int32 `[z, y, x]`, the orientation's number for the first template.
        count, squares: number of scores of the first template, all orientations, and the sum of their squares.
    """

    tile: Tile
    scores: tuple[Array, ...]
    rotations: NDArray[np.int32]
    count: int
    squares: float


def survey(read_slab: ReadSlab, shape: Shape, progress: Progress = no_progress) -> tuple[float, float]:
    """Mean and standard deviation of a tomogram, read once from end to end.

    Raises FailedPrecondition for voxels that are not finite, and for a constant tomogram.
    """
    step = max(1, READ_BYTES // (4 * shape[1] * shape[2]))
    count, mean, squares = 0, 0.0, 0.0
    for z in range(0, shape[0], step):
        end = min(z + step, shape[0])
        slab = read_slab(z, end)
        if not np.isfinite(slab).all():
            raise FailedPrecondition(
                f"the tomogram has voxels that are not finite (NaN or infinity) in its planes {z} to {end - 1}"
            )
        size, here = slab.size, float(slab.mean(dtype=np.float64))
        spread = float(slab.var(dtype=np.float64)) * size
        squares += spread + (here - mean) ** 2 * count * size / (count + size)
        mean += (here - mean) * size / (count + size)
        count += size
        progress(end / shape[0], "measuring the tomogram")
    deviation = math.sqrt(squares / count)
    if deviation <= 1e-7 * abs(mean):
        raise FailedPrecondition("the tomogram is constant, there is nothing to find")
    return mean, deviation


def whitening(tomogram: Tomogram) -> Profile:
    """The profile that makes the tomogram's power the same at all frequencies, at most 30 times that of the largest.

    The power is measured as a mean over shells, in cubes spread over the tomogram.
    """
    side = min(_SPECTRUM_SIDE, *tomogram.binned_shape)
    per_axis = max(1, round(_SPECTRUM_CUBES ** (1 / 3)))
    lines = [np.unique(np.linspace(0, length - side, per_axis).astype(int)) for length in tomogram.binned_shape]
    taper = np.hanning(side + 2)[1:-1].astype(np.float32)
    window = taper[:, None, None] * taper[None, :, None] * taper[None, None, :]
    shells = np.rint(radial_frequency((side, side, side)) * side).astype(np.int64).ravel()
    power = np.zeros(shells.max() + 1)
    for z in lines[0]:
        for y in lines[1]:
            for x in lines[2]:
                region, _, _ = _region(tomogram, (int(z), int(y), int(x)), (side, side, side), filtering=False)
                spectrum = scipy.fft.rfftn((region - region.mean()) * window)
                power += np.bincount(shells, weights=np.square(np.abs(spectrum)).ravel(), minlength=len(power))
    power /= np.maximum(np.bincount(shells, minlength=len(power)), 1)
    amplitude = np.sqrt(np.maximum(power, power[1:].max() / 900))
    # the mean was taken away, and with it what little the first shell says
    amplitude[0] = amplitude[1]
    amplitude /= amplitude.max()
    frequency = np.arange(len(amplitude)) / side

    def profile(k: Array) -> Array:
        return np.asarray(1 / np.interp(k, frequency, amplitude), np.float32)

    return profile


def check_size(shape: Shape, box: int) -> None:
    """Raises InvalidArgument for a template that is larger than the tomogram."""
    if box > min(shape):
        raise InvalidArgument(
            f"the template is a cube of {box} voxels, larger than the tomogram of {shape} voxels (z, y, x)"
        )


def layout(shape: Shape, box: int, *, disturbed: bool, mask_turns: bool, variants: int, threads: int = 1) -> Layout:
    """The tiles of a (binned) tomogram for a template's box; the same on every machine.

    Raises InvalidArgument for a template that is larger than the tomogram.
    """
    check_size(shape, box)
    return tiles.plan(
        shape,
        box,
        DISTURBED if disturbed else 0,
        lambda padded: tile_bytes(padded, box, mask_turns=mask_turns, variants=variants, threads=1),
        TILE_BYTES,
    )


def tile_bytes(padded: Shape, box: int, *, mask_turns: bool, variants: int, threads: int) -> int:
    """What the search of one tile takes at most on a CPU, for one template in so many variants."""
    voxels = math.prod(padded)
    kernels = variants * BATCH * 4 * 12 * box**3 + 4 * 3 * (2 * box + 3) ** 3
    # allowed positions, and the tile as it is read
    return correlation_bytes(padded, box, threads, mask_turns, variants) + kernels + 2 * voxels


def memory_bytes(
    shape: Shape, box: int, *, binning: int, disturbed: bool, mask_turns: bool, variants: int, threads: int
) -> int:
    """What `search` takes at most on a CPU, beside what the caller keeps of its results.

    Raises InvalidArgument for a template that is larger than the tomogram.
    """
    binned = (shape[0] // binning, shape[1] // binning, shape[2] // binning)
    plan = layout(binned, box, disturbed=disturbed, mask_turns=mask_turns, variants=variants)
    region = 4 * math.prod(plan.padded)
    reading = region * (1 + 2 * binning**3 if binning > 1 else 3) + 3 * max(READ_BYTES, 4 * shape[1] * shape[2])
    working = tile_bytes(plan.padded, box, mask_turns=mask_turns, variants=variants, threads=threads)
    return max(reading, working) + 2 * region + (64 << 20)


def pieces(plan: Layout, rotations: int, at_a_time: int = PIECE_ROTATIONS) -> list[Piece]:
    """All the work, tile by tile: runs of orientations as even as they can be, of at most `at_a_time`."""
    runs = math.ceil(rotations / at_a_time)
    bounds = np.linspace(0, rotations, runs + 1).round().astype(int)
    return [Piece(tile, int(first), int(stop)) for tile in plan.tiles for first, stop in pairwise(bounds)]


def search(
    tomogram: Tomogram,
    templates: Sequence[Template],
    rotations: Rotation,
    plan: Layout,
    work: Sequence[Piece],
    *,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = no_progress,
) -> Iterator[Match]:
    """Do pieces of the work, and give what each tile's found, tile by tile.

    Pieces of one tile must follow one another; they are given as one.

    Args:
        tomogram: with its filter and binning; the templates are of its binned voxels.
        templates: the template, and further ones searched for in the same orientations (random phases, mirror image).
            All have one box, and the first one's mask.
        rotations: all orientations of the search.
        plan: the tiles, from `layout`.
        work: which pieces.
        device: "cpu" or "cuda".
        threads: cores to use.
        progress: told how far the work is.
    """
    torch.set_num_threads(threads)
    box = templates[0].box
    turners = [Turner(template, device) for template in templates]
    total = sum(piece.stop - piece.first for piece in work)
    done = 0
    engine = correlator(device, plan.padded, box, plan.valid, threads)
    try:
        for tile, runs in _by_tile(work):
            ends = done + sum(piece.stop - piece.first for piece in runs)
            allowed, region = _prepare(tomogram, templates[0], plan, tile)
            if not allowed.any():
                done = ends
                zeros = np.zeros(tile.shape, np.float32)
                yield Match(tile, (zeros,) * len(templates), np.zeros(tile.shape, np.int32), 0, 0.0)
                continue
            engine.load(region)
            norms = None if templates[0].mask_turns else engine.inverse_norms(templates[0].mask, allowed)
            best = [Best.empty(engine.valid) for _ in templates]
            for piece in runs:
                for first in range(piece.first, piece.stop, BATCH):
                    batch = rotations[first : min(first + BATCH, piece.stop)]
                    for turner, found in zip(turners, best, strict=True):
                        kernels, masks = turner.kernels(batch)
                        if masks is None:
                            engine.search(kernels, first, norms, found)
                        else:
                            engine.search_masked(kernels, masks, first, allowed, found)
                    done += len(batch)
                    progress(done / total, "matching", orientations=done)
            match = _core(tile, best, plan)
            # nothing of this tile is kept while the next one is prepared
            del best, norms, region, allowed
            yield match
            del match
    finally:
        engine.close()


def _by_tile(work: Sequence[Piece]) -> Iterator[tuple[Tile, list[Piece]]]:
    runs: list[Piece] = []
    for piece in work:
        if runs and piece.tile != runs[0].tile:
            yield runs[0].tile, runs
            runs = []
        runs.append(piece)
    if runs:
        yield runs[0].tile, runs


def _core(tile: Tile, best: Sequence[Best], plan: Layout) -> Match:
    """The tile's own positions of what was found at all positions in which the box fits."""
    # position u is the box's first voxel, and its centre, voxel box // 2, is the tile's
    first = plan.disturbed
    inside = tuple(slice(first, first + side) for side in tile.shape)
    found = [fetch(one) for one in best]
    scores = tuple(np.ascontiguousarray(values[inside]) for values, _ in found)
    return Match(tile, scores, np.ascontiguousarray(found[0][1][inside]), best[0].count, best[0].squares)


def _prepare(tomogram: Tomogram, template: Template, plan: Layout, tile: Tile) -> tuple[NDArray[np.bool_], Array]:
    """The positions of a tile that are searched (bool, of the correlator's valid shape) and its voxels."""
    box = template.box
    margin = plan.disturbed + box // 2
    start = (tile.start[0] - margin, tile.start[1] - margin, tile.start[2] - margin)
    allowed = np.zeros(plan.valid, np.bool_)
    first = plan.disturbed
    own = tuple(slice(first, first + side) for side in tile.shape)
    allowed[own] = True if tomogram.read_mask is None else _searched(tomogram, tile)
    if not allowed.any():
        return allowed, np.empty(0, np.float32)
    region, inside, gold = _region(tomogram, start, plan.padded)
    mask_sum = float(template.mask.sum())
    if any(part != slice(0, side) for part, side in zip(inside, plan.padded, strict=True)):
        present = np.zeros(plan.padded, np.float32)
        present[inside] = 1
        allowed &= _under_mask(present, template.mask, plan.valid) >= LEAST_INSIDE * mask_sum
    if gold is not None:
        allowed &= _under_mask(gold.astype(np.float32), template.mask, plan.valid) <= MOST_GOLD * mask_sum
    return allowed, region


def _searched(tomogram: Tomogram, tile: Tile) -> NDArray[np.bool_]:
    """The region mask on a tile's core."""
    assert tomogram.read_mask is not None
    step = tomogram.binning
    planes = []
    for z in range(tile.start[0], tile.stop[0]):
        plane = tomogram.read_mask(z * step, z * step + 1)[0]
        planes.append(
            plane[tile.start[1] * step : tile.stop[1] * step : step, tile.start[2] * step : tile.stop[2] * step : step]
            != 0
        )
    return np.stack(planes)


def _under_mask(values: Array, mask: Array, valid: Shape) -> Array:
    """The sum of `values` under the mask at the first positions along each axis."""
    spectrum = scipy.fft.rfftn(values)
    spectrum *= np.conj(scipy.fft.rfftn(mask, values.shape))
    sums = scipy.fft.irfftn(spectrum, values.shape, overwrite_x=True)
    result: Array = sums[: valid[0], : valid[1], : valid[2]]
    return result


def _region(
    tomogram: Tomogram, start: Shape, padded: Shape, filtering: bool = True
) -> tuple[Array, tuple[slice, slice, slice], NDArray[np.bool_] | None]:
    """A region of the (binned) tomogram, protein positive, with the tomogram's mean as 0 and its deviation as 1.

    Returns:
        The region, filtered; which part of it lies inside the tomogram; and which of its voxels are gold, these being 0
        in the region.
    """
    step = tomogram.binning
    region, inside = tiles.read(
        tomogram.read_slab,
        tomogram.shape,
        [place * step for place in start],
        (padded[0] * step, padded[1] * step, padded[2] * step),
        tomogram.mean,
    )
    region -= np.float32(tomogram.mean)
    region *= np.float32(tomogram.sign / tomogram.deviation)
    gold: NDArray[np.bool_] | None = None
    if tomogram.gold_deviations:
        bright = region > tomogram.gold_deviations
        if bright.any():
            region[bright] = 0
            gold = np.asarray(bright.reshape(padded[0], step, padded[1], step, padded[2], step).any((1, 3, 5)))
    if step > 1:
        region = fourier_crop(region, step)
        inside = (_binned(inside[0], step), _binned(inside[1], step), _binned(inside[2], step))
    if filtering and tomogram.profile is not None:
        region = filter_radially(region, tomogram.profile)
        region /= max(float(region[inside].std()), 1e-6)
    return region, inside, gold


def margin(tomogram: Tomogram) -> int:
    """Voxels around a part of the tomogram that `cut` reads too, where the filter would disturb it."""
    return 0 if tomogram.profile is None else DISTURBED


def cut(tomogram: Tomogram, start: Sequence[int], side: int) -> Array:
    """A cube of the tomogram as it is searched, from its voxel `start` (z, y, x), which may be outside."""
    around = margin(tomogram)
    whole = side + 2 * around
    region, _, _ = _region(tomogram, (start[0] - around, start[1] - around, start[2] - around), (whole, whole, whole))
    inner = slice(around, around + side)
    return np.ascontiguousarray(region[inner, inner, inner])


def _binned(part: slice, step: int) -> slice:
    return slice(part.start // step, part.stop // step)
