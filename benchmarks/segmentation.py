"""How well weak labels segment: python -m benchmarks.segmentation.

The whole way of Zeng et al. 2018, by the product's own operations: subtomograms picked by differences of Gaussians in a
simulated tomogram of membranes and large globules, an autoencoder, k-means, clusters joined into two classes, EDSS3D
trained on their members' labels, and tomograms segmented: that which was learnt from, another of the same kind, and one
whose membranes are all small vesicles. Dice is of all the tomogram's voxels against the simulation's labels; of the
other, also in the boxes that the paper segments, those whose nearest cluster is a chosen one. Nobody looks at the
clusters here: those are chosen that hold most subtomograms of a class by the truth in the middle of their boxes, and
more of it than of anything else; 10 for membranes and 7 for globules of 100, as in the paper.

Membranes are those of organelles larger than the section is thick, which cross it, and of vesicles in it. Where a
membrane lies across the beam, the missing wedge hides it, whatever segments it: vesicles alone have a lower bound. How
far a cut can get is measured on the tomograms without noise. Membranes that cross a section without touching each other
are nearly parallel, and lie otherwise in the other tomogram: so the segmenter is shown boxes turned about the beam, and
the tomograms are smoothed first, lest interpolation take from the boxes what it does not take from a tomogram.

The tomogram's contrast transfer is corrected by a Wiener filter: labels are cut at a brightness, and an uncorrected
tomogram (the default microscope's, 3 µm underfocus) holds little of what is coarse. The SNR is `SimulateTiltSeries`':
the variance of signal over that of noise in a plain back-projection, uncorrected. The autoencoder learns from picks of
a score of `PICK_SCORE` at least, for most of the others are ice; all are extracted, so that the set's scale is the
tomogram's. Beside the members of the 17 clusters, the weakest picks teach what ice is. Strong picks that lie beside a
structure do not: their boxes hold as much of membranes as the rest of the tomogram. The network has the skip that the
paper's has not: without it, globules' edges are blurred, whatever their labels are.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
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
from cryofleet.v1 import common_pb2, io_pb2, learning_pb2, picking_pb2, simulation_pb2
from cryofleet.volumes import open_subtomograms, open_volume
from services.io.service import service as io
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
#: Of noise at the finest detail, which turning boxes by interpolation would take from them and not from the tomogram.
TOMOGRAM_SMOOTHING_ANGSTROM = 12.0
#: Labels are cut from boxes smoothed by so much, which hold more than decoded ones do, at these levels: chosen by the
#: labels' Dice in the tomogram that is learnt from.
BOX_SMOOTHING_ANGSTROM = 8.0
LEVEL, GLOBULE_LEVEL = 0.6, 0.5
TARGET = 0.75
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


@dataclass(frozen=True)
class Size:
    """How much is simulated and learnt: the tomograms that is learnt from, and the others; how many membranes cross the
    section; how many clusters of membranes and of globules are chosen, of how many; how many of the weakest picks are
    taken for ice.
    """

    shape: tuple[int, int, int]
    other_shape: tuple[int, int, int]
    sheets: int
    snr: float
    clusters: int
    chosen: tuple[int, int]
    ice: int
    autoencoder_epochs: int
    segmenter_epochs: int
    segmenter_batch: int


QUICK = Size((48, 144, 144), (48, 144, 144), 1, 1.0, 20, (5, 3), 15, 15, 25, 8)
FULL = Size((56, 336, 336), (56, 224, 224), 3, 1.0, 100, (10, 7), 80, 16, 26, 8)


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
    services = {"io": io, "learning": learning, "picking": picking, "simulation": simulation}
    for name, service in services.items():
        if request.DESCRIPTOR.file.name.endswith(f"/{name}.proto"):
            return run_operation(service, request, store, threads=THREADS)
    raise ValueError(request.DESCRIPTOR.full_name)


def specimen(store: Store, shape: tuple[int, int, int], snr: float, sheets: int, seed: int) -> Specimen:
    """Membranes and globules, of 2 to 3 % of the volume each: half as many vesicles where membranes cross the section,
    `sheets` of them at most, as parallel ones alone have room.
    """
    z, y, x = shape
    voxels = z * y * x
    vesicles = simulation_pb2.Vesicles(
        count=max(1 if sheets else 2, voxels // (800_000 if sheets else 350_000)),
        radius_min_angstrom=250,
        radius_max_angstrom=600,
    )
    scene = run(
        store,
        simulation_pb2.SimulateSceneRequest(
            size_x=x,
            size_y=y,
            size_z=z,
            voxel_size_angstrom=VOXEL_SIZE_ANGSTROM,
            structures=[simulation_pb2.Structure(name=GLOBULE, count=max(4, voxels // 22_000))],
            vesicles=[vesicles],
            flat_membranes=[simulation_pb2.FlatMembranes(count=sheets)] if sheets else [],
            allow_partial=True,
            seed=seed,
        ),
    )
    images = run(store, simulation_pb2.SimulateTiltSeriesRequest(density_uri=scene.density_uri, snr=snr, seed=seed))
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
    smoothed = run(
        store, io_pb2.FilterRequest(volume_uri=made.tomogram_uri, sigma_angstrom=TOMOGRAM_SMOOTHING_ANGSTROM)
    )
    return Specimen(smoothed.volume_uri, labels, images.noise_free_uri, images.tilts_uri)


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
    for number, (name, count) in enumerate(zip(CLASSES, size.chosen, strict=True), start=1):
        members = [(clusters == cluster) & (kind == number) for cluster in range(size.clusters)]
        pure = [c for c in range(size.clusters) if 2 * members[c].sum() > (clusters == c).sum()]
        largest = sorted(pure, key=lambda c: -int(members[c].sum()))[:count]
        if not largest:
            raise RuntimeError(f"no cluster is mostly of {name}: learn from more subtomograms, or longer")
        texts.append(f"{name}:{','.join(str(cluster + 1) for cluster in sorted(largest))}")
    return texts


def dice(found: NDArray[Any], truth: NDArray[np.int64], number: int) -> float:
    """2 |A and B| / (|A| + |B|)."""
    a, b = found == number, truth == number
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def subtomograms(store: Store, tomogram_uri: str) -> tuple[str, str, Particles]:
    """Subtomograms from everywhere in a tomogram, the strong picks among their particles, and all of them."""
    picks = run(
        store,
        picking_pb2.DifferenceOfGaussiansRequest(
            tomogram_uri=tomogram_uri,
            particle_diameter_angstrom=DIAMETER_ANGSTROM,
            min_distance_angstrom=3 * VOXEL_SIZE_ANGSTROM,
            threshold=0,
        ),
    )
    boxes = run(
        store,
        picking_pb2.ExtractRequest(
            tomogram_uri=tomogram_uri,
            particles_uri=picks.particles_uri,
            box_size_voxels=BOX,
            normalisation=picking_pb2.NORMALISATION_NONE,
        ),
    )
    extracted = open_subtomograms(store, boxes.subtomograms_uri).particles()
    strong = extracted.select(extracted.table["score"].to_numpy() >= PICK_SCORE)
    return boxes.subtomograms_uri, put_particles(store, strong), extracted


def put_particles(store: Store, particles: Particles) -> str:
    uri = f"{store.root}/default/brought/{uuid.uuid4().hex}.parquet"
    store.put(uri, particles.to_parquet())
    return uri


@dataclass(frozen=True)
class Learnt:
    """What was learnt from a tomogram: the clusters' and the segmenter's model, the chosen clusters, the share of their
    members that is of its class, the members and how many they are.
    """

    clusters_uri: str
    segmenter_uri: str
    chosen: NDArray[np.int64]
    pure: float
    subtomograms_uri: str
    members_uri: str
    members: int


def learn(store: Store, made: Specimen, size: Size) -> Learnt:
    """The way from a tomogram to a segmenter."""
    subtomograms_uri, strong_uri, every = subtomograms(store, made.tomogram_uri)
    trained = run(
        store,
        learning_pb2.TrainAutoencoderRequest(
            subtomograms_uri=subtomograms_uri,
            particles_uri=strong_uri,
            max_epochs=size.autoencoder_epochs,
            rotations="half",
        ),
    )
    clustered = run(
        store,
        learning_pb2.ClusterRequest(
            subtomograms_uri=subtomograms_uri,
            model_uri=trained.model_uri,
            particles_uri=strong_uri,
            clusters=size.clusters,
        ),
    )
    particles = Particles.from_parquet(store.get(clustered.particles_uri))
    clusters, kind = particles.table["class_id"].to_numpy(), kinds(particles, made.labels)
    texts = groups(clusters, kind, size)
    selected = run(store, learning_pb2.SelectClustersRequest(particles_uri=clustered.particles_uri, groups=texts))
    segmenter = run(
        store,
        learning_pb2.TrainSegmenterRequest(
            subtomograms_uri=subtomograms_uri,
            model_uri=clustered.model_uri,
            particles_uri=put_particles(store, with_ice(store, selected.particles_uri, every, size.ice)),
            level=LEVEL,
            class_levels=[f"{GLOBULE}:{GLOBULE_LEVEL}"],
            skip=True,
            box_smoothing_angstrom=BOX_SMOOTHING_ANGSTROM,
            rotations="beam",
            max_epochs=size.segmenter_epochs,
            batch_size=size.segmenter_batch,
        ),
    )
    wanted = {
        int(cluster): number
        for number, text in enumerate(texts, start=1)
        for cluster in text.partition(":")[2].split(",")
    }
    taken = np.isin(clusters, list(wanted))
    right = kind[taken] == [wanted[int(cluster)] for cluster in clusters[taken]]
    return Learnt(
        clustered.model_uri,
        segmenter.model_uri,
        np.array(sorted(wanted)),
        float(right.mean()),
        subtomograms_uri,
        selected.particles_uri,
        int(taken.sum()),
    )


def with_ice(store: Store, selected_uri: str, every: Particles, count: int) -> Particles:
    """The chosen clusters' members and, as background, the weakest of all picks."""
    selected = Particles.from_parquet(store.get(selected_uri))
    weakest = every.select(np.argsort(every.table["score"].to_numpy())[:count]).with_columns(
        class_id=np.full(count, len(CLASSES) + 1, np.int32), class_name=np.full(count, "background", object)
    )
    return Particles.concat([selected, weakest])


def in_boxes(store: Store, learnt: Learnt, made: Specimen, subtomograms_uri: str, particles_uri: str) -> list[float]:
    """The Dice of each class in segmented boxes."""
    found = run(
        store,
        learning_pb2.PredictRequest(
            model_uri=learnt.segmenter_uri, subtomograms_uri=subtomograms_uri, particles_uri=particles_uri
        ),
    )
    labels = open_volume(store, found.labels_uri).read()
    positions = np.rint(Particles.from_parquet(store.get(particles_uri)).positions()).astype(int)
    truth = np.stack(
        [made.labels[tuple(slice(at - BOX // 2, at + BOX // 2) for at in (z, y, x))] for x, y, z in positions]
    )
    return [dice(labels, truth, number) for number in (1, 2)]


def in_chosen_clusters(store: Store, learnt: Learnt, made: Specimen) -> list[float]:
    """The Dice of each class where the paper segments: in boxes of picks whose nearest cluster is a chosen one."""
    subtomograms_uri, strong_uri, _ = subtomograms(store, made.tomogram_uri)
    assigned = run(
        store,
        learning_pb2.AssignClustersRequest(
            subtomograms_uri=subtomograms_uri, model_uri=learnt.clusters_uri, particles_uri=strong_uri
        ),
    )
    particles = Particles.from_parquet(store.get(assigned.particles_uri))
    among = particles.select(np.isin(particles.table["class_id"].to_numpy(), learnt.chosen))
    return in_boxes(store, learnt, made, subtomograms_uri, put_particles(store, among))


def in_tomogram(store: Store, learnt: Learnt, made: Specimen, overlapping_boxes: bool) -> NDArray[Any]:
    """The classes of a whole tomogram's voxels."""
    found = run(
        store,
        learning_pb2.PredictRequest(
            model_uri=learnt.segmenter_uri, tomogram_uri=made.tomogram_uri, overlapping_boxes=overlapping_boxes
        ),
    )
    labels: NDArray[Any] = open_volume(store, found.labels_uri).read()
    return labels


def measure(quick: bool) -> Iterator[Row]:
    size = QUICK if quick else FULL
    target = None if quick else TARGET
    inner = (slice(BOX // 2, -(BOX // 2)),) * 3
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"file://{folder}")
        learnt_from = specimen(store, size.shape, size.snr, size.sheets, 1)
        other = specimen(store, size.other_shape, size.snr, size.sheets, 2)
        vesicles = specimen(store, size.other_shape, size.snr, 0, 3)
        started = time.perf_counter()
        learnt = learn(store, learnt_from, size)
        shape, other_shape = ("x".join(map(str, each)) for each in (size.shape, size.other_shape))
        case = f"{shape} voxels of {VOXEL_SIZE_ANGSTROM:g} Å, others {other_shape}, SNR {size.snr:g}"
        yield Row(case, "chosen_subtomograms", learnt.members, "", "higher")
        yield Row(case, "chosen_of_their_class", learnt.pure, "", "higher")
        yield Row(case, "seconds_learning", time.perf_counter() - started, "s", "lower")

        def rows(what: str, values: Sequence[float], target: float | None = None) -> Iterator[Row]:
            for label, value in zip(LABELS, values, strict=True):
                yield Row(f"{case}: {what}", f"dice_{label}", value, "", "higher", target)

        for name, made in (("another", other), ("another, vesicles alone", vesicles)):
            for correction, words in (
                (common_pb2.CTF_CORRECTION_NONE, "as imaged"),
                (common_pb2.CTF_CORRECTION_WIENER, "contrast transfer corrected"),
            ):
                yield from rows(
                    f"{name}, best cut without noise, {words}",
                    best_cut(store, made, correction),
                )
        within = in_boxes(store, learnt, learnt_from, learnt.subtomograms_uri, learnt.members_uri)
        yield from rows("learnt from, boxes of the chosen clusters", within)
        within = in_chosen_clusters(store, learnt, other)
        yield from rows("another, boxes of the chosen clusters", within, target)
        for name, made in (
            ("learnt from", learnt_from),
            ("another", other),
            ("another, vesicles alone", vesicles),
        ):
            for overlapping in (False, True):
                found = in_tomogram(store, learnt, made, overlapping)
                what = f"{name}, whole, {'overlapping boxes' if overlapping else 'tiles'}"
                goal = target if overlapping else None
                yield from rows(what, [dice(found, made.labels, number) for number in (1, 2)], goal)
                values = [dice(found[inner], made.labels[inner], number) for number in (1, 2)]
                yield from rows(f"{what}, half a box from its faces", values)


if __name__ == "__main__":
    main("segmentation", measure)
