"""What somebody painted on a tomogram's sections, read from files, and the patches that are cut around it.

Files come from outside. A picture is opened only where its header says the section's size, so none can ask for more
memory than a section has.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cryofleet.errors import InvalidArgument
from cryofleet.formats.volume import open_volume_file
from cryofleet.progress import Progress, no_progress
from services.learning.annotator import FEATURE, MARGIN, NOT_FEATURE, NOT_LOOKED_AT
from services.learning.tomogram_scale import SLAB_BYTES, ReadSlab, Scale

Labels = NDArray[np.uint8]

WHITE, BLACK = 192, 63
"""Grey values of 0 to 255, at least and at most, that count as white and as black."""
OPAQUE = 128
"""The least alpha of 0 to 255 of a pixel that counts as painted."""
GREY = 32
"""Channels that differ by more are a colour."""

MAX_PATCHES = 4096
MAX_PATCH_BYTES = 512 * 2**20
"""More patches than either are not cut; a random part of them is."""

PNG_START = b"\x89PNG\r\n\x1a\n"


def is_png(path: Path) -> bool:
    """By the file's first bytes."""
    with path.open("rb") as file:
        return file.read(len(PNG_START)) == PNG_START


def read_picture(path: Path, name: str, shape: tuple[int, int]) -> Labels:
    """What is painted in a PNG picture of a section of `shape` (y, x): 1 where white, 2 where black, else 0.

    The picture's first row is y = 0. Grey, transparent and coloured pixels were not looked at; 8 and 16 bits, grey,
    palette and colour will do. Raises InvalidArgument, naming the file, for another size and for what is no PNG.
    """
    try:
        # Sizes are compared before anything is decoded, so PIL's own guess of what is too large is not needed.
        with warnings.catch_warnings(), Image.open(path, formats=["PNG"]) as image:
            warnings.simplefilter("ignore")
            if image.size != (shape[1], shape[0]):
                raise InvalidArgument(
                    f"{name}: a picture of {image.size[0]} x {image.size[1]} pixels; the tomogram's sections are "
                    f"{shape[1]} x {shape[0]} (x, y): paint on a picture of a whole section, at its own size"
                )
            if getattr(image, "n_frames", 1) != 1:
                raise InvalidArgument(f"{name}: an animation; a PNG of one picture is needed")
            if image.mode.startswith("I"):
                # PIL would clip 16 bits to 8; their upper byte is what 8 bits hold.
                grey = np.asarray(image).astype(np.int64) >> 8
                looked_at = np.ones(shape, np.bool_)
            else:
                pixels = np.asarray(image.convert("RGBA"), np.int16)
                grey = pixels[..., :3].mean(axis=2)
                looked_at = (pixels[..., 3] >= OPAQUE) & (np.ptp(pixels[..., :3], axis=2) <= GREY)
    except Image.DecompressionBombError:
        raise InvalidArgument(
            f"{name}: a picture of far more pixels than the tomogram's sections of {shape[1]} x {shape[0]} (x, y)"
        ) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidArgument(f"{name}: a damaged PNG picture: {reason}") from None
    painted = np.full(shape, NOT_LOOKED_AT, np.uint8)
    painted[looked_at & (grey >= WHITE)] = FEATURE
    painted[looked_at & (grey <= BLACK)] = NOT_FEATURE
    return painted


def add_picture(painted: Labels, section: int, path: Path, name: str) -> None:
    """Add what a PNG picture of section `section` says to `painted[z, y, x]`.

    Raises InvalidArgument for a section that the tomogram has not, and as `read_picture`.
    """
    if not 0 <= section < len(painted):
        raise InvalidArgument(
            f"sections: {name} is said to be of section {section}; the tomogram has sections 0 to {len(painted) - 1}"
        )
    _merge(painted, section, read_picture(path, name, painted.shape[1:])[np.newaxis], name)


def add_mask(painted: Labels, path: Path, name: str, scratch: Path, progress: Progress = no_progress) -> None:
    """Add what a mask, an MRC or TIFF volume of the tomogram's size, says to `painted[z, y, x]`, slab by slab.

    Raises InvalidArgument, naming the file, for another size, for values other than 0, 1 and 2, and for what is no
    volume.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with open_volume_file(path, name, scratch) as volume:
        if volume.shape != painted.shape:
            raise InvalidArgument(
                f"{name}: a mask of {_xyz(volume.shape)} voxels; the tomogram has {_xyz(painted.shape)} (x, y, z): "
                "paint on the tomogram itself, not on a binned or cropped one"
            )
        step = max(1, SLAB_BYTES // (4 * painted.shape[1] * painted.shape[2]))
        for first in range(0, len(painted), step):
            slab = volume.slab(first, min(first + step, len(painted)))
            known = (slab == NOT_LOOKED_AT) | (slab == FEATURE) | (slab == NOT_FEATURE)
            if not known.all():
                z, y, x = np.unravel_index(int(np.argmin(known)), known.shape)
                raise InvalidArgument(
                    f"{name}: the voxel x={x}, y={y}, z={first + z} is {slab[z, y, x]:g}; a painted mask holds 1 for "
                    "the feature, 2 for what is not the feature, and 0 for what was not looked at"
                )
            _merge(painted, first, slab.astype(np.uint8), name)
            progress(min(1.0, (first + step) / len(painted)), "reading what was painted")


def _merge(painted: Labels, first: int, slab: Labels, name: str) -> None:
    """Add a slab `[z, y, x]` that begins with section `first`. InvalidArgument where files contradict each other."""
    place = painted[first : first + len(slab)]
    contradiction = (place != slab) & (place != NOT_LOOKED_AT) & (slab != NOT_LOOKED_AT)
    if contradiction.any():
        z, y, x = np.unravel_index(int(np.argmax(contradiction)), slab.shape)
        raise InvalidArgument(
            f"{name}: the voxel x={x}, y={y}, z={first + z} is painted as the feature in one file and as not the "
            "feature in another"
        )
    np.maximum(place, slab, out=place)


def _xyz(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in reversed(shape))


@dataclass(frozen=True)
class Place:
    """A patch's section, and its first row and column, in voxels."""

    z: int
    y: int
    x: int
    feature_voxels: int
    other_voxels: int


def patch_limit(size: int) -> int:
    """How many patches of a side are cut at most."""
    return max(2, min(MAX_PATCHES, MAX_PATCH_BYTES // patch_bytes(size)))


def patch_bytes(size: int) -> int:
    """Memory of a patch of a side with its margin, and of what is painted on it."""
    return 4 * (size + 2 * MARGIN) ** 2 + size**2


def place_patches(painted: Labels, size: int, seed: int, progress: Progress = no_progress) -> list[Place]:
    """Where patches of `size` voxels lie that cover all that is painted in `painted[z, y, x]`.

    Strokes nearer to each other than half a patch count as one area; each area's bounding box is covered by patches
    side by side, about its middle. Where there are more than `patch_limit`, a random part of them is kept.

    Raises InvalidArgument where nothing is painted, where only the feature is or only what is not, and where sections
    are smaller than a patch.
    """
    sides = painted.shape[1:]
    if size > min(sides):
        raise InvalidArgument(
            f"patch_size_voxels is {size}; the tomogram's sections are {sides[1]} x {sides[0]} voxels (x, y): it can't "
            "be more than their shorter side"
        )
    found: list[Place] = []
    for z, section in enumerate(painted):
        if section.any():
            found += [
                Place(z, y, x, *_painted_voxels(section[y : y + size, x : x + size]))
                for y, x in _cover(section, size)
                if section[y : y + size, x : x + size].any()
            ]
        progress((z + 1) / len(painted), "placing patches", patches=len(found))
    feature, other = sum(place.feature_voxels for place in found), sum(place.other_voxels for place in found)
    if not found:
        raise InvalidArgument(
            "painted_uris: nothing is painted: masks need voxels of 1 (the feature) and 2 (not the feature), pictures "
            "white and black pixels"
        )
    for count, missing, value, colour in (
        (feature, "the feature", FEATURE, "white"),
        (other, "what is not the feature", NOT_FEATURE, "black"),
    ):
        if count == 0:
            raise InvalidArgument(
                f"painted_uris: {missing} is painted nowhere ({value} in masks, {colour} in pictures): a network can't "
                "learn to tell one thing from nothing, paint some of it too"
            )
    limit = patch_limit(size)
    if len(found) > limit:
        chosen = np.random.default_rng((seed, 6)).choice(len(found), limit, replace=False)
        found = [found[index] for index in np.sort(chosen)]
    return found


def _painted_voxels(area: Labels) -> tuple[int, int]:
    """How many of the feature, and of what is not."""
    return int((area == FEATURE).sum()), int((area == NOT_FEATURE).sum())


def _cover(section: Labels, size: int) -> list[tuple[int, int]]:
    """First rows and columns of patches that cover what is painted in a section."""
    painted = section != NOT_LOOKED_AT
    areas, _ = scipy.ndimage.label(scipy.ndimage.maximum_filter(painted, size=size // 2 + 1), np.ones((3, 3)))
    starts: set[tuple[int, int]] = set()
    for box in scipy.ndimage.find_objects(np.where(painted, areas, 0)):
        if box is not None:
            rows, columns = (
                _side_by_side(side.start, side.stop, size, length)
                for side, length in zip(box, section.shape, strict=True)
            )
            starts |= {(y, x) for y in rows for x in columns}
    return sorted(starts)


def _side_by_side(start: int, stop: int, size: int, length: int) -> list[int]:
    """Where the fewest pieces of `size` begin that cover `start` to `stop`, about its middle, within `length`."""
    count = -(-(stop - start) // size)
    first = (start + stop - count * size) // 2
    return [min(max(0, first + i * size), length - size) for i in range(count)]


def split_patches(
    places: Sequence[Place], size: int, validation_fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of patches for training and for validation, none of which overlaps one of the other kind.

    Patches are drawn for validation until they are the fraction, one at least, and first one that has
    the feature.
    Patches that overlap one of them are left out of training, for they show the same voxels; or nearly the same, where
    they lie within a quarter of a patch in z.

    Raises InvalidArgument where nothing with the feature and nothing without it would be left to train on.
    """
    array = np.array([(place.z, place.y, place.x) for place in places])
    has_feature = np.array([place.feature_voxels > 0 for place in places])
    has_other = np.array([place.other_voxels > 0 for place in places])
    reach = np.array([max(1, size // 4), size, size])
    wanted = min(max(1, round(validation_fraction * len(places))), len(places) - 1)
    shuffled = np.random.default_rng((seed, 0)).permutation(len(places))
    # Of those with the feature, the one that has a middling amount of it: a sliver would say nothing of how well it is
    # found.
    by_amount = sorted(np.flatnonzero(has_feature).tolist(), key=lambda row: places[row].feature_voxels)
    feature_first = [*by_amount[len(by_amount) // 2 :][:1], *shuffled]
    validation: list[int] = []
    free = np.ones(len(places), np.bool_)
    for row in feature_first:
        if len(validation) >= wanted:
            break
        if row in validation:
            continue
        left = free & (np.abs(array - array[row]) >= reach).any(axis=1)
        # A patch that would leave nothing to learn from is no choice.
        if (left & has_feature).any() and (left & has_other).any():
            validation.append(int(row))
            free = left
    if not validation:
        raise InvalidArgument(
            f"painted_uris: what is painted fills {len(places)} patch{'es' * (len(places) != 1)} of {size} voxels; "
            "none can be kept for validation without an overlap with the others, such that the feature and what is not "
            "are left to train on: paint at places further apart, or in further sections"
        )
    return np.flatnonzero(free), np.sort(np.array(validation, np.int64))


def balanced(rows: NDArray[np.int64], places: Sequence[Place]) -> NDArray[np.int64]:
    """The rows with those of the rarer kind, patches with the feature and patches without any, repeated until both are
    as many; as they are where there is only one kind.
    """
    has_feature = np.array([places[row].feature_voxels > 0 for row in rows])
    with_it, without = rows[has_feature], rows[~has_feature]
    if not len(with_it) or not len(without):
        return rows
    more = max(len(with_it), len(without))
    return np.concatenate([np.resize(with_it, more), np.resize(without, more)])


def cut_patches(
    read_slab: ReadSlab, painted: Labels, places: Sequence[Place], size: int, scale: Scale, progress: Progress
) -> dict[str, NDArray[Any]]:
    """The arrays that `AnnotatorLoss` takes: "boxes" (n, size + 2 * MARGIN, size + 2 * MARGIN) float32, in the
    tomogram's scale, and "painted" (n, size, size).

    Beyond the section's edge a patch shows it mirrored.
    """
    whole = size + 2 * MARGIN
    boxes = np.empty((len(places), whole, whole), np.float32)
    masks = np.empty((len(places), size, size), np.uint8)
    section, loaded = np.empty((0, 0), np.float32), -1
    for row, place in enumerate(places):
        if place.z != loaded:
            section, loaded = np.pad(scale(read_slab(place.z, place.z + 1))[0], MARGIN, mode="symmetric"), place.z
        boxes[row] = section[place.y : place.y + whole, place.x : place.x + whole]
        masks[row] = painted[place.z, place.y : place.y + size, place.x : place.x + size]
        progress((row + 1) / len(places), "cutting patches", patches=row + 1)
    return {"boxes": boxes, "painted": masks}


def dice_of(
    logits_of: Callable[[NDArray[np.float32]], NDArray[np.float32]], arrays: dict[str, NDArray[Any]], rows: Any
) -> float:
    """The Dice coefficient 2 |A and B| / (|A| + |B|) of what is found at probability 1/2 and what is painted, over the
    painted voxels of patches `rows`.

    `logits_of` gives the logits (y, x) of one patch with its margin.
    """
    both = found_voxels = feature_voxels = 0
    for row in rows:
        painted = arrays["painted"][row]
        found = (logits_of(arrays["boxes"][row]) > 0) & (painted != NOT_LOOKED_AT)
        feature = painted == FEATURE
        both += int((found & feature).sum())
        found_voxels += int(found.sum())
        feature_voxels += int(feature.sum())
    return 2 * both / (found_voxels + feature_voxels) if found_voxels + feature_voxels else 1.0
