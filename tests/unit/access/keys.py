"""A provider of OpenID Connect tokens for tests: its key, what it publishes of it, and tokens."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from cryofleet.settings import OidcSettings

ISSUER = "https://login.site.example"
AUDIENCE = "cryofleet"


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass
class Provider:
    """Signs tokens by its key."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=_new_key)
    key_id: str = "first"

    def published(self) -> str:
        """Its JWKS."""
        public = json.loads(ECAlgorithm.to_jwk(self.key.public_key()))
        return json.dumps({"keys": [{**public, "kid": self.key_id, "use": "sig", "alg": "ES256"}]})

    def token(self, headers: dict[str, str] | None = None, **changes: Any) -> str:
        """A token of ana's, operator of project apo; claims that are None are left out."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "ana",
            "iat": now,
            "exp": now + 300,
            "cryofleet_role": "operator",
            "cryofleet_projects": ["apo"],
            **changes,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(claims, self.key, algorithm="ES256", headers={"kid": self.key_id, **(headers or {})})

    def settings(self, folder: Path, **changes: Any) -> OidcSettings:
        """Settings that trust it, its keys in a file."""
        path = folder / "jwks.json"
        path.write_text(self.published())
        return OidcSettings(**{"issuer": ISSUER, "audience": AUDIENCE, "jwks": str(path), **changes})
