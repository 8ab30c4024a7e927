"""Pictures, movies and meshes over real gRPC: what is drawn of what is stored, and what is refused."""

from __future__ import annotations

import io
import struct
from typing import Any

import grpc
import numpy as np
import pytest
import trimesh
from google.protobuf.message import Message
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation
from skimage.filters import threshold_otsu

from cryofleet.artifacts import ResultWriter, content_digest, digest_of
from cryofleet.numerics.label_colours import CLASS_COLOURS, label_colour, rgb
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import io_pb2
from cryofleet.volumes import HEADER_BYTES, VolumeInfo, encode_volume, write_subtomograms
from services.io import isosurface
from services.io.figures import grey
from services.io.service import meshes, service
from tests.contract.conftest import channel_to

SHAPE, VOXEL = (40, 330, 340), 10.0
GOLDEN = ["d67c32d627a3aee4", "e7580685bd554e19"]
"""Of the pixels of a slice with circles, and of a scene: the digests' first 16 digits."""
RNG = np.random.default_rng(8)
VOXELS = RNG.normal(0, 1, SHAPE).astype(np.float32)

channel = channel_to(service)


def put(store: Store, name: str, data: bytes) -> str:
    writer = ResultWriter(store, "default", digest_of(data + name.encode()))
    uri = writer.put(name, data)
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0.0)
    return uri


def put_volume(
    store: Store, array: NDArray[np.floating], voxel: float = VOXEL, contrast: str = "dark", stack: bool = False
) -> str:
    count = len(array) if stack else None
    info = VolumeInfo(array.shape[-3:], voxel, contrast, count=count)
    return put(store, "volume.mrc", encode_volume(array.astype(np.float32), info))


def put_particles(store: Store, positions: Any, voxel_size: float = VOXEL, **columns: Any) -> str:
    own = {name: columns.pop(name) for name in ("id", "rotations") if name in columns}
    particles = Particles.from_positions(positions, voxel_size, "t", **own).with_columns(**columns)
    return put(store, "particles.parquet", particles.to_parquet())


def pixels(store: Store, uri: str) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(store.get(uri))) as image:
        return np.asarray(image)


async def refused(channel: grpc.aio.Channel, request: Message) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call_operation(channel, request)
    return error.value.code(), str(error.value.details())


@pytest.fixture
def tomogram(store: Store) -> str:
    return put_volume(store, VOXELS)


# --- DrawSlices ----------------------------------------------------------------------------------------------------


async def test_slices_with_picks_and_labels(channel: grpc.aio.Channel, store: Store, tomogram: str) -> None:
    labels = np.zeros(SHAPE, np.float32)
    labels[12, 200:220, 30:50] = 2
    # Picked in a volume of half the voxel size: (100, 150, 12) and (250, 80, 30) here. The third is elsewhere.
    picks = put_particles(
        store, [[200.0, 300.0, 22.0], [500.0, 160.0, 60.0], [900.0, 10.0, 10.0]], VOXEL / 2,
        class_id=np.array([4, 9, 9], np.int32), shift_x=[0.0, 0, 0], shift_y=[0.0, 0, 0], shift_z=[2.0, 0, 0],
    )  # fmt: skip
    request = io_pb2.DrawSlicesRequest(
        volume_uri=tomogram,
        positions_voxels=[12, 25],
        thickness_angstrom=30,
        particles_uri=picks,
        particle_diameter_angstrom=120,
        labels_uri=put_volume(store, labels, contrast="light"),
        label_names=["", "<b>membrane</b>"],
        protein_bright=True,
    )
    reply = await call_operation(channel, request)
    result = reply.result
    means = [VOXELS[11:14].mean(axis=0), VOXELS[24:27].mean(axis=0)]
    low, high = np.percentile(np.stack(means), (0.5, 99.5))
    assert (result.black_value, result.white_value) == (pytest.approx(low), pytest.approx(high))
    # The second pick lies at z 30, four sections from the last of the second slab: within its radius of six.
    assert result.circles == 2
    first, second = (pixels(store, uri) for uri in result.picture_uris)
    assert first.shape[1:] == second.shape[1:] == (340, 3)
    assert first.shape[0] > 330  # the footer
    np.testing.assert_array_equal(first[300:330, 200:340, 0], grey(means[0], low, high, True)[300:330, 200:340])
    assert np.abs(first[150, 106].astype(int) - rgb(CLASS_COLOURS[0])).max() < 40
    assert np.abs(second[80, 256].astype(int) - rgb(CLASS_COLOURS[1])).max() < 140  # fainter
    painted = np.rint((grey(means[0], low, high, True)[205, 35] + np.array(rgb(label_colour(2)))) / 2)
    np.testing.assert_allclose(first[205, 35], painted, atol=1)
    assert (await call_operation(channel, request)).provenance.cached


async def test_slices_along_all_axes_have_given_limits(channel: grpc.aio.Channel, store: Store, tomogram: str) -> None:
    for axis, shown in (
        (io_pb2.AXIS_Z, VOXELS[20]),
        (io_pb2.AXIS_Y, VOXELS[:, 165]),
        (io_pb2.AXIS_X, VOXELS[:, :, 170]),
    ):
        request = io_pb2.DrawSlicesRequest(
            volume_uri=tomogram, axis=axis, black_value=-3, white_value=2, plain=True, max_side_pixels=340
        )
        result = (await call_operation(channel, request)).result
        assert (result.black_value, result.white_value) == (-3, 2)
        np.testing.assert_array_equal(pixels(store, result.picture_uris[0]), grey(shown, -3, 2))


async def test_slices_that_cannot_be(channel: grpc.aio.Channel, store: Store, tomogram: str) -> None:
    ask = io_pb2.DrawSlicesRequest
    code, text = await refused(channel, ask(volume_uri=tomogram, positions_voxels=[40]))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "positions_voxels: 40 is not in" in text
    assert "40 voxels along z" in text
    for wrong in (
        {"black_percentile": 99.6},
        {"black_value": 1.0},
        {"black_value": 1.0, "white_value": 1.0},
        {"black_value": float("nan"), "white_value": 1.0},
        {"thickness_angstrom": -1.0},
        {"positions_voxels": [0] * 65},
    ):
        assert (await refused(channel, ask(volume_uri=tomogram, **wrong)))[0] == grpc.StatusCode.INVALID_ARGUMENT
    small = put_volume(store, np.zeros((4, 5, 6)))
    halves = put_volume(store, np.full(SHAPE, 0.5))
    strangers = put_particles(store, [[9999.0, 0.0, 0.0]])
    stack = put_volume(store, np.zeros((3, 4, 4, 4)), stack=True)
    broken = bytearray(encode_volume(VOXELS[:4], VolumeInfo((4, *SHAPE[1:]), VOXEL, "dark")))
    broken[HEADER_BYTES : HEADER_BYTES + 4] = struct.pack("<f", float("nan"))
    unsound = put(store, "unsound.mrc", bytes(broken))
    for request, status, words in (
        (ask(volume_uri=tomogram, labels_uri=small), "FAILED_PRECONDITION", "(4, 5, 6) voxels"),
        (ask(volume_uri=tomogram, labels_uri=halves), "INVALID_ARGUMENT", "whole numbers from 0 to 65535"),
        (ask(volume_uri=tomogram, particles_uri=strangers), "FAILED_PRECONDITION", "none of the 1 particles"),
        (ask(volume_uri=stack), "FAILED_PRECONDITION", "a stack of 3 boxes"),
        (ask(volume_uri=unsound, positions_voxels=[0]), "FAILED_PRECONDITION", "NaN or infinite: ingest the file"),
        (ask(volume_uri=tomogram, particles_uri=tomogram), "INVALID_ARGUMENT", "no Parquet table"),
    ):
        code, text = await refused(channel, request)
        assert code.name == status, text
        assert words in text


async def test_picks_of_several_tomograms_are_told_apart(
    channel: grpc.aio.Channel, store: Store, tomogram: str
) -> None:
    own = f"tomogram-{content_digest(store, tomogram)[:12]}"
    places = [[100.0, 100.0, 20.0], [200.0, 100.0, 20.0], [100.0, 200.0, 20.0]]
    mixed = put_particles(store, places, tomogram=np.array([own, "other", own], object))
    result = (await call_operation(channel, io_pb2.DrawSlicesRequest(volume_uri=tomogram, particles_uri=mixed))).result
    assert result.circles == 2
    none = put_particles(store, np.zeros((0, 3)))
    result = (await call_operation(channel, io_pb2.DrawSlicesRequest(volume_uri=tomogram, particles_uri=none))).result
    assert result.circles == 0


# --- DrawMovie -----------------------------------------------------------------------------------------------------


async def test_a_movie_along_z_and_x(channel: grpc.aio.Channel, store: Store, tomogram: str) -> None:
    picks = put_particles(store, [[100.0, 100.0, 20.0]])
    request = io_pb2.DrawMovieRequest(
        volume_uri=tomogram, first_voxel=4, last_voxel=35, max_frames=8, particles_uri=picks, max_side_pixels=170
    )
    result = (await call_operation(channel, request)).result
    assert result.frames == 8
    assert result.black_value < -1 < 1 < result.white_value
    with Image.open(io.BytesIO(store.get(result.movie_uri))) as opened:
        assert getattr(opened, "n_frames", 1) == 8
        opened.seek(4)
        shown = np.asarray(opened.convert("RGB"), float)[:165, :170]
        assert opened.info["duration"] == 67
    expected = VOXELS[20].reshape(165, 2, 170, 2).mean(axis=(1, 3))
    assert np.corrcoef(shown[100:, 100:].mean(axis=2).ravel(), expected[100:, 100:].ravel())[0, 1] > 0.9
    assert np.ptp(shown, axis=2)[45:55, 55:65].max() > 40  # the circle's colour, at half the size
    assert np.ptp(shown, axis=2)[100:, 100:].max() < 20

    sideways = io_pb2.DrawMovieRequest(volume_uri=tomogram, axis=io_pb2.AXIS_X, max_frames=5, plain=True)
    result = (await call_operation(channel, sideways)).result
    with Image.open(io.BytesIO(store.get(result.movie_uri))) as opened:
        assert (getattr(opened, "n_frames", 1), opened.size) == (5, (330, 40))
    code, text = await refused(channel, io_pb2.DrawMovieRequest(volume_uri=tomogram, first_voxel=9, last_voxel=3))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "first_voxel is 9 and last_voxel 3" in text


# --- DrawParticles -------------------------------------------------------------------------------------------------


def put_subtomograms(store: Store, boxes: NDArray[np.float32], **columns: Any) -> str:
    writer = ResultWriter(store, "default", digest_of(boxes.tobytes()))
    particles = Particles.from_positions(
        np.full((len(boxes), 3), 40.0), VOXEL, "t", id=np.arange(100, 100 + len(boxes)), **columns
    )
    uri = write_subtomograms(writer, store, "boxes", boxes, VolumeInfo(boxes.shape[1:], VOXEL, "dark"), particles)
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0.0)
    return uri


async def test_particles_by_score_and_by_a_later_table(channel: grpc.aio.Channel, store: Store) -> None:
    boxes = np.zeros((5, 32, 32, 32), np.float32) + np.arange(5, dtype=np.float32)[:, None, None, None]
    subtomograms = put_subtomograms(store, boxes, score=[0.2, 0.9, np.nan, 0.5, 0.1])

    async def shown(**options: Any) -> list[int]:
        """Which boxes are on the sheet, by their grey."""
        request = io_pb2.DrawParticlesRequest(
            subtomograms_uri=subtomograms, black_percentile=0, white_percentile=100, tile_pixels=32, **options
        )
        result = (await call_operation(channel, request)).result
        sheet = pixels(store, result.picture_uri)
        columns = {2: 2, 3: 2, 5: 3}[result.drawn]
        tiles = [sheet[4 + n // columns * 52 :, 4 + n % columns * 36 :][:32, :32] for n in range(result.drawn)]
        assert all(np.ptp(tile) == 0 for tile in tiles)
        return [int(tile[0, 0]) for tile in tiles]

    # Five levels from 0 to 255; a score that is no number comes last.
    assert await shown() == [64, 191, 0, 255, 128]
    assert await shown(max_particles=3, order=io_pb2.PARTICLE_ORDER_GIVEN) == [0, 128, 255]
    later = put_particles(store, np.zeros((2, 3)), id=[104, 101])
    assert await shown(particles_uri=later, protein_bright=True) == [0, 255]

    code, text = await refused(
        channel,
        io_pb2.DrawParticlesRequest(
            subtomograms_uri=subtomograms, particles_uri=later, order=io_pb2.PARTICLE_ORDER_SCORE
        ),
    )
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "has no scores" in text
    strangers = put_particles(store, np.zeros((3, 3)), id=[101, 7, 105])
    code, text = await refused(
        channel, io_pb2.DrawParticlesRequest(subtomograms_uri=subtomograms, particles_uri=strangers)
    )
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "2 of 3 particles, id 7 first, have no box" in text


# --- MakeMesh ------------------------------------------------------------------------------------------------------


def ball(radius: float, side: int = 32) -> NDArray[np.float32]:
    z, y, x = np.indices((side,) * 3) - side // 2
    values: NDArray[np.float32] = (radius - np.sqrt(x**2 + y**2 + z**2)).astype(np.float32)
    return values


async def test_meshes_of_either_contrast(channel: grpc.aio.Channel, store: Store) -> None:
    light = put_volume(store, ball(9), contrast="light")
    dark = put_volume(store, -ball(9), contrast="dark")
    results = []
    for uri, threshold in ((light, 1.0), (dark, -1.0)):
        request = io_pb2.MakeMeshRequest(volume_uri=uri, threshold=threshold)
        result = (await call_operation(channel, request)).result
        assert result.threshold == threshold
        assert result.volume_nm3 == pytest.approx(4 / 3 * np.pi * 8**3, rel=0.01)
        assert result.area_nm2 == pytest.approx(4 * np.pi * 8**2, rel=0.01)
        results.append(result)
    assert store.get(results[0].mesh_uri) == store.get(results[1].mesh_uri)
    scene = trimesh.load_scene(io.BytesIO(store.get(results[0].mesh_uri)), file_type="glb")
    assert scene.geometry["surface"].is_watertight
    assert len(scene.geometry["surface"].faces) == results[0].triangles
    by_weight = (
        await call_operation(channel, io_pb2.MakeMeshRequest(volume_uri=dark, molecular_weight_kda=1500))
    ).result
    assert by_weight.volume_nm3 == pytest.approx(1500 * 1.212, rel=0.02)
    assert by_weight.threshold < 0
    halfway = (await call_operation(channel, io_pb2.MakeMeshRequest(volume_uri=light, level=0.5))).result
    median, bright = np.quantile(ball(9), (0.5, 0.95))
    assert halfway.threshold == pytest.approx((median + bright) / 2, rel=1e-5)
    plain = (await call_operation(channel, io_pb2.MakeMeshRequest(volume_uri=dark))).result
    assert plain.threshold == pytest.approx(-threshold_otsu(ball(9)), abs=0.2)  # type: ignore[no-untyped-call]

    for wrong, words in (
        ({"volume_uri": light, "level": 0.5, "sigma": 2}, "at most one of"),
        ({"volume_uri": light, "threshold": 99}, "no surface has the threshold 99"),
        ({"volume_uri": light, "threshold": float("inf")}, "threshold"),
        ({"volume_uri": light, "colour": "red;"}, "colour"),
    ):
        code, text = await refused(channel, io_pb2.MakeMeshRequest(**wrong))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert words in text


# --- MakeScene -----------------------------------------------------------------------------------------------------


async def test_averages_at_their_particles(channel: grpc.aio.Channel, store: Store, tomogram: str) -> None:
    averages = [put_volume(store, ball(5, 16), 20.0, "light"), put_volume(store, -ball(3, 16), 20.0)]
    rotations = Rotation.random(6, rng=np.random.default_rng(3))
    positions = np.array([[50, 60, 10], [80, 200, 20], [300, 30, 30], [999, 0, 0], [10, 10, 10], [20, 30, 5]], float)
    columns: dict[str, Any] = {
        "class_id": np.array([3, 7, 7, 3, -1, 7], np.int32),
        "class_name": np.array(["ribosome", "", "", "ribosome", "", ""], object),
        "score": [0.9, 0.8, 0.1, 0.9, 0.9, 0.7],
        "shift_x": np.full(6, 0.5), "shift_y": np.zeros(6), "shift_z": np.zeros(6),
    }  # fmt: skip
    particles = put_particles(store, positions, rotations=rotations, **columns)
    request = io_pb2.MakeSceneRequest(
        particles_uri=particles, volume_uris=averages, tomogram_uri=tomogram, thresholds=[0, 0], max_particles=3
    )
    result = (await call_operation(channel, request)).result
    assert (result.placed, result.left_out, result.without_class, result.outside) == (3, 1, 1, 1)
    scene = trimesh.load_scene(io.BytesIO(store.get(result.scene_uri)), file_type="glb")
    assert set(scene.geometry) == {"ribosome", "class 8", "tomogram"}
    for row, name in ((0, "ribosome"), (1, "class 8"), (5, "class 8")):
        matrix, mesh = scene.graph.get(f"particle {row}")
        assert mesh == name
        np.testing.assert_allclose(np.asarray(matrix)[:3, 3], (positions[row] + [0.5, 0, 0]) * VOXEL, atol=1e-3)
        np.testing.assert_allclose(np.asarray(matrix)[:3, :3], rotations[row].as_matrix(), atol=1e-6)
    faces = {name: len(scene.geometry[name].faces) for name in ("ribosome", "class 8")}
    assert result.triangles == faces["ribosome"] + 2 * faces["class 8"]

    # Without the tomogram all places are the table's; unturned, all lie as they are, and a stack goes by numbers.
    stack = put_volume(store, np.stack([ball(radius, 16) for radius in range(1, 9)]), 20.0, "light", stack=True)
    loose = io_pb2.MakeSceneRequest(particles_uri=particles, volume_uris=[stack], poses=False, level=0.5)
    result = (await call_operation(channel, loose)).result
    assert (result.placed, result.outside) == (5, 0)
    scene = trimesh.load_scene(io.BytesIO(store.get(result.scene_uri)), file_type="glb")
    np.testing.assert_allclose(scene.geometry["class 8"].bounds[1], top_of(8), rtol=0.02)
    assert np.array_equal(np.asarray(scene.graph.get("particle 2")[0])[:3, :3], np.eye(3))


def top_of(radius: int) -> float:
    """Where the surface of a ball of the stack lies, halfway to the brightest, in Å."""
    median, bright = np.quantile(ball(radius, 16), (0.5, 0.95))
    return float(radius - (median + bright) / 2) * 20


async def test_scenes_that_cannot_be(
    channel: grpc.aio.Channel, store: Store, tomogram: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = io_pb2.MakeSceneRequest
    average = put_volume(store, ball(5, 16), contrast="light")
    flat = put_volume(store, np.ones((8, 8, 8)))
    noise = put_volume(store, VOXELS[:12, :12, :12])
    classes = put_particles(store, [[50.0, 60.0, 10.0]] * 2, class_id=np.array([0, 5], np.int32))
    some = (await call_operation(channel, ask(particles_uri=classes, volume_uris=[average]))).result
    assert (some.placed, some.without_class) == (1, 1)
    assert some.note == "1 particles are left out: there is no average of class 6"
    monkeypatch.setattr(isosurface, "MOST_VERTICES", 300)
    plain = put_particles(store, [[50.0, 60.0, 10.0]])
    nameless = put_particles(store, [[50.0, 60.0, 10.0]], class_id=np.array([-1], np.int32))
    mixed = put_particles(store, [[5.0, 6.0, 1.0]] * 2, tomogram=np.array(["a", "b"], object))
    for request, status, words in (
        (ask(particles_uri=plain, volume_uris=[]), "INVALID_ARGUMENT", "volume_uris"),
        (ask(particles_uri=plain, volume_uris=[average, average]), "INVALID_ARGUMENT", "has no classes"),
        (ask(particles_uri=plain, volume_uris=[average], thresholds=[1, 2]), "INVALID_ARGUMENT", "2 values for 1"),
        (ask(particles_uri=nameless, volume_uris=[average]), "FAILED_PRECONDITION", "nothing to place"),
        (ask(particles_uri=mixed, volume_uris=[average]), "FAILED_PRECONDITION", "of 2 tomograms: give tomogram_uri"),
        (ask(particles_uri=mixed, volume_uris=[average], tomogram_uri=tomogram), "FAILED_PRECONDITION", "none of"),
        (ask(particles_uri=plain, volume_uris=[flat]), "FAILED_PRECONDITION", "all voxels are"),
        (ask(particles_uri=plain, volume_uris=[noise], sigma=0), "INVALID_ARGUMENT", "300 are taken"),
    ):
        code, text = await refused(channel, request)
        assert code.name == status, text
        assert words in text


async def test_surfaces_that_are_too_many_together(
    channel: grpc.aio.Channel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    averages = [put_volume(store, ball(radius, 16), contrast="light") for radius in (4, 5, 6)]
    particles = put_particles(store, np.full((3, 3), 9.0), class_id=np.arange(3, dtype=np.int32))
    request = io_pb2.MakeSceneRequest(particles_uri=particles, volume_uris=averages, thresholds=[0, 0, 0])
    made = (await call_operation(channel, request)).result
    first, second, third = trimesh.load_scene(io.BytesIO(store.get(made.scene_uri)), file_type="glb").geometry.values()
    monkeypatch.setattr(meshes, "MOST_VERTICES", len(first.vertices) + len(second.vertices))
    request.max_particles = 4999  # not the same request
    code, text = await refused(channel, request)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "the first 3 of 3 surfaces have more than" in text
    assert len(third.vertices) > len(second.vertices) > len(first.vertices)


async def test_golden_outputs(channel: grpc.aio.Channel, store: Store) -> None:
    """The same as ever: where one of these digests changes, the operation's version must rise."""
    steps = (np.arange(24 * 30 * 40).reshape(24, 30, 40) * 37 % 101).astype(np.float32)
    volume = put_volume(store, steps)
    rotations = Rotation.from_quat([[0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5]])
    particles = put_particles(store, [[10.25, 20.5, 12.0], [30.0, 4.0, 14.0]], rotations=rotations, score=[0.5, 0.25])
    slices = io_pb2.DrawSlicesRequest(
        volume_uri=volume, particles_uri=particles, particle_diameter_angstrom=80, plain=True
    )
    drawn = pixels(store, (await call_operation(channel, slices)).result.picture_uris[0])
    average = put_volume(store, np.rint(ball(5, 16)), contrast="light")
    scene = io_pb2.MakeSceneRequest(particles_uri=particles, volume_uris=[average], thresholds=[0.5])
    made = store.get((await call_operation(channel, scene)).result.scene_uri)
    assert [digest_of(data)[:16] for data in (drawn.tobytes(), made)] == GOLDEN
