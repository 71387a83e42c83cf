"""The Worker service: who drives this group, and that plans and results stay in order. Knows nothing of tensors.

A Run stream becomes the group's owner with its first plan, unless that has an older epoch than one seen: such plans are refused. A stream
with a higher epoch, or with the same one (an owner that connects again), takes the group over: the older stream ends with STALE_EPOCH and
what it held is forgotten, as it is when a stream ends by itself.
"""

import asyncio
from collections.abc import AsyncIterator

import grpc
from opentelemetry.trace import Tracer

from protos.ossia.v1 import worker_pb2, worker_pb2_grpc
from services.errors import OssiaError, StaleEpoch
from services.telemetry import get_logger
from worker.engine import Engine
from worker.metrics import WorkerMetrics
from worker.sequence_spans import SequenceSpans
from worker.step_plan import StepOutcome
from worker.step_wire import encode_cached, encode_outcome

log = get_logger(__name__)

MAX_PLANS_AHEAD = 8  # plans of one stream that wait or run; more are left unread, and flow control holds the sender


class _Stream:
    """One Run call."""

    def __init__(self, tracer: Tracer, peer: str) -> None:
        self.peer = peer
        self.spans = SequenceSpans(tracer)
        self.slots = asyncio.Semaphore(MAX_PLANS_AHEAD)
        self.is_replaced = False
        # In the order of the plans; an error ends the stream with it, None ends it well.
        self.results: asyncio.Queue[tuple[worker_pb2.StepPlan, asyncio.Future[StepOutcome]] | OssiaError | None] = asyncio.Queue()


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Serves one engine. `info` is what Describe answers, epoch and held blocks aside."""

    def __init__(self, engine: Engine, info: worker_pb2.GroupInfo, metrics: WorkerMetrics, tracer: Tracer) -> None:
        self._engine = engine
        self._info = info
        self._metrics = metrics
        self._tracer = tracer
        self._epoch = 0  # highest seen; never falls
        self._owner: _Stream | None = None
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def info(self) -> worker_pb2.GroupInfo:
        """What the group is now, without its held blocks."""
        info = worker_pb2.GroupInfo()
        info.CopyFrom(self._info)
        info.epoch = self._epoch
        return info

    def set_address(self, address: str) -> None:
        """Where schedulers reach this worker, known once the port is bound."""
        self._info.address = address

    async def drain(self) -> None:
        """Tells the owner with every result to place nothing new here, and returns when no sequence is held."""
        self._is_draining = True
        await self._idle.wait()

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext[worker_pb2.DescribeRequest, worker_pb2.GroupInfo]
    ) -> worker_pb2.GroupInfo:
        info = self.info
        if request.include_held_blocks:
            info.held_blocks.extend(encode_cached(block) for block in await self._engine.held_blocks())
        return info

    async def Run(
        self,
        request_iterator: AsyncIterator[worker_pb2.StepPlan],
        context: grpc.aio.ServicerContext[worker_pb2.StepPlan, worker_pb2.StepResult],
    ) -> AsyncIterator[worker_pb2.StepResult]:
        stream = _Stream(self._tracer, context.peer())
        reader = asyncio.create_task(self._read(request_iterator, stream))
        # A call that is cancelled while a result is being sent abandons this generator without closing it.
        context.add_done_callback(lambda _: self._close(stream, reader))  # type: ignore[arg-type]  # any callable will do
        try:
            while (item := await stream.results.get()) is not None:
                if isinstance(item, OssiaError):
                    raise item
                plan, future = item
                outcome = await future
                stream.slots.release()
                self._note(stream, plan, outcome)
                yield encode_outcome(outcome, self._is_draining)
            await reader  # raises what ended it, if it was not the owner
        finally:
            self._close(stream, reader)

    async def _read(self, plans: AsyncIterator[worker_pb2.StepPlan], stream: _Stream) -> None:
        try:
            async for plan in plans:
                await stream.slots.acquire()
                if stream.is_replaced:
                    return
                stream.results.put_nowait((plan, self._take(stream, plan)))
        finally:
            stream.results.put_nowait(None)

    def _take(self, stream: _Stream, plan: worker_pb2.StepPlan) -> asyncio.Future[StepOutcome]:
        """Queues the plan, or refuses it where its epoch is older than one seen. The first one taken makes its stream the owner."""
        if plan.epoch < self._epoch:
            message = f"epoch {plan.epoch} is older than {self._epoch}, which this group has seen; claim the group again"
            refused: asyncio.Future[StepOutcome] = asyncio.get_running_loop().create_future()
            refused.set_result(StepOutcome(plan.epoch, plan.step, StaleEpoch(message, "epoch")))
            return refused
        self._epoch = plan.epoch
        if self._owner is not stream:
            self._take_over(stream)
        if plan.admitted:
            self._idle.clear()
        return self._engine.execute(plan, stream)

    def _take_over(self, stream: _Stream) -> None:
        older, self._owner = self._owner, stream
        self._engine.open(stream)
        log.info("group_taken", epoch=self._epoch, peer=stream.peer, replaced=older is not None)
        if older is not None:
            self._metrics.note_takeover()
            older.is_replaced = True
            older.results.put_nowait(StaleEpoch(f"another stream took the group over with epoch {self._epoch}", "epoch"))

    def _note(self, stream: _Stream, plan: worker_pb2.StepPlan, outcome: StepOutcome) -> None:
        self._metrics.note_outcome(outcome)
        if outcome.refusal:
            log.warning("plan_refused", step=outcome.step, epoch=outcome.epoch, reason=outcome.refusal.message, peer=stream.peer)
        else:
            stream.spans.note_step(plan, outcome)
        if stream is self._owner and outcome.num_held == 0 and stream.results.empty():
            self._idle.set()

    def _close(self, stream: _Stream, reader: asyncio.Task[None]) -> None:
        """Ends a stream, once or again: its plans and its sequences are forgotten."""
        reader.cancel()
        stream.spans.end_all()
        if self._owner is stream:
            self._owner = None
            self._engine.close(stream)
            self._metrics.note_forgotten()
            self._idle.set()
            log.info("group_released", epoch=self._epoch, peer=stream.peer)
