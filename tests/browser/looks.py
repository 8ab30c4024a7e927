"""Whether a page is fit to be looked at, and a picture of it for whoever wants to see for themselves."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from playwright.sync_api import Page

SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", "build/screenshots"))
SIZES = {"1280x800": (1280, 800), "1920x1080": (1920, 1080)}
_FAULTS = Path(__file__).with_name("looks.js").read_text()
_SECONDS = 15.0

each_size = pytest.mark.parametrize("size", list(SIZES))
each_theme = pytest.mark.parametrize("theme", ["default", "dark"])


def resize(page: Page, size: str) -> None:
    width, height = SIZES[size]
    page.set_viewport_size({"width": width, "height": height})


def looks_well(page: Page, name: str, size: str, theme: str) -> None:
    """Take a picture once nothing overlaps, is cut off or is hard to read any more; fail where that does not come."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + _SECONDS
    while faults := page.evaluate(_FAULTS):
        if time.monotonic() > end:
            page.screenshot(path=SCREENSHOTS / f"{name}-{size}-{theme}.png")
            pytest.fail(f"{name}: " + "\n".join(faults[:20]))
        page.wait_for_timeout(200)  # what has just come may not have its place yet
    page.screenshot(path=SCREENSHOTS / f"{name}-{size}-{theme}.png")
