"""Picks of a tomogram, as they are drawn on it."""

from __future__ import annotations

from cryofleet.in_tomogram import particles_inside
from cryofleet.particles import Particles
from cryofleet.server import Reader
from cryofleet.volumes import Volume
from services.io.picks import Picks


def picks_in(reader: Reader, uri: str, tomogram: Volume, diameter_angstrom: float) -> Picks:
    """The particles of a table that lie in the tomogram. Raises FailedPrecondition where they can't be its own."""
    particles = reader.read_particles(uri)
    if not len(particles):
        return Picks(particles.positions(), diameter_angstrom)
    inside = particles_inside(reader.store, particles, uri, tomogram)
    return Picks(inside.positions + inside.shifts, diameter_angstrom, class_names(particles.select(inside.rows)))


def class_names(particles: Particles) -> list[str] | None:
    """The class of each particle by name, or by number, from 1, where there are no names; None without classes."""
    table = particles.table
    if "class_name" in table and any(table["class_name"]):
        return [str(name) or "no class" for name in table["class_name"]]
    if "class_id" in table:
        return [f"class {number + 1}" if number >= 0 else "no class" for number in table["class_id"]]
    return None
