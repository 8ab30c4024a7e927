"""A platform with its page, a tomogram with picks on it, and a browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from cryofleet import local
from tests.platform import SMALL_SCENE, Platform, running_platform

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
expect.set_options(timeout=20_000)


@dataclass(frozen=True)
class Site:
    """A platform, the address of its page, and what is on it."""

    platform: Platform
    url: str
    run: str
    tomogram: str

    @property
    def root(self) -> str:
        return self.url.partition("login")[0]


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    with running_platform(PAGE="localhost:0") as platform, platform.client() as client:
        scene = {**SMALL_SCENE, "size_x": 160, "size_y": 144, "size_z": 56}
        made = client.run("simulate-tomogram", **scene).wait()
        tomogram = made.outputs["tomogram"].uri
        run = client.run("pick-dog", tomograms=[tomogram], particle_diameter_angstrom=200).wait()
        yield Site(platform, local.page_url(platform.settings), run.id, tomogram)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        pytest.fail(f"there is no browser at {CHROMIUM}: make test-browser installs one")
    with sync_playwright() as playwright:
        # In a container there is no user namespace for Chromium's own sandbox; it opens this page alone.
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """Signed in, on nothing yet; a script that fails, or a request that leaves the machine, fails the test."""
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        opened = context.new_page()
        wrong: list[str] = []
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on("requestfailed", lambda request: wrong.append(request.url) if site.root not in request.url else None)
        opened.goto(site.url)
        yield opened
        assert not wrong
