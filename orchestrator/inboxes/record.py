"""The record of inboxes: two tables beside those of the runs, in the same database.

One orchestrator works an inbox at a time, which its row names; that one alone says what has arrived. What must hold
even where two take themselves for it, for a moment, is decided here in single transactions: which item is next, and
how many go on at once.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from cryofleet.errors import AlreadyExists, NotFound
from orchestrator.database import clock
from orchestrator.inboxes.inbox import ACTIVE, SET_ASIDE, STARTED, STARTING, WAITING, Counts, Inbox, Item, run_id_of

metadata = sa.MetaData()
_inboxes = sa.Table(
    "cryofleet_inboxes",
    metadata,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("inbox_id", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("uri", sa.Text, nullable=False),
    sa.Column("pipeline", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("definition", sa.Text, nullable=False),
    sa.Column("arguments", sa.Text, nullable=False),
    sa.Column("input", sa.Text, nullable=False),
    sa.Column("patterns", sa.Text, nullable=False),
    sa.Column("settle_seconds", sa.Float(53), nullable=False),
    sa.Column("give_up_seconds", sa.Float(53), nullable=False),
    sa.Column("ready_suffix", sa.Text, nullable=False),
    sa.Column("at_once", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Float(53), nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("problem", sa.Text, nullable=False),
    sa.Column("worker", sa.Text, nullable=False),
)
_items = sa.Table(
    "cryofleet_inbox_items",
    metadata,
    sa.Column("inbox_id", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("uri", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("mark", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("first_seen", sa.Float(53), nullable=False),
    sa.Column("unchanged_since", sa.Float(53), nullable=False),
    sa.Column("complete_at", sa.Float(53)),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("cause", sa.Text, nullable=False),
    sa.Index("ix_cryofleet_inbox_items_state", "inbox_id", "state"),
)
_AS_READ = sa.and_(
    _items.c.inbox_id == sa.bindparam("of_inbox"),
    _items.c.number == sa.bindparam("of_number"),
    _items.c.state == sa.bindparam("read_state"),
)
"""An item, if it is still in the state in which it was read."""
_ITEM = [column for column in _items.c if column.name != "inbox_id"]


class InboxRecord:
    """Reads and writes the tables, which `schema` makes. Its methods block; call them from a thread."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert

    def now(self) -> float:
        """Unix time by the database's clock."""
        with self._engine.connect() as connection:
            return clock(connection)

    # Inboxes

    def add(self, inbox: Inbox, items: Iterable[Item] = ()) -> None:
        """Keeps a new inbox, with items that are there already. Raises AlreadyExists."""
        values = {**asdict(inbox), "arguments": json.dumps(inbox.arguments), "patterns": json.dumps(inbox.patterns)}
        with self._engine.begin() as connection:
            inserted = connection.execute(
                self._insert(_inboxes).values(**values).on_conflict_do_nothing().returning(_inboxes.c.name)
            ).first()
            if inserted is None:
                raise AlreadyExists(
                    f"project {inbox.project} has an inbox {inbox.name!r}: remove it, or give this one another name"
                )
            self._insert_items(connection, inbox.inbox_id, items)

    def get(self, project: str, name: str) -> Inbox:
        """Raises NotFound."""
        query = sa.select(_inboxes).where(_inboxes.c.project == project, _inboxes.c.name == name)
        with self._engine.connect() as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotFound(f"project {project} has no inbox {name!r}")
        return _inbox(row)

    def all(self, project: str = "", among: Iterable[str] | None = None) -> list[Inbox]:
        """Inboxes of one project or of all `among` these, by project and name."""
        query = sa.select(_inboxes).order_by(_inboxes.c.project, _inboxes.c.name)
        if project:
            query = query.where(_inboxes.c.project == project)
        if among is not None:
            query = query.where(_inboxes.c.project.in_(sorted(among)))
        with self._engine.connect() as connection:
            return [_inbox(row) for row in connection.execute(query).mappings()]

    def set_state(self, inbox: Inbox, state: str) -> None:
        """Pauses it or goes on with it."""
        self._change(inbox, state=state)

    def set_problem(self, inbox: Inbox, problem: str) -> None:
        """Says what keeps it from going on, or that nothing does."""
        self._change(inbox, problem=problem)

    def _change(self, inbox: Inbox, **values: Any) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.update(_inboxes).where(_inboxes.c.inbox_id == inbox.inbox_id).values(**values))

    def remove(self, inbox: Inbox) -> None:
        """Deletes it with its items."""
        with self._engine.begin() as connection:
            for table in (_inboxes, _items):
                connection.execute(sa.delete(table).where(table.c.inbox_id == inbox.inbox_id))

    def claim(self, inbox: Inbox, worker: str) -> bool:
        """Makes somebody the inbox's worker in place of the one it was read with; false where another was quicker."""
        with self._engine.begin() as connection:
            return bool(
                connection.execute(
                    sa.update(_inboxes)
                    .where(_inboxes.c.inbox_id == inbox.inbox_id, _inboxes.c.worker == inbox.worker)
                    .values(worker=worker)
                ).rowcount
            )

    # Items

    def items(self, inbox: Inbox, states: Collection[str] = (), newest: int = 0) -> list[Item]:
        """All items or those in the states, by number; or the newest so many of them, the last one first."""
        query = sa.select(*_ITEM).where(_items.c.inbox_id == inbox.inbox_id)
        query = query.order_by(_items.c.number.desc()).limit(newest) if newest else query.order_by(_items.c.number)
        if states:
            query = query.where(_items.c.state.in_(states))
        with self._engine.connect() as connection:
            return [Item(**row) for row in connection.execute(query).mappings()]

    def counts(self) -> dict[str, Counts]:
        """How many items of each state each inbox has, by its id."""
        query = sa.select(_items.c.inbox_id, _items.c.state, sa.func.count()).group_by(
            _items.c.inbox_id, _items.c.state
        )
        found: dict[str, dict[str, int]] = {}
        with self._engine.connect() as connection:
            for inbox_id, state, count in connection.execute(query):
                found.setdefault(inbox_id, {})[state] = count
        return {inbox_id: Counts(by_state) for inbox_id, by_state in found.items()}

    def note(self, inbox: Inbox, new: Iterable[Item], changed: Mapping[Item, Item], gone: Collection[Item]) -> None:
        """Keeps what a look has found, all at once: items that are new, that have changed, that are gone.

        One that is not any more as the worker had read it, since somebody retried it meanwhile, stays as it is.
        """
        with self._engine.begin() as connection:
            if _held(connection, inbox) is None:
                return  # removed meanwhile: nobody would ever delete the items
            self._insert_items(connection, inbox.inbox_id, new)
            if changed:
                rows = [{**_key(inbox, before), **asdict(after)} for before, after in changed.items()]
                connection.execute(sa.update(_items).where(_AS_READ), rows)
            if gone:
                connection.execute(sa.delete(_items).where(_AS_READ), [_key(inbox, item) for item in gone])

    def change(self, inbox: Inbox, before: Item, after: Item) -> bool:
        """Changes an item; false where it was not any more in the state that it was read in."""
        with self._engine.begin() as connection:
            statement = sa.update(_items).where(_AS_READ)
            return bool(connection.execute(statement, {**_key(inbox, before), **asdict(after)}).rowcount)

    def take_next(self, inbox: Inbox) -> Item | None:
        """The item whose turn it is, which is being started from now on.

        None where no item waits, or as many go on as may at once, or the inbox is paused or was removed.
        """
        with self._engine.begin() as connection:
            held = _held(connection, inbox)
            if held is None or held.state != ACTIVE:
                return None
            of_inbox = _items.c.inbox_id == inbox.inbox_id
            going_on = sa.select(sa.func.count()).where(of_inbox, _items.c.state.in_((STARTING, STARTED)))
            if connection.execute(going_on).scalar_one() >= held.at_once:
                return None
            query = sa.select(*_ITEM).where(of_inbox, _items.c.state == WAITING)
            first = connection.execute(query.order_by(_items.c.complete_at, _items.c.uri).limit(1)).mappings().first()
            if first is None:
                return None
            item = Item(**first)
            taken = replace(item, state=STARTING, run_id=item.run_id or run_id_of(inbox, item), cause="")
            connection.execute(sa.update(_items).where(_AS_READ), {**_key(inbox, item), **asdict(taken)})
            return taken

    def is_active(self, inbox: Inbox) -> bool:
        """Whether it is there still, and not paused."""
        with self._engine.connect() as connection:
            query = sa.select(_inboxes.c.state).where(_inboxes.c.inbox_id == inbox.inbox_id)
            return connection.execute(query).scalar() == ACTIVE

    def set_aside(self, inbox: Inbox, numbers: Collection[int]) -> list[Item]:
        """Items that were set aside, of these numbers or all. Raises NotFound, naming a number that has none such."""
        found = self.items(inbox, (SET_ASIDE,))
        missing = set(numbers) - {item.number for item in found}
        if missing:
            raise NotFound(f"inbox {inbox.name} has set aside no item {min(missing)}")
        return [item for item in found if not numbers or item.number in numbers]

    def _insert_items(self, connection: sa.Connection, inbox_id: str, items: Iterable[Item]) -> None:
        rows = [{"inbox_id": inbox_id, **asdict(item)} for item in items]
        if rows:
            # Two who take themselves for the worker see the same files: the first one's numbers hold.
            connection.execute(self._insert(_items).on_conflict_do_nothing(), rows)


def _held(connection: sa.Connection, inbox: Inbox) -> sa.Row[Any] | None:
    """The inbox's state and limit, held until the transaction ends: others wait. None where it was removed.

    A row that is written is locked, in PostgreSQL; SQLite begins its transactions, of one at a time, with a write.
    """
    of_inbox = sa.update(_inboxes).where(_inboxes.c.inbox_id == inbox.inbox_id)
    return connection.execute(
        of_inbox.values(at_once=_inboxes.c.at_once).returning(_inboxes.c.state, _inboxes.c.at_once)
    ).first()


def _key(inbox: Inbox, item: Item) -> dict[str, Any]:
    """Values for `_AS_READ`."""
    return {"of_inbox": inbox.inbox_id, "of_number": item.number, "read_state": item.state}


def _inbox(row: Mapping[Any, Any]) -> Inbox:
    fields = {**row, "arguments": json.loads(row["arguments"]), "patterns": tuple(json.loads(row["patterns"]))}
    return Inbox(**fields)
