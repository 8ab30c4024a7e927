"""Subtomograms from tilt images: exact central slices come back, real particles average, in the right hand."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from benchmarks.ribosomes import molecular_mask, randomised
from cryofleet.errors import InvalidArgument
from cryofleet.formats.euler import from_euler
from cryofleet.formats.relion_tilt_images import read_tilt_images
from cryofleet.formats.star_tables import parse_star
from cryofleet.numerics import fourier, masks
from cryofleet.numerics.ctf import Ctf, ctf_grid
from cryofleet.numerics.fsc import fsc, resolution
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.radiation import remaining_amplitude
from services.simulation.density import build
from services.simulation.particle_images import (
    WIENER,
    SliceSum,
    half_maps,
    memory_bytes,
    reconstruct,
    reconstruct_particle,
)
from services.simulation.projection import project

BOX = 24
PIXEL = 8.0
TILT_DEGREES = np.arange(-60.0, 61.0, 3.0)
TILTS = Rotation.from_euler("y", TILT_DEGREES[:, None], degrees=True)


def particle(seed: int = 0) -> NDArray[np.float32]:
    """A lopsided blob without symmetry, band-limited, zero at the box's faces."""
    noise = np.random.default_rng(seed).normal(size=(BOX, BOX, BOX)).astype(np.float32)
    return fourier.gaussian(noise, 1.2) * masks.soft_sphere(BOX, 7, 3)


def slices(volume: NDArray[np.float32], projections: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Central slices by the sum over all voxels, (n, v, u // 2 + 1), phases counted from the boxes' middles."""
    box = volume.shape[0]
    z, y, x = np.nonzero(volume)
    positions = np.stack([x, y, z], axis=1) - box // 2
    v, u = np.fft.fftfreq(box)[:, None], np.fft.rfftfreq(box)[None, :]
    plane = np.stack([(u + 0 * v).ravel(), (v + 0 * u).ravel()], axis=1)
    # the real transform of an even side has no sine at Nyquist: left out
    plane_inside = (np.abs(plane) < 0.5).all(axis=1)
    found = [
        np.where(plane_inside, np.exp(-2j * np.pi * (plane @ matrix[:2]) @ positions.T) @ volume[z, y, x], 0)
        for matrix in projections
    ]
    return np.reshape(found, (len(projections), box, box // 2 + 1))


@functools.cache
def tilt_slices() -> NDArray[np.complex128]:
    return slices(particle(), TILTS.as_matrix())


def images_of(spectra: NDArray[np.complex128]) -> NDArray[np.float32]:
    box = spectra.shape[1]
    return np.fft.fftshift(np.fft.irfft2(spectra, (box, box)), axes=(1, 2)).astype(np.float32)


def correlation(first: NDArray[np.float32], second: NDArray[np.float32], sampling: NDArray[np.float32]) -> float:
    """Over the frequencies that were sampled, up to 0.9 of Nyquist, the mean left out."""
    a, b = fourier.forward(first), fourier.forward(second)
    inside = (sampling > 0.05 * sampling.max()) & (fourier.radial_frequency(first.shape) < 0.45)
    inside[0, 0, 0] = False
    cross = np.sum((a * b.conj()).real[inside])
    return float(cross / np.sqrt(np.sum(np.abs(a[inside]) ** 2) * np.sum(np.abs(b[inside]) ** 2)))


def test_slices_in_all_directions_give_the_volume_back_with_its_scale() -> None:
    volume = particle()
    projections = Rotation.random(50, rng=np.random.default_rng(1)).as_matrix()
    box, sampling = reconstruct(images_of(slices(volume, projections)), projections, PIXEL, wiener=0.01)
    assert sampling.shape == (BOX, BOX, BOX // 2 + 1)
    assert np.corrcoef(box.ravel(), volume.ravel())[0, 1] > 0.995
    assert float((box * volume).sum() / (volume * volume).sum()) == pytest.approx(1, abs=0.03)
    mirror = np.roll(volume[::-1], 1, axis=0)
    assert np.corrcoef(box.ravel(), mirror.ravel())[0, 1] < 0.5


def test_a_tilt_series_gives_back_what_it_sampled_and_no_more() -> None:
    volume = particle()
    projections = TILTS.as_matrix()
    box, sampling = reconstruct(images_of(tilt_slices()), projections, PIXEL, wiener=0.01)
    assert correlation(box, volume, sampling) > 0.97
    # the tilt axis is y and the beam z: the wedge around kz is empty, beyond +-60 degrees by more than the kernel
    kz, ky, kx = fourier.axis_frequencies(volume.shape)
    angle = np.degrees(np.arctan2(np.abs(kz + 0 * kx), np.abs(kx)))
    angle = np.broadcast_to(angle, sampling.shape)
    radius = np.broadcast_to(np.hypot(kz, kx), sampling.shape)
    assert (sampling[(angle > 70) & (radius > 0.2)] == 0).all()
    inside = (angle < 58) & (radius > 0.1) & (radius < 0.15) & (np.abs(np.broadcast_to(ky, sampling.shape)) < 0.3)
    assert (sampling[inside] > 0).all()


def test_a_tilt_series_projected_in_real_space_is_the_same() -> None:
    """The tilt by theta is R_y(theta): what `projection` projects with its angles comes back with these matrices."""
    volume = particle()
    box, sampling = reconstruct(project(volume, TILT_DEGREES), TILTS.as_matrix(), PIXEL, wiener=0.01)
    assert correlation(box, volume, sampling) > 0.97


@pytest.mark.parametrize("premultiplied", [False, True])
def test_ctf_dose_and_thickness_are_undone(premultiplied: bool) -> None:
    volume = particle()
    projections = TILTS.as_matrix()
    count = len(projections)
    ctfs = [Ctf(defocus_um=2.0 + 0.02 * i, astigmatism_um=0.2, astigmatism_angle_degrees=30) for i in range(count)]
    doses, scales = np.linspace(0, 100, count), np.cos(np.radians(TILT_DEGREES))
    seen = tilt_slices().copy()
    frequency = fourier.radial_frequency((1, BOX, BOX), PIXEL)[0]
    for index, ctf in enumerate(ctfs):
        transfer = ctf_grid(ctf, (BOX, BOX), PIXEL) * scales[index] * remaining_amplitude(frequency, doses[index])
        seen[index] *= transfer**2 if premultiplied else transfer
    images = images_of(seen)
    box, sampling = reconstruct(
        images, projections, PIXEL, ctfs, premultiplied=premultiplied, doses=doses, scales=scales, wiener=0.01
    )
    assert correlation(box, volume, sampling) > 0.95
    plain, _ = reconstruct(images, projections, PIXEL, wiener=0.01)
    assert correlation(plain, volume, sampling) < correlation(box, volume, sampling) - 0.05
    # weights and images go together: the other reading of the same images is wrong
    other, _ = reconstruct(
        images, projections, PIXEL, ctfs, premultiplied=not premultiplied, doses=doses, scales=scales, wiener=0.01
    )
    assert correlation(other, volume, sampling) < correlation(box, volume, sampling) - 0.02


def test_noise_is_weighed_as_wiener_does() -> None:
    """At one part signal in a hundred of noise, more regularisation brings the estimate nearer the truth."""
    volume = particle()
    projections = TILTS.as_matrix()
    images = images_of(tilt_slices())
    images += np.random.default_rng(2).normal(0, 10 * images.std(), images.shape).astype(np.float32)
    errors = [
        float(np.linalg.norm(reconstruct(images, projections, PIXEL, wiener=wiener)[0] - volume))
        for wiener in (0.01, 1.0, 100.0)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_rotation_and_shift_bring_particles_into_the_references_frame() -> None:
    """A particle turned and moved in its tomogram, seen by a tilt series, comes back as the reference."""
    reference = particle()
    rotation = Rotation.from_euler("zyx", [40, -25, 110], degrees=True)
    shift = np.array([1.7, -2.2, 0.6])
    projections = TILTS.as_matrix()
    spectra = slices(reference, projections @ rotation.as_matrix())
    v, u = np.fft.fftfreq(BOX)[:, None], np.fft.rfftfreq(BOX)[None, :]
    moved = (projections @ shift)[:, :2]
    spectra *= np.exp(-2j * np.pi * (u * moved[:, 0, None, None] + v * moved[:, 1, None, None]))
    images = images_of(spectra)
    box, sampling = reconstruct(images, projections, PIXEL, rotation=rotation, shift=shift, wiener=0.01)
    assert correlation(box, reference, sampling) > 0.95
    # without them the particle as it lies in the tomogram
    box, sampling = reconstruct(images, projections, PIXEL, wiener=0.01)
    assert correlation(box, transform_volume(reference, rotation, shift), sampling) > 0.9


def test_a_sum_of_sums_is_the_sum() -> None:
    projections = TILTS.as_matrix()
    images = images_of(tilt_slices())
    parts = [SliceSum(BOX), SliceSum(BOX)]
    parts[0].add(images[::2], projections[::2])
    parts[1].add(images[1::2], projections[1::2])
    parts[0].merge(parts[1])
    np.testing.assert_allclose(parts[0].divide()[0], reconstruct(images, projections, PIXEL)[0], atol=1e-5)
    with pytest.raises(InvalidArgument, match="can't join"):
        parts[0].merge(SliceSum(BOX + 2))


def test_memory_is_what_is_said() -> None:
    tracemalloc.start()
    total = SliceSum(48)
    total.divide()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.8 * memory_bytes(48) < peak < memory_bytes(48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((3, 8, 9), np.float32)}, "expected \\(n, box, box\\)"),
        ({"images": np.zeros((3, 4, 4), np.float32)}, "at least 8"),
        ({"images": np.full((3, 8, 8), np.nan, np.float32)}, "image 0 .* not finite"),
        ({"projections": np.zeros((3, 3, 3))}, "projection 0 is not a rotation"),
        ({"projections": np.array([np.eye(3), np.eye(3), -np.eye(3)])}, "projection 2 is not a rotation"),
        ({"projections": np.eye(3)[None]}, "expected \\(3, 3, 3\\)"),
        ({"ctfs": [Ctf(defocus_um=1.0)]}, "1 ctfs for 3 images"),
        ({"doses": np.array([0.0, -1.0, 0.0])}, "must not be negative"),
        ({"wiener": -1.0}, "wiener is -1"),
        ({"padding": 0}, "padding 0"),
        ({"shift": np.array([np.nan, 0, 0])}, "shift"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "images": np.zeros((3, 8, 8), np.float32),
        "projections": np.tile(np.eye(3), (3, 1, 1)),
        "pixel_size_angstrom": PIXEL,
    }
    with pytest.raises(InvalidArgument, match=message):
        reconstruct(**(arguments | change))


def test_poses_of_another_simulator(shared_data: Path) -> None:
    """720 images of a 50S subunit simulated by another program, with RELION angles, against the volume they were made
    from."""
    folder = shared_data / "sim" / "two_class_50s"
    name = "tomodrgn_10076_classE_32"
    table = parse_star((folder / f"{name}_sim.star").read_bytes(), "sim.star")[""]
    images = np.fromfile(folder / f"{name}_sim.mrcs", np.float32, offset=1024).reshape(-1, 32, 32)
    truth = np.fromfile(folder / f"{name}.mrc", np.float32, offset=1024).reshape(32, 32, 32)
    rotations = from_euler(np.stack([table.numbers(f"rlnAngle{a}") for a in ("Rot", "Tilt", "Psi")], axis=1), "relion")
    origins = np.stack([table.numbers(f"rlnOrigin{axis}") for axis in "XY"], axis=1)
    v, u = np.fft.fftfreq(32)[:, None], np.fft.rfftfreq(32)[None, :]
    phases = np.exp(-2j * np.pi * (u * origins[:, 0, None, None] + v * origins[:, 1, None, None]))
    centred = np.fft.irfft2(np.fft.rfft2(images) * phases, (32, 32)).astype(np.float32)
    ctfs = [
        Ctf(defocus_um=d * 1e-4, amplitude_contrast=0.1, phase_shift_degrees=90) for d in table.numbers("rlnDefocusU")
    ]
    box, _ = reconstruct(centred, rotations.as_matrix(), 13.1, ctfs, scales=table.numbers("rlnCtfScalefactor"))
    frequency, values = fsc(box, truth)
    assert resolution(frequency, values, 13.1, 0.5) < 60
    _, mirrored = fsc(box, np.roll(truth[::-1], 1, axis=0))
    assert (values[3:8] > mirrored[3:8] + 0.3).all()


# --- real particles ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ribosomes(shared_data: Path) -> Path:
    return shared_data / "real" / "ribosome_70s"


def averages(
    folder: Path, opposite_hand: bool = True, exchange: int = 0, wiener: float = WIENER
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Half maps and average of the 20 ribosomes at their deposited poses, or at that of the particle `exchange` on."""
    particles = read_tilt_images(
        (folder / "particles.star").read_bytes(),
        (folder / "tomograms.star").read_bytes(),
        opposite_hand=opposite_hand,
    )
    posed = [
        dataclasses.replace(item, rotation=particles[(index + exchange) % len(particles)].rotation)
        for index, item in enumerate(particles)
    ]
    return half_maps(posed, lambda item: mrcfile.read(folder / item.stack.split("/", 1)[1]), wiener=wiener)


def test_real_ribosomes_average_at_their_deposited_poses(ribosomes: Path) -> None:
    """Half maps of 10 ribosomes each, in a soft sphere of 120 Å (36 Å of edge) made without the truth.

    Measured: FSC 0.5 at 92 Å and 0.143 at 49 Å.
    """
    first, second, _ = averages(ribosomes)
    mask = masks.soft_sphere(32, 10, 3)
    frequency, values = fsc(first, second, mask)
    assert resolution(frequency, values, 12.0, 0.5) < 95
    assert resolution(frequency, values, 12.0, 0.143) < 50
    # the poses do it: with those of other particles a ball alone is left
    exchanged = averages(ribosomes, exchange=7)
    assert values[4:9].mean() > fsc(exchanged[0], exchanged[1], mask)[1][4:9].mean() + 0.1


def test_half_maps_of_real_ribosomes_agree_to_fifty_angstrom(ribosomes: Path) -> None:
    """In a soft mask of their own average at the ribosome's volume; measured: 0.5 at 48 Å, where maps whose phases are
    noise beyond 80 Å fall to 0.5 at 71 Å, which is the mask's doing."""
    first, second, average = averages(ribosomes, wiener=10.0)
    mask = molecular_mask(average, 12.0)
    assert resolution(*fsc(first, second, mask), 12.0, 0.5) < 50
    rng = np.random.default_rng(0)
    noise = [randomised(half, 12.0 / 80, rng) for half in (first, second)]
    assert resolution(*fsc(noise[0], noise[1], mask), 12.0, 0.5) > 60


def test_one_real_particle_as_cut_and_as_aligned(ribosomes: Path) -> None:
    particles = read_tilt_images(
        (ribosomes / "particles.star").read_bytes(), (ribosomes / "tomograms.star").read_bytes()
    )
    item = particles[0]
    stack = mrcfile.read(ribosomes / item.stack.split("/", 1)[1])
    lying, sampling = reconstruct_particle(item, stack)
    aligned, _ = reconstruct_particle(item, stack, aligned=True)
    assert item.rotation is not None
    turned = transform_volume(aligned, item.rotation)
    ball = masks.soft_sphere(32, 10, 3)
    low = [fourier.low_pass(box, 60.0, 12.0) * ball for box in (lying, turned)]
    assert np.corrcoef(low[0].ravel(), low[1].ravel())[0, 1] > 0.9
    assert sampling.shape == (32, 32, 17)
    with pytest.raises(InvalidArgument, match="Unt_050/1 has no pose"):
        reconstruct_particle(dataclasses.replace(item, rotation=None), stack, aligned=True)
    with pytest.raises(InvalidArgument, match="one box and pixel size"):
        half_maps([item, dataclasses.replace(item, box=16)], lambda _: stack)
    with pytest.raises(InvalidArgument, match="both halves"):
        half_maps([dataclasses.replace(item, half=2)] * 2, lambda _: stack)


#: The orientations of 7P6Z in which it fits the average best, by exhaustive search at 12 degrees and refinement, for
#: the average in either hand: quaternions (x, y, z, w).
BEST_FIT = {
    True: np.array([-0.70551299, -0.67135625, 0.13619103, -0.18161556]),
    False: np.array([-0.22545254, -0.06795075, -0.74537191, 0.62367825]),
}


def test_the_hand_of_the_real_set_is_the_opposite_one(shared_data: Path, ribosomes: Path) -> None:
    """Each hand of the average at its best fit with the structure of the same ribosome (7P6Z).

    Half maps can't tell: they agree alike in both.
    """
    packed = (shared_data / "structures" / "7p6z.cif.gz").read_bytes()
    model = build("70S", gzip.decompress(packed), "7p6z.cif", 12.0, 30.0)
    scores = {}
    for opposite, quaternion in BEST_FIT.items():
        _, _, average = averages(ribosomes, opposite)
        turned = model.rotated(Rotation.from_quat(quaternion), np.zeros(3))
        truth = np.zeros((64, 64, 64), np.float32)
        z, y, x = (32 - side // 2 for side in turned.shape)
        truth[z : z + turned.shape[0], y : y + turned.shape[1], x : x + turned.shape[2]] = turned
        _, values = fsc(average, np.ascontiguousarray(truth[16:48, 16:48, 16:48]), masks.soft_sphere(32, 12, 3))
        scores[opposite] = values
    assert scores[True][4:10].mean() > 1.8 * scores[False][4:10].mean()
    # light protein: these images were inverted on export
    assert scores[True][2] > 0.8
