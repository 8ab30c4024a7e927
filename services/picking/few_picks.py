"""What is likely wrong where almost nothing is found."""

from __future__ import annotations

_MANY_MORE = 3
"""So many times the picks of the other contrast make that the likely one."""


def opposite(contrast: str) -> str:
    """The other sign of protein."""
    return "light" if contrast == "dark" else "dark"


def advice(picks: int, inverted_picks: int, contrast: str, particle_diameter_angstrom: float, threshold: float) -> str:
    """One sentence about a search that found few picks.

    Args:
        picks: how many there are.
        inverted_picks: how many there are for protein of the opposite contrast.
        contrast: that was searched, "dark" or "light".
        particle_diameter_angstrom: likewise.
        threshold: likewise, in standard deviations.
    """
    searched = f"contrast {contrast}, particles of {particle_diameter_angstrom:g} Å, threshold {threshold:g}"
    found = f"{picks} picks with {searched}"
    if inverted_picks >= _MANY_MORE * max(picks, 1):
        other = opposite(contrast)
        return f"{found}; {inverted_picks} with contrast {other}: if protein is {other} in it, give contrast={other}"
    return (
        f"{found}, {inverted_picks} with the opposite contrast: the diameter may be wrong, or the threshold too high; "
        "a tomogram that is smoothed more has fewer and clearer peaks"
    )
