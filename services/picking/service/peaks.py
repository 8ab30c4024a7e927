"""PickPeaks: the maps of a search, and the picks that pass its threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from cryofleet.artifacts import content_digest
from cryofleet.errors import DataLoss, FailedPrecondition, InvalidArgument
from cryofleet.numerics.rotations import rotation_grid
from cryofleet.particles import Particles
from cryofleet.progress import Progress, part
from cryofleet.server import Needs, Reader, Task
from cryofleet.v1 import picking_pb2
from cryofleet.volumes import VolumeInfo
from services.picking import score_peaks
from services.picking.score_maps import MapPiece, ScoreMaps
from services.picking.score_threshold import LEAST_PEAKS, background, compare_hands
from services.picking.service.inputs import BASE_BYTES, values_at
from services.picking.service.registry import service
from services.picking.service.templates import binned_shape
from services.picking.slabs import READ_BYTES, ReadSlab

PeakRequest = picking_pb2.TemplateMatchRequest | picking_pb2.PickPeaksRequest

MATCH_FORMAT = "cryofleet.template-match/1"
_HISTOGRAM_BINS = 100


def peaks_bytes(shape: tuple[int, int, int], box: int, request: PeakRequest) -> int:
    """What joining pieces and taking peaks needs at most, for peaks at least two voxels apart."""
    slab = 8 * max(READ_BYTES, 4 * shape[1] * shape[2])
    return slab + score_peaks.memory_bytes(shape, max(2.0, box / 8), request.top_hat_radius_voxels)


def _pick_peaks_needs(request: picking_pb2.PickPeaksRequest, reader: Reader) -> Needs:
    about = _search_of(request.match_uris[0], reader)["search"]
    z, y, x = (int(side) // int(about["binning"]) for side in about["tomogram_shape"])
    return Needs(BASE_BYTES + peaks_bytes((z, y, x), int(about["box"]), request))


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
    map_info = replace(info, shape=binned_shape(info, binning), voxel_size_angstrom=info.voxel_size_angstrom * binning)
    maps = ScoreMaps.of(pieces, map_info.shape)
    return pick(request, about, maps, map_info, (count, squares), task.progress, task)


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


def pick(
    request: PeakRequest,
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
    numbers = values_at(maps.rotations, positions, maps.slabs())
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


def write_map(name: str, maps: ScoreMaps, which: str, info: VolumeInfo, task: Task) -> str:
    """Write one of the maps of a search."""
    with task.volume_writer(name, info) as writer:
        for z0, z1 in maps.slabs():
            writer.write(maps.largest(z0, z1, which))
    return writer.uri
