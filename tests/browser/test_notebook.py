"""The views in a notebook: a real JupyterLab, its kernel beside the platform, in a real browser."""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Site
from tests.browser.looks import SCREENSHOTS
from tests.browser.test_page import eventually, pane
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.browser

MOVE = "view.go((40, 50, 7)); print('it has', len(view.picks), 'picks')"


@pytest.fixture
def notebook(site: Site, tmp_path: Path) -> Iterator[str]:
    """The address of a notebook with a view in it, in a JupyterLab that sees the platform."""
    with site.platform.client() as client:
        client.artifact(site.tomogram).save(tmp_path / "tomogram.mrc")
    cells = [documented(), MOVE]
    document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    document.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(document, tmp_path / "view.ipynb")
    token, port = secrets.token_hex(16), 8000 + secrets.randbelow(20000)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=None"]
    environment = {**site.platform.environment, "HOME": str(tmp_path), "JUPYTER_PREFER_ENV_PATH": "1"}
    with (tmp_path / "lab.log").open("wb") as log:
        lab = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        root = f"http://localhost:{port}"
        eventually(lambda: answers(f"{root}/api?token={token}"), 60.0)
        yield f"{root}/lab/tree/view.ipynb?token={token}"
    finally:
        lab.terminate()
        lab.wait(30)


def documented() -> str:
    """The cell that docs/views.md shows."""
    text = (REPOSITORY / "docs/views.md").read_text().partition("## In a notebook")[2]
    return text.partition("```python\n")[2].partition("\n```")[0]


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture
def lab(browser: Browser, notebook: str) -> Iterator[Page]:
    with browser.new_context(viewport={"width": 1280, "height": 1100}) as context:
        page = context.new_page()
        outside: list[str] = []
        root = notebook.partition("/lab")[0]
        page.on("request", lambda request: outside.append(request.url) if foreign(request.url, root) else None)
        page.goto(notebook)
        yield page
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / "notebook.png")
        assert not outside


def foreign(url: str, root: str) -> bool:
    return url.startswith(("http", "ws")) and url.partition("://")[2].split("/")[0] != root.partition("://")[2]


def test_a_view_in_a_notebook(lab: Page) -> None:
    cell = lab.locator(".jp-Notebook .jp-Cell .cm-content").first
    cell.click(timeout=90_000)
    expect(lab.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=90_000)
    for _ in range(2):
        lab.keyboard.press("Shift+Enter")
    for axis in "xyz":
        expect(pane(lab, axis)).to_have_attribute("data-shown", re.compile(r"\d+"), timeout=90_000)
    expect(lab.get_by_text(re.compile(r"it has \d\d picks"))).to_be_visible()
    # What the script did is on the slices, and what hands do reaches the kernel.
    expect(pane(lab, "z")).to_have_attribute("data-shown", "7", timeout=30_000)
    lab.get_by_label("slice perpendicular to z;").focus()
    lab.keyboard.press("PageDown")
    expect(pane(lab, "z")).to_have_attribute("data-shown", re.compile("^[68]$"), timeout=30_000)
