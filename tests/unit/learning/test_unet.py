"""The U-Net: shapes, reach, and that nothing but the voxels within reach matters."""

from __future__ import annotations

import pytest
import torch

from services.learning.training import generator_for
from services.learning.unet import UNet, margin, reach


def network(depth: int = 2, channels: int = 4) -> UNet:
    return UNet(channels, depth, generator=generator_for(0)).eval()


@pytest.mark.parametrize("depth", [1, 2])
def test_an_output_voxel_depends_on_no_voxel_beyond_the_reach(depth: int) -> None:
    """And on some at it: the reach is no larger than it must be."""
    side = 2 * margin(depth) + 2**depth
    model = network(depth)
    furthest = 0
    # Every place within the coarsest grid's cell: how far a voxel sees depends on it. A pooling passes the gradient to
    # its largest voxel only: of some volumes that is the outermost.
    for number in range(2**depth * 8):
        volume = torch.randn(1, 1, side, 2**depth, 2**depth, generator=generator_for(number)).requires_grad_()
        at = margin(depth) + number % 2**depth
        model(volume)[0, 0, at, 0, 0].backward()
        assert volume.grad is not None
        seen = volume.grad.abs().sum(dim=(0, 1, 3, 4)).nonzero()[:, 0]
        furthest = max(furthest, at - int(seen.min()), int(seen.max()) - at)
    assert furthest == reach(depth)


def test_the_reach_is_within_the_margin() -> None:
    assert (reach(1), reach(2)) == (11, 27)
    assert (margin(1), margin(2)) == (12, 28)


def test_a_tile_with_its_margin_gives_what_the_whole_gives() -> None:
    model = network()
    whole = torch.randn(1, 1, 8, 112, 8, generator=generator_for(2))
    with torch.inference_mode():
        expected = model(whole)[..., 48:64, :]
        found = model(whole[..., 20:92, :])[..., 28:44, :]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_channels_and_shapes() -> None:
    model = UNet(4, 2, inputs=2, outputs=3, generator=generator_for(0))
    assert model(torch.zeros(2, 2, 8, 12, 16)).shape == (2, 3, 8, 12, 16)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = network(), network()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
