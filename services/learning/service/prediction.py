"""Predict."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import learning_pb2
from services.learning import (
    binned_volume,
    class_prediction,
    clustering,
    datasets,
    deepfinder,
    edss3d,
    open_set,
    overlap_tile,
    overlapping_boxes,
    tomogram_scale,
    training,
)
from services.learning.architectures import CLASSIFIERS
from services.learning.classifiers import Classifier
from services.learning.deepfinder import DeepFinder
from services.learning.edss3d import EDSS3D
from services.learning.preparation import Preparation
from services.learning.service import encoding, inputs, tomograms
from services.learning.service.registry import service

Array = NDArray[np.float32]

KNOWN = (*encoding.AUTOENCODERS, edss3d.NAME, deepfinder.NAME, *CLASSIFIERS)

#: The same name that a segmentation network has for class 0.
BACKGROUND = edss3d.BACKGROUND
#: Outputs of the largest layer that classifying a batch keeps.
CLASSIFIER_LAYERS = 5
MAX_CLASSES = 255


def _config(request: learning_pb2.PredictRequest, reader: Reader) -> dict[str, Any]:
    """The model's config, refused where the model does not take what it is given."""
    config = inputs.model_config(reader, request.model_uri, *KNOWN)
    name = config["architecture"]
    if name in encoding.AUTOENCODERS and request.tomogram_uri:
        raise InvalidArgument(
            f"tomogram_uri: {request.model_uri} is an autoencoder, which gives codes of subtomograms; give "
            "subtomograms_uri, or a classifier or a segmenter"
        )
    if name == edss3d.NAME:
        edss3d.check_config(config)
    if name == deepfinder.NAME:
        deepfinder.check_config(config)
        if request.subtomograms_uri:
            raise InvalidArgument(
                f"subtomograms_uri: {request.model_uri} segments tomograms, whose intensities it measures as a "
                "whole; give tomogram_uri"
            )
        if request.overlapping_boxes:
            raise InvalidArgument(
                f"overlapping_boxes: {request.model_uri} learnt from patches of tomograms, not from boxes; leave it out"
            )
    if request.tomogram_uri and request.particles_uri:
        raise InvalidArgument("particles_uri chooses among subtomograms; it can't be given with tomogram_uri")
    return config


def _boxes(
    request: learning_pb2.PredictRequest, reader: Reader, config: dict[str, Any]
) -> tuple[inputs.Chosen, Preparation]:
    """The chosen subtomograms, and what is done to them; refused where they are not as the model's."""
    chosen = inputs.chosen(reader, request.subtomograms_uri, request.particles_uri)
    inputs.check_fits(config, chosen.subtomograms)
    return chosen, inputs.preparation(chosen.subtomograms, config["binning"], config["pose_normalisation"])


def _tiling(request: learning_pb2.PredictRequest, config: dict[str, Any]) -> overlap_tile.Tiling:
    if config["architecture"] == deepfinder.NAME:
        tile = -(-request.tile_size_voxels // deepfinder.POOLING) * deepfinder.POOLING
        return overlap_tile.Tiling(tile, deepfinder.MARGIN, window=0, multiple=deepfinder.POOLING)
    side = config["box_size"]
    if request.overlapping_boxes:
        # Tiles begin where boxes do, so no box that one of their voxels lies in reaches further out than half of it.
        return overlap_tile.tiling(request.tile_size_voxels, side // 2, side, side // 2)
    return overlap_tile.tiling(request.tile_size_voxels, edss3d.MARGIN, side, edss3d.POOLING)


def _predict_needs(request: learning_pb2.PredictRequest, reader: Reader) -> Needs:
    config = _config(request, reader)
    name = config["architecture"]
    weights = 3 * reader.open_blob(f"{request.model_uri.rstrip('/')}/model.safetensors").size_bytes
    base = inputs.BASE_BYTES + weights
    if request.tomogram_uri:
        tomogram = tomograms.open_tomogram(reader, request.tomogram_uri, config)
        binning = binned_volume.memory_bytes(tomogram.volume.info.shape, tomogram.binning) * (tomogram.binning > 1)
        plane = 16 * tomogram.volume.info.plane_bytes
        classes = len(config["class_names"])
        if name in (edss3d.NAME, deepfinder.NAME):
            tiles = _tiling(request, config)
            voxels = overlap_tile.voxels(tomogram.shape, tiles)
            work = overlap_tile.memory_bytes(tomogram.shape, classes, tiles, request.probabilities)
            if name == edss3d.NAME:
                work += edss3d.inference_bytes(voxels, classes)
            else:
                scale = 16 * tomogram_scale.SAMPLES + 3 * tomogram_scale.SLAB_BYTES
                work = max(work + deepfinder.inference_bytes(voxels, classes, config["channels"]), scale)
        else:
            side = config["box_size"]
            batch = class_prediction.batch_size(side)
            work = overlapping_boxes.memory_bytes(tomogram.shape, side, classes, batch) + _classifier_bytes(side)
        return Needs(base + plane + max(binning, work))
    chosen, preparation = _boxes(request, reader, config)
    # The particle table; codes, probabilities or features, and their table as text.
    rows = len(chosen) * (1000 + 64 * 32)
    side = preparation.prepared_size
    base += datasets.loading_bytes(preparation) + rows
    if name == edss3d.NAME:
        classes = len(config["class_names"])
        boxes = edss3d.inference_bytes(clustering.batch_size(side) * side**3, classes)
        return Needs(base + boxes + 4 * (classes + 1) * chosen.subtomograms.box_size**3)
    if name in CLASSIFIERS:
        return Needs(base + _classifier_bytes(side) + len(chosen) * 64 * len(config["class_names"]))
    return Needs(base + inputs.INFERENCE_LAYERS * clustering.batch_bytes(side))


def _classifier_bytes(side: int) -> int:
    """Of classifying a batch."""
    layer = 4 * class_prediction.LARGEST_LAYER_CHANNELS * side**3
    return CLASSIFIER_LAYERS * class_prediction.batch_size(side) * layer


@service.operation(needs=_predict_needs)
def predict(request: learning_pb2.PredictRequest, task: Task) -> learning_pb2.PredictResult:
    """Apply a trained network to subtomograms or, by overlapping tiles, to a whole tomogram."""
    config = _config(request, task)
    training.use_deterministic_algorithms(task.threads)
    name = config["architecture"]
    if name in encoding.AUTOENCODERS:
        return _encode(request, task)
    _, model = inputs.open_model(task, request.model_uri, name)
    model = model.to(torch.device(task.device)).eval()
    if isinstance(model, DeepFinder) or (isinstance(model, EDSS3D) and request.tomogram_uri):
        return _segment_tomogram(request, task, config, model)
    if isinstance(model, EDSS3D):
        return _segment_boxes(request, task, config, model)
    assert isinstance(model, Classifier)
    classify = _classify_tomogram if request.tomogram_uri else _classify_boxes
    return classify(request, task, config, model)


def _encode(request: learning_pb2.PredictRequest, task: Task) -> learning_pb2.PredictResult:
    """Codes of subtomograms."""
    what = encoding.encoding_set(task, request.subtomograms_uri, request.model_uri, request.particles_uri)
    model, _ = encoding.open_autoencoder(task, request.model_uri)
    codes = encoding.encode(task, model, what, task.progress).codes
    table = {"id": what.chosen.ids.tolist(), "codes": _numbers(codes)}
    spread = codes.std(axis=0, dtype=np.float64)
    metrics = {
        "subtomograms": len(codes),
        "codes_in_use": int((spread > 0).sum()),
        "code_means": codes.mean(axis=0, dtype=np.float64).tolist(),
        "code_standard_deviations": spread.tolist(),
    }
    return learning_pb2.PredictResult(
        table_uri=task.write_table("codes.json", table), metrics_uri=task.write_table("metrics.json", metrics)
    )


def _segment_boxes(
    request: learning_pb2.PredictRequest, task: Task, config: dict[str, Any], model: EDSS3D
) -> learning_pb2.PredictResult:
    """A stack of labels in the particles' order."""
    chosen, preparation = _boxes(request, task, config)
    preparation = inputs.scaled(chosen.subtomograms, preparation, part(task.progress, 0.0, 0.1))
    report = part(task.progress, 0.1, 1.0)
    names, device = config["class_names"], torch.device(task.device)
    step = clustering.batch_size(preparation.prepared_size)
    sizes, sums = np.zeros(len(names), np.int64), np.zeros(len(names))
    info = tomograms.stack_info(chosen.info, len(chosen))
    volumes = tomograms.ClassVolumes(task, info, preparation.binning, len(names), request.probabilities)
    with volumes, torch.inference_mode():
        for first, boxes in datasets.prepared_chunks(chosen.read, chosen.ids, preparation):
            for start in range(0, len(boxes), step):
                batch = torch.from_numpy(boxes[start : start + step])[:, None].to(device)
                found = model.probabilities(batch).cpu().numpy()
                labels = found.argmax(axis=1)
                sizes += np.bincount(labels.reshape(-1), minlength=len(names))
                sums += found.sum(axis=(0, 2, 3, 4), dtype=np.float64)
                volumes.write_boxes(labels, found)
                done = first + start + len(batch)
                report(done / len(chosen), "segmenting", subtomograms=done)
    metrics = _voxel_metrics(names, sizes, sums) | {"subtomograms": len(chosen)}
    return learning_pb2.PredictResult(
        particles_uri=task.write_particles("particles.parquet", chosen.particles),
        labels_uri=volumes.labels_uri,
        probability_uris=volumes.probability_uris,
        names=names,
        sizes=metrics["voxels"],
        metrics_uri=task.write_table("metrics.json", metrics),
    )


def _segment_tomogram(
    request: learning_pb2.PredictRequest, task: Task, config: dict[str, Any], model: EDSS3D | DeepFinder
) -> learning_pb2.PredictResult:
    """Labels of a tomogram by overlapping tiles."""
    tomogram = tomograms.open_tomogram(task, request.tomogram_uri, config)
    names, device = config["class_names"], torch.device(task.device)

    def probabilities(region: Array) -> Array:
        values = torch.from_numpy(region).to(device)
        with torch.inference_mode():
            if request.overlapping_boxes and isinstance(model, EDSS3D):
                found = model.probabilities_by_boxes(values, config["box_size"])
            else:
                found = model.probabilities(values[None, None])[0]
        return np.asarray(found.cpu().numpy())

    sizes, sums = np.zeros(len(names), np.int64), np.zeros(len(names))
    volumes = tomograms.ClassVolumes(task, tomogram.volume.info, tomogram.binning, len(names), request.probabilities)
    preparing = part(task.progress, 0.0, 0.1)
    if isinstance(model, DeepFinder):
        opened = tomograms.in_own_scale(tomogram, preparing)
    else:
        opened = tomograms.opened(task, tomogram, preparing)
    with volumes, opened as read:
        for slab in overlap_tile.segment(
            probabilities,
            read,
            tomogram.shape,
            len(names),
            _tiling(request, config),
            part(task.progress, 0.1, 1.0),
            request.probabilities,
        ):
            sizes += np.bincount(slab.labels.reshape(-1), minlength=len(names))
            sums += slab.sums
            volumes.write_planes(slab.start, slab.labels, slab.scores, slab.probabilities)
    return _volume_result(task, volumes, names, sizes, sums)


def _classify_boxes(
    request: learning_pb2.PredictRequest, task: Task, config: dict[str, Any], model: Classifier
) -> learning_pb2.PredictResult:
    """Classes of subtomograms, those that an open-set network rejects in classes behind the known ones."""
    chosen, preparation = _boxes(request, task, config)
    chunks = datasets.prepared_chunks(chosen.read, chosen.ids, preparation)
    found = class_prediction.predict(
        model, config, chunks, len(chosen), torch.device(task.device), part(task.progress, 0.0, 0.9)
    )
    ids, names = list(config["class_ids"]), list(config["class_names"])
    labels = found.labels
    table: dict[str, Any] = {"id": chosen.ids.tolist(), "names": names, "class_ids": ids}
    table["probabilities"] = _numbers(found.probabilities)
    if found.rejected is not None and found.distances is not None:
        unseen = open_set.unseen_classes(
            found.features, found.rejected, request.unseen_classes, request.seed, part(task.progress, 0.9, 1.0)
        )
        labels = np.where(found.rejected, len(ids) + unseen, labels)
        names += [f"unseen {number}" for number in range(1, request.unseen_classes + 1)]
        ids += [max(ids) + number for number in range(1, request.unseen_classes + 1)]
        table["distances"] = _numbers(found.distances)
        table["rejected"] = found.rejected.tolist()
    sizes = np.bincount(labels, minlength=len(ids)).tolist()
    predicted = chosen.particles.with_columns(
        class_id=np.array(ids, np.int32)[labels],
        class_name=np.array(names, object)[labels],
        score=found.scores,
    )
    metrics = {
        "subtomograms": len(chosen),
        "sizes": dict(zip(names, sizes, strict=True)),
        "mean_probabilities": dict(
            zip(config["class_names"], found.probabilities.mean(axis=0, dtype=np.float64).tolist(), strict=True)
        ),
        "mean_score": float(found.scores.mean()),
    }
    return learning_pb2.PredictResult(
        particles_uri=task.write_particles("particles.parquet", predicted),
        table_uri=task.write_table("probabilities.json", table),
        names=names,
        sizes=sizes,
        metrics_uri=task.write_table("metrics.json", metrics),
    )


def _classify_tomogram(
    request: learning_pb2.PredictRequest, task: Task, config: dict[str, Any], model: Classifier
) -> learning_pb2.PredictResult:
    """Labels of a tomogram by boxes that overlap by half.

    The classes are numbered from 1 in the config's order, but for one that is named background, which is 0; so is what
    lies in constant boxes alone.
    """
    if config["pose_normalisation"]:
        raise FailedPrecondition(
            f"{request.model_uri} was trained on boxes whose poses were normalised; a tomogram's can't be"
        )
    tomogram = tomograms.open_tomogram(task, request.tomogram_uri, config)
    known, box = list(config["class_names"]), config["box_size"]
    if len(known) > MAX_CLASSES:
        raise FailedPrecondition(f"{request.model_uri} has {len(known)} classes; labels can tell {MAX_CLASSES}")
    others = [number for number, name in enumerate(known) if name != BACKGROUND]
    names = [BACKGROUND, *(known[number] for number in others)]
    label_of = np.zeros(len(known), np.uint8)
    label_of[others] = np.arange(1, len(names))
    device = torch.device(task.device)

    def probabilities(boxes: Array) -> Array:
        found = class_prediction.predict(model, config, [(0, boxes)], len(boxes), device, lambda *_, **__: None)
        return found.probabilities

    sizes, sums = np.zeros(len(names), np.int64), np.zeros(len(names))
    volumes = tomograms.ClassVolumes(task, tomogram.volume.info, tomogram.binning, len(names), request.probabilities)
    with volumes, tomograms.opened(task, tomogram, part(task.progress, 0.0, 0.1)) as read:
        grid = overlapping_boxes.classify_boxes(
            probabilities,
            read,
            tomogram.shape,
            box,
            len(known),
            class_prediction.batch_size(box),
            part(task.progress, 0.1 if tomogram.binning > 1 else 0.0, 0.9),
        )
        for z, found in enumerate(overlapping_boxes.planes(grid, tomogram.shape, box)):
            labels = np.where(found.any(axis=0), label_of[found.argmax(axis=0)], 0)
            ordered = np.zeros((len(names), *labels.shape), np.float32)
            for number, label in enumerate(label_of):
                ordered[label] += found[number]
            sizes += np.bincount(labels.reshape(-1), minlength=len(names))
            sums += ordered.sum(axis=(1, 2), dtype=np.float64)
            volumes.write_planes(z, labels[np.newaxis], ordered.max(axis=0)[np.newaxis], ordered[:, np.newaxis])
            task.progress(0.9 + 0.1 * (z + 1) / tomogram.shape[0], "joining boxes", planes=z + 1)
    return _volume_result(task, volumes, names, sizes, sums)


def _volume_result(
    task: Task,
    volumes: tomograms.ClassVolumes,
    names: list[str],
    sizes: NDArray[np.int64],
    sums: NDArray[np.float64],
) -> learning_pb2.PredictResult:
    metrics = _voxel_metrics(names, sizes, sums)
    return learning_pb2.PredictResult(
        labels_uri=volumes.labels_uri,
        scores_uri=volumes.scores_uri,
        probability_uris=volumes.probability_uris,
        names=names,
        sizes=metrics["voxels"],
        metrics_uri=task.write_table("metrics.json", metrics),
    )


def _voxel_metrics(names: list[str], sizes: NDArray[np.int64], sums: NDArray[np.float64]) -> dict[str, Any]:
    """Of voxels as the network saw them, binned where it wanted that."""
    total = int(sizes.sum())
    return {
        "names": names,
        "voxels": sizes.tolist(),
        "shares_of_voxels": (sizes / total).tolist(),
        "mean_probabilities": (sums / total).tolist(),
    }


def _numbers(values: NDArray[np.floating[Any]]) -> list[Any]:
    """For a table: to 6 decimals, as float32 holds no more."""
    rounded: list[Any] = values.astype(np.float64).round(6).tolist()
    return rounded
