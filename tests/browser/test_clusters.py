"""Clusters in a real browser: looked at, chosen by keys and lasso, named, and given to a segmenter."""

from __future__ import annotations

import re
from urllib.parse import urlencode

import pytest
from google.protobuf import json_format
from playwright.sync_api import Page, expect

from tests.browser.conftest import Site
from tests.browser.looks import each_size, each_theme, looks_well, resize
from tests.browser.test_page import MARKUP

pytestmark = pytest.mark.browser
CLUSTERS = 6
SHEET = "decoded cluster centres"


@pytest.fixture(scope="module")
def mined(site: Site) -> str:
    """A run of mine-features."""
    finding = {"particle_diameter_angstrom": 200, "smoothing_angstrom": 15, "min_distance_angstrom": 100}
    with site.platform.client() as client:
        made = client.run(
            "mine-features", tomogram=site.tomogram, box_size_voxels=16, max_epochs=3, clusters=CLUSTERS, **finding
        )
        return made.wait().id


def open_clusters(page: Page, site: Site, run: str, **more: str) -> None:
    page.goto(f"{site.root}?{urlencode({'view': 'clusters', 'run': run, **more})}")
    expect(page.locator(".cell img[src]")).to_have_count(CLUSTERS, timeout=60_000)


def test_clusters_are_chosen_named_and_learnt(page: Page, site: Site, mined: str) -> None:
    open_clusters(page, site, mined)
    sheet = page.get_by_label(SHEET)
    cells = page.locator(".cell")
    # By keys: the first, and the two behind the second; then all but one.
    sheet.focus()
    for key in (" ", "ArrowRight", "ArrowRight", " ", "ArrowRight", "Shift+ "):
        sheet.press(key)
    expect(page.locator('.cell[aria-selected="true"]')).to_have_count(3)
    expect(cells.nth(1)).to_have_attribute("aria-selected", "false")
    expect(page.get_by_text(re.compile("^3 clusters chosen, "))).to_be_visible()
    page.get_by_label("Name of a group").fill(MARKUP)
    page.get_by_role("button", name="Put into the group").click()
    expect(page.get_by_text(f"{MARKUP}: 1,3-4")).to_be_visible()
    assert page.evaluate("window.ran") is None
    # By the lasso: around all centres.
    plot = page.get_by_label(re.compile("drag a lasso"))
    box = plot.bounding_box()
    assert box is not None
    left, top = box["x"] + 3, box["y"] + 3
    right, bottom = left + box["width"] - 6, top + box["height"] - 6
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom), (left, top + 5)):
        page.mouse.move(x, y, steps=3)
    page.mouse.up()
    expect(page.locator('.cell[aria-selected="true"]')).to_have_count(CLUSTERS)
    page.get_by_label("Name of a group").fill("others")
    sheet.press("Escape")
    expect(page.locator('.cell[aria-selected="true"]')).to_have_count(0)
    cells.nth(1).click()
    page.get_by_role("button", name="Put into the group").click()
    expect(page.get_by_text(re.compile("^others: 2 "))).to_be_visible()
    page.get_by_role("button", name="Start", exact=True).click()
    # The page goes over to the run.
    started = page.get_by_text(re.compile(r"^segment-weakly-\S+: (queued|running|succeeded)"))
    expect(started).to_be_visible(timeout=30_000)
    with site.platform.client() as client:
        run = client.get(started.inner_text().partition(":")[0]).cancel()
        arguments = json_format.MessageToDict(run.record.arguments)
    assert arguments["groups"] == [f"{MARKUP}:1,3-4", "others:2"]
    assert arguments["box_size_voxels"] == 16
    assert arguments["tomograms"] == [site.tomogram]


@each_theme
@each_size
def test_clusters_look_well(page: Page, site: Site, mined: str, size: str, theme: str) -> None:
    resize(page, size)
    open_clusters(page, site, mined, theme=theme)
    cells = page.locator(".cell")
    for name, number in (("membrane", 0), ("ribosome", 2)):
        page.get_by_label(SHEET).press("Escape")
        cells.nth(number).click()
        page.get_by_label("Name of a group").fill(name)
        page.get_by_role("button", name="Put into the group").click()
        expect(page.get_by_text(re.compile(f"^{name}: {number + 1}"))).to_be_visible()
    looks_well(page, "clusters", size, theme)


def test_runs_with_clusters_are_offered(page: Page, site: Site, mined: str) -> None:
    # Whatever run was looked at before.
    page.goto(f"{site.root}?{urlencode({'view': 'clusters', 'run': site.run})}")
    expect(page.locator(".cell img[src]")).to_have_count(CLUSTERS, timeout=60_000)
    expect(page.get_by_label("Run", exact=True)).to_have_value(re.compile(".+"))
    expect(page.get_by_role("option", name=mined)).to_be_attached()
