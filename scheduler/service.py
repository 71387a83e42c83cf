"""The Scheduler service: checks a request, places it, relays its tokens, cancels it when its caller goes away."""

from __future__ import annotations  # gRPC's generics exist in its type stubs only

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, field
from functools import partial

import grpc
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer

from protos.ossia.v1 import scheduler_pb2, scheduler_pb2_grpc
from protos.ossia.v1.sampling_pb2 import FINISH_REASON_ERROR
from protos.ossia.v1.scheduler_pb2 import Finished
from scheduler.fleet import Fleet
from scheduler.metrics import SchedulerMetrics
from scheduler.open_request import OpenRequest
from scheduler.outbox import Outbox
from scheduler.placement import Candidate
from scheduler.sequence import Request
from scheduler.validation import read_quote, read_request
from services import errors
from services.errors import InvalidArgument, MissingField, OssiaError, Unavailable
from services.telemetry import extract_context, get_logger

log = get_logger(__name__)
GenerateContext = grpc.aio.ServicerContext[scheduler_pb2.GenerateRequest, scheduler_pb2.TokenDelta]
QuoteContext = grpc.aio.ServicerContext[scheduler_pb2.QuoteRequest, scheduler_pb2.QuoteResponse]
ExplainContext = grpc.aio.ServicerContext[scheduler_pb2.ExplainRequest, scheduler_pb2.ExplainResponse]
StatusContext = grpc.aio.ServicerContext[scheduler_pb2.StatusRequest, scheduler_pb2.SchedulerStatus]
ConnectContext = grpc.aio.ServicerContext[scheduler_pb2.EdgeFrame, scheduler_pb2.SchedulerFrame]


@dataclass(eq=False)
class Caller:
    """An edge's stream, or one call of Generate: where frames go, and the requests that are open on it by stream id."""

    outbox: Outbox = field(default_factory=Outbox)
    requests: dict[int, OpenRequest] = field(default_factory=dict)


class SchedulerService(scheduler_pb2_grpc.SchedulerServicer):
    """Knows of callers and requests; the fleet knows of groups. Both live on one event loop."""

    def __init__(self, scheduler_id: str, fleet: Fleet, metrics: SchedulerMetrics, tracer: Tracer) -> None:
        self._scheduler_id = scheduler_id
        self._fleet = fleet
        self._metrics = metrics
        self._tracer = tracer
        self._edges: set[Caller] = set()
        self._num_open = 0
        self._is_draining = False
        self._has_closed = asyncio.Event()  # set whenever a request closes, for the drain
        fleet.on_change = self._tell_edges

    # ---- the contract ----

    async def Generate(self, request: scheduler_pb2.GenerateRequest, context: GenerateContext) -> AsyncIterator[scheduler_pb2.TokenDelta]:
        caller = Caller()
        num_left = len(self._take(caller, 0, request).placed)
        try:
            async for frame in caller.outbox.frames():
                for delta in frame.deltas:
                    yield delta
                    num_left -= delta.HasField("finished")
                if not num_left:
                    return
        finally:
            self._cancel_all(caller)

    async def Connect(
        self, request_iterator: AsyncIterable[scheduler_pb2.EdgeFrame], context: ConnectContext
    ) -> AsyncIterator[scheduler_pb2.SchedulerFrame]:
        caller = Caller()
        caller.outbox.put_status(self.status())
        self._edges.add(caller)
        reader = asyncio.create_task(self._read_edge(request_iterator, caller))
        try:
            async for frame in caller.outbox.frames():
                yield frame
        finally:
            reader.cancel()
            self._edges.discard(caller)
            self._cancel_all(caller)

    async def Quote(self, request: scheduler_pb2.QuoteRequest, context: QuoteContext) -> scheduler_pb2.QuoteResponse:
        best = self._fleet.cheapest(read_quote(request, self._fleet.model(request.model).block_size))
        if best is None or best.excluded or self._is_draining or self._fleet.groups[best.group_id].is_leaving:
            return scheduler_pb2.QuoteResponse(accepting=False)
        return scheduler_pb2.QuoteResponse(cost_s=best.cost_s, cached_tokens=best.num_cached_tokens, group_id=best.group_id, accepting=True)

    async def Explain(self, request: scheduler_pb2.ExplainRequest, context: ExplainContext) -> scheduler_pb2.ExplainResponse:
        checked = self._check(request.request, handle=None)
        return scheduler_pb2.ExplainResponse(candidates=[_encode_candidate(one) for one in self._fleet.candidates(checked)])

    async def Status(self, request: scheduler_pb2.StatusRequest, context: StatusContext) -> scheduler_pb2.SchedulerStatus:
        return self.status()

    # ---- requests ----

    async def _read_edge(self, frames: AsyncIterable[scheduler_pb2.EdgeFrame], caller: Caller) -> None:
        """Opens and cancels what the edge says. The end of its side ends the stream after what is pending."""
        async for frame in frames:
            if frame.edge_id:
                log.info("edge_connected", edge=frame.edge_id)
            for stream_id in frame.cancelled:
                if handle := caller.requests.get(stream_id):
                    self._fleet.cancel(handle)
            for opened in frame.opened:
                try:
                    self._take(caller, opened.stream_id, opened.request)
                except OssiaError as error:
                    refused = Finished(reason=FINISH_REASON_ERROR, error=errors.to_proto(error))
                    caller.outbox.put([scheduler_pb2.TokenDelta(stream_id=opened.stream_id, finished=refused)])
        caller.outbox.close()

    def _take(self, caller: Caller, stream_id: int, wire: scheduler_pb2.GenerateRequest) -> OpenRequest:
        """Checks and places one request. Raises why it is refused."""
        span = self._tracer.start_span(
            "scheduler.generate", context=extract_context(wire.trace_context) if wire.trace_context else None, kind=SpanKind.SERVER
        )
        handle = OpenRequest(caller.outbox, stream_id, span, partial(self._forget, caller))
        try:
            if stream_id in caller.requests:
                raise InvalidArgument(f"stream_id {stream_id} is in use on this stream: number requests anew", "stream_id")
            if self._is_draining:
                raise Unavailable("this scheduler is draining: use another one", retry_after_s=1.0)
            request = self._check(wire, handle)
            group, chosen = self._fleet.place(request)
            span.set_attributes(
                {
                    "gen_ai.request.model": wire.model,
                    "gen_ai.usage.input_tokens": request.num_prompt_tokens,
                    "ossia.request_id": wire.request_id,
                }
            )
            if span.is_recording():
                span.add_event("placed", {"ossia.group": group.group_id, **_describe_candidates(self._fleet.candidates(request))})
            group.open(request)
            self._metrics.observe_placement(group.group_id, wire.model, chosen.num_cached_tokens)
            if span.is_recording():
                span.add_event("queued", {"ossia.queued_tokens": group.batcher.num_queued_tokens})
        except OssiaError as error:
            self._metrics.count_refusal(errors.row(error).code)
            span.set_status(Status(StatusCode.ERROR, error.message))
            span.end()
            raise
        caller.requests[stream_id] = handle
        self._num_open += 1
        return handle

    def _check(self, wire: scheduler_pb2.GenerateRequest, handle: OpenRequest | None) -> Request:
        if not wire.model:
            raise MissingField("model is empty: name the model to use", "model")
        return read_request(wire, self._fleet.model(wire.model), time.monotonic(), handle)

    def _forget(self, caller: Caller, handle: OpenRequest) -> None:
        del caller.requests[handle.stream_id]
        self._num_open -= 1
        self._has_closed.set()

    def _cancel_all(self, caller: Caller) -> None:
        """The caller is gone, or has all it asked for."""
        for handle in list(caller.requests.values()):
            self._fleet.cancel(handle)

    # ---- the fleet, as edges see it ----

    def status(self) -> scheduler_pb2.SchedulerStatus:
        return scheduler_pb2.SchedulerStatus(
            scheduler_id=self._scheduler_id,
            models=self._fleet.models(),
            groups=[group.status() for group in self._fleet.groups.values()],
            draining=self._is_draining,
        )

    def _tell_edges(self) -> None:
        for caller in self._edges:
            caller.outbox.put_status(self.status())

    async def drain(self) -> None:
        """Takes no new request, tells the edges, and returns when the open ones have ended."""
        self._is_draining = True
        self._tell_edges()
        while self._num_open:
            self._has_closed.clear()
            await self._has_closed.wait()


def _describe_candidates(candidates: list[Candidate]) -> dict[str, list[str] | list[float] | list[int]]:
    """As a span event holds them: parallel lists, cheapest first."""
    return {
        "ossia.candidates": [one.group_id for one in candidates],
        "ossia.costs_s": [one.cost_s for one in candidates],
        "ossia.cached_tokens": [one.num_cached_tokens for one in candidates],
        "ossia.excluded": [one.excluded for one in candidates],
    }


def _encode_candidate(candidate: Candidate) -> scheduler_pb2.Candidate:
    return scheduler_pb2.Candidate(
        group_id=candidate.group_id,
        cost_s=candidate.cost_s,
        queue_s=candidate.queue_s,
        prefill_s=candidate.prefill_s,
        host_copy_s=candidate.host_copy_s,
        step_s=candidate.step_s,
        eviction_s=candidate.eviction_s,
        cached_tokens=candidate.num_cached_tokens,
        excluded=candidate.excluded,
    )
