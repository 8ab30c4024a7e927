"""Reading a volume that is larger than memory: a window that rolls along z and reads every plane once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Shape = tuple[int, int, int]
#: `read_slab(z0, z1)` gives planes z0 to z1 - 1 of a volume as `[z, y, x]`.
ReadSlab = Callable[[int, int], Array]

#: So many bytes are read at a time: few requests to the store, little memory beside the window.
READ_BYTES = 32 << 20


def read_memory_bytes(shape: Shape) -> int:
    """What one read of a volume of this shape takes at most, beside the window itself: its bytes, as float32, and
    corrected.
    """
    return 3 * min(max(READ_BYTES, 4 * shape[1] * shape[2]), 4 * shape[0] * shape[1] * shape[2])


class RollingWindow:
    """Some rows of the `depth` planes read last.

    Attributes:
        planes: `[depth, y, x]`, the rows y0 to y1 - 1 of those planes. Plane z lies at index z % depth, so that
            nothing moves in memory as the window rolls.
        stop: the first plane not read yet.
    """

    def __init__(self, read_slab: ReadSlab, shape: Shape, depth: int, rows: tuple[int, int]) -> None:
        self.planes: Array = np.zeros((depth, rows[1] - rows[0], shape[2]), np.float32)
        self.stop = 0
        self._read_slab = read_slab
        self._rows = slice(*rows)
        self._step = max(1, READ_BYTES // (4 * shape[1] * shape[2]))

    def slots(self, z0: int, z1: int) -> NDArray[np.int64]:
        """Where the planes z0 to z1 - 1 lie in `planes`."""
        return np.arange(z0, z1) % len(self.planes)

    def advance(self, z0: int, z1: int) -> None:
        """Make the planes z0 to z1 - 1 present, at most `depth` of them. z0 never goes back; planes before it are
        forgotten.
        """
        start = max(self.stop, z0)
        for z in range(start, z1, self._step):
            end = min(z + self._step, z1)
            self.planes[self.slots(z, end)] = self._read_slab(z, end)[:, self._rows]
        self.stop = max(self.stop, z1)
