"""Meshes as a binary glTF 2.0 file (.glb), which browsers, Blender, ChimeraX and napari open.

Specification: https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html. One unit of the file is 1 Å. Axes are the
tomogram's, x, y, z, right-handed; viewers show +y upwards and look along -z, where pictures of slices have y downwards.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.label_colours import rgb
from services.io.isosurface import Mesh

_FLOAT, _UNSIGNED_INT = 5126, 5125
_VERTICES, _INDICES = 34962, 34963
_LINES, _TRIANGLES = 1, 4
_MOST_BYTES = 2**32 - 1


@dataclass(frozen=True)
class Shape:
    """What nodes place: a surface in its colour."""

    name: str
    mesh: Mesh
    colour: str
    """#rrggbb."""


@dataclass(frozen=True)
class Node:
    """A place of a shape."""

    name: str
    shape: int
    """Its number."""
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """x, y, z in Å."""
    rotation: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0)
    """Unit quaternion x, y, z, w, taken before the translation."""


@dataclass(frozen=True)
class Outline:
    """The edges of a box with corners at 0 and `size`, shifted by `origin`; x, y, z in Å."""

    name: str
    origin: tuple[float, float, float]
    size: tuple[float, float, float]


def encode_glb(
    shapes: Sequence[Shape], nodes: Sequence[Node], outline: Outline | None = None, about: str = ""
) -> bytes:
    """The file. The same scene gives the same bytes.

    Args:
        shapes: each is stored once, however many nodes have it.
        nodes: where shapes stand.
        outline: a box drawn as lines.
        about: what the file is, for whoever opens it.

    Raises InvalidArgument for what doesn't fit into the format's 4 GiB.
    """
    buffer = _Buffer()
    meshes = [_surface(buffer, number, shape) for number, shape in enumerate(shapes)]
    materials = [_material(shape.name, shape.colour) for shape in shapes]
    placed: list[dict[str, Any]] = [
        {
            "name": node.name,
            "mesh": node.shape,
            "translation": [round(part, 4) for part in node.translation],
            "rotation": _unit(node.rotation),
        }
        for node in nodes
    ]
    if outline is not None:
        placed.append({"name": outline.name, "mesh": len(meshes), "translation": list(outline.origin)})
        meshes.append(_edges(buffer, len(materials), outline))
        materials.append(_material(outline.name, "#808080"))
    root = {"name": about or "scene", "children": list(range(1, len(placed) + 1))}
    document = {
        "asset": {"version": "2.0", "generator": "Cryofleet", "extras": {"unit": "angstrom"}},
        "scene": 0,
        "scenes": [{"name": about or "scene", "nodes": [0]}],
        "nodes": [root, *placed],
        "meshes": meshes,
        "materials": materials,
        "accessors": buffer.accessors,
        "bufferViews": buffer.views,
        "buffers": [{"byteLength": buffer.length}],
    }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    total = 12 + 8 + len(text) + 8 + buffer.length
    if total > _MOST_BYTES:
        raise InvalidArgument(f"a scene of {total} bytes; a .glb file has at most {_MOST_BYTES}")
    return b"".join(
        [
            struct.pack("<4sII", b"glTF", 2, total),
            struct.pack("<I4s", len(text), b"JSON"),
            text,
            struct.pack("<I4s", buffer.length, b"BIN\0"),
            *buffer.pieces,
        ]
    )


class _Buffer:
    """The binary part of a file, and what says where in it each array is."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.length = 0
        self.views: list[dict[str, int]] = []
        self.accessors: list[dict[str, Any]] = []

    def add(self, array: NDArray[Any], kind: str, target: int, limits: bool = False) -> int:
        """The number of an accessor to an array of float32 or uint32, whose items are whole words as is asked for."""
        data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        accessor: dict[str, Any] = {
            "bufferView": len(self.views),
            "componentType": _FLOAT if array.dtype.kind == "f" else _UNSIGNED_INT,
            "count": len(array),
            "type": kind,
        }
        if limits:
            accessor |= {"min": array.min(axis=0).tolist(), "max": array.max(axis=0).tolist()}
        self.views.append({"buffer": 0, "byteOffset": self.length, "byteLength": len(data), "target": target})
        self.accessors.append(accessor)
        self.pieces.append(data)
        self.length += len(data)
        return len(self.accessors) - 1


def _surface(buffer: _Buffer, material: int, shape: Shape) -> dict[str, Any]:
    attributes = {
        "POSITION": buffer.add(shape.mesh.vertices, "VEC3", _VERTICES, limits=True),
        "NORMAL": buffer.add(shape.mesh.normals, "VEC3", _VERTICES),
    }
    indices = buffer.add(shape.mesh.triangles.reshape(-1), "SCALAR", _INDICES)
    primitive = {"attributes": attributes, "indices": indices, "material": material, "mode": _TRIANGLES}
    return {"name": shape.name, "primitives": [primitive]}


def _edges(buffer: _Buffer, material: int, outline: Outline) -> dict[str, Any]:
    corners = np.array([[x, y, z] for z in (0, 1) for y in (0, 1) for x in (0, 1)], np.float32)
    pairs = [(a, a | bit) for bit in (1, 2, 4) for a in range(8) if not a & bit]
    positions = buffer.add(corners * np.array(outline.size, np.float32), "VEC3", _VERTICES, limits=True)
    indices = buffer.add(np.array(pairs, np.uint32).reshape(-1), "SCALAR", _INDICES)
    primitive = {"attributes": {"POSITION": positions}, "indices": indices, "material": material, "mode": _LINES}
    return {"name": outline.name, "primitives": [primitive]}


def _material(name: str, colour: str) -> dict[str, Any]:
    # Colours of a file are linear in light, those of a screen are not: IEC 61966-2-1.
    shares = [part / 255 for part in rgb(colour)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    factor = [round(share, 5) for share in linear] + [1.0]
    return {
        "name": name,
        "pbrMetallicRoughness": {"baseColorFactor": factor, "metallicFactor": 0.0, "roughnessFactor": 0.7},
    }


def _unit(rotation: tuple[float, float, float, float]) -> list[float]:
    quaternion = np.array(rotation, np.float64)
    return [float(part) for part in np.round(quaternion / np.linalg.norm(quaternion), 7)]
