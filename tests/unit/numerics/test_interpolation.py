import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.masks import soft_sphere
from tests.unit.alignment.samples import asymmetric


@pytest.mark.parametrize("box", [24, 25])
def test_rotation_and_shift_follow_the_convention(box: int) -> None:
    blobs = asymmetric(2)
    rotation, shift = Rotation.from_rotvec([0.5, -0.8, 1.1]), np.array([1.5, -0.5, 2.0])
    moved = transform_volume(blobs.volume(box), rotation, shift)
    # Cubic splines of blobs this wide are good to a percent of their height.
    np.testing.assert_allclose(moved, blobs.volume(box, rotation, shift), atol=0.02 * blobs.heights.max())


@pytest.mark.parametrize("box", [16, 17])
def test_the_centre_stays(box: int) -> None:
    volume = np.zeros((box, box, box), dtype=np.float32)
    volume[(box // 2,) * 3] = 1
    turned = transform_volume(volume, Rotation.from_rotvec([1.0, 2.0, 0.3]), order=1)
    assert turned[(box // 2,) * 3] == pytest.approx(1.0, abs=1e-5)


def test_quarter_turns_are_exact() -> None:
    volume = np.random.default_rng(0).normal(size=(9, 9, 9)).astype(np.float32)
    about_z = transform_volume(volume, Rotation.from_euler("z", 90, degrees=True))
    # x goes to y and y to -x: out[z, y, x] = in[z, -x, y].
    np.testing.assert_allclose(about_z, volume[:, ::-1, :].transpose(0, 2, 1), atol=1e-4)


def test_a_soft_sphere_is_one_inside_and_falls_smoothly() -> None:
    mask = soft_sphere(32, 8, 4)
    line = mask[16, 16, 16:]
    assert (line[:9] == 1).all()
    assert (line[12:] == 0).all()
    assert line[10] == pytest.approx(0.5)
    assert (np.diff(line) <= 0).all()
    assert set(np.unique(soft_sphere(16, 5, 0))) == {0.0, 1.0}
