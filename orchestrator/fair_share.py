"""Who is next where more tasks wait for a pool than it has slots: users take turns.

The next slot goes to the user with the fewest slots, among these to the one who has waited longest. So a user alone
gets all of them, and of several each gets the same share of those that come free, however much the others have queued.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar


class Waiter(Protocol):
    """Somebody who waits for a slot."""

    @property
    def user(self) -> str: ...

    @property
    def since(self) -> float:
        """The monotonic clock's time when it began to wait."""
        ...


W = TypeVar("W", bound=Waiter)


class FairShare(Generic[W]):
    """Those who wait, each user's in their order, and the slots that users have."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[W]] = {}
        self._slots: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._waiting.values())

    def __iter__(self) -> Iterator[W]:
        for waiting in self._waiting.values():
            yield from waiting

    def add(self, waiter: W) -> None:
        """Somebody waits, behind all others of the same user."""
        self._waiting.setdefault(waiter.user, deque()).append(waiter)

    def remove(self, waiter: W) -> None:
        """Somebody waits no longer, perhaps since they were served."""
        waiting = self._waiting.get(waiter.user)
        if waiting is not None and waiter in waiting:
            waiting.remove(waiter)
            if not waiting:
                del self._waiting[waiter.user]

    def take(self, user: str) -> None:
        """The user has one slot more."""
        self._slots[user] += 1

    def give_back(self, user: str) -> None:
        """The user has one slot less."""
        self._slots[user] -= 1
        if self._slots[user] <= 0:
            del self._slots[user]

    def slots(self, user: str) -> int:
        """How many the user has."""
        return self._slots[user]

    def serve(self, give: Callable[[W], bool | None]) -> None:
        """Offers slots to those who wait, in turn.

        `give` says whether this one got a slot, which `take` has then been told of; None, that nobody can get any.
        """
        passed_over: set[str] = set()
        while users := self._waiting.keys() - passed_over:
            user = min(users, key=lambda each: (self._slots[each], self._waiting[each][0].since))
            for waiter in self._waiting[user]:
                given = give(waiter)
                if given is None:
                    return
                if given:
                    self.remove(waiter)
                    break
            else:
                passed_over.add(user)
