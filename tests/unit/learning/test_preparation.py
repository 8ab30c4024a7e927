from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.progress import no_progress
from services.learning import datasets
from services.learning.preparation import Preparation, standardise

IDS = np.array([70, 71, 72, 73, 74])


def boxes(side: int = 8) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(5, 3, (5, side, side, side)).astype(np.float32)


def test_prepared_boxes_are_standardised_with_protein_positive() -> None:
    dark = Preparation(8, 1, False, "dark")(boxes(), IDS)
    light = Preparation(8, 1, False, "light")(boxes(), IDS)
    np.testing.assert_allclose(dark, -light, atol=1e-6)
    np.testing.assert_allclose(light.mean(axis=(1, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(light.std(axis=(1, 2, 3)), 1, atol=1e-6)


def test_binning_keeps_low_frequencies_only() -> None:
    side = 16
    x = np.arange(side)
    slow, fast = np.cos(2 * np.pi * x / side), np.cos(2 * np.pi * 7 * x / side)
    both = np.broadcast_to(slow + 3 * fast, (1, side, side, side)).astype(np.float32)
    prepared = Preparation(side, 2, False, "light")(both, IDS[:1])
    expected = standardise(np.broadcast_to(slow[::2], (1, 8, 8, 8)).astype(np.float32))
    np.testing.assert_allclose(prepared, expected, atol=1e-5)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN"), (np.inf, "NaN or infinite")])
def test_values_that_are_not_finite_are_named_by_particle(value: float, message: str) -> None:
    bad = boxes()
    bad[3, 1, 2, 3] = value
    with pytest.raises(InvalidArgument, match=f"set.json: the box of particle 73 .*{message}"):
        Preparation(8, 2, False, "dark", "set.json")(bad, IDS)


def test_constant_boxes_are_named_by_particle() -> None:
    bad = boxes()
    bad[1] = 4.25
    with pytest.raises(InvalidArgument, match="particle 71 is constant"):
        Preparation(8, 1, True, "dark")(bad, IDS)


def test_a_box_that_is_constant_once_binned_is_refused() -> None:
    bad = boxes()
    bad[4] = 7 + np.indices((8, 8, 8)).sum(axis=0) % 2
    with pytest.raises(InvalidArgument, match="particle 74 is constant, binned by 2"):
        Preparation(8, 2, False, "dark")(bad, IDS)


def test_binning_must_divide_the_box() -> None:
    with pytest.raises(InvalidArgument, match="binning"):
        Preparation(20, 3, False, "dark")


def test_large_sets_go_to_a_file_in_chunks_and_come_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "CHUNK_BYTES", 2 * 4 * 8**3)
    source = boxes()
    reads: list[tuple[int, int]] = []

    def read(first: int, count: int) -> NDArray[np.float32]:
        reads.append((first, count))
        return source[first : first + count]

    preparation = Preparation(8, 2, False, "dark")
    small = datasets.load_prepared(read, IDS, preparation, tmp_path, no_progress)
    assert not list(tmp_path.iterdir())
    large = datasets.load_prepared(read, IDS, preparation, tmp_path, no_progress, memory_limit_bytes=4 * 5 * 4**3 - 1)
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [4 * 5 * 4**3]
    np.testing.assert_array_equal(small, large)
    np.testing.assert_array_equal(small, preparation(source, IDS))
    assert reads == [(0, 2), (2, 2), (4, 1)] * 2


def test_batches_hold_each_training_box_once_and_depend_on_seed_and_epoch() -> None:
    numbered = np.broadcast_to(np.arange(23, dtype=np.float32)[:, None, None, None], (23, 4, 4, 4)).copy()

    def make(seed: int) -> datasets.BoxBatches:
        return datasets.BoxBatches(
            numbered, batch_size=4, validation_fraction=0.2, seed=seed, device=torch.device("cpu")
        )

    def seen(batches: datasets.BoxBatches, epoch: int, first: int = 0) -> list[list[int]]:
        return [batch[:, 0, 0, 0, 0].int().tolist() for (batch,) in batches.training(epoch, first)]

    batches = make(1)
    held_back = [number for (batch,) in batches.validation() for number in batch[:, 0, 0, 0, 0].int().tolist()]
    assert len(held_back) == 5
    first, second = seen(batches, 0), seen(batches, 1)
    assert len(first) == batches.training_batches == 5
    assert sorted(itertools.chain(*first)) == sorted(set(range(23)) - set(held_back))
    assert first != second
    assert seen(make(1), 1, 2) == second[2:]
    assert seen(make(2), 0) != first


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_each_side_of_the_split_has_a_box(fraction: float) -> None:
    batches = datasets.BoxBatches(
        boxes()[:2], batch_size=8, validation_fraction=fraction, seed=0, device=torch.device("cpu")
    )
    assert len(batches.training_rows) == len(batches.validation_rows) == 1
    with pytest.raises(InvalidArgument, match="at least 2"):
        datasets.BoxBatches(boxes()[:1], batch_size=8, validation_fraction=fraction, seed=0, device=torch.device("cpu"))


def test_loading_ahead_keeps_the_order_and_passes_errors_on() -> None:
    def load(number: int) -> int:
        if number == 3:
            raise InvalidArgument("three")
        return number * 10

    assert list(datasets.ahead(load, [5, 4, 2])) == [50, 40, 20]
    results = datasets.ahead(load, range(9))
    assert [next(results) for _ in range(3)] == [0, 10, 20]
    with pytest.raises(InvalidArgument, match="three"):
        next(results)
