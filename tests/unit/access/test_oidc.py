from __future__ import annotations

import hashlib
import hmac
import http.server
import json
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from jwt.utils import base64url_encode

from cryofleet.access import oidc
from cryofleet.access.certificates import make_set
from cryofleet.access.oidc import ALGORITHMS, OidcVerifier
from cryofleet.access.roles import Role
from cryofleet.errors import FailedPrecondition, InvalidArgument, Unauthenticated
from cryofleet.settings import OidcSettings, Settings
from tests.unit.access.keys import AUDIENCE, ISSUER, Provider

LEEWAY = OidcSettings("", "", "").leeway_seconds


def test_claims_say_who_it_is(tmp_path: Path) -> None:
    provider = Provider()
    caller = OidcVerifier(provider.settings(tmp_path)).verify(provider.token())
    assert (caller.user, caller.role, caller.projects) == ("ana", Role.OPERATOR, frozenset({"apo"}))
    assert caller.authenticated == "oidc"


def test_claims_by_settings(tmp_path: Path) -> None:
    provider = Provider()
    settings = provider.settings(
        tmp_path,
        user_claim="preferred_username",
        role_claim="realm_access.roles",
        projects_claim="https://site.example/projects",
        roles={"cryoem-users": "viewer", "cryoem-staff": "admin", "cryoem-operators": "operator"},
    )
    verifier = OidcVerifier(settings)
    roles = {"roles": ["mail", "cryoem-users", "cryoem-operators"]}
    claims: dict[str, Any] = {
        "preferred_username": "ana@site.example",
        "realm_access": roles,
        "https://site.example/projects": "apo ribo No/Project",
    }
    caller = verifier.verify(provider.token(**claims))
    assert (caller.user, caller.role, caller.projects) == (
        "ana@site.example",
        Role.OPERATOR,
        frozenset({"apo", "ribo"}),
    )
    roles["roles"].append("cryoem-staff")
    assert verifier.verify(provider.token(**claims)).projects is None, "an admin has them all"
    with pytest.raises(Unauthenticated, match=r"gives ana@site\.example no role"):
        verifier.verify(provider.token(**{**claims, "realm_access": {"roles": ["mail"]}}))
    with pytest.raises(Unauthenticated, match="preferred_username names no user"):
        verifier.verify(provider.token())


def test_no_projects_are_none_and_a_star_is_all(tmp_path: Path) -> None:
    provider = Provider()
    verifier = OidcVerifier(provider.settings(tmp_path))
    assert verifier.verify(provider.token(cryofleet_projects=None)).projects == frozenset()
    assert verifier.verify(provider.token(cryofleet_projects=["*"])).projects is None


def test_tokens_that_are_not_taken(tmp_path: Path) -> None:
    provider = Provider()
    verifier = OidcVerifier(provider.settings(tmp_path))
    now = time.time()
    for changes, words in (
        ({"exp": now - LEEWAY - 2}, "it has expired"),
        ({"nbf": now + LEEWAY + 60}, "not valid yet"),
        ({"iat": now + LEEWAY + 60}, "not valid yet"),
        ({"aud": "another"}, "another audience"),
        ({"aud": None}, "lacks a claim"),
        ({"iss": "https://login.evil.example"}, "another issuer"),
        ({"iss": None}, "lacks a claim"),
        ({"exp": None}, "lacks a claim"),
        ({"sub": "an a"}, "names no user"),
        ({"cryofleet_role": None}, "no role"),
        ({"cryofleet_role": "root"}, "no role"),
    ):
        token = provider.token(**changes)
        with pytest.raises(Unauthenticated, match=words) as caught:
            verifier.verify(token)
        assert token not in str(caught.value)
    # Clocks may differ a little.
    verifier.verify(provider.token(exp=now - LEEWAY / 2))


def test_forged_tokens(tmp_path: Path) -> None:
    provider, stranger = Provider(), Provider()
    verifier = OidcVerifier(provider.settings(tmp_path))
    with pytest.raises(Unauthenticated, match="its signature is wrong"):
        verifier.verify(stranger.token())
    with pytest.raises(Unauthenticated, match="a key that its provider does not publish"):
        verifier.verify(Provider(key_id="unknown").token())
    claims = jwt.decode(provider.token(), options={"verify_signature": False})
    public = provider.key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    unsigned = jwt.encode(claims, "", algorithm="none", headers={"kid": provider.key_id})
    # By the public key as if it were a shared secret; PyJWT itself refuses to sign so.
    head = base64url_encode(json.dumps({"alg": "HS256", "kid": provider.key_id}).encode()).decode()
    message = f"{head}.{provider.token().split('.')[1]}"
    digest = hmac.new(public, message.encode(), hashlib.sha256).digest()
    signed = f"{message}.{base64url_encode(digest).decode()}"
    for token in (unsigned, signed):
        with pytest.raises(Unauthenticated, match="algorithm that is not taken"):
            verifier.verify(token)
    for token in ("a.b.c", "..", provider.token()[:-6] + "."):
        with pytest.raises(Unauthenticated, match="the token is not taken"):
            verifier.verify(token)


def test_only_keys_of_asymmetric_algorithms_are_taken(tmp_path: Path) -> None:
    assert not [name for name in ALGORITHMS if name.startswith("HS") or name == "none"]
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "first", "alg": "HS256"}]}))
    with pytest.raises(FailedPrecondition, match="holds no public keys"):
        OidcVerifier(OidcSettings(ISSUER, AUDIENCE, str(path)))
    with pytest.raises(FailedPrecondition, match="holds no public keys"):
        OidcVerifier(OidcSettings(ISSUER, AUDIENCE, str(tmp_path / "none.json")))


class _Published(http.server.BaseHTTPRequestHandler):
    text: ClassVar[str] = ""
    asked: ClassVar[int] = 0
    redirect: ClassVar[str] = ""

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(302 if self.redirect else 200)
        if self.redirect:
            self.send_header("Location", self.redirect)
        self.end_headers()
        self.wfile.write(self.text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an https server of keys."""
    make_set(tmp_path / "certificates")
    own = tmp_path / "certificates" / "io"
    monkeypatch.setenv("SSL_CERT_FILE", str(own / "ca.crt"))
    _Published.asked, _Published.redirect = 0, ""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Published)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own / "tls.crt", own / "tls.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"https://localhost:{server.server_port}/keys"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_keys_are_fetched_once_and_again_where_one_is_new(published: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Provider(), Provider(key_id="second")
    _Published.text = first.published()
    verifier = OidcVerifier(OidcSettings(ISSUER, AUDIENCE, published))
    assert _Published.asked == 0, "the provider may be away while this starts"
    assert verifier.needs_fetch(first.token())
    verifier.fetch()
    assert verifier.verify(first.token()).user == "ana"
    assert not verifier.needs_fetch(first.token())
    # A key that is not known is asked for, and not again at once, whoever sends such tokens.
    assert not verifier.needs_fetch(second.token())
    monkeypatch.setattr(oidc, "REFETCH_SECONDS", 0.0)
    assert verifier.needs_fetch(second.token())
    _Published.text = second.published()
    verifier.fetch()
    assert verifier.verify(second.token()).user == "ana"
    with pytest.raises(Unauthenticated):
        verifier.verify(first.token())
    assert _Published.asked == 2


def test_keys_stay_while_the_provider_talks_nonsense(published: str, caplog: pytest.LogCaptureFixture) -> None:
    provider = Provider()
    _Published.text = provider.published()
    verifier = OidcVerifier(OidcSettings(ISSUER, AUDIENCE, published))
    verifier.fetch()
    for text in ("<html>", "[]", '{"keys": []}', '{"keys": 3}', " " * (2**20 + 1)):
        _Published.text = text
        verifier.fetch()
        assert verifier.verify(provider.token()).user == "ana"
    _Published.redirect = published
    verifier.fetch()
    assert _Published.asked == 7, "a redirect is not followed"
    assert "no keys from" in caplog.text


def test_a_server_of_another_authority_is_not_believed(published: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    provider = Provider()
    _Published.text = provider.published()
    verifier = OidcVerifier(OidcSettings(ISSUER, AUDIENCE, published))
    verifier.fetch()
    assert _Published.asked == 0
    with pytest.raises(Unauthenticated):
        verifier.verify(provider.token())


def test_settings_of_a_provider() -> None:
    given = {"CRYOFLEET_OIDC_ISSUER": ISSUER, "CRYOFLEET_OIDC_AUDIENCE": AUDIENCE}
    with pytest.raises(InvalidArgument, match="go together"):
        Settings.from_environment(given)
    with pytest.raises(InvalidArgument, match="it must be an https URL"):
        Settings.from_environment({**given, "CRYOFLEET_OIDC_JWKS": "http://login.site.example/keys"})
    given["CRYOFLEET_OIDC_JWKS"] = "/etc/keys.json"
    with pytest.raises(InvalidArgument, match="'staff=root'; it must be WORD=ROLE"):
        Settings.from_environment({**given, "CRYOFLEET_OIDC_ROLES": "staff=root"})
    found = Settings.from_environment({**given, "CRYOFLEET_OIDC_ROLES": "staff=admin a=b=viewer"}).oidc
    assert found is not None
    assert found.roles == {"staff": "admin", "a=b": "viewer"}
    plain = Settings.from_environment(given).oidc
    assert plain is not None
    assert plain.roles == {"viewer": "viewer", "operator": "operator", "admin": "admin"}
