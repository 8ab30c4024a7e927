"""Particle tilt images and their projection geometry, as RELION 5 and Warp export them.

Two STAR files say it all: particles.star (data_general, data_optics, data_particles; one stack of 2D images a particle)
and tomograms.star (data_global and one table of tilts a tomogram, or the name of that table's file). Conventions, read
from RELION 5's source (src/jaz/tomography: tomogram_set, particle_set, tomogram) and tried on exported data:

- A tilt's projection takes the tomogram's (x, y, z) to the image's (u, v) and the depth: the first three rows of
  rlnTomoProj[XYZ], or Rz(rlnTomoZRot) Ry(rlnTomoYTilt) Rx(rlnTomoXTilt), active, about the tomogram's fixed axes.
- A particle's orientation is the rotation of rlnTomoSubtomogram[Rot,Tilt,Psi] after that of rlnAngle[Rot,Tilt,Psi],
  each as `cryofleet.formats.euler` has it. It lies at coordinate - subtomogram rotation * rlnOrigin[XYZ]Angst.
- rlnCenteredCoordinate[XYZ]Angst count from the tomogram's centre, size / 2. RELION 5 writes no others beside 2D
  stacks; rlnCoordinate[XYZ] there are Warp's, in pixels of the particle images from the tomogram's corner.
- The defocus of a particle is its tilt's plus rlnTomoHand times its depth from the tomogram's centre.
- RELION's stacks hold the visible tilts alone, Warp's all tilts.
- CTF-premultiplied images were multiplied by CTF * rlnCtfScalefactor * exp(-dose / (2 Ne(k))).

The hand of a sample can't be told from a tilt series: images turned by half a turn about the beam reconstruct its
mirror image, equally well. A set whose average comes out as the mirror image of the known structure is read with
`opposite_hand`, which turns them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.formats.euler import from_euler
from cryofleet.formats.star_tables import StarTable, parse_star
from cryofleet.numerics.ctf import Ctf

#: How far a projection matrix may be from a rotation, largest element of P P^T - 1: digits written, magnification.
ROTATION_TOLERANCE = 0.05
#: Images that a tomogram's table may hold.
MAX_TILTS = 10_000


@dataclass(frozen=True)
class TiltGeometry:
    """The tilts of one tomogram.

    projections: (n, 3, 3), from the tomogram's (x, y, z) to (u, v, depth). ctfs: at the tomogram's centre. scales: the
    signal's amplitude in each tilt, for the thickness that it crosses. doses: e/Å^2 before each tilt. hand: the sign
    with which depth adds to the defocus. size: (x, y, z) in pixels of the tilt series, where it is stated.
    """

    name: str
    projections: NDArray[np.float64]
    ctfs: tuple[Ctf, ...]
    scales: NDArray[np.float64]
    doses: NDArray[np.float64]
    hand: float
    pixel_size_angstrom: float
    size: tuple[float, float, float] | None


@dataclass(frozen=True)
class TiltImageParticle:
    """One particle and where its images are.

    stack: the file's name as it stands. visible: (n tilts,). rotation: takes the reference onto the particle, None
    where the file has no angles. position_angstrom: (x, y, z) of what the images are centred on, from the tomogram's
    centre; shift_angstrom: of the particle's centre beside it, in the tomogram's frame. half: 1 or 2, 0 where it is not
    stated. box and pixel_size_angstrom are the images'.
    """

    name: str
    geometry: TiltGeometry
    stack: str
    visible: NDArray[np.bool_]
    rotation: Rotation | None
    position_angstrom: NDArray[np.float64]
    shift_angstrom: NDArray[np.float64]
    half: int
    box: int
    pixel_size_angstrom: float
    premultiplied: bool

    @property
    def projections(self) -> NDArray[np.float64]:
        """(n visible, 3, 3)."""
        return self.geometry.projections[self.visible]

    @property
    def scales(self) -> NDArray[np.float64]:
        return self.geometry.scales[self.visible]

    @property
    def doses(self) -> NDArray[np.float64]:
        return self.geometry.doses[self.visible]

    @property
    def ctfs(self) -> tuple[Ctf, ...]:
        """Of the visible tilts, at the particle's own depth in each."""
        depths = self.geometry.projections[:, 2] @ (self.position_angstrom + self.shift_angstrom)
        return tuple(
            ctf.with_defocus(ctf.defocus_um + self.geometry.hand * depth * 1e-4)
            for ctf, depth, visible in zip(self.geometry.ctfs, depths.tolist(), self.visible, strict=True)
            if visible
        )

    def images(self, stack: NDArray[np.floating]) -> NDArray[np.float32]:
        """The visible tilts' images of the particle's whole stack `[n, v, u]`.

        Raises InvalidArgument where it holds neither all tilts nor the visible ones, or has another box.
        """
        tilts, visible = len(self.visible), int(self.visible.sum())
        if stack.ndim != 3 or stack.shape[1:] != (self.box, self.box) or len(stack) not in (tilts, visible):
            raise InvalidArgument(
                f"{self.stack}: the stack of particle {self.name} has shape {stack.shape}; expected {visible} visible "
                f"or all {tilts} tilts of {self.box} x {self.box} pixels"
            )
        chosen = stack[self.visible] if len(stack) == tilts else stack
        return np.ascontiguousarray(chosen, np.float32)


def read_tilt_images(
    particles: bytes,
    tomograms: bytes,
    *,
    particles_name: str = "particles.star",
    tomograms_name: str = "tomograms.star",
    read_file: Callable[[str], bytes] | None = None,
    opposite_hand: bool = False,
) -> tuple[TiltImageParticle, ...]:
    """The particles of a set of 2D stacks, with the geometry of the tomograms they lie in.

    Args:
        particles: the bytes of particles.star.
        tomograms: those of tomograms.star.
        particles_name: what errors call the files.
        tomograms_name: likewise.
        read_file: gives the bytes of a file that tomograms.star names for a tomogram's tilts
            (rlnTomoTiltSeriesStarFile); the caller answers for where it may read.
        opposite_hand: see this file's head.

    Raises:
        InvalidArgument: a file is no STAR file, or lacks or contradicts something: names file, table, column and row.
    """
    tables = parse_star(particles, particles_name)
    rows, optics = _table(tables, "particles", particles_name), _table(tables, "optics", particles_name)
    if rows.rows == 0:
        raise InvalidArgument(f"{particles_name}: table particles has no rows")
    groups = _optics(optics, tables.get("general"))
    geometries = _Geometries(parse_star(tomograms, tomograms_name), tomograms_name, read_file, opposite_hand)

    count = rows.rows
    tomogram_names, stacks, group_of = (
        rows.texts("rlnTomoName"),
        rows.texts("rlnImageName"),
        rows.texts("rlnOpticsGroup"),
    )
    names = rows.texts("rlnTomoParticleName") if "rlnTomoParticleName" in rows else [str(i + 1) for i in range(count)]
    inner = _angles(rows, "rlnTomoSubtomogram")
    outer = _angles(rows, "rlnAngle")
    rotations = outer if inner is None else inner if outer is None else inner * outer
    origins = _vectors(rows, [f"rlnOrigin{axis}Angst" for axis in "XYZ"])
    shifts = np.zeros((count, 3)) if origins is None else -(origins if inner is None else inner.apply(origins))
    centred = _vectors(rows, [f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"])
    cornered = None if centred is not None else _vectors(rows, [f"rlnCoordinate{axis}" for axis in "XYZ"])
    if centred is None and cornered is None:
        raise InvalidArgument(
            f"{particles_name}: table particles has neither rlnCenteredCoordinate[XYZ]Angst nor rlnCoordinate[XYZ]"
        )
    visible = rows.vectors("rlnTomoVisibleFrames") if "rlnTomoVisibleFrames" in rows else None
    halves = rows.integers("rlnRandomSubset") if "rlnRandomSubset" in rows else np.zeros(count, np.int64)

    read = []
    for row in range(count):
        if group_of[row] not in groups:
            raise InvalidArgument(
                f"{rows.where('rlnOpticsGroup', row)}: {group_of[row]!r} is no group of table {optics.name}"
            )
        group = groups[group_of[row]]
        geometry = geometries.of(tomogram_names[row], group, rows.where("rlnTomoName", row))
        if centred is not None:
            position = centred[row]
        else:
            assert cornered is not None
            if geometry.size is None:
                raise InvalidArgument(
                    f"{tomograms_name}: table global has no rlnTomoSize[XYZ], which rlnCoordinate[XYZ] need"
                )
            centre = np.array(geometry.size) / 2 * geometry.pixel_size_angstrom
            position = cornered[row] * group.pixel_size_angstrom - centre
        seen = np.ones(len(geometry.projections), np.bool_)
        if visible is not None:
            seen = _visible(visible[row], len(seen), rows.where("rlnTomoVisibleFrames", row))
        if halves[row] not in ((1, 2) if "rlnRandomSubset" in rows else (0,)):
            raise InvalidArgument(f"{rows.where('rlnRandomSubset', row)}: {halves[row]}, expected 1 or 2")
        read.append(
            TiltImageParticle(
                names[row],
                geometry,
                stacks[row],
                seen,
                None if rotations is None else rotations[row],
                position,
                shifts[row],
                int(halves[row]),
                group.box,
                group.pixel_size_angstrom,
                group.premultiplied,
            )
        )
    return tuple(read)


@dataclass(frozen=True)
class _Optics:
    """A row of data_optics; None where it leaves a value to tomograms.star."""

    pixel_size_angstrom: float
    box: int
    premultiplied: bool
    microscope: Mapping[str, float]


#: What both files may say of the microscope.
_MICROSCOPE = ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast", "rlnTomoTiltSeriesPixelSize")


def _optics(table: StarTable, general: StarTable | None) -> dict[str, _Optics]:
    flat = general is not None and "rlnTomoSubTomosAre2DStacks" in general
    if flat:
        assert general is not None
        flat = bool((general.integers("rlnTomoSubTomosAre2DStacks") == 1).all())
    dimensions = table.integers("rlnImageDimensionality") if "rlnImageDimensionality" in table else None
    if not flat or (dimensions is not None and (dimensions != 2).any()):
        raise InvalidArgument(
            f"{table.file}: not a set of particle tilt images: table general must state rlnTomoSubTomosAre2DStacks 1 "
            "and rlnImageDimensionality be 2 (export 2D stacks)"
        )
    pixels = _positive(table, "rlnImagePixelSize")
    boxes = table.integers("rlnImageSize")
    column = "rlnCtfDataAreCtfPremultiplied"
    premultiplied = table.integers(column) if column in table else np.zeros(table.rows, np.int64)
    known = {name: table.numbers(name) for name in _MICROSCOPE if name in table}
    groups: dict[str, _Optics] = {}
    for row, name in enumerate(table.texts("rlnOpticsGroup")):
        if not 2 <= boxes[row] <= 1 << 14:
            raise InvalidArgument(f"{table.where('rlnImageSize', row)}: images of {boxes[row]} pixels")
        if premultiplied[row] not in (0, 1):
            raise InvalidArgument(f"{table.where(column, row)}: {premultiplied[row]}, expected 0 or 1")
        if name in groups:
            raise InvalidArgument(f"{table.where('rlnOpticsGroup', row)}: a second group {name!r}")
        groups[name] = _Optics(
            float(pixels[row]),
            int(boxes[row]),
            bool(premultiplied[row]),
            {key: float(values[row]) for key, values in known.items()},
        )
    return groups


class _Geometries:
    """The tomograms' geometry, each read when a particle first asks for it."""

    def __init__(
        self,
        tables: Mapping[str, StarTable],
        file: str,
        read_file: Callable[[str], bytes] | None,
        opposite_hand: bool,
    ) -> None:
        self._tables, self._file, self._read_file = tables, file, read_file
        self._opposite_hand = opposite_hand
        self._global = _table(tables, "global", file)
        self._rows = {name: row for row, name in reversed(list(enumerate(self._global.texts("rlnTomoName"))))}
        self._read: dict[str, TiltGeometry] = {}

    def of(self, name: str, group: _Optics, where: str) -> TiltGeometry:
        if name not in self._read:
            if name not in self._rows:
                raise InvalidArgument(f"{where}: {self._file} has no tomogram {name!r}")
            self._read[name] = self._geometry(name, self._rows[name], group)
        return self._read[name]

    def _geometry(self, name: str, row: int, group: _Optics) -> TiltGeometry:
        known = self._global
        tilts = self._tilts(name, row)
        if not 1 <= tilts.rows <= MAX_TILTS:
            raise InvalidArgument(f"{tilts.file}: table {tilts.name} has {tilts.rows} tilts, expected 1 to {MAX_TILTS}")
        microscope = dict(group.microscope)
        microscope.update({key: float(known.numbers(key)[row]) for key in _MICROSCOPE if key in known})
        for key in _MICROSCOPE:
            if key not in microscope:
                raise InvalidArgument(f"{self._file}: table global has no column {key}, nor has the particles' optics")
        pixel_size = microscope["rlnTomoTiltSeriesPixelSize"]
        if not pixel_size > 0:
            raise InvalidArgument(
                f"{known.where('rlnTomoTiltSeriesPixelSize', row)}: {pixel_size:g} Å, expected more than 0"
            )
        size = None
        if all(f"rlnTomoSize{axis}" in known for axis in "XYZ"):
            x, y, z = (float(_positive(known, f"rlnTomoSize{axis}")[row]) for axis in "XYZ")
            size = (x, y, z)
        projections = _projections(tilts)
        scales = tilts.numbers("rlnCtfScalefactor") if "rlnCtfScalefactor" in tilts else projections[:, 2, 2].copy()
        doses = _not_negative(tilts, "rlnMicrographPreExposure")
        if self._opposite_hand:
            projections = np.array([[-1.0], [-1.0], [1.0]]) * projections
        return TiltGeometry(
            name,
            projections,
            _ctfs(tilts, microscope),
            scales,
            np.zeros(tilts.rows) if doses is None else doses,
            float(known.numbers("rlnTomoHand")[row]) if "rlnTomoHand" in known else -1.0,
            pixel_size,
            size,
        )

    def _tilts(self, name: str, row: int) -> StarTable:
        if name in self._tables and name != "global":
            return self._tables[name]
        column = "rlnTomoTiltSeriesStarFile"
        if column not in self._global:
            raise InvalidArgument(f"{self._file}: no table {name!r} with the tomogram's tilts, nor a column {column}")
        if self._read_file is None:
            raise InvalidArgument(f"{self._global.where(column, row)}: the tilts lie in another file; give it along")
        file = self._global.texts(column)[row]
        return _table(parse_star(self._read_file(file), file), name, file)


def _projections(tilts: StarTable) -> NDArray[np.float64]:
    if all(f"rlnTomoProj{axis}" in tilts for axis in "XYZ"):
        rows = [np.array(tilts.vectors(f"rlnTomoProj{axis}", 4))[:, :3] for axis in "XYZ"]
        matrices = np.stack(rows, axis=1)
        deviation = np.abs(matrices @ matrices.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
        wrong = (deviation > ROTATION_TOLERANCE) | (np.linalg.det(matrices) <= 0)
        if wrong.any():
            where = tilts.where("rlnTomoProj[XYZ]", int(np.argmax(wrong)))
            raise InvalidArgument(f"{where}: the three rows are not those of a rotation")
        return matrices
    if "rlnTomoYTilt" in tilts and "rlnTomoZRot" in tilts:
        x = tilts.numbers("rlnTomoXTilt") if "rlnTomoXTilt" in tilts else np.zeros(tilts.rows)
        angles = np.stack([x, tilts.numbers("rlnTomoYTilt"), tilts.numbers("rlnTomoZRot")], axis=1)
        return np.asarray(Rotation.from_euler("xyz", angles, degrees=True).as_matrix(), np.float64)
    raise InvalidArgument(
        f"{tilts.file}: table {tilts.name} has neither rlnTomoProj[XYZ] nor rlnTomoYTilt and rlnTomoZRot: "
        "align the tilt series first"
    )


def _ctfs(tilts: StarTable, microscope: Mapping[str, float]) -> tuple[Ctf, ...]:
    columns = [tilts.numbers(f"rlnDefocus{name}") for name in ("U", "V", "Angle")]
    columns.append(tilts.numbers("rlnPhaseShift") if "rlnPhaseShift" in tilts else np.zeros(tilts.rows))
    b_factors = _not_negative(tilts, "rlnCtfBfactor")
    columns.append(np.zeros(tilts.rows) if b_factors is None else b_factors)
    ctfs = []
    for row, (u, v, angle, phase, b_factor) in enumerate(np.stack(columns, axis=1).tolist()):
        try:
            ctf = Ctf(
                defocus_um=(u + v) / 2 * 1e-4,
                voltage_kv=microscope["rlnVoltage"],
                cs_mm=microscope["rlnSphericalAberration"],
                amplitude_contrast=microscope["rlnAmplitudeContrast"],
                astigmatism_um=abs(u - v) * 1e-4,
                # U lies along the angle and may be the lesser of the two
                astigmatism_angle_degrees=angle if u >= v else angle + 90,
                phase_shift_degrees=phase,
                b_factor=b_factor,
            )
        except InvalidArgument as error:
            raise InvalidArgument(f"{tilts.file}: table {tilts.name}, row {row + 1}: {error}") from None
        ctfs.append(ctf)
    return tuple(ctfs)


def _table(tables: Mapping[str, StarTable], name: str, file: str) -> StarTable:
    if name not in tables:
        raise InvalidArgument(
            f"{file}: no table data_{name}; it has {', '.join('data_' + key for key in tables)[:200]}"
        )
    return tables[name]


def _positive(table: StarTable, column: str) -> NDArray[np.float64]:
    values = table.numbers(column)
    if not (values > 0).all():
        row = int(np.argmin(values > 0))
        raise InvalidArgument(f"{table.where(column, row)}: {values[row]:g}, expected more than 0")
    return values


def _not_negative(table: StarTable, column: str) -> NDArray[np.float64] | None:
    """A column that may be left out."""
    if column not in table:
        return None
    values = table.numbers(column)
    if not (values >= 0).all():
        row = int(np.argmin(values >= 0))
        raise InvalidArgument(f"{table.where(column, row)}: {values[row]:g}, expected 0 or more")
    return values


def _vectors(table: StarTable, columns: list[str]) -> NDArray[np.float64] | None:
    """(n, 3) of three columns; None where the table has none of them."""
    if not any(column in table for column in columns):
        return None
    return np.stack([table.numbers(column) for column in columns], axis=1)


def _angles(table: StarTable, prefix: str) -> Rotation | None:
    angles = _vectors(table, [f"{prefix}{name}" for name in ("Rot", "Tilt", "Psi")])
    return None if angles is None else from_euler(angles, "relion")


def _visible(flags: NDArray[np.float64], tilts: int, where: str) -> NDArray[np.bool_]:
    if len(flags) != tilts:
        raise InvalidArgument(f"{where}: {len(flags)} flags, the tomogram has {tilts} tilts")
    if not np.isin(flags, (0, 1)).all():
        raise InvalidArgument(f"{where}: flags must be 0 or 1")
    return np.asarray(flags == 1, np.bool_)
