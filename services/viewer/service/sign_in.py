"""Who visits the page: a key on one machine, a token of the platform elsewhere.

A visitor's token goes on to the orchestrator and to io with each call, and they decide what it may do. It is kept in
this process's memory alone; the browser has a random number in its place.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any
from urllib.parse import urlsplit

from bokeh.server.auth_provider import AuthProvider
from tornado.web import RequestHandler

from cryofleet.channels import is_unix
from cryofleet.client import Client
from cryofleet.errors import Failure
from cryofleet.settings import DEFAULT_PROJECT, PROJECT_PATTERN, Settings
from cryofleet.views.slices import off_the_loop

_IDLE_SECONDS = 12 * 3600.0
_MOST = 1000
_LONGEST_TOKEN = 16_384
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Cryofleet</title>
<meta name="viewport" content="width=device-width"><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 sans-serif; margin: 0; background: light-dark(#f3f3f3, #212529) }}
header {{ background: #16242f; color: #fff; font-weight: 600; font-size: 17px; padding: 10px 24px }}
main {{ max-width: 24em; margin: 12vh auto; padding: 20px 28px 28px; border-radius: 6px;
border: 1px solid light-dark(#e0e0e0, #3a3f44); background: light-dark(#fff, #2b3035) }}
h1 {{ font-size: 20px; margin: 0 0 12px }} p {{ margin: 0 0 8px }} label {{ display: block }}
input {{ font: inherit; width: 100%; box-sizing: border-box; margin: 2px 0 1em; padding: 6px 8px; border-radius: 4px;
border: 1px solid light-dark(#c0c0c0, #5a5f64); background: light-dark(#fff, #212529) }}
button {{ font: inherit; padding: 6px 20px; color: #fff; background: #0072b2; border: 0; border-radius: 4px }}
.problem {{ color: light-dark(#b02a37, #ea868f) }} .problem:empty {{ display: none }}</style>
<header>Cryofleet</header><main><h1>Sign in</h1><p class="problem" role="alert">{problem}</p>{form}</main></html>"""
_FORM = """<form method="post"><input type="hidden" name="next" value="{next}">
<label>Token<input type="password" name="token" required autofocus autocomplete="off"></label>
<label>Project<input name="project" value="{project}" required></label><button>Sign in</button></form>"""
_NO_FORM = "<p>Open the address that <code>cryofleet up</code> prints: it signs you in.</p>"


@dataclass
class SignIn:
    """A visitor who proved who they are."""

    client: Client
    used_at: float = field(default_factory=time.monotonic)


class SignIns:
    """All who are signed in, by the number in their browser's cookie."""

    def __init__(self, settings: Settings, key: str) -> None:
        """`key` signs in where the platform is this user's own; nothing does where it is empty."""
        self._settings = settings
        self._known: OrderedDict[str, SignIn] = OrderedDict()
        # Whoever reaches a platform's sockets has every right; the key stands for reaching them.
        own = is_unix(settings.orchestrator) and all(is_unix(pool) for pool in settings.pools.values())
        self.key = key if own else ""

    def by_key(self, key: str) -> str | None:
        """The cookie of a visitor with the key; None where it is wrong."""
        if not self.key or not hmac.compare_digest(key.encode(), self.key.encode()):
            return None
        return self._add(SignIn(Client(self._settings, start=False, uploads=False)))

    async def by_token(self, token: str, project: str) -> str:
        """The cookie of a visitor with a token. Raises the Failure that the platform answers it with."""
        settings = replace(self._settings, token=token, token_file=None)
        client = Client(settings, project=project, start=False, uploads=False)
        try:
            await off_the_loop(client.runs, 1)
        except Failure:
            client.close()
            raise
        return self._add(SignIn(client))

    def of(self, cookie: str | None) -> SignIn | None:
        """Who has this cookie."""
        found = self._known.get(cookie or "")
        if found is None or cookie is None:
            return None
        if time.monotonic() - found.used_at > _IDLE_SECONDS:
            self.drop(cookie)
            return None
        found.used_at = time.monotonic()
        self._known.move_to_end(cookie)
        return found

    def drop(self, cookie: str | None) -> None:
        """Sign somebody out."""
        found = self._known.pop(cookie or "", None)
        if found is not None:
            found.client.close()

    def close(self) -> None:
        """Sign everybody out."""
        for cookie in list(self._known):
            self.drop(cookie)

    def _add(self, entered: SignIn) -> str:
        now = time.monotonic()
        for cookie in [c for c, each in self._known.items() if now - each.used_at > _IDLE_SECONDS]:
            self.drop(cookie)
        while len(self._known) >= _MOST:
            self.drop(next(iter(self._known)))
        cookie = secrets.token_urlsafe(32)
        self._known[cookie] = entered
        return cookie


class Door(AuthProvider):
    """Lets nobody see the page who is not signed in; Bokeh asks it for the page and for each web socket."""

    def __init__(self, sign_ins: SignIns, cookie_name: str, secure: bool) -> None:
        """`secure`: the page is served over TLS, and the cookie sent over nothing else."""
        self._sign_ins = sign_ins
        self._cookie_name = cookie_name
        self._secure = secure
        super().__init__()

    @property
    def get_user(self) -> Any:
        def user(handler: RequestHandler) -> str | None:
            cookie = handler.get_cookie(self._cookie_name)
            return cookie if self._sign_ins.of(cookie) is not None else None

        return user

    @property
    def get_user_async(self) -> None:
        return None

    @property
    def login_url(self) -> str:
        return "/login"

    @property
    def get_login_url(self) -> None:
        return None

    @property
    def logout_url(self) -> str:
        return "/logout"

    @property
    def login_handler(self) -> type[RequestHandler]:
        sign_ins, name, secure = self._sign_ins, self._cookie_name, self._secure

        class Login(RequestHandler):
            async def get(self) -> None:
                key = self.get_argument("key", "")
                if not key:
                    self._ask("")
                    return
                self._enter(sign_ins.by_key(key), "This address is of an earlier start of the platform.")

            async def post(self) -> None:
                origin = self.request.headers.get("Origin")
                if origin is not None and urlsplit(origin).netloc != self.request.host:
                    self.set_status(403)
                    return
                token, project = self.get_body_argument("token", ""), self.get_body_argument("project", "")
                if sign_ins.key or not token.isascii() or not token or len(token) > _LONGEST_TOKEN:
                    self._ask("This is no token.")
                elif not PROJECT_PATTERN.fullmatch(project):
                    self._ask("A project's name has small letters, digits, - and _.")
                else:
                    try:
                        self._enter(await sign_ins.by_token(token.strip(), project), "")
                    except Failure as failure:
                        self._ask(str(failure))

            def _enter(self, cookie: str | None, problem: str) -> None:
                if cookie is None:
                    self._ask(problem)
                    return
                self.set_cookie(name, cookie, httponly=True, secure=secure, samesite="Lax")
                wanted = self.get_argument("next", "/")
                # Of this page only: "//host" and "/\host" would leave it.
                self.redirect(wanted if wanted.startswith("/") and wanted[1:2] not in ("/", "\\") else "/")

            def _ask(self, problem: str) -> None:
                self.set_status(403 if problem else 200)
                project = self.get_argument("project", DEFAULT_PROJECT)
                form = _FORM.format(next=escape(self.get_argument("next", "/")), project=escape(project))
                self.finish(_PAGE.format(problem=escape(problem), form=_NO_FORM if sign_ins.key else form))

        return Login

    @property
    def logout_handler(self) -> type[RequestHandler]:
        sign_ins, name = self._sign_ins, self._cookie_name

        class Logout(RequestHandler):
            def get(self) -> None:
                sign_ins.drop(self.get_cookie(name))
                self.clear_cookie(name)
                self.redirect("/login")

        return Logout
