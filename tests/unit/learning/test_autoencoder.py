"""Autoencoder3D against the layers of Zeng et al. 2018, written out once more in torch's plainest operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.learning.autoencoder import (
    Autoencoder3D,
    AutoencoderLoss,
    activation_bytes,
    check_config,
    config,
    max_pool,
    max_pool_by_view,
    weight_bytes,
)

CHANNELS = 32


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def as_in_the_paper(model: Autoencoder3D, boxes: Tensor) -> tuple[Tensor, Tensor, list[tuple[str, tuple[int, ...]]]]:
    """Reconstructions, codes, and each layer's name with the shape of its output for one box."""
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def layer(name: str, output: Tensor) -> Tensor:
        shapes.append((name, tuple(output.shape[1:])))
        return output

    def convolve(features: Tensor, number: int) -> Tensor:
        convolution = getattr(model, f"convolution_{number}")
        return functional.conv3d(features, convolution.weight, convolution.bias, padding=1)

    side = boxes.shape[-1] // 4
    x = layer("conv 1", functional.relu(convolve(boxes, 1)))
    x = layer("pool 1", functional.max_pool3d(x, 2))
    x = layer("conv 2", functional.relu(convolve(x, 2)))
    x = layer("pool 2", functional.max_pool3d(x, 2))
    codes = layer("code", functional.relu(functional.linear(x.flatten(1), model.to_code.weight, model.to_code.bias)))
    x = layer("dense", functional.relu(functional.linear(codes, model.from_code.weight, model.from_code.bias)))
    x = x.view(-1, CHANNELS, side, side, side)
    x = layer("upsample 1", functional.interpolate(x, scale_factor=2, mode="nearest"))
    x = layer("conv 3", functional.relu(convolve(x, 3)))
    x = layer("upsample 2", functional.interpolate(x, scale_factor=2, mode="nearest"))
    x = layer("conv 4", functional.relu(convolve(x, 4)))
    return layer("conv 5", convolve(x, 5)), codes, shapes


def test_layers_at_32_have_the_papers_shapes_and_parameter_counts() -> None:
    model = Autoencoder3D(32, seeded())
    _, _, shapes = as_in_the_paper(model, torch.zeros(1, 1, 32, 32, 32))
    assert shapes == [
        ("conv 1", (32, 32, 32, 32)),
        ("pool 1", (32, 16, 16, 16)),
        ("conv 2", (32, 16, 16, 16)),
        ("pool 2", (32, 8, 8, 8)),
        ("code", (32,)),
        ("dense", (16384,)),
        ("upsample 1", (32, 16, 16, 16)),
        ("conv 3", (32, 16, 16, 16)),
        ("upsample 2", (32, 32, 32, 32)),
        ("conv 4", (32, 32, 32, 32)),
        ("conv 5", (1, 32, 32, 32)),
    ]
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in model.named_children()}
    print(shapes, counts)
    assert counts == {
        "convolution_1": 27 * 32 + 32,
        "convolution_2": 27 * 32 * 32 + 32,
        "to_code": 8**3 * 32 * 32 + 32,
        "from_code": 33 * 8**3 * 32,
        "convolution_3": 27 * 32 * 32 + 32,
        "convolution_4": 27 * 32 * 32 + 32,
        "convolution_5": 27 * 32 + 1,
    }
    assert sum(counts.values()) == 1_149_793
    assert weight_bytes(32) == 4 * 1_149_793
    assert activation_bytes(32) == 4 * 32**4


def test_the_fast_network_computes_the_papers_layers_and_their_gradients() -> None:
    model = Autoencoder3D(12, seeded(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeded(2)))
    boxes = torch.randn(3, 1, 12, 12, 12, generator=seeded(3))
    gradients = []
    outputs = []
    for network in (model, lambda x: as_in_the_paper(model, x)[:2]):
        model.zero_grad()
        reconstruction, codes = network(boxes)
        (functional.mse_loss(reconstruction, boxes) + 1e-2 * codes.sum()).backward()  # type: ignore[no-untyped-call]
        outputs.append((reconstruction.detach(), codes.detach()))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    # Rounding of float32 sums over some thousand terms.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    assert len(gradients[1]) == 14
    for name, expected in gradients[1].items():
        assert float((gradients[0][name] - expected).norm() / expected.norm()) < 1e-4, name


def test_pooling_for_gpus_gives_the_same_values_and_gradients() -> None:
    features = torch.randn(2, 4, 8, 8, 8, generator=seeded())
    results = []
    for pool in (max_pool, max_pool_by_view):
        leaf = features.clone().requires_grad_()
        pooled = pool(leaf)
        (pooled**2).sum().backward()  # type: ignore[no-untyped-call]
        results.append((pooled.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_loss_is_mean_squared_error_plus_the_sum_of_codes() -> None:
    class Network(torch.nn.Module):
        def forward(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
            return boxes + 0.5, torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 5.0]])

    values = AutoencoderLoss(0.1)(Network(), {"boxes": torch.zeros(2, 1, 4, 4, 4)}, seeded())
    assert float(values["reconstruction"]) == pytest.approx(0.25)
    assert float(values["penalty"]) == pytest.approx(0.1 * (3 + 5) / 2)
    assert float(values["loss"]) == pytest.approx(0.25 + 0.4)
    assert float(values["active"]) == pytest.approx(3 / 8)


@pytest.mark.parametrize("side", [0, 2, 18])
def test_sides_that_two_poolings_do_not_divide_are_refused(side: int) -> None:
    with pytest.raises(InvalidArgument, match="multiple of 4"):
        Autoencoder3D(side)


def test_only_its_own_config_is_accepted() -> None:
    good: dict[str, Any] = config(16) | {
        "binning": 2,
        "pose_normalisation": False,
        "subtomogram_box_size": 32,
        "subtomogram_voxel_size_angstrom": 10.0,
    }
    check_config(good)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"architecture": "edss3d"}, "'edss3d'"),
        ({"architecture_version": 2}, "version 2"),
        ({"binning": True}, "binning is True"),
        ({"pose_normalisation": 1}, "pose_normalisation is 1"),
        ({"subtomogram_voxel_size_angstrom": "x"}, "subtomogram_voxel_size_angstrom"),
        ({"subtomogram_box_size": 48}, "contradict"),
        ({"box_size": 18, "binning": 2, "subtomogram_box_size": 36}, "contradict"),
    ]
    for change, message in changes:
        with pytest.raises(FailedPrecondition, match=message):
            check_config(good | change)
