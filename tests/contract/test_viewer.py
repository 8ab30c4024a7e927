"""The viewer's page over HTTP: who gets in, and what is sent along."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import grpc
import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse
from tornado.websocket import websocket_connect

from cryofleet.access.tokens import new_token
from cryofleet.errors import FailedPrecondition
from cryofleet.settings import Settings
from cryofleet.testing import running_server, settings_for
from cryofleet.v1 import viewer_pb2, viewer_pb2_grpc
from services.viewer.service import service
from services.viewer.service.sign_in import SignIns

# Bokeh's own, with pandas 3.1.
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.reset_index")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    own = f"unix:{tmp_path}/run"
    pools = {name: f"{own}/{name}.sock" for name in ("io", "picking", "alignment", "learning", "simulation")}
    return settings_for(tmp_path, pools=pools, orchestrator=f"{own}/orchestrator.sock")


@pytest.fixture
async def url(settings: Settings) -> AsyncIterator[str]:
    async with running_server(service, settings) as channel:
        yield await page_of(channel)


async def page_of(channel: grpc.aio.Channel) -> str:
    response = await viewer_pb2_grpc.ViewerServiceStub(channel).GetPage(viewer_pb2.GetPageRequest())
    return str(response.url)


async def get(url: str, cookie: str = "", **options: object) -> HTTPResponse:
    request = HTTPRequest(url, headers={"Cookie": cookie}, follow_redirects=False, **options)  # type: ignore[arg-type]
    return await AsyncHTTPClient().fetch(request, raise_error=False)


async def signed_in(url: str) -> str:
    answer = await get(url)
    assert (answer.code, answer.headers["Location"]) == (302, "/")
    header = answer.headers["Set-Cookie"]
    assert "HttpOnly" in header
    assert "SameSite=Lax" in header
    return header.partition(";")[0]


async def test_only_who_has_the_key_sees_the_page(url: str) -> None:
    site = url.partition("login")[0]
    assert (await get(site)).code == 302
    assert (await get(site, "cryofleet=x")).headers["Location"].startswith("./login?next=")
    refused = await get(f"{site}login?key=wrong")
    assert refused.code == 403
    assert "Set-Cookie" not in refused.headers
    cookie = await signed_in(url)
    page = await get(site, cookie)
    assert page.code == 200
    assert b"Cryofleet" in page.body
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert b"https://" not in page.body.replace(b"https://github.com", b"").split(b"<body")[0]
    # No web socket without the cookie, nor from another site.
    socket = site.replace("http", "ws") + "ws"
    for headers in ({}, {"Cookie": cookie, "Origin": "http://elsewhere.example"}):
        with pytest.raises(HTTPClientError):
            await websocket_connect(HTTPRequest(socket, headers=headers), subprotocols=["bokeh", "token"])
    await get(f"{site}logout", cookie)
    assert (await get(site, cookie)).code == 302


async def test_signing_in_leads_nowhere_else(url: str) -> None:
    for wanted in ("//elsewhere.example", "https://elsewhere.example", "/\\elsewhere.example"):
        answer = await get(f"{url}&next={wanted}")
        assert answer.headers["Location"] == "/"
    assert (await get(f"{url}&next=/%3Fview%3Dpicking")).headers["Location"] == "/?view=picking"
    body = (await get(f"{url.partition('?')[0]}?next=%22%3E%3Cscript%3E&project=%3Cb%3E")).body
    assert b"<script>" not in body
    assert b"<b>" not in body


async def test_key_and_port_are_kept_over_a_restart(settings: Settings) -> None:
    urls = []
    for _ in range(2):
        async with running_server(service, settings) as channel:
            urls.append(await page_of(channel))
    assert urls[0] == urls[1]
    kept = settings.run_folder / "page.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert parse_qs(urlsplit(urls[0]).query)["key"] == [json.loads(kept.read_text())["key"]]


async def test_a_page_that_a_network_reaches_needs_tls(settings: Settings) -> None:
    with pytest.raises(FailedPrecondition, match="needs TLS"):
        async with running_server(service, replace(settings, page="0.0.0.0:0")):
            pass


async def test_a_platform_elsewhere_asks_for_a_token(settings: Settings) -> None:
    away = replace(settings, orchestrator="cryo.example:50060")
    async with running_server(service, away) as channel:
        url = await page_of(channel)
        assert "key" not in url
        token = new_token()
        body = f"project=default&token={token}"
        answer = await get(f"{url}login", method="POST", body=body)
        # Without TLS no token is sent anywhere.
        assert answer.code == 403
        assert b"mutual TLS" in answer.body
        assert token.encode() not in answer.body
        foreign = HTTPRequest(f"{url}login", "POST", {"Origin": "http://elsewhere.example"}, body)
        assert (await AsyncHTTPClient().fetch(foreign, raise_error=False)).code == 403
        assert b"This is no token" in (await get(f"{url}login", method="POST", body="project=default&token=")).body


async def test_who_left_is_forgotten(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    sign_ins = SignIns(settings, "key")
    cookie = sign_ins.by_key("key")
    assert sign_ins.of(cookie) is not None
    assert sign_ins.by_key("") is None
    monkeypatch.setattr("services.viewer.service.sign_in._IDLE_SECONDS", -1.0)
    assert sign_ins.of(cookie) is None
    assert sign_ins._known == {}
    await asyncio.sleep(0)
