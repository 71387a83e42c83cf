"""One stream carries many requests; whatever happens to it, every open request ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from edge.routing import scheduler_stream
from edge.routing.catalogue import Catalogue
from edge.routing.scheduler_pool import SchedulerPool
from edge.routing.scheduler_stream import QUOTE_TIMEOUT_S, SchedulerStream
from protos.ossia.v1 import sampling_pb2 as sampling
from protos.ossia.v1 import scheduler_pb2 as scheduler
from services.discovery import Members, StaticDiscovery
from services.errors import Unavailable
from services.vocabulary import load_vocabulary
from tests.edge.scripted_scheduler import ANSWER, MODEL, PATIENCE_S, Script, ScriptedScheduler, serve_scheduler, wait_until


def generate(**fields: int) -> scheduler.GenerateRequest:
    return scheduler.GenerateRequest(model=MODEL, prompt_token_ids=[1], sampling=sampling.SamplingParams(max_tokens=100), **fields)


@asynccontextmanager
async def connected(script: Script | None = None) -> AsyncIterator[tuple[ScriptedScheduler, SchedulerStream]]:
    scripted = ScriptedScheduler(script or Script())
    async with serve_scheduler(scripted) as address, asyncio.TaskGroup() as tasks:
        stream = SchedulerStream(address, "edge-1", Catalogue())
        running = tasks.create_task(stream.run())
        await wait_until(lambda: stream.takes_requests)
        yield scripted, stream
        running.cancel()


async def read_all(stream: SchedulerStream, request: scheduler.GenerateRequest) -> list[int]:
    token_ids: list[int] = []
    with stream.open(request) as opened:
        while opened.is_readable:
            token_ids += [one for delta in await opened.receive() for one in delta.token_ids]
    return token_ids


async def test_many_requests_share_the_stream_and_come_apart() -> None:
    async with connected() as (scripted, stream):
        answers = await asyncio.gather(*(read_all(stream, generate()) for _ in range(20)))
        assert answers == [load_vocabulary().encode_harmony(ANSWER)] * 20
        assert (stream.num_open, scripted.cancelled, scripted.edge_ids) == (0, [], ["edge-1"])


async def test_leaving_early_cancels_once() -> None:
    async with connected(Script(pause_at=2)) as (scripted, stream):
        with stream.open(generate()) as opened:
            await opened.receive()
            opened.cancel()
        await asyncio.wait_for(scripted.was_cancelled.wait(), PATIENCE_S)
        assert (scripted.cancelled, stream.num_open) == ([1], 0)


async def test_a_request_that_is_given_up_at_once_is_never_sent() -> None:
    async with connected() as (scripted, stream):
        with stream.open(generate()):
            pass
        await read_all(stream, generate())
        assert (len(scripted.requests), scripted.cancelled) == (1, [])


async def test_a_retired_stream_ends_with_its_last_request() -> None:
    scripted = ScriptedScheduler(Script(pause_at=0))
    async with serve_scheduler(scripted) as address:
        stream = SchedulerStream(address, "edge-1", Catalogue())
        running = asyncio.create_task(stream.run())
        await wait_until(lambda: stream.takes_requests)
        reading = asyncio.create_task(read_all(stream, generate()))
        await asyncio.wait_for(scripted.has_paused.wait(), PATIENCE_S)
        stream.retire()
        assert not stream.takes_requests
        scripted.script.go.set()
        assert await reading == load_vocabulary().encode_harmony(ANSWER)
        await asyncio.wait_for(running, PATIENCE_S)


async def test_a_broken_stream_ends_every_open_request_at_once_and_comes_back() -> None:
    async with connected(Script(pause_at=0)) as (scripted, stream):
        with stream.open(generate()) as first, stream.open(generate(n=2)) as second:
            await asyncio.wait_for(scripted.has_paused.wait(), PATIENCE_S)
            scripted.break_streams()
            for opened in (first, second):
                with pytest.raises(Unavailable, match="lost"):
                    await asyncio.wait_for(opened.receive(), PATIENCE_S)
                assert not opened.is_readable
        await wait_until(lambda: len(scripted.edge_ids) == 2 and stream.takes_requests)
        scripted.script.go.set()
        assert await read_all(stream, generate()) == load_vocabulary().encode_harmony(ANSWER)


async def test_a_scheduler_that_is_not_there_refuses_at_once() -> None:
    with pytest.raises(Unavailable):
        SchedulerStream("127.0.0.1:1", "edge-1", Catalogue()).open(generate())


class ChangingDiscovery(StaticDiscovery):
    """Members that a test moves."""

    def __init__(self) -> None:
        super().__init__({})
        self.changes: asyncio.Queue[Members] = asyncio.Queue()

    async def watch(self, kind: str) -> AsyncIterator[Members]:
        while True:
            yield await self.changes.get()


@asynccontextmanager
async def following(discovery: ChangingDiscovery, catalogue: Catalogue) -> AsyncIterator[SchedulerPool]:
    pool = SchedulerPool(discovery, "edge-1", catalogue)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(pool.run())
        yield pool
        task.cancel()


def has_two_groups(catalogue: Catalogue) -> bool:
    models = catalogue.list_models()
    return bool(models) and models[0].num_groups == 2


async def test_the_pool_follows_the_membership() -> None:
    discovery, catalogue, one = ChangingDiscovery(), Catalogue(), ScriptedScheduler(Script(pause_at=0))
    async with serve_scheduler(one) as first, following(discovery, catalogue) as pool:
        with pytest.raises(Unavailable, match=MODEL):
            await pool.choose(generate())
        discovery.changes.put_nowait({"a": first.encode()})
        await wait_until(catalogue.list_models)
        stream = await pool.choose(generate())
        assert stream.address == first and not one.quoted, "the only one need not be asked what it costs"
        with stream.open(generate()):
            discovery.changes.put_nowait({})
            await wait_until(lambda: not stream.takes_requests)
            assert stream.num_open == 1  # what is open there goes on


async def test_the_pool_takes_the_cheapest_quote_and_falls_back_to_the_least_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_stream, "QUOTE_TIMEOUT_S", PATIENCE_S)  # a quote that is late on a busy machine would not count
    discovery, catalogue = ChangingDiscovery(), Catalogue()
    one, two = ScriptedScheduler(Script(pause_at=0)), ScriptedScheduler(Script(pause_at=0))
    async with serve_scheduler(one) as first, serve_scheduler(two) as second, following(discovery, catalogue) as pool:
        discovery.changes.put_nowait({"a": first.encode(), "b": second.encode()})
        await wait_until(lambda: has_two_groups(catalogue))
        one.quote_s, two.quote_s = 0.2, 0.1
        assert (await pool.choose(generate())).address == second
        two.quote_s = None
        assert (await pool.choose(generate())).address == first, "a full queue makes no offer"
        one.quote_s = None
        busy = await pool.choose(generate())
        with busy.open(generate()):
            assert (await pool.choose(generate())).address != busy.address
    asked = one.quoted[0]
    assert asked.num_prompt_tokens == len(generate().prompt_token_ids) and len(asked.block_hashes) == asked.num_prompt_tokens // 16


class SilentScheduler(ScriptedScheduler):
    async def Quote(self, request: object, context: object) -> scheduler.QuoteResponse:
        await asyncio.Event().wait()
        raise AssertionError("nothing sets the event")


async def test_a_scheduler_that_does_not_quote_in_time_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    discovery, catalogue, ask = ChangingDiscovery(), Catalogue(), SchedulerStream.quote
    one, two = SilentScheduler(Script()), ScriptedScheduler(Script())
    async with serve_scheduler(one) as silent, serve_scheduler(two) as quick, following(discovery, catalogue) as pool:

        async def quote(stream: SchedulerStream, request: scheduler.QuoteRequest) -> scheduler.QuoteResponse | None:
            """On a busy machine the quick one may be late too, so it has longer."""
            monkeypatch.setattr(scheduler_stream, "QUOTE_TIMEOUT_S", QUOTE_TIMEOUT_S if stream.address == silent else PATIENCE_S)
            return await ask(stream, request)

        monkeypatch.setattr(SchedulerStream, "quote", quote)
        discovery.changes.put_nowait({"a": silent.encode(), "b": quick.encode()})
        await wait_until(lambda: has_two_groups(catalogue))
        assert (await pool.choose(generate())).address == quick


async def test_what_a_slow_reader_has_not_taken_is_one_delta_for_each_sequence() -> None:
    async with connected(Script(pause_at=0)) as (scripted, stream):
        with stream.open(generate(n=2)) as opened:
            await asyncio.wait_for(scripted.has_paused.wait(), PATIENCE_S)
            for token_id in range(1000):
                for index in range(2):
                    opened.deliver(scheduler.TokenDelta(index=index, token_ids=[token_id], logprobs=[sampling.TokenLogprobs(logprob=-1.0)]))
            received = await opened.receive()
    assert [(delta.index, list(delta.token_ids)) for delta in received] == [(0, list(range(1000))), (1, list(range(1000)))]
    assert [len(delta.logprobs) for delta in received] == [1000, 1000]


async def test_an_interrupted_request_tells_its_error_and_takes_nothing_more() -> None:
    async with connected(Script(pause_at=0)) as (scripted, stream):
        with stream.open(generate()) as opened:
            await asyncio.wait_for(scripted.has_paused.wait(), PATIENCE_S)
            opened.interrupt(Unavailable("late"))
            opened.deliver(scheduler.TokenDelta(token_ids=[1]))
            with pytest.raises(Unavailable, match="late"):
                await opened.receive()
        await asyncio.wait_for(scripted.was_cancelled.wait(), PATIENCE_S)
