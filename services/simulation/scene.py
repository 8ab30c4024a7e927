"""A crowded specimen in ice, and its truth.

Things are placed in this order, so that what is large or rigid finds room first: the carbon film, membranes, filaments,
gold, the complexes that sit in membranes, and all others by size. Nothing overlaps: shapes keep a gap, membranes part
around the complexes in them. All lie within a slab of ice that is centred in depth. The density is relative to ice, so
that empty ice is 0; the vacuum above and below a slab that is thinner than the volume is taken for ice as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.rotations import uniform_random
from cryofleet.progress import Progress, no_progress, part
from services.simulation import fiducials, filaments, membranes, packing
from services.simulation.density import Density
from services.simulation.packing import MEMBRANE, NOT_IN_VESICLE, OCCUPIED, OUTSIDE

#: A complex that finds no place in so many orientations finds none.
ORIENTATIONS = 12
#: Random places on membranes that are tried for a complex, and random starts for a vesicle, bead or filament.
MEMBRANE_TRIES, STARTS = 500, 100
#: A filament of fewer subunits is none.
MIN_SUBUNITS = 3
MAX_SUBUNITS = 100_000
#: Peak memory of `build_scene` in bytes per voxel, its result included: density, instances, labels, flags.
BYTES_PER_VOXEL = 11
#: Molecules in a litre of a micromolar solution, per Å^3.
_PER_CUBIC_ANGSTROM = 6.02214076e23 * 1e-6 * 1e-27

Where = Literal["cytoplasm", "membrane", "vesicle"]


@dataclass(frozen=True)
class Placement:
    """Copies of a structure: `count`, or where that is 0 as many as `concentration_micromolar` makes in the ice.

    where: anywhere outside of membranes, across a membrane with the structure's z axis along the outward normal and its
    origin `membrane_depth_angstrom` outwards of the middle, or inside vesicles.
    """

    density: Density
    count: int = 0
    concentration_micromolar: float = 0.0
    where: Where = "cytoplasm"
    membrane_depth_angstrom: float = 0.0


@dataclass(frozen=True)
class Vesicles:
    """`count` closed membranes of mean radius radius_min to radius_max, to the bilayer's middle."""

    count: int
    radius_min_angstrom: float = 200.0
    radius_max_angstrom: float = 500.0
    max_ellipticity: float = 1.3


@dataclass(frozen=True)
class FlatMembranes:
    """`count` membranes across the field, leaning from the beam by at most an angle."""

    count: int
    max_tilt_degrees: float = 20.0


@dataclass(frozen=True)
class Filaments:
    """`count` filaments of a subunit whose helical axis is z through its centre; as long as the field where length is
    None."""

    density: Density
    count: int
    rise_angstrom: float
    twist_degrees: float
    persistence_length_angstrom: float = 1e5
    length_angstrom: float | None = None


@dataclass(frozen=True)
class GoldBeads:
    """`count` gold beads of one diameter."""

    count: int
    diameter_angstrom: float = 100.0


@dataclass(frozen=True)
class Carbon:
    """A carbon film's edge; see `fiducials.random_carbon_edge`."""

    width_angstrom: float
    thickness_angstrom: float = 200.0
    hole_radius_angstrom: float = 6000.0


@dataclass(frozen=True)
class Specimen:
    """What a scene is made of.

    shape: (z, y, x). ice_thickness_angstrom: of the slab that all lies in; the whole depth where None.
    min_gap_angstrom: least space between two complexes. allow_partial: go on with fewer copies where there is no room
    for all.
    """

    shape: tuple[int, int, int]
    voxel_size_angstrom: float
    resolution_angstrom: float
    placements: Sequence[Placement] = ()
    vesicles: Sequence[Vesicles] = ()
    flat_membranes: Sequence[FlatMembranes] = ()
    filaments: Sequence[Filaments] = ()
    gold_beads: Sequence[GoldBeads] = ()
    carbon: Carbon | None = None
    ice_thickness_angstrom: float | None = None
    min_gap_angstrom: float = 20.0
    allow_partial: bool = False


@dataclass(frozen=True)
class Placed:
    """How many copies of something were asked for and placed, and why fewer; `occupancy` is their shapes' share of the
    ice."""

    name: str
    asked: int
    placed: int
    reason: str | None
    occupancy: float


@dataclass(frozen=True)
class Scene:
    """A grand model and its truth.

    density: potential above ice (V) `[z, y, x]`, protein positive. labels: uint16, 0 is ice, what else names
    `label_names[label]`. instances: int32, 0 is none, particle i has i + 1 on its shape. positions: (n, 3) x, y, z of
    the particles' centres in voxels; of a filament's subunit the point on the helical axis. rotations: from each
    structure's own frame into the volume. classes: (n,) index of the structure, filaments' subunits after the
    structures. filaments: (n,) which filament a subunit belongs to, -1 for others. occupancy: the share of the ice that
    belongs to particles.
    """

    density: NDArray[np.float32]
    labels: NDArray[np.uint16]
    instances: NDArray[np.int32]
    positions: NDArray[np.float64]
    rotations: Rotation
    classes: NDArray[np.int32]
    filaments: NDArray[np.int32]
    class_names: tuple[str, ...]
    label_names: tuple[str, ...]
    placed: tuple[Placed, ...]
    occupancy: float

    def labels_of(self, name: str) -> list[int]:
        """The labels of a name."""
        return [label for label, other in enumerate(self.label_names) if other == name]


def build_scene(specimen: Specimen, rng: np.random.Generator, progress: Progress = no_progress) -> Scene:
    """Place everything at random, in uniformly random orientations where nothing else decides them.

    Args:
        specimen: what to place.
        rng: of orientations and places.
        progress: told of every particle.

    Raises:
        InvalidArgument: a structure larger than the ice, more than the ice can hold at all, nothing to place.
        FailedPrecondition: no place for all, and `allow_partial` is not set; the message says how many were placed.
    """
    return _Builder(specimen, rng).build(progress)


@dataclass
class _Builder:
    """The scene while it is built."""

    specimen: Specimen
    rng: np.random.Generator
    density: NDArray[np.float32] = field(init=False)
    labels: NDArray[np.uint16] = field(init=False)
    instances: NDArray[np.int32] = field(init=False)
    flags: NDArray[np.uint8] = field(init=False)
    surfaces: list[membranes.Membrane] = field(default_factory=list)
    positions: list[NDArray[np.float64]] = field(default_factory=list)
    quaternions: list[NDArray[np.float64]] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    filament_numbers: list[int] = field(default_factory=list)
    placed: dict[str, Placed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape, voxel = self.specimen.shape, self.specimen.voxel_size_angstrom
        self.density = np.zeros(shape, np.float32)
        self.labels = np.zeros(shape, np.uint16)
        self.instances = np.zeros(shape, np.int32)
        self.flags = np.full(shape, NOT_IN_VESICLE, np.uint8)
        self.gap = packing.ball(self.specimen.min_gap_angstrom / voxel)
        thickness = self.specimen.ice_thickness_angstrom
        depth = shape[0] if thickness is None else min(shape[0], round(thickness / voxel))
        if depth < 1:
            raise InvalidArgument(f"ice_thickness_angstrom is {thickness:g}, less than a voxel of {voxel:g} Å")
        self.ice = ((shape[0] - depth) // 2, (shape[0] - depth) // 2 + depth)
        self.flags[: self.ice[0]] |= OUTSIDE
        self.flags[self.ice[1] :] |= OUTSIDE
        structures = [placement.density.name for placement in self.specimen.placements]
        strands = [strand.density.name for strand in self.specimen.filaments]
        self.class_names = (*structures, *strands)
        self.label_names = ("ice", *self.class_names, "membrane", "gold", "carbon")
        self.membrane, self.gold, self.carbon = (len(self.class_names) + n for n in (1, 2, 3))

    def build(self, progress: Progress) -> Scene:
        specimen = self.specimen
        counts = [self._count(placement) for placement in specimen.placements]
        self._check(counts)
        if specimen.carbon is not None:
            self._add_carbon(specimen.carbon)
        progress(0.0, "membranes")
        # what crosses the whole field finds room first
        for flat in specimen.flat_membranes:
            self._add_membranes("flat membranes", flat.count, partial(self._plane, flat), part(progress, 0.0, 0.05))
        for vesicles in specimen.vesicles:
            self._add_membranes(
                "vesicles",
                vesicles.count,
                partial(self._ellipsoid, vesicles),
                part(progress, 0.05, 0.15),
            )
        for number, strand in enumerate(specimen.filaments):
            self._add_filaments(strand, len(specimen.placements) + number, part(progress, 0.15, 0.25))
        for beads in specimen.gold_beads:
            self._add_gold(beads, part(progress, 0.25, 0.3))
        order = sorted(
            range(len(counts)),
            key=lambda i: (specimen.placements[i].where != "membrane", -specimen.placements[i].density.shape_voxels),
        )
        total = max(1, sum(counts))
        done = 0
        for index in order:
            told = part(progress, 0.3 + 0.7 * done / total, 0.3 + 0.7 * (done + counts[index]) / total)
            self._add_copies(specimen.placements[index], counts[index], index, told)
            done += counts[index]
        ice_voxels = (self.ice[1] - self.ice[0]) * specimen.shape[1] * specimen.shape[2]
        return Scene(
            self.density,
            self.labels,
            self.instances,
            np.array(self.positions, np.float64).reshape(-1, 3),
            Rotation.from_quat(np.array(self.quaternions, np.float64).reshape(-1, 4)),
            np.array(self.classes, np.int32),
            np.array(self.filament_numbers, np.int32),
            self.class_names,
            self.label_names,
            tuple(self.placed.values()),
            float(np.count_nonzero(self.instances)) / ice_voxels,
        )

    # --- checks

    def _count(self, placement: Placement) -> int:
        name = placement.density.name
        if bool(placement.count) == bool(placement.concentration_micromolar):
            raise InvalidArgument(f"structures: {name!r} needs either a count or a concentration_micromolar")
        if placement.where == "membrane" and not (self.specimen.vesicles or self.specimen.flat_membranes):
            raise InvalidArgument(f"structures: {name!r} is to sit in a membrane, and there is none")
        if placement.where == "vesicle" and not self.specimen.vesicles:
            raise InvalidArgument(f"structures: {name!r} is to lie inside vesicles, and there are none")
        if placement.count:
            return placement.count
        ice = (self.ice[1] - self.ice[0]) * math.prod(self.specimen.shape[1:]) * self.specimen.voxel_size_angstrom**3
        return max(1, round(placement.concentration_micromolar * _PER_CUBIC_ANGSTROM * ice))

    def _check(self, counts: list[int]) -> None:
        specimen = self.specimen
        if not (counts or self.class_names or specimen.vesicles or specimen.flat_membranes or specimen.gold_beads):
            raise InvalidArgument("structures: there is nothing to place")
        z, y, x = self.ice[1] - self.ice[0], *specimen.shape[1:]
        for placement in specimen.placements:
            covered = np.argwhere(placement.density.shape)
            sides = (np.ptp(covered, axis=0) + 1) / placement.density.oversampling
            if float(sides.min()) > min(z, y, x):
                raise self._too_large(placement.density.name)
        asked = sum(
            count * placement.density.shape_voxels for count, placement in zip(counts, specimen.placements, strict=True)
        )
        share = asked / (z * y * x)
        if share > 1 and not specimen.allow_partial:
            raise InvalidArgument(
                f"structures: {sum(counts)} complexes would fill {share:.0%} of the ice of {x} x {y} x {z} voxels; "
                "ask for fewer or a larger volume"
            )

    def _too_large(self, name: str) -> InvalidArgument:
        z, y, x = self.specimen.shape
        ice = "" if self.ice == (0, z) else f", of which {self.ice[1] - self.ice[0]} in depth are ice,"
        return InvalidArgument(
            f"structures: {name!r} does not fit into the empty volume of {x} x {y} x {z} voxels{ice} in any of "
            f"{ORIENTATIONS} orientations; make the volume larger"
        )

    def _report(self, name: str, asked: int, placed: int, reason: str | None, voxels: int) -> None:
        """Keep what was placed, or raise where it is too little."""
        ice = (self.ice[1] - self.ice[0]) * math.prod(self.specimen.shape[1:])
        self.placed[name] = Placed(name, asked, placed, reason, voxels / ice)
        if reason is not None and not self.specimen.allow_partial:
            occupied = np.count_nonzero(self.instances) / ice
            raise FailedPrecondition(
                f"structures: placed {placed} of {asked} {name!r}, {len(self.positions)} particles in all: {reason}, "
                f"with {occupied:.1%} of the ice occupied; ask for fewer, a smaller gap or a larger volume, or go on "
                "with what there is room for by allow_partial"
            )

    # --- what is in the ice beside the complexes

    def _depth(self) -> tuple[float, float]:
        return float(self.ice[0]), float(self.ice[1] - 1)

    def _add_carbon(self, carbon: Carbon) -> None:
        voxel = self.specimen.voxel_size_angstrom
        edge = fiducials.random_carbon_edge(
            self.specimen.shape,
            carbon.width_angstrom / voxel,
            carbon.thickness_angstrom / voxel,
            carbon.hole_radius_angstrom / voxel,
            self.rng,
        )
        voltage = np.float32(fiducials.potential_above_ice("C"))
        for z in range(self.specimen.shape[0]):
            inside = edge.plane(z, self.specimen.shape[1:])
            self.density[z] += voltage * inside
            self.labels[z][inside > 0.5] = self.carbon
            self.flags[z][inside > 0] |= OUTSIDE

    def _plane(self, flat: FlatMembranes) -> membranes.Membrane | None:
        return membranes.random_plane(self.specimen.shape, self._depth(), flat.max_tilt_degrees, self.rng)

    def _ellipsoid(self, vesicles: Vesicles) -> membranes.Membrane | None:
        voxel = self.specimen.voxel_size_angstrom
        return membranes.random_ellipsoid(
            self.specimen.shape,
            self._depth(),
            (vesicles.radius_min_angstrom / voxel, vesicles.radius_max_angstrom / voxel),
            vesicles.max_ellipticity,
            membranes.THICKNESS / 2 / voxel,
            self.rng,
        )

    def _add_membranes(
        self, name: str, count: int, draw: Callable[[], membranes.Membrane | None], progress: Progress
    ) -> None:
        """Membranes that don't touch each other; `draw` gives one anywhere, or None where it can't fit."""
        placed, reason = 0, None
        for number in range(count):
            found = False
            for _ in range(STARTS):
                progress(number / count, name, placed=number)
                surface = draw()
                if surface is not None and self._is_clear(surface):
                    self._add_membrane(surface, progress)
                    found = True
                    break
            if not found:
                reason = f"no place was found for another in {STARTS} tries"
                break
            placed += 1
        self._report(name, count, placed, reason, 0)

    def _is_clear(self, surface: membranes.Membrane) -> bool:
        """Whether nothing lies within a membrane and the gap, nor in the vesicle that it closes; carbon may cut it."""
        voxel = self.specimen.voxel_size_angstrom
        reach = (membranes.THICKNESS / 2 + self.specimen.min_gap_angstrom) / voxel
        for z, rows, columns, distance in _planes(surface, self.specimen.shape, reach):
            own = distance < reach if isinstance(surface, membranes.Ellipsoid) else np.abs(distance) < reach
            if (self.flags[z, rows, columns] & (OCCUPIED | MEMBRANE))[own].any():
                return False
        return True

    def _add_membrane(self, surface: membranes.Membrane, progress: Progress) -> None:
        voxel, resolution = self.specimen.voxel_size_angstrom, self.specimen.resolution_angstrom
        reach = membranes.reach_angstrom(resolution) / voxel
        half = membranes.THICKNESS / 2 / voxel
        gap = self.specimen.min_gap_angstrom / voxel
        for number, (z, rows, columns, distance) in enumerate(_planes(surface, self.specimen.shape, reach)):
            if number % 32 == 0:
                progress(0.5, "membranes")
            if not self.ice[0] <= z < self.ice[1]:
                continue
            free = self.labels[z, rows, columns] == 0
            profile = membranes.bilayer_profile(distance * voxel, resolution).astype(np.float32)
            self.density[z, rows, columns] += np.where(free & (np.abs(distance) < reach), profile, 0)
            within = np.abs(distance) <= half
            self.labels[z, rows, columns][within & free] = self.membrane
            flags = self.flags[z, rows, columns]
            flags[np.abs(distance) <= half + gap] |= MEMBRANE
            if isinstance(surface, membranes.Ellipsoid):
                flags[distance < -half] &= np.uint8(255 - NOT_IN_VESICLE)
        self.surfaces.append(surface)

    def _add_filaments(self, strand: Filaments, index: int, progress: Progress) -> None:
        specimen, voxel, name = self.specimen, self.specimen.voxel_size_angstrom, strand.density.name
        rise = strand.rise_angstrom / voxel
        if strand.length_angstrom is None:
            most = MAX_SUBUNITS
        else:
            most = max(1, round(strand.length_angstrom / strand.rise_angstrom))
        size = np.array(specimen.shape[::-1], np.float64)
        placed, reason, subunit_voxels = 0, None, 0
        forbidden = OCCUPIED | MEMBRANE | OUTSIDE

        def accepts(pose: filaments.Pose) -> bool:
            voxels, place = self._voxels(strand.density, pose)
            return packing.is_free(self.flags, forbidden, voxels, place)

        for number in range(strand.count):
            poses: list[filaments.Pose] = []
            for _ in range(STARTS):
                progress(number / strand.count, "filaments", filaments=number)
                start = self.rng.uniform(0, size - 1)
                start[2] = self.rng.uniform(*self._depth())
                poses = filaments.grow(
                    start,
                    filaments.random_direction(self.rng),
                    rise,
                    strand.twist_degrees,
                    strand.persistence_length_angstrom / voxel,
                    most,
                    accepts,
                    self.rng,
                )
                if len(poses) >= min(MIN_SUBUNITS, most):
                    break
                poses = []
            if not poses:
                reason = f"no place was found for another filament in {STARTS} tries"
                break
            taken = []
            for pose in poses:
                voxels, place = self._voxels(strand.density, pose)
                subunit_voxels += self._put(strand.density, pose.rotation, pose.position, index, number)
                taken.append((voxels, place))
            # only now: the subunits of one filament touch each other
            for voxels, place in taken:
                packing.occupy(self.flags, voxels, place, self.gap)
            placed += 1
        self._report(name, strand.count, placed, reason, subunit_voxels)

    def _add_gold(self, beads: GoldBeads, progress: Progress) -> None:
        radius = beads.diameter_angstrom / 2 / self.specimen.voxel_size_angstrom
        voltage = np.float32(fiducials.potential_above_ice("Au"))
        placed, reason = 0, None
        for number in range(beads.count):
            fraction = self.rng.uniform(-0.5, 0.5, 3)
            ball = fiducials.bead(radius, fraction)
            voxels = packing.mask_voxels(ball > 0)
            place = packing.find_place(
                self.flags,
                OCCUPIED | MEMBRANE | OUTSIDE,
                voxels,
                self.rng,
                lambda number=number: progress(number / beads.count, "gold"),  # type: ignore[misc]
            )
            if place is None:
                reason = "no place is left for another bead"
                break
            window, inside = _overlap(self.specimen.shape, place, ball.shape)
            self.density[window] += voltage * ball[inside]
            self.labels[window][ball[inside] > 0.5] = self.gold
            packing.occupy(self.flags, voxels, place, self.gap)
            placed += 1
        self._report("gold", beads.count, placed, reason, 0)

    # --- complexes

    def _add_copies(self, placement: Placement, count: int, index: int, progress: Progress) -> None:
        name = placement.density.name
        forbidden = OCCUPIED | MEMBRANE | OUTSIDE
        if placement.where == "vesicle":
            forbidden |= NOT_IN_VESICLE
        voxels_taken, reason, placed = 0, None, 0
        for number in range(count):

            def keep_going(number: int = number) -> None:
                progress(number / count, f"placing {name}", placed=len(self.positions))

            keep_going()
            if placement.where == "membrane":
                pose = self._membrane_pose(placement, keep_going)
            else:
                pose = self._free_pose(placement.density, forbidden, keep_going)
            if pose is None:
                reason = (
                    f"no place on a membrane was found for another in {MEMBRANE_TRIES} tries"
                    if placement.where == "membrane"
                    else f"no place is left for another in {ORIENTATIONS} orientations at a gap of "
                    f"{self.specimen.min_gap_angstrom:g} Å"
                )
                if not self.positions and not self.surfaces and not self.specimen.allow_partial:
                    raise self._too_large(name)
                break
            voxels, place = self._voxels(placement.density, pose)
            voxels_taken += self._put(placement.density, pose.rotation, pose.position, index, -1)
            packing.occupy(self.flags, voxels, place, self.gap)
            placed += 1
        self._report(name, count, placed, reason, voxels_taken)

    def _free_pose(self, density: Density, forbidden: int, keep_going: Callable[[], None]) -> filaments.Pose | None:
        for _ in range(ORIENTATIONS):
            rotation = uniform_random(1, self.rng)[0]
            fraction = self.rng.uniform(-0.5, 0.5, 3)
            voxels = packing.mask_voxels(density.rotated_shape(rotation, fraction))
            place = packing.find_place(self.flags, forbidden, voxels, self.rng, keep_going)
            if place is not None:
                return filaments.Pose(np.array(place[::-1]) + fraction, rotation)
        return None

    def _membrane_pose(self, placement: Placement, keep_going: Callable[[], None]) -> filaments.Pose | None:
        """Across a membrane: only other complexes and the ice's limits are in the way."""
        depth = placement.membrane_depth_angstrom / self.specimen.voxel_size_angstrom
        for attempt in range(MEMBRANE_TRIES):
            if attempt % 50 == 49:
                keep_going()
            surface = self.surfaces[int(self.rng.integers(len(self.surfaces)))]
            point, normal = surface.surface_point(self.rng)
            laid, _ = Rotation.align_vectors(normal[None], np.array([[0.0, 0.0, 1.0]]))
            rotation = laid * Rotation.from_euler("z", self.rng.uniform(0, 360), degrees=True)
            pose = filaments.Pose(point + depth * normal, rotation)
            voxels, place = self._voxels(placement.density, pose)
            if packing.is_free(self.flags, OCCUPIED | OUTSIDE, voxels, place):
                return pose
        return None

    def _voxels(self, density: Density, pose: filaments.Pose) -> tuple[packing.Voxels, tuple[int, int, int]]:
        """The voxels of a shape at a pose, as offsets from a voxel, and that voxel (z, y, x)."""
        whole = np.rint(pose.position).astype(int)
        voxels = packing.mask_voxels(density.rotated_shape(pose.rotation, pose.position - whole))
        return voxels, (int(whole[2]), int(whole[1]), int(whole[0]))

    def _put(
        self, density: Density, rotation: Rotation, position: NDArray[np.float64], index: int, filament: int
    ) -> int:
        """Add one particle to the scene; the number of voxels that are its own."""
        whole = np.rint(position).astype(int)
        fraction = position - whole
        box, mask = density.rotated(rotation, fraction), density.rotated_shape(rotation, fraction)
        window, inside = _overlap(self.specimen.shape, (int(whole[2]), int(whole[1]), int(whole[0])), box.shape)
        mask = mask[inside] & (self.instances[window] == 0)
        # a membrane parts around what sits in it
        self.density[window][mask & (self.labels[window] == self.membrane)] = 0
        self.density[window] += box[inside]
        self.instances[window][mask] = len(self.positions) + 1
        self.labels[window][mask] = index + 1
        self.positions.append(np.asarray(position, np.float64))
        self.quaternions.append(rotation.as_quat())
        self.classes.append(index)
        self.filament_numbers.append(filament)
        return int(mask.sum())


def _planes(
    surface: membranes.Membrane, shape: tuple[int, int, int], reach: float
) -> Iterator[tuple[int, slice, slice, NDArray[np.float64]]]:
    """The planes of a volume that come near a membrane: z, the rows and columns that do, and the distance of their
    voxels from the membrane's middle, in voxels."""
    low, high = np.zeros(3, int), np.array(shape[::-1])
    if isinstance(surface, membranes.Ellipsoid):
        # distances are exact to first order only: a little more room than they say
        extent = 1.1 * (surface.extent() + reach) + 2
        low = np.maximum(low, np.floor(surface.centre - extent).astype(int))
        high = np.minimum(high, np.ceil(surface.centre + extent).astype(int) + 1)
    if (high <= low).any():
        return
    y, x = np.meshgrid(np.arange(low[1], high[1]), np.arange(low[0], high[0]), indexing="ij")
    points = np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1).astype(np.float64)
    for z in range(int(low[2]), int(high[2])):
        points[:, 2] = z
        yield z, slice(low[1], high[1]), slice(low[0], high[0]), surface.distance(points).reshape(x.shape)


def _overlap(
    shape: tuple[int, int, int], centre: tuple[int, int, int], box: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of the volume that a box about a centre covers, and the part of the box that lies in the volume."""
    window, inside = [], []
    for length, middle, side in zip(shape, centre, box, strict=True):
        start = middle - side // 2
        low, high = max(0, start), min(length, start + side)
        window.append(slice(low, high))
        inside.append(slice(low - start, high - start))
    return tuple(window), tuple(inside)
