"""What must not be seen is not shown. (`tests/contract/test_access.py` searches the logs and answers of a process.)"""

from __future__ import annotations

import pytest

from cryofleet.doctor import _check_postgresql
from cryofleet.settings import Settings

SECRETS = {
    "CRYOFLEET_S3_ACCESS_KEY": "SECRET-1",
    "CRYOFLEET_S3_SECRET_KEY": "SECRET-2",
    "CRYOFLEET_DATABASE": "postgresql://user:SECRET-3@localhost/x",
    "CRYOFLEET_TOKEN": "SECRET-4",
}


def test_settings_show_no_secret() -> None:
    settings = Settings.from_environment({"CRYOFLEET_HOME": "/h", **SECRETS})
    assert settings.s3.secret_key == "SECRET-2"
    assert settings.token == "SECRET-4"
    for shown in (repr(settings), str(settings), repr([settings]), repr(settings.s3)):
        assert "SECRET" not in shown
        assert "localhost:9000" in shown, "what is no secret is shown"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:SECRET@127.0.0.1:1/runs",
        "postgresql://127.0.0.1:1/runs?user=u&password=SECRET",
        "postgresql://user:SECRET@127.0.0.1:1/runs?options=%00",
    ],
)
def test_the_doctor_shows_no_password(url: str) -> None:
    finding = _check_postgresql(url)
    assert not finding.ok
    assert "SECRET" not in f"{finding.found} {finding.advice}"
    assert "127.0.0.1/runs" in finding.found
