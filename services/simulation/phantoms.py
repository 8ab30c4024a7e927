"""Built-in complexes: pseudo-atomic models built from published dimensions.

A phantom is an asymmetric unit of ellipsoidal domains filled with pseudo-atoms, and a point group that repeats it. So
its symmetry is exact at every voxel size and resolution, its molecular weight is stated, and it needs no file. Its
shape is right to a few Å in the features that tomography sees (rings, lobes, channels, caps, clefts, protuberances); it
is no atomic model and is not to be used as one.

All lie with their centroid at the origin and their axes as `rotations.point_group` has them: the one of highest order
along z, and for dihedral groups a twofold along x. A filament has its helical axis along z through the origin, and the
middle of its length there.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.rotations import point_group
from services.simulation.potential import UNIT, Scatterers

Vector = tuple[float, float, float]

#: Potential above ice, V Å^3 per Da, of protein and of ribosome (two thirds RNA, whose phosphorus scatters more): what
#: `structures` gives for GroEL (1OEL) and for a 70S ribosome (7P6Z).
PROTEIN_POTENTIAL = 4.1
RIBOSOME_POTENTIAL = 4.35
#: Distance of neighbouring pseudo-atoms and their Gaussian width, Å: about five residues each, merged smoothly.
PSEUDO_ATOM_SPACING = 7.0
PSEUDO_ATOM_SIGMA = 3.5


@dataclass(frozen=True)
class Domain:
    """An ellipsoid: its centre, its semi-axes along its own x, y and z, and the rotation that takes those axes into the
    complex (Å)."""

    centre: Vector
    semi_axes: Vector
    rotation: Rotation

    def contains(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which points (n, 3) lie inside."""
        own = self.rotation.inv().apply(points - np.array(self.centre)) / np.array(self.semi_axes)
        return np.asarray(np.linalg.norm(own, axis=1) <= 1)


@dataclass(frozen=True)
class Body:
    """A mass spread evenly over the union of domains, less what lies where `keep` is false."""

    mass_kda: float
    domains: tuple[Domain, ...]
    keep: Callable[[NDArray[np.float64]], NDArray[np.bool_]] | None = None

    def pseudo_atoms(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Positions (n, 3) on a face-centred lattice through the union, shaken so that no order shows at high
        resolution."""
        reach = [max(domain.semi_axes) for domain in self.domains]
        low = np.min([np.array(domain.centre) - r for domain, r in zip(self.domains, reach, strict=True)], axis=0)
        high = np.max([np.array(domain.centre) + r for domain, r in zip(self.domains, reach, strict=True)], axis=0)
        cell = PSEUDO_ATOM_SPACING * np.sqrt(2)
        counts = np.ceil((high - low) / cell).astype(int) + 1
        corners = np.stack(np.meshgrid(*(np.arange(count) for count in counts), indexing="ij"), axis=-1).reshape(-1, 3)
        basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
        points = (corners[:, None, :] + basis).reshape(-1, 3) * cell + low
        points += rng.uniform(-0.25, 0.25, points.shape) * PSEUDO_ATOM_SPACING
        inside = np.logical_or.reduce([domain.contains(points) for domain in self.domains])
        if self.keep is not None:
            inside &= self.keep(points)
        return np.asarray(points[inside])


@dataclass(frozen=True)
class Helix:
    """A helical symmetry about z: the next subunit lies `rise_angstrom` further along z and is turned by
    `twist_degrees` about it, counter-clockwise seen from +z (a right-handed screw) where positive.

    subunits: how many a phantom has, the middle one (subunit 0) as `Phantom.subunit` gives it.
    """

    rise_angstrom: float
    twist_degrees: float
    subunits: int

    @property
    def hand(self) -> str:
        """Of the helix through consecutive subunits."""
        return "right" if self.twist_degrees > 0 else "left"

    def operator(self, steps: int) -> tuple[Rotation, float]:
        """The rotation, and the shift along z in Å after it, that take a subunit onto the one `steps` further on."""
        return Rotation.from_euler("z", self.twist_degrees * steps, degrees=True), self.rise_angstrom * steps

    def steps(self) -> range:
        """The subunits of a phantom, counted from the middle one."""
        return range(-(self.subunits // 2), self.subunits - self.subunits // 2)


@dataclass(frozen=True)
class Phantom:
    """A built-in complex.

    extent_angstrom: the published outer size along x, y and z (for a ring its diameter twice, then its height), None
    along an axis for which none is published. symmetry: its point group, or "H" for a filament, whose `helix` then
    says which.
    """

    name: str
    help: str
    symmetry: str
    molecular_weight_kda: float
    extent_angstrom: tuple[float | None, float | None, float | None]
    bodies: tuple[tuple[str, tuple[Body, ...]], ...]
    potential_per_dalton: float = PROTEIN_POTENTIAL
    helix: Helix | None = None

    def scatterers(self) -> Scatterers:
        """Its pseudo-atoms, the same ones at every call."""
        if self.helix is not None:
            return self._filament(self.helix)
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        positions, masses = [], []
        for symmetry, bodies in self.bodies:
            group = point_group(symmetry)
            for body in bodies:
                unit = body.pseudo_atoms(rng)
                copies = np.concatenate([element.apply(unit) for element in group])
                positions.append(copies)
                masses.append(np.full(len(copies), body.mass_kda / len(unit)))
        return self._pseudo_atoms(np.concatenate(positions), np.concatenate(masses)).centred()

    def subunit(self) -> Scatterers:
        """Subunit 0 of a filament, in its place about the helical axis: not centred in x and y, its centroid at z = 0.

        Raises InvalidArgument for a phantom that is no filament.
        """
        if self.helix is None:
            filaments = [name for name, make in PHANTOMS.items() if make().helix is not None]
            raise InvalidArgument(f"{self.name!r} is no filament; {', '.join(filaments)} is")
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        bodies = [body for _, bodies in self.bodies for body in bodies]
        units = [body.pseudo_atoms(rng) for body in bodies]
        mass = np.concatenate(
            [np.full(len(unit), body.mass_kda / len(unit)) for unit, body in zip(units, bodies, strict=True)]
        )
        positions = np.concatenate(units)
        positions[:, 2] -= mass @ positions[:, 2] / mass.sum()
        return self._pseudo_atoms(positions, mass)

    def _filament(self, helix: Helix) -> Scatterers:
        subunit = self.subunit()
        copies = []
        for step in helix.steps():
            turn, shift = helix.operator(step)
            copies.append(turn.apply(subunit.positions) + np.array([0, 0, shift]))
        return replace(
            subunit,
            positions=np.concatenate(copies),
            weights=np.tile(subunit.weights, helix.subunits),
            sigmas=np.tile(subunit.sigmas, helix.subunits),
            kinds=np.tile(subunit.kinds, helix.subunits),
            molecular_weight_kda=subunit.molecular_weight_kda * helix.subunits,
        )

    def _pseudo_atoms(self, positions: NDArray[np.float64], mass_kda: NDArray[np.float64]) -> Scatterers:
        count = len(mass_kda)
        return Scatterers(
            positions,
            mass_kda * 1000 * self.potential_per_dalton,
            np.full(count, PSEUDO_ATOM_SIGMA),
            np.zeros(count, np.int32),
            (UNIT,),
            float(mass_kda.sum()),
        )


def names() -> tuple[str, ...]:
    """The names of all phantoms."""
    return tuple(PHANTOMS)


def phantom(name: str) -> Phantom:
    """A phantom by its name; InvalidArgument, with the nearest name and all of them, for one that does not exist."""
    if name not in PHANTOMS:
        close = difflib.get_close_matches(name, PHANTOMS, 1, 0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InvalidArgument(
            f"structures: no built-in phantom is called {name!r}; {hint}there are {', '.join(PHANTOMS)}. "
            "A structure of your own needs its source_uri"
        )
    return PHANTOMS[name]()


def _ring(
    mass_kda: float, radius: float, azimuth_degrees: float, height: float, semi_axes: Vector, tilt_degrees: float = 0.0
) -> Body:
    """A domain of a ring: semi-axes radial, tangential and axial; tilted about the radius, which gives the ring its
    hand."""
    turn = Rotation.from_euler("z", azimuth_degrees, degrees=True)
    x, y, z = turn.apply([radius, 0, height])
    return Body(mass_kda, (Domain((x, y, z), semi_axes, turn * Rotation.from_euler("x", tilt_degrees, degrees=True)),))


def _blob(centre: Vector, semi_axes: Vector, roll: float = 0.0, pitch: float = 0.0, yaw: float = 0.0) -> Domain:
    """An ellipsoid turned about x by `roll`, then y by `pitch`, then z by `yaw` degrees."""
    return Domain(centre, semi_axes, Rotation.from_euler("xyz", [roll, pitch, yaw], degrees=True))


def _chaperonin_subunit(azimuth: float, base: float = 0.0) -> tuple[Body, ...]:
    """One of the seven subunits of a GroEL ring that stands on z = `base`: equatorial, intermediate and apical
    domain."""
    return (
        _ring(25.4, 45.5, azimuth, base + 17.5, (23, 19, 17.5), 12),
        _ring(9.3, 57.0, azimuth + 5, base + 37.5, (10, 11, 19), -22),
        _ring(22.5, 45.0, azimuth + 13, base + 56.0, (23.5, 15.5, 16.5), -30),
    )


def double_ring() -> Phantom:
    """A chaperonin of two stacked heptameric rings, after GroEL.

    Cylinder 146 Å high and 137 Å wide with a channel 45 Å wide; subunits of an equatorial, an intermediate and an
    apical domain with side windows between them: Braig et al., Nature 371, 578 (1994). 14 x 57.2 kDa (E. coli GroEL,
    UniProt P0A6F5). D7; each equatorial domain touches two of the other ring, so the rings are staggered by half a
    subunit.
    """
    bodies = _chaperonin_subunit(360 / 28)
    return Phantom(
        "double-ring", "chaperonin of two heptameric rings, as GroEL", "D7", 800.8, (137, 137, 146), (("D7", bodies),)
    )


def double_ring_with_caps() -> Phantom:
    """The chaperonin closed by a co-chaperonin at both ends, after the symmetric GroEL-(GroES)2 "football".

    About 230 Å long and 140 Å wide, apical domains raised and turned outwards, a dome of seven 10 kDa subunits with a
    loop each on both ends: Xu, Horwich & Sigler, Nature 388, 741 (1997) for the ring with its cap (a bullet of 184 Å);
    Fei et al., PNAS 111, 12775 (2014) for the football. 14 x 57.2 + 14 x 10.4 kDa. D7.
    """
    azimuth = 360 / 28
    bodies = (
        _ring(25.4, 45.5, azimuth, 17.5, (23, 19, 17.5), 12),
        _ring(9.3, 58.5, azimuth + 8, 43.0, (10.5, 11, 19), -10),
        _ring(22.5, 50.0, azimuth + 22, 68.0, (19, 17, 18.5), -20),
        _ring(8.2, 31.0, azimuth + 26, 95.0, (14, 14, 14), 20),
        _ring(2.2, 17.0, azimuth + 26, 107.5, (12, 8, 7)),
    )
    return Phantom(
        "double-ring-with-caps",
        "chaperonin closed by a dome at both ends, as GroEL-(GroES)2",
        "D7",
        946.4,
        (137, 137, 230),
        (("D7", bodies),),
    )


def single_ring() -> Phantom:
    """One heptameric ring of the chaperonin, after the single-ring mutant SR1 of GroEL.

    137 Å wide and 73 Å high, half of `double_ring`: Weissman et al., Cell 83, 577 (1995). 7 x 57.2 kDa. C7.
    """
    return Phantom(
        "single-ring",
        "one heptameric ring, as GroEL SR1",
        "C7",
        400.4,
        (137, 137, 73),
        (("C7", _chaperonin_subunit(0.0, -36.5)),),
    )


def _barrel_subunits() -> tuple[Body, ...]:
    """An alpha and a beta subunit of the 20S core; the alpha ring leaves a narrow gate, the beta ring a wide
    chamber."""
    return (
        _ring(27.4, 33.5, 8.0, 55.5, (23, 16.5, 18.5), 15),
        _ring(24.0, 38.5, -8.0, 18.0, (18, 18, 18), -15),
    )


def barrel() -> Phantom:
    """The 20S core of the proteasome: four heptameric rings, alpha beta beta alpha.

    148 Å long and 113 Å wide, three inner chambers with narrow gates: Löwe et al., Science 268, 533 (1995). 14 x 27.4 +
    14 x 24.0 kDa, the mean subunits of 720 kDa. D7.
    """
    return Phantom(
        "barrel",
        "20S proteasome core of four heptameric rings",
        "D7",
        719.6,
        (113, 113, 148),
        (("D7", _barrel_subunits()),),
    )


def barrel_with_lids() -> Phantom:
    """The 26S proteasome: the 20S barrel with a regulatory cap on each end.

    450 Å long and about 190 Å wide: Walz et al., J. Struct. Biol. 121, 19 (1998); Lander et al., Nature 482, 186 (2012)
    for the parts of a cap: the AAA+ ring of six ATPases (270 kDa) on the barrel, Rpn1 and Rpn2 (105 and 110 kDa), the
    lid of eight subunits (370 kDa) that leans over one side down to the barrel, and two ubiquitin receptors (85 kDa).
    The lids point to opposite sides, as the two dragons' heads of negative stain. 720 + 2 x 940 kDa. C2: the twofold
    lies along z and the barrel along x.
    """
    atpases = tuple(
        Body(45.0, (_blob(_polar(33.0, 60.0 * i, 103.0, (0, 5)), (23, 21, 27), yaw=60.0 * i, roll=15),))
        for i in range(6)
    )
    cap = (
        *atpases,
        Body(105.0, (_blob((8, -62, 116), (27, 29, 40), roll=20),)),
        Body(110.0, (_blob((-8, -12, 172), (34, 33, 24), pitch=20), _blob((10, 4, 198), (18, 22, 27)))),
        Body(
            370.0,
            (
                _blob((0, 62, 165), (44, 24, 27), roll=-30),
                _blob((-28, 74, 125), (19, 20, 44), roll=12),
                _blob((26, 78, 118), (20, 19, 47), roll=8),
                _blob((2, 88, 92), (26, 15, 27)),
                _blob((14, 36, 190), (27, 24, 22)),
            ),
        ),
        Body(85.0, (_blob((24, -30, 198), (17, 18, 22)), _blob((-30, 30, 190), (18, 18, 20)))),
    )
    # laid out with the barrel along z and the twofold along x, as the barrel alone lies
    return Phantom(
        "barrel-with-lids",
        "26S proteasome: the barrel with a cap on each end",
        "C2",
        2599.6,
        (450, None, None),
        (("C2", tuple(_onto_twofold(body) for body in (*_barrel_half(), *cap))),),
    )


def two_subunit_globule() -> Phantom:
    """A bacterial ribosome: two subunits with a cleft between them, and their protuberances.

    The large subunit is a dome about 200 Å wide with a central protuberance and two stalks, 250 Å across them; the
    small one is 230 Å high with head, neck, platform and spur: Frank et al., Nature 376, 441 (1995); Yusupov et al.,
    Science 292, 883 (2001). 1,450 + 850 kDa, and 10 kDa of bridges between them. C1: no symmetry at all.
    """
    large = Body(
        1450.0,
        (
            _blob((44, 0, -14), (58, 92, 72)),
            _blob((36, -40, 32), (40, 46, 38), roll=35),
            _blob((36, 42, 26), (40, 46, 36), roll=-30),
            _blob((24, 0, 74), (20, 24, 36)),
            _blob((26, 0, 98), (18, 32, 15)),
            _blob((22, -98, 34), (13, 30, 13), roll=-22),
            _blob((16, -124, 50), (17, 15, 20), roll=20),
            _blob((24, 100, 32), (15, 26, 15), roll=20),
            _blob((20, 130, 50), (10, 24, 10), roll=38),
        ),
        keep=lambda points: points[:, 0] > 4 + 0.06 * np.abs(points[:, 1]),
    )
    small = Body(
        850.0,
        (
            _blob((-40, 4, -42), (30, 47, 64), roll=6),
            _blob((-34, -46, -6), (26, 24, 38), roll=-14),
            _blob((-42, 50, -12), (24, 24, 30)),
            _blob((-42, 20, -108), (14, 15, 26), roll=18),
            _blob((-38, -2, 24), (17, 19, 20)),
            _blob((-42, -10, 66), (33, 46, 34), roll=10),
            _blob((-46, 40, 70), (15, 32, 15), roll=-18),
        ),
        keep=lambda points: points[:, 0] < -10,
    )
    bridges = Body(
        10.0,
        tuple(_blob(centre, (15, 10, 10)) for centre in ((-3, -22, 0), (-3, 14, -50), (-3, 0, 76), (-3, 30, -10))),
    )
    return Phantom(
        "two-subunit-globule",
        "bacterial ribosome: two subunits, a cleft and protuberances",
        "C1",
        2310.0,
        (None, None, None),
        (("C1", (large, small, bridges)),),
        RIBOSOME_POTENTIAL,
    )


def hexameric_ring() -> Phantom:
    """A ring of six helicase subunits in two tiers, after DnaB.

    About 115 Å wide and 75 Å high, motor domains around a channel of 25 to 30 Å, the smaller N-terminal domains a wider
    collar on top: Bailey, Eliason & Steitz, Science 318, 459 (2007). 6 x 52.4 kDa (E. coli DnaB, UniProt P0ACB0). C6;
    in the crystal the collar alone has the lower C3.
    """
    bodies = (
        _ring(34.0, 35.5, 0.0, -16.0, (22, 21, 21), 20),
        _ring(18.4, 40.5, 24.0, 19.0, (17, 15.5, 18.5), -25),
    )
    return Phantom(
        "hexameric-ring", "two-tiered ring of six subunits, as DnaB", "C6", 314.4, (115, 115, 75), (("C6", bodies),)
    )


def tetrahedral_shell() -> Phantom:
    """A tetrahedral protease of twelve subunits, after the aminopeptidase TET.

    Dimers along the six edges, each about 120 Å long, wide openings in the four faces: Russo & Baumann, J. Biol. Chem.
    279, 51275 (2004). 12 x 39 kDa. T.
    """
    twofold = _axis("T", 2)
    edge = _across(twofold, _axis("T", 3))
    body = _shell_domain(39.0, twofold * 40 + edge * 27, twofold, (19, 29, 20.5), along=edge)
    return Phantom(
        "tetrahedral-shell",
        "twelve subunits on the edges of a tetrahedron, as TET",
        "T",
        468.0,
        (None, None, None),
        (("T", (body,)),),
    )


def octahedral_shell() -> Phantom:
    """The iron store ferritin, empty: 24 rods around a hollow.

    120 Å outside, 80 Å inside; four-helix bundles of 50 x 25 Å, antiparallel pairs on the twofold axes: Lawson et al.,
    Nature 349, 541 (1991). 24 x 20 kDa. O.
    """
    # the direction that covers the sphere most evenly with rods of this size, which leaves small pores on the fourfolds
    # and threefolds
    centre = _direction(_FOURFOLD, _axis("O", 2), 33.8, -17.4)
    body = _shell_domain(20.0, centre * 50, centre, (12, 28, 13.5), along=_direction(centre, _FOURFOLD, 90, 160))
    return Phantom(
        "octahedral-shell", "24 rods around a hollow, as apoferritin", "O", 480.0, (120, 120, 120), (("O", (body,)),)
    )


def icosahedral_shell() -> Phantom:
    """A T = 1 nanocompartment of sixty subunits, after the encapsulin of Thermotoga maritima.

    240 Å outside, 200 Å inside; pentamers with a small pore, an axial domain at the fivefold and a larger peripheral
    domain: Sutter et al., Nat. Struct. Mol. Biol. 15, 939 (2008). 60 x 30.5 kDa. I.
    """
    # the directions that cover the sphere most evenly with domains of these sizes
    twofold = _axis("I", 2)
    axial, peripheral = _direction(_FIVEFOLD, twofold, 13.9, 15.6), _direction(_FIVEFOLD, twofold, 29.9, -17.8)
    bodies = (
        _shell_domain(11.0, axial * 109, axial, (11, 18, 14), along=_direction(axial, _FIVEFOLD, 90, 24)),
        _shell_domain(
            19.5, peripheral * 107, peripheral, (12, 27, 20), along=_direction(peripheral, _FIVEFOLD, 90, 6.7)
        ),
    )
    return Phantom(
        "icosahedral-shell",
        "T = 1 shell of sixty subunits, as an encapsulin",
        "I",
        1830.0,
        (240, 240, 240),
        (("I", bodies),),
    )


def helical_filament() -> Phantom:
    """Thirteen subunits of F-actin, about one crossover of its two long-pitch strands.

    27.5 Å and -166.7° from a subunit to the next, a left-handed helix whose alternate subunits make two right-handed
    strands, the pointed end at +z; 90 to 95 Å wide at its widest: Holmes et al., Nature 347, 44 (1990); von der Ecken
    et al., Nature 519, 114 (2015). Subunits of 55 x 55 x 35 Å in four subdomains, 1 and 2 (the barbed and the pointed
    one) outside, 3 and 4 at the axis: Kabsch et al., Nature 347, 37 (1990); the 42 kDa shared by residues. Polar, no
    twofold.
    """
    bodies = (
        Body(16.0, (_blob((29.0, 3.0, -12.5), (16.0, 13.5, 15.5), yaw=10),)),
        Body(4.2, (_blob((31.0, -3.0, 17.0), (10.5, 8.5, 11.5), roll=12),)),
        Body(11.8, (_blob((9.0, 4.0, -11.0), (13.5, 13.0, 15.0), roll=-8),)),
        Body(10.0, (_blob((10.0, -1.0, 15.5), (13.0, 12.5, 13.0), roll=10),)),
    )
    return Phantom(
        "helical-filament",
        "segment of thirteen subunits of a polar filament, as F-actin",
        "H",
        546.0,
        (90, 90, None),
        (("C1", bodies),),
        helix=Helix(27.5, -166.7, 13),
    )


def _polar(radius: float, azimuth_degrees: float, height: float, centre: tuple[float, float]) -> Vector:
    angle = np.radians(azimuth_degrees)
    return centre[0] + radius * float(np.cos(angle)), centre[1] + radius * float(np.sin(angle)), height


def _barrel_half() -> tuple[Body, ...]:
    """The 14 subunits of the barrel's upper half; a twofold along x makes the lower."""
    return tuple(
        Body(body.mass_kda, tuple(_turned(domain, turn) for domain in body.domains))
        for turn in point_group("C7")
        for body in _barrel_subunits()
    )


def _onto_twofold(body: Body) -> Body:
    """Turn what was built with its twofold along x and its long axis along z: twofold along z, long axis along x."""
    turn = Rotation.from_matrix([[0, 0, 1], [0, -1, 0], [1, 0, 0]])
    return Body(body.mass_kda, tuple(_turned(domain, turn) for domain in body.domains))


def _turned(domain: Domain, turn: Rotation) -> Domain:
    x, y, z = turn.apply(domain.centre)
    return Domain((x, y, z), domain.semi_axes, turn * domain.rotation)


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(vector / np.linalg.norm(vector))


def _across(axis: NDArray[np.float64], towards: NDArray[np.float64]) -> NDArray[np.float64]:
    """The unit vector perpendicular to `axis` that points most towards another vector."""
    return _unit(towards - axis * (axis @ towards))


_FOURFOLD = _FIVEFOLD = np.array([0.0, 0.0, 1.0])


def _direction(
    axis: NDArray[np.float64], towards: NDArray[np.float64], polar_degrees: float, azimuth_degrees: float
) -> NDArray[np.float64]:
    """The unit vector at a polar angle from `axis`, its azimuth counted about the axis from `towards`."""
    x = _across(axis, towards)
    polar, azimuth = np.radians(polar_degrees), np.radians(azimuth_degrees)
    sideways = np.cos(azimuth) * x + np.sin(azimuth) * np.cross(axis, x)
    return _unit(np.cos(polar) * axis + np.sin(polar) * sideways)


def _axis(group: str, order: int) -> NDArray[np.float64]:
    """The axis of an order that lies nearest to z, of those at the least azimuth from x."""
    vectors = point_group(group).as_rotvec()
    angles = np.linalg.norm(vectors, axis=1)
    chosen = vectors[np.isclose(angles, 2 * np.pi / order)]
    axes = chosen / np.linalg.norm(chosen, axis=1, keepdims=True)
    axes = np.concatenate([axes, -axes])
    axes = axes[axes[:, 2] < 1 - 1e-6]
    near = axes[np.isclose(axes[:, 2], axes[:, 2].max())]
    found: NDArray[np.float64] = near[np.argmin(np.abs(np.arctan2(near[:, 1], near[:, 0]) - 1e-3))]
    return found


def _shell_domain(
    mass_kda: float,
    centre: NDArray[np.float64],
    outwards: NDArray[np.float64],
    semi_axes: Vector,
    along: NDArray[np.float64],
) -> Body:
    """A domain of a shell: semi-axes outwards, along the given tangent, and across both."""
    tangent = _across(outwards, along)
    frame = Rotation.from_matrix(np.stack([outwards, tangent, np.cross(outwards, tangent)], axis=1))
    return Body(mass_kda, (Domain((float(centre[0]), float(centre[1]), float(centre[2])), semi_axes, frame),))


PHANTOMS: dict[str, Callable[[], Phantom]] = {
    "double-ring": double_ring,
    "double-ring-with-caps": double_ring_with_caps,
    "single-ring": single_ring,
    "barrel": barrel,
    "barrel-with-lids": barrel_with_lids,
    "two-subunit-globule": two_subunit_globule,
    "hexameric-ring": hexameric_ring,
    "tetrahedral-shell": tetrahedral_shell,
    "octahedral-shell": octahedral_shell,
    "icosahedral-shell": icosahedral_shell,
    "helical-filament": helical_filament,
}
