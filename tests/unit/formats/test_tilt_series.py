"""Tilt series' metadata: files of other programs, and ours there and back."""

import math
from pathlib import Path

import numpy as np
import pytest

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.tilt_series import (
    MAX_TILTS,
    TiltSeries,
    read_mdoc,
    read_tilt_series,
    read_tlt,
    write_mdoc,
    write_tlt,
)


def series() -> TiltSeries:
    """Everything known, and no number a round one."""
    rng = np.random.default_rng(5)
    angles = np.round(np.arange(-6.0, 7.0, 3.0), 6) + 0.1
    order = np.array([4, 2, 0, 1, 3])
    dose = 2.9 + rng.random(5)
    prior = np.empty(5)
    prior[np.argsort(order)] = np.concatenate([[0.0], np.cumsum(dose[np.argsort(order)])[:-1]])
    return TiltSeries(
        angles,
        acquisition_order=order,
        exposure=dose,
        prior_dose=prior,
        defocus_um=3 + rng.normal(size=5) / 7,
        astigmatism_um=rng.random(5),
        astigmatism_angle_degrees=rng.random(5) * 90,
        phase_shift_degrees=rng.random(5),
        shifts_angstrom=rng.normal(size=(5, 2)),
        rotations_degrees=rng.normal(size=5),
        tilt_axis_degrees=-12.3,
        pixel_size_angstrom=1.0 / 3,
        voltage_kv=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.07,
    )


def test_json_there_and_back_is_exact() -> None:
    before = series()
    after = TiltSeries.from_json(before.to_json(), "tilts.json")
    assert after.to_mapping() == before.to_mapping()
    assert set(after.to_mapping()) > {"acquisition_order", "shifts_angstrom", "amplitude_contrast"}
    assert read_tilt_series(before.to_json(), "tilts.json").to_mapping() == before.to_mapping()
    # what is not known stays so
    bare = TiltSeries(np.array([-1.5, 0.1]))
    assert TiltSeries.from_json(bare.to_json(), "bare").to_mapping() == bare.to_mapping()
    assert bare.defocus_um is None


def test_tlt_there_and_back_is_exact() -> None:
    angles = np.array([-60.000001, -1 / 3, -0.0, 0.1 + 0.2, 89.99999999999999])
    text = write_tlt(angles)
    assert np.array_equal(read_tlt(text, "a.tlt").angles_degrees, angles)
    assert b"-0.0\n" not in text.replace(b" ", b"").replace(b"60.0", b"")
    assert np.array_equal(read_tilt_series(text, "a.tlt").angles_degrees, angles)


def test_mdoc_there_and_back_is_exact_in_all_that_it_holds() -> None:
    before = series()
    data = write_mdoc(before, "TS_1.mrc", (64, 48))
    after = read_mdoc(data, "TS_1.mrc.mdoc")
    held = before.to_mapping()
    for name in ("cs_mm", "amplitude_contrast", "shifts_angstrom", "rotations_degrees"):
        del held[name]
    for name in ("astigmatism_um", "astigmatism_angle_degrees", "phase_shift_degrees"):
        del held[name]
    assert after.to_mapping() == held
    assert read_tilt_series(data.replace(b"\n", b"\r\n"), "dos.mdoc").to_mapping() == held


def test_an_mdoc_of_little_holds_little() -> None:
    bare = TiltSeries(np.array([-1.5, 0.1, 3]))
    assert read_mdoc(write_mdoc(bare, "a.mrc", (8, 8)), "a").to_mapping() == bare.to_mapping()


def test_more_than_a_day_of_images_keeps_its_order() -> None:
    order = np.random.default_rng(1).permutation(2000)
    long = TiltSeries(np.linspace(-60, 60, 2000), acquisition_order=order)
    read = read_mdoc(write_mdoc(long, "a.mrc", (8, 8)), "a")
    assert read.acquisition_order is not None
    assert np.array_equal(read.acquisition_order, order)


def test_a_series_of_a_krios(shared_data: Path) -> None:
    """60 images from -52 to 66 degrees, dose-symmetric in groups, 2.238 e/Å^2 each."""
    data = (shared_data / "formats/tiltseries/cryocat_017.mdoc").read_bytes()
    read = read_tilt_series(data, "017.mdoc")
    tlt = read_tilt_series((shared_data / "formats/tiltseries/cryocat_017.tlt").read_bytes(), "017.tlt")
    assert len(read) == len(tlt) == 60
    assert np.abs(read.angles_degrees - tlt.angles_degrees).max() < 0.0055
    assert read.pixel_size_angstrom == 1.971
    assert read.voltage_kv == 300
    assert read.tilt_axis_degrees == 82.9
    assert read.exposure is not None
    assert read.prior_dose is not None
    assert read.acquisition_order is not None
    assert np.allclose(read.exposure, 2.238, atol=0.01)
    # recorded from 8 degrees outwards ("dosym = 8.0"), and each image adds its dose to the next one's
    assert read.angles_degrees[np.argmin(read.acquisition_order)] == pytest.approx(8, abs=0.1)
    sequence = np.argsort(read.acquisition_order)
    assert read.prior_dose[sequence[0]] < 0.1
    assert np.diff(read.prior_dose[sequence]).min() > 2
    # what the lens was set to is no defocus
    assert read.defocus_um is None


def test_an_older_series_without_doses(shared_data: Path) -> None:
    data = (shared_data / "formats/mdoc/TS_01.mrc.mdoc").read_bytes()
    read = read_tilt_series(data, "TS_01.mrc.mdoc")
    assert len(read) == 41
    assert read.pixel_size_angstrom == 5.4
    assert read.tilt_axis_degrees == 85.3
    # ExposureDose is 0 throughout: not calibrated
    assert read.exposure is None
    assert read.prior_dose is None
    # the stack is in the order of recording, by its dates
    assert read.acquisition_order is not None
    assert np.array_equal(read.acquisition_order, np.arange(41))
    assert read.angles_degrees[:4] == pytest.approx([0, 3, -3, -6], abs=0.01)


def test_the_axis_without_a_title_is_the_rotation_less_90(shared_data: Path) -> None:
    """The two files that have both differ by 90 degrees."""
    data = (shared_data / "formats/tiltseries/cryocat_017.mdoc").read_bytes()
    untitled = data.replace(b"Tilt axis angle", b"Something else")
    assert untitled != data
    assert read_mdoc(untitled, "a").tilt_axis_degrees == pytest.approx(82.9)


def test_other_real_files(shared_data: Path) -> None:
    formats = shared_data / "formats"
    for path, count, first in (
        ("tiltseries/uermel_tilt_1.tlt", 59, -52.24),
        ("pytom/tomo200528_100.rawtlt", 34, -50.9931),
        ("pytom/angles.tlt", 59, -60.0),
        ("mdoc/frame_set_single.mdoc", 1, 32.984),
    ):
        read = read_tilt_series((formats / path).read_bytes(), path)
        assert len(read) == count
        assert read.angles_degrees[0] == first


def test_prior_doses_are_summed_in_the_order_of_dates() -> None:
    def section(z: int, angle: float, minute: int) -> str:
        return (
            f"[ZValue = {z}]\nTiltAngle = {angle}\nExposureDose = {z + 1}\n"
            f"DateTime = 01-Feb-{'2023' if z else '23'}  10:0{minute}:00\n"
        )

    read = read_mdoc("".join([section(2, 3, 1), section(0, -3, 2), section(1, 0, 0)]).encode(), "a.mdoc")
    assert read.angles_degrees.tolist() == [-3, 0, 3]
    assert read.acquisition_order is not None
    assert read.prior_dose is not None
    assert read.acquisition_order.tolist() == [2, 0, 1]
    assert read.prior_dose.tolist() == [5, 0, 2]


MDOC = "PixelSpacing = 2\n\n[ZValue = 0]\nTiltAngle = 1\n\n[ZValue = 1]\nTiltAngle = 2\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no tilt angle in the file"),
        ("\n\n  \n", "no tilt angle in the file"),
        ("1.0\n2.0\nthree\n", "line 3: tilt angle 'three' is not a finite number"),
        ("1.0\n\nnan\n", "line 3: tilt angle 'nan'"),
        ("1.0 2.0\n", "line 1: tilt angle '1.0 2.0'"),
        ("1_0\n", "line 1: tilt angle '1_0'"),
        ("0\n91\n", "line 2: 91 is no tilt angle"),
        ("1\n" * (MAX_TILTS + 1), f"line {MAX_TILTS + 1}: more than {MAX_TILTS}"),
        ("1.0\n\0", "not a text file"),
        ("x" * 100_000, "line 1: tilt angle"),
        ("PixelSpacing = 2\n", r"no \[ZValue"),
        (MDOC + "[ZValue = 1]\nTiltAngle = 3\n", "line 8: section 1 is there twice, first in line 6"),
        (MDOC + "[ZValue = 2]\nDefocus = 3\n", "line 8: section 2 has no TiltAngle"),
        (MDOC + "[ZValue = -2]\n", "line 8: ZValue '-2' is no number of an image"),
        (MDOC + "[ZValue = 99999999999999999999]\n", "line 8: ZValue"),
        (MDOC + "[ZValue = 2\n", "line 8: the bracket is not closed"),
        (MDOC + "hello\n", "line 8: 'hello' is no 'key = value'"),
        (MDOC.replace("TiltAngle = 2", "TiltAngle = 1e999"), "line 7: tilt angle '1e999'"),
        (MDOC.replace("TiltAngle = 2", "TiltAngle = 1000"), "line 7: 1000 is no tilt angle"),
        (MDOC.replace("PixelSpacing = 2", "PixelSpacing = two"), "line 1: PixelSpacing 'two' is not a finite number"),
        (MDOC.replace("PixelSpacing = 2", "PixelSpacing = -2"), "pixel_size_angstrom is -2"),
        ("{", "line 1: not JSON"),
        ("{}", "format is None"),
        ('{"format": "cryofleet.tilt-series/1"}', "angles_degrees is missing"),
        ('{"format": "cryofleet.tilt-series/1", "angles_degrees": [1, 95]}', "angles_degrees: 95 is no tilt angle"),
        ('{"format": "cryofleet.tilt-series/1", "angles_degrees": [1, "2"]}', "angles_degrees must be a list of num"),
        ('{"format": "cryofleet.tilt-series/1", "angles_degrees": [1, [2]]}', "angles_degrees must be a list of num"),
        ('{"format": "cryofleet.tilt-series/1", "angles_degrees": 1}', "angles_degrees must be a list"),
        ('{"format": "cryofleet.tilt-series/1", "angles_degrees": []}', "0 tilt angles"),
        ('{"format": "cryofleet.tilt-series/1", "angles_degrees": [1], "exposure": [NaN]}', "exposure: nan is no dose"),
        ('{"format": "cryofleet.tilt-series/1", "angles_degrees": [1], "exposure": [-1]}', "exposure: -1 is no dose"),
        ('{"format": "cryofleet.tilt-series/1", "angles_degrees": [1], "voltage_kv": true}', "voltage_kv must be"),
        ('{"format": "cryofleet.tilt-series/1", "angles_degrees": [1], "colour": 1}', "unknown field 'colour'"),
        (
            '{"format": "cryofleet.tilt-series/1", "angles_degrees": [1, 2], "shifts_angstrom": [1, 2]}',
            "shifts_angstrom has shape",
        ),
        (
            '{"format": "cryofleet.tilt-series/1", "angles_degrees": [1, 2], "acquisition_order": [1, 1]}',
            "acquisition_order must hold every number from 0 to 1 once",
        ),
        ('{"a": ' * 100_000, "TS"),
    ],
)
def test_hostile_files_are_named_with_their_line(text: str, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named) as caught:
        read_tilt_series(text.encode(), "TS")
    assert str(caught.value).startswith("TS")
    assert len(str(caught.value)) < 300


def test_files_of_other_kinds_are_refused_with_what_is_expected(shared_data: Path) -> None:
    for path in ("tiltseries/uermel_tilt_1.xf", "tiltseries/uermel_test.aln", "tiltseries/cryocat_wedge_list.star"):
        with pytest.raises(InvalidArgument, match=r"expected a \.tlt"):
            read_tilt_series((shared_data / "formats" / path).read_bytes(), path)


def test_the_sections_pixels_must_agree() -> None:
    text = "[ZValue = 0]\nTiltAngle = 1\nPixelSpacing = 2\n[ZValue = 1]\nTiltAngle = 2\nPixelSpacing = 3\n"
    with pytest.raises(InvalidArgument, match="PixelSpacing differ, 2 to 3"):
        read_mdoc(text.encode(), "a.mdoc")


def test_a_file_name_cannot_write_lines_of_its_own() -> None:
    with pytest.raises(InvalidArgument, match="line break"):
        write_mdoc(series(), "a.mrc\n[ZValue = 9]", (8, 8))


def test_what_is_known_stays_and_what_is_not_is_filled() -> None:
    filled = TiltSeries(np.array([0.0, 3.0]), voltage_kv=200).filled(voltage_kv=300, cs_mm=2.7, defocus_um=4.0)
    assert filled.voltage_kv == 200
    assert filled.cs_mm == 2.7
    assert filled.defocus_um is not None
    assert filled.defocus_um.tolist() == [4, 4]
    with pytest.raises(FailedPrecondition, match="amplitude_contrast"):
        filled.ctf(0)
    ctf = series().ctf(3)
    expected = series().defocus_um
    assert expected is not None
    assert ctf.defocus_um == expected[3]
    assert math.isclose(ctf.cs_mm, 2.7)


def test_some_images_of_a_series() -> None:
    every_other = series().select(slice(0, None, 2))
    assert every_other.acquisition_order is not None
    assert every_other.shifts_angstrom is not None
    assert every_other.acquisition_order.tolist() == [2, 0, 1]
    assert every_other.shifts_angstrom.shape == (3, 2)
    assert every_other.pixel_size_angstrom == 1 / 3
