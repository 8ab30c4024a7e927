"""The training loop of all networks: Adam, validation after every epoch, early stopping, and checkpoints to resume
from.

The loop knows no network and no data. It is handed a function that builds the network, an objective that turns a batch
into a loss, and batches; and it calls `progress` after every batch, which is how it is watched and stopped. Where
several processes train one network, each takes its part of every batch, and the `Peers` bring the parts together: all
of them then hold the same weights and the same figures.

Nothing random has a state of its own: first weights, split, order and whatever an objective draws are functions of the
seed and of the attempt, epoch and batch. So a checkpoint is tensors and numbers, and a resumed run takes exactly the
steps of an undisturbed one: on a CPU with the same number of threads its weights agree bit for bit.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import Progress

Batch = Mapping[str, Tensor]
"""Tensors by name, whose first dimension is the batch: "boxes" (b, 1, n, n, n) or, of 2D networks, (b, 1, y, x); and
what belongs to them row by row, as "labels" (b,) or "targets" (b, n, n, n), both int64."""

Checkpoint = dict[str, bytes]

TENSORS_FILE = "state.safetensors"
STATE_FILE = "state.json"

SETTLING_BATCHES = 16
"""Batches that the statistics of batch normalisation are taken from after an epoch."""


class Batches(Protocol):
    """Where batches come from."""

    @property
    def training_batches(self) -> int:
        """Batches in an epoch."""
        ...

    def training(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        """The batches of an epoch from `first_batch` on, always the same ones in the same order."""
        ...

    def validation(self) -> Iterator[Batch]:
        """The batches that are held back from training."""
        ...


class Objective(Protocol):
    """What is minimised."""

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars, each a mean over the batch: `loss`, which is minimised, and whatever else is worth a curve.

        `model.training` tells training from validation. Random numbers come from the generator (on the CPU) alone.
        """
        ...


@runtime_checkable
class MayCollapse(Protocol):
    """An objective that can tell when a network will learn no more."""

    def collapsed(self, training: Mapping[str, float], validation: Mapping[str, float]) -> bool:
        """Whether it must start again, by the means of an epoch."""
        ...


class Peers(Protocol):
    """The processes that train one network together."""

    @property
    def rank(self) -> int:
        """The number of this one, from 0."""
        ...

    def adapted(self, model: nn.Module) -> nn.Module:
        """The network as it is to be trained by several."""
        ...

    def part(self, batch: Batch) -> tuple[Batch, float]:
        """This process's part of a batch, and the boxes that it counts for: together, those of the batch."""
        ...

    def average(self, tensors: Sequence[Tensor], boxes: float) -> None:
        """Replace tensors, each a mean over this process's boxes, by those over the boxes of all."""
        ...


class Alone:
    """One process, which takes whole batches."""

    rank = 0

    def adapted(self, model: nn.Module) -> nn.Module:
        """As it is."""
        return model

    def part(self, batch: Batch) -> tuple[Batch, float]:
        """All of it."""
        return batch, float(boxes_of(batch))

    def average(self, tensors: Sequence[Tensor], boxes: float) -> None:
        """Nothing: they are over all boxes already."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. `betas` and `weight_decay` are those of Adam, the decay added to the gradient, or of AdamW with
    `decoupled_weight_decay`; the learning rate falls linearly to nothing from the share `decay_from` of `max_epochs`
    on; `mixed_precision` computes in bfloat16 on a GPU, with weights in float32, and changes nothing on a CPU; with
    `keep_last` the last epoch's weights count, whatever its validation loss, or with `averaging` their running mean, of
    which each step keeps that share; a collapsed model is started again at most `max_restarts` times.
    """

    max_epochs: int
    patience_epochs: int
    learning_rate: float
    seed: int
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    decay_from: float = 1.0
    mixed_precision: bool = False
    keep_last: bool = False
    averaging: float = 0.0
    max_restarts: int = 3
    checkpoint_seconds: float = 20.0
    report_seconds: float = 0.2


@dataclass(frozen=True)
class Epoch:
    """One line of a training's history; epochs are counted from 1 within an attempt, losses are means over the
    boxes.
    """

    attempt: int
    epoch: int
    training: dict[str, float]
    validation: dict[str, float]


@dataclass(frozen=True)
class Training:
    """A finished training: `model` has the weights of the best validation loss, `epochs` counts the attempt that gave
    them.
    """

    model: nn.Module
    history: list[Epoch]
    epochs: int
    best_epoch: int
    best_validation_loss: float
    restarts: int
    stopped_early: bool


@dataclass
class _State:
    """Where a training stands, besides its tensors. `position` counts the batches done of `epoch`, `sums` their
    losses.
    """

    attempt: int = 0
    epoch: int = 1
    position: int = 0
    boxes: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best_epoch: int = 0
    best_loss: float = math.inf
    history: list[Epoch] = field(default_factory=list)

    def to_json(self) -> bytes:
        document = asdict(self) | {"best_loss": None if math.isinf(self.best_loss) else self.best_loss}
        return json.dumps(document, allow_nan=False).encode()

    @staticmethod
    def from_json(data: bytes) -> _State:
        document = json.loads(data)
        document["best_loss"] = math.inf if document["best_loss"] is None else document["best_loss"]
        document["history"] = [Epoch(**line) for line in document["history"]]
        return _State(**document)


def never(training: Mapping[str, float], validation: Mapping[str, float]) -> bool:
    """For networks that can't collapse."""
    return False


def train(
    build: Callable[[torch.Generator], nn.Module],
    objective: Objective,
    batches: Batches,
    options: TrainingOptions,
    *,
    device: torch.device,
    progress: Progress,
    save_checkpoint: Callable[[Checkpoint], None],
    checkpoint: Mapping[str, bytes] | None = None,
    collapsed: Callable[[Mapping[str, float], Mapping[str, float]], bool] = never,
    peers: Peers | None = None,
) -> Training:
    """Train until the validation loss has not improved for `patience_epochs`, or for `max_epochs`.

    A checkpoint is saved after every epoch and at least every `checkpoint_seconds` within one; handed back as
    `checkpoint`, it resumes the run. `collapsed` looks at the means of an epoch, of training and of validation: where
    it says so, the network starts again from the next weights of the same seed; what was learnt before is dropped, but
    stays in the history. Of several `peers`, each is handed the same batches and the same checkpoint; `progress` and
    `save_checkpoint` are called in each.

    Raises FailedPrecondition where every attempt collapses, or where the loss stops being a number.
    """
    run = _Run(build, objective, batches, options, device, progress, save_checkpoint, collapsed, peers or Alone())
    if checkpoint is not None:
        run.restore(checkpoint)
    return run.finish()


def use_deterministic_algorithms(threads: int) -> None:
    """Let torch compute on so many cores, the same way each time; an operation that can't be repeated exactly
    raises.
    """
    torch.set_num_threads(max(1, threads))
    torch.use_deterministic_algorithms(True)
    # Otherwise torch fills each new tensor before it is written: only code that reads uninitialised memory has use for
    # that.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def generator_for(*numbers: int) -> torch.Generator:
    """A generator on the CPU whose state is a function of the numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)


def boxes_of(batch: Batch) -> int:
    """How many boxes a batch has."""
    return len(next(iter(batch.values())))


class _Run:
    """One training, step by step."""

    def __init__(
        self,
        build: Callable[[torch.Generator], nn.Module],
        objective: Objective,
        batches: Batches,
        options: TrainingOptions,
        device: torch.device,
        progress: Progress,
        save_checkpoint: Callable[[Checkpoint], None],
        collapsed: Callable[[Mapping[str, float], Mapping[str, float]], bool],
        peers: Peers,
    ) -> None:
        self.build = build
        self.objective = objective
        self.batches = batches
        self.options = options
        self.device = device
        self.progress = progress
        self.save_checkpoint = save_checkpoint
        self.collapsed = collapsed
        self.peers = peers
        self.state = _State()
        self.fraction = 0.0
        self.saved_at = time.monotonic()
        self.start_attempt()

    def start_attempt(self) -> None:
        """First weights, a fresh optimiser."""
        generator = generator_for(self.options.seed, 2, self.state.attempt)
        self.model = self.peers.adapted(self.build(generator).to(self.device))
        self.best = self.weights()
        self.optimiser = torch.optim.Adam(
            self.model.parameters(),
            lr=self.options.learning_rate,
            betas=self.options.betas,
            weight_decay=self.options.weight_decay,
            decoupled_weight_decay=self.options.decoupled_weight_decay,
            fused=True,
        )

    def finish(self) -> Training:
        options, state = self.options, self.state
        while not self.is_over():
            training = self.train_epoch()
            validation = self.validate()
            state.history.append(Epoch(state.attempt, state.epoch, training, validation))
            if self.collapsed(training, validation):
                self.restart()
            else:
                if validation["loss"] < state.best_loss or self.options.keep_last:
                    state.best_loss, state.best_epoch = validation["loss"], state.epoch
                    if not options.averaging:
                        self.best = self.weights()
                state.epoch += 1
            state.position, state.boxes, state.sums = 0, 0, {}
            self.save()
        self.model.load_state_dict(self.best)
        epochs = state.epoch - 1
        return Training(
            model=self.model,
            history=state.history,
            epochs=epochs,
            best_epoch=state.best_epoch,
            best_validation_loss=state.best_loss,
            restarts=state.attempt,
            stopped_early=epochs < options.max_epochs,
        )

    def is_over(self) -> bool:
        """Early stopping: as many epochs without a better validation loss as patience allows, or no epoch left."""
        done = self.state.epoch - 1
        return done >= self.options.max_epochs or done - self.state.best_epoch >= self.options.patience_epochs

    def train_epoch(self) -> dict[str, float]:
        """The batches of the epoch that are left; means over all its boxes."""
        state = self.state
        self.model.train()
        # Sums stay on the device until they are reported: reading them after each batch would make a GPU wait.
        sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in state.sums.items()
        }
        reported_at = -math.inf
        loss: float | None = None
        for batch in self.batches.training(state.epoch - 1, state.position):
            part, boxes = self.peers.part(batch)
            values = self.values(part, 3, state.attempt, state.epoch, state.position)
            self.optimiser.zero_grad(set_to_none=True)
            values["loss"].backward()  # type: ignore[no-untyped-call]
            means = {name: value.detach().to(torch.float32) for name, value in values.items()}
            gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
            self.peers.average([*gradients, *means.values()], boxes)
            self.set_learning_rate()
            self.optimiser.step()
            self.average_weights()
            _add(sums, means, boxes_of(batch))
            state.boxes += boxes_of(batch)
            state.position += 1
            now = time.monotonic()
            if now - reported_at >= self.options.report_seconds:
                loss = self.checked(float(sums["loss"]) / state.boxes)
                reported_at = now
            self.report(loss)
            if now - self.saved_at >= self.options.checkpoint_seconds:
                state.sums = {name: float(value) for name, value in sums.items()}
                self.save()
        self.checked(float(sums["loss"]))
        self.settle_statistics()
        # Running statistics, which each peer gathers of its own parts.
        self.peers.average([value for value in self.statistics().values() if value.is_floating_point()], 1.0)
        return {name: float(value) / state.boxes for name, value in sums.items()}

    def set_learning_rate(self) -> None:
        """A function of how much of the run is done, so that a resumed one has that of an undisturbed one."""
        options, state = self.options, self.state
        if options.decay_from >= 1:
            return
        done = (state.epoch - 1 + state.position / self.batches.training_batches) / options.max_epochs
        share = min(1.0, (1 - done) / (1 - options.decay_from))
        for group in self.optimiser.param_groups:
            group["lr"] = options.learning_rate * share

    def average_weights(self) -> None:
        """Move the running mean of the weights a step on: fast at first, or the first weights would stay in it."""
        if not self.options.averaging:
            return
        done = (self.state.epoch - 1) * self.batches.training_batches + self.state.position
        kept = min(self.options.averaging, (1 + done) / (10 + done))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.best[name].lerp_(value, 1 - kept)
                else:
                    self.best[name].copy_(value)

    def settle_statistics(self) -> None:
        """What batch normalisation goes by in use, by the weights as they are now.

        Running means lag some ten steps behind, and Adam moves the mean of a wide layer by about its standard deviation
        in each of the first steps: a network of eight such layers that was right in 0.70 of the cases by the statistics
        of the weights it had was so in 0.20 by the running ones. Nothing else of the network is changed.
        """
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        if not norms:
            return
        own = {id(buffer) for norm in norms for buffer in norm.buffers()}
        others = [(buffer, buffer.clone()) for buffer in self.model.buffers() if id(buffer) not in own]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            # The plain mean over the batches.
            norm.momentum = None
        state = self.state
        with torch.no_grad():
            batches = itertools.islice(self.batches.training(state.epoch - 1, 0), SETTLING_BATCHES)
            for position, batch in enumerate(batches):
                self.values(self.peers.part(batch)[0], 6, state.attempt, state.epoch, position)
                self.report()
            for buffer, value in others:
                buffer.copy_(value)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def validate(self) -> dict[str, float]:
        """Means over the validation boxes."""
        self.model.eval()
        sums: dict[str, Tensor] = {}
        boxes = 0
        with torch.no_grad():
            for position, batch in enumerate(self.batches.validation()):
                part, counted = self.peers.part(batch)
                values = self.values(part, 4, position)
                means = {name: value.to(torch.float32) for name, value in values.items()}
                self.peers.average(list(means.values()), counted)
                _add(sums, means, boxes_of(batch))
                boxes += boxes_of(batch)
                self.progress(self.fraction, f"validating epoch {self.state.epoch}")
        self.checked(float(sums["loss"]))
        return {name: float(value) / boxes for name, value in sums.items()}

    def values(self, batch: Batch, *numbers: int) -> dict[str, Tensor]:
        """The objective's, with random numbers that follow from the numbers, and differ from peer to peer."""
        others = (self.peers.rank,) if self.peers.rank else ()
        generator = generator_for(self.options.seed, *numbers, *others)
        mixed = self.options.mixed_precision and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            return self.objective(self.model, batch, generator)

    def restart(self) -> None:
        """Begin again from other first weights."""
        state = self.state
        if state.attempt == self.options.max_restarts:
            raise FailedPrecondition(
                f"the network collapsed from {state.attempt + 1} different first weights, with the same output for all "
                "subtomograms: a lower learning_rate or l1_penalty may help"
            )
        state.attempt += 1
        state.epoch, state.best_epoch, state.best_loss = 1, 0, math.inf
        self.start_attempt()

    def report(self, loss: float | None = None) -> None:
        state = self.state
        done = state.epoch - 1 + state.position / self.batches.training_batches
        self.fraction = max(self.fraction, min(1.0, done / self.options.max_epochs))
        counters = {"epoch": float(state.epoch)}
        if loss is not None:
            counters["loss"] = loss
        if state.best_epoch:
            counters |= {"best_epoch": float(state.best_epoch), "best_validation_loss": state.best_loss}
        self.progress(self.fraction, f"training epoch {state.epoch}", **counters)

    def checked(self, loss: float) -> float:
        """FailedPrecondition for a loss that overflowed."""
        if not math.isfinite(loss):
            raise FailedPrecondition(
                f"the loss is no longer a number in epoch {self.state.epoch}: a lower learning_rate is needed"
            )
        return loss

    def statistics(self) -> dict[str, Tensor]:
        """What the network keeps besides its parameters."""
        parameters = dict(self.model.named_parameters())
        return {name: value for name, value in self.model.state_dict().items() if name not in parameters}

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def save(self) -> None:
        """Everything that `restore` needs."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{index}/{name}": value for name, value in values.items()}
        # Copies: safetensors takes neither other memory layouts nor tensors that share memory.
        copies = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
        }
        self.save_checkpoint({TENSORS_FILE: safetensors.torch.save(copies), STATE_FILE: self.state.to_json()})
        self.saved_at = time.monotonic()

    def restore(self, checkpoint: Mapping[str, bytes]) -> None:
        """Stand where the checkpoint was saved; InvalidArgument where it is of another network."""
        self.state = _State.from_json(checkpoint[STATE_FILE])
        self.start_attempt()
        optimiser_state: dict[int, dict[str, Tensor]] = {}
        weights: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}}
        for name, value in safetensors.torch.load(checkpoint[TENSORS_FILE]).items():
            part, rest = name.split("/", 1)
            if part == "optimiser":
                number, key = rest.split("/", 1)
                optimiser_state.setdefault(int(number), {})[key] = value
            else:
                weights[part][rest] = value
        try:
            self.model.load_state_dict(weights["model"])
        except RuntimeError as error:
            raise InvalidArgument(f"the checkpoint is of another network: {str(error).splitlines()[0]}") from error
        self.best = {name: value.to(self.device) for name, value in weights["best"].items()}
        # Each in the memory layout of its parameter: the fused optimiser walks through memory, not through indices.
        for index, parameter in enumerate(self.model.parameters()):
            for name, value in optimiser_state.get(index, {}).items():
                if value.shape == parameter.shape:
                    optimiser_state[index][name] = torch.empty_like(parameter.detach()).copy_(value)
        fresh: dict[str, Any] = self.optimiser.state_dict()
        self.optimiser.load_state_dict({"state": optimiser_state, "param_groups": fresh["param_groups"]})
        self.report()


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor], boxes: int) -> None:
    """Add the batch's means, times its boxes, in float64."""
    for name, value in values.items():
        weighted = value.detach().to(torch.float64) * boxes
        sums[name] = sums[name] + weighted if name in sums else weighted
