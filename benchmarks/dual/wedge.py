"""What fills the missing wedge, and how well: python -m benchmarks.dual.wedge.

The paper's test, which needs no truth: a tomogram whose wedge along the beam was filled, by DUAL, is the reference.
What lies in a second wedge, that of the same tilts about the same axis with the beam along x, is taken from it and
filled anew. Uncompensated and compensated volumes are compared with the reference: PSNR, with the reference's range as
its peak, and SSIM of the volumes, standardised; and the Fourier shell correlation of what lies in the second wedge
alone, its mean over shells to two thirds of Nyquist. Without compensation there is nothing there: it is 0.

The same of the first wedge against the specimen's density map, which here is known.
"""

from __future__ import annotations

# First, as it sets what torch reads when it is loaded.
import services.learning  # isort: skip  # noqa: F401

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from benchmarks.crowded import store_in
from benchmarks.dual.sets import VOXEL_SIZE_ANGSTROM, Array, protein_positive, quality, scene, standardised, tomogram
from benchmarks.harness import Row, main
from benchmarks.simulation import CORES
from cryofleet.artifacts import ResultWriter
from cryofleet.numerics.wedge import wedge_mask
from cryofleet.storage import Store
from cryofleet.testing import run_operation
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import VolumeInfo, VolumeWriter
from services.learning.service import service as learning
from services.learning.wedge_filling import on_its_side

TILT_DEGREES = 60.0
#: Of Nyquist, up to which what is filled is compared.
FINEST = 2 / 3


def write(store: Store, volume: Array, number: int) -> str:
    """A tomogram with a wedge, protein positive; its URI."""
    writer = ResultWriter(store, "default", f"{number:064x}")
    shape = volume.shape[0], volume.shape[1], volume.shape[2]
    info = VolumeInfo(shape, VOXEL_SIZE_ANGSTROM, "light", -TILT_DEGREES, TILT_DEGREES)
    with VolumeWriter(writer, "tomogram.mrc", info) as out:
        out.write(volume)
    writer.commit(
        operation="benchmark.Wedge", version=1, parameters={}, inputs={}, result={"uri": out.uri}, seconds=0.0
    )
    return out.uri


def compensate(store: Store, model_uri: str, uri: str) -> Array:
    """By the operation, protein positive."""
    request = learning_pb2.CompensateWedgeRequest(model_uri=model_uri, tomogram_uri=uri)
    return protein_positive(store, run_operation(learning, request, store, threads=CORES).volume_uri)


def without_wedge(volume: Array) -> tuple[Array, NDArray[np.bool_]]:
    """The volume without what its missing wedge would lack, and where in its half spectrum that is."""
    shape = volume.shape[0], volume.shape[1], volume.shape[2]
    mask = wedge_mask(shape, -TILT_DEGREES, TILT_DEGREES, half=True)
    return np.asarray(np.fft.irfftn(np.fft.rfftn(volume) * mask, shape), np.float32), mask == 0


def mean_correlation(first: Array, second: Array, region: NDArray[np.bool_]) -> float:
    """Mean Fourier shell correlation within a region of the half spectrum, to `FINEST` of Nyquist."""
    axes = [np.fft.fftfreq(side) for side in first.shape[:2]] + [np.fft.rfftfreq(first.shape[2])]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    shells = np.round(np.sqrt(z**2 + y**2 + x**2) * min(first.shape)).astype(int)
    one, other = np.fft.rfftn(first), np.fft.rfftn(second)
    found = []
    for shell in range(1, int(FINEST * min(first.shape) / 2) + 1):
        rows = region & (shells == shell)
        a, b = one[rows], other[rows]
        power = np.sqrt((np.abs(a) ** 2).sum() * (np.abs(b) ** 2).sum())
        found.append(float((a * b.conj()).real.sum() / power) if power > 0 else 0.0)
    return float(np.mean(found))


def measure(quick: bool) -> Iterator[Row]:
    side, epochs, channels = (64, 1, 4) if quick else (160, 7, 8)
    with TemporaryDirectory() as folder:
        store = store_in(Path(folder))
        shape = (side, side, side)
        scenes = [scene(store, shape, seed) for seed in (1, 2)]
        uris = [tomogram(store, each, shape, seed).uri for seed, each in enumerate(scenes, start=1)]
        started = time.perf_counter()
        trained = run_operation(
            learning,
            learning_pb2.TrainDualRequest(
                tomograms_uris=uris[:1],
                transposed_pair=True,
                max_epochs=epochs,
                channels=channels,
                spacing_voxels=16,
                batch_size=4,
                learning_rate=4e-4,
            ),
            store,
            threads=CORES,
        )
        case = f"{side}^3 at 10 Å, SNR 0.1"
        yield Row(f"{case}: training", "minutes", (time.perf_counter() - started) / 60, "min", "lower")

        raw = protein_positive(store, uris[1])
        filled = compensate(store, trained.model_uri, uris[1])
        reference = standardised(np.ascontiguousarray(on_its_side(filled)))
        cut, region = without_wedge(reference)
        again = compensate(store, trained.model_uri, write(store, cut, 1))
        truth = protein_positive(store, scenes[1].density_uri)
        first_region = wedge_mask(shape, -TILT_DEGREES, TILT_DEGREES, half=True) == 0
        for name, wanted, before, after, where in (
            ("second wedge, against the filled volume", reference, cut, again, region),
            ("first wedge, against the density map", truth, raw, filled, first_region),
        ):
            least = (*quality(wanted, before), mean_correlation(wanted, before, where))
            found = (*quality(wanted, after), mean_correlation(wanted, after, where))
            for metric, unit, one, other in zip(
                ("psnr", "ssim", "fsc_within"), ("dB", "", ""), least, found, strict=True
            ):
                yield Row(f"{case}: {name}: uncompensated", metric, one, unit, "higher")
                yield Row(f"{case}: {name}: compensated", metric, other, unit, "higher", one)


if __name__ == "__main__":
    main("dual.wedge", measure)
