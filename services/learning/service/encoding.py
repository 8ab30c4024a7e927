"""What all operations that encode subtomograms share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.particles import Particles
from cryofleet.progress import Progress
from cryofleet.server import Reader, Task
from services.learning import autoencoder, cluster_model, clustering, datasets
from services.learning.autoencoder import Autoencoder3D
from services.learning.cluster_model import ClusterModel
from services.learning.pose_normalisation import Poses
from services.learning.preparation import Preparation
from services.learning.service import inputs

AUTOENCODERS = (autoencoder.NAME, cluster_model.NAME)
"""Architectures that give codes."""


@dataclass(frozen=True)
class EncodingSet:
    """Subtomograms, what is done to them, and the config of the model that encodes them."""

    chosen: inputs.Chosen
    preparation: Preparation
    config: Mapping[str, Any]

    @property
    def memory_bytes(self) -> int:
        """Of encoding and decoding, the codes with it."""
        side = self.preparation.prepared_size
        # The particle table and the codes as float32 and float64.
        rows = len(self.chosen) * (1000 + 16 * autoencoder.CODE_SIZE)
        layers = inputs.INFERENCE_LAYERS * clustering.batch_bytes(side)
        # Weights as bytes, as tensors and in the network.
        weights = 3 * autoencoder.weight_bytes(side)
        return inputs.BASE_BYTES + datasets.loading_bytes(self.preparation) + rows + layers + weights


def encoding_set(
    reader: Reader,
    subtomograms_uri: str,
    model_uri: str,
    particles_uri: str = "",
    architectures: tuple[str, ...] = AUTOENCODERS,
) -> EncodingSet:
    """Raises FailedPrecondition where the model is of none of the architectures, or not for such subtomograms."""
    config = inputs.model_config(reader, model_uri, *architectures)
    cluster_model.autoencoder_config(config)
    chosen = inputs.chosen(reader, subtomograms_uri, particles_uri)
    inputs.check_fits(config, chosen.subtomograms)
    preparation = inputs.preparation(chosen.subtomograms, config["binning"], config["pose_normalisation"])
    return EncodingSet(chosen, preparation, config)


def open_autoencoder(task: Task, model_uri: str) -> tuple[Autoencoder3D, ClusterModel | None]:
    """The autoencoder on the task's device, and the model of clusters that it is part of, if it is."""
    _, model = inputs.open_model(task, model_uri, *AUTOENCODERS)
    model = model.to(torch.device(task.device))
    if isinstance(model, ClusterModel):
        return model.autoencoder, model
    assert isinstance(model, Autoencoder3D)
    return model, None


@dataclass(frozen=True)
class Encoded:
    """Codes (n, 32), row by row, and the poses (in binned voxels) that boxes were normalised from, where they were."""

    codes: NDArray[np.float32]
    poses: list[Poses]

    def write_posed(self, task: Task, what: EncodingSet, particles: Particles) -> str:
        """Writes the particles with those poses, which take a decoded centre to where its member is; the table's URI,
        empty where no poses were normalised.
        """
        if not self.poses:
            return ""
        axes = np.concatenate([poses.axes for poses in self.poses])
        centres = np.concatenate([poses.centres for poses in self.poses])
        voxel = what.chosen.info.voxel_size_angstrom * what.preparation.binning / particles.voxel_size_angstrom
        x, y, z = (centres * voxel).T
        posed = particles.with_rotations(Rotation.from_matrix(axes)).with_columns(shift_x=x, shift_y=y, shift_z=z)
        return task.write_particles("posed-particles.parquet", posed)


def encode(task: Task, model: Autoencoder3D, what: EncodingSet, progress: Progress) -> Encoded:
    """Encode the chosen subtomograms."""
    poses: list[Poses] = []
    chunks = datasets.prepared_chunks(what.chosen.read, what.chosen.ids, what.preparation, poses.append)
    codes = clustering.encode(model, chunks, len(what.chosen), torch.device(task.device), progress)
    return Encoded(codes, poses)
