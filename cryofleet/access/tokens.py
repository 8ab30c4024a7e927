"""Static bearer tokens: a file of their hashes, one JSON object a line.

A token is 256 random bits, so that a plain SHA-256 of it tells nothing: there is nothing to guess. The file is read
anew when it changes; a line taken out is a token that works no more.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryofleet.access.roles import Role
from cryofleet.errors import FailedPrecondition, Failure, InvalidArgument
from cryofleet.settings import PROJECT_PATTERN

logger = logging.getLogger(__name__)

EVERY_PROJECT = "*"
_PREFIX = "cryofleet_"
_USER = re.compile(r"[^\s\x00-\x1f\x7f]{1,128}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"sha256", "user", "role", "projects", "expires"}


@dataclass(frozen=True)
class TokenEntry:
    """What a token stands for."""

    digest: str = field(repr=False)
    user: str
    role: Role
    projects: frozenset[str] | None
    """None for every project."""
    expires: datetime | None = None

    def to_line(self) -> str:
        """The line of the file."""
        content: dict[str, object] = {
            "sha256": self.digest,
            "user": self.user,
            "role": self.role.word,
            "projects": [EVERY_PROJECT] if self.projects is None else sorted(self.projects),
        }
        if self.expires is not None:
            content["expires"] = self.expires.astimezone(UTC).isoformat(timespec="seconds")
        return json.dumps(content, ensure_ascii=False)

    @classmethod
    def from_line(cls, line: str) -> TokenEntry:
        """Raises InvalidArgument saying what is wrong, without the hash."""
        try:
            content = json.loads(line)
        except ValueError:
            raise InvalidArgument("it is not JSON") from None
        if not isinstance(content, dict):
            raise InvalidArgument("it is no JSON object")
        unknown = sorted(set(content) - _FIELDS)
        if unknown:
            raise InvalidArgument(f"it has {', '.join(map(repr, unknown))}; known are {', '.join(sorted(_FIELDS))}")
        digest, expires = content.get("sha256"), content.get("expires")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise InvalidArgument("sha256 must be 64 hexadecimal digits")
        return cls(
            digest=digest,
            user=checked_user(content.get("user")),
            role=Role.of(str(content.get("role", ""))),
            projects=checked_projects(content.get("projects")),
            expires=None if expires is None else _time(expires),
        )


def checked_user(user: object) -> str:
    """The name of a user. Raises InvalidArgument for what is none."""
    if not isinstance(user, str) or not _USER.fullmatch(user):
        raise InvalidArgument("user must be a name of 1 to 128 characters without white space")
    return user


def checked_projects(projects: object) -> frozenset[str] | None:
    """A list of projects; None for ["*"], which is every project. Raises InvalidArgument."""
    if not isinstance(projects, list) or not projects:
        raise InvalidArgument('projects must be a list of projects, or ["*"] for every project')
    if projects == [EVERY_PROJECT]:
        return None
    for project in projects:
        if not isinstance(project, str) or not PROJECT_PATTERN.fullmatch(project):
            raise InvalidArgument(f"project {project!r} must match {PROJECT_PATTERN.pattern}")
    return frozenset(projects)


def _time(text: object) -> datetime:
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        raise InvalidArgument(f"expires is {text!r}; it must be a time as 2027-01-31T12:00:00+00:00") from None
    if found.tzinfo is None:
        raise InvalidArgument(f"expires is {text!r}; it must name its time zone, as in 2027-01-31T12:00:00+00:00")
    return found


def new_token() -> str:
    """A token that nobody has seen yet."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(token: str) -> str:
    """What the file keeps of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def new_entry(
    user: str, role: Role, projects: Sequence[str], expires: datetime | None = None
) -> tuple[str, TokenEntry]:
    """A new token with its entry. Raises InvalidArgument."""
    token = new_token()
    return token, TokenEntry(digest_of(token), checked_user(user), role, checked_projects(list(projects)), expires)


def read_entries(lines: Iterable[str]) -> tuple[list[TokenEntry], list[str]]:
    """The entries, and what is wrong with lines that are none; empty lines and comments (#) are neither."""
    entries: list[TokenEntry] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            entries.append(TokenEntry.from_line(line))
        except Failure as failure:
            problems.append(f"line {number}: {failure}")
    return entries, problems


class TokenFile:
    """The tokens of a file, as it is now."""

    def __init__(self, path: Path) -> None:
        """Raises FailedPrecondition where the file can't be read, or may be changed by others."""
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._entries: list[TokenEntry] = []
        self._read()

    def find(self, token: str) -> TokenEntry | None:
        """The token's entry, expired or not.

        Every hash is compared, each in constant time: how long it takes says nothing of how near a guess was.
        """
        try:
            self._read()
        except FailedPrecondition as failure:
            # Without the file nobody knows which tokens were taken back.
            if self._entries:
                logger.error("no token is taken: %s", failure)
            self._entries, self._seen = [], None
        digest = digest_of(token)
        found = None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry
        return found

    def _read(self) -> None:
        try:
            status = self._path.stat()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode)
            if seen == self._seen:
                return
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise FailedPrecondition(f"{self._path} may be changed by others; run: chmod go-w {self._path}")
            entries, problems = read_entries(self._path.read_text().splitlines())
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise FailedPrecondition(f"cannot read the tokens {self._path}: {reason}") from None
        for problem in problems:
            # The others hold: one slip of the pen locks nobody else out, and lets nobody in.
            logger.error("%s: %s; this token is not taken", self._path, problem)
        logger.info("read %d tokens", len(entries))
        self._entries, self._seen = entries, seen
