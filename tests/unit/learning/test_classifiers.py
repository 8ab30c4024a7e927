"""The classification networks: their layers, what dropout draws, what they learn, and that a resumed run is the
undisturbed one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cryofleet.errors import Cancelled, FailedPrecondition, InvalidArgument
from cryofleet.progress import no_progress
from services.learning import (
    architectures,
    autoencoding_classifier,
    cb3d,
    class_prediction,
    classifiers,
    dsrf3d,
    jobs,
    model_files,
    open_set,
    rb3d,
)
from services.learning.augmentation import Augmentation
from services.learning.preparation import standardise
from services.learning.training import Training, TrainingOptions, generator_for, use_deterministic_algorithms
from tests.unit.learning.shapes import two_kinds

CPU = torch.device("cpu")
SIDE = 8
NETWORKS = (dsrf3d, rb3d, cb3d, autoencoding_classifier, open_set)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    use_deterministic_algorithms(1)
    yield
    torch.use_deterministic_algorithms(False)


def network(module: ModuleType, side: int = SIDE, classes: int = 2, seed: int = 0) -> classifiers.Classifier:
    config = module.config(side, range(classes), [f"class {i}" for i in range(classes)])
    built = architectures.build(config, generator_for(seed))
    assert isinstance(built, classifiers.Classifier)
    return built


def objective(module: ModuleType) -> dict[str, Any]:
    if module is autoencoding_classifier:
        return {"name": autoencoding_classifier.AutoencodingLoss.NAME, "reconstruction_weight": 1.0}
    return {"name": open_set.OpenSetLoss.NAME if module is open_set else classifiers.ClassificationLoss.NAME}


def train(module: ModuleType, count: int = 20, **arguments: Any) -> Training:
    boxes, kinds = two_kinds(count, SIDE, 1)
    options: dict[str, Any] = {
        "max_epochs": 2,
        "patience_epochs": 20,
        "learning_rate": 1e-3,
        "seed": 0,
        "weight_decay": 1e-4,
    }
    job = jobs.Job(
        network=module.config(SIDE, [0, 1], ["ball", "shell"]),
        objective=objective(module),
        options=TrainingOptions(**(options | arguments.pop("options", {}))),
        batch_size=8,
        validation_fraction=0.25,
        augmentation=Augmentation("cube", 0.1, 0.1),
        stratify="labels",
    )
    values: dict[str, Any] = {"device": CPU, "progress": no_progress, "save_checkpoint": lambda files: None}
    return jobs.run_job(job, {"boxes": standardise(boxes), "labels": kinds}, **(values | arguments))


def weighted_layers(model: nn.Module, boxes: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Of each convolution and dense layer in the order they are used: the shapes of its weight, input and output."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((module, inputs[0], output))

    for module in model.modules():
        if isinstance(module, nn.Conv3d | nn.Linear):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(boxes)
    layers = []
    for module, before, after in seen:
        assert isinstance(module, nn.Conv3d | nn.Linear)
        layers.append((tuple(module.weight.shape), tuple(before.shape[1:]), tuple(after.shape[1:])))
    return layers


def convolution(inputs: int, outputs: int, side: int, kernel: int = 3) -> tuple[tuple[int, ...], ...]:
    return (outputs, inputs, *(kernel,) * 3), (inputs, *(side,) * 3), (outputs, *(side,) * 3)


def dense(inputs: int, outputs: int) -> tuple[tuple[int, ...], ...]:
    return (outputs, inputs), (inputs,), (outputs,)


def block(inputs: int, outputs: int, side: int) -> list[tuple[tuple[int, ...], ...]]:
    narrow = outputs // 4
    return [
        convolution(inputs, narrow, side, 1),
        convolution(narrow, narrow, side),
        convolution(narrow, outputs, side, 1),
        convolution(inputs, outputs, side),
    ]


# The first convolution is a matrix product of its own on a CPU (`single_channel`), which no hook sees.
LAYERS = {
    dsrf3d: [
        convolution(32, 32, 32),
        convolution(32, 64, 16),
        convolution(64, 64, 16),
        dense(64 * 8**3, 512),
        dense(512, 512),
        dense(512, 10),
    ],
    rb3d: [*block(32, 64, 16), *block(64, 64, 16), *block(64, 128, 8), *block(128, 128, 8), dense(128, 10)],
    cb3d: [
        convolution(32, 64, 16),
        convolution(64, 128, 8),
        convolution(128, 128, 8),
        convolution(128, 128, 4),
        convolution(128, 128, 4),
        convolution(128, 128, 2),
        convolution(128, 128, 2),
        dense(128, 512),
        dense(512, 512),
        dense(512, 10),
    ],
    autoencoding_classifier: [
        convolution(32, 64, 16),
        convolution(64, 128, 8),
        dense(128 * 4**3, 128),
        dense(128, 10),
    ],
    # The output is a product with weights of unit length.
    open_set: [
        convolution(32, 64, 16),
        convolution(64, 128, 8),
        dense(128 * 4**3, 128),
        dense(128, 64),
    ],
}

FIRST = 27 * 32 + 32


def weights(layers: list[Any], biases: bool) -> int:
    return sum(math.prod(weight) + (weight[0] if biases else 0) for weight, _, _ in layers)


# Batch normalisation has a scale and a shift of each channel; the convolutions before it in RB3D have no bias.
PARAMETERS = {
    dsrf3d: FIRST + weights(LAYERS[dsrf3d], True) + 2 * (32 + 32 + 64 + 64),
    rb3d: FIRST + weights(LAYERS[rb3d], False) + 10 + 2 * (2 * (16 + 16 + 64 + 64) + 2 * (32 + 32 + 128 + 128)),
    cb3d: FIRST + weights(LAYERS[cb3d], True) + 2 * (32 + 64 + 6 * 128),
    autoencoding_classifier: FIRST
    + weights(LAYERS[autoencoding_classifier], True)
    + 2 * (32 + 64 + 128)
    + (128 * 32 * 8**3 + 32 * 8**3)
    + 2 * (27 * 32 * 32 + 32)
    + (27 * 32 + 1),
    open_set: FIRST + weights(LAYERS[open_set], True) + 2 * (32 + 64 + 128) + 64 * 10,
}


@pytest.mark.parametrize("module", NETWORKS, ids=lambda module: module.NAME)
def test_layers_and_parameters(module: ModuleType) -> None:
    model = network(module, 32, 10).eval()
    if isinstance(model, open_set.OpenSetClassifier):
        # Each view goes through the same layers.
        model.views = model.views[:1]
    layers = weighted_layers(model, torch.zeros(1, 1, 32, 32, 32))
    for weight, before, after in layers:
        print(f"{module.NAME:10} weight {weight} input {before} output {after}")
    print(f"{module.NAME:10} {classifiers.parameter_count(model)} parameters")
    assert layers == LAYERS[module]
    assert classifiers.parameter_count(model) == PARAMETERS[module]


def test_poolings_keep_what_is_left_over() -> None:
    assert [cb3d.pooled_size(side) for side in (4, 16, 32, 36, 64)] == [1, 1, 1, 2, 2]
    values = torch.arange(27.0).view(1, 1, 3, 3, 3)
    assert classifiers.pool(values).flatten().tolist() == [13, 14, 16, 17, 22, 23, 25, 26]
    single = torch.ones(1, 2, 1, 1, 1)
    assert classifiers.pool(single) is single


@pytest.mark.parametrize("module", NETWORKS, ids=lambda module: module.NAME)
def test_any_multiple_of_4_is_taken_and_no_other(module: ModuleType) -> None:
    for side in (4, 12):
        logits, features = network(module, side, 3).eval()(torch.randn(2, 1, side, side, side))[:2]
        assert logits.shape == (2, 3)
        assert features.shape == (2, network(module, side, 3).feature_size)
    with pytest.raises(FailedPrecondition, match="box_size is 10"):
        network(module, 10)
    with pytest.raises(InvalidArgument, match="multiple of 4 voxels, after binning: it is 10"):
        dsrf3d.DSRF3D(10, 2)
    with pytest.raises(InvalidArgument, match="at least 2 classes"):
        dsrf3d.DSRF3D(SIDE, 1)


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_dropout_leaves_out_a_share_and_keeps_the_mean(share: float) -> None:
    model = network(cb3d)
    ones = torch.ones(64, 512)
    dropped = model.train().dropout(ones, share, generator_for(1))
    # Of 32768 draws, five standard deviations.
    tolerance = 5 * math.sqrt(share * (1 - share) / ones.numel())
    assert float((dropped == 0).float().mean()) == pytest.approx(share, abs=tolerance)
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0.0, 1 / (1 - share)])
    assert torch.equal(dropped, model.dropout(ones, share, generator_for(1)))
    assert not torch.equal(dropped, model.dropout(ones, share, generator_for(2)))
    assert model.eval().dropout(ones, share, None) is ones


@pytest.mark.parametrize("module", [dsrf3d, rb3d, cb3d, autoencoding_classifier], ids=lambda module: module.NAME)
def test_all_classes_are_equally_probable_at_first(module: ModuleType) -> None:
    boxes = torch.randn(3, 1, SIDE, SIDE, SIDE, generator=generator_for(3))
    values = architectures.objective(objective(module))(
        network(module, classes=5), {"boxes": boxes, "labels": torch.tensor([0, 3, 4])}, generator_for(0)
    )
    value = values.get("classification", values["loss"])
    assert float(value.detach()) == pytest.approx(math.log(5), rel=1e-5)


@pytest.mark.parametrize("module", NETWORKS, ids=lambda module: module.NAME)
def test_it_learns_balls_and_shells(module: ModuleType) -> None:
    trained = train(module, count=40, options={"max_epochs": 6, "learning_rate": 2e-3})
    boxes, kinds = two_kinds(20, SIDE, 7)
    assert isinstance(trained.model, classifiers.Classifier)
    logits, _ = class_prediction.outputs(trained.model, [(0, standardise(boxes))], 20, CPU, no_progress)
    assert (logits.argmax(axis=1) == kinds).mean() >= 0.95


class Killed(BaseException):
    pass


# Dropout, batch normalisation, and a decoder beside them.
@pytest.mark.parametrize("module", [dsrf3d, rb3d, autoencoding_classifier], ids=lambda module: module.NAME)
def test_a_killed_run_resumes_bit_for_bit(module: ModuleType) -> None:
    undisturbed = train(module)
    saved: dict[str, bytes] = {}
    reports = 0

    def kill(fraction: float, phase: str = "", **counters: float) -> None:
        nonlocal reports
        reports += phase.startswith("training")
        if reports == 3:
            raise Cancelled("killed")

    with pytest.raises(Cancelled):
        train(module, progress=kill, save_checkpoint=saved.update, options={"checkpoint_seconds": 0.0})
    resumed = train(module, checkpoint=saved)
    assert resumed.history == undisturbed.history
    pairs = zip(resumed.model.state_dict().values(), undisturbed.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_model_is_read_back_and_a_damaged_config_is_not() -> None:
    model = network(rb3d, classes=3).eval()
    files = model_files.write_model(model, rb3d.config(SIDE, [4, 7, 9], ["a", "b", "c"]))
    config = model_files.read_config(files[model_files.CONFIG_FILE])
    again = model_files.read_model(config, files[model_files.WEIGHTS_FILE], architectures.build)
    boxes = torch.randn(2, 1, SIDE, SIDE, SIDE)
    assert torch.equal(again(boxes)[0], model(boxes)[0])
    for change, message in (
        ({"architecture_version": 99}, "version 1 is needed"),
        ({"box_size": 10}, "box_size is 10"),
        ({"class_names": ["a"]}, "its classes are"),
        ({"class_ids": [1, 2, True]}, "its classes are"),
        ({"class_ids": None}, "its classes are"),
    ):
        with pytest.raises(FailedPrecondition, match=message):
            architectures.build(config | change)
    with pytest.raises(FailedPrecondition, match="'cb3d' is needed"):
        cb3d.from_config(config)


def test_few_labels_weigh_as_much_as_many() -> None:
    """However the labelled boxes fall among batches, the batches' losses sum to the set's."""
    model = network(autoencoding_classifier).eval()
    nn.init.normal_(model.output.weight, generator=generator_for(5))
    boxes = torch.randn(8, 1, SIDE, SIDE, SIDE, generator=generator_for(4))
    labels = torch.tensor([1, -1, 0, -1, -1, -1, -1, -1])
    loss = autoencoding_classifier.AutoencodingLoss(0.5, labelled_share=0.25)
    with torch.no_grad():
        logits, codes = model(boxes)
        expected = torch.nn.functional.cross_entropy(logits[[0, 2]], labels[[0, 2]])
        assert isinstance(model, autoencoding_classifier.AutoencodingClassifier)
        reconstruction = ((model.decode(codes) - boxes) ** 2).mean()
        halves = [
            loss(model, {"boxes": boxes[part], "labels": labels[part]}, generator_for(0))
            for part in (slice(0, 4), slice(4, 8))
        ]
    assert float(halves[1]["classification"]) == 0.0
    assert float(sum(half["classification"] for half in halves)) / 2 == pytest.approx(float(expected), rel=1e-5)
    total = float(sum(half["loss"] for half in halves)) / 2
    assert total == pytest.approx(float(expected + 0.5 * reconstruction), rel=1e-5)
    with pytest.raises(InvalidArgument, match="labelled_share"):
        autoencoding_classifier.AutoencodingLoss(1.0, 0.0)


def test_unlabelled_boxes_are_reconstructed() -> None:
    """Labels of a few and boxes of all: what is not labelled lowers the reconstruction's error alone."""
    boxes, kinds = two_kinds(32, SIDE, 1)
    labels = np.where(np.arange(32) < 8, kinds, -1)
    job = jobs.Job(
        network=autoencoding_classifier.config(SIDE, [0, 1], ["ball", "shell"]),
        objective={
            "name": autoencoding_classifier.AutoencodingLoss.NAME,
            "reconstruction_weight": 1.0,
            "labelled_share": 0.25,
        },
        options=TrainingOptions(max_epochs=8, patience_epochs=8, learning_rate=2e-3, seed=0),
        batch_size=8,
        validation_fraction=0.25,
        stratify="labels",
    )
    arrays = {"boxes": standardise(boxes), "labels": labels}
    trained = jobs.run_job(job, arrays, device=CPU, progress=no_progress, save_checkpoint=lambda files: None)
    first, last = trained.history[0].validation, trained.history[-1].validation
    # A network that knows nothing has an error of 1; a ball or a shell explains about half.
    assert last["reconstruction"] < 0.8 < first["reconstruction"]
    assert last["accuracy"] == pytest.approx(1.0)


def test_labelled_boxes_are_half_of_what_an_epoch_shows() -> None:
    """Each of 4 labelled boxes of 64 is shown 15 times, and the loss knows."""
    repeats = autoencoding_classifier.labelled_repeats(4 / 64)
    assert repeats == 15
    assert [autoencoding_classifier.labelled_repeats(share) for share in (1.0, 0.5, 0.4)] == [1, 1, 2]
    loss = autoencoding_classifier.AutoencodingLoss(1.0, labelled_share=4 / 64, labelled_repeats=repeats)
    assert loss.shown_share == pytest.approx(0.5)
    assert autoencoding_classifier.AutoencodingLoss(1.0, labelled_share=0.3).shown_share == pytest.approx(0.3)


def test_only_what_is_sure_becomes_a_pseudo_label() -> None:
    """Two views of three boxes: sure in both, sure in one of them, and sure of different classes."""
    sure, unsure = math.log(0.9 / 0.1), 0.0
    first = torch.tensor([[sure, 0.0], [sure, 0.0], [sure, 0.0]], requires_grad=True)
    second = torch.tensor([[2 * sure, 0.0], [unsure, 0.0], [-sure, 0.0]], requires_grad=True)
    # The mean of 0.9 and 81/82 is above the limit; those of 0.9 and 0.5, and of 0.9 and 0.1, are not.
    surprise = autoencoding_classifier.pseudo_label_surprise(first, second)
    assert float(surprise.detach()) == pytest.approx(-(math.log(0.9) + math.log(81 / 82)) / 2, rel=1e-5)
    surprise.backward()  # type: ignore[no-untyped-call]
    for view in (first, second):
        assert view.grad is not None
        assert (view.grad[1:] == 0).all()
        # The likelier class grows more so.
        assert float(view.grad[0, 0]) < 0


def test_a_second_view_teaches_while_training_alone() -> None:
    boxes = torch.randn(6, 1, SIDE, SIDE, SIDE, generator=generator_for(4))
    batch = {"boxes": boxes, "labels": torch.tensor([1, -1, 0, -1, -1, -1])}
    model = network(autoencoding_classifier)
    loss = autoencoding_classifier.AutoencodingLoss(0.0, labelled_share=1 / 3, consistency_weight=2.0)
    assert "consistency" not in loss(model.eval(), batch, generator_for(0))
    # All classes are equally probable: nothing is sure.
    assert float(loss(model.train(), batch, generator_for(0))["consistency"].detach()) == 0.0
    model.output.bias.data = torch.tensor([3.0, 0.0])
    values = loss(model, batch, generator_for(0))
    # Each of the four is of the first class with probability 1 / (1 + exp(-3)).
    assert float(values["consistency"].detach()) == pytest.approx(math.log1p(math.exp(-3)), rel=1e-5)
    expected = values["classification"] + 2 * values["consistency"]
    assert float(values["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    # A part of a batch may have no unlabelled box, and the term is there all the same.
    labelled = {name: value[:1] for name, value in batch.items()}
    assert float(loss(model, labelled, generator_for(0))["consistency"].detach()) == 0.0


def test_a_last_batch_of_one_box_is_trained_on() -> None:
    """Its voxels may all have been pooled into one, of which there is no variance."""
    for module in (cb3d, rb3d, autoencoding_classifier, dsrf3d):
        model = network(module, 4).train()
        logits, _ = model(torch.randn(1, 1, 4, 4, 4, generator=generator_for(2)), generator_for(3))
        assert torch.isfinite(logits).all()
