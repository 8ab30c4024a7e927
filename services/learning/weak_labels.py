"""Labels for a segmentation network from decoded subtomograms: weak, as nobody has drawn them.

Zeng et al. 2018 (J. Struct. Biol. 202:150-160), section 3.4.2: each member of the selected clusters is decoded by the
autoencoder, and its decoded box, not its cluster's centre, is cut at a level into background and structure. The paper
takes "greater than 0.5" for background and "less than or equal to 0.5" for structure, protein being dark, and does not
say in what units. Here protein is positive, boxes have mean 0 and standard deviation 1, and a decoded box holds less by
what the autoencoder drops as noise; so the level is counted within each decoded box: the share of the way from its
median, which the surroundings of a structure have, to its brightest voxels, the 95th percentile. In a simulated
tomogram of corrected contrast transfer, at level 0.5, labels then agree with the truth by a Dice of 0.72 for membranes
and 0.75 for globules; with the 99.9th percentile by 0.71 and 0.66, as the few brightest voxels lie high above the rest
of a decoded structure. Without the correction no level can do it: the noise-free tomogram itself, cut at its best,
then agrees by 0.58 and 0.77.

Where there is little noise, the 32 numbers of a code lose more than smoothing does, and boxes themselves can be cut
instead, smoothed by a Gaussian: at SNR 0.5, voxels of 20 Å and 14 Å of smoothing, Dice is 0.79 and 0.79 at level 0.6.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.ndimage
import torch
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.progress import Progress
from services.learning.autoencoder import Autoencoder3D
from services.learning.clustering import batch_size
from services.learning.pose_normalisation import Poses, find_poses, structure_weights, turn_back
from services.learning.preparation import standardise

BRIGHTEST = 0.95
"""The quantile of a decoded box's voxels that counts as its brightest."""


Levels = float | NDArray[np.float32]
"""One for all boxes, or (n,), each box's."""


def thresholds(decoded: NDArray[np.float32], level: Levels) -> NDArray[np.float32]:
    """Where to cut boxes `[i, z, y, x]`, protein positive: median + level * (95th percentile - median) of each."""
    flat = decoded.reshape(len(decoded), -1)
    low, high = np.quantile(flat, (0.5, BRIGHTEST), axis=1)
    cuts: NDArray[np.float32] = (low + level * (high - low)).astype(np.float32)
    return cuts


def structure(decoded: NDArray[np.float32], level: Levels) -> NDArray[np.bool_]:
    """Where decoded boxes `[i, z, y, x]` are structure: at and above their thresholds.

    A box all of one value has none.
    """
    cuts = thresholds(decoded, level)
    varied = decoded.max(axis=(1, 2, 3)) > decoded.min(axis=(1, 2, 3))
    found: NDArray[np.bool_] = (decoded >= cuts[:, None, None, None]) & varied[:, None, None, None]
    return found


def label_boxes(
    model: Autoencoder3D,
    boxes: NDArray[np.float32],
    classes: NDArray[np.int32],
    targets: NDArray[np.uint8],
    *,
    level: Levels,
    smoothing_voxels: float = 0.0,
    pose_normalisation: bool,
    device: torch.device,
    progress: Progress,
) -> None:
    """Write labels into `targets` `[i, z, y, x]`: box i's class where its decoded self is structure, 0 elsewhere.

    Args:
        model: the autoencoder, on the device.
        boxes: prepared boxes `[i, z, y, x]` in the pose that they were extracted in.
        classes: (n,) up to 255; 0 for boxes of nothing but background.
        targets: of the boxes' shape.
        level: as in `thresholds`.
        smoothing_voxels: 0 to cut decoded boxes; above, the boxes themselves are cut, smoothed by a Gaussian of this
            standard deviation.
        pose_normalisation: whether the autoencoder was trained on boxes in their own pose. Labels are turned back from
            there: a segmentation network meets tomograms, where structures lie as they do.
        device: of the model.
        progress: called after each batch.
    """
    step = batch_size(model.box_size)
    with torch.inference_mode():
        for first in range(0, len(boxes), step):
            batch = np.ascontiguousarray(boxes[first : first + step])
            cut = level if isinstance(level, float) else level[first : first + step]
            if smoothing_voxels:
                found = structure(scipy.ndimage.gaussian_filter(batch, smoothing_voxels, axes=(1, 2, 3)), cut)
            else:
                found = _decoded_structure(model, batch, cut, pose_normalisation, device)
            stop = first + len(batch)
            targets[first:stop] = found * classes[first:stop, None, None, None]
            progress(stop / len(boxes), "labelling", subtomograms=stop)


def _decoded_structure(
    model: Autoencoder3D, boxes: NDArray[np.float32], level: Levels, pose_normalisation: bool, device: torch.device
) -> NDArray[np.bool_]:
    """Where decoded boxes are structure, in the pose that the boxes were extracted in."""
    poses = find_poses(structure_weights(boxes)) if pose_normalisation else None
    seen = boxes if poses is None else standardise(turn_back(boxes, poses))
    decoded = model(torch.from_numpy(seen)[:, None].to(device))[0][:, 0].cpu().numpy()
    found = structure(decoded, level)
    if poses is None:
        return found
    # Labels as shares of a voxel, so that turning them moves an edge by less than a voxel.
    turned: NDArray[np.bool_] = turn_back(found.astype(np.float32) - 0.5, inverse(poses)) >= 0
    return turned


def inverse(poses: Poses) -> Poses:
    """The poses that take structures from the box centre and the box's axes back to where they were."""
    axes = poses.axes.transpose(0, 2, 1)
    return Poses(-np.einsum("nij,nj->ni", axes, poses.centres), axes)


def parse_levels(texts: Sequence[str]) -> dict[str, float]:
    """Levels by class, of texts such as `globule:0.4`; space around names and levels is ignored.

    Raises InvalidArgument, naming the text, for another syntax, a level that is not between 0 and 1, and a class that
    is given twice.
    """
    levels: dict[str, float] = {}
    for text in texts:
        # A name may hold a colon, a level may not.
        name, _, number = (part.strip() for part in text.rpartition(":"))
        try:
            level = float(number)
        except ValueError:
            level = 0.0
        if not name or not 0 < level < 1:
            raise InvalidArgument(
                f"class_levels: {text!r} must be a class, a colon and a level between 0 and 1, as globule:0.4"
            )
        if name in levels:
            raise InvalidArgument(f"class_levels: {name!r} is given twice")
        levels[name] = level
    return levels
