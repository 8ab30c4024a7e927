"""What filters leave of noise and structure, and the memory of a large tomogram: python -m benchmarks.preprocess.

A crowded tomogram of known truth at an SNR of 0.1 is filtered by each filter; what comes out is compared with the grand
model, both standardised: PSNR with the model's range as its peak, SSIM over cubes of 7 voxels with a data range of 1.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Row, main
from benchmarks.simulation import CORES
from benchmarks.simulation import KINDS as SIMULATED
from cryofleet.artifacts import ResultWriter
from cryofleet.numerics import image_quality
from cryofleet.storage import Store
from cryofleet.testing import run_operation, settings_for
from cryofleet.v1 import io_pb2
from cryofleet.v1 import simulation_pb2 as pb
from cryofleet.volumes import VolumeInfo, VolumeWriter, open_volume
from services.io.service import service as io
from services.simulation.service import service as simulation

KINDS = SIMULATED[:6]
MEMORY_LIMIT_MEBIBYTES = 1536.0

FILTERS: dict[str, dict[str, Any]] = {
    "Gaussian, 1 voxel": {"kind": io_pb2.FILTER_KIND_GAUSSIAN, "sigma_angstrom": 10},
    "Gaussian, 2 voxels": {"kind": io_pb2.FILTER_KIND_GAUSSIAN, "sigma_angstrom": 20},
    "median, 3^3": {"kind": io_pb2.FILTER_KIND_MEDIAN},
    "median, 5^3": {"kind": io_pb2.FILTER_KIND_MEDIAN, "radius_voxels": 2},
    "anisotropic diffusion, exponential, 10 steps": {"kind": io_pb2.FILTER_KIND_ANISOTROPIC_DIFFUSION},
    "anisotropic diffusion, exponential, 20 steps": {
        "kind": io_pb2.FILTER_KIND_ANISOTROPIC_DIFFUSION,
        "iterations": 20,
    },
    "anisotropic diffusion, rational, 20 steps": {
        "kind": io_pb2.FILTER_KIND_ANISOTROPIC_DIFFUSION,
        "iterations": 20,
        "conductance": io_pb2.CONDUCTANCE_RATIONAL,
    },
    "non-local means": {"kind": io_pb2.FILTER_KIND_NON_LOCAL_MEANS},
    "wavelets": {"kind": io_pb2.FILTER_KIND_WAVELET},
}
LARGE: dict[str, dict[str, Any]] = {
    "Gaussian": {"kind": io_pb2.FILTER_KIND_GAUSSIAN, "sigma_angstrom": 20},
    "median, 3^3": {"kind": io_pb2.FILTER_KIND_MEDIAN},
    "anisotropic diffusion, 20 steps": {"kind": io_pb2.FILTER_KIND_ANISOTROPIC_DIFFUSION, "iterations": 20},
    "rescale by 2": {},
}


def standardised(volume: NDArray[np.float32], sign: int) -> NDArray[np.float32]:
    deviation = volume.std(dtype=np.float64)
    return np.asarray(sign * (volume - volume.mean(dtype=np.float64)) / deviation, np.float32)


def quality(quick: bool) -> Iterator[Row]:
    x, y, z, count = (160, 160, 64, 10) if quick else (256, 256, 96, 40)
    with TemporaryDirectory() as folder:
        store = Store.open(settings_for(Path(folder)))
        scene = run_operation(
            simulation,
            pb.SimulateSceneRequest(
                size_x=x, size_y=y, size_z=z, voxel_size_angstrom=10, allow_partial=True,
                structures=[pb.Structure(name=name, count=count) for name in KINDS],
            ),
            store,
            threads=CORES,
        )  # fmt: skip
        series = run_operation(
            simulation, pb.SimulateTiltSeriesRequest(density_uri=scene.density_uri, snr=0.1), store, threads=CORES
        )
        tomogram = run_operation(
            simulation,
            pb.ReconstructRequest(tilt_series_uri=series.tilt_series_uri, tilts_uri=series.tilts_uri, size_z=z),
            store,
            threads=CORES,
        ).tomogram_uri
        truth = standardised(open_volume(store, scene.density_uri).read(), 1)
        peak = float(np.ptp(truth))

        def figures(case: str, uri: str) -> Iterator[Row]:
            seen = standardised(open_volume(store, uri).read(), -1)
            pair = (lambda i, j: truth[i:j]), (lambda i, j: seen[i:j])
            yield Row(case, "psnr", image_quality.psnr(*pair, truth.shape, peak), "dB", "higher")
            yield Row(case, "ssim", image_quality.ssim(*pair, truth.shape), "", "higher")

        size = f"{x}x{y}x{z} at 10 Å, SNR 0.1"
        yield from figures(f"{size}: unfiltered", tomogram)
        for name, parameters in FILTERS.items():
            started = time.perf_counter()
            made = run_operation(io, io_pb2.FilterRequest(volume_uri=tomogram, **parameters), store, threads=CORES)
            seconds = time.perf_counter() - started
            yield from figures(f"{size}: {name}", made.volume_uri)
            yield Row(f"{size}: {name}", "seconds", seconds, "s", "lower")


def write_noise(store: Store, side: int) -> str:
    """A tomogram of noise, of that many voxels along each axis."""
    writer = ResultWriter(store, "default", "0" * 64)
    rng = np.random.default_rng(0)
    with VolumeWriter(writer, "large.mrc", VolumeInfo((side, side, side), 10, "dark", -60, 60)) as volume:
        for _ in range(side):
            volume.write(rng.standard_normal((1, side, side), dtype=np.float32))
    writer.commit(
        operation="benchmark.Noise", version=1, parameters={}, inputs={}, result={"uri": volume.uri}, seconds=0.0
    )
    return volume.uri


def large(quick: bool) -> Iterator[Row]:
    """Each operation in a process of its own, whose greatest memory the kernel has counted (VmHWM)."""
    side = 256 if quick else 1024
    with TemporaryDirectory() as folder:
        uri = write_noise(Store.open(settings_for(Path(folder))), side)
        for name in LARGE:
            command = [sys.executable, "-m", "benchmarks.preprocess", "--one", folder, uri, name]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            mebibytes, seconds = (float(number) for number in said.split())
            case = f"{side}^3, {4 * side**3 / 2**30:.3g} GiB: {name}"
            yield Row(case, "peak_memory", mebibytes, "MiB", "lower", MEMORY_LIMIT_MEBIBYTES)
            yield Row(case, "seconds", seconds, "s", "lower")


def one(folder: str, uri: str, name: str) -> None:
    """Runs one operation, and prints the process's greatest memory in MiB, and the seconds."""
    store = Store.open(settings_for(Path(folder)))
    parameters = LARGE[name]
    request = (
        io_pb2.FilterRequest(volume_uri=uri, **parameters)
        if parameters
        else io_pb2.RescaleRequest(volume_uri=uri, factor=2)
    )
    started = time.perf_counter()
    run_operation(io, request, store, threads=CORES)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    print(int(found[1]) / 1024 if found else float("nan"), seconds)


def measure(quick: bool) -> Iterator[Row]:
    yield from quality(quick)
    yield from large(quick)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:5])
    else:
        main("preprocess", measure)
