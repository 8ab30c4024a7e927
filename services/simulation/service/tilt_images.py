"""ReconstructSubtomograms: subtomograms of particles' tilt images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.images import open_image_stack
from cryofleet.formats.relion_tilt_images import TiltImageParticle, read_tilt_images
from cryofleet.particles import Particles
from cryofleet.requests import CONTRASTS
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import common_pb2
from cryofleet.v1 import simulation_pb2 as pb
from cryofleet.volumes import VolumeInfo
from services.simulation import particle_images
from services.simulation.service.inputs import BASE_BYTES, file_name
from services.simulation.service.registry import service

#: Largest particle image that memory is set aside for.
MAX_TILT_IMAGE_SIDE = 512


def _tilt_images_needs(request: pb.ReconstructSubtomogramsRequest, reader: Reader) -> Needs:
    stacks = max(reader.open_blob(uri).size_bytes for uri in request.image_uris)
    tables = sum(reader.open_blob(uri).size_bytes for uri in (request.particles_uri, request.tomograms_uri))
    # no stack is smaller than one of its images
    side = int(np.sqrt(stacks / 4)) + 1
    sums = particle_images.memory_bytes(min(side, MAX_TILT_IMAGE_SIDE))
    return Needs(sums + 8 * stacks + 20 * tables + BASE_BYTES)


@service.operation(needs=_tilt_images_needs)
def reconstruct_subtomograms(
    request: pb.ReconstructSubtomogramsRequest, task: Task
) -> pb.ReconstructSubtomogramsResult:
    """Reconstruct a subtomogram from each particle's tilt images."""

    def read_geometry(name: str) -> bytes:
        return task.read_file(_named(name, request.geometry_uris, "geometry_uris"))

    found = read_tilt_images(
        task.read_file(request.particles_uri),
        task.read_file(request.tomograms_uri),
        particles_name=file_name(request.particles_uri),
        tomograms_name=file_name(request.tomograms_uri),
        read_file=read_geometry,
        opposite_hand=request.opposite_hand,
    )
    first = found[0]
    for particle in found:
        if (particle.box, particle.pixel_size_angstrom) != (first.box, first.pixel_size_angstrom):
            raise InvalidArgument(
                f"{file_name(request.particles_uri)}: particle {particle.name} has images of {particle.box} pixels of "
                f"{particle.pixel_size_angstrom:g} Å, {first.name} of {first.box} of {first.pixel_size_angstrom:g} Å; "
                "reconstruct groups of one size at a time"
            )
        if request.aligned and particle.rotation is None:
            raise FailedPrecondition(f"aligned: {file_name(request.particles_uri)} has no orientations")
    pixel = first.pixel_size_angstrom

    def boxes() -> Iterator[NDArray[np.float32]]:
        for number, particle in enumerate(found):
            task.progress(0.98 * number / len(found), "reconstructing", particles=number)
            uri = _named(particle.stack, request.image_uris, "image_uris")
            with open_image_stack(task.local_copy(uri), file_name(uri), task.scratch) as stack:
                box, _ = particle_images.reconstruct_particle(
                    particle, stack.read(0, stack.shape[0]), wiener=request.wiener, aligned=request.aligned
                )
            yield box if request.contrast == common_pb2.CONTRAST_LIGHT else -box

    side = first.box
    positions = np.array([particle.position_angstrom for particle in found]) / pixel
    halves = np.array([particle.half for particle in found], np.int32)
    tilts = (-90.0, 90.0)
    if not request.aligned:
        tilts = _common_range(found)
    info = VolumeInfo((side, side, side), pixel, CONTRASTS[request.contrast], *tilts)
    rotations = None
    if not request.aligned and first.rotation is not None:
        rotations = Rotation.concatenate([particle.rotation for particle in found if particle.rotation is not None])
    shifts = np.array([particle.shift_angstrom for particle in found]) / pixel * (0 if request.aligned else 1)
    particles = Particles.from_positions(
        positions,
        pixel,
        "tilt-images",
        None,
        rotations,
        shift_x=shifts[:, 0],
        shift_y=shifts[:, 1],
        shift_z=shifts[:, 2],
        **({"half": halves} if halves.any() else {}),
    )
    return pb.ReconstructSubtomogramsResult(
        subtomograms_uri=task.write_subtomograms("subtomograms", boxes(), info, particles), count=len(found)
    )


def _common_range(particles: Sequence[TiltImageParticle]) -> tuple[float, float]:
    """The tilts that all particles were seen at, from one limit to the other: what the set's wedge may rely on."""
    lows, highs = [], []
    for particle in particles:
        # the beam in the tomogram's frame is (-sin, 0, cos) of a tilt about y
        beams = particle.projections[:, 2]
        angles = np.degrees(np.arctan(-beams[:, 0] / np.maximum(beams[:, 2], 1e-9)))
        lows.append(float(angles.min()))
        highs.append(float(angles.max()))
    low, high = max(lows), min(highs)
    return (low, high) if low < high else (-90.0, 90.0)


def _named(name: str, uris: Sequence[str], field: str) -> str:
    """The URI whose path ends in a name that a file states, with as many of its folders as it takes to tell it."""
    parts = Path(name).parts
    for depth in range(1, len(parts) + 1):
        end = "/".join(parts[-depth:])
        found = [uri for uri in uris if uri == end or uri.endswith("/" + end)]
        if len(found) == 1:
            return found[0]
        if not found:
            break
    raise InvalidArgument(f"{field}: no file there, or more than one, is {name!r}")
