"""What plans the table takes, what it refuses, and that a refusal changes nothing."""

import copy
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.ossia.v1 import sampling_pb2, worker_pb2
from services.errors import BlockOutOfRange, InvalidPlan, OssiaError, StaleEpoch, UnknownSequence, Unsupported
from tests.worker.owner import admit, make_plan
from worker.backend import DrawnToken, FailedSequence, ModelFacts, StepOutput
from worker.plan_draft import Limits
from worker.sequence_table import SequenceTable
from worker.sequences import ScheduledSequence
from worker.step_plan import StepPlan
from worker.step_wire import decode_plan

FACTS = ModelFacts(
    architecture="test",
    fingerprint="",
    total_parameters=0,
    active_parameters=0,
    max_model_len=40,
    vocab_size=100,
    eos_token_ids=(99,),
    block_size=4,
    num_full_blocks=16,
    num_window_blocks=12,
    sliding_window=6,
    device="test",
    dtype="none",
)
LIMITS = Limits(FACTS, max_batch_tokens=16, max_num_seqs=3)
PROMPT = [1, 2, 3, 4, 5]


def plan(*args: object, **kwargs: object) -> StepPlan:
    return decode_plan(make_plan(*args, **kwargs), FACTS)  # type: ignore[arg-type]  # passed on as they are


def commit(table: SequenceTable, scheduled: list[ScheduledSequence], output: StepOutput) -> None:
    table.advance(scheduled)
    table.settle(scheduled, output)


def appended(seq_id: int, full: list[int], window: list[int]) -> worker_pb2.AppendedBlocks:
    return worker_pb2.AppendedBlocks(seq_id=seq_id, full_block_ids=full, window_block_ids=window)


def device_copy(source: int, target: int, pool: "worker_pb2.BlockPool.ValueType" = worker_pb2.BLOCK_POOL_FULL) -> worker_pb2.BlockCopy:
    device = worker_pb2.BLOCK_TIER_DEVICE
    return worker_pb2.BlockCopy(pool=pool, source_tier=device, source_block_id=source, target_tier=device, target_block_id=target)


def table_with_one(num_drawn: int = 1) -> SequenceTable:
    """Sequence 1 holds PROMPT and what it drew, in two blocks of each pool, after steps 1 to `num_drawn`; the next decode is due."""
    table = SequenceTable(LIMITS)
    admission = plan(1, {1: 5}, admitted=[admit(1, PROMPT, [3, 7], [2, 5])])
    commit(table, table.apply(admission), StepOutput((DrawnToken(1, 50),)))
    for step in range(2, num_drawn + 1):
        commit(table, table.apply(plan(step, {1: 1})), StepOutput((DrawnToken(1, 50),)))
    table.check_integrity()
    return table


REFUSALS = {
    "older epoch": (plan(2, {1: 1}, epoch=0), StaleEpoch),
    "step skipped": (plan(3, {1: 1}), InvalidPlan),
    "step repeated": (plan(1, {1: 1}), InvalidPlan),
    "unknown released": (plan(2, released=[2]), UnknownSequence),
    "released twice": (plan(2, released=[1, 1]), UnknownSequence),
    "released and scheduled": (plan(2, {1: 1}, released=[1]), UnknownSequence),
    "admitted again": (plan(2, admitted=[admit(1, PROMPT, [4, 6], [4, 6])]), UnknownSequence),
    "admitted twice": (plan(2, admitted=[admit(2, PROMPT, [4, 6], [4, 6])] * 2), UnknownSequence),
    "too many sequences": (plan(2, admitted=[admit(seq_id, PROMPT, [4, 6], [4, 6]) for seq_id in (2, 3, 4)]), InvalidPlan),
    "no tokens": (plan(2, admitted=[admit(2, [], [], [])]), InvalidPlan),
    "no prompt": (plan(2, admitted=[admit(2, PROMPT, [4, 6], [4, 6], num_prompt_tokens=0)]), InvalidPlan),
    "more prompt than tokens": (plan(2, admitted=[admit(2, PROMPT, [4, 6], [4, 6], num_prompt_tokens=6)]), InvalidPlan),
    "nothing to compute": (plan(2, admitted=[admit(2, PROMPT, [4, 6], [4, 6], num_computed_tokens=5)]), InvalidPlan),
    "unknown token": (plan(2, admitted=[admit(2, [1, 100], [4], [4])]), InvalidPlan),
    "longer than the model": (plan(2, admitted=[admit(2, [1] * 41, range(11), range(11))]), InvalidPlan),
    "full block beyond the pool": (plan(2, {2: 5}, admitted=[admit(2, PROMPT, [4, 16], [4, 6])]), BlockOutOfRange),
    "window block beyond the pool": (plan(2, {2: 5}, admitted=[admit(2, PROMPT, [4, 6], [4, 12])]), BlockOutOfRange),
    "full table too short": (plan(2, {2: 5}, admitted=[admit(2, PROMPT, [4], [4, 6])]), BlockOutOfRange),
    "window table too short": (plan(2, {2: 5}, admitted=[admit(2, PROMPT, [4, 6], [4])]), BlockOutOfRange),
    "computed tokens without blocks": (plan(2, admitted=[admit(2, [1] * 9, [4], [4, 6], num_computed_tokens=8)]), BlockOutOfRange),
    "too many blocks": (plan(2, admitted=[admit(2, PROMPT, range(11), [4, 6])]), BlockOutOfRange),
    "window starts absurdly late": (plan(2, admitted=[admit(2, PROMPT, [4, 6], [4], first_window_block=2**31)]), BlockOutOfRange),
    "window lost a block": (
        plan(2, {2: 1}, admitted=[admit(2, [1] * 13, [0, 1, 4, 6], [4, 6], num_computed_tokens=12, first_window_block=2)]),
        BlockOutOfRange,
    ),
    "appended to unknown": (plan(2, appended=[appended(2, [4], [4])]), UnknownSequence),
    "appended beyond the pool": (plan(2, appended=[appended(1, [16], [4])]), BlockOutOfRange),
    "appended beyond the model": (plan(2, appended=[appended(1, [4] * 5, []), appended(1, [4] * 4, [])]), BlockOutOfRange),
    "copy beyond the pool": (plan(2, copies=[device_copy(0, 16)]), BlockOutOfRange),
    "named beyond the pool": (
        plan(2, cached=[worker_pb2.CachedBlock(pool=worker_pb2.BLOCK_POOL_WINDOW, tier=worker_pb2.BLOCK_TIER_DEVICE, block_id=12)]),
        BlockOutOfRange,
    ),
    "unknown scheduled": (plan(2, {1: 1, 2: 1}), UnknownSequence),
    "scheduled twice": (replace(plan(2), scheduled=((1, 1), (1, 1))), InvalidPlan),
    "zero tokens": (plan(2, {1: 0}), InvalidPlan),
    "more tokens than known": (plan(2, {1: 2}), InvalidPlan),
    "more tokens than a step takes": (plan(2, {2: 17}, admitted=[admit(2, [1] * 20, range(5), range(5))]), InvalidPlan),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_plan_changes_nothing(name: str) -> None:
    table, (refused, error) = table_with_one(), REFUSALS[name]
    before = copy.deepcopy(vars(table))
    with pytest.raises(error) as raised:
        table.apply(refused)
    assert len(raised.value.message) > 20
    assert vars(table) == before
    table.apply(plan(2, {1: 1}))  # the step's number is still due


def test_a_decode_is_scheduled_before_its_token_is_known_to_the_owner() -> None:
    table = table_with_one(num_drawn=3)
    (one,) = table.apply(plan(4, {1: 1}))
    assert one.sequence.token_ids == [*PROMPT, 50, 50, 50]
    assert (one.sequence.num_computed_tokens, one.draws_token) == (7, True)


def test_a_chunk_that_is_not_the_last_draws_nothing() -> None:
    table = SequenceTable(LIMITS)
    (first,) = table.apply(plan(1, {1: 3}, admitted=[admit(1, PROMPT, [0, 1], [0, 1])]))
    assert not first.draws_token
    commit(table, [first], StepOutput(()))
    (last,) = table.apply(plan(2, {1: 2}))
    assert last.draws_token


def test_blocks_are_appended_before_the_step_that_needs_them() -> None:
    table = table_with_one(num_drawn=4)
    with pytest.raises(BlockOutOfRange):
        table.apply(plan(5, {1: 1}))
    (one,) = table.apply(plan(5, {1: 1}, appended=[appended(1, [9], [8])]))
    assert one.sequence.full_block_ids == [3, 7, 9]
    assert one.sequence.window_block_ids == [2, 5, 8]


def test_released_ids_and_blocks_may_be_used_again_in_the_same_plan() -> None:
    table = table_with_one()
    (one,) = table.apply(plan(2, {1: 5}, released=[1], admitted=[admit(1, PROMPT, [3, 7], [2, 5])]))
    assert one.sequence.num_computed_tokens == 0


def test_window_entries_before_the_window_are_in_the_pool() -> None:
    table = SequenceTable(LIMITS)
    admitted = [admit(2, [1] * 14, [0, 1, 4, 6], [4, 6, 7], num_computed_tokens=13, first_window_block=1)]
    (one,) = table.apply(plan(1, {2: 1}, admitted=admitted))
    assert len(one.sequence.window_block_ids) == 4
    table.check_integrity()


def test_a_failed_sequence_is_passed_over_until_it_is_released() -> None:
    table = table_with_one()
    commit(table, table.apply(plan(2, {1: 1})), StepOutput((), (FailedSequence(1, "no numbers"),)))
    assert table.apply(plan(3, {1: 1}, appended=[appended(1, [4], [4])])) == []
    assert len(table) == 0
    table.apply(plan(4, released=[1]))
    with pytest.raises(UnknownSequence):
        table.apply(plan(5, {1: 1}))


def test_what_a_client_asked_wrongly_fails_its_sequence_alone() -> None:
    constrained = sampling_pb2.SamplingParams(constraint=sampling_pb2.Constraint(regex="a+"))
    biased = sampling_pb2.SamplingParams(logit_bias={100: 1.0})
    admitted = [admit(2, PROMPT, [4, 6], [4, 6], sampling=constrained), admit(3, PROMPT, [8, 9], [8, 9], sampling=biased)]
    decoded = plan(2, {1: 1, 2: 5, 3: 5}, admitted=admitted)
    assert isinstance(decoded.admitted[0].rejection, Unsupported)
    assert "100" in str(decoded.admitted[1].rejection)
    assert [one.sequence.seq_id for one in table_with_one().apply(decoded)] == [1]


def test_a_forgotten_table_keeps_its_epoch_and_counts_from_one() -> None:
    table = table_with_one()
    table.forget()
    with pytest.raises(StaleEpoch):
        table.apply(plan(1, epoch=0))
    table.apply(plan(1, {1: 5}, admitted=[admit(1, PROMPT, [0, 1], [0, 1])]))


ids = st.integers(0, 4)
admissions = st.builds(
    admit,
    ids,
    st.lists(st.integers(0, 101), max_size=12),
    st.lists(st.integers(0, 17), max_size=4),
    st.lists(st.integers(0, 13), max_size=4),
    num_computed_tokens=st.integers(0, 3),
    first_window_block=st.integers(0, 1),
)
plans = st.builds(
    make_plan,
    st.just(1),
    st.dictionaries(ids, st.integers(0, 12), max_size=3),
    admitted=st.lists(admissions, max_size=2),
    appended=st.lists(
        st.builds(appended, ids, st.lists(st.integers(0, 16), max_size=2), st.lists(st.integers(0, 12), max_size=2)), max_size=2
    ),
    released=st.lists(ids, max_size=1),
)


@settings(deadline=None)
@given(st.lists(plans, max_size=8), st.data())
def test_any_plan_is_applied_whole_or_refused_whole(messages: list[worker_pb2.StepPlan], data: st.DataObject) -> None:
    table, step = SequenceTable(LIMITS), 1
    for message in messages:
        before = copy.deepcopy(vars(table))
        try:
            scheduled = table.apply(replace(decode_plan(message, FACTS), step=step))
        except OssiaError:
            assert vars(table) == before
            continue
        step += 1
        failing = data.draw(st.booleans())
        drawing = [one.sequence.seq_id for one in scheduled if one.draws_token]
        output = StepOutput((), tuple(FailedSequence(seq_id, "") for seq_id in drawing)) if failing else None
        commit(table, scheduled, output or StepOutput(tuple(DrawnToken(seq_id, 7) for seq_id in drawing)))
        table.check_integrity()
