"""Structures from files: potentials against an independent program, assemblies, maps, and files that are none."""

from __future__ import annotations

import gzip
from pathlib import Path

import gemmi
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics import fourier
from cryofleet.numerics.interpolation import transform_volume
from services.simulation import density, structures
from services.simulation.phantoms import phantom
from services.simulation.potential import VOLT_ANGSTROM_SQUARED, Scatterers, render
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


def scatterers_of(data: bytes) -> Scatterers:
    loaded = structures.load(data, "a file")
    assert isinstance(loaded, Scatterers)
    return loaded


def integral(scatterers: Scatterers) -> float:
    return float(scatterers.weights @ np.array([factor.total for factor in scatterers.factors])[scatterers.kinds])


def test_potential_is_that_of_gemmi(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without solvent, the density that gemmi's own calculator gives in real space, low-passed alike."""
    monkeypatch.setattr(structures, "ICE_SCATTERING", 0.0)
    positions = np.random.default_rng(0).uniform(-9, 9, (25, 3)).round(3)
    data = pdb_file(positions, "S", 35.0)
    scatterers = scatterers_of(data)
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
    assert integral(carbon) == pytest.approx((2.509 - 0.0945 * 16.44) * 47.878, rel=0.005)


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
    assert integral(both) == pytest.approx(2 * integral(one))
    distance = np.ptp(both.positions, axis=0)
    np.testing.assert_allclose(distance, [4, 4, 0], atol=1e-9)  # (1, 2) and (5, -2)
    np.testing.assert_allclose(both.positions.mean(axis=0), 0, atol=1e-9)


def test_groel_assembly_is_symmetric_under_its_fourteen_operations(shared_data: Path) -> None:
    data = (shared_data / "structures" / "1oel.pdb.gz").read_bytes()
    scatterers = scatterers_of(data)
    assert scatterers.molecular_weight_kda == pytest.approx(14 * 55.1, rel=0.01)  # residues 2 to 525 of 548
    volume = render(scatterers, 48, 5.0, 15.0)
    structure = gemmi.read_pdb_string(gzip.decompress(data))
    chains = [
        [atom.pos.tolist() for residue in chain for atom in residue if atom.name == "CA"] for chain in structure[0]
    ]
    ring = np.array([chain for chain in chains if chain])
    assert ring.shape == (7, 524, 3)
    ring -= ring.mean(axis=(0, 1))
    # the rotation that takes every chain onto the next; the seven are alike to about 1 Å, so it is a seventh of a turn
    next_chain, error = Rotation.align_vectors(np.roll(ring, -1, axis=0).reshape(-1, 3), ring.reshape(-1, 3))
    assert error / np.sqrt(ring.size / 3) < 1.5
    axis = next_chain.as_rotvec() / next_chain.magnitude()
    assert next_chain.magnitude() == pytest.approx(2 * np.pi / 7, rel=1e-3)
    sevenfold = Rotation.from_rotvec(np.outer(np.arange(7) * 2 * np.pi / 7, axis))
    twofold = Rotation.from_matrix(structure.assemblies[0].generators[0].operators[1].transform.mat.tolist())
    assert twofold.magnitude() == pytest.approx(np.pi)
    correlations = [
        np.corrcoef(transform_volume(volume, turn).ravel(), volume.ravel())[0, 1]
        for turn in Rotation.concatenate([sevenfold, twofold * sevenfold])
    ]
    assert len(correlations) == 14
    assert min(correlations) > 0.98


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


def test_an_empty_or_inverted_map_is_refused(tmp_path: Path) -> None:
    for values in (np.zeros((16, 16, 16), np.float32), np.full((16, 16, 16), 3, np.float32)):
        loaded = structures.load(mrc_file(tmp_path, values, 5.0), "m.mrc")
        assert isinstance(loaded, structures.Map)
        with pytest.raises(InvalidArgument, match=r"m\.mrc"):
            density.from_map("m.mrc", loaded, 10.0, 20.0)


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
