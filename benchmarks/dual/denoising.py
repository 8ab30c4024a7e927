"""How close denoised tomograms come to the truth, and simulated ones to real: python -m benchmarks.dual.denoising.

Fields of `benchmarks.dual.sets` at an SNR of 0.1: DUAL is trained on noisy ones and on the density maps of others, and
denoises one that it has not met. PSNR and SSIM are against that one's density map, all volumes standardised; PSNR with
the map's range as its peak, SSIM with a data range of 1.

    CRYOFLEET_DUAL=full     four noisy, four clean, one of test, 512 x 512 x 180, the paper's: for a GPU
                            otherwise one of each, 256 x 256 x 96

Beside it stand no filter; a Gaussian, anisotropic diffusion and non-local means, each at the best of several strengths
by the truth itself, which nobody has in practice; Topaz's pretrained networks, run by the `topaz` that
`CRYOFLEET_TOPAZ` names (package topaz-em in an environment of its own; left out otherwise); and noise-to-noise: the
same U-Net that DUAL's denoiser is, taught to tell odd tilts' tomograms from even ones'.

Then DUAL makes tomograms of the test's density map and of one that it was trained with: `benchmarks.dual.realism`.
"""

from __future__ import annotations

# First, as it sets what torch reads when it is loaded.
import services.learning  # isort: skip  # noqa: F401

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mrcfile
import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.crowded import store_in
from benchmarks.dual import realism
from benchmarks.dual.sets import Array, Scene, Shape, Tomogram, protein_positive, quality, scene, standardised, tomogram
from benchmarks.harness import Row, main
from benchmarks.simulation import CORES
from cryofleet.progress import no_progress
from cryofleet.storage import Store
from cryofleet.testing import run_operation
from cryofleet.v1 import io_pb2, learning_pb2
from cryofleet.volumes import open_volume
from services.io.service import service as io
from services.learning import translation
from services.learning.service import service as learning
from services.learning.training import generator_for
from services.learning.unet import UNet, margin

FILTERS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "Gaussian": tuple(
        {"kind": io_pb2.FILTER_KIND_GAUSSIAN, "sigma_angstrom": sigma} for sigma in (10, 15, 20, 25, 30, 40)
    ),
    "anisotropic diffusion": tuple(
        {"kind": io_pb2.FILTER_KIND_ANISOTROPIC_DIFFUSION, "iterations": count} for count in (10, 20, 40, 80)
    ),
    "non-local means": tuple(
        {"kind": io_pb2.FILTER_KIND_NON_LOCAL_MEANS, "strength": strength} for strength in (0.5, 1, 2)
    ),
}
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
TOPAZ = ("unet-3d-10a", "unet-3d-20a")
#: By how much DUAL should be above the best of the others, in dB, and how many times the SSIM.
PSNR_GAIN, SSIM_RATIO = 0.9, 3.0
MINUTES = 40.0


@dataclass(frozen=True)
class Size:
    """How much is done."""

    shape: Shape
    noisy: int
    clean: int
    epochs: int
    channels: int
    batch: int
    learning_rate: float
    filters: Mapping[str, tuple[dict[str, Any], ...]] = field(default_factory=lambda: FILTERS)
    others_steps: int = 1000
    """Of noise-to-noise."""
    spacing: int = 0
    """Voxels from a subvolume to the next; their side where 0."""


SMALL = Size((96, 256, 256), 1, 1, 7, 8, 4, 4e-4, spacing=16)
FULL = Size((180, 512, 512), 4, 4, 20, 16, 16, 1e-4, others_steps=5000)
QUICK = Size((40, 64, 64), 1, 1, 1, 4, 4, 4e-4, {"Gaussian": FILTERS["Gaussian"][2:3]}, 4)


@dataclass(frozen=True)
class Fields:
    """What is trained on, and what is tested with."""

    noisy: tuple[Tomogram, ...]
    clean: tuple[Scene, ...]
    test: tuple[Scene, Tomogram]


def fields(store: Store, size: Size) -> Fields:
    """Each of a specimen of its own."""
    scenes = [scene(store, size.shape, seed) for seed in range(1, size.noisy + size.clean + 2)]
    noisy = tuple(
        tomogram(store, specimen, size.shape, seed) for seed, specimen in enumerate(scenes[: size.noisy], start=1)
    )
    test = scenes[-1]
    return Fields(noisy, tuple(scenes[size.noisy : -1]), (test, tomogram(store, test, size.shape, len(scenes))))


def train_dual(store: Store, given: Fields, size: Size, seed: int = 0) -> learning_pb2.TrainDualResult:
    """By the operation."""
    result: learning_pb2.TrainDualResult = run_operation(
        learning,
        learning_pb2.TrainDualRequest(
            tomograms_uris=[each.uri for each in given.noisy],
            densities_uris=[each.density_uri for each in given.clean],
            max_epochs=size.epochs,
            channels=size.channels,
            batch_size=size.batch,
            learning_rate=size.learning_rate,
            spacing_voxels=size.spacing or None,
            seed=seed,
        ),
        store,
        threads=CORES,
    )
    return result


def denoise(store: Store, model_uri: str, uri: str, strength: float = 1.0) -> str:
    """By the operation."""
    request = learning_pb2.DenoiseRequest(model_uri=model_uri, tomogram_uri=uri, strength=strength)
    return str(run_operation(learning, request, store, threads=CORES).volume_uri)


def uncertainty(case: str, store: Store, model_uri: str, noisy: Tomogram, truth: Array) -> Iterator[Row]:
    """Whether the denoiser is wrong where it says that it is uncertain."""
    request = learning_pb2.DenoiseRequest(model_uri=model_uri, tomogram_uri=noisy.uri, uncertainty=True)
    made = run_operation(learning, request, store, threads=CORES)
    wrong = np.abs(protein_positive(store, made.volume_uri) - standardised(truth))
    said = open_volume(store, made.uncertainty_uri).read()
    rank = float(spearmanr(said.ravel()[::7], wrong.ravel()[::7]).statistic)
    yield Row(f"{case}: uncertainty and error", "rank_correlation", rank, "", "higher")


def strengths(case: str, store: Store, model_uri: str, noisy: Tomogram, truth: Array, quick: bool) -> Iterator[Row]:
    """What is left in the ice of a tomogram's deviation, by the denoiser's strength: it should fall from each to the
    next.
    """
    ice = truth < np.median(truth) + 0.05
    before = open_volume(store, noisy.uri).read()
    left = []
    for strength in STRENGTHS[:: 4 if quick else 1]:
        after = open_volume(store, denoise(store, model_uri, noisy.uri, strength)).read()
        left.append(float(after[ice].std() / before[ice].std()))
        yield Row(f"{case}: strength {strength:g}", "deviation_left_in_ice", left[-1], "", "lower")
    falls = float(np.mean(np.diff(left) < 0))
    yield Row(f"{case}: from a strength to the next", "share_that_falls", falls, "", "higher", 1.0)


def simulate(store: Store, model_uri: str, density_uri: str, seed: int) -> Array:
    """By the operation, protein positive."""
    request = learning_pb2.SimulateStyleRequest(model_uri=model_uri, density_uri=density_uri, seed=seed)
    return protein_positive(store, run_operation(learning, request, store, threads=CORES).tomograms_uris[0])


def noise_to_noise(store: Store, given: Fields, size: Size) -> Array:
    """The test's tomogram, the mean of what is made of its halves, protein positive.

    Lehtinen et al. 2018: the noise of one half can't be told from the other, so that the squared difference is least
    for what they share. Boxes, batches, channels and optimiser are DUAL's.
    """
    halves = [[protein_positive(store, uri) for uri in (each.even_uri, each.odd_uri)] for each in given.noisy]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = UNet(size.channels, generator=generator_for(0)).to(device)
    optimiser = torch.optim.AdamW(network.parameters(), size.learning_rate)
    rng = np.random.default_rng(0)
    side = 32
    for step in range(size.others_steps):
        for group in optimiser.param_groups:
            group["lr"] = size.learning_rate * min(1.0, 2 * (1 - step / size.others_steps))
        seen, wanted = [], []
        for _ in range(2 * size.batch):
            pair = halves[rng.integers(len(halves))]
            z, y, x = (int(rng.integers(0, length - side + 1)) for length in pair[0].shape)
            order = rng.permutation(2)
            boxes = [pair[number][z : z + side, y : y + side, x : x + side] for number in order]
            seen.append(boxes[0])
            wanted.append(boxes[1])
        inputs, targets = (torch.from_numpy(np.stack(each))[:, None].to(device) for each in (seen, wanted))
        loss = torch.nn.functional.mse_loss(network(inputs), targets)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    test = given.test[1]
    made = [_tiled(network, protein_positive(store, uri), device) for uri in (test.even_uri, test.odd_uri)]
    return np.asarray((made[0] + made[1]) / 2, np.float32)


def _tiled(network: UNet, volume: Array, device: torch.device) -> Array:
    tiles = translation.tiling(64, margin(network.depth), 1 << network.depth)
    shape = volume.shape[0], volume.shape[1], volume.shape[2]
    make = translation.on_device(network, device)
    slabs = translation.translate(make, lambda z0, z1: volume[z0:z1], shape, tiles, no_progress)
    return np.concatenate([made for _, made in slabs])


def topaz(store: Store, uri: str, model: str, folder: Path) -> Array:
    """What a pretrained network of Topaz makes of a tomogram, protein positive."""
    source, out = folder / "tomogram.mrc", folder / model
    mrcfile.write(source, -protein_positive(store, uri), overwrite=True)
    command = [os.environ["CRYOFLEET_TOPAZ"], "denoise3d", str(source), "-m", model, "-o", str(out), "-d", "-1"]
    subprocess.run(command, check=True, capture_output=True)
    return standardised(mrcfile.read(next(out.glob("*.mrc"))), -1)


def measure(quick: bool) -> Iterator[Row]:
    size = QUICK if quick else FULL if os.environ.get("CRYOFLEET_DUAL") == "full" else SMALL
    with TemporaryDirectory() as folder:
        store = store_in(Path(folder))
        given = fields(store, size)
        specimen, noisy = given.test
        truth = protein_positive(store, specimen.density_uri)
        case = f"{size.shape[2]}x{size.shape[1]}x{size.shape[0]} at 10 Å, SNR 0.1"
        best = [-np.inf, -np.inf]

        def figures(name: str, found: Array, baseline: bool = True) -> Iterator[Row]:
            psnr, ssim = quality(truth, found)
            if baseline:
                best[:] = max(best[0], psnr), max(best[1], ssim)
            yield Row(f"{case}: {name}", "psnr", psnr, "dB", "higher")
            yield Row(f"{case}: {name}", "ssim", ssim, "", "higher")

        yield from figures("none", protein_positive(store, noisy.uri))
        for name, choices in size.filters.items():
            made = [
                run_operation(io, io_pb2.FilterRequest(volume_uri=noisy.uri, **each), store, threads=CORES).volume_uri
                for each in choices
            ]
            volumes = [protein_positive(store, uri) for uri in made]
            yield from figures(name, max(volumes, key=lambda volume: quality(truth, volume)[0]))
        if os.environ.get("CRYOFLEET_TOPAZ"):
            for model in TOPAZ:
                yield from figures(f"Topaz, {model}", topaz(store, noisy.uri, model, Path(folder)))
        yield from figures("noise to noise", noise_to_noise(store, given, size), baseline=False)

        started = time.perf_counter()
        trained = train_dual(store, given, size)
        yield Row(f"{case}: DUAL, training", "minutes", (time.perf_counter() - started) / 60, "min", "lower", MINUTES)
        started = time.perf_counter()
        made_uri = denoise(store, trained.model_uri, noisy.uri)
        yield Row(f"{case}: DUAL, denoising", "seconds", time.perf_counter() - started, "s", "lower")
        yield from figures("DUAL", protein_positive(store, made_uri), baseline=False)
        found = protein_positive(store, denoise(store, trained.model_uri, noisy.uri, 2.0))
        psnr, ssim = quality(truth, found)
        yield from figures("DUAL, mean over four positions", found, baseline=False)
        yield Row(f"{case}: DUAL over the best", "psnr_gain", psnr - best[0], "dB", "higher", PSNR_GAIN)
        yield Row(f"{case}: DUAL over the best", "ssim_ratio", ssim / best[1], "", "higher", SSIM_RATIO)

        yield from uncertainty(case, store, trained.model_uri, noisy, truth)
        yield from strengths(case, store, trained.model_uri, noisy, truth, quick)

        densities = given.clean[0].density_uri, specimen.density_uri
        yield from realism.rows(
            case,
            (protein_positive(store, given.noisy[0].uri), protein_positive(store, noisy.uri)),
            (protein_positive(store, densities[0]), truth),
            (
                simulate(store, trained.model_uri, densities[0], 1),
                simulate(store, trained.model_uri, densities[1], 2),
            ),
            quick,
        )


if __name__ == "__main__":
    main("dual.denoising", measure)
