"""The time to first token of a scripted worker that is driven directly, two plans ahead as a scheduler drives it: the floor."""

import asyncio
import random
import time

from benchmarks.edge_load.processes import scripted_worker
from protos.ossia.v1 import worker_pb2 as worker
from protos.ossia.v1 import worker_pb2_grpc
from services.grpc_channel import open_channel

PROMPT = list(range(100, 180))
BLOCKS_PER_SEQUENCE = 80
FIRST_PROBE = 1_000_000  # sequence ids from here on


async def first_token_times_s(step_ms: float, num_streams: int, num_probes: int) -> list[float]:
    """`num_streams` - 1 sequences decode; probes come one after the other at random times. From the wish to admit one to its token."""
    with scripted_worker(step_ms, 1000, num_streams) as address:
        async with open_channel(address) as channel:
            return await _Driver(worker_pb2_grpc.WorkerStub(channel), num_streams).measure(num_probes)


class _Driver:
    def __init__(self, stub: "worker_pb2_grpc.WorkerAsyncStub", num_streams: int) -> None:
        self._call = stub.Run()
        self._running = list(range(1, num_streams))
        self._step = 0
        self._wishes: asyncio.Queue[int] = asyncio.Queue()
        self._has_token = asyncio.Event()
        self._probe = 0
        self._released: list[int] = []

    async def measure(self, num_probes: int) -> list[float]:
        await self._send([_admit(seq_id) for seq_id in self._running])
        await self._send([])
        driving = asyncio.create_task(self._drive())
        times = []
        for number in range(num_probes):
            await asyncio.sleep(random.Random(number).uniform(0.02, 0.06))
            begin = time.perf_counter()
            self._has_token.clear()
            self._wishes.put_nowait(FIRST_PROBE + number)
            await self._has_token.wait()
            times.append(time.perf_counter() - begin)
        driving.cancel()
        self._call.cancel()
        await asyncio.wait((driving,))
        return times

    async def _drive(self) -> None:
        while True:
            result = await self._call.read()
            assert isinstance(result, worker.StepResult) and not result.HasField("refusal"), result
            if self._probe and self._probe in result.seq_ids:
                self._released.append(self._probe)
                self._probe = 0
                self._has_token.set()
            admitted = []
            if not self._wishes.empty():
                self._probe = self._wishes.get_nowait()
                admitted = [_admit(self._probe)]
            await self._send(admitted)

    async def _send(self, admitted: list[worker.AdmittedSequence]) -> None:
        self._step += 1
        newcomers = {one.seq_id for one in admitted}
        decoding = [seq_id for seq_id in self._running if seq_id not in newcomers]
        released, self._released = self._released, []
        plan = worker.StepPlan(
            epoch=1,
            step=self._step,
            released=released,
            admitted=admitted,
            scheduled_seq_ids=[*decoding, *newcomers],
            num_scheduled_tokens=[1] * len(decoding) + [len(PROMPT)] * len(newcomers),
        )
        await self._call.write(plan)


def _admit(seq_id: int) -> worker.AdmittedSequence:
    slot = min(seq_id, FIRST_PROBE) % FIRST_PROBE
    blocks = range(slot * BLOCKS_PER_SEQUENCE, (slot + 1) * BLOCKS_PER_SEQUENCE)
    return worker.AdmittedSequence(
        seq_id=seq_id,
        request_id=str(seq_id),
        token_ids=PROMPT,
        num_prompt_tokens=len(PROMPT),
        full_block_ids=blocks,
        window_block_ids=blocks,
    )
