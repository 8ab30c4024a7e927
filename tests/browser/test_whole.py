"""The whole way in a real browser: a run, its tomogram, picks on it, its clusters, and the average of a choice."""

from __future__ import annotations

import re
from urllib.parse import urlencode

import pytest
from google.protobuf import json_format
from playwright.sync_api import Page, expect

from cryofleet.particles import Particles
from tests.browser.conftest import Site
from tests.browser.test_page import COUNT, MARKUP, SLIDERS, canvas, count, eventually, number, open_view, pane, shown
from tests.platform import SMALL_DISCOVERY

pytestmark = pytest.mark.browser
CLUSTERS = 3


@pytest.fixture(scope="module")
def discovered(site: Site) -> str:
    """A run of discover, as `make demo` has one."""
    with site.platform.client() as client:
        run = client.run("discover", tomogram=site.tomogram, **{**SMALL_DISCOVERY, "clusters": CLUSTERS}).wait()
        assert run.state in ("succeeded", "partial")
        return run.id


def go_to(page: Page, view: str) -> None:
    """Click a view in the page's head."""
    page.locator("#header").get_by_role("button", name=view).click()


def test_from_a_run_to_the_average_of_a_choice(page: Page, site: Site, discovered: str) -> None:
    page.goto(f"{site.root}?run={discovered}")
    expect(page.get_by_text(re.compile(f"^{discovered}: (succeeded|partial)"))).to_be_visible()
    page.get_by_role("button", name="Look at it").click()
    expect(pane(page, "z")).to_have_attribute("data-shown", re.compile(r"\d+"), timeout=60_000)
    # Through z, slice by slice, back and on.
    for key, step in (("PageDown", -1), ("PageUp", 1)):
        for _ in range(4):
            before = shown(page, "z")
            canvas(page, "z").press(key)
            assert shown(page, "z") == before + step
    # Picks change with sigma, which the diameter says, and with the threshold.
    go_to(page, "Picking")
    page.get_by_role("button", name="Preview").click()
    expect(page.get_by_text(re.compile("^picked in planes"))).to_be_visible(timeout=30_000)
    sigma, picks = page.get_by_text(re.compile("^sigma ")), page.get_by_text(COUNT)
    wide, of_200 = sigma.inner_text(), picks.inner_text()
    number(page, "diameter", 120)
    eventually(lambda: sigma.inner_text() != wide and picks.inner_text() != of_200)
    before_cut = picks.inner_text()
    number(page, "threshold", 2)
    eventually(lambda: picks.inner_text() != before_cut)
    start = count(page)
    z = canvas(page, "z")
    for key, after in (("a", start + 1), ("ArrowLeft", start + 1), ("a", start + 2), ("d", start + 1)):
        z.press(key)
        eventually(lambda after=after: count(page) == after)  # type: ignore[misc]  # bound at once
    z.press("s")
    saved = page.get_by_text(re.compile(r"picks saved as"))
    expect(saved).to_be_visible(timeout=30_000)
    with site.platform.client() as client:
        table = Particles.from_parquet(client.artifact(saved.inner_text().split("\n")[-1].strip()).read())
    assert len(table) == start + 1
    # Two clusters of the run, averaged.
    go_to(page, "Clusters")
    expect(page.locator(".cell img[src]")).to_have_count(CLUSTERS, timeout=60_000)
    sheet = page.get_by_label("decoded cluster centres")
    sheet.focus()
    for key in (" ", "ArrowRight", " "):
        sheet.press(key)
    expect(page.locator('.cell[aria-selected="true"]')).to_have_count(2)
    page.get_by_label("Start from the choice").select_option("average")
    expect(page.get_by_label(re.compile("^Max candidates"))).to_be_attached()  # of the form of this pipeline
    page.get_by_role("heading", name="Further parameters").click()
    page.get_by_label(re.compile("^Iterations")).fill("1")
    page.get_by_role("button", name="Start", exact=True).click()
    started = page.get_by_text(re.compile(r"^average-\S+: "))
    expect(started).to_be_visible(timeout=30_000)
    run = started.inner_text().partition(":")[0]
    expect(page.get_by_text(f"{run}: succeeded")).to_be_visible(timeout=240_000)
    with site.platform.client() as client:
        arguments = json_format.MessageToDict(client.get(run).record.arguments)
        chosen = Particles.from_parquet(client.artifact(arguments["particles"]).read())
    assert len(chosen) > 0
    # And its average, as slices and as a surface.
    go_to(page, "Averages")
    expect(page.get_by_text(re.compile(r"standard deviations above the mean; encloses"))).to_be_visible(timeout=60_000)
    expect(pane(page, "z").first).to_have_attribute("data-shown", re.compile(r"\d+"), timeout=60_000)
    assert f"run={run}" in page.url


_FOCUSED = """() => {
  let at = document.activeElement
  while (at && at.shadowRoot && at.shadowRoot.activeElement) at = at.shadowRoot.activeElement
  if (!at) return ''
  const label = at.labels && at.labels.length ? at.labels[0].innerText : ''
  return [at.tagName, at.getAttribute('aria-label') || '', at.innerText || '', label, at.className].join('|')
}"""


def tab_to(page: Page, pattern: str, times: int = 1) -> None:
    """Press Tab until what is focused is like the pattern, for so many times."""
    for _ in range(150):
        page.keyboard.press("Tab")
        if re.search(pattern, page.evaluate(_FOCUSED)):
            times -= 1
            if not times:
                return
    pytest.fail(f"the Tab key does not lead to {pattern}")


def test_picking_needs_no_mouse(page: Page, site: Site) -> None:
    page.add_init_script("addEventListener('pointerdown', () => { window.pointed = true }, true)")
    open_view(page, site, "picking")
    tab_to(page, r"^BUTTON\|.*Preview")
    page.keyboard.press("Enter")
    eventually(lambda: count(page) > 0)
    found = count(page)
    # Of the numbers beside the sliders: the threshold's is the second.
    entries = page.locator(".slider-edit input")
    eventually(lambda: entries.count() >= len(SLIDERS))
    for _ in range(150):
        page.keyboard.press("Shift+Tab")
        if entries.nth(1).evaluate("entry => entry.matches(':focus')"):
            break
    page.keyboard.press("Control+a")
    page.keyboard.type("1")
    page.keyboard.press("Enter")
    eventually(lambda: count(page) > found)
    start = count(page)
    tab_to(page, r"^CANVAS\|slice perpendicular to z")
    before = shown(page, "z")
    page.keyboard.press("PageUp")
    assert shown(page, "z") == before + 1
    for key, after in (
        ("ArrowRight", start), ("Shift+ArrowDown", start), ("a", start + 1), ("Alt+ArrowUp", start + 1),
        ("u", start + 1), ("u", start), ("r", start + 1), ("n", start + 1), ("b", start + 1), ("Delete", start),
    ):  # fmt: skip
        page.keyboard.press(key)
        eventually(lambda after=after: count(page) == after)  # type: ignore[misc]  # bound at once
    page.keyboard.press("s")
    saved = page.get_by_text(re.compile(rf"^{start} picks saved as"))
    expect(saved).to_be_visible(timeout=30_000)
    assert page.evaluate("window.pointed") is None


@pytest.mark.parametrize("view", ["picking", "painting", "clusters", "averages"])
def test_names_with_markup_are_shown_in_every_view(page: Page, site: Site, view: str) -> None:
    names = {"view": view, "volume": f"file:///{MARKUP}.mrc", "particles": f"file:///{MARKUP}.parquet", "run": MARKUP}
    page.goto(f"{site.root}?{urlencode(names)}")
    # It is said which one does not exist, in the words that were given.
    expect(page.locator(".problem")).to_contain_text("onerror")
    expect(page.locator('img[src="x"]')).to_have_count(0)
    assert page.evaluate("window.ran") is None
