"""Averages in the tomogram: each one's surface at the poses of its particles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from services.io.gltf import Node, Outline, Shape, encode_glb
from services.io.isosurface import Mesh

NODE_BYTES = 2000
"""Of a node while a file is put together."""


@dataclass(frozen=True)
class Instances:
    """Where surfaces stand."""

    numbers: NDArray[np.int64]
    """(n,) which surface."""
    positions: NDArray[np.float64]
    """(n, 3) x, y, z in Å, where each box's centre comes to lie."""
    rotations: Rotation | None
    """n of them, the surface onto the particle; None leaves all as they are."""
    ids: NDArray[np.int64]
    """(n,) of the particles."""


def encode_scene(
    meshes: Sequence[Mesh],
    names: Sequence[str],
    colours: Sequence[str],
    instances: Instances,
    tomogram_shape: tuple[int, int, int] | None,
    voxel_size_angstrom: float,
) -> bytes:
    """A binary glTF file in which a mesh is stored once and stands at each of its particles.

    Args:
        meshes: of the classes.
        names: theirs.
        colours: theirs, as #rrggbb.
        instances: in the order in which they are to stand in the file.
        tomogram_shape: (z, y, x) of the tomogram, whose box is drawn; None leaves it out.
        voxel_size_angstrom: of the tomogram.
    """
    shapes = [Shape(name, mesh, colour) for name, mesh, colour in zip(names, meshes, colours, strict=True)]
    count = len(instances.numbers)
    quaternions = np.tile((0.0, 0.0, 0.0, 1.0), (count, 1))
    if instances.rotations is not None and count:
        quaternions = instances.rotations.as_quat()
    nodes = [
        Node(f"particle {number}", shape, (x, y, z), (qx, qy, qz, qw))
        for number, shape, (x, y, z), (qx, qy, qz, qw) in zip(
            instances.ids.tolist(),
            instances.numbers.tolist(),
            instances.positions.tolist(),
            quaternions.tolist(),
            strict=True,
        )
    ]
    outline = None
    if tomogram_shape is not None:
        # From edge to edge: the first voxel's centre is at 0.
        depth, height, width = (side * voxel_size_angstrom for side in tomogram_shape)
        half = -voxel_size_angstrom / 2
        outline = Outline("tomogram", (half, half, half), (width, height, depth))
    return encode_glb(shapes, nodes, outline, "particles in their tomogram")
