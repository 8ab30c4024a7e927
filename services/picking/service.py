"""The picking service: turns requests into calls of the methods, and what they give into artifacts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.artifacts import content_digest
from cryofleet.errors import DataLoss, FailedPrecondition, InvalidArgument
from cryofleet.formats.tilt_series import read_tilt_series
from cryofleet.numerics import transfer
from cryofleet.numerics.fourier import Profile, band_profile
from cryofleet.numerics.rotations import rotation_grid
from cryofleet.particles import POSITION, QUATERNION, SHIFT, Particles, row_count
from cryofleet.progress import Progress, part
from cryofleet.scratch_array import ScratchVolume, reserved_array
from cryofleet.server import Needs, Reader, Service, Task
from cryofleet.settings import Settings
from cryofleet.v1 import common_pb2, picking_pb2
from cryofleet.volumes import SHARD_BYTES, Subtomograms, Volume, VolumeInfo
from services.picking import (
    detection,
    merge,
    particle_lists,
    pose_refinement,
    scale_space,
    score_peaks,
    segmentation_distance,
    surface_sampling,
    tiles,
)
from services.picking import difference_of_gaussians as dog
from services.picking import evaluate as evaluation
from services.picking import extract as extraction
from services.picking import saliency as salience
from services.picking import template as templates
from services.picking import template_matching as matching
from services.picking.score_maps import MapPiece, ScoreMaps
from services.picking.score_threshold import LEAST_PEAKS, background, compare_hands
from services.picking.slabs import READ_BYTES, ReadSlab

service = Service(picking_pb2.DESCRIPTOR.services_by_name["PickingService"])

#: A row of a particle table in memory, while it is decoded, copied and encoded.
ROW_BYTES = 1000
#: Buffers of reading and writing artifacts, and small things.
BASE_BYTES = 64 << 20

_CONTRASTS = {common_pb2.CONTRAST_DARK: "dark", common_pb2.CONTRAST_LIGHT: "light"}
_NORMALISATIONS = {
    picking_pb2.NORMALISATION_NONE: "none",
    picking_pb2.NORMALISATION_BOX: "box",
    picking_pb2.NORMALISATION_BACKGROUND: "background",
}
_EDGE_POLICIES = {picking_pb2.EDGE_POLICY_SKIP: "skip", picking_pb2.EDGE_POLICY_FILL_MEAN: "fill_mean"}


def _tomogram(reader: Reader, uri: str) -> Volume:
    volume = reader.open_volume(uri)
    if volume.info.count is not None:
        raise FailedPrecondition(f"{uri} is a stack of {volume.info.count} boxes; a tomogram is needed")
    return volume


def _rows(reader: Reader, uri: str) -> int:
    return row_count(reader.open_blob(uri), uri)


def _dog_needs(request: picking_pb2.DifferenceOfGaussiansRequest, reader: Reader) -> Needs:
    info = _tomogram(reader, request.tomogram_uri).info
    size = info.voxel_size_angstrom, request.particle_diameter_angstrom
    if request.HasField("particle_diameter_max_angstrom"):
        return Needs(
            BASE_BYTES
            + scale_space.memory_bytes(
                info.shape,
                *size,
                request.particle_diameter_max_angstrom,
                sigma_ratio=request.sigma_ratio,
                threshold=request.threshold,
            )
        )
    return Needs(BASE_BYTES + dog.memory_bytes(info.shape, *size, request.sigma_ratio, request.threshold))


@service.operation(needs=_dog_needs)
def difference_of_gaussians(
    request: picking_pb2.DifferenceOfGaussiansRequest, task: Task
) -> picking_pb2.DifferenceOfGaussiansResult:
    """Find particles of one size, or of a range of sizes, as peaks of differences of Gaussians."""
    tomogram = _tomogram(task, request.tomogram_uri)
    info = tomogram.info
    read, shape, first = _previewed(request, tomogram)
    contrast = _CONTRASTS[request.contrast] if request.HasField("contrast") else info.contrast
    min_distance = request.min_distance_angstrom if request.HasField("min_distance_angstrom") else None
    common: dict[str, Any] = {
        "contrast": contrast,
        "sigma_ratio": request.sigma_ratio,
        "threshold": request.threshold,
        "min_distance_angstrom": min_distance,
        "max_picks": request.max_picks,
        "progress": task.progress,
    }
    columns: dict[str, Any] = {}
    metrics: dict[str, Any] = {"preview_planes": None if first is None else [first[0], first[1]]}
    diameter = request.particle_diameter_angstrom
    if request.HasField("particle_diameter_max_angstrom"):
        found = scale_space.scale_space_picks(
            read, shape, info.voxel_size_angstrom, diameter, request.particle_diameter_max_angstrom, **common
        )
        positions, scores = found.positions, found.scores
        columns["diameter_angstrom"] = found.diameters_angstrom
        diameter = found.best_diameter_angstrom or diameter
        metrics["scales"] = [asdict(scale) for scale in found.scales]
    elif first is not None:
        picks = dog.preview(tomogram.slab, info.shape, *first, info.voxel_size_angstrom, diameter, **common)
        positions, scores = picks.positions, picks.scores
    else:
        picks = dog.difference_of_gaussians(read, shape, info.voxel_size_angstrom, diameter, **common)
        positions, scores = picks.positions, picks.scores
    particles = Particles.from_positions(
        positions,
        info.voxel_size_angstrom,
        tomogram=_name_of(request.tomogram_uri, task),
        tomogram_shape=info.shape,
        score=scores,
        **columns,
    )
    return picking_pb2.DifferenceOfGaussiansResult(
        particles_uri=task.write_particles("picks.parquet", particles),
        count=len(particles),
        particle_diameter_angstrom=diameter,
        metrics_uri=task.write_table("metrics.json", {"picks": len(particles), **metrics}),
    )


def _name_of(tomogram_uri: str, task: Task) -> str:
    return f"tomogram-{content_digest(task.store, tomogram_uri)[:12]}"


def _previewed(
    request: picking_pb2.DifferenceOfGaussiansRequest, tomogram: Volume
) -> tuple[ReadSlab, tuple[int, int, int], tuple[int, int] | None]:
    """The tomogram as it is picked, and of a preview the first plane and the number of planes."""
    shape = tomogram.info.shape
    if not request.HasField("preview_z"):
        return tomogram.slab, shape, None
    if request.preview_z >= shape[0]:
        raise InvalidArgument(
            f"preview_z is {request.preview_z}; {request.tomogram_uri} has planes 0 to {shape[0] - 1}"
        )
    if request.HasField("particle_diameter_max_angstrom"):
        raise InvalidArgument("a preview is of one diameter: leave preview_z or particle_diameter_max_angstrom out")
    count = min(request.preview_planes, shape[0])
    first = min(max(0, request.preview_z - count // 2), shape[0] - count)
    return tomogram.slab, shape, (first, count)


def _extract_needs(request: picking_pb2.ExtractRequest, reader: Reader) -> Needs:
    shape = _tomogram(reader, request.tomogram_uri).info.shape
    cutting = extraction.memory_bytes(shape, request.box_size_voxels, request.binning, _EDGE_POLICIES[request.edges])
    # a shard is gathered, stacked and encoded
    shard = 3 * max(SHARD_BYTES, 4 * request.box_size_voxels**3)
    return Needs(BASE_BYTES + cutting + shard + ROW_BYTES * _rows(reader, request.particles_uri))


@service.operation(needs=_extract_needs)
def extract(request: picking_pb2.ExtractRequest, task: Task) -> picking_pb2.ExtractResult:
    """Cut subtomograms; the table's x, y, z become the voxel that is each box's centre, the rest of the position its
    shift.
    """
    tomogram = _tomogram(task, request.tomogram_uri)
    info = tomogram.info
    particles = _chosen_particles(request, task)
    _check_tomogram(particles, info, request)
    positions = _true_positions(particles) * (particles.voxel_size_angstrom / info.voxel_size_angstrom)
    edges = _EDGE_POLICIES[request.edges]
    placement = extraction.place_boxes(positions, info.shape, request.box_size_voxels, request.binning, edges)
    count = len(placement.rows)
    # A shard may lie wholly at the edges; whether the whole set has any box, its reduction sees.
    if count == 0 and not request.HasField("rows"):
        raise FailedPrecondition(
            f"none of the {len(particles)} particles of {request.particles_uri} has a box of {placement.side} tomogram "
            f"voxels within {request.tomogram_uri}: take smaller boxes, other particles, or edges EDGE_POLICY_FILL_MEAN"
        )
    box = (request.box_size_voxels,) * 3
    # boxes are cut in the tomogram's order and written in the table's; between the two they wait on disk
    boxes: NDArray[np.float32] = np.empty((0, *box), np.float32)
    if count:
        boxes = reserved_array(task.scratch / "boxes.f32", (count, *box), np.float32)
        extraction.cut_boxes(
            tomogram.slab,
            info.shape,
            placement,
            boxes,
            normalisation=_NORMALISATIONS[request.normalisation],
            progress=part(task.progress, 0, 0.9),
        )
    task.progress(0.9, "writing", boxes=count)
    # a box's centre voxel is at x, y, z; the particle is shift_x, shift_y, shift_z from there
    columns = dict(zip(POSITION, placement.centres.T.astype(np.float64), strict=True))
    columns |= dict(zip(SHIFT, placement.offsets.T, strict=True))
    cut = replace(
        particles.select(placement.rows),
        voxel_size_angstrom=info.voxel_size_angstrom,
        tomogram_shape=info.shape,
    ).with_columns(**columns)
    box_info = replace(info, shape=box, voxel_size_angstrom=info.voxel_size_angstrom * request.binning)
    return picking_pb2.ExtractResult(
        subtomograms_uri=task.write_subtomograms("subtomograms", boxes, box_info, cut),
        count=count,
        skipped=placement.skipped,
    )


def _chosen_particles(request: picking_pb2.ExtractRequest | picking_pb2.RefinePicksRequest, task: Task) -> Particles:
    particles = task.read_particles(request.particles_uri)
    if len(particles) == 0:
        raise FailedPrecondition(f"{request.particles_uri} has no particles: there is nothing to do")
    if not request.HasField("rows"):
        return particles
    first, stop = request.rows.first, request.rows.first + request.rows.count
    if stop > len(particles):
        raise InvalidArgument(
            f"rows {first} to {stop - 1} were asked for, and {request.particles_uri} has rows 0 to {len(particles) - 1}"
        )
    return particles.select(slice(first, stop))


def _check_tomogram(
    particles: Particles, info: VolumeInfo, request: picking_pb2.ExtractRequest | picking_pb2.RefinePicksRequest
) -> None:
    """Particles of another tomogram, as far as that can be told, are not cut out of this one."""
    if "tomogram" in particles.table and particles.table["tomogram"].nunique() > 1:
        raise FailedPrecondition(
            f"{request.particles_uri} has particles of {particles.table['tomogram'].nunique()} tomograms; "
            "extract from one at a time"
        )
    same_voxels = np.isclose(particles.voxel_size_angstrom, info.voxel_size_angstrom, rtol=1e-6)
    if same_voxels and particles.tomogram_shape not in (None, info.shape):
        raise FailedPrecondition(
            f"{request.particles_uri} is of a tomogram of {particles.tomogram_shape} voxels (z, y, x), "
            f"{request.tomogram_uri} has {info.shape}: these are not its particles"
        )


def _true_positions(particles: Particles) -> NDArray[np.float64]:
    """Where the particles are, in voxels: the centre of their box and their shift from there."""
    return particles.positions() + particles.shifts()


def _merge_subtomograms_needs(request: picking_pb2.MergeSubtomogramsRequest, reader: Reader) -> Needs:
    count = sum(reader.open_subtomograms(uri).count for uri in request.subtomograms_uris)
    return Needs(BASE_BYTES + 2 * ROW_BYTES * count)


@service.operation(needs=_merge_subtomograms_needs)
def merge_subtomograms(
    request: picking_pb2.MergeSubtomogramsRequest, task: Task
) -> picking_pb2.MergeSubtomogramsResult:
    """Join sets of subtomograms: a new index and table, no voxels."""
    sets: list[Subtomograms] = []
    members: list[merge.Member] = []
    for number, uri in enumerate(request.subtomograms_uris):
        task.progress(0.9 * number / len(request.subtomograms_uris), "reading tables", sets=number)
        found = task.open_subtomograms(uri)
        info = found.info
        tilts = (info.tilt_min_degrees, info.tilt_max_degrees)
        sets.append(found)
        members.append(
            merge.Member(uri, found.particles(), found.box_size, info.voxel_size_angstrom, info.contrast, tilts)
        )
    particles = merge.merge_particles(members)
    if len(particles) == 0:
        raise FailedPrecondition(
            f"none of the {len(sets)} sets, the first {request.subtomograms_uris[0]}, has a subtomogram: take smaller "
            "boxes, other particles, or edges EDGE_POLICY_FILL_MEAN"
        )
    task.progress(0.9, "writing", sets=len(sets))
    shards = [shard for found in sets for shard in found.shards]
    return picking_pb2.MergeSubtomogramsResult(
        subtomograms_uri=task.write_subtomograms_index("subtomograms", shards, sets[0].info, particles),
        count=len(particles),
    )


def _merge_particles_needs(request: picking_pb2.MergeParticlesRequest, reader: Reader) -> Needs:
    return Needs(BASE_BYTES + 2 * ROW_BYTES * sum(_rows(reader, uri) for uri in request.particles_uris))


@service.operation(needs=_merge_particles_needs)
def merge_particles(request: picking_pb2.MergeParticlesRequest, task: Task) -> picking_pb2.MergeParticlesResult:
    """Join tables; columns that not all of them have are left out."""
    tables = []
    for number, uri in enumerate(request.particles_uris):
        task.progress(0.9 * number / len(request.particles_uris), "reading tables", tables=number)
        tables.append(task.read_particles(uri))
    particles = Particles.concat(tables)
    task.progress(0.9, "writing", tables=len(tables))
    return picking_pb2.MergeParticlesResult(
        particles_uri=task.write_particles("particles.parquet", particles), count=len(particles)
    )


def _evaluate_needs(request: picking_pb2.EvaluateRequest, reader: Reader) -> Needs:
    rows = _rows(reader, request.particles_uri) + _rows(reader, request.truth_uri)
    return Needs(BASE_BYTES + evaluation.memory_bytes(rows) + ROW_BYTES * rows)


@service.operation(needs=_evaluate_needs)
def evaluate(request: picking_pb2.EvaluateRequest, task: Task) -> picking_pb2.EvaluateResult:
    """Compare picks with the truth, in Å, so that their voxel sizes may differ."""
    picks = task.read_particles(request.particles_uri)
    truth = task.read_particles(request.truth_uri)
    truth_classes = _classes(truth)
    if request.class_names:
        wanted = set(request.class_names)
        missing = sorted(wanted - set(truth_classes or ()))
        if missing:
            raise InvalidArgument(f"{request.truth_uri} has no particles of class {missing[0]!r}")
        assert truth_classes is not None
        chosen = np.array([name in wanted for name in truth_classes])
        truth, truth_classes = truth.select(chosen), [name for name in truth_classes if name in wanted]
    if len(truth) == 0:
        raise FailedPrecondition(f"{request.truth_uri} has no particles: there is nothing to compare the picks with")
    places = _true_positions(picks) * picks.voxel_size_angstrom
    true_places = _true_positions(truth) * truth.voxel_size_angstrom
    scores = picks.table["score"].to_numpy(np.float64) if "score" in picks.table else None
    ranks = np.zeros(len(picks)) if scores is None or np.isnan(scores).any() else scores
    labels = _labels_at(request.instances_uri, picks, task) if request.instances_uri else None

    def matches(rows: NDArray[np.int64], true_rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """For some picks, which of some true particles each finds."""
        if labels is not None:
            ids = truth.table["id"].to_numpy(np.int64)[true_rows]
            return detection.match_by_volume(labels[rows], ranks[rows], ids)
        return detection.match_in_order(places[rows], ranks[rows], true_places[true_rows], request.distance_angstrom)

    found = matches(np.arange(len(picks)), np.arange(len(truth)))
    if labels is None:
        figures = evaluation.evaluate(places, true_places, request.distance_angstrom, truth_classes, task.progress)
    else:
        hits = np.flatnonzero(found >= 0)
        distances = np.linalg.norm(places[hits] - true_places[found[hits]], axis=1)
        figures = evaluation.of_matching(
            evaluation.Matching(hits, found[hits], distances), len(picks), len(truth), truth_classes
        )
    metrics = figures.to_dict()
    metrics["matched_by"] = "distance" if labels is None else "volume"
    curve = None if scores is None else detection.curve(ranks, found >= 0, len(truth))
    metrics["curve"] = None if curve is None else curve.to_dict()
    pick_classes = _classes(picks)
    if pick_classes is not None and truth_classes is not None:
        names = {
            name: (np.flatnonzero(np.array(pick_classes) == name), np.flatnonzero(np.array(truth_classes) == name))
            for name in set(pick_classes) & set(truth_classes)
        }
        hits_of = {name: (int((matches(*rows) >= 0).sum()), len(rows[0])) for name, rows in names.items()}
        metrics["by_class"], metrics["macro_f1"] = detection.by_class(hits_of, pick_classes, truth_classes)
        metrics["confusion"] = detection.confusion(found, pick_classes, truth_classes)
    median = None
    pick_rotations, true_rotations = picks.rotations(), truth.rotations()
    if pick_rotations is not None and true_rotations is not None:
        hits = np.flatnonzero(found >= 0)
        classes = [truth_classes[row] if truth_classes else "" for row in found[hits]]
        symmetries = {entry.class_name: entry.symmetry for entry in request.symmetries}
        errors = (
            detection.angular_errors(pick_rotations[hits], true_rotations[found[hits]], classes, symmetries)
            if len(hits)
            else np.empty(0)
        )
        metrics["angular_error_degrees"] = detection.summary(errors)
        metrics["angular_error_degrees_by_class"] = {
            name: detection.summary(errors[np.array(classes) == name]) for name in sorted(set(classes))
        }
        median = float(np.median(errors)) if len(errors) else None
    result = picking_pb2.EvaluateResult(
        metrics_uri=task.write_table("metrics.json", metrics),
        precision=figures.precision,
        recall=figures.recall,
        f1=figures.f1,
        matched=figures.matched,
    )
    if curve is not None:
        result.average_precision = curve.average_precision
    if median is not None:
        result.median_angular_error_degrees = median
    return result


def _classes(particles: Particles) -> list[str] | None:
    """The class of each row, by name or else by number; None where the table has neither."""
    for column in ("class_name", "class_id"):
        if column in particles.table:
            return [str(value) for value in particles.table[column]]
    return None


def _labels_at(uri: str, picks: Particles, task: Task) -> NDArray[np.int64]:
    """The instance volume at each pick; 0 for picks outside of it."""
    volume = _tomogram(task, uri)
    shape = volume.info.shape
    voxels = np.rint(_true_positions(picks) * (picks.voxel_size_angstrom / volume.info.voxel_size_angstrom))
    inside = ((voxels >= 0) & (voxels < shape[::-1])).all(axis=1)
    labels = np.zeros(len(picks), np.int64)
    step = max(1, READ_BYTES // (4 * shape[1] * shape[2]))
    slabs = [(z, min(z + step, shape[0])) for z in range(0, shape[0], step)]
    labels[inside] = _at(volume.slab, voxels[inside].astype(np.int64), slabs)
    return labels


# --- Lists of particles ----------------------------------------------------------------------------------------------


def _filter_needs(request: picking_pb2.FilterParticlesRequest, reader: Reader) -> Needs:
    rows = sum(_rows(reader, uri) for uri in request.particles_uris)
    needed = BASE_BYTES + 4 * ROW_BYTES * rows
    if request.segmentation_uri:
        needed += segmentation_distance.memory_bytes(_tomogram(reader, request.segmentation_uri).info.shape)
    return Needs(needed)


@service.operation(needs=_filter_needs)
def filter_particles(request: picking_pb2.FilterParticlesRequest, task: Task) -> picking_pb2.FilterParticlesResult:
    """Join tables and keep the rows that pass every rule, in their order; the strongest first where the number is
    limited.
    """
    particles = particle_lists.join_lists([task.read_particles(uri) for uri in request.particles_uris]).particles
    given = len(particles)
    removed: dict[str, int] = {}
    metrics: dict[str, Any] = {"particles": given, "removed": removed}

    def keep(rule: str, passes: NDArray[np.bool_]) -> None:
        nonlocal particles
        removed[rule] = int(len(particles) - passes.sum())
        particles = particles.select(passes)

    if request.class_names:
        keep("class_names", np.isin(np.array(_classes(particles) or [""] * given), list(request.class_names)))
    if request.mask_uri:
        mask = _tomogram(task, request.mask_uri)
        keep("mask", particle_lists.by_mask(_positions_in(particles, mask.info), mask.slab, mask.info.shape))
    if request.segmentation_uri:
        objects = _tomogram(task, request.segmentation_uri)
        away = segmentation_distance.distances(
            _positions_in(particles, objects.info), objects.slab, objects.info.shape, task.progress
        )
        away *= objects.info.voxel_size_angstrom
        nearest = request.segmentation_distance_min_angstrom
        has_limit = request.HasField("segmentation_distance_max_angstrom")
        farthest = request.segmentation_distance_max_angstrom if has_limit else np.inf
        keep("segmentation", (away >= nearest) & (away <= farthest))
    if request.border_angstrom:
        if particles.tomogram_shape is None:
            raise FailedPrecondition("the particles do not say their tomogram's shape, which border_angstrom needs")
        margin = request.border_angstrom / particles.voxel_size_angstrom
        keep("border", particle_lists.by_border(_true_positions(particles), particles.tomogram_shape, margin))
    if request.min_distance_angstrom:
        groups = [particles.table[name] for name in ("tomogram",) if name in particles.table]
        if request.within_class:
            groups.append(pd.Series(_classes(particles) or [""] * len(particles)))
        ranks = particles.table["score"].to_numpy(np.float64) if "score" in particles.table else None
        distance = request.min_distance_angstrom / particles.voxel_size_angstrom
        keep("distance", particle_lists.deduplicate(_true_positions(particles), ranks, distance, groups))
    by_score = [name for name in ("score_min", "score_max", "expected_false_positives") if request.HasField(name)]
    scores = particles.table["score"].to_numpy(np.float64) if "score" in particles.table else None
    if by_score and scores is None:
        raise FailedPrecondition(f"the particles have no scores, which {by_score[0]} needs")
    if by_score:
        assert scores is not None
        least = request.score_min if request.HasField("score_min") else -np.inf
        if request.HasField("expected_false_positives") and not request.HasField("score_min"):
            noise = background(scores)
            least = noise.threshold(request.expected_false_positives)
            metrics |= {"score_min": least, "background": asdict(noise)}
        most = request.score_max if request.HasField("score_max") else np.inf
        keep("score", particle_lists.by_score(scores, least, most))
    if request.max_particles and len(particles) > request.max_particles:
        if "score" not in particles.table:
            raise FailedPrecondition("the particles have no scores, which max_particles needs")
        strongest = np.argsort(-particles.table["score"].to_numpy(np.float64), kind="stable")[: request.max_particles]
        removed["number"] = len(particles) - len(strongest)
        particles = particles.select(strongest)
    metrics["kept"] = len(particles)
    return picking_pb2.FilterParticlesResult(
        particles_uri=task.write_particles("particles.parquet", particles),
        metrics_uri=task.write_table("metrics.json", metrics),
        count=len(particles),
        removed=given - len(particles),
    )


def _positions_in(particles: Particles, info: VolumeInfo) -> NDArray[np.float64]:
    """The particles' positions in voxels of a volume of the same field."""
    return _true_positions(particles) * (particles.voxel_size_angstrom / info.voxel_size_angstrom)


def _grid_needs(request: picking_pb2.SampleGridRequest, reader: Reader) -> Needs:
    info = _tomogram(reader, request.tomogram_uri).info
    spacing = max(1.0, request.spacing_angstrom / info.voxel_size_angstrom)
    points = np.prod([side / spacing + 1 for side in info.shape])
    return Needs(BASE_BYTES + int(ROW_BYTES * points) + 8 * info.shape[1] * info.shape[2])


@service.operation(needs=_grid_needs)
def sample_grid(request: picking_pb2.SampleGridRequest, task: Task) -> picking_pb2.SampleGridResult:
    """Lay out a regular grid of particles."""
    info = _tomogram(task, request.tomogram_uri).info
    read_mask = None
    if request.mask_uri:
        mask = _tomogram(task, request.mask_uri)
        if mask.info.shape != info.shape:
            raise FailedPrecondition(
                f"{request.mask_uri} has {mask.info.shape} voxels (z, y, x), {request.tomogram_uri} has {info.shape}"
            )
        read_mask = mask.slab
    spacing = request.spacing_angstrom / info.voxel_size_angstrom
    positions = surface_sampling.grid(info.shape, spacing, read_mask, task.progress)
    particles = Particles.from_positions(
        positions, info.voxel_size_angstrom, _name_of(request.tomogram_uri, task), info.shape
    )
    return picking_pb2.SampleGridResult(
        particles_uri=task.write_particles("grid.parquet", particles), count=len(particles)
    )


def _surface_needs(request: picking_pb2.SampleSurfaceRequest, reader: Reader) -> Needs:
    info = _tomogram(reader, request.segmentation_uri).info
    lengths = request.smoothing_angstrom / info.voxel_size_angstrom, request.spacing_angstrom / info.voxel_size_angstrom
    return Needs(BASE_BYTES + surface_sampling.memory_bytes(info.shape, *lengths))


@service.operation(needs=_surface_needs)
def sample_surface(request: picking_pb2.SampleSurfaceRequest, task: Task) -> picking_pb2.SampleSurfaceResult:
    """Spread oriented particles over a segmented surface."""
    volume = _tomogram(task, request.segmentation_uri)
    info = volume.info
    found = surface_sampling.sample(
        volume.slab,
        info.shape,
        request.spacing_angstrom / info.voxel_size_angstrom,
        surface="boundary" if request.surface == picking_pb2.SURFACE_BOUNDARY else "middle",
        sigma_voxels=request.smoothing_angstrom / info.voxel_size_angstrom,
        offset_voxels=request.offset_angstrom / info.voxel_size_angstrom,
        progress=task.progress,
    )
    particles = Particles.from_positions(
        found.positions, info.voxel_size_angstrom, tomogram_shape=info.shape, rotations=found.rotations()
    )
    return picking_pb2.SampleSurfaceResult(
        particles_uri=task.write_particles("surface.parquet", particles), count=len(particles)
    )


# --- Saliency --------------------------------------------------------------------------------------------------------


def _saliency_needs(request: picking_pb2.SaliencyRequest, reader: Reader) -> Needs:
    info = _tomogram(reader, request.tomogram_uri).info
    working = salience.memory_bytes(info.shape, info.voxel_size_angstrom, request.particle_diameter_angstrom)
    return Needs(BASE_BYTES + working + 4 * int(np.prod(info.shape)))


@service.operation(needs=_saliency_needs)
def saliency(request: picking_pb2.SaliencyRequest, task: Task) -> picking_pb2.SaliencyResult:
    """Find what stands out of the background's features."""
    volume = _tomogram(task, request.tomogram_uri)
    info = volume.info
    found = salience.saliency(
        volume.read(),
        info.voxel_size_angstrom,
        request.particle_diameter_angstrom,
        contrast=_CONTRASTS[request.contrast] if request.HasField("contrast") else info.contrast,
        compactness=request.compactness,
        threshold=request.threshold,
        min_distance_angstrom=request.min_distance_angstrom if request.HasField("min_distance_angstrom") else None,
        max_picks=request.max_picks,
        workers=task.threads,
        progress=part(task.progress, 0, 0.9),
    )
    particles = Particles.from_positions(
        found.positions,
        info.voxel_size_angstrom,
        _name_of(request.tomogram_uri, task),
        info.shape,
        score=found.scores,
    )
    reduced = replace(
        info,
        shape=found.saliency.shape,
        voxel_size_angstrom=info.voxel_size_angstrom * found.factor,
        contrast="light",
    )
    task.progress(0.9, "writing", picks=len(particles))
    return picking_pb2.SaliencyResult(
        particles_uri=task.write_particles("picks.parquet", particles),
        saliency_uri=task.write_volume("saliency.mrc", found.saliency, reduced),
        suppressed_uri=task.write_volume("suppressed.mrc", found.suppressed, info),
        count=len(particles),
        supervoxels=found.supervoxels,
    )


# --- Template matching ---------------------------------------------------------------------------------------------

_SearchRequest = picking_pb2.TemplateMatchRequest | picking_pb2.RefinePicksRequest
_PeakRequest = picking_pb2.TemplateMatchRequest | picking_pb2.PickPeaksRequest

#: Voxel sizes of template and tomogram that differ by more than this are an error.
VOXEL_SIZE_TOLERANCE = 0.01
MATCH_FORMAT = "cryofleet.template-match/1"
PLAN_FORMAT = "cryofleet.template-plan/1"
#: Of the seeds of one request, the random phases'.
_HISTOGRAM_BINS = 100

_CTF_CORRECTIONS: Mapping[int, transfer.CtfCorrection] = {
    common_pb2.CTF_CORRECTION_NONE: "none",
    common_pb2.CTF_CORRECTION_PHASE_FLIP: "phase_flip",
    common_pb2.CTF_CORRECTION_WIENER: "wiener",
}


def _template_info(uri: str, binning: int, info: VolumeInfo, reader: Reader) -> VolumeInfo:
    """The template's header, once it is sure that it fits the tomogram, its shape as it is searched for.

    A template in the tomogram's own voxels is reduced with it.
    """
    found = reader.open_volume(uri).info
    if found.count is not None:
        raise FailedPrecondition(f"{uri} is a stack of {found.count} boxes; one map is needed as template")
    searched = info.voxel_size_angstrom * binning
    if not any(_same_size(found.voxel_size_angstrom, size) for size in (searched, info.voxel_size_angstrom)):
        raise FailedPrecondition(
            f"the template {uri} has voxels of {found.voxel_size_angstrom:g} Å and the tomogram is searched in voxels "
            f"of {searched:g} Å: bring the template to {searched:g} Å (simulation.SimulateDensity does)"
        )
    if len(set(found.shape)) != 1:
        raise InvalidArgument(f"the template {uri} has {found.shape} voxels (z, y, x); it must be a cube")
    if not _same_size(found.voxel_size_angstrom, searched):
        half = -(-found.shape[0] // (2 * binning))
        found = replace(found, shape=(2 * half,) * 3)
    matching.check_size(_binned_shape(info, binning), found.shape[0])
    return found


def _same_size(one: float, other: float) -> bool:
    return abs(one - other) <= VOXEL_SIZE_TOLERANCE * other


def _mask_turns(request: _SearchRequest) -> bool:
    return bool(request.mask_uri) or len(request.mask_radii_angstrom) == 3


def _filtered(request: _SearchRequest) -> bool:
    return request.whiten or request.HasField("low_pass_angstrom") or request.HasField("high_pass_angstrom")


def _template(request: _SearchRequest, info: VolumeInfo, binning: int, profile: Profile | None, task: Task) -> Any:
    """The template with its mask, and its transfer function for the tomogram."""
    header = _template_info(request.template_uri, binning, info, task)
    box, voxel_size = header.shape[0], info.voxel_size_angstrom * binning
    density = task.open_volume(request.template_uri).read()
    if header.contrast == "dark":
        density = -density
    reduced = 1 if _same_size(header.voxel_size_angstrom, voxel_size) else binning
    mask = _mask(request, density, reduced, voxel_size, task)
    density = templates.binned(density, reduced)
    weights = None
    if request.tilts_uri:
        series = read_tilt_series(task.read_file(request.tilts_uri), request.tilts_uri)
        known = series.defocus_um is not None and series.voltage_kv is not None
        weights = transfer.tilt_series_transfer(
            series,
            box,
            voxel_size,
            ctf_correction=_CTF_CORRECTIONS[request.ctf_correction],
            use_ctf=request.weight_by_ctf if request.HasField("weight_by_ctf") else known,
            use_dose=request.weight_by_dose,
        )
    elif (info.tilt_min_degrees, info.tilt_max_degrees) != (-90.0, 90.0):
        weights = transfer.wedge_transfer(box, info.tilt_min_degrees, info.tilt_max_degrees)
    if profile is not None:
        weights = transfer.filtered(
            np.ones((box, box, box // 2 + 1), np.float32) if weights is None else weights, profile
        )
    return templates.Template(density, mask, _mask_turns(request), weights)


def _mask(
    request: _SearchRequest, density: NDArray[np.float32], reduced: int, voxel_size: float, task: Task
) -> NDArray[np.float32]:
    """The mask in the box that the template is searched for in."""
    if request.mask_uri:
        mask = task.open_volume(request.mask_uri).read()
        if mask.shape != density.shape:
            raise InvalidArgument(
                f"the mask {request.mask_uri} has {mask.shape} voxels (z, y, x) and the template {density.shape}; they "
                "must be the same"
            )
        return np.clip(templates.binned(mask, reduced), 0, 1) if reduced > 1 else mask
    density = templates.binned(density, reduced)
    box = density.shape[0]
    if len(request.mask_radii_angstrom) == 3:
        x, y, z = (radius / voxel_size for radius in request.mask_radii_angstrom)
        return templates.ellipsoid(box, (x, y, z))
    if request.mask_radii_angstrom:
        return templates.sphere(box, request.mask_radii_angstrom[0] / voxel_size)
    return templates.sphere(box, templates.extent(density) + templates.MASK_EDGE)


def _searched(
    request: _SearchRequest, volume: Volume, binning: int, measured: tuple[float, float]
) -> matching.Tomogram:
    """The tomogram as the request has it searched, with its filter."""
    info = volume.info
    contrast = _CONTRASTS[request.contrast] if request.HasField("contrast") else info.contrast
    tomogram = matching.Tomogram(
        volume.slab,
        info.shape,
        *measured,
        sign=-1 if contrast == "dark" else 1,
        binning=binning,
        gold_deviations=request.gold_deviations,
    )
    if not _filtered(request):
        return tomogram
    white = matching.whitening(tomogram) if request.whiten else None
    band = band_profile(
        info.voxel_size_angstrom * binning,
        request.high_pass_angstrom if request.HasField("high_pass_angstrom") else None,
        request.low_pass_angstrom if request.HasField("low_pass_angstrom") else None,
    )

    def profile(frequency: NDArray[np.float32]) -> NDArray[np.float32]:
        kept = band(frequency)
        return kept if white is None else kept * white(frequency)

    return replace(tomogram, profile=profile)


def _plan_needs(request: picking_pb2.PlanTemplateMatchRequest, reader: Reader) -> Needs:
    shape = _tomogram(reader, request.tomogram_uri).info.shape
    return Needs(BASE_BYTES + 6 * max(READ_BYTES, 4 * shape[1] * shape[2]))


@service.operation(needs=_plan_needs)
def plan_template_match(
    request: picking_pb2.PlanTemplateMatchRequest, task: Task
) -> picking_pb2.PlanTemplateMatchResult:
    """Cut a search into tiles and runs of orientations."""
    volume = _tomogram(task, request.tomogram_uri)
    info = volume.info
    box = _template_info(request.template_uri, request.binning, info, task).shape[0]
    mean, deviation = matching.survey(volume.slab, info.shape, task.progress)
    orientations = len(rotation_grid(request.angular_step_degrees, request.symmetry))
    layout = matching.layout(
        _binned_shape(info, request.binning),
        box,
        disturbed=request.filtered or request.binning > 1,
        mask_turns=False,
        variants=1,
    )
    work = matching.pieces(layout, orientations, request.orientations_per_row)
    table = {
        "format": PLAN_FORMAT,
        "rows": len(work),
        "tomogram_shape": list(info.shape),
        "mean": mean,
        "deviation": deviation,
        "binning": request.binning,
        "box": box,
        "orientations": orientations,
        "padded": list(layout.padded),
        "disturbed": layout.disturbed,
        "valid": list(layout.valid),
        "pieces": [
            {"start": list(w.tile.start), "stop": list(w.tile.stop), "first": w.first, "last": w.stop} for w in work
        ],
    }
    return picking_pb2.PlanTemplateMatchResult(
        plan_uri=task.write_table("plan.json", table),
        rows=len(work),
        orientations=orientations,
        tiles=len(layout.tiles),
    )


def _binned_shape(info: VolumeInfo, binning: int) -> tuple[int, int, int]:
    z, y, x = info.shape
    return (z // binning, y // binning, x // binning)


@dataclass(frozen=True)
class _Work:
    """What one call of TemplateMatch does: its tiles, pieces and the tomogram's mean and deviation."""

    layout: tiles.Layout
    pieces: list[matching.Piece]
    measured: tuple[float, float]
    rows: int
    first: int


def _planned(
    request: picking_pb2.TemplateMatchRequest, info: VolumeInfo, box: int, orientations: int, task: Task
) -> _Work:
    """The rows of the plan that are asked for. Raises FailedPrecondition for a plan of another search."""
    plan = task.read_table(request.plan_uri)
    needed = {"tomogram_shape", "mean", "deviation", "binning", "box", "orientations", "rows", "padded", "valid"}
    if plan.get("format") != PLAN_FORMAT or not needed | {"disturbed", "pieces"} <= plan.keys():
        raise InvalidArgument(f"{request.plan_uri} is no plan of a template search: PlanTemplateMatch makes one")
    own = {
        "tomogram_shape": list(info.shape),
        "binning": request.binning,
        "box": box,
        "orientations": orientations,
    }
    for name, value in own.items():
        if plan.get(name) != value:
            raise FailedPrecondition(
                f"{request.plan_uri} was made for {name} {plan.get(name)}, and this search has {value}: "
                "plan and search must have the same tomogram, template, angular step, symmetry and binning"
            )
    if _filtered(request) and plan["disturbed"] == 0:
        raise FailedPrecondition(f"{request.plan_uri} leaves no room for a filter: make it with filtered=true")
    first, stop = request.rows.first, request.rows.first + request.rows.count
    if stop > plan["rows"]:
        raise InvalidArgument(
            f"rows {first} to {stop - 1} were asked for, and {request.plan_uri} has rows 0 to {plan['rows'] - 1}"
        )
    pieces = []
    for row in plan["pieces"]:
        tile = tiles.Tile(tuple(row["start"]), tuple(row["stop"]))
        pieces.append(matching.Piece(tile, int(row["first"]), int(row["last"])))
    layout = tiles.Layout(
        tuple(dict.fromkeys(p.tile for p in pieces)),
        tuple(plan["padded"]),
        int(plan["disturbed"]),
        tuple(plan["valid"]),
    )
    return _Work(layout, pieces[first:stop], (plan["mean"], plan["deviation"]), plan["rows"], first)


def _match_needs(request: picking_pb2.TemplateMatchRequest, reader: Reader) -> Needs:
    info = _tomogram(reader, request.tomogram_uri).info
    box = _template_info(request.template_uri, request.binning, info, reader).shape[0]
    searching = matching.memory_bytes(
        info.shape,
        box,
        binning=request.binning,
        disturbed=_filtered(request) or request.binning > 1,
        mask_turns=_mask_turns(request),
        variants=1 + request.subtract_background + request.test_handedness,
        threads=Settings.from_environment().threads,
    )
    shape = _binned_shape(info, request.binning)
    return Needs(BASE_BYTES + max(searching, _peaks_bytes(shape, box, request)))


def _peaks_bytes(shape: tuple[int, int, int], box: int, request: _PeakRequest) -> int:
    """What joining pieces and taking peaks needs at most, for peaks at least two voxels apart."""
    slab = 8 * max(READ_BYTES, 4 * shape[1] * shape[2])
    return slab + score_peaks.memory_bytes(shape, max(2.0, box / 8), request.top_hat_radius_voxels)


@service.operation(needs=_match_needs)
def template_match(request: picking_pb2.TemplateMatchRequest, task: Task) -> picking_pb2.TemplateMatchResult:
    """Search a tomogram for a template, or the part of it that some rows of a plan are."""
    volume = _tomogram(task, request.tomogram_uri)
    info = volume.info
    binning = request.binning
    box = _template_info(request.template_uri, binning, info, task).shape[0]
    rotations = rotation_grid(request.angular_step_degrees, request.symmetry)
    variants = ["scores"]
    variants += ["background"] if request.subtract_background else []
    variants += ["mirror"] if request.test_handedness else []
    whole = not request.plan_uri
    if whole:
        measured = matching.survey(volume.slab, info.shape, part(task.progress, 0, 0.03))
        layout = matching.layout(
            _binned_shape(info, binning),
            box,
            disturbed=_filtered(request) or binning > 1,
            mask_turns=_mask_turns(request),
            variants=len(variants),
        )
        work = _Work(layout, matching.pieces(layout, len(rotations)), measured, 1, 0)
    else:
        work = _planned(request, info, box, len(rotations), task)
    tomogram = _searched(request, volume, binning, work.measured)
    if request.region_mask_uri:
        mask = _tomogram(task, request.region_mask_uri)
        if mask.info.shape != info.shape:
            raise FailedPrecondition(
                f"{request.region_mask_uri} has {mask.info.shape} voxels (z, y, x), {request.tomogram_uri} has "
                f"{info.shape}: the region mask must have the tomogram's shape"
            )
        tomogram = replace(tomogram, read_mask=mask.slab)
    template = _template(request, info, binning, tomogram.profile, task)
    templates.check_symmetry(template.density, request.symmetry)
    searched = [template]
    searched += [template.with_random_phases(request.seed)] if request.subtract_background else []
    searched += [template.mirrored()] if request.test_handedness else []
    found = matching.search(
        tomogram,
        searched,
        rotations,
        work.layout,
        work.pieces,
        device=task.device,
        threads=task.threads,
        progress=part(task.progress, 0.03, 0.95),
    )
    map_info = replace(
        info, shape=tomogram.binned_shape, voxel_size_angstrom=info.voxel_size_angstrom * binning, contrast="light"
    )
    about = {
        "format": MATCH_FORMAT,
        "tomogram": _name_of(request.tomogram_uri, task),
        "tomogram_shape": list(info.shape),
        "voxel_size_angstrom": info.voxel_size_angstrom,
        "tilt_degrees": [info.tilt_min_degrees, info.tilt_max_degrees],
        "binning": binning,
        "template": content_digest(task.store, request.template_uri),
        "box": box,
        "radius_voxels": templates.extent(template.density),
        "angular_step_degrees": request.angular_step_degrees,
        "symmetry": request.symmetry.upper(),
        "orientations": len(rotations),
        "maps": variants,
        "rows": work.rows,
    }
    if not whole:
        return _write_part(found, about, map_info, work, len(rotations), task)
    with ExitStack() as stack:
        pieces: list[MapPiece] = []
        count, squares = 0, 0.0
        for number, match in enumerate(found):
            reads: dict[str, ReadSlab] = {}
            for name, values in _maps_of(variants, match).items():
                kept = stack.enter_context(ScratchVolume(task.scratch / f"{name}-{number}.f32", match.tile.shape))
                for section, plane in enumerate(values):
                    kept.write_section(section, plane)
                reads[f"read_{name}"] = kept.sections
            pieces.append(MapPiece(match.tile.start, match.tile.shape, **reads))
            count, squares = count + match.count, squares + match.squares
        maps = ScoreMaps.of(pieces, map_info.shape)
        picked = _pick(request, about, maps, map_info, (count, squares), part(task.progress, 0.95, 1), task)
        files = {"scores": task.written(picked.scores_uri), "rotations": task.written(picked.rotations_uri)}
        if request.subtract_background:
            files["scores"] = task.written(_write_map("uncorrected.mrc", maps, "read_scores", map_info, task))
            files["background"] = task.written(_write_map("background.mrc", maps, "read_background", map_info, task))
        if request.test_handedness:
            files["mirror"] = task.written(_write_map("mirror.mrc", maps, "read_mirror", map_info, task))
    entry = {"start": [0, 0, 0], "shape": list(map_info.shape), "files": files}
    rows = {"first": 0, "count": 1, "scores": count, "squares": squares}
    return picking_pb2.TemplateMatchResult(
        match_uri=task.write_table("match.json", {"search": about, "part": rows, "pieces": [entry]}),
        scores_uri=picked.scores_uri,
        rotations_uri=picked.rotations_uri,
        orientations_uri=picked.orientations_uri,
        particles_uri=picked.particles_uri,
        metrics_uri=picked.metrics_uri,
        count=picked.count,
        threshold=picked.threshold,
        orientations=len(rotations),
        min_distance_angstrom=picked.min_distance_angstrom,
    )


def _maps_of(variants: Sequence[str], match: matching.Match) -> dict[str, NDArray[np.float32]]:
    return dict(zip(variants, match.scores, strict=True)) | {"rotations": match.rotations.astype(np.float32)}


def _write_part(
    found: Iterable[matching.Match],
    about: dict[str, Any],
    map_info: VolumeInfo,
    work: _Work,
    orientations: int,
    task: Task,
) -> picking_pb2.TemplateMatchResult:
    """Keep some rows of a plan for PickPeaks."""
    entries: list[dict[str, Any]] = []
    count, squares = 0, 0.0
    for number, match in enumerate(found):
        piece = replace(map_info, shape=match.tile.shape)
        files = {
            name: task.written(task.write_volume(f"{name}-{number}.mrc", values, piece))
            for name, values in _maps_of(about["maps"], match).items()
        }
        entries.append({"start": list(match.tile.start), "shape": list(match.tile.shape), "files": files})
        count, squares = count + match.count, squares + match.squares
    rows = {"first": work.first, "count": len(work.pieces), "scores": count, "squares": squares}
    match_uri = task.write_table("match.json", {"search": about, "part": rows, "pieces": entries})
    return picking_pb2.TemplateMatchResult(match_uri=match_uri, orientations=orientations)


def _write_map(name: str, maps: ScoreMaps, which: str, info: VolumeInfo, task: Task) -> str:
    with task.volume_writer(name, info) as writer:
        for z0, z1 in maps.slabs():
            writer.write(maps.largest(z0, z1, which))
    return writer.uri


def _pick_peaks_needs(request: picking_pb2.PickPeaksRequest, reader: Reader) -> Needs:
    about = _search_of(request.match_uris[0], reader)["search"]
    z, y, x = (int(side) // int(about["binning"]) for side in about["tomogram_shape"])
    return Needs(BASE_BYTES + _peaks_bytes((z, y, x), int(about["box"]), request))


def _search_of(uri: str, reader: Reader) -> dict[str, Any]:
    table = reader.read_table(uri)
    search = table.get("search")
    matched = isinstance(search, dict) and search.get("format") == MATCH_FORMAT
    if not (matched and isinstance(table.get("part"), dict) and isinstance(table.get("pieces"), list)):
        raise InvalidArgument(f"{uri} is no result of a template search: TemplateMatch makes one")
    return table


@service.operation(needs=_pick_peaks_needs)
def pick_peaks(request: picking_pb2.PickPeaksRequest, task: Task) -> picking_pb2.PickPeaksResult:
    """Join the parts of a search and take its peaks."""
    pieces: list[MapPiece] = []
    count, squares = 0, 0.0
    rows: set[int] = set()
    about: dict[str, Any] = {}
    for uri in request.match_uris:
        table = _search_of(uri, task)
        about = about or table["search"]
        if table["search"] != about:
            raise FailedPrecondition(f"{uri} is of another search than {request.match_uris[0]}: they can't be joined")
        own = range(table["part"]["first"], table["part"]["first"] + table["part"]["count"])
        if rows & set(own):
            raise FailedPrecondition(f"{uri} has rows of the plan that another of the parts has too")
        rows |= set(own)
        count, squares = count + int(table["part"]["scores"]), squares + float(table["part"]["squares"])
        pieces += [_stored_piece(entry, uri, task) for entry in table["pieces"]]
    missing = sorted(set(range(int(about["rows"]))) - rows)
    if missing:
        raise FailedPrecondition(
            f"{len(missing)} of the {about['rows']} rows of the search are missing, the first is {missing[0]}: give "
            "all its parts"
        )
    z, y, x = (int(side) for side in about["tomogram_shape"])
    tilt_min, tilt_max = about["tilt_degrees"]
    info = VolumeInfo((z, y, x), float(about["voxel_size_angstrom"]), "light", tilt_min, tilt_max)
    binning = int(about["binning"])
    map_info = replace(info, shape=_binned_shape(info, binning), voxel_size_angstrom=info.voxel_size_angstrom * binning)
    maps = ScoreMaps.of(pieces, map_info.shape)
    return _pick(request, about, maps, map_info, (count, squares), task.progress, task)


def _stored_piece(entry: Mapping[str, Any], uri: str, task: Task) -> MapPiece:
    """A piece of a search in the store. Raises DataLoss where its files are not those it was made with."""
    folder = uri.rpartition("/")[0]
    shape = tuple(int(side) for side in entry["shape"])
    start = tuple(int(place) for place in entry["start"])
    reads: dict[str, ReadSlab] = {}
    for name, file in entry["files"].items():
        place = f"{folder}/{file['name']}"
        volume = task.open_volume(place)
        if volume.info.shape != shape or content_digest(task.store, place) != file["digest"]:
            raise DataLoss(f"{place} is not the map that {uri} was made with")
        reads[f"read_{name}"] = volume.slab
    return MapPiece(start, shape, **reads)  # type: ignore[arg-type]


def _pick(
    request: _PeakRequest,
    about: Mapping[str, Any],
    maps: ScoreMaps,
    info: VolumeInfo,
    sums: tuple[int, float],
    progress: Progress,
    task: Task,
) -> picking_pb2.PickPeaksResult:
    """Write the maps of a search, and the picks that pass its threshold."""
    with task.volume_writer("scores.mrc", info) as scores, task.volume_writer("rotations.mrc", info) as rotations:
        for z0, z1 in maps.slabs():
            scores.write(maps.scores(z0, z1))
            rotations.write(maps.rotations(z0, z1))
            progress(0.4 * z1 / info.shape[0], "joining")
    binning = int(about["binning"])
    distance = float(about["radius_voxels"])
    if request.HasField("min_distance_angstrom"):
        distance = request.min_distance_angstrom / info.voxel_size_angstrom

    def found_in(read: ReadSlab, whole: Progress) -> score_peaks.Peaks:
        return score_peaks.peaks(
            read, info.shape, distance, top_hat_radius_voxels=request.top_hat_radius_voxels, progress=whole
        )

    peaks = found_in(maps.scores, part(progress, 0.4, 0.8))
    noise = background(peaks.heights) if len(peaks.heights) >= LEAST_PEAKS else None
    if request.HasField("threshold"):
        threshold = request.threshold
    elif noise is None:
        background(peaks.heights)  # says why there is no threshold
        raise AssertionError
    else:
        threshold = noise.threshold(request.expected_false_positives)
    kept = peaks.heights >= threshold
    if request.max_picks:
        kept[request.max_picks :] = False
    positions = peaks.positions[kept]
    numbers = _at(maps.rotations, positions, maps.slabs())
    orientations = rotation_grid(float(about["angular_step_degrees"]), str(about["symmetry"]))
    columns: dict[str, Any] = {"score": peaks.scores[kept]}
    if request.class_name:
        columns["class_name"] = [request.class_name] * len(positions)
    z, y, x = (int(side) for side in about["tomogram_shape"])
    picks = Particles.from_positions(
        positions * binning,
        float(about["voxel_size_angstrom"]),
        tomogram=str(about["tomogram"]),
        tomogram_shape=(z, y, x),
        rotations=orientations[numbers] if len(numbers) else Rotation.identity(0),
        **columns,
    )
    table = Particles.from_positions(
        np.zeros((len(orientations), 3)), float(about["voxel_size_angstrom"]), rotations=orientations
    )
    counts, edges = np.histogram(peaks.heights, _HISTOGRAM_BINS)
    metrics: dict[str, Any] = {
        "picks": len(picks),
        "threshold": threshold,
        "expected_false_positives": None if noise is None else noise.false_positives(threshold),
        "background": None if noise is None else asdict(noise),
        "particles_expected": None if noise is None else noise.particles_expected,
        "score_deviation": float(np.sqrt(sums[1] / sums[0])) if sums[0] else None,
        "peak_heights": {"edges": edges.tolist(), "counts": counts.tolist()},
        "search": dict(about),
    }
    if "mirror" in about["maps"]:
        mirrored = found_in(maps.mirror, part(progress, 0.8, 0.95))
        metrics["handedness"] = asdict(compare_hands(peaks.heights, mirrored.heights, max(len(picks), 5)))
    return picking_pb2.PickPeaksResult(
        scores_uri=scores.uri,
        rotations_uri=rotations.uri,
        orientations_uri=task.write_particles("orientations.parquet", table),
        particles_uri=task.write_particles("picks.parquet", picks),
        metrics_uri=task.write_table("metrics.json", metrics),
        count=len(picks),
        threshold=threshold,
        min_distance_angstrom=distance * info.voxel_size_angstrom,
    )


def _at(read: ReadSlab, positions: NDArray[np.int64], slabs: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """The values of a map at voxels (x, y, z), read slab by slab."""
    values = np.zeros(len(positions), np.int64)
    for z0, z1 in slabs:
        inside = (positions[:, 2] >= z0) & (positions[:, 2] < z1)
        if inside.any():
            x, y, z = positions[inside].T
            values[inside] = np.rint(read(z0, z1)[z - z0, y, x]).astype(np.int64)
    return values


def _refine_needs(request: picking_pb2.RefinePicksRequest, reader: Reader) -> Needs:
    info = _tomogram(reader, request.tomogram_uri).info
    box = _template_info(request.template_uri, 1, info, reader).shape[0]
    shift = round(request.max_shift_angstrom / info.voxel_size_angstrom)
    working = pose_refinement.memory_bytes(info.shape, box, shift, disturbed=_filtered(request))
    return Needs(BASE_BYTES + working + ROW_BYTES * _rows(reader, request.particles_uri))


@service.operation(needs=_refine_needs)
def refine_picks(request: picking_pb2.RefinePicksRequest, task: Task) -> picking_pb2.RefinePicksResult:
    """Refine positions and orientations; the table's shifts become part of the positions."""
    volume = _tomogram(task, request.tomogram_uri)
    info = volume.info
    particles = _chosen_particles(request, task)
    _check_tomogram(particles, info, request)
    rotations = particles.rotations()
    if rotations is None:
        raise FailedPrecondition(f"{request.particles_uri} has no orientations; RefinePicks needs them to begin with")
    measured = matching.survey(volume.slab, info.shape, part(task.progress, 0, 0.1))
    tomogram = _searched(request, volume, 1, measured)
    refined = pose_refinement.refine(
        tomogram,
        _template(request, info, 1, tomogram.profile, task),
        _true_positions(particles) * (particles.voxel_size_angstrom / info.voxel_size_angstrom),
        rotations,
        angle_degrees=request.angle_degrees,
        max_shift_voxels=round(request.max_shift_angstrom / info.voxel_size_angstrom),
        device=task.device,
        threads=task.threads,
        progress=part(task.progress, 0.1, 1),
    )
    columns = dict(zip(POSITION, refined.positions.T, strict=True))
    columns |= dict(zip(QUATERNION, refined.rotations.as_quat().reshape(-1, 4).T, strict=True))
    columns |= {"score": refined.scores}
    if "shift_x" in particles.table:
        columns |= {name: np.zeros(len(particles)) for name in SHIFT}
    found = replace(particles, voxel_size_angstrom=info.voxel_size_angstrom, tomogram_shape=info.shape).with_columns(
        **columns
    )
    return picking_pb2.RefinePicksResult(particles_uri=task.write_particles("refined.parquet", found), count=len(found))
