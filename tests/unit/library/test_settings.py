"""Settings from the environment."""

from __future__ import annotations

import pytest

from cryofleet.errors import InvalidArgument
from cryofleet.settings import Settings


def test_defaults_suit_one_machine() -> None:
    settings = Settings.from_environment({"CRYOFLEET_HOME": "/srv/fleet"})
    assert settings.store == "file:///srv/fleet/store"
    assert settings.database == "sqlite:////srv/fleet/orchestrator.sqlite"
    assert settings.pools["picking"] == "unix:/srv/fleet/run/picking.sock"
    assert settings.tls is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLOTS", "many", "CRYOFLEET_SLOTS is 'many'"),
        ("SLOTS", "0", "at least 1"),
        ("DRAIN_SECONDS", "nan", "CRYOFLEET_DRAIN_SECONDS"),
        ("S3_SECURE", "perhaps", "CRYOFLEET_S3_SECURE"),
        ("TLS_KEY", "/k.pem", "must be set together"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Settings.from_environment({f"CRYOFLEET_{name}": value})


def test_the_secret_key_is_never_printed() -> None:
    assert "hunter2" not in repr(Settings.from_environment({"CRYOFLEET_S3_SECRET_KEY": "hunter2"}))
