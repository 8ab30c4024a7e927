"""Picks that are edited by hand, with undo."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.particles import POSITION, SHIFT, Particles
from cryofleet.tomogram_names import plain_names

_POSE = ("qx", "qy", "qz", "qw", *SHIFT)


@dataclass(frozen=True)
class _Edit:
    """One pick before and after; None where there was or is none."""

    pick: int
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class Picks:
    """Picks by their ids, in voxels of the tomogram that is looked at; whatever is done to them can be undone."""

    def __init__(self, table: pd.DataFrame | None = None) -> None:
        """`table` has id, x, y, z and whatever else particles have."""
        if table is None:
            table = pd.DataFrame({"id": np.zeros(0, np.int64), **{name: np.zeros(0) for name in POSITION}})
        self._rows: dict[int, dict[str, Any]] = {
            int(row["id"]): {str(name): value for name, value in row.items()} for row in table.to_dict("records")
        }
        self._done: list[list[_Edit]] = []
        self._undone: list[list[_Edit]] = []
        self._table: pd.DataFrame | None = table
        self._next = max(self._rows, default=-1) + 1

    @classmethod
    def of(cls, particles: Particles, voxel_size_angstrom: float, tomogram: str = "") -> Picks:
        """Particles of one tomogram, where the table has several, in its voxels and with their shifts added."""
        table = particles.table
        if tomogram and "tomogram" in table and table["tomogram"].nunique() > 1:
            # By its name, or as an exported and imported table calls it.
            table = table[table["tomogram"].isin([tomogram, plain_names([tomogram])[tomogram]])]
        scale = particles.voxel_size_angstrom / voxel_size_angstrom
        moved = table.copy()
        for axis, shift in zip(POSITION, SHIFT, strict=True):
            moved[axis] = scale * (table[axis] + table.get(shift, 0.0))
        return cls(moved.drop(columns=[name for name in SHIFT if name in moved]))

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, pick: object) -> bool:
        return pick in self._rows

    @property
    def edits(self) -> int:
        """How many edits could be undone."""
        return len(self._done)

    @property
    def table(self) -> pd.DataFrame:
        """All of them, one row each, in order of their ids after the first edit."""
        if self._table is None:
            rows = [self._rows[pick] for pick in sorted(self._rows)]
            self._table = pd.DataFrame(rows) if rows else Picks().table
        return self._table

    @property
    def positions(self) -> NDArray[np.float64]:
        """`(n, 3)` as x, y, z in voxels."""
        return self.table[list(POSITION)].to_numpy(np.float64)

    @property
    def scores(self) -> NDArray[np.float64]:
        """NaN for picks without one: those added by hand."""
        if "score" not in self.table:
            return np.full(len(self), np.nan)
        return self.table["score"].to_numpy(np.float64)

    def above(self, score: float | None) -> NDArray[np.bool_]:
        """Which have at least a score, or none at all; which were moved by hand count whatever theirs is."""
        if score is None:
            return np.ones(len(self), bool)
        scores = self.scores
        by_hand = self.table["editor"].fillna("").ne("").to_numpy() if "editor" in self.table else False
        return np.asarray(np.isnan(scores) | (scores >= score) | by_hand)

    def place(self, pick: int) -> tuple[float, float, float]:
        """x, y, z of a pick. Raises InvalidArgument."""
        row = self._row(pick)
        return float(row["x"]), float(row["y"]), float(row["z"])

    def add(self, place: tuple[float, float, float], editor: str) -> int:
        """A pick at x, y, z; its id, which no other pick ever had."""
        pick = self._next
        self._next += 1
        row = {"id": pick, **dict(zip(POSITION, map(float, place), strict=True)), "editor": editor}
        self._do([_Edit(pick, None, row)])
        return pick

    def move(self, pick: int, place: tuple[float, float, float], editor: str) -> None:
        """Put a pick elsewhere; its score, measured where it was, is no longer its own."""
        before = self._row(pick)
        after = {**before, **dict(zip(POSITION, map(float, place), strict=True)), "editor": editor}
        after.pop("score", None)
        self._do([_Edit(pick, before, after)])

    def remove(self, pick: int) -> None:
        """Take a pick away."""
        self.reject([pick])

    def reject(self, picks: Iterable[int]) -> None:
        """Take many away, as one edit."""
        gone = [_Edit(pick, self._row(pick), None) for pick in dict.fromkeys(picks)]
        if gone:
            self._do(gone)

    def undo(self) -> int | None:
        """Take the last edit back; which pick it was of, the first where it was of many."""
        if not self._done:
            return None
        edits = self._done.pop()
        self._undone.append(edits)
        for edit in edits:
            self._put(edit.pick, edit.before)
        return edits[0].pick

    def redo(self) -> int | None:
        """Do once more what was undone last; which pick it is of, the first where it is of many."""
        if not self._undone:
            return None
        edits = self._undone.pop()
        self._done.append(edits)
        for edit in edits:
            self._put(edit.pick, edit.after)
        return edits[0].pick

    def to_particles(
        self, voxel_size_angstrom: float, shape: tuple[int, int, int], tomogram: str, least_score: float | None = None
    ) -> Particles:
        """A table of those of at least a score. Raises InvalidArgument where none is left."""
        table = self.table[self.above(least_score)].reset_index(drop=True)
        if not len(table):
            raise InvalidArgument("no pick is left to be saved: lower the threshold, or add some by hand")
        table = table.copy()
        if "editor" in table:
            table["editor"] = table["editor"].fillna("")
        # A pose stands for all rows or for none.
        table = table.drop(columns=[name for name in _POSE if name in table and table[name].isna().any()])
        for name in ("class_id", "half", "filament"):
            if name in table:
                table[name] = table[name].fillna(-1).astype(np.int32)
        for name in ("class_name", "tomogram"):
            if name in table:
                table[name] = table[name].fillna(tomogram if name == "tomogram" else "")
        return Particles(table, voxel_size_angstrom, tomogram, shape)

    def _row(self, pick: int) -> dict[str, Any]:
        if pick not in self._rows:
            raise InvalidArgument(f"there is no pick {pick}")
        return self._rows[pick]

    def _do(self, edits: list[_Edit]) -> None:
        self._done.append(edits)
        self._undone.clear()
        for edit in edits:
            self._put(edit.pick, edit.after)

    def _put(self, pick: int, row: dict[str, Any] | None) -> None:
        if row is None:
            self._rows.pop(pick, None)
        else:
            self._rows[pick] = row
        self._table = None
