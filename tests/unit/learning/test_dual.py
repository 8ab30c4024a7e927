"""DUAL's networks and losses: shapes, closed forms, and who learns from what."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.learning import architectures, dual
from services.learning.learned_transfer import windowed_power
from services.learning.training import generator_for

SIDE, CHANNELS, BATCH = 16, 4, 3


@pytest.fixture
def model() -> dual.Dual:
    return dual.Dual(SIDE, CHANNELS, generator_for(0))


def boxes(seed: int, count: int = BATCH) -> Tensor:
    return torch.randn(count, 1, SIDE, SIDE, SIDE, generator=generator_for(seed))


def batch() -> dict[str, Tensor]:
    return {"boxes": boxes(1), "densities": boxes(2)[:, 0]}


def test_shapes(model: dual.Dual) -> None:
    tomograms = boxes(1)
    codes = model.encoder(tomograms)
    assert codes.shape == (BATCH, dual.CODE_SIZE)
    assert model.noise(codes).shape == model.denoiser(tomograms).shape == model.made(tomograms).shape == tomograms.shape
    # (16 / 8)^3 places of the volume, and as many that the spectrum's mean counts for.
    assert model.of_tomograms(tomograms).shape == (BATCH, 16)
    assert model(torch.zeros(1, 1, 8, 12, 20)).shape == (1, 1, 8, 12, 20)
    with pytest.raises(InvalidArgument, match="multiple of 8"):
        dual.Dual(20, CHANNELS)


def test_a_permutation_keeps_the_values_of_each_box_and_moves_them() -> None:
    noise = boxes(3)
    moved = dual.permuted(noise, generator_for(4))
    assert moved.shape == noise.shape
    assert torch.equal(moved.flatten(1).sort(dim=1).values, noise.flatten(1).sort(dim=1).values)
    # Of 4,096 voxels one stays where it was, on average.
    assert (moved == noise).flatten(1).sum(dim=1).max() < 10
    assert not torch.equal(moved[0].flatten().argsort(), moved[1].flatten().argsort())


def test_the_difference_is_that_of_its_formula() -> None:
    real, made = boxes(5).double(), boxes(6).double()
    made = real + 0.5 * made
    expected = math.log(float(((made - real) ** 2).mean())) + math.log(
        1 - float(np.corrcoef(real.flatten(), made.flatten())[0, 1])
    )
    # Both logarithms are of numbers that are kept above 0.0001.
    assert float(dual.difference(real, made)) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("made", [torch.zeros(2, 1, 8, 8, 8), torch.ones(2, 1, 8, 8, 8)])
def test_the_difference_of_a_constant_is_a_number_with_a_gradient(made: Tensor) -> None:
    made = made.clone().requires_grad_()
    loss = dual.difference(torch.randn(2, 1, 8, 8, 8, generator=generator_for(7)), made)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert made.grad is not None
    assert torch.isfinite(made.grad).all()


def test_the_difference_of_equals_is_its_least() -> None:
    real = boxes(8)
    assert float(dual.difference(real, real.clone())) == pytest.approx(2 * math.log(dual.LEAST), abs=0.1)


def test_the_divergence_of_normal_codes_vanishes_and_of_others_does_not() -> None:
    count = 4000
    codes = torch.randn(count, dual.CODE_SIZE, generator=generator_for(9))
    normal = float(dual.divergence_of_codes(codes))
    assert abs(normal) < 0.01
    shifted = codes.clone()
    shifted[:, 0] += 2.0
    # KL(N(0, I) || N(mu, I)) = |mu|^2 / 2.
    assert float(dual.divergence_of_codes(shifted)) - normal == pytest.approx(2.0 / dual.CODE_SIZE, rel=0.1)
    scaled = codes * math.sqrt(2)
    # For Sigma = s I: (1 / s - 1 + log s) / 2 of each number.
    assert float(dual.divergence_of_codes(scaled)) == pytest.approx(0.5 * (0.5 - 1 + math.log(2)), rel=0.1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_codes_have_a_divergence(count: int) -> None:
    codes = torch.randn(count, dual.CODE_SIZE, generator=generator_for(10)).requires_grad_()
    loss = dual.divergence_of_codes(codes)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() >= 0
    assert codes.grad is not None
    assert torch.isfinite(codes.grad).all()
    # The mean alone is known of one: half its square.
    if count == 1:
        assert loss.item() == pytest.approx(0.5 * float((codes.detach() ** 2).mean()), rel=1e-4)


def gradients(model: dual.Dual, **weights: float) -> dict[str, float]:
    """The norm of each network's gradient by the loss with these weights."""
    loss = dual.DualLoss(
        **dict.fromkeys(("reconstruction_weight", "adversarial_weight", "divergence_weight", "matching_weight"), 0.0)
        | weights,
        joint_steps=2**31,
    )
    model.zero_grad()
    loss(model, batch(), generator_for(11))["loss"].backward()  # type: ignore[no-untyped-call]
    norms: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        network = name.split(".")[0]
        size = 0.0 if parameter.grad is None else float(parameter.grad.norm())
        norms[network] = norms.get(network, 0.0) + size
    return norms


def test_each_network_learns_from_its_own_losses(model: dual.Dual) -> None:
    makers = {"denoiser", "structural", "transfer", "noise", "encoder"}
    judges = {"of_tomograms", "of_densities"}
    by_reconstruction = gradients(model, reconstruction_weight=1.0)
    assert all(by_reconstruction[name] > 0 for name in makers)
    assert all(by_reconstruction[name] == 0 for name in judges)
    by_divergence = gradients(model, divergence_weight=1.0)
    assert {name for name, norm in by_divergence.items() if norm} == {"encoder"}
    by_adversaries = gradients(model, adversarial_weight=1.0)
    assert all(by_adversaries[name] > 0 for name in judges | {"denoiser", "structural", "transfer", "noise"})
    # E makes what is reconstructed, and nothing that is judged.
    assert by_adversaries["encoder"] == 0
    by_matching = gradients(model, matching_weight=1.0)
    assert {name for name, norm in by_matching.items() if norm} == {"structural", "transfer", "noise"}


def test_a_discriminator_learns_from_its_own_loss_alone(model: dual.Dual, monkeypatch: pytest.MonkeyPatch) -> None:
    """The makers' loss, which its answers decide, does not move it."""
    monkeypatch.setattr(dual, "BLUR", 0.0)
    gradients(model, adversarial_weight=1.0)
    judge = model.of_densities
    found = [parameter.grad.clone() for parameter in judge.parameters() if parameter.grad is not None]
    given = batch()
    judge.zero_grad()
    with torch.no_grad():
        made = model.denoiser(given["boxes"])
    real = judge(given["densities"][:, None])
    loss = torch.nn.functional.softplus(-real).mean() + torch.nn.functional.softplus(judge(made)).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    expected = [parameter.grad for parameter in judge.parameters() if parameter.grad is not None]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_discriminators_see_the_spectrum(model: dual.Dual) -> None:
    """Log power of the windowed volume, zero frequency in the middle, against NumPy."""
    volume = boxes(12, 1)
    line = np.hanning(SIDE)
    window = line[:, None, None] * line[:, None] * line
    transform = np.fft.rfftn(volume[0, 0].numpy() * window, norm="ortho")[..., : SIDE // 2]
    expected = np.log(np.abs(np.fft.fftshift(transform, axes=(0, 1))) ** 2 + 1e-6)
    found = model.of_tomograms.spectra(volume)[0]
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-4, atol=1e-3)
    middle = SIDE // 2
    # |k| in units of Nyquist less one; along x, and along z.
    assert found[1, middle, middle, 4] == pytest.approx(4 / (SIDE / 2) - 1)
    assert found[2, middle, middle, 4] == pytest.approx(1.0)
    assert found[3, middle + 4, middle, 0] == pytest.approx(1.0)


def test_a_config_gives_the_network_back(model: dual.Dual) -> None:
    config = dual.config(SIDE, CHANNELS)
    again = architectures.build(config, generator_for(0))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    for broken in ({"architecture": "edss3d"}, {"architecture_version": 0}, {"channels": 0}, {"box_size": "16"}):
        with pytest.raises(FailedPrecondition):
            dual.from_config(config | broken)
    assert isinstance(architectures.objective({"name": dual.DualLoss.NAME}), dual.DualLoss)


def test_the_difference_of_spectra_is_of_their_logarithms(model: dual.Dual) -> None:
    """White noise of twice the amplitude differs by log 4 everywhere, whatever its phases, but for chance."""
    generator = generator_for(5)
    one, other = torch.randn(2, 512, 1, SIDE, SIDE, SIDE, generator=generator).unbind()
    power = model.of_tomograms.power(one)
    shares = model.of_tomograms.shares
    found = float(dual.difference_of_spectra(power, model.of_tomograms.power(2 * other), shares))
    assert found == pytest.approx(math.log(4) ** 2, rel=0.05)
    assert float(dual.difference_of_spectra(power, power, shares)) == 0.0


def test_half_of_a_spectrum_counts_by_places_and_half_by_shells() -> None:
    shares = dual.spectral_shares(SIDE)
    assert float(shares.sum()) == pytest.approx(1, rel=1e-5)
    line = torch.arange(SIDE) - SIDE // 2
    z, y, x = torch.meshgrid(line, line, torch.arange(SIDE // 2), indexing="ij")
    shells = torch.sqrt((z**2 + y**2 + x**2).float()).round().clamp(1, SIDE // 2)
    for shell in range(1, SIDE // 2 + 1):
        inside = shells == shell
        # Of eight shells; the last one has the corners too.
        assert float(shares[inside].sum()) == pytest.approx(0.5 / 8 + 0.5 * float(inside.float().mean()), rel=1e-4)


def test_distributions_differ_by_what_their_values_do() -> None:
    """Of normal values shifted by one deviation, means over 2^3 and 4^3 are off by 8^(1/2) and 64^(1/2) deviations."""
    real = boxes(11, 64)
    shifted = float(dual.difference_of_distributions(real, real + 1))
    expected = sum(off - 0.05 for off in (1, 8**0.5, 8))
    assert shifted == pytest.approx(expected, rel=0.02)
    assert float(dual.difference_of_distributions(real, boxes(12, 64))) < 0.02
    # A few bright voxels, the mean and the deviation alike: the means over 4^3 see no difference, the voxels do.
    made = real.sign() * real**2
    made = (made - made.mean()) / made.std()
    assert float(dual.difference_of_distributions(real, made)) > 0.05
    made.requires_grad_()
    dual.difference_of_distributions(real, made).backward()  # type: ignore[no-untyped-call]
    assert made.grad is not None
    assert float(made.grad.abs().sum()) > 0


def test_the_mean_power_of_what_is_made_is_brought_to_that_of_the_tomograms(model: dual.Dual) -> None:
    """The tomograms have half the amplitude along z, and the densities are noise."""
    rng = np.random.default_rng(0)
    densities = rng.standard_normal((300, SIDE, SIDE, SIDE), np.float32)
    transform = np.fft.rfftn(rng.standard_normal(densities.shape), axes=(1, 2, 3))
    low = np.abs(np.fft.fftfreq(SIDE))[:, None, None] > 0.2
    tomograms = np.fft.irfftn(np.where(low, 0.5, 1.0) * transform, axes=(1, 2, 3)).astype(np.float32)
    dual.correct_transfer(model, tomograms, densities, 0, torch.device("cpu"))
    with torch.no_grad():
        generator = generator_for(1)
        codes = torch.randn(300, dual.CODE_SIZE, generator=generator)
        made = windowed_power(model.simulate(torch.from_numpy(densities)[:, None], codes, generator)).mean(dim=0)
    real = windowed_power(torch.from_numpy(tomograms)[:, None]).mean(dim=0)
    # A plane has 144 frequencies, Hann's window leaves 64 of them, and 256 boxes give each to 6 %: 1 % for the ratio,
    # and at the step between planes 3 and 4 what the window leaks. Plane 0 hangs on a few frequencies at its middle.
    for z in range(1, SIDE // 2):
        assert float(made[z].mean() / real[z].mean()) == pytest.approx(1, abs=0.05), z


def test_what_a_discriminator_sees_is_blurred_by_its_noise() -> None:
    flat = torch.zeros(8, 1, SIDE, SIDE, SIDE)
    first = dual.blurred(flat, generator_for(1))
    assert float(first.std()) == pytest.approx(dual.BLUR, rel=0.02)
    assert torch.equal(first, dual.blurred(flat, generator_for(1)))


def test_reconstructions_teach_all_makers_for_the_joint_steps_and_then_the_last_alone(model: dual.Dual) -> None:
    """The denoiser's gradient is then that of the density maps' reconstruction from what was made, taken as data."""
    loss = dual.DualLoss(adversarial_weight=0.0, divergence_weight=0.0, matching_weight=0.0, joint_steps=1)
    found: list[dict[str, Tensor]] = []
    for _ in range(2):
        model.zero_grad()
        loss(model, batch(), generator_for(11))["loss"].backward()  # type: ignore[no-untyped-call]
        found.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
    assert int(model.steps) == 2
    given, generator = batch(), generator_for(11)
    densities = given["densities"][:, None]
    with torch.no_grad():
        made = model.simulate(densities, torch.randn(BATCH, dual.CODE_SIZE, generator=generator), generator)
    model.zero_grad()
    dual.difference(densities, model.denoiser(made)).backward()  # type: ignore[no-untyped-call]
    for name, value in model.denoiser.named_parameters():
        assert value.grad is not None
        torch.testing.assert_close(found[1][f"denoiser.{name}"], value.grad, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found[0][f"denoiser.{name}"], value.grad, rtol=1e-2)
    model.eval()
    loss(model, batch(), generator_for(11))
    assert int(model.steps) == 2, "validation is no step"
