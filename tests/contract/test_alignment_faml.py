"""The steps of FAML over real gRPC: what they give together, and what they say to requests that can't work."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

import orchestrator
from cryofleet.artifacts import ResultWriter
from cryofleet.numerics.wedge import wedge_mask
from cryofleet.operations import operations
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import alignment_pb2, common_pb2
from cryofleet.volumes import (
    HEADER_BYTES,
    Shard,
    VolumeInfo,
    encode_volume,
    open_volume,
    write_subtomograms_index,
)
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
from tests.unit.alignment.samples import Sample, asymmetric, sample

STATUS = grpc.StatusCode
INVALID = STATUS.INVALID_ARGUMENT
COUNT = 6

channel = channel_to(service)


@pytest.fixture(scope="module")
def data() -> Sample:
    return sample(asymmetric(1), BOX, COUNT, 1.0, wedge=WEDGE)


def start_request(subtomograms: str, **options: Any) -> alignment_pb2.FamlStartRequest:
    few = {"low_pass_angstrom": 48.0, "max_shift_voxels": 2.0, "max_candidates": 8}
    return alignment_pb2.FamlStartRequest(
        subtomograms_uri=subtomograms, particle_diameter_angstrom=220.0, **{**few, **options}
    )


class Run:
    """A run of FAML on a server, step by step."""

    def __init__(self, channel: grpc.aio.Channel, subtomograms: str) -> None:
        self.channel, self.subtomograms = channel, subtomograms
        self.particles = self.model = ""

    async def start(self, **options: Any) -> str:
        begun = (await call_operation(self.channel, start_request(self.subtomograms, **options))).result
        self.particles, self.model = begun.particles_uri, begun.model_uri
        return self.model

    def expectation(self, first: int = 0, count: int = 0) -> alignment_pb2.FamlExpectRequest:
        return alignment_pb2.FamlExpectRequest(
            subtomograms_uri=self.subtomograms,
            particles_uri=self.particles,
            model_uri=self.model,
            rows=common_pb2.RowRange(first=first, count=count) if count else None,
        )

    async def expect(self, first: int = 0, count: int = 0) -> str:
        result = (await call_operation(self.channel, self.expectation(first, count), timeout=120)).result
        assert result.count == (count or COUNT)
        return str(result.statistics_uri)

    def maximisation(self, *statistics: str) -> alignment_pb2.FamlMaximiseRequest:
        return alignment_pb2.FamlMaximiseRequest(model_uri=self.model, statistics_uris=statistics)

    async def maximise(self, *statistics: str) -> alignment_pb2.FamlMaximiseResult:
        result: alignment_pb2.FamlMaximiseResult
        result = (await call_operation(self.channel, self.maximisation(*statistics))).result
        self.model = result.model_uri
        return result

    def finishing(self) -> alignment_pb2.FamlFinishRequest:
        return alignment_pb2.FamlFinishRequest(
            subtomograms_uri=self.subtomograms, particles_uri=self.particles, model_uri=self.model
        )


async def test_the_steps_give_maps_classes_and_curves(channel: grpc.aio.Channel, store: Store, data: Sample) -> None:
    halves = np.array([1, 2, 2, 2, 1, 2])
    known = posed(data.rotations, data.shifts).with_columns(half=halves)
    run = Run(channel, put_subtomograms(store, "a" * 64, data.particles))
    await run.start(classes=2, particles_uri=put_particles(store, "known", known))
    await run.maximise(await run.expect(0, 4), await run.expect(4, 2))
    after = await run.maximise(await run.expect(0, 3), await run.expect(3, 3))
    assert sum(after.class_sizes) == pytest.approx(COUNT)
    assert after.low_pass_angstrom >= 48
    finished = (await call_operation(channel, run.finishing())).result
    assert finished.count == sum(finished.class_sizes) == COUNT
    assert not finished.converged
    particles = particles_at(store, finished.particles_uri)
    assert particles.table["id"].tolist() == list(range(100, 106))
    assert particles.table["half"].tolist() == halves.tolist()
    assert np.abs(particles.shifts()).max() <= (2 + 1) * BINNING
    for k in range(2):
        assert particles_at(store, finished.class_particles_uris[k]).table["class_id"].eq(k).all()
        average = open_volume(store, finished.average_uris[k])
        assert average.info.contrast == "dark"
        assert np.ptp(average.read()) > 0
        curve = json.loads(store.get(finished.fsc_uris[k]))
        assert curve["resolution_angstrom"] == finished.resolutions_angstrom[k] >= 2 * VOXEL
        assert curve["particles"] == finished.class_sizes[k]
    history = json.loads(store.get(finished.history_uri))["iterations"]
    assert len(history) == 1
    assert sum(history[0]["sizes"]) == pytest.approx(COUNT)


async def test_a_start_that_can_not_work_is_refused(channel: grpc.aio.Channel, store: Store, data: Sample) -> None:
    subtomograms = put_subtomograms(store, "a" * 64, data.particles)
    wedge = np.fft.fftshift(wedge_mask((BOX, BOX, BOX), *WEDGE))

    def wedged(name: str, volume: NDArray[np.float32]) -> alignment_pb2.FamlStartRequest:
        return start_request(subtomograms, wedge_uri=put_volume(store, name, volume))

    await refused(channel, wedged("small", wedge[4:-4, 4:-4, 4:-4]), INVALID, "small.mrc", "(16, 16, 16)", "(24, 24")
    await refused(channel, wedged("nothing", np.zeros_like(wedge)), INVALID, "nothing.mrc is zero everywhere")
    unsound = start_request(subtomograms, wedge_uri=put_unsound(store, "unsound", wedge))
    await refused(channel, unsound, INVALID, "unsound.mrc", "not finite")
    both = start_request(subtomograms, wedge_uri=unsound.wedge_uri, tilts_uri=put_file(store, "a.tlt", b"-60\n60\n"))
    await refused(channel, both, INVALID, "wedge_uri or tilts_uri")
    one = start_request(put_subtomograms(store, "b" * 64, data.particles[:1]))
    await refused(channel, one, INVALID, "at least 2 particles", "got 1")
    await refused(channel, start_request(subtomograms, classes=7), INVALID, "classes 7", "only 6 particles")
    # A box of 24 voxels of 12 Å: coarser than 144 Å nothing is left to compare.
    await refused(
        channel, start_request(subtomograms, low_pass_angstrom=400.0), INVALID, "low_pass_angstrom 400", "144"
    )
    large = start_request(subtomograms)
    large.particle_diameter_angstrom = 300.0
    await refused(channel, large, INVALID, "particle_diameter_angstrom 300", "288")
    stranger = Particles.from_positions(np.zeros((2, 3)), VOXEL, "t", id=np.array([100, 7]))
    strange = start_request(subtomograms, particles_uri=put_particles(store, "stranger", stranger))
    await refused(channel, strange, INVALID, "particle 7", "stranger.parquet")
    half = posed(data.rotations, data.shifts).with_columns(half=np.full(COUNT, 2))
    lone = start_request(subtomograms, particles_uri=put_particles(store, "half", half))
    await refused(channel, lone, INVALID, "half set 1 has no particle")


def put_unsound_subtomograms(store: Store, name: str, boxes: NDArray[np.float32], broken: int) -> str:
    """As another program may have written them: one box begins with a NaN."""
    writer = ResultWriter(store, "default", name)
    info = VolumeInfo(boxes.shape[1:], VOXEL, "dark", *WEDGE)
    stack = VolumeInfo(boxes.shape[1:], VOXEL, "dark", *WEDGE, count=len(boxes))
    data = bytearray(encode_volume(boxes, stack))
    at = HEADER_BYTES + broken * boxes[0].nbytes
    data[at : at + 4] = struct.pack("<f", float("nan"))
    return _indexed(writer, store, info, [bytes(data)], [len(boxes)])


def put_mixed_subtomograms(store: Store, name: str, stacks: list[NDArray[np.float32]]) -> str:
    """Stacks of boxes of different sizes as one set, which says that all are as large as the first."""
    writer = ResultWriter(store, "default", name)
    infos = [VolumeInfo(s.shape[1:], VOXEL, "dark", *WEDGE, count=len(s)) for s in stacks]
    encoded = [encode_volume(stack, info) for stack, info in zip(stacks, infos, strict=True)]
    first = VolumeInfo(stacks[0].shape[1:], VOXEL, "dark", *WEDGE)
    return _indexed(writer, store, first, encoded, [len(stack) for stack in stacks])


def _indexed(writer: ResultWriter, store: Store, info: VolumeInfo, stacks: list[bytes], counts: list[int]) -> str:
    shards = []
    for number, (stack, count) in enumerate(zip(stacks, counts, strict=True)):
        uri = writer.put(f"{number}.mrc", stack)
        shards.append(Shard(uri, writer.entry(f"{number}.mrc")["digest"], count))
    ids = 100 + np.arange(sum(counts))
    table = Particles.from_positions(np.full((len(ids), 3), 40.0), VOXEL / BINNING, "t", id=ids)
    rows = {"uri": writer.put("rows.parquet", table.to_parquet()), "digest": writer.entry("rows.parquet")["digest"]}
    uri = write_subtomograms_index(writer, "boxes.json", store, info, rows, shards)
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0.0)
    return uri


async def test_particles_that_can_not_be_compared_are_named(
    channel: grpc.aio.Channel, store: Store, data: Sample
) -> None:
    constant = data.particles.copy()
    constant[2] = 3.0
    run = Run(channel, put_subtomograms(store, "a" * 64, constant))
    await run.start()
    await refused(channel, run.expectation(), INVALID, "particle 102 is constant")
    # The shard that does not hold it is fine.
    await run.expect(3, 3)
    run = Run(channel, put_unsound_subtomograms(store, "b" * 64, data.particles, 4))
    await run.start()
    await refused(channel, run.expectation(), INVALID, "particle 104", "not finite")
    run = Run(
        channel, put_mixed_subtomograms(store, "c" * 64, [data.particles[:4], data.particles[:2, 4:-4, 4:-4, 4:-4]])
    )
    await run.start()
    await refused(channel, run.expectation(), STATUS.DATA_LOSS, "1.mrc", "(16, 16, 16)", "boxes.json says otherwise")


async def test_states_of_other_particles_are_refused(channel: grpc.aio.Channel, store: Store, data: Sample) -> None:
    run = Run(channel, put_subtomograms(store, "a" * 64, data.particles))
    await run.start()
    small = sample(asymmetric(1), 16, COUNT, 1.0, wedge=WEDGE).particles
    for subtomograms, words in (
        (put_subtomograms(store, "b" * 64, small), ("boxes of 24 voxels", "6 of 16")),
        (put_subtomograms(store, "c" * 64, data.particles[:4]), ("particle 104", "no subtomogram")),
    ):
        other = run.expectation()
        other.subtomograms_uri = subtomograms
        await refused(channel, other, INVALID, *words)
    some = put_particles(store, "some", posed(data.rotations[:4], data.shifts[:4]))
    fewer = run.expectation()
    fewer.particles_uri = some
    await refused(channel, fewer, INVALID, "model.npz is of 6 particles", "these are 4")
    await refused(channel, run.expectation(4, 3), INVALID, "rows 4 to 6", "has 6")
    await refused(channel, run.finishing(), INVALID, "nothing to finish")
    wrong = run.expectation()
    wrong.model_uri = some
    await refused(channel, wrong, INVALID, "some.parquet", "no file of arrays")


async def test_statistics_that_are_not_of_all_particles_and_this_state_are_refused(
    channel: grpc.aio.Channel, store: Store, data: Sample
) -> None:
    run = Run(channel, put_subtomograms(store, "a" * 64, data.particles))
    first = await run.start()
    halves = [await run.expect(0, 3), await run.expect(3, 3)]

    async def unfit(statistics: list[str], *words: str) -> None:
        await refused(channel, run.maximisation(*statistics), INVALID, *words)

    await unfit(halves[::-1], halves[1], "from row 3 on", "from row 0 on are missing, or not in order")
    await unfit([halves[0], halves[0]], halves[0], "from row 0 on", "from row 3 on are missing")
    await unfit(halves[:1], "sums over 3 particles", "there are 6")
    await unfit([*halves, halves[1]], halves[1], "from row 6 on are missing, or not in order")
    await unfit([first, halves[1]], first, "no sums of this run")
    # A run of the same particles and shapes, begun with another seed.
    other = Run(channel, run.subtomograms)
    await other.start(seed=1)
    strange = await other.expect(0, 3)
    await unfit([strange, halves[1]], strange, "made with another state")
    await unfit([await _of_more_classes(channel, run.subtomograms), halves[1]], "no sums of this run", "sums is")
    # Those of the iteration before are of the same rows and shapes.
    await run.maximise(*halves)
    await unfit(halves, halves[0], "iteration -1", "the state is of 0")
    again = [await run.expect(0, 3), await run.expect(3, 3)]
    await unfit([again[0], halves[1]], halves[1], "iteration -1")
    assert unpack(store.get(again[1]), "again")["first"] == 3
    await run.maximise(*again)


async def _of_more_classes(channel: grpc.aio.Channel, subtomograms: str) -> str:
    run = Run(channel, subtomograms)
    await run.start(classes=2)
    return await run.expect(0, 3)


def test_every_parameter_of_the_start_can_be_set_in_the_pipeline() -> None:
    pipeline = yaml.safe_load((Path(orchestrator.__file__).parent / "pipelines" / "faml.yaml").read_text())
    start = next(step for step in pipeline["steps"] if step["id"] == "start")
    for parameter in operations()["alignment.FamlStart"].parameters:
        assert start["with"][parameter.name].strip("${}") in {**pipeline["inputs"], **pipeline["parameters"]}
