"""One rank's steps. The next one starts while the one before is under way, so that the device never waits for the host:

    device   forward 1, draw 1 | forward 2, draw 2 | forward 3, draw 3
    host               start 2 | settle 1, draw 2, start 3 | settle 2, draw 3 ...

A step's forward pass needs the tokens that the step before drew on the device only. What its own draw needs of them on the host, as for
penalties and grammars, is there by then. Knows nothing of the wire, and runs on the model's thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from worker.backend import Backend, FinishedStep, StepOutput, StepUnderWay
from worker.sequence_table import SequenceTable
from worker.sequences import ScheduledSequence
from worker.step_plan import StepPlan

OnSettled = Callable[[StepOutput, float], None]  # gets what the step gave, and the seconds that it took on the device


@dataclass(frozen=True)
class _Pending:
    step: StepUnderWay
    scheduled: list[ScheduledSequence]
    started_s: float
    on_settled: OnSettled
    failed_ids: frozenset[int]  # sequences that the step before ended when this one had started: what it computes of them counts nothing


class StepPipeline:
    """Computes the applied plans of one table, in order."""

    def __init__(self, backend: Backend, table: SequenceTable) -> None:
        self._backend = backend
        self._table = table
        self._pending: _Pending | None = None  # set by `run`, taken by `settle`
        self._settled_s = 0.0

    @property
    def under_way(self) -> StepUnderWay | None:
        return self._pending.step if self._pending else None

    def run(self, plan: StepPlan, scheduled: list[ScheduledSequence], on_settled: OnSettled) -> None:
        """Starts the plan's step and settles the one before; also this one where it is done at once."""
        started_s = perf_counter()
        is_empty = not scheduled and not plan.copies
        step = FinishedStep(StepOutput(())) if is_empty else self._backend.start(scheduled, plan.copies)
        failed_ids = self.settle()
        step.draw()
        self._table.advance(scheduled)
        self._pending = _Pending(step, scheduled, started_s, on_settled, failed_ids)
        if step.is_done():
            self.settle()

    def settle(self) -> frozenset[int]:
        """Waits for the step that is under way, if any, and records what it drew; gives the sequences that it ended."""
        if (pending := self._pending) is None:
            return frozenset()
        self._pending = None
        output = pending.step.take().without(pending.failed_ids)
        self._table.settle(pending.scheduled, output)
        began_s, self._settled_s = max(pending.started_s, self._settled_s), perf_counter()  # the device computes one step at a time
        pending.on_settled(output, self._settled_s - began_s)
        return frozenset(failure.seq_id for failure in output.failed)
