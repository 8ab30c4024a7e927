"""Subtomograms sorted by their codes: encoded, clustered by k-means, and the cluster centres decoded.

Zeng et al. 2018 (J. Struct. Biol. 202:150-160), section 2.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import Progress
from services.learning.autoencoder import CODE_SIZE, Autoencoder3D, activation_bytes

STARTS = 10
"""k-means runs from so many first centres, and the run of the least inertia counts."""


BATCH_BYTES = 64 * 2**20
"""Boxes are encoded so many at once that no layer's output is larger, and one at least."""


@dataclass(frozen=True)
class Clustering:
    """k clusters of n codes of d numbers, numbered by size, the largest 0; of two of one size, that of the earlier
    first member.

    `labels` (n,) int32; `centres` (k, d) in the codes' units; `sizes` (k,); `inertia`: sum of squared distances to the
    centres.
    """

    labels: NDArray[np.int32]
    centres: NDArray[np.float32]
    sizes: NDArray[np.int64]
    inertia: float

    def explained(self, codes: NDArray[np.float32]) -> float:
        """The share of the codes' (n, d) variance that lies between the clusters: 1 - inertia / sum of squares."""
        total = float(((codes - codes.mean(axis=0, dtype=np.float64)) ** 2).sum())
        return 1.0 - self.inertia / total if total > 0 else 0.0


def batch_size(box_size: int) -> int:
    """Boxes of a side to encode or decode at once."""
    return max(1, min(256, BATCH_BYTES // activation_bytes(box_size)))


def batch_bytes(box_size: int) -> int:
    """Memory of the largest layer's output for such a batch."""
    return batch_size(box_size) * activation_bytes(box_size)


def check_clusters(clusters: int, subtomograms: int) -> None:
    """InvalidArgument where there are more clusters than subtomograms."""
    if clusters > subtomograms:
        raise InvalidArgument(
            f"clusters is {clusters}, and there are {subtomograms} subtomograms: it can't be more than their number"
        )


def encode(
    model: Autoencoder3D,
    chunks: Iterable[tuple[int, NDArray[np.float32]]],
    count: int,
    device: torch.device,
    progress: Progress,
) -> NDArray[np.float32]:
    """Codes (count, 32) of prepared boxes that come in chunks as (first, boxes `[i, z, y, x]`)."""
    codes = np.empty((count, CODE_SIZE), np.float32)
    step = batch_size(model.box_size)
    with torch.inference_mode():
        for first, boxes in chunks:
            for start in range(0, len(boxes), step):
                batch = torch.from_numpy(boxes[start : start + step])[:, None].to(device)
                stop = first + start + len(batch)
                codes[first + start : stop] = model.encode(batch).cpu().numpy()
                progress(stop / count, "encoding", subtomograms=stop)
    return codes


def decode(
    model: Autoencoder3D, codes: NDArray[np.float32], device: torch.device, progress: Progress
) -> NDArray[np.float32]:
    """Boxes `[i, z, y, x]` of codes (n, 32), protein positive, in standard deviations of a box."""
    boxes = np.empty((len(codes), *(model.box_size,) * 3), np.float32)
    step = batch_size(model.box_size)
    with torch.inference_mode():
        for first in range(0, len(codes), step):
            batch = torch.from_numpy(codes[first : first + step]).to(device)
            boxes[first : first + step] = model.decode(batch)[:, 0].cpu().numpy()
            progress(min(1.0, (first + step) / len(codes)), "decoding the centres")
    return boxes


def distances(codes: NDArray[np.float32], found: Clustering) -> NDArray[np.float64]:
    """How far each of the clustered codes (n, d) lies from its cluster's centre, Euclidean, (n,)."""
    result: NDArray[np.float64] = np.linalg.norm(codes.astype(np.float64) - found.centres[found.labels], axis=1)
    return result


def cluster(codes: NDArray[np.float32], clusters: int, seed: int, progress: Progress) -> Clustering:
    """k-means of codes (n, d) as they are, k = `clusters`, the best of 10 starts by k-means++.

    Single-threaded: scikit-learn's threads sum in the order they finish, and the same seed must give the same bytes.
    Raises InvalidArgument for more clusters than codes, FailedPrecondition for more clusters than different codes.
    """
    check_clusters(clusters, len(codes))
    different = len(np.unique(codes, axis=0))
    if clusters > different:
        raise FailedPrecondition(
            f"clusters is {clusters}, and the model gives {len(codes)} subtomograms only {different} different codes: "
            "ask for fewer clusters, or train a model on these subtomograms"
        )
    points = codes.astype(np.float64)
    best: KMeans | None = None
    with threadpool_limits(1):
        for start in range(STARTS):
            random_state = int(np.random.SeedSequence((seed, start)).generate_state(1)[0])
            found = KMeans(clusters, n_init=1, random_state=random_state).fit(points)
            if best is None or found.inertia_ < best.inertia_:
                best = found
            progress((start + 1) / STARTS, "clustering", inertia=float(best.inertia_))
    assert best is not None
    sizes = np.bincount(best.labels_, minlength=clusters)
    first_members = [int(np.argmax(best.labels_ == label)) for label in range(clusters)]
    order = sorted(range(clusters), key=lambda label: (-sizes[label], first_members[label]))
    number = np.empty(clusters, np.int32)
    number[order] = np.arange(clusters, dtype=np.int32)
    return Clustering(
        labels=number[best.labels_],
        centres=best.cluster_centers_[order].astype(np.float32),
        sizes=sizes[order].astype(np.int64),
        inertia=float(best.inertia_),
    )
