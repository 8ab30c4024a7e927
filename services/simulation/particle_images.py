"""Subtomograms straight from particle tilt images, without a tomogram between.

Each image of a particle is the projection of its density along the beam, so that its transform is a central slice of
the density's transform: with M the rotation from the frame that is reconstructed onto the image's axes (u, v, beam),

    F_image(ku, kv) = F_density(M^T (ku, kv, 0)) .

The slices of all tilts, and of all particles that are averaged, are laid into one padded half of Fourier space by
trilinear weights, as sums of T F_image and of T^2, T being the transfer function that each image was seen through (CTF,
fading by dose, thickness). What comes out is the Wiener estimate sum(T F) / (sum(T^2) + w), divided by the transform of
the trilinear kernel (direct Fourier inversion: Penczek, Methods in Enzymology 482 (2010), 1-33).

CTF-premultiplied images, as RELION 5 and Warp export them, are T F already and enter as they are; only T^2 is computed.

Frames and signs: images are `[n, v, u]`, volumes `[z, y, x]`, centres at side // 2; projection matrices (3, 3) act on
(x, y, z) column vectors and give (u, v, along the beam). With transfer functions the result has the sign of the density
where these carry the sign of the contrast (a CTF that is negative at low frequencies for dark protein gives light
protein); without them it has the contrast of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.formats.relion_tilt_images import TiltImageParticle
from cryofleet.numerics import fourier
from cryofleet.numerics.compiled import compiled
from cryofleet.numerics.ctf import Ctf, ctf_grid, image_frequencies
from cryofleet.numerics.fsc import shell_index
from cryofleet.numerics.radiation import remaining_amplitude
from cryofleet.progress import Progress, no_progress

#: The least side of an image: below it there is no frequency to speak of.
MIN_BOX = 8
#: Added to the weight, as a fraction of its mean over the shell.
WIENER = 0.1


def reconstruct(
    images: NDArray[np.floating[Any]],
    projections: NDArray[np.floating[Any]],
    pixel_size_angstrom: float,
    ctfs: Sequence[Ctf] | None = None,
    *,
    premultiplied: bool = False,
    doses: NDArray[np.floating[Any]] | None = None,
    scales: NDArray[np.floating[Any]] | None = None,
    wiener: float = WIENER,
    padding: int = 2,
    rotation: Rotation | None = None,
    shift: NDArray[np.floating[Any]] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One particle's subtomogram from its tilt images.

    Args:
        images: (n, box, box), the particle in the middle (box // 2), background at a mean of 0.
        projections: (n, 3, 3), the rotation from the tomogram's axes to each image's (u, v, beam).
        pixel_size_angstrom: of the images, and of the result.
        ctfs: of each image, at the particle's own defocus; without them the images count as undistorted.
        premultiplied: the images were multiplied by their whole transfer function already, which `transfer_functions`
            of `ctfs`, `doses` and `scales` must then be.
        doses: e/Å^2 before each image: what radiation has faded weighs less, and is restored.
        scales: the signal's amplitude in each image (the cosine of the tilt, say, for the thickness crossed).
        wiener: see `SliceSum.divide`.
        padding: of Fourier space; 2 leaves an error of interpolation of about 1%.
        rotation: takes the reference onto the particle, to have the box in the reference's frame.
        shift: (x, y, z) in pixels, the particle's place beside the images' common centre, in the tomogram's frame.

    Returns:
        The box `[z, y, x]`, and sum(T^2) on its half FFT grid: where it is 0 nothing was sampled.

    Raises:
        InvalidArgument: shapes don't match, a projection is no rotation, or a value is not finite.
    """
    total = SliceSum(_box_of(images), padding)
    transfers = transfer_functions(len(images), total.side, pixel_size_angstrom, ctfs, doses, scales)
    total.add(images, projections, transfers=transfers, premultiplied=premultiplied, rotation=rotation, shift=shift)
    return total.divide(wiener)


def reconstruct_particle(
    particle: TiltImageParticle,
    stack: NDArray[np.floating[Any]],
    *,
    wiener: float = WIENER,
    padding: int = 2,
    aligned: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`reconstruct` for a particle of an exported set and its stack of images.

    `aligned` puts it into the reference's frame, turned by its pose and moved to its centre; otherwise the box lies as
    cut from the tomogram around the position that the images are centred on.

    Raises InvalidArgument where the stack does not fit the particle, or there is no pose to align by.
    """
    total = SliceSum(particle.box, padding)
    total.add_particle(particle, stack, aligned=aligned)
    return total.divide(wiener)


def half_maps(
    particles: Sequence[TiltImageParticle],
    read_stack: Callable[[TiltImageParticle], NDArray[np.floating[Any]]],
    *,
    wiener: float = WIENER,
    padding: int = 2,
    progress: Progress = no_progress,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Averages `[z, y, x]` of aligned particles: of one half, of the other, of all.

    The halves are those of the set (rlnRandomSubset) where each particle states its own, and every second particle
    otherwise. Memory is two sums' (see `SliceSum`) and one stack's.

    Raises InvalidArgument where boxes or pixel sizes differ, a half is empty, or a particle has no pose.
    """
    kinds = {(item.box, item.pixel_size_angstrom) for item in particles}
    if len(kinds) != 1:
        raise InvalidArgument(f"an average needs particles of one box and pixel size, these have {sorted(kinds)}")
    stated = [item.half for item in particles]
    halves = stated if all(stated) else [1 + index % 2 for index in range(len(particles))]
    if set(halves) != {1, 2}:
        raise InvalidArgument("half maps need particles in both halves (rlnRandomSubset 1 and 2)")
    first, second = (SliceSum(particles[0].box, padding) for _ in range(2))
    for index, (item, half) in enumerate(zip(particles, halves, strict=True)):
        (first if half == 1 else second).add_particle(item, read_stack(item), aligned=True)
        progress((index + 1) / len(particles), "averaging", particles=float(index + 1))
    maps = first.divide(wiener)[0], second.divide(wiener)[0]
    first.merge(second)
    return *maps, first.divide(wiener)[0]


def transfer_functions(
    count: int,
    side: int,
    pixel_size_angstrom: float,
    ctfs: Sequence[Ctf] | None = None,
    doses: NDArray[np.floating[Any]] | None = None,
    scales: NDArray[np.floating[Any]] | None = None,
) -> NDArray[np.float32] | None:
    """What each of `count` images was seen through: CTF * scale * exp(-dose / (2 Ne(k))), (count, side, side // 2 + 1).

    `side` is that of the padded images (`SliceSum.side`). None where neither of the three is given.

    Raises InvalidArgument where one has another count or the pixel size is not positive.
    """
    for name, values in (("ctfs", ctfs), ("doses", doses), ("scales", scales)):
        if values is not None and len(values) != count:
            raise InvalidArgument(f"{len(values)} {name} for {count} images")
    if ctfs is None and doses is None and scales is None:
        return None
    frequency, _ = image_frequencies((side, side), pixel_size_angstrom)
    transfers = np.ones((count, *frequency.shape), np.float32)
    for index, transfer in enumerate(transfers):
        voltage = 300.0
        if ctfs is not None:
            voltage = ctfs[index].voltage_kv
            transfer *= ctf_grid(ctfs[index], (side, side), pixel_size_angstrom)
        if doses is not None:
            transfer *= remaining_amplitude(frequency, float(doses[index]), voltage_kv=voltage)
        if scales is not None:
            transfer *= float(scales[index])
    return transfers


def _box_of(images: NDArray[np.floating[Any]]) -> int:
    if images.ndim != 3 or images.shape[1] != images.shape[2] or len(images) == 0:
        raise InvalidArgument(f"images have shape {images.shape}, expected (n, box, box) with n from 1")
    return int(images.shape[1])


def memory_bytes(box: int, padding: int = 2, sums: int = 1) -> int:
    """The peak memory of so many sums (`half_maps` holds 2), of which one is divided."""
    return (6 * sums + 21) * (padding * box) ** 3


class SliceSum:
    """Sums of central slices, of one particle or of many: add them, merge such sums, divide once.

    Memory: 6 bytes times (padding box)^3, and 20 more while dividing (`memory_bytes`).
    """

    def __init__(self, box: int, padding: int = 2) -> None:
        if box < MIN_BOX:
            raise InvalidArgument(f"images of {box} x {box} pixels: they must have at least {MIN_BOX} on a side")
        if padding < 1 or padding * box % 2:
            raise InvalidArgument(f"padding {padding} of a box of {box}: it must be at least 1, their product even")
        self.box, self.padding = box, padding
        self.side = side = padding * box
        self.numerator = np.zeros((side, side, side // 2 + 1), np.complex64)
        self.weight = np.zeros((side, side, side // 2 + 1), np.float32)

    def add(
        self,
        images: NDArray[np.floating[Any]],
        projections: NDArray[np.floating[Any]],
        *,
        transfers: NDArray[np.float32] | None = None,
        premultiplied: bool = False,
        rotation: Rotation | None = None,
        shift: NDArray[np.floating[Any]] | None = None,
    ) -> None:
        """Add the images of one particle.

        Args:
            images: (n, box, box); their background should have a mean of 0, as the corners that it does not reach
                count as 0.
            projections: (n, 3, 3), from the tomogram's axes onto each image's.
            transfers: (n, side, side // 2 + 1), on the half FFT grid of images padded to `side` (see
                `transfer_functions`); 1 where left out.
            premultiplied: the images were multiplied by `transfers` already.
            rotation: takes the reference onto the particle: with it the sum is in the reference's frame; without, in
                the tomogram's.
            shift: (x, y, z) in pixels, in the tomogram's frame: where the particle lies beside the centre that the
                images were cut around. It is moved to the centre.

        Raises:
            InvalidArgument: shapes don't match, a projection is no rotation, or a value is not finite.
        """
        matrices = self._checked(images, projections, transfers)
        offsets = np.zeros((len(images), 2))
        if shift is not None:
            offset = np.asarray(shift, np.float64)
            if offset.shape != (3,) or not np.isfinite(offset).all():
                raise InvalidArgument("the shift must be three finite numbers of pixels (x, y, z)")
            offsets = (matrices @ offset)[:, :2]
        if rotation is not None:
            matrices = matrices @ rotation.as_matrix()
        ky, kx = np.fft.fftfreq(self.side)[:, None], np.fft.rfftfreq(self.side)[None, :]
        before = self.side // 2 - self.box // 2
        padded = np.zeros((self.side, self.side), np.float32)
        for index, (image, matrix, (u, v)) in enumerate(zip(images, matrices, offsets, strict=True)):
            padded[before : before + self.box, before : before + self.box] = image
            spectrum = scipy.fft.rfft2(scipy.fft.ifftshift(padded)).astype(np.complex64, copy=False)
            if u or v:
                spectrum = (spectrum * np.exp(2j * np.pi * (kx * u + ky * v))).astype(np.complex64)
            transfer = np.ones(spectrum.shape, np.float32) if transfers is None else transfers[index]
            if not premultiplied:
                spectrum = spectrum * transfer
            _insert(
                np.ascontiguousarray(spectrum),
                np.ascontiguousarray(transfer * transfer, np.float32),
                np.ascontiguousarray(matrix),
                self.numerator,
                self.weight,
            )

    def add_particle(
        self, particle: TiltImageParticle, stack: NDArray[np.floating[Any]], *, aligned: bool = True
    ) -> None:
        """Add a particle of an exported set, given its stack; see `reconstruct_particle`."""
        if aligned and particle.rotation is None:
            raise InvalidArgument(f"particle {particle.name} has no pose (rlnAngleRot, rlnAngleTilt, rlnAnglePsi)")
        images = particle.images(stack)
        self.add(
            images,
            particle.projections,
            transfers=transfer_functions(
                len(images), self.side, particle.pixel_size_angstrom, particle.ctfs, particle.doses, particle.scales
            ),
            premultiplied=particle.premultiplied,
            rotation=particle.rotation if aligned else None,
            shift=particle.shift_angstrom / particle.pixel_size_angstrom if aligned else None,
        )

    def _checked(
        self,
        images: NDArray[np.floating[Any]],
        projections: NDArray[np.floating[Any]],
        transfers: NDArray[np.float32] | None,
    ) -> NDArray[np.float64]:
        if images.ndim != 3 or images.shape[1:] != (self.box, self.box):
            raise InvalidArgument(f"images have shape {images.shape}, expected (n, {self.box}, {self.box})")
        matrices = np.asarray(projections, np.float64)
        if matrices.shape != (len(images), 3, 3):
            raise InvalidArgument(f"projections have shape {matrices.shape}, expected ({len(images)}, 3, 3)")
        if not np.isfinite(images).all():
            bad = int(np.argmin(np.isfinite(images).all(axis=(1, 2))))
            raise InvalidArgument(f"image {bad} holds values that are not finite numbers")
        # a matrix of another determinant would scale the particle, one of -1 mirror it
        deviation = np.abs(matrices @ matrices.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2), initial=0)
        wrong = ~(deviation < 0.05) | ~(np.linalg.det(matrices) > 0)
        if wrong.any():
            raise InvalidArgument(f"projection {int(np.argmax(wrong))} is not a rotation matrix")
        expected = (len(images), self.side, self.side // 2 + 1)
        if transfers is not None and transfers.shape != expected:
            raise InvalidArgument(f"transfers have shape {transfers.shape}, expected {expected}")
        return matrices

    def merge(self, other: SliceSum) -> None:
        """Add another sum of the same box and padding to this one."""
        if (other.box, other.padding) != (self.box, self.padding):
            raise InvalidArgument(
                f"a sum of box {other.box} and padding {other.padding} can't join one of {self.box} and {self.padding}"
            )
        self.numerator += other.numerator
        self.weight += other.weight

    def divide(self, wiener: float = WIENER) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The density `[z, y, x]` of side `box`, and the sampling: sum(T^2) on its half FFT grid (z, y, x // 2 + 1).

        `wiener` is the noise-to-signal ratio of the Wiener division as a fraction of the weight's mean over each shell
        of Fourier space, so that it needs no scale; what was never sampled stays 0. The density has the unit of the
        images over voxels: sums along the beam give back the values summed.

        Raises InvalidArgument where `wiener` is negative or not finite.
        """
        if not (np.isfinite(wiener) and wiener >= 0):
            raise InvalidArgument(f"wiener is {wiener:g}: it must be a number from 0")
        shells = shell_index(self.side)
        count = np.bincount(shells.ravel())
        mean = np.bincount(shells.ravel(), self.weight.ravel()) / np.maximum(count, 1)
        # the smallest floor keeps voxels that a slice only grazed, at weights of rounding, from blowing up
        floor = np.maximum(wiener * mean[shells], 1e-3 * mean[shells]).astype(np.float32)
        total = self.weight + floor
        spectrum = np.divide(self.numerator, total, out=np.zeros_like(self.numerator), where=total > 0)
        padded = scipy.fft.fftshift(fourier.inverse(spectrum, (self.side,) * 3, overwrite=True))
        before = self.side // 2 - self.box // 2
        inner = slice(before, before + self.box)
        distance = (np.arange(self.box) - self.box // 2) / self.side
        kernel = (np.sinc(distance) ** 2).astype(np.float32)
        volume = padded[inner, inner, inner] / (kernel[:, None, None] * kernel[None, :, None] * kernel[None, None, :])
        return np.ascontiguousarray(volume, np.float32), self._sampling()

    def _sampling(self) -> NDArray[np.float32]:
        """The weight at the frequencies of the unpadded box."""
        full = np.rint(np.fft.fftfreq(self.box) * self.side).astype(int)
        half = np.arange(self.box // 2 + 1) * self.padding
        return np.ascontiguousarray(self.weight[np.ix_(full, full, half)])


@compiled
def _insert(
    spectrum: NDArray[np.complex64],
    squared: NDArray[np.float32],
    matrix: NDArray[np.float64],
    numerator: NDArray[np.complex64],
    weight: NDArray[np.float32],
) -> None:  # pragma: no cover - compiled
    """Lay one half spectrum `[v, u]` as a slice into the half space `[z, y, x]`, both of the same side, trilinearly.

    What falls on x < 0 is laid down as its Friedel mate. The plane x = 0 is its own mate, so that what reaches it from
    above reaches its mirror image too.
    """
    side = spectrum.shape[0]
    limit = (side // 2 - 1) ** 2
    for row in range(side):
        v = row if row < side // 2 else row - side
        for u in range(spectrum.shape[1]):
            # u = 0 holds each component and its mate: one of them is enough
            if u * u + v * v > limit or (u == 0 and v < 0):
                continue
            x = matrix[0, 0] * u + matrix[1, 0] * v
            y = matrix[0, 1] * u + matrix[1, 1] * v
            z = matrix[0, 2] * u + matrix[1, 2] * v
            value = spectrum[row, u]
            if x < 0:
                x, y, z = -x, -y, -z
                value = np.conj(value)
            x0, y0, z0 = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
            for i in range(2):
                share_z = z - z0 if i else 1 - (z - z0)
                for j in range(2):
                    share_y = share_z * (y - y0 if j else 1 - (y - y0))
                    for k in range(2):
                        share = np.float32(share_y * (x - x0 if k else 1 - (x - x0)))
                        a, b, c = (z0 + i) % side, (y0 + j) % side, x0 + k
                        if c >= numerator.shape[2]:
                            continue
                        numerator[a, b, c] += share * value
                        weight[a, b, c] += share * squared[row, u]
                        if c == 0:
                            a, b = (-z0 - i) % side, (-y0 - j) % side
                            numerator[a, b, 0] += share * np.conj(value)
                            weight[a, b, 0] += share * squared[row, u]
