"""PyTom particle lists (XML). Rotations are AV3's: Z1 is phi, X theta, Z2 psi."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

import numpy as np

from cryofleet.errors import InvalidArgument, ResourceExhausted
from cryofleet.formats.euler import to_euler
from cryofleet.formats.frames import Frame
from cryofleet.formats.particles.files import MAX_TEXT_BYTES, check_file
from cryofleet.formats.particles.table import (
    ParticleTable,
    classes_of_names,
    distinct_ids,
    rotations_of_angles,
)

FRAME = Frame(origin="first-voxel", rotation="av3")

_MAX_PARTICLES, _MAX_DEPTH = 10_000_000, 32
_READ = {"Rotation", "Shift", "PickPosition", "Score", "Class"}
_FILE_NUMBER = re.compile(r"(\d{1,15})\.\w+$")
_ROWS_AT_ONCE = 20_000


class _Reader:
    """Collects what an XML parser finds; nothing but the particles' numbers is kept."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.positions: list[tuple[float, float, float]] = []
        self.shifts: list[tuple[float, float, float]] = []
        self.angles: list[tuple[float, float, float]] = []
        self.scores: list[float | None] = []
        self.classes: list[str] = []
        self.tomograms: list[str] = []
        self.binnings: set[float] = set()
        self.files: list[str] = []
        self.elements: dict[str, None] = {}
        self._depth = 0
        self._particle: dict[str, dict[str, str]] | None = None

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise InvalidArgument(f"{self.source}: nested more than {_MAX_DEPTH} deep")
        if self._depth == 1 and tag != "ParticleList":
            raise InvalidArgument(f"{self.source}: not a PyTom particle list: its first element is {tag[:40]!r}")
        if tag == "Particle" and self._depth == 2:
            if len(self.positions) >= _MAX_PARTICLES:
                raise ResourceExhausted(f"{self.source} has more than {_MAX_PARTICLES} particles")
            self._particle = {}
            self.files.append(attributes.get("Filename", ""))
        elif self._particle is not None and self._depth == 3:
            self.elements[tag] = None
            if tag in _READ:
                self._particle[tag] = attributes

    def end(self, tag: str) -> None:
        self._depth -= 1
        if tag != "Particle" or self._depth != 1 or self._particle is None:
            return
        found, self._particle = self._particle, None
        self.positions.append(self._triple(found, "PickPosition", ("X", "Y", "Z")))
        self.shifts.append(self._triple(found, "Shift", ("X", "Y", "Z"), 0.0))
        self.angles.append(self._triple(found, "Rotation", ("Z1", "X", "Z2"), 0.0))
        paradigm = found.get("Rotation", {}).get("Paradigm", "ZXZ")
        if paradigm != "ZXZ":
            raise InvalidArgument(f"{self._where()}: rotations of the paradigm {paradigm[:20]!r}; ZXZ is read")
        score = found.get("Score", {}).get("Value")
        self.scores.append(None if score is None else self._number(score, "Score"))
        self.classes.append(found.get("Class", {}).get("Name", ""))
        pick = found["PickPosition"]
        self.tomograms.append(pick.get("Origin", ""))
        self.binnings.add(self._number(pick.get("Binning", "1"), "Binning"))

    def _triple(
        self, found: dict[str, dict[str, str]], tag: str, names: tuple[str, str, str], default: float | None = None
    ) -> tuple[float, float, float]:
        if tag not in found:
            if default is None:
                raise InvalidArgument(f"{self._where()} has no {tag}")
            return (default, default, default)
        attributes = found[tag]
        if any(name not in attributes for name in names):
            raise InvalidArgument(f"{self._where()}: {tag} needs {', '.join(names)}")
        a, b, c = (self._number(attributes[name], f"{tag} {name}") for name in names)
        return (a, b, c)

    def _number(self, text: str, what: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = np.nan
        if not np.isfinite(value):
            raise InvalidArgument(f"{self._where()}: {what} is {text[:40]!r}; it must be a number")
        return value

    def _where(self) -> str:
        return f"{self.source}, particle {len(self.files)}"

    def refuse_doctype(self, *_: object) -> NoReturn:
        # A document type can define entities that expand without end or name other files; PyTom writes none.
        raise InvalidArgument(f"{self.source}: holds a document type declaration, which a particle list does not have")


def read(path: Path, source: str) -> ParticleTable:
    """Reads piece by piece. Raises InvalidArgument, with the particle, for what is not a particle list."""
    reader = _Reader(source)
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    parser.StartDoctypeDeclHandler = reader.refuse_doctype
    check_file(path, source, MAX_TEXT_BYTES)
    try:
        with path.open("rb") as file:
            parser.ParseFile(file)
    except expat.ExpatError as error:
        raise InvalidArgument(f"{source}, line {error.lineno}: not XML: {expat.ErrorString(error.code)}") from None
    except OSError as error:
        raise InvalidArgument(f"{source}: can't be read: {error.strerror}") from None
    except (ValueError, LookupError) as error:
        # an encoding that there is none of
        raise InvalidArgument(f"{source}: not XML: {str(error)[:80]}") from None
    if len(reader.binnings) > 1:
        raise InvalidArgument(f"{source}: particles picked at several binnings; make one list of each")
    binning = next(iter(reader.binnings), 1.0)
    columns = classes_of_names(reader.classes)
    if any(score is not None for score in reader.scores):
        columns["score"] = np.array([0.0 if score is None else score for score in reader.scores])
    numbers = [_FILE_NUMBER.search(name) for name in reader.files]
    if numbers and all(numbers):
        columns |= distinct_ids([float(match[1]) for match in numbers if match], "the file's number", source)
    return ParticleTable(
        Frame(rotation=FRAME.rotation, binning=binning if binning > 0 else None),
        np.array(reader.positions, np.float64).reshape(-1, 3),
        source,
        rotations_of_angles(np.array(reader.angles, np.float64).reshape(-1, 3), "av3", source),
        np.array(reader.shifts, np.float64).reshape(-1, 3),
        columns,
        reader.tomograms[:1] if len(set(reader.tomograms)) == 1 else reader.tomograms or ("",),
        tuple(reader.elements),
        tuple(name for name in reader.elements if name not in _READ),
    )


def write(path: Path, table: ParticleTable) -> tuple[str, ...]:
    """Writes positions, shifts, rotations, scores and classes; wedges are not known here."""
    with path.open("w", encoding="utf-8") as file:
        file.write("<ParticleList>\n")
        file.writelines(_elements(table))
        file.write("</ParticleList>\n")
    return ()


def _elements(table: ParticleTable) -> Iterator[str]:
    count = len(table)
    angles = np.zeros((count, 3)) if table.rotations is None else to_euler(table.rotations, "av3").reshape(-1, 3)
    shifts, scores, ids = table.shifts_or_zero(), table.column("score", 0.0), table.columns["id"]
    classed = "class_id" in table.columns or "class_name" in table.columns
    classes = table.class_names("") if classed else [""] * count
    tomograms = table.tomogram_column()
    binning = f"{table.frame.binning or 1.0:g}"
    for start in range(0, count, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        for position, shift, angle, score, number, name, tomogram in zip(
            table.positions[rows].tolist(),
            shifts[rows].tolist(),
            angles[rows].tolist(),
            scores[rows].tolist(),
            ids[rows].tolist(),
            classes[rows],
            tomograms[rows].tolist(),
            strict=True,
        ):
            (x, y, z), (dx, dy, dz), (phi, theta, psi) = position, shift, angle
            yield (
                f'  <Particle Filename="particle_{number}.em">\n'
                f'    <Rotation Z1="{phi!r}" Z2="{psi!r}" X="{theta!r}" Paradigm="ZXZ"/>\n'
                f'    <Shift X="{dx!r}" Y="{dy!r}" Z="{dz!r}"/>\n'
                f'    <PickPosition X="{x!r}" Y="{y!r}" Z="{z!r}" Origin={quoteattr(tomogram)} Binning="{binning}"/>\n'
                f'    <Score Type="FLCFScore" Value="{score!r}"/>\n'
                f"    <Class Name={quoteattr(name)}/>\n"
                "  </Particle>\n"
            )
