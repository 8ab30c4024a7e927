"""Template matching: PlanTemplateMatch and TemplateMatch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.artifacts import content_digest
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.in_tomogram import tomogram_name
from cryofleet.numerics.rotations import rotation_grid
from cryofleet.progress import part
from cryofleet.scratch_array import ScratchVolume
from cryofleet.server import Needs, Reader, Task
from cryofleet.settings import Settings
from cryofleet.v1 import picking_pb2
from cryofleet.volumes import VolumeInfo
from services.picking import template as templates
from services.picking import template_matching as matching
from services.picking import tiles
from services.picking.score_maps import MapPiece, ScoreMaps
from services.picking.service.inputs import BASE_BYTES, asked_rows, open_tomogram
from services.picking.service.peaks import MATCH_FORMAT, peaks_bytes, pick, write_map
from services.picking.service.registry import service
from services.picking.service.templates import (
    binned_shape,
    is_filtered,
    mask_turns,
    searched_tomogram,
    template_info,
    template_of,
)
from services.picking.slabs import READ_BYTES, ReadSlab

PLAN_FORMAT = "cryofleet.template-plan/1"


def _plan_needs(request: picking_pb2.PlanTemplateMatchRequest, reader: Reader) -> Needs:
    shape = open_tomogram(reader, request.tomogram_uri).info.shape
    return Needs(BASE_BYTES + 6 * max(READ_BYTES, 4 * shape[1] * shape[2]))


@service.operation(needs=_plan_needs)
def plan_template_match(
    request: picking_pb2.PlanTemplateMatchRequest, task: Task
) -> picking_pb2.PlanTemplateMatchResult:
    """Cut a search into tiles and runs of orientations."""
    volume = open_tomogram(task, request.tomogram_uri)
    info = volume.info
    box = template_info(request.template_uri, request.binning, info, task).shape[0]
    mean, deviation = matching.survey(volume.slab, info.shape, task.progress)
    orientations = len(rotation_grid(request.angular_step_degrees, request.symmetry))
    layout = matching.layout(
        binned_shape(info, request.binning),
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
    if is_filtered(request) and plan["disturbed"] == 0:
        raise FailedPrecondition(f"{request.plan_uri} leaves no room for a filter: make it with filtered=true")
    rows = asked_rows(request.rows, plan["rows"], request.plan_uri)
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
    return _Work(layout, pieces[rows.start : rows.stop], (plan["mean"], plan["deviation"]), plan["rows"], rows.start)


def _match_needs(request: picking_pb2.TemplateMatchRequest, reader: Reader) -> Needs:
    info = open_tomogram(reader, request.tomogram_uri).info
    box = template_info(request.template_uri, request.binning, info, reader).shape[0]
    searching = matching.memory_bytes(
        info.shape,
        box,
        binning=request.binning,
        disturbed=is_filtered(request) or request.binning > 1,
        mask_turns=mask_turns(request),
        variants=1 + request.subtract_background + request.test_handedness,
        threads=Settings.from_environment().threads,
    )
    shape = binned_shape(info, request.binning)
    return Needs(BASE_BYTES + max(searching, peaks_bytes(shape, box, request)))


@service.operation(needs=_match_needs)
def template_match(request: picking_pb2.TemplateMatchRequest, task: Task) -> picking_pb2.TemplateMatchResult:
    """Search a tomogram for a template, or the part of it that some rows of a plan are."""
    volume = open_tomogram(task, request.tomogram_uri)
    info = volume.info
    binning = request.binning
    box = template_info(request.template_uri, binning, info, task).shape[0]
    rotations = rotation_grid(request.angular_step_degrees, request.symmetry)
    variants = ["scores"]
    variants += ["background"] if request.subtract_background else []
    variants += ["mirror"] if request.test_handedness else []
    whole = not request.plan_uri
    if whole:
        measured = matching.survey(volume.slab, info.shape, part(task.progress, 0, 0.03))
        layout = matching.layout(
            binned_shape(info, binning),
            box,
            disturbed=is_filtered(request) or binning > 1,
            mask_turns=mask_turns(request),
            variants=len(variants),
        )
        work = _Work(layout, matching.pieces(layout, len(rotations)), measured, 1, 0)
    else:
        work = _planned(request, info, box, len(rotations), task)
    tomogram = searched_tomogram(request, volume, binning, work.measured)
    if request.region_mask_uri:
        mask = open_tomogram(task, request.region_mask_uri)
        if mask.info.shape != info.shape:
            raise FailedPrecondition(
                f"{request.region_mask_uri} has {mask.info.shape} voxels (z, y, x), {request.tomogram_uri} has "
                f"{info.shape}: the region mask must have the tomogram's shape"
            )
        tomogram = replace(tomogram, read_mask=mask.slab)
    template = template_of(request, info, binning, tomogram.profile, task)
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
        "tomogram": tomogram_name(task.store, volume),
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
        picked = pick(request, about, maps, map_info, (count, squares), part(task.progress, 0.95, 1), task)
        files = {"scores": task.written(picked.scores_uri), "rotations": task.written(picked.rotations_uri)}
        if request.subtract_background:
            files["scores"] = task.written(write_map("uncorrected.mrc", maps, "read_scores", map_info, task))
            files["background"] = task.written(write_map("background.mrc", maps, "read_background", map_info, task))
        if request.test_handedness:
            files["mirror"] = task.written(write_map("mirror.mrc", maps, "read_mirror", map_info, task))
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
