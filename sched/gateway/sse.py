"""Server-sent events without a coroutine per event, and the comment lines that keep silent ones alive.

aiohttp's `StreamResponse.write` is a coroutine. Here the response's headers and its end go through aiohttp; the events between
are written straight to the connection's transport from the callback that brought them, framed as the headers promised.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from aiohttp import HttpVersion11, web

from sched.stream import Delta

log = logging.getLogger(__name__)

# Bytes that may lie unsent in this process for one client, beyond what the kernel's socket buffers hold: some 20 000 tokens.
# One that is so far behind isn't reading. Its connection is cut, which cancels its request like any disconnect: holding the TE
# back for it would waste the KV blocks that others wait for, and keeping everything would let it eat the memory.
MOST_UNSENT = 4 << 20

PING = b": ping\n\n"
PING_INTERVAL = 15.0  # seconds; proxies and client libraries begin to cut silent streams at 30

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would otherwise collect events until its buffer is full
}


class Shape(Protocol):
    """`shapes.Chat` or `shapes.Completion`."""

    def chunks(self, deltas: list[Delta]) -> bytes: ...


class EventStream:
    """One response of events. Open it when the request has been accepted: before that, an error is still a status."""

    __slots__ = ("allowed", "chunked", "heart", "quiet", "request", "response", "shape", "transport")

    def __init__(self, request: web.Request, heart: Heart, shape: Shape, headers: Mapping[str, str] | None = None):
        """`headers`: of the response, beside those that every stream has."""
        self.request, self.heart, self.shape = request, heart, shape
        self.response = web.StreamResponse(headers={**HEADERS, **(headers or {})})
        self.transport: asyncio.Transport | None = None  # while the connection lives
        self.allowed = MOST_UNSENT
        self.quiet = False  # nothing sent since the heart last looked
        self.chunked = True

    async def open(self) -> None:
        """Send the headers."""
        if self.request.version < HttpVersion11:  # has no chunks: the end of the connection is the end of the stream
            self.response.force_close()
        await self.response.prepare(self.request)
        self.chunked = self.response.headers.get("Transfer-Encoding") == "chunked"
        self.transport = self.request.transport
        self.heart.streams.add(self)

    def put(self, deltas: list[Delta]) -> None:
        """Write the events of some deltas: the stream's sink."""
        self.send(self.shape.chunks(deltas))

    def note(self, text: str) -> None:
        """Write a comment: what a person who waits may want to know. Clients skip it."""
        self.send(b": %b\n\n" % " ".join(text.split()).encode("utf-8", "replace"))

    def send(self, events: bytes) -> None:
        """Write whole events now. Never blocks and never raises: a client that left or doesn't read is cut off."""
        transport = self.transport
        if not events or transport is None or transport.is_closing():
            return
        if transport.get_write_buffer_size() > self.allowed:
            log.warning("client=%s cut off: it does not read its stream", self.request.remote)
            transport.abort()
            return
        self.quiet = False
        if 2 * len(events) > self.allowed:
            self.allowed = 2 * len(events)  # an echoed prompt may be large without the client being slow
        transport.write(b"%x\r\n%b\r\n" % (len(events), events) if self.chunked else events)

    def stop(self) -> None:
        """No more events, nor pings."""
        self.heart.streams.discard(self)

    async def close(self) -> web.StreamResponse:
        """Send the end of the response."""
        self.stop()
        await self.response.write_eof()
        return self.response


class Heart:
    """The one timer of all streams of an application."""

    def __init__(self, interval: float):
        self.interval = interval
        self.streams: set[EventStream] = set()

    async def beat(self) -> None:
        """Ping what has been silent for half an interval or more, twice an interval: none is silent for a whole one."""
        while True:
            await asyncio.sleep(self.interval / 2)
            for stream in list(self.streams):
                if stream.quiet:
                    stream.send(PING)
                stream.quiet = True

    async def running(self, app: web.Application):  # type: ignore[no-untyped-def]  # an aiohttp clean-up context
        task = asyncio.create_task(self.beat())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
