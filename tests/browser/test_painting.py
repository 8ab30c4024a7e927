"""Painting in a real browser: what is brushed on the screen is what is saved, and what annotate is given."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from numpy.typing import NDArray
from playwright.sync_api import Page, expect

from cryofleet.views.painted_sections import FEATURE, NOT_FEATURE, from_png
from tests.browser.conftest import Site
from tests.browser.looks import each_size, each_theme, looks_well, resize
from tests.browser.test_page import canvas, eventually, open_view, pane

pytestmark = pytest.mark.browser
WIDE, HIGH = 160, 144


def said(page: Page) -> str:
    return page.get_by_text(re.compile(r"voxels are it")).inner_text()


def drag(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one voxel (x, y) to another, on the slice perpendicular to z as it is shown at first."""
    box = canvas(page, "z").bounding_box()
    assert box is not None
    scale = min(box["width"] / WIDE, box["height"] / HIGH)
    left = box["x"] + (box["width"] - scale * WIDE) / 2
    top = box["y"] + (box["height"] - scale * HIGH) / 2
    (x1, y1), (x2, y2) = (((x + 0.5) * scale + left, (y + 0.5) * scale + top) for x, y in (start, end))
    page.mouse.move(x1, y1)
    page.mouse.down()
    page.mouse.move(x2, y2, steps=8)
    page.mouse.up()


def saved(page: Page, site: Site) -> tuple[dict[str, Any], dict[int, NDArray[np.uint8]]]:
    """What was saved last: the table, and the labels of the first feature's sections."""
    shown = page.get_by_text(re.compile(r"^saved as"))
    expect(shown).to_be_visible(timeout=30_000)
    with site.platform.client() as client:
        table = client.artifact(shown.inner_text().split("\n")[-1].strip()).to_json()
        first = table["features"][0]
        pictures = [client.artifact(uri).read() for uri in first["painted_uris"]]
    labels = [from_png(data, "picture", (HIGH, WIDE)) for data in pictures]
    return table, dict(zip(first["sections"], labels, strict=True))


def test_what_is_painted_is_saved_and_learnt(page: Page, site: Site) -> None:
    open_view(page, site, "painting")
    z = canvas(page, "z")
    expect(page.get_by_text(re.compile(r"^feature: 0 voxels are it"))).to_be_visible(timeout=20_000)
    drag(page, (40, 30), (80, 30))
    eventually(lambda: not said(page).startswith("feature: 0 "))
    expect(pane(page, "z")).to_have_attribute("data-painted", "28")
    # By keys: what it is not, with a smaller brush, at the crosshair, on the next section.
    for key in ("x", "[", "n", "p"):
        z.press(key)
    eventually(lambda: ", 0 are not" not in said(page))
    expect(pane(page, "z")).to_have_attribute("data-painted", "38")
    z.press("u")
    eventually(lambda: ", 0 are not" in said(page))
    z.press("r")
    eventually(lambda: ", 0 are not" not in said(page))
    z.press("s")
    table, labels = saved(page, site)
    assert table["volume"] == site.tomogram
    assert [(each["name"], each["sections"]) for each in table["features"]] == [("feature", [28, 38])]
    # A bar of 13 voxels' height around y 30, from x 34 to 86: as it was drawn on the screen, to a voxel.
    bar = np.argwhere(labels[28] == FEATURE)
    np.testing.assert_allclose([bar.min(axis=0), bar.max(axis=0)], [[24, 34], [36, 86]], atol=1.01)
    assert len(bar) == pytest.approx(40 * 13 + np.pi * 6**2, rel=0.1)
    dab = np.argwhere(labels[38] == NOT_FEATURE)
    np.testing.assert_allclose(dab.mean(axis=0), [72, 80], atol=0.01)  # the crosshair, in the middle
    # With Shift a drag moves the picture.
    page.keyboard.down("Shift")
    drag(page, (40, 100), (90, 100))
    page.keyboard.up("Shift")
    page.wait_for_timeout(300)
    assert "not saved" not in said(page)
    page.get_by_role("button", name="Start annotate").click()
    started = page.get_by_text(re.compile(r"^annotate-\S+: (queued|running|succeeded|failed)"))
    expect(started).to_be_visible(timeout=30_000)
    with site.platform.client() as client:
        run = client.get(started.inner_text().partition(":")[0]).cancel()
        arguments = json_format.MessageToDict(run.record.arguments)
    assert arguments["features"] == table["features"]
    assert arguments["painted"] == site.tomogram
    assert arguments["tomograms"] == [site.tomogram]


@each_theme
@each_size
def test_painting_looks_well(page: Page, site: Site, size: str, theme: str) -> None:
    resize(page, size)
    open_view(page, site, "painting", theme=theme)
    drag(page, (40, 30), (80, 40))
    canvas(page, "z").press("x")
    drag(page, (40, 80), (90, 100))
    eventually(lambda: ", 0 are not" not in said(page))
    looks_well(page, "painting", size, theme)
