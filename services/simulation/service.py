"""The simulation service: requests into calls, results into messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.images import open_image_stack
from cryofleet.formats.relion_tilt_images import TiltImageParticle, read_tilt_images
from cryofleet.formats.tilt_series import TiltSeries, read_tilt_series, write_mdoc, write_tlt
from cryofleet.particles import Particles
from cryofleet.progress import Progress, part
from cryofleet.scratch_array import ScratchVolume
from cryofleet.server import Needs, Reader, Service, Task
from cryofleet.v1 import common_pb2
from cryofleet.v1 import simulation_pb2 as pb
from cryofleet.volumes import VolumeInfo
from services.simulation import (
    density,
    detector,
    imaging,
    particle_images,
    phantoms,
    poses,
    projection,
    scene,
    structures,
    subtomograms,
    tomogram,
)
from services.simulation.catalogue import Entry, load_catalogue
from services.simulation.signal_to_noise import noise_sigma_for_snr
from services.simulation.tilt_scheme import TiltScheme, tilt_scheme

service = Service(pb.DESCRIPTOR.services_by_name["SimulationService"])

#: Of the process's own, beside what an operation works on.
BASE_BYTES = 64 << 20
#: Sections of a volume that are written together.
SLAB_BYTES = 16 << 20
#: What a row of a particle table takes while it is worked on.
ROW_BYTES = 512
#: Largest particle image that memory is set aside for.
MAX_TILT_IMAGE_SIDE = 512


# --- What several operations share ---------------------------------------------------------------------------------


def _catalogue(uri: str, task: Task) -> Mapping[str, Entry]:
    """The user's catalogue, or the built-in one."""
    if not uri:
        return load_catalogue()
    try:
        return load_catalogue(task.read_file(uri).decode())
    except UnicodeDecodeError:
        raise InvalidArgument(f"{uri}: not a text file; a catalogue is YAML") from None
    except InvalidArgument as error:
        raise InvalidArgument(f"{uri}: {error}") from None


def _check_names(chosen: Sequence[pb.Structure | pb.Filaments]) -> None:
    names = [structure.name for structure in chosen]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InvalidArgument(f"structures: {', '.join(repeated)} stands there more than once; names must differ")


def _build(
    chosen: Sequence[pb.Structure],
    catalogue_uri: str,
    voxel_size_angstrom: float,
    resolution_angstrom: float,
    task: Task,
    progress: Progress,
) -> list[density.Density]:
    """The densities of structures, in their order."""
    _check_names(chosen)
    catalogue = _catalogue(catalogue_uri, task)
    built = []
    for number, structure in enumerate(chosen):
        progress(number / len(chosen), f"building {structure.name}")
        file = task.read_file(structure.source_uri) if structure.source_uri else None
        built.append(
            density.build(
                structure.name,
                file,
                structure.source_uri,
                voxel_size_angstrom,
                resolution_angstrom,
                task.threads,
                catalogue=catalogue,
            )
        )
    return built


def _file_bytes(uri: str, reader: Reader) -> int | None:
    """The size of a structure's file, None for a phantom. Raises InvalidArgument where it is too large to be read."""
    if not uri:
        return None
    size = reader.open_blob(uri).size_bytes
    if size > structures.MAX_FILE_BYTES:
        raise InvalidArgument(f"{uri}: {size} bytes, at most {structures.MAX_FILE_BYTES} are read")
    return size


def _structure_bytes(
    chosen: Sequence[tuple[str, str]], voxel_size_angstrom: float, resolution_angstrom: float, reader: Reader
) -> tuple[int, int]:
    """What structures (name, source_uri) take once they are built, and what building one takes at most."""
    kept = building = 0
    for name, source_uri in chosen:
        size = _file_bytes(source_uri, reader)
        voxels = density.estimated_side(name, size, voxel_size_angstrom, resolution_angstrom) ** 3
        kept += voxels * density.KEPT_BYTES_PER_VOXEL
        building = max(building, voxels * density.BUILD_BYTES_PER_VOXEL + 12 * (size or 0))
    return kept, building


def _resolution(request: Any) -> float:
    return float(request.resolution_angstrom) or 2 * float(request.voxel_size_angstrom)


def _scheme(scheme: pb.TiltScheme) -> TiltScheme:
    return tilt_scheme(
        scheme.tilt_min_degrees,
        scheme.tilt_max_degrees,
        scheme.tilt_step_degrees,
        _ORDERS[scheme.order],
        scheme.start_degrees,
        scheme.group_size,
    )


def _imaging(microscope: pb.Microscope, pixel_size_angstrom: float) -> imaging.ImagingParameters:
    return imaging.ImagingParameters(
        pixel_size_angstrom=pixel_size_angstrom,
        voltage_kv=microscope.voltage_kv,
        cs_mm=microscope.cs_mm,
        amplitude_contrast=microscope.amplitude_contrast,
        defocus_um=microscope.defocus_um,
        phase_shift_degrees=microscope.phase_shift_degrees,
        defocus_spread_um=microscope.defocus_spread_um,
        contrast_transfer=microscope.contrast_transfer,
        dose_per_tilt=microscope.dose_per_tilt,
        radiation_damage=microscope.radiation_damage,
        blur_angstrom=microscope.blur_angstrom,
        shift_error_angstrom=microscope.shift_error_angstrom,
        rotation_error_degrees=microscope.rotation_error_degrees,
    )


def _write_slabs(
    task: Task, name: str, read: Callable[[int, int], NDArray[Any]], info: VolumeInfo, negated: bool = False
) -> str:
    """Write a volume slab by slab: `read` gives its sections."""
    thickness = max(1, SLAB_BYTES // (4 * info.shape[1] * info.shape[2]))
    with task.volume_writer(name, info) as writer:
        for first in range(0, info.shape[0], thickness):
            task.progress(0.99, "writing")
            slab = read(first, min(first + thickness, info.shape[0])).astype(np.float32, copy=False)
            writer.write(-slab if negated else slab)
    return writer.uri


def _name(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


# --- SimulateDensity -----------------------------------------------------------------------------------------------


def _density_needs(request: pb.SimulateDensityRequest, reader: Reader) -> Needs:
    size = _file_bytes(request.source_uri, reader)
    box = request.box_size_voxels or None
    memory = density.density_map_bytes(request.name, size, request.voxel_size_angstrom, _resolution(request), box)
    return Needs(memory + 12 * (size or 0) + BASE_BYTES)


@service.operation(needs=_density_needs)
def simulate_density(request: pb.SimulateDensityRequest, task: Task) -> pb.SimulateDensityResult:
    """Compute the density map of one structure."""
    catalogue = _catalogue(request.catalogue_uri, task)
    file = task.read_file(request.source_uri) if request.source_uri else None
    task.progress(0.1, f"reading {request.name}")
    source = density.load_source(request.name, file, request.source_uri, catalogue=catalogue)
    task.progress(0.3, "rendering")
    made = density.density_map(
        source,
        request.voxel_size_angstrom,
        _resolution(request),
        request.box_size_voxels or None,
        task.threads,
        request.source_uri or request.name,
    )
    entry = catalogue.get(request.name)
    metrics = {
        "name": request.name,
        "source": entry.source if entry else request.source_uri,
        "symmetry": entry.symmetry if entry else None,
        "molecular_weight_kda": made.molecular_weight_kda,
        "extent_angstrom": list(made.extent_angstrom),
        "voxel_size_angstrom": made.voxel_size_angstrom,
        "resolution_angstrom": made.resolution_angstrom,
        "box_size_voxels": len(made.values),
    }
    info = VolumeInfo(made.values.shape, made.voxel_size_angstrom, "light")
    return pb.SimulateDensityResult(
        density_uri=task.write_volume("density.mrc", made.values, info),
        metrics_uri=task.write_table("metrics.json", metrics),
    )


# --- SimulateScene -------------------------------------------------------------------------------------------------


def _scene_needs(request: pb.SimulateSceneRequest, reader: Reader) -> Needs:
    chosen = [(structure.name, structure.source_uri) for structure in request.structures]
    chosen += [(strand.name, strand.source_uri) for strand in request.filaments]
    kept, building = _structure_bytes(chosen, request.voxel_size_angstrom, _resolution(request), reader)
    volume = request.size_x * request.size_y * request.size_z
    # the structures are built first, then the scene lives beside them; labels and instances are written as floats
    return Needs(kept + max(building, volume * (scene.BYTES_PER_VOXEL + 5)) + BASE_BYTES)


@service.operation(needs=_scene_needs)
def simulate_scene(request: pb.SimulateSceneRequest, task: Task) -> pb.SimulateSceneResult:
    """Place everything in ice, and keep the truth."""
    voxel, resolution = request.voxel_size_angstrom, _resolution(request)
    shape = (request.size_z, request.size_y, request.size_x)
    if len(request.carbon_edges) > 1:
        raise InvalidArgument("carbon_edges: a field has one at most")
    _check_names([*request.structures, *request.filaments])
    built = _build(request.structures, request.catalogue_uri, voxel, resolution, task, part(task.progress, 0.0, 0.15))
    specimen = scene.Specimen(
        shape,
        voxel,
        resolution,
        placements=[
            scene.Placement(
                made,
                structure.count,
                structure.concentration_micromolar,
                _PLACES[structure.placement],
                structure.membrane_depth_angstrom,
            )
            for made, structure in zip(built, request.structures, strict=True)
        ],
        vesicles=[
            scene.Vesicles(
                vesicles.count, vesicles.radius_min_angstrom, vesicles.radius_max_angstrom, vesicles.max_ellipticity
            )
            for vesicles in request.vesicles
        ],
        flat_membranes=[scene.FlatMembranes(flat.count, flat.max_tilt_degrees) for flat in request.flat_membranes],
        filaments=[_filaments(strand, request, resolution, task) for strand in request.filaments],
        gold_beads=[scene.GoldBeads(beads.count, beads.diameter_angstrom) for beads in request.gold_beads],
        carbon=next(
            (
                scene.Carbon(edge.width_angstrom, edge.thickness_angstrom, edge.hole_radius_angstrom)
                for edge in request.carbon_edges
            ),
            None,
        ),
        ice_thickness_angstrom=request.ice_thickness_angstrom or None,
        min_gap_angstrom=request.min_gap_angstrom,
        allow_partial=request.allow_partial,
    )
    truth = scene.build_scene(specimen, np.random.default_rng(request.seed), part(task.progress, 0.15, 0.9))
    task.progress(0.9, "writing")
    particles = Particles.from_positions(
        truth.positions,
        voxel,
        "tomogram",
        shape,
        truth.rotations,
        class_id=truth.classes,
        class_name=np.array(truth.class_names, np.str_)[truth.classes],
        **({"filament": truth.filaments} if request.filaments else {}),
    )
    weights = {made.name: made.molecular_weight_kda for made in built}
    metrics = {
        "structures": [
            asdict(placed) | {"molecular_weight_kda": weights.get(placed.name)} for placed in _in_order(truth)
        ],
        "placed": len(truth.positions),
        "occupancy": truth.occupancy,
        "label_names": list(truth.label_names),
    }
    info = VolumeInfo(shape, voxel, "light")
    return pb.SimulateSceneResult(
        density_uri=task.write_volume("density.mrc", truth.density, info),
        truth_uri=task.write_particles("truth.parquet", particles),
        labels_uri=_write_slabs(task, "labels.mrc", lambda first, last: truth.labels[first:last], info),
        instances_uri=_write_slabs(task, "instances.mrc", lambda first, last: truth.instances[first:last], info),
        metrics_uri=task.write_table("metrics.json", metrics),
        count=len(truth.positions),
        gold_labels=truth.labels_of("gold"),
    )


def _in_order(truth: scene.Scene) -> list[scene.Placed]:
    """What was placed, the classes first and in their order."""
    names = {name: place for place, name in enumerate(truth.class_names)}
    return sorted(truth.placed, key=lambda placed: names.get(placed.name, len(names)))


def _filaments(
    strand: pb.Filaments, request: pb.SimulateSceneRequest, resolution_angstrom: float, task: Task
) -> scene.Filaments:
    """A kind of filament; a phantom's own helix where the request does not say another."""
    file = task.read_file(strand.source_uri) if strand.source_uri else None
    subunit = density.build_subunit(
        strand.name,
        file,
        strand.source_uri,
        request.voxel_size_angstrom,
        resolution_angstrom,
        task.threads,
        catalogue=_catalogue(request.catalogue_uri, task),
    )
    helix = phantoms.phantom(strand.name).helix if file is None else None
    rise = strand.rise_angstrom or (helix.rise_angstrom if helix else 0.0)
    if strand.HasField("twist_degrees"):
        twist: float | None = strand.twist_degrees
    else:
        twist = helix.twist_degrees if helix else None
    if not rise or twist is None:
        raise InvalidArgument(f"filaments: {strand.name!r} needs a rise_angstrom and a twist_degrees")
    return scene.Filaments(
        subunit, strand.count, rise, twist, strand.persistence_length_angstrom, strand.length_angstrom or None
    )


# --- SimulateTiltSeries --------------------------------------------------------------------------------------------


def _tilt_series_needs(request: pb.SimulateTiltSeriesRequest, reader: Reader) -> Needs:
    depth, height, length = _scene_info(request, reader).shape
    width = request.width or length
    tilts = len(_scheme(request.tilt_scheme))
    series = 4 * tilts * height * width
    # the scene and its projections; then the images without noise, with it, and its halves
    series_kept = 3 + (2 if request.halves else 0)
    work = projection.projection_bytes(tilts, depth, max(length, width), 2) + 64 * 4 * height * width
    return Needs(4 * depth * height * length + series_kept * series + work + BASE_BYTES)


def _scene_info(request: pb.SimulateTiltSeriesRequest, reader: Reader) -> VolumeInfo:
    info = reader.open_volume(request.density_uri).info
    if info.count is not None:
        raise InvalidArgument(f"{request.density_uri}: a stack of {info.count} volumes; a scene is one")
    if info.contrast != "light":
        raise FailedPrecondition(f"{request.density_uri}: protein is {info.contrast}; a scene has it light")
    return info


@service.operation(needs=_tilt_series_needs)
def simulate_tilt_series(request: pb.SimulateTiltSeriesRequest, task: Task) -> pb.SimulateTiltSeriesResult:
    """Image a scene: projections, contrast, noise; and the metadata as a microscope writes it."""
    info = _scene_info(request, task)
    scheme = _scheme(request.tilt_scheme)
    parameters = _imaging(request.microscope, info.voxel_size_angstrom)
    # streams of their own: other noise leaves the defocus and the alignment's errors as they are
    drawing, noise, measuring = (np.random.default_rng(seed) for seed in np.random.SeedSequence(request.seed).spawn(3))
    series = imaging.draw_tilt_series(scheme, parameters, drawing)
    angles = series.angles_degrees
    task.progress(0.0, "reading")
    specimen = task.open_volume(request.density_uri).read()
    if not np.isfinite(specimen).all():
        raise FailedPrecondition(f"{request.density_uri} holds voxels that are not finite numbers")
    projections = projection.project(
        specimen,
        angles,
        request.width or None,
        _PROJECTIONS[request.projection],
        task.threads,
        part(task.progress, 0.02, 0.25),
    )
    depth, length = specimen.shape[0], specimen.shape[2]
    del specimen
    contrast = imaging.noise_free_series(projections, series, parameters, task.threads, part(task.progress, 0.25, 0.5))
    del projections
    mtf = detector.sinc_mtf if request.microscope.detector_mtf else None
    thickness = request.ice_thickness_angstrom or depth * info.voxel_size_angstrom
    path = request.microscope.mean_free_path_angstrom
    passing = detector.transmission(angles, thickness, path)
    metrics: dict[str, Any] = {"tilts": len(series), "transmission": passing.tolist(), "noise": None}
    clean = detector.apply_mtf(contrast, mtf, task.threads)
    images_info = VolumeInfo(clean.shape, info.voxel_size_angstrom, "dark", *_range(angles))
    result = pb.SimulateTiltSeriesResult(
        tilts=len(series),
        noise_free_uri=task.write_volume("noise-free.mrc", clean, images_info),
        tilts_uri=task.write_bytes("tilts.json", series.to_json()),
        mdoc_uri=task.write_bytes(
            "tilt-series.mrc.mdoc", write_mdoc(series, "tilt-series.mrc", (clean.shape[2], clean.shape[1]))
        ),
        tlt_uri=task.write_bytes("tilt-series.tlt", write_tlt(angles)),
    )
    if request.noise == pb.NOISE_GAUSSIAN:
        scales = detector.noise_scales(angles, thickness, path)
        level = noise_sigma_for_snr(
            clean,
            angles,
            depth,
            request.snr,
            measuring,
            noise_scales=scales,
            mtf=mtf,
            left_out=_left_out(request, task, (depth, clean.shape[1], length)),
            width=length,
            workers=task.threads,
            progress=part(task.progress, 0.5, 0.75),
        )
        recorded = detector.gaussian_series(
            contrast,
            level.sigma * scales,
            noise,
            mtf=mtf,
            halves=request.halves,
            workers=task.threads,
            progress=part(task.progress, 0.75, 0.95),
        )
        metrics |= {
            "noise": "gaussian",
            "snr": request.snr,
            "sigma": level.sigma,
            "signal_variance": level.signal_variance,
            "noise_variance": level.noise_variance,
        }
    elif request.noise == pb.NOISE_POISSON:
        electrons = request.microscope.dose_per_tilt * info.voxel_size_angstrom**2 * passing
        recorded = detector.poisson_series(
            contrast,
            electrons,
            noise,
            mtf=mtf,
            halves=request.halves,
            workers=task.threads,
            progress=part(task.progress, 0.5, 0.95),
        )
        metrics |= {"noise": "poisson", "electrons_per_pixel": electrons.tolist()}
    else:
        recorded = detector.Recorded(clean, *((clean, clean) if request.halves else ()))
    task.progress(0.95, "writing")
    result.tilt_series_uri = task.write_volume("tilt-series.mrc", recorded.images, images_info)
    if recorded.even is not None and recorded.odd is not None:
        result.even_uri = task.write_volume("even.mrc", recorded.even, images_info)
        result.odd_uri = task.write_volume("odd.mrc", recorded.odd, images_info)
    result.metrics_uri = task.write_table("metrics.json", metrics)
    return result


def _left_out(
    request: pb.SimulateTiltSeriesRequest, task: Task, shape: tuple[int, int, int]
) -> NDArray[np.bool_] | None:
    """The voxels that no SNR counts."""
    if not request.labels_uri or not request.labels_left_out:
        return None
    labels = task.open_volume(request.labels_uri)
    if labels.info.shape != shape:
        raise InvalidArgument(f"{request.labels_uri} has shape {labels.info.shape}, the scene {shape} (z, y, x)")
    mask = np.empty(shape, np.bool_)
    for first in range(shape[0]):
        mask[first] = np.isin(labels.slab(first, first + 1)[0], list(request.labels_left_out))
    return mask


def _range(angles: NDArray[np.float64]) -> tuple[float, float]:
    """The tilt range for a volume's header, which has no place for a single angle."""
    low, high = float(angles.min()), float(angles.max())
    return (low, high) if low < high else (-90.0, 90.0)


# --- Reconstruct ---------------------------------------------------------------------------------------------------


def _reconstruct_needs(request: pb.ReconstructRequest, reader: Reader) -> Needs:
    # an image's pixels can't be known before the file is unpacked; no image is larger than its file
    size = reader.open_blob(request.tilt_series_uri).size_bytes
    tilts = len(read_tilt_series(reader.read_file(request.tilts_uri), request.tilts_uri))
    pixels = 4 * size // max(1, tilts)
    side = int(np.sqrt(pixels)) + 1
    preparing = tomogram.PREPARATION_BYTES_PER_PIXEL * pixels
    # the series and the tomogram lie on disk
    block = 4 * tomogram.BLOCK_ROWS * (4 * tilts * side + 6 * request.size_z * side)
    return Needs(preparing + block + 4 * SLAB_BYTES + BASE_BYTES)


@service.operation(needs=_reconstruct_needs)
def reconstruct(request: pb.ReconstructRequest, task: Task) -> pb.ReconstructResult:
    """Reconstruct a tomogram, and its halves where they are asked for."""
    if bool(request.even_uri) != bool(request.odd_uri):
        raise InvalidArgument("even_uri and odd_uri: give both halves or none")
    if request.even_uri and request.split_tilts:
        raise InvalidArgument("split_tilts: there are halves of the dose already; leave one of the two out")
    options = tomogram.Preparation(
        binning=request.binning,
        ctf_correction=_CORRECTIONS[request.ctf_correction],
        wiener_snr=request.wiener_snr,
        dose_weighting=request.dose_weighting,
        tilt_axis_degrees=request.tilt_axis_degrees if request.HasField("tilt_axis_degrees") else None,
        align=request.align_images,
        normalise=request.normalise,
    )
    method = tomogram.Reconstruction(_METHODS[request.method], _WINDOWS[request.window], request.iterations)
    series = tomogram.with_optics(
        read_tilt_series(task.read_file(request.tilts_uri), request.tilts_uri),
        request.defocus_um if request.HasField("defocus_um") else None,
        request.voltage_kv,
        request.cs_mm,
        request.amplitude_contrast,
    )
    tomogram.check_series(series, options, request.tilts_uri)
    all_tilts = np.arange(len(series))
    # name, source, which of its tilts
    wanted = [("tomogram", request.tilt_series_uri, all_tilts)]
    if request.even_uri:
        wanted += [("even", request.even_uri, all_tilts), ("odd", request.odd_uri, all_tilts)]
    elif request.split_tilts:
        if len(series) < 4:
            raise InvalidArgument(f"split_tilts: a series of {len(series)} tilts is too short to be split")
        wanted += [("even", request.tilt_series_uri, all_tilts[::2]), ("odd", request.tilt_series_uri, all_tilts[1::2])]
    uris, residuals = {}, {}
    with ExitStack() as files:
        prepared: ScratchVolume | None = None
        before = ""
        for number, (name, uri, tilts) in enumerate(wanted):
            progress = part(task.progress, number / len(wanted), (number + 0.9) / len(wanted))
            if prepared is None or uri != before:
                files.close()
                prepared, pixel = _prepared(request, uri, series, options, task, part(progress, 0.0, 0.4))
                files.enter_context(prepared)
                before = uri
            shape = (request.size_z, *prepared.shape[1:])
            angles = series.angles_degrees[tilts]

            def rows(
                first: int, last: int, images: ScratchVolume = prepared, tilts: NDArray[np.intp] = tilts
            ) -> NDArray[np.float32]:
                return images.rows(first, last)[tilts]

            with ScratchVolume(task.scratch / f"{name}.f32", shape) as volume:
                residuals[name] = tomogram.reconstruct(
                    rows, angles, shape, volume.write_rows, method, task.threads, part(progress, 0.4, 1.0)
                )
                info = VolumeInfo(shape, pixel, _CONTRASTS[request.contrast], *_range(angles))
                light = request.contrast == common_pb2.CONTRAST_LIGHT
                uris[name] = _write_slabs(task, f"{name}.mrc", volume.sections, info, negated=light)
    metrics = {
        "tilts": len(series),
        "angles_degrees": series.angles_degrees.tolist(),
        "voxel_size_angstrom": pixel,
        "method": method.method,
        "ctf_correction": options.ctf_correction,
        "dose_weighting": options.dose_weighting,
        "sirt_residuals": residuals["tomogram"],
    }
    return pb.ReconstructResult(
        tomogram_uri=uris["tomogram"],
        even_uri=uris.get("even", ""),
        odd_uri=uris.get("odd", ""),
        metrics_uri=task.write_table("metrics.json", metrics),
    )


def _prepared(
    request: pb.ReconstructRequest,
    uri: str,
    series: TiltSeries,
    options: tomogram.Preparation,
    task: Task,
    progress: Progress,
) -> tuple[ScratchVolume, float]:
    """A series prepared for its reconstruction, on disk, and its pixel size after binning."""
    with open_image_stack(task.local_copy(uri), _name(uri), task.scratch, progress) as stack:
        if stack.shape[0] != len(series):
            raise InvalidArgument(
                f"{_name(uri)} has {stack.shape[0]} images and {_name(request.tilts_uri)} {len(series)} angles; "
                "there must be one for each image"
            )
        pixel = stack.pixel_size(request.pixel_size_angstrom or None)
        height, width = tomogram.binned_shape(stack.shape[1:], options.binning)
        prepared = ScratchVolume(task.scratch / "prepared.f32", (len(series), height, width))
        tomogram.prepare_images(
            stack.read, stack.shape, series, pixel, options, prepared.write_section, task.threads, progress
        )
    return prepared, pixel * options.binning


# --- SimulateParticles ---------------------------------------------------------------------------------------------


def _particles_needs(request: pb.SimulateParticlesRequest, reader: Reader) -> Needs:
    return Needs(BASE_BYTES + ROW_BYTES * sum(structure.count for structure in request.structures))


@service.operation(needs=_particles_needs)
def simulate_particles(request: pb.SimulateParticlesRequest, task: Task) -> pb.SimulateParticlesResult:
    """Draw the poses of a set of subtomograms."""
    _check_names(request.structures)
    for structure in request.structures:
        if structure.count < 1:
            raise InvalidArgument(f"structures: {structure.name!r} has a count of {structure.count}; give at least 1")
    about_axis = request.orientations == pb.ORIENTATIONS_ABOUT_AXIS
    drawn = poses.draw_poses(
        [structure.count for structure in request.structures],
        np.random.default_rng(request.seed),
        request.max_shift_angstrom / request.voxel_size_angstrom,
        (list(request.axis) or [0.0, 1.0, 0.0]) if about_axis else None,
        list(request.structure_axis) or [0.0, 0.0, 1.0],
    )
    count = len(drawn.classes)
    side = request.box_size_voxels
    names = np.array([structure.name for structure in request.structures])
    particles = Particles.from_positions(
        np.full((count, 3), float(side // 2)),
        request.voxel_size_angstrom,
        "subtomograms",
        (side, side, side),
        drawn.rotations,
        class_id=drawn.classes,
        class_name=names[drawn.classes],
        shift_x=drawn.shifts_voxels[:, 0],
        shift_y=drawn.shifts_voxels[:, 1],
        shift_z=drawn.shifts_voxels[:, 2],
    )
    return pb.SimulateParticlesResult(particles_uri=task.write_particles("particles.parquet", particles), count=count)


# --- SimulateSubtomograms ------------------------------------------------------------------------------------------


def _subtomograms_needs(request: pb.SimulateSubtomogramsRequest, reader: Reader) -> Needs:
    chosen = [(structure.name, structure.source_uri) for structure in request.structures]
    kept, building = _structure_bytes(chosen, request.voxel_size_angstrom, _resolution(request), reader)
    side = request.box_size_voxels
    width = subtomograms.image_width(side)
    tilts = len(_scheme(request.tilt_scheme))
    batch = max(1, subtomograms.BATCH_VOXELS // side**3)
    working = batch * subtomograms.BYTES_PER_SAMPLE * (side**3 + tilts * side * width)
    return Needs(kept + max(building, working) + (256 << 20) + BASE_BYTES)


@service.operation(needs=_subtomograms_needs)
def simulate_subtomograms(request: pb.SimulateSubtomogramsRequest, task: Task) -> pb.SimulateSubtomogramsResult:
    """Image and reconstruct a subtomogram for each pose; rows of a set come out as they do of the whole."""
    particles = task.read_particles(request.particles_uri)
    if not np.isclose(particles.voxel_size_angstrom, request.voxel_size_angstrom, rtol=1e-6):
        raise FailedPrecondition(
            f"{request.particles_uri} counts in voxels of {particles.voxel_size_angstrom:g} Å, the subtomograms have "
            f"{request.voxel_size_angstrom:g} Å"
        )
    drawn = _poses(particles, request)
    first = request.rows.first if request.HasField("rows") else 0
    stop = first + request.rows.count if request.HasField("rows") else len(particles)
    if stop > len(particles):
        raise InvalidArgument(
            f"rows {first} to {stop - 1} were asked for, and {request.particles_uri} has rows 0 to {len(particles) - 1}"
        )
    built = _build(
        request.structures,
        request.catalogue_uri,
        request.voxel_size_angstrom,
        _resolution(request),
        task,
        part(task.progress, 0.0, 0.1),
    )
    parameters = _imaging(request.microscope, request.voxel_size_angstrom)
    drawing, measuring, noise = np.random.SeedSequence(request.seed).spawn(3)
    setup = subtomograms.Setup(
        built,
        request.box_size_voxels,
        imaging.draw_tilt_series(_scheme(request.tilt_scheme), parameters, np.random.default_rng(drawing)),
        parameters,
        detector.sinc_mtf if request.microscope.detector_mtf else None,
        _CORRECTIONS[request.ctf_correction],
    )
    subtomograms.check_sizes(setup)
    level = None
    if request.HasField("snr"):
        level = subtomograms.calibrate(
            setup, drawn, request.snr, measuring, task.threads, part(task.progress, 0.1, 0.3)
        )
    rows = np.arange(first, stop)
    # by the place in the whole set, so that a shard's noise is the whole's
    seeds = [np.random.SeedSequence(noise.entropy, spawn_key=(*noise.spawn_key, int(row))) for row in rows]
    light = request.contrast == common_pb2.CONTRAST_LIGHT
    part_of_set = poses.Poses(drawn.classes[rows], drawn.rotations[rows], drawn.shifts_voxels[rows])

    def boxes() -> Iterator[NDArray[np.float32]]:
        made = subtomograms.subtomograms(setup, part_of_set, level, seeds, task.threads, part(task.progress, 0.3, 0.99))
        for batch in made:
            yield -batch if light else batch

    side = request.box_size_voxels
    info = VolumeInfo(
        (side, side, side),
        request.voxel_size_angstrom,
        _CONTRASTS[request.contrast],
        *_range(setup.series.angles_degrees),
    )
    metrics: dict[str, Any] = {"snr": request.snr if level else None, "structures": []}
    for index, built_density in enumerate(built):
        metrics["structures"].append(
            {
                "name": built_density.name,
                "molecular_weight_kda": built_density.molecular_weight_kda,
                "signal_variance": level.signal_variances[index] if level else None,
            }
        )
    metrics["noise_variance"] = level.noise_variance if level else None
    return pb.SimulateSubtomogramsResult(
        subtomograms_uri=task.write_subtomograms("subtomograms", boxes(), info, particles.select(rows)),
        count=len(rows),
        metrics_uri=task.write_table("metrics.json", metrics),
    )


def _poses(particles: Particles, request: pb.SimulateSubtomogramsRequest) -> poses.Poses:
    """The poses of a table, its classes told by their names."""
    rotations = particles.rotations()
    if rotations is None or "class_name" not in particles.table:
        raise FailedPrecondition(f"{request.particles_uri}: the particles need a rotation and a class_name each")
    places = {structure.name: place for place, structure in enumerate(request.structures)}
    names = particles.table["class_name"]
    unknown = sorted(set(names) - set(places))
    if unknown:
        raise InvalidArgument(
            f"{request.particles_uri} has particles of class {unknown[0]!r}, which none of the structures is called"
        )
    classes = np.asarray(names.map(places), np.int32)
    shifts = particles.shifts() if "shift_x" in particles.table else np.zeros((len(particles), 3))
    return poses.Poses(classes, rotations, shifts)


# --- ReconstructSubtomograms ---------------------------------------------------------------------------------------


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
        particles_name=_name(request.particles_uri),
        tomograms_name=_name(request.tomograms_uri),
        read_file=read_geometry,
        opposite_hand=request.opposite_hand,
    )
    first = found[0]
    for particle in found:
        if (particle.box, particle.pixel_size_angstrom) != (first.box, first.pixel_size_angstrom):
            raise InvalidArgument(
                f"{_name(request.particles_uri)}: particle {particle.name} has images of {particle.box} pixels of "
                f"{particle.pixel_size_angstrom:g} Å, {first.name} of {first.box} of {first.pixel_size_angstrom:g} Å; "
                "reconstruct groups of one size at a time"
            )
        if request.aligned and particle.rotation is None:
            raise FailedPrecondition(f"aligned: {_name(request.particles_uri)} has no orientations")
    pixel = first.pixel_size_angstrom

    def boxes() -> Iterator[NDArray[np.float32]]:
        for number, particle in enumerate(found):
            task.progress(0.98 * number / len(found), "reconstructing", particles=number)
            uri = _named(particle.stack, request.image_uris, "image_uris")
            with open_image_stack(task.local_copy(uri), _name(uri), task.scratch) as stack:
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
    info = VolumeInfo((side, side, side), pixel, _CONTRASTS[request.contrast], *tilts)
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


_CONTRASTS = {common_pb2.CONTRAST_DARK: "dark", common_pb2.CONTRAST_LIGHT: "light"}
_PLACES: Mapping[int, Any] = {
    pb.PLACEMENT_CYTOPLASM: "cytoplasm",
    pb.PLACEMENT_MEMBRANE: "membrane",
    pb.PLACEMENT_VESICLE: "vesicle",
}
_ORDERS: Mapping[int, Any] = {
    pb.TILT_ORDER_SEQUENTIAL: "sequential",
    pb.TILT_ORDER_BIDIRECTIONAL: "bidirectional",
    pb.TILT_ORDER_DOSE_SYMMETRIC: "dose_symmetric",
}
_PROJECTIONS: Mapping[int, Any] = {
    pb.PROJECTION_REAL_SPACE: "real_space",
    pb.PROJECTION_CENTRAL_SLICES: "central_slices",
}
_METHODS: Mapping[int, Any] = {
    pb.RECONSTRUCTION_WEIGHTED_BACK_PROJECTION: "weighted_back_projection",
    pb.RECONSTRUCTION_SIRT: "sirt",
    pb.RECONSTRUCTION_FOURIER: "fourier",
}
_WINDOWS: Mapping[int, Any] = {
    pb.BACK_PROJECTION_WINDOW_RAMP: "ramp",
    pb.BACK_PROJECTION_WINDOW_HAMMING: "hamming",
    pb.BACK_PROJECTION_WINDOW_SIRT: "sirt",
}
_CORRECTIONS: Mapping[int, Any] = {
    common_pb2.CTF_CORRECTION_NONE: "none",
    common_pb2.CTF_CORRECTION_PHASE_FLIP: "phase_flip",
    common_pb2.CTF_CORRECTION_WIENER: "wiener",
}
