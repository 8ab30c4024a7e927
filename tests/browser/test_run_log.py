"""The log of a run on the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from cryofleet.errors import Failure
from tests.browser.conftest import Site

pytestmark = pytest.mark.browser
MARKUP = "<img src=x onerror=window.ran=1>"
FAILING = f"""
name: failing
steps:
  - id: one
    op: runtime.SelfTest
    with: {{fail_with: "{MARKUP}"}}
outputs: {{index: "${{one.index}}"}}
"""


def test_why_a_step_failed_is_read_in_the_log_of_its_instance(page: Page, site: Site, tmp_path: Path) -> None:
    path = tmp_path / "failing.yaml"
    path.write_text(FAILING)
    with site.platform.client() as client:
        run = client.run(path)
        with pytest.raises(Failure):
            run.wait()
    page.goto(f"{site.root}?run={run.id}")
    expect(page.get_by_text(f"{run.id}: failed")).to_be_visible(timeout=20_000)
    page.get_by_text("Log", exact=True).click()
    # By the orchestrator, and by the instance that the task was on.
    said = f"INVALID_ARGUMENT: fail_with is '{MARKUP}'"
    logged = page.locator("pre").filter(has_text="logged:")
    expect(logged).to_contain_text(f"WARNING  orchestrator runtime.SelfTest one: the task failed: {said}")
    expect(logged).to_contain_text(f"runtime.SelfTest one: {said}")
    expect(logged).to_contain_text("attempt 1 ended as failed")
    assert page.evaluate("window.ran") is None
