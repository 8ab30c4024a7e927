"""The picking pipelines on several tomograms, one of them bad, through real processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cryofleet.particles import Particles
from cryofleet.storage import Store
from tests.platform import Platform

VOXEL = 15.0
SCENE = {
    "size_x": 72,
    "size_y": 72,
    "size_z": 40,
    "voxel_size_angstrom": VOXEL,
    "structures": [{"name": "double-ring", "count": 6}],
    "tilt_step_degrees": 6,
    "snr": 1.0,
    "seed": 2,
}


def nearest(picks: Particles, truth: Particles) -> list[float]:
    """How far each true particle is from the nearest pick, in Å."""
    apart = np.linalg.norm(truth.positions()[:, None] - picks.positions()[None], axis=2)
    distances: list[float] = (VOXEL * apart.min(axis=1)).tolist()
    return distances


def test_a_bad_tomogram_is_set_aside_and_the_others_are_picked(platform: Platform, tmp_path: Path) -> None:
    store = Store.open(platform.settings)
    with platform.client() as client:
        made = client.run("simulate-tomogram", **SCENE).wait().outputs
        good = tmp_path / "good.mrc"
        good.write_bytes(made["tomogram"].read())
        cut = tmp_path / "cut.mrc"
        cut.write_bytes(good.read_bytes()[:-4000])
        truth = Particles.from_parquet(store.get(made["truth"].uri))
        matched = client.run(
            "pick-template",
            tomograms=[cut, good],
            structure="double-ring",
            tilts=made["tilts"],
            truth=made["truth"],
            symmetry="D7",
            voxel_size_angstrom=VOXEL,
            angular_step_degrees=20,
            refine_degrees=10,
            candidates=60,
            threshold=0.42,
        ).wait()
        (failure,) = matched.record.set_aside
        assert "cut short" in failure.cause or "cut.mrc" in failure.cause
        assert matched.outputs["picks"][0] is None
        picks = Particles.from_parquet(store.get(matched.outputs["picks"][1].uri))
        assert matched.outputs["f1"][1] > 0.8
        assert max(sorted(nearest(picks, truth))[:5]) < 1.5 * VOXEL
        assert picks.rotations() is not None
        assert b"precision" in matched.outputs["report"][1].read()

        for pipeline in ("pick-dog", "pick-saliency"):
            found = client.run(
                pipeline, tomograms=[good], truth=made["truth"], particle_diameter_angstrom=170, max_picks=12
            ).wait()
            assert found.outputs["count"][0] > 0
            assert found.outputs["f1"][0] > 0.4
