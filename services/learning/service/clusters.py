"""Cluster, AssignClusters and SelectClusters."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from cryofleet.artifacts import content_digest
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.operations import parameters_of
from cryofleet.particles import Particles
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import VolumeInfo
from services.learning import (
    autoencoder,
    cluster_groups,
    cluster_model,
    clustering,
    edss3d,
    embedding,
    model_card,
    model_files,
    training,
)
from services.learning.preparation import CONTRAST
from services.learning.service import encoding, inputs
from services.learning.service.registry import service


def _clustered_set(request: learning_pb2.ClusterRequest, reader: Reader) -> encoding.EncodingSet:
    what = encoding.encoding_set(reader, request.subtomograms_uri, request.model_uri, request.particles_uri)
    clustering.check_clusters(request.clusters, len(what.chosen))
    return what


def _cluster_needs(request: learning_pb2.ClusterRequest, reader: Reader) -> Needs:
    what = _clustered_set(request, reader)
    centres = 2 * 4 * what.preparation.prepared_size**3 * request.clusters
    # Distances to the centres, and the rows of the tables.
    rows = len(what.chosen) * 8 * request.clusters + 400 * embedding.MAX_POINTS
    return Needs(what.memory_bytes + centres + rows)


@service.operation(needs=_cluster_needs)
def cluster(request: learning_pb2.ClusterRequest, task: Task) -> learning_pb2.ClusterResult:
    """Encode subtomograms, sort the codes by k-means and decode the cluster centres."""
    what = _clustered_set(request, task)
    training.use_deterministic_algorithms(task.threads)
    model, _ = encoding.open_autoencoder(task, request.model_uri)
    encoded = encoding.encode(task, model, what, part(task.progress, 0.0, 0.7))
    codes = encoded.codes
    found = clustering.cluster(codes, request.clusters, request.seed, part(task.progress, 0.7, 0.9))
    centres = clustering.decode(model, found.centres, torch.device(task.device), part(task.progress, 0.9, 1.0))

    info, preparation = what.chosen.info, what.preparation
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
    classified = what.chosen.particles.without_columns("class_name").with_columns(class_id=found.labels)
    largest = [
        task.write_particles(f"cluster-{number:04d}.parquet", classified.select(found.labels == number - 1))
        for number in range(1, min(request.largest, request.clusters) + 1)
    ]
    distances = cluster_model.Assignment(found.labels, clustering.distances(codes, found))
    quantiles = cluster_model.distance_quantiles(distances, request.clusters)
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
        "distances": quantiles,
    }
    task.write_bytes("codes.parquet", codes_table(what.chosen.ids, codes))
    return learning_pb2.ClusterResult(
        particles_uri=task.write_particles("particles.parquet", classified),
        largest_uris=largest,
        centres_uri=task.write_volume("centres.mrc", centres, centre_info),
        sizes=found.sizes.tolist(),
        metrics_uri=task.write_table("metrics.json", metrics),
        model_uri=_write_model(request, task, what, model, found, metrics),
        embedding_uri=task.write_table("embedding.json", _embedding(what.chosen.ids, codes, found)),
        posed_particles_uri=encoded.write_posed(task, what, classified),
    )


def _write_model(
    request: learning_pb2.ClusterRequest,
    task: Task,
    what: encoding.EncodingSet,
    model: autoencoder.Autoencoder3D,
    found: clustering.Clustering,
    metrics: dict[str, Any],
) -> str:
    """The autoencoder with the centres, in `model/`; its URI."""
    figures = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    config = (
        cluster_model.config(cluster_model.autoencoder_config(what.config), metrics["distances"])
        | inputs.data_facts(task, what.chosen, what.preparation)
        | {
            "autoencoder_digest": content_digest(task.store, request.model_uri.rstrip("/")),
            "parameters": parameters_of(request),
            "figures": figures,
        }
    )
    files = model_files.write_model(cluster_model.with_centres(model, found.centres), config)
    files[model_files.CARD_FILE] = model_card.card(config, cluster_model).encode()
    for name, data in files.items():
        task.write_bytes(f"model/{name}", data)
    return task.folder_uri("model")


def _embedding(ids: NDArray[np.int64], codes: NDArray[np.float32], found: clustering.Clustering) -> dict[str, Any]:
    """The table of the codes' first two principal components: columns of the points, and the centres'."""
    components = embedding.principal_components(codes)
    rows = embedding.sampled_rows(len(codes))
    points = components.points(codes[rows]).round(5)
    centres = components.points(found.centres).round(5)
    return {
        "particles": len(codes),
        "points": len(rows),
        "sampling": "all particles" if len(rows) == len(codes) else "rows of particles.parquet, evenly spaced",
        "explained_variance": components.explained.tolist(),
        "id": ids[rows].tolist(),
        "cluster": (found.labels[rows] + 1).tolist(),
        "x": points[:, 0].tolist(),
        "y": points[:, 1].tolist(),
        "centre_x": centres[:, 0].tolist(),
        "centre_y": centres[:, 1].tolist(),
    }


def codes_table(ids: NDArray[np.int64], codes: NDArray[np.float32]) -> bytes:
    """Parquet with the columns id, code_0, code_1 and so on."""
    columns: dict[str, NDArray[Any]] = {"id": ids}
    columns |= {f"code_{i}": codes[:, i] for i in range(codes.shape[1])}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _assigned_set(request: learning_pb2.AssignClustersRequest, reader: Reader) -> encoding.EncodingSet:
    what = encoding.encoding_set(
        reader, request.subtomograms_uri, request.model_uri, request.particles_uri, (cluster_model.NAME,)
    )
    cluster_model.check_config(what.config)
    return what


def _assign_needs(request: learning_pb2.AssignClustersRequest, reader: Reader) -> Needs:
    what = _assigned_set(request, reader)
    return Needs(what.memory_bytes + 4 * 8 * cluster_model.CHUNK_ROWS * int(what.config["clusters"]))


@service.operation(needs=_assign_needs)
def assign_clusters(request: learning_pb2.AssignClustersRequest, task: Task) -> learning_pb2.AssignClustersResult:
    """Map further subtomograms to the nearest of known clusters."""
    what = _assigned_set(request, task)
    training.use_deterministic_algorithms(task.threads)
    model, clusters = encoding.open_autoencoder(task, request.model_uri)
    assert clusters is not None
    encoded = encoding.encode(task, model, what, task.progress)
    codes = encoded.codes
    found = cluster_model.nearest(codes, clusters.centres.cpu().numpy())
    count = len(clusters.centres)
    sizes = np.bincount(found.labels, minlength=count).tolist()
    known = what.config["distances"]
    everywhere, shares = cluster_model.farther_away(found, known)
    own = cluster_model.distance_quantiles(found, count)
    assigned = what.chosen.particles.without_columns("class_name").with_columns(
        class_id=found.labels, score=-found.distances
    )
    metrics = {
        "subtomograms": len(codes),
        "sizes": sizes,
        "quantiles": own["quantiles"],
        "distances": own["all"],
        "distances_of_clustered_set": known["all"],
        # 0.05 of the clustered set itself.
        "share_farther_than_95_percent_of_clustered_set": everywhere,
        "clusters": [
            {
                "cluster": number + 1,
                "subtomograms": sizes[number],
                "distances": own["clusters"][number],
                "distances_of_clustered_set": known["clusters"][number],
                "share_farther_than_95_percent_of_clustered_set": shares[number],
            }
            for number in range(count)
        ],
    }
    return learning_pb2.AssignClustersResult(
        particles_uri=task.write_particles("particles.parquet", assigned),
        sizes=sizes,
        metrics_uri=task.write_table("metrics.json", metrics),
        posed_particles_uri=encoded.write_posed(task, what, assigned),
    )


def _select_needs(request: learning_pb2.SelectClustersRequest, reader: Reader) -> Needs:
    return Needs(inputs.BASE_BYTES + 8 * reader.open_blob(request.particles_uri).size_bytes)


@service.operation(needs=_select_needs)
def select_clusters(request: learning_pb2.SelectClustersRequest, task: Task) -> learning_pb2.SelectClustersResult:
    """Take clusters by their numbers, alone or joined into named classes."""
    groups = cluster_groups.parse_groups(request.groups)
    particles = task.read_particles(request.particles_uri)
    if not len(particles):
        raise FailedPrecondition(f"{request.particles_uri} holds no particle")
    if "class_id" not in particles.table:
        raise InvalidArgument(f"{request.particles_uri} has no column class_id: give the particles of Cluster")
    clusters = particles.table["class_id"].to_numpy() + 1  # as reports number them
    numbers = cluster_groups.group_numbers(clusters, groups, request.particles_uri, request.allow_empty)
    names = [group.name for group in groups]
    if request.weakest_background:
        numbers[_weakest(request, particles, numbers, names)] = len(names) + 1
        names.append(edss3d.BACKGROUND)
    rows = np.flatnonzero(numbers)
    selected = particles.select(rows).with_columns(
        class_id=numbers[rows], class_name=np.array(names, object)[numbers[rows] - 1]
    )
    task.progress(1.0, "selecting clusters")
    return learning_pb2.SelectClustersResult(
        particles_uri=task.write_particles("particles.parquet", selected),
        group_uris=[_write_group(task, selected, number) for number in range(1, len(names) + 1)],
        names=names,
        sizes=np.bincount(numbers, minlength=len(names) + 1)[1:].tolist(),
        count=len(selected),
    )


def _weakest(
    request: learning_pb2.SelectClustersRequest, particles: Particles, numbers: NDArray[np.int32], names: list[str]
) -> NDArray[np.int64]:
    """Rows of the particles of no group that have the lowest scores."""
    if edss3d.BACKGROUND in names:
        raise InvalidArgument(
            f"groups: {edss3d.BACKGROUND!r} is what weakest_background makes; give the one or the other"
        )
    if "score" not in particles.table:
        raise InvalidArgument(f"{request.particles_uri} has no column score, which weakest_background goes by")
    free = np.flatnonzero(numbers == 0)
    scores = particles.table["score"].to_numpy(np.float64)[free]
    return np.sort(free[np.argsort(scores, kind="stable")[: request.weakest_background]])


def _write_group(task: Task, selected: Particles, number: int) -> str:
    """The particles of one group."""
    members = selected.select(selected.table["class_id"].to_numpy() == number)
    return task.write_particles(f"group-{number:03d}.parquet", members)
