"""Files that other programs wrote: read, converted to every other format and back."""

from pathlib import Path

import numpy as np
import pytest
import starfile
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.formats.inspection import inspect
from cryofleet.formats.particles import catalogue
from cryofleet.formats.particles.catalogue import FORMATS
from cryofleet.formats.particles.table import ParticleTable
from cryofleet.particles import Particles
from tests.unit.formats.particles.tables import ONE_TOMOGRAM, same, through

FILES = {
    "particles/TS_037_cyto_ribosomes.csv": ("csv", 1646),
    "particles/cryocat_b4_motl_CR_tm_topbott_clean600_1_dynamo.tbl": ("dynamo", 1343),
    "particles/cryocat_bin1_1deg_500.star": ("relion-3.0", 2),
    "particles/cryocat_nn_ribosome_motl.em": ("em", 1023),
    "particles/cryocat_relion_3.0.star": ("relion-3.0", 3),
    "particles/cryocat_relion_3.1_optics2.star": ("relion-3.1", 3),
    "particles/cryocat_warp2_particles_matching.star": ("relion-4", 1218),
    "particles/cylindra_Picks_job_picks_particles.star": ("relion-5", 5),
    "particles/cylindra_Refine3D_job_refine_run_it050_data.star": ("relion-5", 5),
    "particles/starfile_one_loop.star": ("relion-3.0", 16),
    "particles/starfile_rln3.1_data_style.star": ("relion-3.0", 2),
    "imod/cryocat_correct111.mod": ("imod", 161),
    "imod/multiple_objects_example.mod": ("imod", 6),
    "imod/points.mod": ("imod", 3),
    "imod/slicer_angle_example.mod": ("imod", 4),
    "imod/two_contour_example.mod": ("imod", 25),
    "pytom/example_starfile.star": ("relion-3.1", 74),
    "pytom/pickpos_format.xml": ("pytom", 10),
    "pytom/tomo200528_100_particles.star": ("relion-3.0", 158),
}
SHAPE = (460, 928, 960)


def _read(path: Path) -> tuple[str, ParticleTable]:
    found, table = catalogue.read(path, path.name)
    if table.frame.voxel_size_angstrom is None:
        table = table.with_frame(voxel_size_angstrom=13.79)
    if table.frame.tomogram_shape is None:
        table = table.with_frame(tomogram_shape=SHAPE)
    return found.name, table


@pytest.mark.parametrize("name", FILES)
def test_to_every_other_format_and_back(name: str, shared_data: Path, tmp_path: Path) -> None:
    found, table = _read(shared_data / "formats" / name)
    assert (found, len(table)) == FILES[name]
    particles = table.particles()
    # rows are matched by x: those that share one are told apart no further
    x = (particles.positions() + particles.shifts())[:, 0]
    order = np.argsort(x)
    apart = np.concatenate([[True], np.diff(x[order]) > 0.02])
    particles = particles.select(np.sort(order[apart])[:150])
    particles = Particles(particles.table, particles.voxel_size_angstrom, particles.tomogram, particles.tomogram_shape)
    if "tomogram" not in particles.table and not particles.tomogram:
        particles = Particles(particles.table, particles.voxel_size_angstrom, "TS_037", particles.tomogram_shape)
    for other in FORMATS:
        here = particles
        if {other, found} & set(ONE_TOMOGRAM) and "tomogram" in here.table:
            first = here.table["tomogram"].iloc[0]
            chosen = here.select(here.table["tomogram"].to_numpy() == first).without_columns("tomogram")
            here = Particles(chosen.table, here.voxel_size_angstrom, str(first), here.tomogram_shape)
        (tmp_path / other).mkdir()
        converted = through(here, other, tmp_path / other)
        same(_as_named(here, converted, other), converted, FORMATS[other])
        (tmp_path / other / "back").mkdir()
        if not converted.tomogram and "tomogram" not in converted.table:
            converted = Particles(converted.table, converted.voxel_size_angstrom, here.tomogram, here.tomogram_shape)
        back = through(converted, found, tmp_path / other / "back")
        same(_as_named(here, back, other, found), back, FORMATS[other], FORMATS[found])


def _as_named(particles: Particles, converted: Particles, *ways: str) -> Particles:
    """With the names that copick's folders and numbered formats give to tomograms."""
    if not {"copick", "em", "stopgap"} & set(ways):
        return particles
    one, other = particles.positions() + particles.shifts(), converted.positions() + converted.shifts()
    names = np.full(len(converted), converted.tomogram, object)
    if "tomogram" in converted.table:
        names = converted.table["tomogram"].to_numpy(dtype=object)
    renamed = np.empty(len(one), object)
    renamed[np.argsort(one[:, 0])] = names[np.argsort(other[:, 0])]
    if len(set(renamed)) == 1:
        plain = particles.without_columns("tomogram")
        return Particles(plain.table, plain.voxel_size_angstrom, str(renamed[0]), plain.tomogram_shape)
    before = particles.table["tomogram"].to_numpy(dtype=object)
    assert len(set(zip(before, renamed, strict=True))) == len(set(before))
    return particles.with_columns(tomogram=renamed)


def test_the_same_as_starfile_sees(shared_data: Path) -> None:
    path = shared_data / "formats/pytom/example_starfile.star"
    particles = catalogue.read(path, path.name)[1].particles()
    table = starfile.read(path)
    np.testing.assert_array_equal(particles.positions(), table[[f"rlnCoordinate{axis}" for axis in "XYZ"]])
    origins = table[[f"rlnOrigin{axis}Angst" for axis in "XYZ"]].to_numpy() / 10.96
    np.testing.assert_allclose(particles.shifts(), -origins, atol=1e-12)
    angles = table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()
    rotations = particles.rotations()
    assert rotations is not None
    assert np.rad2deg((Rotation.from_euler("ZYZ", angles, degrees=True) * rotations).magnitude()).max() < 1e-6


def test_warps_coordinates_count_in_the_pixels_of_its_images(shared_data: Path) -> None:
    path = shared_data / "formats/particles/cryocat_warp2_particles_matching.star"
    frame = catalogue.read(path, path.name)[1].frame
    assert frame.voxel_size_angstrom == 4.0
    assert frame.binning is not None
    np.testing.assert_allclose(frame.binning, 5.06714, rtol=1e-5)


def test_what_other_files_are(shared_data: Path) -> None:
    formats = shared_data / "formats"
    tomograms = inspect(formats / "particles/cryocat_R5_tutorial_run_tomograms.star", "tomograms.star")
    assert (tomograms["kind"], list(tomograms["tables"])) == ("star", ["global"])
    tilts = inspect(formats / "pytom/angles.tlt", "angles.tlt")
    assert (tilts["kind"], tilts["tilt_min_degrees"], tilts["tilt_max_degrees"]) == ("tilt series", -60, 56)
    assert inspect(formats / "mdoc/TS_01.mrc.mdoc", "TS_01.mrc.mdoc")["pixel_size_angstrom"] is not None
    volume = inspect(formats / "misc/float16.mrc", "float16.mrc")
    assert (volume["kind"], volume["stored_as"]) == ("stack", "float16")
    assert "one image of 64 x 64" in volume["warnings"][0]
    tiff = inspect(shared_data / "real/microtubule_13pf.tif", "microtubule_13pf.tif", full=True)
    assert tiff["shape_zyx"] == [36, 206, 94]
    assert tiff["statistics"]["of"] == "all voxels"
    packed = inspect(shared_data / "maps/groel_11.5A_emdb.mrc.gz", "groel.mrc.gz")
    np.testing.assert_allclose(packed["voxel_size_angstrom_xyz"], 2.7, rtol=1e-4)
    with pytest.raises(InvalidArgument, match=r"tomo200528_100_job\.json: of no known format"):
        inspect(formats / "pytom/tomo200528_100_job.json", "tomo200528_100_job.json")
