"""One worker group that this scheduler owns: plans go out ahead of results, results become frames for the edges."""

from __future__ import annotations  # gRPC's generics exist in its type stubs only

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import grpc

from protos.ossia.v1 import scheduler_pb2, worker_pb2, worker_pb2_grpc
from scheduler.batching import Batcher, ProtocolViolation
from scheduler.config import SchedulerConfig
from scheduler.metrics import SchedulerMetrics
from scheduler.open_request import handle_of, sampling_of, trace_context_of
from scheduler.outbox import Outbox
from scheduler.prefix_cache import PrefixIndex
from scheduler.sequence import Event, Request, Sequence
from scheduler.step_stream import decode_result, encode_plan, read_limits
from services.errors import GroupLost, OssiaError, from_rpc_error

Call = grpc.aio.StreamStreamCall[worker_pb2.StepPlan, worker_pb2.StepResult]


class HandedOver(OssiaError):
    """Nothing was lost: the group has nothing left to do here, and another scheduler is to own it."""


class Group:
    """Holds the group's batcher and drives it. All calls come from the one event loop, so that the batcher needs no lock.

    `epoch` may be raised by whoever holds the claim, and goes out with every plan.
    """

    def __init__(
        self, info: worker_pb2.GroupInfo, epoch: int, config: SchedulerConfig, metrics: SchedulerMetrics, index: PrefixIndex
    ) -> None:
        self.info = info
        self.group_id = info.group_id
        self.epoch = epoch
        self.is_draining = False  # the worker takes nothing new
        self.is_leaving = False  # it goes to another scheduler when what runs here has ended
        self.is_fenced = False  # another scheduler owns it
        self.batcher = Batcher(
            read_limits(info),
            max_queued_tokens=config.max_queued_tokens,
            batch_timeout_s=config.batch_timeout_ms / 1e3,
            tenant_weights=config.weights,
            index=index,
            group_id=info.group_id,
        )
        self._config = config
        self._metrics = metrics
        self._has_news = asyncio.Event()  # a request, a cancellation or a result came
        self._sent_at: dict[int, float] = {}  # step → when its plan went out
        self._planning_s: dict[int, float] = {}  # step → what it took to plan it

    # ---- requests ----

    def open(self, request: Request) -> None:
        """Queues the request; raises what `Batcher.add` raises."""
        sequences = self.batcher.add(request, time.monotonic())
        handle_of(sequences[0]).place(self.group_id, sequences)
        self._has_news.set()

    def cancel(self, sequence: Sequence) -> None:
        """Ends the sequence; the caller hears of it by one last delta."""
        self._deliver(self.batcher.cancel(sequence, time.monotonic()))
        self._has_news.set()

    def abandon(self, error: OssiaError, move: Callable[[Sequence], bool]) -> None:
        """The group is lost, or owned by another: what `move` does not take ends with `error`."""
        moved = {sequence for sequence in self.batcher.sequences if move(sequence)}
        self._deliver(event for event in self.batcher.abandon(error, time.monotonic()) if event.sequence not in moved)

    def fence(self) -> None:
        """Ends the run: the group is not ours any more."""
        self.is_fenced = True
        self._has_news.set()

    def hand_over(self, is_leaving: bool) -> None:
        """While leaving it takes nothing new, and the run ends once nothing is left to do."""
        self.is_leaving = is_leaving
        self._has_news.set()

    @property
    def is_usable(self) -> bool:
        """It can take requests. One that is leaving should take none while another group can."""
        return not (self.is_draining or self.is_fenced)

    # ---- steps ----

    async def run(self, stub: worker_pb2_grpc.WorkerAsyncStub) -> None:
        """Drives the group until it is lost (GroupLost) or given to another scheduler (HandedOver); its stream is closed then."""
        call = stub.Run()
        # Not a TaskGroup: there a failure of a child would swallow a cancellation that comes at the same moment.
        tasks = [asyncio.create_task(self._send_plans(call)), asyncio.create_task(self._receive_results(call))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        except HandedOver:
            raise
        except grpc.aio.AioRpcError as failure:
            raise self._lost(from_rpc_error(failure).message) from None
        except (asyncio.InvalidStateError, ProtocolViolation, OssiaError) as failure:  # InvalidStateError: written to after its end
            raise self._lost(str(failure)) from None
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_plans(self, call: Call) -> None:
        while True:
            self._has_news.clear()
            if self.is_fenced:
                raise GroupLost("another scheduler owns it now")
            if self.is_leaving and self.batcher.is_idle:
                raise HandedOver("it goes to another scheduler")
            now = time.monotonic()
            self._deliver(self.batcher.expire(now))
            plan = self.batcher.plan(now) if len(self.batcher.in_flight) < self._config.pipeline_depth else None
            if plan is None:
                await self._wait(now)
                continue
            self._sent_at[plan.step] = now
            self._metrics.observe_plan(self.group_id, plan)
            wire = encode_plan(plan, self.epoch, sampling_of, trace_context_of)
            self._planning_s[plan.step] = time.monotonic() - now
            await call.write(wire)

    async def _wait(self, now: float) -> None:
        """Until something comes, or time itself gives something to do."""
        wake_at, oldest = self.batcher.wake_at(), min(self._sent_at.values(), default=None)
        if oldest is not None:
            if now >= oldest + self._config.step_timeout_s:
                raise GroupLost(f"a step took longer than {self._config.step_timeout_s:g} s")
            wake_at = min(wake_at or float("inf"), oldest + self._config.step_timeout_s)
        try:
            async with asyncio.timeout(None if wake_at is None else max(0.001, wake_at - now)):
                await self._has_news.wait()
        except TimeoutError:
            return

    async def _receive_results(self, call: Call) -> None:
        async for wire in call:
            result, now = decode_result(wire), time.monotonic()
            self.is_draining = wire.draining
            step, events = self.batcher.apply(result, now)
            self._deliver(reversed(events))  # prefills stand last in a step, and a first token waits for nobody
            round_trip_s, host_s = now - self._sent_at.pop(result.step), self._planning_s.pop(result.step) + time.monotonic() - now
            self._metrics.observe_step(self.group_id, step, result, round_trip_s, host_s)
            self._has_news.set()
        raise GroupLost("it closed its stream")

    def _lost(self, cause: str) -> GroupLost:
        message = f"the worker group {self.group_id} that held the request was lost ({cause}): send the request again"
        return GroupLost(message, retry_after_s=1.0)

    # ---- to the callers ----

    def _deliver(self, events: Iterable[Event]) -> None:
        """One frame for each caller, whatever the number of its requests."""
        frames: dict[Outbox, list[scheduler_pb2.TokenDelta]] = defaultdict(list)
        for event in events:
            handle = handle_of(event.sequence)
            frames[handle.outbox].append(handle.take(event))
            if event.finish is not None:
                self._metrics.observe_finish(self.info.model, event.sequence, event.finish, handle.span)
        for outbox, deltas in frames.items():
            outbox.put(deltas)

    def status(self) -> scheduler_pb2.GroupStatus:
        batcher = self.batcher
        num_free_full, num_free_window = batcher.num_free_blocks
        return scheduler_pb2.GroupStatus(
            group_id=self.group_id,
            model=self.info.model,
            num_running=batcher.num_running,
            num_waiting=batcher.num_waiting,
            num_queued_tokens=batcher.num_queued_tokens,
            num_full_blocks=batcher.limits.num_full_blocks,
            num_free_full_blocks=num_free_full,
            num_window_blocks=batcher.limits.num_window_blocks,
            num_free_window_blocks=num_free_window,
            prefill_tokens_per_s=batcher.rates.prefill_tokens_per_s,
            step_s=batcher.rates.last_decode_step_s,
            epoch=self.epoch,
            num_steps=batcher.num_steps,
            num_surplus_tokens=batcher.num_surplus_tokens,
        )
