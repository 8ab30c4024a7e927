"""What a run left of the clusters that it sorted particles into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.v1 import orchestrator_pb2


@dataclass(frozen=True)
class ClusteredRun:
    """URIs of a run's clusters, and what they were made from."""

    run_id: str
    centres_uri: str
    particles_uri: str
    model_uri: str
    embedding_uri: str
    subtomograms_uri: str
    sizes: tuple[int, ...]
    """Particles of each cluster, the first of cluster 1."""
    arguments: Mapping[str, Any]
    """The run's own."""


@dataclass(frozen=True)
class Embedding:
    """Particles by the first two principal components of their codes."""

    ids: NDArray[np.int64]
    points: NDArray[np.float32]
    """(n, 2); of very many particles a part."""
    clusters: NDArray[np.int32]
    """Of each point, from 1."""
    centres: NDArray[np.float32]
    """(clusters, 2)."""
    explained: tuple[float, ...]
    particles: int


def clustered(run: orchestrator_pb2.Run) -> ClusteredRun | None:
    """The clusters of a run; None where it has none (yet)."""
    found = next((step for step in run.steps if step.operation == "learning.Cluster"), None)
    if found is None:
        return None
    outputs = json_format.MessageToDict(found.outputs)
    names = ("centres_uri", "particles_uri", "model_uri", "embedding_uri")
    uris = {name: str(outputs.get(name) or "") for name in names}
    if not all(uris.values()):
        return None
    arguments = json_format.MessageToDict(run.arguments)
    extracted = [json_format.MessageToDict(step.outputs).get("subtomograms_uri") for step in run.steps]
    subtomograms = next((uri for uri in (*extracted, arguments.get("subtomograms")) if isinstance(uri, str)), "")
    sizes = tuple(int(size) for size in outputs.get("sizes", ()))
    return ClusteredRun(run.id, **uris, subtomograms_uri=subtomograms, sizes=sizes, arguments=arguments)


def embedding_of(table: Any, uri: str) -> Embedding:
    """A run's table of its embedding. Raises InvalidArgument, naming it, where columns lack, differ in length or hold
    what can't be.
    """
    try:
        columns = {name: np.asarray(table[name], np.float64) for name in ("id", "cluster", "x", "y")}
        centres = np.array([table["centre_x"], table["centre_y"]], np.float64).T
        shares = tuple(float(share) for share in table.get("explained_variance", ()))
        points = np.stack([columns["x"], columns["y"]], axis=1)
        numbers = np.stack([columns["id"], columns["cluster"]], axis=1)
        if not (np.isfinite(points).all() and np.isfinite(centres).all() and np.isfinite(numbers).all()):
            raise ValueError("some coordinates are not finite")
        if ((numbers[:, 1] < 1) | (numbers[:, 1] > len(centres))).any():
            raise ValueError(f"some particles are of no cluster from 1 to {len(centres)}")
        return Embedding(
            columns["id"].astype(np.int64),
            points.astype(np.float32),
            columns["cluster"].astype(np.int32),
            centres.astype(np.float32).reshape(-1, 2),
            shares,
            int(table.get("particles", len(points))),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidArgument(
            f"{uri} is no embedding as Cluster writes it, with id, cluster, x, y, centre_x and centre_y: {error}"
        ) from None
