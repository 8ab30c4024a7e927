"""How well weak labels segment: python -m benchmarks.segmentation.

The whole way of Zeng et al. 2018, by the product's own operations: subtomograms picked by differences of Gaussians in a
simulated tomogram of vesicles and large globules, an autoencoder, k-means, clusters joined into two classes, EDSS3D
trained on the members' decoded boxes, and two tomograms segmented by tiles: that which was learnt from, and another of
the same kind. Dice is of all the tomogram's voxels against the simulation's labels. Nobody looks at the clusters here:
those are chosen that hold most subtomograms of a class by the truth in the middle of their boxes, and more of it than
of anything else; 10 for membranes and 7 for globules of 100, as in the paper.

The tomogram's contrast transfer is corrected by a Wiener filter: labels are cut at a brightness, and an uncorrected
tomogram (the default microscope's, 3 µm underfocus) holds little of what is coarse. How far a cut can get is measured
on the tomogram without noise, corrected and not. The SNR is `SimulateTiltSeries`': the variance of signal over that of
noise in a plain back-projection, uncorrected. The autoencoder learns from picks of a score of `PICK_SCORE` at least,
for most of the others are ice; all are extracted, so that the set's scale is the tomogram's. Beside the 17 clusters
some that hold ice are chosen as background.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.ndimage
from google.protobuf.message import Message
from numpy.typing import NDArray

from benchmarks.harness import Row, main
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import run_operation
from cryofleet.v1 import common_pb2, learning_pb2, picking_pb2, simulation_pb2
from cryofleet.volumes import open_subtomograms, open_volume
from services.learning.service import service as learning
from services.picking.service import service as picking
from services.simulation.service import service as simulation

VOXEL_SIZE_ANGSTROM = 20.0
BOX = 16
#: Of the simulation's label names; the globule is as large as a ribosome.
GLOBULE, MEMBRANE = "two-subunit-globule", "membrane"
CLASSES = (MEMBRANE, GLOBULE)
LABELS = ("membrane", "globule")
DIAMETER_ANGSTROM = 240.0
#: A box counts as one of a class where that fills so much of the ball of 5 voxels in its middle.
LEAST_SHARE = {MEMBRANE: 0.15, GLOBULE: 0.25}
#: Least score of a pick, in standard deviations of the filtered tomogram.
PICK_SCORE = 1.0
TARGET = 0.75
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


@dataclass(frozen=True)
class Size:
    """How much is simulated and learnt. `chosen` clusters of ice, of membranes and of globules, of `clusters`."""

    shape: tuple[int, int, int]
    snr: float
    clusters: int
    chosen: tuple[int, int, int]
    autoencoder_epochs: int
    segmenter_epochs: int
    segmenter_batch: int

    @property
    def voxels(self) -> int:
        z, y, x = self.shape
        return z * y * x


QUICK = Size((48, 144, 144), 1.0, 20, (2, 5, 3), 15, 25, 8)
FULL = Size((56, 336, 336), 0.5, 100, (7, 10, 7), 18, 26, 8)


@dataclass(frozen=True)
class Specimen:
    """A simulated tomogram and its labels `[z, y, x]`, 0 the background, then as in `CLASSES`; and the images that it
    would be made of were there no noise.
    """

    tomogram_uri: str
    labels: NDArray[np.int64]
    noise_free_uri: str
    tilts_uri: str


def run(store: Store, request: Message) -> Any:
    services = {"LearningService": learning, "PickingService": picking, "SimulationService": simulation}
    for name, service in services.items():
        if name.removesuffix("Service").lower() in request.DESCRIPTOR.file.name:
            return run_operation(service, request, store, threads=THREADS)
    raise ValueError(request.DESCRIPTOR.full_name)


def specimen(store: Store, size: Size, seed: int) -> Specimen:
    """Membranes and globules of 2 % of the volume each, or so."""
    z, y, x = size.shape
    scene = run(
        store,
        simulation_pb2.SimulateSceneRequest(
            size_x=x,
            size_y=y,
            size_z=z,
            voxel_size_angstrom=VOXEL_SIZE_ANGSTROM,
            structures=[simulation_pb2.Structure(name=GLOBULE, count=max(4, size.voxels // 22_000))],
            vesicles=[
                simulation_pb2.Vesicles(
                    count=max(2, size.voxels // 350_000), radius_min_angstrom=250, radius_max_angstrom=600
                )
            ],
            allow_partial=True,
            seed=seed,
        ),
    )
    images = run(
        store, simulation_pb2.SimulateTiltSeriesRequest(density_uri=scene.density_uri, snr=size.snr, seed=seed)
    )
    made = run(
        store,
        simulation_pb2.ReconstructRequest(
            tilt_series_uri=images.tilt_series_uri,
            tilts_uri=images.tilts_uri,
            size_z=z,
            ctf_correction=common_pb2.CTF_CORRECTION_WIENER,
        ),
    )
    names = json.loads(store.get(scene.metrics_uri))["label_names"]
    class_of = np.array([CLASSES.index(name) + 1 if name in CLASSES else 0 for name in names])
    labels = class_of[open_volume(store, scene.labels_uri).read().astype(np.int64)]
    return Specimen(made.tomogram_uri, labels, images.noise_free_uri, images.tilts_uri)


def best_cut(store: Store, made: Specimen, correction: common_pb2.CtfCorrection.ValueType) -> list[float]:
    """The Dice of each class that the best threshold of a tomogram without noise reaches around it: what the labels,
    which are cut at a level, are bounded by. Around: within 80 Å, and not within 40 Å of the other class.
    """
    clean = run(
        store,
        simulation_pb2.ReconstructRequest(
            tilt_series_uri=made.noise_free_uri,
            tilts_uri=made.tilts_uri,
            size_z=made.labels.shape[0],
            ctf_correction=correction,
        ),
    )
    volume = -open_volume(store, clean.tomogram_uri).read()
    best = []
    for number in (1, 2):
        distance = scipy.ndimage.distance_transform_edt(made.labels != number)
        other = scipy.ndimage.distance_transform_edt(made.labels != 3 - number)
        around = (distance <= 80 / VOXEL_SIZE_ANGSTROM) & (other > 40 / VOXEL_SIZE_ANGSTROM)
        values, truth = volume[around], (made.labels[around] == number).astype(np.int64)
        cuts = np.quantile(values, np.linspace(0.3, 0.95, 40))
        best.append(max(dice((values > cut).astype(np.int64), truth, 1) for cut in cuts))
    return best


def kinds(particles: Particles, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,): the class in the middle of each box, 0 where there is little of any."""
    offset = np.arange(BOX) - BOX // 2
    middle = offset[:, None, None] ** 2 + offset[None, :, None] ** 2 + offset[None, None, :] ** 2 <= 25
    found = np.zeros(len(particles), np.int64)
    for row, (x, y, z) in enumerate(np.rint(particles.positions()).astype(int)):
        place = tuple(slice(at - BOX // 2, at + BOX // 2) for at in (z, y, x))
        shares = [(labels[place][middle] == number).mean() for number in (1, 2)]
        best = int(np.argmax(shares))
        if shares[best] > LEAST_SHARE[CLASSES[best]]:
            found[row] = best + 1
    return found


def groups(clusters: NDArray[np.int32], kind: NDArray[np.int64], size: Size) -> list[str]:
    """The clusters of each class, as SelectClusters takes them."""
    texts = []
    for number, (name, count) in enumerate(zip(("background", *CLASSES), size.chosen, strict=True)):
        members = [(clusters == cluster) & (kind == number) for cluster in range(size.clusters)]
        pure = [c for c in range(size.clusters) if 2 * members[c].sum() > (clusters == c).sum()]
        largest = sorted(pure, key=lambda c: -int(members[c].sum()))[:count]
        if largest:
            texts.append(f"{name}:{','.join(map(str, sorted(largest)))}")
        elif number:
            raise RuntimeError(f"no cluster is mostly of {name}: learn from more subtomograms, or longer")
    return texts


def dice(found: NDArray[Any], truth: NDArray[np.int64], number: int) -> float:
    """2 |A and B| / (|A| + |B|)."""
    a, b = found == number, truth == number
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def measure(quick: bool) -> Iterator[Row]:
    size = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"file://{folder}")
        learnt_from, other = specimen(store, size, 1), specimen(store, size, 2)
        started = time.perf_counter()
        picks = run(
            store,
            picking_pb2.DifferenceOfGaussiansRequest(
                tomogram_uri=learnt_from.tomogram_uri,
                particle_diameter_angstrom=DIAMETER_ANGSTROM,
                min_distance_angstrom=3 * VOXEL_SIZE_ANGSTROM,
                threshold=0,
            ),
        )
        boxes = run(
            store,
            picking_pb2.ExtractRequest(
                tomogram_uri=learnt_from.tomogram_uri,
                particles_uri=picks.particles_uri,
                box_size_voxels=BOX,
                normalisation=picking_pb2.NORMALISATION_NONE,
            ),
        )
        extracted = open_subtomograms(store, boxes.subtomograms_uri).particles()
        strong = extracted.select(extracted.table["score"].to_numpy() >= PICK_SCORE)
        strong_uri = f"{store.root}/default/brought/strong.parquet"
        store.put(strong_uri, strong.to_parquet())
        trained = run(
            store,
            learning_pb2.TrainAutoencoderRequest(
                subtomograms_uri=boxes.subtomograms_uri, particles_uri=strong_uri, max_epochs=size.autoencoder_epochs
            ),
        )
        clustered = run(
            store,
            learning_pb2.ClusterRequest(
                subtomograms_uri=boxes.subtomograms_uri,
                model_uri=trained.model_uri,
                particles_uri=strong_uri,
                clusters=size.clusters,
            ),
        )
        particles = Particles.from_parquet(store.get(clustered.particles_uri))
        kind = kinds(particles, learnt_from.labels)
        chosen = groups(particles.table["class_id"].to_numpy(), kind, size)
        selected = run(store, learning_pb2.SelectClustersRequest(particles_uri=clustered.particles_uri, groups=chosen))
        rows = Particles.from_parquet(store.get(selected.particles_uri)).table
        kind_of = dict(zip(particles.table["id"].tolist(), kind.tolist(), strict=True))
        number_of = {"background": 0} | {name: number for number, name in enumerate(CLASSES, start=1)}
        pure = np.mean([kind_of[row.id] == number_of[str(row.class_name)] for row in rows.itertuples()])
        segmenter = run(
            store,
            learning_pb2.TrainSegmenterRequest(
                subtomograms_uri=boxes.subtomograms_uri,
                model_uri=clustered.model_uri,
                particles_uri=selected.particles_uri,
                max_epochs=size.segmenter_epochs,
                batch_size=size.segmenter_batch,
            ),
        )
        shape = "x".join(map(str, size.shape))
        case = f"{shape} voxels of {VOXEL_SIZE_ANGSTROM:g} Å, SNR {size.snr:g}, {len(particles)} boxes of {BOX}^3"
        yield Row(case, "chosen_subtomograms", len(rows), "", "higher")
        yield Row(case, "chosen_of_their_class", float(pure), "", "higher")
        for correction, words in (
            (common_pb2.CTF_CORRECTION_NONE, "as imaged"),
            (common_pb2.CTF_CORRECTION_WIENER, "contrast transfer corrected"),
        ):
            for label, value in zip(LABELS, best_cut(store, learnt_from, correction), strict=True):
                yield Row(f"{case}: without noise, {words}", f"dice_of_best_cut_{label}", value, "", "higher")
        for name, made in (("learnt from", learnt_from), ("another", other)):
            found = run(
                store,
                learning_pb2.PredictRequest(model_uri=segmenter.model_uri, tomogram_uri=made.tomogram_uri),
            )
            labels = open_volume(store, found.labels_uri).read()
            inner = (slice(BOX // 2, -(BOX // 2)),) * 3
            for number, label in enumerate(LABELS, start=1):
                target = None if quick else TARGET
                yield Row(f"{case}: {name}", f"dice_{label}", dice(labels, made.labels, number), "", "higher", target)
                value = dice(labels[inner], made.labels[inner], number)
                yield Row(f"{case}: {name}, half a box from its faces", f"dice_{label}", value, "", "higher")
        yield Row(case, "seconds", time.perf_counter() - started, "s", "lower")


if __name__ == "__main__":
    main("segmentation", measure)
