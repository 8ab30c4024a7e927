"""EDSS3D against the layers of Zeng et al. 2018, written out once more in torch's plainest operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.learning import architectures
from services.learning.edss3d import (
    EDSS3D,
    MARGIN,
    POOLING,
    REACH,
    SegmentationLoss,
    accuracy,
    check_config,
    config,
    cross_entropy,
    weight_bytes,
)


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def as_in_the_paper(model: EDSS3D, boxes: Tensor) -> tuple[Tensor, list[tuple[str, tuple[int, ...]]]]:
    """Logits, and each layer's name with the shape of its output for one box."""
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def layer(name: str, output: Tensor) -> Tensor:
        shapes.append((name, tuple(output.shape[1:])))
        return output

    def convolve(features: Tensor, number: int) -> Tensor:
        convolution = getattr(model, f"convolution_{number}")
        return functional.conv3d(features, convolution.weight, convolution.bias, padding=1)

    x = layer("conv 1", functional.relu(convolve(boxes, 1)))
    x = layer("pool 1", functional.max_pool3d(x, 2))
    x = layer("conv 2", functional.relu(convolve(x, 2)))
    x = layer("pool 2", functional.max_pool3d(x, 2))
    x = layer("conv 3", functional.relu(convolve(x, 3)))
    x = layer("upsample 1", functional.interpolate(x, scale_factor=2, mode="nearest"))
    x = layer("conv 4", functional.relu(convolve(x, 4)))
    x = layer("upsample 2", functional.interpolate(x, scale_factor=2, mode="nearest"))
    x = layer("conv 5", functional.relu(convolve(x, 5)))
    return layer("conv 6", convolve(x, 6)), shapes


def test_layers_at_32_have_the_papers_shapes_and_parameter_counts() -> None:
    model = EDSS3D(3, seeded())
    _, shapes = as_in_the_paper(model, torch.zeros(1, 1, 32, 32, 32))
    assert shapes == [
        ("conv 1", (32, 32, 32, 32)),
        ("pool 1", (32, 16, 16, 16)),
        ("conv 2", (32, 16, 16, 16)),
        ("pool 2", (32, 8, 8, 8)),
        ("conv 3", (32, 8, 8, 8)),
        ("upsample 1", (32, 16, 16, 16)),
        ("conv 4", (32, 16, 16, 16)),
        ("upsample 2", (32, 32, 32, 32)),
        ("conv 5", (32, 32, 32, 32)),
        ("conv 6", (3, 32, 32, 32)),
    ]
    count = sum(parameter.numel() for parameter in model.parameters())
    # 27 * 1 * 32 + 32, four times 27 * 32 * 32 + 32, and 27 * 32 * 3 + 3.
    assert count == 896 + 4 * 27_680 + 2_595
    assert weight_bytes(3) == 4 * count


@pytest.mark.parametrize("shape", [(8, 8, 8), (4, 12, 16)])
def test_what_is_computed_is_what_the_layers_say(shape: tuple[int, int, int]) -> None:
    model = EDSS3D(4, seeded(1)).eval()
    boxes = torch.randn((2, 1, *shape), generator=seeded(2))
    with torch.no_grad():
        expected, _ = as_in_the_paper(model, boxes)
        found = model(boxes)
        chances = model.probabilities(boxes)
    assert found.shape == (2, 4, *shape)
    # float32, sums of up to 27 * 32 terms
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chances, torch.softmax(expected, dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chances.sum(dim=1), torch.ones(2, *shape), rtol=0, atol=1e-6)


def test_the_reach_is_the_farthest_voxel_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Averages in place of maxima reach as far, and let every voxel count.
    monkeypatch.setattr(functional, "max_pool3d", functional.avg_pool3d)
    model = EDSS3D(2, seeded(3))
    for parameter in model.parameters():
        parameter.data.abs_()  # nothing cancels, and every ReLU lets pass
    farthest = 0
    for voxel in range(28, 32):  # all places within the grid of a quarter of the size
        boxes = torch.rand((1, 1, 4, 4, 64), generator=seeded(4), requires_grad=True)
        logits, _ = as_in_the_paper(model, boxes)
        logits[0, 0, 1, 1, voxel].backward()  # type: ignore[no-untyped-call]
        assert boxes.grad is not None
        counting = boxes.grad.abs().sum(dim=(0, 1, 2, 3)).nonzero()[:, 0].tolist()
        farthest = max(farthest, voxel - min(counting), max(counting) - voxel)
    assert farthest == REACH
    assert REACH <= MARGIN
    assert MARGIN % POOLING == 0


def test_the_loss_is_torchs_cross_entropy_and_learns() -> None:
    model = EDSS3D(3, seeded(5))
    boxes = 0.3 * torch.randn((2, 1, 8, 8, 8), generator=seeded(6))
    boxes[..., 4:] += 2
    targets = 2 * (torch.arange(8) >= 4).long().expand(2, 8, 8, 8)
    objective = architectures.objective({"name": SegmentationLoss.NAME})
    values = objective(model, {"boxes": boxes, "targets": targets}, seeded())
    logits = model(boxes)
    torch.testing.assert_close(values["loss"], functional.cross_entropy(logits, targets))
    assert float(values["accuracy"]) == float((logits.argmax(1) == targets).float().mean())
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    for _ in range(25):
        optimiser.zero_grad()
        loss = objective(model, {"boxes": boxes, "targets": targets}, seeded())["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    # log 2 is what knowing the classes' shares alone would leave.
    assert loss.item() < 0.6 * 0.693


def test_cross_entropy_of_sure_and_of_even_probabilities() -> None:
    targets = torch.tensor([[[[0, 1]]]])
    sure = torch.tensor([[[[[1e4, -1e4]]], [[[-1e4, 1e4]]]]])
    assert float(cross_entropy(sure, targets)) == 0
    assert float(accuracy(sure, targets)) == 1
    assert float(cross_entropy(torch.zeros(1, 2, 1, 1, 2), targets)) == pytest.approx(0.6931472)


def test_configs() -> None:
    settings = config(["background", "membrane"])
    check_config(settings)
    model = architectures.build(settings, seeded())
    assert isinstance(model, EDSS3D)
    assert model.classes == 2
    for wrong, message in (
        ({"architecture": "autoencoder3d"}, "'edss3d' is needed"),
        ({"architecture_version": 7}, "version 7"),
        ({"class_names": ["background"]}, "damaged"),
        ({"class_names": None}, "damaged"),
    ):
        with pytest.raises(FailedPrecondition, match=message):
            check_config(settings | wrong)
    with pytest.raises(InvalidArgument, match="at least 2 classes"):
        EDSS3D(1)


def test_a_skip_adds_a_convolution_of_the_input() -> None:
    model = architectures.build(config(["background", "membrane", "globule"], skip=True), seeded())
    assert isinstance(model, EDSS3D)
    assert model.skip is not None
    assert weight_bytes(3, skip=True) == 4 * sum(parameter.numel() for parameter in model.parameters())
    plain = EDSS3D(3, seeded())
    torch.testing.assert_close(plain.convolution_6.weight, model.convolution_6.weight, rtol=0, atol=0)
    boxes = torch.randn(2, 1, 8, 12, 16, generator=seeded(1))
    added = functional.conv3d(boxes, model.skip.weight, model.skip.bias, padding=1)
    torch.testing.assert_close(model(boxes), plain(boxes) + added, rtol=1e-4, atol=1e-5)
    earlier = config(["background", "membrane"])
    del earlier["skip"]
    assert architectures.build(earlier, seeded()).state_dict().keys() == plain.state_dict().keys()


def test_boxes_that_overlap_are_seen_as_the_network_sees_them_alone() -> None:
    model, side = EDSS3D(3, seeded()).eval(), 8
    region = torch.randn(16, 8, 20, generator=seeded(1))
    with torch.inference_mode():
        found = model.probabilities_by_boxes(region, side)
        window = torch.sin(torch.pi * (torch.arange(side) + 0.5) / side) ** 2
        for place in ((5, 3, 10), (0, 7, 0), (15, 0, 19)):
            expected, weights = torch.zeros(3), 0.0
            for z in range(0, 9, 4):
                for x in range(0, 13, 4):
                    at = (place[0] - z, place[1], place[2] - x)
                    if all(0 <= step < side for step in at):
                        weight = float(window[list(at)].prod())
                        box = region[z : z + side, :, x : x + side]
                        expected += weight * model.probabilities(box[None, None])[0][(slice(None), *at)]
                        weights += weight
            torch.testing.assert_close(found[(slice(None), *place)], expected / weights, rtol=0, atol=1e-6)
        assert model.probabilities_by_boxes(region[:4], side).shape == (3, 4, 8, 20), "shallower than a box"
    torch.testing.assert_close(found.sum(dim=0), torch.ones(16, 8, 20))
