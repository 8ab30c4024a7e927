"""Damaged files of every format: an error that names the file, or a table; never anything else."""

import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryofleet.errors import Failure
from cryofleet.formats.inspection import inspect
from cryofleet.formats.particles import catalogue
from cryofleet.formats.particles.catalogue import FORMATS
from tests.unit.formats.particles.tables import ENDINGS, ONE_TOMOGRAM, table_of

_MEMORY_BYTES = 64 << 20
_TOKENS = [
    b"nan", b"-inf", b"1e308", b"1e999", b"-1", b"0", b"9" * 30, b"", b" ", b"\n", b"\0", b"\xff\xfe", b'"', b"'", b"#",
    b"{", b"[", b"]", b"}", b",", b"<", b">", b"&a;", b"loop_", b"data_", b"data_particles\n", b"_rlnCoordinateX\n",
    b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\xff\xff\xff\xff", b"CONT", b"OBJT", b"IEOF", b"null", b"true", b"1.5",
]  # fmt: skip


def _seeds() -> dict[str, bytes]:
    """A good file of each format."""
    seeds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, ending in ENDINGS.items():
            particles = table_of(4, tomograms=("TS_01",) if name in (*ONE_TOMOGRAM, "copick") else ("TS_01", "TS_02"))
            path = Path(folder) / f"{name}{ending}"
            if name == "copick":
                particles = particles.with_columns(class_id=[1, 1, 1, 1])
            catalogue.write(path, particles, FORMATS[name])
            seeds[name] = (next(path.rglob("*/Picks/*.json")) if path.is_dir() else path).read_bytes()
    return seeds


SEEDS = _seeds()


@st.composite
def damaged(draw: st.DrawFn, seed: bytes) -> bytes:
    """A file with pieces cut out, doubled, overwritten and put in."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 5)):
            case 0:
                del data[at : at + draw(st.integers(1, 40))]
            case 1:
                data[at:at] = draw(st.sampled_from(_TOKENS))
            case 2:
                token = draw(st.sampled_from(_TOKENS))
                data[at : at + len(token)] = token
            case 3:
                data[at:at] = data[at : at + draw(st.integers(1, 200))]
            case 4:
                data[at : at + 4] = draw(st.binary(min_size=4, max_size=4))
            case _:
                del data[at:]
    return bytes(data)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_damaged_files(name: str) -> None:
    """The same files in every run; CRYOFLEET_FUZZ=n makes it n others of each format."""
    examples = int(os.environ.get("CRYOFLEET_FUZZ", "60"))
    same = "CRYOFLEET_FUZZ" not in os.environ

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=same, suppress_health_check=list(HealthCheck)
    )
    @given(data=damaged(SEEDS[name]))
    def check(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"damaged{ENDINGS[name] or '.json'}"
            path.write_bytes(data)
            for format_name in (name, None):
                message = "its name"
                tracemalloc.start()
                try:
                    table = catalogue.read(path, "its name", format_name, voxel_size_angstrom=2.0)[1]
                    table.with_frame(tomogram_shape=(10, 20, 30)).particles()
                    inspect(path, "its name")
                except Failure as failure:
                    message = failure.message
                finally:
                    peak = tracemalloc.get_traced_memory()[1]
                    tracemalloc.stop()
                assert "its name" in message
                assert "\n" not in message
                assert peak < _MEMORY_BYTES

    check()
