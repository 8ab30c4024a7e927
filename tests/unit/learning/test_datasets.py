"""Reading, splitting and batching of subtomograms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.progress import no_progress
from services.learning import datasets
from services.learning.preparation import Preparation
from services.learning.training import Batch

IDS = np.array([70, 71, 72, 73, 74])
CPU = torch.device("cpu")


def boxes(side: int = 8) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(5, 3, (5, side, side, side)).astype(np.float32)


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


def test_the_scale_of_a_set_is_that_of_all_its_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CHUNK_BYTES", 2 * 4 * 8**3)
    source = boxes()
    source[1:3] += 20

    def read(first: int, count: int) -> NDArray[np.float32]:
        return source[first : first + count]

    found = datasets.measure_scale(read, 5, Preparation(8, 1, False, "dark"), no_progress)
    assert found.mean == pytest.approx(source.mean())
    assert found.deviation == pytest.approx(source.std(), rel=1e-5)
    # White noise has an eighth of its variance in an eighth of its components.
    halved = datasets.measure_scale(read, 5, Preparation(8, 2, False, "dark"), no_progress)
    assert halved.mean == pytest.approx(found.mean)
    assert halved.deviation**2 == pytest.approx(20**2 * 0.24 + 9 / 8, rel=0.05)


@pytest.mark.parametrize(("value", "words"), [(3.0, "deviation of all boxes is 0"), (np.nan, "is nan")])
def test_a_set_without_a_scale_is_refused(value: float, words: str) -> None:
    source = np.full((3, 8, 8, 8), value, np.float32)
    with pytest.raises(InvalidArgument, match=words):
        datasets.measure_scale(lambda i, n: source[i : i + n], 3, Preparation(8, 1, False, "dark"), no_progress)


def numbered(count: int) -> NDArray[np.float32]:
    return np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (count, 4, 4, 4)).copy()


def numbers(batch: Batch) -> list[int]:
    return [int(number) for number in batch["boxes"][:, 0, 0, 0, 0]]


def batches_of(
    count: int, seed: int, change: Callable[[Batch, torch.Generator], Batch] | None = None
) -> datasets.ArrayBatches:
    arrays: dict[str, NDArray[Any]] = {
        "boxes": numbered(count),
        "labels": np.arange(count, dtype=np.uint8),
        "weights": np.arange(count, dtype=np.float32),
    }
    rows = datasets.split_rows(count, 0.2, seed)
    return datasets.ArrayBatches(arrays, *rows, batch_size=4, seed=seed, device=CPU, change=change)


def test_batches_hold_each_training_box_once_and_depend_on_seed_and_epoch() -> None:
    def seen(batches: datasets.ArrayBatches, epoch: int, first: int = 0) -> list[list[int]]:
        return [numbers(batch) for batch in batches.training(epoch, first)]

    batches = batches_of(23, 1)
    held_back = [number for batch in batches.validation() for number in numbers(batch)]
    assert len(held_back) == 5
    first, second = seen(batches, 0), seen(batches, 1)
    assert len(first) == batches.training_batches == 5
    assert sorted(itertools.chain(*first)) == sorted(set(range(23)) - set(held_back))
    assert first != second
    assert seen(batches_of(23, 1), 1, 2) == second[2:]
    assert seen(batches_of(23, 2), 0) != first


def test_what_belongs_to_the_boxes_comes_with_them() -> None:
    for batch in batches_of(23, 0).training(0, 0):
        assert batch["boxes"].shape[1:] == (1, 4, 4, 4)
        assert batch["labels"].dtype == torch.int64
        assert batch["labels"].tolist() == numbers(batch)
        assert batch["weights"].dtype == torch.float32
        assert batch["weights"].tolist() == numbers(batch)


@pytest.mark.parametrize("other", [9, 23, 60])
def test_what_is_unpaired_has_an_order_of_its_own_and_the_smaller_set_repeats(other: int) -> None:
    rows, other_rows = datasets.split_rows(23, 0.2, 1), datasets.split_rows(other, 0.2, 1)
    arrays: dict[str, NDArray[Any]] = {"boxes": numbered(23), "others": np.arange(other)}
    batches = datasets.ArrayBatches(arrays, *rows, batch_size=4, seed=1, device=CPU, unpaired={"others": other_rows})

    def seen(part: Iterable[Batch]) -> tuple[list[list[int]], list[list[int]]]:
        found = list(part)
        return [numbers(batch) for batch in found], [batch["others"].tolist() for batch in found]

    own, others = seen(batches.training(0, 0))
    longest = max(len(rows[0]), len(other_rows[0]))
    assert len(own) == batches.training_batches == -(-longest // 4)
    for parts, all_rows in ((own, rows[0]), (others, other_rows[0])):
        counts = np.bincount(list(itertools.chain(*parts)), minlength=60)[all_rows]
        assert counts.sum() == longest
        assert np.ptp(counts) <= 1, "each as often as the others"
    if other == 23:
        assert own != others
    assert seen(batches.training(0, 2)) == (own[2:], others[2:])
    assert seen(batches.training(1, 0))[1] != others
    held_back = seen(batches.validation())[1]
    assert set(itertools.chain(*held_back)) == set(other_rows[1].tolist())


def test_pictures_get_a_channel_too() -> None:
    rows = datasets.split_rows(5, 0.2, 0)
    pictures = datasets.ArrayBatches({"boxes": boxes()[:, 0]}, *rows, batch_size=4, seed=0, device=CPU)
    assert next(pictures.training(0, 0))["boxes"].shape == (4, 1, 8, 8)


def test_training_batches_are_changed_as_seed_epoch_and_batch_say_and_validation_ones_are_not() -> None:
    def change(batch: Batch, generator: torch.Generator) -> Batch:
        return {"boxes": batch["boxes"] + torch.rand(1, generator=generator)}

    def added(epoch: int, first: int, seed: int = 0) -> list[float]:
        batches = batches_of(23, seed, change)
        return [float(batch["boxes"].flatten()[0] % 1) for batch in batches.training(epoch, first)]

    once = added(0, 0)
    assert len(set(once)) == 5
    assert added(0, 2) == once[2:], "a resumed epoch draws the same"
    assert added(1, 0) != once
    assert added(0, 0, seed=1) != once
    assert all("labels" in batch for batch in batches_of(23, 0, change).validation())


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_each_side_of_the_split_has_a_box(fraction: float) -> None:
    training_rows, validation_rows = datasets.split_rows(2, fraction, 0)
    assert len(training_rows) == len(validation_rows) == 1
    with pytest.raises(InvalidArgument, match="at least 2"):
        datasets.split_rows(1, fraction, 0)


def test_a_split_by_classes_holds_back_the_same_share_of_each() -> None:
    classes = np.repeat([0, 1, 2, -1], [40, 20, 10, 1])
    training_rows, validation_rows = datasets.split_rows(71, 0.2, 3, classes)
    assert sorted([*training_rows, *validation_rows]) == list(range(71))
    assert np.bincount(classes[validation_rows] + 1, minlength=4).tolist() == [0, 8, 4, 2]
    plain = datasets.split_rows(71, 0.2, 3)[1]
    assert validation_rows.tolist() != plain.tolist()
    with pytest.raises(InvalidArgument, match="no class has 2"):
        datasets.split_rows(3, 0.2, 0, np.arange(3))


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
