"""Structures from files: PDB and mmCIF coordinates, MRC maps, each plain or gzipped.

Coordinates become scatterers (`potential.Scatterers`): the first model, its first biological assembly where the file
names one, waters left out, alternative locations by their occupancy. The solvent that atoms displace is subtracted by
the Gaussian model of Fraser, MacRae & Suzuki (J. Appl. Cryst. 11, 693, 1978): an atom of volume V pushes ice out of a
Gaussian whose integral is V. Hydrogens that the file leaves out are spread evenly over the heavy atoms of their
residue, which at the resolutions of tomography can't be told from placing them.

Files come from users, so sizes are bounded before memory is taken and every fault is an InvalidArgument that names the
file.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import gemmi
import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.simulation.potential import VOLT_ANGSTROM_SQUARED, FormFactor, Scatterers

#: Largest file, unpacked. The largest mmCIF of the PDB is about 1 GB.
MAX_FILE_BYTES = 1 << 30
#: Largest assembly; an HIV capsid has 4.9 million atoms.
MAX_ATOMS = 10_000_000
#: Largest side of a map in voxels.
MAX_MAP_SIDE = 2048

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


@dataclass(frozen=True)
class Map:
    """A density map: values `[z, y, x]`, protein light, and voxel sizes (z, y, x) in Å."""

    values: NDArray[np.float32]
    voxel_sizes_angstrom: tuple[float, float, float]


def load(data: bytes, name: str) -> Scatterers | Map:
    """A structure from the bytes of a file, whose kind is told by its content, not by its name.

    Args:
        data: the file's bytes, PDB, mmCIF or MRC, plain or gzipped.
        name: what errors call it.

    Raises:
        InvalidArgument: not such a file, damaged, empty of atoms, or too large.
        FailedPrecondition: a map without a voxel size.
    """
    if data[:2] == b"\x1f\x8b":
        data = _gunzip(data, name)
    if len(data) > MAX_FILE_BYTES:
        raise InvalidArgument(f"{name}: {len(data)} bytes, at most {MAX_FILE_BYTES} are read")
    if not data:
        raise InvalidArgument(f"{name}: the file is empty")
    if data[208:211] == b"MAP" or (len(data) >= 1024 and b"\0" in data[:64]):
        return read_map(data, name)
    return read_coordinates(data, name)


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


def read_coordinates(data: bytes, name: str) -> Scatterers:
    """The scatterers of the first biological assembly of a PDB or mmCIF file."""
    structure = _parse(data, name)
    if len(structure) == 0:
        raise InvalidArgument(f"{name}: no atoms found; expected a PDB, mmCIF or MRC file")
    structure.remove_waters()
    table = _AtomTable.of(structure[0])
    if len(table.positions) == 0:
        raise InvalidArgument(
            f"{name}: no atoms with coordinates and a known element; expected a PDB, mmCIF or MRC file"
        )
    if not np.isfinite(table.positions).all():
        raise InvalidArgument(f"{name}: coordinates that are not finite numbers")
    copies = _assembly(structure, table)
    count = sum(len(rows) for rows, _, _ in copies)
    if count == 0:
        raise InvalidArgument(f"{name}: its biological assembly names chains that the file does not hold")
    if count > MAX_ATOMS:
        raise InvalidArgument(f"{name}: its biological assembly has {count} atoms, at most {MAX_ATOMS} are read")
    rows = np.concatenate([part for part, _, _ in copies])
    positions = np.concatenate([table.positions[part] @ turn.T + shift for part, turn, shift in copies])
    return _scatterers(table, rows, positions)


def _parse(data: bytes, name: str) -> gemmi.Structure:
    head = data[:4096].lstrip()
    try:
        if head.startswith((b"data_", b"#", b"loop_")) or b"\ndata_" in head:
            document = gemmi.cif.read_string(data)
            if len(document) == 0:
                raise InvalidArgument(f"{name}: an mmCIF file without a data block")
            structure = gemmi.make_structure_from_block(document[0])
        else:
            _check_coordinates(data)
            structure = gemmi.read_pdb_string(data)
        structure.setup_entities()
    # gemmi reports what it can't read by these three
    except (ValueError, RuntimeError, IndexError) as error:
        raise InvalidArgument(
            f"{name}: not a readable PDB or mmCIF file ({' '.join(str(error).split())[:200]})"
        ) from None
    return structure


def _check_coordinates(data: bytes) -> None:
    """Raise ValueError at the first atom of a PDB file whose coordinates are no numbers: gemmi takes those for 0."""
    for number, line in enumerate(data.splitlines(), 1):
        if line.startswith((b"ATOM", b"HETATM")):
            try:
                _ = float(line[30:38]), float(line[38:46]), float(line[46:54])
            except ValueError:
                fields = line[30:54].decode(errors="replace")
                raise ValueError(f"line {number}: {fields!r} are not three coordinates") from None


@dataclass(frozen=True)
class _AtomTable:
    """The atoms of a model as columns; `hydrogens` are those that the file leaves out, spread over the residue's
    atoms."""

    positions: NDArray[np.float64]
    elements: NDArray[np.str_]
    occupancies: NDArray[np.float64]
    b_factors: NDArray[np.float64]
    hydrogens: NDArray[np.float64]
    chains: NDArray[np.str_]
    subchains: NDArray[np.str_]

    @classmethod
    def of(cls, model: gemmi.Model) -> _AtomTable:
        rows: list[tuple[float, float, float, str, float, float, float, str, str]] = []
        for chain in model:
            for residue in chain:
                atoms = [atom for atom in residue if atom.element.atomic_number > 0]
                heavy = sum(atom.occ for atom in atoms if not atom.element.is_hydrogen)
                absent = max(
                    0.0, _hydrogen_count(residue) - sum(atom.occ for atom in atoms if atom.element.is_hydrogen)
                )
                share = absent / heavy if heavy > 0 else 0.0
                for atom in atoms:
                    hydrogen = atom.element.is_hydrogen
                    rows.append(
                        (
                            atom.pos.x,
                            atom.pos.y,
                            atom.pos.z,
                            "H" if hydrogen else atom.element.name.upper(),
                            atom.occ,
                            atom.b_iso,
                            0.0 if hydrogen else share * atom.occ,
                            chain.name,
                            residue.subchain,
                        )
                    )
        columns = list(zip(*rows, strict=True)) if rows else [()] * 9
        return cls(
            np.array(columns[:3], np.float64).T.reshape(-1, 3),
            np.array(columns[3], np.str_),
            np.array(columns[4], np.float64),
            np.array(columns[5], np.float64),
            np.array(columns[6], np.float64),
            np.array(columns[7], np.str_),
            np.array(columns[8], np.str_),
        )


def _hydrogen_count(residue: gemmi.Residue) -> int:
    """Hydrogens of a residue in its chain: a peptide or phosphodiester bond costs two of the free molecule's."""
    known = gemmi.find_tabulated_residue(residue.name)
    if not known.found():
        return 0
    in_chain = known.is_amino_acid() or known.is_nucleic_acid()
    return int(max(0, known.hydrogen_count - (2 if in_chain else 0)))


def _assembly(
    structure: gemmi.Structure, table: _AtomTable
) -> list[tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]]:
    """Rows of the table, rotation matrix and shift of each copy that the first assembly asks for; the file as it is
    without one."""
    if not structure.assemblies:
        return [(np.arange(len(table.positions)), np.eye(3), np.zeros(3))]
    copies = []
    for generator in structure.assemblies[0].generators:
        if generator.chains:
            rows = np.flatnonzero(np.isin(table.chains, list(generator.chains)))
        else:
            rows = np.flatnonzero(np.isin(table.subchains, list(generator.subchains)))
        for operator in generator.operators:
            turn = np.array(operator.transform.mat.tolist(), np.float64)
            copies.append((rows, turn, np.array(operator.transform.vec.tolist(), np.float64)))
    return copies


def _scatterers(table: _AtomTable, rows: NDArray[np.intp], positions: NDArray[np.float64]) -> Scatterers:
    names = sorted(set(table.elements.tolist()) | {"H"})
    factors = tuple(_form_factor(element) for element in names)
    kinds = np.searchsorted(names, table.elements)[rows].astype(np.int32)
    b_factors = np.clip(table.b_factors[rows], 0, MAX_B_FACTOR)
    if not b_factors.any():
        b_factors = np.full(len(rows), DEFAULT_B_FACTOR)
    # B = 8 pi^2 u^2, u the root mean square displacement along one direction
    sigmas = np.sqrt(b_factors / (8 * np.pi**2))
    occupancies, hydrogens = table.occupancies[rows], table.hydrogens[rows]
    masses = np.array([gemmi.Element(element.capitalize()).weight for element in names])
    mass = float(occupancies @ masses[kinds] + hydrogens.sum() * masses[names.index("H")])
    riding = np.flatnonzero(hydrogens)
    return Scatterers(
        np.concatenate([positions, positions[riding]]),
        np.concatenate([occupancies, hydrogens[riding]]),
        np.concatenate([sigmas, sigmas[riding]]),
        np.concatenate([kinds, np.full(len(riding), names.index("H"), np.int32)]),
        factors,
        mass / 1000,
    ).centred()


def _form_factor(element: str) -> FormFactor:
    """Electron form factor (International Tables C, table 4.3.2.2, five Gaussians) less that of the ice displaced, in V
    Å^3."""
    # None for elements beyond californium: carbon stands for them rather than nothing
    coefficients = gemmi.Element(element.capitalize()).c4322 or gemmi.Element("C").c4322
    volume = DISPLACED_VOLUMES.get(element, DISPLACED_VOLUME_OTHER)
    # the table's argument is s = k / 2: exp(-b s^2) = exp(-b k^2 / 4). Fraser's Gaussian is exp(-pi k^2 V^(2/3))
    amplitudes = [*coefficients.a, -ICE_SCATTERING * volume]
    widths = [*coefficients.b, 4 * np.pi * volume ** (2 / 3)]
    return FormFactor(tuple(float(a) * VOLT_ANGSTROM_SQUARED for a in amplitudes), tuple(float(b) for b in widths))


# --- maps
# ----------------------------------------------------------------------------------------------------------------------

_MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}


def read_map(data: bytes, name: str) -> Map:
    """An MRC or CCP4 map, its axes put into the order z, y, x.

    Raises InvalidArgument for a damaged file and FailedPrecondition where the header has no voxel size.
    """
    if len(data) < 1024:
        raise InvalidArgument(f"{name}: {len(data)} bytes, an MRC header alone has 1024")
    order = "<" if 0 <= int.from_bytes(data[12:16], "little", signed=True) <= 127 else ">"
    words = np.frombuffer(data, f"{order}i4", 256)
    columns, rows, sections = (int(word) for word in words[:3])
    mode, extended = int(words[3]), int(words[23])
    if not all(1 <= side <= MAX_MAP_SIDE for side in (columns, rows, sections)):
        raise InvalidArgument(
            f"{name}: a map of {columns} x {rows} x {sections} voxels; sides must lie in 1 to {MAX_MAP_SIDE} "
            "(is this an MRC file?)"
        )
    if mode not in _MODES:
        raise InvalidArgument(
            f"{name}: MRC mode {mode} is not a real volume; modes {', '.join(map(str, _MODES))} are read"
        )
    kind = np.dtype(f"{order}{_MODES[mode]}")
    start, count = 1024 + max(0, extended), columns * rows * sections
    if len(data) < start + count * kind.itemsize:
        raise InvalidArgument(
            f"{name}: {len(data)} bytes, its header promises {start + count * kind.itemsize}; the file is cut off"
        )
    axes = tuple(int(word) for word in words[16:19])
    if axes == (0, 0, 0):
        axes = (1, 2, 3)
    if sorted(axes) != [1, 2, 3]:
        raise InvalidArgument(f"{name}: axis order {axes} in the header, expected 1, 2, 3 in some order")
    stored = np.frombuffer(data, kind, count, start).reshape(sections, rows, columns).astype(np.float32)
    # stored axes, slowest first, are (maps, mapr, mapc); put z (3) first and x (1) last
    slowest_first = (axes[2], axes[1], axes[0])
    values = np.ascontiguousarray(stored.transpose([slowest_first.index(axis) for axis in (3, 2, 1)]))
    if not np.isfinite(values).all():
        raise InvalidArgument(f"{name}: the map holds values that are not finite numbers")
    cell = np.frombuffer(data, f"{order}f4", 3, 40).astype(np.float64)
    intervals = words[7:10].astype(np.float64)
    sizes = np.divide(cell, intervals, out=np.zeros(3), where=intervals > 0)
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise FailedPrecondition(
            f"{name}: the map's header has no voxel size; set it (cell / intervals, Å) and try again"
        )
    return Map(values, (float(sizes[2]), float(sizes[1]), float(sizes[0])))
