"""Sections side by side, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PANEL_PIXELS = 384
"""Panels are enlarged or shrunk to about this height."""
GAP = 8
CAPTION = 24


def picture(panels: Sequence[tuple[str, NDArray[np.floating]]]) -> bytes:
    """A PNG of sections [y, x] in a row, each under its name; black and white are its percentiles 0.5 and 99.5."""
    tiles = [_tile(section) for _, section in panels]
    width = sum(tile.width + GAP for tile in tiles) - GAP
    sheet = Image.new("L", (width, CAPTION + max(tile.height for tile in tiles)), 255)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    x = 0
    for (name, _), tile in zip(panels, tiles, strict=True):
        pen.text((x, 2), name, fill=0, font=font)
        sheet.paste(tile, (x, CAPTION))
        x += tile.width + GAP
    packed = io.BytesIO()
    sheet.save(packed, "PNG", compress_level=9)
    return packed.getvalue()


def _tile(section: NDArray[np.floating]) -> Image.Image:
    low, high = (float(limit) for limit in np.percentile(section, (0.5, 99.5)))
    grey = np.rint(255 * np.clip((section - low) / max(high - low, 1e-12), 0, 1)).astype(np.uint8)
    image = Image.fromarray(grey)
    scale = PANEL_PIXELS / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST)
