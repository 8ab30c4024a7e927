"""A model of clusters: the autoencoder that gives the codes, and the clusters' centres among them.

Further subtomograms are mapped to the nearest centre (Zeng et al. 2018, J. Struct. Biol. 202:150-160, section 3.4.1).
How far the clustered set's own members lie from their centres is kept in the config, so that it can be seen when
another set does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cryofleet.errors import FailedPrecondition
from services.learning import autoencoder
from services.learning.autoencoder import CODE_SIZE, Autoencoder3D

NAME = "autoencoder3d-clusters"
VERSION = 1
"""Raised when the same weights would compute something else."""

USE = "Maps further subtomograms of the same voxel size and box to the nearest of its clusters."
LIMITS = (
    "Each subtomogram goes to some cluster, whether it resembles one or not: compare its distance with those of the "
    "clustered set, which the config holds."
)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Of the distances that the config keeps."""
FAR = QUANTILES.index(0.95)
"""Of the clustered set itself, a share of 0.05 lies farther away than this quantile."""

CHUNK_ROWS = 4096


class ClusterModel(nn.Module):
    """An autoencoder for boxes of one side, and `centres` (clusters, 32) of its codes."""

    centres: Tensor

    def __init__(self, box_size: int, clusters: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.autoencoder = Autoencoder3D(box_size, generator)
        self.register_buffer("centres", torch.zeros(clusters, CODE_SIZE))


@dataclass(frozen=True)
class Assignment:
    """The nearest cluster of n codes: `labels` (n,) int32; `distances` (n,), Euclidean, in the codes' units."""

    labels: NDArray[np.int32]
    distances: NDArray[np.float64]


def with_centres(model: Autoencoder3D, centres: NDArray[np.float32]) -> ClusterModel:
    """The model of clusters with these centres (k, 32)."""
    joined = ClusterModel(model.box_size, len(centres))
    joined.autoencoder = model
    joined.centres = torch.from_numpy(centres.copy())
    return joined


def nearest(codes: NDArray[np.float32], centres: NDArray[np.float32]) -> Assignment:
    """The nearest of centres (k, d) to each of codes (n, d); of equally near ones the first."""
    labels = np.empty(len(codes), np.int32)
    distances = np.empty(len(codes))
    places = centres.astype(np.float64)
    squares = np.einsum("kd,kd->k", places, places)
    for first in range(0, len(codes), CHUNK_ROWS):
        points = codes[first : first + CHUNK_ROWS].astype(np.float64)
        chosen = (squares - 2 * points @ places.T).argmin(axis=1)
        labels[first : first + CHUNK_ROWS] = chosen
        distances[first : first + CHUNK_ROWS] = np.linalg.norm(points - places[chosen], axis=1)
    return Assignment(labels, distances)


def distance_quantiles(assignment: Assignment, clusters: int) -> dict[str, Any]:
    """Quantiles of the distances, of all together and of each cluster; None for a cluster without members."""
    members = [assignment.distances[assignment.labels == number] for number in range(clusters)]
    return {
        "quantiles": list(QUANTILES),
        "all": _quantiles(assignment.distances),
        "clusters": [_quantiles(distances) for distances in members],
    }


def _quantiles(distances: NDArray[np.float64]) -> list[float] | None:
    return [float(value) for value in np.quantile(distances, QUANTILES)] if len(distances) else None


def farther_away(assignment: Assignment, known: Mapping[str, Any]) -> tuple[float, list[float | None]]:
    """The share of particles that lie farther from their centre than 95 % of the clustered set lie from theirs.

    `known` is what `distance_quantiles` gave for that set. Of all particles together, and of each cluster's against its
    own: 0.05 where the sets are alike, more where the centres do not describe these particles. None for a cluster
    without members in either set.
    """
    everywhere = float(np.mean(assignment.distances > known["all"][FAR]))
    shares: list[float | None] = []
    for number, quantiles in enumerate(known["clusters"]):
        distances = assignment.distances[assignment.labels == number]
        shares.append(float(np.mean(distances > quantiles[FAR])) if quantiles and len(distances) else None)
    return everywhere, shares


def config(autoencoder_config: Mapping[str, Any], distances: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config: that of its autoencoder, under this architecture's name, and what `distance_quantiles` gave."""
    own = {
        "architecture": NAME,
        "architecture_version": VERSION,
        "autoencoder_version": autoencoder_config["architecture_version"],
        "clusters": len(distances["clusters"]),
        "distances": dict(distances),
    }
    return {name: value for name, value in autoencoder_config.items() if name != "weights_sha256"} | own


def autoencoder_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the autoencoder within a model of clusters, or of an autoencoder itself.

    FailedPrecondition where it is neither, or not whole.
    """
    if settings.get("architecture") != NAME:
        autoencoder.check_config(settings)
        return dict(settings)
    if settings.get("architecture_version") != VERSION:
        raise FailedPrecondition(
            f"the model is {NAME} version {settings.get('architecture_version')!r}; version {VERSION} is needed: "
            "cluster again"
        )
    own = {"architecture": autoencoder.NAME, "architecture_version": settings.get("autoencoder_version")}
    inner = {name: value for name, value in settings.items() if name not in ("clusters", "distances")} | own
    autoencoder.check_config(inner)
    return inner


def check_config(settings: Mapping[str, Any]) -> None:
    """FailedPrecondition where a model's config describes another architecture, or is not whole."""
    if settings.get("architecture") != NAME:
        raise FailedPrecondition(
            f"the model's architecture is {settings.get('architecture')!r}, {NAME!r} is needed: the one that Cluster "
            "gives"
        )
    autoencoder_config(settings)
    clusters, distances = settings.get("clusters"), settings.get("distances")
    if not (
        isinstance(clusters, int)
        and not isinstance(clusters, bool)
        and clusters > 0
        and isinstance(distances, Mapping)
        and _is_quantiles(distances.get("all"))
        and isinstance(distances.get("clusters"), list)
        and len(distances["clusters"]) == clusters
        and all(each is None or _is_quantiles(each) for each in distances["clusters"])
    ):
        raise FailedPrecondition(
            "the model's config does not say the clusters' distances: it is damaged, cluster again"
        )


def _is_quantiles(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(QUANTILES)
        and all(isinstance(each, int | float) and not isinstance(each, bool) for each in value)
    )


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> ClusterModel:
    """The network of a model's config; FailedPrecondition as `check_config`."""
    check_config(settings)
    return ClusterModel(settings["box_size"], settings["clusters"], generator)
