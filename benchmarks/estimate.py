"""How near estimates come to the truth of simulated tomograms: python -m benchmarks.estimate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from scipy.spatial import KDTree

from benchmarks.harness import Row, main
from benchmarks.simulation import CORES
from benchmarks.simulation import KINDS as SIMULATED
from cryofleet.storage import Store
from cryofleet.testing import run_operation, settings_for
from cryofleet.v1 import simulation_pb2 as pb
from cryofleet.volumes import open_volume
from services.io import contrast_sign, gold, slab, tomogram_snr, wedge
from services.simulation.service import service as simulation

KINDS = SIMULATED[:6]
VOXEL = 10.0
BEADS = 6
#: Lowest and highest tilt, and the step; the ice as share of the tomogram's depth is in `measure`.
RANGES = ((-60.0, 60.0, 3.0), (-50.0, 50.0, 2.0), (-50.0, 70.0, 2.0))
TURN_DEGREES = 12.0

Volume = NDArray[np.float32]


class Specimen:
    """A crowded slab with gold, and its tomograms."""

    def __init__(self, store: Store, side: int, depth: int, ice: int, count: int) -> None:
        self.store, self.depth = store, depth
        self.scene = self._run(
            pb.SimulateSceneRequest(
                size_x=side, size_y=side, size_z=depth, voxel_size_angstrom=VOXEL, allow_partial=True,
                structures=[pb.Structure(name=name, count=count) for name in KINDS],
                gold_beads=[pb.GoldBeads(count=BEADS)], ice_thickness_angstrom=ice * VOXEL,
            )
        )  # fmt: skip
        labels = open_volume(store, self.scene.labels_uri).read()
        self.gold = np.isin(labels, list(self.scene.gold_labels))
        numbered, found = scipy.ndimage.label(self.gold)
        self.beads = np.array(scipy.ndimage.center_of_mass(self.gold, numbered, range(1, found + 1)))[:, ::-1]
        occupied = np.flatnonzero((labels > 0).any(axis=(1, 2)))
        self.thickness = float(occupied[-1] - occupied[0] + 1)

    def _run(self, request: Any) -> Any:
        return run_operation(simulation, request, self.store, threads=CORES)

    def tomograms(self, tilts: tuple[float, float, float], snr: float) -> dict[str, Volume]:
        """The tomogram, its halves, and the tomogram without noise."""
        scheme = pb.TiltScheme(tilt_min_degrees=tilts[0], tilt_max_degrees=tilts[1], tilt_step_degrees=tilts[2])
        series = self._run(
            pb.SimulateTiltSeriesRequest(
                density_uri=self.scene.density_uri, labels_uri=self.scene.labels_uri,
                labels_left_out=list(self.scene.gold_labels), snr=snr, halves=True, tilt_scheme=scheme,
            )
        )  # fmt: skip
        made = self._run(
            pb.ReconstructRequest(
                tilt_series_uri=series.tilt_series_uri, tilts_uri=series.tilts_uri, size_z=self.depth,
                even_uri=series.even_uri, odd_uri=series.odd_uri,
            )
        )  # fmt: skip
        clean = self._run(
            pb.ReconstructRequest(tilt_series_uri=series.noise_free_uri, tilts_uri=series.tilts_uri, size_z=self.depth)
        )
        uris = {"whole": made.tomogram_uri, "even": made.even_uri, "odd": made.odd_uri, "clean": clean.tomogram_uri}
        return {name: open_volume(self.store, uri).read() for name, uri in uris.items()}


def reader(volume: Volume) -> tomogram_snr.ReadSlab:
    return lambda first, last: volume[first:last]


def shape_of(volume: Volume) -> tuple[int, int, int]:
    depth, height, width = volume.shape
    return depth, height, width


def wedges(case: str, volume: Volume, tilts: tuple[float, float, float]) -> Iterator[Row]:
    """With the step that is taken where none is given, 2 degrees."""
    for turn in (0.0, TURN_DEGREES):
        seen = volume
        if turn:
            # counter-clockwise from x to y, as array axes run
            seen = scipy.ndimage.rotate(volume, -turn, axes=(1, 2), reshape=False, order=3, mode="reflect")
        found = wedge.estimate_wedge(reader(seen), shape_of(seen), workers=CORES)
        name = f"{case}, axis at {turn:g}°"
        yield Row(name, "tilt_min_off_by", abs(found.tilt_min - tilts[0]), "°", "lower", 2.0)
        yield Row(name, "tilt_max_off_by", abs(found.tilt_max - tilts[1]), "°", "lower", 2.0)
        yield Row(name, "tilt_axis_off_by", abs(found.axis - turn), "°", "lower", 2.0)
        yield Row(name, "wedge_depth", found.depth, "", "higher")


def snrs(
    case: str, made: dict[str, Volume], left_out: NDArray[np.bool_], tilts: tuple[float, float, float]
) -> Iterator[Row]:
    noise = made["whole"] - made["clean"]
    counted = ~left_out
    true = float(made["clean"][counted].var(dtype=np.float64) / noise[counted].var(dtype=np.float64))
    mask = left_out.astype(np.float32)
    shape = shape_of(mask)
    halves = tomogram_snr.snr_of_halves(reader(made["even"]), reader(made["odd"]), shape, reader(mask), CORES)
    yield Row(case, "true_snr", true, "", "higher")
    yield Row(case, "snr_of_halves_off_by", abs(halves.snr / true - 1), "", "lower", 0.15)
    yield Row(case, "snr_of_halves_error_stated", halves.error / true, "", "lower")
    # a spectrum can't leave gold out
    true = float(made["clean"].var(dtype=np.float64) / noise.var(dtype=np.float64))
    single = tomogram_snr.snr_of_spectrum(reader(made["whole"]), shape, tilts[0], tilts[1], CORES)
    yield Row(case, "snr_of_spectrum", single.snr, "", "higher")
    yield Row(case, "snr_of_spectrum_off_by", abs(single.snr / true - 1), "", "lower")
    yield Row(case, "snr_of_spectrum_error_stated", single.error / true, "", "lower")


def contents(case: str, volume: Volume, specimen: Specimen) -> Iterator[Row]:
    shape = shape_of(volume)
    ice = slab.find_slab(reader(volume), shape, VOXEL)
    yield Row(case, "slab_found", float(ice.found), "", "higher", 1.0)
    yield Row(case, "thickness_off_by", abs(ice.thickness / specimen.thickness - 1), "", "lower")
    yield Row(case, "thickness_error_stated", ice.thickness_error / specimen.thickness, "", "lower")
    beads = gold.find_gold(reader(volume), shape, 100 / VOXEL, True, workers=CORES)
    near = KDTree(specimen.beads).query(beads.positions)[0] if len(beads.positions) else np.empty(0)
    right = float(np.count_nonzero(near < 2))
    yield Row(case, "gold_recall", right / len(specimen.beads), "", "higher", 1.0)
    yield Row(case, "gold_precision", right / max(1, len(beads.positions)), "", "higher", 1.0)
    sign = contrast_sign.estimate_skewness(reader(volume), shape, VOXEL)
    yield Row(case, "contrast_is_right", float(sign.significant and sign.value < 0), "", "higher", 1.0)
    yield Row(case, "skewness_over_error", abs(sign.value) / sign.error, "", "higher", 3.0)


def measure(quick: bool) -> Iterator[Row]:
    side, depth, ice, count = (192, 80, 50, 10) if quick else (320, 128, 80, 35)
    with TemporaryDirectory() as folder:
        specimen = Specimen(Store.open(settings_for(Path(folder))), side, depth, ice, count)
        for tilts in RANGES[:: 2 if quick else 1]:
            for snr in (0.01, 0.1):
                made = specimen.tomograms(tilts, snr)
                case = f"{tilts[0]:g} to {tilts[1]:g}° by {tilts[2]:g}°, SNR {snr:g}"
                yield from wedges(case, made["whole"], tilts)
                yield from snrs(case, made, specimen.gold, tilts)
                yield from contents(case, made["whole"], specimen)


if __name__ == "__main__":
    main("estimate", measure)
