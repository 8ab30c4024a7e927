"""Joining the pieces of a search into whole maps, slab by slab.

A piece holds the best scores of a tile, and the orientations they had, over the part of all orientations that was
searched. Where pieces have the same positions the largest score counts. Positions that no piece has score 0.

Scores can be corrected for their background: what the template with random phases scores at a place above its mean over
the map is taken off (never added).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.picking.slabs import READ_BYTES, ReadSlab, Shape

Array = NDArray[np.float32]


@dataclass(frozen=True)
class MapPiece:
    """What one piece of work left of a tile.

    Attributes:
        start: (z, y, x) of its first voxel in the map.
        shape: (z, y, x).
        read_scores, read_rotations: planes z0 to z1 - 1 of the piece.
        read_background, read_mirror: the same of the scores of the template with random phases and of its mirror image,
            where these were searched for.
    """

    start: Shape
    shape: Shape
    read_scores: ReadSlab
    read_rotations: ReadSlab
    read_background: ReadSlab | None = None
    read_mirror: ReadSlab | None = None


@dataclass(frozen=True)
class ScoreMaps:
    """Maps of a whole tomogram, made of pieces as they are read."""

    pieces: tuple[MapPiece, ...]
    shape: Shape
    mean_background: float | None = None

    @classmethod
    def of(cls, pieces: Sequence[MapPiece], shape: Shape) -> ScoreMaps:
        """Measures the mean of the background, where all pieces have one."""
        maps = cls(tuple(pieces), shape)
        if not pieces or any(piece.read_background is None for piece in pieces):
            return maps
        total = 0.0
        for z0, z1 in maps.slabs():
            total += float(maps.largest(z0, z1, "read_background").sum(dtype=np.float64))
        return cls(maps.pieces, shape, total / float(np.prod(shape)))

    def slabs(self) -> list[tuple[int, int]]:
        """Runs of planes to be read at a time."""
        step = max(1, READ_BYTES // (4 * self.shape[1] * self.shape[2]))
        return [(z, min(z + step, self.shape[0])) for z in range(0, self.shape[0], step)]

    def scores(self, z0: int, z1: int) -> Array:
        """Planes z0 to z1 - 1 of the best scores, corrected where there is a background."""
        found = self.largest(z0, z1, "read_scores")
        if self.mean_background is not None:
            found -= np.maximum(self.largest(z0, z1, "read_background") - np.float32(self.mean_background), 0)
        return found

    def mirror(self, z0: int, z1: int) -> Array:
        """The scores of the mirror image."""
        return self.largest(z0, z1, "read_mirror")

    def rotations(self, z0: int, z1: int) -> Array:
        """The number of the best orientation at each voxel."""
        best, rotations = self._empty(z0, z1), self._empty(z0, z1)
        seen = np.zeros(best.shape, np.bool_)
        for piece, own, there in self._inside(z0, z1):
            scores, numbers = piece.read_scores(*own), piece.read_rotations(*own)
            better = (scores > best[there]) | ~seen[there]
            rotations[there] = np.where(better, numbers, rotations[there])
            best[there] = np.where(better, scores, best[there])
            seen[there] = True
        return rotations

    def largest(self, z0: int, z1: int, which: str) -> Array:
        """The largest values of one of the pieces' maps: read_scores, read_background or read_mirror."""
        found = self._empty(z0, z1)
        seen = np.zeros(found.shape, np.bool_)
        for piece, own, there in self._inside(z0, z1):
            scores = getattr(piece, which)(*own)
            found[there] = np.where(seen[there], np.maximum(found[there], scores), scores)
            seen[there] = True
        return found

    def _empty(self, z0: int, z1: int) -> Array:
        return np.zeros((z1 - z0, *self.shape[1:]), np.float32)

    def _inside(self, z0: int, z1: int) -> list[tuple[MapPiece, tuple[int, int], tuple[slice, slice, slice]]]:
        """The pieces that planes z0 to z1 - 1 cut, which of their planes, and where those lie in the slab."""
        cut = []
        for piece in self.pieces:
            z, y, x = piece.start
            low, high = max(z0, z), min(z1, z + piece.shape[0])
            if low < high:
                there = (slice(low - z0, high - z0), slice(y, y + piece.shape[1]), slice(x, x + piece.shape[2]))
                cut.append((piece, (low - z, high - z), there))
        return cut
