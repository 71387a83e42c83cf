"""What one step costs the scheduler on its own processor: plan, encode, decode the result, apply, and the edge's frame.

The worker is left out; its answer is made off the clock, so that only the scheduler's work is timed. Every sequence decodes, the case in
which steps are shortest and most frequent. The last row is from a real loop over a real channel: how long the device waits between steps.
"""

import asyncio
import statistics
import time

from opentelemetry.trace import INVALID_SPAN

from benchmarks.idle_share import NUM_SEQUENCES, STEP_MS, measure_idle_share
from benchmarks.report import Report, finish, parser
from protos.ossia.v1 import sampling_pb2, scheduler_pb2, worker_pb2
from scheduler.batching import Batcher
from scheduler.open_request import OpenRequest, handle_of, sampling_of, trace_context_of
from scheduler.outbox import Outbox
from scheduler.sequence import GroupLimits, Request
from scheduler.step_stream import decode_result, encode_plan

NUM_STEPS, NUM_WARM_UP = 200, 20
PROMPT = list(range(100, 132))


def step_times_s(num_sequences: int) -> list[float]:
    """Seconds of scheduler work per step, with `num_sequences` decoding."""
    limits = GroupLimits(16, num_sequences * 20, num_sequences * 20, 128, 131_072, 8192 + num_sequences, num_sequences)
    batcher, outbox = Batcher(limits, max_queued_tokens=2**40), Outbox()
    for number in range(num_sequences):
        handle = OpenRequest(outbox, number, INVALID_SPAN, lambda _: None)
        request = Request(f"r{number}", "m", PROMPT, max_tokens=1000, wire_sampling=sampling_pb2.SamplingParams(seed=number), handle=handle)
        handle.place("g", batcher.add(request, 0.0))
    times = []
    for _ in range(NUM_WARM_UP + NUM_STEPS):
        start = time.perf_counter()
        plan = batcher.plan(0.0)
        assert plan is not None
        encode_plan(plan, 1, sampling_of, trace_context_of).SerializeToString()
        planned = time.perf_counter()
        answer = answer_to(batcher)
        answered = time.perf_counter()
        _, events = batcher.apply(decode_result(worker_pb2.StepResult.FromString(answer)), 0.0)
        deltas = [handle_of(event.sequence).take(event) for event in events]
        scheduler_pb2.SchedulerFrame(deltas=deltas).SerializeToString()
        times.append(planned - start + time.perf_counter() - answered)
    return times[NUM_WARM_UP:]


def answer_to(batcher: Batcher) -> bytes:
    step = batcher.in_flight[-1]
    result = worker_pb2.StepResult(step=step.step, seq_ids=step.drawing, token_ids=[7] * len(step.drawing), device_time_s=0.01)
    return result.SerializeToString()


def main() -> None:
    arguments = parser(__doc__).parse_args()
    report = Report("scheduler work per step, all decoding (median of 200)", ("sequences", "ms per step", "us per sequence"))
    for num_sequences in (64, 256, 1024):
        median_s = statistics.median(step_times_s(num_sequences))
        per_sequence_us = median_s / num_sequences * 1e6
        figures = {f"step_host_ms_{num_sequences}": median_s * 1e3, f"step_host_us_per_sequence_{num_sequences}": per_sequence_us}
        report.add(num_sequences, f"{median_s * 1e3:.2f}", f"{per_sequence_us:.2f}", **figures)
    share = asyncio.run(measure_idle_share())
    report.add(f"device idle at {NUM_SEQUENCES}, steps of {STEP_MS:g} ms", f"{share:.2%} of the time", "", device_idle_share=share)
    finish(report, arguments.json)


if __name__ == "__main__":
    main()
