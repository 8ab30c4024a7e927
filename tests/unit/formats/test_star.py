"""RELION 5 files as another reader sees them."""

from pathlib import Path

import numpy as np
import pytest
import starfile
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.formats.euler import from_euler
from cryofleet.formats.frames import CENTRE_RULES, CentreRule, tomogram_centre
from cryofleet.formats.star import encode_relion5_particles

CENTRED = ["rlnCenteredCoordinateXAngst", "rlnCenteredCoordinateYAngst", "rlnCenteredCoordinateZAngst"]
ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]


def test_coordinates_orientations_and_shifts_as_starfile_reads_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    positions, shifts = rng.uniform(0, 60, (40, 3)), rng.normal(0, 2, (40, 3))
    rotations = Rotation.random(40, rng=rng)
    path = tmp_path / "particles.star"
    path.write_bytes(
        b"".join(
            encode_relion5_particles(
                "TS_01",
                (32, 48, 65),
                7.84,
                positions,
                rotations=rotations,
                shifts=shifts,
                ids=np.arange(100, 140),
                scores=rng.random(40),
                class_numbers=np.full(40, 2),
                random_subsets=np.arange(40) % 2 + 1,
            )
        )
    )
    table = starfile.read(path)
    assert len(table) == 40
    assert set(table["rlnTomoName"]) == {"TS_01"}
    assert table["rlnTomoParticleName"][3] == "TS_01/103"
    # The particle is at position + shift; x counts from 65 / 2, y from 24, z from 16 voxels.
    expected = (positions + shifts - [32.5, 24, 16]) * 7.84
    np.testing.assert_allclose(table[CENTRED].to_numpy(), expected, atol=1e-6)
    assert not table[["rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst"]].to_numpy().any()
    # RELION's angles turn the particle back onto the reference.
    back = Rotation.from_euler("ZYZ", table[ANGLES].to_numpy(), degrees=True)
    assert np.rad2deg((back * rotations).magnitude()).max() < 1e-5
    assert set(table["rlnRandomSubset"]) == {1, 2}


def test_a_point_of_the_reference_is_found_at_the_same_place_by_relions_arithmetic(tmp_path: Path) -> None:
    """The whole chain for one particle: what RELION computes from the file is where the point really is."""
    shape, size = (40, 60, 80), 10.0
    position, shift, point = np.array([20.0, 30.0, 10.0]), np.array([1.5, -2.0, 0.25]), np.array([3.0, -4.0, 5.0])
    rotation = from_euler((30.0, 40.0, 50.0), "relion")
    truth = position + shift + rotation.apply(point)  # particle(r) = reference(R^-1 (r - c - t))
    path = tmp_path / "a.star"
    path.write_bytes(
        b"".join(
            encode_relion5_particles(
                "t", shape, size, position[None], rotations=Rotation.concatenate([rotation]), shifts=shift[None]
            )
        )
    )
    row = starfile.read(path).iloc[0]
    np.testing.assert_allclose(row[ANGLES].to_numpy(float), (30, 40, 50), atol=1e-5)
    centre = row[CENTRED].to_numpy(float) / size + np.array([80, 60, 40]) / 2
    origin = row[["rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst"]].to_numpy(float) / size
    reference_to_particle = Rotation.from_euler("ZYZ", row[ANGLES].to_numpy(float), degrees=True).as_matrix().T
    np.testing.assert_allclose(centre - origin + reference_to_particle @ point, truth, atol=1e-5)


def test_the_centre_rules_by_name() -> None:
    shape = (31, 40, 41)
    expected: dict[CentreRule, tuple[float, float, float]] = {
        "size/2": (20.5, 20.0, 15.5),
        "floor(size/2)": (20, 20, 15),
        "size/2-1": (19.5, 19, 14.5),
        "(size-1)/2": (20, 19.5, 15),
    }
    assert set(expected) == set(CENTRE_RULES)
    for rule, centre in expected.items():
        np.testing.assert_array_equal(tomogram_centre(shape, rule), centre)
    with pytest.raises(InvalidArgument, match="known are size/2"):
        tomogram_centre(shape, "corner")  # type: ignore[arg-type]


def test_the_same_angstroms_at_every_binning() -> None:
    """A voxel i of a tomogram binned by 4 lies at voxel 4 i of the unbinned one."""
    binned = (np.array([7.25, 3.0, 9.5]) - tomogram_centre((16, 24, 32))) * 8.0
    unbinned = (np.array([7.25, 3.0, 9.5]) * 4 - tomogram_centre((64, 96, 128))) * 2.0
    np.testing.assert_allclose(binned, unbinned, atol=1e-12)


def test_columns_are_those_of_files_that_relion_wrote(shared_data: Path, tmp_path: Path) -> None:
    theirs: set[str] = set()
    for name in ("cylindra_Refine3D_job_refine_run_it050_data.star", "cylindra_Picks_job_picks_particles.star"):
        tables = starfile.read(shared_data / "formats/particles" / name, always_dict=True)
        theirs |= set(tables["particles"].columns)
    path = tmp_path / "a.star"
    ones = np.ones(1, np.int64)
    path.write_bytes(
        b"".join(
            encode_relion5_particles(
                "t", (9, 9, 9), 1.0, np.ones((1, 3)), rotations=Rotation.identity(1), class_numbers=ones,
                random_subsets=ones,
            )
        )
    )  # fmt: skip
    assert set(starfile.read(path).columns) <= theirs


def test_a_percent_sign_in_a_name_stands_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.star"
    path.write_bytes(b"".join(encode_relion5_particles("50%dose", (9, 9, 9), 1.0, np.ones((2, 3)))))
    assert list(starfile.read(path)["rlnTomoParticleName"]) == ["50%dose/1", "50%dose/2"]


def test_no_particles_still_make_a_file_with_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.star"
    path.write_bytes(b"".join(encode_relion5_particles("t", (9, 9, 9), 1.0, np.zeros((0, 3)))))
    assert "_rlnCenteredCoordinateZAngst #5" in path.read_text()


def test_what_cannot_stand_in_a_star_file() -> None:
    with pytest.raises(InvalidArgument, match="tomogram_name"):
        list(encode_relion5_particles("my tomo", (9, 9, 9), 1.0, np.ones((1, 3))))
    with pytest.raises(InvalidArgument, match="row 1"):
        list(encode_relion5_particles("t", (9, 9, 9), 1.0, np.array([[1, 1, 1], [1, np.nan, 1]])))
