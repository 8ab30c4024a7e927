"""What other programs see in files: run in their environments, which have nothing of Cryofleet.

python readers.py NAME FILE prints JSON: places (x, y, z) as the program's user gets them, and where it has them the
matrices that take the reference onto the particle.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib import import_module
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

warnings.simplefilter("ignore")


def cryocat(path: str, kind: str) -> tuple[Any, Any]:
    """Motive lists: the place is the sum of coordinates and shifts; zxz of phi, theta, psi turns the reference."""
    motl = import_module("cryocat.cryomotl").Motl.load(path, motl_type=kind)
    return motl.get_coordinates(), motl.get_rotations().as_matrix()


def cryocat_relion(path: str) -> tuple[Any, Any]:
    motl = import_module("cryocat.cryomotl").RelionMotl(path, pixel_size=4.0, binning=1.0)
    return motl.get_coordinates(), motl.get_rotations().as_matrix()


def dynamotable(path: str) -> tuple[Any, Any]:
    table = import_module("dynamotable").read(path)
    places = table[["x", "y", "z"]].to_numpy() + table[["dx", "dy", "dz"]].to_numpy()
    # Dynamo's own definition: the particle is turned back by tdrot about z, tilt about x, narot about z
    angles = table[["tdrot", "tilt", "narot"]].to_numpy(float)
    return places, Rotation.from_euler("zxz", angles, degrees=True).inv().as_matrix()


def emfile(path: str) -> tuple[Any, Any]:
    _, rows = import_module("emfile").read(path)
    rows = np.asarray(rows)[0]
    turned = Rotation.from_euler("zxz", rows[:, [16, 18, 17]], degrees=True)
    return rows[:, 7:10] + rows[:, 10:13], turned.as_matrix()


def imodmodel(path: str) -> tuple[Any, Any]:
    return import_module("imodmodel").read(path)[["x", "y", "z"]].to_numpy(), None


def starfile(path: str) -> tuple[Any, Any]:
    tables = import_module("starfile").read(path, always_dict=True)
    table = tables["particles"]
    size = float(tables["optics"]["rlnTomoTiltSeriesPixelSize"].iloc[0])
    origins = table[[f"rlnOrigin{axis}Angst" for axis in "XYZ"]].to_numpy() / size
    angles = table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()
    matrices = Rotation.from_euler("ZYZ", angles, degrees=True).inv().as_matrix()
    return table[[f"rlnCoordinate{axis}" for axis in "XYZ"]].to_numpy() - origins, matrices


def copick(path: str) -> tuple[Any, Any]:
    root = import_module("copick").from_file(path)
    places, matrices = [], []
    for run in root.runs:
        for picks in run.picks:
            assert picks.trust_orientation
            assert root.get_object(picks.pickable_object_name) is not None
            for point in picks.points:
                location = point.location
                places.append(np.array([location.x, location.y, location.z]) + point.transformation[:3, 3])
                matrices.append(point.transformation[:3, :3])
    return np.array(places), np.array(matrices)


def ome_zarr(path: str) -> None:
    """An OME-Zarr's levels, as ome-zarr gives them, to volume.npz; its metadata are held to the schema of 0.4."""
    import_module("ome_zarr_models.v04").Image.from_zarr(import_module("zarr").open_group(path, mode="r"))
    node = next(iter(import_module("ome_zarr.reader").Reader(import_module("ome_zarr.io").parse_url(path))()))
    levels: Any = {f"level{k}": np.asarray(level) for k, level in enumerate(node.data)}
    steps = node.metadata["coordinateTransformations"]
    np.savez(
        "volume.npz",
        scale=[each[0]["scale"] for each in steps],
        translation=[each[1]["translation"] for each in steps],
        **levels,
    )


def zipped_zarr(path: str) -> None:
    """The finest level of a zipped one, as zarr opens it, to volume.npz."""
    storage = import_module("zarr").storage.ZipStore(path, mode="r")
    np.savez("volume.npz", level0=import_module("zarr").open_group(storage, mode="r")["0"][:])


def em_volume(path: str) -> None:
    """The voxels of an EM file, to volume.npz."""
    np.savez("volume.npz", level0=import_module("emfile").read(path)[1])


if __name__ == "__main__":
    name, file, *options = sys.argv[1:]
    if name in ("ome_zarr", "zipped_zarr", "em_volume"):
        globals()[name](file)
        sys.exit()
    found, turned = globals()[name](file, *options)
    rotations = None if turned is None else np.asarray(turned).tolist()
    print(json.dumps({"places": np.asarray(found, float).tolist(), "matrices": rotations}))
