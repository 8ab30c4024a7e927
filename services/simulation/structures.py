"""Structures from files: PDB and mmCIF coordinates, MRC maps, each plain or gzipped.

Coordinates become scatterers (`potential.Scatterers`): by default the first model, its first biological assembly where
the file names one, waters left out, alternative locations by their occupancy. The solvent that atoms displace is
subtracted by the Gaussian model of Fraser, MacRae & Suzuki (J. Appl. Cryst. 11, 693, 1978): an atom of volume V pushes
ice out of a Gaussian whose integral is V. Hydrogens that the file leaves out are spread evenly over the heavy atoms of
their residue, which at the resolutions of tomography can't be told from placing them. A `Treatment` asks for something
else.

Files come from users, so sizes are bounded before memory is taken and every fault is an InvalidArgument that names the
file.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.mrc import parse_header
from services.simulation.potential import VOLT_ANGSTROM_SQUARED, FormFactor, Scatterers

#: Largest file, unpacked. The largest mmCIF of the PDB is about 1 GB.
MAX_FILE_BYTES = 1 << 30
#: Largest assembly; an HIV capsid has 4.9 million atoms.
MAX_ATOMS = 10_000_000
#: Largest side of a map in voxels.
MAX_MAP_SIDE = 2048
#: Voxels of a structure's map, Å.
MIN_VOXEL_SIZE, MAX_VOXEL_SIZE = 0.01, 1000.0
#: Coordinates beyond this, Å, are no molecule's.
MAX_COORDINATE = 1e6

#: Volume that an atom takes from the solvent, Å^3 (Fraser, MacRae & Suzuki 1978; metals as in CRYSOL: Svergun,
#: Barberato & Koch, J. Appl. Cryst. 28, 768, 1995).
DISPLACED_VOLUMES = {
    "H": 5.15,
    "C": 16.44,
    "N": 2.49,
    "O": 9.13,
    "P": 5.73,
    "S": 19.86,
    "MG": 17.16,
    "ZN": 9.85,
    "FE": 7.99,
}
DISPLACED_VOLUME_OTHER = 15.0
#: Mean electron scattering of vitreous ice, Å per Å^3: 0.93 g/cm^3 of H2O at f = 3.04 Å, a mean inner potential of 4.5
#: V.
ICE_SCATTERING = 0.93 * 0.602214 / 18.01528 * (2 * 0.5288 + 1.983)
#: Average B-factor assumed where a file has none (all zero), Å^2.
DEFAULT_B_FACTOR = 30.0
#: B-factors above this are a way to say "not seen"; they are taken as this, Å^2.
MAX_B_FACTOR = 1000.0
#: The assembly that is the file as it stands.
ASYMMETRIC_UNIT = "asymmetric-unit"


@dataclass(frozen=True)
class Treatment:
    """What is taken from a file, and how. What is said of coordinates does nothing to a map, and the other way about.

    Of coordinates:
        assembly: name of a biological assembly; the first one where empty, `ASYMMETRIC_UNIT` (or "none") for the file
            as it stands.
        model: which model, counted from 1.
        chains: only these chains, before an assembly is built; all where empty.
        b_factor: taken for all atoms in place of the file's, Å^2.
        added_b_factor: added to all, Å^2, negative to sharpen; what comes out below 0 is taken as 0.
        solvent_displaced: whether the ice that the atoms displace is subtracted; the potential in vacuum otherwise.
        hydrogens: whether hydrogens count, those that the file leaves out included.
    Of maps:
        voxel_size_angstrom: in place of the header's.
        level: the contour level in the map's own unit that tells the structure from what is around it; where left out
            it is `density.SHAPE_LEVEL` of the maximum at `density.SHAPE_RESOLUTION`.
        component: only the nth largest connected part above the level (voxels that share a face), counted from 1.
        inverted: whether protein is dark in the file.
    Of both:
        centred: whether the centroid is put at the origin; otherwise the file's own origin stays, which of a map is
            its voxel n // 2.

    Raises InvalidArgument for values that mean nothing.
    """

    assembly: str = ""
    model: int = 1
    chains: tuple[str, ...] = ()
    b_factor: float | None = None
    added_b_factor: float = 0.0
    solvent_displaced: bool = True
    hydrogens: bool = True
    voxel_size_angstrom: float | None = None
    level: float | None = None
    component: int | None = None
    inverted: bool = False
    centred: bool = True

    def __post_init__(self) -> None:
        if self.model < 1:
            raise InvalidArgument(f"model is {self.model}; models are counted from 1")
        if self.component is not None and self.component < 1:
            raise InvalidArgument(f"component is {self.component}; components are counted from 1, the largest")
        if self.b_factor is not None and not 0 <= self.b_factor <= MAX_B_FACTOR:
            raise InvalidArgument(f"b_factor is {self.b_factor:g} Å^2, it must lie in 0 to {MAX_B_FACTOR:g}")
        if not abs(self.added_b_factor) <= MAX_B_FACTOR:
            raise InvalidArgument(
                f"added_b_factor is {self.added_b_factor:g} Å^2, it must lie in -{MAX_B_FACTOR:g} to {MAX_B_FACTOR:g}"
            )
        if self.voxel_size_angstrom is not None and not (MIN_VOXEL_SIZE <= self.voxel_size_angstrom <= MAX_VOXEL_SIZE):
            raise InvalidArgument(
                f"voxel_size_angstrom is {self.voxel_size_angstrom:g}, it must lie in {MIN_VOXEL_SIZE:g} to "
                f"{MAX_VOXEL_SIZE:g}"
            )
        if self.level is not None and not math.isfinite(self.level):
            raise InvalidArgument(f"level is {self.level:g}, it must be a finite number")


AS_IT_IS = Treatment()


@dataclass(frozen=True)
class Map:
    """A density map: values `[z, y, x]`, protein light, and voxel sizes (z, y, x) in Å; how it is to be cut out (see
    `Treatment`)."""

    values: NDArray[np.float32]
    voxel_sizes_angstrom: tuple[float, float, float]
    treatment: Treatment = field(default=AS_IT_IS)


def load(data: bytes, name: str, treatment: Treatment = AS_IT_IS) -> Scatterers | Map:
    """A structure from the bytes of a file, whose kind is told by its content, not by its name.

    Args:
        data: the file's bytes, PDB, mmCIF or MRC, plain or gzipped.
        name: what errors call it.
        treatment: what to take from it.

    Raises:
        InvalidArgument: not such a file, damaged, empty of atoms, too large, or without what the treatment asks for.
        FailedPrecondition: a map without a voxel size.
    """
    if data[:2] == b"\x1f\x8b":
        data = _gunzip(data, name)
    if len(data) > MAX_FILE_BYTES:
        raise InvalidArgument(f"{name}: {len(data)} bytes, at most {MAX_FILE_BYTES} are read")
    if not data:
        raise InvalidArgument(f"{name}: the file is empty")
    if data[208:211] == b"MAP" or (len(data) >= 1024 and b"\0" in data[:64]):
        return read_map(data, name, treatment)
    return read_coordinates(data, name, treatment)


def _gunzip(data: bytes, name: str) -> bytes:
    """Unpack all members of a gzip file, and no more than the limit."""
    parts: list[bytes] = []
    size = 0
    while data[:2] == b"\x1f\x8b":
        decoder = zlib.decompressobj(wbits=31)
        try:
            part = decoder.decompress(data, MAX_FILE_BYTES - size + 1)
        except zlib.error as error:
            raise InvalidArgument(f"{name}: damaged gzip data ({error})") from None
        parts.append(part)
        size += len(part)
        if size > MAX_FILE_BYTES:
            raise InvalidArgument(f"{name}: unpacks to more than {MAX_FILE_BYTES} bytes")
        if not decoder.eof:
            raise InvalidArgument(f"{name}: the gzip data ends early, the file is cut off")
        data = decoder.unused_data
    return b"".join(parts)


# --- coordinates
# ---------------------------------------------------------------------------------------------------------------


def read_coordinates(data: bytes, name: str, treatment: Treatment = AS_IT_IS) -> Scatterers:
    """The scatterers of a PDB or mmCIF file, of its first model's first biological assembly unless told otherwise."""
    structure = _parse(data, name)
    if len(structure) == 0:
        raise InvalidArgument(f"{name}: no atoms found; expected a PDB, mmCIF or MRC file")
    if treatment.model > len(structure):
        raise InvalidArgument(f"{name}: model {treatment.model} is asked for, the file has {len(structure)}")
    structure.remove_waters()
    table = _AtomTable.of(structure[treatment.model - 1], name)
    if not treatment.hydrogens:
        table = table.without_hydrogens()
    if len(table.positions) == 0:
        raise InvalidArgument(
            f"{name}: no atoms with coordinates and a known element; expected a PDB, mmCIF or MRC file"
        )
    table.check(name)
    copies = _assembly(structure, table, treatment, name)
    count = sum(len(rows) for rows, _, _ in copies)
    if count == 0:
        raise InvalidArgument(f"{name}: its biological assembly names chains that the file does not hold")
    if count > MAX_ATOMS:
        raise InvalidArgument(f"{name}: its biological assembly has {count} atoms, at most {MAX_ATOMS} are read")
    rows = np.concatenate([part for part, _, _ in copies])
    positions = np.concatenate([table.positions[part] @ turn.T + shift for part, turn, shift in copies])
    scatterers = _scatterers(table, rows, positions, treatment, name)
    return scatterers.centred() if treatment.centred else scatterers


def _parse(data: bytes, name: str) -> gemmi.Structure:
    # both formats are ASCII; what other bytes do in names of authors or chains must not stop the reading
    if not data.isascii():
        data = data.translate(_ASCII)
    head = data[:4096].lstrip()
    try:
        if head.startswith((b"data_", b"#", b"loop_")) or b"\ndata_" in head:
            document = gemmi.cif.read_string(data)
            if len(document) == 0:
                raise InvalidArgument(f"{name}: an mmCIF file without a data block")
            _check_elements(set(document[0].find_values("_atom_site.type_symbol")))
            structure = gemmi.make_structure_from_block(document[0])
        else:
            _check_pdb(data)
            structure = gemmi.read_pdb_string(data)
        structure.setup_entities()
    # gemmi reports what it can't read by these three
    except (ValueError, RuntimeError, IndexError) as error:
        raise InvalidArgument(
            f"{name}: not a readable PDB or mmCIF file ({' '.join(str(error).split())[:200]})"
        ) from None
    return structure


_ASCII = bytes(range(128)) + b"?" * 128


def _check_pdb(data: bytes) -> None:
    """Raise ValueError at the first atom of a PDB file whose coordinates are no numbers, which gemmi takes for 0, or
    whose element is none."""
    elements = set()
    for number, line in enumerate(data.splitlines(), 1):
        if line.startswith((b"ATOM", b"HETATM")):
            try:
                _ = float(line[30:38]), float(line[38:46]), float(line[46:54])
            except ValueError:
                fields = line[30:54].decode(errors="replace")
                raise ValueError(f"line {number}: {fields!r} are not three coordinates") from None
            elements.add(line[76:78])
    _check_elements({element.decode("latin-1") for element in elements})


def _check_elements(symbols: set[str]) -> None:
    """Raise ValueError for a symbol that is no element's: gemmi leaves such atoms out.

    X is the PDB's own symbol for an unknown atom, and where none stands gemmi tells it by the atom's name.
    """
    for symbol in sorted(symbols):
        known = symbol.strip()
        if known.isalpha() and known.upper() != "X" and gemmi.Element(known).atomic_number == 0:
            raise ValueError(f"{known!r} is no element")


@dataclass(frozen=True)
class _AtomTable:
    """The atoms of a model as columns; `hydrogens` are those that the file leaves out, spread over the residue's
    atoms."""

    positions: NDArray[np.float64]
    elements: NDArray[np.uint8]
    occupancies: NDArray[np.float64]
    b_factors: NDArray[np.float64]
    hydrogens: NDArray[np.float64]
    chains: NDArray[np.str_]
    subchains: NDArray[np.str_]

    @classmethod
    def of(cls, model: gemmi.Model, name: str) -> _AtomTable:
        """Atoms of a known element. A residue is looked at in Python, its atoms are not."""
        residues = [
            (len(residue), _hydrogen_count(residue), chain.name, residue.subchain)
            for chain in model
            for residue in chain
        ]
        lengths = np.array([residue[0] for residue in residues], np.intp)
        of_residue = np.repeat(np.arange(len(residues)), lengths)
        alone = gemmi.Structure()
        alone.add_model(model)
        # gemmi keeps names of up to seven letters in flat columns; those of chains may be longer and are kept above
        for chain in alone[0]:
            chain.name = ""
            for residue in chain:
                residue.name = residue.subchain = ""
        try:
            flat = gemmi.FlatStructure(alone)
        except RuntimeError as error:
            raise InvalidArgument(f"{name}: {' '.join(str(error).split())[:200]}") from None
        # gemmi numbers deuterium apart from hydrogen
        codes, first = np.unique(flat.elements, return_index=True)
        numbers = np.zeros(256, np.uint8)
        symbols = np.array(flat.element_names, np.bytes_)[first].tolist()
        numbers[codes] = [gemmi.Element(symbol.decode()).atomic_number for symbol in symbols]
        elements = numbers[flat.elements]
        occupancies = np.array(flat.occ, np.float64)
        hydrogen = elements == 1
        known = elements > 0
        present = np.bincount(of_residue, np.where(hydrogen, occupancies, 0), len(residues))
        heavy = np.bincount(of_residue, np.where(known & ~hydrogen, occupancies, 0), len(residues))
        absent = np.maximum(0, np.array([residue[1] for residue in residues], np.float64) - present)
        share = np.divide(absent, heavy, out=np.zeros(len(residues)), where=heavy > 0)
        # an occupancy that is no number is refused by `check`, by name
        with np.errstate(all="ignore"):
            hydrogens = np.where(hydrogen, 0, share[of_residue] * occupancies)
        return cls(
            np.array(flat.pos, np.float64).reshape(-1, 3)[known],
            elements[known],
            occupancies[known],
            np.array(flat.b_iso, np.float64)[known],
            hydrogens[known],
            np.array([residue[2] for residue in residues], np.str_)[of_residue][known],
            np.array([residue[3] for residue in residues], np.str_)[of_residue][known],
        )

    def without_hydrogens(self) -> _AtomTable:
        """The same without those in the file and those that it leaves out."""
        heavy = self.elements != 1
        return _AtomTable(
            self.positions[heavy],
            self.elements[heavy],
            self.occupancies[heavy],
            self.b_factors[heavy],
            np.zeros(int(heavy.sum())),
            self.chains[heavy],
            self.subchains[heavy],
        )

    def check(self, name: str) -> None:
        """Raise InvalidArgument for numbers that no atom has."""
        self._refuse(name, ~np.isfinite(self.positions).all(axis=1), "coordinates that are not finite numbers")
        self._refuse(
            name,
            (np.abs(self.positions) > MAX_COORDINATE).any(axis=1),
            f"coordinates beyond {MAX_COORDINATE:g} Å",
        )
        self._refuse(name, ~np.isfinite(self.occupancies), "an occupancy that is not a finite number")
        # what rounding in a file makes of one is let through
        self._refuse(
            name,
            (self.occupancies < 0) | (self.occupancies > 1.01),
            "an occupancy outside 0 to 1",
        )
        self._refuse(name, ~np.isfinite(self.b_factors), "a B-factor that is not a finite number")
        if not self.occupancies.any():
            raise InvalidArgument(f"{name}: the occupancy of every atom is 0")

    def _refuse(self, name: str, where: ArrayLike, what: str) -> None:
        wrong = np.asarray(where, np.bool_)
        if wrong.any():
            first = int(np.argmax(wrong))
            x, y, z = self.positions[first]
            element = gemmi.Element(int(self.elements[first])).name
            raise InvalidArgument(
                f"{name}: {what}, of {int(wrong.sum())} atoms; the first is a {element} at ({x:g}, {y:g}, {z:g}) of "
                f"chain {self.chains[first]!r}, B {self.b_factors[first]:g}, occupancy {self.occupancies[first]:g}"
            )


def _hydrogen_count(residue: gemmi.Residue) -> int:
    """Hydrogens of a residue in its chain: a peptide or phosphodiester bond costs two of the free molecule's."""
    known = gemmi.find_tabulated_residue(residue.name)
    if not known.found():
        return 0
    in_chain = known.is_amino_acid() or known.is_nucleic_acid()
    return int(max(0, known.hydrogen_count - (2 if in_chain else 0)))


def _assembly(
    structure: gemmi.Structure, table: _AtomTable, treatment: Treatment, name: str
) -> list[tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]]:
    """Rows of the table, rotation matrix and shift of each copy that the assembly asks for; the file as it is without
    one."""
    wanted = np.ones(len(table.positions), np.bool_)
    if treatment.chains:
        there = set(np.unique(table.chains).tolist())
        absent = [chain for chain in treatment.chains if chain not in there]
        if absent:
            raise InvalidArgument(
                f"{name}: there is no chain {', '.join(map(repr, absent))}; there are {', '.join(sorted(there))[:200]}"
            )
        wanted = np.isin(table.chains, treatment.chains)
    assembly = _chosen_assembly(structure, treatment.assembly, name)
    if assembly is None:
        return [(np.flatnonzero(wanted), np.eye(3), np.zeros(3))]
    copies: list[tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]] = []
    for generator in assembly.generators:
        if generator.chains:
            named = np.isin(table.chains, list(generator.chains))
        else:
            named = np.isin(table.subchains, list(generator.subchains))
        rows = np.flatnonzero(named & wanted)
        for operator in generator.operators:
            turn = np.array(operator.transform.mat.tolist(), np.float64)
            shift = np.array(operator.transform.vec.tolist(), np.float64)
            # entries first: the product of what a damaged file holds may overflow
            if not (np.abs(turn) <= 1.01).all() or not np.allclose(turn @ turn.T, np.eye(3), atol=0.01):
                raise InvalidArgument(
                    f"{name}: assembly {assembly.name}: operator {operator.name or len(copies) + 1} is no rotation"
                )
            if not (np.abs(shift) <= MAX_COORDINATE).all():
                raise InvalidArgument(
                    f"{name}: assembly {assembly.name}: operator {operator.name or len(copies) + 1} shifts by more "
                    f"than {MAX_COORDINATE:g} Å"
                )
            copies.append((rows, turn, shift))
    return copies


def _chosen_assembly(structure: gemmi.Structure, wanted: str, name: str) -> gemmi.Assembly | None:
    if wanted in (ASYMMETRIC_UNIT, "none") or (not wanted and not structure.assemblies):
        return None
    if not wanted:
        return structure.assemblies[0]
    for assembly in structure.assemblies:
        if assembly.name == wanted:
            return assembly
    there = ", ".join([*(assembly.name for assembly in structure.assemblies), ASYMMETRIC_UNIT])
    raise InvalidArgument(f"{name}: there is no assembly {wanted!r}; there are {there}")


def _scatterers(
    table: _AtomTable, rows: NDArray[np.intp], positions: NDArray[np.float64], treatment: Treatment, name: str
) -> Scatterers:
    numbers = np.union1d(table.elements, np.array([1], np.uint8))
    factors = tuple(_form_factor(gemmi.Element(int(number)), treatment.solvent_displaced) for number in numbers)
    kinds = np.searchsorted(numbers, table.elements)[rows].astype(np.int32)
    b_factors = np.clip(table.b_factors[rows], 0, MAX_B_FACTOR)
    if treatment.b_factor is not None:
        b_factors = np.full(len(rows), treatment.b_factor)
    elif not b_factors.any():
        b_factors = np.full(len(rows), DEFAULT_B_FACTOR)
    # B = 8 pi^2 u^2, u the root mean square displacement along one direction
    sigmas = np.sqrt(np.maximum(0, b_factors + treatment.added_b_factor) / (8 * np.pi**2))
    occupancies, hydrogens = table.occupancies[rows], table.hydrogens[rows]
    masses = np.array([gemmi.Element(int(number)).weight for number in numbers])
    hydrogen = int(np.searchsorted(numbers, 1))
    mass = float(occupancies @ masses[kinds] + hydrogens.sum() * masses[hydrogen])
    riding = np.flatnonzero(hydrogens)
    scatterers = Scatterers(
        np.concatenate([positions, positions[riding]]),
        np.concatenate([occupancies, hydrogens[riding]]),
        np.concatenate([sigmas, sigmas[riding]]),
        np.concatenate([kinds, np.full(len(riding), hydrogen, np.int32)]),
        factors,
        mass / 1000,
    )
    # some ions and bare hydrogen displace more than they are; a structure of nothing else is none that is seen in ice
    if not scatterers.integral() > 0:
        raise InvalidArgument(f"{name}: its atoms have no more potential than the ice that they displace")
    return scatterers


def _form_factor(element: gemmi.Element, solvent_displaced: bool) -> FormFactor:
    """Electron form factor (International Tables C, table 4.3.2.2, five Gaussians), less that of the ice displaced, in
    V Å^3."""
    # None for elements beyond californium: carbon stands for them rather than nothing
    coefficients = element.c4322 or gemmi.Element("C").c4322
    amplitudes, widths = list(coefficients.a), list(coefficients.b)
    if solvent_displaced:
        symbol = "H" if element.is_hydrogen else element.name.upper()
        volume = DISPLACED_VOLUMES.get(symbol, DISPLACED_VOLUME_OTHER)
        # the table's argument is s = k / 2: exp(-b s^2) = exp(-b k^2 / 4). Fraser's Gaussian is exp(-pi k^2 V^(2/3))
        amplitudes.append(-ICE_SCATTERING * volume)
        widths.append(4 * np.pi * volume ** (2 / 3))
    return FormFactor(tuple(float(a) * VOLT_ANGSTROM_SQUARED for a in amplitudes), tuple(float(b) for b in widths))


# --- maps
# ----------------------------------------------------------------------------------------------------------------------


def read_map(data: bytes, name: str, treatment: Treatment = AS_IT_IS) -> Map:
    """An MRC or CCP4 map, its axes put into the order z, y, x, protein light. Voxels may have unequal sides.

    Raises InvalidArgument for a damaged file or an oblique cell, and FailedPrecondition where neither the header nor
    the treatment has a voxel size.
    """
    header = parse_header(data[:1024], name)
    if max(header.shape) > MAX_MAP_SIDE:
        sections, rows, columns = header.shape
        raise InvalidArgument(
            f"{name}: a map of {columns} x {rows} x {sections} voxels; sides must lie in 1 to {MAX_MAP_SIDE} "
            "(is this an MRC file?)"
        )
    if min(header.shape) < 4:
        sections, rows, columns = header.shape
        raise InvalidArgument(f"{name}: {columns} x {rows} x {sections} voxels are too thin for a structure")
    if len(data) < header.file_bytes:
        raise InvalidArgument(
            f"{name}: {len(data)} bytes, its header promises {header.file_bytes}; the file is cut off"
        )
    oblique = [angle for angle in header.cell_angles_degrees if angle != 0 and not abs(angle - 90) < 0.1]
    if oblique:
        raise InvalidArgument(
            f"{name}: the map's cell has an angle of {oblique[0]:g}°; only maps on orthogonal axes are read"
        )
    if treatment.voxel_size_angstrom is not None:
        sizes = (treatment.voxel_size_angstrom,) * 3
    elif header.voxel_size_angstrom is not None:
        x, y, z = header.voxel_size_angstrom
        sizes = (z, y, x)
        if not MIN_VOXEL_SIZE <= min(sizes) <= max(sizes) <= MAX_VOXEL_SIZE:
            raise InvalidArgument(
                f"{name}: the header's voxel size is {x:g} x {y:g} x {z:g} Å; it must lie in {MIN_VOXEL_SIZE:g} to "
                f"{MAX_VOXEL_SIZE:g}"
            )
    else:
        raise FailedPrecondition(
            f"{name}: the map's header has no voxel size; state it (voxel_size_angstrom in a catalogue), or set cell "
            "and intervals in the header"
        )
    stored = np.frombuffer(data, header.dtype, math.prod(header.shape), header.data_offset).reshape(header.shape)
    # what signals is a NaN in the file, which is refused below by name
    with np.errstate(invalid="ignore"):
        values = np.ascontiguousarray(stored.transpose(header.order), dtype=np.float32)
    if not np.isfinite(values).all():
        raise InvalidArgument(f"{name}: the map holds values that are not finite numbers")
    # a difference of float32 may overflow where its parts do not
    if not float(np.abs(values).max()) < 1e30:
        raise InvalidArgument(f"{name}: the map holds values beyond 1e30, which no density has")
    if float(values.min()) == float(values.max()):
        raise InvalidArgument(f"{name}: every voxel of the map is {float(values.flat[0]):g}; it holds no structure")
    return Map(-values if treatment.inverted else values, sizes, treatment)
