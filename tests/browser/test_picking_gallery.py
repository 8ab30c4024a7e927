"""The gallery of picks in a real browser: sorted, rejected many at once without a mouse, and saved."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from cryofleet.particles import Particles
from tests.browser.conftest import Site
from tests.browser.test_page import count, eventually, open_view

pytestmark = pytest.mark.browser


def test_many_are_rejected_by_keyboard(page: Page, site: Site) -> None:
    with site.platform.client() as client:
        table = client.get(site.run).outputs["picks"][0].uri
        before = Particles.from_parquet(client.artifact(table).read()).table
    open_view(page, site, "picking", particles=table)
    # All of a table are shown at first, whatever their scores.
    eventually(lambda: count(page) == len(before))
    page.get_by_role("button", name="Gallery").press("Enter")
    sheet = page.get_by_role("listbox", name="picks, the best first")
    expect(sheet).to_be_visible(timeout=20_000)
    cells = sheet.get_by_role("option")
    eventually(lambda: cells.count() == len(before))
    ranked = before.sort_values("score", ascending=False)["id"].tolist()
    expect(cells.first).to_contain_text(f"pick {ranked[0]}")
    eventually(lambda: bool(cells.first.evaluate("cell => cell.querySelector('img').naturalWidth > 0")))
    sheet.focus()
    sheet.press("Space")
    sheet.press("ArrowRight")
    sheet.press("ArrowRight")
    sheet.press("Shift+Space")
    sheet.press("d")
    eventually(lambda: count(page) == len(before) - 3)
    sheet.press("u")
    eventually(lambda: count(page) == len(before))
    sheet.press("r")
    eventually(lambda: count(page) == len(before) - 3)
    sheet.press("s")
    saved = page.get_by_text(re.compile(r"picks saved as"))
    expect(saved).to_be_visible(timeout=20_000)
    with site.platform.client() as client:
        kept = Particles.from_parquet(client.artifact(saved.inner_text().split("\n")[-1].strip()).read()).table
    assert sorted(kept["id"]) == sorted(ranked[3:])


def test_how_many_are_background_is_estimated_or_why_not(page: Page, site: Site) -> None:
    with site.platform.client() as client:
        table = client.get(site.run).outputs["picks"][0].uri
        picks = len(Particles.from_parquet(client.artifact(table).read()))
    open_view(page, site, "picking", particles=table)
    eventually(lambda: count(page) == picks)
    page.get_by_role("button", name="Estimate false positives").click()
    # Few picks show no distribution.
    answer = "too few to measure" if picks < 50 else "Expected false positives above the threshold"
    expect(page.get_by_text(re.compile(answer)).first).to_be_visible(timeout=30_000)
