"""Conformations: boxes turned into the average's frame, the loss of what was imaged, and a domain that swings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from scipy.stats import spearmanr

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.fourier import apply_transfer, low_pass
from cryofleet.numerics.rotations import uniform_random
from cryofleet.numerics.wedge import wedge_mask
from cryofleet.progress import no_progress
from services.learning import (
    architectures,
    conformation,
    conformation_boxes,
    conformation_path,
    datasets,
    orientation_share,
    training,
)
from tests.unit.learning.moving_domain import TILTS, domain_centre, structure, subtomograms
from tests.unit.learning.shapes import correlation

CPU = torch.device("cpu")
SIDE = 16
CUTOFF = 0.3
Array = NDArray[np.float32]


def network(seed: int = 0, cutoff: float = CUTOFF) -> conformation.ConformationAutoencoder:
    return conformation.ConformationAutoencoder(SIDE, 3, cutoff, TILTS, training.generator_for(seed))


def test_boxes_are_turned_back_onto_the_reference() -> None:
    sphere = conformation.box_sphere(24)
    reference = low_pass(structure(0.3, 24), 1.0, 5.0) * sphere
    for seed in range(3):
        random = np.random.default_rng(seed)
        rotation = uniform_random(1, random)[0]
        shift = random.uniform(-2, 2, 3)
        particle = structure(0.3, 24, rotation, tuple(shift))
        back = conformation_boxes.turned_to_average(particle, rotation, shift) * sphere
        assert correlation(low_pass(back, 1.0, 5.0), reference) > 0.995
        assert correlation(particle * sphere, reference) < 0.9


def test_the_wedge_is_turned_with_the_box() -> None:
    """White noise behind a wedge, turned: its power lies where the turned wedge says."""
    random = np.random.default_rng(0)
    model = network()
    for turn in (Rotation.identity(), Rotation.from_euler("zyx", [40, 70, 10], degrees=True)):
        noise = random.standard_normal((24, 24, 24)).astype(np.float32)
        box = apply_transfer(noise, wedge_mask((24,) * 3, *TILTS, half=True))
        back = conformation_boxes.turned_to_average(box, turn, np.zeros(3)) * conformation.box_sphere(24)
        power = np.abs(np.fft.rfftn(back)) ** 2
        seen = conformation_boxes.observed(24, turn, TILTS)
        band = (conformation.band(24, 0.35) > 0.5) & (conformation.band(24, 0.1) == 0)
        assert 0.6 < seen[band].mean() < 0.73, "two thirds of all angles"
        # The sphere smears a fifth of it across the wedge's edges.
        assert power[band & ~seen].mean() < 0.3 * power[band & seen].mean()
        unturned = conformation_boxes.observed(24, Rotation.identity(), TILTS)
        if turn.magnitude() > 0:
            assert power[band & ~unturned].mean() > 0.5 * power[band & unturned].mean()
        # The network's own wedge is the same, but for rounding at its edges.
        matrices = torch.from_numpy(turn.as_matrix()[None].astype(np.float32))
        mine = model.observed(matrices)[0].numpy() > 0
        assert (mine != conformation_boxes.observed(SIDE, turn, TILTS)).mean() < 0.01


def test_the_average_and_the_differences(tmp_path: Path) -> None:
    """Of one structure in many orientations: each component is seen by some, and nothing differs."""
    random = np.random.default_rng(0)
    rotations = uniform_random(24, random)
    wedge = wedge_mask((24,) * 3, *TILTS, half=True)
    boxes = np.stack([apply_transfer(structure(0, 24, rotations[i]), wedge) for i in range(24)])

    def differences(limit: int) -> tuple[Array, Array]:
        return conformation_boxes.differences(
            [(0, boxes[:10]), (10, boxes[10:])], rotations, np.zeros((24, 3)), box_size=24, tilts=TILTS, cutoff=0.2,
            scratch=tmp_path, memory_limit_bytes=limit, progress=no_progress,
        )  # fmt: skip

    average, found = differences(1 << 30)
    sphere = conformation.box_sphere(24)
    true = structure(0, 24) * sphere
    expected = apply_transfer(true, conformation.band(24, 0.2))
    assert correlation(average * sphere, expected * sphere) > 0.99
    # What is cut off by the sphere, and interpolation, leave a little.
    assert found.std() < 0.2 * expected.std()
    mapped = differences(1000)
    np.testing.assert_array_equal(mapped[0], average)
    np.testing.assert_array_equal(mapped[1], found)
    assert isinstance(mapped[1], np.memmap)


def test_the_loss_compares_what_was_imaged_alone() -> None:
    model = network().eval()
    random = training.generator_for(5)
    rotations = torch.from_numpy(uniform_random(4, np.random.default_rng(0)).as_matrix().astype(np.float32))
    observed = model.observed(rotations)
    volumes = torch.randn(4, SIDE, SIDE, SIDE, generator=random)
    with torch.no_grad():
        boxes = (model.sphere * model.filtered(volumes, observed * model.band))[:, None]
        batch = {"boxes": boxes, "rotations": rotations}
        values = conformation.ConformationLoss()(model, batch, random)
        points = model.encode(boxes, observed)
        change = model.change(points)
        # In numpy, particle by particle.
        sphere = conformation.box_sphere(SIDE)
        errors = []
        for i in range(4):
            spectrum = np.fft.rfftn(change[i].numpy()) * observed[i].numpy()
            imaged = sphere * np.fft.irfftn(spectrum, s=(SIDE,) * 3, axes=(0, 1, 2))
            errors.append(((boxes[i, 0].numpy() - imaged) ** 2).sum() / (sphere**2).sum())
        assert float(values["error"]) == pytest.approx(np.mean(errors), rel=1e-4)
        # What was not imaged does not count: a change there alone is none.
        hidden = model.filtered(volumes, (1 - observed) * model.band)
        assert float(model.filtered(hidden, observed).abs().max()) < 1e-4 * float(hidden.abs().max())


def test_changes_stay_in_the_mask_and_the_band() -> None:
    model = network(cutoff=0.5)
    half = torch.zeros(SIDE, SIDE, SIDE)
    half[:, :, 8:] = 1
    model.mask.copy_(half)
    with torch.no_grad():
        change = model.change(torch.ones(2, 3)).numpy()
        # Components from Nyquist on are cut off, which spreads a little of them.
        assert np.abs(change[:, :, :, 1:7]).max() < 0.1 * np.abs(change).max()
        change = network(cutoff=0.2).change(torch.ones(2, 3)).numpy()
    power = np.abs(np.fft.rfftn(change, axes=(1, 2, 3)))
    assert power[:, conformation.band(SIDE, 0.2) == 0].max() < 1e-5 * power.max()


@dataclass(frozen=True)
class Swing:
    """A network trained on a domain that swings."""

    model: conformation.ConformationAutoencoder
    differences: Array
    rotations: Rotation
    motions: NDArray[np.float64]
    points: NDArray[np.float64]

    def points_after(self, fills: int) -> NDArray[np.float64]:
        with torch.inference_mode():
            turns = torch.from_numpy(self.rotations.as_matrix().astype(np.float32))
            boxes = torch.from_numpy(self.differences)[:, None]
            return self.model.encode(boxes, self.model.observed(turns), fills).numpy().astype(np.float64)


@pytest.fixture(scope="module")
def swing(tmp_path_factory: pytest.TempPathFactory) -> Swing:
    boxes, motions, rotations, shifts = subtomograms(128, SIDE, 0, noise=0.25)
    average, differences = conformation_boxes.differences(
        [(0, boxes / boxes.std())], rotations, shifts, box_size=SIDE, tilts=TILTS, cutoff=CUTOFF,
        scratch=tmp_path_factory.mktemp("swing"), memory_limit_bytes=1 << 30, progress=no_progress,
    )  # fmt: skip
    turns = rotations.as_matrix().astype(np.float32)
    training.use_deterministic_algorithms(1)

    def build(generator: torch.Generator) -> torch.nn.Module:
        model = conformation.ConformationAutoencoder(SIDE, 3, CUTOFF, TILTS, generator)
        model.average.copy_(torch.from_numpy(average))
        return model

    rows, held_back = datasets.split_rows(128, 0.1, 0)
    trained = training.train(
        build,
        conformation.ConformationLoss(),
        datasets.ArrayBatches(
            {"boxes": differences, "rotations": turns}, rows, held_back, batch_size=16, seed=0, device=CPU
        ),
        training.TrainingOptions(max_epochs=10, patience_epochs=10, learning_rate=0.003, seed=0),
        device=CPU,
        progress=no_progress,
        save_checkpoint=lambda files: None,
    )
    assert isinstance(trained.model, conformation.ConformationAutoencoder)
    points = conformation.points_of(trained.model, differences, turns, CPU, no_progress)
    return Swing(trained.model, differences, rotations, motions, points.astype(np.float64))


def test_the_first_component_is_the_motion(swing: Swing) -> None:
    mean, components, _ = conformation_path.principal_components(swing.points)
    places = (swing.points - mean) @ components[0]
    # Points without any motion in them would correlate by less than 0.25 in 99 of 100 sets of 128; what noise of 1.5
    # times the structure's standard deviation leaves is far more.
    assert abs(spearmanr(places, swing.motions).statistic) > 0.85


def test_the_path_moves_the_domain(swing: Swing) -> None:
    path = conformation_path.along_component(swing.points, 1, 5)
    volumes = conformation.volumes_of(swing.model, path.astype(np.float32), CPU, no_progress)
    mean, components, _ = conformation_path.principal_components(swing.points)
    places = (swing.points - mean) @ components[0]
    sign = np.sign(spearmanr(places, swing.motions).statistic)
    z, y, x = np.mgrid[:SIDE, :SIDE, :SIDE] - SIDE // 2
    near_arc = (np.abs(np.hypot(x, y) - 3.6) < 1.5) & (np.abs(z) <= 1) & (y > 0)
    angles = []
    for volume in volumes:
        density = np.clip(volume, 0, None)[near_arc] ** 2
        angles.append(np.degrees(np.arctan2((density * x[near_arc]).sum(), (density * y[near_arc]).sum())))
    assert (sign * np.diff(angles) > 0).all(), f"the domain swings one way, by {angles}"
    assert abs(angles[-1] - angles[0]) > 50, "most of its 100 degrees, of which the percentiles leave 90"
    for volume, motion in ((volumes[0], -0.8 * sign), (volumes[-1], 0.8 * sign)):
        assert correlation(volume, structure(motion, SIDE)) > correlation(volume, structure(-motion, SIDE)) + 0.15
        assert correlation(volume, structure(motion, SIDE)) > 0.75
    assert domain_centre(1)[0] > 0


def test_points_do_not_tell_orientations(swing: Swing) -> None:
    """Beside what shuffled points tell by chance, points tell under a twentieth of the orientations' variance; and
    without filling in what is missing they would tell more than twice as much.
    """
    told, shuffled = orientation_share.orientation_share(swing.points, swing.rotations)
    once, by_chance = orientation_share.orientation_share(swing.points_after(0), swing.rotations)
    assert told - shuffled.mean() < 0.05
    assert once > by_chance.max()
    assert once - by_chance.mean() > 2 * (told - shuffled.mean())


def test_orientations_that_are_told_are_noticed() -> None:
    random = np.random.default_rng(0)
    rotations = uniform_random(200, random)
    points = random.standard_normal((200, 3))
    told, shuffled = orientation_share.orientation_share(points, rotations)
    assert told < np.percentile(shuffled, 99)
    assert shuffled.mean() == pytest.approx(2 * 3 / 200, rel=0.15)
    points[:, 1] = 5 * rotations.inv().apply([0, 0, 1])[:, 0] ** 2 + 0.1 * points[:, 1]
    told, shuffled = orientation_share.orientation_share(points, rotations)
    assert told > shuffled.max() + 0.05


def test_models_of_another_kind_are_refused() -> None:
    config = conformation.config(SIDE, 3, CUTOFF, TILTS)
    assert isinstance(architectures.build(config), conformation.ConformationAutoencoder)
    for change in (
        {"architecture": "autoencoder3d"},
        {"architecture_version": 2},
        {"box_size": 18},
        {"box_size": 16.0},
        {"dimensions": 0},
        {"low_pass_cycles_per_voxel": float("nan")},
        {"low_pass_cycles_per_voxel": 0.7},
        {"tilt_min_degrees": 60},
        {"tilt_max_degrees": None},
    ):
        with pytest.raises(FailedPrecondition):
            conformation.from_config(config | change)


def test_low_passes() -> None:
    assert conformation.cutoff_of(0, 10) == 0.5
    assert conformation.cutoff_of(40, 10) == 0.25
    with pytest.raises(InvalidArgument, match=r"low_pass_angstrom is 15; voxels of 10 Å, .* down to 20 Å"):
        conformation.cutoff_of(15, 10)
    with pytest.raises(InvalidArgument, match="multiple of 4"):
        conformation.check_box_size(18)
