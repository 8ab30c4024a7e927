"""Surfaces of maps, and their files: closed, in their place, of the right size, and read by another library."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.io import isosurface as surfaces
from services.io.gltf import Node, Outline, Shape, encode_glb
from services.io.isosurface import Mesh, isosurface, threshold_of
from services.io.scene import Instances, encode_scene

VOXEL = 5.0
RNG = np.random.default_rng(11)


def ball(radius: float, side: int = 40) -> NDArray[np.float32]:
    """Positive within the radius about voxel side // 2, falling by 1 a voxel."""
    z, y, x = np.indices((side,) * 3) - side // 2
    values: NDArray[np.float32] = (radius - np.sqrt(x**2 + y**2 + z**2)).astype(np.float32)
    return values


def block(side: int = 24) -> NDArray[np.float32]:
    """1 in x 4-9, y 6-7, z 12-20, and 0 elsewhere."""
    volume = np.zeros((side,) * 3, np.float32)
    volume[12:21, 6:8, 4:10] = 1
    return volume


def is_closed(mesh: Mesh) -> bool:
    """Whether each edge of a triangle is that of just one other, which goes the other way."""
    corners = mesh.triangles.astype(np.int64)
    edges = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
    forth = np.sort(edges[:, 0] * len(mesh.vertices) + edges[:, 1])
    back = np.sort(edges[:, 1] * len(mesh.vertices) + edges[:, 0])
    return np.array_equal(forth, back) and len(np.unique(forth)) == len(forth)


# --- The surface ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [40, 41])
def test_a_ball(side: int) -> None:
    mesh = isosurface(ball(12, side), VOXEL, "threshold", 0.0).mesh
    radius_nm = 12 * VOXEL / 10
    assert mesh.volume_nm3() == pytest.approx(4 / 3 * np.pi * radius_nm**3, rel=0.01)
    assert mesh.area_nm2() == pytest.approx(4 * np.pi * radius_nm**2, rel=0.01)
    assert is_closed(mesh)
    outwards = mesh.vertices / np.linalg.norm(mesh.vertices, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=1), 12 * VOXEL, rtol=0.01)
    assert (mesh.normals * outwards).sum(axis=1).min() > 0.99
    np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-5)


def test_coarser_steps_keep_place_and_size() -> None:
    fine = isosurface(ball(14, 45), VOXEL, "threshold", 0.0).mesh
    coarse = isosurface(ball(14, 45), VOXEL, "threshold", 0.0, step_voxels=2).mesh
    assert is_closed(coarse)
    assert len(coarse.triangles) == pytest.approx(len(fine.triangles) / 4, rel=0.1)
    assert coarse.volume_nm3() == pytest.approx(fine.volume_nm3(), rel=0.05)
    np.testing.assert_allclose(coarse.vertices.mean(axis=0), 0, atol=0.01)


def test_a_mesh_is_where_the_map_is() -> None:
    mesh = isosurface(block(), VOXEL, "threshold", 0.5).mesh
    # Halfway to the next voxels, from the centre at voxel 12.
    np.testing.assert_allclose(mesh.vertices.min(axis=0), (np.array([3.5, 5.5, 11.5]) - 12) * VOXEL)
    np.testing.assert_allclose(mesh.vertices.max(axis=0), (np.array([9.5, 7.5, 20.5]) - 12) * VOXEL)


@pytest.mark.parametrize(
    "volume",
    [
        RNG.normal(0, 1, (17, 18, 19)),
        RNG.integers(0, 2, (17, 18, 19)),  # faces that can be cut in two ways
        np.rint(RNG.normal(0.5, 2, (17, 18, 19))) / 2,  # voxels on the threshold, and parts that reach the edge
    ],
    ids=["noise", "ties", "on the threshold"],
)
def test_any_surface_is_closed(volume: NDArray[Any]) -> None:
    mesh = isosurface(volume.astype(np.float32), VOXEL, "threshold", 0.5, smallest_part=0).mesh
    assert is_closed(mesh)
    assert mesh.volume_nm3() > 0


def test_small_parts_are_left_out() -> None:
    volume = ball(8)
    volume[2:4, 2:4, 2:4] = 5
    volume[36, 36, 36] = 5
    whole = isosurface(volume, VOXEL, "threshold", 0.0, smallest_part=0)
    cleaned = isosurface(volume, VOXEL, "threshold", 0.0, smallest_part=0.05)
    assert (whole.parts_left_out, cleaned.parts_left_out) == (0, 2)
    alone = isosurface(ball(8), VOXEL, "threshold", 0.0).mesh
    np.testing.assert_allclose(cleaned.mesh.vertices, alone.vertices, atol=1e-4)


def test_rules_for_the_threshold() -> None:
    volume = ball(12)
    assert threshold_of(volume, VOXEL, "sigma", 1.5) == pytest.approx(volume.mean() + 1.5 * volume.std(), rel=1e-5)
    median, bright = np.quantile(volume, (0.5, 0.95))
    assert threshold_of(volume, VOXEL, "level", 0.25) == pytest.approx(median + 0.25 * (bright - median), rel=1e-5)
    # GroEL's 800 kDa: 1.212 nm^3 each.
    found = isosurface(volume, VOXEL, "molecular_weight", 800.0)
    # Voxels as far from the centre are equal, and come or go by up to 96 of 7760.
    assert found.mesh.volume_nm3() == pytest.approx(800 * 1.212, rel=0.02)
    # Otsu's threshold divides two kinds of voxels, however few there are of one.
    assert threshold_of(block() + 3, VOXEL, "otsu", 0.0) == pytest.approx(3.5)
    # A structure of fewer voxels than 5% of the box lies halfway to the brightest.
    thin = np.zeros((20, 20, 20), np.float32)
    thin[10, 10, 5:15] = 8
    assert threshold_of(thin, VOXEL, "level", 0.5) == 4


def test_surfaces_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FailedPrecondition, match="all voxels are 3"):
        isosurface(np.full((8, 8, 8), 3, np.float32), VOXEL)
    with pytest.raises(InvalidArgument, match="threshold 99: voxels, protein positive, go from -"):
        isosurface(ball(12), VOXEL, "threshold", 99.0)
    with pytest.raises(InvalidArgument, match="no surface has the threshold 12:"):
        isosurface(ball(12), VOXEL, "threshold", 12 - 1e-9)
    with pytest.raises(InvalidArgument, match="no surface has the threshold"):
        isosurface(ball(12), VOXEL, "sigma", 50.0)
    with pytest.raises(InvalidArgument, match=r"1e\+07 kDa fill .* the box has 64000"):
        isosurface(ball(12), VOXEL, "molecular_weight", 1e7)
    with pytest.raises(InvalidArgument, match="take smaller steps"):
        isosurface(block(), VOXEL, "threshold", 0.9, step_voxels=8)
    monkeypatch.setattr(surfaces, "MOST_VERTICES", 1000)
    with pytest.raises(InvalidArgument, match="1000 are taken: smooth or bin"):
        isosurface(ball(12), VOXEL)


# --- The file ------------------------------------------------------------------------------------------------------


def parts_of(encoded: bytes) -> tuple[dict[str, Any], bytes]:
    """Document and binary part of a .glb, after the glTF 2.0 specification, section 4.4."""
    magic, version, length = struct.unpack_from("<4sII", encoded)
    assert (magic, version, length) == (b"glTF", 2, len(encoded))
    text_length, kind = struct.unpack_from("<I4s", encoded, 12)
    assert (kind, text_length % 4) == (b"JSON", 0)
    binary_length, kind = struct.unpack_from("<I4s", encoded, 20 + text_length)
    assert (kind, binary_length % 4) == (b"BIN\0", 0)
    binary = encoded[28 + text_length :]
    assert len(binary) == binary_length
    return json.loads(encoded[20 : 20 + text_length]), binary


def test_the_file_holds_the_mesh() -> None:
    mesh = isosurface(block(), VOXEL, "threshold", 0.5).mesh
    encoded = encode_glb(
        [Shape("a <b>", mesh, "#ff8000")], [Node("one", 0)], Outline("box", (-1, -2, -3), (40, 50, 60))
    )
    document, binary = parts_of(encoded)
    assert document["asset"]["version"] == "2.0"
    primitive = document["meshes"][0]["primitives"][0]

    def array(number: int, kind: str, dtype: str, width: int) -> NDArray[Any]:
        accessor = document["accessors"][number]
        view = document["bufferViews"][accessor["bufferView"]]
        assert accessor["type"] == kind
        assert accessor["componentType"] == {"<f4": 5126, "<u4": 5125}[dtype]
        assert view["byteOffset"] % 4 == 0
        assert view["byteLength"] == accessor["count"] * width * 4
        return np.frombuffer(binary, dtype, accessor["count"] * width, view["byteOffset"]).reshape(-1, width)

    positions = array(primitive["attributes"]["POSITION"], "VEC3", "<f4", 3)
    np.testing.assert_array_equal(positions, mesh.vertices)
    limits = document["accessors"][primitive["attributes"]["POSITION"]]
    assert limits["min"] == positions.min(axis=0).tolist()
    assert limits["max"] == positions.max(axis=0).tolist()
    np.testing.assert_array_equal(array(primitive["attributes"]["NORMAL"], "VEC3", "<f4", 3), mesh.normals)
    np.testing.assert_array_equal(array(primitive["indices"], "SCALAR", "<u4", 1).reshape(-1, 3), mesh.triangles)
    # sRGB 255, 128, 0 in linear light.
    assert document["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"] == [1.0, 0.21586, 0.0, 1.0]
    lines = document["meshes"][1]["primitives"][0]
    corners = array(lines["attributes"]["POSITION"], "VEC3", "<f4", 3)
    edges = corners[array(lines["indices"], "SCALAR", "<u4", 1).reshape(-1, 2)]
    assert lines["mode"] == 1
    assert sorted(np.abs(edges[:, 1] - edges[:, 0]).max(axis=1).tolist()) == [40] * 4 + [50] * 4 + [60] * 4


def test_another_library_reads_the_surface() -> None:
    mesh = isosurface(ball(12), VOXEL, "threshold", 0.0).mesh
    loaded = trimesh.load_scene(
        io.BytesIO(encode_glb([Shape("ball", mesh, "#e69f00")], [Node("ball", 0)])), file_type="glb"
    )
    found = loaded.geometry["ball"]
    assert found.is_watertight
    assert found.is_winding_consistent
    assert found.volume / 1000 == pytest.approx(mesh.volume_nm3(), rel=1e-5)
    assert found.area / 100 == pytest.approx(mesh.area_nm2(), rel=1e-5)


def place_of(scene: trimesh.Scene, node: str) -> tuple[NDArray[np.float64], str]:
    """A node's 4 x 4 matrix in the scene, and the name of its mesh."""
    matrix, mesh = scene.graph.get(node)
    return np.asarray(matrix), str(mesh)


def test_particles_stand_at_their_poses() -> None:
    meshes = [isosurface(volume, VOXEL, "threshold", 0.5).mesh for volume in (block(), ball(6, 24))]
    numbers, positions = RNG.integers(0, 2, 12), RNG.uniform(0, 3000, (12, 3))
    rotations = Rotation.random(12, rng=RNG)
    instances = Instances(numbers, positions, rotations, np.arange(100, 112))
    encoded = encode_scene(meshes, ["block", "ball"], ["#e69f00", "#56b4e9"], instances, (100, 200, 300), 10.0)
    assert encoded == encode_scene(meshes, ["block", "ball"], ["#e69f00", "#56b4e9"], instances, (100, 200, 300), 10.0)
    document, binary = parts_of(encoded)
    assert len(document["meshes"]) == 3  # each stored once, and the box
    assert len(binary) < 1.1 * sum(48 * len(mesh.vertices) for mesh in meshes) + 1000

    scene = trimesh.load_scene(io.BytesIO(encoded), file_type="glb")
    for row in range(12):
        transform, name = place_of(scene, f"particle {100 + row}")
        assert name == ("block", "ball")[numbers[row]]
        mesh = meshes[numbers[row]]
        expected = rotations[row].apply(mesh.vertices) + positions[row]
        found = mesh.vertices @ transform[:3, :3].T + transform[:3, 3]
        np.testing.assert_allclose(found, expected, atol=0.01)
    transform, _ = place_of(scene, "tomogram")
    # From edge to edge of the voxels.
    np.testing.assert_allclose(transform[:3, 3], -5)
    plain = Instances(numbers, positions, None, np.arange(12))
    untouched = encode_scene(meshes, ["block", "ball"], ["#e69f00", "#56b4e9"], plain, None, 10.0)
    assert all(node.get("rotation", [0, 0, 0, 1]) == [0, 0, 0, 1] for node in parts_of(untouched)[0]["nodes"])
