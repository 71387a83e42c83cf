"""The engine over a device whose draws come late: results go out when they are there, in order, and what breaks is told."""

import asyncio
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.errors import InvalidLogits
from tests.worker.late_backend import LateBackend, LateStep
from tests.worker.owner import admit, make_plan
from worker.backend import Backend
from worker.engine import Engine
from worker.metrics import WorkerMetrics
from worker.plan_draft import Limits
from worker.runner import ModelBackend
from worker.watchdog import StepWatchdog

PROMPT, BLOCKS = list(range(3, 40)), [0, 1, 2]
FIRST = make_plan(1, {1: len(PROMPT)}, admitted=[admit(1, PROMPT, BLOCKS, BLOCKS)])


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


def open_engine(backend: Backend, thread: ThreadPoolExecutor) -> tuple[Engine, object]:
    engine, owner = Engine(backend, Limits(backend.facts, 1024, 32), thread, StepWatchdog(60)), object()
    engine.open(owner)
    return engine, owner


async def test_plans_one_by_one_and_plans_sent_ahead_draw_the_same(
    load_backend: Callable[[str], ModelBackend], thread: ThreadPoolExecutor
) -> None:
    late = LateBackend(load_backend("four_ranks"))
    engine, owner = open_engine(late, thread)
    plans = [FIRST, *(make_plan(step, {1: 1}) for step in range(2, 9))]
    one_by_one = [await engine.execute(plan, owner) for plan in plans]  # nothing comes after a step: its wait must end by itself
    assert late.num_unknown == 0
    engine.open(owner)
    ahead = await asyncio.gather(*(engine.execute(plan, owner) for plan in plans))
    assert late.num_unknown > 0
    assert [outcome.step for outcome in ahead] == list(range(1, 9))
    drawn = [[token.token_id for outcome in outcomes for token in outcome.output.drawn] for outcomes in (one_by_one, ahead)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 3
    assert all(outcome.device_time_s > 0 for outcome in ahead)


async def test_a_plan_that_is_refused_leaves_the_step_under_way_alone(
    load_backend: Callable[[str], ModelBackend], thread: ThreadPoolExecutor
) -> None:
    engine, owner = open_engine(LateBackend(load_backend("four_ranks")), thread)
    first, refused, second = await asyncio.gather(
        *(engine.execute(plan, owner) for plan in (FIRST, make_plan(2, {7: 1}), make_plan(2, {1: 1})))
    )
    assert refused.refusal and not refused.output.drawn
    assert [len(outcome.output.drawn) for outcome in (first, second)] == [1, 1]


async def test_a_device_that_breaks_while_it_is_waited_for_is_told(
    load_backend: Callable[[str], ModelBackend], thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall_over(_: LateStep) -> None:
        raise ZeroDivisionError("the device fell over")

    monkeypatch.setattr(LateStep, "wait", fall_over)
    engine, owner = open_engine(LateBackend(load_backend("four_ranks")), thread)
    with pytest.raises(ZeroDivisionError):
        await engine.execute(FIRST, owner)
    assert isinstance(await engine.crashed, ZeroDivisionError)


async def test_logits_that_are_not_numbers_end_one_sequence_with_an_error_and_a_metric(
    load_backend: Callable[[str], ModelBackend], thread: ThreadPoolExecutor
) -> None:
    backend, metrics = load_backend("four_ranks"), WorkerMetrics()
    engine, owner = open_engine(LateBackend(backend), thread)
    metrics.note_outcome(await engine.execute(FIRST, owner))
    backend._kv_cache.full[:, :, BLOCKS[0]] = math.nan
    healthy = admit(2, PROMPT, [3, 4, 5], [3, 4, 5])
    plans = make_plan(2, {1: 1, 2: len(PROMPT)}, admitted=[healthy]), make_plan(3, {1: 1, 2: 1}), make_plan(4, {2: 1}, released=[1])
    outcomes = await asyncio.gather(*(engine.execute(plan, owner) for plan in plans))  # 3 is under way when 1 is found to fail
    for outcome in outcomes:
        metrics.note_outcome(outcome)
    assert [[(one.seq_id, type(one.error)) for one in outcome.failures] for outcome in outcomes] == [[(1, InvalidLogits)], [], []]
    assert [[token.seq_id for token in outcome.output.drawn] for outcome in outcomes] == [[2], [2], [2]]
    assert metrics.registry.get_sample_value("ossia_worker_sequences_failed_total", {"code": "ERROR_CODE_INVALID_LOGITS"}) == 1
