"""Image stacks open as what they are, and say what is wrong with them."""

from __future__ import annotations

import gzip
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.images import open_image_stack

PIXELS = np.random.default_rng(0).normal(size=(5, 6, 8)).astype(np.float32)


def stack_file(folder: Path, name: str, pixels: np.ndarray, pixel_size: float | None = 2.5) -> Path:
    path = folder / name
    with mrcfile.new(path) as file:
        file.set_data(pixels)
        file.set_image_stack()
        if pixel_size is not None:
            file.voxel_size = pixel_size
    return path


@pytest.mark.parametrize("name", ["series.st", "series.mrc", "series.mrcs"])
def test_a_stack_is_read_in_pieces(tmp_path: Path, name: str) -> None:
    with open_image_stack(stack_file(tmp_path, name, PIXELS), name, tmp_path) as stack:
        assert stack.shape == (5, 6, 8)
        assert stack.pixel_size() == 2.5
        assert stack.pixel_size(3.0) == 3.0
        np.testing.assert_array_equal(stack.read(1, 4), PIXELS[1:4])


def test_integers_and_gzip(tmp_path: Path) -> None:
    pixels = (PIXELS * 100).astype(np.int16)
    plain = stack_file(tmp_path, "series.mrc", pixels)
    packed = tmp_path / "series.mrc.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with open_image_stack(packed, "series.mrc.gz", tmp_path) as stack:
        np.testing.assert_array_equal(stack.read(0, 5), pixels.astype(np.float32))


def test_one_image_is_a_stack_of_one(tmp_path: Path) -> None:
    with open_image_stack(stack_file(tmp_path, "one.mrc", PIXELS[:1]), "one.mrc", tmp_path) as stack:
        assert stack.shape == (1, 6, 8)


def test_no_pixel_size(tmp_path: Path) -> None:
    with (
        open_image_stack(stack_file(tmp_path, "series.st", PIXELS, None), "series.st", tmp_path) as stack,
        pytest.raises(FailedPrecondition, match=r"series\.st.*pixel_size_angstrom"),
    ):
        stack.pixel_size()


def test_a_pixel_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = stack_file(tmp_path, "series.st", PIXELS)
    data = bytearray(path.read_bytes())
    at = 1024 + 4 * int(np.ravel_multi_index((3, 2, 1), PIXELS.shape))
    data[at : at + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with (
        open_image_stack(path, "series.st", tmp_path) as stack,
        pytest.raises(FailedPrecondition, match="image 3 holds nan at pixel x=1, y=2"),
    ):
        stack.read(0, 5)


def test_damaged_files(tmp_path: Path) -> None:
    path = stack_file(tmp_path, "series.st", PIXELS)
    cut = tmp_path / "cut.st"
    cut.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InvalidArgument, match=r"cut\.st: truncated"):
        open_image_stack(cut, "cut.st", tmp_path)
    text = tmp_path / "notes.st"
    text.write_text("these are my notes\n" * 100)
    with pytest.raises(InvalidArgument, match=r"notes\.st.*text"):
        open_image_stack(text, "notes.st", tmp_path)
