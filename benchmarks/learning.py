"""What the networks cost, and what they find: python -m benchmarks.learning.

A training step is compared with the bare loop of the same network on one batch (forward, backward, optimiser), without
loading, reports, metrics or checkpoints; encoding from the store with the bare forward pass. The step at 32^3 is also
compared with the network as Keras would run it, in torch's plainest operations. Clustering is judged on three
simulated complexes of random pose in white noise, and on the ten classes of `classification_sets`, binned to 16^3: by
the share of boxes that are of the commonest kind of their cluster, and by the mutual information of clusters and kinds.
"""

from __future__ import annotations

# First, as it sets what torch reads when it is loaded.
import services.learning  # isort: skip  # noqa: F401

import os
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional

from benchmarks import classification_sets
from benchmarks.harness import Row, main
from cryofleet.artifacts import ResultWriter
from cryofleet.particles import Particles
from cryofleet.progress import no_progress
from cryofleet.storage import Store
from cryofleet.volumes import VolumeInfo, open_subtomograms, write_subtomograms
from services.learning import class_comparison, clustering, datasets
from services.learning.autoencoder import Autoencoder3D, AutoencoderLoss
from services.learning.pose_normalisation import normalise_poses
from services.learning.preparation import Preparation, standardise
from services.learning.training import (
    Batch,
    Training,
    TrainingOptions,
    generator_for,
    train,
    use_deterministic_algorithms,
)

CPU = torch.device("cpu")
BATCH = 8
L1_PENALTY = 1e-4


def noise(count: int, side: int) -> NDArray[np.float32]:
    return standardise(np.random.default_rng(0).standard_normal((count, side, side, side), np.float32))


def batches_of(boxes: NDArray[np.float32], validation_fraction: float, seed: int) -> datasets.ArrayBatches:
    rows = datasets.split_rows(len(boxes), validation_fraction, seed)
    return datasets.ArrayBatches({"boxes": boxes}, *rows, batch_size=BATCH, seed=seed, device=CPU)


def fit(boxes: NDArray[np.float32], epochs: int, seed: int = 0) -> Training:
    loss = AutoencoderLoss(L1_PENALTY)
    return train(
        lambda generator: Autoencoder3D(boxes.shape[-1], generator),
        loss,
        batches_of(boxes, 0.1, seed),
        TrainingOptions(max_epochs=epochs, patience_epochs=epochs, learning_rate=1e-3, seed=seed),
        device=CPU,
        progress=no_progress,
        save_checkpoint=lambda files: None,
        collapsed=loss.collapsed,
    )


def plain_layers(model: Autoencoder3D, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The network without our identities."""

    def convolve(features: Tensor, number: int) -> Tensor:
        layer = getattr(model, f"convolution_{number}")
        return functional.conv3d(features, layer.weight.contiguous(), layer.bias, padding=1)

    features = functional.max_pool3d(functional.relu(convolve(boxes, 1)), 2)
    features = functional.max_pool3d(functional.relu(convolve(features, 2)), 2)
    codes = functional.relu(model.to_code(features.flatten(1)))
    features = functional.relu(model.from_code(codes)).view(-1, 32, *(model.coarse_size,) * 3)
    for number in (3, 4):
        features = functional.relu(convolve(functional.interpolate(features, scale_factor=2, mode="nearest"), number))
    return convolve(features, 5), codes


class Bare:
    """Forward, backward and optimiser on one batch."""

    def __init__(self, side: int, forward: Callable[[Autoencoder3D, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.model = Autoencoder3D(side, generator_for(0))
        self.forward = forward
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
        self.batch = torch.from_numpy(noise(BATCH, side))[:, None]

    def step(self) -> None:
        reconstruction, codes = self.forward(self.model, self.batch)
        loss = functional.mse_loss(reconstruction, self.batch) + L1_PENALTY * codes.sum(dim=1).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()


class StepTimes:
    """Batches that measure the time from one to the next: a training step with all that goes on around it."""

    def __init__(self, side: int, steps: int) -> None:
        boxes = noise(BATCH * (steps + 1) + 1, side)
        self.source = batches_of(boxes, 1e-6, 0)
        self.seconds: list[float] = []

    @property
    def training_batches(self) -> int:
        return self.source.training_batches

    def training(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        started = time.perf_counter()
        for batch in self.source.training(epoch, first_batch):
            yield batch
            now = time.perf_counter()
            self.seconds.append(now - started)
            started = now

    def validation(self) -> Iterator[Batch]:
        return self.source.validation()


def training_steps(side: int, steps: int) -> Iterator[Row]:
    """Ours and the bare loop by turns, so that both meet the same load of the machine; the median of each."""
    bare, plain = Bare(side, lambda model, batch: model(batch)), Bare(side, plain_layers)
    ours: list[float] = []
    bares: list[float] = []
    plains: list[float] = []
    bare.step()
    plain.step()
    measured = StepTimes(side, steps)

    def interleave(fraction: float, phase: str = "", **counters: float) -> None:
        if not phase.startswith("training"):
            return
        for loop, seconds in ((bare, bares), (plain, plains)):
            started = time.perf_counter()
            loop.step()
            seconds.append(time.perf_counter() - started)

    train(
        lambda generator: Autoencoder3D(side, generator),
        AutoencoderLoss(L1_PENALTY),
        measured,
        TrainingOptions(max_epochs=1, patience_epochs=1, learning_rate=1e-3, seed=0),
        device=CPU,
        progress=interleave,
        save_checkpoint=lambda files: None,
    )
    # What the interleaved loops took is no part of our step.
    ours = [total - b - p for total, b, p in zip(measured.seconds, bares, plains, strict=True)]
    case = f"training, batch {BATCH} of {side}^3"
    step, bare_step, plain_step = (float(np.median(times[1:])) for times in (ours, bares, plains))
    yield Row(case, "time_per_subvolume", 1e3 * step / BATCH, "ms", "lower")
    yield Row(case, "step_over_bare_step", step / bare_step, "", "lower", 1.15)
    yield Row(case, "plain_layers_over_ours", plain_step / bare_step, "", "higher")


def encoding(side: int, count: int) -> Iterator[Row]:
    """Encoding from a store, standardised on the way, against the bare forward pass."""
    model = Autoencoder3D(side, generator_for(0)).eval()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"file://{folder}")
        writer = ResultWriter(store, "default", 64 * "0")
        particles = Particles.from_positions(np.zeros((count, 3)), 10.0, "t")
        info = VolumeInfo((side,) * 3, 10.0, "dark")
        uri = write_subtomograms(writer, store, "boxes", noise(count, side), info, particles)
        writer.commit(operation="io.Upload", version=1, parameters={}, inputs={}, result={}, seconds=0)
        subtomograms = open_subtomograms(store, uri)
        preparation = Preparation(side, 1, False, "dark")
        batch = torch.from_numpy(noise(clustering.batch_size(side), side))[:, None]
        ours, bares = [], []
        for _ in range(3):
            started = time.perf_counter()
            chunks = datasets.prepared_chunks(subtomograms.read, np.arange(count), preparation)
            clustering.encode(model, chunks, count, CPU, no_progress)
            ours.append((time.perf_counter() - started) / count)
            with torch.inference_mode():
                started = time.perf_counter()
                repeats = -(-count // len(batch))
                for _ in range(repeats):
                    model.encode(batch)
                bares.append((time.perf_counter() - started) / (repeats * len(batch)))
    case = f"encoding {count} of {side}^3 from the store"
    yield Row(case, "time_per_subvolume", 1e3 * min(ours), "ms", "lower")
    yield Row(case, "share_of_bare_forward_speed", min(bares) / min(ours), "", "higher", 0.8)


def complexes(count: int, snr: float, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Boxes of 32^3 with protein positive: a globule of two lobes, a barrel and a small globule with a lobe, by turns.

    Random orientation, shifts of 1 voxel (standard deviation). The noise is the same in all boxes; SNR is the kinds'
    mean variance over the noise's.
    """
    random = np.random.default_rng(seed)
    z, y, x = np.mgrid[:32, :32, :32] - 16
    places = np.stack([x, y, z], axis=-1).astype(np.float64)

    def solid(distance: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1 / (1 + np.exp(-2 * distance))

    def ball(at: NDArray[np.float64], centre: tuple[float, float, float], radius: float) -> NDArray[np.float64]:
        return solid(radius - np.linalg.norm(at - np.array(centre), axis=-1))

    boxes = []
    for index in range(count):
        turn = Rotation.random(random_state=int(random.integers(2**31))).as_matrix()
        at = (places - random.normal(0, 1, 3)) @ turn
        across = np.hypot(at[..., 0], at[..., 1])
        boxes.append(
            (
                lambda at=at: np.maximum(ball(at, (0, 0, 0), 7), ball(at, (6, 3, 2), 5)),
                lambda at=at, across=across: solid(5 - across) * solid(across - 2) * solid(8 - np.abs(at[..., 2])),
                lambda at=at: np.maximum(ball(at, (0, 0, 0), 4), ball(at, (4, 0, 1), 2.5)),
            )[index % 3]()
        )
    clean = np.stack(boxes).astype(np.float32)
    variance = float(np.mean([clean[kind::3].var(axis=(1, 2, 3)).mean() for kind in range(3)]))
    noisy = clean + random.normal(0, np.sqrt(variance / snr), clean.shape).astype(np.float32)
    return noisy, np.arange(count) % 3


def separation(count: int, snr: float, epochs: int) -> Iterator[Row]:
    boxes, kinds = complexes(count, snr)
    for pose_normalisation in (False, True):
        preparation = Preparation(32, 2, pose_normalisation, "light")
        started = time.perf_counter()
        prepared = preparation(boxes, np.arange(count))
        prepare_seconds = time.perf_counter() - started
        started = time.perf_counter()
        trained = fit(prepared, epochs)
        seconds = time.perf_counter() - started
        model = trained.model.eval()
        assert isinstance(model, Autoencoder3D)
        codes = clustering.encode(model, [(0, prepared)], count, CPU, no_progress)
        found = clustering.cluster(codes, 3, 0, no_progress)
        common = [np.bincount(kinds[found.labels == number]).max() for number in range(3)]
        name = "with" if pose_normalisation else "without"
        case = f"3 complexes, {count} boxes, SNR {snr:g}, {name} pose normalisation"
        yield Row(case, "purity", float(sum(common)) / count, "", "higher")
        yield Row(case, "preparation", 1e3 * prepare_seconds / count, "ms/box", "lower")
        yield Row(case, f"training_{epochs}_epochs", seconds, "s", "lower", 60.0)


def ten_classes(count: int, epochs: int, snrs: tuple[float, ...]) -> Iterator[Row]:
    """Autoencoder and k-means on `count` boxes of each of ten classes, in as many clusters and in a hundred."""
    imaged = classification_sets.image(count, classification_sets.Imaging(), 1)
    for snr in snrs:
        boxes = imaged.at(snr, binning=2)
        for pose_normalisation in (False, True):
            prepared = standardise(normalise_poses(boxes)) if pose_normalisation else boxes
            model = fit(prepared, epochs).model.eval()
            assert isinstance(model, Autoencoder3D)
            codes = clustering.encode(model, [(0, prepared)], len(prepared), CPU, no_progress)
            name = "with" if pose_normalisation else "without"
            for clusters in (10, 100):
                found = clustering.cluster(codes, clusters, 0, no_progress)
                compared = class_comparison.compare(found.labels, imaged.classes)
                case = f"10 classes, {count} boxes each, SNR {snr:g}, {clusters} clusters, {name} pose normalisation"
                yield Row(case, "purity", compared.purity, "", "higher")
                information = compared.normalised_mutual_information
                yield Row(case, "normalised_mutual_information", information, "", "higher")


def measure(quick: bool) -> Iterator[Row]:
    use_deterministic_algorithms(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    for side, steps in ((16, 10 if quick else 40), (32, 3 if quick else 15)):
        yield from training_steps(side, steps)
    for side, count in ((16, 512 if quick else 4096), (32, 128 if quick else 1024)):
        yield from encoding(side, count)
    for snr in (0.2,) if quick else (0.2, 0.05):
        yield from separation(90 if quick else 240, snr, 5 if quick else 20)
    yield from ten_classes(12 if quick else 100, 1 if quick else 10, (0.1,) if quick else (0.1, 0.05, 0.03))


if __name__ == "__main__":
    main("learning", measure)
