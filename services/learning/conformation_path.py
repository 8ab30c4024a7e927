"""Paths through the space of conformations: along a principal component of the points, or through the crowd of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import KDTree

from cryofleet.errors import FailedPrecondition, InvalidArgument

Points = NDArray[np.float64]

PERCENTILES = (5.0, 95.0)
"""Of the points' places along a component, between which it is followed: beyond are few points, and nothing learnt."""
NEIGHBOURS = 10
"""Each point is joined with so many of the nearest."""
MAX_EDGES = 20_000_000
"""More joints than these would not fit into memory."""


def principal_components(points: Points) -> tuple[Points, Points, NDArray[np.float64]]:
    """The mean (d,), the components (d, d) in rows, and the share of the points' (n, d) variance along each, largest
    first.

    A component's sign is such that its largest entry is positive. Raises FailedPrecondition where all points are one.
    """
    mean = points.mean(axis=0)
    centred = points - mean
    # Of the small matrix of products: a decomposition of the points themselves would be n by n.
    spread, vectors = np.linalg.eigh(centred.T @ centred)
    variances, components = np.clip(spread[::-1], 0, None), vectors.T[::-1].copy()
    if variances.sum() <= 1e-24 * max(1.0, float((points**2).sum())):
        raise FailedPrecondition("all points are the same: the network found no differences between the subtomograms")
    largest = np.abs(components).argmax(axis=1)
    components *= np.sign(components[np.arange(len(components)), largest])[:, None]
    return mean, components, variances / variances.sum()


def along_component(points: Points, component: int, steps: int) -> Points:
    """`steps` points (steps, d) along a principal component of points (n, d), counted from 1, evenly from its 5th to
    its 95th percentile.

    Raises InvalidArgument for a component that the space has not.
    """
    if component > points.shape[1]:
        raise InvalidArgument(
            f"component is {component}; the space has {points.shape[1]} dimensions, so it can be 1 to {points.shape[1]}"
        )
    mean, components, _ = principal_components(points)
    direction = components[component - 1]
    start, stop = np.percentile((points - mean) @ direction, PERCENTILES)
    path: Points = mean + np.linspace(start, stop, steps)[:, None] * direction
    return path


def through_crowd(points: Points, waypoints: Sequence[int], steps: int) -> Points:
    """`steps` points (steps, d), evenly along the shortest way from one waypoint to the next over points (n, d) that
    are near neighbours.

    `waypoints` are rows, two at least. Where crowds lie apart, each point is joined with twice as many neighbours until
    a way leads through. Raises InvalidArgument for fewer waypoints, FailedPrecondition where none leads through.
    """
    if len(waypoints) < 2:
        raise InvalidArgument(f"waypoints: a path needs two particles at least, {len(waypoints)} is given")
    neighbours = NEIGHBOURS
    while (way := _way(points, waypoints, neighbours)) is None:
        neighbours *= 2
        if neighbours * len(points) > MAX_EDGES:
            raise FailedPrecondition(
                f"waypoints: no way leads from one to the next over points that are among the {neighbours // 2} "
                "nearest of one another: they lie in crowds apart, choose waypoints of one"
            )
    corners = points[way]
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(corners, axis=0), axis=1))])
    places = np.linspace(0, along[-1], steps)
    path: Points = np.stack([np.interp(places, along, column) for column in corners.T], axis=1)
    return path


def _way(points: Points, waypoints: Sequence[int], neighbours: int) -> list[int] | None:
    """The rows of the points on the way, each joined with so many of its nearest; None where there is no way."""
    count = len(points)
    found = KDTree(points).query(points, k=np.arange(1, min(neighbours + 1, count) + 1))
    distances, nearest = np.asarray(found[0]), np.asarray(found[1])
    rows = np.repeat(np.arange(count), nearest.shape[1])
    # An entry of 0 would be no edge; points that coincide are joined by as good as none.
    lengths = np.maximum(distances.ravel(), 1e-12 * max(1e-300, float(distances.max())))
    graph = csr_array((lengths, (rows, nearest.ravel())), shape=(count, count))
    way: list[int] = [int(waypoints[0])]
    for start, stop in pairwise(waypoints):
        _, before = dijkstra(graph, directed=False, indices=np.array([start]), return_predecessors=True)
        leg = [int(stop)]
        while leg[-1] != start:
            previous = int(before[0, leg[-1]])
            if previous < 0:
                return None
            leg.append(previous)
        way += leg[-2::-1]
    return way


def nearest_counts(points: Points, path: Points) -> NDArray[np.int64]:
    """How many of points (n, d) are nearest to each point (steps, d) of a path; of equally near ones, to the first."""
    _, nearest = KDTree(path).query(points)
    counts: NDArray[np.int64] = np.bincount(nearest, minlength=len(path)).astype(np.int64)
    return counts
