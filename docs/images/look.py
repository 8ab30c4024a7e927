"""Makes docs/images/look.png; needs matplotlib: python docs/images/look.py."""

from __future__ import annotations

import io
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.spatial.transform import Rotation

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.colors import LightSource
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from cryofleet.artifacts import ResultWriter, digest_of
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import file_store, run_operation
from cryofleet.v1 import io_pb2
from cryofleet.volumes import VolumeInfo, encode_volume, write_subtomograms
from services.io.service import service
from services.simulation import density, scene

SHAPE, VOXEL, BOX = (64, 256, 320), 10.0, 36
KINDS = ("double-ring", "barrel-with-lids", "two-subunit-globule", "hexameric-ring")
HEIGHT, WIDTH, GAP, TITLE = 420, 560, 10, 24


def put(store: Store, name: str, data: bytes) -> str:
    writer = ResultWriter(store, "default", digest_of(data))
    uri = writer.put(name, data)
    writer.commit(operation="docs.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0.0)
    return uri


def put_boxes(store: Store, volume: NDArray[np.float32], particles: Particles) -> str:
    half, corners = BOX // 2, np.rint(particles.positions()).astype(int)[:, ::-1]
    kept = ((corners >= half) & (corners <= np.array(volume.shape) - half)).all(axis=1)
    slices = [tuple(slice(c - half, c + half) for c in corner) for corner in corners[kept]]
    boxes = np.stack([volume[part] for part in slices])
    writer = ResultWriter(store, "default", "1" * 64)
    info = VolumeInfo(boxes.shape[1:], VOXEL, "dark")
    uri = write_subtomograms(writer, store, "boxes", boxes, info, particles.select(kept))
    writer.commit(operation="docs.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0.0)
    return uri


def rendered(glb: bytes) -> Image.Image:
    """The scene as it looks from above."""
    loaded = trimesh.load_scene(io.BytesIO(glb), file_type="glb")
    figure = plt.figure(figsize=(8.4, 5.2), dpi=100)
    axes: Any = figure.add_axes((0, 0, 1, 1), projection="3d", computed_zorder=False)
    triangles, colours = [], []
    light = LightSource(azdeg=300, altdeg=50)
    for node in loaded.graph.nodes_geometry:
        matrix, name = loaded.graph.get(node)
        matrix = np.asarray(matrix)
        geometry = loaded.geometry[name]
        if name == "tomogram":
            continue  # its lines, which the library reads as one
        corners = geometry.vertices @ matrix[:3, :3].T + matrix[:3, 3]
        faces = corners[geometry.faces]
        normals = np.cross(faces[:, 1] - faces[:, 0], faces[:, 2] - faces[:, 0])
        shade = light.shade_normals(normals / np.linalg.norm(normals, axis=1, keepdims=True))
        linear = np.asarray(geometry.visual.material.baseColorFactor[:3], float) / 255
        base = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        triangles.append(faces)
        colours.append(np.clip(base * (0.35 + 0.75 * shade[:, None]), 0, 1))
    axes.add_collection3d(Poly3DCollection(np.concatenate(triangles), facecolors=np.concatenate(colours)))
    depth, height, width = (side * VOXEL for side in SHAPE)
    for start, end in itertools.combinations(itertools.product((0, width), (0, height), (0, depth)), 2):
        if sum(a != b for a, b in zip(start, end, strict=True)) == 1:
            axes.plot(*zip(start, end, strict=True), color="#888888", linewidth=0.8, zorder=0)
    axes.set(xlim=(0, width), ylim=(0, height), zlim=(0, depth))
    axes.set_box_aspect((width, height, depth), zoom=0.98)
    axes.view_init(elev=42, azim=-70)
    axes.set_axis_off()
    packed = io.BytesIO()
    figure.savefig(packed, format="png")
    plt.close(figure)
    picture = Image.open(packed).convert("RGB")
    return picture.crop(ImageOps.invert(picture).getbbox())


def main() -> None:
    rng = np.random.default_rng(4)
    built = [density.build(name, None, "", VOXEL, 2.5 * VOXEL, 2) for name in KINDS]
    specimen = scene.Specimen(
        SHAPE, VOXEL, 2.5 * VOXEL, placements=[scene.Placement(made, 14) for made in built], allow_partial=True
    )
    made = scene.build_scene(specimen, rng)
    signal = -made.density
    volume = (signal + rng.normal(0, 1.2 * signal.std(), SHAPE)).astype(np.float32)
    particles = Particles.from_positions(
        made.positions,
        VOXEL,
        "docs",
        SHAPE,
        rotations=made.rotations,
        class_id=made.classes,
        class_name=np.array(made.class_names, object)[made.classes],
        score=rng.uniform(0.3, 0.9, len(made.positions)).round(2),
    )
    with tempfile.TemporaryDirectory() as folder:
        store = file_store(Path(folder))
        tomogram = put(store, "tomogram.mrc", encode_volume(volume, VolumeInfo(SHAPE, VOXEL, "dark")))
        picks = put(store, "picks.parquet", particles.to_parquet())
        averages = [
            put(store, "average.mrc", encode_volume(box, VolumeInfo(box.shape, VOXEL, "light")))
            for box in (each.rotated(Rotation.identity(), np.zeros(3)) for each in built)
        ]
        slices = run_operation(
            service,
            io_pb2.DrawSlicesRequest(
                volume_uri=tomogram, thickness_angstrom=50, particles_uri=picks, particle_diameter_angstrom=240
            ),
            store,
        )
        sheet = run_operation(
            service,
            io_pb2.DrawParticlesRequest(
                subtomograms_uri=put_boxes(store, volume, particles),
                thickness_angstrom=50,
                max_particles=20,
                tile_pixels=72,
            ),
            store,
        )
        placed = run_operation(
            service, io_pb2.MakeSceneRequest(particles_uri=picks, volume_uris=averages, tomogram_uri=tomogram), store
        )
        panels = [
            ("DrawSlices: picks, each class in its colour", Image.open(io.BytesIO(store.get(slices.picture_uris[0])))),
            ("DrawParticles: the best first", Image.open(io.BytesIO(store.get(sheet.picture_uri)))),
            ("MakeScene: averages at their poses", rendered(store.get(placed.scene_uri))),
        ]
    font = ImageFont.load_default(15)
    shown = []
    for title, panel in panels:
        scale = min(HEIGHT / panel.height, WIDTH / panel.width)
        scaled = panel.convert("RGB").resize(
            (round(panel.width * scale), round(panel.height * scale)), Image.Resampling.LANCZOS
        )
        shown.append((title, scaled))
    sheet_image = Image.new(
        "RGB", (sum(panel.width + GAP for _, panel in shown) + GAP, HEIGHT + TITLE + 2 * GAP), "white"
    )
    draw, x = ImageDraw.Draw(sheet_image), GAP
    for title, panel in shown:
        draw.text((x, GAP - 2), title, fill="black", font=font)
        sheet_image.paste(panel, (x, GAP + TITLE))
        x += panel.width + GAP
    sheet_image.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
