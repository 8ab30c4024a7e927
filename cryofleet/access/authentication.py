"""Finding out who calls: by the socket, by a token, by a certificate of the platform."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase

from cryofleet.access.caller import CERTIFICATE, TOKEN, Caller, owner
from cryofleet.access.oidc import OidcVerifier, is_jwt
from cryofleet.access.roles import Role
from cryofleet.access.tokens import TokenFile
from cryofleet.errors import Unauthenticated
from cryofleet.settings import Settings

logger = logging.getLogger(__name__)

_HEADER = "authorization"
_SCHEME = "bearer "
_MOST_CHARACTERS = 16 * 1024


def certificate_names(auth_context: Mapping[str, Sequence[bytes]]) -> list[str]:
    """Names in the verified certificate of a call's other side: its alternative names, else its common name."""
    for field in ("x509_subject_alternative_name", "x509_common_name"):
        names = [name.decode(errors="replace") for name in auth_context.get(field, ())]
        if names:
            return names
    return []


class Authenticator:
    """Knows callers by what the settings trust."""

    def __init__(self, settings: Settings, is_private: bool) -> None:
        """`is_private` says that calls come over a Unix socket that only this process's user can reach.

        Raises FailedPrecondition where the tokens or the provider's keys can't be read.
        """
        self._owner = owner() if is_private else None
        self._platform_names = settings.platform_names
        self._tokens = TokenFile(settings.tokens) if settings.tokens is not None and not is_private else None
        self._oidc = OidcVerifier(settings.oidc) if settings.oidc is not None and not is_private else None

    async def identify(self, metadata: Iterable[tuple[str, str | bytes]], certificate: Sequence[str]) -> Caller:
        """The caller, by the call's metadata and the names in its certificate.

        A token says more than a certificate, and is looked at first. Raises Unauthenticated.
        """
        if self._owner is not None:
            return self._owner
        values = [value for key, value in metadata if key == _HEADER]
        if not values:
            return self._by_certificate(certificate)
        if len(values) > 1:
            raise Unauthenticated("one authorization header is taken, and more came")
        value = values[0]
        if not isinstance(value, str) or not value.lower().startswith(_SCHEME) or len(value) > _MOST_CHARACTERS:
            raise Unauthenticated("the authorization header must be: Bearer TOKEN")
        token = value[len(_SCHEME) :].strip()
        return await self._by_jwt(token) if is_jwt(token) else self._by_token(token)

    def _by_certificate(self, names: Sequence[str]) -> Caller:
        for name in names:
            if any(fnmatchcase(name, pattern) for pattern in self._platform_names):
                return Caller(name, Role.OPERATOR, None, CERTIFICATE)
        raise Unauthenticated("a token is needed: set CRYOFLEET_TOKEN or CRYOFLEET_TOKEN_FILE")

    def _by_token(self, token: str) -> Caller:
        entry = self._tokens.find(token) if self._tokens is not None else None
        if entry is None:
            raise Unauthenticated("the token is not taken: it is not known here")
        if entry.expires is not None and entry.expires <= datetime.now(UTC):
            raise Unauthenticated("the token is not taken: it has expired")
        return Caller(entry.user, entry.role, None if entry.role is Role.ADMIN else entry.projects, TOKEN)

    async def _by_jwt(self, token: str) -> Caller:
        if self._oidc is None:
            raise Unauthenticated("the token is not taken: no OpenID Connect provider is set up here")
        if self._oidc.needs_fetch(token):
            await asyncio.to_thread(self._oidc.fetch)
        return self._oidc.verify(token)
