"""DUAL: unsupervised simultaneous denoising and simulation (Zeng et al. 2024, bioRxiv 2024.03.02.583135).

Six networks learn from unpaired subvolumes of tomograms, t, and of density maps without noise, v:

    denoiser         v_f = D(t)
    generators       t_f = G_s(v + P G_n(z)), z ~ N(0, I), P a random permutation of the voxels
    noise encoder    z of a tomogram: t^ = G_s(D(t) + G_n(E(t)))
    discriminators   of tomograms and of density maps, real and made

D and G_s are U-Nets, G_s with a learned transfer function after it. E and G_n are convolutions by strides to a code and
back. Each discriminator is two networks, one of the voxels and one of the logarithm of the power spectrum, which is
where wedge and contrast transfer show; both give a logit for each place and are averaged. The paper's supplement with
the networks' sizes is not at hand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor, nn

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.learning.architecture_version import check_architecture
from services.learning.autoencoder import memory_order
from services.learning.learned_transfer import LearnedTransfer, windowed_power
from services.learning.training import Batch
from services.learning.unet import SLOPE, UNet, orthogonal

NAME = "dual"
VERSION = 2
"""Raised when the same weights would compute something else."""

CODE_SIZE = 16
"""Numbers of a noise code: about as many as boxes in a step, or their covariance says little."""
DEPTH = 2
"""Poolings of the U-Nets."""
POOLING = 8
"""Sides of the subvolumes are multiples of this: encoder and discriminators halve them three times."""

LEVEL_RATE = 10.0
"""Natural logarithm of the noise's level for a weight of 1."""

JOINT_SHARE = 0.25
"""Of a training's steps, in which reconstructions teach all networks."""
DECAY_FROM = 0.5
"""Share of a training after which the learning rate falls: an adversarial training does not settle by itself."""
AVERAGING = 0.995
"""Share of their running mean that the weights keep in a step: the mean is what a training ends with."""

USE = "Its denoiser takes noise from tomograms, its generators make tomograms of density maps."
LIMITS = (
    "It was trained without any pair of a tomogram and its truth: structures that the density maps lack may be left "
    "out or turned into others that they have. Look at the tomogram beside it, and measure in the tomogram."
)


class Dual(nn.Module):
    """The six networks for subvolumes of `box_size` voxels, with `channels` at the U-Nets' full size.

    Raises InvalidArgument for a side that is no multiple of 8, or below 16.
    """

    steps: Tensor

    def __init__(self, box_size: int, channels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if box_size < 2 * POOLING or box_size % POOLING:
            raise InvalidArgument(
                f"subvolumes have sides of a multiple of {POOLING} voxels, {2 * POOLING} at least: not {box_size}"
            )
        self.box_size = box_size
        self.denoiser = UNet(channels, DEPTH, generator=generator)
        self.structural = UNet(channels, DEPTH, generator=generator)
        self.transfer = LearnedTransfer(box_size)
        self.noise = NoiseGenerator(box_size, channels, generator)
        self.encoder = NoiseEncoder(box_size, channels, generator)
        self.of_tomograms = Discriminator(box_size, channels, generator)
        self.of_densities = Discriminator(box_size, channels, generator)
        # Part of the state, so that a resumed training goes on as an undisturbed one.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def simulate(self, densities: Tensor, codes: Tensor, generator: torch.Generator) -> Tensor:
        """Made subvolumes t_f (batch, 1, n, n, n) of densities of that shape and noise codes (batch, code)."""
        return self.made(densities + permuted(self.noise(codes), generator))

    def made(self, noisy_densities: Tensor, periodic: bool = True) -> Tensor:
        """G_s of densities with noise: subvolumes are taken as periodic, parts of volumes (batch, 1, z, y, x) are not.

        What the U-Net changes in them, and they themselves, go through the transfer function: noise in a tomogram is
        white noise that was filtered, and so nearly is all else.
        """
        result: Tensor = self.transfer(noisy_densities + self.structural(noisy_densities), periodic)
        return result

    def forward(self, tomograms: Tensor) -> Tensor:
        """Denoised subvolumes (batch, 1, z, y, x), of sides that are multiples of 4."""
        result: Tensor = self.denoiser(tomograms)
        return result


class NoiseGenerator(nn.Module):
    """G_n: noise (batch, 1, n, n, n) of codes (batch, code)."""

    def __init__(self, box_size: int, channels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.side = box_size // POOLING
        self.width = 4 * channels
        self.from_code = nn.Linear(CODE_SIZE, self.width * self.side**3)
        widths = [4 * channels, 2 * channels, channels, channels]
        self.layers = nn.ModuleList(
            nn.ConvTranspose3d(before, after, 4, stride=2, padding=1) for before, after in itertools.pairwise(widths)
        )
        self.output = nn.Conv3d(channels, 1, 3, padding=1)
        # The logarithm of what the noise is multiplied by, so that its level is soon found.
        self.level = nn.Parameter(torch.full((), math.log(10) / LEVEL_RATE))
        orthogonal(self, generator)
        for layer in self.layers:
            assert isinstance(layer, nn.ConvTranspose3d)
            assert layer.bias is not None
            nn.init.orthogonal_(layer.weight, nn.init.calculate_gain("leaky_relu", SLOPE), generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, codes: Tensor) -> Tensor:
        features = functional.leaky_relu(self.from_code(codes), SLOPE)
        features = memory_order(features.view(-1, self.width, self.side, self.side, self.side))
        for layer in self.layers:
            features = functional.leaky_relu(layer(features), SLOPE)
        result: Tensor = self.output(features) * torch.exp(LEVEL_RATE * self.level)
        return result


class NoiseEncoder(nn.Module):
    """E: codes (batch, code) of subvolumes (batch, 1, n, n, n)."""

    def __init__(self, box_size: int, channels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.layers = _halvings(1, channels)
        self.to_code = nn.Linear(4 * channels * (box_size // POOLING) ** 3, CODE_SIZE)
        orthogonal(self, generator)

    def forward(self, tomograms: Tensor) -> Tensor:
        codes: Tensor = self.to_code(self.layers(memory_order(tomograms)).contiguous().flatten(1))
        return codes


class Discriminator(nn.Module):
    """Logits (batch, places) that subvolumes (batch, 1, n, n, n) are real: of places in the volume and in its spectrum.

    The spectrum is the logarithm of the power of the volume under a Hann window. What it should be differs from place
    to place, so the network is told where it looks.
    """

    places: Tensor
    shares: Tensor

    def __init__(self, box_size: int, channels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.voxels = nn.Sequential(*_halvings(1, channels), nn.Conv3d(4 * channels, 1, 3, padding=1))
        self.spectrum = nn.Sequential(*_halvings(4, channels), nn.Conv3d(4 * channels, 1, 3, padding=1))
        orthogonal(self, generator)
        self.register_buffer("places", spectral_places(box_size), persistent=False)
        self.register_buffer("shares", spectral_shares(box_size), persistent=False)

    def forward(self, volumes: Tensor) -> Tensor:
        voxels = self.voxels(memory_order(volumes)).flatten(1)
        spectrum = self.spectrum(memory_order(self.spectra(volumes))).flatten(1)
        # As many places of either kind count the same.
        return torch.cat([voxels, spectrum.mean(dim=1, keepdim=True).expand(-1, voxels.shape[1])], dim=1)

    def power(self, volumes: Tensor) -> Tensor:
        """(batch, n, n, n // 2): the shifted half power spectrum of volumes (batch, 1, n, n, n), above zero."""
        power = windowed_power(volumes)[..., : volumes.shape[-1] // 2]
        shifted: Tensor = torch.fft.fftshift(power, dim=(1, 2))
        return shifted

    def spectra(self, volumes: Tensor) -> Tensor:
        """(batch, 4, n, n, n // 2): log power, and where in Fourier space it is."""
        power = torch.log(self.power(volumes))[:, None]
        return torch.cat([power, self.places.expand(len(volumes), -1, -1, -1, -1)], dim=1)


def spectral_places(side: int) -> Tensor:
    """(3, n, n, n // 2): |k|, and the cosines of its angles with x and z, of a shifted half spectrum."""
    line = torch.arange(side, dtype=torch.float32) - side // 2
    z, y, x = torch.meshgrid(line, line, torch.arange(side // 2, dtype=torch.float32), indexing="ij")
    radius = torch.sqrt(z * z + y * y + x * x).clamp(min=1.0)
    return torch.stack([radius / (side / 2) - 1, x / radius, z.abs() / radius])


def spectral_shares(side: int) -> Tensor:
    """What each place (n, n, n // 2) of a shifted half spectrum counts: half of it by places, half by shells.

    A shell of a whole |k| counts as much as any other then, as the coarsest have few places and most of what is seen.
    """
    line = torch.arange(side) - side // 2
    z, y, x = torch.meshgrid(line, line, torch.arange(side // 2), indexing="ij")
    shells = torch.sqrt((z * z + y * y + x * x).float()).round().long().clamp(1, side // 2)
    counts = torch.zeros(side // 2 + 1).scatter_add(0, shells.flatten(), torch.ones(shells.numel()))
    of_shells = 1 / counts[shells]
    return 0.5 / shells.numel() + 0.5 * of_shells / of_shells.sum()


def permuted(noise: Tensor, generator: torch.Generator) -> Tensor:
    """Each of (batch, 1, n, n, n) with its voxels in another random order."""
    flat = noise.flatten(1)
    order = torch.rand(flat.shape, generator=generator).argsort(dim=1).to(flat.device)
    return torch.gather(flat, 1, order).view_as(noise)


class DualLoss:
    """Equations 3 to 9: reconstruction in both domains, the adversarial losses, and the noise codes' divergence.

    A batch holds "boxes", subvolumes of tomograms (b, 1, n, n, n), and "densities" (b, n, n, n), which need not
    belong together. The discriminators learn in the same step as the others, each from its own loss: what was made is
    detached for theirs, and their weights are for the others'. The logarithms and the covariance are kept from what has
    none: a reconstruction is never better than `LEAST`, a batch's covariance is drawn towards the identity.

    Three things stand beside the equations.

    For `joint_steps` steps a reconstruction teaches all that takes part in it, which brings the networks together:
    their contrasts and places agree. From then on it teaches what comes last: the denoiser the density maps, G_s and
    the noise's networks the tomograms. For the logarithms make a reconstruction worth the more the better it is, until
    it is had by making tomograms that are too easy to denoise.

    All that a discriminator sees, real or made, has white noise of the deviation `BLUR` on it (Sonderby et al. 2017):
    density maps are flat between structures, as nothing that is made can be.

    And the made tomograms of a batch are drawn to the real ones in their mean power spectrum and in how their values
    are distributed, in voxels and in means of 2^3 and 4^3 (matched features, Salimans et al. 2016): without it the
    generators learn the noise late, hide the tomogram's own noise in what the denoiser makes, to have it back in the
    cycle, and leave densities stronger against the noise than they are.
    """

    NAME = "dual"

    def __init__(
        self,
        reconstruction_weight: float = 1.0,
        adversarial_weight: float = 1.0,
        divergence_weight: float = 0.1,
        matching_weight: float = 1.0,
        joint_steps: int = 0,
    ) -> None:
        self.reconstruction_weight = reconstruction_weight
        self.adversarial_weight = adversarial_weight
        self.divergence_weight = divergence_weight
        self.matching_weight = matching_weight
        self.joint_steps = joint_steps

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Means over the batch: `loss`, its terms, and what shows a collapse: how real the discriminators find what is
        real and what is made, and the deviation of what the denoiser makes.
        """
        assert isinstance(model, Dual)
        joint = int(model.steps) < self.joint_steps
        if model.training:
            model.steps += 1
        tomograms, densities = batch["boxes"], batch["densities"][:, None]
        codes = torch.randn(len(densities), CODE_SIZE, generator=generator).to(densities.device)
        made = model.simulate(densities, codes, generator)
        denoised = model.denoiser(tomograms)
        found_codes = model.encoder(tomograms)
        remade = model.made((denoised if joint else denoised.detach()) + model.noise(found_codes))
        restored = model.denoiser(made if joint else made.detach())
        reconstruction = difference(densities, restored) + difference(tomograms, remade)
        divergence = divergence_of_codes(found_codes.float())
        values = {"reconstruction": reconstruction, "divergence": divergence}
        adversarial = tomograms.new_zeros(())
        discrimination = tomograms.new_zeros(())
        for name, network, real, fake in (
            ("tomograms", model.of_tomograms, tomograms, made),
            ("densities", model.of_densities, densities, denoised),
        ):
            real, fake = blurred(real, generator), blurred(fake, generator)
            fixed = {key: value.detach() for key, value in network.state_dict(keep_vars=True).items()}
            judged: Tensor = torch.func.functional_call(network, fixed, (fake,))
            adversarial = adversarial + functional.softplus(-judged.float()).mean()
            of_real, of_fake = network(real).float(), network(fake.detach()).float()
            discrimination = discrimination + functional.softplus(-of_real).mean() + functional.softplus(of_fake).mean()
            values[f"real_{name}"] = of_real.detach().sigmoid().mean()
            values[f"made_{name}"] = of_fake.detach().sigmoid().mean()
            values[f"spectra_{name}"] = difference_of_spectra(network.power(real), network.power(fake), network.shares)
        values |= {"adversarial": adversarial, "discrimination": discrimination}
        values["distributions_tomograms"] = difference_of_distributions(tomograms, made)
        values["deviation"] = denoised.detach().float().std()
        loss = (
            self.reconstruction_weight * reconstruction
            + self.adversarial_weight * (adversarial + discrimination)
            + self.divergence_weight * divergence
            + self.matching_weight * (values["spectra_tomograms"] + 3 * values["distributions_tomograms"])
        )
        return {"loss": loss, **values}


BLUR = 0.1
"""Deviation of the noise on what discriminators see, in those of the tomograms and of the density maps."""
CORRECTIONS, CORRECTED_BOXES = 4, 256
"""Rounds of the transfer function's after the training: what the window leaks from strong frequencies to weak ones
shrinks from one to the next. And of how many subvolumes."""
LEAST = 1e-4
"""Of a mean squared difference and of 1 - correlation, before their logarithm."""


def difference(real: Tensor, made: Tensor) -> Tensor:
    """log of the mean squared difference + log(1 - correlation), over all voxels of a batch (equations 4 and 5).

    Of the batch and not of each subvolume: one of plain ice has no correlation.
    """
    real, made = real.float(), made.float()
    squared = functional.mse_loss(made, real)
    a, b = real - real.mean(), made - made.mean()
    correlation = (a * b).mean() / torch.sqrt((a * a).mean() * (b * b).mean() + LEAST**2)
    return torch.log(squared + LEAST) + torch.log(1 - correlation + LEAST)


def difference_of_spectra(real: Tensor, made: Tensor, shares: Tensor) -> Tensor:
    """Mean squared difference of the logarithms of the batches' mean power (batch, z, y, x), places by their shares.

    Both means are over as many boxes, so what the logarithm of a mean of few is off by cancels.
    """
    return (shares * (torch.log(made.mean(dim=0)) - torch.log(real.mean(dim=0))) ** 2).sum()


def difference_of_distributions(real: Tensor, made: Tensor) -> Tensor:
    """How far the sorted values of two batches (batch, 1, n, n, n) lie apart, in deviations of the real ones: the sum
    for their voxels and for their means over 2^3 and 4^3, which show structures rather than noise.

    Beyond a tenth of a deviation differences count as they are and not by their squares, as the few brightest voxels
    differ from batch to batch.
    """
    total = real.new_zeros((), dtype=torch.float32)
    for scale in (1, 2, 4):
        a, b = (functional.avg_pool3d(volumes.float(), scale).flatten().sort().values for volumes in (real, made))
        deviation = a.std() + LEAST
        total = total + functional.smooth_l1_loss(b / deviation, a / deviation, beta=0.1)
    return total


@torch.no_grad()
def correct_transfer(
    model: Dual, boxes: NDArray[np.float32], densities: NDArray[np.float32], seed: int, device: torch.device
) -> None:
    """Bring the mean power of made tomograms to that of real ones, subvolumes (n, z, y, x) of either domain.

    After a training, whose last steps leave it where they do: of what an adversary teaches nothing stands still.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(volumes: NDArray[np.float32]) -> Iterator[Tensor]:
        order = torch.randperm(len(volumes), generator=generator)[:CORRECTED_BOXES].sort().values.numpy()
        for rows in np.array_split(order, -(-len(order) // 8)):
            yield torch.from_numpy(np.ascontiguousarray(volumes[rows]))[:, None].to(device)

    def mean_power(batches: Iterator[Tensor]) -> Tensor:
        powers = [(windowed_power(batch).sum(dim=0), len(batch)) for batch in batches]
        return torch.stack([power for power, _ in powers]).sum(dim=0) / sum(count for _, count in powers)

    real = mean_power(drawn(boxes))
    for _ in range(CORRECTIONS):
        made = mean_power(
            model.simulate(batch, torch.randn(len(batch), CODE_SIZE, generator=generator).to(device), generator)
            for batch in drawn(densities)
        )
        model.transfer.correct(real, made)


def blurred(volumes: Tensor, generator: torch.Generator) -> Tensor:
    """With white noise of the deviation `BLUR`."""
    return volumes + BLUR * torch.randn(volumes.shape, generator=generator).to(volumes.device)


def divergence_of_codes(codes: Tensor) -> Tensor:
    """KL(N(0, I) || N(mu, Sigma)) of the mean and covariance of codes (batch, code), divided by the code's size.

    A batch of b has a covariance of rank b - 1 at most. It is drawn towards the identity by the share
    code / (code + b), so that its inverse is there; a batch of one is compared by its mean alone.
    """
    count, size = codes.shape
    mean = codes.mean(dim=0)
    identity = torch.eye(size, device=codes.device)
    centred = codes - mean
    covariance = centred.T @ centred / max(count - 1, 1)
    share = size / (size + count) if count > 1 else 1.0
    covariance = (1 - share) * covariance + share * identity
    factor = torch.linalg.cholesky(covariance)
    inverse = torch.cholesky_inverse(factor)
    logarithm = 2 * torch.log(torch.diagonal(factor)).sum()
    return 0.5 * (torch.trace(inverse) + mean @ inverse @ mean - size + logarithm) / size


def config(box_size: int, channels: int) -> dict[str, Any]:
    """What names the architecture in a model's config."""
    return {"architecture": NAME, "architecture_version": VERSION, "box_size": box_size, "channels": channels}


def check_config(settings: Mapping[str, Any]) -> None:
    """FailedPrecondition where a model's config describes another architecture, or is not whole."""
    check_architecture(settings, NAME, VERSION)
    for name in ("box_size", "channels"):
        value = settings.get(name)
        if type(value) is not int or value < 1:
            raise FailedPrecondition(
                f"the model's config says {name} is {value!r}: it is damaged, train the model again"
            )


def from_config(settings: Mapping[str, Any], generator: torch.Generator | None = None) -> Dual:
    """The networks of a model's config; FailedPrecondition as `check_config`."""
    check_config(settings)
    return Dual(settings["box_size"], settings["channels"], generator)


def _halvings(inputs: int, channels: int) -> nn.Sequential:
    """Three convolutions 4^3 of stride 2 with leaky ReLU, to 4 times the channels."""
    widths = [inputs, channels, 2 * channels, 4 * channels]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv3d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE, inplace=True)]
    return nn.Sequential(*layers)
