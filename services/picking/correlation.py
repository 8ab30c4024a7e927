"""The correlation of one tile of a tomogram with many small kernels, and the best of them at each position.

The kernel of a position u is laid with its first voxel at u: C(u) = sum_r V(u + r) kernel(r), for all u at which it
lies inside the tile. C = F^-1[F(V) conj(F(kernel))], of which most passes over memory can be saved:

- the kernel is zero but for its box, so its transform along x and y takes only the box's lines;
- along z, a few columns at a time are transformed, multiplied and transformed back while they are in the cache;
- only planes in which the kernel lies inside the tile are transformed back in y and x, one plane at a time, and each is
  compared with the best so far before it leaves the cache.

On a CPU this takes less than one forward and one inverse transform of the tile. Plans are FFTW's, made once for a tile
shape. On a GPU the same steps are whole-tile operations of PyTorch.

Scores are normalised correlations under a mask m of sum n (Roseman, Ultramicroscopy 94 (2003) 225), kept exact for
soft masks by weighting all sums by m: with a kernel (t - <t>) m / sqrt(sum m (t - <t>)^2), where <t> = sum m t / n,
the score

    C(u) / sqrt( sum_r m(r) V(u + r)^2 - (sum_r m(r) V(u + r))^2 / n )

lies in -1 to 1 by the inequality of Cauchy and Schwarz. A mask that does not change as the template turns has one
denominator for all rotations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyfftw
import scipy.fft
import torch
from numpy.typing import NDArray

from cryofleet.numerics.compiled import compiled

Array = NDArray[np.float32]
Spectrum = NDArray[np.complex64]
Shape = tuple[int, int, int]

#: Columns that are transformed along z together take so many bytes: they and the tile's spectrum stay in the cache.
CACHE_BYTES = 3 << 17
#: FFTW makes one plan at a time.
_planning = threading.Lock()
#: Where the tile's local deviation is below this part of its overall one there is nothing to correlate with.
LEAST_DEVIATION = 1e-2


@dataclass
class Best:
    """The best score at each position of a tile, which kernel had it, and sums over all scores seen.

    Attributes:
        scores: float32 `[z, y, x]`; -1 before anything was seen.
        kernels: int32 `[z, y, x]`, the number of the kernel; -1 where no score was above -1.
        count, squares: number and sum of squares of all scores of all kernels, but those of masked positions (exactly
            0).
    """

    scores: Any
    kernels: Any
    count: int = 0
    squares: float = 0.0

    @classmethod
    def empty(cls, shape: Shape) -> Best:
        return cls(np.full(shape, -1, np.float32), np.full(shape, -1, np.int32))


class Correlator(Protocol):
    """Correlates the tile that it was given with kernels. `box` is the kernels' side, `valid` the shape of the
    positions that are looked at: the first ones along each axis. A kernel that hangs over the tile's far face meets its
    near one.
    """

    valid: Shape

    def load(self, tile: Array) -> None:
        """Take a tile of the correlator's shape, with mean about 0 and deviation about 1."""

    def inverse_norms(self, mask: Array, allowed: NDArray[np.bool_]) -> Any:
        """1 / the score's denominator at each valid position for a mask of the kernels' box; 0 where not allowed, and
        where the tile is empty.
        """

    def search(self, kernels: torch.Tensor, first: int, norms: Any, best: Best) -> None:
        """Update `best` with kernels `[n, z, y, x]`, numbered from `first`."""

    def search_masked(
        self, kernels: torch.Tensor, masks: torch.Tensor, first: int, allowed: NDArray[np.bool_], best: Best
    ) -> None:
        """The same where each kernel has a mask of its own, `[n, z, y, x]`."""

    def close(self) -> None:
        """Free threads and memory."""


def correlator(device: str, shape: Shape, box: int, valid: Shape, threads: int = 1) -> Correlator:
    """A correlator for tiles of a shape and kernels of a box side on `cpu` or `cuda`."""
    if device == "cpu":
        return FftwCorrelator(shape, box, valid, threads)
    return TorchCorrelator(shape, valid, device)


def memory_bytes(shape: Shape, box: int, threads: int, masked: bool, variants: int = 1) -> int:
    """What a correlator takes at most on a CPU for tiles of a shape, with their best scores."""
    voxels = shape[0] * shape[1] * shape[2]
    spectrum = 8 * shape[0] * shape[1] * (shape[2] // 2 + 1)
    # the tile, where it is searched, its spectrum and its products, norms, and the best scores with their kernels
    working = 5 * voxels + (5 if masked else 2) * spectrum + 4 * voxels + 8 * voxels * variants
    # the tile, where it is searched, and in double precision: the tile or its square, the spectra of that and of the
    # mask, a sum at all positions and the variance
    norms = 5 * voxels + 5 * 8 * voxels
    kernels = 8 * box * shape[1] * (shape[2] // 2 + 1) * 2
    return max(working, norms) + kernels + threads * (8 * CACHE_BYTES + 16 * shape[1] * shape[2])


@compiled
def _multiply_conjugate(columns: Any, spectrum: Any, out: Any) -> None:
    for i in range(columns.shape[0]):
        for j in range(columns.shape[1]):
            out[i, j] = columns[i, j].conjugate() * spectrum[i, j]


@compiled
def _keep_best(correlation: Any, norms: Any, scores: Any, kernels: Any, number: int) -> float:
    squares = 0.0
    for y in range(scores.shape[0]):
        row = np.float32(0)
        for x in range(scores.shape[1]):
            score = correlation[y, x] * norms[y, x]
            row = np.float32(row + score * score)
            if score > scores[y, x]:
                scores[y, x] = score
                kernels[y, x] = number
        squares += float(row)
    return squares


@compiled
def _keep_best_masked(
    correlation: Any,
    sums: Any,
    squares_: Any,
    allowed: Any,
    mask_sum: float,
    least: float,
    scores: Any,
    kernels: Any,
    number: int,
) -> tuple[float, int]:
    total, count = 0.0, 0
    for y in range(scores.shape[0]):
        for x in range(scores.shape[1]):
            variance = squares_[y, x] - sums[y, x] * sums[y, x] / mask_sum
            score = np.float32(0)
            if allowed[y, x] and variance > least:
                score = np.float32(correlation[y, x] / np.sqrt(variance))
                total += float(score * score)
                count += 1
            if score > scores[y, x]:
                scores[y, x] = score
                kernels[y, x] = number
    return total, count


class _Scratch:
    """The buffers and plans of one thread."""

    def __init__(self, shape: Shape, columns: int) -> None:
        depth, height, width = shape
        self.columns: Spectrum = pyfftw.zeros_aligned((depth, columns), "complex64")
        self.product: Spectrum = pyfftw.zeros_aligned((depth, columns), "complex64")
        self.plane: Spectrum = pyfftw.zeros_aligned((height, width // 2 + 1), "complex64")
        self.correlation: Array = pyfftw.zeros_aligned((height, width), "float32")
        self.down = pyfftw.FFTW(self.columns, self.columns, axes=(0,), flags=("FFTW_MEASURE",))
        self.across = pyfftw.FFTW(self.plane, self.plane, axes=(0,), flags=("FFTW_MEASURE",))
        self.up, self.up_product = (
            pyfftw.FFTW(values, values, axes=(0,), direction="FFTW_BACKWARD", flags=("FFTW_MEASURE",))
            for values in (self.columns, self.product)
        )
        self.flat = pyfftw.FFTW(
            self.plane,
            self.correlation,
            axes=(0, 1),
            direction="FFTW_BACKWARD",
            flags=("FFTW_MEASURE", "FFTW_DESTROY_INPUT"),
        )


class FftwCorrelator:
    """On a CPU, by FFTW and compiled loops."""

    def __init__(self, shape: Shape, box: int, valid: Shape, threads: int) -> None:
        self._shape = shape
        self._box = box
        self.valid = valid
        self._half = shape[2] // 2 + 1
        all_columns = shape[1] * self._half
        # a whole number of cache lines
        self._columns = min(max(CACHE_BYTES // (8 * shape[0]) // 16, 1) * 16, all_columns)
        self._chunks = -(-all_columns // self._columns)
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="correlation")
        with _planning:
            self._scratch = [_Scratch(shape, self._columns) for _ in range(self._threads)]
        self._products: list[Spectrum] = []
        self._tile: Spectrum | None = None
        self._tile_squared: Spectrum | None = None
        self._values: Array | None = None

    def close(self) -> None:
        self._pool.shutdown()
        self._products, self._tile, self._tile_squared, self._values = [], None, None, None

    def load(self, tile: Array) -> None:
        self._values = tile
        self._tile = self._tile_squared = None
        self._products = []

    def inverse_norms(self, mask: Array, allowed: NDArray[np.bool_]) -> Array:
        assert self._values is not None
        # a small difference of large sums: double precision
        mask_spectrum = np.conj(scipy.fft.rfftn(mask.astype(np.float64), self._shape, workers=self._threads))
        sums = self._local_sum(self._values.astype(np.float64), mask_spectrum)
        variance = sums * sums
        variance /= -float(mask.sum(dtype=np.float64))
        del sums
        variance += self._local_sum(np.square(self._values, dtype=np.float64), mask_spectrum)
        empty = variance < LEAST_DEVIATION**2 * float(mask.sum(dtype=np.float64))
        variance[empty] = 1
        norms: Array = (1 / np.sqrt(variance)).astype(np.float32)
        norms[empty | ~allowed] = 0
        return norms

    def _local_sum(self, values: NDArray[np.float64], mask_spectrum: Any) -> NDArray[np.float64]:
        spectrum = scipy.fft.rfftn(values, workers=self._threads, overwrite_x=True)
        del values
        spectrum *= mask_spectrum
        full: NDArray[np.float64] = scipy.fft.irfftn(spectrum, self._shape, workers=self._threads, overwrite_x=True)
        del spectrum
        depth, height, width = self.valid
        return np.ascontiguousarray(full[:depth, :height, :width])

    def search(self, kernels: torch.Tensor, first: int, norms: Any, best: Best) -> None:
        tile = self._spectrum()
        products = self._buffers(1)
        seen = int(np.count_nonzero(norms))
        for number, kernel in enumerate(kernels.numpy(), first):
            self._along_z(self._in_planes(kernel), [(tile, products[0])])

            def keep(scratch: _Scratch, z: int, number: int = number) -> float:
                scratch.plane[:] = products[0][z]
                scratch.flat.execute()
                squares: float = _keep_best(scratch.correlation, norms[z], best.scores[z], best.kernels[z], number)
                return squares

            best.squares += sum(self._each(keep, self.valid[0]))
            best.count += seen

    def search_masked(
        self, kernels: torch.Tensor, masks: torch.Tensor, first: int, allowed: NDArray[np.bool_], best: Best
    ) -> None:
        tile = self._spectrum()
        if self._tile_squared is None:
            assert self._values is not None
            self._tile_squared = self._transformed(np.square(self._values))
        products = self._buffers(3)
        pairs = zip(kernels.numpy(), masks.numpy(), strict=True)
        for number, (kernel, mask) in enumerate(pairs, first):
            self._along_z(self._in_planes(kernel), [(tile, products[0])])
            self._along_z(self._in_planes(mask), [(tile, products[1]), (self._tile_squared, products[2])])
            mask_sum = float(mask.sum(dtype=np.float64))
            least = LEAST_DEVIATION**2 * mask_sum

            def keep(
                scratch: _Scratch, z: int, number: int = number, mask_sum: float = mask_sum, least: float = least
            ) -> tuple[float, int]:
                planes = []
                for product in products:
                    scratch.plane[:] = product[z]
                    scratch.flat.execute()
                    planes.append(scratch.correlation.copy())
                found: tuple[float, int] = _keep_best_masked(
                    planes[0],
                    planes[1],
                    planes[2],
                    allowed[z],
                    mask_sum,
                    least,
                    best.scores[z],
                    best.kernels[z],
                    number,
                )
                return found

            for squares, count in self._each(keep, self.valid[0]):
                best.squares += squares
                best.count += count

    def _spectrum(self) -> Spectrum:
        if self._tile is None:
            assert self._values is not None
            self._tile = self._transformed(self._values)
        return self._tile

    def _buffers(self, count: int) -> list[Spectrum]:
        shape = (self.valid[0], self._shape[1], self._half)
        while len(self._products) < count:
            self._products.append(np.empty(shape, np.complex64))
        return self._products

    def _transformed(self, values: Array) -> Spectrum:
        """The tile's spectrum, scaled for the inverse transform and laid out as `[chunk, kz, column]`."""
        spectrum: Spectrum = scipy.fft.rfftn(values, workers=self._threads)
        spectrum *= np.float32(1 / values.size)
        depth = self._shape[0]
        columns = spectrum.reshape(depth, -1)
        laid_out: Spectrum = np.zeros((self._chunks, depth, self._columns), np.complex64)
        for chunk in range(self._chunks):
            part = columns[:, chunk * self._columns : (chunk + 1) * self._columns]
            laid_out[chunk, :, : part.shape[1]] = part
        return laid_out

    def _in_planes(self, kernel: Array) -> Spectrum:
        """The kernel's transform along x and y, `[box, columns]`."""
        out: Spectrum = np.empty((self._box, self._shape[1] * self._half), np.complex64)

        def transform(scratch: _Scratch, z: int) -> None:
            scratch.plane[: self._box] = scipy.fft.rfft(kernel[z], self._shape[2], axis=1)
            scratch.plane[self._box :] = 0
            scratch.across.execute()
            out[z] = scratch.plane.ravel()

        for _ in self._each(transform, self._box):
            pass
        return out

    def _along_z(self, kernel: Spectrum, targets: list[tuple[Spectrum, Spectrum]]) -> None:
        """Multiply a kernel, transformed in its planes, with spectra of tiles: for each, its valid planes of products,
        back in real space along z.
        """
        box, valid = self._box, self.valid[0]
        flat = [(spectrum, product.reshape(valid, -1)) for spectrum, product in targets]

        def chunk(scratch: _Scratch, index: int) -> None:
            here = slice(index * self._columns, (index + 1) * self._columns)
            part = kernel[:, here]
            width = part.shape[1]
            scratch.columns[:box, :width] = part
            scratch.columns[box:] = 0
            scratch.columns[:, width:] = 0
            scratch.down.execute()
            for spectrum, product in flat[:-1]:
                _multiply_conjugate(scratch.columns, spectrum[index], scratch.product)
                scratch.up_product.execute()
                product[:, here] = scratch.product[:valid, :width]
            # the last one in place: less to keep in the cache
            _multiply_conjugate(scratch.columns, flat[-1][0][index], scratch.columns)
            scratch.up.execute()
            flat[-1][1][:, here] = scratch.columns[:valid, :width]

        for _ in self._each(chunk, self._chunks):
            pass

    def _each(self, work: Callable[[_Scratch, int], Any], count: int) -> Iterator[Any]:
        """The results of `work` for 0 to count - 1, shared among the threads."""

        def share(thread: int) -> list[Any]:
            scratch = self._scratch[thread]
            return [work(scratch, index) for index in range(thread, count, self._threads)]

        if self._threads == 1:
            yield from share(0)
            return
        for found in self._pool.map(share, range(self._threads)):
            yield from found


class TorchCorrelator:
    """On any device of PyTorch, by whole-tile operations; made for GPUs."""

    def __init__(self, shape: Shape, valid: Shape, device: str) -> None:
        self._shape = shape
        self._device = torch.device(device)
        self.valid = valid
        self._values: torch.Tensor | None = None
        self._tile: torch.Tensor | None = None
        self._tile_squared: torch.Tensor | None = None

    def close(self) -> None:
        self._values = self._tile = self._tile_squared = None

    def load(self, tile: Array) -> None:
        self._values = torch.from_numpy(np.ascontiguousarray(tile)).to(self._device)
        self._tile = torch.fft.rfftn(self._values)
        self._tile_squared = None

    def inverse_norms(self, mask: Array, allowed: NDArray[np.bool_]) -> torch.Tensor:
        assert self._values is not None
        weights = torch.from_numpy(mask).to(self._device, torch.float64)
        spectrum = torch.fft.rfftn(weights, s=self._shape).conj()
        values = self._values.double()
        total = float(weights.sum())
        variance = self._valid(torch.fft.irfftn(torch.fft.rfftn(values * values) * spectrum, s=self._shape))
        sums = self._valid(torch.fft.irfftn(torch.fft.rfftn(values) * spectrum, s=self._shape))
        variance = variance - sums * sums / total
        usable = (variance >= LEAST_DEVIATION**2 * total) & torch.from_numpy(allowed).to(self._device)
        return torch.where(usable, variance.clamp_min(1e-30).rsqrt(), 0).float()

    def search(self, kernels: torch.Tensor, first: int, norms: Any, best: Best) -> None:
        assert self._tile is not None
        seen = int(torch.count_nonzero(norms))
        self._take(best)
        squares = torch.zeros((), dtype=torch.float64, device=self._device)
        for number, kernel in enumerate(kernels, first):
            scores = self._valid(self._correlation(kernel, self._tile)) * norms
            squares += scores.square().sum(dtype=torch.float64)
            self._keep(scores, number, best)
            best.count += seen
        best.squares += float(squares)

    def search_masked(
        self, kernels: torch.Tensor, masks: torch.Tensor, first: int, allowed: NDArray[np.bool_], best: Best
    ) -> None:
        assert self._tile is not None
        assert self._values is not None
        if self._tile_squared is None:
            self._tile_squared = torch.fft.rfftn(self._values.square())
        usable = torch.from_numpy(allowed).to(self._device)
        self._take(best)
        for number, (kernel, mask) in enumerate(zip(kernels, masks, strict=True), first):
            total = float(mask.sum())
            sums = self._valid(self._correlation(mask, self._tile))
            variance = self._valid(self._correlation(mask, self._tile_squared)) - sums.square() / total
            good = usable & (variance > LEAST_DEVIATION**2 * total)
            norms = torch.where(good, variance.clamp_min(1e-30).rsqrt(), 0)
            scores = self._valid(self._correlation(kernel, self._tile)) * norms
            best.squares += float(scores.square().sum(dtype=torch.float64))
            best.count += int(torch.count_nonzero(good))
            self._keep(scores, number, best)

    def _correlation(self, kernel: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfftn(kernel.to(self._device), s=self._shape)
        product: torch.Tensor = torch.fft.irfftn(torch.conj(spectrum).mul(tile), s=self._shape)
        return product

    def _valid(self, values: torch.Tensor) -> torch.Tensor:
        depth, height, width = self.valid
        return values[:depth, :height, :width]

    def _take(self, best: Best) -> None:
        """Bring the best scores to the device, where they stay; `fetch` brings them back."""
        if not isinstance(best.scores, torch.Tensor):
            best.scores = torch.from_numpy(best.scores).to(self._device)
            best.kernels = torch.from_numpy(best.kernels).to(self._device)

    @staticmethod
    def _keep(scores: torch.Tensor, number: int, best: Best) -> None:
        best.kernels.masked_fill_(scores > best.scores, number)
        torch.maximum(best.scores, scores, out=best.scores)


def fetch(best: Best) -> tuple[Array, NDArray[np.int32]]:
    """The best scores and kernels as arrays of the CPU. Rounding may carry a score past 1; it is cut there."""
    scores, kernels = best.scores, best.kernels
    if isinstance(scores, torch.Tensor):
        scores, kernels = scores.cpu().numpy(), kernels.cpu().numpy()
    return np.clip(scores, -1, 1), kernels
