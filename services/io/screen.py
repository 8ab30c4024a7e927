"""Pictures for a screen: a part of a slice, in as many pixels as are asked for, in few bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.label_colours import label_colour, rgb

_SAMPLES = 1 << 17
_QUALITIES = (85, 70, 55, 40, 25)
_SHRINK = 0.8
_LEAST_SIDE = 16


@dataclass(frozen=True)
class Region:
    """A part of a slice, in voxels."""

    first_row: int
    first_column: int
    rows: int
    columns: int

    def of(self, plane: NDArray[np.float32]) -> NDArray[np.float32]:
        """That part of a plane [row, column]."""
        rows = slice(self.first_row, self.first_row + self.rows)
        return plane[rows, self.first_column : self.first_column + self.columns]


def shrunk(picture: NDArray[np.float32], longest_side: int) -> NDArray[np.float32]:
    """The picture, averaged down where a side is longer."""
    rows, columns = picture.shape
    scale = longest_side / max(rows, columns)
    if scale >= 1:
        return picture
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    image = Image.fromarray(np.ascontiguousarray(picture))
    if columns % size[0] == 0 and rows % size[1] == 0:
        return np.asarray(image.reduce((columns // size[0], rows // size[1])), np.float32)  # the same, sooner
    return np.asarray(image.resize(size, Image.Resampling.BOX), np.float32)


def limits(picture: NDArray[np.float32], black_percentile: float, white_percentile: float) -> tuple[float, float]:
    """The values of black and white: percentiles of the picture, of a regular sample where it is large."""
    values = picture.ravel()
    step = -(-values.size // _SAMPLES)
    # No divisor of a row's length, so that the sample is not of a few columns.
    while step > 1 and picture.shape[1] % step == 0:
        step += 1
    black, white = (float(value) for value in np.percentile(values[::step], (black_percentile, white_percentile)))
    return (black, white) if white > black else (black - 0.5, black + 0.5)


def jpeg(levels: NDArray[np.uint8], max_bytes: int) -> bytes:
    """Grey values as JPEG of at most so many bytes: of a lower quality, and at last in fewer pixels, until it fits.

    A slice is mostly noise, of which lossless formats make several times that.
    """
    image = Image.fromarray(levels)
    while True:
        for quality in _QUALITIES:
            packed = io.BytesIO()
            image.save(packed, "JPEG", quality=quality)
            if packed.tell() <= max_bytes or max(image.size) <= _LEAST_SIDE:
                return packed.getvalue()
        width, height = (max(1, int(side * _SHRINK)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)


def labels_png(labels: NDArray[np.float32], longest_side: int, max_bytes: int, name: str) -> bytes:
    """Labels in their colours as PNG, 0 transparent, every n-th voxel where a side is longer.

    Raises InvalidArgument naming the volume where values are no labels.
    """
    step = max(1, -(-max(labels.shape) // longest_side))
    while True:
        values = labels[::step, ::step]
        whole = np.clip(values, 0, 65535).astype(np.uint16)
        if not np.array_equal(whole, values):
            raise InvalidArgument(f"{name}: labels must be whole numbers from 0 to 65535")
        present, places = np.unique(whole, return_inverse=True)
        colours = np.array([(*rgb(label_colour(int(label))), 255) if label else (0, 0, 0, 0) for label in present])
        packed = io.BytesIO()
        Image.fromarray(colours.astype(np.uint8)[places.reshape(whole.shape)]).save(packed, "PNG", compress_level=6)
        if packed.tell() <= max_bytes or max(values.shape) <= _LEAST_SIDE:
            return packed.getvalue()
        step += 1
