"""Makes docs/images/microtubule-lattice.png, and microtubule-picks.png where a map of beta-tubulin is given; needs
matplotlib: python docs/images/microtubule.py TOMOGRAM [TUBULIN]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import mrcfile
import numpy as np
import tifffile
from scipy.spatial import cKDTree

mpl.use("agg")
from matplotlib import pyplot as plt

from benchmarks.microtubule import wall_distance, wall_picks
from cryofleet.numerics.cylindrical import cylindrical_spectrum, cylindrical_transform, frames_along, trace_axis

VOXEL_NM = 1.052


def main(tomogram: Path) -> None:
    volume = tifffile.imread(tomogram).astype(np.float32)
    axis = trace_axis(volume, 10.5, along="y")
    every = np.arange(4, 18, 0.25)
    profile = cylindrical_transform(volume, axis, every, 96).mean(axis=(1, 2))
    radii = np.arange(8.0, 14.0, 0.5)
    unrolled = cylindrical_transform(volume, axis, radii, 96)
    spectrum = cylindrical_spectrum(unrolled, VOXEL_NM, radii)
    orders, frequency = spectrum.orders, spectrum.axial_frequency
    wall = profile - profile[(every > 14) & (every < 17)].mean()
    inside = (every >= 8) & (every <= 14)
    radius = float((every * wall)[inside].sum() / wall[inside].sum())
    print(f"wall: peak {every[np.argmax(profile)] * VOXEL_NM:.2f} nm, centre of mass {radius * VOXEL_NM:.2f} nm")
    arc = np.linalg.norm(np.diff(axis, axis=0), axis=1).sum()
    chord = axis[-1] - axis[0]
    off = np.linalg.norm(np.cross(axis - axis[0], chord / np.linalg.norm(chord)), axis=1).max()
    print(f"axis: {arc * VOXEL_NM:.0f} nm, {off * VOXEL_NM:.2f} nm off its chord")
    near = np.flatnonzero((frequency > 1 / 4.4) & (frequency < 1 / 3.8))
    marks = [(13, 0.0)]
    equator = spectrum.line(0.0)
    others = (np.abs(orders) >= 8) & (np.abs(orders) <= 20) & (np.abs(orders) != 13)
    print(f"h=13, equator: {spectrum.at(13, 0.0) / np.median(equator[others]):.0f} times the median of 8..20")
    for order in (-3, 10):
        column = spectrum.power[:, orders == order][:, 0]
        top = near[np.argmax(column[near])]
        low, mid, high = np.log(column[top - 1 : top + 2])
        found = (top + 0.5 * (low - high) / (low - 2 * mid + high)) * frequency[1]
        rest = (np.abs(orders) <= 15) & (orders != -3) & (orders != 10)
        ratio = column[top] / np.median(spectrum.power[top][rest])
        print(f"h={order}: repeat {1 / found:.3f} nm, {ratio:.0f} times the median of its line's orders to 15")
        marks.append((order, found))

    figure, panels = plt.subplots(1, 3, figsize=(12, 6), layout="constrained")
    middle = round(float(axis[:, 2].mean()))
    panels[0].imshow(volume[middle - 1 : middle + 2].mean(axis=0), cmap="gray", origin="lower")
    panels[0].plot(axis[:, 0], axis[:, 1], color="tab:orange", linewidth=1.5)
    panels[0].set(title="x-y plane, traced axis", xlabel="x / voxels", ylabel="y / voxels")
    extent = (0, 360, 0, unrolled.shape[1] * VOXEL_NM)
    panels[1].imshow(unrolled[2:10].mean(axis=0), cmap="gray", origin="lower", aspect="auto", extent=extent)
    panels[1].set(title="wall, unrolled", xlabel="angle / degrees", ylabel="along the axis / nm")
    shown = np.abs(orders) <= 20
    logarithm = np.log10(spectrum.power[:, shown] + 1e-9)
    low, high = np.percentile(logarithm, [20, 99.9])
    edge = (-20.5, 20.5, -frequency[1] / 2, frequency[-1] + frequency[1] / 2)
    panels[2].imshow(
        logarithm,
        cmap="magma",
        origin="lower",
        aspect="auto",
        extent=edge,
        vmin=low,
        vmax=high,
        interpolation="nearest",
    )
    for order, at in marks:
        panels[2].plot(order, at, "o", markersize=16, markerfacecolor="none", markeredgecolor="cyan")
        panels[2].annotate(f"h = {order}", (order, at), (0, 12), textcoords="offset points", color="cyan", ha="center")
    panels[2].set(
        title="cylindrical power spectrum",
        xlabel="Bessel order h",
        ylabel="axial frequency / nm⁻¹",
        ylim=(-0.006, 0.32),
    )
    figure.savefig(Path(__file__).with_name("microtubule-lattice.png"), dpi=90)


def picks(tomogram: Path, tubulin: Path) -> None:
    volume = tifffile.imread(tomogram).astype(np.float32)
    axis = trace_axis(volume, 10.5, along="y")
    with mrcfile.open(tubulin) as file:
        found = wall_picks(volume, np.array(file.data, np.float32))
    best = found.positions[:100].astype(np.float64)
    distance = wall_distance(best, axis, 10.5) * VOXEL_NM
    print(f"within 3 nm of the wall: {(distance <= 3).mean():.0%}, median {np.median(distance):.2f} nm")
    figure, panels = plt.subplots(1, 2, figsize=(9, 6), layout="constrained")
    middle = round(float(axis[:, 2].mean()))
    panels[0].imshow(volume[middle - 4 : middle + 5].mean(axis=0), cmap="gray", origin="lower")
    panels[0].plot(best[:, 0], best[:, 1], "o", markersize=5, markerfacecolor="none", color="tab:orange")
    panels[0].set(title="the best 100 picks", xlabel="x / voxels", ylabel="y / voxels")
    frames = frames_along(axis, 0.05)
    nearest = cKDTree(frames.points).query(best)[1]
    away = best - frames.points[nearest]
    across = (away * frames.first[nearest]).sum(axis=1), (away * frames.second[nearest]).sum(axis=1)
    turn = np.linspace(0, 2 * np.pi, 200)
    panels[1].plot(11.05 * np.cos(turn), 11.05 * np.sin(turn), color="gray", linewidth=1)
    panels[1].plot(across[0] * VOXEL_NM, across[1] * VOXEL_NM, "o", markersize=4, color="tab:orange")
    panels[1].set(title="seen along the axis", xlabel="nm", ylabel="nm", aspect="equal")
    figure.savefig(Path(__file__).with_name("microtubule-picks.png"), dpi=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        picks(Path(sys.argv[1]), Path(sys.argv[2]))
