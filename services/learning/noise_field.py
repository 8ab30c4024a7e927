"""Noise for a volume of any size, of the voxels of one box of noise.

DUAL's noise generator makes a box, whose voxels are put in random order before they are added to a density map: what
they keep is their distribution. For a whole volume each voxel is drawn at random from that box. The numbers are those
of a counter-based generator (Philox; Salmon et al. 2011, SC11, doi:10.1145/2063384.2063405), whose counter is the
section: so a voxel's noise is the same whatever part of the volume is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.learning.dual import CODE_SIZE
from services.learning.training import generator_for

Array = NDArray[np.float32]
Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class NoiseField:
    """Noise (z, y, x) of sections (height, width), drawn from the values `pool` (n,); `numbers` are its seed."""

    pool: Array
    height: int
    width: int
    numbers: tuple[int, ...]

    def sections(self, first: int, last: int) -> Array:
        """Sections first <= z < last as (n, y, x)."""
        return np.stack([self._section(z) for z in range(first, last)])

    def _section(self, z: int) -> Array:
        key = np.random.SeedSequence(self.numbers).generate_state(2, np.uint64)
        drawn = np.random.Philox(counter=[0, 0, 0, z], key=key).random_raw(self.height * self.width)
        # The upper half of each number, times the pool's size, over 2^32.
        places = (drawn >> np.uint64(32)) * np.uint64(len(self.pool)) >> np.uint64(32)
        section: Array = self.pool[places].reshape(self.height, self.width)
        return section


def random_noise(
    noise: Callable[[Tensor], Tensor], shape: Shape, seed: int, number: int, device: torch.device
) -> NoiseField:
    """Noise for a volume (z, y, x), of the box that a noise generator on the device makes of a random code; each number
    has a code and noise of its own.
    """
    code = torch.randn(1, CODE_SIZE, generator=generator_for(seed, 7, number))
    with torch.inference_mode():
        pool: Array = noise(code.to(device)).float().cpu().numpy().reshape(-1)
    return NoiseField(pool, shape[1], shape[2], (seed, 8, number))
