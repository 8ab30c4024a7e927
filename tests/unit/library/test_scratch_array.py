from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from cryofleet.errors import ResourceExhausted
from cryofleet.scratch_array import ScratchVolume, reserved_array


def test_the_disk_space_is_claimed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "array"
    array = reserved_array(path, (100, 1000), np.float32)
    assert path.stat().st_blocks * 512 >= 400_000, "the file is not sparse"
    assert array.shape == (100, 1000)
    assert array.dtype == np.dtype(np.float32)
    assert not array.any()
    array[99] = 1
    array.flush()
    assert np.fromfile(path, np.float32)[-1000:].tolist() == [1.0] * 1000


def test_a_full_disk_is_told_before_anything_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceExhausted, match=f"{tmp_path} has no room for a temporary file of 800 bytes"):
        reserved_array(tmp_path / "array", (10, 10), np.float64)
    assert list(tmp_path.iterdir()) == []


def test_rows_and_sections_of_one_volume(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 7, 6)).astype(np.float32)
    path = tmp_path / "v.f32"
    with ScratchVolume(path, values.shape) as volume:
        assert not volume.sections(0, 5).any()
        for first in range(0, 7, 3):
            volume.write_rows(first, values[:, first : first + 3])
        np.testing.assert_array_equal(volume.sections(1, 4), values[1:4])
        np.testing.assert_array_equal(volume.rows(2, 5), values[:, 2:5])
        volume.write_section(2, -values[2])
        np.testing.assert_array_equal(volume.sections(2, 3)[0], -values[2])
        np.testing.assert_array_equal(volume.rows(6, 7)[[1, 3]], values[[1, 3], 6:7])
    assert not path.exists()


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ResourceExhausted, match="no room for a temporary file of 96 bytes"):
        ScratchVolume(tmp_path / "v.f32", (2, 3, 4))
    assert not list(tmp_path.iterdir())
