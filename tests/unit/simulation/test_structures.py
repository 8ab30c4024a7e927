"""Structures from files: potentials against an independent program, assemblies, maps, and files that are none."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from benchmarks import groel
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics import fourier
from cryofleet.numerics.interpolation import transform_volume
from services.simulation import density, structures
from services.simulation.phantoms import phantom
from services.simulation.potential import VOLT_ANGSTROM_SQUARED, Scatterers, render
from services.simulation.structures import Treatment
from tests.unit.simulation.files import mrc_file, pdb_file

BIOMT = """\
REMARK 350 BIOMOLECULE: 1
REMARK 350 APPLY THE FOLLOWING TO CHAINS: A
REMARK 350   BIOMT1   1  1.000000  0.000000  0.000000        0.00000
REMARK 350   BIOMT2   1  0.000000  1.000000  0.000000        0.00000
REMARK 350   BIOMT3   1  0.000000  0.000000  1.000000        0.00000
REMARK 350   BIOMT1   2 -1.000000  0.000000  0.000000        6.00000
REMARK 350   BIOMT2   2  0.000000 -1.000000  0.000000        0.00000
REMARK 350   BIOMT3   2  0.000000  0.000000  1.000000        0.00000
"""


def scatterers_of(data: bytes, treatment: Treatment = structures.AS_IT_IS) -> Scatterers:
    loaded = structures.load(data, "a file", treatment)
    assert isinstance(loaded, Scatterers)
    return loaded


def map_of(data: bytes, name: str, treatment: Treatment = structures.AS_IT_IS) -> structures.Map:
    loaded = structures.load(data, name, treatment)
    assert isinstance(loaded, structures.Map)
    return loaded


def correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    return float(np.corrcoef(first.ravel().astype(np.float64), second.ravel().astype(np.float64))[0, 1])


def test_potential_is_that_of_gemmi() -> None:
    """Without solvent, the density that gemmi's own calculator gives in real space, low-passed alike."""
    positions = np.random.default_rng(0).uniform(-9, 9, (25, 3)).round(3)
    data = pdb_file(positions, "S", 35.0)
    scatterers = scatterers_of(data, Treatment(solvent_displaced=False))
    side, spacing, resolution = 96, 0.5, 5.0
    ours = render(scatterers, side, spacing, resolution)

    model = gemmi.read_pdb_string(data)
    model.cell = gemmi.UnitCell(48, 48, 48, 90, 90, 90)
    model.spacegroup_hm = "P 1"
    for atom in model[0].all():
        atom.atom.pos += gemmi.Position(*(24 - positions.mean(axis=0)))
    calculator = gemmi.DensityCalculatorE()
    calculator.grid.set_unit_cell(model.cell)
    calculator.grid.set_size(side, side, side)
    calculator.cutoff = 1e-7
    calculator.add_model_density_to_grid(model[0])
    theirs = np.array(calculator.grid, copy=True).transpose(2, 1, 0) * np.float32(VOLT_ANGSTROM_SQUARED)
    theirs = fourier.low_pass(theirs, resolution, spacing, edge=fourier.EDGE / 2)
    assert np.abs(ours - theirs).max() < 0.002 * theirs.max()


def test_displaced_solvent_lowers_carbon_and_leaves_protein_above_ice() -> None:
    carbon = scatterers_of(pdb_file(np.zeros((1, 3))))
    # f(0) of carbon is 2.509 Å (International Tables C 4.3.1.1); ice, 0.0945 Å per Å^3, fills 16.44 Å^3 without it
    assert carbon.integral() == pytest.approx((2.509 - 0.0945 * 16.44) * 47.878, rel=0.005)


def test_hydrogens_left_out_are_added_in_mass() -> None:
    peptide = "\n".join(
        f"ATOM  {i + 1:5d} {name:<4s} ALA A   1    {x:8.3f}{0:8.3f}{0:8.3f}  1.00 20.00          {name.strip()[0]:>2s}"
        for i, (name, x) in enumerate([(" N", 0), (" CA", 1.5), (" C", 3), (" O", 4), (" CB", 2)])
    )
    # an alanine residue weighs 71.08 Da
    assert scatterers_of(peptide.encode()).molecular_weight_kda * 1000 == pytest.approx(71.08, abs=0.05)


def test_biological_assembly_is_built() -> None:
    one = scatterers_of(pdb_file(np.array([[1.0, 2.0, 0.0]])))
    both = scatterers_of(pdb_file(np.array([[1.0, 2.0, 0.0]]), remarks=BIOMT))
    assert both.integral() == pytest.approx(2 * one.integral())
    distance = np.ptp(both.positions, axis=0)
    np.testing.assert_allclose(distance, [4, 4, 0], atol=1e-9)  # (1, 2) and (5, -2)
    np.testing.assert_allclose(both.positions.mean(axis=0), 0, atol=1e-9)


def test_groel_assembly_is_symmetric_under_its_fourteen_operations(shared_data: Path) -> None:
    data = (shared_data / "structures" / "1oel.pdb.gz").read_bytes()
    # residues 2 to 525 of 548
    assert scatterers_of(data).molecular_weight_kda == pytest.approx(14 * 55.1, rel=0.01)
    operations = groel.symmetry_operations(data)
    assert operations[1].magnitude() == pytest.approx(2 * np.pi / 7, rel=1e-3)
    assert operations[7].magnitude() == pytest.approx(np.pi)
    correlations = groel.symmetry_correlations(data)
    assert len(correlations) == 14
    assert min(correlations) > 0.98


def test_groel_fits_its_experimental_map(shared_data: Path) -> None:
    map_file = (shared_data / "maps" / "groel_11.5A_emdb.mrc.gz").read_bytes()
    assert map_of(map_file, "groel").voxel_sizes_angstrom == pytest.approx((2.7, 2.7, 2.7))
    found = groel.fit((shared_data / "structures" / "1oel.pdb.gz").read_bytes(), map_file)
    assert np.abs(found.pose[1:4]).max() < 0.5
    assert found.pose[4] == pytest.approx(1, abs=0.03)
    model = found.model()
    fitted = found.at_resolution(model)
    assert groel.correlation(fitted, found.target) > 0.92
    # not by its outline alone: within the mask of its own density too
    inside = fitted > 0.15 * fitted.max()
    assert groel.correlation(fitted[inside], found.target[inside]) > 0.65
    # with the fall-off of an unsharpened map of its time, and not turned by half a subunit
    assert groel.correlation(found.fitted(found.model(500.0)), found.target) > 0.95
    turned = found.fitted(model, 1, found.pose + np.array([180 / 7, 0, 0, 0, 0]))
    assert groel.correlation(turned, found.target) < groel.correlation(found.fitted(model, 1), found.target) - 0.05


def test_a_map_of_a_structure_holds_its_resolution() -> None:
    """At two voxels' resolution the coarse map is the fine one, cropped in Fourier space."""
    positions = np.random.default_rng(1).uniform(-9, 9, (40, 3)).round(3)
    scatterers = scatterers_of(pdb_file(positions, "C", 25.0))
    fine, coarse = (density.density_map(scatterers, voxel_size, 4.0) for voxel_size in (1.0, 2.0))
    expected = fourier.fourier_crop(fine.values, 2)
    np.testing.assert_allclose(coarse.values, expected, atol=2e-3 * expected.max())
    assert coarse.values.sum() * 2**3 == pytest.approx(scatterers.integral(), rel=0.01)
    side = len(coarse.values)
    for box in (17, 18, 64, 65):
        boxed = density.density_map(scatterers, 2.0, 4.0, box).values
        assert boxed.shape == (box, box, box)
        kept = min(side, box) // 2
        inner, outer = (slice(n // 2 - kept, n // 2 + kept) for n in (box, side))
        np.testing.assert_array_equal(boxed[inner, inner, inner], coarse.values[outer, outer, outer])
        assert float(np.abs(boxed).sum()) <= float(np.abs(coarse.values).sum()) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("voxel_size", "resolution", "box", "message"),
    [
        (4.0, 7.0, None, "voxels of 4 Å hold 8 Å"),
        (4.0, 8.0, 20, "a box of 20 voxels of 4 Å has 80"),
        (0.0, 8.0, None, "voxel_size_angstrom is 0"),
        (4.0, float("nan"), None, "resolution_angstrom is nan"),
        (0.1, 0.2, None, "larger voxel size"),
    ],
)
def test_a_map_that_cannot_be_made_is_refused(
    voxel_size: float, resolution: float, box: int | None, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        density.density_map(phantom("double-ring").scatterers(), voxel_size, resolution, box)


@pytest.mark.parametrize(("name", "resolution"), [("double-ring", 10.0), ("double-ring", 25.0), ("barrel", 12.0)])
def test_the_memory_of_a_map_is_stated_before_it_is_made(name: str, resolution: float) -> None:
    stated = density.density_map_bytes(name, None, 5.0, resolution, 50)
    tracemalloc.start()
    try:
        density.density_map(phantom(name).scatterers(), 5.0, resolution, 50)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.3 * stated < peak < 1.1 * stated


TWO_ASSEMBLIES = BIOMT + BIOMT.replace("BIOMOLECULE: 1", "BIOMOLECULE: 2").replace("6.00000", "9.00000")


def test_treatment_chooses_assembly_and_chains() -> None:
    one = pdb_file(np.array([[1.0, 2.0, 0.0], [2.0, 2.0, 0.0]]), remarks=TWO_ASSEMBLIES)
    data = one.replace(b"UNX A   2", b"UNX B   2")
    # the remarks name chain A alone
    spans = {"": 2, "1": 2, "2": 2, "asymmetric-unit": 2, "none": 2}
    for assembly, count in spans.items():
        assert len(scatterers_of(data, Treatment(assembly=assembly)).positions) == count
    along_x = {
        assembly: float(np.ptp(scatterers_of(data, Treatment(assembly=assembly)).positions[:, 0])) for assembly in spans
    }
    assert along_x == pytest.approx({"": 4, "1": 4, "2": 7, "asymmetric-unit": 1, "none": 1})
    assert len(scatterers_of(data, Treatment(assembly="none", chains=("B",))).positions) == 1
    with pytest.raises(InvalidArgument, match="no assembly '7'; there are 1, 2, asymmetric-unit"):
        scatterers_of(data, Treatment(assembly="7"))
    with pytest.raises(InvalidArgument, match="no chain 'Q'; there are A, B"):
        scatterers_of(data, Treatment(chains=("A", "Q")))


def test_treatment_chooses_the_model() -> None:
    first, second = (pdb_file(np.zeros((count, 3))).decode().replace("END\n", "ENDMDL\n") for count in (1, 3))
    data = f"MODEL        1\n{first}MODEL        2\n{second}".encode()
    assert len(scatterers_of(data).positions) == 1
    assert len(scatterers_of(data, Treatment(model=2)).positions) == 3
    with pytest.raises(InvalidArgument, match="model 3 is asked for, the file has 2"):
        scatterers_of(data, Treatment(model=3))


def test_treatment_sets_b_factors_and_hydrogens() -> None:
    data = pdb_file(np.zeros((1, 3)), "C", 20.0)

    def b_factor(treatment: Treatment) -> float:
        return 8 * np.pi**2 * float(scatterers_of(data, treatment).sigmas[0]) ** 2

    assert b_factor(Treatment()) == pytest.approx(20)
    assert b_factor(Treatment(b_factor=55)) == pytest.approx(55)
    assert b_factor(Treatment(added_b_factor=-5)) == pytest.approx(15)
    assert b_factor(Treatment(b_factor=55, added_b_factor=10)) == pytest.approx(65)
    assert b_factor(Treatment(added_b_factor=-50)) == 0
    alanine = pdb_file(np.zeros((1, 3))).replace(b"UNX", b"ALA")
    with_them, without = (scatterers_of(alanine, Treatment(hydrogens=kept)) for kept in (True, False))
    assert with_them.molecular_weight_kda - without.molecular_weight_kda == pytest.approx(5 * 1.008e-3, rel=1e-3)
    assert len(without.positions) == 1
    deuterium = pdb_file(np.zeros((2, 3))).replace(b"  1.00 20.00           C\nEND", b"  1.00 20.00           D\nEND")
    assert len(scatterers_of(deuterium).positions) == 2
    assert len(scatterers_of(deuterium, Treatment(hydrogens=False)).positions) == 1


def test_a_file_keeps_its_own_origin_where_asked() -> None:
    data = pdb_file(np.array([[10.0, 0.0, 3.0], [12.0, 0.0, 3.0]]))
    np.testing.assert_allclose(
        scatterers_of(data, Treatment(centred=False)).positions, [[10, 0, 3], [12, 0, 3]], atol=1e-9
    )
    subunit = density.build_subunit("mine", data, "mine.pdb", 2.0, 6.0)
    # 11 Å along x from the axis to the centroid, 3 Å along z
    points = np.argwhere(subunit.shape > 0) - subunit.centre
    np.testing.assert_allclose(points.mean(axis=0) / subunit.oversampling * 2.0, [3, 0, 11], atol=0.5)


def test_mmcif_of_many_chains_reads(shared_data: Path) -> None:
    scatterers = scatterers_of((shared_data / "structures" / "4v1w.cif.gz").read_bytes())
    assert scatterers.molecular_weight_kda == pytest.approx(24 * 19.4, rel=0.02)  # horse L ferritin, residues seen
    # apoferritin is a shell: nothing within 35 Å of its centre, nothing beyond 70 Å
    radii = np.linalg.norm(scatterers.positions, axis=1)
    assert radii.min() > 30
    assert radii.max() < 70


def test_a_map_gives_the_density_that_it_was_made_of(tmp_path: Path) -> None:
    scatterers = phantom("two-subunit-globule").scatterers()
    expected = density.from_scatterers("atoms", scatterers, 12.0, 30.0)
    finer = np.roll(render(scatterers, 64, 6.5, 20.0), (5, -4, 3), axis=(0, 1, 2))
    loaded = structures.load(mrc_file(tmp_path, 100 + 3 * finer, 6.5), "a map")
    assert isinstance(loaded, structures.Map)
    found = density.from_map("map", loaded, 12.0, 30.0)
    turn, fraction = Rotation.from_euler("xyz", [20, 50, 80], degrees=True), np.array([0.2, -0.3, 0.1])
    first, second = expected.rotated(turn, fraction), found.rotated(turn, fraction)
    core = min(*first.shape, *second.shape) // 2
    first, second = (v[tuple(slice(n // 2 - core, n // 2 + core + 1) for n in v.shape)] for v in (first, second))
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1), (3, 2, 1)])
def test_axis_order_of_a_map_is_read(tmp_path: Path, order: tuple[int, int, int]) -> None:
    values = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)  # z, y, x
    # what the file's columns, rows and sections are, fastest first, is `order`
    stored = values.transpose([3 - axis for axis in reversed(order)])
    data = bytearray(mrc_file(tmp_path, np.ascontiguousarray(stored), 3.0))
    data[28:40] = np.array([6, 5, 4], "<i4").tobytes()
    data[40:52] = np.array([12, 15, 16], "<f4").tobytes()
    data[64:76] = np.array(order, "<i4").tobytes()
    read = structures.read_map(bytes(data), "a map")
    np.testing.assert_array_equal(read.values, values)
    assert read.voxel_sizes_angstrom == (4.0, 3.0, 2.0)


def test_experimental_maps_read_or_say_what_they_lack(shared_data: Path) -> None:
    loaded = structures.load((shared_data / "maps" / "groel_11.5A_emdb.mrc.gz").read_bytes(), "groel")
    assert isinstance(loaded, structures.Map)
    built = density.from_map("groel", loaded, 10.0, 25.0)
    # a cylinder of 137 x 146 Å, its channel open or not: 1.0 to 2.2 thousand voxels of 10 Å
    assert 1000 < built.shape_voxels < 2200


def test_a_map_without_voxel_size_is_refused(tmp_path: Path) -> None:
    data = mrc_file(tmp_path, np.ones((8, 8, 8), np.float32), 0.0)
    with pytest.raises(FailedPrecondition, match=r"m\.mrc: .*no voxel size"):
        structures.load(data, "m.mrc")


def ball(radii_voxels: tuple[float, float, float], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    grids = np.ogrid[tuple(slice(-(side // 2), side - side // 2) for side in shape)]
    distance = np.sqrt(sum((grid / radius) ** 2 for grid, radius in zip(grids, radii_voxels, strict=True)))
    return np.clip((1 - distance) * min(radii_voxels) + 0.5, 0, 1).astype(np.float32)


def test_voxels_of_unequal_sides_are_taken_for_what_they_are() -> None:
    sizes = (3.0, 4.0, 6.0)
    values = ball((80 / 3, 80 / 4, 80 / 6), (80, 60, 40))
    made = density.density_map(structures.Map(values, sizes), 5.0, 20.0)
    # at 15% of its maximum a ball low-passed to 20 Å reaches some 5 Å beyond its radius of 80 Å
    assert all(160 <= extent <= 180 for extent in made.extent_angstrom)
    assert np.ptp(made.extent_angstrom) <= 5
    turned = transform_volume(made.values, Rotation.from_euler("x", 90, degrees=True))
    assert np.corrcoef(turned.ravel(), made.values.ravel())[0, 1] > 0.99


def two_balls() -> NDArray[np.float32]:
    """One of 9 and one of 6 voxels' radius beside each other."""
    values = np.roll(ball((9, 9, 9), (48, 48, 48)), -10, axis=2)
    return np.asarray(values + np.roll(ball((6, 6, 6), (48, 48, 48)), 14, axis=2), np.float32)


@pytest.mark.parametrize("level", [0.5, None])
@pytest.mark.parametrize(("component", "diameter"), [(1, 72), (2, 48)])
def test_one_component_of_a_map_is_taken_alone(
    tmp_path: Path, component: int, diameter: float, level: float | None
) -> None:
    data = mrc_file(tmp_path, two_balls(), 4.0)
    loaded = structures.load(data, "m.mrc", Treatment(level=level, component=component))
    made = density.density_map(loaded, 4.0, 12.0)
    assert all(diameter <= extent <= diameter + 16 for extent in made.extent_angstrom)
    # it alone is in the box: its mean, times its volume, is all there is
    assert made.values.sum() * 4**3 == pytest.approx(np.pi / 6 * diameter**3 * made.values.max(), rel=0.2)


def test_level_and_component_that_a_map_has_not_are_refused(tmp_path: Path) -> None:
    data = mrc_file(tmp_path, two_balls(), 4.0)
    for treatment, message in (
        (Treatment(level=0.5, component=3), r"component 3 is asked for, .* has 2 \("),
        (Treatment(level=7.0), "level is 7, it must lie among the map's values, 0 to 1"),
        (Treatment(level=-1.0), "level is -1"),
    ):
        loaded = map_of(data, "m.mrc", treatment)
        with pytest.raises(InvalidArgument, match=r"^m\.mrc: " + message):
            density.from_map("m.mrc", loaded, 8.0, 20.0)


def test_a_dark_map_is_refused_unless_it_is_said_to_be_one(tmp_path: Path) -> None:
    noise = np.random.default_rng(2).normal(0, 0.02, (48, 48, 48)).astype(np.float32)
    light = two_balls() + noise
    data = mrc_file(tmp_path, -light, 4.0)
    dark = structures.load(data, "m.mrc")
    with pytest.raises(InvalidArgument, match=r"^m\.mrc: .*is its protein dark"):
        density.density_map(dark, 4.0, 20.0, name="m.mrc")
    told = density.density_map(structures.load(data, "m.mrc", Treatment(inverted=True)), 4.0, 20.0)
    expected = density.density_map(structures.Map(light, (4.0, 4.0, 4.0)), 4.0, 20.0)
    np.testing.assert_array_equal(told.values, expected.values)


def test_a_caller_may_say_the_voxel_size_and_its_own_goes_first(tmp_path: Path) -> None:
    for header in (0.0, 1.0, 7.0):
        data = mrc_file(tmp_path, two_balls(), header)
        loaded = map_of(data, "m.mrc", Treatment(voxel_size_angstrom=4.0))
        assert loaded.voxel_sizes_angstrom == (4.0, 4.0, 4.0)


def test_a_crystal_on_oblique_axes_is_refused(shared_data: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^EMD-3001\.map: .*angle of 94\.326°"):
        structures.load((shared_data / "maps" / "EMD-3001.map").read_bytes(), "EMD-3001.map")


def cif_file(x: str = "1.0", element: str = "C", occupancy: str = "1.0", b_factor: str = "20.0") -> bytes:
    columns = (
        "group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_entity_id label_seq_id "
        "pdbx_PDB_ins_code Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv auth_seq_id auth_asym_id pdbx_PDB_model_num"
    )
    head = "".join(f"_atom_site.{column}\n" for column in columns.split())
    rows = f"ATOM 1 {element} C . UNX A 1 1 ? {x} 0 0 {occupancy} {b_factor} 1 A_LONG_CHAIN 1\n"
    return f"data_x\nloop_\n{head}{rows}ATOM 2 C C . UNX A 1 2 ? 0 0 0 1 20 2 A_LONG_CHAIN 1\n".encode()


def test_mmcif_chains_of_long_names_are_told_apart() -> None:
    assert len(scatterers_of(cif_file(), Treatment(chains=("A_LONG_CHAIN",))).positions) == 2


@pytest.mark.parametrize("data", [cif_file(), pdb_file(np.zeros((2, 3)))], ids=["cif", "pdb"])
def test_letters_beyond_ascii_do_not_stop_the_reading(data: bytes) -> None:
    assert len(scatterers_of(data.replace(b"UNX A", b"UN\xd6 \xe9")).positions) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (cif_file(occupancy="-0.5"), r"an occupancy outside 0 to 1, of 1 atoms; the first is a C at \(1, 0, 0\)"),
        (cif_file(occupancy="7"), "an occupancy outside 0 to 1"),
        (cif_file(occupancy="nan"), "an occupancy that is not a finite number"),
        (cif_file(b_factor="nan"), "a B-factor that is not a finite number"),
        (cif_file(element="Qq"), "'Qq' is no element"),
        (cif_file(x="1e9"), "coordinates beyond 1e\\+06 Å"),
        (cif_file(x="nan"), "coordinates that are not finite"),
        (cif_file().replace(b"C . UNX", b"CARBONCARBON . UNX"), "8\\+ char"),
        (pdb_file(np.zeros((1, 3)), "QQ"), "'QQ' is no element"),
        (pdb_file(np.zeros((1, 3)), "X"), "no atoms with coordinates and a known element"),
        (pdb_file(np.zeros((1, 3))).replace(b"  1.00 20.00", b" -1.00 20.00"), "an occupancy outside 0 to 1"),
        (pdb_file(np.zeros((1, 3))).replace(b"  1.00 20.00", b"  0.00 20.00"), "the occupancy of every atom is 0"),
        (pdb_file(np.zeros((1, 3))).replace(b"  1.00 20.00", b"  1.00   nan"), "a B-factor that is not a finite"),
        (pdb_file(np.zeros((1, 3)), "HE"), "no more potential than the ice"),
        (pdb_file(np.zeros((1, 3)), remarks=BIOMT.replace("-1.000000", "-9.000000")), "operator .* is no rotation"),
        (pdb_file(np.zeros((1, 3)), remarks=BIOMT.replace("-1.000000", "      nan")), "operator .* is no rotation"),
        (pdb_file(np.zeros((1, 3)), remarks=BIOMT.replace("    6.00000", " 9999999.00")), "shifts by more than"),
    ],
)
def test_numbers_that_no_atom_has_are_refused_by_name(data: bytes, message: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^bad\.pdb: .*{message}"):
        structures.load(data, "bad.pdb")


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": 0},
        {"component": 0},
        {"b_factor": -1.0},
        {"added_b_factor": float("nan")},
        {"voxel_size_angstrom": 0.0},
        {"level": float("inf")},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_treatments_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        Treatment(**wrong)


def test_maps_of_no_use_are_refused_by_name(tmp_path: Path) -> None:
    for values, message in (
        (np.full((8, 8, 8), 3, np.float32), "every voxel of the map is 3"),
        (np.arange(128, dtype=np.float32).reshape(2, 8, 8), "8 x 8 x 2 voxels are too thin"),
        (np.where(np.arange(512).reshape(8, 8, 8) == 9, np.nan, 1).astype(np.float32), "not finite"),
        (np.where(np.arange(512).reshape(8, 8, 8) == 9, 1e35, 1).astype(np.float32), "beyond 1e30"),
    ):
        with pytest.raises(InvalidArgument, match=rf"^m\.mrc: .*{message}"):
            structures.load(with_values(tmp_path, values), "m.mrc")


@pytest.mark.parametrize("cell", [1e-30, 1e30])
def test_a_voxel_size_that_no_map_has_is_refused(tmp_path: Path, cell: float) -> None:
    data = bytearray(mrc_file(tmp_path, two_balls(), 4.0))
    data[40:44] = np.array([cell], "<f4").tobytes()
    with pytest.raises(InvalidArgument, match=r"^m\.mrc: the header's voxel size is"):
        structures.load(bytes(data), "m.mrc")


def with_values(folder: Path, values: NDArray[np.float32]) -> bytes:
    """A file with these values behind a sound header: mrcfile warns of what is no number."""
    return mrc_file(folder, np.zeros_like(values), 2.0)[:1024] + values.tobytes()


GOOD = pdb_file(np.zeros((3, 3)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello, this is no structure\n",
        b"\x1f\x8b" + b"broken" * 20,
        gzip.compress(GOOD)[:-12],
        b"data_x\nloop_\n_atom_site.id\n'unterminated",
        b"data_x\n_cell.length_a 1\n",
        GOOD.replace(b"0.000", b"  nan"),
        GOOD.replace(b"0.000", b"abcde"),
        np.zeros(2000, np.uint8).tobytes(),
        bytes(range(256)) * 10,
    ],
    ids=["empty", "text", "gzip", "cut", "cif", "no-atoms", "nan", "letters", "zeros", "binary"],
)
def test_hostile_files_are_refused_by_name(data: bytes) -> None:
    with pytest.raises((InvalidArgument, FailedPrecondition), match=r"^bad\.pdb: "):
        structures.load(data, "bad.pdb")


def test_a_cut_map_is_refused(tmp_path: Path) -> None:
    data = mrc_file(tmp_path, np.ones((8, 8, 8), np.float32), 2.0)
    with pytest.raises(InvalidArgument, match="cut off"):
        structures.load(data[:-5], "m.mrc")


def test_a_gzip_bomb_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structures, "MAX_FILE_BYTES", 10_000)
    with pytest.raises(InvalidArgument, match="more than 10000 bytes"):
        structures.load(gzip.compress(b"\0" * 1_000_000), "bomb.gz")


def test_an_assembly_of_too_many_atoms_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structures, "MAX_ATOMS", 1)
    with pytest.raises(InvalidArgument, match="assembly has 2 atoms"):
        structures.load(pdb_file(np.zeros((1, 3)), remarks=BIOMT), "virus.pdb")


def test_a_structure_too_large_for_its_voxels_is_refused() -> None:
    data = pdb_file(np.array([[0.0, 0, 0], [900.0, 0, 0]]))
    with pytest.raises(InvalidArgument, match="larger voxel size"):
        density.build("long", data, "long.pdb", 1.0, 4.0)
