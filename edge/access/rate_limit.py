"""Token buckets per tenant: shared by all edges in Redis, and each edge's own while Redis is away.

A bucket holds `capacity` and gets `rate_per_s` back each second. A call takes from all of its buckets or from none. Of tokens a call takes
what it may use and gives back what it did not; what it used beyond that the bucket owes, and nobody takes from it until it is paid.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from redis.exceptions import RedisError

from edge.access.caller import Bucket, Limits, Standing
from services.errors import TABLE, PermissionDenied, RateLimited, Unauthenticated
from services.metrics import MetricSet
from services.telemetry import get_logger

REDIS_TIMEOUT_S = 0.25
REDIS_RETRY_S = 1.0  # how long nothing is asked of a Redis that failed
MAX_LOCAL_BUCKETS = 100_000
BUCKETS = (  # a field of Limits, what it counts, per what, in seconds
    ("requests_per_second", "requests", "second", 1),
    ("requests_per_minute", "requests", "minute", 60),
    ("tokens_per_minute", "tokens", "minute", 60),
    ("tokens_per_day", "tokens", "day", 86_400),
)
log = get_logger(__name__)

# KEYS: buckets. ARGV: "1" to take whatever is left, then rate, capacity and cost of each. The clock is Redis's own, the same for all edges.
TAKE = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1000000
local levels, wait = {}, 0
for i, key in ipairs(KEYS) do
  local rate, capacity, cost = tonumber(ARGV[3 * i - 1]), tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1])
  local held = redis.call('HMGET', key, 'level', 'at')
  local level = tonumber(held[1]) or capacity
  levels[i] = math.min(capacity, level + math.max(0, now - (tonumber(held[2]) or now)) * rate)
  if levels[i] < cost then wait = math.max(wait, (cost - levels[i]) / rate) end
end
local taken = wait == 0 or ARGV[1] == '1'
local answer = {taken and 1 or 0, tostring(wait)}
for i, key in ipairs(KEYS) do
  local rate, capacity, cost = tonumber(ARGV[3 * i - 1]), tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1])
  if taken then
    levels[i] = math.min(capacity, levels[i] - cost)
    redis.call('HSET', key, 'level', tostring(levels[i]), 'at', tostring(now))
    redis.call('PEXPIRE', key, math.ceil((capacity - levels[i]) / rate * 1000) + 1000)
  end
  answer[i + 2] = tostring(levels[i])
end
return answer
"""


class Share(NamedTuple):
    """What a call takes of one bucket; less than nothing gives back."""

    bucket: Bucket
    cost: float


class Taken(NamedTuple):
    """`wait_s` 0: the shares were taken. `levels` are parallel to them."""

    wait_s: float
    levels: tuple[float, ...]


class Buckets(Protocol):
    async def take(self, owner: str, shares: Sequence[Share], is_forced: bool) -> Taken: ...


class LocalBuckets:
    """This edge's own. Those that were not used for longest go first where there are too many: they are the fullest."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: OrderedDict[tuple[str, str, str], tuple[float, float]] = OrderedDict()  # level and when it was that

    async def take(self, owner: str, shares: Sequence[Share], is_forced: bool) -> Taken:
        now = self._clock()
        levels = [self._level(owner, share.bucket, now) for share in shares]
        wait_s = max(
            ((share.cost - level) / share.bucket.rate_per_s for share, level in zip(shares, levels, strict=True) if level < share.cost),
            default=0.0,
        )
        if wait_s and not is_forced:
            return Taken(wait_s, tuple(levels))
        for at, (bucket, cost) in enumerate(shares):
            levels[at] = min(bucket.capacity, levels[at] - cost)
            self._held[owner, bucket.kind, bucket.span] = levels[at], now
            self._held.move_to_end((owner, bucket.kind, bucket.span))
        while len(self._held) > MAX_LOCAL_BUCKETS:
            self._held.popitem(last=False)
        return Taken(0.0, tuple(levels))

    def _level(self, owner: str, bucket: Bucket, now: float) -> float:
        level, at = self._held.get((owner, bucket.kind, bucket.span), (bucket.capacity, now))
        return min(bucket.capacity, level + (now - at) * bucket.rate_per_s)


class RedisBuckets:
    """Raises RedisError or OSError when Redis does not answer in time."""

    def __init__(self, client: Redis, prefix: str) -> None:
        self._take = client.register_script(TAKE)
        self._prefix = prefix

    async def take(self, owner: str, shares: Sequence[Share], is_forced: bool) -> Taken:
        # The braces put one owner's buckets onto one node of a Redis cluster.
        keys = [f"{self._prefix}:limit:{{{owner}}}:{share.bucket.kind}:{share.bucket.span}" for share in shares]
        numbers = [number for share in shares for number in (share.bucket.rate_per_s, share.bucket.capacity, share.cost)]
        async with asyncio.timeout(REDIS_TIMEOUT_S):
            taken, wait_s, *levels = await self._take(keys=keys, args=["1" if is_forced else "0", *map(repr, map(float, numbers))])
        return Taken(0.0 if taken else float(wait_s), tuple(map(float, levels)))


class LimitMetrics(MetricSet):
    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__("edge", registry)
        self.shared = self.gauge("rate_limits_shared", "1 while limits are counted over all edges, 0 while this edge counts alone")
        self.local_takes = self.counter("rate_limit_local_takes", "Takes that this edge counted alone because Redis was away")
        self.refused = self.counter("rate_limited", "Calls refused by a limit", "kind", "span")
        self.denied = self.counter("access_denied", "Calls refused before any limit, by error code", "code")
        for _, kind, span, _ in BUCKETS:
            self.refused.labels(kind, span)  # from 0 on, so that a rate sees the first one
        for error in (Unauthenticated, PermissionDenied):
            self.denied.labels(TABLE[error].code)


class RateLimiter:
    """Every tenant's buckets. Falls back to this edge's own within REDIS_TIMEOUT_S, and asks Redis again every REDIS_RETRY_S."""

    def __init__(
        self, metrics: LimitMetrics, defaults: Limits, shared: Buckets | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._defaults = defaults
        self._shared = shared
        self._local = LocalBuckets(clock)
        self._clock = clock
        self._retry_at = float("-inf")  # while Redis is away: when to ask it again
        self._is_shared = shared is not None
        metrics.shared.set(self._is_shared)

    async def take(self, owner: str, limits: Limits, *, requests: float = 0, tokens: float = 0) -> list[Standing]:
        """Takes from every bucket that limits the owner, or raises RateLimited."""
        shares = self._share(limits, requests, tokens)
        if not shares:
            return []
        taken = await self._ask(owner, shares)
        if taken.wait_s:
            self._refuse(shares, taken)
        return [Standing(share.bucket, level) for share, level in zip(shares, taken.levels, strict=True)]

    async def settle(self, owner: str, limits: Limits, *, taken: float, used: float) -> None:
        """The end of a call that took `taken` tokens: what it did not use comes back, and what it used beyond is owed."""
        if shares := [Share(share.bucket, used - share.cost) for share in self._share(limits, 0, taken)]:
            await self._ask(owner, shares, is_forced=True)

    def _share(self, limits: Limits, requests: float, tokens: float) -> list[Share]:
        """A call that may use more tokens than a bucket holds takes all that it holds."""
        found = []
        for field, kind, span, span_s in BUCKETS:
            own: float | None = getattr(limits, field)
            limit = getattr(self._defaults, field) if own is None else own
            cost = requests if kind == "requests" else tokens
            if limit and cost:
                capacity = max(1.0, limit)
                found.append(Share(Bucket(kind, span, capacity, limit / span_s), min(cost, capacity)))
        return found

    async def _ask(self, owner: str, shares: Sequence[Share], is_forced: bool = False) -> Taken:
        if self._shared is None:
            return await self._local.take(owner, shares, is_forced)
        if self._clock() >= (retry_at := self._retry_at):
            try:
                taken = await self._shared.take(owner, shares, is_forced)
            except (RedisError, OSError) as error:  # a time-out is an OSError
                self._retry_at = self._clock() + REDIS_RETRY_S
                self._note(False, f"{type(error).__name__}: {error}")
            else:
                if retry_at == self._retry_at:  # else another ask has failed since this one was sent
                    self._note(True)
                return taken
        self._metrics.local_takes.inc()
        return await self._local.take(owner, shares, is_forced)

    def _note(self, is_shared: bool, reason: str = "") -> None:
        if is_shared != self._is_shared:
            self._is_shared = is_shared
            self._metrics.shared.set(is_shared)
            if is_shared:
                log.info("rate_limits_shared_again")
            else:
                log.warning("rate_limits_local", reason=reason)

    def _refuse(self, shares: Sequence[Share], taken: Taken) -> None:
        short = [(share, level) for share, level in zip(shares, taken.levels, strict=True) if level < share.cost]
        (bucket, _), _ = max(short, key=lambda one: (one[0].cost - one[1]) / one[0].bucket.rate_per_s)
        self._metrics.refused.labels(bucket.kind, bucket.span).inc()
        raise RateLimited(
            f"the limit of {bucket.capacity:g} {bucket.kind} per {bucket.span} is reached; try again in {taken.wait_s:.1f} s",
            retry_after_s=taken.wait_s,
        )
