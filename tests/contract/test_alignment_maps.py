"""What the alignment service makes of half maps and averages, over real gRPC: resolution, SNR, symmetry, masks."""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
import pytest
import scipy.fft
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.fourier import low_pass
from cryofleet.numerics.fsc import corrected_fsc, fsc, resolution, shell_index
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.masks import soft_sphere
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import alignment_pb2 as pb
from cryofleet.volumes import VolumeInfo, open_volume
from services.alignment.helical import HelicalSymmetry
from services.alignment.service import service
from tests.contract.alignment_inputs import (
    BINNING,
    VOXEL,
    particles_at,
    posed,
    put_particles,
    put_subtomograms,
    put_unsound,
    put_volume,
    refused,
)
from tests.contract.conftest import channel_to
from tests.unit.alignment.samples import asymmetric, sample, symmetric
from tests.unit.alignment.test_helical import helix

BOX = 32
INVALID = grpc.StatusCode.INVALID_ARGUMENT
#: Half maps agree to here.
CUTOFF = 60.0

Volume = NDArray[np.float32]

channel = channel_to(service)


def white(seed: int) -> Volume:
    """A structure of the same power at all frequencies, and in all of the box."""
    return np.random.default_rng(seed).normal(size=(BOX,) * 3).astype(np.float32)


@pytest.fixture(scope="module")
def truth() -> Volume:
    return low_pass(white(1), CUTOFF, VOXEL, edge=1e-3)


def put_halves(store: Store, volume: Volume, noise: float, contrast: str = "light") -> dict[str, Any]:
    """Half maps of a light structure, with white noise of `noise` deviations of it."""
    sign = -1 if contrast == "dark" else 1
    level = noise * float(volume.std())
    noisy = [volume + level * np.random.default_rng(7 + i).normal(size=volume.shape) for i in range(2)]
    return {
        f"half{i + 1}_uri": put_volume(store, f"half{i + 1}", sign * v, contrast=contrast) for i, v in enumerate(noisy)
    }


def at(store: Store, uri: str) -> Volume:
    return open_volume(store, uri).read()


async def result_of(channel: grpc.aio.Channel, request: Any) -> Any:
    return (await call_operation(channel, request)).result


def correlation(a: Volume, b: Volume) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


async def test_resolution_of_half_maps_and_against_the_truth(
    channel: grpc.aio.Channel, store: Store, truth: Volume
) -> None:
    halves = put_halves(store, truth, 1.0, "dark")
    request = pb.ResolutionRequest(**halves, truth_uri=put_volume(store, "truth", truth), seed=1)
    result = await result_of(channel, request)
    # Within a shell of where the structure ends. A mask carries some of it further, of a truth without noise most.
    shell = 1 / (BOX * VOXEL)
    assert 1 / result.unmasked_resolution_angstrom == pytest.approx(1 / CUTOFF, abs=shell)
    mask = soft_sphere(BOX, 0.4 * BOX, 2)
    first, second = (-at(store, uri) for uri in halves.values())
    curves = corrected_fsc(first, second, mask, VOXEL, seed=1)
    frequency, against = fsc(np.float32(0.5) * (first + second), truth, mask)
    assert result.truth_resolution_angstrom == pytest.approx(resolution(frequency, against, VOXEL, 0.5))
    assert result.resolution_angstrom == pytest.approx(curves.resolution_angstrom())
    assert result.resolution_angstrom >= result.masked_resolution_angstrom
    table = json.loads(store.get(result.fsc_uri))
    assert table["frequency_per_angstrom"][1] == pytest.approx(shell)
    last = round(BOX * VOXEL / CUTOFF)
    assert min(table["unmasked"][1 : last - 1]) > 0.9
    assert abs(np.mean(table["unmasked"][last + 2 :])) < 0.05
    assert table["masked"] == pytest.approx(curves.masked)
    assert table["corrected"] == pytest.approx(curves.corrected)
    assert table["truth"] == pytest.approx(against)
    half = np.array(table["corrected"][1 : last - 1])
    assert table["spectral_snr"][1 : last - 1] == pytest.approx(2 * half / (1 - half))
    np.testing.assert_allclose(at(store, result.mask_uri), mask, atol=1e-6)


async def test_resolution_under_a_mask_from_the_average(channel: grpc.aio.Channel, store: Store) -> None:
    ball = soft_sphere(BOX, 6, 2)
    halves = put_halves(store, ball, 0.3)
    result = await result_of(channel, pb.ResolutionRequest(**halves, mask_source=pb.MASK_SOURCE_AUTO))
    assert result.resolution_angstrom > 0
    mask = at(store, result.mask_uri)
    assert mask[ball > 0.5].min() > 0.99
    assert 0 < mask.mean() < 0.3
    given = await result_of(channel, pb.ResolutionRequest(**halves, mask_uri=result.mask_uri))
    assert given.resolution_angstrom == result.resolution_angstrom


async def test_local_resolution_and_the_average_filtered_by_it(
    channel: grpc.aio.Channel, store: Store, truth: Volume
) -> None:
    request = pb.LocalResolutionRequest(**put_halves(store, truth, 0.3, "dark"))
    result = await result_of(channel, request)
    # The bands are 12% apart.
    assert result.median_angstrom == pytest.approx(CUTOFF, rel=0.15)
    assert result.finest_angstrom <= result.median_angstrom <= result.coarsest_angstrom
    inside = soft_sphere(BOX, 0.4 * BOX, 2) >= 0.5
    assert np.median(at(store, result.resolution_uri)[inside]) == pytest.approx(result.median_angstrom)
    filtered = open_volume(store, result.filtered_uri)
    assert filtered.info.contrast == "dark"
    mean = sum(at(store, uri) for uri in (request.half1_uri, request.half2_uri))
    assert correlation(filtered.read(), -truth) > correlation(np.asarray(mean), -truth) + 0.01
    request.filter = False
    assert (await result_of(channel, request)).filtered_uri == ""


async def test_the_snr_of_particles_and_of_their_average(
    channel: grpc.aio.Channel, store: Store, truth: Volume
) -> None:
    box, snr = 24, 0.5
    data = sample(asymmetric(1), box, 20, snr, wedge=(-60, 60))
    order = np.random.default_rng(0).permutation(20)
    request = pb.EstimateSnrRequest(
        subtomograms_uri=put_subtomograms(store, "a" * 64, data.particles),
        particles_uri=put_particles(store, "posed", posed(data.rotations[order], data.shifts[order], 100 + order)),
        **put_halves(store, truth, 0.5),
    )
    result = await result_of(channel, request)
    assert result.pairs == 20
    assert result.snr == pytest.approx(snr, abs=3 * result.snr_error)
    assert result.snr_error < 0.2 * snr
    assert result.snr == pytest.approx(result.correlation / (1 - result.correlation))
    table = json.loads(store.get(result.spectrum_uri))
    assert len(table["spectral_snr"]) == len(table["frequency_per_angstrom"]) == box // 2
    # Two halves with noise of a quarter of the structure's power in the whole box, which is white up to the cutoff.
    shells = BOX**3 / float((np.abs(scipy.fft.fftn(truth)) > 1e-3 * BOX**1.5).sum())
    expected = 2 * shells / 0.25
    # A tenth of what a few thousand components tell, and the shells' edges.
    assert np.median(table["average"]["spectral_snr"][2:5]) == pytest.approx(expected, rel=0.5)
    # Without poses of their own there is nothing to go by.
    request.particles_uri = ""
    await refused(channel, request, grpc.StatusCode.FAILED_PRECONDITION, "holds no rotations")
    few = posed(data.rotations[:3], data.shifts[:3])
    request.particles_uri = put_particles(store, "few", few)
    await refused(channel, request, INVALID, "at least 4 particles")
    request.half2_uri = ""
    await refused(channel, request, INVALID, "both half maps")


async def test_the_symmetry_of_an_average_and_its_frame(channel: grpc.aio.Channel, store: Store) -> None:
    tilt, shift = Rotation.from_rotvec([0.7, -0.4, 1.0]), np.array([1.2, -0.8, 0.5])
    volume = symmetric("C4", count=2).volume(BOX, tilt, shift)
    rotation, moved = Rotation.from_rotvec([[0.3, 0.5, -0.2]]), np.array([[0.5, -1.0, 0.8]])
    request = pb.DetectSymmetryRequest(
        **put_halves(store, volume, 0.3, "dark"),
        candidates=["C2", "C4", "D4", "C3"],
        turn=True,
        particles_uri=put_particles(store, "posed", posed(rotation, moved)),
    )
    result = await result_of(channel, request)
    assert result.symmetry == "C4"
    table = json.loads(store.get(result.table_uri))
    assert [group["group"] for group in table["groups"] if group["fits"]] == ["C4"]
    assert len(table["groups"]) == 4
    centre = np.array([result.centre_x_voxels, result.centre_y_voxels, result.centre_z_voxels])
    # Any point of the axis will do.
    assert np.linalg.norm(np.cross(centre - shift, tilt.apply([0, 0, 1]))) < 0.3
    turned = at(store, result.average_uri)
    quarter = transform_volume(turned, Rotation.from_rotvec([0, 0, 90], degrees=True))
    inner = soft_sphere(BOX, 0.4 * BOX, 0)
    assert correlation(turned * inner, quarter * inner) > 0.9
    assert open_volume(store, result.half1_uri).info.contrast == "dark"
    assert 0.5 < correlation(at(store, result.half1_uri), at(store, result.half2_uri)) < 1
    # A particle looks the same from the average as it was and from the turned one.
    particle = particles_at(store, result.particles_uri)
    pose = particle.rotations()
    assert pose is not None
    seen = transform_volume(turned, pose[0], particle.shifts()[0] / BINNING)
    assert correlation(seen * inner, transform_volume(-volume, rotation[0], moved[0]) * inner) > 0.9
    # Nothing is turned where that was not asked for.
    request.turn = False
    request.particles_uri = ""
    plain = await result_of(channel, request)
    assert (plain.average_uri, plain.particles_uri) == ("", "")


async def test_a_helix_is_found_and_imposed(channel: grpc.aio.Channel, store: Store) -> None:
    box, voxel = 40, 6.0
    rotation, shift = Rotation.from_rotvec([0.3, -0.2, 0.4]), np.array([1.1, -0.7, 0.4])
    symmetry = HelicalSymmetry(30.0, 25.0, 3)
    volume = helix(symmetry, rotation=rotation, shift=shift) * soft_sphere(box, 16, 3)
    noise = np.random.default_rng(0).normal(size=volume.shape) * 0.3 * volume.std()
    request = pb.FindHelixRequest(
        volume_uri=put_volume(store, "filament", -(volume + noise), voxel, "dark"),
        min_rise_angstrom=26,
        max_rise_angstrom=34,
        min_twist_degrees=10,
        max_twist_degrees=50,
        order=3,
        outer_radius_angstrom=60,
    )
    result = await result_of(channel, request)
    assert result.rise_angstrom == pytest.approx(symmetry.rise_angstrom, rel=0.01)
    assert result.twist_degrees == pytest.approx(symmetry.twist_degrees, rel=0.01)
    assert result.score > 0.9
    direction = Rotation.from_quat([result.qx, result.qy, result.qz, result.qw]).apply([0, 0, 1])
    assert abs(direction @ rotation.apply([0, 0, 1])) > np.cos(np.radians(1))
    symmetrised = open_volume(store, result.symmetrised_uri)
    assert symmetrised.info == VolumeInfo((box,) * 3, voxel, "dark")
    coverage = at(store, result.coverage_uri)
    filled = coverage > 0
    # In the middle there are the subunits that lie in the central part of the box.
    assert coverage.max() == pytest.approx(3 * 0.6 * box * voxel / symmetry.rise_angstrom, abs=4.5)
    # Up to a turn about the axis and a move along it, of which the upright map knows.
    inner = soft_sphere(box, 9, 0) * filled
    assert correlation(symmetrised.read() * inner, at(store, result.upright_uri) * inner) > 0.9
    table = json.loads(store.get(result.candidates_uri))
    assert table["best"]["rise_angstrom"] == result.rise_angstrom
    assert table["best"]["hand"] == "right"
    assert 1 <= len(table["candidates"]) <= 5
    request.max_rise_angstrom = 20
    await refused(channel, request, INVALID, "rises from 26 to 20")
    request.max_rise_angstrom = 34
    request.outer_radius_angstrom = 500
    await refused(channel, request, INVALID, "outer_radius_angstrom 500")


async def test_sharpening_undoes_a_b_factor(channel: grpc.aio.Channel, store: Store) -> None:
    b, cut = -6000.0, 36.0
    frequency = shell_index(BOX) / (BOX * VOXEL)
    flat = white(3)
    blurred = scipy.fft.irfftn(scipy.fft.rfftn(flat) * np.exp(b * frequency**2 / 4), flat.shape).astype(np.float32)
    request = pb.SharpenRequest(
        **put_halves(store, blurred, 0.0, "dark"), resolution_angstrom=cut, b_factor_angstrom2=b
    )
    result = await result_of(channel, request)
    assert result.b_factor_angstrom2 == b
    assert result.guinier_uri == ""
    expected = low_pass(flat, cut, VOXEL, edge=1 / BOX)
    assert open_volume(store, result.sharpened_uri).info.contrast == "dark"
    assert correlation(at(store, result.sharpened_uri), -expected) > 0.99
    request.ClearField("b_factor_angstrom2")
    await refused(channel, request, INVALID, "b_factor_angstrom2 or fit_from_angstrom")
    request.fit_from_angstrom = 130
    fitted = await result_of(channel, request)
    guinier = json.loads(store.get(fitted.guinier_uri))
    # Amplitudes of some thousand components each: the line's own error says how well B is known.
    assert fitted.b_factor_angstrom2 == pytest.approx(b, abs=4 * guinier["standard_error_angstrom2"] + 0.03 * abs(b))


async def test_masks_of_all_shapes(channel: grpc.aio.Channel, store: Store) -> None:
    volume = -symmetric("D7", count=2).volume(BOX)
    uri = put_volume(store, "average", volume, contrast="dark")

    async def mask(shape: Any, **options: Any) -> Volume:
        result = await result_of(channel, pb.MakeMaskRequest(volume_uri=uri, shape=shape, **options))
        found = at(store, result.mask_uri)
        assert result.share == pytest.approx(found.mean(), rel=1e-5)
        assert found.min() == 0
        assert found.max() == 1
        return found

    # A hard edge: volumes in voxels, to the few percent of a surface of voxels.
    r, h = 120 / VOXEL, 100 / VOXEL
    sphere = await mask(pb.MASK_SHAPE_SPHERE, radii_angstrom=[120], edge_angstrom=0)
    assert sphere.sum() == pytest.approx(4 / 3 * np.pi * r**3, rel=0.03)
    cylinder = await mask(pb.MASK_SHAPE_CYLINDER, radii_angstrom=[120], height_angstrom=2 * 100 + 6, edge_angstrom=0)
    assert cylinder.sum() == pytest.approx(np.pi * r**2 * (2 * np.floor(h + 0.25) + 1), rel=0.03)
    ellipsoid = await mask(pb.MASK_SHAPE_ELLIPSOID, radii_angstrom=[120, 96, 72], edge_angstrom=0)
    assert ellipsoid.sum() == pytest.approx(4 / 3 * np.pi * 10 * 8 * 6, rel=0.04)
    middle = BOX // 2
    # x is the longest of them, and the last of the array's axes.
    assert ellipsoid[middle, middle, middle + 9] == 1
    assert ellipsoid[middle + 9, middle, middle] == 0
    auto = await mask(pb.MASK_SHAPE_AUTO)
    assert auto[volume < 0.5 * volume.min()].min() > 0.9
    uri = put_volume(store, "ball", sphere)
    grown = await mask(pb.MASK_SHAPE_DILATE, dilation_angstrom=36, edge_angstrom=0)
    assert grown.sum() == pytest.approx(4 / 3 * np.pi * (r + 3) ** 3, rel=0.05)

    def request(shape: Any, **options: Any) -> pb.MakeMaskRequest:
        return pb.MakeMaskRequest(volume_uri=uri, shape=shape, **options)

    await refused(channel, request(pb.MASK_SHAPE_ELLIPSOID, radii_angstrom=[50]), INVALID, "ellipsoid takes 3")
    await refused(channel, request(pb.MASK_SHAPE_CYLINDER, radii_angstrom=[50]), INVALID, "height_angstrom")
    sphere_with_height = request(pb.MASK_SHAPE_SPHERE, radii_angstrom=[50], height_angstrom=3)
    await refused(channel, sphere_with_height, INVALID, "sphere takes no height_angstrom")
    await refused(channel, request(pb.MASK_SHAPE_DILATE, threshold=2), INVALID, "ball.mrc", "above the threshold")
    await refused(channel, request(pb.MASK_SHAPE_UNSPECIFIED), INVALID, "shape")


async def test_half_maps_that_do_not_fit_are_named(channel: grpc.aio.Channel, store: Store, truth: Volume) -> None:
    good = put_volume(store, "good", truth)
    bad = {
        "small": (put_volume(store, "small", truth[2:-2, 2:-2, 2:-2]), "(28, 28, 28)"),
        "coarse": (put_volume(store, "coarse", truth, 13.0), "13 Å"),
        "flat": (put_volume(store, "flat", np.ones_like(truth)), "constant"),
        "unsound": (put_unsound(store, "unsound", truth), "not finite"),
        "dark": (put_volume(store, "dark", truth, contrast="dark"), "one contrast"),
        "slab": (put_volume(store, "slab", truth[:8]), "cubic"),
    }
    for name, (uri, words) in bad.items():
        for kind in (pb.ResolutionRequest, pb.LocalResolutionRequest, pb.DetectSymmetryRequest):
            request = kind(half1_uri=good, half2_uri=uri)
            await refused(channel, request, INVALID, f"{name}.mrc", words)
    mask = put_volume(store, "mask", np.full_like(truth, 2))
    request = pb.ResolutionRequest(half1_uri=good, half2_uri=good, mask_uri=mask)
    await refused(channel, request, INVALID, "mask.mrc", "0 to 1")
    request.mask_uri = put_volume(store, "empty", np.zeros_like(truth))
    await refused(channel, request, INVALID, "empty.mrc", "zero everywhere")
    request.mask_uri = f"{store.root}/default/inputs/none.mrc"
    await refused(channel, request, grpc.StatusCode.NOT_FOUND, "none.mrc")
