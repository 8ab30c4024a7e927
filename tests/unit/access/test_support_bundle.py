"""A support bundle tells much, and no secret, wherever one was put."""

from __future__ import annotations

import json
import logging
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cryofleet.errors import AlreadyExists, InvalidArgument
from cryofleet.logs import JsonFormatter
from cryofleet.redaction import HIDDEN, Redaction, shown_settings
from cryofleet.settings import Settings
from cryofleet.support_bundle import write_bundle

MARK = "sEcReT"


class _Recorded(Mapping[str, str]):
    """An environment that knows what was asked of it."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def all_settings() -> set[str]:
    """Names of all variables that a process reads."""
    together = {"CRYOFLEET_OIDC_ISSUER": "https://a.b", "CRYOFLEET_OIDC_AUDIENCE": "a", "CRYOFLEET_OIDC_JWKS": "/a"}
    environment = _Recorded(together)
    Settings.from_environment(environment)
    return environment.asked


def _planted(name: str, number: int) -> str | None:
    """A value with a secret in it, as it may get there; None where the setting can't take one."""
    secret = f"{MARK}{number}x"
    match name.removeprefix("CRYOFLEET_"):
        case "HOME":
            return None  # the folder that the test works in
        case "DATABASE":
            return f"postgresql://user:{secret}%22@127.0.0.1:1/runs?sslpassword={MARK}query"
        case "STORE":
            return f"s3://user:{secret}@bucket/prefix"
        case "OIDC_JWKS":
            return f"https://user:{secret}@keys.example/jwks"
        case "OIDC_ROLES":
            return f"{secret}=admin"
        case _:
            return secret


def _refused(environment: dict[str, str]) -> str:
    """The variable whose value can't be read."""
    try:
        Settings.from_environment(environment)
    except InvalidArgument as refused:
        return str(refused).partition(" ")[0]
    return ""


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, str]:
    """Every setting that takes text has a secret."""
    environment = {"CRYOFLEET_HOME": str(tmp_path / "home"), "CRYOFLEET_OF_ANOTHER_VERSION": f"{MARK}other"}
    values = {name: _planted(name, number) for number, name in enumerate(sorted(all_settings()))}
    environment |= {name: value for name, value in values.items() if value is not None}
    while refused := _refused(environment):
        del environment[refused]  # a number, or true or false: no secret can stand there
    tokens = tmp_path / "tokens-file"
    tokens.write_text(f"{MARK}in-the-file\n")
    environment["CRYOFLEET_TOKEN_FILE"] = str(tokens)
    return environment


def _logged(message: str) -> str:
    record = logging.makeLogRecord({"msg": message, "levelname": "WARNING", "name": "test"})
    return JsonFormatter("io", "io").format(record)


def _read(bundle: Path) -> dict[str, str]:
    with zipfile.ZipFile(bundle) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_no_setting_gives_its_secret_away(planted: dict[str, str], tmp_path: Path) -> None:
    settings = Settings.from_environment(planted)
    settings.log_folder.mkdir(parents=True)
    lines = [_logged(f"somebody wrote {name} down: {value}") for name, value in planted.items() if MARK in value]
    jwt = f"eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJhbmEifQ.{MARK}signature"
    lines += [
        _logged(f'the password is {MARK}{sorted(all_settings()).index("CRYOFLEET_DATABASE")}x" and no other'),
        _logged(f"from the file: {MARK}in-the-file"),
        _logged(f"Authorization: Bearer {jwt}, or {jwt}"),
        _logged(f"connecting to postgresql://other:{MARK}unknown@db/runs?password={MARK}unknown&x=1"),
        f"a traceback's line, password={MARK}plain",
        "-----BEGIN PRIVATE KEY-----",
        f"{MARK}key",
        "-----END PRIVATE KEY-----",
        _logged("what is no secret stays"),
    ]
    (settings.log_folder / "io.log").write_text("\n".join(lines) + "\n")
    assert sum(MARK in value for value in planted.values()) >= 20, "the test itself plants"

    write_bundle(tmp_path / "bundle.zip", settings, planted)

    parts = _read(tmp_path / "bundle.zip")
    found = {name: [line for line in text.splitlines() if MARK in line] for name, text in parts.items()}
    assert not any(found.values()), found
    assert MARK.encode() not in (tmp_path / "bundle.zip").read_bytes()
    assert {finding["check"] for finding in json.loads(parts["doctor.json"])} >= {"store", "database", "disk"}
    assert "what is no secret stays" in parts["logs/io.log"]
    shown = json.loads(parts["settings.json"])
    assert set(planted) <= set(shown), "each is named"
    assert shown["CRYOFLEET_HOME"] == planted["CRYOFLEET_HOME"]
    assert {shown[name] for name in planted if MARK in planted[name]} == {HIDDEN}


def test_harmless_settings_are_shown() -> None:
    harmless = {
        "CRYOFLEET_ADDRESS": "0.0.0.0:7000",
        "CRYOFLEET_AUDIT": "log",
        "CRYOFLEET_DATABASE": "sqlite:////data/orchestrator.sqlite",
        "CRYOFLEET_DRAIN_SECONDS": "30.5",
        "CRYOFLEET_HOME": "/data/cryofleet",
        "CRYOFLEET_INSTANCE": "picking-7c9d-x2",
        "CRYOFLEET_LOG_LEVEL": "DEBUG",
        "CRYOFLEET_METRICS_HOST": "0.0.0.0",
        "CRYOFLEET_OIDC_ISSUER": "https://login.site.example/realms/cryo",
        "CRYOFLEET_OIDC_ROLE_CLAIM": "realm_access.roles",
        "CRYOFLEET_ORCHESTRATOR": "unix:/data/cryofleet/run/orchestrator.sock",
        "CRYOFLEET_PLATFORM_NAMES": "io *.cryofleet.svc",
        "CRYOFLEET_POOL_IO": "dns:///io.cryofleet.svc:7000",
        "CRYOFLEET_POOL_PICKING": "10.0.0.1:7000, 10.0.0.2:7000",
        "CRYOFLEET_READ_ONLY_ROOTS": "file:///raw s3://raw/2026",
        "CRYOFLEET_S3_ENDPOINT": "minio.site.example:9000",
        "CRYOFLEET_S3_REGION": "us-east-1",
        "CRYOFLEET_S3_SECURE": "true",
        "CRYOFLEET_SLOTS": "4",
        "CRYOFLEET_STORE": "s3://results/cryofleet",
        "CRYOFLEET_TLS_KEY": "/tls/tls.key",
        "OMP_NUM_THREADS": "2",
    }
    assert shown_settings({**harmless, "PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "x"}) == harmless
    redaction = Redaction(harmless)
    assert redaction.hide(json.dumps(harmless)) == json.dumps(harmless)


def test_every_setting_has_been_thought_of() -> None:
    """A new setting is shown only once somebody has said what its harmless values look like."""
    secret = {"TOKEN", "S3_ACCESS_KEY", "S3_SECRET_KEY"}
    words = [
        "/a/b",
        "7",
        "word",
        "word:7",
        "https://a.b",
        "io=viewer",
        "true",
        "file:///a",
        "log",
        "sqlite:////a",
        "us-east-1",
        "INFO",
        "127.0.0.1",
    ]
    for name in all_settings():
        shown = any(shown_settings({name: word}) == {name: word} for word in words)
        assert shown == (name.removeprefix("CRYOFLEET_") not in secret), name


def test_size_is_bounded_by_whole_lines(tmp_path: Path) -> None:
    settings = Settings.from_environment({"CRYOFLEET_HOME": str(tmp_path)})
    settings.log_folder.mkdir()
    for name, count in (("io", 10), ("orchestrator", 20000)):
        lines = [_logged(f"line {number} of {name}") for number in range(count)]
        (settings.log_folder / f"{name}.log").write_text("\n".join(lines) + "\n")
    (settings.log_folder / "other.log").symlink_to("/etc/passwd")
    write_bundle(tmp_path / "bundle.zip", settings, {}, log_bytes=100_000)
    parts = _read(tmp_path / "bundle.zip")
    logs = {name: text for name, text in parts.items() if name.startswith("logs/")}
    assert set(logs) == {"logs/io.log", "logs/orchestrator.log"}
    assert 95_000 < sum(len(text) for text in logs.values()) <= 100_000
    assert len(logs["logs/io.log"].splitlines()) == 10, "what the short one leaves is the long one's"
    last = [json.loads(line)["message"] for line in logs["logs/orchestrator.log"].splitlines()]
    assert last[-1] == "line 19999 of orchestrator"


def test_without_a_platform_it_says_what_is_missing(tmp_path: Path) -> None:
    settings = Settings.from_environment({"CRYOFLEET_HOME": str(tmp_path)})
    missing = write_bundle(tmp_path / "bundle.zip", settings, {})
    parts = _read(tmp_path / "bundle.zip")
    assert set(missing) == {"pools.json", "runs.json", "logs"} == set(json.loads(parts["about.json"])["missing"])
    assert "not up" in missing["pools.json"]
    assert {"doctor.json", "versions.json", "settings.json", "machine.json"} <= set(parts)
    assert json.loads(parts["machine.json"])["usable_cores"] >= 1
    assert json.loads(parts["versions.json"])["packages"]["grpcio"]


def test_the_file_is_its_owners_and_nothing_is_overwritten(tmp_path: Path) -> None:
    settings = Settings.from_environment({"CRYOFLEET_HOME": str(tmp_path)})
    path = tmp_path / "bundle.zip"
    write_bundle(path, settings, {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(AlreadyExists):
        write_bundle(path, settings, {})
    with pytest.raises(InvalidArgument, match="No such file"):
        write_bundle(tmp_path / "none" / "bundle.zip", settings, {})
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))
