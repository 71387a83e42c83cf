"""A backend driven by the real scheduler's core on the real wire values, two plans deep, in one thread."""

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from protos.ossia.v1 import sampling_pb2, worker_pb2
from scheduler.batching import Batcher
from scheduler.sequence import Admission, Request, Sequence
from scheduler.step_stream import decode_result, encode_plan, read_limits
from services.prefix_hash import PrefixHasher, prefix_key
from worker.backend import Backend, StepOutput
from worker.plan_draft import Limits
from worker.sequence_table import SequenceTable
from worker.step_broadcast import Leader
from worker.step_pipeline import StepPipeline
from worker.step_plan import SequenceFailure, StepOutcome, StepPlan
from worker.step_wire import decode_plan, encode_outcome

PIPELINE_DEPTH = 2
STEP_S = 1.0  # what every step is said to take: computing again is slow then, and blocks in host memory are fetched


def make_request(token_ids: Ordered[int], max_tokens: int, block_size: int, num_resumed_tokens: int = 0, **sampling: object) -> Request:
    wire = sampling_pb2.SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling})  # type: ignore[arg-type]  # as given
    return Request(
        f"r{len(token_ids)}",
        "m",
        list(token_ids),
        num_resumed_tokens=num_resumed_tokens,
        max_tokens=max_tokens,
        ignore_eos=True,
        prefix=PrefixHasher(prefix_key("", b""), block_size, token_ids),
        checkpoint_blocks=[len(token_ids) // block_size],
        wire_sampling=wire,
    )


@dataclass
class Counts:
    """What happened on the way."""

    num_steps: int = 0
    num_cached_tokens: int = 0  # found when sequences were admitted
    num_swapped_out: int = 0  # blocks copied to host memory
    num_swapped_in: int = 0
    num_chunks: int = 0  # of more than one token that did not draw


class ScheduledRun:
    """One owner's stream. `submit` requests, then `step` until nothing is left."""

    def __init__(self, backend: Backend, limits: Limits, leader: Leader | None = None) -> None:
        facts = limits.facts
        info = worker_pb2.GroupInfo(
            block_size=facts.block_size,
            num_full_blocks=facts.num_full_blocks,
            num_window_blocks=facts.num_window_blocks,
            num_host_blocks=facts.num_host_blocks,
            sliding_window=facts.sliding_window,
            max_model_len=facts.max_model_len,
            max_batch_tokens=limits.max_batch_tokens,
            max_num_seqs=limits.max_num_seqs,
        )
        self.batcher = Batcher(read_limits(info), max_queued_tokens=1 << 20)
        self.counts = Counts()
        self._facts = facts
        self._leader = leader
        self._table = SequenceTable(limits)
        self._pipeline = StepPipeline(backend, self._table)
        self._now = 0.0

    def submit(self, request: Request) -> Sequence:
        (sequence,) = self.batcher.add(request, self._now)
        return sequence

    def run(self, requests: Ordered[Request], stagger: int = 2) -> list[Sequence]:
        """Submits a request every `stagger` steps, and returns when all have ended."""
        sequences: list[Sequence] = []
        while len(sequences) < len(requests) or not all(one.is_finished for one in sequences):
            if len(sequences) < len(requests) and self.counts.num_steps >= stagger * len(sequences):
                sequences.append(self.submit(requests[len(sequences)]))
            self.step()
        self.close()
        return sequences

    def step(self) -> None:
        """Sends a plan ahead where one may be sent, otherwise waits for a result."""
        self._now += STEP_S
        plan = self.batcher.plan(self._now) if len(self.batcher.in_flight) < PIPELINE_DEPTH else None
        if plan is None:
            self._pipeline.settle()
            return
        self._count(plan.admitted)
        wire = encode_plan(plan, 1, _sampling_of, lambda _: {})
        decoded = decode_plan(wire, self._facts)
        scheduled = self._table.apply(decoded)
        self.counts.num_steps += 1
        self.counts.num_swapped_out += sum(copy.target_on_host for copy in decoded.copies)
        self.counts.num_swapped_in += sum(copy.source_on_host for copy in decoded.copies)
        self.counts.num_chunks += sum(one.num_tokens > 1 and not one.draws_token for one in scheduled)
        if self._leader:
            self._leader.send_plan(wire, is_ahead=self._pipeline.under_way is not None)
        self._pipeline.run(decoded, scheduled, self._reporter(decoded))

    def close(self) -> None:
        """What is under way is settled and dropped, on every rank."""
        self._pipeline.settle()
        if self._leader:
            self._leader.send_forget()

    def _reporter(self, plan: StepPlan) -> Callable[[StepOutput, float], None]:
        def report(output: StepOutput, _time: float) -> None:
            failures = tuple(SequenceFailure(one.seq_id, one.error(one.message)) for one in output.failed)
            outcome = StepOutcome(plan.epoch, plan.step, output=output, failures=failures, device_time_s=STEP_S)
            self.batcher.apply(decode_result(encode_outcome(outcome)), self._now)
            self._table.check_integrity()

        return report

    def _count(self, admitted: Ordered[Admission]) -> None:
        self.counts.num_cached_tokens += sum(one.num_computed_tokens for one in admitted)


def _sampling_of(admission: Admission) -> sampling_pb2.SamplingParams:
    wire = admission.sequence.request.wire_sampling
    assert isinstance(wire, sampling_pb2.SamplingParams)
    return wire
