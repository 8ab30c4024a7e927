"""Evaluate: picks beside the truth."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.particles import Particles
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import picking_pb2
from services.picking import detection
from services.picking import evaluate as evaluation
from services.picking.service.inputs import (
    BASE_BYTES,
    ROW_BYTES,
    classes_of,
    count_rows,
    open_tomogram,
    true_positions,
    values_at,
)
from services.picking.service.registry import service
from services.picking.slabs import READ_BYTES


def _evaluate_needs(request: picking_pb2.EvaluateRequest, reader: Reader) -> Needs:
    rows = count_rows(reader, request.particles_uri) + count_rows(reader, request.truth_uri)
    return Needs(BASE_BYTES + evaluation.memory_bytes(rows) + ROW_BYTES * rows)


@service.operation(needs=_evaluate_needs)
def evaluate(request: picking_pb2.EvaluateRequest, task: Task) -> picking_pb2.EvaluateResult:
    """Compare picks with the truth, in Å, so that their voxel sizes may differ."""
    picks = task.read_particles(request.particles_uri)
    truth = task.read_particles(request.truth_uri)
    truth_classes = classes_of(truth)
    if request.class_names:
        wanted = set(request.class_names)
        missing = sorted(wanted - set(truth_classes or ()))
        if missing:
            raise InvalidArgument(f"{request.truth_uri} has no particles of class {missing[0]!r}")
        assert truth_classes is not None
        chosen = np.array([name in wanted for name in truth_classes])
        truth, truth_classes = truth.select(chosen), [name for name in truth_classes if name in wanted]
    if len(truth) == 0:
        raise FailedPrecondition(f"{request.truth_uri} has no particles: there is nothing to compare the picks with")
    places = true_positions(picks) * picks.voxel_size_angstrom
    true_places = true_positions(truth) * truth.voxel_size_angstrom
    scores = picks.table["score"].to_numpy(np.float64) if "score" in picks.table else None
    ranks = np.zeros(len(picks)) if scores is None or np.isnan(scores).any() else scores
    labels = _labels_at(request.instances_uri, picks, task) if request.instances_uri else None

    def matches(rows: NDArray[np.int64], true_rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """For some picks, which of some true particles each finds."""
        if labels is not None:
            ids = truth.table["id"].to_numpy(np.int64)[true_rows]
            return detection.match_by_volume(labels[rows], ranks[rows], ids)
        return detection.match_in_order(places[rows], ranks[rows], true_places[true_rows], request.distance_angstrom)

    found = matches(np.arange(len(picks)), np.arange(len(truth)))
    if labels is None:
        figures = evaluation.evaluate(places, true_places, request.distance_angstrom, truth_classes, task.progress)
    else:
        hits = np.flatnonzero(found >= 0)
        distances = np.linalg.norm(places[hits] - true_places[found[hits]], axis=1)
        figures = evaluation.of_matching(
            evaluation.Matching(hits, found[hits], distances), len(picks), len(truth), truth_classes
        )
    metrics = figures.to_dict()
    metrics["matched_by"] = "distance" if labels is None else "volume"
    curve = None if scores is None else detection.curve(ranks, found >= 0, len(truth))
    metrics["curve"] = None if curve is None else curve.to_dict()
    pick_classes = classes_of(picks)
    if pick_classes is not None and truth_classes is not None:
        names = {
            name: (np.flatnonzero(np.array(pick_classes) == name), np.flatnonzero(np.array(truth_classes) == name))
            for name in set(pick_classes) & set(truth_classes)
        }
        hits_of = {name: (int((matches(*rows) >= 0).sum()), len(rows[0])) for name, rows in names.items()}
        metrics["by_class"], metrics["macro_f1"] = detection.by_class(hits_of, pick_classes, truth_classes)
        metrics["confusion"] = detection.confusion(found, pick_classes, truth_classes)
    median = None
    pick_rotations, true_rotations = picks.rotations(), truth.rotations()
    if pick_rotations is not None and true_rotations is not None:
        hits = np.flatnonzero(found >= 0)
        classes = [truth_classes[row] if truth_classes else "" for row in found[hits]]
        symmetries = {entry.class_name: entry.symmetry for entry in request.symmetries}
        errors = (
            detection.angular_errors(pick_rotations[hits], true_rotations[found[hits]], classes, symmetries)
            if len(hits)
            else np.empty(0)
        )
        metrics["angular_error_degrees"] = detection.summary(errors)
        metrics["angular_error_degrees_by_class"] = {
            name: detection.summary(errors[np.array(classes) == name]) for name in sorted(set(classes))
        }
        median = float(np.median(errors)) if len(errors) else None
    result = picking_pb2.EvaluateResult(
        metrics_uri=task.write_table("metrics.json", metrics),
        precision=figures.precision,
        recall=figures.recall,
        f1=figures.f1,
        matched=figures.matched,
    )
    if curve is not None:
        result.average_precision = curve.average_precision
    if median is not None:
        result.median_angular_error_degrees = median
    return result


def _labels_at(uri: str, picks: Particles, task: Task) -> NDArray[np.int64]:
    """The instance volume at each pick; 0 for picks outside of it."""
    volume = open_tomogram(task, uri)
    shape = volume.info.shape
    voxels = np.rint(true_positions(picks) * (picks.voxel_size_angstrom / volume.info.voxel_size_angstrom))
    inside = ((voxels >= 0) & (voxels < shape[::-1])).all(axis=1)
    labels = np.zeros(len(picks), np.int64)
    step = max(1, READ_BYTES // (4 * shape[1] * shape[2]))
    slabs = [(z, min(z + step, shape[0])) for z in range(0, shape[0], step)]
    labels[inside] = values_at(volume.slab, voxels[inside].astype(np.int64), slabs)
    return labels
