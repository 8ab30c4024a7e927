"""What requests of several operations say, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.progress import Progress
from cryofleet.server import Reader, Task
from cryofleet.v1 import simulation_pb2 as pb
from cryofleet.volumes import VolumeInfo
from services.simulation import density, imaging, structures
from services.simulation.catalogue import Entry, load_catalogue
from services.simulation.tilt_scheme import TiltScheme, tilt_scheme

#: Of the process's own, beside what an operation works on.
BASE_BYTES = 64 << 20
#: Sections of a volume that are written together.
SLAB_BYTES = 16 << 20

_ORDERS: Mapping[int, Any] = {
    pb.TILT_ORDER_SEQUENTIAL: "sequential",
    pb.TILT_ORDER_BIDIRECTIONAL: "bidirectional",
    pb.TILT_ORDER_DOSE_SYMMETRIC: "dose_symmetric",
}


def read_catalogue(uri: str, task: Task) -> Mapping[str, Entry]:
    """The user's catalogue, or the built-in one."""
    if not uri:
        return load_catalogue()
    try:
        return load_catalogue(task.read_file(uri).decode())
    except UnicodeDecodeError:
        raise InvalidArgument(f"{uri}: not a text file; a catalogue is YAML") from None
    except InvalidArgument as error:
        raise InvalidArgument(f"{uri}: {error}") from None


def check_names(chosen: Sequence[pb.Structure | pb.Filaments]) -> None:
    """Raises InvalidArgument where two have the same."""
    names = [structure.name for structure in chosen]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InvalidArgument(f"structures: {', '.join(repeated)} stands there more than once; names must differ")


def build_structures(
    chosen: Sequence[pb.Structure],
    catalogue_uri: str,
    voxel_size_angstrom: float,
    resolution_angstrom: float,
    task: Task,
    progress: Progress,
) -> list[density.Density]:
    """The densities of structures, in their order."""
    check_names(chosen)
    catalogue = read_catalogue(catalogue_uri, task)
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


def file_bytes(uri: str, reader: Reader) -> int | None:
    """The size of a structure's file, None for a phantom. Raises InvalidArgument where it is too large to be read."""
    if not uri:
        return None
    size = reader.open_blob(uri).size_bytes
    if size > structures.MAX_FILE_BYTES:
        raise InvalidArgument(f"{uri}: {size} bytes, at most {structures.MAX_FILE_BYTES} are read")
    return size


def structure_bytes(
    chosen: Sequence[tuple[str, str]], voxel_size_angstrom: float, resolution_angstrom: float, reader: Reader
) -> tuple[int, int]:
    """What structures (name, source_uri) take once they are built, and what building one takes at most."""
    kept = building = 0
    for name, source_uri in chosen:
        size = file_bytes(source_uri, reader)
        voxels = density.estimated_side(name, size, voxel_size_angstrom, resolution_angstrom) ** 3
        kept += voxels * density.KEPT_BYTES_PER_VOXEL
        building = max(building, voxels * density.BUILD_BYTES_PER_VOXEL + 12 * (size or 0))
    return kept, building


def resolution_of(request: Any) -> float:
    """That of the densities that a request asks for; the finest that its voxels have where it names none."""
    return float(request.resolution_angstrom) or 2 * float(request.voxel_size_angstrom)


def scheme_of(scheme: pb.TiltScheme) -> TiltScheme:
    """The tilts in the order in which they are taken."""
    return tilt_scheme(
        scheme.tilt_min_degrees,
        scheme.tilt_max_degrees,
        scheme.tilt_step_degrees,
        _ORDERS[scheme.order],
        scheme.start_degrees,
        scheme.group_size,
    )


def imaging_of(microscope: pb.Microscope, pixel_size_angstrom: float) -> imaging.ImagingParameters:
    """What a microscope makes of a specimen in such pixels."""
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


def write_slabs(
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


def file_name(uri: str) -> str:
    """As messages call what is at a URI."""
    return uri.rstrip("/").rpartition("/")[2]


def tilt_range(angles: NDArray[np.float64]) -> tuple[float, float]:
    """The tilt range for a volume's header, which has no place for a single angle."""
    low, high = float(angles.min()), float(angles.max())
    return (low, high) if low < high else (-90.0, 90.0)
