"""Adversarial domain adaptation: a classifier of one kind of images, the source, made fit for another, the target,
whose classes are not known.

The three stages of AITom: the classifier is trained on the source; a domain discriminator is confused between the
features of the source and of the target (this module); the target is classified by the adapted network.

Before the second, the source is filtered so that its mean power spectrum is the target's (`match_spectra`; after Yang &
Soatto 2020, FDA: Fourier domain adaptation for semantic segmentation, CVPR). Most of what tells two imaging conditions
apart is a filter: the contrast transfer's amplitudes, the wedge, the spectrum of the noise. What a filter does need not
be learnt against. It is the source that is filtered, so the adapted network takes boxes of the target as they are.

The second is by gradient reversal (Ganin & Lempitsky 2015, Unsupervised domain adaptation by backpropagation, ICML): a
small network learns to tell the domain of a box by its features, and its gradient reaches the classifier with its sign
turned and a weight, which grows from 0 over the run as theirs does. The source's cross-entropy is kept beside it, so
that features of which nothing tells the domain still tell the class.

    discriminator: dense 128, ReLU, dense 128, ReLU, dense 1

Features are scaled to unit length first: what would confuse it most easily otherwise is features that shrink to zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor, nn

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.learning import classifiers
from services.learning.classifiers import Classifier
from services.learning.datasets import chunk_count
from services.learning.preparation import standardise
from services.learning.training import Batch

NAME = "domain-adversarial"
VERSION = 1

HIDDEN = 128
STEEPNESS = 10.0
"""Of the growth of the adversarial weight, as Ganin & Lempitsky have it."""

LARGEST_GAIN = 2.0
"""Of the filter: where the source recorded nothing, noise is all that could be amplified."""


class DomainAdversarial(nn.Module):
    """A classifier with a discriminator of domains. `steps` counts the batches trained on."""

    steps: Tensor

    def __init__(self, classifier: Classifier, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.classifier = classifier
        hidden = nn.Linear(classifier.feature_size, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        output = nn.Linear(HIDDEN, 1)
        self.discriminator = nn.Sequential(hidden[0], nn.ReLU(), hidden[1], nn.ReLU(), output)
        classifiers.initialise(self.discriminator, generator, output)
        # Part of the state, so that a resumed run has the weight of an undisturbed one.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, boxes: Tensor, weight: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Logits (batch, classes), and the logits (batch,) that a box is of the target, whose gradient is turned and
        has this weight where it reaches the features.
        """
        logits, features = self.classifier(boxes, generator)[:2]
        turned: Tensor = _ReverseGradient.apply(features.float(), weight)  # type: ignore[no-untyped-call]
        # Of length sqrt(d), so that each number is about 1 as the first weights expect.
        scaled = functional.normalize(turned, dim=1) * math.sqrt(features.shape[1])
        return logits, self.discriminator(scaled)[:, 0]


class DomainAdversarialLoss:
    """loss = cross-entropy of the classes, its mean over the source's labelled boxes
           + cross-entropy of the domains, half its mean over the source and half that over the target

    A batch's "domains" (b,) are 0 for the source and 1 for the target, whose "labels" are not used; -1 in the source is
    unlabelled. `source_share` and `labelled_share` are the shares of the source's boxes and of its labelled ones in the
    whole set: each mean is taken as a sum over a batch's boxes of that kind over its size times their share, so that
    batches sum to the set's loss however its kinds fall among them. `adversarial_weight` is reached over so many
    `steps`: times 2 / (1 + exp(-10 p)) - 1 at a share p of them. Raises InvalidArgument for impossible shares.
    """

    NAME = "domain-adversarial"

    def __init__(self, adversarial_weight: float, steps: int, source_share: float, labelled_share: float) -> None:
        if not 0 < labelled_share <= source_share < 1:
            raise InvalidArgument(
                f"source_share {source_share:g} and labelled_share {labelled_share:g} must lie between 0 and 1, the "
                "second at most the first"
            )
        self.adversarial_weight = adversarial_weight
        self.steps = steps
        self.source_share = source_share
        self.labelled_share = labelled_share

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Means over the batch: `loss`; its terms `classification` and `discrimination`; `accuracy` of the source's
        classes; and `domains_told`, the share of boxes whose domain the discriminator tells, each domain a half: 0.5 is
        guessing.
        """
        assert isinstance(model, DomainAdversarial)
        weight = 0.0
        if model.training:
            weight = self.adversarial_weight * ramp(int(model.steps) / self.steps)
            model.steps += 1
        logits, domain_logits = model(batch["boxes"], weight, generator)
        target = batch["domains"] == 1
        # Whatever the target's labels are, they are not looked at.
        labels = batch["labels"].masked_fill(target, classifiers.UNLABELLED)
        entropies = functional.cross_entropy(
            logits.float(), labels, ignore_index=classifiers.UNLABELLED, reduction="sum"
        )
        labelled = self.labelled_share * len(labels)
        found = ((logits.detach().argmax(dim=1) == labels) & (labels >= 0)).to(torch.float32)
        surprise = functional.binary_cross_entropy_with_logits(
            domain_logits.float(), target.to(torch.float32), reduction="none"
        )
        halves = torch.where(target, 0.5 / (1 - self.source_share), 0.5 / self.source_share)
        told = ((domain_logits.detach() > 0) == target).to(torch.float32)
        classification, discrimination = entropies / labelled, (halves * surprise).mean()
        return {
            "loss": classification + discrimination,
            "classification": classification,
            "discrimination": discrimination,
            "accuracy": found.sum() / labelled,
            "domains_told": (halves * told).mean(),
        }


def match_spectra(boxes: NDArray[np.float32], source: int) -> None:
    """Filter the first `source` of prepared boxes (n, z, y, x), in place, so that their mean power spectrum is that of
    the others; each has mean 0 and standard deviation 1 again.

    The gain of each frequency is the root of the ratio of the two, at most `LARGEST_GAIN`. It is no function of the
    radius alone: what the target's wedge lacks the source loses. Phases stay: a sign that the contrast transfer turned
    is learnt against, or corrected before. Both sets should hold much the same structures, as their spectra do.
    """
    own, others = mean_power(boxes[:source]), mean_power(boxes[source:])
    gain = np.sqrt(others / np.maximum(own, others / LARGEST_GAIN**2 + np.finfo(np.float32).tiny)).astype(np.float32)
    step = chunk_count(boxes.shape[1])
    for first in range(0, source, step):
        chunk = boxes[first : min(first + step, source)]
        filtered = np.fft.irfftn(np.fft.rfftn(chunk, axes=(1, 2, 3)) * gain, s=chunk.shape[1:], axes=(1, 2, 3))
        chunk[:] = standardise(filtered.astype(np.float32))


def mean_power(boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """The mean over boxes of the squared amplitudes of their half spectra (z, y, x // 2 + 1)."""
    total = np.zeros((*boxes.shape[1:3], boxes.shape[3] // 2 + 1))
    step = chunk_count(boxes.shape[1])
    for first in range(0, len(boxes), step):
        total += np.square(np.abs(np.fft.rfftn(boxes[first : first + step], axes=(1, 2, 3)))).sum(axis=0)
    return total / len(boxes)


def ramp(progress: float) -> float:
    """0 to 1 over the share of a run that is done."""
    return 2 / (1 + math.exp(-STEEPNESS * progress)) - 1


class _ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is turned and weighted."""

    @staticmethod
    def forward(context: Any, features: Tensor, weight: float) -> Tensor:
        context.weight = weight
        return features.view_as(features)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -context.weight * gradients[0], None


def config(classifier: Mapping[str, Any]) -> dict[str, Any]:
    """What names the network in a job, by the classifier's config."""
    return {"architecture": NAME, "architecture_version": VERSION, "classifier": dict(classifier)}


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> DomainAdversarial:
    """The network of a job; FailedPrecondition where the config is of another, or its classifier is none."""
    # Networks are known by name there, this one among them.
    from services.learning import architectures

    classifier = settings.get("classifier")
    if settings.get("architecture") != NAME or not isinstance(classifier, Mapping):
        raise FailedPrecondition(f"the network is {settings.get('architecture')!r}, {NAME!r} is needed")
    network = architectures.build(classifier, generator)
    if not isinstance(network, Classifier):
        raise FailedPrecondition(f"the model's architecture is {classifier.get('architecture')!r}, no classifier")
    return DomainAdversarial(network, generator)
