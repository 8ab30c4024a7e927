"""Boxes of a stack on the platform: those that are looked at are fetched, and no others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.client import Client
from cryofleet.errors import DataLoss, InvalidArgument
from cryofleet.views.gallery import grey_picture
from cryofleet.volumes import HEADER_BYTES, VolumeInfo, decode_header

MOST_BYTES = 16 << 20
"""Of a box."""
_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Boxes:
    """A stack of volumes, and where its voxels begin."""

    uri: str
    info: VolumeInfo
    start_bytes: int

    def __len__(self) -> int:
        return self.info.count or 1

    @property
    def box_bytes(self) -> int:
        return self.info.data_bytes // len(self)


def open_boxes(client: Client, uri: str) -> Boxes:
    """A stack by its URI. Raises InvalidArgument where a box has more than 16 MiB, and what a damaged header raises."""
    size = next((entry.size_bytes for entry in client.list(uri) if entry.uri == uri), 0)
    header = b"".join(client.download_chunks(uri, 0, HEADER_BYTES))
    boxes = Boxes(uri, *decode_header(header, size, uri))
    if boxes.box_bytes > MOST_BYTES:
        raise InvalidArgument(f"{uri} has boxes of more than {MOST_BYTES >> 20} MiB: the page shows none as large")
    return boxes


def read_box(client: Client, boxes: Boxes, place: int) -> NDArray[np.float32]:
    """The box `[z, y, x]` at a place in the stack, from 0. Raises DataLoss where not all of it comes."""
    start = boxes.start_bytes + place * boxes.box_bytes
    data = b"".join(client.download_chunks(boxes.uri, start, boxes.box_bytes))
    if len(data) != boxes.box_bytes:
        raise DataLoss(f"{boxes.uri}: {len(data)} bytes came where {boxes.box_bytes} were asked for")
    return np.frombuffer(data, "<f4").reshape(boxes.info.shape)


def sections_picture(box: NDArray[np.float32], contrast: str) -> NDArray[np.uint8]:
    """The central sections of a box `[z, y, x]` as one picture, protein bright: xy upper left, to its right zy, below
    it xz, and in the corner left over the mean along z.
    """
    values = -box if contrast == "dark" else box
    z, y, x = (side // 2 for side in box.shape)
    sections = (values[z], values[:, :, x].T, values[:, y], values.mean(axis=0))
    low, high = np.percentile(np.concatenate([section.ravel() for section in sections[:3]]), _PERCENTILES)
    upper_left, upper_right, lower_left, mean = (grey_picture(section, low, high) for section in sections)
    rows, columns = box.shape[1], box.shape[2]
    picture = np.zeros((rows + 1 + box.shape[0], columns + 1 + box.shape[0]), np.uint8)
    picture[:rows, :columns] = upper_left
    picture[:rows, columns + 1 :] = upper_right
    picture[rows + 1 :, :columns] = lower_left
    corner = picture[rows + 1 :, columns + 1 :]
    corner[: mean.shape[0], : mean.shape[1]] = mean[: corner.shape[0], : corner.shape[1]]
    return picture
