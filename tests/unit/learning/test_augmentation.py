"""What is changed in a training batch, and what is not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.wedge import wedge_mask
from services.learning.augmentation import (
    Augmentation,
    cube_turns,
    random_rotations,
    rotate,
    rotate_labels,
    turn,
)
from services.learning.preparation import standardise
from tests.unit.learning.shapes import CHIRAL, blobs, correlation

SIDE = 24


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def chiral(rotation: Rotation | None = None) -> Tensor:
    """A standardised box (1, 1, n, n, n)."""
    return torch.from_numpy(standardise(blobs(CHIRAL, SIDE, rotation)[None]))[:, None]


def noise(count: int, side: int = 16, seed: int = 0) -> Tensor:
    boxes = np.random.default_rng(seed).standard_normal((count, side, side, side), np.float32)
    return torch.from_numpy(standardise(boxes))[:, None]


def test_nothing_is_changed_unless_asked_for() -> None:
    assert Augmentation().changes_nothing
    boxes = noise(3)
    assert torch.equal(Augmentation()({"boxes": boxes}, seeded())["boxes"], boxes)
    for change in ({"rotations": "cube"}, {"contrast_jitter": 0.1}, {"noise_jitter": 0.1}, {"wedge_jitter_degrees": 1}):
        changed: dict[str, Any] = change
        assert not Augmentation(**changed).changes_nothing


def test_the_same_numbers_for_the_same_generator() -> None:
    everything = Augmentation("any", 0.2, 0.5, 10.0, -60, 60)
    batch = {"boxes": noise(3), "labels": torch.arange(3)}
    first, second = everything(batch, seeded(1)), everything(batch, seeded(1))
    assert torch.equal(first["boxes"], second["boxes"])
    assert not torch.equal(first["boxes"], everything(batch, seeded(2))["boxes"])
    assert first["labels"] is batch["labels"]
    assert torch.equal(batch["boxes"], noise(3)), "the batch that was given stays as it was"


@pytest.mark.parametrize("side", [7, 8])
def test_the_cubes_24_rotations_are_rotations_each_once(side: int) -> None:
    coordinates = torch.stack(
        torch.meshgrid(*[torch.arange(side) - side // 2] * 3, indexing="ij"), dim=-1
    )  # [z, y, x, 3]
    seen = set()
    for how in cube_turns(3):
        turned = torch.stack([turn(coordinates[..., axis], how) for axis in range(3)], dim=-1)
        # Where the unit vectors come from: the columns of the inverse rotation.
        centre = side // 2
        rows = torch.stack([turned[tuple(centre + step)] for step in torch.eye(3, dtype=torch.int64)]).float()
        assert torch.equal(turned[centre, centre, centre], torch.zeros(3, dtype=torch.int64)), "the centre stays"
        assert torch.equal(rows @ rows.T, torch.eye(3))
        assert float(torch.det(rows)) == pytest.approx(1.0)
        inside = turned[1:, 1:, 1:] if side % 2 == 0 else turned
        expected = (coordinates[1:, 1:, 1:] if side % 2 == 0 else coordinates).float() @ rows
        assert torch.equal(inside.float(), expected)
        seen.add(tuple(rows.flatten().tolist()))
        values = torch.arange(side**3).view(side, side, side)
        assert torch.equal(turn(values, how).flatten().sort().values, values.flatten()), "no value is changed or lost"
    assert len(seen) == 24


def test_half_turns_move_boxes_and_labels_alike_and_leave_the_wedge() -> None:
    side = 12
    mask = torch.from_numpy(wedge_mask((side,) * 3, -60, 60))
    boxes = torch.fft.ifftn(torch.fft.fftn(noise(64, side), dim=(2, 3, 4)) * mask, dim=(2, 3, 4)).real
    changed = Augmentation("half")({"boxes": boxes, "targets": (boxes[:, 0] > 0).long()}, seeded(1))
    turned = changed["boxes"]
    assert torch.equal(changed["targets"], (turned[:, 0] > 0).long())
    outside = torch.fft.fftn(turned, dim=(2, 3, 4)) * (1 - mask)
    assert float(outside.abs().max()) < 1e-3 * float(torch.fft.fftn(turned, dim=(2, 3, 4)).abs().max())
    x, y, z = (torch.from_numpy(Rotation.from_euler(axis, 180, degrees=True).as_matrix()) for axis in "xyz")
    kinds = [0, 0, 0, 0]
    for before, after in zip(boxes[:, 0], turned[:, 0], strict=True):
        for kind, matrix in enumerate((torch.eye(3, dtype=torch.float64), x, y, z)):
            # A diagonal matrix on (x, y, z); arrays are [z, y, x].
            axes = [2 - axis for axis in range(3) if matrix[axis, axis] < 0]
            kinds[kind] += int(torch.equal(after, torch.flip(before, axes)))
    assert sum(kinds) == 64
    # Each is drawn 16 times in the mean, give or take 3.5.
    assert min(kinds) > 4


def test_pictures_are_turned_and_mirrored_eight_ways() -> None:
    assert len({tuple(turn(torch.arange(9).view(3, 3), how).flatten().tolist()) for how in cube_turns(2)}) == 8
    pictures = torch.randn(6, 1, 9, 9, generator=seeded())
    batch = {"boxes": pictures, "targets": (pictures[:, 0] > 0).long()}
    changed = Augmentation("cube")(batch, seeded(1))
    assert torch.equal(changed["targets"], (changed["boxes"][:, 0] > 0).long())
    assert not torch.equal(changed["boxes"], pictures)


def test_turned_boxes_show_the_turned_structure() -> None:
    turns = Rotation.random(4, random_state=1)
    matrices = torch.from_numpy(turns.as_matrix().astype(np.float32))
    turned = rotate(chiral().expand(4, -1, -1, -1, -1), matrices)
    for index in range(4):
        found = turned[index, 0].numpy()
        assert correlation(found, chiral(turns[index])[0, 0].numpy()) > 0.99
        assert correlation(found, chiral(turns[index].inv())[0, 0].numpy()) < 0.9
        assert float(found.mean()) == pytest.approx(0, abs=1e-5)
        assert float(found.std()) == pytest.approx(1, abs=1e-5)


def test_labels_are_turned_with_their_boxes_and_stay_labels() -> None:
    boxes = chiral().expand(3, -1, -1, -1, -1)
    targets = 3 * (boxes[:, 0] > 1).to(torch.int64)
    for kind in ("any", "beam", "cube", "half"):
        changed = Augmentation(kind)({"boxes": boxes, "targets": targets}, seeded(4))
        assert changed["targets"].dtype == torch.int64
        assert set(changed["targets"].flatten().tolist()) == {0, 3}
        expected = changed["boxes"][:, 0] > 1
        overlap = (expected & (changed["targets"] == 3)).sum() / (expected | (changed["targets"] == 3)).sum()
        # A blob of some hundred voxels has about half of them on its surface, where interpolation decides.
        assert float(overlap) > 0.8, kind
        assert float(overlap) > 0.999 or kind not in ("cube", "half")


def test_what_comes_from_beyond_the_box_is_its_mean_and_no_label() -> None:
    ones = torch.ones(1, 1, 8, 8, 8) + 0.1 * noise(1, 8)
    quarter = torch.from_numpy(Rotation.from_euler("z", 45, degrees=True).as_matrix().astype(np.float32))[None]
    assert float(rotate(ones, quarter).min()) > 0.5
    assert int(rotate_labels(torch.ones(1, 8, 8, 8, dtype=torch.int64), quarter)[0, 4, 0, 0]) == 0


def test_rotations_about_the_beam_keep_z() -> None:
    matrices = random_rotations(200, "beam", seeded())
    expected = torch.tensor([0.0, 0.0, 1.0]).expand(200, 3)
    torch.testing.assert_close(matrices[:, 2], expected)
    torch.testing.assert_close(matrices[:, :, 2], expected)
    angles = torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0])
    # Uniform: the mean of cos and sin has a standard deviation of 1 / sqrt(2 n) = 0.05.
    assert abs(float(angles.cos().mean())) < 0.2
    assert abs(float(angles.sin().mean())) < 0.2


def test_any_rotation_is_uniform() -> None:
    matrices = random_rotations(2000, "any", seeded())
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3).expand(2000, 3, 3), atol=1e-5, rtol=0)
    assert (torch.linalg.det(matrices) > 0).all()
    # Of uniform rotations each element has mean 0 and variance 1/3; the angle's density is (1 - cos a) / pi.
    assert float(matrices.mean(dim=0).abs().max()) < 4 * math.sqrt(1 / 3 / 2000)
    angles = torch.arccos(((matrices.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1))
    expected = math.pi / 2 + 2 / math.pi
    assert float(angles.mean()) == pytest.approx(expected, abs=4 * 0.65 / math.sqrt(2000))


def test_contrast_is_multiplied_and_shifted_box_by_box() -> None:
    boxes = noise(400, 4)
    changed = Augmentation(contrast_jitter=0.2)({"boxes": boxes}, seeded())["boxes"]
    shifts = changed.mean(dim=(1, 2, 3, 4))
    factors = ((changed - shifts.view(-1, 1, 1, 1, 1)) * boxes).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(
        changed, boxes * factors.view(-1, 1, 1, 1, 1) + shifts.view(-1, 1, 1, 1, 1), atol=1e-5, rtol=0
    )
    # Four standard errors of mean and standard deviation of 400 numbers.
    for drawn, mean in ((factors, 1.0), (shifts, 0.0)):
        assert float(drawn.mean()) == pytest.approx(mean, abs=4 * 0.2 / 20)
        assert float(drawn.std()) == pytest.approx(0.2, abs=4 * 0.2 / math.sqrt(800))


def test_each_box_gets_noise_of_its_own_deviation() -> None:
    boxes = noise(300, 8)
    added = Augmentation(noise_jitter=0.6)({"boxes": boxes}, seeded())["boxes"] - boxes
    deviations = added.std(dim=(1, 2, 3, 4))
    assert float(deviations.max()) < 0.6 * (1 + 4 / math.sqrt(2 * 512))
    # Uniform between 0 and 0.6: mean 0.3 and standard deviation 0.6 / sqrt(12).
    assert float(deviations.mean()) == pytest.approx(0.3, abs=4 * 0.173 / math.sqrt(300))
    assert float(deviations.std()) == pytest.approx(0.173, abs=0.03)
    assert abs(float((added[0] * added[1]).mean())) < 4 * 0.36 / math.sqrt(512)


def test_wedges_are_widened_by_up_to_the_angle_at_either_end() -> None:
    side = 24
    change = Augmentation(wedge_jitter_degrees=15, tilt_min_degrees=-60, tilt_max_degrees=50)
    boxes = noise(12, side)
    changed = change({"boxes": boxes}, seeded())["boxes"]
    torch.testing.assert_close(changed.std(dim=(1, 2, 3, 4), correction=0), torch.ones(12), atol=1e-4, rtol=0)
    power = torch.fft.fftn(changed[:, 0], dim=(1, 2, 3)).abs().numpy()
    kept, removed = wedge_mask((side,) * 3, -45, 35) > 0, wedge_mask((side,) * 3, -60, 50) == 0
    shares = []
    for spectrum in power:
        assert (spectrum[kept] > 1e-3).mean() > 0.999
        assert spectrum[removed].max() < 1e-2
        shares.append(float((spectrum > 1e-2).mean()))
    # Each box has a wedge of its own.
    assert len(set(shares)) > 6
    between = (wedge_mask((side,) * 3, -45, 35).mean(), wedge_mask((side,) * 3, -60, 50).mean())
    assert between[0] - 0.01 < min(shares) < max(shares) < between[1] + 0.01


def test_what_can_not_be_done_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="none, half, beam, cube, any"):
        Augmentation("all")
    with pytest.raises(InvalidArgument, match="wedge_jitter is 60"):
        Augmentation(wedge_jitter_degrees=60, tilt_min_degrees=-60, tilt_max_degrees=60)
    with pytest.raises(InvalidArgument, match="3D"):
        Augmentation("any")({"boxes": torch.zeros(1, 1, 8, 8)}, seeded())
