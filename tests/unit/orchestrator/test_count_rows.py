"""How many rows an artifact has that an operation is split over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cryofleet.errors import FailedPrecondition
from cryofleet.particles import Particles
from cryofleet.testing import file_store
from orchestrator.row_count import count_rows


def test_particles_and_tables_say_their_rows(tmp_path: Path) -> None:
    store = file_store(tmp_path)
    particles, plan, bad = (f"{store.root}/default/inputs/{name}" for name in ("p.parquet", "plan.json", "bad.json"))
    store.put(particles, Particles.from_positions(np.zeros((7, 3)), 10.0).to_parquet())
    store.put(plan, b'{"rows": 12}')
    assert count_rows(store, "particles", particles) == 7
    assert count_rows(store, "table", plan) == 12
    for text in (b'{"rows": "12"}', b"{}", b"[1]", b"no table", b'{"rows": -1}'):
        store.put(bad, text)
        with pytest.raises(FailedPrecondition, match="does not say how many rows"):
            count_rows(store, "table", bad)
