"""How long a device waits for its scheduler: the real loop of a group over real gRPC, to a scripted worker in a process of its own."""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from opentelemetry.trace import INVALID_SPAN
from prometheus_client import CollectorRegistry

from protos.ossia.v1 import sampling_pb2, worker_pb2, worker_pb2_grpc
from scheduler.batching import InFlightStep
from scheduler.config import SchedulerConfig
from scheduler.group import Group
from scheduler.metrics import SchedulerMetrics
from scheduler.open_request import OpenRequest
from scheduler.outbox import Outbox
from scheduler.prefix_cache import PrefixIndex
from scheduler.sequence import Request, StepResult
from services.grpc_channel import open_channel

STEP_MS = 5.0
NUM_SEQUENCES = 64
WINDOW_STEPS, NUM_WINDOWS = 100, 5


class StepLog(SchedulerMetrics):
    """Keeps when each result with all sequences decoding came, and what its step took on the device."""

    def __init__(self) -> None:
        super().__init__(CollectorRegistry())
        self.steps: list[tuple[float, float]] = []

    def observe_step(self, group: str, step: InFlightStep, result: StepResult, round_trip_s: float, host_s: float) -> None:
        super().observe_step(group, step, result, round_trip_s, host_s)
        if step.num_decodes == NUM_SEQUENCES:
            self.steps.append((time.perf_counter(), result.device_time_s))


async def measure_idle_share() -> float:
    """Share of the time in which the device computes nothing: the median of NUM_WINDOWS windows of WINDOW_STEPS steps each."""
    log, outbox = StepLog(), Outbox()
    async with scripted_device() as address, open_channel(address) as channel:
        stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
        info = await stub.Describe(worker_pb2.DescribeRequest(), wait_for_ready=True)
        group = Group(info, info.epoch + 1, SchedulerConfig(), log, PrefixIndex())
        tasks = [asyncio.create_task(group.run(stub)), asyncio.create_task(read(outbox))]
        for number in range(1, NUM_SEQUENCES + 1):
            handle = OpenRequest(outbox, number, INVALID_SPAN, lambda _: None)
            wire = sampling_pb2.SamplingParams(seed=number)
            prompt = [1000 + number, *range(2000, 2031)]
            max_tokens = WINDOW_STEPS * (NUM_WINDOWS + 1)
            group.open(Request(f"r{number}", info.model, prompt, max_tokens=max_tokens, ignore_eos=True, wire_sampling=wire, handle=handle))
        while len(log.steps) < WINDOW_STEPS * NUM_WINDOWS + WINDOW_STEPS // 2:
            await asyncio.sleep(0.05)
            assert not tasks[0].done(), "the group was lost"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    steady = log.steps[WINDOW_STEPS // 4 :]
    windows = [steady[at : at + WINDOW_STEPS + 1] for at in range(0, WINDOW_STEPS * NUM_WINDOWS, WINDOW_STEPS)]
    return statistics.median(map(idle_share, windows))


def idle_share(window: list[tuple[float, float]]) -> float:
    """Of the time from the first result to the last, what the steps after the first did not fill."""
    return 1.0 - sum(device_s for _, device_s in window[1:]) / (window[-1][0] - window[0][0])


async def read(outbox: Outbox) -> None:
    """As a stream to an edge does: every frame is taken and serialized."""
    async for frame in outbox.frames():
        frame.SerializeToString()


@asynccontextmanager
async def scripted_device() -> AsyncIterator[str]:
    """The address of a worker whose steps sleep for STEP_MS."""
    flags = ("--backend", "scripted", "--step-ms", str(STEP_MS), "--max-num-seqs", str(NUM_SEQUENCES), "--log-level", "error")
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "worker", *flags, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        serving = json.loads(await process.stdout.readline())
        yield serving["grpc"]
    finally:
        process.terminate()
        await process.wait()
