"""How true tomograms are that are simulated in a style: a part of `python -m benchmarks.dual.denoising`.

A small network is taught to tell simulated subvolumes from those of real tomograms of the style, and asked about others
of specimens it has not seen; one for DUAL's, and one for the usual simulation: the density map without what the wedge
lacks, and white Gaussian noise within the wedge, at the SNR of the style. The area under a coin's ROC is 0.5.

    network     three convolutions 4^3 of stride 2 to 8, 16 and 32 channels, leaky ReLU; the mean over all places;
                a dense layer
    training    2,000 subvolumes of 32^3 of each kind at random places, steps of 16, 3 epochs, Adam, rate 0.001
    test        500 of each

And the mean power spectra of subvolumes: as a function of |k|, and in sectors of the angle with the beam.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal.windows import hann
from sklearn.metrics import roc_auc_score
from torch import nn

from benchmarks.dual.sets import SNR, Array, standardised
from benchmarks.harness import Row
from cryofleet.numerics.wedge import wedge_mask

SIDE = 32
TRAINED, TESTED, EPOCHS, BATCH = 2000, 500, 3, 16
AIM = 0.65
SPECTRA = 0.10
#: Sectors of the angle between k and the plane across the beam.
SECTORS = ((0, 30), (30, 60), (60, 90))


def gaussian_simulation(density: Array, snr: float, seed: int) -> Array:
    """A density map, protein positive, with a wedge of ±60° about y and white Gaussian noise, at an SNR."""
    shape = density.shape[0], density.shape[1], density.shape[2]
    mask = wedge_mask(shape, -60, 60, half=True)
    rng = np.random.default_rng(seed)

    def masked(volume: Array) -> Array:
        return np.asarray(np.fft.irfftn(np.fft.rfftn(volume) * mask, shape), np.float32)

    signal, noise = masked(density), masked(rng.standard_normal(density.shape).astype(np.float32))
    return standardised(signal / signal.std() + noise / noise.std() / np.sqrt(snr))


def boxes(volumes: list[Array], count: int, seed: int) -> Array:
    """Subvolumes at random places (count, 32, 32, 32)."""
    rng = np.random.default_rng(seed)
    cut = []
    for number in range(count):
        volume = volumes[number % len(volumes)]
        z, y, x = (int(rng.integers(0, side - SIDE + 1)) for side in volume.shape)
        cut.append(volume[z : z + SIDE, y : y + SIDE, x : x + SIDE])
    return np.stack(cut)


def area_under_roc(real: tuple[Array, Array], made: tuple[Array, Array], epochs: int = EPOCHS) -> float:
    """How well a network trained on the first boxes of either kind tells the second."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers: list[nn.Module] = []
    for before, after in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv3d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 1)).to(device)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    shown = torch.from_numpy(np.concatenate([real[0], made[0]]))[:, None]
    classes = torch.cat([torch.ones(len(real[0])), torch.zeros(len(made[0]))])
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(shown)), BATCH):
            logits = network(shown[rows].to(device))[:, 0]
            loss = nn.functional.binary_cross_entropy_with_logits(logits, classes[rows].to(device))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    asked = torch.from_numpy(np.concatenate([real[1], made[1]]))[:, None]
    with torch.no_grad():
        scores = torch.cat([network(part.to(device))[:, 0].cpu() for part in torch.split(asked, 64)])
    truth = np.repeat([1, 0], [len(real[1]), len(made[1])])
    return float(roc_auc_score(truth, scores.numpy()))


def mean_power(cut: Array) -> NDArray[np.float64]:
    """The mean power spectrum (32, 32, 17) of boxes under a Hann window."""
    line = hann(SIDE, sym=False)
    window = line[:, None, None] * line[:, None] * line
    power: NDArray[np.float64] = np.mean(
        [(np.abs(np.fft.rfftn(part * window, axes=(1, 2, 3))) ** 2).mean(axis=0) for part in np.array_split(cut, 16)],
        axis=0,
    )
    return power


def spectral_deviations(real: Array, made: Array) -> dict[str, float]:
    """Mean over shells of |made / real - 1| of the mean power, over all directions and in each sector."""
    of_real, of_made = mean_power(real), mean_power(made)
    axis = np.fft.fftfreq(SIDE) * SIDE
    z, y, x = np.meshgrid(axis, axis, np.arange(SIDE // 2 + 1), indexing="ij")
    radius = np.sqrt(z**2 + y**2 + x**2)
    # The tilt axis is y: the wedge is by the angle in the plane of x and z.
    elevation = np.degrees(np.arctan2(np.abs(z), np.abs(x)))
    found = {}
    for name, inside in {
        "all directions": np.ones_like(radius, bool),
        **{f"{low} to {high}° from x": (elevation >= low) & (elevation <= high) for low, high in SECTORS},
    }.items():
        ratios = []
        for shell in range(2, SIDE // 2):
            rows = inside & (np.abs(radius - shell) < 0.5)
            ratios.append(of_made[rows].mean() / of_real[rows].mean())
        found[name] = float(np.abs(np.array(ratios) - 1).mean())
    return found


def rows(
    case: str, real: tuple[Array, Array], densities: tuple[Array, Array], dual: tuple[Array, Array], quick: bool
) -> Iterator[Row]:
    """Of tomograms in the style, density maps, and DUAL's tomograms of these: each, one to learn from, one to test."""
    trained, tested, epochs = (64, 32, 1) if quick else (TRAINED, TESTED, EPOCHS)
    gaussian = gaussian_simulation(densities[0], SNR, 1), gaussian_simulation(densities[1], SNR, 2)
    cut = [(boxes([pair[0]], trained, 1), boxes([pair[1]], tested, 2)) for pair in (real, dual, gaussian)]
    for name, made, target in (("DUAL", cut[1], AIM), ("Gaussian noise", cut[2], None)):
        area = area_under_roc(cut[0], made, epochs)
        yield Row(f"{case}: told from the style, {name}", "area_under_roc", area, "", "lower", target)
        for where, deviation in spectral_deviations(cut[0][1], made[1]).items():
            limit = SPECTRA if name == "DUAL" else None
            yield Row(f"{case}: power, {where}, {name}", "mean_deviation", deviation, "", "lower", limit)
