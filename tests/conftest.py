"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# As the services themselves have it: threads that wait for one another in every small product cost far more than they
# bring, the more so beside other processes. Read when NumPy and torch are loaded, so set before any of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real structures, maps and files of other programs, beside the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the folder of real data at {folder}")
    return folder
