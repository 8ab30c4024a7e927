"""The catalogue: what it states is what its files hold, and one of a user's own is read strictly."""

from __future__ import annotations

import gzip
from pathlib import Path

import gemmi
import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.rotations import point_group
from services.simulation import density, phantoms, structures
from services.simulation.catalogue import Entry, load_catalogue
from services.simulation.potential import Scatterers

CATALOGUE = load_catalogue()
COORDINATES = [entry for entry in CATALOGUE.values() if entry.kind == "coordinates"]
MAPS = [entry for entry in CATALOGUE.values() if entry.kind == "map"]

OWN = """
structures:
  - name: mine
    help: a virus
    kind: map
    source: EMD-1
    files: [emd_1.map.gz]
    symmetry: I
    molecular_weight_kda: 5000
    level: 0.2
    component: 2
    voxel_size_angstrom: 3.5
"""


def file_of(entry: Entry, shared_data: Path) -> bytes:
    folder = shared_data / ("maps" if entry.kind == "map" else "structures")
    return (folder / entry.files[0]).read_bytes()


def named(entry: Entry) -> str:
    return entry.name


def test_all_phantoms_are_in_it_as_they_state_themselves() -> None:
    for name in phantoms.names():
        phantom, entry = phantoms.phantom(name), CATALOGUE[name]
        assert (entry.kind, entry.symmetry, entry.help) == ("phantom", phantom.symmetry, phantom.help)
        assert entry.molecular_weight_kda == phantom.molecular_weight_kda


@pytest.mark.parametrize("entry", COORDINATES, ids=named)
def test_coordinates_have_the_mass_stated(entry: Entry, shared_data: Path) -> None:
    source = density.load_source(entry.name, file_of(entry, shared_data), entry.files[0])
    assert isinstance(source, Scatterers)
    assert source.molecular_weight_kda == pytest.approx(entry.molecular_weight_kda, rel=2e-3)


@pytest.mark.parametrize("entry", [entry for entry in COORDINATES if entry.symmetry != "C1"], ids=named)
def test_coordinates_have_the_symmetry_stated(entry: Entry, shared_data: Path) -> None:
    """The rotations that take a chain onto its like and all chains onto chains are as many as the group has."""
    data = gzip.decompress(file_of(entry, shared_data))
    structure = structures._parse(data, entry.name)
    if entry.treatment.assembly != structures.ASYMMETRIC_UNIT:
        structure.transform_to_assembly(entry.treatment.assembly, gemmi.HowToNameCopiedChain.Short)
    chains = []
    for chain in structure[0]:
        found = {residue.seqid.num or 0: residue.find_atom("CA", "*") for residue in chain}
        chains.append({number: atom.pos.tolist() for number, atom in found.items() if atom is not None})
    chains = [positions for positions in chains if len(positions) > 30]
    centre = np.mean([position for chain in chains for position in chain.values()], axis=0)
    everything = np.concatenate([np.array(list(chain.values())) for chain in chains]) - centre
    tree, operations = cKDTree(everything), 0
    for other in chains:
        common = sorted(set(chains[0]) & set(other))
        if len(common) < 0.8 * max(len(chains[0]), len(other)):
            continue
        first, second = (np.array([of[number] for number in common]) - centre for of in (chains[0], other))
        turn, _ = Rotation.align_vectors(second, first)
        # 1OEL's subunits are alike to 1.5 Å; where there is no symmetry, neighbours of no relation are 4 Å away
        operations += bool(np.mean(tree.query(turn.apply(everything))[0]) < 2)
    assert operations == len(point_group(entry.symmetry))


@pytest.mark.parametrize("entry", MAPS, ids=named)
def test_maps_give_one_structure_of_plausible_size(entry: Entry, shared_data: Path) -> None:
    source = density.load_source(entry.name, file_of(entry, shared_data), entry.files[0])
    made = density.density_map(source, 15.0, 45.0, name=entry.name)
    smallest, largest = (40, 90) if entry.name == "beta-tubulin" else (100, 375)
    assert smallest < min(made.extent_angstrom)
    assert max(made.extent_angstrom) < largest
    # the centroid is the middle
    grids = np.ogrid[tuple(slice(0, side) for side in made.values.shape)]
    weights = np.clip(made.values, 0, None)
    for side, grid in zip(made.values.shape, grids, strict=True):
        assert float((weights * grid).sum() / weights.sum()) == pytest.approx(side // 2, abs=0.3)


@pytest.mark.parametrize("name", ["beta-galactosidase", "thyroglobulin"])
def test_maps_have_the_symmetry_stated(name: str, shared_data: Path) -> None:
    """Twofolds of a body lie along its principal axes."""
    entry = CATALOGUE[name]
    source = density.load_source(name, file_of(entry, shared_data), entry.files[0])
    volume = density.density_map(source, 10.0, 30.0).values
    middle = len(volume) // 2
    points = np.argwhere(volume > 0.15 * volume.max())[:, ::-1] - middle
    weights = volume[tuple((points[:, ::-1] + middle).T)]
    _, axes = np.linalg.eigh((points * weights[:, None]).T @ points)
    turned = [transform_volume(volume, Rotation.from_rotvec(np.pi * axis)) for axis in axes.T]
    alike = [np.corrcoef(volume.ravel(), other.ravel())[0, 1] > 0.97 for other in turned]
    assert sum(alike) + 1 == len(point_group(entry.symmetry))


def test_of_two_complexes_in_a_file_one_is_taken(shared_data: Path) -> None:
    data = file_of(CATALOGUE["tric"], shared_data)
    both = density.density_map(density.load_source("any", data, "4v94.mrc"), 10.0, 30.0)
    one = density.density_map(density.load_source("tric", data, "4v94.mrc"), 10.0, 30.0)
    # TRiC is 160 Å wide and high; the two of the file lie 330 Å across
    assert max(both.extent_angstrom) > 300
    assert all(150 <= extent <= 200 for extent in one.extent_angstrom)
    treated = structures.Treatment(level=34, component=2)
    other = density.density_map(density.load_source("tric", data, "4v94.mrc", treated), 10.0, 30.0)
    assert np.prod(other.extent_angstrom) == pytest.approx(np.prod(one.extent_angstrom), rel=0.2)


def test_a_structure_of_the_catalogue_takes_its_treatment_and_needs_its_file(shared_data: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"'groel' is made from a file; pass 1oel\.pdb\.gz .*PDB 1OEL"):
        density.build("groel", None, "", 10.0, 20.0)
    data = (shared_data / "maps" / "emd_5592_21A.mrc").read_bytes()
    with pytest.raises(FailedPrecondition, match="voxel size"):
        density.build("any", data, "emd_5592_21A.mrc", 20.0, 50.0)
    built = density.build("ribosome-80s-map", data, "emd_5592_21A.mrc", 20.0, 50.0)
    assert built.name == "ribosome-80s-map"
    # a ribosome fills 3 to 7 thousand nm^3 at this resolution
    assert 3000 < built.shape_voxels * 8 < 7000


def test_a_catalogue_of_ones_own_is_read() -> None:
    entries = load_catalogue(OWN)
    assert set(entries) == {"mine", *phantoms.names()}
    mine = entries["mine"]
    assert (mine.kind, mine.symmetry, mine.molecular_weight_kda, mine.files) == ("map", "I", 5000, ("emd_1.map.gz",))
    assert mine.treatment == structures.Treatment(level=0.2, component=2, voxel_size_angstrom=3.5)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("structures:", "things:", "one key, structures"),
        ("    kind: map", "    kind: shell", "entry 'mine': kind: 'shell' is none of coordinates, map"),
        ("    symmetry: I", "    symmetry: Z", "entry 'mine': symmetry: .*'Z'"),
        ("    symmetry: I\n", "", "entry 'mine': symmetry: is missing"),
        ("5000", "heavy", "entry 'mine': molecular_weight_kda: 'heavy' is no number"),
        ("5000", "-1", "entry 'mine': molecular_weight_kda"),
        ("5000", ".nan", "entry 'mine': molecular_weight_kda"),
        ("5000", "5" * 400, "entry 'mine': molecular_weight_kda: is too large"),
        ("0.2", "yes", "entry 'mine': level: True is no number"),
        ("component: 2", "component: 0", "entry 'mine': component is 0"),
        ("3.5", "0", "entry 'mine': voxel_size_angstrom is 0"),
        ("    help: a virus", "    help: a virus\n    colour: red", "entry 'mine': colour: no such field"),
        ("    help: a virus", "    help: a virus\n    assembly: 1", "entry 'mine': assembly: says nothing of a map"),
        ("files: [emd_1.map.gz]", "files: emd_1.map.gz", "entry 'mine': files: .*no list"),
        ("name: mine", "name: ../mine", "entry 1: name: '../mine' is no name"),
        ("name: mine", "name: barrel", "entry 'barrel': name: a built-in phantom"),
        ("  - name: mine", "  - 17\n  - name: mine", "entry 1 is no mapping"),
        ("help: a virus", "help: &a virus\n    source: *a", "aliases"),
        ("help: a virus", "help: [a virus", "not readable as YAML"),
        ("help: a virus", "help: !!python/object:os.system x", "not readable as YAML"),
    ],
)
def test_faults_of_a_catalogue_are_named(old: str, new: str, message: str) -> None:
    assert old in OWN
    with pytest.raises(InvalidArgument, match=message):
        load_catalogue(OWN.replace(old, new, 1))


def test_two_entries_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="two entries are called 'mine'"):
        load_catalogue(OWN + OWN.replace("\nstructures:\n", ""))
