"""Placement: each term says what it should, and the quick choice is the first of the full ranking."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from scheduler.batching import Batcher
from scheduler.placement import Candidate, choose, rank
from scheduler.prefix_cache import PrefixIndex
from scheduler.rates import GroupRates
from scheduler.sequence import GroupLimits, Request, StepResult
from scheduler.simulation.step_time import GPT_OSS_120B_H200, StepShape
from scheduler.simulation.workloads import END_TOKEN_ID, Writer

LIMITS = GroupLimits(16, 200, 0, 0, 4096, 512, max_num_seqs=8, eos_token_ids=frozenset({END_TOKEN_ID}))
TOKENS_PER_S = 1000.0


class Groups:
    """Batchers over one index, and steps that take as long as their prompt tokens say."""

    def __init__(self, *names: str, limits: GroupLimits = LIMITS) -> None:
        self.index, self.writer, self.now = PrefixIndex(), Writer(), 0.0
        self.batchers = {name: Batcher(limits, max_queued_tokens=3000, index=self.index, group_id=name) for name in names}

    def request(self, num_tokens: int = 320, prefix: range = range(0), num_answer_tokens: int = 1, **fields: object) -> Request:
        return self.writer.request("t", [*prefix, *self.writer.fresh(num_tokens)], self.writer.answer(num_answer_tokens), **fields)

    def compute(self, name: str, request: Request, num_steps: int = 100) -> None:
        """Runs the request there, to its end or as far as so many steps go."""
        batcher = self.batchers[name]
        batcher.add(request, self.now)
        while num_steps and (plan := batcher.plan(self.now)):
            num_steps -= 1
            step = batcher.in_flight[-1]
            seconds = step.num_prefill_tokens / TOKENS_PER_S or 0.001
            self.now += seconds
            batcher.apply(StepResult(plan.step, step.drawing, [END_TOKEN_ID] * len(step.drawing), device_time_s=seconds), self.now)

    def measure(self) -> None:
        for name in self.batchers:
            self.compute(name, self.request())

    def rank(self, request: Request) -> dict[str, Candidate]:
        """In order; and the quick choice is the first."""
        ranked = rank(request, self.batchers, self.index, self.now)
        assert choose(request, self.batchers, self.index, self.now) == next(iter(ranked), None)
        return {one.group_id: one for one in ranked}


def roofline_step_s(num_sequences: int) -> float:
    return GPT_OSS_120B_H200(StepShape(0, num_sequences, 1024 * num_sequences))


def first(candidates: dict[str, Candidate]) -> str:
    return next(iter(candidates))


def test_equal_groups_go_by_name_and_no_group_gives_none() -> None:
    groups = Groups("b", "a")
    assert list(groups.rank(groups.request())) == ["a", "b"]
    assert Groups().rank(groups.request()) == {}


def test_terms_are_seconds_at_the_measured_rate() -> None:
    groups = Groups("a", "b")
    groups.measure()
    groups.batchers["a"].add(groups.request(480), groups.now)
    found = groups.rank(groups.request(320))
    assert first(found) == "b"
    assert found["a"].queue_s == pytest.approx(0.48) and found["a"].prefill_s == found["b"].prefill_s == pytest.approx(0.32)
    assert found["a"].cost_s == pytest.approx(sum(found["a"][1:6]))


def test_what_is_under_way_counts_until_it_is_done() -> None:
    groups = Groups("a")
    groups.measure()
    groups.batchers["a"].add(groups.request(480), groups.now)
    assert groups.batchers["a"].plan(groups.now)
    assert groups.rank(groups.request())["a"].queue_s == pytest.approx(0.48)
    groups.now += 0.4
    assert groups.rank(groups.request())["a"].queue_s == pytest.approx(0.08)
    groups.now += 0.4
    assert groups.rank(groups.request())["a"].queue_s == 0.0


def test_a_cached_prefix_draws_its_next_request_over_a_short_queue_but_not_over_a_long_one() -> None:
    groups = Groups("a", "b")
    groups.measure()
    prefix = groups.writer.fresh(480)
    groups.compute("b", groups.request(64, prefix))
    assert first(found := groups.rank(groups.request(64, prefix))) == "b"
    assert found["b"].num_cached_tokens == 480 and found["b"].prefill_s == pytest.approx(0.064) and found["a"].num_cached_tokens == 0
    groups.batchers["b"].add(groups.request(800), groups.now)
    assert first(groups.rank(groups.request(64, prefix))) == "b", "computing the prefix again would cost the next ones as much"
    groups.batchers["b"].add(groups.request(800), groups.now)
    assert first(groups.rank(groups.request(64, prefix))) == "a", "one hot prefix buries no group"


def test_a_prefix_counts_from_the_moment_it_is_routed() -> None:
    groups = Groups("a", "b")
    groups.measure()
    prefix = groups.writer.fresh(480)
    groups.batchers["b"].add(groups.request(16, prefix), groups.now)
    found = groups.rank(groups.request(16, prefix))
    assert found["b"].num_cached_tokens == 480 and first(found) == "b"


def test_a_group_that_would_lose_what_is_of_use_costs_more() -> None:
    groups = Groups("a", "b")
    groups.measure()
    for _ in range(6):
        prefix = groups.writer.fresh(480)
        for _ in range(2):
            groups.compute("a", groups.request(16, prefix))
        groups.compute("b", groups.request(480))
    found = groups.rank(groups.request(480))
    assert found["a"].eviction_s > 0.0 and found["b"].eviction_s == 0.0, "b has as much cached, and nobody came back for it"
    assert first(found) == "b"


@pytest.mark.parametrize(("step_s", "expected"), [(roofline_step_s, "many"), (lambda size: 0.002 * size, "few")], ids=["concave", "linear"])
def test_a_concave_decode_curve_packs_and_a_straight_one_spreads(step_s: Callable[[int], float], expected: str) -> None:
    groups = Groups("few", "many", limits=replace(LIMITS, num_full_blocks=1000, max_num_seqs=128))
    groups.measure()
    for name, num_running in (("few", 24), ("many", 112)):
        batcher = groups.batchers[name]
        for _ in range(num_running):
            batcher.add(groups.request(16, max_tokens=100, ignore_eos=True), groups.now)
        while batcher.num_waiting and (plan := batcher.plan(groups.now)):
            drawing = batcher.in_flight[-1].drawing
            batcher.apply(StepResult(plan.step, drawing, [1] * len(drawing), device_time_s=0.1), groups.now)
        assert batcher.num_running == num_running and not batcher.in_flight
        batcher.rates = GroupRates()
        batcher.rates.learn_completion(200)
        for size in (1, 2, 4, 8, 16, 32, 64, 128):
            batcher.rates.decode.add(size, step_s(size))
    assert first(groups.rank(groups.request(16))) == expected


def test_a_group_that_has_measured_nothing_is_taken_for_its_peers_equal() -> None:
    groups = Groups("a", "new")
    groups.compute("a", groups.request())
    found = groups.rank(groups.request(320))
    assert found["new"].prefill_s == pytest.approx(found["a"].prefill_s)


def test_what_does_not_fit_is_excluded_with_its_reason_and_comes_last() -> None:
    groups = Groups("a", "full", "small")
    groups.batchers["small"] = Batcher(replace(LIMITS, max_model_len=100), max_queued_tokens=3000, index=groups.index, group_id="small")
    groups.batchers["full"].add(groups.request(3000), 0.0)
    found = groups.rank(groups.request(320))
    assert first(found) == "a" and "queue is full" in found["full"].excluded and "100 tokens" in found["small"].excluded
    groups.batchers["a"].add(groups.request(2900), 0.0)
    assert first(groups.rank(groups.request(320))) == "a" and groups.rank(groups.request(320))["a"].excluded


@pytest.mark.parametrize("seed", range(20))
def test_the_quick_choice_is_the_first_of_the_ranking_whatever_the_groups_do(seed: int) -> None:
    draw = random.Random(seed)
    groups = Groups(*(f"g{number}" for number in range(6)))
    prefixes = [groups.writer.fresh(16 * draw.randint(1, 30)) for _ in range(4)]
    for _ in range(30):
        request = groups.request(draw.randint(1, 200), draw.choice(prefixes), max_tokens=draw.randint(1, 20))
        found = groups.rank(request)
        name = draw.choice([first(found), *groups.batchers])
        if not found[name].excluded:
            groups.compute(name, request, draw.choice([0, 1, 2, 100]))
        groups.now += draw.choice([0.0, 0.1])
        groups.batchers[name].check_integrity()
