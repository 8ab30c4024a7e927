"""The documentation's site, built as `make site` does: whole, and from the repository alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cryofleet.operations import operations
from cryofleet.settings import Settings
from orchestrator.library import Library

ROOT = Path(__file__).resolve().parents[3]
# What a browser fetches by itself.
FETCHED = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?\s(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]*)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a link that leads nowhere, to a page or within one, is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        assert not FETCHED.findall(page.read_text(encoding="utf-8")), page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_every_operation_and_pipeline_has_its_parameters_in_the_reference(site: Path) -> None:
    for operation in operations().values():
        page = (site / "reference" / "operations" / f"{operation.service}.html").read_text(encoding="utf-8")
        assert f'id="{operation.name.replace(".", "").lower()}"' in page
        assert all(f"<code>{parameter.name}</code>" in page for parameter in operation.parameters)
    page = (site / "reference" / "pipelines.html").read_text(encoding="utf-8")
    for pipeline in Library(Settings.from_environment({})).all():
        assert f'id="{pipeline.name}"' in page
        assert all(f"<code>{argument.name}</code>" in page for argument in pipeline.arguments)


def test_rules_and_comments_of_the_contract_are_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "operations" / "picking.html").read_text(encoding="utf-8")
    assert "above 0 to 100000 Å" in page, "bounds and unit of particle_diameter_angstrom"
    assert "<code>skip</code> (Particles whose box leaves the tomogram are left out and counted)" in page
    assert "particle_diameter_max_angstrom must be above particle_diameter_angstrom" in page
    calls = (site / "reference" / "operations" / "orchestrator.html").read_text(encoding="utf-8")
    assert "Checks a pipeline and its inputs, starts it and answers at once." in calls


def test_links_into_the_repository_lead_to_the_file(site: Path) -> None:
    page = (site / "picking.html").read_text(encoding="utf-8")
    (target,) = re.findall(r'href="([^"]*score_threshold[^"]*)"', page)
    listing = (site / target).read_text(encoding="utf-8")
    assert (ROOT / "services/picking/score_threshold.py").read_text().splitlines()[0].strip('".') in listing


def test_python_and_the_command_line_are_documented(site: Path) -> None:
    page = (site / "reference" / "python.html").read_text(encoding="utf-8")
    assert 'id="cryofleet.client.Client.run"' in page
    page = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    assert 'id="cryofleet-run"' in page
    assert 'id="cryofleet-inbox-add"' in page
