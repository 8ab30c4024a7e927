"""What denoising gains for picking without a template: python -m benchmarks.dual.picking.

Seven tomograms of purified ribosomes of 256 x 256 x 96 voxels of 10 Å, at an SNR where a difference of Gaussians finds
them in the raw tomograms with an F1 of about 0.58, as in the paper. Its parameters are the paper's: sigmas of 8.0 and
8.8 voxels, peaks at least 240 Å apart, hits within 80 Å of a particle's centre; of each tomogram the strongest
detections, 1.2 times as many as it has particles, which is about the paper's 500 in its tomograms. DUAL is trained on
all seven, without any position, and on density maps of two other such fields.

Baselines have the strengths that are best for the picture of the field (`benchmarks.dual.denoising`).
"""

from __future__ import annotations

# First, as it sets what torch reads when it is loaded.
import services.learning  # isort: skip  # noqa: F401

import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from benchmarks.crowded import DATA, real_data, store_in
from benchmarks.dual.denoising import TOPAZ, Fields, Size, denoise, topaz, train_dual
from benchmarks.dual.sets import VOXEL_SIZE_ANGSTROM, Array, Scene, Shape, protein_positive, tomogram
from benchmarks.harness import Row, main
from benchmarks.simulation import CORES
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import run_operation
from cryofleet.v1 import io_pb2
from cryofleet.v1 import simulation_pb2 as pb
from services.io.service import service as io
from services.picking.difference_of_gaussians import difference_of_gaussians
from services.picking.evaluate import match
from services.simulation.service import service as simulation

#: Where F1 in the raw tomograms is about the paper's 0.577.
SNR = float(os.environ.get("CRYOFLEET_DUAL_PICKING_SNR", "0.0008"))
RIBOSOMES = 80
#: Of a sphere whose Gaussian is that of the paper, sigma = r / sqrt(3).
DIAMETER_ANGSTROM = 2 * math.sqrt(3) * 8.0 * VOXEL_SIZE_ANGSTROM
SIGMA_RATIO, APART_ANGSTROM, HIT_ANGSTROM = 1.1, 240.0, 80.0
#: Detections for each particle: 500 of about 410.
DETECTIONS = 1.2
TARGET = 0.70
FULL = Size((96, 256, 256), 7, 2, 8, 8, 4, 4e-4)
QUICK = Size((48, 96, 96), 2, 1, 1, 4, 4, 4e-4)


def ribosomes(store: Store, shape: Shape, seed: int) -> Scene:
    """A field of ribosomes alone."""
    count = max(2, round(RIBOSOMES * math.prod(shape) / math.prod(FULL.shape)))
    if real_data():
        kind = pb.Structure(name="ribosome", count=count, source_uri=f"file://{DATA / 'structures/7p6z.cif.gz'}")
    else:
        kind = pb.Structure(name="two-subunit-globule", count=count)
    made = run_operation(
        simulation,
        pb.SimulateSceneRequest(
            size_x=shape[2],
            size_y=shape[1],
            size_z=shape[0],
            voxel_size_angstrom=VOXEL_SIZE_ANGSTROM,
            seed=seed,
            allow_partial=True,
            structures=[kind],
        ),
        store,
        threads=CORES,
    )
    return Scene(made.density_uri, made.labels_uri, made.truth_uri, tuple(made.gold_labels))


def scores(volume: Array, truth: NDArray[np.float64]) -> tuple[float, float, float]:
    """Precision, recall and F1 of the strongest detections in a volume, protein positive; centres (n, 3) in voxels."""
    found = difference_of_gaussians(
        lambda z0, z1: volume[z0:z1],
        (volume.shape[0], volume.shape[1], volume.shape[2]),
        VOXEL_SIZE_ANGSTROM,
        DIAMETER_ANGSTROM,
        contrast="light",
        sigma_ratio=SIGMA_RATIO,
        threshold=-math.inf,
        min_distance_angstrom=APART_ANGSTROM,
        max_picks=round(DETECTIONS * len(truth)),
    )
    picks = found.positions.astype(np.float64)
    hits = len(match(picks, truth, HIT_ANGSTROM / VOXEL_SIZE_ANGSTROM).picks)
    precision, recall = hits / max(1, len(picks)), hits / len(truth)
    return precision, recall, 2 * hits / (len(picks) + len(truth))


def measure(quick: bool) -> Iterator[Row]:
    size = QUICK if quick else FULL
    with TemporaryDirectory() as folder:
        store = store_in(Path(folder))
        scenes = [ribosomes(store, size.shape, seed) for seed in range(1, size.noisy + size.clean + 1)]
        noisy = tuple(
            tomogram(store, each, size.shape, seed, SNR) for seed, each in enumerate(scenes[: size.noisy], start=1)
        )
        truths = [Particles.from_parquet(store.get(each.truth_uri)).positions() for each in scenes[: size.noisy]]

        def filtered(**parameters: float) -> Callable[[str], Array]:
            def made(uri: str) -> Array:
                request = io_pb2.FilterRequest(volume_uri=uri, **parameters)  # type: ignore[arg-type]
                return protein_positive(store, run_operation(io, request, store, threads=CORES).volume_uri)

            return made

        def by_topaz(model: str, uri: str) -> Array:
            return topaz(store, uri, model, Path(folder))

        methods: dict[str, Callable[[str], Array]] = {
            "none": lambda uri: protein_positive(store, uri),
            "Gaussian": filtered(kind=io_pb2.FILTER_KIND_GAUSSIAN, sigma_angstrom=25),
            "anisotropic diffusion": filtered(kind=io_pb2.FILTER_KIND_ANISOTROPIC_DIFFUSION, iterations=20),
            "non-local means": filtered(kind=io_pb2.FILTER_KIND_NON_LOCAL_MEANS),
        }
        if os.environ.get("CRYOFLEET_TOPAZ"):
            for model in TOPAZ:
                methods[f"Topaz, {model}"] = functools.partial(by_topaz, model)
        test = (scenes[0], noisy[0])
        trained = train_dual(store, Fields(noisy, tuple(scenes[size.noisy :]), test), size)
        methods["DUAL"] = lambda uri: protein_positive(store, denoise(store, trained.model_uri, uri))
        for name, method in methods.items():
            found = np.array([scores(method(each.uri), truth) for each, truth in zip(noisy, truths, strict=True)])
            for number, metric in enumerate(("precision", "recall", "f1")):
                target = TARGET if (name, metric) == ("DUAL", "f1") else None
                case = f"{len(noisy)} tomograms, SNR {SNR:g}: {name}"
                yield Row(case, metric, float(found[:, number].mean()), "", "higher", target)
                yield Row(case, f"{metric}_deviation", float(found[:, number].std(ddof=1)), "", "lower")


if __name__ == "__main__":
    main("dual.picking", measure)
