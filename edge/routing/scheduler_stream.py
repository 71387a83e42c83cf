"""The edge's one long-lived stream to one scheduler: many requests out, one frame per model step back.

Knows nothing of text or choices. A request that is open here always ends: with its last delta, or with an error as soon as the stream
breaks.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import grpc

from edge.routing.catalogue import RETRY_AFTER_S, Catalogue
from protos.ossia.v1 import scheduler_pb2 as scheduler
from protos.ossia.v1 import scheduler_pb2_grpc
from services.errors import Cancelled, OssiaError, Unavailable, from_rpc_error
from services.grpc_channel import open_channel
from services.telemetry import get_logger
from services.tls import Identity

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 2.0
QUOTE_TIMEOUT_S = 0.1
MAX_STREAM_ID = 2**32 - 1
log = get_logger(__name__)


class OpenRequest:
    """One request on the stream: receive its deltas, and leave the `with` block to give it up.

    The stream is shared and must not wait for one slow reader: what a reader has not taken yet is merged into one delta per sequence. That
    costs it four bytes a token, so that `max_tokens` and the edge's limit of open requests bound it.
    """

    def __init__(self, stream: "SchedulerStream", stream_id: int, num_sequences: int) -> None:
        self._stream = stream
        self._stream_id = stream_id
        self._num_running = num_sequences
        self._arrived: dict[int, scheduler.TokenDelta] = {}  # not yet received, by sequence
        self._error: OssiaError | None = None  # what ended the request; after what has arrived
        self._waiter: asyncio.Future[None] | None = None  # the reader's, while nothing has arrived
        self._is_cancelled = False

    @property
    def has_ended(self) -> bool:
        """Every sequence has sent its last delta, or the stream broke; what has arrived may still be received."""
        return self._num_running == 0

    @property
    def is_readable(self) -> bool:
        """More has arrived or is still to come."""
        return not self.has_ended or bool(self._arrived)

    async def receive(self) -> list[scheduler.TokenDelta]:
        """All that has arrived, at least one delta. Raises the error that ended the request; must not be called after the last delta."""
        if not self._arrived and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._arrived:
            taken = list(self._arrived.values())
            self._arrived.clear()
            return taken
        assert self._error is not None
        raise self._error

    def cancel(self) -> None:
        """Tells the scheduler once; the last deltas still come, so that they can be received for their usage."""
        if not self.has_ended and not self._is_cancelled:
            self._is_cancelled = True
            self._stream.send_cancel(self._stream_id)

    def deliver(self, delta: scheduler.TokenDelta) -> None:
        if delta.HasField("finished"):
            self._num_running -= 1
        if self._error is not None:
            return  # nobody reads on after an error
        if waiting := self._arrived.get(delta.index):
            waiting.MergeFrom(delta)
        else:
            self._arrived[delta.index] = delta
            self._wake()

    def interrupt(self, error: OssiaError) -> None:
        """The reader gets `error` next; the request itself runs until it is cancelled."""
        self._error = error
        self._wake()

    def fail(self, error: OssiaError) -> None:
        self._num_running = 0
        self.interrupt(error)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.cancel()
        self._stream.forget(self._stream_id)


class SchedulerStream:
    """Connected while `run` runs, again and again. `status` is the scheduler's latest word, None while there is no connection."""

    def __init__(self, address: str, edge_id: str, catalogue: Catalogue, identity: Identity | None = None) -> None:
        self.address = address
        self.status: scheduler.SchedulerStatus | None = None
        self._edge_id = edge_id
        self._catalogue = catalogue
        self._identity = identity
        self._requests: dict[int, OpenRequest] = {}  # open on the present connection, by stream id
        self._last_id = 0
        self._stub: scheduler_pb2_grpc.SchedulerAsyncStub | None = None  # while connected
        self._outbox = scheduler.EdgeFrame()  # what the next frame says
        self._has_mail = asyncio.Event()
        self._is_retired = False
        self._num_failures = 0  # connections in a row that brought no frame

    def __repr__(self) -> str:
        return f"SchedulerStream({self.address}, connected={self.status is not None}, open={self.num_open})"

    @property
    def num_open(self) -> int:
        return len(self._requests)

    @property
    def takes_requests(self) -> bool:
        return self.status is not None and not self.status.draining and not self._is_retired

    def open(self, request: scheduler.GenerateRequest) -> OpenRequest:
        """Sends the request with the next frame. Raises Unavailable where there is no connection."""
        if self.status is None:
            raise Unavailable("the scheduler is not connected; try again", retry_after_s=RETRY_AFTER_S)
        stream_id = self._draw_id()
        opened = self._requests[stream_id] = OpenRequest(self, stream_id, max(1, request.n))
        self._outbox.opened.add(stream_id=stream_id, request=request)
        self._has_mail.set()
        return opened

    async def quote(self, request: scheduler.QuoteRequest) -> scheduler.QuoteResponse | None:
        """What the request would cost there; None where the scheduler is away or does not answer in QUOTE_TIMEOUT_S."""
        if self._stub is None:
            return None
        try:
            return await self._stub.Quote(request, timeout=QUOTE_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            log.info("no_quote", address=self.address, reason=from_rpc_error(failure).message)
            return None

    async def ask_status(self) -> scheduler.SchedulerStatus | None:
        """What the scheduler says of itself now; None where it is away or does not answer in QUOTE_TIMEOUT_S."""
        if self._stub is None:
            return None
        try:
            return await self._stub.Status(scheduler.StatusRequest(), timeout=QUOTE_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            log.info("no_status", address=self.address, reason=from_rpc_error(failure).message)
            return None

    def send_cancel(self, stream_id: int) -> None:
        """Within one frame order means nothing, so a request that has not been sent yet is taken back instead."""
        unsent = next((at for at, one in enumerate(self._outbox.opened) if one.stream_id == stream_id), None)
        if unsent is None:
            self._outbox.cancelled.append(stream_id)
            self._has_mail.set()
        else:
            del self._outbox.opened[unsent]
            self._requests[stream_id].fail(Cancelled("the request was cancelled before it was sent"))

    def forget(self, stream_id: int) -> None:
        """Nobody reads the request any more; deltas that still come are dropped."""
        self._requests.pop(stream_id, None)
        if self._is_retired:
            self._has_mail.set()

    def retire(self) -> None:
        """The scheduler left the membership: no new request; `run` ends when the open ones have."""
        self._is_retired = True
        self._has_mail.set()

    async def run(self) -> None:
        """Keeps the stream up, with jittered back-off, until the scheduler has left."""
        while not self._is_retired:
            reason = "the scheduler closed the stream"
            async with open_channel(self.address, identity=self._identity, role="scheduler") as channel:
                try:
                    await self._converse(scheduler_pb2_grpc.SchedulerStub(channel))
                except grpc.aio.AioRpcError as failure:
                    reason = from_rpc_error(failure).message
                finally:
                    self._disconnect()
            if not self._is_retired:
                log.warning("scheduler_lost", address=self.address, reason=reason)
                await asyncio.sleep(self._backoff_s())

    async def _converse(self, stub: "scheduler_pb2_grpc.SchedulerAsyncStub") -> None:
        self._stub, self._outbox, self._has_mail = stub, scheduler.EdgeFrame(edge_id=self._edge_id), asyncio.Event()
        self._has_mail.set()
        async for frame in stub.Connect(self._frames()):
            self._num_failures = 0
            if frame.HasField("status"):
                self.status = frame.status
                self._catalogue.observe(self.address, frame.status)
            for delta in frame.deltas:
                if opened := self._requests.get(delta.stream_id):
                    opened.deliver(delta)

    async def _frames(self) -> AsyncIterator[scheduler.EdgeFrame]:
        """What came together since the last frame goes out together. Ends our side of the stream when nothing is left to do on it."""
        while True:
            await self._has_mail.wait()
            self._has_mail.clear()
            frame, self._outbox = self._outbox, scheduler.EdgeFrame()
            yield frame
            if self._is_retired and not self._requests:
                return

    def _disconnect(self) -> None:
        self.status = self._stub = None
        self._catalogue.observe(self.address, None)
        self._num_failures += 1
        requests, self._requests = self._requests, {}
        for opened in requests.values():
            if not opened.has_ended:
                opened.fail(Unavailable("the scheduler that ran the request was lost; send the request again", retry_after_s=RETRY_AFTER_S))

    def _draw_id(self) -> int:
        self._last_id = self._last_id % MAX_STREAM_ID + 1
        while self._last_id in self._requests:
            self._last_id = self._last_id % MAX_STREAM_ID + 1
        return self._last_id

    def _backoff_s(self) -> float:
        longest = min(FIRST_BACKOFF_S * 2 ** min(self._num_failures - 1, 10), LAST_BACKOFF_S)
        return random.uniform(longest / 2, longest)
