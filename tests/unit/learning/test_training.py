"""The training loop: what it learns, when it stops, and that a resumed run is the undisturbed one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cryofleet.errors import Cancelled, FailedPrecondition, InvalidArgument
from cryofleet.progress import no_progress
from services.learning.autoencoder import Autoencoder3D, AutoencoderLoss
from services.learning.datasets import ArrayBatches, split_rows
from services.learning.preparation import standardise
from services.learning.training import Batch, Training, TrainingOptions, train, use_deterministic_algorithms
from tests.unit.learning.shapes import two_kinds

CPU = torch.device("cpu")
LOSS = AutoencoderLoss(1e-4)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    use_deterministic_algorithms(1)
    yield
    torch.use_deterministic_algorithms(False)


def batches(count: int = 20, seed: int = 0) -> ArrayBatches:
    boxes = standardise(two_kinds(count, 8, 1)[0])
    return ArrayBatches({"boxes": boxes}, *split_rows(count, 0.2, seed), batch_size=6, seed=seed, device=CPU)


def options(**changes: Any) -> TrainingOptions:
    values: dict[str, Any] = {"max_epochs": 4, "patience_epochs": 20, "learning_rate": 1e-3, "seed": 0}
    return TrainingOptions(**(values | changes))


def train_autoencoder(**arguments: Any) -> Training:
    values: dict[str, Any] = {
        "options": options(),
        "batches": batches(),
        "device": CPU,
        "progress": no_progress,
        "save_checkpoint": lambda files: None,
        "collapsed": LOSS.collapsed,
    }
    return train(lambda generator: Autoencoder3D(8, generator), LOSS, **(values | arguments))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_learns_a_tiny_set() -> None:
    result = train_autoencoder(options=options(max_epochs=20, learning_rate=3e-3))
    first, last = result.history[0], result.history[-1]
    # Boxes are standardised, so a network that knows nothing has a loss of 1. A ball or a shell explains about half.
    assert first.training["reconstruction"] == pytest.approx(1.0, abs=0.05)
    assert last.training["reconstruction"] < 0.7
    assert result.best_validation_loss == min(line.validation["loss"] for line in result.history)
    assert [line.epoch for line in result.history] == list(range(1, 21))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, second = train_autoencoder(), train_autoencoder()
    assert same_weights(first.model, second.model)
    assert first.history == second.history
    assert not same_weights(first.model, train_autoencoder(options=options(seed=1)).model)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("batches_before_the_kill", "how"),
    [(1, {}), (4, {}), (6, {}), (11, {}), (6, {"decay_from": 0.3}), (7, {"keep_last": True, "averaging": 0.9})],
)
def test_a_killed_run_resumes_bit_for_bit(batches_before_the_kill: int, how: dict[str, Any]) -> None:
    undisturbed = train_autoencoder(options=options(**how))
    saved: list[dict[str, bytes]] = []
    calls = itertools.count(1)

    def die(fraction: float, phase: str = "", **counters: float) -> None:
        if phase.startswith("training") and next(calls) > batches_before_the_kill:
            raise Killed

    # Saved after each batch here, so that most checkpoints lie within an epoch (3 batches).
    with pytest.raises(Killed):
        train_autoencoder(options=options(checkpoint_seconds=0.0, **how), progress=die, save_checkpoint=saved.append)
    assert len(saved) >= batches_before_the_kill
    assert {name.rsplit(".")[-1] for name in saved[-1]} == {"safetensors", "json"}
    resumed = train_autoencoder(checkpoint=saved[-1], options=options(**how))
    assert same_weights(resumed.model, undisturbed.model)
    assert resumed.history == undisturbed.history
    # Tables are written in the order of the figures, too.
    assert [list(line.training) for line in resumed.history] == [list(line.training) for line in undisturbed.history]
    assert resumed.best_epoch == undisturbed.best_epoch


def test_a_finished_run_resumes_to_its_result() -> None:
    saved: list[dict[str, bytes]] = []
    whole = train_autoencoder(save_checkpoint=saved.append)
    assert len(saved) == 4, "one checkpoint an epoch"
    steps = []
    again = train_autoencoder(checkpoint=saved[-1], progress=lambda *_, **counters: steps.append(counters))
    assert same_weights(again.model, whole.model)
    assert len(steps) == 1, "nothing was left to do"


def test_a_checkpoint_of_another_network_is_refused() -> None:
    saved: list[dict[str, bytes]] = []
    train_autoencoder(save_checkpoint=saved.append, options=options(max_epochs=1))
    with pytest.raises(InvalidArgument, match="another network"):
        train(
            lambda generator: Autoencoder3D(12, generator),
            AutoencoderLoss(0),
            batches(),
            options(),
            device=CPU,
            progress=no_progress,
            save_checkpoint=lambda files: None,
            checkpoint=saved[-1],
        )


def test_progress_is_called_for_each_batch_rises_and_stops_the_run() -> None:
    reports: list[tuple[float, str, dict[str, float]]] = []
    train_autoencoder(progress=lambda fraction, phase="", **counters: reports.append((fraction, phase, counters)))
    training = [report for report in reports if report[1].startswith("training")]
    assert len(training) == 4 * 3
    assert all({"epoch", "loss"} <= counters.keys() for _, _, counters in training)
    fractions = [fraction for fraction, _, _ in reports]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0

    def cancel(fraction: float, phase: str = "", **counters: float) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        train_autoencoder(progress=cancel)


# --- Early stopping and collapse, on a network of one number whose validation loss is prescribed -------------------


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class Scripted:
    """Batches and objective at once: the n-th validation gives the n-th loss; training counts the weight up."""

    training_batches = 1

    def __init__(self, losses: list[float], active: list[float] | None = None) -> None:
        self.losses = iter(losses)
        self.active = iter(active or [1.0] * len(losses))
        self.alive = 1.0

    def training(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        return iter([{"boxes": torch.ones(1)}][first_batch:])

    def validation(self) -> Iterator[Batch]:
        return iter([{"boxes": torch.ones(1)}])

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        if model.training:
            self.alive = next(self.active)
            return {"loss": -model.get_parameter("weight").sum(), "active": torch.tensor(self.alive)}
        return {"loss": torch.tensor(next(self.losses)), "active": torch.tensor(self.alive)}


def run_script(script: Scripted, **changes: Any) -> Training:
    return train(
        lambda generator: One(),
        script,
        script,
        options(learning_rate=1.0, **changes),
        device=CPU,
        progress=no_progress,
        save_checkpoint=lambda files: None,
        collapsed=LOSS.collapsed,
    )


def weight(result: Training) -> float:
    return float(result.model.get_parameter("weight").detach())


def test_training_stops_when_patience_ends_and_keeps_the_best() -> None:
    result = run_script(Scripted([5, 3, 4, 3, 3.5, 2]), max_epochs=50, patience_epochs=3)
    assert (result.epochs, result.best_epoch, result.best_validation_loss) == (5, 2, 3.0)
    assert result.stopped_early
    # Adam's first steps of a constant gradient are the learning rate each: the weight counts epochs.
    assert weight(result) == pytest.approx(2.0, rel=1e-3)


def test_training_ends_with_its_last_epoch() -> None:
    result = run_script(Scripted([5, 4, 3]), max_epochs=3, patience_epochs=2)
    assert (result.epochs, result.best_epoch, result.stopped_early) == (3, 3, False)
    assert weight(result) == pytest.approx(3.0, rel=1e-3)


def test_a_collapsed_network_starts_again() -> None:
    result = run_script(Scripted([1, 1, 7, 6], [0.5, 0.0, 0.5, 0.5]), max_epochs=2)
    assert result.restarts == 1
    assert [(line.attempt, line.epoch) for line in result.history] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert (result.best_epoch, result.best_validation_loss) == (2, 6.0)
    assert weight(result) == pytest.approx(2.0, rel=1e-3)


def test_collapse_from_all_first_weights_is_an_error() -> None:
    with pytest.raises(FailedPrecondition, match="collapsed from 3 different"):
        run_script(Scripted([1.0] * 9, [0.0] * 9), max_restarts=2)


def test_dead_codes_of_the_real_network_are_noticed_and_another_start_tried() -> None:
    attempts: list[nn.Module] = []

    def build(generator: torch.Generator) -> nn.Module:
        model = Autoencoder3D(8, generator)
        if not attempts:
            nn.init.constant_(model.to_code.bias, -1e3)
        attempts.append(model)
        return model

    result = train(
        build,
        AutoencoderLoss(1e-4),
        batches(),
        options(max_epochs=2),
        device=CPU,
        progress=no_progress,
        save_checkpoint=lambda files: None,
        collapsed=LOSS.collapsed,
    )
    assert len(attempts) == 2
    assert result.restarts == 1
    assert result.history[-1].validation["active"] > 0


def test_a_loss_that_overflows_is_an_error() -> None:
    with pytest.raises(FailedPrecondition, match="learning_rate"):
        run_script(Scripted([1.0, math.nan]), max_epochs=3)


def test_collapse_needs_both_training_and_validation_to_be_dead() -> None:
    cases: list[tuple[Mapping[str, float], Mapping[str, float], bool]] = [
        ({"active": 0.0}, {"active": 0.0}, True),
        ({"active": 0.01}, {"active": 0.0}, False),
        ({"active": 0.0}, {"active": 0.01}, False),
    ]
    for training, validation, expected in cases:
        assert LOSS.collapsed(training, validation) is expected


def test_mixed_precision_changes_nothing_on_a_cpu() -> None:
    plain, mixed = train_autoencoder(), train_autoencoder(options=options(mixed_precision=True))
    assert same_weights(plain.model, mixed.model)
    assert plain.history == mixed.history
    assert all(value.dtype == torch.float32 for value in mixed.model.state_dict().values())


def test_the_learning_rate_falls_to_nothing() -> None:
    """Adam's steps are the learning rate where the gradient is always the same: of eight, five are whole."""
    kept = run_script(Scripted([1.0] * 8), max_epochs=8, keep_last=True)
    falling = run_script(Scripted([1.0] * 8), max_epochs=8, keep_last=True, decay_from=0.5)
    assert weight(kept) == pytest.approx(8.0, rel=1e-5)
    assert weight(falling) == pytest.approx(5 + 3 / 4 + 2 / 4 + 1 / 4, rel=1e-5)


def test_the_running_mean_of_the_weights_counts() -> None:
    averaged = run_script(Scripted([1.0] * 8), max_epochs=8, keep_last=True, averaging=0.5)
    # The weight is 1, 2, ... after each step, and of the mean's first steps less is kept.
    expected = 0.0
    for step in range(8):
        kept = min(0.5, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * (step + 1)
    assert weight(averaged) == pytest.approx(expected, rel=1e-5)


def test_weight_decay_is_adams() -> None:
    """A weight whose loss is flat moves by the decay alone: Adam's first step is the learning rate, against its
    sign.
    """

    class Flat(Scripted):
        def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            return {"loss": 0.0 * model.get_parameter("weight").sum() + 1.0, "active": torch.tensor(1.0)}

    def build(generator: torch.Generator) -> nn.Module:
        model = One()
        nn.init.constant_(model.weight, 5.0)
        return model

    weights = []
    for decay in (0.0, 1e-3):
        script = Flat([])
        result = train(
            build,
            script,
            script,
            options(max_epochs=1, learning_rate=0.5, weight_decay=decay),
            device=CPU,
            progress=no_progress,
            save_checkpoint=lambda files: None,
        )
        weights.append(weight(result))
    assert weights == pytest.approx([5.0, 4.5], rel=1e-5)


class Normalised(nn.Module):
    """Batch normalisation of a multiple of the boxes, and a count of its uses in training."""

    uses: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm3d(1)
        self.register_buffer("uses", torch.zeros((), dtype=torch.int64))

    def forward(self, boxes: Tensor) -> Tensor:
        normalised: Tensor = self.norm(self.weight * boxes)
        return normalised


class Rising:
    """Batches and objective at once: each of three batches moves the weight up."""

    training_batches = 3
    boxes = torch.arange(24.0).view(3, 2, 1, 2, 2, 1)

    def training(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        return iter([{"boxes": each} for each in self.boxes[first_batch:]])

    def validation(self) -> Iterator[Batch]:
        return iter([{"boxes": self.boxes[0]}])

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, Normalised)
        if model.training:
            model.uses += 1
        return {"loss": 0 * model(batch["boxes"]).sum() - model.weight.sum()}


def test_batch_normalisation_in_use_is_by_the_weights_as_they_are() -> None:
    """Not by what they were while the running statistics were gathered."""
    rising = Rising()
    result = train(
        lambda generator: Normalised(),
        rising,
        rising,
        options(learning_rate=1.0, max_epochs=2),
        device=CPU,
        progress=no_progress,
        save_checkpoint=lambda files: None,
    )
    model = result.model
    assert isinstance(model, Normalised)
    weight = float(model.weight.detach())
    assert weight == pytest.approx(6.0, rel=1e-3)
    assert model.norm.running_mean is not None
    assert float(model.norm.running_mean) == pytest.approx(weight * float(rising.boxes.mean()), rel=1e-6)
    assert model.norm.running_var is not None
    within = torch.stack([each.var() for each in rising.boxes]).mean()
    assert float(model.norm.running_var) == pytest.approx(weight**2 * float(within), rel=1e-6)
    # Six steps; that the statistics were taken once more changed nothing else.
    assert int(model.uses) == 6
    assert model.norm.momentum == 0.1
