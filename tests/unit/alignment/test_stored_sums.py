"""Sums of classes that were made in parts: the same averages, and no particle compared to itself."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.transfer import wedge_transfer
from services.alignment.align import Poses, Search
from services.alignment.array_files import pack, unpack
from services.alignment.classify import ClassSums, class_sums, reassign
from services.alignment.stored_sums import About, StoredSums, add_up
from tests.unit.alignment.samples import asymmetric, sample

BOX, COUNT = 16, 13
WEDGE = (-60.0, 60.0)
SEARCH = Search(BOX, 15.0, wedge_transfer(BOX, *WEDGE), low_pass_angstrom=60.0, max_candidates=6)
DATA = sample(asymmetric(1), BOX, COUNT, 0.5, wedge=WEDGE)
POSES = Poses(DATA.rotations, DATA.shifts, np.zeros(COUNT))
LABELS = np.array([0, 1, 0, -1, 1, 1, 0, 0, 1, 0, 1, 0, 1])
HALVES = np.arange(COUNT) // 2 % 2
ABOUT = About(BOX, 15.0, "dark", "C1", "a table", COUNT, 0, COUNT)


def cut(poses: Poses, rows: slice) -> Poses:
    return Poses(poses.rotations[rows], poses.shifts[rows], poses.scores[rows])


def sums_of(rows: slice) -> ClassSums:
    boxes = DATA.particles[rows]
    return class_sums(
        lambda i, n: boxes[i : i + n], len(boxes), cut(POSES, rows), LABELS[rows], 2, SEARCH, halves=HALVES[rows]
    )


def stored(first: int, count: int) -> tuple[StoredSums, str]:
    part = StoredSums.of(sums_of(slice(first, first + count)), replace(ABOUT, first=first, count=count))
    return StoredSums.from_arrays(unpack(pack(part.to_arrays()), "sums"), "sums"), f"rows {first} on"


def scores(sums: StoredSums, rows: slice) -> NDArray[np.float64]:
    boxes = DATA.particles[rows]
    own = sums.class_sums(LABELS[rows], HALVES[rows], cut(POSES, rows), "cpu")
    return reassign(lambda i, n: boxes[i : i + n], len(boxes), own, SEARCH).scores


def test_parts_add_up_to_the_whole() -> None:
    whole = sums_of(slice(0, COUNT))
    total = add_up([stored(0, 5), stored(5, 4), stored(9, 4)])
    assert total.about == ABOUT
    assert total.counts.tolist() == whole.counts.tolist()
    peak = np.abs(whole.averages()).max()
    np.testing.assert_allclose(total.whole().averages(), whole.averages(), atol=1e-5 * peak)
    np.testing.assert_allclose(
        total.whole().half_maps(), whole.half_maps(), atol=1e-5 * np.abs(whole.half_maps()).max()
    )


def test_some_particles_are_scored_as_among_all() -> None:
    whole = reassign(DATA.read, COUNT, sums_of(slice(0, COUNT)), SEARCH).scores
    total = add_up([stored(0, 7), stored(7, 6)])
    parts = np.concatenate([scores(total, slice(0, 4)), scores(total, slice(4, COUNT))])
    np.testing.assert_allclose(parts, whole, atol=1e-3)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    first, second = stored(0, 5), stored(5, 8)
    with pytest.raises(InvalidArgument, match="rows 5 on begins with row 5"):
        add_up([second])
    with pytest.raises(InvalidArgument, match="ends with row 4, but there are 13 particles"):
        add_up([first])
    with pytest.raises(InvalidArgument, match="rows 0 on begins with row 0: row 5 must follow"):
        add_up([first, first])
    other = replace(second[0], about=replace(second[0].about, made_of="another table"))
    with pytest.raises(InvalidArgument, match="other and rows 0 on are not sums of one table"):
        add_up([first, (other, "other")])


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("sums", np.zeros((2, 2, 5), np.complex64), "sums is"),
        ("weights", None, "weights"),
        ("about", np.frombuffer(b"{}", np.uint8), "missing"),
        ("about", np.frombuffer(b"[1", np.uint8), "holds no sums"),
    ],
)
def test_files_of_something_else_are_refused(name: str, value: NDArray[np.generic] | None, told: str) -> None:
    arrays = dict(stored(0, 5)[0].to_arrays())
    if value is None:
        del arrays[name]
    else:
        arrays[name] = value
    with pytest.raises(InvalidArgument, match="file holds no sums of classes") as caught:
        StoredSums.from_arrays(arrays, "file")
    assert told in str(caught.value)
    broken = stored(0, 5)[0]
    broken.sums[0, 0, 0] = np.nan
    with pytest.raises(InvalidArgument, match="sums holds values that are not finite"):
        StoredSums.from_arrays(broken.to_arrays(), "file")
