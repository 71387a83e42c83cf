"""The Worker service on the real protocol: order, refusals, fencing, and what a stream's end leaves behind."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from protos.ossia.v1 import sampling_pb2, worker_pb2, worker_pb2_grpc
from services.errors import StaleEpoch, from_rpc_error
from services.grpc_channel import open_channel
from services.grpc_server import serve
from services.vocabulary import load_vocabulary
from tests.worker.owner import RESULT_TIMEOUT_S, Owner, admit, connect, make_plan
from worker.__main__ import SERVICE_NAME
from worker.backend import BlockCopy, ModelFacts, StepUnderWay
from worker.engine import Engine
from worker.metrics import WorkerMetrics
from worker.plan_draft import Limits
from worker.scripted.backend import ScriptedBackend, StepTimes
from worker.scripted.script import Script
from worker.sequences import ScheduledSequence
from worker.service import WorkerService
from worker.watchdog import StepWatchdog

REPLY = "<|channel|>final<|message|>A short reply of several tokens.<|return|>"
PROMPT = list(range(500, 520))
BLOCKS = [0, 1, 2]


class Group:
    """A served engine and what it is made of."""

    def __init__(self, engine: Engine, service: WorkerService, metrics: WorkerMetrics, spans: InMemorySpanExporter) -> None:
        self.engine, self.service, self.metrics, self.spans = engine, service, metrics, spans
        self.stub: worker_pb2_grpc.WorkerStub

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"ossia_worker_{name}", labels)


class FailingBackend:
    """Breaks at its first step."""

    def __init__(self, facts: ModelFacts) -> None:
        self.facts = facts

    def start(self, scheduled: list[ScheduledSequence], copies: tuple[BlockCopy, ...]) -> StepUnderWay:
        raise ZeroDivisionError("the device fell over")


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(
        Script(default=REPLY), StepTimes(), block_size=16, num_full_blocks=64, num_window_blocks=64, sliding_window=128, max_model_len=512
    )


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


@pytest.fixture
async def group(backend: ScriptedBackend, thread: ThreadPoolExecutor) -> AsyncIterator[Group]:
    spans, provider, metrics = InMemorySpanExporter(), TracerProvider(), WorkerMetrics()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    engine = Engine(backend, Limits(backend.facts, max_batch_tokens=64, max_num_seqs=4), thread, StepWatchdog(60))
    info = worker_pb2.GroupInfo(group_id="g", incarnation="1", block_size=16)
    service = WorkerService(engine, info, metrics, provider.get_tracer("test"))
    made = Group(engine, service, metrics, spans)
    add = partial(worker_pb2_grpc.add_WorkerServicer_to_server, service)
    async with serve("127.0.0.1:0", [(SERVICE_NAME, add)]) as running, connect(running.address) as made.stub:
        service.set_address(running.address)
        yield made


def reply_ids() -> list[int]:
    return load_vocabulary().encode_harmony(REPLY)


def first_plan(epoch: int = 1, seq_id: int = 1, blocks: list[int] = BLOCKS) -> worker_pb2.StepPlan:
    return make_plan(1, {seq_id: len(PROMPT)}, epoch=epoch, admitted=[admit(seq_id, PROMPT, blocks, blocks)])


async def test_plans_sent_ahead_come_back_in_order(group: Group) -> None:
    owner, num_steps = Owner(group.stub), len(reply_ids())
    assert num_steps > 8  # more than the worker lets wait
    await owner.send(first_plan(), *[make_plan(step, {1: 1}) for step in range(2, num_steps + 1)])
    results = [await owner.receive() for _ in range(num_steps)]
    assert [result.step for result in results] == list(range(1, num_steps + 1))
    assert [token_id for result in results for token_id in result.token_ids] == reply_ids()[:num_steps]
    assert group.sample("tokens_total", kind="prefill") == len(PROMPT)
    assert group.sample("tokens_total", kind="decode") == num_steps - 1


async def test_a_refused_plan_changes_nothing_and_its_step_is_still_due(group: Group) -> None:
    owner = Owner(group.stub)
    await owner.step(first_plan())
    bad = [make_plan(2, {2: 1}), make_plan(2, {1: 1}, admitted=[admit(3, PROMPT, [64], [0])]), make_plan(3, {1: 1})]
    codes = [(await owner.step(plan)).refusal.code for plan in bad]
    assert codes == [
        sampling_pb2.ERROR_CODE_UNKNOWN_SEQUENCE,
        sampling_pb2.ERROR_CODE_BLOCK_OUT_OF_RANGE,
        sampling_pb2.ERROR_CODE_INVALID_PLAN,
    ]
    assert list((await owner.step(make_plan(2, {1: 1}))).token_ids) == reply_ids()[1:2]
    assert group.sample("plans_refused_total", code="ERROR_CODE_UNKNOWN_SEQUENCE") == 1


async def test_a_higher_epoch_takes_over_and_ends_the_older_stream(group: Group) -> None:
    older, newer = Owner(group.stub), Owner(group.stub)
    await older.step(first_plan(epoch=3))
    result = await newer.step(first_plan(epoch=7))  # the same seq_id: the older stream's is forgotten
    assert list(result.token_ids) == reply_ids()[:1]
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await older.receive()
    assert from_rpc_error(ended.value).code == sampling_pb2.ERROR_CODE_STALE_EPOCH
    assert list((await newer.step(make_plan(2, {1: 1}, epoch=7))).token_ids) == reply_ids()[1:2]
    assert (await group.stub.Describe(worker_pb2.DescribeRequest())).epoch == 7


async def test_an_older_epoch_is_refused_and_harms_nobody(group: Group) -> None:
    owner, late = Owner(group.stub), Owner(group.stub)
    await owner.step(first_plan(epoch=7))
    for step in (1, 2):
        assert (await late.step(make_plan(step, epoch=6))).refusal.code == sampling_pb2.ERROR_CODE_STALE_EPOCH
    assert list((await owner.step(make_plan(2, {1: 1}, epoch=7))).token_ids) == reply_ids()[1:2]


async def test_the_epoch_outlives_its_stream(group: Group) -> None:
    owner = Owner(group.stub)
    await owner.step(first_plan(epoch=7))
    await owner.call.done_writing()
    assert await owner.status() == grpc.StatusCode.OK
    assert (await Owner(group.stub).step(first_plan(epoch=6))).refusal.code == sampling_pb2.ERROR_CODE_STALE_EPOCH


async def test_an_owner_that_connects_again_replaces_its_old_stream(group: Group) -> None:
    older, newer = Owner(group.stub), Owner(group.stub)
    await older.step(first_plan(epoch=2))
    assert not (await newer.step(first_plan(epoch=2))).HasField("refusal")
    assert await older.status() == grpc.StatusCode.FAILED_PRECONDITION


async def test_a_takeover_refuses_the_older_streams_waiting_plans(group: Group, thread: ThreadPoolExecutor) -> None:
    older, newer, release = object(), object(), threading.Event()
    group.engine.open(older)
    thread.submit(release.wait)  # holds the model's thread
    waiting = group.engine.execute(first_plan(epoch=1), older)
    group.engine.open(newer)
    taken = group.engine.execute(first_plan(epoch=2), newer)
    release.set()
    assert isinstance((await waiting).refusal, StaleEpoch)
    assert [drawn.token_id for drawn in (await taken).output.drawn] == reply_ids()[:1]


@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_a_streams_end_forgets_its_sequences(group: Group, how: str) -> None:
    owner = Owner(group.stub)
    await owner.step(first_plan())
    assert group.sample("sequences_held") == 1
    if how == "cancelled":
        owner.call.cancel()
    else:
        await owner.call.done_writing()
    async with asyncio.timeout(RESULT_TIMEOUT_S):
        await group.service.drain()
    again = Owner(group.stub)
    assert not (await again.step(first_plan())).HasField("refusal")
    assert (await again.step(make_plan(2, {1: 1}))).token_ids


async def test_a_draining_group_says_so_with_every_result_and_ends_when_its_last_sequence_is_released(group: Group) -> None:
    owner = Owner(group.stub)
    before = await owner.step(first_plan())
    draining = asyncio.create_task(group.service.drain())
    await asyncio.sleep(0)
    during = await owner.step(make_plan(2, {1: 1}))
    assert (before.draining, during.draining, draining.done()) == (False, True, False)
    await owner.step(make_plan(3, released=[1]))
    await draining


async def test_bytes_that_are_no_plan_end_their_stream_alone(group: Group) -> None:
    owner = Owner(group.stub)
    await owner.step(first_plan())
    async with open_channel((await group.stub.Describe(worker_pb2.DescribeRequest())).address) as channel:
        call = channel.stream_stream(f"/{SERVICE_NAME}/Run")()
        await call.write(b"\xff\xff\xff")
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            assert await call.code() != grpc.StatusCode.OK
    assert (await owner.step(make_plan(2, {1: 1}))).token_ids


async def test_a_sequence_with_mixed_up_blocks_fails_and_the_others_go_on(group: Group) -> None:
    owner = Owner(group.stub)
    await owner.step(first_plan())
    forged = admit(2, PROMPT[::-1], [0, 3], [0, 3], num_computed_tokens=16)  # block 0 holds another prefix
    result = await owner.step(make_plan(2, {1: 1, 2: 4}, admitted=[forged]))
    assert [error.seq_id for error in result.errors] == [2]
    assert list(result.seq_ids) == [1]
    after = await owner.step(make_plan(3, {2: 1}))  # sent before the failure was known
    assert not after.HasField("refusal")
    assert not after.seq_ids


async def test_a_reply_that_breaks_its_constraint_fails_alone(group: Group) -> None:
    owner = Owner(group.stub)
    await owner.step(first_plan())
    constrained = sampling_pb2.SamplingParams(constraint=sampling_pb2.Constraint(regex="a+"))
    result = await owner.step(make_plan(2, {1: 1, 2: 20}, admitted=[admit(2, PROMPT, [3, 4], [3, 4], sampling=constrained)]))
    assert [(one.seq_id, one.error.code) for one in result.errors] == [(2, sampling_pb2.ERROR_CODE_CONSTRAINT_FAILED)]
    assert list(result.seq_ids) == [1]


async def test_held_blocks_are_those_named_and_not_written_since(group: Group) -> None:
    def named(block_id: int, name: bytes) -> worker_pb2.CachedBlock:
        device, pool = worker_pb2.BLOCK_TIER_DEVICE, worker_pb2.BLOCK_POOL_FULL
        return worker_pb2.CachedBlock(pool=pool, tier=device, block_id=block_id, hash=name)

    owner = Owner(group.stub)
    await owner.step(first_plan())
    await owner.step(make_plan(2, cached=[named(0, b"a"), named(9, b"b"), named(10, b"c")]))
    await owner.step(make_plan(3, {2: 20}, admitted=[admit(2, PROMPT, [9, 8], [9, 8])], cached=[named(10, b"")]))
    owner.call.cancel()
    info = await group.stub.Describe(worker_pb2.DescribeRequest(include_held_blocks=True))
    assert [(block.block_id, block.hash) for block in info.held_blocks] == [(0, b"a")]
    assert not (await group.stub.Describe(worker_pb2.DescribeRequest())).held_blocks


async def test_logprobs_come_for_those_who_asked(group: Group) -> None:
    asking = sampling_pb2.SamplingParams(top_logprobs=2)
    admitted = [admit(1, PROMPT, BLOCKS, BLOCKS), admit(2, PROMPT, [3, 4], [3, 4], sampling=asking)]
    result = await Owner(group.stub).step(make_plan(1, {1: 20, 2: 20}, admitted=admitted))
    assert [one.seq_id for one in result.logprobs] == [2]
    assert list(result.logprobs[0].logprobs.top_token_ids) == reply_ids()[:1]


async def test_each_sequence_has_a_span_under_its_scheduler(group: Group) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    context = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    owner = Owner(group.stub)
    await owner.step(make_plan(1, {1: 20}, admitted=[admit(1, PROMPT, BLOCKS, BLOCKS, trace_context=context)]))
    await owner.step(make_plan(2, {1: 1}))
    assert not group.spans.get_finished_spans()
    await owner.step(make_plan(3, released=[1]))
    (span,) = group.spans.get_finished_spans()
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == trace_id
    assert [event.name for event in span.events] == ["first_token"]


async def test_a_failed_step_is_told_to_the_process(thread: ThreadPoolExecutor, backend: ScriptedBackend) -> None:
    engine = Engine(FailingBackend(backend.facts), Limits(backend.facts, 64, 4), thread, StepWatchdog(60))
    owner = object()
    engine.open(owner)
    with pytest.raises(ZeroDivisionError):
        await engine.execute(first_plan(), owner)
    assert isinstance(await engine.crashed, ZeroDivisionError)
