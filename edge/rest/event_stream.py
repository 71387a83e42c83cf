"""A chat as server-sent events, sent raw: no framework stands between a step's bytes and the socket.

A socket that is behind holds up `send`, and with it only its own stream: what comes meanwhile is one larger batch when it goes on.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Generic, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge.inference import ChatEvents
from edge.rest.disconnect import while_connected
from protos.ossia.v1 import inference_pb2 as inference
from services.errors import Cancelled, from_proto

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
Write = Callable[[list[inference.ChatEvent]], bytes]
Batch = TypeVar("Batch")


class Builder(Protocol):
    """Takes every event of a chat after `started`; raises the OssiaError of a terminal error."""

    def add(self, event: inference.ChatEvent) -> None: ...


Built = TypeVar("Built", bound=Builder)


async def collect(batches: ChatEvents, make_builder: Callable[[inference.ChatStarted], Built]) -> Built:
    """A whole chat in what builds its answer."""
    async with aclosing(batches):
        builder = make_builder((await anext(batches))[0].started)
        async for events in batches:
            for event in events:
                builder.add(event)
    return builder


async def open_stream(
    request: Request, batches: ChatEvents, make_writer: Callable[[inference.ChatStarted], Write]
) -> "EventStream[list[inference.ChatEvent]]":
    """Waits for the first event that says something: a request that the cluster refuses gets its HTTP status and no stream."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(aclosing(batches))
        started = (await anext(batches))[0].started
        with while_connected(request.receive):
            first = await anext(batches)
        if first[0].HasField("error"):
            raise from_proto(first[0].error)
        stack.pop_all()  # the stream closes them from here on
    return EventStream(batches, make_writer(started), first)


class EventStream(Response, Generic[Batch]):
    """It ends when its batches do, and they are closed when the client goes away. `write` gives the bytes of a batch; none for none."""

    def __init__(self, batches: AsyncGenerator[Batch, None], write: Callable[[Batch], bytes], first: Batch) -> None:
        super().__init__(media_type="text/event-stream", headers=HEADERS)
        del self.headers["content-length"]
        self._batches = batches
        self._write = write
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with while_connected(receive):
                await self._send_all(send)
        except Cancelled:
            return  # nobody listens any more

    async def _send_all(self, send: Send) -> None:
        write = self._write
        async with aclosing(self._batches) as batches:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": write(self._first), "more_body": True})
            async for batch in batches:
                if chunk := write(batch):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
