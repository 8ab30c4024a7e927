"""How long viewers of the page wait for a slice, and what it costs: ten and thirty that scroll without a pause.

A visitor here is what a browser is to the viewer: it signs in, opens the page, and on its web socket asks for the next
plane as soon as the last has come. They run on the same cores as what they measure.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
from bokeh.protocol import Protocol
from bokeh.protocol.receiver import Receiver
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from benchmarks.harness import Row, main
from cryofleet import local
from cryofleet.artifacts import ResultWriter
from cryofleet.settings import DEFAULT_PROJECT
from cryofleet.storage import Store
from cryofleet.volumes import VolumeInfo, VolumeWriter
from tests.platform import Platform, running_platform

SHAPE = (512, 1024, 1024)
VISITORS = (1, 10, 30)
AXES = ("z", "y", "x")
_SECONDS = 30.0
_TARGET_SECONDS = {1: 0.15, 30: 0.5}
_TARGET_BYTES = 120_000.0
_TARGET_MEMORY = float(1 << 30)
_WATCHED = ("io", "viewer")
_LONGEST_WAIT = 60.0


@dataclass
class Visitor:
    """A page that is open, and how long each of its slices took."""

    socket: WebSocketClientConnection
    panes: dict[str, str] = field(default_factory=dict)
    """Bokeh's number of the pane of each axis."""
    waits: list[float] = field(default_factory=list)
    largest: int = 0
    failed: int = 0
    _receiver: Receiver = field(default_factory=lambda: Receiver(Protocol()))
    _sent: int = 0

    async def ask(self, kind: str, content: Any) -> str:
        """Send a message of Bokeh's protocol; its number comes back."""
        self._sent += 1
        number = str(self._sent)
        for part in ({"msgid": number, "msgtype": kind}, {}, content):
            await self.socket.write_message(json.dumps(part))
        return number

    async def event(self, name: str, **values: Any) -> None:
        """Tell the page of something that happened in the browser."""
        said = {"type": "event", "name": name, "values": {"type": "map", "entries": list(values.items())}}
        await self.ask("PATCH-DOC", {"events": [{"kind": "MessageSent", "msg_type": "bokeh_event", "msg_data": said}]})

    async def next(self) -> Any:
        """The next whole message."""
        while True:
            fragment = await asyncio.wait_for(self.socket.read_message(), _LONGEST_WAIT)
            if fragment is None:
                raise ConnectionError(
                    f"the viewer has closed a page: {self.socket.close_code} {self.socket.close_reason}"
                )
            message = await self._receiver.consume(fragment)
            if message is not None:
                return message

    async def find_panes(self) -> None:
        """Wait until the volume is open in all three panes."""
        end = time.monotonic() + _LONGEST_WAIT
        while len(self.panes) < len(AXES):
            asked = await self.ask("PULL-DOC-REQ", {})
            while (reply := await self.next()).header.get("reqid") != asked:
                pass
            self.panes = dict(_panes(reply.content["doc"]))
            if time.monotonic() > end:
                raise TimeoutError("the tomogram did not open")

    async def look(self, axis: str, position: int) -> None:
        """Ask for a plane and wait for its picture."""
        wanted = {"type": "want", "position": position, "region": None, "pixels": 512, "version": 1}
        began = time.perf_counter()
        while True:
            data = {"type": "map", "entries": list(wanted.items())}
            await self.event("data_event", model={"id": self.panes[axis]}, data=data)
            header, size = await self._frame(axis)
            if not header["again"]:
                break
            await asyncio.sleep(0.35)
        self.waits.append(time.perf_counter() - began)
        self.largest = max(self.largest, size)
        self.failed += not header["images"] or header["position"] != position

    async def _frame(self, axis: str) -> tuple[dict[str, Any], int]:
        while True:
            message = await self.next()
            for buffer in message.buffers if message.msgtype == "PATCH-DOC" else ():
                data = bytes(buffer.data)
                if not data:  # of a pane that is new
                    continue
                length = int.from_bytes(data[:4], "little")
                header: dict[str, Any] = json.loads(data[4 : 4 + length])
                return header, sum(len(bytes(each.data)) for each in message.buffers)


def _panes(node: Any) -> Iterator[tuple[str, str]]:
    """Axis and number of each pane with a volume in it, from a document as JSON."""
    if isinstance(node, list):
        for each in node:
            yield from _panes(each)
    elif isinstance(node, dict):
        attributes = node.get("attributes", {})
        data = attributes.get("data", {}) if attributes.get("class_name") == "SlicePane" else {}
        own = data.get("attributes", {})
        if own.get("columns", 0) > 0 and own.get("visible", True) and attributes.get("visible", True):
            yield own.get("axis", "z"), node["id"]
        for each in node.values():
            yield from _panes(each)


async def sign_in(url: str) -> dict[str, str]:
    """The headers of a visitor who opened the address that `cryofleet up` prints."""
    try:
        answer = await AsyncHTTPClient().fetch(url, follow_redirects=False)
    except HTTPClientError as error:
        if error.response is None or error.code != 302:
            raise
        answer = error.response
    cookies = SimpleCookie(answer.headers["Set-Cookie"])
    return {"Cookie": "; ".join(f"{name}={each.value}" for name, each in cookies.items())}


async def visit(root: str, headers: dict[str, str], volume: str) -> Visitor:
    """Open the page on a volume."""
    page = await AsyncHTTPClient().fetch(f"{root}?{urlencode({'view': 'tomogram', 'volume': volume})}", headers=headers)
    token = re.search(rb'"token":"([^"]+)"', page.body)
    if token is None:
        raise RuntimeError("the page has no session")
    request = HTTPRequest(f"ws://{urlsplit(root).netloc}/ws", headers={**headers, "Origin": root.rstrip("/")})
    socket = await websocket_connect(request, subprotocols=["bokeh", token[1].decode()], max_message_size=64 << 20)
    visitor = Visitor(socket)
    while (await visitor.next()).msgtype != "ACK":  # what is sent before is lost
        pass
    await visitor.event("document_ready")
    await visitor.find_panes()
    return visitor


async def scroll(visitor: Visitor, axis: str, positions: list[int], until: float) -> None:
    """Ask for one plane after the other until then."""
    visitor.waits.clear()
    for position in positions * (1 + int(1e6) // len(positions)):
        if time.monotonic() > until:
            return
        await visitor.look(axis, position)


async def _measure(platform: Platform, volume: str, depth: int, count: int, seconds: float) -> list[Row]:
    url = local.page_url(platform.settings)
    headers = await sign_in(url)
    visitors = [await visit(url.partition("login")[0], headers, volume) for _ in range(count)]
    rows = []
    for axis in AXES:
        # Each begins elsewhere, as people do.
        side = depth if axis == "z" else SHAPE["zyx".index(axis)]
        planes = [np.roll(np.arange(side), 37 * n).tolist() for n in range(count)]
        await asyncio.gather(*(v.look(axis, own[0]) for v, own in zip(visitors, planes, strict=True)))
        before = {name: _cpu_seconds(platform.process_id(name)) for name in _WATCHED}
        until = time.monotonic() + seconds
        await asyncio.gather(*(scroll(v, axis, own[1:], until) for v, own in zip(visitors, planes, strict=True)))
        waits = [wait for each in visitors for wait in each.waits]
        case = f"{count} scrolling along {axis}"
        rows += [
            Row(case, "median wait", statistics.median(waits), "s", "lower", _TARGET_SECONDS.get(count)),
            Row(case, "95 of 100 wait at most", float(np.percentile(waits, 95)), "s", "lower"),
            Row(case, "largest slice", float(max(v.largest for v in visitors)), "B", "lower", _TARGET_BYTES),
            Row(case, "failed", float(sum(v.failed for v in visitors)), "", "lower", 0.0),
        ]
        for name in _WATCHED:
            used = _cpu_seconds(platform.process_id(name)) - before[name]
            rows.append(Row(case, f"CPU of {name}", 1000 * used / len(waits), "ms/slice", "lower"))
    for name in _WATCHED:
        peak = _peak_bytes(platform.process_id(name))
        rows.append(Row(f"{count} scrolling", f"memory of {name}", peak, "B", "lower", _TARGET_MEMORY))
    for visitor in visitors:
        visitor.socket.close()
    return rows


def _cpu_seconds(process_id: int) -> float:
    with open(f"/proc/{process_id}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_bytes(process_id: int) -> float:
    with open(f"/proc/{process_id}/status") as file:
        found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
    assert found
    return 1024.0 * int(found[1])


def _noise(platform: Platform, depth: int) -> str:
    """A tomogram of noise, the worst case for compression, as a result of the platform."""
    store = Store.open(platform.settings)
    result = ResultWriter(store, DEFAULT_PROJECT, "0" * 64)
    rng = np.random.default_rng(5)
    info = VolumeInfo((depth, *SHAPE[1:]), 10.0, "dark")
    with VolumeWriter(result, "tomogram.mrc", info) as volume:
        for _ in range(depth):
            volume.write(rng.standard_normal((1, *SHAPE[1:]), np.float32))
    result.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": volume.uri}, seconds=0.0)
    return volume.uri


def measure(quick: bool) -> Iterator[Row]:
    """Thirty seconds for each axis and number of visitors; three, of a shallower tomogram, in a quick run."""
    with running_platform(PAGE="localhost:0") as platform:
        depth = 64 if quick else SHAPE[0]
        volume = _noise(platform, depth)
        for count in VISITORS:
            yield from asyncio.run(_measure(platform, volume, depth, count, 3.0 if quick else _SECONDS))


if __name__ == "__main__":
    main("viewers", measure)
