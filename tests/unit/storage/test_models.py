"""The index of models: what is listed is what is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from click.testing import CliRunner

from cryofleet import models
from cryofleet.artifacts import MANIFEST, ResultWriter, open_blob, remove
from cryofleet.artifacts.models import index_uri
from cryofleet.cli import cli
from cryofleet.cli import models as command
from cryofleet.client import Client
from cryofleet.errors import InvalidArgument
from cryofleet.storage import Store
from orchestrator import garbage

CONFIG = {
    "architecture": "autoencoder3d",
    "subtomograms": 36,
    "figures": {"best_validation_loss": 0.5, "epochs": 20, "training_subtomograms": 32},
}


class StoreClient:
    """As much of a client as lists and reads, without services."""

    project = "default"

    def __init__(self, store: Store) -> None:
        self.store = store

    def store_root(self) -> str:
        return self.store.root

    def list(self, uri: str) -> Any:
        return self.store.list(uri)

    def artifact(self, uri: str) -> Any:
        return open_blob(self.store, uri)


def listed(store: Store) -> list[models.Model]:
    return models.models(cast(Client, StoreClient(store)))


def put_model(store: Store, key: str, folder: str = "model", **config: Any) -> str:
    writer = ResultWriter(store, "default", key * 64)
    writer.put(f"{folder}/model.safetensors", b"weights")
    writer.put(f"{folder}/config.json", json.dumps(CONFIG | config).encode())
    writer.put(f"{folder}/card.md", b"# The card\n")
    writer.commit(operation="learning.Train", version=1, parameters={}, inputs={}, result={}, seconds=1)
    return f"{writer.uri}/{folder}"


@pytest.fixture
def client(store: Store, monkeypatch: pytest.MonkeyPatch) -> Client:
    @contextmanager
    def opened(**_: Any) -> Iterator[StoreClient]:
        yield StoreClient(store)

    monkeypatch.setattr(command, "Client", opened)
    return cast(Client, StoreClient(store))


def test_models_are_listed_by_what_their_configs_say(store: Store) -> None:
    assert listed(store) == []
    first = put_model(store, "a")
    second = put_model(store, "b", architecture="edss3d", figures={"dice": 0.75})
    writer = ResultWriter(store, "default", "c" * 64)
    writer.put("config.json", b"{}")
    writer.put("other/config.json", b"{}")
    writer.commit(operation="io.Export", version=1, parameters={}, inputs={}, result={}, seconds=1)
    found = {model.uri: model for model in listed(store)}
    assert set(found) == {first, second}
    assert found[first].to_mapping() == {
        "uri": first,
        "architecture": "autoencoder3d",
        "operation": "learning.Train",
        "created_at": found[first].created_at,
        "training_set_size": 32,
        "figures": {"best_validation_loss": 0.5},
    }
    assert found[second].figures == {"dice": 0.75}
    assert found[second].training_set_size == 36


def test_models_that_are_collected_or_never_finished_are_not_listed(store: Store) -> None:
    put_model(store, "a")
    kept = put_model(store, "b")
    remove(store, "default", "a" * 64)
    assert [model.uri for model in listed(store)] == [kept]
    assert not store.exists(index_uri(f"{store.root}/default/{'a' * 64}"))
    # A writer that was killed between the entry and the manifest, or a manifest that was taken back.
    store.delete(f"{store.root}/default/{'b' * 64}/{MANIFEST}")
    assert listed(store) == []
    # Made again, it is there again.
    assert put_model(store, "b") == kept
    assert [model.uri for model in listed(store)] == [kept]
    assert put_model(store, "b") == kept, "committing once more changes nothing"
    assert len(listed(store)) == 1


def test_garbage_collection_takes_models_out_and_pins_keep_them(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(garbage, "RECORD_SECONDS", 0.0)
    monkeypatch.setattr(garbage, "_clock", lambda store: 1e12)
    put_model(store, "a")
    kept = put_model(store, "b")
    garbage.pin(store, kept, unpin=False)
    collected = garbage.collect(store, lambda: garbage.Held([]), 0.0, "default", delete=True)
    assert [each.operation for each in collected] == ["learning.Train"]
    assert [model.uri for model in listed(store)] == [kept]
    assert [found.uri.rpartition("/")[2] for found in store.list(f"{store.root}/default/_models")] == [
        f"{'b' * 64}.json"
    ]


def test_the_command_lists_and_shows(store: Store, client: Client) -> None:
    uri = put_model(store, "a", architecture="dsrf3d-v2", figures={"accuracy": 0.98765, "best_validation_loss": 0.1})
    runner = CliRunner()
    line = runner.invoke(cli, ["models"]).output.strip().split("\t")
    assert line[0] == "dsrf3d-v2"
    assert line[2:] == ["36", "accuracy 0.9877, best validation loss 0.1", uri]
    assert json.loads(runner.invoke(cli, ["models", "--json"]).output)[0]["figures"]["accuracy"] == 0.98765
    assert runner.invoke(cli, ["models", "show", uri]).output == "# The card\n"
    assert json.loads(runner.invoke(cli, ["models", "show", uri + "/", "--json"]).output)["subtomograms"] == 36
    with pytest.raises(InvalidArgument, match=r"no model: it has no card.md"):
        runner.invoke(cli, ["models", "show", uri.removesuffix("/model")], catch_exceptions=False)
