"""A walk through a volume along an axis, as an animated WebP.

WebP, as every browser shows it and Pillow writes it; MP4 would need an encoder from outside.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cryofleet.progress import Progress, no_progress
from cryofleet.scratch_array import ScratchVolume
from services.io import figures
from services.io.drawing import pixels_per_voxel
from services.io.slices import Axis, Picture, ReadSlab, Shape, Slab, mean_slices, picture_shape, slab_at

_SAMPLED_FRAMES = 16
_ROWS_BYTES = 64 << 20


def frame_slabs(shape: Shape, axis: Axis, first: int, last: int, thickness_voxels: float, most: int) -> list[Slab]:
    """What each frame shows: every section first <= i < last, or every n-th where there are more than `most`."""
    every = max(1, -(-(last - first) // most))
    return [slab_at(shape, axis, position, thickness_voxels) for position in range(first, last, every)]


@contextmanager
def open_frames(
    read: ReadSlab, shape: Shape, slabs: list[Slab], scratch: Path, progress: Progress = no_progress
) -> Iterator[Callable[[int], Picture]]:
    """Gives the slices of a movie one at a time, in any order.

    Along z they are read when asked for. Along y and x the volume is read once, as all of them cross each of its
    sections, and they wait in a file of the folder `scratch`.
    """
    if slabs[0].axis == "z":
        yield lambda number: mean_slices(read, shape, [slabs[number]])[0]
        return
    depth, height, width = shape
    across = width if slabs[0].axis == "y" else height
    step = max(1, _ROWS_BYTES // (4 * height * width))
    with ScratchVolume(scratch / "frames", (len(slabs), depth, across)) as waiting:
        for start in range(0, depth, step):
            stop = min(start + step, depth)
            sections = read(start, stop)
            waiting.write_rows(start, np.stack(_slices_of(sections, slabs)))
            progress(stop / depth, "reading")
        yield lambda number: waiting.sections(number, number + 1)[0]


def _slices_of(sections: NDArray[np.float32], slabs: list[Slab]) -> list[Picture]:
    depth, height, width = sections.shape
    return mean_slices(lambda first, last: sections[first:last], (depth, height, width), slabs)


def sampled_limits(
    frame: Callable[[int], Picture], count: int, percentiles: tuple[float, float]
) -> tuple[float, float]:
    """Black and white by percentiles of frames spread over the movie."""
    spread = np.unique(np.linspace(0, count - 1, min(count, _SAMPLED_FRAMES)).round().astype(int))
    return figures.limits([frame(int(number)) for number in spread], *percentiles)


class _Frames(Image.Image):
    """A picture of several frames, each drawn when it is its turn, so that one is held at a time."""

    def __init__(self, image: Callable[[int], Image.Image], count: int) -> None:
        super().__init__()
        self._image, self.n_frames, self._number = image, count, -1
        self.seek(0)

    def seek(self, frame: int) -> None:
        if frame == self._number:
            return
        shown = self._image(frame).convert("RGB")
        self.im, self._mode, self._size, self._number = shown.im, shown.mode, shown.size, frame

    def tell(self) -> int:
        return self._number


def animated_webp(
    image: Callable[[int], Image.Image],
    count: int,
    frames_per_second: float,
    quality: int,
    progress: Progress = no_progress,
) -> bytes:
    """Frames, all of one size, as a WebP that plays again and again.

    Args:
        image: draws a frame.
        count: of the frames.
        frames_per_second: rounded to whole milliseconds a frame.
        quality: 0 to 100; noise takes many bytes at a high one.
        progress: called before each frame.
    """

    def drawn(number: int) -> Image.Image:
        progress(number / count, "drawing", frames=number)
        return image(number)

    packed = io.BytesIO()
    _Frames(drawn, count).save(
        packed,
        "WEBP",
        save_all=True,
        duration=max(1, round(1000 / frames_per_second)),
        loop=0,
        quality=quality,
        method=2,
    )
    return packed.getvalue()


def memory_bytes(shape: Shape, axis: Axis, frames: int, longest_side: int) -> int:
    """What reading, drawing and encoding need at most.

    White noise takes a byte for each pixel, and the encoded frames are there three times when they become a file.
    """
    rows, columns = picture_shape(shape, axis)
    reading = 3 * max(_ROWS_BYTES, 4 * shape[1] * shape[2]) + 24 * rows * columns
    sample = 8 * min(frames, _SAMPLED_FRAMES) * rows * columns
    scale = pixels_per_voxel(rows, columns, longest_side)
    return reading + sample + round((3 * frames + 20) * scale**2 * rows * columns)
