"""How classes or clusters agree with the true classes of the same particles.

A class is known by its name, or where it has none by its number. Found classes with names are taken for the true
classes of the same names; those of other names, and clusters, which have none, are matched to the true classes that are
left so that most particles agree (the assignment problem, solved by the Hungarian algorithm). A cluster that is left
over agrees with none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.optimize
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, roc_auc_score

from cryofleet.errors import InvalidArgument
from services.learning.calibration import share


@dataclass(frozen=True, eq=False)
class Comparison:
    """Of n particles, found classes against true ones.

    `found_names` and `true_names` name the columns and rows of `table` (true classes, found classes), counts.
    `matched` says for each found class the row of its true class, -1 for none. `precision`, `recall` and `f1`
    (true classes,) are by that matching. `purity`: the share of particles that are of the commonest true class of their
    found class.
    """

    found_names: tuple[str, ...]
    true_names: tuple[str, ...]
    table: NDArray[np.int64]
    matched: tuple[int, ...]
    accuracy: float
    purity: float
    normalised_mutual_information: float
    adjusted_rand_index: float
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]


def match_rows(
    found_ids: NDArray[np.int64],
    true_ids: NDArray[np.int64],
    found_tomograms: Sequence[str] | NDArray[np.object_] | None = None,
    true_tomograms: Sequence[str] | NDArray[np.object_] | None = None,
) -> NDArray[np.int64]:
    """The row in the truth of each found particle.

    Particles are the same that have one id and, where both tables name their tomograms, one tomogram. Raises
    InvalidArgument for a found particle that is not in the truth, and for one that is in either more than once.
    """
    found, truth = pd.DataFrame({"id": found_ids}), pd.DataFrame({"id": true_ids})
    keys = ["id"]
    if found_tomograms is not None and true_tomograms is not None:
        found["tomogram"], truth["tomogram"] = list(found_tomograms), list(true_tomograms)
        keys = ["tomogram", "id"]
    for what, table in (("particles", found), ("truth", truth)):
        twice = table.duplicated(keys)
        if twice.any():
            raise InvalidArgument(f"{what}: {_called(table.iloc[int(np.argmax(twice))])} is there more than once")
    truth["row"] = np.arange(len(truth))
    joined = found.merge(truth, how="left", on=keys, validate="one_to_one")
    alone = joined["row"].isna().to_numpy()
    if alone.any():
        first = _called(found.iloc[int(np.argmax(alone))])
        raise InvalidArgument(
            f"truth has no {first}, and lacks {int(alone.sum())} of {len(found)} particles: it must hold each of them"
        )
    return joined["row"].to_numpy(np.int64)


def _called(row: pd.Series) -> str:
    return f"particle {row['id']}" + (f" of {row['tomogram']}" if "tomogram" in row else "")


def compare(
    found: NDArray[np.integer],
    truth: NDArray[np.integer],
    found_names: Sequence[str] | NDArray[np.object_] | None = None,
    true_names: Sequence[str] | NDArray[np.object_] | None = None,
) -> Comparison:
    """Compare classes `found` (n,) with the true ones (n,), which are numbers, or names where these are given (n,).

    Raises InvalidArgument where there is no particle.
    """
    if not len(found):
        raise InvalidArgument("there is no particle to compare the class of")
    rows, row_names = _numbered(truth, true_names)
    columns, column_names = _numbered(found, found_names)
    shape = (len(row_names), len(column_names))
    table = np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape).astype(np.int64)
    matched = _match(table, row_names, column_names, named=found_names is not None)
    agree = np.zeros(shape[0])
    taken = np.zeros(shape[0])
    for column, row in enumerate(matched):
        if row >= 0:
            agree[row] = table[row, column]
            taken[row] = table[:, column].sum()
    precision, recall = share(agree, taken), share(agree, table.sum(axis=1))
    return Comparison(
        found_names=column_names,
        true_names=row_names,
        table=table,
        matched=matched,
        accuracy=float(agree.sum()) / len(found),
        purity=float(table.max(axis=0).sum()) / len(found),
        normalised_mutual_information=float(normalized_mutual_info_score(rows, columns)),
        adjusted_rand_index=float(adjusted_rand_score(rows, columns)),
        precision=precision,
        recall=recall,
        f1=share(2 * precision * recall, precision + recall),
    )


def _numbered(
    numbers: NDArray[np.integer], names: Sequence[str] | NDArray[np.object_] | None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Each particle's class as an index of the classes' names, which are in the order of their numbers."""
    called = numbers.astype(str) if names is None else np.asarray(names, dtype=object).astype(str)
    # A class that was not given a name goes by its number.
    called = np.where(called == "", numbers.astype(str), called)
    order = pd.DataFrame({"name": called, "number": numbers}).groupby("name")["number"].min().sort_values(kind="stable")
    found = tuple(str(name) for name in order.index)
    index = {name: place for place, name in enumerate(found)}
    return np.array([index[name] for name in called], np.int64), found


def _match(
    table: NDArray[np.int64], row_names: tuple[str, ...], column_names: tuple[str, ...], named: bool
) -> tuple[int, ...]:
    """The row of each column, -1 for none."""
    matched = np.full(len(column_names), -1)
    if named:
        matched[:] = [row_names.index(name) if name in row_names else -1 for name in column_names]
    columns = np.flatnonzero(matched < 0)
    rows = np.setdiff1d(np.arange(len(row_names)), matched)
    if len(columns) and len(rows):
        chosen_rows, chosen_columns = scipy.optimize.linear_sum_assignment(-table[np.ix_(rows, columns)])
        matched[columns[chosen_columns]] = rows[chosen_rows]
    return tuple(int(row) for row in matched)


def unseen_area_under_roc(
    scores: NDArray[np.float64], truth: NDArray[np.integer], known_classes: Sequence[int]
) -> float:
    """How well scores (n,) tell particles of unseen true classes (n,) from those of known ones, whose scores should be
    higher: the area under the ROC, 0.5 by chance.

    Raises InvalidArgument where all particles are of known classes, or none is.
    """
    unseen = ~np.isin(truth, np.asarray(known_classes))
    if unseen.all() or not unseen.any():
        raise InvalidArgument(
            f"known_classes: {'none' if unseen.all() else 'all'} of the particles are of these classes in the truth; "
            "some must be of others, and some of these"
        )
    return float(roc_auc_score(unseen, -scores))
