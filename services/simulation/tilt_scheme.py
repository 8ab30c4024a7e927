"""The angles of a tilt series and the order in which they are recorded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument

TiltOrder = Literal["sequential", "bidirectional", "dose_symmetric"]
#: More images than any microscope records of one specimen.
MAX_TILTS = 1000
#: Angles are rounded to so many decimals, so that steps of 0.1 degrees make no 0.30000000000000004.
_DECIMALS = 6


@dataclass(frozen=True)
class TiltScheme:
    """angles_degrees: (n,) ascending, as the stack holds them. acquisition_order: (n,) when each was recorded, from
    0."""

    angles_degrees: NDArray[np.float64]
    acquisition_order: NDArray[np.int64]

    def prior_dose(self, dose_per_tilt: float) -> NDArray[np.float64]:
        """The dose (n,) that had gone through the specimen before each image, at the same dose for each."""
        return self.acquisition_order.astype(np.float64) * dose_per_tilt

    def __len__(self) -> int:
        return len(self.angles_degrees)


def tilt_scheme(
    tilt_min_degrees: float,
    tilt_max_degrees: float,
    step_degrees: float,
    order: TiltOrder = "dose_symmetric",
    start_degrees: float = 0.0,
    group_size: int = 1,
) -> TiltScheme:
    """The scheme of angles from tilt_min in steps up to tilt_max.

    Args:
        tilt_min_degrees: the lowest angle, -90 at least.
        tilt_max_degrees: 90 at most; the highest angle lies below it where the step does not divide the range.
        step_degrees: from one angle to the next.
        order: "sequential": from the lowest to the highest. "bidirectional": from the start up to the highest, then
            from below the start down to the lowest. "dose_symmetric" (Hagen, Wan & Briggs, J. Struct. Biol. 197, 191
            (2017)): the start, then in turn `group_size` angles above and `group_size` below, outwards; where one side
            has no more, the rest of the other.
        start_degrees: the angle of the scheme nearest to it is recorded first; nothing to "sequential".
        group_size: for "dose_symmetric".

    Raises InvalidArgument: the range or step makes no series of 2 to `MAX_TILTS` images, or the start lies outside.
    """
    for name, value in (
        ("tilt_min_degrees", tilt_min_degrees),
        ("tilt_max_degrees", tilt_max_degrees),
        ("tilt_step_degrees", step_degrees),
        ("start_degrees", start_degrees),
    ):
        if not math.isfinite(value):
            raise InvalidArgument(f"{name} is {value}, it must be a finite number")
    if not -90 <= tilt_min_degrees < tilt_max_degrees <= 90:
        raise InvalidArgument(
            f"tilt_min_degrees {tilt_min_degrees:g} and tilt_max_degrees {tilt_max_degrees:g}: "
            "both must lie in -90 to 90, the smaller first"
        )
    extent = tilt_max_degrees - tilt_min_degrees
    if step_degrees <= 0:
        raise InvalidArgument(f"tilt_step_degrees is {step_degrees:g}, it must be positive")
    if step_degrees > extent:
        raise InvalidArgument(
            f"tilt_step_degrees is {step_degrees:g}, more than the whole range of {extent:g} degrees: "
            "a series has at least two angles"
        )
    steps = extent / step_degrees
    if steps + 1 > MAX_TILTS:
        raise InvalidArgument(
            f"tilt_step_degrees is {step_degrees:g}: a range of {extent:g} degrees would have {steps + 1:.4g} tilts, "
            f"at most {MAX_TILTS} are possible; the step must be at least {extent / (MAX_TILTS - 1):.3g}"
        )
    if order not in get_args(TiltOrder):
        raise InvalidArgument(f"order is {order!r}, it must be one of {', '.join(get_args(TiltOrder))}")
    if group_size < 1:
        raise InvalidArgument(f"group_size is {group_size}, it must be at least 1")
    count = math.floor(steps + 1e-9) + 1
    angles = np.round(tilt_min_degrees + step_degrees * np.arange(count), _DECIMALS)
    if order == "sequential":
        sequence = list(range(count))
    else:
        if not tilt_min_degrees <= start_degrees <= tilt_max_degrees:
            raise InvalidArgument(
                f"start_degrees is {start_degrees:g}, it must lie in the tilt range "
                f"{tilt_min_degrees:g} to {tilt_max_degrees:g}"
            )
        first = int(np.argmin(np.abs(angles - start_degrees)))
        above, below = list(range(first + 1, count)), list(range(first - 1, -1, -1))
        sequence = [first]
        if order == "bidirectional":
            sequence += above + below
        else:
            for start in range(0, max(len(above), len(below)), group_size):
                sequence += above[start : start + group_size] + below[start : start + group_size]
    acquisition = np.empty(count, np.int64)
    acquisition[sequence] = np.arange(count)
    return TiltScheme(angles, acquisition)
