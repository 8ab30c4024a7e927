"""Small structures and maps as the bytes of files."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
from numpy.typing import NDArray


def pdb_file(positions: NDArray[np.float64], element: str = "C", b_factor: float = 20.0, remarks: str = "") -> bytes:
    """A PDB file with one atom of an unknown residue, which gets no hydrogens, at each position."""
    lines = [
        f"HETATM{i + 1:5d}  {element:<2s}  UNX A{i + 1:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00{b_factor:6.2f}          "
        f"{element:>2s}"
        for i, (x, y, z) in enumerate(positions)
    ]
    return (remarks + "\n".join([*lines, "END"]) + "\n").encode()


def mrc_file(folder: Path, values: NDArray[np.float32], voxel_size_angstrom: float) -> bytes:
    """An MRC file as the mrcfile library writes it."""
    path = folder / "map.mrc"
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(values)
        mrc.voxel_size = voxel_size_angstrom
    return path.read_bytes()
