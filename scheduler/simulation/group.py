"""A simulated group: the production batcher, driven as `scheduler/group.py` drives it, over a device that takes the time of a model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from scheduler.batching import Batcher
from scheduler.sequence import Event, Request, Sequence, StepPlan, StepResult
from scheduler.simulation.events import EventLoop
from scheduler.simulation.step_time import StepShape, StepTime
from scheduler.simulation.workload import answer_of

Deliver = Callable[[Iterable[Event]], None]
Delay = Callable[[], float]


@dataclass
class Held:
    """A sequence on the device."""

    sequence: Sequence
    num_drawn: int  # tokens of the answer that it has, here or from before it was preempted or moved

    def draw(self) -> int:
        """The next token of the answer; planned ahead, a draw may lie behind its end, and the batcher drops it."""
        token_ids = answer_of(self.sequence.request).token_ids
        self.num_drawn += 1
        return token_ids[min(self.num_drawn, len(token_ids)) - 1]


class SimulatedGroup:
    """`deliver` gets what `Group._deliver` gets. `late_s` is drawn for each result: how long it takes on the wire."""

    def __init__(
        self,
        group_id: str,
        batcher: Batcher,
        step_time: StepTime,
        loop: EventLoop,
        deliver: Deliver,
        *,
        late_s: Delay = lambda: 0.0,
        pipeline_depth: int = 2,
    ) -> None:
        self.group_id = group_id
        self.batcher = batcher
        self.busy_s = 0.0
        self._step_time = step_time
        self._loop = loop
        self._deliver = deliver
        self._late_s = late_s
        self._pipeline_depth = pipeline_depth
        self._held: dict[int, Held] = {}
        self._device_free_s = 0.0
        self._result_due_s = 0.0  # results keep their order, however late one is
        self._wake_at_s = float("inf")
        self.is_lost = False

    def open(self, request: Request) -> list[Sequence]:
        """Raises what `Batcher.add` raises."""
        sequences = self.batcher.add(request, self._loop.now)
        self.pump()
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        self._deliver(self.batcher.cancel(sequence, self._loop.now))
        self.pump()

    def lose(self) -> None:
        """The device is gone with all that it held; results on the wire never arrive."""
        self.is_lost = True

    def pump(self) -> None:
        """Plans as far ahead of results as is allowed."""
        if self.is_lost:
            return
        now = self._loop.now
        self._deliver(self.batcher.expire(now))
        while len(self.batcher.in_flight) < self._pipeline_depth and (plan := self.batcher.plan(now)):
            self._run(plan)
        wake_at = self.batcher.wake_at()
        if wake_at is not None and now < wake_at and not now < self._wake_at_s <= wake_at:
            self._wake_at_s = wake_at
            self._loop.at(wake_at, self._wake)

    def _wake(self) -> None:
        self._wake_at_s = float("inf")
        self.pump()

    def _run(self, plan: StepPlan) -> None:
        step = self.batcher.in_flight[-1]
        for seq_id in plan.released:
            del self._held[seq_id]
        for one in plan.admitted:
            self._held[one.seq_id] = Held(one.sequence, len(one.token_ids) - one.sequence.request.num_prompt_tokens)
        num_context_tokens = sum(self._held[seq_id].sequence.num_scheduled_tokens for seq_id, count in plan.scheduled.items() if count == 1)
        duration_s = self._step_time(StepShape(step.num_prefill_tokens, step.num_decodes, num_context_tokens))
        token_ids = [self._held[seq_id].draw() for seq_id in step.drawing]
        self.busy_s += duration_s
        self._device_free_s = max(self._loop.now, self._device_free_s) + duration_s
        self._result_due_s = max(self._result_due_s, self._device_free_s + self._late_s())
        result = StepResult(plan.step, step.drawing, token_ids, device_time_s=duration_s)
        self._loop.at(self._result_due_s, partial(self._receive, result))

    def _receive(self, result: StepResult) -> None:
        if self.is_lost:
            return
        _, events = self.batcher.apply(result, self._loop.now)
        self._deliver(events)
        self.pump()
