"""Clusters over real gRPC: their model, further subtomograms, and classes made of them."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import open_volume
from services.learning import autoencoder
from services.learning.service import service
from tests.contract.conftest import channel_to
from tests.contract.learning_models import data_facts, put_model
from tests.contract.test_learning import put_particles, put_subtomograms, refused, table
from tests.unit.learning.shapes import CHIRAL, blobs, two_kinds

STATUS = grpc.StatusCode
COUNT = 24

channel = channel_to(service)


def put_autoencoder(store: Store) -> str:
    return put_model(store, "autoencoder", autoencoder.config(8) | data_facts())


async def test_clusters_can_be_used_on_further_subtomograms(channel: grpc.aio.Channel, store: Store) -> None:
    boxes = two_kinds(COUNT, 16, 0)[0]
    subtomograms = put_subtomograms(store, "clustered", boxes)
    made = learning_pb2.ClusterRequest(subtomograms_uri=subtomograms, model_uri=put_autoencoder(store), clusters=2)
    clusters = (await call_operation(channel, made)).result
    embedding = table(store, clusters.embedding_uri)
    assert embedding["id"] == list(range(100, 100 + COUNT))
    assert embedding["sampling"] == "all particles"
    assert embedding["explained_variance"][0] > embedding["explained_variance"][1] > 0
    classes = Particles.from_parquet(store.get(clusters.particles_uri)).table["class_id"].tolist()
    assert embedding["cluster"] == [number + 1 for number in classes]
    # Balls and shells lie apart on the first component.
    first = np.array(embedding["x"])
    assert abs(first[::2].mean() - first[1::2].mean()) > 3 * max(first[::2].std(), first[1::2].std())
    assert table(store, f"{clusters.model_uri}/config.json")["clusters"] == 2
    assert "autoencoder3d-clusters" in store.get(f"{clusters.model_uri}/card.md").decode()

    assign = learning_pb2.AssignClustersRequest(subtomograms_uri=subtomograms, model_uri=clusters.model_uri)
    same = (await call_operation(channel, assign)).result
    assert list(same.sizes) == list(clusters.sizes)
    again = Particles.from_parquet(store.get(same.particles_uri)).table
    assert again["class_id"].tolist() == classes
    metrics = table(store, same.metrics_uri)
    # One in twenty of the clustered set itself, as far as 24 can show that.
    assert metrics["share_farther_than_95_percent_of_clustered_set"] <= 2 / COUNT
    assert metrics["distances"] == pytest.approx(metrics["distances_of_clustered_set"], rel=1e-3)
    assert sorted((-again["score"]).tolist())[-1] == pytest.approx(metrics["distances"][-1])

    noise = np.random.default_rng(5).standard_normal((9, 16, 16, 16), np.float32)
    other = put_subtomograms(store, "noise", noise)
    assign = learning_pb2.AssignClustersRequest(
        subtomograms_uri=other,
        model_uri=clusters.model_uri,
        particles_uri=put_particles(store, "some", [104, 101, 107]),
    )
    foreign = (await call_operation(channel, assign)).result
    assert sum(foreign.sizes) == 3
    assert Particles.from_parquet(store.get(foreign.particles_uri)).table["id"].tolist() == [104, 101, 107]
    assert table(store, foreign.metrics_uri)["share_farther_than_95_percent_of_clustered_set"] == 1

    # Some of them once more, by the autoencoder in the model of the clusters.
    once_more = learning_pb2.ClusterRequest(
        subtomograms_uri=subtomograms,
        model_uri=clusters.model_uri,
        clusters=3,
        particles_uri=put_particles(store, "balls", list(range(100, 100 + COUNT, 2))),
    )
    finer = (await call_operation(channel, once_more)).result
    assert sum(finer.sizes) == COUNT // 2
    assert open_volume(store, finer.centres_uri).info.count == 3


async def test_models_that_are_none_of_clusters(channel: grpc.aio.Channel, store: Store) -> None:
    subtomograms = put_subtomograms(store, "clustered", two_kinds(6, 16, 0)[0])
    model = put_autoencoder(store)
    code, message = await refused(
        channel, learning_pb2.AssignClustersRequest(subtomograms_uri=subtomograms, model_uri=model)
    )
    assert code == STATUS.FAILED_PRECONDITION
    assert "'autoencoder3d', 'autoencoder3d-clusters' is needed" in message
    store.put(f"{model}/model.safetensors", store.get(f"{model}/model.safetensors")[:-4] + b"abcd")
    code, message = await refused(
        channel, learning_pb2.ClusterRequest(subtomograms_uri=subtomograms, model_uri=model, clusters=2)
    )
    assert code == STATUS.DATA_LOSS
    assert "model.safetensors" in message


async def test_clusters_joined_into_classes(channel: grpc.aio.Channel, store: Store) -> None:
    numbers = np.array([0, 1, 2, 3, 0, 1, 2, 4], np.int32)
    particles = Particles.from_positions(np.zeros((8, 3)), 10.0, "t", class_id=numbers, class_name=np.repeat("old", 8))
    uri = f"{store.root}/default/brought/particles.parquet"
    store.put(uri, particles.to_parquet())

    def select(*groups: str) -> learning_pb2.SelectClustersRequest:
        return learning_pb2.SelectClustersRequest(particles_uri=uri, groups=groups)

    result = (await call_operation(channel, select("membrane:2,4-5", "globule:1"))).result
    assert list(result.names) == ["membrane", "globule"]
    assert list(result.sizes) == [4, 2]
    selected = Particles.from_parquet(store.get(result.particles_uri)).table
    assert selected["id"].tolist() == [0, 1, 3, 4, 5, 7]
    assert selected["class_id"].tolist() == [2, 1, 1, 2, 1, 1]
    assert selected["class_name"].tolist() == ["globule", "membrane", "membrane", "globule", "membrane", "membrane"]
    groups = [Particles.from_parquet(store.get(group)).table for group in result.group_uris]
    assert [group["id"].tolist() for group in groups] == [[1, 3, 5, 7], [0, 4]]

    for texts, words in (
        (["membrane:1,9"], "cluster 9 of 'membrane' is not there"),
        (["membrane:1", "globule:1-2"], "cluster 1 is in 'membrane' and in 'globule'"),
        (["membrane:0"], "cluster 0 of 'membrane' is not there: the clusters of"),
        ([":1"], "no name before the colon"),
        (["membrane 1"], "as membrane:1,4,8-10"),
    ):
        code, message = await refused(channel, select(*texts))
        assert code == STATUS.INVALID_ARGUMENT
        assert words in message
    store.put(uri, Particles.from_positions(np.zeros((2, 3)), 10.0, "t").to_parquet())
    code, message = await refused(channel, select("membrane:1"))
    assert code == STATUS.INVALID_ARGUMENT
    assert "has no column class_id" in message


async def test_the_weakest_of_the_others_as_background(channel: grpc.aio.Channel, store: Store) -> None:
    uri = f"{store.root}/default/brought/particles.parquet"
    numbers, scores = np.array([0, 1, 2, 0, 1], np.int32), np.array([5.0, 0.1, 3.0, 0.2, 0.3])

    def put(**columns: Any) -> None:
        store.put(uri, Particles.from_positions(np.zeros((5, 3)), 10.0, "t", class_id=numbers, **columns).to_parquet())

    def select(*groups: str, count: int = 2) -> learning_pb2.SelectClustersRequest:
        return learning_pb2.SelectClustersRequest(particles_uri=uri, groups=groups, weakest_background=count)

    put(score=scores)
    result = (await call_operation(channel, select("globule:1"))).result
    assert (list(result.names), list(result.sizes), result.count) == (["globule", "background"], [2, 2], 4)
    selected = Particles.from_parquet(store.get(result.particles_uri)).table
    assert selected["id"].tolist() == [0, 1, 3, 4], "3 is weaker than 4, but a globule"
    assert selected["class_name"].tolist() == ["globule", "background", "globule", "background"]
    assert Particles.from_parquet(store.get(result.group_uris[1])).table["id"].tolist() == [1, 4]
    assert list((await call_operation(channel, select("globule:1", count=9))).result.sizes) == [2, 3]

    code, message = await refused(channel, select("globule:1", "background:2"))
    assert (code, "weakest_background makes" in message) == (STATUS.INVALID_ARGUMENT, True)
    put()
    code, message = await refused(channel, select("globule:1"))
    assert (code, "has no column score" in message) == (STATUS.INVALID_ARGUMENT, True)


async def test_normalised_poses_lead_back_to_where_structures_are(channel: grpc.aio.Channel, store: Store) -> None:
    random = np.random.default_rng(3)
    turns, shifts = Rotation.random(6, rng=random), random.uniform(-1, 1, (6, 3))
    boxes = np.stack([blobs(CHIRAL, 16, turn, tuple(shift)) for turn, shift in zip(turns, shifts, strict=True)])
    subtomograms = put_subtomograms(store, "turned", boxes)
    facts = data_facts(16, 1, pose_normalisation=True)
    model = put_model(store, "poses", autoencoder.config(16) | facts)
    made = learning_pb2.ClusterRequest(subtomograms_uri=subtomograms, model_uri=model, clusters=2)
    clusters = (await call_operation(channel, made)).result
    posed = Particles.from_parquet(store.get(clusters.posed_particles_uri))
    found = posed.rotations()
    assert found is not None
    # Whatever the axes of the structure are, they turn and move with it.
    between = (found * found[0].inv()) * (turns * turns[0].inv()).inv()
    assert np.degrees(between.magnitude()).max() < 3
    middles = turns.inv().apply(posed.shifts() - shifts)
    assert np.abs(middles - middles[0]).max() < 0.15
    plain = Particles.from_parquet(store.get(clusters.particles_uri))
    assert plain.rotations() is None
    further = learning_pb2.AssignClustersRequest(subtomograms_uri=subtomograms, model_uri=clusters.model_uri)
    assigned = (await call_operation(channel, further)).result
    again = Particles.from_parquet(store.get(assigned.posed_particles_uri))
    np.testing.assert_array_equal(again.shifts(), posed.shifts())
