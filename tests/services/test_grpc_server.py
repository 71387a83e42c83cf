import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.ossia.v1 import scheduler_pb2 as pb
from protos.ossia.v1 import scheduler_pb2_grpc as rpc
from services.errors import Internal, Overloaded, from_rpc_error
from services.grpc_channel import PING_INTERVAL_MS, PING_TIMEOUT_MS, open_channel
from services.grpc_server import PortInUse, RunningServer, serve
from tests.fakes.tcp_proxy import tcp_proxy

ROOT = Path(__file__).parent.parent.parent
SERVICE = "ossia.v1.Scheduler"


class Toy(rpc.SchedulerServicer):
    """Fails as it is told by the request; Generate gives two deltas first, and `hang` never ends."""

    async def Status(self, request: pb.StatusRequest, context: object) -> pb.SchedulerStatus:
        raise Overloaded("the queue is full: try again later", retry_after_s=2.5)

    async def Quote(self, request: pb.QuoteRequest, context: object) -> pb.QuoteResponse:
        raise ZeroDivisionError("a secret of ours")

    async def Generate(self, request: pb.GenerateRequest, context: object) -> AsyncIterator[pb.TokenDelta]:
        yield pb.TokenDelta(token_ids=[1])
        yield pb.TokenDelta(token_ids=[2])
        if request.request_id == "hang":
            await asyncio.Event().wait()
        if request.request_id == "fail":
            raise Overloaded("full", retry_after_s=1)


def serving() -> "asyncio.AbstractAsyncContextManager[RunningServer]":
    return serve("127.0.0.1:0", [(SERVICE, lambda server: rpc.add_SchedulerServicer_to_server(Toy(), server))])


async def test_an_error_keeps_its_type_over_the_wire() -> None:
    async with serving() as server, open_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await rpc.SchedulerStub(channel).Status(pb.StatusRequest())
    error = from_rpc_error(failure.value)
    assert isinstance(error, Overloaded) and error.retry_after_s == 2.5 and failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_bug_is_told_as_internal_without_its_text() -> None:
    async with serving() as server, open_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await rpc.SchedulerStub(channel).Quote(pb.QuoteRequest())
    assert isinstance(from_rpc_error(failure.value), Internal) and "secret" not in str(failure.value)


async def test_a_stream_delivers_what_came_before_its_error() -> None:
    async with serving() as server, open_channel(server.address) as channel:
        got = []
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async for delta in rpc.SchedulerStub(channel).Generate(pb.GenerateRequest(request_id="fail")):
                got += delta.token_ids
    assert got == [1, 2] and isinstance(from_rpc_error(failure.value), Overloaded)


async def test_a_port_in_use_is_one_typed_line() -> None:
    async with serving() as server:
        with pytest.raises(PortInUse, match=server.address):
            async with serve(server.address, []):
                raise AssertionError("two servers share a port")


async def test_health_says_when_it_serves_and_when_it_drains() -> None:
    async with serving() as server, open_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        states = []
        for serve_now in (None, True, False):
            if serve_now is not None:
                await server.set_serving(serve_now)
            states.append((await health.Check(health_pb2.HealthCheckRequest())).status)
    serving_state, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert states == [not_serving, serving_state, not_serving]


async def test_a_drain_lets_open_calls_end_and_takes_no_new_one() -> None:
    async with serving() as server, open_channel(server.address) as channel:
        call = rpc.SchedulerStub(channel).Generate(pb.GenerateRequest(request_id="end"))
        tokens: list[int] = []
        async for delta in call:
            if not tokens:
                draining = asyncio.create_task(server.drain(60.0))
            tokens += delta.token_ids
        await draining
        assert tokens == [1, 2]
        with pytest.raises(grpc.aio.AioRpcError):
            await rpc.SchedulerStub(channel).Status(pb.StatusRequest(), timeout=60)


async def test_a_connection_may_take_its_time_to_come_about() -> None:
    async with serving() as server, tcp_proxy(server.address, delay_s=1.0) as wire, open_channel(wire.address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


async def test_a_stopped_peer_is_noticed_in_under_ten_seconds() -> None:
    code = """
import asyncio
from tests.services.test_grpc_server import serving
async def main():
    async with serving() as server:
        print(server.address, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with open_channel((await process.stdout.readline()).decode().strip()) as channel:
            call = rpc.SchedulerStub(channel).Generate(pb.GenerateRequest(request_id="hang"))
            assert await call.read() and await call.read()
            os.kill(process.pid, signal.SIGSTOP)
            stopped = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await call.read()
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        # A limit of the contract, not of speed, and some time for a machine that is busy: without the ping time-out it takes over a minute.
        assert PING_INTERVAL_MS + PING_TIMEOUT_MS < 10_000
        assert time.monotonic() - stopped < 40
    finally:
        process.kill()
        await process.wait()
