"""Painted masks and pictures: read from files that may hold anything, and cut into patches."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cryofleet.errors import InvalidArgument
from cryofleet.progress import no_progress
from services.learning import painted, tomogram_scale
from services.learning.annotator import MARGIN

SHAPE = (5, 20, 30)


def save_mask(path: Path, mask: NDArray[np.generic]) -> Path:
    with mrcfile.new(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # not finite
        file.set_data(mask)
        file.voxel_size = 10.0
    return path


def test_pictures_of_all_kinds(tmp_path: Path) -> None:
    expected = np.zeros((20, 30), np.uint8)
    expected[2:5, 3:9], expected[10:14, 20:29] = 1, 2
    grey = np.choose(expected, [128, 255, 0]).astype(np.uint8)
    clear = np.where(expected == 0, 0, 255).astype(np.uint8)
    pictures = {
        "grey": Image.fromarray(grey),
        "16-bit": Image.fromarray(grey.astype(np.uint16) * 257),
        "colour": Image.fromarray(np.stack([grey] * 3, axis=2)),
        # Transparent, whatever its colour: white here.
        "transparent": Image.merge("LA", [Image.fromarray(np.where(expected == 2, 0, 255).astype(np.uint8)),
                                          Image.fromarray(clear)]),
        "palette": Image.fromarray(np.stack([grey] * 3, axis=2)).convert("P"),
    }  # fmt: skip
    red = np.stack([grey] * 3, axis=2)
    red[expected == 0] = (255, 0, 0)
    pictures["red"] = Image.fromarray(red)
    for name, picture in pictures.items():
        path = tmp_path / f"{name}.png"
        picture.save(path)
        assert painted.is_png(path)
        np.testing.assert_array_equal(painted.read_picture(path, name, (20, 30)), expected, err_msg=name)
    masks = np.zeros(SHAPE, np.uint8)
    painted.add_picture(masks, 3, tmp_path / "grey.png", "grey.png")
    np.testing.assert_array_equal(masks[3], expected)
    assert not masks[[0, 1, 2, 4]].any()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_pictures_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"

    def refused(data: bytes, word: str) -> None:
        path.write_bytes(data)
        with pytest.raises(InvalidArgument, match=word):
            painted.read_picture(path, "picture.png", (20, 30))

    def encoded(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    good = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30)).astype(np.uint8)))
    refused(encoded(Image.new("L", (20, 30))), r"20 x 30 pixels; the tomogram's sections are 30 x 20")
    refused(good[: len(good) // 2], "damaged")
    refused(b"\x89PNG\r\n\x1a\n", "damaged")
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    bomb = good[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    refused(bomb, "far more pixels")
    with pytest.raises(InvalidArgument, match="section 5; the tomogram has sections 0 to 4"):
        painted.add_picture(np.zeros(SHAPE, np.uint8), 5, path, "picture.png")
    # Whatever is done to a picture's bytes, it is read or refused.
    random = np.random.default_rng(1)
    for _ in range(150):
        data = bytearray(good)
        for place in random.integers(8, len(data), 3):
            data[place] = random.integers(256)
        path.write_bytes(data)
        with contextlib.suppress(InvalidArgument):
            painted.read_picture(path, "picture.png", (20, 30))


def test_masks(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, np.int8)
    mask[1, 2:4, 5:9], mask[3, 10, 11] = 1, 2
    masks = np.zeros(SHAPE, np.uint8)
    painted.add_mask(masks, save_mask(tmp_path / "a.mrc", mask), "a.mrc", tmp_path / "x")
    np.testing.assert_array_equal(masks, mask)
    more = np.zeros(SHAPE, np.float32)
    more[1, 3, 5:8], more[4, 0, 0] = 1, 2
    painted.add_mask(masks, save_mask(tmp_path / "b.mrc", more), "b.mrc", tmp_path / "x")
    np.testing.assert_array_equal(masks, np.maximum(mask, more))

    more[1, 3, 6] = 2
    with pytest.raises(InvalidArgument, match=r"c\.mrc: the voxel x=6, y=3, z=1 is painted as the feature in one"):
        painted.add_mask(masks, save_mask(tmp_path / "c.mrc", more), "c.mrc", tmp_path / "x")
    more[1, 3, 6] = 3
    with pytest.raises(InvalidArgument, match="x=6, y=3, z=1 is 3; a painted mask holds 1"):
        painted.add_mask(masks, save_mask(tmp_path / "d.mrc", more), "d.mrc", tmp_path / "x")
    more[1, 3, 6] = np.inf
    with pytest.raises(InvalidArgument, match="is inf"):
        painted.add_mask(masks, save_mask(tmp_path / "e.mrc", more), "e.mrc", tmp_path / "x")
    small = save_mask(tmp_path / "f.mrc", np.zeros((5, 10, 15), np.int8))
    with pytest.raises(InvalidArgument, match="15 x 10 x 5 voxels; the tomogram has 30 x 20 x 5"):
        painted.add_mask(masks, small, "f.mrc", tmp_path / "x")
    jpeg = tmp_path / "g.jpg"
    Image.new("L", (30, 20)).save(jpeg)
    with pytest.raises(InvalidArgument, match="JPEG"):
        painted.add_mask(masks, jpeg, "g.jpg", tmp_path / "x")


def test_patches_cover_what_is_painted() -> None:
    masks = np.zeros((6, 200, 240), np.uint8)
    masks[1, 10:74, 20:84] = 2
    masks[1, 30:40, 30:60] = 1
    masks[3, 150:153, 100:240] = 1  # wider than two patches, at the section's edge
    masks[4, 0:5, 0:5] = 2
    places = painted.place_patches(masks, 64, 0)
    assert (places[0].z, places[0].y, places[0].x) == (1, 10, 20), "a painted patch is a patch"
    assert (places[0].feature_voxels, places[0].other_voxels) == (300, 64 * 64 - 300)
    covered = np.zeros_like(masks)
    for place in places:
        covered[place.z, place.y : place.y + 64, place.x : place.x + 64] = 1
        assert 0 <= place.y <= 200 - 64
        assert 0 <= place.x <= 240 - 64
    assert covered[masks > 0].all()
    assert len(places) == 5


def test_what_can_not_be_learnt_from() -> None:
    masks = np.zeros((6, 100, 100), np.uint8)
    with pytest.raises(InvalidArgument, match="nothing is painted"):
        painted.place_patches(masks, 32, 0)
    masks[2, 10:20, 10:20] = 1
    with pytest.raises(InvalidArgument, match="what is not the feature is painted nowhere"):
        painted.place_patches(masks, 32, 0)
    masks[2, 10:20, 10:20] = 2
    with pytest.raises(InvalidArgument, match="the feature is painted nowhere"):
        painted.place_patches(masks, 32, 0)
    with pytest.raises(InvalidArgument, match="patch_size_voxels is 128; the tomogram's sections are 100 x 100"):
        painted.place_patches(masks, 128, 0)
    masks[2, 10:15, 10:20] = 1
    places = painted.place_patches(masks, 32, 0)
    with pytest.raises(InvalidArgument, match="fills 1 patch of 32 voxels"):
        painted.split_patches(places, 32, 0.1, 0)
    # A second patch that has nothing of the feature can't be held back, nor can the only one that has it.
    masks[5, 70:90, 70:90] = 2
    places = painted.place_patches(masks, 32, 0)
    rows, held_back = painted.split_patches(places, 32, 0.5, 0)
    assert ([places[row].feature_voxels > 0 for row in rows], len(held_back)) == ([True], 1)


def test_validation_overlaps_nothing_that_is_trained_on() -> None:
    random = np.random.default_rng(0)
    masks = np.zeros((40, 150, 150), np.uint8)
    for z, y, x in random.integers(0, (40, 120, 120), (60, 3)):
        masks[z, y : y + 30, x : x + 30] = 2
        masks[z, y + 10 : y + 20, x + 10 : x + 20] = random.integers(1, 3)
    places = painted.place_patches(masks, 32, 0)
    rows, held_back = painted.split_patches(places, 32, 0.1, 3)
    assert not set(rows) & set(held_back)
    assert len(held_back) == round(0.1 * len(places))
    assert any(places[row].feature_voxels for row in held_back)
    for row in rows:
        for other in held_back:
            a, b = places[row], places[other]
            assert abs(a.z - b.z) >= 8 or abs(a.y - b.y) >= 32 or abs(a.x - b.x) >= 32
    again = painted.split_patches(places, 32, 0.1, 3)
    np.testing.assert_array_equal(again[0], rows)
    assert not np.array_equal(painted.split_patches(places, 32, 0.1, 4)[1], held_back)

    shown = painted.balanced(rows, places)
    with_it = sum(places[row].feature_voxels > 0 for row in shown)
    assert with_it * 2 == len(shown)
    assert set(shown) == set(rows)


def test_patches_show_the_section_around_them() -> None:
    volume = np.random.default_rng(0).standard_normal((4, 60, 70)).astype(np.float32)
    masks = np.zeros(volume.shape, np.uint8)
    masks[2, 21:37, 30:46] = 1
    masks[3, 0:16, 0:16] = 2
    places = painted.place_patches(masks, 16, 0)
    scale = tomogram_scale.Scale(0.5, -2.0)
    arrays = painted.cut_patches(lambda a, b: volume[a:b], masks, places, 16, scale, no_progress)
    assert arrays["painted"][0].all()
    inner = volume[2, 21 - MARGIN : 37 + MARGIN, 30 - MARGIN : 46 + MARGIN]
    np.testing.assert_allclose(arrays["boxes"][0], (inner - 0.5) / -2, rtol=1e-6)
    corner = arrays["boxes"][1]
    np.testing.assert_array_equal(corner[:MARGIN], corner[MARGIN : 2 * MARGIN][::-1], "mirrored beyond the edge")
