from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from services.learning.learned_transfer import RATE, LearnedTransfer, mirrored, windowed_power
from services.learning.training import generator_for

BOX = 16


def filtering(gains: Tensor) -> LearnedTransfer:
    transfer = LearnedTransfer(BOX)
    with torch.no_grad():
        transfer.weight.copy_(torch.log(gains) / RATE)
    return transfer


def frequencies() -> Tensor:
    line = torch.fft.fftfreq(BOX)
    return torch.sqrt(line[:, None, None] ** 2 + line[:, None] ** 2 + torch.fft.rfftfreq(BOX) ** 2)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator_for(seed))


@pytest.mark.parametrize("periodic", [True, False])
def test_at_first_nothing_is_changed(periodic: bool) -> None:
    volumes = noise(0, 2, 1, BOX, BOX, BOX)
    torch.testing.assert_close(LearnedTransfer(BOX)(volumes, periodic), volumes, atol=1e-5, rtol=0)


def test_a_periodic_box_gets_the_gains_frequency_by_frequency() -> None:
    gains = 0.5 + noise(1, BOX, BOX, BOX // 2 + 1).abs()
    gains = torch.fft.rfftn(torch.fft.irfftn(gains, (BOX,) * 3)).real
    volumes = noise(2, 1, 1, BOX, BOX, BOX)
    found = filtering(gains)(volumes, True)
    np.testing.assert_allclose(
        np.fft.rfftn(found[0, 0].detach().numpy()),
        np.fft.rfftn(volumes[0, 0].numpy()) * gains.numpy(),
        atol=2e-3,
    )


def test_a_volume_of_any_size_is_convolved_and_mirrored_at_its_faces() -> None:
    gains = torch.exp(-20 * frequencies() ** 2)
    transfer = filtering(gains)
    volume = noise(3, 1, 1, 20, 7, 26)
    found = transfer(volume, False)[0, 0].detach()
    assert found.shape == (20, 7, 26)
    kernel = torch.fft.fftshift(torch.fft.irfftn(gains, (BOX,) * 3))
    padded = volume[0, 0]
    for axis, side in enumerate(padded.shape):
        padded = padded.index_select(axis, mirrored(side, BOX // 2, padded.device))
    # Convolution: places before a voxel get what is behind the kernel's middle.
    windows = padded.unfold(0, BOX + 1, 1).unfold(1, BOX + 1, 1).unfold(2, BOX + 1, 1)
    flipped = torch.nn.functional.pad(kernel, (0, 1, 0, 1, 0, 1)).flip(0, 1, 2)
    torch.testing.assert_close(found, (windows * flipped).sum(dim=(-3, -2, -1)), atol=1e-4, rtol=0)


def test_a_part_with_margins_of_the_reach_is_as_of_the_whole() -> None:
    transfer = filtering(torch.exp(-8 * frequencies()))
    volume = noise(4, 1, 1, 12, 60, 20)
    whole = transfer(volume, False)
    part = transfer(volume[..., 10:50, :], False)
    torch.testing.assert_close(part[..., 8:32, :], whole[..., 18:42, :], atol=1e-5, rtol=0)


def test_lines_go_on_as_their_mirror_images() -> None:
    device = torch.device("cpu")
    assert mirrored(3, 4, device).tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2]
    assert mirrored(1, 2, device).tolist() == [0, 0, 0, 0, 0]


def test_corrected_gains_give_noise_the_spectrum_that_is_wanted() -> None:
    wanted = filtering(0.1 + torch.exp(-30 * frequencies() ** 2))
    transfer = filtering(torch.ones(BOX, BOX, BOX // 2 + 1))
    with torch.no_grad():
        real = windowed_power(wanted(noise(5, 400, 1, BOX, BOX, BOX), True)).mean(dim=0)
        for seed in (6, 7, 8):
            made = windowed_power(transfer(noise(seed, 400, 1, BOX, BOX, BOX), True)).mean(dim=0)
            transfer.correct(real, made)
        found = transfer.gains() / wanted.gains()
    # 400 boxes give a power to 5 %, the ratio of two to 7 % and a gain to 3.5 %; of the 144 of a plane a Hann window
    # leaves 64 that do not hang together.
    for plane in found:
        assert float(plane.mean()) == pytest.approx(1, abs=4 * 0.035 / 8)
    assert float((1 / wanted.gains().detach() - 1).abs().mean()) > 1
