"""TrainClassifier, AdaptClassifier, CompareClasses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cryofleet.artifacts import content_digest
from cryofleet.errors import InvalidArgument
from cryofleet.operations import parameters_of
from cryofleet.particles import Particles
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import learning_pb2
from services.learning import (
    autoencoding_classifier,
    class_comparison,
    class_prediction,
    classifiers,
    datasets,
    domain_adaptation,
    jobs,
    open_set,
    training,
)
from services.learning.architectures import CLASSIFIERS
from services.learning.preparation import CONTRAST, Preparation
from services.learning.service import inputs
from services.learning.service.registry import service

#: Channels of a network's widest layer at the full size of a box.
CHANNELS = 32
#: Share of the source that an adapted classifier is calibrated by.
CALIBRATION_FRACTION = 0.1


@dataclass(frozen=True, eq=False)
class Labels:
    """Classes of n particles: `labels` (n,) number them in the order of `ids` and `names`, -1 where unlabelled."""

    labels: NDArray[np.int64]
    ids: list[int]
    names: list[str]

    def share(self) -> float:
        """The share of the labelled ones."""
        return float((self.labels >= 0).mean())

    def counts(self) -> dict[str, int]:
        """Particles of each class, by its name."""
        return inputs.class_counts(self.labels, dict(enumerate(self.names)))


def _class_ids(particles: Particles, source: str) -> NDArray[np.int64]:
    if "class_id" not in particles.table:
        raise InvalidArgument(
            f"{source} has no column class_id: give particles_uri with the particles' classes, numbers from 0"
        )
    numbers: NDArray[np.int64] = particles.table["class_id"].to_numpy().astype(np.int64)
    if (numbers < classifiers.UNLABELLED).any():
        row = int(np.argmax(numbers < classifiers.UNLABELLED))
        raise InvalidArgument(
            f"{source}: particle {particles.table['id'].iloc[row]} has class_id {numbers[row]}; classes are numbered "
            "from 0, and -1 is unlabelled"
        )
    return numbers


def _class_names(particles: Particles, numbers: NDArray[np.int64], source: str) -> dict[int, str]:
    """The name of each class; its number where it has none. InvalidArgument where a class has two names, or two one."""
    table = particles.table
    labelled = numbers != classifiers.UNLABELLED
    names: dict[int, str] = {}
    for number in np.unique(numbers[labelled]).tolist():
        called = table["class_name"][numbers == number].unique().tolist() if "class_name" in table else [""]
        if len(called) > 1:
            raise InvalidArgument(
                f"{source}: class {number} is called {called[0]!r} and {called[1]!r}; give it one name"
            )
        names[number] = called[0] or str(number)
    for number, name in names.items():
        other = next(first for first, called in names.items() if called == name)
        if other != number:
            raise InvalidArgument(
                f"{source}: classes {other} and {number} are both called {name!r}; give them one number"
            )
    return names


def _training_labels(chosen: inputs.Chosen, network: str) -> Labels:
    """The classes to train on. InvalidArgument where they can't be."""
    numbers = _class_ids(chosen.particles, chosen.source)
    unlabelled = numbers == classifiers.UNLABELLED
    if unlabelled.any() and network != autoencoding_classifier.NAME:
        first = chosen.ids[int(np.argmax(unlabelled))]
        raise InvalidArgument(
            f"{chosen.source}: particle {first} has class_id -1, unlabelled, as {int(unlabelled.sum())} of "
            f"{len(numbers)} have; only the network 'autoencoding' learns from those: leave them out, or take it"
        )
    names = _class_names(chosen.particles, numbers, chosen.source)
    if len(names) < 2:
        what = f"only of class {next(iter(names.values()))!r}" if names else "of no class"
        raise InvalidArgument(f"{chosen.source}: the particles are {what}; a classifier needs at least 2 classes")
    ids = sorted(names)
    for number in ids:
        if int((numbers == number).sum()) < 2:
            raise InvalidArgument(
                f"{chosen.source}: class {names[number]!r} has 1 particle; each needs at least 2, one for validation"
            )
    labels = np.searchsorted(np.array(ids), numbers)
    labels[unlabelled] = classifiers.UNLABELLED
    return Labels(labels.astype(np.int64), ids, [names[number] for number in ids])


def _box_bytes(side: int) -> int:
    """What a training step keeps of a box."""
    return inputs.TRAINING_LAYERS * 4 * CHANNELS * side**3


def _training_set(
    request: learning_pb2.TrainClassifierRequest, reader: Reader
) -> tuple[inputs.Chosen, Preparation, Labels, dict[str, Any]]:
    """The subtomograms, what is done to them, their classes, and the network's config; refused before anything large
    is read where training can't work."""
    chosen = inputs.chosen(reader, request.subtomograms_uri, request.particles_uri)
    preparation = inputs.preparation(chosen.subtomograms, request.binning, False)
    classifiers.check_box_size(preparation.prepared_size)
    labels = _training_labels(chosen, request.network)
    config = CLASSIFIERS[request.network].config(preparation.prepared_size, labels.ids, labels.names)
    if request.network == open_set.NAME:
        config["view_rotations"] = request.rotations
    return chosen, preparation, labels, config


def _train_needs(request: learning_pb2.TrainClassifierRequest, reader: Reader) -> Needs:
    chosen, preparation, _, config = _training_set(request, reader)
    inputs.augmentation(request, chosen.info)
    # Of unlabelled boxes a second view is looked at.
    views = 2 if request.network == autoencoding_classifier.NAME else 1
    return inputs.training_needs(
        preparation,
        len(chosen),
        batch_size=views * request.batch_size,
        box_bytes=_box_bytes(preparation.prepared_size),
        weight_bytes=inputs.weight_bytes(config),
        row_bytes=64,
    )


def _objective(request: learning_pb2.TrainClassifierRequest, labels: Labels) -> dict[str, Any]:
    if request.network == autoencoding_classifier.NAME:
        return {
            "name": autoencoding_classifier.AutoencodingLoss.NAME,
            "reconstruction_weight": request.reconstruction_weight,
            "consistency_weight": request.consistency_weight,
            "labelled_share": labels.share(),
            "labelled_repeats": autoencoding_classifier.labelled_repeats(labels.share()),
        }
    if request.network == open_set.NAME:
        return {"name": open_set.OpenSetLoss.NAME}
    return {"name": classifiers.ClassificationLoss.NAME}


@service.operation(needs=_train_needs)
def train_classifier(request: learning_pb2.TrainClassifierRequest, task: Task) -> learning_pb2.TrainClassifierResult:
    """Train a classification network on subtomograms of known classes."""
    chosen, preparation, labels, config = _training_set(request, task)
    training.use_deterministic_algorithms(task.threads)
    device = torch.device(task.device)
    boxes = datasets.load_prepared(chosen.read, chosen.ids, preparation, task.scratch, part(task.progress, 0.0, 0.05))
    arrays: dict[str, NDArray[Any]] = {"boxes": boxes, "labels": labels.labels}
    job = jobs.Job(
        network=config,
        objective=_objective(request, labels),
        options=inputs.training_options(
            request,
            patience_epochs=request.patience_epochs,
            weight_decay=request.weight_decay,
            decay_from=classifiers.DECAY_FROM,
        ),
        batch_size=request.batch_size,
        validation_fraction=request.validation_fraction,
        augmentation=inputs.augmentation(request, chosen.info),
        stratify="labels",
        labelled_repeats=autoencoding_classifier.labelled_repeats(labels.share()),
    )
    trained = inputs.run_job(task, job, arrays, part(task.progress, 0.05, 0.95))
    model = trained.model
    assert isinstance(model, classifiers.Classifier)
    training_rows, validation_rows = jobs.split(job, arrays)
    calibrated = class_prediction.calibrate(
        model, boxes, labels.labels, training_rows, validation_rows, device, part(task.progress, 0.95, 1.0)
    )
    metrics = calibrated.metrics(labels.ids, labels.names) | {
        "training_subtomograms": len(training_rows),
        "validation_subtomograms": len(validation_rows),
        "unlabelled_subtomograms": int((labels.labels < 0).sum()),
    }
    document = config | inputs.data_facts(task, chosen, preparation) | calibrated.config()
    document |= {"class_counts": labels.counts(), "parameters": parameters_of(request)}
    model_uri, metrics_uri = inputs.write_trained(task, trained, document, metrics)
    return learning_pb2.TrainClassifierResult(
        model_uri=model_uri,
        metrics_uri=metrics_uri,
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        best_validation_loss=trained.best_validation_loss,
        accuracy=calibrated.figures.accuracy,
        calibration_error=calibrated.error,
        names=labels.names,
    )


@dataclass(frozen=True, eq=False)
class _Domains:
    """Source and target, one after the other, in the contrast of the source."""

    source: inputs.Chosen
    target: inputs.Chosen

    def read(self, first: int, count: int) -> NDArray[np.float32]:
        """Boxes `[i, z, y, x]`."""
        last = first + count
        border = len(self.source)
        parts = []
        if first < border:
            parts.append(self.source.read(first, min(last, border) - first))
        if last > border:
            start = max(0, first - border)
            boxes = self.target.read(start, last - border - start)
            parts.append(-boxes if self.target.info.contrast != self.source.info.contrast else boxes)
        return np.concatenate(parts)

    @property
    def ids(self) -> NDArray[np.int64]:
        return np.concatenate([self.source.ids, self.target.ids])


def _adaptation_set(
    request: learning_pb2.AdaptClassifierRequest, reader: Reader
) -> tuple[_Domains, Preparation, Labels, dict[str, Any]]:
    """Both sets, what is done to them, the source's classes as the model numbers them, and the model's config."""
    config = inputs.model_config(reader, request.model_uri, *CLASSIFIERS)
    source = inputs.chosen(reader, request.subtomograms_uri, request.particles_uri)
    target = inputs.chosen(reader, request.target_uri)
    for chosen in (source, target):
        inputs.check_fits(config, chosen.subtomograms)
    preparation = replace(
        inputs.preparation(source.subtomograms, config["binning"], False),
        source=f"{request.subtomograms_uri} or {request.target_uri}",
    )
    return _Domains(source, target), preparation, _source_labels(source, config), config


def _source_labels(source: inputs.Chosen, config: dict[str, Any]) -> Labels:
    """The source's classes, by their names as the model knows them."""
    numbers = _class_ids(source.particles, source.source)
    labels = np.full(len(numbers), classifiers.UNLABELLED, np.int64)
    known: list[str] = config["class_names"]
    for number, name in _class_names(source.particles, numbers, source.source).items():
        if name not in known:
            raise InvalidArgument(
                f"{source.source}: class {number}, {name!r}, is none of the model's, which are {', '.join(known)}"
            )
        labels[numbers == number] = known.index(name)
    missing = [name for place, name in enumerate(known) if int((labels == place).sum()) < 2]
    if missing:
        raise InvalidArgument(
            f"{source.source}: fewer than 2 particles are of class {missing[0]!r}; the source needs some of each of "
            "the model's classes, or the adapted model would forget it"
        )
    return Labels(labels, list(config["class_ids"]), known)


def _adapt_needs(request: learning_pb2.AdaptClassifierRequest, reader: Reader) -> Needs:
    domains, preparation, _, config = _adaptation_set(request, reader)
    inputs.augmentation(request, domains.source.info)
    return inputs.training_needs(
        preparation,
        len(domains.source) + len(domains.target),
        batch_size=2 * request.batch_size,
        box_bytes=_box_bytes(preparation.prepared_size),
        weight_bytes=inputs.weight_bytes(domain_adaptation.config(config)),
        row_bytes=64,
    )


@service.operation(needs=_adapt_needs)
def adapt_classifier(request: learning_pb2.AdaptClassifierRequest, task: Task) -> learning_pb2.AdaptClassifierResult:
    """Adapt a classifier to subtomograms imaged otherwise, of unknown classes, by a domain discriminator."""
    domains, preparation, source, config = _adaptation_set(request, task)
    _, classifier = inputs.open_model(task, request.model_uri, *CLASSIFIERS)
    training.use_deterministic_algorithms(task.threads)
    device = torch.device(task.device)
    boxes = datasets.load_prepared(domains.read, domains.ids, preparation, task.scratch, part(task.progress, 0.0, 0.05))
    domain_adaptation.match_spectra(boxes, len(domains.source))
    there = len(domains.target)
    labels = np.concatenate([source.labels, np.full(there, classifiers.UNLABELLED)])
    arrays: dict[str, NDArray[Any]] = {
        "boxes": boxes,
        "labels": labels,
        "domains": np.repeat([0, 1], [len(source.labels), there]),
    }
    training_rows, validation_rows = datasets.split_rows(len(boxes), CALIBRATION_FRACTION, request.seed, labels)
    batch_size = 2 * request.batch_size
    job = jobs.Job(
        network=domain_adaptation.config(config),
        objective={
            "name": domain_adaptation.DomainAdversarialLoss.NAME,
            "adversarial_weight": request.adversarial_weight,
            "steps": request.max_epochs * math.ceil(len(training_rows) / batch_size),
            "source_share": len(source.labels) / len(labels),
            "labelled_share": float((labels >= 0).mean()),
        },
        # What tells the best epoch would be the target's classes.
        options=inputs.training_options(request, patience_epochs=request.max_epochs, keep_last=True),
        batch_size=batch_size,
        validation_fraction=CALIBRATION_FRACTION,
        augmentation=inputs.augmentation(request, domains.source.info),
        stratify="labels",
    )
    first_weights = {f"classifier.{name}": value for name, value in classifier.state_dict().items()}
    trained = inputs.run_job(task, job, arrays, part(task.progress, 0.05, 0.95), first_weights)
    adversarial = trained.model
    assert isinstance(adversarial, domain_adaptation.DomainAdversarial)
    calibrated = class_prediction.calibrate(
        adversarial.classifier, boxes, labels, training_rows, validation_rows, device, part(task.progress, 0.95, 1.0)
    )
    metrics = calibrated.metrics(source.ids, source.names) | {
        "source_subtomograms": len(source.labels),
        "target_subtomograms": there,
        "figures_of": "the source's subtomograms that were held back: the target's classes are not known",
    }
    document = {
        **CLASSIFIERS[config["architecture"]].config(config["box_size"], source.ids, source.names),
        # An open-set network's.
        **{name: config[name] for name in ("view_rotations",) if name in config},
        **inputs.data_facts(task, domains.source, preparation),
        **calibrated.config(),
        "class_counts": source.counts(),
        "contrast": CONTRAST,
        "adapted_from_weights_sha256": config["weights_sha256"],
        "target_digest": content_digest(task.store, domains.target.subtomograms.uri),
        "parameters": parameters_of(request),
    }
    adapted = replace(trained, model=adversarial.classifier)
    model_uri, metrics_uri = inputs.write_trained(task, adapted, document, metrics)
    return learning_pb2.AdaptClassifierResult(model_uri=model_uri, metrics_uri=metrics_uri, epochs=trained.epochs)


def _compare_needs(request: learning_pb2.CompareClassesRequest, reader: Reader) -> Needs:
    rows = len(reader.read_particles(request.particles_uri)) + len(reader.read_particles(request.truth_uri))
    return Needs(inputs.BASE_BYTES + 1000 * rows)


@service.operation(needs=_compare_needs)
def compare_classes(request: learning_pb2.CompareClassesRequest, task: Task) -> learning_pb2.CompareClassesResult:
    """Compare the classes or clusters of particles with the true ones."""
    particles, truth = task.read_particles(request.particles_uri), task.read_particles(request.truth_uri)
    found = _class_ids(particles, request.particles_uri)
    true = _class_ids(truth, request.truth_uri)
    if request.known_classes and "score" not in particles.table:
        raise InvalidArgument(
            f"{request.particles_uri} has no column score, by which particles of unseen classes are told: leave out "
            "known_classes, or give particles with scores"
        )
    rows = class_comparison.match_rows(
        inputs.ids(particles), inputs.ids(truth), _strings(particles, "tomogram"), _strings(truth, "tomogram")
    )
    labelled = true[rows] != classifiers.UNLABELLED
    own, others = np.flatnonzero(labelled), rows[labelled]
    if not len(own):
        raise InvalidArgument(f"{request.truth_uri}: none of the particles has a class there, all are -1")
    found_names, true_names = _strings(particles, "class_name"), _strings(truth, "class_name")
    comparison = class_comparison.compare(
        found[own],
        true[others],
        None if found_names is None else found_names[own],
        None if true_names is None else true_names[others],
    )
    area: float | None = None
    if request.known_classes:
        scores = particles.table["score"].to_numpy()[own]
        area = class_comparison.unseen_area_under_roc(scores, true[others], list(request.known_classes))
    metrics = {
        "particles": len(own),
        "without_true_class": len(particles) - len(own),
        "only_in_truth": len(truth) - len(particles),
        "accuracy": comparison.accuracy,
        "purity": comparison.purity,
        "normalised_mutual_information": comparison.normalised_mutual_information,
        "adjusted_rand_index": comparison.adjusted_rand_index,
        "confusion_matrix": {
            "rows": "true classes",
            "columns": "classes found",
            "row_names": list(comparison.true_names),
            "column_names": list(comparison.found_names),
            "counts": comparison.table.tolist(),
        },
        "matched": {
            name: comparison.true_names[row] if row >= 0 else None
            for name, row in zip(comparison.found_names, comparison.matched, strict=True)
        },
        "classes": [
            {
                "class_name": name,
                "particles": int(comparison.table[row].sum()),
                "precision": float(comparison.precision[row]),
                "recall": float(comparison.recall[row]),
                "f1": float(comparison.f1[row]),
            }
            for row, name in enumerate(comparison.true_names)
        ],
    }
    if area is not None:
        metrics["area_under_roc"] = area
    return learning_pb2.CompareClassesResult(
        accuracy=comparison.accuracy,
        purity=comparison.purity,
        normalised_mutual_information=comparison.normalised_mutual_information,
        adjusted_rand_index=comparison.adjusted_rand_index,
        area_under_roc=area,
        metrics_uri=task.write_table("metrics.json", metrics),
    )


def _strings(particles: Particles, column: str) -> NDArray[np.object_] | None:
    return particles.table[column].to_numpy(dtype=object) if column in particles.table else None
