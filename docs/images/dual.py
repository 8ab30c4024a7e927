"""Makes docs/images/dual-microtubule.png and prints what docs/dual.md says of it; needs matplotlib:

    python docs/images/dual.py ../shared/data/real/microtubule_13pf.tif ../shared/data/maps/NAME_OF_A_TUBULIN_MAP

The density maps of the second domain are straight microtubules of 13 protofilaments, each of another length of the
axial repeat: what the denoiser learns of it is wrong for the tomogram in all of them but by chance.
"""

from __future__ import annotations

# First, as it sets what torch reads when it is loaded.
import services.learning  # isort: skip  # noqa: F401

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib as mpl
import mrcfile
import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

mpl.use("agg")
from matplotlib import pyplot as plt

from benchmarks.crowded import store_in
from benchmarks.simulation import CORES
from cryofleet.artifacts import ResultWriter
from cryofleet.numerics.cylindrical import cylindrical_spectrum, cylindrical_transform, trace_axis
from cryofleet.storage import Store
from cryofleet.testing import run_operation
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import VolumeInfo, VolumeWriter, open_volume
from services.learning.service import service as learning

VOXEL_ANGSTROM, MAP_VOXEL_ANGSTROM = 10.52, 5.144
RADIUS_ANGSTROM, PROTOFILAMENTS, STARTS = 111.5, 13, 3
#: Axial repeats of the second domain, in Å; the tomogram's is 41.0.
REPEATS = (36.0, 38.0, 40.0, 42.0, 44.0, 46.0)
Array = NDArray[np.float32]


def microtubule(tubulin: Array, shape: tuple[int, int, int], repeat: float, seed: int) -> Array:
    """The density of a straight microtubule near y in a field (z, y, x), at a random place and a random angle to y."""
    rng = np.random.default_rng(seed)
    density = ndimage.gaussian_filter(np.clip(tubulin, 0, None), 0.5 * VOXEL_ANGSTROM / MAP_VOXEL_ANGSTROM)
    centre = np.array(ndimage.center_of_mass(density))[::-1]
    z, y, x = shape
    # The axis from +z to y, turned about it at random, and some degrees off y.
    laid = Rotation.from_euler("zxz", [rng.uniform(0, 360), -90, rng.uniform(-15, 15)], degrees=True)
    tilted = Rotation.from_euler("x", rng.uniform(-4, 4), degrees=True) * laid
    middle = np.array([rng.uniform(0.35, 0.65) * x, y / 2, rng.uniform(0.45, 0.55) * z])
    field = np.zeros(shape, np.float32)
    reach = int(0.6 * np.hypot(y, x) * VOXEL_ANGSTROM / repeat)
    half = 5
    ticks = np.arange(-half, half + 1)
    box = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), axis=-1)[..., ::-1].reshape(-1, 3)
    for filament in range(PROTOFILAMENTS):
        turn = Rotation.from_euler("z", 360 * filament / PROTOFILAMENTS, degrees=True)
        spin = tilted * turn * Rotation.from_euler("z", -90, degrees=True)
        for number in range(-reach, reach + 1):
            place = turn.apply([RADIUS_ANGSTROM, 0.0, 0.0])
            # A 3-start helix of the left hand: monomers of the next protofilament lie lower.
            place[2] += (number - STARTS * filament / PROTOFILAMENTS) * repeat
            at = tilted.apply(place) / VOXEL_ANGSTROM + middle
            voxels = np.round(at).astype(int) + box
            inside = np.all((voxels >= 0) & (voxels < [x, y, z]), axis=1)
            if not inside.any():
                continue
            offsets = spin.inv().apply((voxels[inside] - at) * VOXEL_ANGSTROM) / MAP_VOXEL_ANGSTROM + centre
            values = ndimage.map_coordinates(density, offsets[:, ::-1].T, order=1, mode="constant")
            np.add.at(field, tuple(voxels[inside][:, ::-1].T), values.astype(np.float32))
    return field


def write(store: Store, volume: Array, number: int, tilt_degrees: float) -> str:
    """A volume, protein positive; its URI."""
    writer = ResultWriter(store, "default", f"{number:064x}")
    shape = volume.shape[0], volume.shape[1], volume.shape[2]
    info = VolumeInfo(shape, VOXEL_ANGSTROM, "light", -tilt_degrees, tilt_degrees)
    with VolumeWriter(writer, "volume.mrc", info) as out:
        out.write(volume)
    writer.commit(operation="docs.Dual", version=1, parameters={}, inputs={}, result={"uri": out.uri}, seconds=0.0)
    return out.uri


def layer_line(volume: Array, axis: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Axial frequency in 1/nm and power of orders -3 and 10 there, and the repeat in nm where it is highest."""
    radii = np.arange(8.0, 14.0, 0.5)
    unrolled = cylindrical_transform(volume, axis, radii, 96)
    spectrum = cylindrical_spectrum(unrolled, VOXEL_ANGSTROM / 10, radii)
    frequency = np.asarray(spectrum.axial_frequency, np.float64)
    power = sum(spectrum.power[:, spectrum.orders == order][:, 0] for order in (-3, 10))
    near = np.flatnonzero((frequency > 1 / 4.8) & (frequency < 1 / 3.4))
    top = near[np.argmax(power[near])]
    low, mid, high = np.log(power[top - 1 : top + 2])
    found = (top + 0.5 * (low - high) / (low - 2 * mid + high)) * frequency[1]
    return frequency, np.asarray(power, np.float64), float(1 / found)


def main(tomogram: Path, tubulin: Path) -> None:
    volume = tifffile.imread(tomogram).astype(np.float32)
    monomer = mrcfile.read(tubulin).astype(np.float32)
    with TemporaryDirectory() as folder:
        store = store_in(Path(folder))
        uri = write(store, volume, 1, 60)
        shape = volume.shape[0], volume.shape[1], volume.shape[2]
        densities = [
            write(store, microtubule(monomer, shape, repeat, seed), seed, 90)
            for seed, repeat in enumerate(REPEATS, start=2)
        ]
        trained = run_operation(
            learning,
            learning_pb2.TrainDualRequest(
                tomograms_uris=[uri], densities_uris=densities, spacing_voxels=8, max_epochs=3, batch_size=4,
                learning_rate=4e-4,
            ),
            store,
            threads=CORES,
        )  # fmt: skip
        print(f"{trained.tomogram_subvolumes} and {trained.density_subvolumes} subvolumes", *trained.warnings)
        made = run_operation(
            learning, learning_pb2.DenoiseRequest(model_uri=trained.model_uri, tomogram_uri=uri), store, threads=CORES
        )
        denoised = open_volume(store, made.volume_uri).read()
        example = open_volume(store, densities[2]).read()
    axis = trace_axis(volume, 10.5, along="y")
    middle = round(float(axis[:, 2].mean()))
    figure, panels = plt.subplots(1, 4, figsize=(13, 6), layout="constrained", width_ratios=[1, 1, 1, 1.3])
    for panel, shown, title in zip(
        panels,
        (volume, denoised, example),
        ("tomogram", "denoised", "of the second domain, repeat 4.0 nm"),
        strict=False,
    ):
        low, high = np.percentile(shown[middle], [1, 99.5])
        panel.imshow(shown[middle], cmap="gray", origin="lower", vmin=low, vmax=high)
        panel.set(title=title, xlabel="x / voxels", ylabel="y / voxels")
    for name, each in (("tomogram", volume), ("denoised", denoised)):
        frequency, power, repeat = layer_line(each, axis)
        # What is to be told from: the same sum of orders on other axial frequencies.
        away = (frequency > 1 / 6) & (frequency < 1 / 2.6) & (np.abs(frequency - 1 / repeat) > 0.02)
        height = power.max(initial=0, where=np.abs(frequency - 1 / repeat) < 0.01) / np.median(power[away])
        print(f"{name}: repeat {repeat:.3f} nm, {height:.0f} times the median from 6 to 2.6 nm")
        panels[3].semilogy(frequency, power / np.median(power[away]), label=f"{name}: {repeat:.2f} nm")
    panels[3].set(title="orders -3 and 10 along the axis", xlabel="1 / nm", xlim=(0.1, 0.45))
    panels[3].legend()
    out = Path(__file__).parent / "dual-microtubule.png"
    figure.savefig(out, dpi=80)
    print(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
