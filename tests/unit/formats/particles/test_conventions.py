"""What each format's numbers mean, against values computed by hand or by other programs."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from cryofleet.formats.euler import from_euler
from cryofleet.formats.frames import BinningRule, Frame, rebinned
from cryofleet.formats.particles import catalogue, files, imod, relion
from cryofleet.formats.particles.catalogue import FORMATS
from cryofleet.formats.particles.table import ParticleTable, rescaled
from cryofleet.particles import Particles
from tests.unit.formats.particles.tables import ENDINGS, table_of

GOLDEN = from_euler((30.0, 40.0, 50.0), "relion")
SHAPE = (100, 201, 300)


def one(**columns: float) -> Particles:
    """A particle of the golden rotation at (10.25, 20.5, -3.75), shifted by (1, -2, 0.5)."""
    particles = Particles.from_positions(
        [[10.25, 20.5, -3.75]], 4.0, "TS_01", SHAPE, Rotation.concatenate([GOLDEN]),
        id=[7], score=[0.5], class_id=[2], half=[2],
    )  # fmt: skip
    return particles.with_columns(shift_x=[1.0], shift_y=[-2.0], shift_z=[0.5])


def written(name: str, folder: Path, **frame: object) -> Path:
    path = folder / f"a{ENDINGS[name]}"
    catalogue.write(path, one(), FORMATS[name], **frame)  # type: ignore[arg-type]
    return path


def star_row(path: Path) -> dict[str, str]:
    lines = path.read_text().split("data_particles")[-1].split("data_\n")[-1].splitlines()
    labels = [line.split()[0].lstrip("_") for line in lines if line.startswith("_")]
    values = next(line for line in reversed(lines) if line.strip()).split()
    return dict(zip(labels, values, strict=True))


def test_relion_3_0_counts_voxels_and_subtracts_origins_in_voxels(tmp_path: Path) -> None:
    row = star_row(written("relion-3.0", tmp_path))
    assert [float(row[f"rlnCoordinate{axis}"]) for axis in "XYZ"] == [10.25, 20.5, -3.75]
    assert [float(row[f"rlnOrigin{axis}"]) for axis in "XYZ"] == [-1, 2, -0.5]
    np.testing.assert_allclose(
        [float(row[f"rlnAngle{name}"]) for name in ("Rot", "Tilt", "Psi")], (30, 40, 50), atol=1e-4
    )
    assert (row["rlnClassNumber"], row["rlnRandomSubset"], row["rlnPixelSize"]) == ("3", "2", "4")


@pytest.mark.parametrize("name", ["relion-3.1", "relion-4"])
def test_later_relion_subtracts_origins_in_angstrom(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    row = star_row(path)
    assert [float(row[f"rlnOrigin{axis}Angst"]) for axis in "XYZ"] == [-4, 8, -2]
    size = "rlnImagePixelSize" if name == "relion-3.1" else "rlnTomoTiltSeriesPixelSize"
    assert f"_{size}" in path.read_text()


@pytest.mark.parametrize(
    ("rule", "centre"),
    [("size/2", (150, 100.5, 50)), ("floor(size/2)", (150, 100, 50)), ("size/2-1", (149, 99.5, 49)),
     ("(size-1)/2", (149.5, 100, 49.5))],
)  # fmt: skip
def test_relion_5_counts_angstrom_from_the_centre_of_the_named_rule(
    rule: str, centre: tuple[float, ...], tmp_path: Path
) -> None:
    path = written("relion-5", tmp_path, centre=rule)
    row = star_row(path)
    expected = (np.array([10.25, 20.5, -3.75]) - centre) * 4.0
    np.testing.assert_allclose([float(row[f"rlnCenteredCoordinate{axis}Angst"]) for axis in "XYZ"], expected, atol=1e-6)
    _, table = catalogue.read(path, "a", voxel_size_angstrom=4.0, tomogram_shape=SHAPE, centre=rule)
    np.testing.assert_allclose(table.particles().positions(), one().positions(), atol=1e-6)


def test_dynamo_counts_from_one_in_its_own_angles(tmp_path: Path) -> None:
    row = [float(word) for word in written("dynamo", tmp_path).read_text().split()]
    assert len(row) == 42
    assert row[0] == 7
    assert row[3:6] == [1, -2, 0.5]
    np.testing.assert_allclose(row[6:9], (-40, 40, 120), atol=1e-4)
    assert row[21] == 3
    assert row[23:26] == [11.25, 21.5, -2.75]
    assert row[35] == 4.0


def test_dynamo_to_relion_as_the_eulerangles_package_has_it(tmp_path: Path) -> None:
    row = ["0"] * 26
    row[0], row[6:9], row[19] = "1", ["-47.2730", "1.1777", "-132.3000"], "5"
    (tmp_path / "a.tbl").write_text(" ".join(row) + "\n")
    found, table = catalogue.read(tmp_path / "a.tbl", "a.tbl", voxel_size_angstrom=1.0)
    catalogue.convert(table, found, tmp_path / "a.star", FORMATS["relion-4"])
    read = star_row(tmp_path / "a.star")
    angles = [float(read[f"rlnAngle{name}"]) for name in ("Rot", "Tilt", "Psi")]
    np.testing.assert_allclose(angles, (137.7000, 1.1777, 42.7270), atol=1e-4)


def test_motive_lists_hold_av3_angles_and_count_from_one(tmp_path: Path) -> None:
    data = written("em", tmp_path).read_bytes()
    assert struct.unpack("<3i", data[4:16]) == (20, 1, 1)
    assert (data[0], data[3]) == (6, 5)
    row = np.frombuffer(data, "<f4", offset=512)
    np.testing.assert_allclose(row[7:13], [11.25, 21.5, -2.75, 1, -2, 0.5])
    # R = Rz(psi) Rx(theta) Rz(phi), what cryoCAT's (-120, -40, 40) is
    read = Rotation.from_euler("zxz", [row[16], row[18], row[17]], degrees=True)
    assert np.rad2deg((GOLDEN.inv() * read).magnitude()) < 1e-4
    assert np.rad2deg((GOLDEN.inv() * Rotation.from_euler("zxz", (-120, -40, 40), degrees=True)).magnitude()) < 1e-4


def test_stopgap_has_the_same_in_a_star_file(tmp_path: Path) -> None:
    text = written("stopgap", tmp_path).read_text()
    assert "data_stopgap_motivelist" in text
    labels = [line[1:] for line in text.splitlines() if line.startswith("_")]
    row = dict(zip(labels, text.split()[-len(labels) :], strict=True))
    assert [float(row[name]) for name in ("orig_x", "orig_y", "orig_z")] == [11.25, 21.5, -2.75]
    assert [float(row[name]) for name in ("x_shift", "y_shift", "z_shift")] == [1, -2, 0.5]
    read = Rotation.from_euler("zxz", [float(row[name]) for name in ("phi", "the", "psi")], degrees=True)
    assert np.rad2deg((GOLDEN.inv() * read).magnitude()) < 1e-4
    assert (row["halfset"], row["class"], row["subtomo_num"]) == ("B", "3", "7")


def test_eman_counts_unbinned_pixels_from_the_centre_with_the_shift(tmp_path: Path) -> None:
    document = json.loads(written("eman", tmp_path).read_text())
    assert document["apix_unbin"] == 4.0
    assert document["boxes_3d"][0][:3] == [10.25 + 1 - 150, 20.5 - 2 - 100, -3.75 + 0.5 - 50]


def test_imod_points_are_half_a_voxel_on_in_x_and_y_alone(tmp_path: Path) -> None:
    data = written("imod", tmp_path).read_bytes()
    point = np.frombuffer(data, ">f4", 3, data.index(b"CONT") + 20)
    np.testing.assert_array_equal(point, [11.75, 19.0, -3.25])
    assert struct.unpack(">3i", data[136:148]) == (300, 201, 100)


def test_copick_keeps_the_shift_in_the_matrix(tmp_path: Path) -> None:
    catalogue.write(tmp_path / "project", one(), FORMATS["copick"])
    (file,) = (tmp_path / "project").glob("ExperimentRuns/TS_01/Picks/*.json")
    point = json.loads(file.read_text())["points"][0]
    assert point["location"] == {"x": 41.0, "y": 82.0, "z": -15.0}
    matrix = np.array(point["transformation_"])
    np.testing.assert_allclose(matrix[:3, 3], [4, -8, 2])
    np.testing.assert_allclose(matrix[:3, :3], GOLDEN.as_matrix(), atol=1e-12)


def test_the_portal_holds_the_whole_place(tmp_path: Path) -> None:
    point = json.loads(written("portal", tmp_path).read_text())
    assert point["location"] == {"x": 11.25, "y": 18.5, "z": -3.25}
    np.testing.assert_allclose(point["xyz_rotation_matrix"], GOLDEN.as_matrix(), atol=1e-12)


def test_a_mirrored_tomogram_and_back(tmp_path: Path) -> None:
    """A point of the particle lies at the mirror image of where it lay."""
    path = written("relion-3.0", tmp_path, handedness="left")
    _, mirrored = catalogue.read(path, "a")
    point = np.array([3.0, -4.0, 5.0])
    there = mirrored.particles().with_columns(id=[0])
    rotations, original = there.rotations(), one().rotations()
    assert rotations is not None
    assert original is not None
    place = one().positions()[0] + one().shifts()[0] + original[0].apply(point)
    image = there.positions()[0] + there.shifts()[0] + rotations[0].apply(point * [1, 1, -1])
    np.testing.assert_allclose(image, [place[0], place[1], 99 - place[2]], atol=1e-5)
    _, table = catalogue.read(path, "a", handedness="left", tomogram_shape=SHAPE)
    again = table.particles()
    np.testing.assert_allclose(again.positions(), one().positions(), atol=1e-6)
    np.testing.assert_allclose(again.shifts(), one().shifts(), atol=1e-6)
    turned = again.rotations()
    assert turned is not None
    assert np.rad2deg((turned[0].inv() * GOLDEN).magnitude()) < 1e-4


@pytest.mark.parametrize(("rule", "expected"), [("index", 2.5), ("edge", 2.125)])
def test_binning_by_name(rule: BinningRule, expected: float) -> None:
    np.testing.assert_array_equal(rebinned([[10.0, 10, 10]], 4, rule), [[expected] * 3])
    np.testing.assert_array_equal(rebinned([[expected] * 3], 0.25, rule), [[10.0, 10, 10]])
    binned = rescaled(one(), 16.0, rule)
    np.testing.assert_allclose(binned.shifts(), one().shifts() / 4)
    assert binned.tomogram_shape is None  # 201 / 4 is not whole
    back = rescaled(binned, 4.0, rule)
    np.testing.assert_allclose(back.positions(), one().positions(), atol=1e-12)


def test_the_same_angstroms_at_every_binning(tmp_path: Path) -> None:
    """RELION 5's rule of the centre makes positions independent of the voxels they are counted in."""
    particles = Particles.from_positions([[10.5, 20.25, 5.0]], 8.0, "t", (16, 24, 32))
    catalogue.write(tmp_path / "a.star", particles, FORMATS["relion-5"])
    catalogue.write(tmp_path / "b.star", rescaled(particles, 2.0), FORMATS["relion-5"])
    assert star_row(tmp_path / "a.star") == star_row(tmp_path / "b.star")


def test_subtomogram_angles_turn_particles_and_their_origins(tmp_path: Path) -> None:
    (tmp_path / "a.star").write_text(
        "data_optics\nloop_\n_rlnOpticsGroup\n_rlnTomoTiltSeriesPixelSize\n1 2.0\n\n"
        "data_particles\nloop_\n_rlnTomoName\n"
        "_rlnCoordinateX\n_rlnCoordinateY\n_rlnCoordinateZ\n_rlnOriginXAngst\n_rlnOriginYAngst\n_rlnOriginZAngst\n"
        "_rlnAngleRot\n_rlnAngleTilt\n_rlnAnglePsi\n_rlnTomoSubtomogramRot\n_rlnTomoSubtomogramTilt\n"
        "_rlnTomoSubtomogramPsi\n_rlnOpticsGroup\nt 1 2 3 4 6 8 30 40 50 10 20 30 1\n"
    )
    particles = relion.read(tmp_path / "a.star", "a").particles()
    subtomogram = from_euler((10.0, 20.0, 30.0), "relion")
    np.testing.assert_allclose(particles.shifts()[0], -subtomogram.apply([2, 3, 4]), atol=1e-12)
    rotations = particles.rotations()
    assert rotations is not None
    assert ((subtomogram * GOLDEN).inv() * rotations[0]).magnitude() < 1e-12


def test_tomograms_of_their_own_shapes(tmp_path: Path) -> None:
    (tmp_path / "tomograms.star").write_text(
        "data_global\nloop_\n_rlnTomoName\n_rlnTomoSizeX\n_rlnTomoSizeY\n_rlnTomoSizeZ\n_rlnTomoTiltSeriesPixelSize\n"
        "a 40 50 60 2.0\nb 10 20 30 2.0\n"
    )
    shapes, size = relion.read_tomograms(tmp_path / "tomograms.star", "tomograms.star")
    assert shapes == {"a": (60, 50, 40), "b": (30, 20, 10)}
    assert size == 2.0
    (tmp_path / "p.star").write_text(
        "data_particles\nloop_\n_rlnTomoName\n_rlnCenteredCoordinateXAngst\n_rlnCenteredCoordinateYAngst\n"
        "_rlnCenteredCoordinateZAngst\na 0 0 0\nb 0 2 -2\n"
    )
    found, table = catalogue.read(tmp_path / "p.star", "p.star", tomogram_shape=shapes, voxel_size_angstrom=size)
    np.testing.assert_array_equal(table.particles().positions(), [[20, 25, 30], [5, 11, 14]])
    catalogue.convert(table, found, tmp_path / "q.star", FORMATS["relion-5"])
    _, again = catalogue.read(tmp_path / "q.star", "q", tomogram_shape=shapes, voxel_size_angstrom=size)
    np.testing.assert_array_equal(again.positions, table.positions)
    with pytest.raises(FailedPrecondition, match="shape of tomogram 'b'"):
        table.with_frame(tomogram_shape={"a": (60, 50, 40)}).particles()


def test_what_is_not_known_is_asked_for(tmp_path: Path) -> None:
    catalogue.write(tmp_path / "a.em", one(), FORMATS["em"])
    _, table = catalogue.read(tmp_path / "a.em", "a.em")
    with pytest.raises(FailedPrecondition, match=r"a\.em: .*--voxel-size"):
        table.particles()
    catalogue.write(tmp_path / "a.star", one(), FORMATS["relion-5"])
    _, table = catalogue.read(tmp_path / "a.star", "a.star", voxel_size_angstrom=4.0)
    with pytest.raises(FailedPrecondition, match="--tomogram-shape"):
        table.particles()
    with pytest.raises(InvalidArgument, match=r"--to: relion-3\.0, "):
        catalogue.for_writing(tmp_path / "b.star")
    with pytest.raises(InvalidArgument, match="--select-tomogram"):
        catalogue.write(tmp_path / "b.mod", table_of(tomograms=("a", "b")), FORMATS["imod"])
    with pytest.raises(InvalidArgument, match="no other frame"):
        catalogue.write(tmp_path / "b.csv", one(), FORMATS["csv"], origin="one")
    with pytest.raises(NotFound):
        catalogue.read(tmp_path / "none.star", "none.star")
    with pytest.raises(InvalidArgument, match="known are voxel"):
        Frame(unit="nm")  # type: ignore[arg-type]


def test_what_would_be_lost_is_said(tmp_path: Path) -> None:
    found, table = "relion-4", ParticleTable.in_frame(one(), FORMATS["relion-4"].frame)
    done = catalogue.convert(table, FORMATS[found], tmp_path / "a.mod", FORMATS["imod"])
    assert done.lost == ("rotations", "scores", "half sets", "tomogram's name")


def test_hostile_files_are_refused_with_their_names(tmp_path: Path) -> None:
    def refused(name: str, content: bytes, match: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InvalidArgument, match=match) as caught:
            catalogue.read(path, name)
        assert name in str(caught.value)

    refused(
        "a.xml",
        b'<!DOCTYPE l [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><ParticleList>&b;</ParticleList>',
        "document type",
    )
    refused("a.xml", b"<ParticleList>" + b"<a>" * 1000, "nested")
    refused("a.xml", b'<?xml version="1.0" encoding="none"?><ParticleList/>', "not XML")
    refused("a.json", b'{"boxes_3d": ' + b"[" * 100_000, "nested|not JSON")
    refused("a.json", b'{"boxes_3d": [[1e999, 0, 0]]}', "finite")
    refused("a.json", b'{"boxes_3d": [[' + b"9" * 5000 + b", 0, 0]]}", "not JSON|beyond")
    refused("a.json", b'{"boxes_3d": [[NaN, 0, 0]]}', "NaN")
    header = bytearray(512)
    header[0], header[3] = 6, 5
    header[4:16] = struct.pack("<3i", 20, 2**30, 1)
    refused("a.em", bytes(header), "bytes; 1073741824 particles")
    catalogue.write(tmp_path / "b.mod", one(), FORMATS["imod"])
    model = bytearray((tmp_path / "b.mod").read_bytes())
    at = model.index(b"CONT") + 4
    model[at : at + 4] = struct.pack(">i", 2**31 - 1)
    refused("c.mod", bytes(model), "2147483647 points")
    refused("a.star", b"data_\nloop_\n_rlnCoordinateX\n_rlnCoordinateY\n_rlnCoordinateZ\n1 2 x\n", "row 1: 'x'")
    refused("a.tbl", b"1 " * 26 + b"\n" + b"1 " * 25, "line 2: 25 values")
    refused("a.ndjson", b'{"location": {"x": 1, "y": 2, "z": "3"}}\n', "line 1: z is '3'")
    refused("a.csv", b"x,y\n1,2\n", "no table of particles|no column")


def test_a_copick_project_opens_nothing_outside_itself(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text('{"pickable_object_name": "a", "points": []}')
    picks = tmp_path / "project" / "ExperimentRuns" / "run" / "Picks"
    picks.mkdir(parents=True)
    (picks / "u_0_a.json").symlink_to(outside)
    with pytest.raises(InvalidArgument, match="leads out of the project"):
        catalogue.read(tmp_path / "project", "project")
    particles = Particles.from_positions([[1, 2, 3]], 1.0, "../../etc/passwd")
    catalogue.write(tmp_path / "safe", particles, FORMATS["copick"])
    assert [path.name for path in (tmp_path / "safe" / "ExperimentRuns").iterdir()] == ["passwd"]
    with pytest.raises(InvalidArgument, match="new or empty"):
        catalogue.write(tmp_path / "safe", particles, FORMATS["copick"])


def test_files_over_the_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)
    with pytest.raises(ResourceExhausted, match="256 MiB"):
        catalogue.read(path, "a.json", "eman")


def test_slots_of_a_models_header_lie_where_imod_has_them(tmp_path: Path) -> None:
    assert written("imod", tmp_path).read_bytes()[240:244] == b"OBJT"
    assert imod.read(tmp_path / "a.mod", "a").frame.voxel_size_angstrom == 4.0


def test_a_tomogram_of_other_voxels_than_the_tables() -> None:
    voxels = ParticleTable.in_frame(one(), FORMATS["relion-4"].frame)
    known = catalogue.in_tomogram(voxels, (25, 50, 75), 16.0)
    assert known.frame.tomogram_shape == (100, 200, 300)
    np.testing.assert_allclose(known.particles().positions(), one().positions())
    angstrom = ParticleTable.in_frame(one(), FORMATS["relion-5"].frame)
    binned = catalogue.in_tomogram(angstrom, (50, 101, 150), 8.0).particles()
    assert binned.voxel_size_angstrom == 8.0
    # the centre of x and z is the same, n / 2; y counts from 50.5 binned, not from 100.5 / 2
    np.testing.assert_allclose(binned.positions() * 2 - one().positions(), [[0, 0.5, 0]], atol=1e-9)
    odd = catalogue.in_tomogram(voxels, (25, 50, 75), 5.0)
    assert odd.frame.tomogram_shape == SHAPE
    assert "left out" in odd.warnings[0]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = written("relion-4", tmp_path)
    before = path.read_bytes()
    with pytest.raises(InvalidArgument, match="cannot stand"):
        catalogue.write(path, Particles.from_positions([[1, 2, 3]], 1.0, "two words"), FORMATS["relion-4"])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.star"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.star")
    for name in (None, "relion-4", "pytom", "portal"):
        with pytest.raises(InvalidArgument, match=r"pipe\.star is no regular file"):
            catalogue.read(tmp_path / "pipe.star", "pipe.star", name)
