"""What a segmenter finds that never saw a label of its own data: python -m benchmarks.segmentation_transfer.

DeepFinder's network is trained three times on the same scenes, by the same settings, and only their imaging differs:

    target    imaged in the target style: what labels of the data itself would give
    dual      made by a DUAL model, which was trained on other tomograms of the target style and densities of further
              scenes, unpaired and without a label
    gaussian  plain projections with white noise of the target's SNR and tilts: contrast transfer, detector, damage,
              misalignment and the tilts' growing noise left out

and looks at a further tomogram of the target style. The style is the microscope's whole way: strong defocus that varies
from tilt to tilt, the detector's transfer, damage, blur, misalignment, ice that dims at high tilts. Each class's F1 is
of voxels (their Dice), and of particles: picks of its class against true ones within half the smallest
class's diameter. `dual` should reach 0.9 of the macro-F1 of `target` and be 0.1 above `gaussian`.

Sizes are arguments; `--quick` runs through in a minute and says nothing of quality. What a GPU is for:

    --shape 96 256 256 --copies 40 --scenes 4 --snr 0.1 --patch 56 --patches 1000 --channels 32 --epochs 40 --tile 128
    --structures double-ring two-subunit-globule icosahedral-shell single-ring octahedral-shell --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from benchmarks.harness import Row, print_rows
from cryofleet.storage import Store
from cryofleet.testing import run_operation
from cryofleet.v1 import learning_pb2, picking_pb2, simulation_pb2
from cryofleet.volumes import open_volume
from services.learning.service import service as learning
from services.picking.service import service as picking
from services.simulation.service import service as simulation

VOXEL_SIZE_ANGSTROM = 10.0
MEMBRANE = "membrane"
#: What the macro-F1 of `dual` should be: of that of `target`, and above that of `gaussian`.
SHARE_OF_TARGET, ABOVE_GAUSSIAN = 0.9, 0.1
STYLE = simulation_pb2.Microscope(
    defocus_um=4,
    defocus_spread_um=0.3,
    blur_angstrom=4,
    shift_error_angstrom=4,
    rotation_error_degrees=0.3,
)
PLAIN = simulation_pb2.Microscope(
    contrast_transfer=False, detector_mtf=False, radiation_damage=False, mean_free_path_angstrom=1_000_000
)
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
Style = Literal["target", "gaussian"]


@dataclass(frozen=True)
class Size:
    """How much is simulated and learnt; copies are of each structure in a scene."""

    shape: tuple[int, int, int]
    structures: tuple[str, ...]
    copies: int
    scenes: int
    snr: float
    dual_epochs: int
    dual_channels: int
    patch: int
    patches: int
    channels: int
    epochs: int
    tile: int
    device: str


@dataclass(frozen=True)
class Scene:
    """A specimen and its truth."""

    density_uri: str
    labels_uri: str
    names_uri: str
    truth_uri: str


def run(store: Store, request: Message, device: str = "cpu") -> Any:
    for name, service in {"learning": learning, "picking": picking, "simulation": simulation}.items():
        if request.DESCRIPTOR.file.name.endswith(f"/{name}.proto"):
            return run_operation(service, request, store, threads=THREADS, device=device)
    raise ValueError(request.DESCRIPTOR.full_name)


def scene(store: Store, size: Size, seed: int) -> Scene:
    z, y, x = size.shape
    made = run(
        store,
        simulation_pb2.SimulateSceneRequest(
            size_x=x,
            size_y=y,
            size_z=z,
            voxel_size_angstrom=VOXEL_SIZE_ANGSTROM,
            structures=[simulation_pb2.Structure(name=name, count=size.copies) for name in size.structures],
            vesicles=[simulation_pb2.Vesicles(count=1, radius_min_angstrom=150, radius_max_angstrom=250)],
            allow_partial=True,
            seed=seed,
        ),
    )
    return Scene(made.density_uri, made.labels_uri, made.metrics_uri, made.truth_uri)


def imaged(store: Store, size: Size, specimen: Scene, style: Style, seed: int) -> str:
    """A tomogram of the specimen; its URI."""
    images = run(
        store,
        simulation_pb2.SimulateTiltSeriesRequest(
            density_uri=specimen.density_uri,
            microscope=STYLE if style == "target" else PLAIN,
            snr=size.snr,
            seed=seed,
        ),
    )
    made = run(
        store,
        simulation_pb2.ReconstructRequest(
            tilt_series_uri=images.tilt_series_uri, tilts_uri=images.tilts_uri, size_z=size.shape[0]
        ),
    )
    return str(made.tomogram_uri)


def by_dual(store: Store, size: Size, specimens: Sequence[Scene]) -> list[str]:
    """Tomograms of the specimens in the style that DUAL learns from others of the target style."""
    others = [scene(store, size, seed) for seed in range(200, 200 + 2 * size.scenes)]
    unlabelled, densities = others[: size.scenes], others[size.scenes :]
    model = run(
        store,
        learning_pb2.TrainDualRequest(
            tomograms_uris=[imaged(store, size, each, "target", n) for n, each in enumerate(unlabelled, start=200)],
            densities_uris=[each.density_uri for each in densities],
            max_epochs=size.dual_epochs,
            channels=size.dual_channels,
            spacing_voxels=16,
            batch_size=4,
            learning_rate=4e-4,
        ),
        size.device,
    )
    made = []
    for seed, each in enumerate(specimens):
        request = learning_pb2.SimulateStyleRequest(
            model_uri=model.model_uri, density_uri=each.density_uri, seed=seed, tile_size_voxels=size.tile
        )
        made.append(str(run(store, request, size.device).tomograms_uris[0]))
    return made


@dataclass(frozen=True)
class Found:
    """F1 of each class, of voxels and of particles."""

    voxels: dict[str, float]
    particles: dict[str, float]
    seconds_training: float


def found_by(
    store: Store, size: Size, specimens: Sequence[Scene], tomograms: Sequence[str], test: Scene, test_uri: str
) -> Found:
    """What a segmenter that learns from the tomograms finds in the test tomogram."""
    started = time.perf_counter()
    trained = run(
        store,
        learning_pb2.TrainTomogramSegmenterRequest(
            tomogram_uris=tomograms,
            labels_uris=[each.labels_uri for each in specimens],
            names_uris=[each.names_uri for each in specimens],
            patch_size_voxels=size.patch,
            patches=size.patches,
            channels=size.channels,
            max_epochs=size.epochs,
            patience_epochs=size.epochs,
        ),
        size.device,
    )
    seconds = time.perf_counter() - started
    labels = run(
        store,
        learning_pb2.PredictRequest(model_uri=trained.model_uri, tomogram_uri=test_uri, tile_size_voxels=size.tile),
        size.device,
    )
    drawn = open_volume(store, labels.labels_uri).read()
    truth = open_volume(store, test.labels_uri).read()
    label_names = json.loads(store.get(test.names_uri))["label_names"]
    names = list(trained.names)
    of_voxels = {
        name: dice(drawn == names.index(name), truth == label_names.index(name)) for name in trained.structures
    }
    picks = run(
        store,
        learning_pb2.PickSegmentationRequest(
            labels_uri=labels.labels_uri,
            names=names,
            left_out=[MEMBRANE],
            diameters_angstrom=trained.diameters_angstrom,
        ),
    )
    evaluated = run(
        store,
        picking_pb2.EvaluateRequest(
            particles_uri=picks.particles_uri,
            truth_uri=test.truth_uri,
            distance_angstrom=min(trained.diameters_angstrom[names.index(name)] for name in size.structures) / 2,
        ),
    )
    figures = json.loads(store.get(evaluated.metrics_uri))["by_class"]
    of_particles = {figure["class"]: float(figure["f1"]) for figure in figures}
    return Found(of_voxels, of_particles, seconds)


def dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """2 |A and B| / (|A| + |B|), which is the F1 of the voxels."""
    return float(2 * (found & truth).sum() / max(1, found.sum() + truth.sum()))


def macro(values: dict[str, float]) -> float:
    """The mean over the classes."""
    return float(np.mean(list(values.values())))


def transfer(size: Size, judged: bool) -> Iterator[Row]:
    """All figures; with targets where `judged`."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"file://{folder}")
        specimens = [scene(store, size, seed) for seed in range(100, 100 + size.scenes)]
        test = scene(store, size, 1)
        test_uri = imaged(store, size, test, "target", 1)
        results: dict[str, Found] = {}
        for way in ("target", "dual", "gaussian"):
            if way == "dual":
                tomograms = by_dual(store, size, specimens)
            else:
                style: Style = "target" if way == "target" else "gaussian"
                tomograms = [imaged(store, size, each, style, seed) for seed, each in enumerate(specimens, start=100)]
            found = found_by(store, size, specimens, tomograms, test, test_uri)
            results[way] = found
            for name, value in found.voxels.items():
                yield Row(way, f"f1_voxels_{name}", value, "", "higher")
            for name, value in found.particles.items():
                yield Row(way, f"f1_particles_{name}", value, "", "higher")
            yield Row(way, "macro_f1_voxels", macro(found.voxels), "", "higher")
            yield Row(way, "macro_f1_particles", macro(found.particles), "", "higher")
            yield Row(way, "seconds_training_segmenter", found.seconds_training, "s", "lower")
        for kind in ("voxels", "particles"):
            f1 = {way: macro(getattr(each, kind)) for way, each in results.items()}
            share, lead = f1["dual"] / max(f1["target"], 1e-9), f1["dual"] - f1["gaussian"]
            yield Row("dual over target", f"macro_f1_{kind}", share, "", "higher", SHARE_OF_TARGET if judged else None)
            yield Row("dual above gaussian", f"macro_f1_{kind}", lead, "", "higher", ABOVE_GAUSSIAN if judged else None)


QUICK = Size((32, 64, 64), ("double-ring", "icosahedral-shell"), 3, 1, 1.0, 1, 2, 24, 30, 4, 2, 64, "cpu")
FULL = Size(
    (64, 192, 192), ("double-ring", "two-subunit-globule", "icosahedral-shell"),
    20, 3, 0.2, 7, 8, 32, 300, 16, 20, 96, "cpu",
)  # fmt: skip


def measure(quick: bool) -> Iterator[Row]:
    yield from transfer(QUICK if quick else FULL, not quick)


def arguments() -> tuple[Size, bool, bool]:
    """The sizes, whether targets count, and whether JSON is wanted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.segmentation_transfer")
    parser.add_argument("--quick", action="store_true", help="small sizes where no others are given")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("Z", "Y", "X"), help="of a scene, voxels of 10 Å")
    parser.add_argument("--structures", nargs="+", help="names of phantoms")
    for name, kind, text in (
        ("copies", int, "of each structure in a scene"),
        ("scenes", int, "that are learnt from; as many for DUAL's tomograms, and for its densities"),
        ("snr", float, "of the tomograms"),
        ("dual-epochs", int, "of DUAL's training"),
        ("dual-channels", int, "of DUAL's U-Nets"),
        ("patch", int, "side of the segmenter's patches, voxels"),
        ("patches", int, "that the segmenter learns from"),
        ("channels", int, "of the segmenter's first level"),
        ("epochs", int, "of the segmenter's training"),
        ("tile", int, "side of tiles, voxels"),
        ("device", str, "cpu or cuda"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=text)
    options = vars(parser.parse_args())
    quick, as_json = options.pop("quick"), options.pop("json")
    base = QUICK if quick else FULL
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items() if value}
    return Size(**(vars(base) | given)), not quick, as_json


if __name__ == "__main__":
    chosen_size, is_judged, wants_json = arguments()
    print_rows("segmentation_transfer", transfer(chosen_size, is_judged), wants_json)
