"""A scheduler that replays a script over the real protocol, and an edge in front of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
from opentelemetry.trace import NoOpTracerProvider
from prometheus_client import CollectorRegistry

from edge.access.gate import open_gate
from edge.access.rpc import AccessInterceptor
from edge.assembly import Edge, assemble
from edge.config import EdgeConfig
from edge.rest.server import serve_rest
from edge.routing.catalogue import Catalogue
from edge.routing.model_settings import read_settings
from edge.rpc.inference import SERVICE_NAME
from protos.ossia.v1 import inference_pb2_grpc, scheduler_pb2_grpc
from protos.ossia.v1 import sampling_pb2 as sampling
from protos.ossia.v1 import scheduler_pb2 as scheduler
from services.discovery import StaticDiscovery
from services.grpc_server import serve
from services.vocabulary import load_vocabulary

MODEL = "gpt-oss-test"
MAX_MODEL_LEN = 4096
PATIENCE_S = 60.0  # longer than a busy machine stands still: it only ends tests that have failed
ANSWER = "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>Hello there.<|return|>"


@dataclass
class Script:
    """What every sequence gets: a text with control tokens written out, `chunk` tokens a delta, a pause before one until `go`."""

    text: str = ANSWER
    chunk: int = 1
    reason: sampling.FinishReason.ValueType = sampling.FINISH_REASON_STOP
    error: sampling.Error | None = None
    pause_at: int | None = None
    go: asyncio.Event = field(default_factory=asyncio.Event)


class ScriptedScheduler(scheduler_pb2_grpc.SchedulerServicer):
    def __init__(self, script: Script, model: str = MODEL, max_model_len: int = MAX_MODEL_LEN) -> None:
        self.script = script
        self.model = model
        self.max_model_len = max_model_len
        self.quote_s: float | None = 0.0  # None: the queue is full
        self.quoted: list[scheduler.QuoteRequest] = []
        self.num_steps, self.step_s = 0, 0.0
        self.requests: list[scheduler.GenerateRequest] = []
        self.cancelled: list[int] = []
        self.was_cancelled = asyncio.Event()
        self.has_paused = asyncio.Event()
        self.edge_ids: list[str] = []
        self._calls: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"ScriptedScheduler({len(self.requests)} requests, cancelled {self.cancelled})"

    def break_streams(self) -> None:
        """Ends every open stream as a crash would."""
        for call in self._calls:
            call.cancel()

    async def Connect(self, request_iterator: Any, context: Any) -> AsyncIterator[scheduler.SchedulerFrame]:
        outgoing: asyncio.Queue[scheduler.SchedulerFrame | None] = asyncio.Queue()
        outgoing.put_nowait(scheduler.SchedulerFrame(status=self._status()))
        reader = asyncio.create_task(self._read(request_iterator, outgoing))
        self._calls.add(reader)
        reader.add_done_callback(lambda _: outgoing.put_nowait(None))
        while (frame := await outgoing.get()) is not None:
            yield frame
        self._calls.discard(reader)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the scheduler crashed")

    async def Quote(self, request: scheduler.QuoteRequest, context: Any) -> scheduler.QuoteResponse:
        self.quoted.append(request)
        return scheduler.QuoteResponse(cost_s=self.quote_s or 0.0, accepting=self.quote_s is not None)

    async def Status(self, request: scheduler.StatusRequest, context: Any) -> scheduler.SchedulerStatus:
        return self._status()

    async def _read(self, frames: Any, outgoing: "asyncio.Queue[scheduler.SchedulerFrame | None]") -> None:
        async with asyncio.TaskGroup() as tasks:
            running: dict[int, asyncio.Task[None]] = {}
            async for frame in frames:
                if frame.edge_id:
                    self.edge_ids.append(frame.edge_id)
                for opened in frame.opened:
                    self.requests.append(opened.request)
                    running[opened.stream_id] = tasks.create_task(self._reply(opened.stream_id, opened.request, outgoing))
                for stream_id in frame.cancelled:
                    self.cancelled.append(stream_id)
                    self.was_cancelled.set()
                    if running[stream_id].cancel():
                        finished = self._finish(self.requests[-1], 0, sampling.FINISH_REASON_CANCELLED)
                        outgoing.put_nowait(_frame(scheduler.TokenDelta(stream_id=stream_id, finished=finished)))

    async def _reply(
        self, stream_id: int, request: scheduler.GenerateRequest, outgoing: "asyncio.Queue[scheduler.SchedulerFrame | None]"
    ) -> None:
        script, token_ids = self.script, load_vocabulary().encode_harmony(self.script.text)[: request.sampling.max_tokens]
        for begin in range(0, len(token_ids), script.chunk):
            if script.pause_at is not None and begin >= script.pause_at and not script.go.is_set():
                self.has_paused.set()
                await script.go.wait()
            piece = token_ids[begin : begin + script.chunk]
            for index in range(max(1, request.n)):
                outgoing.put_nowait(_frame(self._delta(stream_id, index, piece, request)))
        for index in range(max(1, request.n)):
            reason = sampling.FINISH_REASON_ERROR if script.error else script.reason
            finished = self._finish(request, len(token_ids), reason)
            outgoing.put_nowait(_frame(scheduler.TokenDelta(stream_id=stream_id, index=index, finished=finished)))

    @staticmethod
    def _delta(stream_id: int, index: int, piece: list[int], request: scheduler.GenerateRequest) -> scheduler.TokenDelta:
        delta = scheduler.TokenDelta(stream_id=stream_id, index=index, token_ids=piece)
        if request.sampling.HasField("top_logprobs"):
            num_top = request.sampling.top_logprobs
            delta.logprobs.extend(
                sampling.TokenLogprobs(logprob=-0.5, top_token_ids=[one] * num_top, top_logprobs=[-0.5] * num_top) for one in piece
            )
        return delta

    def _finish(self, request: scheduler.GenerateRequest, num_tokens: int, reason: sampling.FinishReason.ValueType) -> scheduler.Finished:
        usage = sampling.Usage(prompt_tokens=len(request.prompt_token_ids), completion_tokens=num_tokens, cached_tokens=16)
        return scheduler.Finished(reason=reason, usage=usage, timings=sampling.Timings(queue_s=0.25, total_s=1.0), error=self.script.error)

    def _status(self) -> scheduler.SchedulerStatus:
        status = scheduler.ModelStatus(
            model=self.model,
            max_model_len=self.max_model_len,
            vocab_size=201088,
            num_groups=1,
            fingerprint="fp-1",
            total_parameters=42,
            block_size=16,
        )
        group = scheduler.GroupStatus(group_id="g", model=self.model, num_steps=self.num_steps, step_s=self.step_s)
        return scheduler.SchedulerStatus(scheduler_id="scripted", models=[status], groups=[group])


def _frame(delta: scheduler.TokenDelta) -> scheduler.SchedulerFrame:
    return scheduler.SchedulerFrame(deltas=[delta])


@dataclass(frozen=True)
class Stand:
    """A whole edge on free ports before a scripted scheduler."""

    edge: Edge
    scheduler: ScriptedScheduler
    rest: str
    grpc: str
    registry: CollectorRegistry

    @property
    def url(self) -> str:
        return f"http://{self.rest}"

    def http(self, **options: Any) -> httpx.AsyncClient:
        """A client of the REST door that waits longer than httpx's own five seconds."""
        return httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S, **options)


@asynccontextmanager
async def serve_scheduler(scripted: ScriptedScheduler, listen: str = "127.0.0.1:0") -> AsyncIterator[str]:
    contract = ("ossia.v1.Scheduler", lambda server: scheduler_pb2_grpc.add_SchedulerServicer_to_server(scripted, server))
    async with serve(listen, [contract]) as server:
        try:
            yield server.address
        finally:
            scripted.break_streams()


@asynccontextmanager
async def stand(
    script: Script | None = None, max_model_len: int = MAX_MODEL_LEN, clock: Callable[[], float] = time.monotonic, **config: Any
) -> AsyncIterator[Stand]:
    """`clock` is what the limits go by."""
    scripted = ScriptedScheduler(script or Script(), max_model_len=max_model_len)
    async with serve_scheduler(scripted) as address, AsyncExitStack() as stack:
        discovery = StaticDiscovery({"schedulers": {"one": address.encode()}})
        settings = EdgeConfig(edge_id="edge-1", **config)
        catalogue, tracer = Catalogue(read_settings(settings)), NoOpTracerProvider().get_tracer("test")
        registry = CollectorRegistry()
        gate = await stack.enter_async_context(open_gate(settings, settings.redis_url, registry, clock))
        edge = assemble(settings, catalogue, discovery, registry, tracer, lambda: catalogue.has_seen_models, gate=gate)
        contract = (SERVICE_NAME, lambda server: inference_pb2_grpc.add_InferenceServicer_to_server(edge.service, server))
        interceptors = [AccessInterceptor(gate)] if gate else []
        async with (
            serve("127.0.0.1:0", [contract], interceptors) as rpc,
            serve_rest(edge.app, "127.0.0.1:0", 1) as rest,
            asyncio.TaskGroup() as tasks,
        ):
            following = tasks.create_task(edge.pool.run())
            await wait_until(lambda: edge.catalogue.has_seen_models)
            try:
                yield Stand(edge, scripted, rest.address, rpc.address, registry)
            finally:
                await edge.runner.aclose()
                await discovery.aclose()
                following.cancel()


async def wait_until(holds: Any, timeout_s: float = PATIENCE_S) -> None:
    """Polls: for states that nothing announces."""
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 - states that nothing announces
            await asyncio.sleep(0.005)
