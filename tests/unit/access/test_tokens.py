from __future__ import annotations

import hashlib
import hmac
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cryofleet.access.authentication import Authenticator
from cryofleet.access.client_token import token_source
from cryofleet.access.roles import Role
from cryofleet.access.tokens import TokenEntry, TokenFile, new_entry, read_entries
from cryofleet.cli import cli
from cryofleet.errors import FailedPrecondition, InvalidArgument, Unauthenticated
from cryofleet.settings import Settings


def entry(token: str = "secret", **changes: Any) -> str:
    content = {
        "sha256": hashlib.sha256(token.encode()).hexdigest(),
        "user": "ana",
        "role": "operator",
        "projects": ["apo"],
        **changes,
    }
    return json.dumps(content)


def test_a_line_says_whose_token_it_is() -> None:
    found = TokenEntry.from_line(entry(expires="2027-01-31T12:00:00+01:00"))
    assert (found.user, found.role, found.projects) == ("ana", Role.OPERATOR, frozenset({"apo"}))
    assert found.expires == datetime(2027, 1, 31, 11, tzinfo=UTC)
    assert TokenEntry.from_line(found.to_line()) == found
    assert TokenEntry.from_line(entry(projects=["*"])).projects is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "it is not JSON"),
        ("[]", "no JSON object"),
        (entry(sha256="1234"), "64 hexadecimal digits"),
        (entry(user="an a"), "without white space"),
        (entry(user=""), "without white space"),
        (entry(role="root"), "one of viewer, operator, admin"),
        (entry(projects=[]), "list of projects"),
        (entry(projects="apo"), "list of projects"),
        (entry(projects=["../other"]), "must match"),
        (entry(projects=["*", "apo"]), "must match"),
        (entry(expires="soon"), "it must be a time"),
        (entry(expires="2027-01-31T12:00:00"), "time zone"),
        (entry(roles="admin"), "'roles'"),
    ],
)
def test_a_wrong_line_says_what_is_wrong_and_not_its_hash(line: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        TokenEntry.from_line(line)
    assert hashlib.sha256(b"secret").hexdigest() not in str(caught.value)


def test_a_token_is_256_random_bits_and_only_its_hash_is_kept() -> None:
    token, made = new_entry("ana", Role.VIEWER, ["apo"])
    other, _ = new_entry("ana", Role.VIEWER, ["apo"])
    assert token != other
    assert len(token.removeprefix("cryofleet_")) >= 43
    assert made.digest == hashlib.sha256(token.encode()).hexdigest()
    assert token not in made.to_line()
    assert made.digest not in repr(made)


def test_the_file_is_read_anew_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# ours\n\n{entry('one')}\n")
    file = TokenFile(path)
    found = file.find("one")
    assert found is not None
    assert found.user == "ana"
    assert file.find("two") is None
    path.write_text(entry("two", user="ben") + "\n" + entry("three") + "\n")
    second = file.find("two")
    assert second is not None
    assert second.user == "ben"
    assert file.find("one") is None, "a line taken out is a token that works no more"
    # As a secret of Kubernetes changes: another file takes its place.
    new = tmp_path / "new"
    new.write_text(entry("four"))
    new.replace(path)
    assert file.find("four") is not None
    assert file.find("two") is None


def test_a_wrong_line_counts_for_nothing_and_the_others_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokens"
    path.write_text(entry("one", role="root") + "\n" + entry("two"))
    file = TokenFile(path)
    assert file.find("one") is None
    assert file.find("two") is not None
    assert "line 1: role is 'root'" in caplog.text


def test_a_file_that_is_gone_or_open_to_others_lets_nobody_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokens"
    with pytest.raises(FailedPrecondition, match="No such file"):
        TokenFile(path)
    path.write_text(entry("one"))
    file = TokenFile(path)
    path.chmod(0o666)
    assert file.find("one") is None
    assert "may be changed by others" in caplog.text
    path.chmod(0o640)
    assert file.find("one") is not None
    path.unlink()
    assert file.find("one") is None


def test_every_hash_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens"
    path.write_text("\n".join(entry(name) for name in ("one", "two", "three")))
    file = TokenFile(path)
    compared = []
    compare = hmac.compare_digest

    def counted(a: str, b: str) -> bool:
        compared.append(a)
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    for token in ("one", "three", "none"):
        file.find(token)
    assert len(compared) == 9, "each look compares all, wherever the right one stands"


def settings_with(path: Path) -> Settings:
    return Settings(home=path.parent, store=f"file://{path.parent}/store", tokens=path)


async def test_who_is_known_by_what(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    path.write_text("\n".join([entry("one", expires=soon), entry("old", expires=past), entry("root", role="admin")]))
    known = Authenticator(settings_with(path), is_private=False)
    caller = await known.identify([("authorization", "Bearer one")], ["client"])
    assert (caller.user, caller.role, caller.projects) == ("ana", Role.OPERATOR, frozenset({"apo"}))
    assert (await known.identify([("authorization", "bearer root")], [])).projects is None, "an admin has them all"
    platform = await known.identify([], ["picking", "localhost"])
    assert (platform.user, platform.is_platform, platform.projects) == ("picking", True, None)
    # With a token, the token says who it is.
    assert (await known.identify([("authorization", "Bearer one")], ["orchestrator"])).user == "ana"
    for metadata, words in (
        ([], "a token is needed"),
        ([("authorization", "Bearer two")], "not known here"),
        ([("authorization", "Bearer old")], "it has expired"),
        ([("authorization", "Basic one")], "Bearer TOKEN"),
        ([("authorization", "Bearer")], "Bearer TOKEN"),
        ([("authorization", "Bearer " + "x" * 20_000)], "Bearer TOKEN"),
        ([("authorization", "Bearer one"), ("authorization", "Bearer root")], "one authorization header"),
        ([("authorization", "Bearer a.b.c")], "no OpenID Connect provider"),
    ):
        with pytest.raises(Unauthenticated, match=words):
            await known.identify(metadata, ["client"])


async def test_names_of_the_platform_are_the_settings(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, store=f"file://{tmp_path}", platform_names=("spiffe://site/cryofleet/*",))
    known = Authenticator(settings, is_private=False)
    assert (await known.identify([], ["spiffe://site/cryofleet/orchestrator"])).is_platform
    for names in (["orchestrator"], ["spiffe://site/other/orchestrator"], []):
        with pytest.raises(Unauthenticated):
            await known.identify([], names)


async def test_over_a_socket_of_its_own_everybody_is_the_owner(tmp_path: Path) -> None:
    known = Authenticator(Settings(home=tmp_path, store=f"file://{tmp_path}"), is_private=True)
    caller = await known.identify([("authorization", "Bearer whatever")], [])
    assert (caller.role, caller.projects, caller.authenticated) == (Role.ADMIN, None, "socket")
    assert caller.user


def test_the_command_makes_a_token_that_is_taken(tmp_path: Path) -> None:
    made = CliRunner().invoke(cli, ["tokens", "new", "--user", "ana", "--role", "viewer", "--project", "apo", "--json"])
    assert made.exit_code == 0, made.output
    content = json.loads(made.stdout)
    path = tmp_path / "tokens"
    path.write_text(content["line"] + "\n" + entry(expires="2020-01-01T00:00:00+00:00", user="old"))
    found = TokenFile(path).find(content["token"])
    assert found is not None
    assert (found.user, found.role, found.projects, found.expires) == ("ana", Role.VIEWER, frozenset({"apo"}), None)
    listed = CliRunner().invoke(cli, ["tokens", "list", str(path), "--json"])
    assert [(row["user"], row["expired"]) for row in json.loads(listed.stdout)] == [("ana", False), ("old", True)]
    assert found.digest not in listed.output


def test_the_command_asks_for_projects_unless_for_an_admin() -> None:
    refused = CliRunner().invoke(cli, ["tokens", "new", "--user", "ana", "--role", "viewer"])
    assert (refused.exit_code, "--project" in refused.output) == (2, True)
    made = CliRunner().invoke(cli, ["tokens", "new", "--user", "ana", "--role", "admin", "--days", "1", "--json"])
    (found,), problems = read_entries([json.loads(made.stdout)["line"]])
    assert not problems
    assert found.projects is None
    assert found.expires is not None
    assert timedelta(hours=23) < found.expires - datetime.now(UTC) <= timedelta(days=1)


def test_a_client_reads_its_token_from_a_file_that_nobody_else_may_read(tmp_path: Path) -> None:
    path = tmp_path / "token"
    settings = Settings.from_environment({"CRYOFLEET_HOME": str(tmp_path), "CRYOFLEET_TOKEN_FILE": str(path)})
    with pytest.raises(FailedPrecondition, match="cannot read the token"):
        token_source(settings)
    path.write_text("first\n")
    path.chmod(0o640)
    with pytest.raises(FailedPrecondition, match="chmod 600"):
        token_source(settings)
    path.chmod(0o600)
    source = token_source(settings)
    assert source is not None
    assert source() == "first"
    path.write_text("second")
    assert source() == "second", "what renews it writes it there"
    os.truncate(path, 0)
    with pytest.raises(FailedPrecondition, match="one token and nothing else"):
        source()
    assert token_source(Settings.from_environment({"CRYOFLEET_HOME": str(tmp_path)})) is None
    in_environment = Settings.from_environment({"CRYOFLEET_HOME": str(tmp_path), "CRYOFLEET_TOKEN": "third"})
    named = token_source(in_environment)
    assert named is not None
    assert named() == "third"
