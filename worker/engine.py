"""Executes plans in order on the model's own thread, each while the step before it is under way, and tells what became of each.

Knows who may send plans (the stream that owns the group), nothing of the wire's transport.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from protos.ossia.v1 import worker_pb2
from services.errors import OssiaError, StaleEpoch
from worker.backend import Backend, StepOutput, StepUnderWay
from worker.block_names import BlockNames
from worker.plan_draft import Limits
from worker.sequence_table import SequenceTable
from worker.sequences import ScheduledSequence
from worker.step_broadcast import Leader
from worker.step_pipeline import OnSettled, StepPipeline
from worker.step_plan import CachedBlock, SequenceFailure, StepOutcome, StepPlan
from worker.step_wire import decode_plan
from worker.watchdog import StepWatchdog

Result = TypeVar("Result")


class Engine:
    """`thread` has one worker: all model work runs there, in the order in which it was asked for. Another thread only waits for the device,
    so that a result goes out when it is there, and a plan that comes meanwhile starts at once.

    An exception of the backend is no refusal: the state of the group is unknown after it. It becomes the result of `crashed`, and the
    process must end. What does not end at all shows in `watchdog`.
    """

    def __init__(
        self, backend: Backend, limits: Limits, thread: ThreadPoolExecutor, watchdog: StepWatchdog, leader: Leader | None = None
    ) -> None:
        self.limits = limits
        self.crashed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._backend = backend
        self._thread = thread
        self._watchdog = watchdog
        self._leader = leader
        self._owner: object | None = None  # whose plans count; set by `open` and `close` on the event loop
        self._loop = asyncio.get_running_loop()
        self._awaited: set[asyncio.Future[StepOutcome]] = set()  # not there yet; used on the event loop
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="device-wait")
        # Used on the model's thread only.
        self._table = SequenceTable(limits)
        self._pipeline = StepPipeline(backend, self._table)
        self._names = BlockNames(limits.facts.block_size)

    def open(self, owner: object) -> None:
        """From now on only this owner's plans count; what the one before held is forgotten."""
        self._owner = owner
        self._submit(self._forget)

    def close(self, owner: object) -> None:
        """Forgets what the owner held, unless another has taken its place."""
        if self._owner is owner:
            self._owner = None
            self._submit(self._forget)

    def execute(self, message: worker_pb2.StepPlan, owner: object) -> asyncio.Future[StepOutcome]:
        """Queues a plan. Refusals are part of the outcome."""
        outcome: asyncio.Future[StepOutcome] = self._loop.create_future()
        self._awaited.add(outcome)
        outcome.add_done_callback(self._awaited.discard)
        self._submit(lambda: self._execute(message, owner, partial(self._tell, outcome)))
        return outcome

    def held_blocks(self) -> asyncio.Future[list[CachedBlock]]:
        return self._submit(lambda: list(self._names))

    async def stop(self) -> None:
        """Ends the other ranks' loops after all queued work."""
        if self._leader:
            await self._submit(self._leader.send_stop)

    def _submit(self, work: Callable[[], Result], thread: ThreadPoolExecutor | None = None) -> asyncio.Future[Result]:
        future = self._loop.run_in_executor(thread or self._thread, self._run, work)
        future.add_done_callback(self._note_crash)
        return future

    def _run(self, work: Callable[[], Result]) -> Result:
        with self._watchdog.working():
            return work()

    def _note_crash(self, done: asyncio.Future[Result]) -> None:
        if done.cancelled() or (error := done.exception()) is None or self.crashed.done():
            return
        self.crashed.set_result(error)
        for outcome in list(self._awaited):
            if not outcome.done():  # told or given up in this very turn of the loop
                outcome.set_exception(error)

    def _tell(self, future: asyncio.Future[StepOutcome], outcome: StepOutcome) -> None:
        """From the model's thread. Whoever asked may be gone."""

        def tell() -> None:
            if not future.done():
                future.set_result(outcome)

        self._loop.call_soon_threadsafe(tell)

    def _await_device(self, step: StepUnderWay) -> None:
        self._submit(step.wait, self._waiter).add_done_callback(lambda _: self._submit(lambda: self._settle(step)))

    # ---- on the model's thread ----

    def _settle(self, step: StepUnderWay) -> None:
        """Unless the plan after it has done so."""
        if self._pipeline.under_way is step:
            self._pipeline.settle()

    def _forget(self) -> None:
        self._pipeline.settle()
        self._table.forget()
        if self._leader:
            self._leader.send_forget()

    def _execute(self, message: worker_pb2.StepPlan, owner: object, tell: Callable[[StepOutcome], None]) -> None:
        try:
            if owner is not self._owner:
                raise StaleEpoch("another stream drives this group now; claim the group again", "epoch")
            plan = decode_plan(message, self.limits.facts)
            scheduled = self._table.apply(plan)
        except OssiaError as refusal:
            tell(StepOutcome(message.epoch, message.step, refusal, num_held=len(self._table)))
            return
        if self._leader:
            self._leader.send_plan(message, is_ahead=self._pipeline.under_way is not None)
        self._names.note_step(plan.copies, scheduled, plan.cached)
        self._pipeline.run(plan, scheduled, self._reporter(plan, scheduled, tell))
        if step := self._pipeline.under_way:
            self._loop.call_soon_threadsafe(self._await_device, step)

    def _reporter(self, plan: StepPlan, scheduled: list[ScheduledSequence], tell: Callable[[StepOutcome], None]) -> OnSettled:
        """Tells the step's outcome once it is settled. Counts now what the step will have changed by then."""
        num_decode = sum(one.num_tokens == 1 and one.draws_token for one in scheduled)
        num_tokens = sum(one.num_tokens for one in scheduled)

        def report(output: StepOutput, device_time_s: float) -> None:
            failed_ids = {failed.seq_id for failed in output.failed}
            for one in scheduled:
                if one.sequence.seq_id in failed_ids:
                    self._names.note_failure(one.sequence)
            rejected = [SequenceFailure(one.seq_id, one.rejection) for one in plan.admitted if one.rejection]
            failures = [SequenceFailure(failed.seq_id, failed.error(failed.message)) for failed in output.failed]
            tell(
                StepOutcome(
                    epoch=plan.epoch,
                    step=plan.step,
                    output=output,
                    failures=(*rejected, *failures),
                    device_time_s=device_time_s,
                    num_prefill_tokens=num_tokens - num_decode,
                    num_decode_tokens=num_decode,
                    num_scheduled=len(scheduled),
                    num_held=len(self._table),
                )
            )

        return report
