"""Buckets take all or nothing, owe what was used beyond, and count on while Redis is away: against a real one that is killed."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from edge.access import rate_limit
from edge.access.caller import Admission, Bucket, Caller, Limits, Standing
from edge.access.rate_limit import REDIS_RETRY_S, Buckets, LimitMetrics, LocalBuckets, RateLimiter, RedisBuckets, Share, Taken
from services.errors import RateLimited
from tests.edge.scripted_scheduler import PATIENCE_S
from tests.fakes.redis_server import RedisServer, redis_server

OWN = Limits()
SLOW = Bucket("requests", "minute", 3, 3 / 86_400)  # nothing of note comes back while a test runs
WIDE = Bucket("tokens", "day", 100, 100 / 864_000)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limiter(clock: Clock, shared: Buckets | None = None, **limits: float) -> tuple[RateLimiter, CollectorRegistry]:
    registry = CollectorRegistry()
    return RateLimiter(LimitMetrics(registry), Limits(**limits), shared, clock), registry  # type: ignore[arg-type]  # whole where they must be


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no Redis that went away."""
    monkeypatch.setattr(rate_limit, "REDIS_TIMEOUT_S", PATIENCE_S)


def dialled(server: RedisServer) -> Redis:
    return Redis.from_url(server.url, socket_timeout=PATIENCE_S, socket_connect_timeout=PATIENCE_S)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(f"ossia_edge_{name}", labels) or 0.0


async def walk(buckets: Buckets) -> list[tuple[bool, tuple[int, ...]]]:
    """One path through takes, refusals, debts and gifts: whether each was taken, and the levels after it, rounded."""
    steps = [
        ([Share(SLOW, 1), Share(WIDE, 60)], False),
        ([Share(SLOW, 1), Share(WIDE, 60)], False),  # refused for the tokens: no request is taken either
        ([Share(SLOW, 2)], False),
        ([Share(SLOW, 1)], False),
        ([Share(WIDE, 50)], True),  # owes
        ([Share(WIDE, 1)], False),
        ([Share(WIDE, -500)], True),  # never more than it holds
        ([Share(SLOW, -1), Share(WIDE, 100)], False),
    ]
    found = []
    for shares, is_forced in steps:
        taken = await buckets.take("acme", shares, is_forced)
        found.append((not taken.wait_s, tuple(round(level) for level in taken.levels)))
    return found


WALKED = [
    (True, (2, 40)),
    (False, (2, 40)),
    (True, (0,)),
    (False, (0,)),
    (True, (-10,)),
    (False, (-10,)),
    (True, (100,)),
    (True, (1, 0)),
]


async def test_local_and_shared_buckets_are_the_same(tmp_path: Path, patience: None) -> None:
    assert await walk(LocalBuckets(Clock())) == WALKED
    async with redis_server(tmp_path) as server, dialled(server) as client:
        assert await walk(RedisBuckets(client, "test")) == WALKED
        assert await client.ttl("test:limit:{acme}:requests:minute") > 0


async def test_what_was_used_comes_back_with_time() -> None:
    clock = Clock()
    limits, _ = limiter(clock, requests_per_minute=2, requests_per_second=1)
    await limits.take("a", OWN, requests=1)
    with pytest.raises(RateLimited, match=r"1 requests per second") as refused:
        await limits.take("a", OWN, requests=1)
    assert refused.value.retry_after_s == pytest.approx(1.0)
    clock.now += 1
    await limits.take("a", OWN, requests=1)
    clock.now += 1
    with pytest.raises(RateLimited, match=r"2 requests per minute") as refused:
        await limits.take("a", OWN, requests=1)
    assert refused.value.retry_after_s == pytest.approx(28.0)
    await limits.take("b", OWN, requests=1)  # another tenant has buckets of its own


async def test_reserved_tokens_are_settled_with_those_used() -> None:
    limits, registry = limiter(Clock(), tokens_per_minute=1000)
    (held,) = await limits.take("a", OWN, tokens=800)
    assert held.level == 200 and held.reset_s == pytest.approx(48.0)
    await limits.settle("a", OWN, taken=800, used=100)
    await limits.take("a", OWN, tokens=900)
    with pytest.raises(RateLimited, match="1000 tokens per minute"):
        await limits.take("a", OWN, tokens=1)
    assert value(registry, "rate_limited_total", kind="tokens", span="minute") == 1
    assert len(await limits.take("b", OWN, tokens=50_000)) == 1  # more than a bucket ever holds: all of it, and the rest is owed
    await limits.settle("b", OWN, taken=50_000, used=2000)
    with pytest.raises(RateLimited) as refused:
        await limits.take("b", OWN, tokens=1)
    assert refused.value.retry_after_s == pytest.approx(60.06)
    await limits.take("c", OWN, tokens=50_000)
    await limits.settle("c", OWN, taken=50_000, used=900)
    (left,) = await limits.take("c", OWN, tokens=1)
    assert left.level == 99  # what it used stays used


async def test_a_keys_own_limits_stand_before_the_deployments() -> None:
    limits, _ = limiter(Clock(), requests_per_minute=1)
    for _ in range(5):
        await limits.take("a", Limits(requests_per_minute=5), requests=1)
    assert await limits.take("a", Limits(requests_per_minute=0), requests=1) == []


def test_headers_name_the_bucket_with_the_least_left() -> None:
    admission = Admission(Caller("key:1", "acme", frozenset()), "127.0.0.1")
    admission.note([Standing(SLOW, 2.0), Standing(Bucket("requests", "second", 10, 10), 1.5), Standing(WIDE, 40.0)])
    assert dict(admission.headers()) == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "0.850s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "40",
        "x-ratelimit-reset-tokens": "518400.000s",
    }


async def test_two_edges_share_limits_and_each_counts_alone_while_redis_is_away(tmp_path: Path, patience: None) -> None:
    clock, limits = Clock(), {"tokens_per_day": 4}  # Redis goes by its own clock: nothing comes back while the test runs

    async def count_taken(edges: list[RateLimiter], tenant: str) -> int:
        taken = 0
        for edge in edges * 6:
            try:
                await edge.take(tenant, OWN, tokens=1)
                taken += 1
            except RateLimited:
                continue
        return taken

    async with redis_server(tmp_path) as server, dialled(server) as one, dialled(server) as two:
        made = [limiter(clock, RedisBuckets(client, "test"), **limits) for client in (one, two)]
        edges = [edge for edge, _ in made]
        assert await count_taken(edges, "a") == 4  # over both
        await server.kill()
        assert await count_taken(edges, "b") == 8  # each for itself
        assert [value(registry, "rate_limits_shared") for _, registry in made] == [0, 0]
        assert all(value(registry, "rate_limit_local_takes_total") == 6 for _, registry in made)
        await server.start()
        clock.now += REDIS_RETRY_S
        assert await count_taken(edges, "c") == 4
        assert [value(registry, "rate_limits_shared") for _, registry in made] == [1, 1]


async def test_a_redis_that_fails_is_asked_again_once_a_second() -> None:
    calls = 0

    class Failing:
        async def take(self, owner: str, shares: object, is_forced: bool) -> None:
            nonlocal calls
            calls += 1
            raise TimeoutError

    clock = Clock()
    limits, _ = limiter(clock, Failing(), requests_per_minute=100)  # type: ignore[arg-type]  # it only fails
    await asyncio.gather(*(limits.take("a", OWN, requests=1) for _ in range(20)))
    assert calls == 1
    clock.now += REDIS_RETRY_S
    await limits.take("a", OWN, requests=1)
    assert calls == 2


async def test_an_answer_from_before_a_failure_does_not_end_it() -> None:
    late, calls = asyncio.Event(), 0

    class Failing(LocalBuckets):
        async def take(self, owner: str, shares: Sequence[Share], is_forced: bool) -> Taken:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise TimeoutError
            await late.wait()
            return await super().take(owner, shares, is_forced)

    clock = Clock()
    limits, registry = limiter(clock, Failing(), requests_per_minute=100)
    first = asyncio.create_task(limits.take("a", OWN, requests=1))
    await asyncio.sleep(0)
    await limits.take("a", OWN, requests=1)
    late.set()
    await first
    assert calls == 2 and value(registry, "rate_limits_shared") == 0
    clock.now += REDIS_RETRY_S
    await limits.take("a", OWN, requests=1)
    assert value(registry, "rate_limits_shared") == 1
