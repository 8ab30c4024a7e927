import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from services.alignment import clustering
from services.alignment.clustering import adjusted_rand_index, cluster


def groups(
    count: int, distance: float, particles: int = 120, components: int = 3, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Gaussian clouds of deviation 1 whose centres, on a simplex, are `distance` apart."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, count, particles)
    centres = np.eye(max(count, components))[:count] * distance / np.sqrt(2)
    return rng.normal(size=(particles, centres.shape[1])) + centres[labels], labels


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_number_of_clusters_is_found(count: int) -> None:
    points, labels = groups(count, 8.0)
    found = cluster(points)
    assert len(found) == count
    # 8 deviations apart, none in a hundred thousand lies nearer to another centre.
    assert adjusted_rand_index(found.labels, labels) == 1.0
    assert found.sizes.tolist() == sorted(np.bincount(labels).tolist(), reverse=True)
    assert np.array_equal(np.bincount(found.labels), found.sizes)
    for k in range(count):
        assert np.allclose(found.centres[k], points[found.labels == k].mean(axis=0))


@pytest.mark.parametrize("seed", range(4))
def test_one_cloud_is_one_cluster_whatever_its_shape(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for points in (rng.normal(size=(80, 2)) * [5, 1], rng.standard_t(5, size=(80, 3)), rng.normal(size=(30, 1))):
        assert len(cluster(points)) == 1


def test_tight_clusters_that_are_long_are_not_parted_further() -> None:
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], 40)
    points = np.stack([labels * 40 + rng.normal(size=80), 4 * rng.normal(size=80)], axis=1)
    found = cluster(points)
    assert adjusted_rand_index(found.labels, labels) == 1.0
    # The table tells what was tested: the whole, which was parted, and both parts, which were not.
    assert [(t.size, t.parted) for t in found.tests] == [(80, True), (40, False), (40, False)]
    assert found.tests[0].gap[1] > found.tests[0].gap[0]
    table = found.table()
    assert table["sizes"] == [40, 40]
    assert table["criterion"] == "gap statistic of Ward's clusters"


def test_the_number_of_clusters_can_be_given_and_bounded() -> None:
    points, labels = groups(3, 8.0)
    assert adjusted_rand_index(cluster(points, 3).labels, labels) == 1.0
    assert len(cluster(points, 6)) == 6
    assert len(cluster(points, 1)) == 1
    assert cluster(points, 3).tests == ()
    assert len(cluster(points, largest=2)) == 2
    assert len(cluster(points, largest=1)) == 1


def test_many_points_go_to_the_nearest_centre_of_a_tree_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "TREE_PARTICLES", 60)
    points, labels = groups(3, 8.0, particles=3000)
    found = cluster(points)
    assert adjusted_rand_index(found.labels, labels) > 0.995
    assert found.sizes.sum() == 3000


def test_points_that_coincide_and_single_points_work() -> None:
    assert len(cluster(np.zeros((20, 2)))) == 1
    assert len(cluster(np.repeat([[0.0], [5.0]], 10, axis=0), 2)) == 2
    single = cluster(np.ones((1, 3)))
    assert single.labels.tolist() == [0]


def test_the_same_seed_gives_the_same() -> None:
    points, _ = groups(3, 4.0)
    assert cluster(points, seed=5).tests == cluster(points, seed=5).tests


def test_the_adjusted_rand_index() -> None:
    first = np.array([0, 0, 0, 1, 1, 1])
    assert adjusted_rand_index(first, np.array([7, 7, 7, -1, -1, -1])) == 1.0
    # Table (2, 1; 0, 3): 1 + 3 pairs together in both, 6 and 1 + 6 in each, 6 x 7 / 15 by chance.
    assert adjusted_rand_index(first, np.array([0, 0, 1, 1, 1, 1])) == pytest.approx((4 - 42 / 15) / (6.5 - 42 / 15))
    rng = np.random.default_rng(0)
    assert abs(adjusted_rand_index(rng.integers(0, 3, 3000), rng.integers(0, 3, 3000))) < 0.01
    assert adjusted_rand_index(np.zeros(4, int), np.zeros(4, int)) == 1.0


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="not finite"):
        cluster(np.array([[0.0], [np.nan]]))
    with pytest.raises(InvalidArgument, match="5 clusters of 4 particles"):
        cluster(np.zeros((4, 1)), 5)
    with pytest.raises(InvalidArgument, match="are expected"):
        cluster(np.zeros((0, 2)))
    with pytest.raises(InvalidArgument, match="at least 1"):
        cluster(np.zeros((4, 1)), largest=0)
    with pytest.raises(InvalidArgument, match="3 and 4"):
        adjusted_rand_index(np.zeros(3, int), np.zeros(4, int))
