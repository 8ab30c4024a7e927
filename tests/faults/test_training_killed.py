"""The learning service is killed in the middle of a training: the next call goes on from the checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import grpc

from cryofleet.channels import open_channel
from cryofleet.storage import Store
from cryofleet.testing import InstanceProcess, call_operation, instance_process, settings_for
from cryofleet.v1 import learning_pb2
from tests.contract.test_learning import put_subtomograms
from tests.unit.learning.shapes import two_kinds

EPOCHS = 60


def request(store: Store) -> learning_pb2.TrainAutoencoderRequest:
    """A training of some seconds, whose batches are augmented."""
    return learning_pb2.TrainAutoencoderRequest(
        subtomograms_uri=put_subtomograms(store, "two-kinds", two_kinds(36, 16, 0)[0]),
        max_epochs=EPOCHS,
        patience_epochs=EPOCHS,
        binning=2,
        rotations="any",
        contrast_jitter=0.1,
        noise_jitter=0.2,
        wedge_jitter=5,
    )


def went_on_from_a_checkpoint(instance: InstanceProcess) -> bool:
    return any(line["message"] == "going on from a checkpoint" for line in instance.lines)


async def test_a_killed_training_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "killed", address=f"unix:{tmp_path}/killed.sock", threads=1)
    store = Store.open(settings)
    asked = request(store)
    async with (
        instance_process("services.learning", settings) as instance,
        open_channel(settings.address, settings.tls, "localhost") as channel,
    ):
        call = asyncio.create_task(call_operation(channel, asked, timeout=300))
        while not any(found.uri.endswith("checkpoint.json") for found in store.list(store.root)):
            assert not call.done(), call
            await asyncio.sleep(0.02)
        # Some epochs later, perhaps in the middle of one.
        await asyncio.sleep(0.2)
        instance.process.kill()
        assert await instance.wait() != 0
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call
            raise AssertionError("the training was over before it could be killed")
    async with (
        instance_process("services.learning", settings) as instance,
        open_channel(settings.address, settings.tls, "localhost") as channel,
    ):
        resumed = await call_operation(channel, asked, timeout=300)
    assert went_on_from_a_checkpoint(instance)
    assert not any("_work" in found.uri for found in store.list(store.root)), "checkpoints go with the commit"

    settings = settings_for(tmp_path / "undisturbed", address=f"unix:{tmp_path}/undisturbed.sock", threads=1)
    other = Store.open(settings)
    async with (
        instance_process("services.learning", settings) as instance,
        open_channel(settings.address, settings.tls, "localhost") as channel,
    ):
        undisturbed = await call_operation(channel, request(other), timeout=300)
    assert not went_on_from_a_checkpoint(instance)
    assert resumed.result.best_validation_loss == undisturbed.result.best_validation_loss
    metrics = [kept.get(reply.result.metrics_uri) for kept, reply in ((store, resumed), (other, undisturbed))]
    assert len(json.loads(metrics[0])["losses"]) == EPOCHS
    assert metrics[0] == metrics[1]
    weights = [
        kept.get(f"{reply.result.model_uri}/model.safetensors")
        for kept, reply in ((store, resumed), (other, undisturbed))
    ]
    assert weights[0] == weights[1]
