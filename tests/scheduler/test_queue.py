import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.queue import AGING_S, DrainRate, WaitingQueue
from scheduler.sequence import Request, Sequence


def waiting(tenant: str = "a", arrival: int = 1, arrival_s: float = 0.0, num_tokens: int = 10, priority: int = 0) -> Sequence:
    request = Request("r", "m", tuple(range(num_tokens)), tenant=tenant, priority=priority)
    return Sequence(request, 0, arrival, arrival_s, 5, num_tokens, num_tokens)


def serve(queue: WaitingQueue, now: float = 0.0) -> Sequence:
    sequence = queue.first(now)
    assert sequence is not None
    queue.take_turn(sequence, sequence.num_known_tokens)
    return sequence


def test_tenants_take_turns_by_tokens_whatever_the_length_of_their_queues() -> None:
    queue = WaitingQueue(10_000)
    for arrival in range(40):
        queue.push(waiting("greedy", arrival))
    for arrival in range(40, 44):
        queue.push(waiting("modest", arrival))
    served = [serve(queue).request.tenant for _ in range(8)]
    assert served.count("modest") == 4


def test_a_weight_is_a_share() -> None:
    queue = WaitingQueue(10_000, {"gold": 3.0})
    for arrival in range(60):
        queue.push(waiting("gold" if arrival % 2 else "iron", arrival))
    served = [serve(queue).request.tenant for _ in range(24)]
    assert served.count("gold") == 18


def test_a_tenant_that_was_idle_has_saved_nothing_up() -> None:
    queue = WaitingQueue(10_000)
    for arrival in range(30):
        queue.push(waiting("busy", arrival))
    for _ in range(20):
        serve(queue)
    for arrival in range(100, 110):
        queue.push(waiting("late", arrival))
    assert {serve(queue).request.tenant for _ in range(3)} == {"busy", "late"}, "it does not get all turns until it has caught up"


def test_generated_tokens_count_too() -> None:
    queue = WaitingQueue(10_000)
    for arrival, tenant in enumerate(["talker", "listener"] * 3):
        queue.push(waiting(tenant, arrival))
    assert serve(queue).request.tenant == "talker"
    queue.charge("talker", num_output_tokens=100)
    assert [serve(queue).request.tenant for _ in range(3)] == ["listener"] * 3


def test_priority_goes_first_and_waiting_makes_up_for_it() -> None:
    queue = WaitingQueue(10_000)
    old, urgent = waiting("a", 1, 0.0), waiting("a", 2, 2.5 * AGING_S, priority=1)
    queue.push(old)
    queue.push(urgent)
    assert queue.first(2.6 * AGING_S) is old, "it has waited for more than a level"
    queue.push(younger := waiting("b", 3, 2.5 * AGING_S))
    queue.remove(old)
    assert queue.first(2.6 * AGING_S) is urgent and younger in list(queue)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.integers(-2, 2)), max_size=30), st.randoms())
def test_counts_stay_true_under_pushes_and_removals(arrivals: list[tuple[str, int, int]], draw: object) -> None:
    queue = WaitingQueue(10_000)
    held = [
        waiting(tenant, arrival, float(arrival), num_tokens, priority) for arrival, (tenant, num_tokens, priority) in enumerate(arrivals)
    ]
    for one in held:
        queue.push(one)
        queue.check_integrity()
    for one in held[::2]:
        queue.remove(one)
        queue.check_integrity()
    while queue.first(100.0):
        serve(queue, 100.0)
        queue.check_integrity()
    assert len(queue) == queue.num_tokens == queue.num_uncached_tokens == 0


def test_a_newcomer_waits_for_its_fair_share_of_the_others() -> None:
    queue = WaitingQueue(10_000)
    for arrival in range(100):
        queue.push(waiting("greedy", arrival))
    assert queue.tokens_before("greedy", 10) == 1000
    assert queue.tokens_before("modest", 10) == 10


def test_the_drain_rate_counts_only_while_something_waits() -> None:
    rate = DrainRate()
    rate.note(0.0, 100, is_backlogged=True)
    rate.note(1.0, 500, is_backlogged=True)
    assert rate.tokens_per_s == pytest.approx(500.0)
    rate.note(2.0, 500, is_backlogged=False)
    rate.note(60.0, 10, is_backlogged=True)
    assert rate.tokens_per_s == pytest.approx(500.0), "the idle minute does not count"
