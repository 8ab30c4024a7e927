"""Which instances are set aside for what tasks fail with, and when they come back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from orchestrator import set_aside
from orchestrator.set_aside import SetAside


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(set_aside, "time", clock)
    return clock


def of(*instances: str) -> SetAside:
    def others_work(address: str) -> bool:
        return any(aside.works(each) for each in instances if each != address)

    aside = SetAside("io", others_work)
    return aside


def fail(aside: SetAside, address: str, *contents: str, shared: bool = False) -> None:
    for content in contents:
        aside.failed(address, content, f"INTERNAL: {content}", shared)


def test_three_different_tasks_set_an_instance_aside_with_their_causes(clock: Clock) -> None:
    aside = of("a", "b")
    fail(aside, "a", "x", "x", "x", "y")
    assert aside.works("a"), "two tasks, however often"
    fail(aside, "a", "z")
    assert not aside.works("a")
    assert aside.causes("a") == ["INTERNAL: x", "INTERNAL: y", "INTERNAL: z"]
    assert aside.until("a") == clock.time() + 60
    assert (aside.works("b"), aside.until("b"), aside.causes("b")) == (True, None, [])
    assert not aside.on_trial("a")
    clock.now += 60
    assert aside.on_trial("a")


def test_a_trial_decides(clock: Clock) -> None:
    aside = of("a", "b")
    fail(aside, "a", "x", "y", "z")
    clock.now += 61
    fail(aside, "a", "u")
    assert not aside.on_trial("a")
    assert aside.until("a") == clock.time() + 120, "twice as long"
    assert aside.causes("a") == ["INTERNAL: u"]
    began = clock.now - 1
    clock.now += 121
    aside.done("a", "older", began)
    assert aside.on_trial("a"), "what had begun before it was set aside says nothing"
    aside.done("a", "v", clock.now)
    assert aside.works("a")
    fail(aside, "a", "x1", "y1")
    assert aside.works("a"), "it starts afresh"
    fail(aside, "a", "z1")
    assert aside.until("a") == clock.time() + 60


def test_it_is_never_aside_for_longer_than_an_hour(clock: Clock) -> None:
    aside = of("a", "b")
    fail(aside, "a", "x", "y", "z")
    for number in range(10):
        clock.now += 3600
        fail(aside, "a", f"{number}")
    assert aside.until("a") == clock.time() + 3600


def test_old_failures_do_not_count(clock: Clock) -> None:
    aside = of("a", "b")
    fail(aside, "a", "x", "y")
    clock.now += 601
    fail(aside, "a", "z")
    assert aside.works("a")


def test_the_last_instance_that_works_is_kept(clock: Clock) -> None:
    aside = of("a", "b")
    fail(aside, "a", "x", "y", "z")
    fail(aside, "b", "u", "v", "w", "q")
    assert (aside.works("a"), aside.works("b")) == (False, True)


def test_bad_tasks_speak_against_no_instance(clock: Clock) -> None:
    aside = of("a", "b", "c")
    fail(aside, "a", "x", "y", "z")
    assert not aside.works("a")
    fail(aside, "b", "x")
    assert aside.works("a"), "x fails elsewhere, too"
    fail(aside, "b", "y", "z")
    assert aside.works("b")
    for content in ("x", "y", "z"):
        fail(aside, "c", content)
        aside.given_up(content)
    assert all(aside.works(each) for each in "abc")
    fail(aside, "a", "u", "v")
    assert aside.works("a"), "nothing is left of x, y and z"


def test_what_a_third_instance_does_was_the_fault_of_the_first_two(clock: Clock) -> None:
    aside = of("a", "b", "c")
    for content in ("x", "y", "z"):
        fail(aside, "a", content)
        fail(aside, "b", content)
        assert aside.works("a")
        aside.done("c", content, clock.now)
    assert [aside.works(each) for each in "abc"] == [False, False, True]


def test_a_task_that_went_well_where_it_had_failed_speaks_for_the_instance(clock: Clock) -> None:
    aside = of("a", "b")
    for content in ("x", "y", "z"):
        fail(aside, "a", content)
        aside.done("a", content, clock.now)
    assert aside.works("a")


def test_calls_that_are_lost_together_count_once(clock: Clock) -> None:
    aside = of("a", "b")
    for number in range(8):
        aside.lost("a", f"{number}", "was lost")
    assert aside.works("a"), "one process has ended"
    for number in (10, 20):
        clock.now += 30
        aside.lost("a", f"{number}", "was lost")
    assert not aside.works("a"), "it has ended three times"


def test_storage_that_is_away_is_no_instances_fault(clock: Clock) -> None:
    aside = of("a", "b", "c")
    fail(aside, "a", *"xyz", shared=True)
    fail(aside, "b", *"uvw", shared=True)
    clock.now += 5
    for content in "xyz":
        aside.done("c", content, clock.now)
    for content in "uvw":
        aside.done("b", content, clock.now)
    assert all(aside.works(each) for each in "abc")


def test_a_full_disk_of_one_instance_is(clock: Clock) -> None:
    aside = of("a", "b")
    fail(aside, "a", "x", shared=True)
    clock.now += 1
    aside.done("b", "other", clock.now)
    clock.now += 1
    fail(aside, "a", "y", "z", shared=True)
    assert not aside.works("a"), "others have gone on meanwhile"


@pytest.mark.parametrize("end", [SetAside.given_up, SetAside.left])
def test_nothing_is_kept_of_tasks_that_have_ended(clock: Clock, end: Callable[[SetAside, str], None]) -> None:
    aside = of("a", "b")
    fail(aside, "a", "x")
    fail(aside, "b", "x")
    end(aside, "x")
    aside.forget("a")
    aside.forget("b")
    assert not aside._failed
    assert not aside._standings
