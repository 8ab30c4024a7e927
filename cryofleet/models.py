"""The models of a project, as the store's index of them says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryofleet.errors import DataLoss, InvalidArgument, NotFound

if TYPE_CHECKING:
    from cryofleet.client import Client

# As cryofleet.artifacts.models writes it; that loads the store, and the command line should answer at once.
_INDEX = "_models"
_MANIFEST = "manifest.json"
_CONFIG = "config.json"
_CARD = "card.md"

KEY_FIGURES = ("accuracy", "dice", "calibration_error", "best_validation_loss")
"""The figures of a model that are shown in a list, where it has them."""


@dataclass(frozen=True)
class Model:
    """A model in the store."""

    uri: str
    operation: str
    created_at: str
    """ISO 8601, UTC."""
    config: dict[str, Any]

    @property
    def architecture(self) -> str:
        return str(self.config.get("architecture", ""))

    @property
    def training_set_size(self) -> int | None:
        """How many subtomograms, or patches, it was trained on; None where its config does not say."""
        figures = self.config.get("figures")
        for place in (figures if isinstance(figures, dict) else {}, self.config):
            for name in ("training_subtomograms", "subtomograms", "patches"):
                if isinstance(place.get(name), int):
                    return int(place[name])
        return None

    @property
    def figures(self) -> dict[str, Any]:
        """Its key figures."""
        figures = self.config.get("figures")
        return {name: figures[name] for name in KEY_FIGURES if name in figures} if isinstance(figures, dict) else {}

    def to_mapping(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "uri": self.uri,
            "architecture": self.architecture,
            "operation": self.operation,
            "created_at": self.created_at,
            "training_set_size": self.training_set_size,
            "figures": self.figures,
        }


def models(client: Client) -> list[Model]:
    """All models of the client's project, the newest first."""
    project = f"{client.store_root()}/{client.project}"
    found = []
    for entry in client.list(f"{project}/{_INDEX}"):
        key = entry.uri.rpartition("/")[2].removesuffix(".json")
        try:
            content = json.loads(client.artifact(entry.uri).read())
        except NotFound:
            continue  # collected as garbage since it was listed
        except ValueError as error:
            raise DataLoss(f"{entry.uri} is not JSON: {error}") from None
        # Without its manifest a result is none.
        if not any(client.list(f"{project}/{key}/{_MANIFEST}")):
            continue
        found += [
            Model(f"{project}/{key}/{folder}", content["operation"], content["created_at"], config)
            for folder, config in content["models"].items()
        ]
    return sorted(found, key=lambda model: (model.created_at, model.uri), reverse=True)


def card(client: Client, uri: str) -> str:
    """The card of the model at a URI, Markdown. Raises InvalidArgument where there is none."""
    return _part(client, uri, _CARD).decode()


def config(client: Client, uri: str) -> dict[str, Any]:
    """The config of the model at a URI. Raises InvalidArgument where there is none."""
    content: dict[str, Any] = json.loads(_part(client, uri, _CONFIG))
    return content


def _part(client: Client, uri: str, name: str) -> bytes:
    place = f"{uri.rstrip('/')}/{name}"
    if not any(client.list(place)):
        raise InvalidArgument(f"{uri} is no model: it has no {name}; `cryofleet models` lists those there are")
    return client.artifact(place).read()
