"""The averages of a run in a real browser: slices, surface, figures, and the way into the tomogram."""

from __future__ import annotations

import re
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Site
from tests.browser.looks import each_size, each_theme, looks_well, resize
from tests.browser.test_page import eventually, pane
from tests.platform import SMALL_DISCOVERY

pytestmark = pytest.mark.browser
CUT = re.compile(r"standard deviations above the mean; encloses")


@pytest.fixture(scope="module")
def averaged(site: Site) -> str:
    """A run that picked, clustered and averaged."""
    with site.platform.client() as client:
        return client.run("discover", tomogram=site.tomogram, **SMALL_DISCOVERY).wait().id


def open_averages(page: Page, site: Site, run: str, **more: str) -> None:
    page.goto(f"{site.root}?{urlencode({'view': 'averages', 'run': run, **more})}")
    expect(page.get_by_text(CUT)).to_be_visible(timeout=30_000)


def test_an_average_is_looked_at_from_all_sides(page: Page, site: Site, averaged: str) -> None:
    open_averages(page, site, averaged)
    for axis in "xyz":
        expect(pane(page, axis)).to_have_attribute("data-shown", "8", timeout=20_000)
    expect(page.get_by_text(re.compile(r"^Resolution: .*0\.143.*0\.5"))).to_be_visible(timeout=20_000)
    expect(page.get_by_text(re.compile(r"^Sides that the beam saw, z upwards: \d+ particles"))).to_be_visible()
    expect(page.get_by_label("classes by step")).to_be_visible(timeout=20_000)
    surface = page.locator(".surface > .surface")
    expect(surface).to_have_attribute("data-voxels", str(16**3))
    eventually(lambda: int(surface.get_attribute("data-drawn") or 0) > 500)
    page.wait_for_timeout(500)  # until it is drawn finely
    before = surface.get_attribute("data-drawn")
    canvas = surface.locator("canvas")
    canvas.press("ArrowRight")
    eventually(lambda: surface.get_attribute("data-drawn") not in (before, ""))
    said = page.get_by_text(CUT).inner_text()
    # A higher threshold encloses less.
    page.locator(".noUi-handle").first.press("ArrowRight")
    eventually(lambda: page.get_by_text(CUT).inner_text() != said)


def test_an_average_goes_back_into_its_tomogram(page: Page, site: Site, averaged: str) -> None:
    open_averages(page, site, averaged)
    page.get_by_role("button", name="Map back").click()
    expect(page.get_by_text(re.compile(r"^map-back-\S+"))).to_be_visible(timeout=20_000)
    # When it has ended, the tomogram can be seen with labels over it, and their particles.
    show = page.get_by_role("button", name="Show labels")
    expect(show).to_be_visible(timeout=90_000)
    show.click()
    page.wait_for_url(re.compile(r"view=tomogram.*particles=.*labels="), wait_until="commit")
    expect(pane(page, "z")).to_have_attribute("data-shown", re.compile(r"\d+"), timeout=30_000)


def test_contrast_is_that_of_the_planes_shown(page: Page, site: Site, averaged: str) -> None:
    # The first plane asked for says what is black and white on all of them: it must not be one that nobody looks at.
    asked: list[str] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda frame: asked.append(str(frame))))
    open_averages(page, site, averaged)
    for axis in "xyz":
        expect(pane(page, axis)).to_have_attribute("data-shown", "8", timeout=20_000)
    planes = [found for each in asked for found in re.findall(r'"want"\],\["position",(\d+)\]', each)]
    assert len(planes) >= 3
    assert set(planes) == {"8"}


def test_a_run_without_averages_says_so(page: Page, site: Site) -> None:
    page.goto(f"{site.root}?{urlencode({'view': 'averages', 'run': site.run})}")
    expect(page.get_by_text(f"Run {site.run} has no averages.").first).to_be_visible(timeout=20_000)


@each_theme
@each_size
def test_averages_look_well(page: Page, site: Site, averaged: str, size: str, theme: str) -> None:
    resize(page, size)
    open_averages(page, site, averaged, theme=theme)
    expect(page.get_by_label("classes by step")).to_be_visible(timeout=20_000)
    looks_well(page, "averages", size, theme)
    page.goto(f"{site.root}?{urlencode({'view': 'averages', 'theme': theme})}")
    expect(page.get_by_text("No run is chosen")).to_be_visible(timeout=20_000)
    looks_well(page, "no-averages", size, theme)
