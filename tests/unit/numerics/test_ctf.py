"""The CTF against its formula, published constants and the geometry of a tilted specimen."""

import math

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.ctf import (
    GRADIENT_LIMIT_DEGREES,
    Ctf,
    ctf_grid,
    defocus_at,
    electron_wavelength_angstrom,
    image_frequencies,
    interaction_constant,
    radial_frequency,
)


@pytest.mark.parametrize(("voltage", "wavelength"), [(100, 0.037014), (200, 0.025079), (300, 0.019687)])
def test_wavelengths_are_those_of_the_tables(voltage: float, wavelength: float) -> None:
    assert electron_wavelength_angstrom(voltage) == pytest.approx(wavelength, abs=5e-7)


@pytest.mark.parametrize(("voltage", "constant"), [(100, 9.244e-4), (200, 7.288e-4), (300, 6.526e-4)])
def test_interaction_constants_are_those_of_the_tables(voltage: float, constant: float) -> None:
    """Kirkland, Advanced Computing in Electron Microscopy, table 2.1 (rad / (V Å))."""
    assert interaction_constant(voltage) == pytest.approx(constant, rel=2e-4)


def test_the_ctf_is_the_formula() -> None:
    ctf = Ctf(defocus_um=2.5, cs_mm=2.7, amplitude_contrast=0.1, phase_shift_degrees=20)
    k = np.linspace(0, 0.3, 500)
    chi = math.pi * 0.0196875 * 25000 * k**2 - math.pi / 2 * 2.7e7 * 0.0196875**3 * k**4 + math.radians(20)
    expected = -(math.sqrt(1 - 0.01) * np.sin(chi) + 0.1 * np.cos(chi))
    # the wavelength is given to 6e-7 relative above, and chi reaches 140
    assert np.abs(ctf(k) - expected).max() < 3e-4


def test_protein_is_dark() -> None:
    """Underfocus, amplitude contrast and a phase plate each make the CTF negative at low frequencies."""
    k = 0.01
    assert Ctf(defocus_um=3)(k) < 0
    assert Ctf(defocus_um=0)(0) == pytest.approx(-0.07)
    assert Ctf(defocus_um=0, phase_shift_degrees=90)(0) == pytest.approx(-math.sqrt(1 - 0.07**2))
    assert Ctf(defocus_um=-3)(k) > 0


@pytest.mark.parametrize(
    "ctf",
    [
        Ctf(defocus_um=2),
        Ctf(defocus_um=-0.05),
        Ctf(defocus_um=0.1),
        Ctf(defocus_um=4, cs_mm=0, voltage_kv=200, amplitude_contrast=0.2),
        Ctf(defocus_um=0.5, phase_shift_degrees=90, voltage_kv=100),
        Ctf(defocus_um=0),
    ],
)
def test_zeros_are_all_the_sign_changes(ctf: Ctf) -> None:
    zeros = ctf.zeros(0.4)
    k = np.linspace(0, 0.4, 400_001)
    values = ctf(k)
    changes = np.flatnonzero(np.signbit(values[1:]) != np.signbit(values[:-1]))
    assert len(zeros) == len(changes)
    assert np.all((zeros >= k[changes]) & (zeros <= k[changes + 1]))
    assert np.abs(ctf(zeros)).max(initial=0) < 1e-11


def test_the_envelope_is_the_b_factor_s() -> None:
    k = np.linspace(0, 0.2, 50)
    assert np.allclose(Ctf(defocus_um=2, b_factor=120)(k), Ctf(defocus_um=2)(k) * np.exp(-30 * k**2), atol=1e-15)


def test_astigmatism_has_its_largest_defocus_at_its_angle() -> None:
    ctf = Ctf(defocus_um=2, astigmatism_um=0.4, astigmatism_angle_degrees=30)
    k = np.linspace(0, 0.2, 100)
    for degrees, defocus in ((30, 2.2), (210, 2.2), (120, 1.8), (75, 2.0)):
        assert np.allclose(ctf(k, math.radians(degrees)), Ctf(defocus_um=defocus)(k), atol=1e-9)
    assert np.allclose(ctf.zeros(0.2, math.radians(120)), Ctf(defocus_um=1.8).zeros(0.2))


def test_the_grid_is_the_function_at_each_frequency() -> None:
    ctf = Ctf(defocus_um=1.5, astigmatism_um=0.3, astigmatism_angle_degrees=20)
    grid = ctf_grid(ctf, (11, 15), 4.0)
    assert grid.shape == (11, 8)
    assert grid.dtype == np.float32
    # row 9 is ky = -2 / (11 * 4 Å), column 3 is kx = 3 / (15 * 4 Å)
    ky, kx = -2 / 44, 3 / 60
    assert grid[9, 3] == pytest.approx(float(ctf(math.hypot(kx, ky), math.atan2(ky, kx))), abs=1e-6)
    whole = ctf_grid(ctf, (11, 15), 4.0, half=False)
    assert whole.shape == (11, 15)
    assert np.allclose(whole[:, :8], grid)
    # the image of a real object is real: k and -k have one value
    assert np.allclose(whole[1:, 1:], whole[1:, 1:][::-1, ::-1], atol=1e-6)
    k, _ = image_frequencies((11, 15), 4.0)
    assert k.max() < 0.125 * math.sqrt(2) + 1e-12
    assert np.allclose(radial_frequency((11, 15), 4.0), k)
    round_one = Ctf(defocus_um=1.5)
    assert np.allclose(ctf_grid(round_one, (11, 15), 4.0), round_one(k), atol=1e-6)


@pytest.mark.parametrize("tilt", [-60.0, -13.0, 0.0, 47.0])
def test_the_gradient_is_the_height_of_the_tilted_specimen(tilt: float) -> None:
    """The sample is turned about y; a point nearer to the source (higher z) is less out of focus, by its height."""
    rng = np.random.default_rng(3)
    x, z = rng.uniform(-3000, 3000, (2, 20))
    turned = Rotation.from_euler("y", tilt, degrees=True).apply(np.stack([x, np.zeros(20), z], axis=1))
    u, height = turned[:, 0], turned[:, 2]
    assert np.allclose(defocus_at(3.0, tilt, u, z), 3.0 - height * 1e-4, atol=1e-9)


def test_the_gradient_is_bounded_where_the_specimen_is_seen_edge_on() -> None:
    assert defocus_at(2.0, 90.0, 100.0) == defocus_at(2.0, GRADIENT_LIMIT_DEGREES, 100.0)
    assert defocus_at(2.0, -90.0, 100.0) == defocus_at(2.0, -GRADIENT_LIMIT_DEGREES, 100.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("voltage_kv", 0), ("amplitude_contrast", 1.5), ("cs_mm", -1), ("b_factor", -1), ("defocus_um", math.nan)],
)
def test_what_no_microscope_has_is_named(field: str, value: float) -> None:
    with pytest.raises(InvalidArgument, match=field):
        Ctf(**{"defocus_um": 2.0, field: value})


def test_a_pixel_without_size_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="pixel_size"):
        ctf_grid(Ctf(defocus_um=1), (8, 8), 0.0)
