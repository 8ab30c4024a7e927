"""Makes docs/images/real-subtomograms-50s.png and real-subtomograms-70s.png; needs matplotlib and the folder of real
data beside the repository: python docs/images/real_subtomograms.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray

mpl.use("agg")
from matplotlib import pyplot as plt

from benchmarks import real_subtomograms as sets
from cryofleet.numerics.fourier import low_pass

HERE = Path(__file__).parent


def scaled_to(volume: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """A volume times the factor that brings it nearest to another."""
    return volume * np.float32(np.vdot(volume, other) / np.vdot(volume, volume))


def fifty_s() -> None:
    data = sets.two_classes()
    found = sets.by_likelihood(data)
    same_way = np.mean(found.labels == data.classes) >= 0.5
    classes = [sets.within_sphere(volume, 6.0) for volume in (found.volumes if same_way else found.volumes[::-1])]
    truths = [sets.within_sphere(volume, 6.0) for volume in data.truths]
    classes = [scaled_to(volume, truth) for volume, truth in zip(classes, truths, strict=True)]
    rows = [("true volumes", truths), ("classes found", classes)]
    figure, panels = plt.subplots(2, 3, figsize=(8.4, 5.8), layout="constrained")
    # where the classes differ most
    plane = int(np.argmax(np.square(truths[0] - truths[1]).sum(axis=(1, 2))))
    strongest, apart = np.abs(truths[0]).max(), np.abs(truths[0] - truths[1]).max()
    for row, (name, (first, second)) in zip(panels, rows, strict=True):
        for panel, image, limit, title in (
            (row[0], first, strongest, "class D"),
            (row[1], second, strongest, "class E"),
            (row[2], first - second, apart, "D - E"),
        ):
            colours = "RdBu_r" if image is not first and image is not second else "gray"
            panel.imshow(image[plane], cmap=colours, origin="lower", vmin=-limit, vmax=limit, interpolation="bicubic")
            panel.set(xticks=[], yticks=[], title=f"{title}, {name}")
    figure.savefig(HERE / "real-subtomograms-50s.png", dpi=80)


def seventy_s() -> None:
    data, reference = sets.ribosomes(), sets.ribosome_structure()
    fit = sets.fitted(sets.maps_at(data, data.deposited)[2], reference)
    deposited = sets.maps_at(data, sets.in_frame_of(fit, data.deposited))[2]
    found = sets.maps_at(data, sets.aligned(data, reference))[2]
    titles = ("structure 7P6Z", "20 ribosomes, deposited poses", "20 ribosomes, poses found")
    figure, panels = plt.subplots(2, 3, figsize=(8.4, 5.8), layout="constrained")
    for column, volume, title in zip(panels.T, (reference, deposited, found), titles, strict=True):
        low = low_pass(volume, 60.0, sets.PIXEL_ANGSTROM)
        limit = np.abs(low * sets.SPHERE).max()
        middle = sets.BOX // 2
        for panel, image, axes in ((column[0], low[middle], "x-y"), (column[1], low[:, middle], "x-z")):
            panel.imshow(image, cmap="gray", origin="lower", vmin=-limit, vmax=limit, interpolation="bicubic")
            panel.set(xticks=[], yticks=[], ylabel=axes)
        column[0].set_title(title, fontsize=10)
    figure.savefig(HERE / "real-subtomograms-70s.png", dpi=80)


if __name__ == "__main__":
    torch.set_num_threads(1)
    fifty_s()
    seventy_s()
