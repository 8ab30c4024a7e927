"""DrawSlices, DrawMovie and DrawParticles: pictures of volumes and particles."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.label_colours import CLASS_COLOURS, OTHER_CLASSES_COLOUR, label_colour
from cryofleet.particles import Particles, row_count
from cryofleet.progress import part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import io_pb2
from cryofleet.volumes import Volume
from services.io import drawing, figures, montage, movie, slices
from services.io.drawing import Footer, GreyLevels
from services.io.picks import ClassColours, Picks, circles_on, class_colours
from services.io.service.inputs import BASE_BYTES, ROW_BYTES, single
from services.io.service.picks import picks_in
from services.io.service.registry import service
from services.io.service.sound import sound, sound_slabs
from services.io.slices import Axis, Slab

_AXES: Mapping[int, Axis] = {io_pb2.AXIS_X: "x", io_pb2.AXIS_Y: "y", io_pb2.AXIS_Z: "z"}
_VIEWS: Mapping[int, montage.View] = {
    io_pb2.PARTICLE_VIEW_SLICE: "slice",
    io_pb2.PARTICLE_VIEW_PROJECTION: "projection",
    io_pb2.PARTICLE_VIEW_ORTHOGONAL: "orthogonal",
}
_MAX_LABEL, _LONGEST_LEGEND = 65535, 40


def _rows_bytes(reader: Reader, uri: str) -> int:
    return ROW_BYTES * row_count(reader.open_blob(uri), uri) if uri else 0


def _thickness_voxels(request: io_pb2.DrawSlicesRequest | io_pb2.DrawMovieRequest, volume: Volume) -> float:
    return request.thickness_angstrom / volume.info.voxel_size_angstrom if request.HasField("thickness_angstrom") else 1


def _inverted(protein_bright: bool, contrast: str) -> bool:
    return protein_bright and contrast == "dark"


def _picks(
    request: io_pb2.DrawSlicesRequest | io_pb2.DrawMovieRequest, task: Task, volume: Volume
) -> tuple[Picks, ClassColours]:
    diameter = request.particle_diameter_angstrom
    picks = Picks(np.zeros((0, 3)), diameter)
    if request.particles_uri:
        picks = picks_in(task, request.particles_uri, volume, diameter)
    return picks, class_colours(picks.names(), CLASS_COLOURS, OTHER_CLASSES_COLOUR)


def _legend(picks: Picks, colours: ClassColours) -> list[tuple[str, str]]:
    if picks.classes is None:
        return []
    return [(colour, f"{name} ({count:,})") for colour, name, count in colours.legend()]


# --- DrawSlices ----------------------------------------------------------------------------------------------------


def _draw_slices_needs(request: io_pb2.DrawSlicesRequest, reader: Reader) -> Needs:
    shape, axis = single(reader, request.volume_uri).info.shape, _AXES[request.axis]
    count = max(1, len(request.positions_voxels))
    volumes = 2 if request.labels_uri else 1
    needed = volumes * slices.memory_bytes(shape, axis, count)
    needed += drawing.memory_bytes(slices.picture_shape(shape, axis), request.max_side_pixels)
    return Needs(BASE_BYTES + needed + _rows_bytes(reader, request.particles_uri))


@service.operation(needs=_draw_slices_needs)
def draw_slices(request: io_pb2.DrawSlicesRequest, task: Task) -> io_pb2.DrawSlicesResult:
    """Draw slices or projections of a volume."""
    volume, axis = single(task, request.volume_uri), _AXES[request.axis]
    shape, voxel_size = volume.info.shape, volume.info.voxel_size_angstrom
    side = slices.side(shape, axis)
    positions = list(request.positions_voxels) or [side // 2]
    if max(positions) >= side:
        raise InvalidArgument(
            f"positions_voxels: {max(positions)} is not in {request.volume_uri}, which has {side} voxels along {axis}"
        )
    picks, colours = _picks(request, task, volume)
    slabs = [slices.slab_at(shape, axis, position, _thickness_voxels(request, volume)) for position in positions]
    pictures = slices.mean_slices(sound_slabs(volume), shape, slabs, part(task.progress, 0, 0.5), "reading the volume")
    labels = _labels(request, task, shape, axis, positions) if request.labels_uri else None
    if request.HasField("black_value"):
        black, white = request.black_value, request.white_value
    else:
        black, white = figures.limits(pictures, request.black_percentile, request.white_percentile)
    levels = GreyLevels(black, white, _inverted(request.protein_bright, volume.info.contrast))

    uris, circled = [], 0
    for number, (slab, picture) in enumerate(zip(slabs, pictures, strict=True)):
        progress = part(task.progress, 0.7 + 0.3 * number / len(slabs), 0.7 + 0.3 * (number + 1) / len(slabs))
        circles = circles_on(picks, slab, voxel_size, colours)
        painted = None if labels is None else labels[number]
        legend = _legend(picks, colours) + _label_legend(painted, list(request.label_names))
        image = drawing.draw(
            picture,
            levels,
            voxel_size,
            circles,
            painted,
            None if request.plain else Footer(slab.name(), legend),
            request.max_side_pixels,
            progress,
        )
        uris.append(task.write_bytes(f"{number + 1:02d}-{axis}-{positions[number]}.png", drawing.png(image)))
        circled += len(circles)
        progress(1, "drawing", pictures=number + 1)
    return io_pb2.DrawSlicesResult(picture_uris=uris, black_value=black, white_value=white, circles=circled)


def _labels(
    request: io_pb2.DrawSlicesRequest, task: Task, shape: tuple[int, int, int], axis: Axis, positions: list[int]
) -> list[NDArray[np.uint16]]:
    volume = single(task, request.labels_uri)
    if volume.info.shape != shape:
        raise FailedPrecondition(
            f"{request.labels_uri} has {volume.info.shape} voxels (z, y, x), {request.volume_uri} has {shape}: "
            "give the labels of the volume that is shown"
        )
    slabs = [Slab(axis, position, position + 1) for position in positions]
    found = []
    for values in slices.mean_slices(
        sound_slabs(volume), shape, slabs, part(task.progress, 0.5, 0.7), "reading the labels"
    ):
        labels = np.clip(values, 0, _MAX_LABEL).astype(np.uint16)
        if not np.array_equal(labels, values):
            raise InvalidArgument(f"{request.labels_uri}: labels must be whole numbers from 0 to {_MAX_LABEL}")
        found.append(labels)
    return found


def _label_legend(labels: NDArray[np.uint16] | None, names: list[str]) -> list[tuple[str, str]]:
    if labels is None:
        return []
    present = [int(label) for label in np.unique(labels) if label > 0][:_LONGEST_LEGEND]
    return [
        (label_colour(label), names[label - 1] if label <= len(names) and names[label - 1] else f"label {label}")
        for label in present
    ]


# --- DrawMovie -----------------------------------------------------------------------------------------------------


def _draw_movie_needs(request: io_pb2.DrawMovieRequest, reader: Reader) -> Needs:
    shape, axis = single(reader, request.volume_uri).info.shape, _AXES[request.axis]
    frames = min(request.max_frames, slices.side(shape, axis))
    needed = movie.memory_bytes(shape, axis, frames, request.max_side_pixels)
    needed += drawing.memory_bytes(slices.picture_shape(shape, axis), request.max_side_pixels)
    return Needs(BASE_BYTES + needed + _rows_bytes(reader, request.particles_uri))


@service.operation(needs=_draw_movie_needs)
def draw_movie(request: io_pb2.DrawMovieRequest, task: Task) -> io_pb2.DrawMovieResult:
    """Draw a walk through a volume."""
    volume, axis = single(task, request.volume_uri), _AXES[request.axis]
    shape, voxel_size = volume.info.shape, volume.info.voxel_size_angstrom
    side = slices.side(shape, axis)
    last = request.last_voxel if request.HasField("last_voxel") else side - 1
    if not request.first_voxel <= last < side:
        raise InvalidArgument(
            f"first_voxel is {request.first_voxel} and last_voxel {last}; {request.volume_uri} has {side} voxels "
            f"along {axis}, and the first must not lie behind the last"
        )
    slabs = movie.frame_slabs(
        shape, axis, request.first_voxel, last + 1, _thickness_voxels(request, volume), request.max_frames
    )
    picks, colours = _picks(request, task, volume)
    legend = _legend(picks, colours)
    with movie.open_frames(sound_slabs(volume), shape, slabs, task.scratch, part(task.progress, 0, 0.3)) as frame:
        if request.HasField("black_value"):
            black, white = request.black_value, request.white_value
        else:
            percentiles = (request.black_percentile, request.white_percentile)
            black, white = movie.sampled_limits(frame, len(slabs), percentiles)
        levels = GreyLevels(black, white, _inverted(request.protein_bright, volume.info.contrast))

        def image(number: int) -> Image.Image:
            slab = slabs[number]
            circles = circles_on(picks, slab, voxel_size, colours)
            footer = None if request.plain else Footer(slab.name(), legend)
            return drawing.draw(
                frame(number), levels, voxel_size, circles, footer=footer, longest_side=request.max_side_pixels
            )

        encoded = movie.animated_webp(
            image, len(slabs), request.frames_per_second, request.quality, part(task.progress, 0.3, 1)
        )
    return io_pb2.DrawMovieResult(
        movie_uri=task.write_bytes("movie.webp", encoded), frames=len(slabs), black_value=black, white_value=white
    )


# --- DrawParticles -------------------------------------------------------------------------------------------------


def _draw_particles_needs(request: io_pb2.DrawParticlesRequest, reader: Reader) -> Needs:
    subtomograms = reader.open_subtomograms(request.subtomograms_uri)
    count = min(request.max_particles, len(subtomograms))
    needed = montage.memory_bytes(count, subtomograms.box_size, _VIEWS[request.view], request.tile_pixels)
    needed += 2 * ROW_BYTES * len(subtomograms)
    return Needs(BASE_BYTES + needed + _rows_bytes(reader, request.particles_uri))


@service.operation(needs=_draw_particles_needs)
def draw_particles(request: io_pb2.DrawParticlesRequest, task: Task) -> io_pb2.DrawParticlesResult:
    """Draw subtomograms side by side."""
    subtomograms = task.open_subtomograms(request.subtomograms_uri)
    own = subtomograms.particles()
    particles = task.read_particles(request.particles_uri) if request.particles_uri else own
    source = request.particles_uri or request.subtomograms_uri
    if not len(particles):
        raise FailedPrecondition(f"{source} has no particles to draw")
    rows = _rows_by_id(own, particles, request)
    scores = particles.table["score"].to_numpy(np.float64) if "score" in particles.table else None
    by_score = request.order == io_pb2.PARTICLE_ORDER_SCORE if request.HasField("order") else scores is not None
    if by_score and scores is None:
        raise InvalidArgument(f"order: {source} has no scores; take PARTICLE_ORDER_GIVEN")
    order = np.arange(len(particles)) if not by_score or scores is None else np.argsort(-scores, kind="stable")
    chosen = order[: request.max_particles]
    ids = particles.table["id"].to_numpy(np.int64)
    captions = [f"{ids[row]}" + ("" if scores is None else f"   {scores[row]:.3g}") for row in chosen]
    size = subtomograms.info.voxel_size_angstrom
    thickness = request.thickness_angstrom / size if request.HasField("thickness_angstrom") else 1
    first = "the highest scores first" if by_score else "in the table's order"
    image = montage.sheet(
        lambda row: sound(subtomograms.read(row, 1)[0], request.subtomograms_uri),
        rows[chosen].tolist(),
        captions,
        subtomograms.box_size,
        size,
        _VIEWS[request.view],
        2 * max(0, round((thickness - 1) / 2)) + 1,
        (request.black_percentile, request.white_percentile),
        request.own_limits,
        _inverted(request.protein_bright, subtomograms.info.contrast),
        request.tile_pixels,
        f"{len(chosen):,} of {len(particles):,} boxes, {first}",
        task.progress,
    )
    return io_pb2.DrawParticlesResult(
        picture_uri=task.write_bytes("particles.png", drawing.png(image)), drawn=len(chosen)
    )


def _rows_by_id(own: Particles, particles: Particles, request: io_pb2.DrawParticlesRequest) -> NDArray[np.int64]:
    """Which box each particle has."""
    known, wanted = own.table["id"].to_numpy(np.int64), particles.table["id"].to_numpy(np.int64)
    order = np.argsort(known)
    places = np.searchsorted(known, wanted, sorter=order)
    rows = order[np.minimum(places, len(known) - 1)]
    strangers = known[rows] != wanted
    if strangers.any():
        raise InvalidArgument(
            f"{request.particles_uri}: {int(strangers.sum())} of {len(wanted)} particles, id {wanted[strangers][0]} "
            f"first, have no box in {request.subtomograms_uri}: give a table of its particles"
        )
    return np.asarray(rows, np.int64)
