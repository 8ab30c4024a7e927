"""Who makes the call that is being answered."""

from __future__ import annotations

import contextlib
import contextvars
import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass

from cryofleet.access.roles import Role, Rule
from cryofleet.errors import PermissionDenied

SOCKET, CERTIFICATE, TOKEN, OIDC = "socket", "certificate", "token", "oidc"
"""How a caller is known: by a Unix socket of the owner, a certificate of the platform, or a bearer token."""


@dataclass(frozen=True)
class Caller:
    """A user, or another process of the platform."""

    user: str
    role: Role
    projects: frozenset[str] | None
    """Those that the caller may use; None for all."""
    authenticated: str
    """One of the words above."""

    @property
    def is_platform(self) -> bool:
        """Whether another process of the platform calls, for a run that somebody was allowed to start."""
        return self.authenticated == CERTIFICATE

    @property
    def role_word(self) -> str:
        """For messages and the audit log."""
        return "platform" if self.is_platform else self.role.word

    def may_use(self, project: str) -> bool:
        """Whether the project is one of the caller's."""
        return self.projects is None or project in self.projects

    def check_role(self, method: str, rule: Rule) -> None:
        """Raises PermissionDenied where the caller may not call the method."""
        short = method.rpartition(".")[2]
        if self.is_platform:
            if not rule.platform:
                raise PermissionDenied(f"{short} takes a user's token; the certificate of {self.user} does not do")
        elif rule.role is not None and self.role < rule.role:
            raise PermissionDenied(f"{short} takes the role {rule.role.word}; {self.user} is {self.role.word}")

    def check_project(self, project: str) -> None:
        """Raises PermissionDenied for a project of others, whether it exists or not."""
        if not self.may_use(project):
            raise PermissionDenied(f"{self.user} has no access to project {project!r}")


def owner() -> Caller:
    """Whoever reaches a Unix socket of this process is the user that it runs as."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user, which no list of users has
        user = str(os.getuid())
    return Caller(user, Role.ADMIN, None, SOCKET)


_caller: contextvars.ContextVar[Caller] = contextvars.ContextVar("cryofleet_caller")


@contextlib.contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """Inside, `current_caller` is this one; it goes along into worker threads with the context."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


def current_caller() -> Caller:
    """Who makes the call that is being answered. Raises PermissionDenied where that is not known."""
    try:
        return _caller.get()
    except LookupError:
        raise PermissionDenied("nobody is known to make this call") from None
