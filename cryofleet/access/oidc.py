"""Tokens of an OpenID Connect provider: JWTs, checked by PyJWT against the provider's published keys."""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import jwt

from cryofleet.access.caller import OIDC, Caller
from cryofleet.access.roles import Role
from cryofleet.access.tokens import EVERY_PROJECT, checked_user
from cryofleet.errors import FailedPrecondition, Failure, Unauthenticated
from cryofleet.settings import PROJECT_PATTERN, OidcSettings

logger = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Asymmetric ones alone: with a shared secret, whoever can check a token could make one."""
KEYS_SECONDS = 3600.0
"""How long fetched keys are believed."""
REFETCH_SECONDS = 30.0
"""Keys are fetched no more often, however many tokens name one that is not known."""
_FETCH_TIMEOUT_SECONDS = 5.0
_MOST_BYTES = 2**20

_REASONS: tuple[tuple[type[jwt.PyJWTError], str], ...] = (
    (jwt.ExpiredSignatureError, "it has expired"),
    (jwt.ImmatureSignatureError, "it is not valid yet"),
    (jwt.InvalidAudienceError, "it is meant for another audience"),
    (jwt.InvalidIssuerError, "it is from another issuer"),
    (jwt.MissingRequiredClaimError, "it lacks a claim: exp, iss and aud are needed"),
    (jwt.InvalidAlgorithmError, "it is signed by an algorithm that is not taken"),
    (jwt.InvalidSignatureError, "its signature is wrong"),
)


def is_jwt(token: str) -> bool:
    """Whether a token has the form of a JWT, which no static token has."""
    return token.count(".") == 2


class _Keys:
    """The provider's public keys, from a file or an https URL."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at = -KEYS_SECONDS
        self._tried_at = -KEYS_SECONDS
        # No redirects, and nothing but https: another host, or another scheme, is never asked for keys.
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            self._opener.add_handler(handler)

    @property
    def empty(self) -> bool:
        """Whether there are no keys."""
        return not self._keys

    def needs_fetch(self, key_id: str) -> bool:
        """Whether the keys are old, or lack this one; not so soon after they were last asked for."""
        now = time.monotonic()
        known = key_id in self._keys and now - self._fetched_at < KEYS_SECONDS
        return not known and now - self._tried_at >= REFETCH_SECONDS

    def find(self, key_id: str) -> jwt.PyJWK | None:
        # Old keys are taken on while the provider is away, for as long again.
        old = time.monotonic() - self._fetched_at >= 2 * KEYS_SECONDS
        return None if old else self._keys.get(key_id)

    def fetch(self) -> None:
        """Blocks. Where there are no keys to be had the old ones stay."""
        with self._lock:
            self._tried_at = time.monotonic()
            try:
                content = json.loads(self._read())
                keys = {}
                for key in jwt.PyJWKSet.from_dict(content).keys:
                    if key.algorithm_name in ALGORITHMS and key.public_key_use in (None, "sig"):
                        keys[key.key_id or ""] = key
            except (OSError, ValueError, AttributeError, TypeError, HTTPException, jwt.PyJWTError) as error:
                logger.error("no keys from %s: %s", self._source, error)
                return
            self._keys, self._fetched_at = keys, self._tried_at

    def _read(self) -> bytes:
        if not self._source.startswith("https://"):
            return Path(self._source).read_bytes()
        with self._opener.open(self._source, timeout=_FETCH_TIMEOUT_SECONDS) as answer:
            content: bytes = answer.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        return content


class OidcVerifier:
    """Checks JWTs and reads from their claims who the user is."""

    def __init__(self, settings: OidcSettings) -> None:
        """Raises FailedPrecondition where a file of keys can't be read; a URL may be away until it is needed."""
        self._settings = settings
        self._keys = _Keys(settings.jwks)
        if not settings.jwks.startswith("https://"):
            self._keys.fetch()
            if self._keys.empty:
                raise FailedPrecondition(f"{settings.jwks} holds no public keys (CRYOFLEET_OIDC_JWKS)")

    def needs_fetch(self, token: str) -> bool:
        """Whether `fetch` should be called, in a thread, before `verify`."""
        return self._keys.needs_fetch(_key_id(token))

    def fetch(self) -> None:
        """Blocks while it asks for the provider's keys."""
        self._keys.fetch()

    def verify(self, token: str) -> Caller:
        """The token's user. Raises Unauthenticated saying why it is not taken; never with what is in it."""
        settings = self._settings
        key = self._keys.find(_key_id(token))
        if key is None:
            raise Unauthenticated("the token is not taken: it is signed by a key that its provider does not publish")
        try:
            claims = jwt.decode(
                token,
                key,
                # The key says how it signs; the token's own header has no say in it.
                algorithms=[key.algorithm_name],
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=settings.leeway_seconds,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.PyJWTError as error:
            reason = next((text for kind, text in _REASONS if isinstance(error, kind)), "it is no valid JWT")
            raise Unauthenticated(f"the token is not taken: {reason}") from None
        try:
            user = checked_user(_claim(claims, settings.user_claim))
        except Failure:
            raise Unauthenticated(f"the token is not taken: its claim {settings.user_claim} names no user") from None
        role = self._role(claims)
        if role is None:
            raise Unauthenticated(f"the token is not taken: its claim {settings.role_claim} gives {user} no role here")
        return Caller(user, role, _every(role, self._projects(claims)), OIDC)

    def _role(self, claims: Mapping[str, Any]) -> Role | None:
        """The highest of those that the claim gives."""
        roles = [
            Role.of(self._settings.roles[word])
            for word in _words(_claim(claims, self._settings.role_claim))
            if word in self._settings.roles
        ]
        return max(roles, default=None)

    def _projects(self, claims: Mapping[str, Any]) -> frozenset[str] | None:
        """What is no project's name is another application's business."""
        words = _words(_claim(claims, self._settings.projects_claim))
        return None if EVERY_PROJECT in words else frozenset(w for w in words if PROJECT_PATTERN.fullmatch(w))


def _every(role: Role, projects: frozenset[str] | None) -> frozenset[str] | None:
    return None if role is Role.ADMIN else projects


def _key_id(token: str) -> str:
    try:
        found = jwt.get_unverified_header(token).get("kid", "")
    except jwt.PyJWTError:
        raise Unauthenticated("the token is not taken: it is no valid JWT") from None
    return found if isinstance(found, str) else ""


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    """A claim by its name, or by a path of names as realm_access.roles."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(part)
    return found


def _words(value: Any) -> list[str]:
    """A list of words, or words in one text."""
    if isinstance(value, str):
        return value.split()
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []
