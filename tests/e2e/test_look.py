"""Pictures and meshes through real processes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import trimesh
from PIL import Image

from cryofleet.artifacts import ResultWriter
from cryofleet.storage import Store
from cryofleet.volumes import VolumeInfo, encode_volume
from tests.platform import Platform


def test_a_tomogram_is_drawn_and_averages_are_put_back(platform: Platform, scene: dict[str, Any]) -> None:
    truth = scene["truth"].to_dataframe()
    store = Store.open(platform.settings)
    writer = ResultWriter(store, "default", "6" * 64)
    z, y, x = np.indices((24, 24, 24)) - 12
    ball = (6 - np.sqrt(x**2 + y**2 + z**2)).astype(np.float32)
    average = writer.put("average.mrc", encode_volume(ball, VolumeInfo(ball.shape, 14.0, "light")))
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": average}, seconds=0)

    with platform.client() as client:
        look = client.run("look", tomogram=scene["tomogram"], particles=scene["truth"], max_frames=10)
        classes = truth["class_id"].nunique()
        placed = client.run(
            "map-back", tomogram=scene["tomogram"], particles=scene["truth"], averages=[average] * classes
        )
        outputs = look.wait().outputs
        pictures = [Image.open(io.BytesIO(outputs[f"slices_{axis}"][0].read())) for axis in "zyx"]
        movie = Image.open(io.BytesIO(outputs["movie"].read()))
        sheet = Image.open(io.BytesIO(outputs["particles_sheet"].read()))
        back = placed.wait().outputs
        found = trimesh.load_scene(io.BytesIO(back["scene"].read()), file_type="glb")
        labels = back["labels"].to_array()
    assert all(np.ptp(np.asarray(picture.convert("RGB"), int), axis=2).max() > 60 for picture in pictures)
    assert getattr(movie, "n_frames", 1) == 10
    assert sheet.format == "PNG"
    assert back["placed"] == len(truth)
    assert {f"particle {number}" for number in truth["id"]} <= set(found.graph.nodes)
    # The scene and the volume of labels agree on what is where.
    column = truth.iloc[0]
    assert labels[round(column["z"]), round(column["y"]), round(column["x"])] > 0
