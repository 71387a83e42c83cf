"""A worker group's owner for tests: makes plans, and drives a Run stream with them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc

from protos.ossia.v1 import sampling_pb2, worker_pb2, worker_pb2_grpc
from services.grpc_channel import open_channel

RESULT_TIMEOUT_S = 120.0


def admit(
    seq_id: int,
    token_ids: Sequence[int],
    full: Sequence[int],
    window: Sequence[int],
    *,
    num_prompt_tokens: int | None = None,
    num_computed_tokens: int = 0,
    first_window_block: int = 0,
    sampling: sampling_pb2.SamplingParams | None = None,
    trace_context: dict[str, str] | None = None,
) -> worker_pb2.AdmittedSequence:
    return worker_pb2.AdmittedSequence(
        seq_id=seq_id,
        request_id=f"request-{seq_id}",
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        num_computed_tokens=num_computed_tokens,
        sampling=sampling,
        full_block_ids=full,
        window_block_ids=window,
        first_window_block=first_window_block,
        trace_context=trace_context,
    )


def make_plan(
    step: int,
    scheduled: dict[int, int] | None = None,
    *,
    epoch: int = 1,
    admitted: Sequence[worker_pb2.AdmittedSequence] = (),
    appended: Sequence[worker_pb2.AppendedBlocks] = (),
    released: Sequence[int] = (),
    copies: Sequence[worker_pb2.BlockCopy] = (),
    cached: Sequence[worker_pb2.CachedBlock] = (),
) -> worker_pb2.StepPlan:
    """`scheduled` maps a sequence to the number of its tokens."""
    return worker_pb2.StepPlan(
        epoch=epoch,
        step=step,
        released=released,
        copies=copies,
        admitted=admitted,
        appended=appended,
        cached=cached,
        scheduled_seq_ids=list(scheduled or {}),
        num_scheduled_tokens=list((scheduled or {}).values()),
    )


class Owner:
    """One Run stream."""

    def __init__(self, stub: "worker_pb2_grpc.WorkerAsyncStub") -> None:
        self.call = stub.Run()

    async def send(self, *plans: worker_pb2.StepPlan) -> None:
        for plan in plans:
            await self.call.write(plan)

    async def receive(self) -> worker_pb2.StepResult:
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            result = await self.call.read()
        assert isinstance(result, worker_pb2.StepResult), "the stream ended"
        return result

    async def step(self, plan: worker_pb2.StepPlan) -> worker_pb2.StepResult:
        await self.send(plan)
        return await self.receive()

    async def status(self) -> grpc.StatusCode:
        """How the stream ended."""
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            return await self.call.code()

    async def generate(self, seq_id: int, token_ids: Sequence[int], num_tokens: int, *, first_step: int = 1, epoch: int = 1) -> list[int]:
        """Admits a sequence with blocks 0, 1, 2 ... (of 16 tokens) and draws that many tokens, two plans ahead of the results."""
        blocks = range(-(-(len(token_ids) + num_tokens) // 16))
        plan = make_plan(first_step, {seq_id: len(token_ids)}, epoch=epoch, admitted=[admit(seq_id, token_ids, blocks, blocks)])
        await self.send(plan)
        drawn: list[int] = []
        for step in range(first_step + 1, first_step + num_tokens + 1):
            if step < first_step + num_tokens:
                await self.send(make_plan(step, {seq_id: 1}, epoch=epoch))
            result = await self.receive()
            assert not result.HasField("refusal"), result.refusal.message
            drawn.extend(result.token_ids)
        return drawn


@asynccontextmanager
async def connect(address: str) -> "AsyncIterator[worker_pb2_grpc.WorkerAsyncStub]":
    async with open_channel(address) as channel:
        stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
        yield stub
