from __future__ import annotations

from pathlib import Path

import pytest

from cryofleet.artifacts import ResultWriter, identity
from cryofleet.storage import Store, file_uri

KEY = identity("test.Make", 1, {"seed": 0}, {})


def path_of(uri: str) -> Path:
    """The file behind a URI of a file store."""
    return Path(uri.removeprefix("file://"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(file_uri(tmp_path / "store"))


@pytest.fixture
def writer(store: Store) -> ResultWriter:
    return ResultWriter(store, "default", KEY)
