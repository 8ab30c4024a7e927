from __future__ import annotations

import numpy as np
import pytest

from cryofleet.errors import InvalidArgument
from services.learning.cluster_groups import group_numbers, parse_groups, ranges_text

CLUSTERS = np.array([0, 1, 2, 3, 4, 0, 7, 8, 9, 4], np.int32)


def test_names_numbers_and_ranges() -> None:
    groups = parse_groups(["membrane:0,3,7-9", " large globule : 4 , 1 - 2 ", "a:b:11"])
    assert [group.name for group in groups] == ["membrane", "large globule", "a:b"]
    assert [group.ranges for group in groups] == [((0, 0), (3, 3), (7, 9)), ((4, 4), (1, 2)), ((11, 11),)]
    numbers = group_numbers(CLUSTERS, groups[:2], "particles")
    assert numbers.dtype == np.int32
    assert numbers.tolist() == [1, 2, 2, 1, 2, 1, 1, 1, 1, 2]
    assert group_numbers(CLUSTERS, parse_groups(["x:4"]), "particles").tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    # Further particles need not be in all clusters.
    found = group_numbers(CLUSTERS, parse_groups(["x:4,900-2000", "y:3000"]), "particles", allow_empty=True)
    assert found.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["membrane"], r"'membrane' has no colon; it must be a name, a colon"),
        ([":1,2"], "no name before the colon"),
        (["  :1"], "no name before the colon"),
        (["a:"], r"'' in 'a:' is no cluster"),
        (["a:1,,2"], r"'' in 'a:1,,2' is no cluster"),
        (["a:1;2"], r"'1;2' in 'a:1;2' is no cluster; it must be .*membrane:1,4,8-10"),
        (["a:-1"], "'-1' in"),
        (["a:1-2-3"], "'1-2-3' in"),
        (["a:1.5"], r"'1\.5' in"),
        (["a:9-7"], "'9-7' in 'a:9-7' runs backwards; write 7-9"),
        (["a:3000000000"], "numbered up to"),
        (["a:0,3", "b:1-3"], "cluster 3 is in 'a' and in 'b'"),
        (["a:0-5,4"], "cluster 4 is twice in 'a'"),
        (["a:1", "a:2"], "two of the name 'a'"),
    ],
)
def test_what_is_no_group(texts: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        parse_groups(texts)


@pytest.mark.parametrize(("text", "missing"), [("a:5", 5), ("a:3-8", 5), ("a:8-10", 10), ("a:2000000000", 2000000000)])
def test_clusters_that_are_not_there(text: str, missing: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"cluster {missing} of 'a' is not there: .* of table are 0-4, 7-9"):
        group_numbers(CLUSTERS, parse_groups([text]), "table")


def test_a_range_of_two_thousand_million_is_no_work() -> None:
    with pytest.raises(InvalidArgument, match="cluster 5 of 'a'"):
        group_numbers(CLUSTERS, parse_groups(["a:0-2000000000"]), "table")


def test_ranges_as_text() -> None:
    assert ranges_text(np.array([], np.int32)) == "none"
    assert ranges_text(np.array([3], np.int32)) == "3"
    assert ranges_text(np.arange(0, 100, 2, dtype=np.int32)).endswith("34, 36, ..., 98")
