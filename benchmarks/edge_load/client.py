"""A lean HTTP client for load, so that what is measured is the server: it looks for the marks of events and parses no JSON."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import cast

DONE = b"data: [DONE]"
EVENT = b"data: {"
LAST_CHUNK = b"0\r\n\r\n"
MESSAGES = [{"role": "user", "content": "Count."}]


@dataclass
class StreamTimes:
    """When one stream's request was sent, and when its events came, in seconds on one clock."""

    sent: float = 0.0
    events: list[float] = field(default_factory=list)
    is_whole: bool = False


def build_request(host: str, model: str, max_tokens: int, is_raw: bool = False) -> bytes:
    """One streamed chat completion as it goes over the wire; `is_raw`: a text completion."""
    path, asked = ("/v1/completions", {"prompt": "Count."}) if is_raw else ("/v1/chat/completions", {"messages": MESSAGES})
    body = json.dumps({"model": model, "stream": True, "max_tokens": max_tokens, **asked}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nAuthorization: Bearer none\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


class Connection(asyncio.Protocol):
    """One keep-alive connection; `stream` sends a request and waits for the end of its events."""

    def __init__(self) -> None:
        self._times = StreamTimes()
        self._ended: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._last = b""  # the end of what came before: a mark may lie across two reads

    @classmethod
    async def open(cls, address: str) -> "Connection":
        host, _, port = address.rpartition(":")
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, int(port))
        return connection

    async def stream(self, request: bytes) -> StreamTimes:
        assert self._transport is not None
        self._times, self._last, self._ended = StreamTimes(time.perf_counter()), b"", asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._ended
        return self._times

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by descent

    def data_received(self, data: bytes) -> None:
        num_events = (self._last[1 - len(EVENT) :] + data).count(EVENT)
        self._times.events += [time.perf_counter()] * num_events
        joined = self._last + data
        self._times.is_whole = self._times.is_whole or DONE in joined
        if joined.endswith(LAST_CHUNK):
            self._end(None)
        self._last = joined[1 - len(DONE) :]

    def connection_lost(self, error: Exception | None) -> None:
        self._end(ConnectionError("the server closed the connection"))

    def _end(self, error: Exception | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)
