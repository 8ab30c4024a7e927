"""The catalogue: structures by name, where they come from, and what to do with their files.

The built-in one is `catalogue.yaml` beside this file, which is also the example of how to write one. It names public
structures and ships none of them: a user brings the file, and gives it the entry's name to have it treated as the entry
says. Phantoms need no file and are in every catalogue.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.rotations import point_group
from services.simulation import phantoms
from services.simulation.structures import AS_IT_IS, Treatment

BUILT_IN = Path(__file__).with_name("catalogue.yaml")
#: Largest catalogue of a user, characters.
MAX_CHARACTERS = 1 << 20
KINDS = ("coordinates", "map")
#: What only one kind of file has: the other kind's entries must not say it.
_OF_COORDINATES = ("assembly", "model", "chains", "b_factor", "added_b_factor", "solvent_displaced", "hydrogens")
_OF_MAPS = ("voxel_size_angstrom", "level", "component", "inverted")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Entry:
    """A structure of the catalogue.

    kind: phantom, coordinates or map. source: archive and accession. files: names under which the file is usual.
    symmetry: point group, or "H" of a filament. molecular_weight_kda: of what `treatment` makes of the file, None where
    nobody states it.
    """

    name: str
    help: str
    kind: str
    source: str
    url: str
    licence: str
    files: tuple[str, ...]
    symmetry: str
    molecular_weight_kda: float | None
    treatment: Treatment = AS_IT_IS


def load_catalogue(text: str | None = None) -> dict[str, Entry]:
    """The entries of a catalogue by name, the phantoms among them; the built-in one without `text`.

    Raises InvalidArgument that names the entry and the field.
    """
    if text is None:
        return dict(_built_in())
    return {**_phantoms(), **_parse(text)}


@cache
def _built_in() -> Mapping[str, Entry]:
    return {**_phantoms(), **_parse(BUILT_IN.read_text(encoding="utf-8"))}


@cache
def _phantoms() -> Mapping[str, Entry]:
    found = [phantoms.phantom(name) for name in phantoms.names()]
    return {
        phantom.name: Entry(
            phantom.name,
            phantom.help,
            "phantom",
            "built in",
            "",
            "Apache-2.0",
            (),
            phantom.symmetry,
            phantom.molecular_weight_kda,
        )
        for phantom in found
    }


def _parse(text: str) -> dict[str, Entry]:
    if len(text) > MAX_CHARACTERS:
        raise InvalidArgument(f"catalogue: {len(text)} characters, at most {MAX_CHARACTERS} are read")
    try:
        # an alias may make a small file large, and no catalogue needs one
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise InvalidArgument("catalogue: YAML aliases (*name) are not read; write values out")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidArgument(f"catalogue: not readable as YAML ({reason})") from None
    if not isinstance(content, dict) or set(content) != {"structures"} or not isinstance(content["structures"], list):
        raise InvalidArgument("catalogue: expected one key, structures, with a list of entries")
    entries: dict[str, Entry] = {}
    for number, item in enumerate(content["structures"], 1):
        entry = _entry(item, number)
        if entry.name in entries:
            raise InvalidArgument(f"catalogue: two entries are called {entry.name!r}")
        if entry.name in phantoms.PHANTOMS:
            raise InvalidArgument(f"catalogue: entry {entry.name!r}: name: a built-in phantom is called so")
        entries[entry.name] = entry
    return entries


def _entry(item: object, number: int) -> Entry:
    if not isinstance(item, dict):
        raise InvalidArgument(f"catalogue: entry {number} is no mapping of fields")
    name = item.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"catalogue: entry {number}: name: {name!r} is no name; letters, digits, '_', '.' and '-', at most 64"
        )

    def refuse(field: str, what: str) -> InvalidArgument:
        return InvalidArgument(f"catalogue: entry {name!r}: {field}: {what}")

    unknown = sorted(str(key) for key in item if key not in _READERS)
    if unknown:
        raise refuse(unknown[0], f"no such field; there are {', '.join(_READERS)}")
    values: dict[str, Any] = {}
    for field, (required, read) in _READERS.items():
        if field not in item:
            if required:
                raise refuse(field, "is missing")
            continue
        try:
            values[field] = read(item[field])
        except ValueError as error:
            raise refuse(field, str(error)) from None
    foreign = _OF_MAPS if values["kind"] == "coordinates" else _OF_COORDINATES
    for field in foreign:
        if field in values:
            raise refuse(field, f"says nothing of {'a map' if values['kind'] == 'map' else 'coordinates'}")
    try:
        treatment = Treatment(**{key: values[key] for key in (*_OF_COORDINATES, *_OF_MAPS) if key in values})
    except InvalidArgument as error:
        raise InvalidArgument(f"catalogue: entry {name!r}: {error}") from None
    own = {key: values[key] for key in _OWN if key in values}
    return Entry(**{"url": "", "licence": "", "molecular_weight_kda": None, **own}, treatment=treatment)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is no text")
    return value.strip()


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number")
    if isinstance(value, int) and abs(value) > 10**18:
        raise ValueError("is too large a number")
    return float(value)


def _mass(value: object) -> float:
    mass = _number(value)
    if not 0 < mass < 1e9:
        raise ValueError(f"{mass:g} is no molecular weight in kDa")
    return mass


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is no whole number")
    return value


def _yes_or_no(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{value!r} is no list of texts")
    # a chain may be called 1
    return tuple(_text(str(item) if type(item) is int else item) for item in value)


def _kind(value: object) -> str:
    if value not in KINDS:
        raise ValueError(f"{value!r} is none of {', '.join(KINDS)}")
    return str(value)


def _symmetry(value: object) -> str:
    symmetry = _text(value)
    if symmetry != "H":
        try:
            point_group(symmetry)
        except InvalidArgument as error:
            raise ValueError(f"{error}, or H of a filament") from None
    return symmetry


def _assembly(value: object) -> str:
    return _text(str(value) if type(value) is int else value)


#: Of each field, whether it is required, and what reads it or raises ValueError.
_READERS: dict[str, tuple[bool, Callable[[object], object]]] = {
    "name": (True, _text),
    "help": (True, _text),
    "kind": (True, _kind),
    "source": (True, _text),
    "url": (False, _text),
    "licence": (False, _text),
    "files": (True, _texts),
    "symmetry": (True, _symmetry),
    "molecular_weight_kda": (False, _mass),
    "assembly": (False, _assembly),
    "model": (False, _whole),
    "chains": (False, _texts),
    "b_factor": (False, _number),
    "added_b_factor": (False, _number),
    "solvent_displaced": (False, _yes_or_no),
    "hydrogens": (False, _yes_or_no),
    "voxel_size_angstrom": (False, _number),
    "level": (False, _number),
    "component": (False, _whole),
    "inverted": (False, _yes_or_no),
}
_OWN = tuple(field.name for field in fields(Entry) if field.name != "treatment")
