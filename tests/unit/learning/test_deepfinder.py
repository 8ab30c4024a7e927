"""DeepFinder's U-Net against its published layers, written out once more in torch's plainest operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import no_progress
from services.learning import architectures, deepfinder
from services.learning.deepfinder import DeepFinder, SegmentationLoss, soft_dice
from services.learning.overlap_tile import Array, Tiling, segment


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def as_published(model: DeepFinder, boxes: Tensor) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Logits, and the shape of each convolution's output for one box."""
    shapes: list[tuple[int, ...]] = []

    def convolve(features: Tensor, name: str) -> Tensor:
        layer = getattr(model, name)
        # As Keras pads: an even kernel sees one voxel more behind it.
        pad = (0, 1) if layer.kernel_size[0] == 2 else (1, 1) if layer.kernel_size[0] == 3 else (0, 0)
        output = functional.conv3d(functional.pad(features, pad * 3), layer.weight, layer.bias)
        shapes.append(tuple(output.shape[1:]))
        return output if name == "output" else functional.relu(output)

    def up(features: Tensor) -> Tensor:
        return functional.interpolate(features, scale_factor=2, mode="nearest")

    fine = convolve(convolve(boxes, "fine_1"), "fine_2")
    middle = convolve(convolve(functional.max_pool3d(fine, 2), "middle_1"), "middle_2")
    x = functional.max_pool3d(middle, 2)
    for number in range(1, 5):
        x = convolve(x, f"coarse_{number}")
    x = torch.cat([convolve(up(x), "up_middle"), middle], dim=1)
    x = convolve(convolve(x, "joined_middle_1"), "joined_middle_2")
    x = torch.cat([convolve(up(x), "up_fine"), fine], dim=1)
    x = convolve(convolve(x, "joined_fine_1"), "joined_fine_2")
    return convolve(x, "output"), shapes


def test_layers_and_parameters_are_the_published_ones() -> None:
    model = DeepFinder(16, generator=seeded())
    _, shapes = as_published(model, torch.zeros(1, 1, 16, 16, 16))
    assert shapes == [
        *[(32, 16, 16, 16)] * 2, *[(48, 8, 8, 8)] * 2, *[(64, 4, 4, 4)] * 4,
        (64, 8, 8, 8), *[(48, 8, 8, 8)] * 2, (48, 16, 16, 16), *[(32, 16, 16, 16)] * 2, (16, 16, 16, 16),
    ]  # fmt: skip
    # Kernels and biases, layer by layer.
    count = (27 + 1) * 32 + (27 * 32 + 1) * 32 + (27 * 32 + 1) * 48 + (27 * 48 + 1) * 48 + (27 * 48 + 1) * 64
    count += 3 * (27 * 64 + 1) * 64 + (8 * 64 + 1) * 64 + (27 * 112 + 1) * 48 + (27 * 48 + 1) * 48
    count += (8 * 48 + 1) * 48 + (27 * 80 + 1) * 32 + (27 * 32 + 1) * 32 + (32 + 1) * 16
    assert sum(parameter.numel() for parameter in model.parameters()) == count == 903_456
    assert deepfinder.parameter_count(16, 32) == count
    small = DeepFinder(3, 8, seeded())
    assert sum(parameter.numel() for parameter in small.parameters()) == deepfinder.parameter_count(3, 8)


@pytest.mark.parametrize("shape", [(8, 8, 8), (4, 12, 16)])
def test_what_is_computed_is_what_the_layers_say(shape: tuple[int, int, int]) -> None:
    model = DeepFinder(4, 8, seeded(1)).eval()
    boxes = torch.randn((2, 1, *shape), generator=seeded(2))
    with torch.no_grad():
        expected, _ = as_published(model, boxes)
        found = model(boxes)
        chances = model.probabilities(boxes)
    assert found.shape == (2, 4, *shape)
    # float32, sums of up to 27 * 28 terms through fifteen layers
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chances, torch.softmax(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_the_reach_is_the_farthest_voxel_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Averages in place of maxima reach as far, and let every voxel count.
    monkeypatch.setattr(functional, "max_pool3d", functional.avg_pool3d)
    model = DeepFinder(2, 2, seeded(3))
    for parameter in model.parameters():
        parameter.data.abs_()  # nothing cancels, and every ReLU lets pass
    before = behind = 0
    for voxel in range(48, 52):  # all places within the grid of a quarter of the size
        boxes = torch.rand((1, 1, 4, 4, 96), generator=seeded(4), requires_grad=True)
        logits, _ = as_published(model, boxes)
        logits[0, 0, :, :, voxel].sum().backward()  # type: ignore[no-untyped-call]
        assert boxes.grad is not None
        counting = boxes.grad.abs().sum(dim=(0, 1, 2, 3)).nonzero()[:, 0].tolist()
        before, behind = max(before, voxel - min(counting)), max(behind, max(counting) - voxel)
    assert (before, behind) == deepfinder.REACH
    assert max(deepfinder.REACH) <= deepfinder.MARGIN
    assert deepfinder.MARGIN % deepfinder.POOLING == 0


def test_tiles_leave_no_seams() -> None:
    model = DeepFinder(3, 4, seeded(5)).eval()
    volume = np.random.default_rng(6).standard_normal((10, 14, 100), np.float32)

    def predict(region: Array) -> Array:
        with torch.inference_mode():
            return np.asarray(model.probabilities(torch.from_numpy(region)[None, None])[0].numpy())

    def found(margin: int) -> Array:
        tiles = Tiling(tile=16, margin=margin, window=0, multiple=4)
        slabs = list(segment(predict, lambda z0, z1: volume[z0:z1], volume.shape, 3, tiles, no_progress, True))
        return np.concatenate([slab.probabilities for slab in slabs if slab.probabilities is not None], axis=1)

    whole = predict(np.pad(volume, [(0, -side % 4) for side in volume.shape]))[:, :10, :14, :100]
    # float32 sums in another order; probabilities are at most 1
    np.testing.assert_allclose(found(deepfinder.MARGIN), whole, rtol=0, atol=5e-6)
    assert np.abs(found(8) - whole).max() > 1e-4


def test_the_loss_is_cross_entropy_and_soft_dice_of_the_classes_that_occur() -> None:
    model = DeepFinder(4, 4, seeded(7))
    boxes = torch.randn((2, 1, 8, 8, 8), generator=seeded(8))
    targets = torch.randint(0, 3, (2, 8, 8, 8), generator=seeded(9))  # never class 3
    values = architectures.objective({"name": SegmentationLoss.NAME})(
        model, {"boxes": boxes, "targets": targets}, seeded()
    )
    logits = model(boxes)
    chances = torch.softmax(logits, dim=1)
    dice = []
    for number in range(3):
        p, g = chances[:, number], (targets == number).float()
        # Tversky's index with both weights 1/2.
        dice.append((p * g).sum() / ((p * g).sum() + 0.5 * (p * (1 - g)).sum() + 0.5 * ((1 - p) * g).sum()))
    expected = 1 - torch.stack(dice).mean()
    torch.testing.assert_close(values["dice_loss"], expected)
    torch.testing.assert_close(values["cross_entropy"], functional.cross_entropy(logits, targets))
    torch.testing.assert_close(values["loss"], values["cross_entropy"] + expected)
    perfect = functional.one_hot(targets, 4).movedim(-1, 1).float()
    assert float(soft_dice(perfect, targets)) == 1.0
    values["loss"].backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_first_weights_follow_from_the_generator_and_keep_the_variance() -> None:
    models = [DeepFinder(3, 8, seeded(number)) for number in (1, 1, 2)]
    same, other = (
        all(torch.equal(a, b) for a, b in zip(models[0].parameters(), each.parameters(), strict=True))
        for each in models[1:]
    )
    assert same
    assert not other
    with torch.no_grad():
        logits = models[0](torch.randn((1, 1, 16, 16, 16), generator=seeded(3)))
    # Glorot's weights would have let the deepest path fade by 2^-7.
    assert 0.1 < float(logits.std()) < 10


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architecture": "edss3d"}, "'deepfinder' is needed"),
        ({"architecture_version": 99}, "version 1 is needed"),
        ({"class_names": ["background"]}, "damaged"),
        ({"channels": 7}, "damaged"),
        ({"channels": True}, "damaged"),
    ],
)
def test_other_configs_are_refused(change: dict[str, object], expected: str) -> None:
    good = deepfinder.config(["background", "a"], 8)
    assert isinstance(architectures.build(good), DeepFinder)
    with pytest.raises(FailedPrecondition, match=expected):
        deepfinder.from_config(good | change)


def test_networks_that_cannot_be() -> None:
    with pytest.raises(InvalidArgument, match="at least 2 classes"):
        DeepFinder(1)
    with pytest.raises(InvalidArgument, match="even number"):
        DeepFinder(2, 7)
