"""The scheduler's service over real gRPC, with scripted workers behind it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace

import grpc
import pytest
from google.protobuf import json_format
from opentelemetry.trace import NoOpTracerProvider
from prometheus_client import CollectorRegistry

from protos.ossia.v1 import sampling_pb2, scheduler_pb2_grpc, worker_pb2
from protos.ossia.v1 import scheduler_pb2 as pb
from scheduler.config import SchedulerConfig
from scheduler.fleet import Fleet
from scheduler.metrics import SchedulerMetrics
from scheduler.service import SchedulerService
from services.discovery import StaticDiscovery
from services.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    GroupLost,
    InvalidArgument,
    MissingField,
    ModelNotFound,
    OssiaError,
    Overloaded,
    Unavailable,
    from_proto,
    from_rpc_error,
)
from services.grpc_channel import open_channel
from services.grpc_server import serve
from services.vocabulary import load_vocabulary
from tests.fakes.free_port import free_port
from tests.fakes.scripted_worker import REPLY, ScriptedWorker, scripted_worker

REPLY_IDS = load_vocabulary().encode_harmony(REPLY)
TIMEOUT_S = 120


class Stand:
    """A served scheduler and a channel to it."""

    def __init__(self, service: SchedulerService, fleet: Fleet, stub: "scheduler_pb2_grpc.SchedulerAsyncStub") -> None:
        self.service, self.fleet, self.stub = service, fleet, stub

    async def generate(self, **fields: object) -> list[pb.TokenDelta]:
        return [delta async for delta in self.stub.Generate(make_request(**fields), timeout=TIMEOUT_S)]

    async def refusal(self, **fields: object) -> OssiaError:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await self.generate(**fields)
        return from_rpc_error(failure.value)


def make_request(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"request_id": "r", "model": "scripted", "prompt_token_ids": list(range(100, 120)), **fields})


async def read_all(call: "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.TokenDelta]") -> list[pb.TokenDelta]:
    """What is left of a call that was read from before."""
    deltas = []
    while (delta := await call.read()) is not grpc.aio.EOF:
        deltas.append(delta)
    return deltas


def own_prompt(number: int) -> range:
    """One that shares no prefix: no cache draws its request to a group."""
    return range(1000 * number, 1000 * number + 20)


def token_ids(deltas: list[pb.TokenDelta], index: int = 0) -> list[int]:
    return [token_id for delta in deltas if delta.index == index for token_id in delta.token_ids]


@asynccontextmanager
async def stand(*workers: ScriptedWorker, **config: object) -> AsyncIterator[Stand]:
    addresses = [worker.running.address for worker in workers]
    groups = {address: json_format.MessageToJson(worker_pb2.GroupInfo(address=address)).encode() for address in addresses}
    metrics = SchedulerMetrics(CollectorRegistry())
    async with AsyncExitStack() as stack:
        discovery = await stack.enter_async_context(StaticDiscovery({"groups": groups}))
        fleet = Fleet(SchedulerConfig(**config), discovery, metrics)
        service = SchedulerService("s", fleet, metrics, NoOpTracerProvider().get_tracer("test"))
        contract = ("ossia.v1.Scheduler", lambda server: scheduler_pb2_grpc.add_SchedulerServicer_to_server(service, server))
        running = await stack.enter_async_context(serve("127.0.0.1:0", [contract]))
        channel = await stack.enter_async_context(open_channel(running.address))
        following = asyncio.create_task(fleet.run())
        try:
            await until(lambda: len(fleet.groups) == len(workers))
            yield Stand(service, fleet, scheduler_pb2_grpc.SchedulerStub(channel))
        finally:
            following.cancel()
            await asyncio.wait((following,))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not holds():  # noqa: ASYNC110 - what is awaited has no event
            await asyncio.sleep(0.01)


@pytest.fixture
async def one() -> AsyncIterator[Stand]:
    async with scripted_worker() as worker, stand(worker) as made:
        yield made


async def test_generate_streams_the_reply_and_ends_with_one_finish(one: Stand) -> None:
    deltas = await one.generate()
    assert token_ids(deltas) == REPLY_IDS
    assert [delta.HasField("finished") for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    finished = deltas[-1].finished
    assert finished.reason == sampling_pb2.FINISH_REASON_STOP and finished.stop_token_id == REPLY_IDS[-1]
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (20, len(REPLY_IDS))
    assert 0 <= finished.timings.queue_s <= finished.timings.ttft_s <= finished.timings.total_s


async def test_a_resumed_request_goes_on_where_it_was(one: Stand) -> None:
    resumed = [*range(100, 120), *REPLY_IDS[:5]]
    deltas = await one.generate(prompt_token_ids=resumed, num_resumed_tokens=5)
    assert token_ids(deltas) == REPLY_IDS[5:]
    assert (deltas[-1].finished.usage.prompt_tokens, deltas[-1].finished.usage.completion_tokens) == (20, len(REPLY_IDS))


async def test_n_sequences_end_each_for_itself(one: Stand) -> None:
    deltas = await one.generate(n=3, sampling=sampling_pb2.SamplingParams(max_tokens=4))
    assert [token_ids(deltas, index) for index in range(3)] == [REPLY_IDS[:4]] * 3
    assert sorted(delta.index for delta in deltas if delta.HasField("finished")) == [0, 1, 2]


async def test_a_cancelled_call_frees_its_blocks(one: Stand) -> None:
    async with scripted_worker(step_ms=20) as worker, stand(worker) as slow:
        call = slow.stub.Generate(make_request())
        await call.read()
        call.cancel()
        (group,) = slow.fleet.groups.values()
        await until(lambda: group.batcher.num_running == 0)
        group.batcher.check_integrity()
        assert group.batcher.num_free_blocks == (64, 64)


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"model": ""}, MissingField, "model"),
        ({"model": "nope"}, ModelNotFound, "model"),
        ({"prompt_token_ids": []}, MissingField, "prompt_token_ids"),
        ({"prompt_token_ids": [1, 201_088]}, InvalidArgument, "prompt_token_ids"),
        ({"num_resumed_tokens": 20}, InvalidArgument, "num_resumed_tokens"),
        ({"prompt_token_ids": range(200)}, ContextLengthExceeded, "messages"),
        ({"n": 9}, InvalidArgument, "n"),
        ({"priority": 101}, InvalidArgument, "priority"),
        ({"timeout_s": 0.0}, InvalidArgument, "timeout_s"),
        ({"start_timeout_s": float("nan")}, InvalidArgument, "start_timeout_s"),
        ({"sampling": sampling_pb2.SamplingParams(temperature=2.5)}, InvalidArgument, "temperature"),
        ({"sampling": sampling_pb2.SamplingParams(temperature=float("nan"))}, InvalidArgument, "temperature"),
        ({"sampling": sampling_pb2.SamplingParams(top_p=0)}, InvalidArgument, "top_p"),
        ({"sampling": sampling_pb2.SamplingParams(max_tokens=0)}, InvalidArgument, "max_tokens"),
        ({"sampling": sampling_pb2.SamplingParams(logit_bias={201_088: 1})}, InvalidArgument, "logit_bias"),
        ({"sampling": sampling_pb2.SamplingParams(logit_bias={1: 101})}, InvalidArgument, "logit_bias"),
        ({"num_resumed_tokens": 3, "sampling": sampling_pb2.SamplingParams(max_tokens=3)}, InvalidArgument, "max_tokens"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
async def test_a_bad_request_is_refused_by_name(one: Stand, fields: dict[str, object], kind: type[OssiaError], param: str) -> None:
    refusal = await one.refusal(**fields)
    assert type(refusal) is kind and refusal.param == param
    assert token_ids(await one.generate()) == REPLY_IDS, "nothing else was lost"


async def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    async with scripted_worker(step_ms=200, max_num_seqs=1) as worker, stand(worker, max_queued_tokens=30) as full:
        batcher = full.fleet.groups["g"].batcher
        open_requests = [asyncio.create_task(full.generate())]
        await until(lambda: batcher.num_running == 1)  # it counts as queued before it runs, and two would be too many
        open_requests.append(asyncio.create_task(full.generate()))
        await until(lambda: batcher.num_waiting == 1)
        refusal = await full.refusal()
        assert isinstance(refusal, Overloaded) and refusal.retry_after_s and refusal.retry_after_s > 0
        assert [token_ids(await one) for one in open_requests] == [REPLY_IDS] * 2


async def test_connect_sends_status_first_and_one_frame_per_step(one: Stand) -> None:
    outbound: asyncio.Queue[pb.EdgeFrame] = asyncio.Queue()

    async def frames() -> AsyncIterator[pb.EdgeFrame]:
        while True:
            yield await outbound.get()

    opened = [pb.EdgeFrame.Open(stream_id=number, request=make_request(request_id=f"r{number}")) for number in (1, 2, 3)]
    outbound.put_nowait(pb.EdgeFrame(edge_id="e", opened=opened))
    got: dict[int, list[pb.TokenDelta]] = {1: [], 2: [], 3: []}
    told: list[set[int]] = []
    async with asyncio.timeout(TIMEOUT_S):
        call = one.stub.Connect(frames())
        async for frame in call:
            if frame.HasField("status"):
                assert [model.model for model in frame.status.models] == ["scripted"] and not told
                continue
            told.append({delta.stream_id for delta in frame.deltas})
            for delta in frame.deltas:
                got[delta.stream_id].append(delta)
            if all(deltas and deltas[-1].HasField("finished") for deltas in got.values()):
                break
    call.cancel()
    assert [token_ids(deltas) for deltas in got.values()] == [REPLY_IDS] * 3
    assert all(one == {1, 2, 3} for one in told) and len(told) <= len(REPLY_IDS), "the three requests share their frames"


async def test_a_first_token_is_told_before_the_streams_that_run() -> None:
    async with scripted_worker(step_ms=50) as worker, stand(worker) as it:
        has_begun = asyncio.Event()

        async def frames() -> AsyncIterator[pb.EdgeFrame]:
            yield pb.EdgeFrame(
                opened=[pb.EdgeFrame.Open(stream_id=number, request=make_request(request_id=f"r{number}")) for number in (1, 2)]
            )
            await has_begun.wait()
            yield pb.EdgeFrame(opened=[pb.EdgeFrame.Open(stream_id=3, request=make_request(request_id="r3"))])
            await asyncio.Event().wait()

        async with asyncio.timeout(TIMEOUT_S):
            call = it.stub.Connect(frames())
            async for frame in call:
                told = [delta.stream_id for delta in frame.deltas]
                if told:
                    has_begun.set()
                if 3 in told:
                    break
        call.cancel()
        first = told.index(3)  # what went before it was told by a step before, in a frame that was not written yet
        assert set(told[first + 1 : first + 3]) == {1, 2}


async def test_connect_tells_a_refusal_as_a_terminal_delta_and_goes_on(one: Stand) -> None:
    async def frames() -> AsyncIterator[pb.EdgeFrame]:
        yield pb.EdgeFrame(opened=[pb.EdgeFrame.Open(stream_id=7, request=make_request(model="nope"))])
        yield pb.EdgeFrame(opened=[pb.EdgeFrame.Open(stream_id=8, request=make_request())])
        await asyncio.Event().wait()

    last: dict[int, pb.Finished] = {}
    async with asyncio.timeout(TIMEOUT_S):
        call = one.stub.Connect(frames())
        async for frame in call:
            last.update({delta.stream_id: delta.finished for delta in frame.deltas if delta.HasField("finished")})
            if len(last) == 2:
                break
    call.cancel()
    assert isinstance(from_proto(last[7].error), ModelNotFound) and last[8].reason == sampling_pb2.FINISH_REASON_STOP


async def test_the_end_of_an_edges_stream_cancels_what_it_had_open() -> None:
    async def frames() -> AsyncIterator[pb.EdgeFrame]:
        yield pb.EdgeFrame(opened=[pb.EdgeFrame.Open(stream_id=1, request=make_request())])
        await asyncio.Event().wait()

    async with scripted_worker(step_ms=20) as worker, stand(worker) as slow:
        call = slow.stub.Connect(frames())
        async for frame in call:
            if frame.deltas:
                break
        call.cancel()
        (group,) = slow.fleet.groups.values()
        await until(lambda: group.batcher.num_running == 0)


async def test_explain_names_every_group_and_its_terms_add_up() -> None:
    async with scripted_worker("a") as first, scripted_worker("b") as second, stand(first, second) as two:
        await two.generate()
        candidates = (await two.stub.Explain(pb.ExplainRequest(request=make_request()))).candidates
    assert sorted(one.group_id for one in candidates) == ["a", "b"]
    for one in candidates:
        assert one.cost_s == pytest.approx(one.queue_s + one.prefill_s + one.host_copy_s + one.step_s + one.eviction_s)
    assert candidates[0].cost_s <= candidates[1].cost_s


async def test_quote_is_the_cheapest_candidates_cost(one: Stand) -> None:
    quote = await one.stub.Quote(pb.QuoteRequest(model="scripted", num_prompt_tokens=20))
    (candidate,) = (await one.stub.Explain(pb.ExplainRequest(request=make_request()))).candidates
    assert quote.accepting and quote.cost_s == pytest.approx(candidate.cost_s) and quote.group_id == "g"
    assert not (await one.stub.Quote(pb.QuoteRequest(model="scripted", num_prompt_tokens=10_000))).accepting


async def test_two_groups_share_the_load() -> None:
    async with scripted_worker("a", step_ms=50) as first, scripted_worker("b", step_ms=50) as second, stand(first, second) as two:
        answers = await asyncio.gather(*(two.generate(prompt_token_ids=own_prompt(number)) for number in range(8)))
        assert all(token_ids(deltas) == REPLY_IDS for deltas in answers)
        assert all(group.batcher.num_steps for group in two.fleet.groups.values())


async def test_a_lost_group_ends_its_requests_and_is_driven_again_when_it_is_back() -> None:
    async with AsyncExitStack() as life:
        worker = await life.enter_async_context(scripted_worker(listen=f"127.0.0.1:{free_port()}", step_ms=20))
        async with stand(worker) as made:
            call = made.stub.Generate(make_request())
            await call.read()
            await life.aclose()
            *_, last = await read_all(call)
            assert isinstance(from_proto(last.finished.error), GroupLost)
            await until(lambda: not made.fleet.groups)
            assert isinstance(await made.refusal(), Unavailable), "known, and away"
            async with scripted_worker(listen=worker.running.address):
                await until(lambda: bool(made.fleet.groups))
                assert token_ids(await made.generate()) == REPLY_IDS


async def test_a_lost_groups_sequences_go_on_in_another_without_a_gap_or_a_repeat() -> None:
    async with scripted_worker("b", step_ms=50, num_blocks=200) as second, AsyncExitStack() as life:
        first = await life.enter_async_context(scripted_worker("a", step_ms=50, num_blocks=200))
        async with stand(first, second) as two:
            asked = [make_request(request_id=f"r{number}", n=2, prompt_token_ids=own_prompt(number)) for number in range(4)]
            calls = [two.stub.Generate(request) for request in asked]
            begun = [await call.read() for call in calls]
            assert two.fleet.groups["a"].batcher.num_running and two.fleet.groups["b"].batcher.num_running
            await life.aclose()
            for call, delta in zip(calls, begun, strict=True):
                deltas = [delta, *await read_all(call)]
                assert [token_ids(deltas, index) for index in range(2)] == [REPLY_IDS] * 2
                ends = [one.finished for one in deltas if one.HasField("finished")]
                assert [end.reason for end in ends] == [sampling_pb2.FINISH_REASON_STOP] * 2
                assert {end.usage.completion_tokens for end in ends} == {len(REPLY_IDS)} and {end.usage.prompt_tokens for end in ends} == {
                    20
                }
            await until(lambda: "a" not in two.fleet.groups)
            two.fleet.groups["b"].batcher.check_integrity()


async def test_deadlines_end_requests_with_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted_worker(step_ms=200) as worker, stand(worker) as slow:
        call = slow.stub.Generate(make_request(timeout_s=60.0))
        first = await call.read()
        monkeypatch.setattr("scheduler.group.time", SimpleNamespace(monotonic=lambda: time.monotonic() + 60.0))
        deltas = [first, *await read_all(call)]
        assert isinstance(from_proto(deltas[-1].finished.error), DeadlineExceeded) and 0 < len(token_ids(deltas)) < len(REPLY_IDS)


async def test_a_drain_ends_when_the_last_request_does_and_takes_no_new_one() -> None:
    async with scripted_worker(step_ms=50) as worker, stand(worker) as made:
        call = made.stub.Generate(make_request())
        first = await call.read()
        draining = asyncio.create_task(made.service.drain())
        await asyncio.sleep(0)
        assert isinstance(await made.refusal(), Unavailable)
        assert token_ids([first, *await read_all(call)]) == REPLY_IDS
        await asyncio.wait_for(draining, TIMEOUT_S)


async def test_a_draining_worker_gets_nothing_new_and_ends_what_it_has() -> None:
    async with scripted_worker(step_ms=50) as worker, stand(worker) as made:
        call = made.stub.Generate(make_request())
        first = await call.read()
        draining = asyncio.create_task(worker.service.drain())
        await until(lambda: made.fleet.groups["g"].is_draining)
        assert isinstance(await made.refusal(), Unavailable)
        assert token_ids([first, *await read_all(call)]) == REPLY_IDS
        await asyncio.wait_for(draining, TIMEOUT_S)
