"""The use of a trained classifier: `predict` takes a model, its config and prepared boxes, and gives calibrated
probabilities, features and, of an open-set model, distances and rejections; `open_set.unseen_classes` clusters what was
rejected.

    model = model_files.read_model(config, weights, architectures.build).to(device)     # a classifiers.Classifier
    chunks = datasets.prepared_chunks(read, ids, preparation)
    prediction = class_prediction.predict(model, config, chunks, len(ids), device, progress)
    class_ids = numpy.array(config["class_ids"])[prediction.labels]; names likewise from config["class_names"]

Boxes are sorted into the config's classes in its order. Where `prediction.rejected` is set, the label is that of the
nearest known class, which a box so marked does not belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import Progress, part
from services.learning import calibration, open_set
from services.learning.classifiers import Classifier

BATCH_BYTES = 64 * 2**20
"""So many boxes at once that no layer's output is larger, and one at least."""

LARGEST_LAYER_CHANNELS = 64
"""Of the output of any classifier's layer at the full size of the box, at most."""


@dataclass(frozen=True, eq=False)
class ClassPrediction:
    """Of n boxes: `probabilities` (n, classes), calibrated, and `features` (n, d).

    Of an open-set model also `distances` (n,) from the nearest known class, and the `rejection_distance` above which a
    box is rejected; None of others.
    """

    probabilities: NDArray[np.float32]
    features: NDArray[np.float32]
    distances: NDArray[np.float32] | None = None
    rejection_distance: float | None = None

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,): the likeliest known class's number in the config's order."""
        labels: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return labels

    @property
    def rejected(self) -> NDArray[np.bool_] | None:
        """(n,): which are rejected; None where the model rejects none."""
        if self.distances is None or self.rejection_distance is None:
            return None
        return self.distances > self.rejection_distance

    @property
    def scores(self) -> NDArray[np.float64]:
        """(n,), 0 to 1: how surely a box is of its class.

        The probability of the likeliest class; of an open-set model 1 / (1 + distance / rejection_distance), below 0.5
        where a box is rejected: probabilities are shares among the known classes and say nothing of that.
        """
        if self.distances is not None and self.rejection_distance is not None:
            return 1 / (1 + self.distances.astype(np.float64) / self.rejection_distance)
        likeliest: NDArray[np.float64] = self.probabilities.max(axis=1).astype(np.float64)
        return likeliest


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Of a trained model: its `temperature`, the `rejection_distance` of an open-set one, and, of the boxes that were
    held back, the expected calibration error before and after and the classes' figures.
    """

    temperature: float
    rejection_distance: float | None
    error_before: float
    error: float
    figures: calibration.ClassFigures

    def config(self) -> dict[str, float]:
        """What `predict` reads in a model's config."""
        rejection = {} if self.rejection_distance is None else {"rejection_distance": self.rejection_distance}
        return {"temperature": self.temperature} | rejection

    def metrics(self, ids: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
        """As JSON; `ids` and `names` of the classes in the config's order."""
        figures = self.figures
        rows = [
            {
                "class_id": ids[i],
                "class_name": names[i],
                "validation_subtomograms": int(figures.confusion[i].sum()),
                "precision": float(figures.precision[i]),
                "recall": float(figures.recall[i]),
                "f1": float(figures.f1[i]),
            }
            for i in range(len(ids))
        ]
        return {
            "accuracy": figures.accuracy,
            "calibration_error_before": self.error_before,
            "calibration_error": self.error,
            **self.config(),
            "classes": rows,
            "confusion_matrix": {
                "rows": "true classes",
                "columns": "classes found",
                "names": list(names),
                "counts": figures.confusion.tolist(),
            },
        }


def predict(
    model: Classifier,
    config: Mapping[str, Any],
    chunks: Iterable[tuple[int, NDArray[np.float32]]],
    count: int,
    device: torch.device,
    progress: Progress,
) -> ClassPrediction:
    """The classes of `count` prepared boxes that come in chunks as (first, boxes `[i, z, y, x]`).

    Raises FailedPrecondition where the config has no temperature or, of an open-set model, no distance of rejection.
    """
    temperature = temperature_of(config)
    threshold = open_set.threshold_of(config) if isinstance(model, open_set.OpenSetClassifier) else None
    logits, features = outputs(model, chunks, count, device, progress)
    found = calibration.probabilities(logits, temperature)
    if threshold is None:
        return ClassPrediction(found, features)
    assert isinstance(model, open_set.OpenSetClassifier)
    whitened = features @ model.whitening.cpu().numpy()
    return ClassPrediction(found, features, open_set.distances(whitened, model.centres.cpu().numpy()), threshold)


def outputs(
    model: Classifier,
    chunks: Iterable[tuple[int, NDArray[np.float32]]],
    count: int,
    device: torch.device,
    progress: Progress,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (count, classes) and features (count, d) of prepared boxes that come in chunks as (first, boxes)."""
    logits = np.empty((count, model.classes), np.float32)
    features: NDArray[np.float32] | None = None
    step = batch_size(model.box_size)
    model.eval()
    with torch.inference_mode():
        for first, boxes in chunks:
            for start in range(0, len(boxes), step):
                batch = torch.from_numpy(boxes[start : start + step])[:, None].to(device)
                stop = first + start + len(batch)
                scores, found = model(batch)
                logits[first + start : stop] = scores.float().cpu().numpy()
                if features is None:
                    features = np.empty((count, found.shape[1]), np.float32)
                features[first + start : stop] = found.float().cpu().numpy()
                progress(stop / count, "classifying", subtomograms=stop)
    return logits, np.empty((0, 0), np.float32) if features is None else features


def rows_of(
    boxes: NDArray[np.float32], rows: NDArray[np.int64], step: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Some rows of prepared boxes `[i, z, y, x]`, so many at a time, as (first, boxes)."""
    for first in range(0, len(rows), step):
        yield first, boxes[rows[first : first + step]]


def calibrate(
    model: Classifier,
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    training_rows: NDArray[np.int64],
    validation_rows: NDArray[np.int64],
    device: torch.device,
    progress: Progress,
) -> Calibrated:
    """What a trained model's config needs besides, and its figures, by the labelled ones of the validation rows.

    Of an open-set model the centres and the whitening are set, by the training rows. Raises InvalidArgument where no
    validation row is labelled.
    """
    rows = validation_rows[labels[validation_rows] >= 0]
    if not len(rows):
        raise InvalidArgument("no labelled subtomogram is held back for validation: a larger share must be")
    step = batch_size(model.box_size)
    found, features = outputs(model, rows_of(boxes, rows, step), len(rows), device, part(progress, 0.0, 0.2))
    rejection: float | None = None
    if isinstance(model, open_set.OpenSetClassifier):
        known = training_rows[labels[training_rows] >= 0]
        _, trained = outputs(model, rows_of(boxes, known, step), len(known), device, part(progress, 0.2, 1.0))
        whitening, centres = open_set.fit_classes(trained, labels[known], model.classes)
        model.whitening.copy_(torch.from_numpy(whitening))
        model.centres.copy_(torch.from_numpy(centres))
        rejection = open_set.rejection_distance(open_set.distances(features @ whitening, centres))
    truth = labels[rows]
    temperature = calibration.fit_temperature(found, truth)
    return Calibrated(
        temperature=temperature,
        rejection_distance=rejection,
        error_before=calibration.expected_calibration_error(calibration.probabilities(found, 1.0), truth),
        error=calibration.expected_calibration_error(calibration.probabilities(found, temperature), truth),
        figures=calibration.class_figures(found.argmax(axis=1), truth, model.classes),
    )


def batch_size(box_size: int) -> int:
    """Boxes of a side to classify at once."""
    return max(1, min(256, BATCH_BYTES // (4 * LARGEST_LAYER_CHANNELS * box_size**3)))


def temperature_of(settings: Mapping[str, Any]) -> float:
    """The temperature in a model's config; FailedPrecondition where there is none."""
    value = settings.get("temperature")
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise FailedPrecondition(
            f"the model's config says temperature is {value!r}: it is damaged, train the model again"
        )
    return float(value)
