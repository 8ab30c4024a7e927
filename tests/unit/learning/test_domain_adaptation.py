"""Adversarial adaptation: spectra that are matched, gradients that are turned, labels of the target that are never
used, and a run that resumes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cryofleet.errors import Cancelled, FailedPrecondition, InvalidArgument
from cryofleet.progress import no_progress
from services.learning import architectures, autoencoder, domain_adaptation, dsrf3d, jobs
from services.learning.domain_adaptation import DomainAdversarial, DomainAdversarialLoss
from services.learning.preparation import standardise
from services.learning.training import Training, TrainingOptions, generator_for, use_deterministic_algorithms
from tests.unit.learning.shapes import two_kinds

CPU = torch.device("cpu")
SIDE = 8
PARTS = (slice(0, 4), slice(4, 7))
CLASSIFIER = dsrf3d.config(SIDE, [0, 1], ["ball", "shell"])


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    use_deterministic_algorithms(1)
    yield
    torch.use_deterministic_algorithms(False)


def domains(count: int, seed: int) -> dict[str, NDArray[Any]]:
    """Source and target: balls and shells, of the target in blurred boxes of more noise."""
    source, kinds = two_kinds(count, SIDE, seed)
    sharp = two_kinds(count, SIDE, seed + 1)[0]
    target = sharp + np.roll(sharp, 1, axis=1) + np.random.default_rng(seed).normal(0, 0.4, sharp.shape)
    return {
        "boxes": standardise(np.concatenate([source, target]).astype(np.float32)),
        "labels": np.concatenate([kinds, np.full(count, -1)]),
        "domains": np.repeat([0, 1], count),
    }


def adapt(arrays: dict[str, NDArray[Any]], epochs: int = 2, **arguments: Any) -> Training:
    job = jobs.Job(
        network=domain_adaptation.config(CLASSIFIER),
        objective={
            "name": DomainAdversarialLoss.NAME,
            "adversarial_weight": 1.0,
            "steps": 10,
            "source_share": 0.5,
            "labelled_share": 0.5,
        },
        options=TrainingOptions(
            max_epochs=epochs, patience_epochs=epochs, learning_rate=1e-3, seed=0, keep_last=True,
            checkpoint_seconds=0.0,
        ),
        batch_size=8,
        validation_fraction=0.2,
        stratify="labels",
    )  # fmt: skip
    values: dict[str, Any] = {"device": CPU, "progress": no_progress, "save_checkpoint": lambda files: None}
    return jobs.run_job(job, arrays, **(values | arguments))


def batch_of(arrays: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.from_numpy(values) for name, values in arrays.items()}
    return batch | {"boxes": batch["boxes"][:, None]}


def network() -> DomainAdversarial:
    built = architectures.build(domain_adaptation.config(CLASSIFIER), generator_for(0))
    assert isinstance(built, DomainAdversarial)
    for layer in (built.discriminator[-1], built.classifier.output):
        assert isinstance(layer, torch.nn.Linear)
        torch.nn.init.normal_(layer.weight, std=0.1, generator=generator_for(1))
    return built.eval()


def gradients(weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the domains' cross-entropy, in the features' last layer and in the discriminator's."""
    model = network()
    batch = batch_of(domains(4, 0))
    _, logits = model(batch["boxes"], weight, generator_for(0))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["domains"].float())
    loss.backward()  # type: ignore[no-untyped-call]
    features, own = model.classifier.dense_2.weight.grad, model.discriminator[0].weight.grad  # type: ignore[union-attr]
    assert isinstance(features, torch.Tensor)
    assert isinstance(own, torch.Tensor)
    return features, own


def test_the_source_gets_the_spectrum_of_the_target() -> None:
    """What tells the two apart is a filter along z; the source is left as the target's own would be."""
    white = np.random.default_rng(0).standard_normal((600, SIDE, SIDE, SIDE)).astype(np.float32)
    smooth = standardise(white + np.roll(white, 1, axis=1))
    boxes = np.concatenate([white[:300], smooth[300:]])
    target = boxes[300:].copy()
    domain_adaptation.match_spectra(boxes, 300)
    assert np.array_equal(boxes[300:], target), "the target stays as it is"
    power = domain_adaptation.mean_power
    assert power(boxes[:300]).ravel()[1:] == pytest.approx(power(target).ravel()[1:], rel=0.05, abs=5)
    found = np.fft.rfftn(boxes[:300], axes=(1, 2, 3)) / np.fft.rfftn(white[:300], axes=(1, 2, 3))
    assert np.abs(np.angle(found[np.abs(found) > 0.1])).max() < 1e-3, "no phase is changed"
    assert boxes.mean(axis=(1, 2, 3)) == pytest.approx(np.zeros(600), abs=1e-5)
    assert boxes.std(axis=(1, 2, 3)) == pytest.approx(np.ones(600), abs=1e-4)


def test_what_the_source_never_recorded_is_not_amplified_beyond_a_limit() -> None:
    white = np.random.default_rng(0).standard_normal((40, SIDE, SIDE, SIDE)).astype(np.float32)
    narrow = np.fft.rfftn(white[:20], axes=(1, 2, 3))
    narrow[:, 2:-1] *= 1e-3
    band = np.fft.irfftn(narrow, s=(SIDE,) * 3, axes=(1, 2, 3)).astype(np.float32)
    boxes = np.concatenate([standardise(band), white[20:]])
    before = boxes[:20].copy()
    domain_adaptation.match_spectra(boxes, 20)
    ratio = np.abs(np.fft.rfftn(boxes[:20], axes=(1, 2, 3))) / np.abs(np.fft.rfftn(before, axes=(1, 2, 3)))
    assert float(ratio[:, 2:-1].max() / ratio[:, :2].max()) < 20
    # A frequency that neither has: nothing is divided by nothing.
    boxes = np.zeros((4, SIDE, SIDE, SIDE), np.float32)
    boxes[:, 0, 0, 0] = 1
    boxes = standardise(boxes - boxes.mean(axis=0))
    domain_adaptation.match_spectra(boxes, 2)
    assert np.isfinite(boxes).all()


def test_the_gradient_is_turned_where_it_reaches_the_features() -> None:
    plain, own = gradients(-1.0)
    turned, same = gradients(0.5)
    assert float(plain.abs().max()) > 0
    assert torch.allclose(turned, -0.5 * plain, rtol=1e-4, atol=1e-9)
    assert torch.equal(own, same)


def test_the_weight_grows_from_nothing() -> None:
    assert domain_adaptation.ramp(0) == 0
    assert domain_adaptation.ramp(0.5) == pytest.approx(math.tanh(2.5))
    assert domain_adaptation.ramp(1) == pytest.approx(math.tanh(5))


def test_each_domain_counts_a_half_and_labels_of_the_target_count_nothing() -> None:
    model = network()
    arrays = domains(4, 0)
    three = {name: values[:7] for name, values in arrays.items()}
    loss = DomainAdversarialLoss(1.0, 10, source_share=4 / 7, labelled_share=4 / 7)
    with torch.no_grad():
        values = loss(model, batch_of(three), generator_for(0))
        logits, told = model(batch_of(three)["boxes"], 0.0, generator_for(0))
        expected = torch.nn.functional.cross_entropy(logits[:4], torch.from_numpy(three["labels"][:4]))
        surprise = torch.nn.functional.softplus(torch.cat([told[:4], -told[4:]]))
        otherwise = three | {"labels": np.where(three["domains"] == 1, 1, three["labels"])}
        known = loss(model, batch_of(otherwise), generator_for(0))
    assert float(values["classification"]) == pytest.approx(float(expected), rel=1e-5)
    halves = 0.5 * (surprise[:4].mean() + surprise[4:].mean())
    assert float(values["discrimination"]) == pytest.approx(float(halves), rel=1e-5)
    assert float(values["loss"]) == pytest.approx(float(expected + halves), rel=1e-5)
    assert float(known["loss"]) == float(values["loss"])
    # However the domains fall among batches, these sum to the set's loss.
    with torch.no_grad():
        parts = [loss(model, batch_of({k: v[rows] for k, v in three.items()}), generator_for(0)) for rows in PARTS]
    sums = sum(size * float(part["loss"]) for size, part in zip((4, 3), parts, strict=True))
    assert sums / 7 == pytest.approx(float(values["loss"]), rel=1e-5)
    assert int(model.steps) == 0, "validation is no step"
    with pytest.raises(InvalidArgument, match="labelled_share"):
        DomainAdversarialLoss(1.0, 10, 0.4, 0.5)


def test_the_last_epoch_is_kept_and_a_killed_run_resumes_bit_for_bit() -> None:
    arrays = domains(12, 0)
    first = {f"classifier.{k}": v for k, v in architectures.build(CLASSIFIER, generator_for(9)).state_dict().items()}
    undisturbed = adapt(arrays, epochs=3, first_weights=first)
    assert undisturbed.best_epoch == 3
    assert isinstance(undisturbed.model, DomainAdversarial)
    assert int(undisturbed.model.steps) == 3 * math.ceil(20 / 8)
    saved: dict[str, bytes] = {}
    reports = 0

    def kill(fraction: float, phase: str = "", **counters: float) -> None:
        nonlocal reports
        reports += phase.startswith("training")
        if reports == 5:
            raise Cancelled("killed")

    with pytest.raises(Cancelled):
        adapt(arrays, epochs=3, first_weights=first, progress=kill, save_checkpoint=saved.update)
    resumed = adapt(arrays, epochs=3, first_weights=first, checkpoint=saved)
    pairs = zip(resumed.model.state_dict().values(), undisturbed.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_only_classifiers_are_adapted() -> None:
    foreign = autoencoder.config(SIDE) | {
        "binning": 1, "pose_normalisation": False, "subtomogram_box_size": SIDE,
        "subtomogram_voxel_size_angstrom": 10.0,
    }  # fmt: skip
    with pytest.raises(FailedPrecondition, match="no classifier"):
        architectures.build(domain_adaptation.config(foreign))
