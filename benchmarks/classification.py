"""What the classifiers find: python -m benchmarks.classification.

Ten classes of simulated subtomograms (`classification_sets`): eight complexes, a piece of membrane and empty ice, at
random poses with a wedge of 60 degrees to either side. `BOXES` and `BINNING` say how many of each class, and how much
they are binned: 1,000 at 32^3 is what the targets are for, on a GPU; on a CPU take less, 300 binned by 2 for instance,
and fewer epochs of smaller steps:

    export CRYOFLEET_CLASSIFICATION_BOXES=300 CRYOFLEET_CLASSIFICATION_BINNING=2
    export CRYOFLEET_CLASSIFICATION_EPOCHS=10 CRYOFLEET_CLASSIFICATION_BATCH=32
    python -m benchmarks.classification

- Accuracy of each network on boxes it has not met, and the error of its probabilities before and after calibration.
- The autoencoding classifier where 1 in 20 boxes is labelled, beside the same encoder trained on those alone.
- The open-set network trained on seven of the classes: how well its scores tell the other three; two choices of them.
- A classifier of SNR 0.1 without the CTF used at SNR 0.05 with it and a wedge of 50 degrees, before and after
  adaptation, and after one without the adversary, which leaves what the filter does: the recovered share is
  (adapted - source) / (trained on the target's classes - source).
"""

from __future__ import annotations

# First, as it sets what torch reads when it is loaded.
import services.learning  # isort: skip  # noqa: F401

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.classification_sets import NAMES, Imaged, Imaging, image
from benchmarks.harness import Row, main
from cryofleet.progress import no_progress
from services.learning import (
    autoencoding_classifier,
    calibration,
    cb3d,
    class_comparison,
    class_prediction,
    classifiers,
    domain_adaptation,
    dsrf3d,
    jobs,
    open_set,
    rb3d,
    training,
)
from services.learning.augmentation import Augmentation

#: The autoencoding classifier without its decoder learns as they do where all is labelled.
SUPERVISED = (dsrf3d, rb3d, cb3d, autoencoding_classifier)
SNRS = (0.1, 0.05, 0.03)
#: None of these were unseen in the trainings by which the distance was chosen: (3, 7) and (2, 5) were.
UNSEEN = ((1, 4, 6), (0, 6, 8))
LABELLED_SHARE = 0.05
VALIDATION = 0.1
SOURCE, TARGET = (Imaging(60.0, ctf=False), 0.1), (Imaging(50.0, ctf=True), 0.05)


@dataclass(frozen=True)
class Size:
    """How much is done: boxes of each class to train on and to test with, binning, epochs, boxes in
    a step, and seeds, of which each labels others of the boxes."""

    boxes: int
    tested: int
    binning: int
    epochs: int
    batch: int
    seeds: int
    snrs: tuple[float, ...] = SNRS
    networks: tuple[ModuleType, ...] = SUPERVISED


FULL = Size(
    int(os.environ.get("CRYOFLEET_CLASSIFICATION_BOXES", "1000")),
    200,
    int(os.environ.get("CRYOFLEET_CLASSIFICATION_BINNING", "1")),
    int(os.environ.get("CRYOFLEET_CLASSIFICATION_EPOCHS", "60")),
    int(os.environ.get("CRYOFLEET_CLASSIFICATION_BATCH", "64")),
    3,
)
QUICK = Size(8, 4, 4, 2, 16, 1, (0.1,), (cb3d,))


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained classifier, and what it says of its validation boxes."""

    model: classifiers.Classifier
    calibrated: class_prediction.Calibrated
    config: dict[str, Any]
    boxes_per_second: float

    def predict(self, boxes: NDArray[np.float32]) -> class_prediction.ClassPrediction:
        return class_prediction.predict(self.model, self.config, [(0, boxes)], len(boxes), device(), no_progress)

    def accuracy(self, boxes: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
        return float((self.predict(boxes).labels == labels).mean())


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(
    module: ModuleType,
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    size: Size,
    objective: Mapping[str, Any] | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    labelled_repeats: int = 1,
    seed: int = 0,
) -> Fitted:
    """Train as TrainClassifier does, with its augmentation, on classes numbered from 0."""
    classes = int(labels.max()) + 1
    epochs = epochs or size.epochs
    config = module.config(boxes.shape[1], range(classes), [str(number) for number in range(classes)])
    job = jobs.Job(
        network=config,
        objective=objective or {"name": classifiers.ClassificationLoss.NAME},
        options=training.TrainingOptions(
            max_epochs=epochs,
            patience_epochs=max(10, epochs // 4),
            learning_rate=1e-3,
            seed=seed,
            weight_decay=1e-4,
            decay_from=classifiers.DECAY_FROM,
            mixed_precision=True,
        ),
        batch_size=batch or size.batch,
        validation_fraction=VALIDATION,
        augmentation=Augmentation("cube", 0.1, 0.1),
        stratify="labels",
        labelled_repeats=labelled_repeats,
    )
    arrays: dict[str, NDArray[Any]] = {"boxes": boxes, "labels": labels}
    started = time.perf_counter()
    trained = jobs.run_job(job, arrays, device=device(), progress=no_progress, save_checkpoint=lambda files: None)
    seconds = time.perf_counter() - started
    assert isinstance(trained.model, classifiers.Classifier)
    rows = jobs.split(job, arrays)
    calibrated = class_prediction.calibrate(trained.model, boxes, labels, *rows, device(), no_progress)
    speed = trained.epochs * len(rows[0]) / seconds
    return Fitted(trained.model, calibrated, config | calibrated.config(), speed)


def supervised(train: Imaged, test: Imaged, size: Size) -> Iterator[Row]:
    for snr in size.snrs:
        boxes, unmet = train.at(snr, size.binning), test.at(snr, size.binning)
        best = 0.0
        for module in size.networks:
            fitted = fit(module, boxes, train.classes, size)
            found = fitted.predict(unmet)
            accuracy = float((found.labels == test.classes).mean())
            best = max(best, accuracy)
            case = f"{module.NAME}, SNR {snr:g}"
            yield Row(case, "accuracy", accuracy, "", "higher")
            logits, _ = class_prediction.outputs(fitted.model, [(0, unmet)], len(unmet), device(), no_progress)
            before = calibration.expected_calibration_error(calibration.probabilities(logits, 1.0), test.classes)
            after = calibration.expected_calibration_error(found.probabilities, test.classes)
            yield Row(case, "calibration_error_before", before, "", "lower")
            yield Row(case, "calibration_error", after, "", "lower")
            yield Row(case, "training_speed", fitted.boxes_per_second, "boxes/s", "higher")
        yield Row(f"best network, SNR {snr:g}", "accuracy", best, "", "higher", 0.9 if snr == 0.05 else None)


def semi_supervised(train: Imaged, test: Imaged, size: Size, snr: float = 0.05) -> Iterator[Row]:
    boxes, unmet = train.at(snr, size.binning), test.at(snr, size.binning)
    gains = []
    for seed in range(size.seeds):
        labels = few_labels(train.classes, seed)
        share = float((labels >= 0).mean())
        case = f"1 in {1 / share:.0f} labelled, SNR {snr:g}, seed {seed}"
        few, every = by_few(boxes, labels, size, seed)
        alone, both = few.accuracy(unmet, test.classes), every.accuracy(unmet, test.classes)
        gains.append(both - alone)
        yield Row(case, "accuracy_of_the_labelled_alone", alone, "", "higher")
        yield Row(case, "accuracy_with_the_unlabelled", both, "", "higher")
        yield Row(case, "gain", gains[-1], "", "higher")
    yield Row(
        f"few labelled, SNR {snr:g}, mean of {size.seeds} seeds", "gain", float(np.mean(gains)), "", "higher", 0.0
    )


def few_labels(classes: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The classes of a share of the boxes, other ones for each seed; -1 for the rest."""
    labels = np.full(len(classes), classifiers.UNLABELLED)
    for number in range(len(NAMES)):
        rows = np.random.default_rng((seed, number)).permutation(np.flatnonzero(classes == number))
        # Two at least: one of them is for validation.
        labels[rows[: max(2, round(LABELLED_SHARE * len(rows)))]] = number
    return labels


def by_few(boxes: NDArray[np.float32], labels: NDArray[np.int64], size: Size, seed: int) -> tuple[Fitted, Fitted]:
    """The autoencoding classifier of the labelled boxes alone, and of all.

    Of as many steps, with as many labelled boxes in each: it is the labels that are few, and not the training.
    """
    labelled = labels >= 0
    share = float(labelled.mean())
    repeats = autoencoding_classifier.labelled_repeats(share)
    objective = {"name": autoencoding_classifier.AutoencodingLoss.NAME}
    batch = round(size.batch * autoencoding_classifier.SHOWN_LABELLED)
    few = fit(
        autoencoding_classifier,
        boxes[labelled],
        labels[labelled],
        size,
        objective | {"reconstruction_weight": 0.0},
        epochs=size.epochs * repeats,
        batch=batch,
        seed=seed,
    )
    weights = {"reconstruction_weight": 1.0, "consistency_weight": 1.0}
    every = fit(
        autoencoding_classifier,
        boxes,
        labels,
        size,
        objective | weights | {"labelled_share": share, "labelled_repeats": repeats},
        labelled_repeats=repeats,
        seed=seed,
    )
    return few, every


def unseen(train: Imaged, test: Imaged, size: Size, snr: float = 0.05) -> Iterator[Row]:
    boxes, unmet = train.at(snr, size.binning), test.at(snr, size.binning)
    for left_out in UNSEEN:
        known = [number for number in range(len(NAMES)) if number not in left_out]
        rows = np.isin(train.classes, known)
        labels = np.searchsorted(known, train.classes[rows])
        fitted = fit(open_set, boxes[rows], labels, size, {"name": open_set.OpenSetLoss.NAME})
        found = fitted.predict(unmet)
        assert found.rejected is not None
        case = f"{', '.join(NAMES[number] for number in left_out)} unseen, SNR {snr:g}"
        seen = np.isin(test.classes, known)
        area = class_comparison.unseen_area_under_roc(found.scores, test.classes, known)
        right = found.labels[seen] == np.searchsorted(known, test.classes[seen])
        yield Row(case, "area_under_roc", area, "", "higher", 0.85)
        yield Row(case, "accuracy_of_the_known", float(right.mean()), "", "higher")
        yield Row(case, "known_that_are_rejected", float(found.rejected[seen].mean()), "", "lower")
        yield Row(case, "unseen_that_are_rejected", float(found.rejected[~seen].mean()), "", "higher")
        clusters = open_set.unseen_classes(found.features, found.rejected, len(left_out), 0, no_progress)
        both = found.rejected & ~seen
        if both.any():
            sorted_out = class_comparison.compare(clusters[both], test.classes[both])
            yield Row(case, "purity_of_the_unseen", sorted_out.purity, "", "higher")


def adaptation(size: Size, module: ModuleType = autoencoding_classifier) -> Iterator[Row]:
    (source_imaging, source_snr), (target_imaging, target_snr) = SOURCE, TARGET
    source = image(size.boxes, source_imaging, 11)
    target, test = image(size.boxes, target_imaging, 12), image(size.tested, target_imaging, 13)
    source_boxes = source.at(source_snr, size.binning)
    target_boxes, unmet = target.at(target_snr, size.binning), test.at(target_snr, size.binning)
    fitted = fit(module, source_boxes, source.classes, size)
    before = fitted.accuracy(unmet, test.classes)
    best = fit(module, target_boxes, target.classes, size).accuracy(unmet, test.classes)
    after = adapt(fitted, source_boxes, source.classes, target_boxes, size).accuracy(unmet, test.classes)
    filtered = adapt(fitted, source_boxes, source.classes, target_boxes, size, weight=0.0).accuracy(unmet, test.classes)
    case = f"{module.NAME}, from SNR {source_snr:g} to SNR {target_snr:g} with the CTF and another wedge"
    yield Row(case, "accuracy_of_the_source's", before, "", "higher")
    yield Row(case, "accuracy_adapted", after, "", "higher")
    yield Row(case, "accuracy_adapted_without_the_adversary", filtered, "", "higher")
    yield Row(case, "accuracy_of_the_target's", best, "", "higher")
    if best > before:
        yield Row(case, "recovered_share", (after - before) / (best - before), "", "higher", 0.5)


def adapt(
    fitted: Fitted,
    source: NDArray[np.float32],
    classes: NDArray[np.int64],
    target: NDArray[np.float32],
    size: Size,
    weight: float = 1.0,
    learning_rate: float = 2e-4,
) -> Fitted:
    """As AdaptClassifier does."""
    boxes = np.concatenate([source, target])
    domain_adaptation.match_spectra(boxes, len(source))
    labels = np.concatenate([classes, np.full(len(target), classifiers.UNLABELLED)])
    arrays = {"boxes": boxes, "labels": labels, "domains": np.repeat([0, 1], [len(source), len(target)])}
    epochs = max(2, size.epochs // 3)
    steps = epochs * math.ceil((1 - VALIDATION) * len(boxes) / (2 * size.batch))
    job = jobs.Job(
        network=domain_adaptation.config(fitted.config),
        objective={
            "name": domain_adaptation.DomainAdversarialLoss.NAME,
            "adversarial_weight": weight,
            "steps": steps,
            "source_share": len(source) / len(boxes),
            "labelled_share": len(source) / len(boxes),
        },
        options=training.TrainingOptions(
            max_epochs=epochs,
            patience_epochs=epochs,
            learning_rate=learning_rate,
            seed=0,
            mixed_precision=True,
            keep_last=True,
        ),
        batch_size=2 * size.batch,
        validation_fraction=VALIDATION,
        augmentation=Augmentation("cube", 0.1, 0.1),
        stratify="labels",
    )
    first = {f"classifier.{name}": value.cpu() for name, value in fitted.model.state_dict().items()}
    trained = jobs.run_job(
        job,
        arrays,
        device=device(),
        progress=no_progress,
        save_checkpoint=lambda files: None,
        first_weights=first,
    )
    assert isinstance(trained.model, domain_adaptation.DomainAdversarial)
    model = trained.model.classifier
    calibrated = class_prediction.calibrate(model, boxes, labels, *jobs.split(job, arrays), device(), no_progress)
    return Fitted(model, calibrated, fitted.config | calibrated.config(), 0.0)


def measure(quick: bool) -> Iterator[Row]:
    size = QUICK if quick else FULL
    training.use_deterministic_algorithms(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    train, test = image(size.boxes, Imaging(), 1), image(size.tested, Imaging(), 2)
    yield from supervised(train, test, size)
    yield from semi_supervised(train, test, size)
    yield from unseen(train, test, size)
    yield from adaptation(size)


if __name__ == "__main__":
    main("classification", measure)
