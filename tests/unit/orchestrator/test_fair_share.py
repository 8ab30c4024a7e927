from __future__ import annotations

from dataclasses import dataclass

from orchestrator.fair_share import FairShare


@dataclass(eq=False)
class Waiting:
    user: str
    since: float
    picky: bool = False


def serve(queue: FairShare[Waiting], slots: int) -> list[str]:
    """Users in the order in which they get these slots."""
    served: list[str] = []

    def give(waiter: Waiting) -> bool | None:
        if len(served) == slots:
            return None
        if waiter.picky:
            return False
        queue.take(waiter.user)
        served.append(waiter.user)
        return True

    queue.serve(give)
    return served


def test_users_take_turns_however_much_one_has_queued() -> None:
    queue: FairShare[Waiting] = FairShare()
    for number in range(100):
        queue.add(Waiting("ana", number))
    queue.add(Waiting("ben", 1000))
    queue.add(Waiting("ben", 1001))
    queue.add(Waiting("eva", 1002))
    assert serve(queue, 8) == ["ana", "ben", "eva", "ana", "ben", "ana", "ana", "ana"]
    assert (queue.slots("ana"), queue.slots("ben"), queue.slots("eva"), len(queue)) == (5, 2, 1, 95)


def test_the_fewest_slots_come_first() -> None:
    queue: FairShare[Waiting] = FairShare()
    for _ in range(3):
        queue.take("ana")
    queue.take("ben")
    for number in range(10):
        queue.add(Waiting("ana", number))
        queue.add(Waiting("ben", 100 + number))
    assert serve(queue, 3) == ["ben", "ben", "ana"], "with three each the one who has waited longest"
    queue.give_back("ana")
    queue.give_back("ana")
    assert serve(queue, 1) == ["ana"]


def test_a_user_alone_gets_everything_in_order() -> None:
    queue: FairShare[Waiting] = FairShare()
    waiters = [Waiting("ana", number) for number in range(4)]
    for waiter in waiters:
        queue.add(waiter)
    queue.remove(waiters[0])
    queue.remove(waiters[0])
    assert serve(queue, 9) == ["ana"] * 3
    assert (len(queue), list(queue)) == (0, [])


def test_one_who_cannot_take_what_is_free_holds_nobody_up() -> None:
    queue: FairShare[Waiting] = FairShare()
    for waiter in (Waiting("ana", 1, picky=True), Waiting("ana", 2), Waiting("ben", 3, picky=True), Waiting("eva", 4)):
        queue.add(waiter)
    assert serve(queue, 9) == ["ana", "eva"]
    assert [waiter.since for waiter in queue] == [1, 3]
