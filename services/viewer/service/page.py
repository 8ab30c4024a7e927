"""Serves the page over HTTP beside the viewer's own gRPC address."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator
from typing import Any

import panel as pn
from panel.io.resources import LOCAL_DIST
from panel.io.server import get_server
from tornado.httputil import HTTPHeaders
from tornado.web import OutputTransform

from cryofleet.errors import FailedPrecondition
from cryofleet.server import CallContext
from cryofleet.server.instance import Instance
from cryofleet.settings import Settings
from cryofleet.v1 import viewer_pb2
from cryofleet.views import Page
from services.viewer.service.registry import service
from services.viewer.service.sign_in import Door, SignIns
from services.viewer.service.tls import page_context

_LOCAL = ("localhost", "127.0.0.1")
_HEADERS = {
    # Panel makes functions of texts, and styles in place. Nothing comes from elsewhere, and nothing goes there.
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; frame-ancestors 'none'; "
        "form-action 'self'; base-uri 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class _Headers(OutputTransform):
    """Adds headers to every answer."""

    def transform_first_chunk(
        self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
    ) -> tuple[int, HTTPHeaders, bytes]:
        for name, value in _HEADERS.items():
            headers.setdefault(name, value)
        return status_code, headers, chunk


_urls: dict[Instance, str] = {}


@contextlib.asynccontextmanager
async def _lifespan(instance: Instance) -> AsyncIterator[None]:
    settings = instance.settings
    host, port, key = _place(settings)
    sign_ins = SignIns(settings, key)
    secure = settings.tls is not None
    cookie_name = f"cryofleet-{port}"

    def page() -> Any:
        cookie = pn.state.cookies.get(cookie_name)
        found = sign_ins.of(cookie)
        if found is None:  # signed out between the door and here
            return pn.pane.Str("Signed out: load the page again.")

        location = pn.state.location

        def sign_out() -> None:
            sign_ins.drop(cookie)
            if location is not None:
                location.reload = True

        # Else style sheets are asked of Panel's own network where a late browser gets a session without a page.
        if pn.state.curdoc is not None:
            pn.state.curdoc.template_variables["dist_url"] = LOCAL_DIST
        made = Page(found.client, on_sign_out=sign_out)
        return made.template()

    pn.extension(
        "tabulator", notifications=True, disconnect_notification="The page has lost the viewer; load it again."
    )
    _quiet()
    server = get_server(
        {"/": page},
        port=port,
        address=host,
        websocket_origin=_origins(settings, host, port),
        title="Cryofleet",
        auth_provider=Door(sign_ins, cookie_name, secure),
        http_server_kwargs={"ssl_options": page_context(settings.tls) if settings.tls else None},
        # A visitor who went away is forgotten within half a minute.
        unused_session_lifetime_milliseconds=15_000,
        check_unused_sessions_milliseconds=10_000,
    )
    server._tornado.add_transform(_Headers)
    server.start()
    instance.metrics.watch("cryofleet_page_visitors", "Pages that are open.", lambda: len(server.get_sessions("/")))
    scheme = "https" if secure else "http"
    _urls[instance] = f"{scheme}://{host}:{port}/" + (f"login?key={sign_ins.key}" if sign_ins.key else "")
    try:
        yield
    finally:
        _urls.pop(instance)
        server.stop()
        sign_ins.close()


service.lifespan = _lifespan


@service.rpc("GetPage")
async def get_page(request: viewer_pb2.GetPageRequest, call: CallContext) -> viewer_pb2.GetPageResponse:
    """Say where the page is."""
    return viewer_pb2.GetPageResponse(url=_urls[call.instance])


def _quiet() -> None:
    """Leave out what libraries say of each page, and leave what they warn of to the process's own log."""
    logging.getLogger("tornado.access").setLevel(logging.ERROR)  # it would write the key of the first address
    for name in ("bokeh", "panel", "param"):
        library = logging.getLogger(name)
        library.setLevel(logging.WARNING)
        library.handlers.clear()
        library.propagate = True
    logging.getLogger("bokeh.server.views.ws").setLevel(logging.ERROR)  # a visitor who left is nothing to warn of


def _place(settings: Settings) -> tuple[str, int, str]:
    """Host and port to listen on, and the key; those of the last start where they can be, so that open pages go on.

    Raises FailedPrecondition where the page would be open to a network in plain.
    """
    host, _, port_text = settings.page.rpartition(":")
    port = int(port_text)
    if host not in _LOCAL and settings.tls is None:
        raise FailedPrecondition(
            f"CRYOFLEET_PAGE is {settings.page}: a page that a network reaches needs TLS: set "
            "CRYOFLEET_TLS_CERTIFICATE, CRYOFLEET_TLS_KEY and CRYOFLEET_TLS_AUTHORITY"
        )
    if not settings.address.startswith("unix:"):
        return host, port or _free_port(host, 0), ""
    kept = settings.run_folder / "page.json"
    try:
        state = json.loads(kept.read_text())
        last, key = int(state["port"]), str(state["key"])
    except (OSError, ValueError, KeyError, TypeError):
        last, key = 0, secrets.token_urlsafe(32)
    port = port or _free_port(host, last)
    new = kept.with_suffix(".new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"port": port, "key": key}, file)
    new.replace(kept)
    return host, port, key


def _free_port(host: str, wished: int) -> int:
    """The port wished for where nobody has it, else any that is free."""
    address = socket.getaddrinfo(host, wished, type=socket.SOCK_STREAM)[0]
    with socket.socket(address[0]) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address[4])
        except OSError:
            return _free_port(host, 0)
        return int(probe.getsockname()[1])


def _origins(settings: Settings, host: str, port: int) -> list[str]:
    """Where pages may be from that open a web socket here."""
    if settings.page_origins:
        return list(settings.page_origins)
    return [f"{name}:{port}" for name in dict.fromkeys(("localhost", "127.0.0.1", host))]
