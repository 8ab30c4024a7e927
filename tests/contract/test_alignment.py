"""The alignment service over real gRPC: what it gives, and what it says to requests that can't work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import scipy.fft
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.formats.tilt_series import TiltSeries
from cryofleet.numerics.rotations import angular_distance_degrees, frame_between
from cryofleet.numerics.transfer import tilt_series_transfer
from cryofleet.numerics.wedge import wedge_mask
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import call_operation, file_store, run_operation
from cryofleet.v1 import alignment_pb2, common_pb2
from cryofleet.volumes import VolumeInfo, open_volume
from services.alignment.array_files import unpack
from services.alignment.service import service
from tests.contract.alignment_inputs import (
    BINNING,
    BOX,
    VOXEL,
    WEDGE,
    particles_at,
    posed,
    put_file,
    put_particles,
    put_subtomograms,
    put_unsound,
    put_volume,
    refused,
)
from tests.contract.conftest import channel_to
from tests.unit.alignment.samples import Sample, asymmetric, sample, symmetric

STATUS = grpc.StatusCode

channel = channel_to(service)


@pytest.fixture(scope="module")
def data() -> Sample:
    return sample(asymmetric(1), BOX, 6, 1.0, wedge=WEDGE)


async def test_align_finds_poses_in_the_tomograms_voxels(channel: grpc.aio.Channel, store: Store, data: Sample) -> None:
    # The reference is light, the boxes are dark.
    reply = await call_operation(
        channel,
        alignment_pb2.AlignRequest(
            subtomograms_uri=put_subtomograms(store, "a" * 64, data.particles),
            reference_uri=put_volume(store, "reference", asymmetric(1).volume(BOX)),
            max_candidates=20,
        ),
        timeout=120,
    )
    particles = particles_at(store, reply.result.particles_uri)
    assert reply.result.count == 6
    assert particles.table["id"].tolist() == list(range(100, 106))
    rotations = particles.rotations()
    assert rotations is not None
    assert angular_distance_degrees(data.rotations, rotations).max() < 3
    np.testing.assert_allclose(particles.shifts(), data.shifts * BINNING, atol=0.5 * BINNING)
    assert reply.result.mean_score == pytest.approx(particles.table["score"].mean())
    assert reply.result.mean_score > 0.5


async def test_rows_of_a_set_give_the_same_poses_as_the_whole(
    channel: grpc.aio.Channel, store: Store, data: Sample
) -> None:
    request = alignment_pb2.AlignRequest(
        subtomograms_uri=put_subtomograms(store, "a" * 64, data.particles),
        reference_uri=put_volume(store, "reference", asymmetric(1).volume(BOX)),
        low_pass_angstrom=60,
        high_pass_angstrom=250,
        max_candidates=10,
        max_shift_voxels=3,
    )
    whole = particles_at(store, (await call_operation(channel, request)).result.particles_uri)
    request.rows.CopyFrom(common_pb2.RowRange(first=3, count=2))
    part = particles_at(store, (await call_operation(channel, request)).result.particles_uri)
    assert part.table["id"].tolist() == [103, 104]
    # Batches are cut elsewhere, which may change the last digits.
    np.testing.assert_allclose(part.table["score"], whole.table["score"][3:5], atol=1e-5)
    request.rows.count = 4
    await refused(channel, request, STATUS.INVALID_ARGUMENT, "rows 3 to 6", "has 6")


async def test_average_gives_maps_poses_halves_and_curve(channel: grpc.aio.Channel, store: Store, data: Sample) -> None:
    subtomograms = put_subtomograms(store, "a" * 64, data.particles)
    request = alignment_pb2.AverageRequest(subtomograms_uri=subtomograms, iterations=2, max_candidates=10, seed=3)
    reply = await call_operation(channel, request, timeout=200)
    result = reply.result
    average = open_volume(store, result.average_uri)
    assert average.info == VolumeInfo((BOX, BOX, BOX), VOXEL, "dark")
    centre = slice(BOX // 2 - 3, BOX // 2 + 3)
    assert average.read()[centre, centre, centre].mean() < 0
    particles = particles_at(store, result.particles_uri)
    assert sorted(particles.table["half"]) == [1, 1, 1, 2, 2, 2]
    rotations = particles.rotations()
    assert rotations is not None
    frame = frame_between(data.rotations, rotations)
    assert np.median(angular_distance_degrees(data.rotations, rotations * frame)) < 6
    table = json.loads(store.get(result.fsc_uri))
    assert len(table["frequency_per_angstrom"]) == len(table["fsc"]) == BOX // 2 + 1
    assert table["frequency_per_angstrom"][-1] == pytest.approx(1 / (2 * VOXEL))
    assert table["resolution_angstrom"] == pytest.approx(result.resolution_angstrom)
    assert [set(i) for i in table["iterations"]] == [{"mean_score", "resolution_angstrom", "low_pass_angstrom"}] * 2
    assert result.count == 6
    halves = [open_volume(store, uri).read() for uri in (result.half1_uri, result.half2_uri)]
    assert 0 < np.corrcoef(halves[0].ravel(), halves[1].ravel())[0, 1] < 1


async def test_average_takes_chosen_particles_and_their_poses(
    channel: grpc.aio.Channel, store: Store, data: Sample
) -> None:
    subtomograms = put_subtomograms(store, "a" * 64, data.particles)
    order = [5, 0, 3, 2]
    chosen = posed(data.rotations[order], data.shifts[order], 100 + np.array(order))
    request = alignment_pb2.AverageRequest(
        subtomograms_uri=subtomograms,
        particles_uri=put_particles(store, "chosen", chosen),
        iterations=1,
        max_candidates=10,
    )
    result = (await call_operation(channel, request, timeout=120)).result
    particles = particles_at(store, result.particles_uri)
    assert particles.table["id"].tolist() == [105, 100, 103, 102]
    rotations = particles.rotations()
    assert rotations is not None
    # The frame is that of the poses it began with.
    assert np.median(angular_distance_degrees(data.rotations[order], rotations)) < 10


async def test_average_keeps_half_sets(channel: grpc.aio.Channel, store: Store, data: Sample) -> None:
    """Particles that were averaged in two half sets stay in them, however few are in one: else what refined them
    before is in both."""
    subtomograms = put_subtomograms(store, "a" * 64, data.particles)
    halves = np.array([2, 1, 1, 1, 2, 1])
    known = posed(data.rotations, data.shifts).with_columns(half=halves)
    uri = put_particles(store, "known", known)
    request = alignment_pb2.AverageRequest(
        subtomograms_uri=subtomograms, particles_uri=uri, iterations=1, max_candidates=5
    )
    result = (await call_operation(channel, request, timeout=120)).result
    assert particles_at(store, result.particles_uri).table["half"].tolist() == halves.tolist()
    start = alignment_pb2.AverageStartRequest(subtomograms_uri=subtomograms, particles_uri=uri, max_candidates=5)
    model = (await call_operation(channel, start, timeout=120)).result.model_uri
    assert unpack(store.get(model), "model")["halves"].tolist() == halves.tolist()
    some = known.with_columns(half=np.array([1, 2, 0, 1, 2, 1], np.int32))
    start.particles_uri = put_particles(store, "some", some)
    await refused(channel, start, STATUS.INVALID_ARGUMENT, "particle 102", "has half 0")
    one = known.with_columns(half=np.ones(6, np.int32))
    request.particles_uri = start.particles_uri = put_particles(store, "one", one)
    for refusal in (request, start):
        await refused(channel, refusal, STATUS.INVALID_ARGUMENT, "half set 2 has no particle")


def test_average_goes_on_from_its_checkpoint(tmp_path: Path, data: Sample) -> None:
    class Stopped(Exception):
        pass

    def stop(fraction: float, phase: str = "", **counters: float) -> None:
        # After the first of the two iterations.
        if fraction > 0.8:
            raise Stopped

    def files(folder: str, interrupted: bool) -> list[bytes]:
        store = file_store(tmp_path / folder)
        request = alignment_pb2.AverageRequest(
            subtomograms_uri=put_subtomograms(store, "a" * 64, data.particles[:4]), iterations=2, max_candidates=8
        )
        if interrupted:
            with pytest.raises(Stopped):
                run_operation(service, request, store, progress=stop)
            assert any("_work" in found.uri for found in store.list(f"{store.root}/default"))
        result = run_operation(service, request, store)
        assert not any("_work" in found.uri for found in store.list(f"{store.root}/default"))
        return [store.get(uri) for uri in (result.average_uri, result.particles_uri, result.fsc_uri)]

    assert files("undisturbed", False) == files("interrupted", True)


async def test_inputs_that_do_not_fit_are_named(channel: grpc.aio.Channel, store: Store, data: Sample) -> None:
    subtomograms = put_subtomograms(store, "a" * 64, data.particles)
    volume = asymmetric(1).volume(BOX)

    def request(reference: str, **options: Any) -> alignment_pb2.AlignRequest:
        return alignment_pb2.AlignRequest(subtomograms_uri=subtomograms, reference_uri=reference, **options)

    invalid = STATUS.INVALID_ARGUMENT
    await refused(
        channel, request(put_volume(store, "small", asymmetric(1).volume(16))), invalid, "small.mrc", "(16, 16, 16)"
    )
    coarse = put_volume(store, "coarse", volume, voxel_size_angstrom=12.2)
    await refused(channel, request(coarse), invalid, "coarse.mrc", "12.2 Å")
    flat = put_volume(store, "flat", np.ones_like(volume))
    await refused(channel, request(flat), invalid, "flat.mrc is constant")
    good = put_volume(store, "good", volume)
    await refused(channel, request(good, low_pass_angstrom=-1), invalid, "low_pass_angstrom")
    await refused(channel, request(good, low_pass_angstrom=250), invalid, "low_pass_angstrom 250")
    missing = f"{store.root}/default/inputs/none.mrc"
    await refused(channel, request(missing), STATUS.NOT_FOUND, "none.mrc")


async def test_particles_that_can_not_be_averaged_are_named(
    channel: grpc.aio.Channel, store: Store, data: Sample
) -> None:
    broken = data.particles.copy()
    broken[2] = 3.0
    invalid = STATUS.INVALID_ARGUMENT
    request = alignment_pb2.AverageRequest(subtomograms_uri=put_subtomograms(store, "b" * 64, broken))
    await refused(channel, request, invalid, "particle 102 is constant")
    request.subtomograms_uri = put_subtomograms(store, "c" * 64, data.particles[:1])
    await refused(channel, request, invalid, "at least 2 particles")
    request.subtomograms_uri = put_subtomograms(store, "a" * 64, data.particles)
    stranger = Particles.from_positions(np.zeros((2, 3)), VOXEL, "t", id=np.array([100, 7]))
    request.particles_uri = put_particles(store, "stranger", stranger)
    await refused(channel, request, invalid, "particle 7", "stranger.parquet")
    request.particles_uri = ""
    request.symmetry = "Z3"
    await refused(channel, request, invalid, "symmetry")


def centred_wedge() -> NDArray[np.float32]:
    """The wedge mask of the boxes as other programs have it, zero frequency in the middle."""
    return np.fft.fftshift(wedge_mask((BOX, BOX, BOX), *WEDGE))


async def test_a_wedge_mask_stands_for_the_tilt_range(channel: grpc.aio.Channel, store: Store, data: Sample) -> None:
    request = alignment_pb2.AlignRequest(
        subtomograms_uri=put_subtomograms(store, "a" * 64, data.particles),
        reference_uri=put_volume(store, "reference", asymmetric(1).volume(BOX)),
        max_candidates=8,
    )
    expected = particles_at(store, (await call_operation(channel, request)).result.particles_uri)
    # These boxes do not say what they miss.
    request.subtomograms_uri = put_subtomograms(store, "d" * 64, data.particles, (-90, 90))
    unaware = particles_at(store, (await call_operation(channel, request)).result.particles_uri)
    request.wedge_uri = put_volume(store, "wedge", centred_wedge())
    masked = particles_at(store, (await call_operation(channel, request)).result.particles_uri)
    np.testing.assert_allclose(masked.table["score"], expected.table["score"], atol=1e-5)
    assert masked.table["score"].min() > unaware.table["score"].max()


async def test_components_are_weighted_tilt_by_tilt(channel: grpc.aio.Channel, store: Store) -> None:
    angles = np.arange(-60.0, 61.0, 3.0)
    # At this underfocus the first zero of the CTF lies at 36 Å, and finer detail is upside down.
    series = TiltSeries(
        angles, defocus_um=np.full(len(angles), 6.5), voltage_kv=300, cs_mm=2.7, amplitude_contrast=0.07
    )
    transfer = tilt_series_transfer(series, BOX, VOXEL)
    assert transfer.min() < -0.5
    data = sample(asymmetric(1), BOX, 3, None, wedge=(-90, 90))
    seen = scipy.fft.irfftn(scipy.fft.rfftn(data.particles, axes=(1, 2, 3)) * transfer, axes=(1, 2, 3))
    request = alignment_pb2.AlignRequest(
        subtomograms_uri=put_subtomograms(store, "a" * 64, seen.astype(np.float32)),
        reference_uri=put_volume(store, "reference", asymmetric(1).volume(BOX)),
        low_pass_angstrom=24.5,
        max_candidates=8,
        tilts_uri=put_file(store, "a.json", series.to_json()),
    )
    weighted = (await call_operation(channel, request)).result
    request.weight_by_ctf = False
    unweighted = (await call_operation(channel, request)).result
    assert weighted.mean_score > 0.98
    assert unweighted.mean_score < 0.95
    rotations = particles_at(store, weighted.particles_uri).rotations()
    assert rotations is not None
    assert angular_distance_degrees(data.rotations, rotations).max() < 1
    # What a series does not say can't be weighted by.
    request.tilts_uri = put_file(store, "a.tlt", b"-60\n0\n60\n")
    request.weight_by_ctf = True
    await refused(channel, request, STATUS.FAILED_PRECONDITION, "defocus")


async def test_alignment_stays_around_its_start_and_modulo_symmetry(channel: grpc.aio.Channel, store: Store) -> None:
    data = sample(symmetric("C4"), BOX, 3, 1.0, wedge=WEDGE)
    # A quarter turn about the reference's axis looks the same; this start is 6 degrees off that.
    quarter = data.rotations * Rotation.from_rotvec([0, 0, 90], degrees=True)
    start = Rotation.from_rotvec([0, 6, 0], degrees=True) * quarter
    order = [2, 0]
    request = alignment_pb2.AlignRequest(
        subtomograms_uri=put_subtomograms(store, "a" * 64, data.particles),
        reference_uri=put_volume(store, "reference", symmetric("C4").volume(BOX)),
        particles_uri=put_particles(store, "start", posed(start[order], data.shifts[order], 100 + np.array(order))),
        mask_uri=put_volume(store, "mask", np.ones((BOX,) * 3)),
        max_angle_degrees=12,
        max_shift_voxels=1,
        symmetry="C4",
        max_candidates=10,
    )
    found = particles_at(store, (await call_operation(channel, request)).result.particles_uri)
    assert found.table["id"].tolist() == [102, 100]
    rotations = found.rotations()
    assert rotations is not None
    assert angular_distance_degrees(quarter[order], rotations).max() < 3
    np.testing.assert_allclose(found.shifts(), data.shifts[order] * BINNING, atol=0.5 * BINNING)
    request.rows.CopyFrom(common_pb2.RowRange(first=1, count=1))
    one = particles_at(store, (await call_operation(channel, request)).result.particles_uri)
    assert one.table["id"].tolist() == [100]
    request.particles_uri = ""
    await refused(channel, request, STATUS.FAILED_PRECONDITION, "max_angle_degrees", "particles_uri")


async def test_what_imaging_left_must_fit_the_boxes(channel: grpc.aio.Channel, store: Store, data: Sample) -> None:
    subtomograms = put_subtomograms(store, "a" * 64, data.particles)
    invalid = STATUS.INVALID_ARGUMENT
    wedge = centred_wedge()

    def request(uri: str, **options: Any) -> alignment_pb2.AverageRequest:
        return alignment_pb2.AverageRequest(subtomograms_uri=subtomograms, wedge_uri=uri, **options)

    small = put_volume(store, "small-wedge", wedge[4:-4, 4:-4, 4:-4])
    await refused(channel, request(small), invalid, "small-wedge.mrc", "(16, 16, 16)", "(24, 24, 24)")
    nothing = put_volume(store, "nothing", np.zeros_like(wedge))
    await refused(channel, request(nothing), invalid, "nothing.mrc is zero everywhere")
    unsound = put_unsound(store, "unsound", wedge)
    await refused(channel, request(unsound), invalid, "unsound.mrc", "not finite")
    shifted = put_volume(store, "half", np.where(np.arange(BOX) < BOX // 2, wedge, np.float32(0)))
    await refused(channel, request(shifted), invalid, "half.mrc", "not symmetric")
    await refused(channel, request(nothing, tilts_uri=nothing), invalid, "wedge_uri or tilts_uri")
    bad = alignment_pb2.AlignRequest(
        subtomograms_uri=subtomograms,
        reference_uri=put_volume(store, "reference", asymmetric(1).volume(BOX)),
        mask_uri=put_volume(store, "twos", np.full((BOX,) * 3, 2.0)),
    )
    await refused(channel, bad, invalid, "twos.mrc", "0 to 1")
    bad.mask_uri = ""
    bad.reference_uri = put_unsound(store, "broken", asymmetric(1).volume(BOX))
    await refused(channel, bad, invalid, "broken.mrc", "not finite")
