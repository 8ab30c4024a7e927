"""How many rows there are to split a step over."""

from __future__ import annotations

import json

from cryofleet.artifacts import open_blob
from cryofleet.errors import FailedPrecondition
from cryofleet.particles import row_count
from cryofleet.storage import Store
from cryofleet.volumes import open_subtomograms


def count_rows(store: Store, kind: str, uri: str) -> int:
    """Rows of a particle table, boxes of a set of subtomograms, or the `rows` that a JSON table says it has.

    Of the first two no more is read than their headers.
    """
    if kind == "subtomograms":
        return open_subtomograms(store, uri).count
    if kind == "table":
        try:
            rows = json.loads(open_blob(store, uri).read())["rows"]
        except (ValueError, KeyError, TypeError):
            rows = None
        if not isinstance(rows, int) or rows < 0:
            raise FailedPrecondition(f"{uri} does not say how many rows it has, so it can't be split")
        return rows
    return row_count(open_blob(store, uri), uri)
