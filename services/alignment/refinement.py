"""Local refinement of rotation and shift by Levenberg-Marquardt steps on the constrained correlation (FAML, eq. 1)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cryofleet.numerics.compiled import compiled
from cryofleet.numerics.spectra import SpectrumTable
from services.alignment.band import Band, rotation_matrices, turn, turn_between

_LARGEST_TURN = math.radians(6.0)
_LARGEST_STEP_CYCLES = 0.15
"""A shift may move by this share of a period of the band's finest component at once."""


@dataclass(frozen=True)
class Refined:
    """Poses and their scores: quaternions (.., 4), shifts (.., 3) as (x, y, z) in voxels, correlations (..)."""

    quaternions: torch.Tensor
    shifts: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True)
class _Sums:
    """Sums over the band at poses (batch, poses): |M|^2, X . M, and with J, the derivatives of M by the six parameters,
    J^T J (.., 6, 6), J^T M and J^T X (.., 6). Real and imaginary parts count as separate components.
    """

    norm: torch.Tensor
    overlap: torch.Tensor
    gram: torch.Tensor
    along: torch.Tensor
    towards: torch.Tensor


def _phases(band: Band, shifts: torch.Tensor) -> torch.Tensor:
    """What a shift and the imaging make of each component, (.., components)."""
    angle = (shifts @ band.points.T) * (-2 * math.pi / band.box_size)
    return band.imaged(torch.complex(torch.cos(angle), torch.sin(angle)))


def correlations(
    band: Band, particles: torch.Tensor, table: SpectrumTable, quaternions: torch.Tensor, shifts: torch.Tensor
) -> torch.Tensor:
    """Eq. 1 for poses (batch, poses): Re sum X conj(M) / (|X| |M|), M the rotated, shifted and imaged reference."""
    model = table.rotated(band.points, rotation_matrices(quaternions)) * _phases(band, shifts)
    norm = particles.abs().square().sum(-1)[:, None] * model.abs().square().sum(-1)
    overlap = (particles[:, None] * model.conj()).real.sum(-1)
    return overlap * norm.clamp(min=1e-30).rsqrt()


def _sums_by_tensors(
    band: Band, data: torch.Tensor, table: SpectrumTable, matrices: torch.Tensor, shifts: torch.Tensor
) -> _Sums:
    k = band.points
    phases = _phases(band, shifts)
    value, gradient = table.sample_gradient(torch.matmul(k, matrices))
    model = value * phases
    flat = torch.view_as_real(model).flatten(-2)
    # Derivatives by a turn v of the particle's frame, dM = -v . (k x R grad A), and by the shift.
    real = torch.view_as_real(gradient).movedim(-1, -3)
    rotated = torch.matmul(real, matrices.transpose(-1, -2).unsqueeze(-3))
    turned = -torch.linalg.cross(k.expand_as(rotated), rotated)
    by_turn = torch.complex(turned[..., 0, :, :], turned[..., 1, :, :]) * phases[..., None]
    by_shift = model[..., None] * (k * (2 * math.pi / band.box_size))
    by_shift = torch.complex(by_shift.imag, -by_shift.real)
    jacobian = torch.view_as_real(torch.cat([by_turn, by_shift], dim=-1)).movedim(-1, -2).flatten(-3, -2)
    spread = torch.view_as_real(data).flatten(-2)[:, None]
    return _Sums(
        flat.square().sum(-1),
        (flat * spread).sum(-1),
        torch.matmul(jacobian.transpose(-1, -2), jacobian),
        torch.matmul(flat.unsqueeze(-2), jacobian).squeeze(-2),
        torch.matmul(spread.unsqueeze(-2), jacobian).squeeze(-2),
    )


@compiled
def _accumulate(
    values: NDArray[np.float32],
    sides: tuple[int, int, int],
    oversampling: float,
    box_size: int,
    points: NDArray[np.float32],
    transfer: NDArray[np.float32],
    data: NDArray[np.float32],
    matrices: NDArray[np.float32],
    shifts: NDArray[np.float32],
    result: NDArray[np.float32],
) -> None:
    """`_sums_by_tensors` on a CPU; result (batch, poses, 8, 8) holds the products of (M, six derivatives, X) with one
    another.
    """
    _, sy, sx = sides
    reach = sx - 1
    count = points.shape[0]
    cycle = np.float32(-2.0 * np.pi / box_size)
    k_reach = box_size // 2
    columns = np.empty((8, 2 * count), np.float32)
    phase = np.empty((3, 2 * k_reach + 1, 2), np.float32)
    for b in range(matrices.shape[0]):
        table = values[b if values.shape[0] > 1 else 0]
        for j in range(count):
            columns[7, 2 * j] = data[b, j, 0]
            columns[7, 2 * j + 1] = data[b, j, 1]
        for c in range(matrices.shape[1]):
            m = matrices[b, c]
            for axis in range(3):
                for i in range(2 * k_reach + 1):
                    angle = cycle * np.float32(i - k_reach) * shifts[b, c, axis]
                    phase[axis, i, 0] = np.cos(angle)
                    phase[axis, i, 1] = np.sin(angle)
            for j in range(count):
                px, py, pz = points[j, 0], points[j, 1], points[j, 2]
                x = (px * m[0, 0] + py * m[1, 0] + pz * m[2, 0]) * np.float32(oversampling)
                y = (px * m[0, 1] + py * m[1, 1] + pz * m[2, 1]) * np.float32(oversampling)
                z = (px * m[0, 2] + py * m[1, 2] + pz * m[2, 2]) * np.float32(oversampling)
                sign = np.float32(1.0)
                if x < 0:
                    x, y, z, sign = -x, -y, -z, np.float32(-1.0)
                y += reach
                z += reach
                ix, iy, iz = int(x), int(y), int(z)
                fx, fy, fz = x - np.float32(ix), y - np.float32(iy), z - np.float32(iz)
                at = (iz * sy + iy) * sx + ix
                up = at + sx * sy
                # The phase of the shift, from the three axes' own.
                jx, jy, jz = int(px) + k_reach, int(py) + k_reach, int(pz) + k_reach
                ar = phase[0, jx, 0] * phase[1, jy, 0] - phase[0, jx, 1] * phase[1, jy, 1]
                ai = phase[0, jx, 0] * phase[1, jy, 1] + phase[0, jx, 1] * phase[1, jy, 0]
                imaged = transfer[j]
                cr = imaged * (ar * phase[2, jz, 0] - ai * phase[2, jz, 1])
                ci = imaged * (ar * phase[2, jz, 1] + ai * phase[2, jz, 0])
                # Value and slopes of both parts; (v, dx, dy, dz) for real, then imaginary.
                part = 0
                vr = gxr = gyr = gzr = vi = gxi = gyi = gzi = np.float32(0.0)
                for part in range(2):
                    a, e = table[at, part], table[up, part]
                    da, de = table[at + 1, part] - a, table[up + 1, part] - e
                    f, g = table[at + sx, part], table[up + sx, part]
                    df, dg = table[at + sx + 1, part] - f, table[up + sx + 1, part] - g
                    la, lf, le, lg = a + fx * da, f + fx * df, e + fx * de, g + fx * dg
                    low, high = la + fy * (lf - la), le + fy * (lg - le)
                    dlow, dhigh = da + fy * (df - da), de + fy * (dg - de)
                    gx = dlow + fz * (dhigh - dlow)
                    gy = (lf - la) + fz * ((lg - le) - (lf - la))
                    gz = high - low
                    if part == 0:
                        vr = low + fz * gz
                        gxr, gyr, gzr = sign * gx, sign * gy, sign * gz
                    else:
                        vi = sign * (low + fz * gz)
                        gxi, gyi, gzi = gx, gy, gz
                # R grad A, crossed with k.
                o = np.float32(oversampling)
                rx = (m[0, 0] * gxr + m[0, 1] * gyr + m[0, 2] * gzr) * o
                ry = (m[1, 0] * gxr + m[1, 1] * gyr + m[1, 2] * gzr) * o
                rz = (m[2, 0] * gxr + m[2, 1] * gyr + m[2, 2] * gzr) * o
                sx_, sy_, sz_ = (
                    (m[0, 0] * gxi + m[0, 1] * gyi + m[0, 2] * gzi) * o,
                    (m[1, 0] * gxi + m[1, 1] * gyi + m[1, 2] * gzi) * o,
                    (m[2, 0] * gxi + m[2, 1] * gyi + m[2, 2] * gzi) * o,
                )
                tr, ti = pz * ry - py * rz, pz * sy_ - py * sz_
                columns[1, 2 * j], columns[1, 2 * j + 1] = tr * cr - ti * ci, tr * ci + ti * cr
                tr, ti = px * rz - pz * rx, px * sz_ - pz * sx_
                columns[2, 2 * j], columns[2, 2 * j + 1] = tr * cr - ti * ci, tr * ci + ti * cr
                tr, ti = py * rx - px * ry, py * sx_ - px * sy_
                columns[3, 2 * j], columns[3, 2 * j + 1] = tr * cr - ti * ci, tr * ci + ti * cr
                mr, mi = vr * cr - vi * ci, vr * ci + vi * cr
                columns[0, 2 * j], columns[0, 2 * j + 1] = mr, mi
                columns[4, 2 * j], columns[4, 2 * j + 1] = -cycle * px * mi, cycle * px * mr
                columns[5, 2 * j], columns[5, 2 * j + 1] = -cycle * py * mi, cycle * py * mr
                columns[6, 2 * j], columns[6, 2 * j + 1] = -cycle * pz * mi, cycle * pz * mr
            for first in range(8):
                for second in range(first, 8):
                    total = np.float32(0.0)
                    for i in range(2 * count):
                        total += columns[first, i] * columns[second, i]
                    result[b, c, first, second] = total
                    result[b, c, second, first] = total


def _sums(band: Band, data: torch.Tensor, table: SpectrumTable, matrices: torch.Tensor, shifts: torch.Tensor) -> _Sums:
    if data.device.type != "cpu":
        return _sums_by_tensors(band, data, table, matrices, shifts)
    products = torch.empty((*matrices.shape[:2], 8, 8))
    _accumulate(
        table.values.numpy(),
        table.sides,
        float(table.oversampling),
        band.box_size,
        band.points.numpy(),
        (torch.ones(len(band)) if band.transfer is None else band.transfer).numpy(),
        torch.view_as_real(data).numpy(),
        matrices.numpy(),
        shifts.numpy(),
        products.numpy(),
    )
    return _Sums(
        products[..., 0, 0], products[..., 0, 7], products[..., 1:7, 1:7], products[..., 0, 1:7], products[..., 1:7, 7]
    )


def _shortened(vectors: torch.Tensor, longest: float) -> torch.Tensor:
    """Vectors (.., 3), those that are longer brought to length `longest`."""
    shortened: torch.Tensor = vectors * (longest / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
    return shortened


def _within(quaternions: torch.Tensor, near: torch.Tensor, max_angle_degrees: float) -> torch.Tensor:
    """Rotations (batch, poses, 4), those further than that from `near` (batch, 4) brought back on the shortest way."""
    centre = near[:, None].expand_as(quaternions)
    away, limit = turn_between(centre, quaternions), math.radians(max_angle_degrees)
    beyond = away.norm(dim=-1, keepdim=True) > limit
    return torch.where(beyond, turn(centre, _shortened(away, limit)), quaternions)


def refine(
    band: Band,
    particles: torch.Tensor,
    table: SpectrumTable,
    quaternions: torch.Tensor,
    shifts: torch.Tensor,
    max_shift_voxels: float,
    iterations: int,
    around: tuple[torch.Tensor, float] | None = None,
) -> Refined:
    """Climb from each pose (batch, poses) to the nearest maximum of the correlation; no pose ends lower than it began.

    For a scale s fitted beforehand, the correlation is largest where sum |X - s M|^2 is least, so each step solves the
    six normal equations of the residual, with the direction of the scale projected out (Kaufman's variable projection).
    `particles` is complex (batch, components). Shifts stay within `max_shift_voxels` along each axis, and rotations,
    with `around`, within so many degrees of its quaternions (batch, 4): one that would leave stops at the limit.
    """
    if around is not None:
        quaternions = _within(quaternions, *around)
    unit = particles / particles.abs().square().sum(-1, keepdim=True).sqrt().clamp(min=1e-30)
    largest_step = _LARGEST_STEP_CYCLES * band.box_size / band.k_max
    damping = torch.full(quaternions.shape[:-1], 1e-3, device=quaternions.device)
    best = Refined(quaternions, shifts, torch.full_like(damping, -2.0))
    trial_q, trial_t = quaternions, shifts
    gram = torch.zeros((*damping.shape, 6, 6), device=damping.device)
    slope = torch.zeros((*damping.shape, 6), device=damping.device)
    for iteration in range(iterations + 1):
        sums = _sums(band, unit, table, rotation_matrices(trial_q), trial_t)
        norm = sums.norm.clamp(min=1e-30)
        score = sums.overlap * norm.rsqrt()
        better = score > best.scores
        best = Refined(
            torch.where(better[..., None], trial_q, best.quaternions),
            torch.where(better[..., None], trial_t, best.shifts),
            torch.where(better, score, best.scores),
        )
        if iteration == iterations:
            break
        damping = torch.where(better, damping * 0.2, damping * 8.0).clamp(1e-5, 1e4)
        along = sums.along / norm[..., None]
        scale = (sums.overlap / norm).clamp(min=1e-12)
        new_gram = sums.gram - sums.along[..., :, None] * along[..., None, :]
        new_slope = (sums.towards - sums.overlap[..., None] * along) / scale[..., None]
        gram = torch.where(better[..., None, None], new_gram, gram)
        slope = torch.where(better[..., None], new_slope, slope)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        ridge = damping[..., None] * diagonal + 1e-9 * diagonal.amax(-1, keepdim=True) + 1e-30
        step = torch.linalg.solve_ex((gram + torch.diag_embed(ridge)).double(), slope.double()[..., None])[0][
            ..., 0
        ].float()
        step = torch.nan_to_num(step)
        turn_step, shift_step = step[..., :3], step[..., 3:]
        turn_step = _shortened(turn_step, _LARGEST_TURN)
        trial_q = turn(best.quaternions, turn_step)
        if around is not None:
            trial_q = _within(trial_q, *around)
            allowed = turn_between(best.quaternions, trial_q)
            # What the normal equations say of the shift once the turn is given.
            rest = slope[..., 3:] - (gram[..., 3:, :3] @ allowed[..., None])[..., 0]
            held = (allowed - turn_step).norm(dim=-1, keepdim=True) > 1e-6
            of_shift = (gram + torch.diag_embed(ridge))[..., 3:, 3:].double()
            alone = torch.linalg.solve_ex(of_shift, rest.double()[..., None])[0][..., 0].float()
            shift_step = torch.where(held, torch.nan_to_num(alone), shift_step)
        trial_t = (best.shifts + _shortened(shift_step, largest_step)).clamp(-max_shift_voxels, max_shift_voxels)
    return best
