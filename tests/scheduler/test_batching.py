"""The batcher against a model of a worker that checks every plan as the contract says it may."""

import random
from collections import deque
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.batching import Batcher, ProtocolViolation
from scheduler.host_tier import TierCopy
from scheduler.prefix_cache import PrefixIndex
from scheduler.sequence import Event, FinishReason, GroupLimits, Request, Sequence, StepPlan, StepResult
from services.errors import ContextLengthExceeded, Internal, Overloaded
from services.prefix_hash import PrefixHasher, prefix_key

LIMITS = GroupLimits(
    block_size=4, num_full_blocks=24, num_window_blocks=14, sliding_window=10, max_model_len=64, max_batch_tokens=16, max_num_seqs=4
)


def request(num_prompt_tokens: int = 5, max_tokens: int | None = 3, **fields: object) -> Request:
    return Request("r", "m", tuple(range(num_prompt_tokens)), max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


def next_token(token_ids: list[int]) -> int:
    """A stand-in for the model: what follows depends on every token before it."""
    return hash(tuple(token_ids)) % 1000


@dataclass
class Held:
    token_ids: list[int]
    num_computed: int
    full: list[int]
    window: list[int]


Slots = dict[tuple[int, int], int]  # (block, offset) → hash of the prefix whose last token was written there


class ModelWorker:
    """Runs plans in order. Each slot remembers the token prefix that was written there; every read is checked against it."""

    def __init__(self, limits: GroupLimits) -> None:
        self.limits = limits
        self.sequences: dict[int, Held] = {}
        self.device: dict[bool, Slots] = {False: {}, True: {}}  # by "is the window pool"
        self.host: dict[bool, Slots] = {False: {}, True: {}}
        self.last_step = 0

    def run(self, plan: StepPlan) -> StepResult:
        assert plan.step == self.last_step + 1
        self.last_step = plan.step
        for seq_id in plan.released:
            del self.sequences[seq_id]
        for copy in plan.copies:
            self.copy(copy)
        for one in plan.admitted:
            assert one.seq_id not in self.sequences
            window = [-1] * one.first_window_block + list(one.window_block_ids)
            self.sequences[one.seq_id] = Held(list(one.token_ids), one.num_computed_tokens, list(one.full_block_ids), window)
        for seq_id, full, window in plan.appended:
            self.sequences[seq_id].full += full
            self.sequences[seq_id].window += window
        assert len(self.sequences) <= self.limits.max_num_seqs
        assert sum(plan.scheduled.values()) <= self.limits.max_batch_tokens
        # A model stores all of a step before any of it is read.
        for seq_id, count in plan.scheduled.items():
            self.write(self.sequences[seq_id], count)
        drawn = {seq_id: self.draw(self.sequences[seq_id], count) for seq_id, count in plan.scheduled.items()}
        drawn = {seq_id: token_id for seq_id, token_id in drawn.items() if token_id is not None}
        return StepResult(plan.step, list(drawn), list(drawn.values()), device_time_s=0.01)

    def copy(self, copy: TierCopy) -> None:
        device, host = self.device[copy.is_window], self.host[copy.is_window]
        source, target = (device, host) if copy.to_host else (host, device)
        ids = (copy.device_block_id, copy.host_block_id)
        source_id, target_id = ids if copy.to_host else ids[::-1]
        for offset in range(self.limits.block_size):
            target[target_id, offset] = source[source_id, offset]

    def write(self, held: Held, count: int) -> None:
        start, end = held.num_computed, held.num_computed + count
        assert count > 0 and end <= len(held.token_ids), "only known tokens are computed"
        for position in range(start, end):
            prefix = hash(tuple(held.token_ids[: position + 1]))
            for is_window, table in ((False, held.full), (True, held.window))[: 1 + bool(self.limits.num_window_blocks)]:
                self.device[is_window][table[position // self.limits.block_size], position % self.limits.block_size] = prefix

    def draw(self, held: Held, count: int) -> int | None:
        start, end = held.num_computed, held.num_computed + count
        self.check(held, False, held.full, 0, end)
        if self.limits.num_window_blocks:
            self.check(held, True, held.window, max(0, start - self.limits.sliding_window + 1), end)
        held.num_computed = end
        if end < len(held.token_ids):
            return None
        held.token_ids.append(next_token(held.token_ids))
        return held.token_ids[-1]

    def check(self, held: Held, is_window: bool, table: list[int], start: int, end: int) -> None:
        size = self.limits.block_size
        for position in range(start, end):
            found = self.device[is_window][table[position // size], position % size]
            assert found == hash(tuple(held.token_ids[: position + 1])), f"position {position} holds another prefix"


class Loop:
    """Drives a batcher and a model worker with `depth` plans in flight, and gathers what each sequence got."""

    def __init__(self, batcher: Batcher, depth: int = 2) -> None:
        self.batcher, self.depth, self.now = batcher, depth, 0.0
        self.worker = ModelWorker(batcher.limits)
        self.on_wire: deque[StepResult] = deque()
        self.tokens: dict[Sequence, list[int]] = {}
        self.ends: dict[Sequence, FinishReason] = {}

    def take(self, events: list[Event]) -> None:
        for event in events:
            assert event.sequence not in self.ends, "nothing comes after the end"
            self.tokens.setdefault(event.sequence, []).extend(event.token_ids)
            if event.finish:
                self.ends[event.sequence] = event.finish.reason

    def turn(self) -> bool:
        """One plan or one result; False when there is nothing to do."""
        self.now += 0.01
        plan = self.batcher.plan(self.now) if len(self.on_wire) < self.depth else None
        if plan:
            self.on_wire.append(self.worker.run(plan))
        elif has_result := bool(self.on_wire):
            self.take(self.batcher.apply(self.on_wire.popleft(), self.now)[1])
        self.batcher.check_integrity()
        return bool(plan or has_result)

    def finish(self) -> None:
        for _ in range(10_000):
            if not self.turn():
                return
        raise AssertionError("the batcher never came to rest")


def expected(one: Sequence) -> list[int]:
    token_ids = list(one.request.prompt_token_ids)
    for _ in range(one.max_new_tokens):
        token_ids.append(next_token(token_ids))
        if token_ids[-1] in one.request.stop_token_ids:
            break
    return token_ids[len(one.request.prompt_token_ids) :]


def make_loop(limits: GroupLimits = LIMITS, depth: int = 2, max_queued_tokens: int = 1000) -> Loop:
    return Loop(Batcher(limits, max_queued_tokens=max_queued_tokens), depth)


@given(seed=st.integers(0, 2**32), depth=st.integers(1, 3), num_host_blocks=st.sampled_from([0, 3, 40]))
@settings(max_examples=200, deadline=None)
def test_every_sequence_gets_its_solo_tokens_under_arrivals_cancels_sharing_and_preemption(
    seed: int, depth: int, num_host_blocks: int
) -> None:
    draw, limits = random.Random(seed), replace(LIMITS, num_host_blocks=num_host_blocks)
    index = PrefixIndex()
    loop = Loop(Batcher(limits, max_queued_tokens=100_000, index=index, group_id="g"), depth)
    stems = [tuple(draw.randrange(1000) for _ in range(40)) for _ in range(3)]
    opened: list[Sequence] = []
    for _ in range(draw.randint(1, 20)):
        stem, tenant = draw.choice(stems), draw.choice("ab")
        prompt = stem[: draw.randint(1, 40)] + tuple(draw.randrange(1000) for _ in range(draw.randint(0, 8)))
        ask = Request(
            "r",
            "m",
            prompt,
            max_tokens=draw.randint(1, 16),
            stop_token_ids=frozenset(draw.sample(range(1000), 30)),
            priority=draw.randint(0, 1),
            n=draw.choice([1, 1, 3]),
            tenant=tenant,
            prefix=PrefixHasher(prefix_key(tenant, b""), limits.block_size, prompt),
            checkpoint_blocks=tuple(sorted({draw.randint(0, len(prompt)) // limits.block_size for _ in range(2)})),
        )
        opened += loop.batcher.add(ask, loop.now)
        for _ in range(draw.randint(0, 6)):
            loop.turn()
        if draw.random() < 0.2:
            loop.take(loop.batcher.cancel(draw.choice(opened), loop.now))
    loop.finish()
    for one in opened:
        got = loop.tokens.get(one, [])
        was_cancelled = loop.ends[one] is FinishReason.CANCELLED
        assert got == expected(one)[: len(got)] if was_cancelled else got == expected(one)
    assert loop.batcher.num_free_blocks == (LIMITS.num_full_blocks, LIMITS.num_window_blocks)
    assert not loop.worker.sequences, "the worker was told to forget every sequence"
    loop.batcher.cache.close()
    assert not index.holders([name for one in opened for name in one.request.block_names[:1]])


def test_a_pool_too_small_for_all_preempts_and_still_ends_every_sequence() -> None:
    loop = make_loop()
    opened = [loop.batcher.add(request(20, 30), 0.0)[0] for _ in range(4)]
    loop.finish()
    assert all(loop.tokens[one] == expected(one) for one in opened)
    assert sum(one.num_preemptions for one in opened) > 0


def test_decodes_go_before_prefill_and_share_the_step() -> None:
    loop = make_loop()
    loop.batcher.add(request(5, 20), 0.0)
    loop.turn()
    loop.batcher.add(request(40, 20), 0.0)
    plan = loop.batcher.plan(0.0)
    assert plan and list(plan.scheduled.values()) == [1, 15], "one decode, and the rest of the budget as a chunk"


def test_a_stop_found_late_drops_the_surplus_token() -> None:
    loop = make_loop()
    stop = next_token(list(range(5)))
    (one,) = loop.batcher.add(request(5, 20, stop_token_ids=frozenset({stop})), 0.0)
    loop.finish()
    assert loop.tokens[one] == [stop] and loop.ends[one] is FinishReason.STOP and loop.batcher.num_surplus_tokens == 1


def test_min_tokens_holds_a_stop_back() -> None:
    loop = make_loop()
    stop = next_token(list(range(5)))
    (one,) = loop.batcher.add(request(5, 4, stop_token_ids=frozenset({stop}), min_tokens=1), 0.0)
    loop.finish()
    assert len(loop.tokens[one]) == 4


def test_resumed_tokens_count_towards_the_limit() -> None:
    loop = make_loop()
    (one,) = loop.batcher.add(request(9, 10, num_resumed_tokens=4), 0.0)
    loop.finish()
    assert len(loop.tokens[one]) == 6 and one.request.num_prompt_tokens == 5


def test_a_cancelled_sequence_is_released_and_never_planned_again() -> None:
    loop = make_loop()
    (one,) = loop.batcher.add(request(5, 50), 0.0)
    loop.turn()
    seq_id = one.seq_id
    loop.take(loop.batcher.cancel(one, 0.0))
    plan = loop.batcher.plan(0.0)
    assert plan and list(plan.released) == [seq_id] and not plan.scheduled
    assert loop.batcher.num_free_blocks == (LIMITS.num_full_blocks, LIMITS.num_window_blocks)


def test_window_blocks_are_freed_as_the_window_passes() -> None:
    loop = make_loop()
    (one,) = loop.batcher.add(request(5, 50), 0.0)
    for _ in range(80):
        loop.turn()
        assert len(one.window_block_ids) <= LIMITS.num_blocks(LIMITS.sliding_window) + 1 + LIMITS.num_blocks(LIMITS.max_batch_tokens)
    assert len(one.full_block_ids) > len(one.window_block_ids)


def test_higher_priority_overtakes_in_the_queue() -> None:
    loop = make_loop(GroupLimits(4, 24, 14, 10, 64, 16, max_num_seqs=1))
    running, low, high = (loop.batcher.add(request(5, 2, priority=priority), 0.0)[0] for priority in (0, 0, 5))
    loop.finish()
    ended = list(loop.ends)
    assert ended.index(high) < ended.index(low)
    assert ended.index(running) <= ended.index(low)


def test_what_can_never_fit_is_refused_and_a_full_queue_too() -> None:
    batcher = make_loop(max_queued_tokens=30).batcher
    with pytest.raises(ContextLengthExceeded, match="64"):
        batcher.add(request(64), 0.0)
    batcher.add(request(20), 0.0)
    with pytest.raises(Overloaded) as refusal:
        batcher.add(request(20), 0.0)
    assert refusal.value.retry_after_s and refusal.value.retry_after_s >= 1.0


def test_deadlines_end_what_waits_and_what_runs() -> None:
    loop = make_loop(GroupLimits(4, 24, 14, 10, 64, 16, max_num_seqs=1))
    (runs,) = loop.batcher.add(request(5, 50, deadline_s=1.0), 0.0)
    (waits,) = loop.batcher.add(request(5, 50, start_deadline_s=0.5), 0.0)
    loop.turn()
    assert loop.batcher.wake_at() == 0.5
    loop.take(loop.batcher.expire(0.6))
    assert loop.ends == {waits: FinishReason.ERROR}
    loop.take(loop.batcher.expire(1.0))
    assert loop.ends[runs] is FinishReason.ERROR
    loop.batcher.check_integrity()


def test_an_idle_group_waits_for_company_only_as_long_as_told() -> None:
    batcher = Batcher(LIMITS, max_queued_tokens=1000, batch_timeout_s=0.1)
    batcher.add(request(), 1.0)
    assert batcher.plan(1.05) is None and batcher.wake_at() == pytest.approx(1.1)
    batcher.add(request(), 1.05)
    plan = batcher.plan(1.1)
    assert plan and len(plan.scheduled) == 2


def test_a_failed_sequence_ends_alone_and_later_plans_may_still_name_it() -> None:
    loop = make_loop()
    bad, good = (loop.batcher.add(request(5, 6), 0.0)[0] for _ in range(2))
    first, second = loop.batcher.plan(0.0), loop.batcher.plan(0.0)
    assert first and second
    result = loop.worker.run(first)
    bad_id, good_id = bad.seq_id, good.seq_id
    loop.take(loop.batcher.apply(StepResult(1, [good_id], [result.token_ids[1]], errors={bad_id: Internal("not a number")}), 0.0)[1])
    result = loop.worker.run(second)
    loop.take(loop.batcher.apply(StepResult(2, [good_id], [result.token_ids[1]]), 0.0)[1])
    assert loop.ends == {bad: FinishReason.ERROR}
    loop.finish()
    assert loop.tokens[good] == expected(good)


@pytest.mark.parametrize(
    "answer",
    [StepResult(2, [1], [7]), StepResult(1, [2], [7]), StepResult(1), StepResult(1, [1, 1], [7, 7])],
    ids=["step", "id", "none", "two"],
)
def test_a_result_that_no_plan_asked_for_is_a_violation(answer: StepResult) -> None:
    loop = make_loop()
    loop.batcher.add(request(), 0.0)
    assert loop.batcher.plan(0.0)
    with pytest.raises(ProtocolViolation):
        loop.batcher.apply(answer, 0.0)
