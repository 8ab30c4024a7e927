"""The learning service: turns requests into calls of the methods, and what they give into artifacts."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from cryofleet.artifacts import content_digest
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.particles import Particles
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Service, Task
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import Subtomograms, VolumeInfo
from services.learning import autoencoder, clustering, datasets, model_files, training
from services.learning.preparation import CONTRAST, Preparation

service = Service(learning_pb2.DESCRIPTOR.services_by_name["LearningService"])

#: torch itself, buffers of reading and writing artifacts, and small things.
BASE_BYTES = 256 << 20
#: What a training step keeps for a box, in outputs of the largest layer: measured at 32^3, with their gradients.
TRAINING_LAYERS = 14
#: The same of encoding and decoding.
INFERENCE_LAYERS = 5
#: Relative difference of voxel sizes that is rounding.
VOXEL_SIZE_TOLERANCE = 1e-3


def _preparation(subtomograms: Subtomograms, binning: int, pose_normalisation: bool) -> Preparation:
    return Preparation(
        box_size=subtomograms.box_size,
        binning=binning,
        pose_normalisation=pose_normalisation,
        contrast=subtomograms.info.contrast,
        source=subtomograms.uri,
    )


def _ids(particles: Particles) -> NDArray[np.int64]:
    return particles.table["id"].to_numpy()


def _training_set(request: learning_pb2.TrainAutoencoderRequest, reader: Reader) -> tuple[Subtomograms, Preparation]:
    """The subtomograms and what is done to them, refused before anything is read where training can't work."""
    subtomograms = reader.open_subtomograms(request.subtomograms_uri)
    preparation = _preparation(subtomograms, request.binning, request.pose_normalisation)
    autoencoder.check_box_size(preparation.prepared_size)
    if subtomograms.count < 2:
        raise InvalidArgument(
            f"{subtomograms.uri} has {subtomograms.count} subtomogram; training needs at least 2, one for validation"
        )
    return subtomograms, preparation


def _train_needs(request: learning_pb2.TrainAutoencoderRequest, reader: Reader) -> Needs:
    subtomograms, preparation = _training_set(request, reader)
    side = preparation.prepared_size
    kept = min(4 * side**3 * subtomograms.count, datasets.MEMORY_LIMIT_BYTES)
    batch = min(request.batch_size, subtomograms.count)
    layers = TRAINING_LAYERS * batch * autoencoder.activation_bytes(side)
    # Weights, gradients, two moments of Adam, the best weights, and a checkpoint as tensors and as bytes.
    weights = 13 * autoencoder.weight_bytes(side)
    return Needs(BASE_BYTES + datasets.loading_bytes(preparation) + kept + layers + weights)


@service.operation(needs=_train_needs)
def train_autoencoder(request: learning_pb2.TrainAutoencoderRequest, task: Task) -> learning_pb2.TrainAutoencoderResult:
    """Train the convolutional autoencoder (Autoencoder3D) on subtomograms."""
    subtomograms, preparation = _training_set(request, task)
    training.use_deterministic_algorithms(task.threads)
    device = torch.device(task.device)
    boxes = datasets.load_prepared(
        subtomograms.read,
        _ids(subtomograms.particles()),
        preparation,
        task.scratch,
        part(task.progress, 0.0, 0.05),
    )
    batches = datasets.BoxBatches(
        boxes,
        batch_size=request.batch_size,
        validation_fraction=request.validation_fraction,
        seed=request.seed,
        device=device,
    )
    trained = training.train(
        lambda generator: autoencoder.Autoencoder3D(preparation.prepared_size, generator),
        autoencoder.AutoencoderLoss(request.l1_penalty),
        batches,
        training.TrainingOptions(
            max_epochs=request.max_epochs,
            patience_epochs=request.patience_epochs,
            learning_rate=request.learning_rate,
            seed=request.seed,
        ),
        device=device,
        progress=part(task.progress, 0.05, 1.0),
        save_checkpoint=task.save_checkpoint,
        checkpoint=task.load_checkpoint(),
        collapsed=autoencoder.codes_collapsed,
    )
    figures = {
        "epochs": trained.epochs,
        "best_epoch": trained.best_epoch,
        "best_validation_loss": trained.best_validation_loss,
        "stopped_early": trained.stopped_early,
        "restarts": trained.restarts,
        "training_subtomograms": len(batches.training_rows),
        "validation_subtomograms": len(batches.validation_rows),
    }
    config = autoencoder.config(preparation.prepared_size) | {
        "binning": request.binning,
        "pose_normalisation": request.pose_normalisation,
        "contrast": CONTRAST,
        "intensity": "each box has mean 0 and standard deviation 1",
        "subtomogram_box_size": subtomograms.box_size,
        "subtomogram_voxel_size_angstrom": subtomograms.info.voxel_size_angstrom,
        "subtomograms_digest": content_digest(task.store, subtomograms.uri),
        "parameters": {
            "max_epochs": request.max_epochs,
            "patience_epochs": request.patience_epochs,
            "batch_size": request.batch_size,
            "learning_rate": request.learning_rate,
            "l1_penalty": request.l1_penalty,
            "validation_fraction": request.validation_fraction,
            "seed": request.seed,
        },
        "figures": figures,
    }
    for name, data in model_files.write_model(trained.model, config).items():
        task.write_bytes(f"model/{name}", data)
    metrics = figures | {"losses": [_loss_row(line) for line in trained.history if line.attempt == trained.restarts]}
    collapsed = [
        {"attempt": line.attempt + 1} | _loss_row(line) for line in trained.history if line.attempt < trained.restarts
    ]
    if collapsed:
        metrics["collapsed_attempts"] = collapsed
    return learning_pb2.TrainAutoencoderResult(
        model_uri=task.folder_uri("model"),
        metrics_uri=task.write_table("metrics.json", metrics),
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        best_validation_loss=trained.best_validation_loss,
    )


def _loss_row(line: training.Epoch) -> dict[str, Any]:
    return {
        "epoch": line.epoch,
        "training_loss": line.training["loss"],
        "validation_loss": line.validation["loss"],
        "validation_reconstruction_loss": line.validation["reconstruction"],
        "active_codes": line.validation["active"],
    }


def _clustered_set(
    request: learning_pb2.ClusterRequest, reader: Reader
) -> tuple[Subtomograms, Preparation, Mapping[str, Any]]:
    """The subtomograms, what is done to them, and the model's config, refused where they do not go together."""
    subtomograms = reader.open_subtomograms(request.subtomograms_uri)
    config = model_files.read_config(reader.read_file(f"{request.model_uri}/{model_files.CONFIG_FILE}"))
    autoencoder.check_config(config)
    size, voxel_size = config["subtomogram_box_size"], config["subtomogram_voxel_size_angstrom"]
    found = subtomograms.info.voxel_size_angstrom
    if subtomograms.box_size != size or not math.isclose(found, voxel_size, rel_tol=VOXEL_SIZE_TOLERANCE):
        raise FailedPrecondition(
            f"{subtomograms.uri} has boxes of {subtomograms.box_size} voxels of {found:g} Å; the model was trained on "
            f"boxes of {size} voxels of {voxel_size:g} Å: extract the subtomograms alike, or train a model on them"
        )
    clustering.check_clusters(request.clusters, subtomograms.count)
    return subtomograms, _preparation(subtomograms, config["binning"], config["pose_normalisation"]), config


def _cluster_needs(request: learning_pb2.ClusterRequest, reader: Reader) -> Needs:
    subtomograms, preparation, _ = _clustered_set(request, reader)
    side = preparation.prepared_size
    layers = INFERENCE_LAYERS * clustering.batch_bytes(side)
    centres = 2 * 4 * side**3 * request.clusters
    # Codes as float32 and float64, distances to the centres, and the rows of the tables.
    rows = subtomograms.count * (1000 + 16 * autoencoder.CODE_SIZE + 8 * request.clusters)
    return Needs(
        BASE_BYTES + datasets.loading_bytes(preparation) + layers + centres + rows + autoencoder.weight_bytes(side)
    )


@service.operation(needs=_cluster_needs)
def cluster(request: learning_pb2.ClusterRequest, task: Task) -> learning_pb2.ClusterResult:
    """Encode subtomograms, sort the codes by k-means and decode the cluster centres."""
    subtomograms, preparation, config = _clustered_set(request, task)
    weights = task.read_file(f"{request.model_uri}/{model_files.WEIGHTS_FILE}")
    training.use_deterministic_algorithms(task.threads)
    device = torch.device(task.device)
    model = model_files.read_model(config, weights, autoencoder.from_config).to(device)
    particles = subtomograms.particles()
    ids = _ids(particles)
    codes = clustering.encode(
        model,
        datasets.prepared_chunks(subtomograms.read, ids, preparation),
        len(ids),
        device,
        part(task.progress, 0.0, 0.7),
    )
    found = clustering.cluster(codes, request.clusters, request.seed, part(task.progress, 0.7, 0.9))
    centres = clustering.decode(model, found.centres, device, part(task.progress, 0.9, 1.0))

    info = subtomograms.info
    centre_info = VolumeInfo(
        shape=(preparation.prepared_size,) * 3,
        voxel_size_angstrom=info.voxel_size_angstrom * preparation.binning,
        contrast=CONTRAST,
        # Boxes that were turned have no wedge in common.
        tilt_min_degrees=-90.0 if preparation.pose_normalisation else info.tilt_min_degrees,
        tilt_max_degrees=90.0 if preparation.pose_normalisation else info.tilt_max_degrees,
        count=request.clusters,
    )
    # Names of an earlier classification say nothing of these classes.
    unnamed = replace(particles, table=particles.table.drop(columns="class_name", errors="ignore"))
    classified = unnamed.with_columns(class_id=found.labels)
    largest = [
        task.write_particles(f"cluster-{number:04d}.parquet", classified.select(found.labels == number))
        for number in range(min(request.largest, request.clusters))
    ]
    spread = codes.std(axis=0, dtype=np.float64)
    metrics = {
        "subtomograms": len(codes),
        "clusters": request.clusters,
        "inertia": found.inertia,
        "share_of_variance_between_clusters": found.explained(codes),
        "codes_in_use": int((spread > 0).sum()),
        "sizes": found.sizes.tolist(),
        "code_means": codes.mean(axis=0, dtype=np.float64).tolist(),
        "code_standard_deviations": spread.tolist(),
    }
    task.write_bytes("codes.parquet", _codes_table(ids, codes))
    return learning_pb2.ClusterResult(
        particles_uri=task.write_particles("particles.parquet", classified),
        largest_uris=largest,
        centres_uri=task.write_volume("centres.mrc", centres, centre_info),
        sizes=found.sizes.tolist(),
        metrics_uri=task.write_table("metrics.json", metrics),
    )


def _codes_table(ids: NDArray[np.int64], codes: NDArray[np.float32]) -> bytes:
    """Parquet with the columns id, code_0, code_1 and so on."""
    columns: dict[str, NDArray[Any]] = {"id": ids}
    columns |= {f"code_{i}": codes[:, i] for i in range(codes.shape[1])}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()
