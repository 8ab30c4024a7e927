"""The section annotator: what it sees, what it is trained on, and whether it finds what a threshold can't."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import no_progress
from services.learning import annotator, architectures, datasets, painted, section_annotation, tomogram_scale, training
from tests.unit.learning.painted_tomogram import GLOBULE, dice, painted_patches, tomogram

CPU = torch.device("cpu")
MARGIN = annotator.MARGIN


def network(seed: int = 0) -> annotator.SectionAnnotator:
    model = annotator.SectionAnnotator(training.generator_for(seed))
    # Statistics that a training would have left, so that no layer is the identity.
    random = training.generator_for(seed, 1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=random)
            module.running_var.uniform_(0.5, 1.5, generator=random)
    return model.eval()


def test_a_voxel_depends_on_nothing_beyond_the_margin() -> None:
    model = network()
    section = torch.randn(1, 1, 4 + 2 * MARGIN, 4 + 2 * MARGIN, generator=training.generator_for(2))
    section.requires_grad_()
    for y in range(4):  # what it sees repeats with its pooling
        for x in range(4):
            (gradient,) = torch.autograd.grad(model(section)[0, y, x], section)
            rows, columns = gradient[0, 0].abs().amax(1).nonzero(), gradient[0, 0].abs().amax(0).nonzero()
            for seen, place in ((rows, y), (columns, x)):
                assert seen.min() >= place
                assert seen.max() <= place + 2 * MARGIN
                assert seen.max() - seen.min() >= 30, "it sees more than a ribosome"


def test_tiles_and_the_whole_section_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    section = np.random.default_rng(0).standard_normal((75, 50)).astype(np.float32)
    whole = section_annotation.probabilities(model, section, CPU)
    assert whole.shape == section.shape
    assert whole.std() > 0.01
    monkeypatch.setattr(section_annotation, "TILE", 32)
    np.testing.assert_allclose(section_annotation.probabilities(model, section, CPU), whole, atol=1e-5)


def test_the_strongest_feature_counts() -> None:
    class Constant(torch.nn.Module):
        def __init__(self, logits: float) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, sections: torch.Tensor) -> torch.Tensor:
            inner = sections[:, 0, MARGIN:-MARGIN, MARGIN:-MARGIN]
            return torch.where(inner > 0, self.logits, -self.logits)

    volume = np.where(np.arange(9) % 3 == 0, 1, -1).astype(np.float32)[None, None, :] * np.ones((2, 5, 1), np.float32)
    scale = tomogram_scale.Scale(0.0, 1.0)

    def annotated(*logits: float, threshold: float) -> Any:
        slabs = list(
            section_annotation.annotate(
                [Constant(each) for each in logits], lambda a, b: volume[a:b], (2, 5, 9), scale, threshold, CPU
            )
        )
        return np.concatenate([slab.labels for slab in slabs]), np.concatenate([slab.scores for slab in slabs])

    labels, scores = annotated(1.0, 2.0, -0.5, threshold=0.5)
    assert (labels[volume > 0] == 2).all(), "of two that claim a voxel, the more probable"
    assert (labels[volume < 0] == 3).all()
    np.testing.assert_allclose(scores[volume > 0], 1 / (1 + np.exp(-2)), rtol=1e-5)
    np.testing.assert_allclose(scores[volume < 0], 1 / (1 + np.exp(-0.5)), rtol=1e-5)
    labels, _ = annotated(1.0, 2.0, -0.5, threshold=0.7)
    assert (labels[volume < 0] == 0).all(), "below the threshold is nothing"
    labels, _ = annotated(1.0, 1.0, threshold=0.5)
    assert (labels[volume > 0] == 1).all(), "of equals, the first"


def test_only_voxels_that_were_looked_at_count() -> None:
    model = annotator.SectionAnnotator(training.generator_for(0)).eval()
    random = training.generator_for(1)
    patches = torch.randn(3, 1, 16 + 2 * MARGIN, 16 + 2 * MARGIN, generator=random)
    marks = torch.randint(0, 3, (3, 16, 16), generator=random)
    values = annotator.AnnotatorLoss(augment=True)(model, {"boxes": patches, "painted": marks}, random)
    logits = model(patches).detach().numpy().astype(np.float64)
    probabilities = 1 / (1 + np.exp(-logits))
    expected = -np.concatenate([np.log(probabilities[marks == 1]), np.log(1 - probabilities[marks == 2])]).mean()
    assert float(values["loss"].detach()) == pytest.approx(expected, rel=1e-5), "validation is not augmented"
    none = annotator.AnnotatorLoss(augment=False)(model, {"boxes": patches, "painted": marks * 0}, random)
    assert float(none["loss"].detach()) == 0


def test_augmentation_turns_patch_and_mask_alike() -> None:
    random = np.random.default_rng(0)
    marks = random.integers(0, 3, (64, 8, 8))
    patches = 100 * np.pad(marks, ((0, 0), (MARGIN,) * 2, (MARGIN,) * 2)).astype(np.float32)[:, None]
    turned, mask = annotator.augmented(torch.from_numpy(patches), torch.from_numpy(marks), training.generator_for(3))
    inner = turned[:, 0, MARGIN:-MARGIN, MARGIN:-MARGIN].numpy()
    kinds = set()
    for before, after, shown in zip(marks, mask.numpy(), inner, strict=True):
        # Contrast and noise are far smaller than the steps of 100.
        assert np.corrcoef(shown.ravel(), after.ravel())[0, 1] > 0.99
        ways = [np.rot90(side, k) for side in (before, before[:, ::-1]) for k in range(4)]
        kinds.add(next(i for i, way in enumerate(ways) if np.array_equal(way, after)))
    assert kinds == set(range(8)), "all ways of turning and mirroring a square"


def test_it_finds_what_a_threshold_does_not() -> None:
    volume, kinds = tomogram((32, 128, 128), 0, noise=0.5)
    places = [(z, y, x) for z, y in ((11, 0), (16, 32), (20, 64)) for x in (0, 32, 64, 96)]
    masks = painted_patches(kinds, GLOBULE, places, 32)
    scale = tomogram_scale.measure_scale(lambda a, b: volume[a:b], volume.shape, "dark", "tomogram")
    patches = painted.place_patches(masks, 32, 0)
    assert len(patches) == 12
    rows, held_back = painted.split_patches(patches, 32, 0.2, 0)
    arrays = painted.cut_patches(lambda a, b: volume[a:b], masks, patches, 32, scale, no_progress)
    training.use_deterministic_algorithms(1)
    trained = training.train(
        annotator.SectionAnnotator,
        annotator.AnnotatorLoss(augment=True),
        datasets.ArrayBatches(
            arrays, np.tile(painted.balanced(rows, patches), 2), held_back, batch_size=4, seed=0, device=CPU
        ),
        training.TrainingOptions(max_epochs=12, patience_epochs=12, learning_rate=0.01, seed=0),
        device=CPU,
        progress=no_progress,
        save_checkpoint=lambda files: None,
    )
    # Sections that nobody painted.
    sections = [12, 13, 15, 18]
    unseen = volume[sections]
    slabs = section_annotation.annotate([trained.model.eval()], lambda a, b: unseen[a:b], unseen.shape, scale, 0.5, CPU)
    found = np.concatenate([slab.labels for slab in slabs]) == 1
    true = kinds[sections] == GLOBULE
    # Membranes are as dark as globules, so a threshold that finds globules finds as large a share of membranes; where
    # the tomogram is smoothed before, which makes thin membranes weaker, it does better.
    smoothed = gaussian_filter(volume, 1.5)[sections]
    best = max(dice(image < level, true) for image in (unseen, smoothed) for level in np.linspace(-2, 0, 41))
    reached = dice(found, true)
    assert reached > 0.75
    assert reached > best + 0.15


def test_models_of_another_kind_are_refused() -> None:
    config = annotator.config() | {"feature": "membrane", "voxel_size_angstrom": 13.5}
    annotator.check_config(config)
    assert isinstance(architectures.build(config), annotator.SectionAnnotator)
    for change, word in (
        ({"architecture": "edss3d"}, "'edss3d'"),
        ({"architecture_version": 9}, "version 9"),
        ({"feature": ""}, "feature"),
        ({"voxel_size_angstrom": -1}, "voxel_size_angstrom"),
        ({"voxel_size_angstrom": float("nan")}, "voxel_size_angstrom"),
    ):
        with pytest.raises(FailedPrecondition, match=word):
            annotator.check_config(config | change)


def test_the_scale_of_a_tomogram() -> None:
    random = np.random.default_rng(0)
    volume = (50 + 4 * random.standard_normal((12, 40, 50))).astype(np.float32)
    volume[3, 5, 6] = -4000  # gold

    def measured(values: Any, contrast: str = "dark") -> tomogram_scale.Scale:
        return tomogram_scale.measure_scale(lambda a, b: values[a:b], values.shape, contrast, "t.mrc")

    scale = measured(volume)
    assert scale.middle == pytest.approx(50, abs=0.2)
    assert scale.spread == pytest.approx(-4, abs=0.1), "gold counts as one voxel"
    assert scale(volume).max() == tomogram_scale.LIMIT, "dark gold is positive, and drawn in"
    assert measured(volume, "light").spread == pytest.approx(4, abs=0.1)
    masked = np.zeros((12, 40, 50), np.float32)
    masked[5, 10:12] = 3
    assert np.isfinite(measured(masked)(masked)).all()
    with pytest.raises(InvalidArgument, match=r"t\.mrc is constant, 7 everywhere"):
        measured(np.full((3, 4, 5), 7, np.float32))
    volume[7, 8, 9] = np.nan
    with pytest.raises(InvalidArgument, match="x=9, y=8, z=7 is nan"):
        measured(volume)
