import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.wedge import is_sampled, wedge_mask


def test_the_central_slice_of_a_tilt_is_sampled_exactly_within_the_range() -> None:
    for tilt in range(-89, 90):
        # The slice of tilt theta holds R_y(-theta) x = (cos theta, 0, sin theta).
        x, _, z = Rotation.from_euler("y", -tilt, degrees=True).apply([1.0, 0.0, 0.0])
        assert bool(is_sampled(np.array(x), np.array(z), -50, 70)) == (-50 <= tilt <= 70)
        assert bool(is_sampled(np.array(-x), np.array(-z), -50, 70)) == (-50 <= tilt <= 70)


@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 9, 9), (8, 6, 10)])
@pytest.mark.parametrize("tilts", [(-50.0, 70.0), (-60.0, 60.0), (10.0, 40.0), (-90.0, 30.0)])
def test_masks_are_friedel_symmetric_and_keep_zero_frequency(
    shape: tuple[int, int, int], tilts: tuple[float, float]
) -> None:
    mask = wedge_mask(shape, *tilts)
    mate = mask[np.ix_(*[-np.arange(n) % n for n in shape])]
    np.testing.assert_array_equal(mask, mate)
    assert mask[0, 0, 0] == 1
    assert (mask[0, :, 0] == 1).all()  # the tilt axis lies in every slice
    assert set(np.unique(mask)) == {0.0, 1.0}
    np.testing.assert_array_equal(wedge_mask(shape, *tilts, half=True), mask[..., : shape[2] // 2 + 1])


def test_the_asymmetric_wedge_keeps_the_right_side() -> None:
    mask = wedge_mask((32, 32, 32), -50, 70)
    # atan2(kz, kx): 60 degrees is in, -60 degrees is not.
    assert mask[7, 0, 4] == 1
    assert mask[-7, 0, 4] == 0
    assert mask[1, 0, 0] == 0


def test_the_whole_range_masks_nothing() -> None:
    assert (wedge_mask((8, 8, 8), -90, 90) == 1).all()


def test_the_share_that_is_sampled_is_that_of_the_angles() -> None:
    mask = wedge_mask((64, 1, 64), -60, 60)[:, 0]
    k = np.fft.fftfreq(64)
    disc = np.hypot(k[:, None], k[None, :]) < 0.45
    # Grid points of a sector, to about the share of points on its edges.
    assert mask[disc].mean() == pytest.approx(120 / 180, abs=0.02)


@pytest.mark.parametrize("tilts", [(60.0, -60.0), (-91.0, 60.0), (-60.0, 91.0), (5.0, 5.0)])
def test_impossible_ranges_are_refused(tilts: tuple[float, float]) -> None:
    with pytest.raises(InvalidArgument, match="tilt range"):
        wedge_mask((8, 8, 8), *tilts)
