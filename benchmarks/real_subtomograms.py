"""Subtomograms of other people's making: two classes of 50S at given poses, and 20 real ribosomes against a structure:
python -m benchmarks.real_subtomograms.

Both come as tilt images with poses. They need the folder of real data beside the repository (`../shared/data`); a line
says so where it is not there.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mrcfile
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from benchmarks.crowded import DATA
from benchmarks.harness import Row, main
from benchmarks.subtomogram_sets import structure
from cryofleet.formats.euler import from_euler
from cryofleet.formats.relion_tilt_images import TiltImageParticle, read_tilt_images
from cryofleet.formats.star_tables import parse_star
from cryofleet.numerics import fourier
from cryofleet.numerics.ctf import Ctf
from cryofleet.numerics.fsc import fsc, resolution, shell_index
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.masks import soft_sphere
from cryofleet.numerics.rotations import angular_distance_degrees, frame_between, rotation_grid, uniform_random
from cryofleet.numerics.spectra import SpectrumTable
from services.alignment.align import Poses, Search, align, search_exhaustively
from services.alignment.average import average
from services.alignment.band import Band
from services.alignment.classify import classify
from services.alignment.clustering import adjusted_rand_index, cluster
from services.alignment.dimension_reduction import weighted_pca
from services.simulation.particle_images import SliceSum, transfer_functions
from services.simulation.subtomograms import specimen

Volume = NDArray[np.float32]

BOX = 32
TILTS = 8
"""Of each particle: one class has 8 images a particle and the other 10, which would give it away."""
RADIUS_VOXELS = 11.0
"""Within it lies a 50S subunit at 13.1 Å, or a ribosome at 12 Å."""


def read_mrc(path: Path) -> NDArray[np.float32]:
    """A volume or a stack, also from a header that lacks what marks an MRC file."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        return np.asarray(mrcfile.read(path), np.float32)


def _part(boxes: NDArray[np.float32], first: int, count: int) -> NDArray[np.float32]:
    return boxes[first : first + count]


# Two classes of 50S

ROUNDS = 20
"""At most so many times are both volumes solved for and the particles sorted anew."""


@dataclass(frozen=True, eq=False)
class TiltImages:
    """Particles as tilt images: `images` (n, tilts, 32, 32) shifted so that the particle is in the middle, noise of
    deviation 1; `matrices` (n, tilts, 3, 3) from the reference's axes to each image's (u, v, beam); `transfers`
    (n, tilts, 32, 17), CTF and dose; `noise` (n,), the deviation that was divided out; `classes` (n,) index `truths`.
    """

    images: NDArray[np.float32]
    matrices: NDArray[np.float64]
    transfers: NDArray[np.float32]
    noise: NDArray[np.float64]
    classes: NDArray[np.int64]
    truths: tuple[Volume, Volume]
    pixel_size_angstrom: float

    def __len__(self) -> int:
        return len(self.images)

    def only(self, chosen: NDArray[np.bool_]) -> TiltImages:
        """Some of the particles."""
        kept = {name: getattr(self, name)[chosen] for name in ("images", "matrices", "transfers", "noise", "classes")}
        return replace(self, **kept)

    def spectra(self) -> NDArray[np.complex128]:
        """Transforms (n, tilts, 32, 17) about the images' middle."""
        return np.fft.rfft2(np.fft.ifftshift(self.images, axes=(2, 3)))


def half_plane() -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Frequencies (32, 17, 2) of an image's half spectrum, (u, v) in cycles per box, and one of each pair."""
    v, u = np.meshgrid(np.fft.fftfreq(BOX) * BOX, np.arange(BOX // 2 + 1.0), indexing="ij")
    return np.stack([u, v], axis=-1), (u > 0) | (v > 0)


def two_classes(share: int = 1) -> TiltImages:
    """The 50S set, of each class every particle or every `share`-th."""
    classes = [_one_class(name, share) for name in ("classD", "classE")]
    images, matrices, transfers, noise = (np.concatenate(pair) for pair in zip(*(c[:4] for c in classes), strict=True))
    labels = np.repeat([0, 1], [len(c[0]) for c in classes])
    return TiltImages(images, matrices, transfers, noise, labels, (classes[0][4], classes[1][4]), classes[0][5])


def _one_class(
    name: str, share: int
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float32], NDArray[np.float64], Volume, float]:
    folder, file = DATA / "sim" / "two_class_50s", f"tomodrgn_10076_{name}_32_sim"
    stack = read_mrc(folder / f"{file}.mrcs").astype(np.float64)
    (table,) = parse_star((folder / f"{file}.star").read_bytes(), f"{file}.star").values()
    groups = np.array(table.texts("rlnGroupName"))
    first = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])[::share]
    rows = first[:, None] + np.arange(TILTS)
    pixel = float(table.numbers("rlnDetectorPixelSize")[0])
    ctfs = [
        Ctf(defocus_um=defocus * 1e-4, cs_mm=2.7, amplitude_contrast=0.1, phase_shift_degrees=90)
        for defocus in table.numbers("rlnDefocusU").tolist()
    ]
    # the files state the dose as a B factor of -4 Å^2 for each e/Å^2
    doses, scales = -table.numbers("rlnCtfBfactor") / 4, table.numbers("rlnCtfScalefactor")
    transfers = transfer_functions(len(stack), BOX, pixel, ctfs, doses, scales)
    assert transfers is not None
    # each image is off by an origin of its own
    origins = np.stack([table.numbers("rlnOriginX"), table.numbers("rlnOriginY")], axis=1)
    frequency, single = half_plane()
    border = np.ones((BOX, BOX), np.bool_)
    border[3:-3, 3:-3] = False
    spectra = np.fft.rfft2(stack - stack[:, border].mean(axis=1)[:, None, None])
    spectra *= np.exp(-2j * np.pi / BOX * np.einsum("vuc,nc->nvu", frequency, origins))
    spectra = spectra[rows]
    radius = np.linalg.norm(frequency, axis=-1)
    outer = single & (radius >= 12.5) & (radius < 15.5)
    noise = np.sqrt((np.abs(spectra[..., outer]) ** 2).mean(axis=(1, 2))) / BOX
    images = (np.fft.irfft2(spectra, s=(BOX, BOX)) / noise[:, None, None, None]).astype(np.float32)
    angles = np.stack([table.numbers(f"rlnAngle{axis}") for axis in ("Rot", "Tilt", "Psi")], axis=1)
    matrices = from_euler(angles, "relion").as_matrix()
    truth = read_mrc(folder / f"tomodrgn_10076_{name}_32.mrc")
    return images, matrices[rows], transfers[rows], noise, truth, pixel


def slices(volume: Volume, data: TiltImages, k_max: float) -> NDArray[np.complex64]:
    """What the images (n, tilts, 32, 17) would be of a volume, up to so many cycles per box; 0 beyond."""
    frequency, _ = half_plane()
    inside = np.linalg.norm(frequency, axis=-1) <= k_max
    table = SpectrumTable(torch.from_numpy(volume[None]), k_max + 1)
    points = np.einsum("ntcx,pc->ntpx", data.matrices[:, :, :2], frequency[inside])
    result = np.zeros(data.transfers.shape, np.complex64)
    result[..., inside] = (
        table.sample(torch.from_numpy(points.astype(np.float32)).view(1, -1, 3))[0].numpy().reshape(*points.shape[:-1])
    )
    return result * data.transfers


def by_truth(data: TiltImages, k_max: float = 8.0) -> NDArray[np.int64]:
    """Each particle's likelier class where both volumes are known: what the data allow."""
    frequency, single = half_plane()
    radius = np.linalg.norm(frequency, axis=-1)
    band = single & (radius >= 1) & (radius <= k_max)
    seen = data.spectra()[..., band]
    models = [slices(truth - truth.mean(), data, k_max)[..., band] for truth in data.truths]
    middle = (models[0] + models[1]) / 2
    for k in range(1, int(k_max) + 1):
        # the volumes' scale is arbitrary, and their fall-off the simulation's own: one factor a shell for both
        shell = np.rint(radius[band]) == k
        scale = (
            np.vdot(middle[..., shell], seen[..., shell]).real / np.vdot(middle[..., shell], middle[..., shell]).real
        )
        for model in models:
            model[..., shell] *= scale
    misfits = [(np.abs(seen - model) ** 2).sum(axis=(1, 2)) for model in models]
    return np.asarray(np.argmin(misfits, axis=0), np.int64)


def sums(images: NDArray[np.float32], projections: NDArray[np.float64], transfers: NDArray[np.float32]) -> SliceSum:
    """Central slices of one particle, laid into its own box's half space without padding."""
    total = SliceSum(BOX, padding=1)
    total.add(images, projections, transfers=transfers)
    return total


def by_service(data: TiltImages, feature_cycles: float = 4.0) -> NDArray[np.int64]:
    """`classify` as it is, at the given poses: subtomograms and the one transfer function that it takes for all.

    A subtomogram is sum(T F) / sqrt(mean sum(T^2)) over its slices, whose noise is white where anything was imaged, and
    the transfer function the root of that mean.
    """
    # the tilt axis is the images' u; the first image is untilted
    untilted = data.matrices[:, 0]
    made = [
        sums(images, matrices @ matrices[0].T, transfers)
        for images, matrices, transfers in zip(data.images, data.matrices, data.transfers, strict=True)
    ]
    weight = np.mean([one.weight for one in made], axis=0)
    imaged = weight > 0.02 * weight.max()
    divisor = np.where(imaged, np.sqrt(np.maximum(weight, 1e-6)), np.inf)
    spectra = np.stack([one.numerator for one in made]) / divisor
    boxes = np.fft.fftshift(np.fft.irfftn(spectra, s=(BOX,) * 3, axes=(1, 2, 3)), axes=(1, 2, 3)).astype(np.float32)
    transfer = np.where(imaged, np.sqrt(weight / weight.max()), 0).astype(np.float32)
    poses = Poses(Rotation.from_matrix(untilted), np.zeros((len(data), 3)), np.ones(len(data)))
    search = Search(BOX, data.pixel_size_angstrom, transfer)
    found = classify(
        partial(_part, boxes),
        len(data),
        poses,
        search,
        classes=2,
        iterations=1,
        components=2,
        feature_cycles=feature_cycles,
    )
    return found.labels


def by_weighted_pca(data: TiltImages, k_max: float = 5.0) -> NDArray[np.int64]:
    """One principal component, each particle with weights of its own, and two clusters along it.

    Values are sum(T D) / sum(T^2) over the slices of a particle in the reference's frame, D what is left of its images
    once the average of all is taken away, and the weights are sum(T^2).
    """
    total = SliceSum(BOX, padding=1)
    for images, matrices, transfers in zip(data.images, data.matrices, data.transfers, strict=True):
        total.add(images, matrices, transfers=transfers)
    mean = total.divide()[0] * soft_sphere(BOX, RADIUS_VOXELS, 3.0)
    spectra, models = data.spectra(), slices(mean, data, BOX / 2 - 1)
    frequency, single = half_plane()
    radius = np.linalg.norm(frequency, axis=-1)
    band = single & (radius >= 1) & (radius <= 6)
    scale = np.vdot(models[..., band], spectra[..., band]).real / np.vdot(models[..., band], models[..., band]).real
    left = np.fft.fftshift(np.fft.irfft2(spectra - scale * models, s=(BOX, BOX)), axes=(2, 3)).astype(np.float32)
    made = [sums(*one) for one in zip(left, data.matrices, data.transfers, strict=True)]
    index = Band(BOX, 1.0, k_max, None, "cpu").index.numpy()
    weights = np.stack([one.weight.ravel()[index] for one in made])
    weights[weights < 0.1] = 0
    values = np.stack([one.numerator.ravel()[index] for one in made]) / np.maximum(weights, 0.1) * (weights > 0)
    pca = weighted_pca(np.stack([values.real, values.imag], axis=1).astype(np.float32), weights, 1)
    return cluster(pca.scores, 2).labels


@dataclass(frozen=True, eq=False)
class TwoVolumes:
    """Two classes by evidence: `labels` (n,), `log_odds` (n,) of each particle being where it is, given the others;
    the volumes of both, up to 8 cycles per box; `evidence` over that of one class, nats; and how many of the
    restarts ended there.
    """

    labels: NDArray[np.int64]
    log_odds: NDArray[np.float64]
    volumes: tuple[Volume, Volume]
    evidence: float
    agreeing_restarts: float


def by_likelihood(data: TiltImages, k_max: float = 8.0, restarts: int = 20, seed: int = 0) -> TwoVolumes:
    """Two classes at the given poses, from the images alone.

    The classes are m + d and m - d, and y_i = A_i (m + s_i d) + noise, where A_i takes a volume to the particle's
    slices through its transfer functions: what was not imaged has no part in it. m and d are sums of smooth functions
    within a sphere, with normal priors whose widths are found by evidence. With r_i = A_i' (y_i - A_i m) and C the
    posterior covariance of d, which does not depend on who is in which class,

        log evidence(s) = 1/2 s' Q s - 1/2 log det(prior / C) ,    Q_ij = r_i' C r_j .

    So the odds of particle i, given all others, are exp(2 s_i sum_j Q_ij s_j) over j other than i: it never counts for
    itself. From random signs each particle goes where its odds are, until none moves; of all restarts and priors the
    best evidence is taken. It starts with the average of all for m, which is halfway between the classes where they are
    of one size; in the end m and d are solved for together, and the odds with them.
    """
    places, smooth = smooth_basis(RADIUS_VOXELS)
    frequency, single = half_plane()
    radius = np.linalg.norm(frequency, axis=-1)
    band = single & (radius >= 1) & (radius <= k_max)
    spectra = data.spectra()[..., band] * (np.sqrt(2) / BOX)
    size = smooth.shape[1]
    precision, slope = np.empty((len(data), size, size), np.float32), np.empty((len(data), size))
    for i in range(len(data)):
        points = np.einsum("tcx,pc->tpx", data.matrices[i, :, :2], frequency[band]).reshape(-1, 3)
        waves = np.exp(-2j * np.pi / BOX * (points @ places.T)) * (data.transfers[i][:, band].reshape(-1, 1) / BOX)
        shown = np.sqrt(2) * np.concatenate([waves.real, waves.imag]).astype(np.float32) @ smooth
        seen = spectra[i].ravel()
        precision[i] = shown.T @ shown
        slope[i] = shown.T @ np.concatenate([seen.real, seen.imag])
    power, turn = np.linalg.eigh(precision.sum(axis=0, dtype=np.float64))
    power = np.maximum(power, 0)

    def occam(prior: float) -> float:
        return 0.5 * float(np.log1p(prior * power).sum())

    # the average of all
    along = turn.T @ slope.sum(axis=0)
    scale = float(np.median(1 / power[power > 0]))
    priors = scale * 10.0 ** np.arange(-6, 6.1, 0.5)
    best = max(priors, key=lambda prior: 0.5 * float((along**2 * prior / (1 + prior * power)).sum()) - occam(prior))
    mean = turn @ (along * best / (1 + best * power))
    # what is left of each particle
    rest = (slope - precision @ mean) @ turn
    rng = np.random.default_rng(seed)
    starts = rng.choice([-1.0, 1.0], (restarts, len(data)))
    found: list[tuple[float, float, NDArray[np.float64]]] = []
    for prior in priors:
        together = (rest * (prior / (1 + prior * power))) @ rest.T
        for start in starts:
            signs = _settled(together, start, rng)
            found.append((0.5 * float(signs @ together @ signs) - occam(prior), float(prior), signs))
    evidence, prior, signs = max(found, key=lambda one: one[0])
    agreeing = np.mean([abs(one[2] @ signs) == len(data) for one in found if one[1] == prior])
    # where one class is larger, m is not the average of all: both are solved for together, until nothing moves
    eye = np.eye(size)
    for _ in range(ROUNDS):
        apart = np.einsum("i,ipq->pq", signs, precision)
        both = precision.sum(axis=0, dtype=np.float64)
        system = np.block([[both + eye / best, apart], [apart, both + eye / prior]])
        mean, difference = np.split(np.linalg.solve(system, np.r_[slope.sum(axis=0), signs @ slope]), 2)
        rest = (slope - precision @ mean) @ turn
        together = (rest * (prior / (1 + prior * power))) @ rest.T
        before, signs = signs, _settled(together, signs, rng)
        if (before == signs).all():
            break
    odds = 2 * signs * (together @ signs - np.diag(together) * signs)
    volumes = tuple(on_grid(places, smooth @ (mean + sign * difference)) for sign in (1, -1))
    # every way of sorting the particles was as likely as any other before
    evidence -= len(data) * np.log(2)
    return TwoVolumes((signs < 0).astype(np.int64), odds, (volumes[0], volumes[1]), evidence, float(agreeing))


def _settled(
    together: NDArray[np.float64], start: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Signs after each particle went where the others want it, one by one, until none moves."""
    signs = start.copy()
    others = together - np.diag(np.diag(together))
    moved = True
    while moved:
        moved = False
        for i in rng.permutation(len(signs)):
            # each move raises the evidence, so this ends
            if signs[i] * float(others[i] @ signs) < 0:
                signs[i] = -signs[i]
                moved = True
    return signs


COARSE = 16
"""Voxels to the box's side that hold 8 cycles."""


def smooth_basis(radius_voxels: float, width_voxels: float = 2.0) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Places (points, 3) x, y, z of a coarse grid within a sphere, in voxels from the middle, and functions (points,
    functions) on them, so that the sum of functions with independent normal weights has a covariance that falls off as
    a Gaussian of that width."""
    axis = (np.arange(COARSE) - COARSE // 2) * (BOX / COARSE)
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    places = np.stack([x, y, z], axis=-1).reshape(-1, 3)
    places = places[np.linalg.norm(places, axis=1) <= radius_voxels]
    apart = ((places[:, None] - places) ** 2).sum(axis=-1)
    variances, functions = np.linalg.eigh(np.exp(-apart / (2 * width_voxels**2)))
    kept = variances > 1e-3 * variances.max()
    # the transform of a box is the sum over its own voxels, each coarse one standing for several
    return places, (functions[:, kept] * np.sqrt(variances[kept]) * (BOX / COARSE) ** 3).astype(np.float32)


def on_grid(places: NDArray[np.float64], values: NDArray[np.float64]) -> Volume:
    """A volume of the box, from values at the coarse grid's places; band-limited."""
    coarse = np.zeros((COARSE,) * 3)
    x, y, z = np.rint(places / (BOX / COARSE)).astype(int).T + COARSE // 2
    coarse[z, y, x] = values
    spectrum = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(coarse)))
    edge = (BOX - COARSE) // 2
    return np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(np.pad(spectrum, edge))).real).astype(np.float32)


def f1(labels: NDArray[np.integer], classes: NDArray[np.integer]) -> float:
    """The mean F1 of both classes, the better way round of naming them."""
    ways = []
    for named in (labels, 1 - labels):
        right = [np.count_nonzero((named == k) & (classes == k)) for k in (0, 1)]
        ways.append(np.mean([2 * right[k] / np.count_nonzero(np.r_[named == k, classes == k]) for k in (0, 1)]))
    return float(max(ways))


def within_sphere(volume: Volume, k_max: float) -> Volume:
    """A volume up to so many cycles per box, within the particle's sphere, its mean there 0."""
    low = fourier.low_pass(volume, BOX / k_max, 1.0)
    mask = soft_sphere(BOX, RADIUS_VOXELS, 2.0)
    return ((low - np.average(low, weights=mask)) * mask).astype(np.float32)


def difference_correlation(found: TwoVolumes, data: TiltImages, k_max: float = 6.0) -> float:
    """Of the found classes' difference with that of the true volumes, within the sphere and up to so many cycles."""
    seen, true = (within_sphere(pair[0] - pair[1], k_max) for pair in (found.volumes, data.truths))
    return float(abs(np.corrcoef(seen.ravel(), true.ravel())[0, 1]))


def fifty_s(quick: bool) -> Iterator[Row]:
    data = two_classes(2 if quick else 1)
    case = f"two classes of 50S, {len(data) // 2} each, 8 tilts of -12 to 9"

    def rows(name: str, labels: NDArray[np.int64]) -> Iterator[Row]:
        yield Row(case, f"{name}_f1", f1(labels, data.classes), "", "higher")
        yield Row(case, f"{name}_adjusted_rand", adjusted_rand_index(labels, data.classes), "", "higher")

    yield from rows("noise_level_alone", cluster(data.noise[:, None], 2).labels)
    yield from rows("true_volumes", by_truth(data))
    yield from rows("service", by_service(data))
    yield from rows("own_weights", by_weighted_pca(data))
    found = by_likelihood(data, restarts=5 if quick else 20)
    yield from rows("likelihood", found.labels)
    yield Row(case, "restarts_that_agree", found.agreeing_restarts, "", "higher")
    yield Row(case, "evidence_for_two", found.evidence, "nats", "higher")
    alone = by_likelihood(data.only(data.classes == 0), restarts=5)
    yield Row(case, "evidence_for_two_in_one_class", alone.evidence, "nats", "lower", 0.0)
    yield Row(case, "least_log_odds", float(found.log_odds.min()), "nats", "higher")
    yield Row(case, "difference_correlation", difference_correlation(found, data), "", "higher")


# Ribosomes

PIXEL_ANGSTROM = 12.0
HIGH_PASS_ANGSTROM, LOW_PASS_ANGSTROM = 200.0, 45.0
MAX_SHIFT_VOXELS = 2.0
SPHERE = soft_sphere(BOX, RADIUS_VOXELS, 3.0)


@dataclass(frozen=True, eq=False)
class Ribosomes:
    """Real particles: subtomograms `boxes` (n, 32, 32, 32), protein positive, as cut from the tomogram and within a
    soft sphere, of noise that is white where anything was imaged; `transfers` (n, 32, 32, 17), the root of the sum of
    squared transfer functions of each; and `deposited`, their poses in the frame of the deposited average.
    """

    particles: tuple[TiltImageParticle, ...]
    stacks: tuple[NDArray[np.float32], ...]
    boxes: NDArray[np.float32]
    transfers: NDArray[np.float32]
    deposited: Poses

    def __len__(self) -> int:
        return len(self.particles)


def ribosomes(opposite_hand: bool = True) -> Ribosomes:
    """The 20 ribosomes; their images were recorded with the opposite hand."""
    folder = DATA / "real" / "ribosome_70s"
    particles = read_tilt_images(
        (folder / "particles.star").read_bytes(), (folder / "tomograms.star").read_bytes(), opposite_hand=opposite_hand
    )
    stacks = tuple(read_mrc(folder / particle.stack.split("/", 1)[1]) for particle in particles)
    boxes, transfers, rotations = [], [], []
    for particle, stack in zip(particles, stacks, strict=True):
        assert particle.rotation is not None
        total = SliceSum(BOX, padding=1)
        total.add_particle(particle, stack, aligned=False)
        imaged = total.weight > 0.01 * total.weight.max()
        spectrum = total.numerator / np.where(imaged, np.sqrt(np.maximum(total.weight, 1e-6)), np.inf)
        box = np.fft.fftshift(np.fft.irfftn(spectrum, s=(BOX,) * 3, axes=(0, 1, 2))) * soft_sphere(
            BOX, RADIUS_VOXELS + 1, 3.0
        )
        boxes.append(box.astype(np.float32))
        transfers.append(np.where(imaged, np.sqrt(total.weight / total.weight.max()), 0).astype(np.float32))
        rotations.append(particle.rotation)
    shifts = np.stack([particle.shift_angstrom for particle in particles]) / PIXEL_ANGSTROM
    deposited = Poses(Rotation.concatenate(rotations), shifts, np.ones(len(particles)))
    return Ribosomes(particles, stacks, np.stack(boxes), np.stack(transfers), deposited)


def ribosome_structure() -> Volume:
    """The M. pneumoniae 70S ribosome's density (7P6Z, from cells like these) at 12 Å voxels."""
    return specimen(structure("ribosome-70s", PIXEL_ANGSTROM)[0], Rotation.identity(), np.zeros(3), BOX)


def maps_at(data: Ribosomes, poses: Poses) -> tuple[Volume, Volume, Volume]:
    """Averages at given poses: of every second particle, of the others, of all."""
    halves = [SliceSum(BOX) for _ in range(2)]
    for i, (particle, stack) in enumerate(zip(data.particles, data.stacks, strict=True)):
        images = particle.images(stack)
        halves[i % 2].add(
            images,
            particle.projections,
            transfers=transfer_functions(
                len(images), halves[0].side, PIXEL_ANGSTROM, particle.ctfs, particle.doses, particle.scales
            ),
            premultiplied=particle.premultiplied,
            rotation=poses.rotations[i],
            shift=poses.shifts[i],
        )
    first, second = (half.divide(10.0)[0] for half in halves)
    halves[0].merge(halves[1])
    return first, second, halves[0].divide(10.0)[0]


def fitted(mean: Volume, reference: Volume) -> Poses:
    """The pose that takes a structure onto an average, and its correlation."""
    search = Search(
        BOX, PIXEL_ANGSTROM, None, LOW_PASS_ANGSTROM, HIGH_PASS_ANGSTROM, max_candidates=500, max_shift_voxels=4.0
    )
    return align(partial(_part, (mean * SPHERE)[None]), 1, reference, search)


def in_frame_of(fit: Poses, poses: Poses) -> Poses:
    """Poses of a structure, from those of an average that it was fitted to."""
    shifts = poses.shifts + poses.rotations.apply(fit.shifts[0])
    return Poses(poses.rotations * fit.rotations[0], shifts, poses.scores)


def searches(data: Ribosomes, max_angle_degrees: float | None = None) -> Iterator[Search]:
    """What each particle is compared in: its own transfer function, one band."""
    for transfer in data.transfers:
        yield Search(
            BOX,
            PIXEL_ANGSTROM,
            transfer,
            LOW_PASS_ANGSTROM,
            HIGH_PASS_ANGSTROM,
            max_shift_voxels=MAX_SHIFT_VOXELS,
            max_angle_degrees=max_angle_degrees,
        )


def joined(poses: list[Poses]) -> Poses:
    """Poses of single particles as one table."""
    return Poses(
        Rotation.concatenate([pose.rotations for pose in poses]),
        np.concatenate([pose.shifts for pose in poses]),
        np.concatenate([pose.scores for pose in poses]),
    )


def aligned(
    data: Ribosomes, reference: Volume, start: Poses | None = None, max_angle_degrees: float | None = None
) -> Poses:
    """Poses by `align`, searched everywhere or around others."""
    found = []
    for i, search in enumerate(searches(data, max_angle_degrees)):
        near = None if start is None else Poses(start.rotations[i : i + 1], start.shifts[i : i + 1], np.ones(1))
        box = data.boxes[i : i + 1]
        found.append(align(partial(_part, box), 1, reference, search, start=near))
    return joined(found)


def searched(data: Ribosomes, reference: Volume, rotations: list[Rotation]) -> Poses:
    """Of each particle, the best of its list of rotations, each with its best shift."""
    each = zip(data.boxes, searches(data), rotations, strict=True)
    return joined([search_exhaustively(box, reference, search, grid) for box, search, grid in each])


def simulated_alike(
    data: Ribosomes, reference: Volume, poses: Poses, rng: np.random.Generator, gain: float = 1.0
) -> Ribosomes:
    """The structure at given poses, seen through the same transfer functions, with the signal (times a gain) and the
    noise of each shell that the real particles have at these poses: what the method would find in them were they
    nothing else."""
    shells = shell_index(BOX)
    bins = int(shells.max()) + 1
    seen = np.fft.rfftn(np.fft.ifftshift(data.boxes, axes=(1, 2, 3)), axes=(1, 2, 3))
    turned = [
        transform_volume(reference, turn, shift) for turn, shift in zip(poses.rotations, poses.shifts, strict=True)
    ]
    models = np.fft.rfftn(np.fft.ifftshift(np.stack(turned), axes=(1, 2, 3)), axes=(1, 2, 3)) * data.transfers

    def by_shell(values: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.bincount(shells.ravel(), values.sum(axis=0).ravel(), bins).astype(np.float64)

    amplitude = by_shell((seen * models.conj()).real) / np.maximum(by_shell(np.abs(models) ** 2), 1e-30)
    amplitude = np.maximum(amplitude, 0)
    imaged = data.transfers > 0
    power = by_shell(np.abs(seen - amplitude[shells] * models) ** 2 * imaged) / np.maximum(by_shell(imaged * 1.0), 1)
    mask = soft_sphere(BOX, RADIUS_VOXELS + 1, 3.0)
    white = np.fft.rfftn(rng.standard_normal(data.boxes.shape), axes=(1, 2, 3)) / BOX**1.5
    noise = np.fft.irfftn(white * np.sqrt(power / np.mean(mask**2))[shells] * imaged, s=(BOX,) * 3, axes=(1, 2, 3))
    signal = np.fft.irfftn(gain * amplitude[shells] * models, s=(BOX,) * 3, axes=(1, 2, 3))
    boxes = np.fft.fftshift(signal, axes=(1, 2, 3)) + noise * mask
    return replace(data, boxes=boxes.astype(np.float32))


def seventy_s(quick: bool) -> Iterator[Row]:
    case = "20 real 70S ribosomes, 200 to 45 Å"
    data, reference = ribosomes(), ribosome_structure()
    first, second, mean = maps_at(data, data.deposited)
    fit = fitted(mean, reference)
    true = in_frame_of(fit, data.deposited)
    other = ribosomes(opposite_hand=False)
    yield Row(case, "fit_of_average_correlation", float(fit.scores[0]), "", "higher")
    mirrored = fitted(maps_at(other, other.deposited)[2], reference)
    yield Row(case, "fit_of_other_hand", float(mirrored.scores[0]), "", "lower")
    frequency, values = fsc(mean, transform_volume(reference, fit.rotations[0], fit.shifts[0]), SPHERE)
    yield Row(case, "structure_fsc_0.5", resolution(frequency, values, PIXEL_ANGSTROM, 0.5), "Å", "lower")
    frequency, values = fsc(first, second, SPHERE)
    yield Row(case, "deposited_fsc_0.5", resolution(frequency, values, PIXEL_ANGSTROM, 0.5), "Å", "lower")
    yield Row(case, "deposited_fsc_0.143", resolution(frequency, values, PIXEL_ANGSTROM), "Å", "lower")

    def compared(name: str, poses: Poses) -> Iterator[Row]:
        apart = angular_distance_degrees(true.rotations, poses.rotations)
        yield Row(case, f"{name}_median_degrees", float(np.median(apart)), "degrees", "lower")
        yield Row(case, f"{name}_within_20_degrees", float((apart <= 20).mean()), "", "higher")
        yield Row(case, f"{name}_mean_score", float(poses.scores.mean()), "", "higher")

    def half_maps_of(name: str, poses: Poses) -> Iterator[Row]:
        frequency, values = fsc(*maps_at(data, poses)[:2], SPHERE)
        yield Row(case, f"{name}_fsc_0.5", resolution(frequency, values, PIXEL_ANGSTROM, 0.5), "Å", "lower")

    found = aligned(data, reference)
    yield from compared("align", found)
    yield from half_maps_of("align", found)
    grid = rotation_grid(30.0 if quick else 12.0)
    every = searched(data, reference, [grid] * len(data))
    yield from compared("exhaustive", every)
    # what poses are worth: the deposited ones, and each particle at another's
    rng = np.random.default_rng(0)
    here = searched(data, reference, [true.rotations[i : i + 1] for i in range(len(data))])
    yield Row(case, "deposited_mean_score", float(here.scores.mean()), "", "higher")
    strangers = [true.rotations[np.delete(np.arange(len(data)), i)] for i in range(len(data))]
    scores = np.stack(
        [searched(data, reference, [own[k : k + 1] for own in strangers]).scores for k in range(3 if quick else 19)]
    )
    yield Row(case, "other_poses_mean_score", float(scores.mean()), "", "lower")
    margin = (here.scores - scores.mean(axis=0)) / scores.std(ddof=1)
    yield Row(case, "deposited_z_score", float(margin.mean()), "", "higher")
    yield Row(case, "deposited_best_of_all", float((here.scores >= every.scores).mean()), "", "higher")
    # were they nothing but the structure and noise, as strong as it is and thrice as strong
    for gain in (1.0, 3.0):
        apart = np.stack(
            [
                angular_distance_degrees(
                    true.rotations, aligned(simulated_alike(data, reference, true, rng, gain), reference).rotations
                )
                for _ in range(1 if quick else 3)
            ]
        )
        name = f"simulated_{gain:g}x"
        yield Row(case, f"{name}_median_degrees", float(np.median(apart)), "degrees", "lower")
        yield Row(case, f"{name}_within_20_degrees", float((apart <= 20).mean()), "", "higher")
    # from 20 degrees beside the deposited poses
    axes = uniform_random(len(data), rng).apply([0, 0, 1])
    near = Poses(Rotation.from_rotvec(np.radians(20) * axes) * true.rotations, true.shifts, true.scores)
    yield from compared("from_20_degrees", aligned(data, reference, near, 30.0))
    # no reference
    search = Search(
        BOX, PIXEL_ANGSTROM, data.transfers.mean(axis=0), LOW_PASS_ANGSTROM, HIGH_PASS_ANGSTROM, max_shift_voxels=2.0
    )
    own = average(partial(_part, data.boxes), len(data), search, iterations=3 if quick else 6).poses
    frame = frame_between(true.rotations, own.rotations)
    yield from compared("no_reference", Poses(own.rotations * frame, own.shifts, own.scores))
    yield from half_maps_of("no_reference", own)


def measure(quick: bool) -> Iterator[Row]:
    if not DATA.is_dir():
        print(f"no real data at {DATA}: the 50S classes and the ribosomes are left out", file=sys.stderr)
        return
    torch.set_num_threads(1)
    yield from fifty_s(quick)
    yield from seventy_s(quick)


if __name__ == "__main__":
    main("real_subtomograms", measure)
