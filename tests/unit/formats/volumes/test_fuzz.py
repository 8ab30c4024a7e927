"""Damaged volume files of every format: an error that names the file, or a volume; never anything else."""

import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryofleet.errors import Failure
from cryofleet.formats.inspection import inspect
from cryofleet.formats.volumes import catalogue
from tests.unit.formats.volumes.volumes import ENDINGS, noise, volume_of, written

# sections of sparse formats may take 64 MiB where nothing bears them out: twice, with what tells which are finite
_MEMORY_BYTES = 200 << 20
_TOKENS = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\x80\x7f", b"\x01\0\0\0",
           b"\0\0\0\x10", b"9" * 20, b"-1", b"../..", b'"', b"{", b"[", b"null", b"1e999", b"NaN", b"/", b"65535",
           b"u1", b">", b"zlib", b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;"]  # fmt: skip


def _seeds() -> dict[str, bytes]:
    """A good file of each format; OME-Zarr as one file."""
    with tempfile.TemporaryDirectory() as name:
        volume = volume_of(noise(3, 4, 6))
        seeds = {each: written(Path(name), each, volume).read_bytes() for each in ENDINGS if each != "ome-zarr"}
        catalogue.write(Path(name) / "a.ozx", volume, catalogue.FORMATS["ome-zarr"])
        return seeds | {"ome-zarr": (Path(name) / "a.ozx").read_bytes()}


SEEDS = _seeds()


@st.composite
def damaged(draw: st.DrawFn, seed: bytes) -> bytes:
    """A file with pieces cut out, doubled, overwritten and put in; most of them in its first or last bytes."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 6))):
        size = max(1, len(data))
        where = draw(st.integers(0, 3))
        at = draw(st.integers(0, min(size, 256) - 1) if where < 2 else st.integers(0, size - 1))
        if where == 2:
            at = max(0, size - 1 - at % 600)
        match draw(st.integers(0, 7)):
            case 0:
                del data[at : at + draw(st.integers(1, 40))]
            case 1:
                data[at:at] = draw(st.sampled_from(_TOKENS))
            case 2 | 3:
                token = draw(st.sampled_from(_TOKENS))
                data[at : at + len(token)] = token
            case 4:
                data[at:at] = data[at : at + draw(st.integers(1, 200))]
            case 5:
                data[at : at + 4] = draw(st.binary(min_size=4, max_size=4))
            case 6:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case _:
                del data[at:]
    return bytes(data)


@pytest.mark.parametrize("name", sorted(ENDINGS))
def test_damaged_volumes(name: str) -> None:
    """The same files in every run; CRYOFLEET_FUZZ=n makes it n others of each format."""
    # HDF5 takes a process each
    examples = int(os.environ.get("CRYOFLEET_FUZZ", "8" if name == "eman-hdf5" else "80"))
    same = "CRYOFLEET_FUZZ" not in os.environ

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=same, suppress_health_check=list(HealthCheck)
    )
    @given(data=damaged(SEEDS[name]))
    def check(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "damaged.bin"
            path.write_bytes(data)
            tracemalloc.start()
            for format_name, full in ((name, True), (None, False)) if name != "eman-hdf5" else ((None, True),):
                message = "its name"
                try:
                    inspect(path, "its name", format_name, full)
                except Failure as failure:
                    message = failure.message
                assert "its name" in message
                assert "\n" not in message
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < _MEMORY_BYTES

    check()
