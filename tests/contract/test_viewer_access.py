"""The page on a platform over TLS: visitors do what their tokens may, and nothing in the viewer's own right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from urllib.parse import urlencode

import numpy as np
import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse

from cryofleet.artifacts import ResultWriter, digest_of
from cryofleet.client import Client
from cryofleet.errors import Failure
from cryofleet.testing import running_server
from cryofleet.v1 import io_pb2, viewer_pb2, viewer_pb2_grpc
from cryofleet.views import Page
from cryofleet.volumes import VolumeInfo, encode_volume
from services.viewer.service import service
from services.viewer.service.sign_in import SignIns
from tests.contract.test_access_runs import Site, certificates, site

__all__ = ["certificates", "site"]
# Bokeh's own, with pandas 3.1.
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.reset_index")


@pytest.fixture
async def url(site: Site) -> AsyncIterator[str]:
    settings = replace(
        site.instance,
        address=f"unix:{site.home}/run/viewer.sock",
        tls=site.tls("client"),
        tokens=None,
        orchestrator=site.address,
        pools={"io": site.io_address},
    )
    async with running_server(service, settings) as channel:
        response = await viewer_pb2_grpc.ViewerServiceStub(channel).GetPage(viewer_pb2.GetPageRequest())
        yield response.url


async def fetch(url: str, cookie: str = "", **fields: str) -> HTTPResponse:
    body = {"method": "POST", "body": urlencode(fields)} if fields else {}
    request = HTTPRequest(url, headers={"Cookie": cookie}, follow_redirects=False, validate_cert=False, **body)  # type: ignore[arg-type]
    return await AsyncHTTPClient().fetch(request, raise_error=False)


def volume_of(site: Site, project: str) -> str:
    writer = ResultWriter(site.store, project, digest_of(project.encode()))
    voxels = np.random.default_rng(1).normal(size=(4, 20, 30)).astype(np.float32)
    uri = writer.put("t.mrc", encode_volume(voxels, VolumeInfo((4, 20, 30), 10.0, "dark")))
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0.0)
    return uri


async def test_a_token_opens_its_own_projects(site: Site, url: str) -> None:
    assert url.startswith("https://")
    assert "key" not in url
    for token, project, words in (
        ("nonsense", "apo", b"token"),
        (site.tokens["ben"], "apo", b"apo"),
        (site.tokens["ana"], "ribo", b"ribo"),
    ):
        answer = await fetch(f"{url}login", token=token, project=project)
        assert answer.code == 403
        assert words in answer.body
        assert "Set-Cookie" not in answer.headers
    answer = await fetch(f"{url}login", token=site.tokens["ana"], project="apo")
    assert answer.code == 302
    assert "Secure" in answer.headers["Set-Cookie"]
    assert site.tokens["ana"] not in str(answer.headers)
    page = await fetch(url, answer.headers["Set-Cookie"].partition(";")[0])
    assert page.code == 200
    assert site.tokens["ana"].encode() not in page.body


async def entered(site: Site, user: str, project: str) -> tuple[SignIns, str, Client]:
    settings = replace(site.instance, tls=site.tls("client"), orchestrator=site.address, pools={"io": site.io_address})
    sign_ins = SignIns(settings, "")
    cookie = await sign_ins.by_token(site.tokens[user], project)
    found = sign_ins.of(cookie)
    assert found is not None
    return sign_ins, cookie, found.client


async def test_visitors_see_what_their_tokens_let_them(site: Site) -> None:
    apo, ribo = volume_of(site, "apo"), volume_of(site, "ribo")
    sign_ins, _, vera = await entered(site, "vera", "apo")
    cut = await asyncio.to_thread(vera.cut_slice, io_pb2.CutSliceRequest(volume_uri=apo))
    assert cut.picture
    with pytest.raises(Failure, match="ribo") as refused:
        await asyncio.to_thread(vera.cut_slice, io_pb2.CutSliceRequest(volume_uri=ribo))
    assert refused.value.status == "PERMISSION_DENIED"
    # A viewer may look and not work; and nobody has the viewer's own files sent anywhere.
    with pytest.raises(Failure) as refused:
        await asyncio.to_thread(vera.run, "pick-dog", tomograms=["/etc/hostname"])
    assert refused.value.status == "PERMISSION_DENIED"
    others, _, ana = await entered(site, "ana", "apo")
    with pytest.raises(Failure, match="/etc/hostname"):
        await asyncio.to_thread(ana.run, "pick-dog", tomograms=["/etc/hostname"])
    assert site.audited(method="cryofleet.v1.IoService/Upload") == []
    sign_ins.close()
    others.close()


async def test_who_loses_their_token_is_asked_again(site: Site) -> None:
    sign_ins, cookie, client = await entered(site, "ana", "apo")
    page = Page(client, on_sign_out=lambda: sign_ins.drop(cookie))
    page._follow()
    await page.runs.refresh()
    assert page.runs.problem == ""
    site.tokens_file.write_text("")
    await page.runs.refresh()
    assert "token" in page.runs.problem
    assert sign_ins.of(cookie) is None
