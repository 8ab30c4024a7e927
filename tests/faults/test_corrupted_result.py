"""A stored result is damaged: whoever reads it notices, it is taken back, and made anew."""

from __future__ import annotations

import os
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from cryofleet.artifacts import remove
from cryofleet.client import RunFailed, RunHandle
from cryofleet.errors import DataLoss
from cryofleet.storage import Store
from tests.faults.conftest import computed
from tests.platform import Platform

PIPELINE = """
name: ingest-and-filter
inputs:
  tomogram: {kind: file}
steps:
  - id: ingest
    op: io.Ingest
    with: {source_uri: "${tomogram}"}
  - id: filter
    op: io.Filter
    with: {volume_uri: "${ingest.tomogram_uri}", kind: gaussian, sigma_angstrom: 20}
outputs:
  tomogram: ${ingest.tomogram_uri}
  filtered: ${filter.volume_uri}
"""


def flip_a_byte(path: Path) -> None:
    """In the middle of the voxels, which no check of a header would notice."""
    mode = path.stat().st_mode
    path.chmod(mode | 0o200)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x40]))
    path.chmod(mode)


def operations(platform: Platform, run: RunHandle) -> list[str]:
    """Operations that the run computed, in order."""
    return [operation for operation, _ in computed(platform, run)]


def test_a_damaged_result_is_noticed_taken_back_and_made_anew(platform: Platform, tmp_path: Path) -> None:
    with platform.client() as shared:
        client = shared.in_project("damaged")
        pipeline = tmp_path / "pipeline.yaml"
        pipeline.write_text(PIPELINE)
        source = tmp_path / "tomogram.mrc"
        voxels = np.random.default_rng(1).normal(size=(24, 32, 40)).astype(np.float32)
        with mrcfile.new(source, voxels) as file:
            file.voxel_size = 10.0
        undisturbed = client.run(pipeline, tomogram=source).wait()
        first = undisturbed.outputs
        tomogram, filtered = first["tomogram"].read(), first["filtered"].read()
        assert operations(platform, undisturbed) == ["io.Ingest", "io.Filter"]

        # The filter's result is taken away, so that the next run needs the damaged one that it is made from.
        store = Store(platform.settings.store)
        remove(store, *first["filtered"].uri.split("/")[-3:-1])
        stored = Path(first["tomogram"].uri.removeprefix("file://"))
        flip_a_byte(stored)
        assert stored.read_bytes() != tomogram
        with pytest.raises(DataLoss):
            first["tomogram"].read()

        run = client.run(pipeline, tomogram=source)
        with pytest.raises(RunFailed, match="DATA_LOSS") as failed:
            run.wait()
        assert stored.name in str(failed.value), "the damaged object is named"
        assert "taken out of the store" in str(failed.value)
        assert not list(stored.parent.glob("manifest.json"))
        assert operations(platform, run) == [], "nothing was computed from it"

        run.resume().wait()
        assert (run.state, run.record.attempt) == ("succeeded", 2)
        assert operations(platform, run) == ["io.Ingest", "io.Filter"]
        assert run.outputs["tomogram"].uri == first["tomogram"].uri, "the same result, in its own place"
        assert (run.outputs["tomogram"].read(), run.outputs["filtered"].read()) == (tomogram, filtered)
