"""The simulation keeps its own promises: the same seed gives the same run, every answer comes whole, and faults lose nothing."""

from pathlib import Path
from random import Random

import pytest

from scheduler.sequence import FinishReason, GroupLimits
from scheduler.simulation import policies
from scheduler.simulation.cluster import ClusterSpec, Faults, SimulatedCluster
from scheduler.simulation.events import EventLoop
from scheduler.simulation.outcome import Outcome, percentile
from scheduler.simulation.step_time import GPT_OSS_120B_H200, SerialPrefill, StepShape
from scheduler.simulation.trace import read_trace, write_trace
from scheduler.simulation.workloads import END_TOKEN_ID, Chats, SharedPrefixes, agents, hot_prefix, long_documents, sudden_bursts

LIMITS = GroupLimits(
    block_size=16,
    num_full_blocks=20_000,
    num_window_blocks=4_000,
    sliding_window=128,
    max_model_len=131_072,
    max_batch_tokens=8192,
    max_num_seqs=64,
    eos_token_ids=frozenset({END_TOKEN_ID}),
)
CHATS = Chats(rate_per_s=2.0, num_chats=12)
SERIAL = ClusterSpec(4, GroupLimits(16, 2000, 0, 0, 131_072, 8192, 1, eos_token_ids=frozenset({END_TOKEN_ID})), SerialPrefill(20_000.0))


def chat_spec(**fields: object) -> ClusterSpec:
    return ClusterSpec(3, LIMITS, GPT_OSS_120B_H200, **fields)  # type: ignore[arg-type]


def signature(outcome: Outcome) -> list[tuple[object, ...]]:
    return [(one.at_s, one.group_ids, one.first_token_s, one.ended_s, one.num_cached_tokens) for one in outcome.records]


def test_events_go_by_time_and_equal_times_by_order_of_asking() -> None:
    loop, seen = EventLoop(), list[tuple[float, str]]()
    loop.at(2.0, lambda: seen.append((loop.now, "late")))
    loop.at(1.0, lambda: loop.after(1.0, lambda: seen.append((loop.now, "asked last"))))
    loop.run(until_s=1.5)
    assert not seen
    loop.run()
    assert seen == [(2.0, "late"), (2.0, "asked last")]


def test_the_roofline_gives_the_known_numbers() -> None:
    one, sixty_four, twice = (GPT_OSS_120B_H200(StepShape(0, size, 1024 * size)) for size in (1, 64, 128))
    assert 1 / one == pytest.approx(852)
    assert twice / sixty_four == pytest.approx(1.17, abs=0.01)
    assert GPT_OSS_120B_H200(StepShape(512, 64, 65_536)) < 1.2 * sixty_four, "decodes ride along in a chunk"


def test_the_same_seed_gives_the_same_run_and_another_one_does_not() -> None:
    first, again, other = (SimulatedCluster(chat_spec(), seed).run(CHATS.arrivals(seed)) for seed in (1, 1, 2))
    assert signature(first) == signature(again) != signature(other)


@pytest.mark.parametrize(
    "workload",
    [CHATS, agents(1.0, 4), long_documents(1.0, 3), hot_prefix(20.0, 60), sudden_bursts(20.0, 80)],
    ids=["chats", "agents", "documents", "hot prefix", "bursts"],
)
def test_every_workload_is_answered_whole_and_finds_what_placement_expected(workload: Chats | SharedPrefixes) -> None:
    outcome = SimulatedCluster(chat_spec(), 1).run(workload.arrivals(1))
    assert outcome.records and all(one.is_answered for one in outcome.records)
    assert all(one.num_cached_tokens >= one.num_predicted_tokens for one in outcome.records) and outcome.hit_ratio > 0.3


def test_a_chat_finds_its_own_earlier_turns() -> None:
    outcome = SimulatedCluster(chat_spec(), 3).run(Chats(rate_per_s=0.1, num_chats=2, num_tenants=2, num_turns=(5, 5)).arrivals(3))
    later = [one for one in outcome.records if one.num_cached_tokens]
    assert len(later) >= 8, "each of four turns after the first"
    assert min(one.num_cached_tokens / len(one.request.prompt_token_ids) for one in later) > 0.4


MAKE_POLICY = [
    policies.RoundRobin,
    policies.Random,
    policies.PowerOfTwo,
    policies.LeastLoaded,
    policies.StickyTenants,
    lambda group_ids, draw: policies.ApproximateTree(group_ids, draw, blocks_per_group=2000),
]


@pytest.mark.parametrize("make_policy", MAKE_POLICY)
@pytest.mark.parametrize("num_schedulers", [1, 2])
def test_every_policy_answers_all_and_ours_is_not_slower(make_policy: policies.MakePolicy, num_schedulers: int) -> None:
    workload = SharedPrefixes(20.0, num_tenants=20, num_requests=200)
    spec = ClusterSpec(SERIAL.num_groups, SERIAL.limits, SERIAL.step_time, num_schedulers)
    ours = SimulatedCluster(spec, 1).run(workload.arrivals(1))
    other_spec = ClusterSpec(SERIAL.num_groups, SERIAL.limits, SERIAL.step_time, num_schedulers, make_policy)
    theirs = SimulatedCluster(other_spec, 1).run(workload.arrivals(1))
    assert all(one.is_answered for one in (*ours.records, *theirs.records))
    assert ours.mean_ttft_s <= theirs.mean_ttft_s


def test_two_routers_do_not_see_each_others_requests() -> None:
    one, other = (policies.LeastLoaded(["a", "b"], Random(1)) for _ in range(2))
    request = next(SharedPrefixes(1.0, 1).arrivals(1)).request
    one.opened(request, "a")
    assert one.choose(request) == "b" and {other.choose(request) for _ in range(20)} == {"a", "b"}


def test_lost_groups_and_late_results_lose_and_double_no_token() -> None:
    faults = Faults(losses=[(1.0, "g0001"), (2.5, "g0000"), (4.0, "g0001")], back_after_s=2.0, late_share=0.2, late_s=0.3)
    cluster = SimulatedCluster(chat_spec(faults=faults), 5)
    outcome = cluster.run(Chats(rate_per_s=6.0, num_chats=25, num_turns=(1, 3), pause_s=(0.1, 1.0)).arrivals(5))
    assert all(one.is_answered for one in outcome.records)
    assert any(len(one.group_ids) > 1 for one in outcome.records), "some were moved"
    for batcher in cluster.batchers.values():
        batcher.check_integrity()
        assert batcher.is_idle


def test_a_cancelled_request_ends_at_once_and_the_rest_go_on() -> None:
    cluster = SimulatedCluster(chat_spec(), 1)
    cluster.loop.at(3.0, lambda: cluster.cancel(next(name for name, one in cluster.records.items() if one.reason is None)))
    outcome = cluster.run(Chats(rate_per_s=8.0, num_chats=20, num_turns=(1, 1)).arrivals(1))
    (cancelled,) = [one for one in outcome.records if one.reason is FinishReason.CANCELLED]
    assert cancelled.ended_s == 3.0 and all(one.is_answered for one in outcome.records if one is not cancelled)


def test_a_trace_keeps_what_placement_needs_and_no_token(tmp_path: Path) -> None:
    workload = SharedPrefixes(30.0, num_tenants=10, num_requests=100)
    path = tmp_path / "trace.jsonl"
    recorded = SimulatedCluster(SERIAL, 1).run(workload.arrivals(1))
    write_trace(recorded.records, path)
    replayed = SimulatedCluster(SERIAL, 1).run(read_trace(path))
    assert [one.num_cached_tokens for one in replayed.records] == [one.num_cached_tokens for one in recorded.records]
    assert "token_ids" not in path.read_text()
    path.write_text('{"at_s": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        list(read_trace(path))


def test_a_thousand_groups_run() -> None:
    spec = ClusterSpec(1000, SERIAL.limits, SERIAL.step_time)
    outcome = SimulatedCluster(spec, 1).run(
        SharedPrefixes(2000.0, num_tenants=50, num_requests=100, prefix_tokens=320, question_tokens=64).arrivals(1)
    )
    assert all(one.is_answered for one in outcome.records)


def test_a_percentile_is_a_value_that_occurred() -> None:
    assert [percentile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.99)] == [1.0, 1.0, 2.0, 4.0]
