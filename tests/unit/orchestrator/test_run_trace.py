"""Where the parts of a run hang in its trace."""

from __future__ import annotations

import pytest

from cryofleet.tracing import Identity
from orchestrator.run_trace import around


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("pick", ""),
        ("tomograms[12]", "tomograms"),
        ("tomograms[12].pick", "tomograms[12]"),
        ("tomograms[12].boxes[3]", "tomograms[12].boxes"),
        ("tomograms[12][3]", "tomograms[12]"),
        ("average/reduce", "average"),
        ("tomograms[12]/reduce", "tomograms[12]"),
        ("refine@2.align", "refine"),
        ("tomograms[1].refine@10.align[4]", "tomograms[1].refine@10.align"),
        ("tomograms[1].refine@10.align", "tomograms[1].refine"),
    ],
)
def test_a_part_hangs_below_what_it_lies_in(place: str, expected: str) -> None:
    assert around(place) == expected


def test_identities_are_valid_and_tell_runs_and_parts_apart() -> None:
    found = [Identity.of(run, f"{run}:{attempt}/{place}") for run in "ab" for attempt in (1, 2) for place in "xy"]
    assert len({each.trace_id for each in found}) == 2
    assert len({each.span_id for each in found}) == 8
    assert all(0 < each.trace_id < 2**128 and 0 < each.span_id < 2**64 for each in found)
