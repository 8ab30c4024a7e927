"""How true simulated data are, and how fast they are made: python -m benchmarks.simulation.

Figures of real structures, maps and particle images need the folder of real data beside the repository
(`../shared/data`); where it is not there they are left out, and a line says so.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mrcfile
import numpy as np
from numpy.typing import NDArray

from benchmarks import groel, ribosomes
from benchmarks.harness import Row, main
from cryofleet.formats.relion_tilt_images import TiltImageParticle, read_tilt_images
from cryofleet.formats.tilt_series import TiltSeries
from cryofleet.numerics import masks
from cryofleet.numerics.fsc import fsc, resolution
from cryofleet.numerics.wedge import wedge_mask
from cryofleet.storage import Store
from cryofleet.testing import run_operation, settings_for
from cryofleet.v1 import simulation_pb2 as pb
from cryofleet.volumes import open_volume
from services.simulation import density, detector, imaging, particle_images, poses, projection, scene, subtomograms
from services.simulation.service import service
from services.simulation.tilt_scheme import TiltScheme, tilt_scheme
from services.simulation.weighted_back_projection import weighted_back_projection

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CORES = len(os.sched_getaffinity(0))
#: Noise of its own for each pose so many times over: every two are a pair.
REALISATIONS = 4
KINDS = (
    "double-ring",
    "double-ring-with-caps",
    "barrel-with-lids",
    "two-subunit-globule",
    "hexameric-ring",
    "tetrahedral-shell",
    "octahedral-shell",
    "icosahedral-shell",
)


class PeakMemory:
    """The most memory that this process has held, above what it held before, MiB; sampled every 20 ms."""

    def __enter__(self) -> PeakMemory:
        self._before = self._now()
        self.mebibytes = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.mebibytes = max(self.mebibytes, self._now() - self._before)

    @staticmethod
    def _now() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20


def correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def snr_of_subtomograms(quick: bool) -> Iterator[Row]:
    """rho / (1 - rho) over pairs of one pose; boxes of 64^3 at 6 Å, +-60 degrees in steps of 3, CTF and detector."""
    side, voxel = (32, 12.0) if quick else (64, 6.0)
    built = [density.build("double-ring", None, "", voxel, 2 * voxel, CORES)]
    parameters = imaging.ImagingParameters(pixel_size_angstrom=voxel, defocus_um=4.0)
    series = imaging.draw_tilt_series(tilt_scheme(-60, 60, 3), parameters, np.random.default_rng(0))
    setup = subtomograms.Setup(built, side, series, parameters, detector.sinc_mtf)
    for snr, count in ((0.003, 200), (0.01, 100), (0.1, 30), (1.0, 20)):
        # as many voxels in smaller boxes, or nearly
        count *= 3 if quick else 1
        drawn = poses.draw_poses([count], np.random.default_rng(1), max_shift_voxels=2)
        level = subtomograms.calibrate(setup, drawn, snr, np.random.SeedSequence(2), CORES)
        seeds = [np.random.SeedSequence(3 + number).spawn(count) for number in range(REALISATIONS)]
        covariance = total = 0.0
        several = (subtomograms.subtomograms(setup, drawn, level, own, CORES) for own in seeds)
        for batches in zip(*several, strict=True):
            for particle in zip(*batches, strict=True):
                matrix = np.cov(np.stack([box.ravel() for box in particle]).astype(np.float64))
                total += float(np.trace(matrix)) / REALISATIONS
                covariance += float(matrix[np.triu_indices(REALISATIONS, 1)].mean())
        measured = covariance / (total - covariance)
        pairs = count * REALISATIONS * (REALISATIONS - 1) // 2
        case = f"SNR {snr:g}, {pairs} pairs of {side}^3 at {voxel:g} Å"
        yield Row(case, "measured", measured, "", "higher")
        yield Row(case, "off_by", abs(measured / snr - 1), "", "lower", 0.1)


def projections(quick: bool) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    angles = np.arange(-90.0, 91.0, 1.0)
    volume = rng.standard_normal((40, 16, 48)).astype(np.float32)
    stack = projection.project(volume, angles, 64)
    images = rng.standard_normal(stack.shape).astype(np.float32)
    left = float(np.vdot(stack.astype(np.float64), images))
    right = float(np.vdot(volume.astype(np.float64), projection.back_project(images, angles, 40, 48)))
    yield Row("projection", "adjoint_relative_error", abs(left / right - 1), "", "lower", 1e-5)

    side = 64 if quick else 96
    z, y, x = (np.indices((side, side, side)) - side // 2).astype(np.float32)
    phantom = np.zeros((side,) * 3, np.float32)
    for centre in rng.uniform(-0.22 * side, 0.22 * side, (12, 3)):
        phantom += np.exp(-((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2) / 8)
    width = int(1.5 * side)
    for method in ("real_space", "central_slices"):
        # the transform of a sum of Gaussians along the slice, against that of the projection
        found = projection.project(phantom, angles[::15], width, method, CORES)
        error = 0.0
        for image, angle in zip(found, np.radians(angles[::15]), strict=True):
            own = np.fft.rfft(np.fft.ifftshift(image.astype(np.float64), axes=1), axis=1)[:, :-1]
            k = np.fft.rfftfreq(width)[:-1]
            along_z = np.exp(-2j * np.pi * np.outer(k * np.sin(angle), np.arange(side) - side // 2))
            along_x = np.exp(-2j * np.pi * np.outer(k * np.cos(angle), np.arange(side) - side // 2))
            expected = np.einsum("kz,zyx,kx->yk", along_z, phantom.astype(np.float64), along_x, optimize=True)
            error = max(error, float(np.abs(own - expected).max() / np.abs(expected).max()))
        yield Row(f"projection, {method}", "slice_theorem_error", error, "", "lower", projection.ALIASING)
    full = projection.project(phantom, angles, width, workers=CORES)
    made = weighted_back_projection(full, angles, side, side, workers=CORES)
    yield Row("WBP, +-90 by 1 degree", "correlation", correlation(made, phantom), "", "higher", 0.95)
    noise = rng.standard_normal((121, 8, 192)).astype(np.float32)
    tilts = np.arange(-60.0, 61.0)
    volume = weighted_back_projection(noise, tilts, 96, 96) * (np.hanning(96)[:, None, None] * np.hanning(96)).astype(
        np.float32
    )
    power = (np.abs(np.fft.fft2(volume, axes=(0, 2))) ** 2).mean(axis=1)
    k = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.fftfreq(96)[None, :])
    band = (k > 0.1) & (k < 0.4)
    empty = wedge_mask((96, 1, 96), -64, 64)[:, 0] == 0
    there = wedge_mask((96, 1, 96), -56, 56)[:, 0] > 0
    yield Row(
        "WBP, +-60", "power_in_missing_wedge", float(power[band & empty].mean() / power[band & there].mean()), "",
        "lower", 0.01,
    )  # fmt: skip


def thon_rings(quick: bool) -> Iterator[Row]:
    """Minima of the rotationally averaged power of imaged white noise, against the zeros of the formula."""
    side, pixel = 512, 2.0
    parameters = imaging.ImagingParameters(pixel_size_angstrom=pixel, defocus_um=2.0, radiation_damage=False)
    count = 2 if quick else 6
    series = imaging.draw_tilt_series(
        TiltScheme(np.zeros(count), np.arange(count)), parameters, np.random.default_rng(0)
    )
    phantom = np.random.default_rng(1).standard_normal((count, side, side)).astype(np.float32)
    images = imaging.noise_free_series(phantom, series, parameters, CORES)
    window = np.hanning(side)[:, None] * np.hanning(side)
    power = (np.abs(np.fft.fft2(images * window)) ** 2).mean(axis=0)
    axis = np.fft.fftfreq(side) * side
    radius = np.hypot(axis[:, None], axis)
    shells = np.rint(radius).astype(int)
    profile = np.bincount(shells.ravel(), power.ravel()) / np.bincount(shells.ravel())
    zeros = parameters.ctf().zeros(0.15) * side * pixel
    inner = profile[: side // 2]
    minima = np.flatnonzero((inner[1:-1] < inner[:-2]) & (inner[1:-1] < inner[2:])) + 1
    off = max(float(np.abs(minima - zero).min()) for zero in zeros)
    yield Row(f"Thon rings, {len(zeros)} zeros to 6.7 Å", "largest_distance", off, "shells", "lower", 1.0)


def real_structures(quick: bool) -> Iterator[Row]:
    if not DATA.is_dir():
        print(f"no real data at {DATA}: GroEL and the ribosomes are left out", file=sys.stderr)
        return
    structure = (DATA / "structures" / "1oel.pdb.gz").read_bytes()
    lowest = min(groel.symmetry_correlations(structure))
    yield Row("1OEL 14-mer at 15 Å", "lowest_symmetry_correlation", lowest, "", "higher", 0.98)
    found = groel.fit(structure, (DATA / "maps" / "groel_11.5A_emdb.mrc.gz").read_bytes())
    fitted = found.at_resolution(found.model())
    score = groel.correlation(fitted, found.target)
    yield Row("1OEL to the EMDB map, 11.5 Å, whole box", "correlation", score, "", "higher", 0.9)

    folder = DATA / "real" / "ribosome_70s"
    particles = read_tilt_images(
        (folder / "particles.star").read_bytes(), (folder / "tomograms.star").read_bytes(), opposite_hand=True
    )

    def stack(particle: TiltImageParticle) -> NDArray[np.float32]:
        return np.asarray(mrcfile.read(folder / particle.stack.split("/", 1)[1]), np.float32)

    first, second, average = particle_images.half_maps(particles, stack, wiener=10.0)
    mask = ribosomes.molecular_mask(average, 12.0)
    case = "20 real ribosomes, soft mask of their average"
    frequency, values = fsc(first, second, mask)
    yield Row(case, "half_map_fsc_0.5", resolution(frequency, values, 12.0, 0.5), "Å", "lower", 50.0)
    # what the mask alone makes of maps whose phases are noise beyond 80 Å (Chen et al. 2013)
    rng = np.random.default_rng(0)
    frequency, values = fsc(
        ribosomes.randomised(first, 12.0 / 80, rng), ribosomes.randomised(second, 12.0 / 80, rng), mask
    )
    yield Row(case, "with_random_phases_fsc_0.5", resolution(frequency, values, 12.0, 0.5), "Å", "higher")
    frequency, values = fsc(first, second, masks.soft_sphere(32, 10, 3))
    case = "20 real ribosomes, soft sphere of 120 Å"
    yield Row(case, "half_map_fsc_0.5", resolution(frequency, values, 12.0, 0.5), "Å", "lower")
    yield Row(case, "half_map_fsc_0.143", resolution(frequency, values, 12.0, 0.143), "Å", "lower")


def crowding(quick: bool) -> Iterator[Row]:
    shape = (100, 256, 256) if quick else (200, 512, 512)
    count = 20 if quick else 130
    started = time.perf_counter()
    with PeakMemory() as memory:
        built = [density.build(name, None, "", 10.0, 20.0, CORES) for name in KINDS]
        specimen = scene.Specimen(shape, 10.0, 20.0, [scene.Placement(made, count) for made in built])
        made = scene.build_scene(specimen, np.random.default_rng(1))
    seconds = time.perf_counter() - started
    size = "x".join(str(side) for side in reversed(shape))
    case = f"scene {size}, {8 * count} complexes of 8 kinds"
    yield Row(case, "seconds", seconds, "s", "lower", 90.0)
    yield Row(case, "placed", len(made.positions), "", "higher", float(8 * count))
    yield Row(case, "occupancy", made.occupancy, "", "higher")
    yield Row(case, "peak_memory", memory.mebibytes, "MiB", "lower")
    # every shape rendered anew, and its voxels counted: none is shared
    voxels = np.zeros(shape, np.uint16)
    for position, rotation, index in zip(made.positions, made.rotations, made.classes, strict=True):
        whole = np.rint(position).astype(int)
        mask = built[index].rotated_shape(rotation, position - whole)
        there = np.argwhere(mask) - np.array(mask.shape) // 2 + whole[::-1]
        voxels[tuple(there.T)] += 1
    yield Row(case, "voxels_shared", float(np.count_nonzero(voxels > 1)), "", "lower", 0.0)
    inside = np.bincount(made.instances.ravel(), made.density.ravel().astype(np.float64))
    means = inside[1:] / np.bincount(made.instances.ravel())[1:]
    yield Row(case, "lowest_instance_mean", float(means.min() / made.density[made.instances == 0].mean()), "x outside",
              "higher", 1.0)  # fmt: skip


def whole_tomogram(quick: bool) -> Iterator[Row]:
    """The service's three operations, files written and read again."""
    x, y, z, step, count = (256, 256, 96, 4, 20) if quick else (512, 512, 200, 2, 130)
    with TemporaryDirectory() as folder:
        store = Store.open(settings_for(Path(folder)))
        case = f"tomogram {x}x{y}x{z}, {8 * count} complexes, {120 // step + 1} tilts"
        started = time.perf_counter()
        with PeakMemory() as memory:
            made = run_operation(
                service,
                pb.SimulateSceneRequest(
                    size_x=x, size_y=y, size_z=z, voxel_size_angstrom=10,
                    structures=[pb.Structure(name=name, count=count) for name in KINDS],
                ),
                store,
            )  # fmt: skip
            series = run_operation(
                service,
                pb.SimulateTiltSeriesRequest(
                    density_uri=made.density_uri, snr=0.1, tilt_scheme=pb.TiltScheme(tilt_step_degrees=step)
                ),
                store,
            )
            result = run_operation(
                service,
                pb.ReconstructRequest(tilt_series_uri=series.tilt_series_uri, tilts_uri=series.tilts_uri, size_z=z),
                store,
            )
        yield Row(case, "seconds", time.perf_counter() - started, "s", "lower", 480.0)
        yield Row(case, "peak_memory", memory.mebibytes, "MiB", "lower", 6144.0)
        # what the SNR is: the tomogram of the images without noise, against the rest
        clean = run_operation(
            service,
            pb.ReconstructRequest(tilt_series_uri=series.noise_free_uri, tilts_uri=series.tilts_uri, size_z=z),
            store,
        )
        signal = open_volume(store, clean.tomogram_uri).read()
        noise = open_volume(store, result.tomogram_uri).read()
        noise -= signal
        snr = float(signal.var(dtype=np.float64) / noise.var(dtype=np.float64))
        yield Row(case, "snr_off_by", abs(snr / 0.1 - 1), "", "lower", 0.1)


def subtomogram_sets(quick: bool) -> Iterator[Row]:
    count = 40 if quick else 200
    built = [density.build("double-ring", None, "", 6.0, 12.0, CORES)]
    parameters = imaging.ImagingParameters(pixel_size_angstrom=6.0, defocus_um=6.0)
    series: TiltSeries = imaging.draw_tilt_series(tilt_scheme(-60, 60, 3), parameters, np.random.default_rng(0))
    setup = subtomograms.Setup(built, 64, series, parameters, detector.sinc_mtf)
    drawn = poses.draw_poses([count], np.random.default_rng(1), max_shift_voxels=3)
    few = poses.draw_poses([2], np.random.default_rng(1))
    for _ in subtomograms.subtomograms(setup, few, None, [], CORES):
        pass  # what is compiled on its first call
    started = time.perf_counter()
    with PeakMemory() as memory:
        level = subtomograms.calibrate(setup, drawn, 0.1, np.random.SeedSequence(2), CORES)
        for _ in subtomograms.subtomograms(setup, drawn, level, np.random.SeedSequence(3).spawn(count), CORES):
            pass
    case = f"{count} subtomograms of 64^3, 41 tilts"
    yield Row(case, "seconds", time.perf_counter() - started, "s", "lower", 60.0 * count / 200)
    yield Row(case, "peak_memory", memory.mebibytes, "MiB", "lower")


def measure(quick: bool) -> Iterator[Row]:
    for part in (
        projections, thon_rings, real_structures, snr_of_subtomograms, subtomogram_sets, crowding, whole_tomogram,
    ):  # fmt: skip
        yield from part(quick)


if __name__ == "__main__":
    main("simulation", measure)
