"""Which point group an average has, as far as its half maps can tell.

For each candidate group the frame Q is found in which the average is most nearly symmetric (`symmetry_axes`). Then one
half is compared with the other one turned by each element g: in shell s, X_s(g) = <A_1, g A_2>_s beside
F_s = <A_1, A_2>_s, which is the half maps' FSC. Noise is independent between the halves, so the expected quotient is
the correlation of the signal itself with its turned copy, whatever the noise: 1 where g is a symmetry. Shells count by
what they know, their components times their FSC,

    q(g) = sum_s w_s X_s(g) / sum_s w_s F_s,    w_s = M_s F_s,

so that fine detail, where a ring's sevenfold differs from its fourteenfold, is not drowned by the blob.

The error follows from the same numbers: X_s - F_s of a true symmetry has the variance 2 (1 - F_s) / M_s, M_s being the
independent components of the shell under the mask. A group fits if its worst element falls short of 1 by no more than
sqrt(tolerance^2 + (3 errors)^2).
All its subgroups then fit as well, so the largest that fits is chosen. Two things would fit too well:

- what is round fits every group: the radial mean is removed, and where next to nothing is left, or what is left the
  halves do not agree on, no group is claimed;
- what is round about an axis fits every Cn and Dn of it: a group with a main axis is claimed only if half its step,
  pi / n, does not fit, and nothing is claimed where a larger group is ruled out by that alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import fsc, resolution, shell_counts, shell_index
from cryofleet.numerics.masks import radius_grid, soft_sphere, usual_edge_voxels
from cryofleet.numerics.rotations import point_group
from cryofleet.numerics.spectra import SpectrumTable, centred_irfft, centred_rfft
from cryofleet.progress import Progress, no_progress, part
from services.alignment.symmetry_axes import find_axes
from services.alignment.symmetry_frame import centre_of_mass

CANDIDATES = (*(f"{kind}{n}" for kind in "CD" for n in range(2, 15)), "T", "O", "I")
TOLERANCE = 0.07
"""Of the correlation of the signal with its turned copy, for what interpolation, a frame found to a quarter of a degree
and a wedge that was not quite filled take from it."""
ERRORS = 3.0
INTERPOLATED = 1e-3
"""Power of the strongest shell that interpolation leaves in the others: what is weaker than this counts for little."""
LARGEST_ERROR = 0.1
"""No claim where q is less well known: half a structure would pass for all of it."""
LEAST_AGREEMENT = 0.143
LEAST_SHARE = 2e-3
"""Of the power in the band that is not radial; a sphere on a grid of voxels has some 1e-4."""
_AXES_CYCLES = 6.0
_PASSES = ((2.0, 2), (1.0, 2), (0.5, 2), (0.25, 1))
"""Steps of the last search around the frame, in degrees, and how often each is tried."""


@dataclass(frozen=True)
class GroupFit:
    """How well one group fits: `correlation` is that of its worst element, 1 for a true symmetry; `mean_correlation`
    that of all but the identity; `half_step` that of the turn by pi / n about the main axis, NaN for T, O and I.
    `rotation` is the frame Q: a(Q r) has the group's axes where `point_group` has them; a pose R becomes R Q.
    """

    group: str
    order: int
    correlation: float
    mean_correlation: float
    half_step: float
    rotation: Rotation
    fits: bool


@dataclass(frozen=True)
class SymmetryDetection:
    """`chosen` is the group, C1 where none is claimed, with the reason in `remark`; `rotation` its frame. `fits` are
    all candidates, those that fit first, larger ones before smaller, then the others by their correlation; empty where
    nothing could be compared. `error` is one standard error of a correlation; `finest_angstrom` the band's limit.
    `centre_voxels` is the point (x, y, z), from the box's centre, that all frames turn about: the centre of mass.
    """

    chosen: str
    rotation: Rotation
    remark: str
    fits: tuple[GroupFit, ...]
    error: float
    threshold: float
    finest_angstrom: float
    centre_voxels: tuple[float, float, float] = (0.0, 0.0, 0.0)


def remove_radial_mean(volume: NDArray[np.float32]) -> NDArray[np.float32]:
    """A cubic volume less its mean over directions, a function of the radius that is linear between whole voxels."""
    radius = radius_grid(volume.shape[0]).astype(np.float64)
    low = np.floor(radius).astype(np.int64)
    above = radius - low
    nodes = int(low.max()) + 2
    # Least squares for hat functions: a tridiagonal system.
    diagonal = np.zeros(nodes)
    beside, right = np.zeros(nodes), np.zeros(nodes)
    np.add.at(diagonal, low, (1 - above) ** 2)
    np.add.at(diagonal, low + 1, above**2)
    np.add.at(beside, low, above * (1 - above))
    np.add.at(right, low, (1 - above) * volume)
    np.add.at(right, low + 1, above * volume)
    system = np.diag(diagonal + 1e-9) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
    profile = np.linalg.solve(system, right)
    return np.asarray(volume - (profile[low] * (1 - above) + profile[low + 1] * above), dtype=np.float32)


class _Comparison:
    """Two half maps, masked, without their radial mean, on the components of one band."""

    def __init__(self, first: NDArray[np.float32], second: NDArray[np.float32], k_max: float) -> None:
        n = first.shape[0]
        shell = shell_index(n)
        k, kx = np.fft.fftfreq(n) * n, np.fft.rfftfreq(n) * n
        z, y, x = np.meshgrid(k, k, kx, indexing="ij")
        last = min(math.floor(k_max), n // 2 - 1)
        half = (x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))
        chosen = half & (shell >= 1) & (shell <= last)
        self.shell = shell[chosen]
        self.count = last + 1
        self.points = torch.from_numpy(np.stack([x[chosen], y[chosen], z[chosen]], axis=1).astype(np.float32))
        reach = float(self.points.norm(dim=1).max())
        self._tables = [SpectrumTable(torch.from_numpy(v[None]), reach) for v in (first, second)]
        self._own = [self.turned(t, Rotation.identity(1))[0] for t in self._tables]
        self.power = np.sqrt(self.sums(np.abs(self._own[0]) ** 2) * self.sums(np.abs(self._own[1]) ** 2))
        cross = self.sums((self._own[0] * self._own[1].conj()).real)
        self.fsc = np.where(self.power > 0, cross / np.where(self.power > 0, self.power, 1.0), 0.0)
        self.fsc[0] = 0.0

    def turned(self, table: SpectrumTable, rotations: Rotation) -> NDArray[np.complex128]:
        matrices = torch.from_numpy(np.atleast_3d(rotations.as_matrix()).reshape(1, -1, 3, 3).astype(np.float32))
        return table.rotated(self.points, matrices)[0].numpy().astype(np.complex128)

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.bincount(self.shell, weights=values, minlength=self.count), dtype=np.float64)

    def weigh(self, components: NDArray[np.float64]) -> None:
        """Fix the weights of the shells, from their independent components."""
        each = self.power / np.maximum(components[: self.count], 1e-9)
        agreed = np.clip(self.fsc, 0, 1) * each / np.maximum(each + INTERPOLATED * each.max(), 1e-30)
        self.weight = components[: self.count] * agreed
        self.total = float((self.weight * np.clip(self.fsc, 0, 1)).sum())
        variance = 2 * (1 - agreed) / np.maximum(components[: self.count], 1e-9)
        self.error = math.sqrt(float((self.weight**2 * variance).sum())) / max(self.total, 1e-30)
        per_component = self.weight / np.where(self.power > 0, self.power, np.inf)
        self._factor = per_component[self.shell]

    def correlations(self, rotations: Rotation) -> NDArray[np.float64]:
        """q of each rotation, the mean of both halves turned against the other."""
        q = np.zeros(len(rotations))
        for own, table in ((self._own[0], self._tables[1]), (self._own[1], self._tables[0])):
            turned = self.turned(table, rotations)
            q += ((own.conj() * self._factor) * turned).real.sum(axis=1) / (2 * self.total)
        return q


def _conjugated(frame: Rotation, elements: Rotation) -> Rotation:
    return frame * elements * frame.inv()


def _refined(comparison: _Comparison, frame: Rotation, elements: Rotation) -> Rotation:
    """The frame nearby in which the group's elements correlate best on average."""
    around = np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3)])
    # Generators would do, but few elements are enough: the mean over them has its maximum where that over all has.
    few = elements[np.unique(np.linspace(0, len(elements) - 1, min(len(elements), 4)).astype(int))]
    for step, times in _PASSES:
        for _ in range(times):
            near = frame * Rotation.from_rotvec(np.radians(step) * around)
            scores = [float(comparison.correlations(_conjugated(q, few)).mean()) for q in near]
            best = int(np.argmax(scores))
            if best == 0:
                break
            frame = near[best]
    return frame


def detect_symmetry(
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    voxel_size_angstrom: float,
    *,
    candidates: Sequence[str] = CANDIDATES,
    low_pass_angstrom: float | None = None,
    tolerance: float = TOLERANCE,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> SymmetryDetection:
    """The point group of an average, from its half maps.

    Half maps that were averaged with a symmetry imposed have it: detect it on an average made in C1.

    Args:
        first: half map, cubic `[z, y, x]`, protein positive, the particle within the sphere that fits the box.
        second: the other one.
        voxel_size_angstrom: of both.
        candidates: names of groups as of `point_group`.
        low_pass_angstrom: finest detail that is compared; where left out, where the FSC in a soft sphere falls below
            0.143.
        tolerance: see `TOLERANCE`.
        device: of the search for axes.
        progress: told of each group.

    Raises InvalidArgument where the maps are not cubes of one size, constant or not finite, where there is no candidate
    or one is no group, or where the low-pass leaves fewer than two shells.
    """
    if first.ndim != 3 or len(set(first.shape)) != 1 or first.shape != second.shape:
        raise InvalidArgument(f"half maps must be two cubes of one size, not {first.shape} and {second.shape}")
    for name, volume in (("first", first), ("second", second)):
        if not np.isfinite(volume).all() or not float(volume.max()) > float(volume.min()):
            raise InvalidArgument(f"the {name} half map is constant or holds values that are not finite")
    if not candidates:
        raise InvalidArgument("candidates is empty: name at least one point group")
    groups = {name.upper(): point_group(name) for name in candidates}
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    n = first.shape[0]
    edge = usual_edge_voxels(n)
    mask = soft_sphere(n, n / 2 - edge, edge)
    if low_pass_angstrom is None:
        low_pass_angstrom = resolution(*fsc(first, second, mask), voxel_size_angstrom)
    k_max = min(n * voxel_size_angstrom / low_pass_angstrom, n / 2 - 1)
    finest = n * voxel_size_angstrom / k_max

    def nothing(remark: str, error: float = math.nan) -> SymmetryDetection:
        return SymmetryDetection("C1", Rotation.identity(), remark, (), error, math.nan, finest)

    if k_max < 2:
        return nothing(f"the half maps agree to {low_pass_angstrom:g} Å only, less than two shells of the box")
    centre = _centre_below((first + second) * np.float32(0.5), mask, k_max)
    whole = [_moved(v, centre, k_max) for v in (first, second)]
    maps = [remove_radial_mean(v) * mask for v in whole]
    share = _power_below(maps[0] + maps[1], k_max) / max(_power_below(whole[0] + whole[1], k_max), 1e-30)
    if share < LEAST_SHARE:
        return nothing(f"the average is round: {share:.1e} of its power is not radial")
    comparison = _Comparison(maps[0], maps[1], k_max)
    filled = float((mask.astype(np.float64) ** 2).sum()) ** 2 / (
        mask.size * float((mask.astype(np.float64) ** 4).sum())
    )
    components = shell_counts(n) * filled
    comparison.weigh(components)
    error = comparison.error
    agreed = float((components[: comparison.count] * comparison.fsc).sum() / components[: comparison.count].sum())
    if comparison.total <= 0 or error > LARGEST_ERROR:
        return nothing(
            f"the half maps agree too little without their radial mean, {agreed:.2f} on average: a correlation is "
            f"known to {error:.2f} only",
            error,
        )
    threshold = 1 - math.hypot(tolerance, ERRORS * error)
    average = centred_irfft(_whitened(maps, comparison, n), n).numpy()
    fits = []
    for i, (name, group) in enumerate(groups.items()):
        report = part(progress, i / len(groups), (i + 1) / len(groups))
        report(0.0, f"trying {name}")
        elements = group[1:]
        frame = find_axes(average, min(k_max, _AXES_CYCLES), group, device)
        frame = _refined(comparison, frame, elements)
        values = comparison.correlations(_conjugated(frame, elements))
        half_step = math.nan
        if name[0] in "CD":
            turn = Rotation.from_rotvec([[0, 0, np.pi / int(name[1:])]])
            half_step = float(comparison.correlations(_conjugated(frame, turn))[0])
        good = float(values.min()) >= threshold and not half_step >= threshold
        fits.append(GroupFit(name, len(group), float(values.min()), float(values.mean()), half_step, frame, good))
    fits.sort(key=lambda f: (not f.fits, -f.order if f.fits else 0, -f.correlation))
    round_about = [f for f in fits if f.correlation >= threshold and f.half_step >= threshold]
    best = fits[0] if fits and fits[0].fits else None
    if best is not None and all(f.order < best.order or _has_half_step(best.group, f.group) for f in round_about):
        return SymmetryDetection(
            best.group,
            best.rotation,
            "the largest group that fits",
            tuple(fits),
            error,
            threshold,
            finest,
            (float(centre[0]), float(centre[1]), float(centre[2])),
        )
    remark = "no group fits"
    if round_about:
        names = ", ".join(f.group for f in round_about)
        remark = f"{names} fit, and steps of half their size do too: round about an axis at {finest:.3g} Å"
    return SymmetryDetection("C1", Rotation.identity(), remark, tuple(fits), error, threshold, finest)


def _has_half_step(group: str, smaller: str) -> bool:
    """Whether the turns about the main axis of a Cn or Dn hold half the step of another's: C14 that of C7 and D7."""
    return group[0] in "CD" and smaller[0] in "CD" and int(group[1:]) % (2 * int(smaller[1:])) == 0


def _below(box_size: int, k_max: float) -> torch.Tensor:
    """1 on the components up to `k_max` cycles per box, in the layout of `rfftn`."""
    return torch.from_numpy((shell_index(box_size) <= k_max).astype(np.float32))


def _centre_below(average: NDArray[np.float32], mask: NDArray[np.float32], k_max: float) -> NDArray[np.float64]:
    """The centre of mass of an average cut to the band."""
    n = average.shape[0]
    smooth = centred_irfft(centred_rfft(torch.from_numpy(average)) * _below(n, k_max), n).numpy()
    return centre_of_mass(smooth * mask)


def _moved(volume: NDArray[np.float32], centre: NDArray[np.float64], k_max: float) -> NDArray[np.float32]:
    """A half map with `centre` at the box's centre, cut to the band."""
    n = volume.shape[0]
    k = np.fft.fftfreq(n)
    phase = (
        k[:, None, None] * centre[2] + k[None, :, None] * centre[1] + np.fft.rfftfreq(n)[None, None, :] * centre[0]
    ) * (2 * np.pi)
    shift = torch.from_numpy(np.exp(1j * phase).astype(np.complex64))
    return centred_irfft(centred_rfft(torch.from_numpy(volume)) * shift * _below(n, k_max), n).numpy()


def _power_below(volume: NDArray[np.float32], k_max: float) -> float:
    """Power of a volume between zero frequency, which is left out, and `k_max` cycles per box (to a factor)."""
    shell = shell_index(volume.shape[0])
    power = np.abs(np.fft.rfftn(volume.astype(np.float64))) ** 2
    return float(power[(shell >= 1) & (shell <= k_max)].sum())


def _whitened(maps: list[NDArray[np.float32]], comparison: _Comparison, box_size: int) -> torch.Tensor:
    """Spectrum of the average, its shells weighted as the comparison does."""
    gain = np.sqrt(comparison.weight / np.maximum(shell_counts(box_size)[: comparison.count], 1))
    gain = gain / np.sqrt(np.where(comparison.power > 0, comparison.power, np.inf))
    shell = shell_index(box_size)
    factor = np.where(shell < comparison.count, gain[np.minimum(shell, comparison.count - 1)], 0.0)
    factor /= max(float(factor.max()), 1e-30)
    return centred_rfft(torch.from_numpy(maps[0] + maps[1])) * torch.from_numpy(factor.astype(np.float32))
