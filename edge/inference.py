"""The one implementation behind both doors: a chat request in, chat events out.

Prepares, picks a scheduler, relays its deltas as events. The consumer going away, by closing the generator or by cancelling its task,
cancels the request in the cluster.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, use_span

from edge.conversation.constraints import compile_schemas, has_schemas
from edge.conversation.harmony_parse import ParsedChannel
from edge.conversation.prepare import ChatPreparer
from edge.conversation.turn import PreparedChat, Turn
from edge.metrics import EdgeMetrics
from edge.routing.scheduler_pool import SchedulerPool
from edge.routing.scheduler_stream import OpenRequest
from protos.ossia.v1 import inference_pb2 as inference
from services.errors import DeadlineExceeded, OssiaError, Overloaded, row, to_proto
from services.metrics import exemplar_of
from services.telemetry import get_logger, inject_context
from services.vocabulary import Vocabulary

SETTLE_S = 2.0  # how long a turn that stop strings ended waits for the scheduler's count
OVERLOAD_RETRY_S = 1.0
MAX_LOGGED_ID = 128  # characters: an id that is refused may be of any length
log = get_logger(__name__)
ChatEvents = AsyncGenerator[list[inference.ChatEvent], None]  # in batches: all that came together


class InferenceCore:
    """Stateless but for the number of open requests. `clock` is monotonic, in seconds."""

    def __init__(
        self,
        preparer: ChatPreparer,
        pool: SchedulerPool,
        vocabulary: Vocabulary,
        metrics: EdgeMetrics,
        tracer: Tracer,
        max_open_requests: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_open = 0
        self._preparer = preparer
        self._pool = pool
        self._vocabulary = vocabulary
        self._metrics = metrics
        self._tracer = tracer
        self._max_open_requests = max_open_requests
        self._clock = clock

    async def chat(self, request: inference.ChatRequest) -> ChatEvents:
        """`started`, the choices' events, then exactly one of `completed` and `error`.

        A batch is never empty and holds all that came since the one before, so that a slow consumer gets few large ones. A request that is
        refused before it is sent on raises its OssiaError instead of the first batch.
        """
        arrived = self._clock()
        try:
            if self.num_open >= self._max_open_requests:
                raise Overloaded(f"this edge has {self.num_open} open requests, its limit; try again", retry_after_s=OVERLOAD_RETRY_S)
            if has_schemas(request):
                await asyncio.to_thread(compile_schemas, request)
            prepared = await self._preparer.prepare(request)
            stream = await self._pool.choose(prepared.generate)
        except OssiaError as error:
            self._metrics.refused.labels(row(error).code).inc()
            log.info("chat_refused", request_id=request.request_id[:MAX_LOGGED_ID], tenant=request.tenant, outcome=row(error).code)
            raise
        turn, outcome = Turn(prepared, self._vocabulary), _Outcome(arrived, self._metrics, prepared.model.model)
        with self._observe(prepared, turn, outcome) as span:
            outcome.exemplar = exemplar_of(span)
            with use_span(span, end_on_exit=False):
                prepared.generate.trace_context.update(inject_context())
            with stream.open(prepared.generate) as deltas, self._deadline(deltas, prepared, arrived):
                yield [prepared.started]
                try:
                    events: list[inference.ChatEvent] = []
                    while not turn.is_finished:
                        received = await deltas.receive()
                        outcome.observe(self._clock())
                        events.extend(turn.apply(received))
                        if events and not (turn.is_finished and not deltas.is_readable):  # the last ones go out with the end
                            yield events
                            events = []
                    await self._settle(deltas, turn)
                except OssiaError as error:
                    outcome.end(row(error).code)
                    span.set_status(Status(StatusCode.ERROR, row(error).code))
                    yield [*events, inference.ChatEvent(error=to_proto(error))]  # what came together with the error was said too
                    return
                outcome.end("completed")
                yield [*events, turn.complete(outcome.first_s or 0.0, self._clock() - arrived)]

    @contextmanager
    def _deadline(self, deltas: OpenRequest, prepared: PreparedChat, arrived: float) -> Iterator[None]:
        """Ends the request at its deadline: a scheduler that says nothing more must not hold a client."""
        timeout_s = prepared.generate.timeout_s
        cure = "raise timeout_s or ask for fewer tokens"
        error = DeadlineExceeded(f"timeout_s: the request did not end within {timeout_s:g} seconds; {cure}", "timeout_s")
        remaining_s = max(0.0, arrived + timeout_s - self._clock())
        timer = asyncio.get_running_loop().call_later(remaining_s, deltas.interrupt, error)
        try:
            yield
        finally:
            timer.cancel()

    async def _settle(self, deltas: OpenRequest, turn: Turn) -> None:
        """Where stop strings ended the turn the sequences still run: stops them, and takes what they report of their use."""
        deltas.cancel()
        try:
            async with asyncio.timeout(SETTLE_S):
                while deltas.is_readable:
                    for _ in turn.apply(await deltas.receive()):
                        pass  # said after the end
        except (TimeoutError, OssiaError) as error:
            log.warning("usage_not_settled", reason=str(error))

    @contextmanager
    def _observe(self, prepared: PreparedChat, turn: Turn, outcome: "_Outcome") -> Iterator[Span]:
        """Metrics, log line and span of one request, however it ends."""
        model = prepared.model.model
        tenant = prepared.generate.tenant
        self.num_open += 1
        self._metrics.open_requests.inc()
        span = self._tracer.start_span("chat", kind=SpanKind.SERVER, attributes=_describe(prepared))
        try:
            yield span
        finally:
            self.num_open -= 1
            self._metrics.open_requests.dec()
            usage, total_s = turn.usage, self._clock() - outcome.arrived
            tokens = {one.value: turn.count_tokens(one) for one in ParsedChannel}
            self._metrics.record(model, tenant, outcome.name, total_s, usage, tokens, turn.num_malformed, outcome.exemplar)
            span.add_event("finished", {"ossia.outcome": outcome.name})
            span.set_attribute("gen_ai.response.model", model)
            span.set_attribute("gen_ai.response.id", prepared.request_id)
            span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
            with use_span(span, end_on_exit=True):
                log.info(
                    "chat_ended",
                    request_id=prepared.request_id,
                    tenant=tenant,
                    model=model,
                    outcome=outcome.name,
                    prompt_tokens=usage.prompt_tokens,
                    cached_tokens=usage.cached_tokens,
                    completion_tokens=usage.completion_tokens,
                    ttft_s=None if outcome.first_s is None else round(outcome.first_s, 4),
                    total_s=round(total_s, 4),
                )


def _describe(prepared: PreparedChat) -> dict[str, str | int | float]:
    """The request as OpenTelemetry's conventions for generative AI name its parts; never what it says."""
    sampling = prepared.generate.sampling
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "ossia",
        "gen_ai.request.model": prepared.model.model,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.choice.count": max(1, prepared.generate.n),
        "ossia.request_id": prepared.request_id,
        "ossia.tenant": prepared.generate.tenant,
    }


class _Outcome:
    """How one request goes, for its metrics: filled while it runs. Without an end the client went away."""

    def __init__(self, arrived: float, metrics: EdgeMetrics, model: str) -> None:
        self.arrived = arrived
        self.first_s: float | None = None  # arrival to first token
        self.last_at = arrived
        self.name = "client_gone"
        self.exemplar: dict[str, str] | None = None  # the request's trace
        self._ttft_s, self._inter_token_s = metrics.ttft_s.labels(model), metrics.inter_token_s.labels(model)

    def observe(self, now: float) -> None:
        """Tokens have come."""
        if self.first_s is None:
            self.first_s = now - self.arrived
            self._ttft_s.observe(self.first_s, self.exemplar)
        else:
            self._inter_token_s.observe(now - self.last_at, self.exemplar)
        self.last_at = now

    def end(self, name: str) -> None:
        self.name = name
