"""How far this orchestrator's work is, kept in memory and written to the record of runs as it changes."""

from __future__ import annotations

import threading

from orchestrator.runs import RunStore, Unit, UnitKey


class Tracker:
    """The units that this orchestrator works on; what has changed is written by `flush`."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._units: dict[UnitKey, Unit] = {}
        self._written: dict[UnitKey, str] = {}
        self._lock = threading.Lock()

    def unit(self, run_id: str, attempt: int, name: str, path: str) -> Unit:
        """A fresh unit; one of the same name is replaced, as its workflow is replayed."""
        unit = Unit(path)
        self._units[run_id, attempt, name] = unit
        return unit

    def flush(self, run_id: str | None = None) -> None:
        """Writes what has changed, of one run or of all, in one transaction. Blocks."""
        with self._lock:
            changed, read = {}, []
            for key, unit in list(self._units.items()):
                if run_id is not None and key[0] != run_id:
                    continue
                if not unit.changed:
                    continue
                # Before the record is made: what changes meanwhile is written the next time.
                unit.changed = False
                read.append(unit)
                record = unit.to_json()
                if self._written.get(key) != record:
                    changed[key] = record
            try:
                self._store.write_units(changed)
            except BaseException:
                for unit in read:
                    unit.changed = True
                raise
            self._written.update(changed)

    def forget(self, run_id: str) -> None:
        """The run's units are not written any more."""
        for key in [key for key in self._units if key[0] == run_id]:
            self._units.pop(key, None)
            self._written.pop(key, None)

    def keep(self, run_ids: set[str]) -> None:
        """Forgets the units of all other runs."""
        for run_id in {key[0] for key in self._units} - run_ids:
            self.forget(run_id)
