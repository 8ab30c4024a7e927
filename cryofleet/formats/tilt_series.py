"""What is known of the images of a tilt series: our JSON, IMOD's .tlt and SerialEM's .mdoc.

`read_tilt_series` takes any of the three and tells them apart by their content.

Of SerialEM's keys (bio3d.colorado.edu/SerialEM, "File formats"):

- the tilt axis is the "Tilt axis angle" of a title, from the image's y axis, counter-clockwise; `RotationAngle` is that
  plus 90 degrees;
- doses are in e/Å^2, and 0 where the microscope was not calibrated: unknown;
- `Defocus` is what the lens was set to, in µm and underfocus negative, against a zero that nobody knows. It is the
  defocus only in a file that `write_mdoc` wrote, which says so in a title; of other files the defocus stays unknown;
- images were recorded in the order of `PriorRecordDose`, or of `DateTime` where that is left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.ctf import Ctf

FORMAT = "cryofleet.tilt-series/1"
#: No tilt series has more images, nor such a file more bytes.
MAX_TILTS = 10_000
MAX_BYTES = 64 << 20
_SIMULATED = "Cryofleet: simulated; Defocus is the true one"
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
#: Simulated images are dated a minute apart from here on: other programs tell the order of recording by the date alone.
_FIRST_DATE = datetime(2000, 1, 1)
_EXPECTED = "expected a .tlt (one angle in degrees a line), a SerialEM .mdoc, or a tilt series of Cryofleet (JSON)"


@dataclass(frozen=True, eq=False)
class TiltSeries:
    """The images of a tilt series, in the order of the stack. What is not known is None.

    angles_degrees: (n,), tilt theta as `cryofleet.numerics.ctf` has it. acquisition_order: (n,) when each image was
    recorded, from 0. exposure, prior_dose: (n,) e/Å^2 of the image, and of all before it. defocus_um: (n,) at the tilt
    axis, underfocus positive. astigmatism_um, astigmatism_angle_degrees, phase_shift_degrees: (n,), as `Ctf` has them.
    shifts_angstrom: (n, 2), where on each image the specimen's centre lies, (u, v) from the image's centre.
    rotations_degrees: (n,), by how much it is turned there, u towards v. Of a simulated series both are the errors of
    its alignment. tilt_axis_degrees: angle of the tilt axis from the images' y axis, counter-clockwise.

    Raises InvalidArgument that names the field for lengths that differ and values that cannot be.
    """

    angles_degrees: NDArray[np.float64]
    acquisition_order: NDArray[np.int64] | None = None
    exposure: NDArray[np.float64] | None = None
    prior_dose: NDArray[np.float64] | None = None
    defocus_um: NDArray[np.float64] | None = None
    astigmatism_um: NDArray[np.float64] | None = None
    astigmatism_angle_degrees: NDArray[np.float64] | None = None
    phase_shift_degrees: NDArray[np.float64] | None = None
    shifts_angstrom: NDArray[np.float64] | None = None
    rotations_degrees: NDArray[np.float64] | None = None
    tilt_axis_degrees: float | None = None
    pixel_size_angstrom: float | None = None
    voltage_kv: float | None = None
    cs_mm: float | None = None
    amplitude_contrast: float | None = None

    def __post_init__(self) -> None:
        count = np.size(self.angles_degrees)
        if not 1 <= count <= MAX_TILTS:
            raise InvalidArgument(f"angles_degrees: {count} tilt angles; a series has 1 to {MAX_TILTS}")
        for name in _PER_IMAGE:
            value = getattr(self, name)
            if value is None:
                continue
            array = np.array(value, np.float64)
            expected = (count, 2) if name == "shifts_angstrom" else (count,)
            if array.shape != expected:
                raise InvalidArgument(f"{name} has shape {array.shape}, expected {expected} for {count} tilts")
            wrong = ~np.isfinite(array)
            if name == "angles_degrees":
                wrong |= np.abs(array) > 90
            elif name in ("exposure", "prior_dose"):
                wrong |= array < 0
            if wrong.any():
                raise InvalidArgument(f"{name}: {array[wrong][0]:g} {_RULES.get(name, 'is not a finite number')}")
            object.__setattr__(self, name, array)
        if self.acquisition_order is not None:
            order = np.asarray(self.acquisition_order)
            if not np.array_equal(np.sort(order), np.arange(count)):
                raise InvalidArgument(f"acquisition_order must hold every number from 0 to {count - 1} once")
            object.__setattr__(self, "acquisition_order", order.astype(np.int64))
        for name in _SINGLE:
            number = getattr(self, name)
            if number is None:
                continue
            if not math.isfinite(number) or (name in ("pixel_size_angstrom", "voltage_kv") and number <= 0):
                raise InvalidArgument(f"{name} is {number}, it must be a finite number, and positive for a size")
            object.__setattr__(self, name, float(number))

    def __len__(self) -> int:
        return len(self.angles_degrees)

    def filled(self, **values: Any) -> TiltSeries:
        """The same with `values` in place of what is not known; what is known stays. A number stands for all images."""
        missing = {name: value for name, value in values.items() if getattr(self, name) is None and value is not None}
        for name, value in missing.items():
            if name in _PER_IMAGE and np.ndim(value) == 0:
                missing[name] = np.full(len(self), float(value))
        return dataclasses.replace(self, **missing)

    def select(self, images: NDArray[Any] | slice) -> TiltSeries:
        """Some of the images, by index or mask; the order of recording is counted anew."""
        chosen: dict[str, Any] = {}
        for name in _PER_IMAGE:
            value = getattr(self, name)
            chosen[name] = None if value is None else value[images]
        if chosen["acquisition_order"] is not None:
            chosen["acquisition_order"] = _ranks(chosen["acquisition_order"])
        return dataclasses.replace(self, **chosen)

    def ctf(self, image: int) -> Ctf:
        """The transfer function of an image at the tilt axis.

        Raises FailedPrecondition where the defocus, voltage, Cs or amplitude contrast is not known.
        """
        for name in ("defocus_um", "voltage_kv", "cs_mm", "amplitude_contrast"):
            if getattr(self, name) is None:
                raise FailedPrecondition(f"the tilt series does not say its {name}, without which there is no CTF")

        def of_image(values: NDArray[np.float64] | None) -> float:
            return 0.0 if values is None else float(values[image])

        return Ctf(
            defocus_um=of_image(self.defocus_um),
            voltage_kv=float(self.voltage_kv or 0),
            cs_mm=float(self.cs_mm or 0),
            amplitude_contrast=float(self.amplitude_contrast or 0),
            astigmatism_um=of_image(self.astigmatism_um),
            astigmatism_angle_degrees=of_image(self.astigmatism_angle_degrees),
            phase_shift_degrees=of_image(self.phase_shift_degrees),
        )

    def to_mapping(self) -> dict[str, Any]:
        """What is known, as plain lists and numbers, with the format's name."""
        known: dict[str, Any] = {"format": FORMAT}
        for name in (*_PER_IMAGE, *_SINGLE):
            value = getattr(self, name)
            if value is not None:
                known[name] = value.tolist() if isinstance(value, np.ndarray) else value
        return known

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TiltSeries:
        """The inverse of `to_mapping`, exactly. Raises InvalidArgument that names the field."""
        if mapping.get("format") != FORMAT:
            raise InvalidArgument(f"format is {mapping.get('format')!r}, expected {FORMAT!r}")
        values = {name: value for name, value in mapping.items() if name != "format"}
        unknown = sorted(set(values) - {*_PER_IMAGE, *_SINGLE})
        if unknown:
            raise InvalidArgument(f"unknown field {unknown[0]!r} of a tilt series")
        if "angles_degrees" not in values:
            raise InvalidArgument("angles_degrees is missing")
        for name, value in values.items():
            if name in _SINGLE:
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise InvalidArgument(f"{name} must be a number")
            elif not isinstance(value, list):
                raise InvalidArgument(f"{name} must be a list of numbers")
            else:
                try:
                    array = np.array(value)
                except ValueError:
                    raise InvalidArgument(f"{name} must be a list of numbers, all of one length") from None
                if array.dtype.kind not in "iuf":
                    raise InvalidArgument(f"{name} must be a list of numbers")
                values[name] = array
        return cls(**values)

    def to_json(self) -> bytes:
        """`to_mapping` as JSON; numbers are exact."""
        return (json.dumps(self.to_mapping(), indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, name: str) -> TiltSeries:
        """The inverse of `to_json`; InvalidArgument that names the file and the line or field."""
        text = _text(data, name)
        try:
            mapping = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidArgument(f"{name}, line {error.lineno}: not JSON: {error.msg}") from None
        except (RecursionError, ValueError):
            raise InvalidArgument(f"{name}: nested too deep, or a number too long, for a tilt series") from None
        if not isinstance(mapping, dict):
            raise InvalidArgument(f"{name}: {_EXPECTED}")
        try:
            return cls.from_mapping(mapping)
        except InvalidArgument as error:
            raise InvalidArgument(f"{name}: {error}") from None


_SINGLE = ("tilt_axis_degrees", "pixel_size_angstrom", "voltage_kv", "cs_mm", "amplitude_contrast")
_PER_IMAGE = tuple(field.name for field in dataclasses.fields(TiltSeries) if field.name not in _SINGLE)
_RULES = {
    "angles_degrees": "is no tilt angle: it must lie in -90 to 90 degrees",
    "exposure": "is no dose: it must be a finite number, not negative",
    "prior_dose": "is no dose: it must be a finite number, not negative",
}


def read_tilt_series(data: bytes, name: str) -> TiltSeries:
    """The tilt series of a .tlt, a .mdoc or our JSON, whichever the content is; `name` is what errors call it.

    Raises InvalidArgument that names the file and the line.
    """
    text = _text(data, name)
    start = text.lstrip()[:1]
    if start == "{":
        return TiltSeries.from_json(data, name)
    if re.search(r"^\s*(\[|[A-Za-z]\w*\s*=)", text, re.MULTILINE):
        return read_mdoc(data, name)
    return read_tlt(data, name)


def read_tlt(data: bytes, name: str) -> TiltSeries:
    """The angles of an IMOD .tlt or .rawtlt: one in degrees a line, in the order of the stack; blank lines count for
    nothing."""
    angles: list[float] = []
    for number, line in enumerate(_lines(data, name), start=1):
        if not line:
            continue
        if len(angles) == MAX_TILTS:
            raise InvalidArgument(f"{name}, line {number}: more than {MAX_TILTS} tilt angles")
        angles.append(_angle(line, f"{name}, line {number}"))
    if not angles:
        raise InvalidArgument(f"{name}: no tilt angle in the file; {_EXPECTED}")
    return TiltSeries(np.array(angles))


def write_tlt(angles_degrees: Sequence[float] | NDArray[np.float64]) -> bytes:
    """An IMOD .tlt: one angle a line, with as many digits as it takes to read the same number again."""
    return "".join(f"{_digits(angle):>8}\n" for angle in angles_degrees).encode()


def read_mdoc(data: bytes, name: str) -> TiltSeries:
    """The tilt series of a SerialEM .mdoc, its sections in the order of their ZValue; see this file's head for what is
    taken from which key.

    Raises InvalidArgument that names the file and the line.
    """
    header, titles, sections = _parse_mdoc(data, name)
    if not sections:
        raise InvalidArgument(f"{name}: no [ZValue = ...] section in the file; {_EXPECTED}")
    sections.sort(key=lambda section: section.index)
    angles = []
    for section in sections:
        if "TiltAngle" not in section.values:
            raise InvalidArgument(f"{name}, line {section.line}: section {section.index} has no TiltAngle")
        text, line = section.values["TiltAngle"]
        angles.append(_angle(text, f"{name}, line {line}"))

    def column(key: str) -> NDArray[np.float64] | None:
        """A number of every section, or None where one lacks it."""
        if any(key not in section.values for section in sections):
            return None
        found = (section.values[key] for section in sections)
        return np.array([_number(text, key, f"{name}, line {line}") for text, line in found])

    def single(key: str) -> float | None:
        """A number of the header, or else of the sections, which must agree on it."""
        if key in header:
            text, line = header[key]
            return _number(text, key, f"{name}, line {line}")
        values = column(key)
        if values is None:
            return None
        if np.ptp(values) > 1e-3 * np.abs(values).max():
            raise InvalidArgument(f"{name}: the sections' {key} differ, {values.min():g} to {values.max():g}")
        return float(values[0])

    exposure = column("ExposureDose")
    if exposure is not None and not exposure.any():
        exposure = None
    prior = column("PriorRecordDose")
    order = None if prior is None or len(np.unique(prior)) < len(prior) else _ranks(prior)
    if order is None:
        dates = [_date(section.values["DateTime"][0]) if "DateTime" in section.values else None for section in sections]
        known = [date for date in dates if date is not None]
        if len(set(known)) == len(sections) > 1:
            order = _ranks(np.array([(date - _FIRST_DATE).total_seconds() for date in known]))
    if prior is not None and not prior.any():
        prior = None
    if prior is None and order is not None and exposure is not None:
        sequence = np.argsort(order)
        prior = np.empty(len(sections))
        prior[sequence] = np.concatenate([[0.0], np.cumsum(exposure[sequence])[:-1]])

    axis = None
    for title, line in titles:
        if found := re.search(r"[Tt]ilt axis angle\s*=\s*([^,\s\]]+)", title):
            axis = _number(found[1], "Tilt axis angle", f"{name}, line {line}")
    rotation = single("RotationAngle") if axis is None else None
    if rotation is not None:
        axis = round((rotation - 90 + 180) % 360 - 180, 6)
    defocus = column("Defocus") if any(_SIMULATED in title for title, _ in titles) else None
    # SerialEM writes 0 where it does not know a pixel
    pixel = single("PixelSpacing") or None
    try:
        return TiltSeries(
            np.array(angles),
            acquisition_order=order,
            exposure=exposure,
            prior_dose=prior,
            defocus_um=None if defocus is None else -defocus,
            tilt_axis_degrees=axis,
            pixel_size_angstrom=pixel,
            voltage_kv=single("Voltage"),
        )
    except InvalidArgument as error:
        raise InvalidArgument(f"{name}: {error}") from None


def write_mdoc(
    series: TiltSeries,
    image_file: str,
    image_size: tuple[int, int] | None,
    data_mode: int = 2,
    simulated: bool = True,
) -> bytes:
    """A tilt series as SerialEM would describe it.

    Angles, doses, their order, defocus, pixel, voltage and tilt axis are kept exactly; the format has no place for
    Cs, amplitude contrast and alignment errors, which our JSON keeps. Dates only tell the order.

    Args:
        series: what is not known is left out.
        image_file: name of the stack, without its folder.
        image_size: (x, y) in pixels; left out where it is None.
        data_mode: MRC mode of the stack: 2 is float32.
        simulated: the defocus is the true one and is written, with a title that says so; of other series it is left
            out, for SerialEM's Defocus is another thing.

    Raises InvalidArgument where the name holds a line break.
    """
    if re.search(r"[\r\n\0]", image_file):
        raise InvalidArgument(f"the image file's name {image_file!r} holds a line break")
    lines: list[str] = []
    if series.pixel_size_angstrom is not None:
        lines.append(f"PixelSpacing = {_digits(series.pixel_size_angstrom)}")
    if series.voltage_kv is not None:
        lines.append(f"Voltage = {_digits(series.voltage_kv)}")
    lines.append(f"ImageFile = {image_file}")
    if image_size is not None:
        lines.append(f"ImageSize = {image_size[0]} {image_size[1]}")
    lines += [f"DataMode = {data_mode}", ""]
    if simulated:
        lines += [f"[T = {_SIMULATED}]", ""]
    if series.tilt_axis_degrees is not None:
        lines += [f"[T =     Tilt axis angle = {_digits(series.tilt_axis_degrees)}, binning = 1]", ""]
    target = None if series.defocus_um is None or not simulated else float(np.mean(series.defocus_um))
    for index in range(len(series)):
        lines += [f"[ZValue = {index}]", f"TiltAngle = {_digits(series.angles_degrees[index])}"]
        if series.exposure is not None:
            lines.append(f"ExposureDose = {_digits(series.exposure[index])}")
        if series.pixel_size_angstrom is not None:
            lines.append(f"PixelSpacing = {_digits(series.pixel_size_angstrom)}")
        if series.defocus_um is not None and target is not None:
            lines.append(f"Defocus = {_digits(-series.defocus_um[index])}")
        if series.tilt_axis_degrees is not None:
            lines.append(f"RotationAngle = {_digits(series.tilt_axis_degrees + 90)}")
        if target is not None:
            lines.append(f"TargetDefocus = {_digits(-target)}")
        if series.prior_dose is not None:
            lines.append(f"PriorRecordDose = {_digits(series.prior_dose[index])}")
        if series.acquisition_order is not None:
            date = _FIRST_DATE + timedelta(minutes=int(series.acquisition_order[index]))
            lines.append(f"DateTime = {date.day:02d}-{_MONTHS[date.month - 1]}-{date:%y  %H:%M:%S}")
        lines.append("")
    return "\n".join(lines).encode()


@dataclass
class _Section:
    index: int
    line: int
    values: dict[str, tuple[str, int]]


def _parse_mdoc(data: bytes, name: str) -> tuple[dict[str, tuple[str, int]], list[tuple[str, int]], list[_Section]]:
    """The header's values, the titles and the sections, each with the number of its line."""
    header: dict[str, tuple[str, int]] = {}
    titles: list[tuple[str, int]] = []
    sections: dict[int, _Section] = {}
    values = header
    for number, line in enumerate(_lines(data, name), start=1):
        if not line or line.startswith("#"):
            continue
        bracketed = line.startswith("[")
        if bracketed and not line.endswith("]"):
            raise InvalidArgument(f"{name}, line {number}: the bracket is not closed")
        key, equals, value = (part.strip() for part in line.strip("[]").partition("="))
        if not equals:
            raise InvalidArgument(f"{name}, line {number}: {line[:60]!r} is no 'key = value'")
        if key == "T":
            titles.append((value, number))
        elif not bracketed:
            values[key] = (value, number)
        elif key in ("ZValue", "FrameSet"):
            if not re.fullmatch(r"[0-9]{1,9}", value):
                raise InvalidArgument(f"{name}, line {number}: {key} {value[:40]!r} is no number of an image")
            index = int(value)
            if index in sections:
                raise InvalidArgument(
                    f"{name}, line {number}: section {index} is there twice, first in line {sections[index].line}"
                )
            if len(sections) == MAX_TILTS:
                raise InvalidArgument(f"{name}, line {number}: more than {MAX_TILTS} sections")
            sections[index] = _Section(index, number, {})
            values = sections[index].values
        else:
            # of some other kind, a montage's pieces say: its keys are nobody's
            values = {}
    return header, titles, list(sections.values())


def _text(data: bytes, name: str) -> str:
    if len(data) > MAX_BYTES:
        raise InvalidArgument(f"{name}: {len(data)} bytes; a file of tilt angles has at most {MAX_BYTES}")
    if b"\0" in data:
        raise InvalidArgument(f"{name}: not a text file; {_EXPECTED}")
    return data.decode("utf-8-sig", errors="replace")


def _lines(data: bytes, name: str) -> list[str]:
    text = _text(data, name).replace("\r\n", "\n").replace("\r", "\n")
    return [line.strip() for line in text.split("\n")]


def _number(text: str, what: str, where: str) -> float:
    try:
        # float() would also take 1_000
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidArgument(f"{where}: {what} {text[:40]!r} is not a finite number")
    return value


def _angle(text: str, where: str) -> float:
    try:
        angle = _number(text, "tilt angle", where)
    except InvalidArgument as error:
        raise InvalidArgument(f"{error}; {_EXPECTED}") from None
    if abs(angle) > 90:
        raise InvalidArgument(f"{where}: {angle:g} {_RULES['angles_degrees']}")
    return angle


def _digits(value: float) -> str:
    """The shortest digits that read as the same number; no minus before a zero."""
    return repr(float(value) + 0.0)


def _ranks(values: NDArray[Any]) -> NDArray[np.int64]:
    ranks = np.empty(len(values), np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks


def _date(text: str) -> datetime | None:
    """SerialEM's 06-Jun-23  23:19:46, the year with two digits or four; None for anything else."""
    found = re.fullmatch(r"(\d{1,2})-([A-Z][a-z]{2})-(\d{2}|\d{4})\s+(\d{2}):(\d{2}):(\d{2})", text)
    if found is None or found[2] not in _MONTHS:
        return None
    day, year, hour, minute, second = (int(found[i]) for i in (1, 3, 4, 5, 6))
    try:
        return datetime(year + 2000 if year < 100 else year, _MONTHS.index(found[2]) + 1, day, hour, minute, second)
    except ValueError:
        return None
