from __future__ import annotations

from typing import Any

import pytest

from orchestrator.expressions import Reference, Template, evaluate, look_up_in, parse, references

VALUES = {
    "n": 5.0,
    "flag": True,
    "name": "ribosome",
    "nothing": None,
    "pick": {"uri": "file:///p", "sizes": [3, 2]},
    "skipped": None,
    "each": {"inner": {"uri": ["file:///a", None, "file:///c"], "uris": [["a1", "a2"], None, [], ["d1", None]]}},
}


def value(text: object) -> object:
    return evaluate(parse(text), look_up_in(VALUES))


def test_a_whole_reference_keeps_its_type() -> None:
    assert value("${n}") == 5.0
    assert value("${flag}") is True
    assert value("${pick.sizes}") == [3, 2]
    assert value("${ pick.uri }") == "file:///p"


def test_references_inside_text_become_text() -> None:
    assert value("${n} of ${name}, ${flag}") == "5 of ribosome, true"
    assert value("sizes ${pick.sizes}") == "sizes 3, 2"


def test_dollar_brace_can_be_written() -> None:
    assert value("$${n}") == "${n}"
    assert value("a $${n} b ${n}") == "a ${n} b 5"


def test_what_was_left_out_leaves_lists_and_mappings() -> None:
    assert value("${skipped.uri}") is None
    assert value(["${pick.uri}", "${skipped.uri}"]) == ["file:///p"]
    assert value({"a": "${nothing}", "b": {"c": "${n}"}}) == {"b": {"c": 5.0}}
    assert value("${each.inner.uri}") == ["file:///a", "file:///c"]


def test_places_are_kept_where_asked_for() -> None:
    def kept(text: Any) -> Any:
        return evaluate(parse(text), look_up_in(VALUES), keep_places=True)

    assert kept("${each.inner.uri}") == ["file:///a", None, "file:///c"]
    assert kept(["${pick.uri}", "${skipped.uri}", "${n}"]) == ["file:///p", None, 5.0]
    assert kept({"a": "${nothing}", "b": "${n}"}) == {"b": 5.0}


def test_lists_of_lists_are_one_list_to_a_field() -> None:
    assert value("${each.inner.uris}") == ["a1", "a2", "d1"]
    assert value({"a": ["${pick.sizes}", "${n}"]}) == {"a": [3, 2, 5.0]}
    kept = evaluate(parse("${each.inner.uris}"), look_up_in(VALUES), keep_places=True)
    assert kept == [["a1", "a2"], None, [], ["d1", None]]


def test_literals_stay() -> None:
    assert value({"a": [1, 2.5, False, None], "b": "text"}) == {"a": [1, 2.5, False], "b": "text"}


def test_references_are_found_in_order() -> None:
    expression = parse({"a": "${x}", "b": ["${y.z}", "text ${w}"]})
    assert [str(reference) for reference in references(expression)] == ["${x}", "${y.z}", "${w}"]
    assert isinstance(parse("${x}"), Reference)
    assert isinstance(parse("a ${x}"), Template)


@pytest.mark.parametrize("text", ["${}", "${a b}", "${a..b}", "${1a}", "${a", "x ${a[0]} y"])
def test_malformed_references_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no reference"):
        parse(text)
